"""Forms of the keypoint model, each trained for a few steps on features that stay as they are.

The paper's ablation asks what the heads and the kernel are worth. So every form gets the same features, those of one
model; what makes a field of the matches (the kernel, or the smoothness of a spline) is trained from its start, each
form on the same items. A training is kept in a folder whose name holds a fingerprint of all that it depends on: one
that was killed goes on from its last validation (every 25 steps), and one that is finished is read. (A change of the
package's code is not noticed: delete the folder then.)
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables import mean
from benchmarks.thorax_pairs import Prepared
from regteach import objectives
from regteach.checkpoints import Model, network
from regteach.nets.kernel import KernelConfig
from regteach.nets.keypoint_kernel import MIND, ONE, KeypointKernelConfig
from regteach.recipes import find_recipe
from regteach.runs import line
from regteach.training import Settings, train

RECIPE = "kernel-thorax"
FULL, NO_FEATURES = "full", "no learned features"
# How a form differs from the full model, and what the paper says of it, mm.
FORMS: dict[str, tuple[dict[str, Any], float | None]] = {
    FULL: ({}, 1.72),
    "only semantics": ({"heads": ("semantics",)}, 1.79),
    "only geometry": ({"heads": ("geometry",)}, 2.00),
    "thin-plate spline": ({"reconstruction": "thin_plate"}, 2.23),
    "no bias": ({"bias": False}, None),
    "weighted mean, no plane": ({"degree": 0}, None),
    "affine part first": ({"affine": True}, None),
    NO_FEATURES: ({"features": 0}, None),
    "one scale": ({"scales": ONE}, None),
}


def changed(config: KeypointKernelConfig, **changes: Any) -> KeypointKernelConfig:
    """A configuration with changes of its own settings and of its kernel's."""
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("grid", "kernel")}
    kernel = {f.name: getattr(config.kernel, f.name) for f in fields(KernelConfig)}
    kept = {name: value for name, value in kernel.items() if name not in ("dim", "semantics")}
    return KeypointKernelConfig.of(config.grid, **(own | kept | changes))


class FieldTask:
    """Training of what makes a field of the matches, on features that stay as they are.

    Args:
        config: of the form.
        recipe: weights of the loss, and the numbers of keypoints and of landmarks of an item.
        settings: of the loop.
        pairs: for "train" and "validation".
    """

    def __init__(
        self, config: KeypointKernelConfig, recipe: Any, settings: Settings, pairs: Mapping[str, list[Prepared]]
    ) -> None:
        self.config, self.recipe, self.settings, self.pairs = config, recipe, settings, pairs

    def build(self) -> Any:
        """An untrained network; its U-Net is not used."""
        return network(self.config)

    def loss(self, model: Any, items: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """That of the recipe: see ``objectives.keypoints``."""
        each = [self._terms(model, number) for number in items]
        return {name: torch.stack([terms[name] for terms in each]) for name in each[0]}

    def validate(self, model: Any, device: torch.device) -> dict[str, float]:
        """Minus the mean error at the landmarks, mm."""
        return {"minus_tre_mm": -mean([one.tre(one.fields(model)[-1]) for one in self.pairs["validation"]])}

    def picture(self, model: Any, device: torch.device) -> bytes | None:
        """Nothing."""
        return None

    def _terms(self, model: Any, number: int) -> dict[str, Tensor]:
        recipe, every = self.recipe, self.pairs["train"]
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_000_007 + number)
        one = every[int(torch.randint(len(every), (), generator=generator))]
        pair, points = one.pair, one.keypoints
        some = torch.randperm(len(points), generator=generator)[: recipe.keypoints].to(points.device)
        chosen = torch.randperm(len(pair.marks_fixed), generator=generator)[: recipe.asked]
        marks = (pair.marks_fixed[chosen].to(points), pair.marks_moving[chosen].to(points))
        low, high = torch.tensor(pair.grid.origin), torch.tensor(pair.grid.last)
        sampled = (low + (high - low) * torch.rand(recipe.asked, pair.grid.dim, generator=generator)).to(points)
        count = MIND[pair.grid.dim] * self.config.channels
        described = (one.maps[0][:, :count], one.maps[1][:, :count])
        reads = [field.at for field in one.fields(model, some)]
        return objectives.keypoints(reads, marks, described, pair.grid, sampled, recipe.smooth, recipe.image)


def trained(form: str, model: Model, pairs: Mapping[str, list[Prepared]], steps: int, runs: Path) -> tuple[Any, float]:
    """A form after so many steps, and the seconds of the clock; taken up, or read, where it was trained before."""
    config, recipe = changed(model.network.config, **FORMS[form][0]), find_recipe(RECIPE)
    settings = Settings(
        steps=steps, batch=1, rate=3e-3, warmup=min(4, steps), decay=True, validate_every=min(25, steps)
    )
    weights = b"".join(t.detach().cpu().contiguous().numpy().tobytes() for t in model.network.state_dict().values())
    told: dict[str, Any] = {
        "config": asdict(config),
        "loss": [recipe.keypoints, recipe.asked, recipe.smooth, recipe.image],
        "features": hashlib.sha256(weights).hexdigest(),
        "patients": {split: [(p.pair.name, len(p.pair.marks_fixed)) for p in every] for split, every in pairs.items()},
    }
    told = json.loads(json.dumps(told))
    text = json.dumps(told | {"settings": asdict(settings)}, sort_keys=True)
    slug = form.replace(",", "").replace(" ", "-")
    folder = runs / f"{RECIPE}-{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def progress(record: dict[str, float]) -> None:
        print(f"{folder.name}: {line(record)}", flush=True)

    found = train(FieldTask(config, recipe, settings, pairs), settings, folder, progress, of=told)
    return found.model, found.seconds
