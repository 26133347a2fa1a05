"""Brain slices: one axial T1 slice of each of up to 20 people (OASIS-TRT-20), brain-extracted, cortex labelled.

Convention: real images, 1 mm pixels, with background around them so that each axis can be halved four times. As
structures serve the cortex of each half of the brain: labels 1000 to 1999 (left) and 2000 to 2999 (right), whatever
the gyrus. By eye they follow the image. All other labels are left out: those of ventricles and caudate do not.

Orientation: axes are those that the file's header gives, brought to RAS, because a file that a user registers is read
in the same way. Along axis 0, which runs to the right, that agrees with the labels: label 1 (left) has the lower
indices. Along axis 1 the header is wrong: the axis runs to the back, not to the front (the frontal labels, 1027, have
lower indices than the occipital ones, 1011). It makes no difference to registration: all slices are alike in it.

Without a download there are six slices of six more people, without labels: :func:`load_unlabelled_slices`.

People are few, so a result on one split says little: :func:`slice_folds` tests on everybody in turn.

Sources: Klein, Tourville, 101 labeled brain images and a consistent human cortical labeling protocol, Front Neurosci 6,
2012; Marcus et al., OASIS, J Cogn Neurosci 19, 2007; Tustison et al., The ANTsX ecosystem, Sci Rep 11, 2021 (the six).
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

import data_download
from regteach.data.cohort import SPLITS, Cohort, one_hot
from regteach.data.hippocampus import centred, dealt
from regteach.data.intensity import normalised
from regteach.data.volumes import read_volume
from regteach.grid import Grid

SHAPE = (160, 208)  # all 12 brains fit, with a margin; both are multiples of 16
STRUCTURES = {1: "left cortex", 2: "right cortex"}
PER_STRUCTURE = 1000  # label 1005 is region 5 of the left, 2005 of the right
NAME = re.compile(r"OASIS-TRT-20-(\d+)(_DKT31_CMA_labels)?_slice(\d+)\.nii\.gz")
DEAL = ("train",) * 4 + ("validation", "test")
UNLABELLED = (16, 27, 30, 62, 64, 85)
BACKGROUND = 10  # grey values (of 255) up to this are background: JPEG leaves traces around the brain


def load_slices(split_seed: int = 0, shape: Sequence[int] = SHAPE) -> Cohort:
    """The slices, of each six people four to train, one to validate, one to test.

    Args:
        split_seed: of the split; a person's split does not depend on who else is there (as for the hippocampus).
        shape: pixels of the common grid, 1 mm each. A smaller one than the files' cuts background off, never brain:
            (160, 208) holds the first twelve people.

    Returns:
        A cohort with one channel, and a crisp SoI map (0 or 1) a structure. Pixels keep the files' coordinates.

    Raises:
        FileNotFoundError: if the data set has not been fetched, or an image or its labels are missing.
        ValueError: if a file is not what it should be, or does not fit the grid.
    """
    folder = data_download.locate("oasis-trt-slices")
    files = _pairs(folder)
    images, labels, grids = zip(*[_read(*files[person], shape) for person in files], strict=True)
    for person, grid in zip(files, grids, strict=True):
        if grid != grids[0]:
            raise ValueError(f"The slice of person {person} lies on another grid than that of person {min(files)}.")
    label_maps = torch.stack(labels)
    parts = [dealt(person, split_seed, DEAL) for person in files]
    return Cohort(
        name="slices",
        images=torch.cat(images),
        soi=one_hot(label_maps, STRUCTURES),
        labels=label_maps,
        grid=grids[0],
        people=tuple(f"OASIS-TRT-20-{person}" for person in files),
        structures=STRUCTURES,
        splits={split: tuple(i for i, part in enumerate(parts) if part == split) for split in SPLITS},
        origin="Real T1 MRI, one axial slice a person, with cortical labels edited by hand (Mindboggle, OASIS-TRT-20).",
    )


def load_unlabelled_slices(split_seed: int = 0, shape: Sequence[int] = SHAPE) -> Cohort:
    """Six axial T1 slices of six people, brain-extracted, without labels: four to train, one to validate, one to test.

    The one structure is the brain, from the image itself (the largest piece above a grey value, holes filled), so an
    overlap says no more than whether outlines agree. For more, deform them by a known transform (:mod:`large`), or use
    :func:`slice_folds` to test on everybody in turn.

    Axis 0 runs along the picture's rows of pixels, from its left to its right, axis 1 upwards (to the front). Which
    side of the picture is the left side of the person is not known. The files give no size either: a pixel is taken as
    1 mm, which makes the brains 172 to 178 mm long. Each brain is put into the middle of the grid.

    Args:
        split_seed: of the split.
        shape: pixels of the grid; a brain has to fit into it.

    Raises:
        FileNotFoundError: if a slice has not been fetched; the message has the command.
        ValueError: if a file is no grey JPEG, shows no brain, or does not fit the grid.
    """
    shape = tuple(shape)
    read = [_read_unlabelled(data_download.locate("t1-slices", f"r{number}slice.jpg"), shape) for number in UNLABELLED]
    brains = torch.stack([brain for _, brain in read])
    parts = [dealt(k, split_seed, DEAL) for k in range(1, len(UNLABELLED) + 1)]
    return Cohort(
        name="unlabelled-slices",
        images=torch.cat([image for image, _ in read]),
        soi=brains[:, None].float(),
        labels=brains.long(),
        grid=Grid(shape),
        people=tuple(f"r{number}" for number in UNLABELLED),
        structures={1: "brain"},
        splits={split: tuple(i for i, part in enumerate(parts) if part == split) for split in SPLITS},
        origin="Real T1 MRI, one axial slice a person, without labels (example data of ANTs).",
    )


def slice_folds(cohort: Cohort, size: int = 2, seed: int = 0) -> list[dict[str, tuple[int, ...]]]:
    """Splits in which everybody is tested on once: leave ``size`` people out, and validate on the next ``size``.

    ``dataclasses.replace(cohort, splits=fold)`` is the cohort with such a split.

    Args:
        cohort: of any data set.
        size: number of people to test on; the last fold has fewer where the number of people is no multiple.
        seed: of the order of people.

    Returns:
        One split for each fold: indices of "train", "validation" and "test", no person in two of them.

    Raises:
        ValueError: if the people do not suffice for three groups.
    """
    people = sorted(set(cohort.people))
    order = torch.randperm(len(people), generator=torch.Generator().manual_seed(seed)).tolist()
    if size < 1 or len(people) <= 2 * size:
        raise ValueError(f"{len(people)} people can not be split into groups of {size} to train, validate and test on.")
    groups = [{people[i] for i in order[start : start + size]} for start in range(0, len(people), size)]
    folds = []
    for test, validation in zip(groups, [*groups[1:], groups[0]], strict=True):
        chosen = {"train": set(people) - test - validation, "validation": validation, "test": test}
        folds.append({k: tuple(i for i, p in enumerate(cohort.people) if p in who) for k, who in chosen.items()})
    return folds


def _pairs(folder: Path) -> dict[int, tuple[Path, Path]]:
    """Image and labels of each person, in the order of their numbers, side by side or in folders."""
    found: dict[tuple[int, str], dict[bool, Path]] = {}
    for path in sorted(folder.rglob("*.nii.gz")):
        match = NAME.fullmatch(path.name)
        if match is None:
            continue
        both = found.setdefault((int(match[1]), match[3]), {})
        if bool(match[2]) in both:
            raise ValueError(f"{folder} holds {path.name} twice: {both[bool(match[2])]} and {path}.")
        both[bool(match[2])] = path
    if not found:
        raise FileNotFoundError(f"{folder} holds no slice: run `python -m data_download oasis-trt-slices --force`.")
    pairs: dict[int, tuple[Path, Path]] = {}
    for (person, _), both in sorted(found.items()):
        if len(both) < 2:
            has, lacks = ("labels", "image") if True in both else ("image", "labels")
            raise FileNotFoundError(f"{folder} holds the {has} of person {person}, but not the {lacks} of that slice.")
        if person in pairs:
            raise ValueError(f"{folder} holds two slices of person {person}, but one of each is expected.")
        pairs[person] = both[False], both[True]
    return pairs


def _read(image_path: Path, labels_path: Path, shape: Sequence[int]) -> tuple[Tensor, Tensor, Grid]:
    """One slice on a grid of ``shape``: image ``1 1 *grid`` in [0, 1], labels ``*grid`` of 0, 1 and 2, the grid."""
    image, regions = read_volume(image_path), read_volume(labels_path, labels=True)
    if regions.grid != image.grid:
        raise ValueError(f"{labels_path.name} lies on another grid than {image_path.name}.")
    if image.grid.spacing != (1, 1) or len(shape) != 2:
        raise ValueError(
            f"{image_path.name} has pixels of {image.grid.spacing} mm, to be put on a grid of {tuple(shape)},"
            " but slices have two axes and pixels of 1 mm."
        )
    half = regions.data // PER_STRUCTURE
    labels = torch.where((half == 1) | (half == 2), half, 0)
    for label, name in STRUCTURES.items():
        if not (labels == label).any():
            raise ValueError(f"{labels_path.name} holds no {name} (labels {label}000 to {label}999).")
    placed, before = centred(normalised(image.batch), shape)
    placed_labels, _ = centred(labels, shape)
    if (centred(image.data, shape)[0] != 0).sum() < (image.data != 0).sum() or placed_labels.sum() < labels.sum():
        raise ValueError(f"{image_path.name} does not fit into a grid of {tuple(shape)}: brain would be cut off.")
    origin = tuple(o - b * h for o, b, h in zip(image.grid.origin, before, image.grid.spacing, strict=True))
    return placed, placed_labels, Grid(tuple(shape), image.grid.spacing, origin)


def _read_unlabelled(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Image ``1 1 *grid`` in [0, 1], 0 outside the brain, and the brain ``*grid``."""
    from matplotlib.image import imread  # slow to import, and needed for these files only

    try:
        picture = np.asarray(imread(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a whole JPEG image ({error}): fetch t1-slices again.") from None
    if picture.ndim != 2:
        raise ValueError(f"{path.name} is not a grey image: its shape is {picture.shape}.")
    grey = np.ascontiguousarray(picture.T[:, ::-1])  # rows run downwards: now axis 1 runs upwards
    pieces, count = ndimage.label(grey > BACKGROUND)
    if not count:
        raise ValueError(f"{path.name} shows no brain: no grey value is above {BACKGROUND}.")
    largest = 1 + int(np.argmax(np.bincount(pieces.reshape(-1))[1:]))
    brain = ndimage.binary_fill_holes(pieces == largest)
    box = ndimage.find_objects(brain.astype(np.uint8))[0]
    if any(n > m for n, m in zip(brain[box].shape, shape, strict=True)):
        raise ValueError(f"{path.name} holds a brain of {brain[box].shape} pixels, which do not fit into {shape}.")
    alone = torch.from_numpy(np.where(brain, grey, 0)[box].astype(np.float32))
    image, _ = centred(normalised(alone[None, None]), shape)
    return image, centred(torch.from_numpy(brain[box]), shape)[0]
