"""Readers of lung pairs on tiny files, planted bad ones, and Learn2Reg's measures against its formulas."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from truths.fields import one_sentence

import data_download
from regteach.data.lungs import (
    KEYPOINT_GRID,
    evaluate_lungs,
    learn2reg_sdlogj,
    learn2reg_tre,
    load_lung_keypoints,
    read_keypoints,
    read_nlst,
)
from regteach.grid import Grid
from regteach.metrics import target_registration_error
from regteach.sampling import grid_points, sample
from regteach.transforms import Dense, FreeForm

GRID = Grid((12, 10, 14), (1.5, 1.25, 1.75), (-3.0, 5.0, 10.0))
GOOD = "3.0,4.0,5.0,3.5,4.25,6.0\n1,2,3,1,2,3\n"
HERE = data_download.present("lung-keypoints")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_table_becomes_mm_by_a_grid_or_a_spacing(tmp_path: Path) -> None:
    path = write(tmp_path / "case.csv", GOOD)
    fixed, moving = read_keypoints(path, GRID)
    torch.testing.assert_close(fixed, torch.tensor([[[1.5, 10.0, 18.75], [-1.5, 7.5, 15.25]]]))
    torch.testing.assert_close(moving[0, 0], torch.tensor([3.5 * 1.5 - 3, 4.25 * 1.25 + 5, 6 * 1.75 + 10]))
    fixed, moving = read_keypoints(path, (2.0, 1.0, 3.0))
    torch.testing.assert_close(fixed[0, 0], torch.tensor([6.0, 4.0, 15.0]))
    other = Grid((12, 10, 14), (1.0, 1.0, 1.0))
    torch.testing.assert_close(read_keypoints(path, GRID, other)[1][0, 0], torch.tensor([3.5, 4.25, 6.0]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fx,fy,fz,mx,my,mz\n" + GOOD, "header"),
        ("1,2,3\n4,5,6\n", "3 columns in line 1"),
        ("1,2,3,4,5,6\n1,2,3,4,5,6,7\n", "7 columns in line 2"),
        ("1 2 3 4 5 6\n", "not a table"),
        ("1,2,3,4,5,6\n1,2,3,4,nan,6\n", "not finite"),
        ("1,2,3,4,5,inf\n", "not finite"),
        ("-120.5,33.0,200.0,-118.0,30.0,190.0\n" + GOOD, "voxels, not mm"),
        ("3,4,5,3,4,80\n", "voxels, not mm"),
        ("", "empty"),
        (" \n\n", "empty"),
        ("1,2,3,4,5,6\nhello\n", "line 2 is 'hello'"),
    ],
)
def test_planted_errors_get_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path / "case.csv", text)
    with pytest.raises(ValueError) as error:
        read_keypoints(path, GRID)
    assert one_sentence(error.value, said, str(path))


def test_a_file_that_is_no_text_and_one_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "case.csv"
    with pytest.raises(FileNotFoundError) as missing:
        read_keypoints(path, GRID)
    assert one_sentence(missing.value, "no file")
    path.write_bytes(bytes(range(128, 256)))
    for bad in (path, tmp_path):
        with pytest.raises(ValueError) as error:
            read_keypoints(bad, GRID)
        assert one_sentence(error.value, "not a table")
    write(path, GOOD)
    with pytest.raises(ValueError) as error:
        read_keypoints(path, Grid((5, 5)))
    assert one_sentence(error.value, "2 axes")


def write_nlst(root: Path, cases: tuple[int, ...] = (1, 2, 101), flip: bool = False) -> Path:
    """The layout of Learn2Reg NLST with 12 x 10 x 14 voxels; a keypoint sits on a voxel that is brighter than all."""
    rng = np.random.default_rng(0)
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    if flip:
        affine = np.diag([-1.5, -1.5, 1.5, 1.0])
        affine[:2, 3] = (70.0, 50.0)
    rows = []
    for case in cases:
        points = rng.integers(1, 9, (4, 6))
        for side, columns in ((0, points[:, :3]), (1, points[:, 3:])):
            image = rng.uniform(-1000, -500, GRID.shape).astype(np.float32)
            image[tuple(columns.T)] = 500
            mask = np.ones(GRID.shape, np.uint8)
            mask[0] = 0
            for kind, array in (("imagesTr", image), ("masksTr", mask)):
                (root / kind).mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(array, affine), root / kind / f"NLST_{case:04d}_{side:04d}.nii.gz")
        text = "\n".join(",".join(f"{v:.3f}" for v in row) for row in points)
        write(root / "keypointsTr" / f"NLST_{case:04d}_0000.csv", text)
        names = [f"./imagesTr/NLST_{case:04d}_{side:04d}.nii.gz" for side in (0, 1)]
        rows.append({"fixed": names[0], "moving": names[1]})
    listed = {"training_paired_images": rows, "registration_val": [row for row in rows if "_01" in row["fixed"]]}
    write(root / "NLST_dataset.json", json.dumps(listed))
    return root


@pytest.mark.parametrize("flip", [False, True])
def test_nlst_pairs_keep_images_masks_and_keypoints_together(tmp_path: Path, flip: bool) -> None:
    root = write_nlst(tmp_path, flip=flip)
    pairs = read_nlst(root)
    assert [pair.name for pair in pairs] == ["NLST_0001", "NLST_0002"]
    assert [pair.name for pair in read_nlst(root, "validation")] == ["NLST_0101"]
    pair = pairs[0]
    fixed, moving = pair.keypoints()
    for volume, points in ((pair.fixed, fixed), (pair.moving, moving)):
        # In mm the points find the bright voxels again, whichever way the file's axes run.
        torch.testing.assert_close(
            sample(volume.batch, points, volume.grid, order=0), torch.full((1, 1, 4), 500.0), rtol=0, atol=1e-3
        )
    assert pair.fixed_mask.data.sum() == 11 * 10 * 14
    assert pair.moving_mask.grid == pair.moving.grid


def test_nlst_is_read_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_nlst(tmp_path / "nlst")
    (root / "imagesTr" / "NLST_0001_0000.nii.gz").write_bytes(b"no image")
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    (root / "masksTr" / "NLST_0002_0001.nii.gz").unlink()
    pairs = read_nlst()  # nothing is opened
    assert len(pairs) == 2
    with pytest.raises(ValueError) as error:
        _ = pairs[0].fixed
    assert one_sentence(error.value, "NIfTI")
    with pytest.raises(FileNotFoundError):
        _ = pairs[1].moving_mask
    assert pairs[1].fixed.grid.shape == GRID.shape


def test_what_is_wrong_with_an_nlst_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        read_nlst(tmp_path)
    assert one_sentence(missing.value, "NLST_dataset.json")
    root = write_nlst(tmp_path)
    with pytest.raises(ValueError) as error:
        read_nlst(root, "test")
    assert one_sentence(error.value, "'test'")
    (root / "imagesTr" / "NLST_0002_0001.nii.gz").unlink()
    with pytest.raises(FileNotFoundError) as missing:
        read_nlst(root)
    assert one_sentence(missing.value, "NLST_0002_0001")
    for text in ("{", "[]", '{"training_paired_images": [1]}', '{"training_paired_images": [{"fixed": "a"}]}'):
        write(root / "NLST_dataset.json", text)
        with pytest.raises(ValueError) as error:
            read_nlst(root)
        assert one_sentence(error.value, "list of pairs")


def test_keypoints_of_a_pair_are_checked(tmp_path: Path) -> None:
    pair = read_nlst(write_nlst(tmp_path))[0]
    table = tmp_path / "keypointsTr" / "NLST_0001_0000.csv"
    write(table, "3,4,5,3,4,40\n")
    with pytest.raises(ValueError) as error:
        pair.keypoints()
    assert one_sentence(error.value, "outside the grid")
    table.unlink()
    with pytest.raises(FileNotFoundError) as missing:
        pair.keypoints()
    assert one_sentence(missing.value, "NLST_0001_0000.csv")


def test_lung_keypoints_are_the_files_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        load_lung_keypoints()
    write(tmp_path / "lung_keypoints" / "case_002.csv", GOOD)
    write(tmp_path / "lung_keypoints" / "case_001.csv", GOOD + "190,191,207,0,0,0\n")
    pairs = load_lung_keypoints()
    assert [(pair.name, pair.fixed.shape[1]) for pair in pairs] == [("case_001", 3), ("case_002", 2)]
    torch.testing.assert_close(pairs[1].fixed[0, 0], torch.tensor([5.25, 5.0, 8.75]))
    write(tmp_path / "lung_keypoints" / "case_003.csv", "1,2,3,4,5,250\n")
    with pytest.raises(ValueError) as error:
        load_lung_keypoints()
    assert one_sentence(error.value, "case_003")


def free_form(seed: int = 0) -> FreeForm:
    ctrl = Grid((8, 8, 8), (5.0, 5.0, 6.0), (-12.0, -4.0, -2.0))
    return FreeForm(2 * torch.randn(1, 8, 8, 8, 3, generator=torch.Generator().manual_seed(seed)).double(), ctrl)


def test_learn2reg_tre_is_their_formula_in_voxels() -> None:
    field = free_form().displacement_on(GRID)
    rng = np.random.default_rng(0)
    fixed_vox, moving_vox = (rng.uniform(1, np.array(GRID.shape) - 2, (40, 3)) for _ in range(2))
    spacing, origin = np.array(GRID.spacing), np.array(GRID.origin)
    # As the challenge writes it: a displacement in voxels, read at the fixed landmarks with scipy's default order 3.
    u_vox = field[0].numpy() / spacing
    read = np.stack([ndimage.map_coordinates(u_vox[..., k], fixed_vox.T) for k in range(3)], 1)
    expected = np.linalg.norm((fixed_vox + read - moving_vox) * spacing, axis=1)
    points = [torch.from_numpy(v * spacing + origin)[None] for v in (fixed_vox, moving_vox)]
    torch.testing.assert_close(learn2reg_tre(field, GRID, *points)[0], torch.from_numpy(expected).float())
    torch.testing.assert_close(learn2reg_tre(free_form(), GRID, *points)[0], torch.from_numpy(expected).float())


def test_ours_and_theirs_agree_where_the_field_is_linear_and_differ_where_it_is_curved() -> None:
    points = grid_points(GRID, dtype=torch.float64)[None]
    linear = Dense(0.1 * (points - points.new_tensor(GRID.centre)) + 1, GRID)
    inside = points.flatten(1, 3)[:, ::7] * 0.8 + 0.2 * points.new_tensor(GRID.centre)
    moving = inside + 0.5
    ours, theirs = target_registration_error(linear, inside, moving), learn2reg_tre(linear, GRID, inside, moving)
    torch.testing.assert_close(theirs.double(), ours, rtol=0, atol=0.02)  # the spline's ends are mirrored
    curved = Dense(free_form().displacement_on(GRID), GRID)  # ours reads it linearly, theirs by a spline
    truth = target_registration_error(free_form(), inside, moving)
    error_ours = (target_registration_error(curved, inside, moving) - truth).abs().mean()
    error_theirs = (learn2reg_tre(curved, GRID, inside, moving) - truth).abs().mean()
    assert error_theirs < 0.5 * error_ours


def test_learn2reg_sdlogj_crops_adds_three_and_keeps_to_the_mask() -> None:
    field = free_form(1).displacement_on(GRID)
    mask = torch.rand(1, 1, *GRID.shape) > 0.4
    u = field[0].numpy()
    slopes = np.stack([np.stack(np.gradient(u[..., k], *GRID.spacing), -1) for k in range(3)], -2)
    det = np.linalg.det(slopes + np.eye(3))
    inner = (slice(2, -2),) * 3
    expected = np.log((det + 3).clip(1e-9, 1e9))[inner][mask[0, 0].numpy()[inner]].std()
    assert float(learn2reg_sdlogj(field, GRID, mask)[0]) == pytest.approx(expected, rel=1e-6)


def test_both_measures_come_side_by_side() -> None:
    fixed = grid_points(GRID, dtype=torch.float64)[3:-3, 3:-3, 3:-3].reshape(1, -1, 3)
    transform = free_form()
    moving = transform(fixed) + torch.tensor([0.0, 3.0, 4.0])
    result = evaluate_lungs(transform, GRID, fixed, moving)
    assert result["tre_mm"] == pytest.approx(5)
    assert result["tre_learn2reg_mm"] == pytest.approx(5, abs=0.01)
    assert result["sdlogj"] > 2 * result["sdlogj_learn2reg"] > 0
    assert 0 <= result["folding_percent"] < 100


def test_points_and_fields_that_do_not_fit_are_refused() -> None:
    fixed = torch.zeros(1, 3, 3)
    with pytest.raises(ValueError) as error:
        learn2reg_tre(torch.zeros(1, 5, 5, 5, 3), GRID, fixed, fixed)
    assert one_sentence(error.value, "5, 5, 5")
    with pytest.raises(ValueError) as error:
        learn2reg_tre(torch.zeros(1, *GRID.shape, 3), GRID, fixed, fixed[:, :2])
    assert one_sentence(error.value, "pairs")


@pytest.mark.skipif(not HERE, reason="the lung keypoints are not fetched")
def test_the_real_keypoints_fit_the_grid_that_is_assumed() -> None:
    pairs = load_lung_keypoints()
    assert len(pairs) >= 10
    assert all(800 <= pair.fixed.shape[1] <= 2500 for pair in pairs)
    motion = torch.stack([(pair.moving - pair.fixed).norm(dim=-1).mean() for pair in pairs])
    assert 5 < motion.mean() < 20
    assert all(pair.grid == KEYPOINT_GRID for pair in pairs)
