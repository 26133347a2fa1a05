"""Slices: tiny files in the layouts that a fetch and a clone leave; the real slices where they are."""

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import data_download
from regteach.data.cohort import SPLITS, Cohort
from regteach.data.slices import UNLABELLED, load_slices, load_unlabelled_slices, slice_folds
from regteach.grid import Grid
from regteach.metrics import dice, mean_over_labels

SIZE = (20, 27)
SHAPE = (24, 32)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # as the real headers say
HERE = data_download.present("oasis-trt-slices")


def one(person: int) -> tuple[np.ndarray, np.ndarray]:
    """A slice and its labels as stored: brain inside a margin of 3, cortex of both sides, and labels to leave out."""
    rng = np.random.default_rng(person)
    image = np.zeros(SIZE, np.float32)
    image[3:-3, 3:-3] = rng.uniform(100, 1900, (SIZE[0] - 6, SIZE[1] - 6))
    labels = np.zeros(SIZE, np.float32)
    labels[12:16, 4:9] = 1005
    labels[12:16, 15:20] = 1999
    labels[4:8, 4:9] = 2000
    labels[4:8, 15:20] = 2035
    labels[8, 8:12] = (4, 43, 11, 50)
    labels[9, 8:11] = (999, 3000, 14)
    return image, labels


def write(path: Path, array: np.ndarray, affine: np.ndarray = LPS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def image_name(person: int) -> str:
    return f"OASIS-TRT-20-{person}_slice118.nii.gz"


def labels_name(person: int) -> str:
    return f"OASIS-TRT-20-{person}_DKT31_CMA_labels_slice118.nii.gz"


def write_slices(root: Path, people: list[int], nested: bool = False) -> Path:
    folder = root / "oasis_trt_slices"
    for person in people:
        image, labels = one(person)
        write(folder / ("Atlases" if nested else ".") / image_name(person), image)
        write(folder / ("Labels" if nested else ".") / labels_name(person), labels)
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    return tmp_path


def test_the_cortex_of_each_side_is_a_structure_and_nothing_else_is(root: Path) -> None:
    write_slices(root, [1])
    cohort = load_slices(shape=SIZE)
    stored = one(1)[1]
    expected = np.where((stored >= 1000) & (stored < 2000), 1, np.where((stored >= 2000) & (stored < 3000), 2, 0))
    np.testing.assert_array_equal(cohort.labels[0], expected[::-1, ::-1])  # canonical: both axes run the other way
    assert cohort.structures == {1: "left cortex", 2: "right cortex"}
    for channel, label in enumerate((1, 2)):
        assert torch.equal(cohort.soi[:, channel] == 1, cohort.labels == label)


def test_intensities_are_scaled_by_the_brain_alone(root: Path) -> None:
    write_slices(root, [1])
    stored = one(1)[0][::-1, ::-1]
    low, high = np.percentile(stored[stored > 0], (1, 99), method="nearest")
    expected = np.clip((stored - low) / (high - low), 0, 1)
    np.testing.assert_allclose(load_slices(shape=SIZE).images[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("shape", [SHAPE, (16, 23), (21, 28)])
def test_pixels_keep_their_coordinates(root: Path, shape: tuple[int, int]) -> None:
    write_slices(root, [1])
    cohort = load_slices(shape=shape)
    assert cohort.grid.shape == shape
    stored = one(1)[1]
    i, j = 13, 17  # label 1999
    assert stored[i, j] == 1999
    x, y = (LPS @ (i, j, 0, 1))[:2]
    at = [round((p - o) / h) for p, o, h in zip((x, y), cohort.grid.origin, cohort.grid.spacing, strict=True)]
    assert cohort.labels[0][tuple(at)] == 1
    edges = (cohort.labels[0] == 1).nonzero().float() + torch.tensor(cohort.grid.origin)
    truth = np.argwhere((stored >= 1000) & (stored < 2000)) * (-1, -1)
    np.testing.assert_allclose(edges.amin(0), truth.min(0))
    np.testing.assert_allclose(edges.amax(0), truth.max(0))


def test_padding_adds_background_and_cropping_keeps_the_brain(root: Path) -> None:
    write_slices(root, [1, 2])
    as_stored, larger, smaller = (load_slices(shape=shape) for shape in (SIZE, SHAPE, (16, 23)))
    for other in (larger, smaller):
        torch.testing.assert_close(other.images.sum((1, 2, 3)), as_stored.images.sum((1, 2, 3)))
        assert torch.equal(other.labels.sum((1, 2)), as_stored.labels.sum((1, 2)))
    assert torch.equal(larger.images[:, :, 2:22, 2:29], as_stored.images)


def test_a_grid_that_would_cut_brain_off_is_refused(root: Path) -> None:
    write_slices(root, [1])
    with pytest.raises(ValueError, match=r"does not fit into a grid of \(13, 23\): brain would be cut off"):
        load_slices(shape=(13, 23))
    with pytest.raises(ValueError, match="slices have two axes and pixels of 1 mm"):
        load_slices(shape=(16, 16, 16))


def test_people_are_in_the_order_of_their_numbers(root: Path) -> None:
    write_slices(root, [10, 2, 1])
    assert load_slices(shape=SHAPE).people == ("OASIS-TRT-20-1", "OASIS-TRT-20-2", "OASIS-TRT-20-10")


def test_the_folders_of_a_clone_are_read_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_slices(root, [1, 2])
    flat = load_slices(shape=SHAPE)
    nested = write_slices(root / "clone", [1, 2], nested=True)
    monkeypatch.setattr(data_download, "locate", lambda name: nested)
    again = load_slices(shape=SHAPE)
    assert torch.equal(again.images, flat.images)
    assert torch.equal(again.labels, flat.labels)
    assert again.people == flat.people


# ---- splits and folds ----


def test_of_six_people_four_train_one_validates_one_tests(root: Path) -> None:
    write_slices(root, list(range(1, 13)))
    for seed in range(3):
        splits = load_slices(split_seed=seed, shape=SHAPE).splits
        for first in (0, 6):
            shares = Counter(split for split in SPLITS for i in splits[split] if first <= i < first + 6)
            assert shares == {"train": 4, "validation": 1, "test": 1}


def test_a_person_stays_in_the_split_when_eight_more_come(root: Path) -> None:
    write_slices(root, list(range(1, 13)))
    dozen = load_slices(shape=SHAPE)
    write_slices(root, list(range(13, 21)))
    everybody = load_slices(shape=SHAPE)
    for split in SPLITS:
        assert set(dozen.splits[split]) == {i for i in everybody.splits[split] if i < 12}
    assert sorted(i for members in everybody.splits.values() for i in members) == list(range(20))


def test_the_split_of_seed_0_does_not_change(root: Path) -> None:
    write_slices(root, list(range(1, 13)))
    cohort = load_slices(shape=SHAPE)
    assert cohort.splits["test"] == (0, 10)
    assert cohort.splits["validation"] == (4, 11)


def cohort_of(people: int, images_each: int = 1) -> Cohort:
    n = people * images_each
    names = tuple(f"p{i // images_each}" for i in range(n))
    grid = Grid((4, 5))
    blank = torch.zeros(n, 1, *grid.shape)
    return Cohort("made up", blank, blank, blank[:, 0].long(), grid, names, {1: "a"}, {"train": (0,)}, "Synthetic.")


@pytest.mark.parametrize(("people", "size", "each"), [(12, 2, 1), (20, 2, 1), (7, 3, 2), (3, 1, 1), (13, 2, 1)])
def test_folds_test_and_validate_on_everybody_once(people: int, size: int, each: int) -> None:
    cohort = cohort_of(people, each)
    folds = slice_folds(cohort, size)
    assert len(folds) == -(-people // size)
    for split in ("validation", "test"):
        assert sorted(i for fold in folds for i in fold[split]) == list(range(len(cohort)))
    for fold in folds:
        assert tuple(fold) == SPLITS
        assert sorted(itertools.chain(*fold.values())) == list(range(len(cohort)))
        assert fold["train"]
        assert dataclasses.replace(cohort, splits=fold).splits == fold  # no person is in two splits, or it would raise


def test_folds_depend_on_the_seed_alone() -> None:
    cohort = cohort_of(12)
    torch.rand(3)
    assert slice_folds(cohort, seed=1) == slice_folds(cohort, seed=1) != slice_folds(cohort, seed=2)


@pytest.mark.parametrize(("people", "size"), [(4, 2), (2, 1), (12, 0), (5, 3)])
def test_too_few_people_for_folds(people: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"{people} people can not be split into groups of {size}"):
        slice_folds(cohort_of(people), size)


# ---- bad input ----


def test_absent_data_name_the_command(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run `python -m data_download oasis-trt-slices`\."):
        load_slices()


def damage(folder: Path, kind: str) -> None:
    image, labels = folder / image_name(2), folder / labels_name(2)
    moved, coarse = LPS.copy(), LPS * 2
    moved[1, 3], coarse[3, 3] = 5, 1
    stored = one(2)
    match kind:
        case "labels missing":
            labels.unlink()
        case "image missing":
            image.unlink()
        case "another slice":
            labels.rename(labels.with_name(labels.name.replace("118", "119")))
        case "two slices":
            write(folder / image_name(2).replace("118", "90"), stored[0])
            write(folder / labels_name(2).replace("118", "90"), stored[1])
        case "twice":
            write(folder / "Atlases" / image.name, stored[0])
        case "labels moved":
            write(labels, stored[1], moved)
        case "person moved":
            write(image, stored[0], moved)
            write(labels, stored[1], moved)
        case "2 mm":
            write(image, stored[0], coarse)
            write(labels, stored[1], coarse)
        case "no left":
            write(labels, np.where((stored[1] >= 1000) & (stored[1] < 2000), 0, stored[1]))
        case "not whole":
            write(labels, stored[1] + np.float32(0.5))


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("labels missing", FileNotFoundError, "the image of person 2, but not the labels of that slice"),
        ("image missing", FileNotFoundError, "the labels of person 2, but not the image of that slice"),
        ("another slice", FileNotFoundError, "the image of person 2, but not the labels of that slice"),
        ("two slices", ValueError, "two slices of person 2"),
        ("twice", ValueError, f"holds {image_name(2)} twice"),
        ("labels moved", ValueError, f"{labels_name(2)} lies on another grid than {image_name(2)}"),
        ("person moved", ValueError, "slice of person 2 lies on another grid than that of person 1"),
        ("2 mm", ValueError, r"has pixels of \(2.0, 2.0\) mm"),
        ("no left", ValueError, r"holds no left cortex \(labels 1000 to 1999\)"),
        ("not whole", ValueError, "is no label map"),
    ],
)
def test_a_planted_error_gives_one_sentence(root: Path, kind: str, error: type[Exception], words: str) -> None:
    folder = write_slices(root, [1, 2])
    damage(folder, kind)
    with pytest.raises(error, match=words) as raised:
        load_slices(shape=SHAPE)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_slice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_download, "locate", lambda name: root)
    with pytest.raises(FileNotFoundError, match=r"holds no slice: run `python -m data_download oasis-trt-slices --for"):
        load_slices()


# ---- the real slices ----


def mean_dice(labels: torch.Tensor, pairs: list[tuple[int, int]]) -> float:
    moving, fixed = (labels[[pair[side] for pair in pairs]][:, None] for side in (0, 1))
    return float(mean_over_labels(dice(moving, fixed, [1, 2])).mean())


@pytest.mark.skipif(not HERE, reason="oasis-trt-slices is not fetched: python -m data_download oasis-trt-slices")
def test_the_real_slices() -> None:
    cohort = load_slices()
    assert cohort.images.shape[1:] == (1, 160, 208)
    people = range(len(cohort))
    for image, labels in zip(cohort.images[:, 0], cohort.labels, strict=True):
        assert (image[labels > 0] > 0).float().mean() > 0.97  # cortex lies in the brain
        left, right = ((labels == label).nonzero()[:, 0].float().mean() for label in (1, 2))
        assert 60 < right - left < 80  # mm: axis 0 runs to the right
        grey, white = image[labels > 0].median(), image[(labels == 0) & (image > 0)].quantile(0.75)
        assert grey < 0.75 * white
    # What registration starts from, and the same with the sides exchanged.
    pairs = list(itertools.permutations(people, 2))
    assert 0.44 < mean_dice(cohort.labels, pairs) < 0.52
    exchanged = torch.where(cohort.labels > 0, 3 - cohort.labels, 0)
    moving = cohort.labels[[m for m, _ in pairs]][:, None]
    assert mean_over_labels(dice(moving, exchanged[[f for _, f in pairs]][:, None], [1, 2])).mean() < 0.1
    # A smaller grid holds the same brains.
    small = load_slices(shape=(160, 208))
    assert torch.equal(small.labels.sum((1, 2)), cohort.labels.sum((1, 2)))
    assert mean_dice(small.labels, pairs[:5]) == pytest.approx(mean_dice(cohort.labels, pairs[:5]), abs=1e-6)


# The six without labels


def ellipse(person: int) -> np.ndarray:
    """A picture, rows downwards: a brain of known outline with a dark hole in it, a bright front, and a stray piece."""
    row, column = np.mgrid[0:64, 0:56]
    radius = ((row - 30 - person % 5) / (20 + person % 3)) ** 2 + ((column - 25) / 14) ** 2
    picture = np.where(radius < 1, 120 + column, 0)
    picture[(radius < 1) & (row < 20)] = 240
    picture[(row - 35) ** 2 + (column - 25) ** 2 < 9] = 0
    picture[2:4, 50:53] = 200
    return picture.astype(np.uint8)


def write_pictures(root: Path) -> Path:
    from PIL import Image

    folder = root / "t1_slices"
    folder.mkdir(parents=True)
    for person in UNLABELLED:
        Image.fromarray(ellipse(person)).save(folder / f"r{person}slice.jpg", quality=95)
    return folder


def test_the_brain_is_cut_out_turned_upright_and_put_into_the_middle(root: Path) -> None:
    write_pictures(root)
    cohort = load_unlabelled_slices(shape=(48, 64))
    assert cohort.images.shape == (6, 1, 48, 64)
    assert cohort.grid == Grid((48, 64))
    assert cohort.people == ("r16", "r27", "r30", "r62", "r64", "r85")
    for image, brain in zip(cohort.images[:, 0], cohort.labels, strict=True):
        assert torch.equal(image > 0, (image > 0) & (brain > 0))
        columns, rows = (brain.any(axis).nonzero()[:, 0] for axis in (1, 0))
        for where, n in ((columns, 48), (rows, 64)):
            assert abs(int(where[0]) - (n - 1 - int(where[-1]))) <= 1  # in the middle
        assert len(columns) < 30  # the stray piece is gone
        assert brain[int(columns.float().mean()), int(rows.float().mean())] == 1  # and the hole belongs to the brain
        front, back = rows[-1] - 4, rows[0] + 4
        middle = int(columns.float().mean())
        assert image[middle, front] > image[middle, back] > 0  # the bright rows are above
    assert brain[0].sum() == 0


def test_six_people_are_dealt_out(root: Path) -> None:
    write_pictures(root)
    cohort = load_unlabelled_slices(shape=(48, 64))
    assert [len(cohort.splits[split]) for split in SPLITS] == [4, 1, 1]
    assert len({i for split in SPLITS for i in cohort.splits[split]}) == 6
    tested = [fold["test"] for fold in slice_folds(cohort, size=1)]
    assert sorted(i for fold in tested for i in fold) == list(range(6))


@pytest.mark.parametrize("kind", ["cut short", "colour", "black", "too large", "absent"])
def test_a_planted_error_in_a_picture_gives_one_sentence(root: Path, kind: str) -> None:
    from PIL import Image

    folder, shape = write_pictures(root), (48, 64)
    path = folder / "r30slice.jpg"
    words, error = {
        "cut short": ("not a whole JPEG", ValueError),
        "colour": ("not a grey image", ValueError),
        "black": ("shows no brain", ValueError),
        "too large": ("do not fit into (48, 20)", ValueError),
        "absent": ("t1-slices", FileNotFoundError),
    }[kind]
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[:60])
    elif kind == "colour":
        Image.fromarray(np.dstack([ellipse(30), ellipse(16), ellipse(30)])).save(path)
    elif kind == "black":
        Image.fromarray(np.zeros((64, 56), np.uint8)).save(path)
    elif kind == "too large":
        shape = (48, 20)
    else:
        path.unlink()
    with pytest.raises(error) as caught:
        load_unlabelled_slices(shape=shape)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
