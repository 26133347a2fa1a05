"""Brains of several people on one grid: six donors, the SynthSeg label maps, OASIS, and Colin27.

Convention: RAS millimetres about a fixed template, whose axes are those of the MNI space: x = 0 between the
hemispheres, and the fourteen sub-cortical structures where :data:`TEMPLATE` has them. ``align="rigid"`` turns and
shifts each person onto it by the centroids of these structures (Procrustes, without scale); ``align="none"`` only
shifts, and keeps the turn of the file. Structures have the labels 1 to 7 on the left and 8 to 14 on the right, in the
order of :data:`STRUCTURES`; with ``sides="merged"`` 1 to 7 for both. A map whose structures lie elsewhere than in a
brain (another numbering, sides swapped) is refused.

Each voxel of the grid is divided into parts of about 1 mm. The SoI are the fractions of these parts in a structure;
labels and tissue are what most of them are.

What is real: all label maps but those parts of the donors' that :func:`completed` invents. Images are synthetic,
except OASIS and Colin27, which are T1 scans.

Sources: Markello et al., eLife 10 (2021), abagen, Desikan-Killiany numbering; Hawrylycz et al., Nature 489 (2012), the
donors; Billot et al., SynthSeg, Medical Image Analysis 86 (2023); Hoopes et al., HyperMorph, IPMI 2021, and Marcus et
al., OASIS (2007); Holmes et al. (1998), Colin27; Tzourio-Mazoyer et al. (2002), AAL. Rigid alignment: Kabsch (1976).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

import data_download
from regteach.data.anatomy import (
    BRAIN_CENTRE,
    Fine,
    axis_positions,
    centroids,
    completed,
    dilated,
    template_points,
    turn_onto,
    with_structures,
)
from regteach.data.cohort import Cohort, split_by_person
from regteach.data.contrast import OUTSIDE, TISSUES, brain, synthesise, t1_like
from regteach.data.intensity import normalised
from regteach.data.volumes import Volume, read_volume
from regteach.grid import Grid, per_axis
from regteach.sampling import warp

STRUCTURES = ("thalamus", "caudate", "putamen", "pallidum", "accumbens", "hippocampus", "amygdala")
DONORS = ("9861", "10021", "12876", "14380", "15496", "15697")

# Numbers of the structures, left then right, in the order of STRUCTURES.
DONOR_NUMBERS = (*range(35, 42), *range(76, 83))
FREESURFER_NUMBERS = (10, 11, 12, 13, 26, 17, 18, 49, 50, 51, 52, 58, 53, 54)
# neurite-OASIS renumbers FreeSurfer's labels from 1 to 35 in ascending order (its seg35_labels.txt).
OASIS_NUMBERS = (7, 8, 9, 10, 16, 14, 15, 26, 27, 28, 29, 32, 30, 31)
AAL_NUMBERS = (77, 71, 73, 75, 0, 37, 41, 78, 72, 74, 76, 0, 38, 42)  # AAL has no accumbens
# What else a map holds: tissue -> its numbers.
FREESURFER_TISSUES = {
    "csf": (24, 85),  # 85 is the optic chiasm, in the fluid under the brain
    "cortex": (3, 42),
    "white matter": (2, 41, 30, 62),
    "ventricle": (4, 5, 14, 15, 43, 44, 72, 136, 137, 163, 164),  # from 136 on: choroid plexus, by its place
    "cerebellar cortex": (8, 47),
    "cerebellar white matter": (7, 46),
    "brainstem": (16,),
    "ventral diencephalon": (28, 60),
    "lesion": (25, 57),
}
OASIS_TISSUES = {
    "cortex": (2, 21),
    "white matter": (1, 20, 18, 34),
    "ventricle": (3, 4, 11, 12, 19, 22, 23, 35),
    "cerebellar cortex": (6, 25),
    "cerebellar white matter": (5, 24),
    "brainstem": (13,),
    "ventral diencephalon": (17, 33),
}
APART_MM = 8.0  # 1.4 to 3.7 mm in the donors and the SynthSeg maps; with swapped sides it is 13 or more
FLUID_MM = 4.0  # fluid further than this from the brain is outside it


@dataclass(frozen=True)
class _Person:
    """One person on the common grid."""

    name: str
    counts: Int[Tensor, "k *grid"]  # parts of each voxel in each structure
    labels: Int[Tensor, "*grid"]
    tissue: Int[Tensor, "*grid"] | None
    image: Float[Tensor, "1 *grid"]


def brain_grid(spacing_mm: float = 3.0, shape: Sequence[int] = (64, 64, 64)) -> Grid:
    """The common grid: centred on the brain of the template."""
    spacing = per_axis(spacing_mm, 3, "spacing_mm")
    if len(shape) != 3:
        raise ValueError(f"A grid for brains has three axes, but its shape is {tuple(shape)}.")
    origin = tuple(c - 0.5 * (n - 1) * h for c, n, h in zip(BRAIN_CENTRE, shape, spacing, strict=True))
    return Grid(tuple(shape), spacing, origin)


def load_donors(
    spacing_mm: float = 3.0,
    shape: Sequence[int] = (64, 64, 64),
    seed: int = 0,
    sides: str = "both",
    align: str = "rigid",
) -> Cohort:
    """Six people of the Allen Human Brain Atlas: real label maps, synthetic contrast.

    Args:
        spacing_mm: of the grid; 3 in the paper's experiments, which suits 64 voxels, or 2 with 96 x 112 x 96.
        shape: of the grid.
        seed: of the noise in the images.
        sides: "both" keeps left and right apart, "merged" does not.
        align: "rigid" or "none", see the module.

    Returns:
        The cohort, split as the first of :func:`donor_folds`.

    Raises:
        FileNotFoundError: if the label maps have not been fetched.
        ValueError: for an unknown ``sides`` or ``align``.
    """
    grid = brain_grid(spacing_mm, shape)
    people: list[_Person] = []
    for name in DONORS:
        head = _Head(read_volume(data_download.locate("allen-donors", f"{name}.nii.gz"), labels=True), DONOR_NUMBERS)
        fine = head.on(grid, align)
        tissue = completed(fine)
        people.append(_person(name, fine, tissue, grid, sides, seed + len(people)))
    origin = (
        "Six real people (Allen Human Brain Atlas donors): cortex and sub-cortical structures are measured; "
        "white matter is filled in, ventricles, fluid, cerebellum and brainstem are invented, the T1 is synthetic."
    )
    splits: dict[str, tuple[int, ...]] = {"train": (), "validation": (), "test": ()}
    return donor_folds(_cohort("allen-donors", people, grid, sides, origin, splits))[0]


def donor_folds(cohort: Cohort) -> tuple[Cohort, ...]:
    """Leave two out: in fold i the people 2i and 2i+1 are for testing, the next one for validation, three for training.

    Every person is tested on exactly once.

    Raises:
        ValueError: if the cohort has not six people.
    """
    if len(cohort) != len(DONORS):
        raise ValueError(f"The folds are made for {len(DONORS)} people, but {cohort.name} has {len(cohort)}.")
    folds = []
    for first in (0, 2, 4):
        order = [(first + i) % 6 for i in range(6)]
        splits = {"train": tuple(sorted(order[3:])), "validation": (order[2],), "test": tuple(order[:2])}
        folds.append(replace(cohort, splits=splits))
    return tuple(folds)


def load_synthseg(
    spacing_mm: float = 3.0,
    shape: Sequence[int] = (64, 64, 64),
    seed: int = 0,
    sides: str = "both",
    align: str = "rigid",
    skull: str = "stripped",
) -> Cohort:
    """The SynthSeg label maps: as many of the 20 people as are there; real label maps, synthetic contrast.

    Args:
        spacing_mm: of the grid.
        shape: of the grid.
        seed: of the noise in the images and of the split: a tenth of the people for validation, a fifth for testing.
        sides: "both" or "merged".
        align: "rigid" or "none".
        skull: "stripped", or "kept": what is outside the brain is then part of the tissue map.

    Raises:
        FileNotFoundError: if there is no map.
        ValueError: for an unknown ``sides``, ``align`` or ``skull``.
    """
    _one_of("skull", skull, ("stripped", "kept"))
    grid = brain_grid(spacing_mm, shape)
    people: list[_Person] = []
    for path in _files("synthseg-labels", "training_seg_*.nii.gz"):
        fine = _Head(read_volume(path, labels=True), FREESURFER_NUMBERS).on(grid, align)
        tissue = _tissue(fine, FREESURFER_TISSUES)
        if skull == "kept":
            tissue = torch.where(fine.labels >= 500, OUTSIDE + fine.labels - 500, tissue)
        name = path.name.removeprefix("training_seg_").removesuffix(".nii.gz")
        people.append(_person(f"synthseg-{name}", fine, tissue, grid, sides, seed + len(people)))
    origin = f"{len(people)} real people (label maps of SynthSeg, FreeSurfer numbering); the T1 is synthetic."
    return _cohort("synthseg-labels", people, grid, sides, origin, _dealt(people, seed))


def load_oasis(
    spacing_mm: float = 3.0,
    shape: Sequence[int] = (64, 64, 64),
    seed: int = 0,
    sides: str = "both",
    align: str = "rigid",
    limit: int = 40,
) -> Cohort:
    """The 3D volumes of neurite-OASIS: real T1, skull-stripped, with FreeSurfer's labels.

    Args:
        spacing_mm: of the grid.
        shape: of the grid.
        seed: of the split: a tenth of the people for validation, a fifth for testing, a person's scans together.
        sides: "both" or "merged".
        align: "rigid" or "none".
        limit: read this many scans, the first by name; all 414 at 2 mm would fill 25 GB.

    Raises:
        FileNotFoundError: if there is none, or one has a scan without labels or labels without a scan.
        ValueError: for an unknown ``sides`` or ``align``, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is a number of scans, at least 1, not {limit}.")
    grid = brain_grid(spacing_mm, shape)
    people: list[_Person] = []
    scans, maps = "aligned_norm.nii.gz", "aligned_seg35.nii.gz"
    found = [*_files("neurite-oasis-3d", f"**/{scans}"), *_files("neurite-oasis-3d", f"**/{maps}")]
    for folder in sorted({path.parent for path in found})[:limit]:
        for name, what in ((scans, "scan"), (maps, "label map")):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder.name} of neurite-oasis-3d has no {what} ({name}).")
        head = _Head(read_volume(folder / maps, labels=True), OASIS_NUMBERS, read_volume(folder / scans))
        fine = head.on(grid, align)
        # A folder is called OASIS_OAS1_0001_MR1: the person is OAS1_0001.
        name = folder.name.removeprefix("OASIS_").rsplit("_MR", 1)[0]
        people.append(_person(name, fine, _tissue(fine, OASIS_TISSUES), grid, sides, seed))
    origin = f"{len(people)} real T1 scans (neurite-OASIS), labels by FreeSurfer."
    return _cohort("neurite-oasis-3d", people, grid, sides, origin, _dealt(people, seed))


def load_colin(
    spacing_mm: float = 3.0, shape: Sequence[int] = (64, 64, 64), sides: str = "both", align: str = "rigid"
) -> Cohort:
    """Colin27, one real T1 with the labels of AAL: the one person to try a network on real contrast without a download.

    AAL has no accumbens: that structure, and its channel, are left out; the other labels keep their numbers. AAL's
    outlines are generous: its caudate takes in some of the ventricle. The person is in the test split.

    Raises:
        FileNotFoundError: if T1 or labels have not been fetched.
        ValueError: for an unknown ``sides`` or ``align``.
    """
    grid = brain_grid(spacing_mm, shape)
    labels = read_volume(data_download.locate("colin27-labels", "aal.nii"), labels=True)
    fine = _Head(labels, AAL_NUMBERS, read_volume(data_download.locate("colin27", "t1.nii.gz"))).on(grid, align)
    origin = (
        "One real T1 (Colin27, the mean of 27 scans of one person), labels of the AAL atlas, which has no accumbens."
    )
    people = [_person("colin", fine, None, grid, sides, 0)]
    splits: dict[str, tuple[int, ...]] = {"train": (), "validation": (), "test": (0,)}
    return _cohort("colin27", people, grid, sides, origin, splits, without="accumbens")


@dataclass(frozen=True)
class _Head:
    """A label map in its own space; ``numbers`` are its structures (0: not in it), ``t1`` the scan it belongs to."""

    labels: Volume
    numbers: Sequence[int]
    t1: Volume | None = None

    def on(self, grid: Grid, align: str) -> Fine:
        """Turned and shifted onto the template, and read at the parts of each voxel: labels nearest, T1 linear."""
        rotation, centroid, centre = self._pose(align)
        parts = tuple(max(1, round(h)) for h in grid.spacing)
        fine = grid.resized([n * p for n, p in zip(grid.shape, parts, strict=True)])
        labels = _nearest(self.labels, fine, rotation, centroid, centre)
        scan = None
        if self.t1 is not None:

            def own_mm(points: Tensor) -> Tensor:
                return (points - centre.float()) @ rotation.float() + centroid.float()

            scan = warp(self.t1.batch, own_mm, self.t1.grid, fine, padding="zeros")[0, 0]
        return Fine(labels, _numbered(labels, self.numbers), scan, fine, parts)

    def _pose(self, align: str) -> tuple[Tensor, Tensor, Tensor]:
        """Rotation R, centroid c of the person and m of the template: x is at R (x - c) + m on the template."""
        _one_of("align", align, ("rigid", "none"))
        have = [i for i, number in enumerate(self.numbers) if number]
        own = centroids(_numbered(self.labels.data, self.numbers), self.labels.grid)[have]
        for i, position in zip(have, own, strict=True):
            if not bool(position.isfinite().all()):
                raise ValueError(f"The label map has no {_names('both')[i + 1]} (number {self.numbers[i]}).")
        template = template_points()[have]
        centroid, centre = own.mean(0), template.mean(0)
        rotation = turn_onto(own, template)
        apart_mm = float(((own - centroid) @ rotation.T - (template - centre)).norm(dim=1).mean())
        if apart_mm > APART_MM:
            raise ValueError(
                f"The structures lie {apart_mm:.0f} mm from where a brain has them: "
                "the numbering or the orientation of this label map is another one."
            )
        return rotation if align == "rigid" else torch.eye(3, dtype=torch.float64), centroid, centre


def _nearest(volume: Volume, fine: Grid, rotation: Tensor, centroid: Tensor, centre: Tensor) -> Int[Tensor, "*fine"]:
    """The label nearest to each point of ``fine``; outside the volume is 0.

    A voxel index is the sum of one number for each coordinate of the point, so three tables serve for all points.
    """
    spacing, origin = torch.tensor(volume.grid.spacing), torch.tensor(volume.grid.origin)
    inverse = rotation.T.float() / spacing[:, None]
    first = (centroid.float() - origin) / spacing + 1  # a border of one voxel of 0 takes all that lies outside
    axes = [axis - float(c) for axis, c in zip(axis_positions(fine), centre, strict=True)]
    flat = torch.zeros(fine.shape, dtype=torch.int32)
    for k, n in enumerate(volume.grid.shape):
        index = inverse[k, 0] * axes[0] + first[k] + inverse[k, 1] * axes[1] + inverse[k, 2] * axes[2]
        flat.mul_(n + 2).add_(index.round_().clamp_(0, n + 1).to(torch.int32))
    padded = F.pad(volume.data.to(torch.int16), (1,) * 6)
    return padded.reshape(-1).index_select(0, flat.reshape(-1)).reshape(fine.shape)


def _person(name: str, fine: Fine, tissue: Int[Tensor, "*fine"] | None, grid: Grid, sides: str, seed: int) -> _Person:
    """From the parts to the voxels of the grid; a person without a scan gets a T1-like image."""
    structures = fine.structures
    if sides == "merged":
        structures = torch.where(structures > len(STRUCTURES), structures - len(STRUCTURES), structures)
    counts = _counts(structures, fine.parts, len(_names(sides)) + 1)
    coarse = None if tissue is None else _most(_counts(tissue, fine.parts, int(tissue.max()) + 1))
    if fine.t1 is not None:
        image = F.avg_pool3d(fine.t1[None, None], fine.parts)
    else:
        assert coarse is not None
        image = t1_like(coarse[None], grid, torch.Generator().manual_seed(seed))
    return _Person(name, counts[1:], _most(counts), coarse, normalised(image)[0])


def _counts(fine: Int[Tensor, "*fine"], parts: tuple[int, ...], count: int) -> Int[Tensor, "c *grid"]:
    """How many of each voxel's parts have the labels 0 ... count-1."""
    coarse = tuple(n // p for n, p in zip(fine.shape, parts, strict=True))
    # A byte counts the parts of voxels of up to 6 mm. A grid of larger voxels has few of them.
    kind = torch.uint8 if math.prod(parts) < 256 else torch.int32
    counts = torch.zeros(count, math.prod(coarse), dtype=kind)
    one = torch.ones(1, counts.shape[1], dtype=kind)
    for offset in itertools.product(*map(range, parts)):
        part = fine[tuple(slice(o, None, p) for o, p in zip(offset, parts, strict=True))]
        counts.scatter_add_(0, part.reshape(1, -1).long(), one)
    return counts.unflatten(1, coarse)


def _most(counts: Int[Tensor, "c *grid"]) -> Int[Tensor, "*grid"]:
    """The label with most parts, the last of equals: half a voxel of a structure is enough.

    Several times faster than ``argmax`` over a leading axis.
    """
    best, label = counts[0].clone(), torch.zeros(counts.shape[1:], dtype=torch.int64)
    for k, count in enumerate(counts[1:], start=1):
        label[count >= best] = k
        torch.maximum(best, count, out=best)
    return label


def _cohort(
    name: str,
    people: list[_Person],
    grid: Grid,
    sides: str,
    origin: str,
    splits: Mapping[str, tuple[int, ...]],
    without: str = "",
) -> Cohort:
    structures = {label: s for label, s in _names(sides).items() if not without or without not in s}
    parts = math.prod(max(1, round(h)) for h in grid.spacing)
    soi = torch.empty(len(people), len(structures), *grid.shape)
    for i, person in enumerate(people):
        for channel, label in enumerate(structures):
            torch.div(person.counts[label - 1], parts, out=soi[i, channel])
    tissue = [p.tissue for p in people if p.tissue is not None]
    return Cohort(
        name=name,
        images=torch.stack([p.image for p in people]),
        soi=soi,
        labels=torch.stack([p.labels for p in people]),
        grid=grid,
        people=tuple(p.name for p in people),
        structures=structures,
        splits=splits,
        origin=origin,
        tissue=torch.stack(tissue) if tissue else None,
        synthesis=synthesise if tissue else None,
    )


def _names(sides: str) -> dict[int, str]:
    """Label -> structure."""
    _one_of("sides", sides, ("both", "merged"))
    names = STRUCTURES if sides == "merged" else [f"{side} {s}" for side in ("left", "right") for s in STRUCTURES]
    return dict(enumerate(names, start=1))


def _dealt(people: list[_Person], seed: int) -> dict[str, tuple[int, ...]]:
    n = len(people)
    parts = {"train": -1, "validation": max(1, n // 10) if n > 2 else 0, "test": max(1, n // 5) if n > 1 else 0}
    return split_by_person(tuple(p.name for p in people), parts, seed)


def _numbered(fine: Int[Tensor, "*fine"], numbers: Sequence[int]) -> Int[Tensor, "*fine"]:
    """The labels 1 to 14 from a map's own numbers."""
    return _looked_up(fine, {number: label for label, number in enumerate(numbers, start=1) if number})


def _looked_up(fine: Int[Tensor, "*fine"], names: Mapping[int, int]) -> Int[Tensor, "*fine"]:
    fine = fine.clamp_min(0)  # some write their background as -1; what has no name is background either way
    table = torch.zeros(max(int(fine.max()), *names) + 1, dtype=torch.uint8)
    table[list(names)] = torch.tensor(list(names.values()), dtype=torch.uint8)
    return table.index_select(0, fine.reshape(-1).int()).reshape(fine.shape)


def _tissue(fine: Fine, tissues: Mapping[str, Sequence[int]]) -> Int[Tensor, "*fine"]:
    """Numbers of TISSUES for a map that has all of them; fluid only near the brain."""
    known = {number: TISSUES[name] for name, numbers in tissues.items() for number in numbers}
    tissue = with_structures(_looked_up(fine.labels, known), fine.structures)
    near = dilated(brain(tissue), FLUID_MM, fine.grid)
    return torch.where((tissue == TISSUES["csf"]) & ~near, 0, tissue)


def _files(name: str, pattern: str) -> list[Path]:
    """Files of a data set, sorted.

    Raises:
        FileNotFoundError: if there is none; the message has the command that fetches them.
    """
    return sorted(data_download.locate(name).glob(pattern))


def _one_of(what: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise ValueError(f"{what} is {' or '.join(repr(k) for k in known)}, not {given!r}.")
