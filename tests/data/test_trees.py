"""Trees: the generator's truth, point by point and by warping; the reader on small archives, and on the real one."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage, spatial

import data_download
from regteach.affine import Affine, AffineBounds
from regteach.data.synth2d import read_synth2d
from regteach.data.trees import KINDS, Trees, generate_trees, grow_tree
from regteach.grid import Grid
from regteach.metrics import dice
from regteach.sampling import flat_points, sample, warp

HERE = data_download.present("istn-synth2d")
STILL = AffineBounds(translation_mm=0.0, rotation_deg=0.0, scale_ratio=1.0, stretch_axes_deg=0.0)


@pytest.fixture(scope="module")
def trees() -> Trees:
    return generate_trees(train=12, validation=4, test=4)


def all_pairs(cohort: Trees) -> tuple[list[int], list[int]]:
    moving, fixed = zip(*(pair for split in cohort.splits for pair in cohort.pairs(split)), strict=True)
    return list(moving), list(fixed)


def overlap(cohort: Trees, transform: Affine | None) -> torch.Tensor:
    """Dice at half maximum of the moving SoI and the fixed one, a pair."""
    moving, fixed = all_pairs(cohort)
    soi = cohort.soi[moving]
    warped = soi if transform is None else warp(soi, transform, cohort.grid, padding="zeros")
    return dice((warped > 0.5).long(), (cohort.soi[fixed] > 0.5).long(), [1])[1]


# The generator


def test_the_truth_aligns_the_tree_of_every_pair_and_nothing_else_does(trees: Trees) -> None:
    moving, fixed = all_pairs(trees)
    truth = trees.truth(moving, fixed)
    assert overlap(trees, truth).min() > 0.95
    assert 0.5 < overlap(trees, None).mean() < 0.75  # as hard as the authors' data
    assert overlap(trees, truth.inverse()).mean() < 0.7
    assert overlap(trees, trees.square_transform(moving, fixed)).mean() < 0.7


def test_the_truth_maps_landmarks_exactly_and_the_soft_map_goes_with_it(trees: Trees) -> None:
    moving, fixed = all_pairs(trees)
    truth = trees.truth(moving, fixed)
    assert trees.landmarks is not None
    torch.testing.assert_close(truth(trees.landmarks[fixed]), trees.landmarks[moving], atol=1e-4, rtol=0)
    for k, (m, f) in enumerate(zip(moving, fixed, strict=True)):
        points = trees.points(f)
        there = trees.truth(m, f)(points[None])
        inside = ((there > 1) & (there < 126)).all(-1)[0]
        read = sample(trees.soi[m : m + 1], there, trees.grid)[0, 0]
        own = sample(trees.soi[f : f + 1], points[None], trees.grid)[0, 0]
        assert (own > 0.5).all()
        error = (read - own)[inside].abs()  # of linear interpolation: largest where branches meet
        assert error.max() < 0.07, k
        assert error.mean() < 0.005, k


def test_the_soft_map_is_the_distance_to_the_reference_tree_seen_through_the_affine(trees: Trees) -> None:
    pieces, _ = grow_tree()
    shares = torch.linspace(0, 1, 200)[:, None]
    dense = torch.cat([(1 - shares) * start + shares * end for start, end in pieces])
    for index in (0, 7, 39):
        matrix, shift = trees.placed.matrix[index].numpy(), trees.placed.translation[index].numpy()
        reference = (flat_points(trees.grid)[0].numpy() - 63.5 - shift) @ np.linalg.inv(matrix).T + 63.5
        distance = spatial.cKDTree(dense.numpy()).query(reference)[0].reshape(128, 128)
        error = np.abs(trees.soi[index, 0].numpy() - np.exp(-0.5 * (distance / 5) ** 2))
        assert error.max() < 0.04  # half-way between two branches the distance has a ridge, which a grid rounds off
        assert np.quantile(error, 0.99) < 0.003
        at_body = trees.images[index, 0][torch.from_numpy((distance < 1.5) & (distance > 0.5))]
        assert 0.2 < at_body.mean() < 0.6  # the image shows it there, grey


def test_points_are_the_pixels_of_the_tree_in_millimetres(trees: Trees) -> None:
    expected = np.argwhere(trees.tree[3].numpy())  # row, column
    np.testing.assert_array_equal(trees.points(3), expected)
    assert len(expected) > 1000


def test_the_square_moves_for_itself() -> None:
    trees = generate_trees(train=60, validation=0, test=0, noise=0.0)
    moving, fixed = all_pairs(trees)
    inside = (trees.images > 0.2).float()  # the square, and the tree where it sticks out
    by_square = warp(inside[moving], trees.square_transform(moving, fixed), trees.grid, padding="zeros") > 0.5
    by_tree = warp(inside[moving], trees.truth(moving, fixed), trees.grid, padding="zeros") > 0.5
    square, tree = (dice(by.long(), inside[fixed].long(), [1])[1] for by in (by_square, by_tree))
    assert square.mean() > 0.97
    assert tree.mean() < 0.92
    assert (square > tree).float().mean() > 0.9
    turns = [torch.atan2(t.matrix[:, 1, 0] - t.matrix[:, 0, 1], t.matrix[:, 0, 0] + t.matrix[:, 1, 1]).numpy()
             for t in (trees.placed, trees.square)]  # fmt: skip
    assert abs(np.corrcoef(turns)[0, 1]) < 0.25
    assert abs(np.corrcoef(trees.placed.translation[:, 0], trees.square.translation[:, 0])[0, 1]) < 0.25


def test_a_seed_gives_the_same_images_and_another_seed_others() -> None:
    first, again, other = (generate_trees(2, 1, 1, size=48, seed=seed) for seed in (3, 3, 4))
    torch.testing.assert_close(first.images, again.images, atol=0, rtol=0)
    torch.testing.assert_close(first.placed.matrix, again.placed.matrix, atol=0, rtol=0)
    assert (first.placed.matrix - other.placed.matrix).flatten(1).norm(dim=1).min() > 1e-3
    assert (first.images - other.images).flatten(1).norm(dim=1).min() > 1


def test_more_training_pairs_change_no_other_image() -> None:
    few, many = generate_trees(2, 2, 1, size=48), generate_trees(5, 2, 1, size=48)
    for split in few.splits:
        size = len(few.splits[split])
        torch.testing.assert_close(few.images[list(few.splits[split])], many.images[list(many.splits[split])[:size]])


def test_splits_and_pairs_share_no_image_and_no_two_images_are_the_same(trees: Trees) -> None:
    used = [index for pair in zip(*all_pairs(trees), strict=True) for index in pair]
    assert sorted(used) == list(range(40))
    for split, pairs in (("train", 12), ("validation", 4), ("test", 4)):
        assert len(trees.pairs(split)) == pairs
        assert {i for pair in trees.pairs(split) for i in pair} == set(trees.splits[split])
    assert len(set(trees.people)) == 40
    flat = trees.images.flatten(1)
    assert (torch.cdist(flat, flat) + 1e3 * torch.eye(40)).min() > 5
    assert torch.unique(trees.placed.matrix, dim=0).shape[0] == 40


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_soi_fits_its_labels_and_names(kind: str) -> None:
    trees = generate_trees(2, 1, 1, size=64, kind=kind)
    channels = 11 if kind == "each landmark" else 1
    assert trees.soi.shape == (8, channels, 64, 64)
    assert list(trees.structures) == list(range(1, channels + 1))
    assert trees.soi.min() >= 0
    assert trees.soi.max() <= 1
    assert trees.images.min() >= 0
    assert trees.images.max() == 1
    torch.testing.assert_close(trees.tree, generate_trees(2, 1, 1, size=64).tree)  # whatever the SoI is
    for label in trees.structures:
        assert (trees.soi[:, label - 1][trees.labels == label] > 0.5).all()
    assert ((trees.labels == 0) == (trees.soi <= 0.5).all(1)).all()
    assert trees.landmarks is not None
    if kind != "segmentation":
        for k in range(11):
            values = sample(trees.soi, trees.landmarks[:, k : k + 1], trees.grid)[:, k if channels > 1 else 0, 0]
            inside = ((trees.landmarks[:, k] > 2) & (trees.landmarks[:, k] < 61)).all(-1)
            assert (values[inside] > 0.9).all()


def test_a_map_of_distances_falls_in_a_straight_line_from_each_landmark() -> None:
    trees = generate_trees(0, 0, 3, size=64, kind="landmark distances")
    assert trees.landmarks is not None
    # In the image a distance is that of the reference tree, which an affine has stretched a little.
    reference = trees.placed.inverse()
    points, landmarks = reference(flat_points(trees.grid)), reference(trees.landmarks)
    nearest = torch.cdist(points, landmarks).amin(-1).reshape(-1, 64, 64)
    torch.testing.assert_close(trees.soi[:, 0], (1 - nearest / 12).clamp_min(0), atol=1e-3, rtol=0)
    blobs = generate_trees(0, 0, 3, size=64, kind="landmarks")
    torch.testing.assert_close(trees.images, blobs.images)
    assert ((trees.soi > 0) & (blobs.soi < 0.01)).float().mean() > 0.05  # a slope where a blob is flat


def test_the_tree_as_drawn_is_thinner_than_its_soft_map() -> None:
    soft, drawn = (generate_trees(4, 0, 0, blurred=blurred) for blurred in (True, False))
    assert 0.3 < drawn.tree.sum() / soft.tree.sum() < 0.6
    assert not (drawn.tree & ~soft.tree).any()
    moving, fixed = all_pairs(drawn)
    assert overlap(drawn, drawn.truth(moving, fixed)).min() > 0.95


def test_motion_is_as_large_as_asked_for() -> None:
    still = generate_trees(2, 0, 0, size=48, tree_motion=STILL)
    torch.testing.assert_close(still.soi, still.soi[:1].expand(4, -1, -1, -1))
    assert (still.square.matrix - torch.eye(2)).abs().amax() > 0.01
    shifted = generate_trees(40, 0, 0, size=64)  # bounds scale with the image: 2.5 mm of 64
    reach = shifted.placed.translation.abs().amax()
    assert 2.3 < reach <= 2.5
    other = generate_trees(2, 0, 0, size=48, tree_motion=STILL, tree_seed=1)
    assert (other.soi - still.soi).abs().amax() > 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "segmentations"},
            "one of segmentation, landmarks, each landmark, landmark distances, not 'segmentations'",
        ),
        ({"size": 16}, "at least 32 pixels"),
        ({"train": -1}, "numbers of pairs"),
        ({"train": 0, "validation": 0, "test": 0}, "not all 0"),
        ({"seed": -1}, "Seeds and noise are 0 or more"),
        ({"noise": -0.1}, "Seeds and noise are 0 or more"),
    ],
)
def test_bad_arguments_get_a_sentence(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_trees(**arguments)


def test_pairs_of_unknown_images_get_a_sentence(trees: Trees) -> None:
    with pytest.raises(ValueError, match="images 0 to 39, but not 40"):
        trees.truth([0, 40], [1, 2])
    with pytest.raises(ValueError, match="images 0 to 39, but not -1"):
        trees.points(-1)
    with pytest.raises(ValueError, match="2 moving and 1 fixed"):
        trees.truth([0, 1], [2])


# The reader, on archives made here: 24 rows, 40 columns, so that swapped axes show

ROWS, COLUMNS = 24, 40
Files = dict[str, bytes]


def png(pixels: np.ndarray) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows, columns = pixels.shape
    lines = b"".join(b"\0" + row.tobytes() for row in pixels.astype(np.uint8))
    header = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def reference_map(column: np.ndarray, row: np.ndarray) -> np.ndarray:
    """A bar with a spot beside it: no symmetry."""
    bar = np.hypot(np.maximum(np.abs(column - 18) - 8, 0), row - 11)
    return np.exp(-0.5 * (np.minimum(bar, 1.2 * np.hypot(column - 25, row - 17)) / 2.5) ** 2)


def archive_files(train: int = 3, test: int = 2) -> Files:
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:ROWS, :COLUMNS]
    files = {"train/": b"", "test/": b""}
    for part, count in (("train", train), ("test", test)):
        for number in range(1, count + 1):
            for side in ("source", "target"):
                angle, factor = rng.uniform(-0.3, 0.3), rng.uniform(0.9, 1.1, 2)
                turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
                to_reference = np.eye(4)
                to_reference[:2, :2] = turn * factor
                centre = np.array([COLUMNS - 1, ROWS - 1]) / 2
                to_reference[:2, 3] = centre - to_reference[:2, :2] @ centre + rng.uniform(-2, 2, 2)
                at = np.einsum("ij,jrc->irc", to_reference[:2, :2], np.stack([column, row])).T + to_reference[:2, 3]
                soft = reference_map(at[..., 0].T, at[..., 1].T)
                stem = f"{part}/V_square_{side}{number}"
                files[f"{stem}.png"] = png(rng.integers(0, 256, (ROWS, COLUMNS)))
                files[f"{stem}_seg.png"] = png(np.rint(208 * soft))
                files[f"{stem}_points.png"] = png(np.rint(204 * soft**4))
                text = io.StringIO()
                np.savetxt(text, to_reference, fmt="%.6g", delimiter="\t", newline="\r\n")
                files[f"{stem}_transform.txt"] = text.getvalue().encode()
    return files


def write_archive(root: Path, files: Files) -> Path:
    path = root / "istn_synth2d" / "synth2d.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    return tmp_path


def test_the_archive_becomes_a_cohort(root: Path) -> None:
    write_archive(root, archive_files(train=12))
    trees = read_synth2d(validation=2)
    assert trees.grid == Grid((ROWS, COLUMNS))
    assert trees.images.shape == (28, 1, ROWS, COLUMNS)
    assert trees.splits == {"train": tuple(range(20)), "validation": (20, 21, 22, 23), "test": (24, 25, 26, 27)}
    assert trees.pairs("validation") == ((20, 21), (22, 23))
    assert trees.people[2] == "train/source2"  # by number: 2 before 10
    assert trees.people[20:22] == ("train/source11", "train/target11")
    assert trees.people[24] == "test/source1"
    assert trees.soi.max() == 1
    assert ((trees.soi[:, 0] > 0.5) == trees.labels.bool()).all()
    assert trees.landmarks is None
    landmarks = read_synth2d("landmarks", validation=2)
    assert landmarks.structures == {1: "landmarks"}
    assert landmarks.soi.max() == 1
    assert landmarks.soi.mean() < trees.soi.mean()
    torch.testing.assert_close(landmarks.tree, trees.tree)
    assert landmarks.labels.sum() < landmarks.tree.sum()


def test_the_files_transforms_warp_one_tree_onto_another(root: Path) -> None:
    write_archive(root, archive_files(train=8))
    trees = read_synth2d(validation=2)
    moving, fixed = all_pairs(trees)
    truth = trees.truth(moving, fixed)
    warped = warp(trees.soi[moving], truth, trees.grid)
    error = (warped - trees.soi[fixed])[..., 4:-4, 4:-4]
    assert error.square().mean().sqrt() < 0.02
    for wrong in (truth.inverse(), lambda points: points):
        assert (warp(trees.soi[moving], wrong, trees.grid) - trees.soi[fixed]).square().mean().sqrt() > 0.08
    # The files' own arithmetic at a point: (column, row) of the fixed image to the reference, and on to the moving.
    to_reference = [np.loadtxt(io.BytesIO(archive_files(train=8)[f"train/V_square_{s}1_transform.txt"]))
                    for s in ("source", "target")]  # fmt: skip
    column, row = (np.linalg.inv(to_reference[0]) @ to_reference[1] @ [30, 5, 0, 1])[:2]
    there = trees.truth(0, 1)(torch.tensor([[[5.0, 30.0]]]))
    np.testing.assert_allclose(there[0, 0], [row, column], atol=1e-4)


def test_pixels_keep_their_row_and_column(root: Path) -> None:
    files = archive_files()
    corner = np.zeros((ROWS, COLUMNS))
    corner[3, 35] = 208
    write_archive(root, {**files, "train/V_square_source2_seg.png": png(corner)})
    trees = read_synth2d(validation=1)
    assert trees.tree[2].nonzero().tolist() == [[3, 35]]
    assert trees.points(2).tolist() == [[3.0, 35.0]]


def test_half_the_maximum_itself_is_background(root: Path) -> None:
    values = np.zeros((ROWS, COLUMNS))
    values[0, :3] = 104, 105, 208
    write_archive(root, {**archive_files(), "train/V_square_source1_seg.png": png(values)})
    assert read_synth2d(validation=1).labels[0, 0, :4].tolist() == [0, 1, 1, 0]


def test_a_missing_archive_names_the_command(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data_download istn-synth2d"):
        read_synth2d()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_archive_gets_a_sentence(root: Path, share: float) -> None:
    path = write_archive(root, archive_files())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_synth2d()


def test_a_changed_byte_gets_a_sentence(root: Path) -> None:
    path = write_archive(root, archive_files())
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 12] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_synth2d(validation=1)


@pytest.mark.parametrize("gone", ["test/V_square_target2.png", "train/V_square_source1_seg.png",
                                  "test/V_square_source1_transform.txt"])  # fmt: skip
def test_a_missing_member_is_named(root: Path, gone: str) -> None:
    files = archive_files()
    write_archive(root, {name: content for name, content in files.items() if name != gone})
    with pytest.raises(ValueError, match=f"synth2d.zip lacks {gone}: fetch istn-synth2d again"):
        read_synth2d(validation=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"other/a.txt": b""}, "no image V_square_. in its folder train"),
        (lambda f: {**f, "train/V_square_source1.png": b"text"}, "source1.png .* not a whole PNG"),
        (lambda f: {**f, "test/V_square_target1.png": png(np.zeros((9, 9)))}, "target1.png .* not a grey image"),
        (
            lambda f: {**f, "test/V_square_target1_seg.png": png(209 + np.zeros((24, 40)))},
            "reach 209.* end at 208",
        ),
        (lambda f: {**f, "train/V_square_source1_transform.txt": b"1 0 x"}, "source1_transform.txt .* is no matrix"),
        (lambda f: {**f, "train/V_square_source1_transform.txt": b"1 0 0\n0 1 0"}, "no 4 x 4 matrix"),
        (lambda f: {**f, "train/V_square_source1_transform.txt": b"0 0 0 0\n0 0 0 0\n0 0 1 0\n0 0 0 1"}, "no 4 x 4"),
    ],
)
def test_damaged_members_get_a_sentence(root: Path, change: Callable[[Files], Files], message: str) -> None:
    write_archive(root, change(archive_files()))
    with pytest.raises(ValueError, match=message):
        read_synth2d(validation=1)


def test_unknown_kinds_and_too_many_validation_pairs_get_a_sentence(root: Path) -> None:
    write_archive(root, archive_files())
    with pytest.raises(ValueError, match="one of segmentation, landmarks, not 'each landmark'"):
        read_synth2d("each landmark")
    with pytest.raises(ValueError, match="Between 0 and 2 of the 3 training pairs"):
        read_synth2d(validation=3)


@pytest.mark.skipif(not HERE, reason="istn-synth2d not fetched")
def test_the_authors_data_scores_as_measured_with_their_own_code() -> None:
    trees = read_synth2d()
    assert {split: len(trees.pairs(split)) for split in trees.splits} == {"train": 80, "validation": 20, "test": 10}
    moving, fixed = map(list, zip(*trees.pairs("test"), strict=True))
    truth = trees.truth(moving, fixed)
    soi, target = trees.soi[moving], trees.tree[fixed]
    overlaps, distances = {}, {}
    for name, warped in (("nothing", soi), ("truth", warp(soi, truth, trees.grid, padding="zeros"))):
        here = warped[:, 0] > 0.5
        overlaps[name] = float(dice(here[:, None].long(), target[:, None].long(), [1])[1].mean())
        # Their surface distance: from every pixel of one tree to the other tree, 0 where they overlap, both ways.
        distances[name] = np.mean([
            (ndimage.distance_transform_edt(~b)[a].mean() + ndimage.distance_transform_edt(~a)[b].mean()) / 2
            for a, b in zip(here.numpy(), target.numpy(), strict=True)
        ])  # fmt: skip
    assert overlaps == {"nothing": pytest.approx(0.662, abs=5e-4), "truth": pytest.approx(0.994, abs=5e-4)}
    assert distances == {"nothing": pytest.approx(1.435, abs=5e-4), "truth": pytest.approx(0.015, abs=1.5e-3)}
    errors = []
    for m, f in zip(moving, fixed, strict=True):
        points = trees.points(f)[None]
        errors.append((trees.truth(m, f)(points) - points).norm(dim=-1).mean())
    assert torch.stack(errors).mean() == pytest.approx(9.84, abs=5e-3)
    # The squares: their own transform aligns them, the tree's leaves them turned by 10 degrees.
    bright = ndimage.binary_closing(trees.images[:, 0].numpy() > 0.5, np.ones((1, 13, 13)))  # the branches filled in
    squares = torch.from_numpy(ndimage.binary_opening(bright, np.ones((1, 7, 7)))).float()[:, None]
    by_square, by_tree = (
        dice((warp(squares[moving], t, trees.grid, padding="zeros") > 0.5).long(), squares[fixed].long(), [1])[1].mean()
        for t in (trees.square_transform(moving, fixed), truth)
    )
    assert by_square > 0.97
    assert by_tree < 0.94
