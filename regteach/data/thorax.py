"""A breathing thorax, synthetic, whose motion is known exactly at every point.

Convention: RAS axes (0 to the right, 1 to the front, 2 up), mm and HU; in 2D a coronal slice (0 to the right, 1 up).
Fixed is exhale, moving is inhale. The patient stands in the middle of the grid, about 330 x 235 mm wide at full size
and cut off above and below, and all lengths of :class:`ThoraxConfig` are relative to there.

The image is a function of points of the moving (inhale) frame, and the fixed image is the same function at the moved
points: I_fixed(x) = I_moving(phi(x)). So u = phi(x) - x is exact, and nothing is interpolated. Inside the lungs mass is
kept: HU_fixed + 1000 = (HU_moving + 1000) det D phi. (This makes vessels denser too, as all that is in the lung.) Each
image has its own noise. The motion is that of ``breathing``: lungs slide along the wall.

What is drawn: two lungs with a vessel tree each, which fills the lung by halving a cloud of points, with radii after
Murray's law, exponent 2.8; its forks are the landmarks. Ribs, spine, breast bone, heart, windpipe, liver, fat, and a
correlated texture. Widths and depths are those of an adult; it is a drawing, not an atlas.

Sources: Murray, The physiological principle of minimum work, PNAS 12 (1926), with an exponent between the 2 of large
and the 3 of small vessels; growing into a cloud of points: Tawhai et al., J Appl Physiol 97 (2004).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regteach.data.breathing import CHUNK, Breathing
from regteach.data.thorax_anatomy import ADULT, ThoraxConfig, grow_tree, individual, motion
from regteach.data.thorax_picture import AIR_HU, painter
from regteach.grid import Grid
from regteach.sampling import flat_points

__all__ = ["ADULT", "STRUCTURES", "ThoraxCase", "ThoraxConfig", "generate_patient", "generate_patients", "thorax_grid"]

STRUCTURES = {1: "right lung", 2: "left lung", 3: "body around them"}
NOTE = "Synthetic: a drawn thorax, not a scan; its motion is known exactly."


@dataclass(frozen=True, eq=False)
class ThoraxCase:
    """A pair of images of one patient, with the truth.

    Args:
        fixed: the exhaled image, ``1 1 *grid``, HU.
        moving: the inhaled image, ``1 1 *grid``, HU.
        grid: of both.
        transform: fixed to moving points, exact.
        fixed_labels: ``1 1 *grid``, :data:`STRUCTURES`.
        moving_labels: as well.
        fixed_landmarks_mm: ``1 n d``.
        moving_landmarks_mm: the same places in the moving image, ``1 n d``.
        note: what is real, what is synthetic.
    """

    fixed: Float[Tensor, "1 1 *grid"]
    moving: Float[Tensor, "1 1 *grid"]
    grid: Grid
    transform: Breathing
    fixed_labels: Int[Tensor, "1 1 *grid"]
    moving_labels: Int[Tensor, "1 1 *grid"]
    fixed_landmarks_mm: Float[Tensor, "1 n d"]
    moving_landmarks_mm: Float[Tensor, "1 n d"]
    note: str = NOTE

    @property
    def fixed_mask(self) -> Bool[Tensor, "1 1 *grid"]:
        """Both lungs of the fixed image."""
        return (self.fixed_labels == 1) | (self.fixed_labels == 2)

    @property
    def moving_mask(self) -> Bool[Tensor, "1 1 *grid"]:
        """Both lungs of the moving image."""
        return (self.moving_labels == 1) | (self.moving_labels == 2)


def thorax_grid(spacing_mm: float = 6.0, dim: int = 3) -> Grid:
    """The usual field of view, 336 x 288 x 336 mm (in 2D 336 x 336) about 0, at a spacing: 6 mm gives 56 x 48 x 56."""
    extent = (336.0, 288.0, 336.0) if dim == 3 else (336.0, 336.0)
    shape = tuple(max(1, round(length_mm / spacing_mm)) for length_mm in extent)
    return Grid(shape, (spacing_mm,), tuple(-(n - 1) * spacing_mm / 2 for n in shape))


def generate_patient(grid: Grid, seed: int = 0, config: ThoraxConfig = ADULT, index: int = 0) -> ThoraxCase:
    """Draw one synthetic patient, exhaled and inhaled.

    A patient depends on seed, index and config: on another grid the same one is drawn, with other noise and blur.

    Args:
        grid: of both images, 2D (a coronal slice) or 3D; the patient stands at its centre.
        seed: of a group of patients.
        config: lengths and grey values of the average patient.
        index: which of the group, from 0.

    Raises:
        ValueError: if seed or index is negative.
    """
    if min(seed, index) < 0:
        raise ValueError(f"Seed and index are 0 or more, not {seed} and {index}.")
    # One stream for each purpose: drawing more of one thing changes no other.
    traits, growth, grain, noise = np.random.SeedSequence([seed, index]).spawn(4)
    person = individual(config, np.random.default_rng(traits))
    transform = motion(person, grid, np.random.default_rng(traits.spawn(1)[0]))
    local = replace(transform, centre=(0.0,) * grid.dim)
    tips = person.vessel_tips[grid.dim - 2]
    rngs = [np.random.default_rng(s) for s in growth.spawn(2)]
    trees = [grow_tree(lung, local, person, tips, rng) for lung, rng in zip(local.lungs, rngs, strict=True)]
    draw = painter(person, local, trees, grid, np.random.default_rng(grain))
    shift = torch.tensor(grid.centre)
    images, labels = [], []
    for kind, rng in zip(("fixed", "moving"), map(np.random.default_rng, noise.spawn(2)), strict=True):
        hu, structure = torch.empty(grid.size), torch.zeros(grid.size, dtype=torch.long)
        points = flat_points(grid)[0] - shift
        for part in torch.arange(grid.size).split(CHUNK):
            x = points[part]
            y = x if kind == "moving" else local(x[None])[0]
            value, body = draw(y)
            ratio = 1 if kind == "moving" else local.volume_ratio(x[None])[0]
            hu[part] = AIR_HU + (value - AIR_HU) * ratio
            lung = local.lung_at(x[None], inhaled=kind == "moving")[0]
            structure[part] = torch.where(lung > 0, lung, torch.where(body, 3, 0))
        hu += person.noise_hu * torch.from_numpy(rng.standard_normal(grid.size, dtype=np.float32))
        images.append(hu.reshape(1, 1, *grid.shape))
        labels.append(structure.reshape(1, 1, *grid.shape))
    forks = torch.from_numpy(np.concatenate([tree.forks for tree in trees]))[None]
    moving_marks, fixed_marks = forks, local.lung_inverse(forks)
    lowest, highest = torch.tensor(grid.origin) - shift, torch.tensor(grid.last) - shift
    seen = ((fixed_marks >= lowest) & (fixed_marks <= highest) & (forks >= lowest) & (forks <= highest)).all(-1)[0]
    return ThoraxCase(
        images[0],
        images[1],
        grid,
        transform,
        labels[0],
        labels[1],
        (fixed_marks[:, seen] + shift).float(),
        (moving_marks[:, seen] + shift).float(),
    )


def generate_patients(grid: Grid, count: int, seed: int = 0, config: ThoraxConfig = ADULT) -> list[ThoraxCase]:
    """Several patients of one seed; the first ones stay the same when more are asked for."""
    return [generate_patient(grid, seed, config, index) for index in range(count)]
