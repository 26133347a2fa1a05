"""Hippocampus: tiny files in the Decathlon's layout; the real crops where they are."""

import time
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import data_download
from regteach.data.cohort import SPLITS
from regteach.data.hippocampus import DEAL, centred, dealt, load_hippocampus
from regteach.grid import Grid
from regteach.metrics import dice, mean_over_labels

SHAPE = (12, 17, 13)
SIZES = [(9, 11, 8), (10, 12, 7), (12, 17, 13), (7, 10, 9)]
PINNED_TEST = [1, 11, 13, 30, 43, 48]
PINNED_VALIDATION = [5, 16, 22, 32, 39, 41]
HERE = data_download.present("hippocampus")


def crop(number: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and labels of our own for a case: label 1 in front of label 2, intensities on a scale of its own."""
    rng = np.random.default_rng(number)
    size = SIZES[number % len(SIZES)]
    image = rng.uniform(1, 100, size).astype(np.float32) * np.float32(10.0 ** (number % 4))
    labels = np.zeros(size, np.uint8)
    labels[3:6, 2:5, 2:5] = 2
    labels[3:6, 5:8, 2:5] = 1
    return image, labels


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def write_cases(root: Path, numbers: list[int]) -> Path:
    folder = root / "hippocampus"
    for number in numbers:
        for kind, array in zip(("imagesTr", "labelsTr"), crop(number), strict=True):
            write(folder / kind / f"hippocampus_{number:03d}.nii.gz", array)
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    return tmp_path


def test_crops_lie_unchanged_in_the_middle_of_one_grid(root: Path) -> None:
    numbers = [1, 4, 6, 7]
    write_cases(root, numbers)
    cohort = load_hippocampus(shape=SHAPE)
    assert len(cohort) == 4
    assert cohort.grid == Grid(SHAPE)
    assert cohort.structures == {1: "anterior", 2: "posterior"}
    for i, number in enumerate(numbers):
        image, labels = crop(number)
        low, high = np.percentile(image, (1, 99), method="nearest")
        expected = np.clip((image - low) / (high - low), 0, 1)
        start = [(new - old) // 2 for new, old in zip(SHAPE, image.shape, strict=True)]
        inside = tuple(slice(a, a + n) for a, n in zip(start, image.shape, strict=True))
        np.testing.assert_allclose(cohort.images[i, 0][inside], expected, atol=1e-5)
        np.testing.assert_array_equal(cohort.labels[i][inside], labels)
        # Nothing else is on the grid, and the middles agree to half a voxel.
        assert cohort.images[i].sum() == pytest.approx(expected.sum(), rel=1e-5)
        assert cohort.labels[i].sum() == labels.sum()
        middle = np.asarray(start) + (np.asarray(image.shape) - 1) / 2
        assert np.abs(middle - np.asarray(cohort.grid.centre)).max() <= 0.5


def test_soi_are_the_labels_one_channel_each(root: Path) -> None:
    write_cases(root, [1, 3])
    cohort = load_hippocampus(shape=SHAPE)
    assert cohort.soi.shape == (2, 2, *SHAPE)
    for channel, label in enumerate((1, 2)):
        assert torch.equal(cohort.soi[:, channel] == 1, cohort.labels == label)
    assert set(cohort.soi.unique().tolist()) == {0, 1}


def test_the_scale_of_the_intensities_does_not_matter(root: Path) -> None:
    folder = write_cases(root, [5])
    before = load_hippocampus(shape=SHAPE).images
    write(folder / "imagesTr" / "hippocampus_005.nii.gz", crop(5)[0] * np.float32(5000))
    torch.testing.assert_close(load_hippocampus(shape=SHAPE).images, before, rtol=1e-4, atol=1e-5)


def test_another_order_of_the_axes_in_the_file_does_not_matter(root: Path) -> None:
    folder = write_cases(root, [5])
    before = load_hippocampus(shape=SHAPE)
    for kind, array in zip(("imagesTr", "labelsTr"), crop(5), strict=True):
        # Axes up, left, front: the same voxels at the same places.
        affine = np.array([[0, -1, 0, array.shape[0] - 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
        write(folder / kind / "hippocampus_005.nii.gz", array[::-1].transpose(2, 0, 1), affine)
    after = load_hippocampus(shape=SHAPE)
    assert torch.equal(after.images, before.images)
    assert torch.equal(after.labels, before.labels)


def test_notes_that_macos_leaves_are_no_cases(root: Path) -> None:
    folder = write_cases(root, [1])
    (folder / "imagesTr" / "._hippocampus_002.nii.gz").write_bytes(b"note")
    assert len(load_hippocampus(shape=SHAPE)) == 1


def test_limit_takes_the_first_cases(root: Path) -> None:
    write_cases(root, [2, 11, 9])
    assert load_hippocampus(shape=SHAPE, limit=2).people == ("cases 001 and 002", "cases 009 and 010")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        load_hippocampus(shape=SHAPE, limit=0)


# ---- the split ----


def split_of(cohort_people: tuple[str, ...], splits: dict[str, tuple[int, ...]]) -> dict[str, str]:
    return {cohort_people[i]: split for split, members in splits.items() for i in members}


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_in_number_are_one_person(root: Path, seed: int) -> None:
    write_cases(root, list(range(1, 61)))
    cohort = load_hippocampus(split_seed=seed, shape=SHAPE)
    assert sorted(i for members in cohort.splits.values() for i in members) == list(range(60))
    for split in SPLITS:
        members = {i + 1 for i in cohort.splits[split]}  # case numbers
        assert all((n + 1 if n % 2 else n - 1) in members for n in members)
        for moving, fixed in cohort.pairs(split):
            assert moving // 2 != fixed // 2


def test_a_person_stays_in_the_split_whoever_else_is_there(root: Path) -> None:
    folder = write_cases(root, list(range(1, 41)))
    everybody = load_hippocampus(shape=SHAPE)
    for number in range(2, 41, 2):
        for kind in ("imagesTr", "labelsTr"):
            (folder / kind / f"hippocampus_{number:03d}.nii.gz").unlink()
    half = load_hippocampus(shape=SHAPE)
    assert len(half) == 20
    assert split_of(half.people, half.splits) == split_of(everybody.people, everybody.splits)


def test_every_hand_is_dealt_in_the_same_shares() -> None:
    share = Counter(DEAL)
    for seed in range(20):
        for first in (1, 27, 53):
            assert Counter(dealt(n, seed, DEAL) for n in range(first, first + 26)) == share


def test_the_seed_deals_anew_and_all_positions_are_alike() -> None:
    tests = Counter(n for seed in range(400) for n in range(1, 27) if dealt(n, seed, DEAL) == "test")
    # 400 deals of 3 of 26: 46 each, standard deviation 6.4.
    assert min(tests.values()) > 46 - 5 * 6.4
    assert max(tests.values()) < 46 + 5 * 6.4


def test_the_split_of_seed_0_does_not_change() -> None:
    assert [n for n in range(1, 53) if dealt(n, 0, DEAL) == "test"] == PINNED_TEST
    assert [n for n in range(1, 53) if dealt(n, 0, DEAL) == "validation"] == PINNED_VALIDATION


# ---- putting into the middle ----


@pytest.mark.parametrize(("old", "new"), [(5, 9), (5, 8), (9, 5), (8, 5), (7, 7)])
def test_centred_keeps_the_middle(old: int, new: int) -> None:
    values = torch.arange(1.0, old + 1)
    result, (before,) = centred(values, (new,))
    assert len(result) == new
    kept = result[result != 0]
    where = torch.nonzero(result)[:, 0]
    assert torch.equal(kept - 1, (where - before).float())  # whole voxels, by the offset that is returned
    assert len(kept) == min(old, new)
    assert abs((old - 1) / 2 + before - (new - 1) / 2) <= 0.5


def test_centred_takes_each_axis_by_itself() -> None:
    values = torch.rand(2, 3, 7, 9, 11)
    result, before = centred(values, (9, 4, 11))
    assert before == (1, -3, 0)
    assert result.shape == (2, 3, 9, 4, 11)
    assert torch.equal(result[:, :, 1:8], values[..., 3:7, :])
    assert result[:, :, 0].abs().sum() == result[:, :, 8].abs().sum() == 0


# ---- bad input ----


def test_absent_data_name_the_command(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run `python -m data_download hippocampus`\."):
        load_hippocampus()


def test_folders_without_a_case(root: Path) -> None:
    folder = write_cases(root, [1])
    (folder / "imagesTr" / "hippocampus_001.nii.gz").rename(folder / "imagesTr" / "._note.nii.gz")
    (folder / "labelsTr" / "hippocampus_001.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no case: run `python -m data_download hippocampus --force`\."):
        load_hippocampus(shape=SHAPE)


def damage(folder: Path, kind: str) -> None:
    image, labels = (folder / part / "hippocampus_002.nii.gz" for part in ("imagesTr", "labelsTr"))
    shifted, coarse = np.eye(4), np.diag([2.0, 2, 2, 1])
    shifted[0, 3] = 1
    match kind:
        case "labels missing":
            labels.unlink()
        case "image missing":
            image.unlink()
        case "labels moved":
            write(labels, crop(2)[1], shifted)
        case "labels cropped":
            write(labels, crop(2)[1][:-1])
        case "label 3":
            write(labels, np.where(crop(2)[1] == 2, 3, crop(2)[1]).astype(np.uint8))
        case "no label 2":
            write(labels, np.where(crop(2)[1] == 2, 0, crop(2)[1]).astype(np.uint8))
        case "2 mm":
            write(image, crop(2)[0], coarse)
            write(labels, crop(2)[1], coarse)
        case "slice":
            write(image, crop(2)[0][..., :1])
            write(labels, crop(2)[1][..., :1])
        case "strange":
            image.rename(image.with_name("brain.nii.gz"))
            labels.rename(labels.with_name("brain.nii.gz"))
        case "constant":
            write(image, np.full_like(crop(2)[0], 7))
        case "truncated":
            image.write_bytes(image.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("labels missing", FileNotFoundError, "holds the image of hippocampus_002.nii.gz, but not its labels"),
        ("image missing", FileNotFoundError, "holds the labels of hippocampus_002.nii.gz, but not its image"),
        (
            "labels moved",
            ValueError,
            r"labels of hippocampus_002.nii.gz lie on another grid .* from \(1.0, 0.0, 0.0\) mm",
        ),
        ("labels cropped", ValueError, "labels of hippocampus_002.nii.gz lie on another grid"),
        ("label 3", ValueError, "labels of hippocampus_002.nii.gz hold the value 3, but only 0, 1 and 2"),
        ("no label 2", ValueError, r"labels of hippocampus_002.nii.gz show no posterior \(value 2\)"),
        ("2 mm", ValueError, r"hippocampus_002.nii.gz has voxels of \(2.0, 2.0, 2.0\) mm"),
        ("slice", ValueError, "hippocampus_002.nii.gz has voxels of .* but these crops are 3D"),
        ("strange", ValueError, "brain.nii.gz is no case"),
        ("constant", ValueError, "hippocampus_002.nii.gz is constant"),
        ("truncated", ValueError, "hippocampus_002.nii.gz is truncated or damaged"),
    ],
)
def test_a_planted_error_gives_one_sentence(root: Path, kind: str, error: type[Exception], words: str) -> None:
    folder = write_cases(root, [1, 2])
    damage(folder, kind)
    with pytest.raises(error, match=words) as raised:
        load_hippocampus(shape=SHAPE)
    assert "\n" not in str(raised.value)


def test_a_crop_that_does_not_fit_is_not_cut(root: Path) -> None:
    write_cases(root, [2])  # 12 x 17 x 13
    with pytest.raises(ValueError, match=r"has \(12, 17, 13\) voxels and does not fit into a grid of \(12, 16, 16\)"):
        load_hippocampus(shape=(12, 16, 16))
    with pytest.raises(ValueError, match="The crops have three axes"):
        load_hippocampus(shape=(32, 32))


# ---- the real crops ----


@pytest.mark.skipif(not HERE, reason="hippocampus is not fetched: python -m data_download hippocampus")
def test_the_real_crops() -> None:
    start = time.perf_counter()
    cohort = load_hippocampus()
    assert time.perf_counter() - start < 30  # about 3 s for 130 cases
    assert cohort.images.shape[1:] == (1, 48, 64, 48)
    if len(cohort) == 130:
        assert {split: len(cohort.splits[split]) for split in SPLITS} == {"train": 103, "validation": 13, "test": 14}
    for labels in cohort.labels:
        assert labels.unique().tolist() == [0, 1, 2]
        anterior, posterior = ((labels == label).nonzero()[:, 1].float().mean() for label in (1, 2))
        assert anterior > posterior + 10  # mm
    tissue = cohort.images[:, 0][cohort.labels > 0]
    assert 0.35 < tissue.mean() < 0.45  # grey matter, between fluid and white matter
    # What registration starts from, and the same with the two structures exchanged.
    pairs = cohort.pairs("test", 50, seed=0)
    moving, fixed = (cohort.labels[[pair[side] for pair in pairs]][:, None] for side in (0, 1))
    start_dice = mean_over_labels(dice(moving, fixed, [1, 2])).mean()
    assert 0.48 < start_dice < 0.59
    exchanged = torch.where(moving > 0, 3 - moving, moving)
    assert mean_over_labels(dice(exchanged, fixed, [1, 2])).mean() < 0.2
