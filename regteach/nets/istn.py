"""Image-and-spatial transformer networks (ISTN).

An image transformer (ITN) maps each image to maps that show the structures of interest (SoI), and a spatial transformer
(STN) predicts, from the maps of both images, the transform that brings them together. Left without an ITN the model is
an ordinary registration network (STN-u, STN-s: they differ in the loss alone, see ``objectives.istn``).

    M' = ITN(M), F' = ITN(F);   T = STN(M', F'),  fixed points to moving points, mm

The STN works in stages, each on the maps that the stages before it have already aligned: affine (or rigid), then one
or more cubic B-splines. All last layers start at zero: maps start empty, and the untrained network is the identity. A
B-spline's coefficients stay, by default, below the bound under which it can not fold, so no transform of the default
network does.

Source: Lee, Oktay, Schuh, Schaap, Glocker, Image-and-Spatial Transformer Networks for Structure-Guided Image
Registration, MICCAI 2019, section 2; the public architecture as its code has it is :func:`public`. Ours differs in
stages, bounds in millimetres, normalisation, and a B-spline head that sees where it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regteach import bspline
from regteach.affine import AffineBounds
from regteach.grid import Grid
from regteach.nets.blocks import Encoder, UNet, as_tuples, check_pair, conv, zero_start
from regteach.result import Result, Step, assemble
from regteach.sampling import grid_points, sample, warp
from regteach.transforms import Dense, FreeForm, Transform

RIGID = AffineBounds(translation_mm=20.0, rotation_deg=45.0, scale_ratio=1.0, stretch_axes_deg=0.0, shear_ratio=0.0)


def _check_counts(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is a number of at least 1, not {getattr(config, name)}.")


def _check_widths(widths: tuple[int, ...]) -> None:
    if not widths or min(widths) < 1:
        raise ValueError(f"A network has channels at one level or more, but its widths are {widths}.")


@dataclass(frozen=True)
class AffineStage:
    """An affine step: a vector of the two maps, a hidden layer, and one number for each part that may move.

    Args:
        bounds: how far each part may go; a part whose bound is nothing (a ratio of 1, an angle of 0) has no number.
            ``RIGID`` makes a rigid step.
        widths: channels a level of its encoder.
        hidden: width of the hidden layer.
    """

    bounds: AffineBounds = AffineBounds(translation_mm=20.0, rotation_deg=45.0, scale_ratio=1.5, shear_ratio=0.3)
    widths: tuple[int, ...] = (16, 32, 32)
    hidden: int = 64

    def __post_init__(self) -> None:
        _check_counts(self, "hidden")
        _check_widths(self.widths)


@dataclass(frozen=True)
class SplineStage:
    """A free-form step: a map of control-point displacements.

    Args:
        control_mm: distance between control points.
        limit_mm: largest coefficient; left out, the largest with which the spline can not fold.
        widths: channels a level of its network, finest first.
    """

    control_mm: float = 8.0
    limit_mm: float | None = None
    widths: tuple[int, ...] = (16, 32, 32)

    def __post_init__(self) -> None:
        for name, value in (("control_mm", self.control_mm), ("limit_mm", self.limit_mm)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is a length above 0 mm, not {value}.")
        _check_widths(self.widths)


Stage = AffineStage | SplineStage


@dataclass(frozen=True)
class ISTNConfig:
    """Everything that fixes an ISTN but its weights.

    Args:
        grid: the grid that images are brought to; the affine turns about the centre of the one that a call names.
        stages: of the STN, coarse to fine.
        channels: of an image.
        structures: number of SoI channels.
        itn: channels a level of the ITN, finest first; empty for none (STN-u, STN-s).
        shrink: the STN sees the maps averaged over cubes of this many voxels; between stages it warps these.
        normalise: instance normalisation inside the networks.
        flat: the public STN: unpadded 5-wide convolutions, everything flattened, no normalisation.
    """

    grid: Grid
    stages: tuple[Stage, ...] = (AffineStage(),)
    channels: int = 1
    structures: int = 1
    itn: tuple[int, ...] = (16, 32, 64, 64)
    shrink: int = 1
    normalise: bool = True
    flat: bool = False

    def __post_init__(self) -> None:
        _check_counts(self, "channels", "structures", "shrink")
        if self.itn:
            _check_widths(self.itn)
        moves = [isinstance(s, SplineStage) or _moving_parts(s.bounds, self.grid.dim) for s in self.stages]
        if not moves or not all(moves):
            raise ValueError("An ISTN needs at least one stage, and every stage something that it may move.")
        if self.flat and self.shrink != 1:
            raise ValueError("The public network (flat) sees maps at full resolution: shrink is 1.")
        deepest = 2 ** (max(len(widths) for widths in (self.itn, *(s.widths for s in self.stages))) - 1)
        if self.normalise and max(n // self.shrink for n in self.grid.shape) <= deepest:
            raise ValueError(f"A grid of {self.grid.shape} voxels is too small for networks of these many levels.")

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "ISTNConfig":
        """Back from ``dataclasses.asdict`` (a checkpoint's header).

        Raises:
            ValueError: if a key is unknown, or one that has no default is missing.
        """
        try:
            stages = tuple(
                SplineStage(**as_tuples(stage))
                if "control_mm" in stage
                else AffineStage(**as_tuples(stage) | {"bounds": AffineBounds(**stage["bounds"])})
                for stage in values["stages"]
            )
            return ISTNConfig(**as_tuples(values) | {"grid": Grid(**as_tuples(values["grid"])), "stages": stages})
        except (KeyError, TypeError) as error:
            raise ValueError(f"This is no configuration of an ISTN ({error}).") from None


def public(grid: Grid, kind: str, structures: int = 1, itn: bool = True) -> ISTNConfig:
    """The architecture of the authors' public code, on a grid of 128 x 128 (2D) or 64 x 64 x 64 (3D) voxels.

    Parameters: ITN 5,031 (2D), 13,655 (3D); STN affine 164,142 (2D), 148,020 (3D); B-spline 2,090,506 (2D),
    4,563,219 (3D). Its bounds are theirs, in coordinates of -1 to 1 over the image: shift 0.1, scale exp(0.2), turns
    45 degrees, B-spline 0.2. Ours differs from it in that the identity is the identity, and the start,
    and in 3D in the order of the turns (theirs: about axes 2, 0, 2).

    Args:
        grid: working grid.
        kind: "affine" or "bspline".
        structures: SoI channels.
        itn: with an ITN or without.
    """
    half = [length / 2 for length in grid.extent]
    widths = (8, 16, 32)
    if kind == "affine":
        bounds = AffineBounds(translation_mm=0.1 * min(half), scale_ratio=2.718281828459045**0.2)
        stage: Stage = AffineStage(bounds, widths, hidden=32)
    elif kind == "bspline":
        # Their 10 voxels, stretched so that the control points are as many as theirs (15 of 128, 9 of 64 voxels).
        spans = [(n - 1) * h for n, h in zip(grid.shape, grid.spacing, strict=True)]
        stage = SplineStage(max(spans) / (max(grid.shape) // 10), 0.2 * min(half), widths)
    else:
        raise ValueError(f"The public code has the kinds affine and bspline, not {kind!r}.")
    return ISTNConfig(grid, (stage,), 1, structures, (4, 8, 16) if itn else (), 1, normalise=False, flat=True)


class ISTN(nn.Module):
    """The model. Nothing is kept between calls.

    Args:
        config: what it is made of.
    """

    def __init__(self, config: ISTNConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.grid.dim
        self.itn = UNet(dim, config.channels, config.structures, config.itn, config.normalise) if config.itn else None
        if self.itn is not None:
            # Maps start empty. Random ones are larger than any structure, and the STN learns first of all to move them
            # out of sight, from where (a saturated tanh) it does not come back: the implicit variant needs this.
            zero_start(self.itn.head[-1])
        maps = 2 * (config.structures if config.itn else config.channels)
        heads: dict[type, Any] = {
            AffineStage: _AffineHead,
            SplineStage: _FlatSplineHead if config.flat else _SplineHead,
        }
        self.stages = nn.ModuleList(
            heads[type(stage)](stage, config, maps, last=index == len(config.stages) - 1)
            for index, stage in enumerate(config.stages)
        )

    def forward(self, moving: Tensor, fixed: Tensor, grid: Grid) -> Result:
        """Register a batch of pairs.

        Args:
            moving: ``b c *grid`` in [0, 1].
            fixed: the same.
            grid: where both sit; its shape and spacing are those of the configuration.

        Raises:
            ValueError: if the grid's shape or spacing are others, or the images do not fit it.
        """
        self._check(moving, fixed, grid, self.config.channels)
        return replace(self.align(*self.features(moving, fixed), grid), images=(moving, fixed))

    def features(self, moving: Tensor, fixed: Tensor) -> tuple[Float[Tensor, "b k *grid"], Float[Tensor, "b k *grid"]]:
        """M' and F'; the images themselves where there is no ITN."""
        if self.itn is None:
            return moving, fixed
        both = self.itn(torch.cat([moving, fixed]))
        first, second = both.float().chunk(2)
        return first, second

    def align(self, moving: Float[Tensor, "b k *grid"], fixed: Float[Tensor, "b k *grid"], grid: Grid) -> Result:
        """The transform between two sets of maps: the STN alone."""
        self._check(moving, fixed, grid, self.config.structures if self.config.itn else self.config.channels)
        steps: list[Step] = []
        small, small_fixed = _shrunk(moving, self.config.shrink), _shrunk(fixed, self.config.shrink)
        small_grid, warped = grid.coarsened(self.config.shrink), small
        for head in self.stages:
            if steps:
                # Where the maps come to lie by now; the gradient through it is what trains the stages together.
                warped = warp(small, assemble(steps), small_grid)
            steps.append(_step(head, head(warped, small_fixed, grid).float(), grid))
        return Result(assemble(steps), (moving, fixed), tuple(steps))

    def _check(self, moving: Tensor, fixed: Tensor, grid: Grid, channels: int) -> None:
        want = self.config.grid
        spacings = zip(grid.spacing, want.spacing, strict=False)  # of another length only with another shape
        if grid.shape != want.shape or any(abs(a - b) > 1e-3 * b for a, b in spacings):
            raise ValueError(
                f"This network works on {want.shape} voxels of {want.spacing} mm, but the grid has {grid.shape} voxels "
                f"of {grid.spacing} mm; register brings images there."
            )
        check_pair(moving, fixed, channels, grid)


class _AffineHead(nn.Module):
    """Two sets of maps to the numbers of an affine transform."""

    slots: Tensor

    def __init__(self, stage: AffineStage, config: ISTNConfig, maps: int, last: bool) -> None:
        super().__init__()
        dim = config.grid.dim
        self.bounds, self.dim = stage.bounds, dim
        shape = [n // config.shrink for n in config.grid.shape]
        kernel = 5 if config.flat else 3
        self.encoder = Encoder(dim, maps, stage.widths, shape, kernel, not config.flat, config.normalise)
        moves = _moving_parts(stage.bounds, dim)
        self.register_buffer("slots", torch.tensor(moves), persistent=False)
        self.hidden = nn.Linear(self.encoder.length, stage.hidden)
        self.out = zero_start(nn.Linear(stage.hidden, len(moves)))

    def forward(self, moving: Tensor, fixed: Tensor, grid: Grid) -> Float[Tensor, "b p"]:
        vector = self.encoder(torch.cat([moving, fixed], 1))
        return self.out(F.relu(self.hidden(vector)))

    def build(self, z: Float[Tensor, "b p"], grid: Grid) -> Transform:
        every = z.new_zeros(len(z), sum(AffineBounds.counts(self.dim)))
        return self.bounds.parts(every.index_copy(1, self.slots, z), self.dim).about(grid.centre)


class _SplineHead(nn.Module):
    """Two sets of maps to control points, by a U-Net that stops at the resolution of the control points.

    Its output lies on a coarse grid of its own; each control point reads it where it is, in mm.
    """

    def __init__(self, stage: SplineStage, config: ISTNConfig, maps: int, last: bool) -> None:
        super().__init__()
        dim = config.grid.dim
        self.stage, self.shrink, self.last = stage, config.shrink, last
        voxel = max(config.grid.spacing) * config.shrink
        levels = len(stage.widths)
        # The coarsest level that is no coarser than the control points: what is finer would be read by nobody.
        self.level = min(levels - 1, max(0, int(torch.tensor(stage.control_mm / voxel).log2().floor())))
        self.unet = UNet(dim, maps, stage.widths[self.level], stage.widths, config.normalise, finest=self.level)
        self.out = zero_start(conv(dim, stage.widths[self.level], dim, kernel=1))

    def forward(self, moving: Tensor, fixed: Tensor, grid: Grid) -> Float[Tensor, "b *ctrl d"]:
        field = self.out(F.leaky_relu(self.unet(torch.cat([moving, fixed], 1)))).float()
        step = self.shrink * 2**self.level
        # The U-Net pads at the end, so its voxels stay 2^level of the input's apart, counted from the first.
        coarse = Grid(
            tuple(field.shape[2:]),
            tuple(h * step for h in grid.spacing),
            tuple(o + 0.5 * (step - 1) * h for o, h in zip(grid.origin, grid.spacing, strict=True)),
        )
        ctrl = bspline.control_grid(grid, self.stage.control_mm)
        points = grid_points(ctrl, field.device)[None]
        return sample(field, points, coarse).movedim(1, -1)

    def build(self, z: Float[Tensor, "b *ctrl d"], grid: Grid) -> Transform:
        return _spline(z, self.stage, grid, self.last)


class _FlatSplineHead(nn.Module):
    """The public code's: one linear layer from everything to all control points."""

    def __init__(self, stage: SplineStage, config: ISTNConfig, maps: int, last: bool) -> None:
        super().__init__()
        dim = config.grid.dim
        self.stage, self.last = stage, last
        shape = bspline.control_grid(config.grid, stage.control_mm).shape
        self.encoder = Encoder(
            dim, maps, stage.widths, config.grid.shape, kernel=5, padded=False, normalise=config.normalise
        )
        self.out = zero_start(nn.Linear(self.encoder.length, dim * torch.Size(shape).numel()))

    def forward(self, moving: Tensor, fixed: Tensor, grid: Grid) -> Float[Tensor, "b *ctrl d"]:
        ctrl = bspline.control_grid(grid, self.stage.control_mm)
        return self.out(self.encoder(torch.cat([moving, fixed], 1))).unflatten(1, (*ctrl.shape, grid.dim))

    def build(self, z: Float[Tensor, "b *ctrl d"], grid: Grid) -> Transform:
        return _spline(z, self.stage, grid, self.last)


def _spline(z: Float[Tensor, "b *ctrl d"], stage: SplineStage, grid: Grid, last: bool) -> Transform:
    """Bounded coefficients, c = limit * tanh(z), as a transform.

    A spline that is followed by others is tabulated on the voxels and read linearly between them: its own 4^d terms at
    every moved point would cost a hundred times as much, for a difference far below a tenth of a voxel.
    """
    ctrl = bspline.control_grid(grid, stage.control_mm)
    limit = [bspline.FOLD_FREE[grid.dim] * h for h in ctrl.spacing] if stage.limit_mm is None else stage.limit_mm
    spline = FreeForm(z.tanh() * torch.as_tensor(limit).to(z), ctrl)
    return spline if last else Dense(spline.displacement_on(grid), grid)


def _step(head: Any, z: Tensor, grid: Grid) -> Step:
    return Step(z, lambda parameters: head.build(parameters, grid))


def _moving_parts(bounds: AffineBounds, dim: int) -> list[int]:
    """Which of the numbers of an affine transform can move at all."""
    moves = (
        bounds.translation_mm > 0,
        bounds.rotation_deg > 0,
        bounds.scale_ratio > 1,
        bounds.scale_ratio > 1 and bounds.stretch_axes_deg > 0,
        bounds.shear_ratio > 0,
    )
    parts = [part for part, n in enumerate(AffineBounds.counts(dim)) for _ in range(n)]
    return [slot for slot, part in enumerate(parts) if moves[part]]


def _shrunk(maps: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return maps
    return {2: F.avg_pool2d, 3: F.avg_pool3d}[maps.ndim - 2](maps, factor)


def count_parameters(module: nn.Module | Sequence[nn.Module]) -> int:
    """Number of trained numbers."""
    modules = [module] if isinstance(module, nn.Module) else module
    return sum(p.numel() for m in modules for p in m.parameters())


def parameters_by_part(network: nn.Module) -> dict[str, int]:
    """Number of trained numbers in each part of a network, by its name; parts that have none are left out."""
    counts = {name: count_parameters(part) for name, part in network.named_children()}
    return {name: count for name, count in counts.items() if count}


__all__ = [
    "ISTN",
    "RIGID",
    "AffineStage",
    "ISTNConfig",
    "SplineStage",
    "Stage",
    "count_parameters",
    "parameters_by_part",
    "public",
]
