"""Thoraces that breathe, for the benchmark of the keypoint model: pairs, what is measured of a transform or a field.

TRE is the distance of the landmarks from where they belong, mean and 95th percentile. Both SDlogJ are those of the
fixed lungs: ours, of the voxels that are not folded; and Learn2Reg's, whose + 3 makes it about a fourth, but a voxel
with a determinant below -3 counts there as log 1e-9, and a few of these rule it. Folding is that of all voxels. At the
wall of a lung, where it slides, the exact motion folds too when it is read at voxels.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regteach import keypoint_task, metrics, objectives
from regteach.checkpoints import Model
from regteach.data.intensity import normalised
from regteach.data.thorax import ADULT, ThoraxCase, ThoraxConfig, generate_patient, thorax_grid
from regteach.data.thorax_ct import ThoraxScan, warp_ct
from regteach.nets.keypoint_field import Field
from regteach.nets.keypoint_kernel import MIND
from regteach.transforms import Dense, Transform, displacement, jacobian_determinant

NOISE_HU = 20.0  # of the moved CT, whose own noise moves with it
SMALL_TREES = ThoraxConfig(vessel_tips=(20, 100))
Row = dict[str, Any]


# ---- pairs ----


@dataclass(frozen=True, eq=False)
class Pair(keypoint_task.Patient):
    """One pair as the network sees it, and the lungs of the fixed image, ``1 1 *grid``."""

    mask: Tensor

    @staticmethod
    def of(name: str, case: ThoraxCase) -> "Pair":
        """Grey values between 0 and 1, as in training."""
        marks = case.fixed_landmarks_mm[0], case.moving_landmarks_mm[0]
        return Pair(
            name, normalised(case.moving), normalised(case.fixed), case.grid, case.transform, *marks, case.fixed_mask
        )


@cache
def drawn(spacing_mm: float, index: int, config: ThoraxConfig = ADULT) -> Pair:
    """A patient of the seed that the model was trained on, by number."""
    return Pair.of(f"patient {index}", generate_patient(thorax_grid(spacing_mm), keypoint_task.SEED, config, index))


def moved_ct(scan: ThoraxScan) -> Pair:
    """A CT and itself breathed out, with noise of its own."""
    return Pair.of("CT", warp_ct(scan, noise_hu=NOISE_HU))


def stand_in_scan() -> ThoraxScan:
    """A drawn patient in the place of the CT."""
    case = generate_patient(thorax_grid(12.0), 1, SMALL_TREES)
    return ThoraxScan(case.moving, torch.where(case.moving_mask, case.moving_labels, 0), case.grid)


# ---- what is measured ----


@torch.no_grad()
def figures(pair: Pair, moved: Tensor, dense: Dense) -> dict[str, float]:
    """Errors of moved landmarks, ``n d`` in moving mm, and regularity of a field on the grid of the pair or a coarser.

    The lungs of a coarser grid are the cubes of which more than half is lung.
    """
    errors = (moved.cpu() - pair.marks_moving).norm(dim=1)
    factor = round(dense.grid.spacing[0] / pair.grid.spacing[0])
    mask = objectives.averaged(pair.mask.float(), factor) > 0.5
    det = jacobian_determinant(Dense(dense.displacement.cpu(), dense.grid), dense.grid)
    return {
        "tre_mm": float(errors.mean()),
        "tre95_mm": float(errors.quantile(0.95)),
        "sdlogj": float(metrics.sdlogj(det, mask)),
        "sdlogj_learn2reg": float(metrics.sdlogj_learn2reg(det, mask)),
        "folding": float(metrics.folding_percent(det)),
    }


def row(pair: Pair, method: str, transform: Transform, **more: Any) -> Row:
    """What there is to say about one transform of a pair."""
    with torch.no_grad():
        dense = transform if isinstance(transform, Dense) else Dense(displacement(transform, pair.grid), pair.grid)
        moved = transform(pair.marks_fixed[None].to(dense.displacement))[0]
    head = {"pair": pair.name, "method": method, "shape": pair.grid.shape, "spacing_mm": pair.grid.spacing[0]}
    return head | figures(pair, moved, dense) | more


@dataclass(frozen=True, eq=False)
class Prepared:
    """A pair with what a model sees in it: keypoints, and the features of the moving and of the fixed image."""

    pair: Pair
    keypoints: Tensor
    maps: tuple[Tensor, Tensor]

    @staticmethod
    @torch.no_grad()
    def of(model: Model, pair: Pair, device: torch.device) -> "Prepared":
        """By a model's own features."""
        moving, fixed = (image.to(device) for image in (pair.moving, pair.fixed))
        features = model.network.features
        return Prepared(pair, model.network.keypoints(fixed, pair.grid), (features(moving), features(fixed)))

    def fields(self, model: Any, most: Tensor | None = None) -> list[Field]:
        """After each scale, by a model that reads the first of these features; from some of the keypoints."""
        config = model.config
        count = MIND[config.grid.dim] * config.channels + config.features
        points = self.keypoints if most is None else self.keypoints[most]
        maps = (self.maps[0][:, :count], self.maps[1][:, :count])
        images = (self.pair.moving.to(points), self.pair.fixed.to(points))
        found: list[Field] = model.scales(*images, self.pair.grid, keypoints_mm=points, features=maps)
        return found

    @torch.no_grad()
    def tre(self, field: Field) -> float:
        """Mean error at the landmarks, mm."""
        marks = self.pair.marks_fixed.to(self.keypoints)
        return float((marks + field.at(marks) - self.pair.marks_moving.to(marks)).norm(dim=1).mean())

    @torch.no_grad()
    def row(self, method: str, field: Field, **more: Any) -> Row:
        """Landmarks by the field itself; regularity on a grid of half the resolution, which is eight times cheaper."""
        marks, half = self.pair.marks_fixed.to(self.keypoints), self.pair.grid.coarsened(2)
        moved, dense = marks + field.at(marks), Dense(field.on(half)[None], half)
        return {"pair": self.pair.name, "method": method} | figures(self.pair, moved, dense) | more
