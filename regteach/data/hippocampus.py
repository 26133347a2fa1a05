"""Hippocampus: real T1 crops with two labels each, from the Medical Segmentation Decathlon (task 4).

Convention: every crop is put, unchanged, into the middle of one grid of 1 mm voxels, by whole voxels: nothing is
interpolated. The scale of intensities differs by a factor of 5,000 between cases, so each image goes to [0, 1] before
zeros are put around it. Axes are RAS: 0 to the right, 1 to the front, 2 up; label 1
(anterior) lies in front. All crops look alike, as of one side of the head: the other side was mirrored before the data
were published. Where a crop sat in the head is not known.

Who is who: the challenge's 394 crops come from 195 people, so nearly everybody gave two, left and right, and which
belong together was not published. Two neighbours in number (1 and 2, 3 and 4, ...) are taken for one person here: they
are never in two splits, and never registered to each other. The split of a case depends on its number and the seed
alone (:func:`dealt`), not on which other cases are there: weights trained on a part of the data can be tested on all
of it.

Sources: Antonelli et al., The Medical Segmentation Decathlon, Nat Commun 13, 2022; Simpson et al., arXiv:1902.09063.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor

import data_download
from regteach.data.cohort import SPLITS, Cohort, one_hot
from regteach.data.intensity import normalised
from regteach.data.volumes import read_volume
from regteach.grid import Grid

SHAPE = (48, 64, 48)  # the largest of 130 crops has 42 x 57 x 45
STRUCTURES = {1: "anterior", 2: "posterior"}
CASE = re.compile(r"hippocampus_(\d+)\.nii\.gz")
CROPS_PER_PERSON = 2
DEAL = ("train",) * 20 + ("validation",) * 3 + ("test",) * 3


def load_hippocampus(split_seed: int = 0, shape: Sequence[int] = SHAPE, limit: int | None = None) -> Cohort:
    """The labelled crops, about 77 % to train, 11.5 % to validate, 11.5 % to test.

    Args:
        split_seed: of the split by person.
        shape: voxels of the common grid, 1 mm each; every crop has to fit.
        limit: read the first so many cases only, for a quick look; a split may then be empty.

    Returns:
        A cohort with one channel, and a crisp SoI map (0 or 1) a label. Its pairs are of different people.

    Raises:
        FileNotFoundError: if the data set has not been fetched, is empty, or an image or its labels are missing.
        ValueError: if a file is not what it should be, or does not fit the grid.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is a number of cases, at least 1, not {limit}.")
    folder = data_download.locate("hippocampus")
    numbers = _cases(folder)
    names = sorted(numbers)[:limit]
    grid = Grid(tuple(shape))
    if grid.dim != 3:
        raise ValueError(f"The crops have three axes, but the shape {grid.shape} has {grid.dim}.")
    images, labels = zip(*[_read(folder, name, grid) for name in names], strict=True)
    label_maps = torch.stack(labels)
    persons = [-(-numbers[name] // CROPS_PER_PERSON) for name in names]  # 1 and 2 are person 1, 3 and 4 person 2
    parts = [dealt(person, split_seed, DEAL) for person in persons]
    return Cohort(
        name="hippocampus",
        images=torch.cat(images),
        soi=one_hot(label_maps, STRUCTURES),
        labels=label_maps,
        grid=grid,
        people=tuple(f"cases {2 * person - 1:03d} and {2 * person:03d}" for person in persons),
        structures=STRUCTURES,
        splits={split: tuple(i for i, part in enumerate(parts) if part == split) for split in SPLITS},
        origin="Real T1 MRI of the hippocampus with labels drawn by hand (Medical Segmentation Decathlon, task 4).",
    )


def dealt(number: int, seed: int, deal: Sequence[str]) -> str:
    """The split of person ``number``, which depends on nothing but the arguments.

    People are dealt out like cards: each run of ``len(deal)`` consecutive numbers is put in a random order (that of
    the sha256 of ``"seed:number"``), and gets the splits named in ``deal`` in that order. So the shares are even along
    the numbers too, and a person stays in the split when others join or leave.

    Args:
        number: of the person, from 1.
        seed: of the order.
        deal: the split of each card.
    """
    first = number - (number - 1) % len(deal)
    hand = range(first, first + len(deal))
    order = sorted(hand, key=lambda card: hashlib.sha256(f"{seed}:{card}".encode()).digest())
    return deal[order.index(number)]


def centred(values: Shaped[Tensor, "*any"], shape: Sequence[int]) -> tuple[Shaped[Tensor, "*more"], tuple[int, ...]]:
    """Put the last axes into the middle of a larger (zeros around) or smaller (the border cut off) grid.

    Args:
        values: an image or a label map whose last axes are the grid.
        shape: voxels of the new grid.

    Returns:
        The values on the new grid, and the number of voxels put before each axis (negative: cut off). Where the
        difference is odd, the larger part comes after (of zeros) or before (of what is cut off).
    """
    before = tuple((new - old) // 2 for new, old in zip(shape, values.shape[-len(shape) :], strict=True))
    pads: list[int] = []
    for b, new, old in zip(before, shape, values.shape[-len(shape) :], strict=True):
        pads = [b, new - old - b, *pads]  # torch counts from the last axis
    return F.pad(values, pads), before


def _cases(folder: Path) -> dict[str, int]:
    """File name of each case and its number; each has an image and labels."""
    names = {
        kind: {path.name for path in (folder / kind).glob("*.nii.gz") if not path.name.startswith(".")}
        for kind in ("imagesTr", "labelsTr")
    }
    if not any(names.values()):
        raise FileNotFoundError(f"{folder} holds no case: run `python -m data_download hippocampus --force`.")
    lone = sorted(names["imagesTr"] ^ names["labelsTr"])
    if lone:
        has, lacks = ("image", "labels") if lone[0] in names["imagesTr"] else ("labels", "image")
        raise FileNotFoundError(f"{folder} holds the {has} of {lone[0]}, but not its {lacks}.")
    matches = {name: CASE.fullmatch(name) for name in names["imagesTr"]}
    strange = sorted(name for name, match in matches.items() if match is None or int(match[1]) < 1)
    if strange:
        raise ValueError(f"{folder / 'imagesTr' / strange[0]} is no case: those are hippocampus_001.nii.gz and so on.")
    return {name: int(match[1]) for name, match in matches.items() if match}


def _read(folder: Path, name: str, grid: Grid) -> tuple[Tensor, Tensor]:
    """One case on the common grid: image ``1 1 *grid`` in [0, 1] and labels ``*grid``."""
    image = read_volume(folder / "imagesTr" / name)
    labels = read_volume(folder / "labelsTr" / name, labels=True)
    if labels.grid != image.grid:
        raise ValueError(
            f"The labels of {name} lie on another grid than its image: {labels.grid.shape} voxels of"
            f" {labels.grid.spacing} mm from {labels.grid.origin} mm, against {image.grid.shape} of"
            f" {image.grid.spacing} mm from {image.grid.origin} mm."
        )
    if image.grid.dim != 3 or image.grid.spacing != (1, 1, 1):
        raise ValueError(f"{name} has voxels of {image.grid.spacing} mm, but these crops are 3D with voxels of 1 mm.")
    if any(n > m for n, m in zip(image.grid.shape, grid.shape, strict=True)):
        raise ValueError(f"{name} has {image.grid.shape} voxels and does not fit into a grid of {grid.shape}.")
    unknown = labels.data[~torch.isin(labels.data, torch.tensor([0, *STRUCTURES]))]
    if len(unknown):
        raise ValueError(f"The labels of {name} hold the value {unknown[0]}, but only 0, 1 and 2 have a meaning.")
    for value, structure in STRUCTURES.items():
        if not bool((labels.data == value).any()):
            raise ValueError(f"The labels of {name} show no {structure} (value {value}).")
    return centred(normalised(image.batch), grid.shape)[0], centred(labels.data, grid.shape)[0]
