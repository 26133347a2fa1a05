"""Digits: the split and the pairs on a small table made here; the real 5,000 where they are."""

import gzip
import itertools
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data_download
from regteach.data import digits as module
from regteach.data.digits import SPLITS, Digits, load_digit_pairs, load_digits, load_full_mnist, segment
from regteach.grid import Grid

PINNED = [18, 19, 27, 39, 75, 83, 84, 85]
LIBRARIES: list[torch.library.Library] = []  # operators live as long as the library that defines them
HERE = data_download.present("mnist-5k")


def table(per_class: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    grey = rng.integers(0, 256, size=(10 * per_class, 784))
    return np.column_stack([grey, np.repeat(np.arange(10), per_class)])


def write_csv(root: Path, content: np.ndarray) -> Path:
    path = root / "mnist_5k" / "mnist_5k.csv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        np.savetxt(file, content, fmt="%d", delimiter=",")
    return path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def small(root: Path) -> Digits:
    write_csv(root, table(20))
    return load_digits()


def test_the_table_becomes_images_labels_and_a_grid(small: Digits) -> None:
    content = table(20)
    assert small.images.shape == (200, 1, 28, 28)
    assert small.images.dtype == torch.float32
    assert small.grid == Grid((28, 28), (1, 1), (0, 0))
    np.testing.assert_array_equal(small.labels, content[:, -1])
    np.testing.assert_allclose(small.images[37, 0, 3, 5], content[37, 3 * 28 + 5] / 255, rtol=1e-6)  # row, column
    assert "train 160" in repr(small)


def test_the_split_is_by_image_and_even_over_classes(small: Digits) -> None:
    parts = [set(small.split(name).tolist()) for name in SPLITS]
    assert [len(part) for part in parts] == [160, 20, 20]
    for a, b in itertools.combinations(parts, 2):
        assert not a & b
    assert set.union(*parts) == set(range(200))
    for name, each in zip(SPLITS, (16, 2, 2), strict=True):
        assert torch.bincount(small.labels[small.split(name)]).tolist() == [each] * 10


def test_an_unknown_split_is_named(small: Digits) -> None:
    with pytest.raises(ValueError, match="train, validation, test, not 'val'"):
        small.split("val")


def test_pairs_are_different_images_of_one_class_within_one_split(small: Digits) -> None:
    moving, fixed = small.same_class_pairs("train", seed=3, n=2000)
    assert (small.labels[moving] == small.labels[fixed]).all()
    assert (moving != fixed).all()
    members = small.split("train")
    assert torch.isin(moving, members).all()
    assert torch.isin(fixed, members).all()
    assert len({(int(m), int(f)) for m, f in zip(moving, fixed, strict=True)}) == 2000
    counts = torch.bincount(small.labels[moving], minlength=10)
    assert counts.min() > 150  # 2,400 pairs exist, 240 a class


def test_all_pairs_can_be_drawn_and_not_one_more(small: Digits) -> None:
    moving, fixed = small.same_class_pairs("test", seed=0, n=20)
    drawn = {(int(m), int(f)) for m, f in zip(moving, fixed, strict=True)}
    members = small.split("test").tolist()
    assert drawn == {(m, f) for m, f in itertools.permutations(members, 2) if small.labels[m] == small.labels[f]}
    with pytest.raises(ValueError, match="has 20 such pairs, but 21 were asked for"):
        small.same_class_pairs("test", seed=0, n=21)


def test_pairs_depend_on_the_seed_and_on_nothing_else(small: Digits) -> None:
    first = small.same_class_pairs("train", seed=1, n=50)
    torch.rand(10)
    again, other = small.same_class_pairs("train", seed=1, n=50), small.same_class_pairs("train", seed=2, n=50)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_pairs_of_one_digit(small: Digits) -> None:
    moving, fixed = small.same_class_pairs("train", seed=0, n=100, label=7)
    assert (small.labels[moving] == 7).all()
    assert (small.labels[fixed] == 7).all()


def test_segment_is_a_threshold_at_one_half() -> None:
    images = torch.tensor([0.0, 0.5, 0.51, 1.0]).reshape(1, 1, 2, 2)
    assert segment(images).flatten().tolist() == [False, False, True, True]


def test_missing_digits_name_the_command(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run `python -m data_download mnist-5k`\."):
        load_digits()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("truncated", "is not a whole table of digits"),
        ("text", "is not a whole table of digits"),
        ("columns", "has 784 columns, but digits have 784 grey values and a label"),
        ("label", "has a label 12, but digits are 0 to 9"),
    ],
)
def test_a_damaged_table_gives_one_sentence(root: Path, damage: str, words: str) -> None:
    content = table(2)
    if damage == "columns":
        content = content[:, 1:]
    if damage == "label":
        content[3, -1] = 12
    path = write_csv(root, content)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    if damage == "text":
        path.write_bytes(b"not a gzip")
    with pytest.raises(ValueError, match=words):
        load_digits()


@pytest.mark.skipif(not HERE, reason="mnist-5k is not here: python data_download mnist-5k")
def test_the_real_digits() -> None:
    real = load_digits()
    assert [len(real.split(name)) for name in SPLITS] == [4000, 500, 500]
    assert torch.bincount(real.labels).tolist() == [500] * 10
    assert (real.images.min(), real.images.max()) == (0, 1)
    # The split is part of every result of the course: it must not change with a library.
    assert real.split("test")[:8].tolist() == PINNED
    ones = real.images[real.labels == 1]
    zeros = real.images[real.labels == 0]
    assert ones.mean() < 0.6 * zeros.mean()  # a one has less ink
    middle_row, middle_column = zeros[:, 0, 14].mean(0), zeros[:, 0, :, 14].mean(0)
    assert middle_row[14] < middle_row.max() / 2  # a zero is hollow
    assert middle_column[14] < middle_column.max() / 2


# ---- all of MNIST, through torchvision ----


def write_idx(root: Path, train: int, test: int) -> dict[str, np.ndarray]:
    """The four files of MNIST in miniature, as a download leaves them."""
    folder = root / "mnist" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    truth = {}
    for part, n in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, size=(n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 2051, n, 28, 28) + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, n) + labels.tobytes())
        truth[part] = images
    return truth


@pytest.fixture
def torchvision_works() -> None:
    """A torchvision built for another torch lacks two operators; declared here, its data sets can be imported."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        ):
            library.define(operator)
        LIBRARIES.append(library)


def test_full_mnist_keeps_the_official_test_set_apart(root: Path, torchvision_works: None) -> None:
    truth = write_idx(root, train=240, test=30)
    full = load_full_mnist()
    assert full.images.shape == (270, 1, 28, 28)
    assert full.split("test").tolist() == list(range(240, 270))
    assert len(full.split("validation")) == 20
    assert len(full.split("train")) == 220
    np.testing.assert_allclose(full.images[:240, 0] * 255, truth["train"], atol=1e-4)
    np.testing.assert_allclose(full.images[240:, 0] * 255, truth["t10k"], atol=1e-4)
    assert full.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_damaged_full_mnist_gives_one_sentence(root: Path, torchvision_works: None) -> None:
    write_idx(root, train=20, test=10)
    path = root / "mnist" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="torchvision can not read MNIST"):
        load_full_mnist()


def test_missing_full_mnist_names_the_command(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run `python -m data_download mnist`\."):
        load_full_mnist()


def test_a_torchvision_that_can_not_be_imported_is_explained(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(root, train=20, test=10)

    class Broken:
        def find_spec(self, name: str, path=None, target=None) -> None:
            if name.split(".")[0] == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"nms does not exist\): install the build of torchvision that belongs"):
        load_full_mnist()


def test_torchvision_is_not_imported_for_the_small_set() -> None:
    source = Path(module.__file__).read_text()
    assert source.count("torchvision import") == 1
    assert "    from torchvision import datasets" in source  # inside a function


# As a cohort


def test_pairs_of_the_cohort_show_the_same_digit_twice(small: Digits) -> None:
    cohort = load_digit_pairs(300, 15, 10, seed=2)
    assert {split: len(cohort.pairs(split)) for split in SPLITS} == {"train": 300, "validation": 15, "test": 10}
    for split in SPLITS:
        for moving, fixed in cohort.pairs(split):
            assert moving != fixed
            assert small.labels[moving] == small.labels[fixed]
            assert {moving, fixed} <= set(small.split(split).tolist())
        assert len(set(cohort.pairs(split))) == len(cohort.pairs(split))
    assert len({small.labels[m].item() for m, _ in cohort.pairs("train")}) == 10


def test_images_are_the_people_of_the_cohort_and_half_intensity_is_the_structure(small: Digits) -> None:
    cohort = load_digit_pairs(10, 5, 5)
    assert len(set(cohort.people)) == len(cohort) == len(small.images)
    members = [set(cohort.splits[split]) for split in SPLITS]
    assert sum(map(len, members)) == len(set().union(*members)) == 200
    assert torch.equal(cohort.labels, (small.images[:, 0] > 0.5).long())
    assert torch.equal(cohort.soi[:, 0], cohort.labels.float())
    assert dict(cohort.structures) == {1: "digit"}


def test_the_seed_fixes_the_pairs_and_splits_do_not_depend_on_each_other(small: Digits) -> None:
    first, other_sizes, other_seed = (
        load_digit_pairs(50, 5, 5),
        load_digit_pairs(10, 5, 5),
        load_digit_pairs(50, 5, 5, 1),
    )
    assert first.pairs("test") == other_sizes.pairs("test")
    assert first.pairs("train") == load_digit_pairs(50, 5, 5, digits=small).pairs("train")
    assert first.pairs("train") != other_seed.pairs("train")


def test_more_pairs_than_there_are_is_an_error(small: Digits) -> None:
    with pytest.raises(ValueError, match="test split has 20 such pairs, but 21"):
        load_digit_pairs(10, 5, 21)
