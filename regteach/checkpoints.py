"""Trained weights as files: safetensors with a card that says what they are.

A checkpoint is one ``.safetensors`` file. Its header holds the kind of model, its configuration, the recommended
refinement and the card (recipe, data and split, seed, figures, hardware, time), as JSON; its tensors are the weights,
in half precision. Reading one runs no code that is in it.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from regteach.grid import Grid
from regteach.names import first_line, nearest
from regteach.nets.blocks import as_tuples, fast_layout
from regteach.nets.georeg import GeoReg, GeoRegConfig
from regteach.nets.istn import ISTN, ISTNConfig
from regteach.nets.kernel import KernelConfig, LearnedKernel
from regteach.nets.keypoint_kernel import KeypointKernel, KeypointKernelConfig
from regteach.nets.voxelmorph import VoxelMorph, VoxelMorphConfig
from regteach.refinement import Refinement
from regteach.training import write_whole

FORMAT = "regteach-1"
SUFFIX = ".safetensors"
WEIGHTS = Path(__file__).parent / "weights"  # those that ship with the package
# Kind of model: its class, and how its configuration comes back from JSON.
KINDS: dict[str, tuple[type[nn.Module], Callable[[dict[str, Any]], Any]]] = {
    "istn": (ISTN, ISTNConfig.from_dict),
    "georeg": (GeoReg, GeoRegConfig.from_dict),
    "voxelmorph": (VoxelMorph, VoxelMorphConfig.from_dict),
    "kernel": (LearnedKernel, KernelConfig.from_dict),
    "keypoint_kernel": (KeypointKernel, KeypointKernelConfig.from_dict),
}
Config = (
    ISTNConfig | GeoRegConfig | VoxelMorphConfig | KeypointKernelConfig
)  # of networks that take two images on a grid
AnyConfig = Config | KernelConfig


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network and what is known about it.

    Args:
        name: of the weights.
        network: takes moving, fixed, grid; or, without images, keypoints (``network.reconstruct``); in evaluation mode.
        refinement: recommended at test time.
        card: recipe, data, split, seed, figures, hardware, time: whatever its maker wrote down.
    """

    name: str
    network: Any = field(repr=False)
    refinement: Refinement = Refinement()
    card: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def grid(self) -> Grid:
        """The grid that images are brought to.

        Raises:
            ValueError: if the network takes no images.
        """
        if not hasattr(self.network.config, "grid"):
            raise ValueError(
                f"{self.name} works on keypoints and has no grid: it registers no images, but its network.reconstruct "
                "turns displacements at keypoints into those at any points."
            )
        grid: Grid = self.network.config.grid
        return grid

    @property
    def dim(self) -> int:
        """2 or 3 axes."""
        config = self.network.config
        return config.dim if isinstance(config, KernelConfig) else self.grid.dim

    def to(self, device: torch.device | str) -> "Model":
        """The same on another device: the network itself is moved there."""
        self.network.to(device)
        return self


def network(config: AnyConfig) -> nn.Module:
    """An untrained network of any kind."""
    if isinstance(config, ISTNConfig):
        return ISTN(config)
    if isinstance(config, KernelConfig):
        return LearnedKernel(config)
    if isinstance(config, KeypointKernelConfig):
        return KeypointKernel(config)
    return GeoReg(config) if isinstance(config, GeoRegConfig) else VoxelMorph(config)


def save_model(path: Path, model: Model) -> Path:
    """Write a checkpoint; the file appears whole or not at all.

    Raises:
        ValueError: if the path does not end in .safetensors or can not be written, the network is of no known kind, or
            a weight is not finite in half precision.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"A checkpoint ends in {SUFFIX}, not as {path.name!r}.")
    kinds = [kind for kind, (network_class, _) in KINDS.items() if type(model.network) is network_class]
    if not kinds:
        raise ValueError(f"Checkpoints hold {', '.join(KINDS)}, not a {type(model.network).__name__}.")
    header = {
        "format": FORMAT,
        "kind": kinds[0],
        "name": model.name,
        "config": json.dumps(asdict(model.network.config)),
        "refinement": json.dumps(asdict(model.refinement)),
        "card": json.dumps(model.card),
    }
    weights = {name: t.detach().cpu().half().contiguous() for name, t in model.network.state_dict().items()}
    _check_finite(weights, f"The network of {model.name}")
    try:
        # As bytes: what safetensors writes itself, nobody but its owner may read.
        data = save(weights, header)
        write_whole(path, lambda temporary: temporary.write_bytes(data))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The checkpoint {path} can not be written ({_reason(error)}).") from None
    return path


def find_device(device: torch.device | str) -> torch.device:
    """A device by name, "auto" for a GPU where there is one; a ValueError if there is no such device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:  # by a tensor, whose device has a number where there may be several
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).replace(". ", "; ")
        raise ValueError(f"There is no device {str(device)!r} to compute on ({reason}).") from None


def load(name: str | PathLike[str], device: torch.device | str = "cpu") -> Model:
    """A model that ships with the package, by name, or one from a file.

    Args:
        name: as :func:`available` lists it, or the path of a ``.safetensors`` file.
        device: where to put it; "auto" takes a GPU where there is one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown name (with the nearest one), a file that is damaged, of another version, or not
            ours, or a device that is not there.
    """
    if not isinstance(name, str | PathLike):
        raise ValueError(f"A model has a name or is a file, but {name!r} is neither.")
    path, device = Path(name), find_device(device)
    if path.suffix == SUFFIX:
        if not path.exists():
            raise FileNotFoundError(f"There is no checkpoint {path}.")
        return _read(path).to(device)
    ours = available()
    if str(name) not in ours:
        if path.is_file():
            raise ValueError(f"A checkpoint ends in {SUFFIX}, not as {path.name!r}.")
        near = f"; the nearest is {nearest(str(name), ours)!r} (of {', '.join(ours)})" if ours else ""
        hint = near or ": no weights ship with this version"
        raise ValueError(f"There is no model {str(name)!r}{hint}.")
    return _read(WEIGHTS / f"{name}{SUFFIX}").to(device)


def available() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.stem for path in WEIGHTS.glob(f"*{SUFFIX}"))


def _read(path: Path) -> Model:
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path.name} is truncated or no safetensors file ({_reason(error)}).") from None
    given = header.get("format", "")
    if not given.startswith(FORMAT.split("-")[0]):
        raise ValueError(f"{path.name} is a safetensors file, but not one of regteach.")
    if given != FORMAT:
        raise ValueError(f"{path.name} has the format {given}, and this version reads {FORMAT}.")
    try:
        network_class, from_dict = KINDS[header["kind"]]
        built = network_class(from_dict(json.loads(header["config"])))
        built.load_state_dict(weights)
        refinement, card = Refinement(**as_tuples(json.loads(header["refinement"]))), json.loads(header["card"])
        model = Model(header["name"], built.eval().requires_grad_(False), refinement, card)
        if not isinstance(card, dict) or not isinstance(card.get("recipe", {}), dict):
            raise ValueError("its card is no card")
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path.name} does not fit this version of the model ({_reason(error)}).") from None
    _check_finite(weights, path.name)
    fast_layout(built, model.dim)
    return model


def _check_finite(weights: dict[str, Tensor], name: str) -> None:
    wrong = [key for key, value in weights.items() if not bool(value.isfinite().all())]
    if wrong:
        raise ValueError(f"{name} has weights that are not finite ({', '.join(wrong[:3])}).")


def _reason(error: Exception) -> str:
    """What an error says, as part of a sentence: torch lists what does not fit below its first line."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[min(1, len(lines) - 1)].replace(". ", "; ")[:200]
