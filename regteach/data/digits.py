"""Handwritten digits: real MNIST images, split by image, and pairs of one class.

Convention: ``n 1 28 28``, float32 in [0, 1]; axis 0 of an image is the row (downwards), axis 1 the column; a pixel is
1 mm, so ``grid`` is ``Grid((28, 28))``. A pair is (moving, fixed): two different images of the same digit, both from
the same part of the split.

The default are 5,000 digits, 500 a class, which all come from MNIST's official *training* set: a model trained on
them may be tested on the official test set. Split by image, 400 / 50 / 50 a class; the seed of the split is part of
:func:`load_digits`, not of a lesson.

Source: LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition, Proc. IEEE 86, 1998.
"""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import data_download
from regteach.data.cohort import SPLITS, Cohort
from regteach.grid import Grid

SIDE = 28
SPLIT_SEED = 0
THRESHOLD = 0.5  # of a digit's foreground


@dataclass(frozen=True, eq=False)
class Digits:
    """Digit images with their labels and their split.

    Args:
        images: grey values in [0, 1].
        labels: the digit that each image shows, 0 to 9.
        indices: for each of ``"train"``, ``"validation"``, ``"test"``, which images belong to it, ascending.
        grid: where the pixels of every image are; 1 mm pixels.
    """

    images: Float[Tensor, "n 1 28 28"]
    labels: Int[Tensor, "n"]
    indices: dict[str, Int[Tensor, "m"]]
    grid: Grid = Grid((SIDE, SIDE))  # noqa: RUF009 (frozen)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {len(index):,}" for name, index in self.indices.items())
        return f"Digits({len(self.images):,} images: {parts})"

    def split(self, name: str) -> Int[Tensor, "m"]:
        """Indices of the images of one part of the split.

        Raises:
            ValueError: if there is no such part.
        """
        if name not in self.indices:
            raise ValueError(f"A split is one of {', '.join(self.indices)}, not {name!r}.")
        return self.indices[name]

    def same_class_pairs(
        self, split: str, seed: int, n: int, label: int | None = None
    ) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]]:
        """Draw pairs of different images that show the same digit.

        All ordered pairs are equally likely and none is drawn twice; the draw depends on nothing but the arguments.

        Args:
            split: part of the split that both images come from.
            seed: of the draw.
            n: number of pairs.
            label: draw pairs of this digit only.

        Returns:
            Indices of the moving and of the fixed images.

        Raises:
            ValueError: if there is no such part, or it has fewer than ``n`` such pairs.
        """
        index = self.split(split)
        labels = self.labels[index]
        chosen = torch.unique(labels).tolist() if label is None else [label]
        groups = [index[labels == digit] for digit in chosen]
        sizes = [len(group) * (len(group) - 1) for group in groups]
        if not 0 <= n <= sum(sizes):
            raise ValueError(f"The {split} split has {sum(sizes):,} such pairs, but {n:,} were asked for.")
        # Pair number p of a group of m images: moving p // (m - 1), and fixed one of the m - 1 others.
        numbers = np.random.default_rng(seed).choice(sum(sizes), size=n, replace=False)
        starts = np.cumsum([0, *sizes])
        group_of = np.searchsorted(starts, numbers, side="right") - 1
        moving, fixed = torch.empty(n, dtype=torch.long), torch.empty(n, dtype=torch.long)
        for g, group in enumerate(groups):
            here = torch.from_numpy(np.flatnonzero(group_of == g))
            first, second = np.divmod(numbers[here] - starts[g], max(len(group) - 1, 1))
            second += second >= first  # step over the image itself
            moving[here], fixed[here] = group[first], group[second]
        return moving, fixed


def load_digits() -> Digits:
    """The 5,000 real digits that come with the course: 4,000 to train, 500 to validate, 500 to test.

    Raises:
        FileNotFoundError: if they have not been fetched; the message has the command.
        ValueError: if the file is not what it should be.
    """
    images, labels = _read_csv(data_download.locate("mnist-5k", "mnist_5k.csv.gz"))
    return Digits(images, labels, _stratified(labels, SPLIT_SEED, {"validation": 0.1, "test": 0.1}))


def load_digit_pairs(
    train: int = 20_000, validation: int = 500, test: int = 500, seed: int = 0, digits: Digits | None = None
) -> Cohort:
    """Pairs of different images of the same digit as a cohort: "people" are images, the structure is the digit itself.

    A digit may have several writers' hands in one split, and one writer's in several: MNIST does not say whose they
    are. No image is in two splits.

    Args:
        train: number of training pairs, at random among all there are (1.6 million).
        validation: number of validation pairs.
        test: number of test pairs.
        seed: of the choice of pairs; each split's pairs depend on it and on their own number only.
        digits: the images; those of :func:`load_digits` where left out.

    Returns:
        A cohort whose pairs are :meth:`Digits.same_class_pairs`; labels are the foreground, grey value above 0.5.

    Raises:
        FileNotFoundError: if the digits have not been fetched; the message has the command.
        ValueError: if a split has fewer such pairs than asked for.
    """
    digits = load_digits() if digits is None else digits
    foreground = segment(digits.images)
    pairs = {}
    for split, count in {"train": train, "validation": validation, "test": test}.items():
        moving, fixed = digits.same_class_pairs(split, seed, count)
        pairs[split] = tuple(zip(moving.tolist(), fixed.tolist(), strict=True))
    return Cohort(
        name="digits",
        images=digits.images,
        soi=foreground.float(),
        labels=foreground[:, 0].long(),
        grid=digits.grid,
        people=tuple(f"{label} ({number})" for number, label in enumerate(digits.labels.tolist())),
        structures={1: "digit"},
        splits={split: tuple(digits.split(split).tolist()) for split in SPLITS},
        origin="Real handwritten digits (MNIST), two different images of the same digit a pair.",
        given_pairs=pairs,
    )


def load_full_mnist() -> Digits:
    """All of MNIST through torchvision: the official 10,000 digits to test, a twelfth of the other 60,000 to validate.

    Raises:
        FileNotFoundError: if it has not been fetched; the message has the command.
        ImportError: if torchvision can not be imported here; the message says why.
        ValueError: if a file is not what it should be.
    """
    folder = data_download.locate("mnist")
    datasets = _torchvision_datasets()
    try:
        parts = [datasets.MNIST(root=str(folder), train=train, download=False) for train in (True, False)]
    except Exception as error:  # torchvision raises RuntimeError, ValueError, AssertionError, as the damage falls
        raise ValueError(f"torchvision can not read MNIST in {folder} ({error}): fetch it again.") from None
    images = torch.cat([part.data for part in parts]).unsqueeze(1).float() / 255
    labels = torch.cat([part.targets for part in parts]).long()
    official = len(parts[0].targets)
    indices = _stratified(labels[:official], SPLIT_SEED, {"validation": 1 / 12})
    return Digits(images, labels, {**indices, "test": torch.arange(official, len(labels))})


def segment(images: Float[Tensor, "b 1 28 28"]) -> Bool[Tensor, "b 1 28 28"]:
    """Foreground of digits: grey value above 0.5."""
    return images > THRESHOLD


def _read_csv(path: Path) -> tuple[Float[Tensor, "n 1 28 28"], Int[Tensor, "n"]]:
    """Images and labels of a table with 784 grey values (0 to 255) and the label in each row."""
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8, ndmin=2)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole table of digits ({error}): fetch mnist-5k again.") from None
    if table.shape[1] != SIDE * SIDE + 1:
        raise ValueError(f"{path} has {table.shape[1]} columns, but digits have 784 grey values and a label.")
    if table[:, -1].max(initial=0) > 9:
        raise ValueError(f"{path} has a label {table[:, -1].max()}, but digits are 0 to 9.")
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, SIDE, SIDE).astype(np.float32) / 255)
    return images, torch.from_numpy(table[:, -1].astype(np.int64))


def _stratified(labels: Int[Tensor, "n"], seed: int, fractions: dict[str, float]) -> dict[str, Int[Tensor, "m"]]:
    """Split by image so that each class gives the same fraction to each part; the rest trains."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {"train": [], **{name: [] for name in fractions}}
    for digit in np.unique(labels.numpy()):
        shuffled = rng.permutation(np.flatnonzero(labels.numpy() == digit))
        size = len(shuffled)
        for name, fraction in fractions.items():
            count = math.floor(fraction * size + 0.5)
            parts[name].append(shuffled[:count])
            shuffled = shuffled[count:]
        parts["train"].append(shuffled)
    return {name: torch.from_numpy(np.sort(np.concatenate(chunks))) for name, chunks in parts.items()}


def _torchvision_datasets() -> ModuleType:
    """torchvision.datasets, imported here only: its compiled part fails where it was built for another torch."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(
            f"All of MNIST is read through torchvision, which can not be imported here ({error}): install the build of"
            f" torchvision that belongs to torch {torch.__version__}, or use the 5,000 digits of load_digits()."
        ) from error
    return datasets
