"""Large deformations of known truth: five families, three ranges, on any image or cohort.

A family is fractal noise, alone or followed by a turn, a scaling, a shift, or all three. With T from fixed to moving
points, T(x) = affine(noise(x)), the fixed image is the moving one read at T: so T is the exact answer, at every point.

    brownian      noise
    rotation      noise, and a turn about each axis
    scaling       noise, and a factor along each axis
    translation   noise, and a shift along each axis
    all           noise, and all three

No deformation folds: the affine never does, and the noise is the spline of :func:`deformations.fractal`. So each has
an inverse, and an error against the truth means what it says. What the affine takes out of the moving image can not be
found by anybody: :func:`visible` says where that is not so.

Source: the five families follow Sideri-Lampretsa et al., Interpretable deformable image registration: a geometric deep
learning perspective, arXiv 2412.13294, Table 3. There the noise is interpolated linearly (:func:`deformations.
brownian`), which folds a third of space at the same amplitude. The numbers of that table are lost: those in
:data:`RANGES` are ours; the smallest noise is the amplitude of its authors' code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regteach.affine import Affine, AffineBounds
from regteach.data.cohort import Cohort
from regteach.data.deformations import fractal, random_affine
from regteach.grid import Grid
from regteach.names import nearest
from regteach.sampling import grid_points, warp
from regteach.transforms import Compose, FreeForm, Transform, displacement

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """How far the parts of a family go.

    Args:
        noise: largest displacement of the noise, as a fraction of half the extent of each axis.
        rotation_deg: largest turn about each axis.
        scale_ratio: largest factor along each axis, 1.2 for 1/1.2 to 1.2.
        translation: largest shift along each axis, as a fraction of half the shortest extent.
    """

    noise: float
    rotation_deg: float = 0.0
    scale_ratio: float = 1.0
    translation: float = 0.0


RANGES = {
    "small": Range(noise=0.125, rotation_deg=10.0, scale_ratio=1.1, translation=0.1),
    "medium": Range(noise=0.25, rotation_deg=20.0, scale_ratio=1.2, translation=0.2),
    "large": Range(noise=0.375, rotation_deg=30.0, scale_ratio=1.3, translation=0.3),
}
# Which parts of a Range each family uses; the noise is in all of them.
FAMILIES = {
    "brownian": (),
    "rotation": ("rotation_deg",),
    "scaling": ("scale_ratio",),
    "translation": ("translation",),
    "all": ("rotation_deg", "scale_ratio", "translation"),
}


@dataclass(frozen=True)
class LargeDeformation:
    """One family in one range.

    Args:
        family: "brownian", "rotation", "scaling", "translation" or "all".
        level: "small", "medium", "large", or 1, 2, 3.

    Raises:
        ValueError: for an unknown family or level, with the nearest known one.
    """

    family: str
    level: str | int = "medium"

    def __post_init__(self) -> None:
        _known(self.family, FAMILIES, "family")
        names = list(RANGES)
        if isinstance(self.level, int) and 1 <= self.level <= len(names):
            object.__setattr__(self, "level", names[self.level - 1])  # frozen: this is where it is normalised
        _known(str(self.level), RANGES, "level")

    @property
    def limits(self) -> Range:
        """The range, without the parts that the family does not use."""
        full = RANGES[str(self.level)]
        return replace(Range(full.noise), **{part: getattr(full, part) for part in FAMILIES[self.family]})

    def noise_mm(self, grid: Grid) -> tuple[float, ...]:
        """Largest displacement of the noise along each axis of this grid, mm."""
        return tuple(self.limits.noise * length / 2 for length in grid.extent)

    def bounds(self, grid: Grid) -> AffineBounds:
        """Bounds of the affine part on this grid, in mm and degrees."""
        limits = self.limits
        return AffineBounds(
            translation_mm=limits.translation * min(grid.extent) / 2,
            rotation_deg=limits.rotation_deg,
            scale_ratio=limits.scale_ratio,
            stretch_axes_deg=0.0,
        )

    def draw(
        self, grid: Grid, generator: torch.Generator, batch: int = 1, like: Tensor | None = None
    ) -> FreeForm | Compose:
        """``batch`` random transforms, fixed to moving: the noise, then the affine (none in "brownian")."""
        noise = fractal(grid, self.limits.noise, generator, batch, like=like)
        if not FAMILIES[self.family]:
            return noise
        return Compose((noise, random_affine(grid, self.bounds(grid), generator, batch, like)))


def large_deformation(
    grid: Grid, family: str, level: str | int, seed: int, batch: int = 1, like: Tensor | None = None
) -> FreeForm | Compose:
    """Random transforms of one family and range, fixed points to moving points, mm; the seed fixes them.

    Args:
        grid: the image's grid; all lengths go with its extent.
        family: see :class:`LargeDeformation`.
        level: likewise.
        seed: of all random numbers.
        batch: how many transforms.
        like: tensor that gives device and dtype; float32 on the CPU where left out.

    Raises:
        ValueError: for an unknown family or level, with the nearest known one.
    """
    return LargeDeformation(family, level).draw(grid, torch.Generator().manual_seed(seed), batch, like)


def deformed_pair(
    image: Float[Tensor, "b c *grid"],
    grid: Grid,
    transform: Transform,
    seed: int = 0,
    noise: float = 0.0,
) -> tuple[Float[Tensor, "b c *grid"], Float[Tensor, "b c *grid"]]:
    """A moving and a fixed image between which the transform is the exact answer.

    Args:
        image: the moving image, in [0, 1]; it stays as it is.
        grid: of the image.
        transform: fixed points to moving points.
        seed: of the noise.
        noise: standard deviation of noise in the fixed image, where it is not 0 (background).

    Returns:
        Moving and fixed. What comes from outside the moving image is 0.
    """
    fixed = warp(image, transform, grid, padding="zeros")
    if noise:
        numbers = torch.randn(fixed.shape, generator=torch.Generator().manual_seed(seed)).to(fixed)
        fixed = torch.where(fixed > 0, (fixed + noise * numbers).clamp(0, 1), fixed)
    return image, fixed


def visible(transform: Transform, grid: Grid, margin_vox: float = 0.0) -> Bool[Tensor, "b 1 *grid"]:
    """Where a point of the fixed grid has its partner inside the moving image: what a registration can find.

    Args:
        transform: fixed points to moving points.
        grid: of both images.
        margin_vox: how far inside of the outermost voxel centres the partner has to be.
    """
    field = displacement(transform, grid)
    at = (grid_points(grid).to(field) + field - field.new_tensor(grid.origin)) / field.new_tensor(grid.spacing)
    last = at.new_tensor(grid.shape) - 1
    return ((at >= margin_vox) & (at <= last - margin_vox)).all(-1)[:, None]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Deformed(Cohort):
    """Pairs of an image and its own deformed copy; the other arguments are those of ``Cohort``.

    Args:
        truths: the transform, fixed to moving, a batch of one, for each (moving, fixed).
    """

    truths: Mapping[tuple[int, int], Transform]

    def truth(self, moving: int, fixed: int) -> Transform:
        """The exact transform of a pair, fixed points to moving points.

        Raises:
            ValueError: if the two are no pair of this cohort.
        """
        if (moving, fixed) not in self.truths:
            raise ValueError(f"Images {moving} and {fixed} are no pair of {self.name}, so there is no exact truth.")
        return self.truths[moving, fixed]


def deformed(
    cohort: Cohort,
    family: str,
    level: str | int,
    seed: int = 0,
    copies: int = 1,
    noise: float = 0.02,
    limits: Mapping[str, int] | None = None,
    partners: Mapping[int, int] | None = None,
) -> Deformed:
    """A cohort of known truth: images of another cohort, each to be registered to deformed copies of itself.

    Splits stay as they are. What is drawn for one split does not depend on the others.

    Args:
        cohort: of any kind.
        family: see :class:`LargeDeformation`.
        level: likewise.
        seed: of deformations, noise and choice.
        copies: deformed copies of each image.
        noise: standard deviation of the noise in the copies, where they are not 0.
        limits: how many images of each split to use, chosen at random; all where left out.
        partners: moving image -> image of the same anatomy (in another contrast) whose copies are the fixed images;
            only these are used. Where left out, every image is its own partner.

    Raises:
        ValueError: for an unknown family or level, a limit of a split that is not there, a negative number, or if there
            is no image, or no copy, to make pairs of.
    """
    wanted = LargeDeformation(family, level)
    for split in limits or {}:
        if split not in cohort.splits:
            raise ValueError(f"{cohort.name} has the splits {', '.join(cohort.splits)}, but not {split!r}.")
    if min(seed, noise, *(limits or {}).values()) < 0:
        raise ValueError("A seed, a noise and the limits of splits are 0 or more.")
    drawn = []  # (split, moving, transform, noise's seed)
    for number, (split, members) in enumerate(cohort.splits.items()):
        state = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        usable = [i for i in members if partners is None or i in partners]
        order = torch.randperm(len(usable), generator=generator).tolist()
        chosen = sorted(usable[i] for i in order[: (limits or {}).get(split, len(usable))])
        if chosen and copies > 0:
            transforms = wanted.draw(cohort.grid, generator, batch=len(chosen) * copies)
            seeds = torch.randint(2**31, (len(chosen) * copies,), generator=generator).tolist()
            for j, own in enumerate(seeds):
                drawn.append((split, chosen[j // copies], item(transforms, j), own))
    if not drawn:
        raise ValueError(f"There is no image of {cohort.name} to make {copies} deformed copies of.")
    kept = sorted({moving for _, moving, _, _ in drawn})
    place = {moving: k for k, moving in enumerate(kept)}
    pairs: dict[str, list[tuple[int, int]]] = {split: [] for split in cohort.splits}
    truths: dict[tuple[int, int], Transform] = {}
    parts: list[tuple[Tensor, ...]] = []
    for split, moving, transform, own in drawn:
        pair = (place[moving], len(kept) + len(parts))
        pairs[split].append(pair)
        truths[pair] = transform
        parts.append(_copy(cohort, moving if partners is None else partners[moving], transform, own, noise))
    images, soi, labels = (torch.cat([part[k] for part in parts]) for k in range(3))
    return Deformed(
        name=f"{cohort.name}, {wanted.family} {wanted.level}",
        images=torch.cat([cohort.images[kept], images]),
        soi=torch.cat([cohort.soi[kept], soi]),
        labels=torch.cat([cohort.labels[kept], labels]),
        grid=cohort.grid,
        people=tuple(cohort.people[i] for i in (*kept, *(moving for _, moving, _, _ in drawn))),
        structures=cohort.structures,
        splits={split: tuple(sorted({i for pair in chosen for i in pair})) for split, chosen in pairs.items()},
        origin=f"{cohort.origin} Each is registered to copies of itself whose deformation is synthetic and known.",
        tissue=None if cohort.tissue is None else torch.cat([cohort.tissue[kept], *(part[3] for part in parts)]),
        synthesis=cohort.synthesis,
        given_pairs={split: tuple(chosen) for split, chosen in pairs.items()},
        truths=truths,
    )


def item(transform: FreeForm | Compose, index: int) -> FreeForm | Compose:
    """One transform of a batch, as a batch of one."""
    if isinstance(transform, FreeForm):
        return FreeForm(transform.coefficients[[index]], transform.grid)
    noise, affine = transform.transforms
    assert isinstance(noise, FreeForm)
    assert isinstance(affine, Affine)
    single = Affine(affine.matrix[[index]], affine.translation[[index]], affine.centre)
    return Compose((FreeForm(noise.coefficients[[index]], noise.grid), single))


def _copy(cohort: Cohort, index: int, transform: Transform, seed: int, noise: float) -> tuple[Tensor, ...]:
    """Image, SoI, labels, and tissue where there is one, of an image read at the transform."""
    grid = cohort.grid
    _, image = deformed_pair(cohort.images[[index]], grid, transform, seed, noise)
    soi = warp(cohort.soi[[index]], transform, grid, padding="zeros")
    maps = [cohort.labels] if cohort.tissue is None else [cohort.labels, cohort.tissue]
    read = [warp(m[[index]][:, None].float(), transform, grid, order=0, padding="zeros")[:, 0].round() for m in maps]
    return image, soi, *(values.to(m.dtype) for values, m in zip(read, maps, strict=True))


def _known(name: str, table: dict[str, T], what: str) -> T:
    if name not in table:
        near = nearest(name, table)
        raise ValueError(
            f"There is no {what} {name!r}; the nearest is {near!r}, and the others are {', '.join(table)}."
        )
    return table[name]
