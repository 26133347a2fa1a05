"""Volumes: SimpleITK and closed forms are the truth for positions, displacements and resampling."""

import gzip
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from truths.fields import GRIDS

import data_download
from regteach.data.volumes import Volume, load_mni, read_volume, save_displacement, save_volume
from regteach.grid import Grid
from regteach.sampling import flat_points, grid_points, sample

SPACING, ORIGIN, SHAPE = (1.0, 1.5, 2.0), (10.0, -20.0, 5.0), (7, 9, 11)


def ramp(points: np.ndarray) -> np.ndarray:
    """A linear function of RAS mm: exact under linear interpolation, different along each axis."""
    return 3 + points @ np.array([1.0, -2.0, 0.5])[: points.shape[-1]]


def positions(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def rotation(degrees: float, axis: int = 2) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.eye(3)
    a, b = [k for k in range(3) if k != axis]
    matrix[[a, a, b, b], [a, b, a, b]] = c, -s, s, c
    return matrix


def affine_of(axes: np.ndarray, origin: tuple[float, ...] = ORIGIN) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, origin
    return affine


def image_of(values: np.ndarray, affine: np.ndarray | None = None) -> nib.Nifti1Image:
    return nib.Nifti1Image(values, affine_of(np.diag(SPACING)) if affine is None else affine)


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


# ---- reading ----


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPS", "LIA", "PIR", "SRA"])
def test_any_orientation_is_read_in_ras_with_every_value_at_its_place(codes: str, values: np.ndarray) -> None:
    ras = image_of(values)
    target = nib.orientations.axcodes2ornt(codes)
    stored = ras.as_reoriented(nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), target))
    assert nib.aff2axcodes(stored.affine) == tuple(codes)
    volume = read_volume(stored)
    assert volume.grid == Grid(SHAPE, SPACING, ORIGIN)
    np.testing.assert_array_equal(volume.data.numpy(), values)
    assert volume.batch.shape == (1, 1, *SHAPE)
    assert volume.notes == ()


def test_positions_agree_with_simpleitk(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "image.nii.gz"
    nib.save(image_of(values, affine_of(np.diag([-1.0, -1.5, 2.0]))), path)  # stored as LPS
    volume, itk = read_volume(path), sitk.ReadImage(str(path))
    for index in ((0, 0, 0), (6, 2, 4), (3, 8, 10)):
        point_lps = np.array(volume.grid.origin) + np.array(index) * volume.grid.spacing
        where = itk.TransformPhysicalPointToIndex((-point_lps[0], -point_lps[1], point_lps[2]))
        assert itk.GetPixel(*where) == volume.data[index]


def test_voxels_are_not_read_before_they_are_used(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "image.nii"
    nib.save(image_of(values), path)
    path.write_bytes(path.read_bytes()[:-100])
    volume = read_volume(path)  # the header is whole
    assert volume.grid.shape == SHAPE
    with pytest.raises(ValueError, match="truncated or damaged"):
        _ = volume.data


def test_two_axes_and_a_third_of_length_one_are_the_same_2d_image() -> None:
    flat = np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32)
    affine = affine_of(np.diag(SPACING))
    two, one = read_volume(nib.Nifti1Image(flat, affine)), read_volume(nib.Nifti1Image(flat[:, :, None], affine))
    assert two.grid == one.grid == Grid((7, 9), (1, 1.5), (10, -20))
    np.testing.assert_array_equal(two.data, one.data)
    np.testing.assert_array_equal(two.data, flat)


def test_a_coronal_slice_keeps_x_and_z(values: np.ndarray) -> None:
    volume = read_volume(image_of(values[:, 4:5, :]))
    assert volume.grid == Grid((7, 11), (1, 2), (10, 5))
    np.testing.assert_array_equal(volume.data, values[:, 4])
    assert "2D axes are x and z" in volume.notes[0]


def test_a_tilted_slice_keeps_its_own_axes_and_says_so() -> None:
    flat = np.random.default_rng(0).normal(size=(7, 9, 1)).astype(np.float32)
    with pytest.warns(UserWarning, match="tilted"):
        volume = read_volume(image_of(flat, affine_of(rotation(20, axis=0) @ np.diag(SPACING))))
    assert volume.grid.spacing == (1.0, 1.5)
    np.testing.assert_array_equal(volume.data, flat[:, :, 0])


@pytest.mark.parametrize("shear", [False, True], ids=["oblique", "sheared"])
def test_oblique_and_sheared_images_are_resampled_where_they_are(shear: bool) -> None:
    axes = rotation(15) @ rotation(10, axis=0) @ np.diag(SPACING)
    if shear:
        axes = np.array([[1.0, 0.3, 0.0], [0.0, 1.5, -0.2], [0.0, 0.0, 2.0]])
    affine = affine_of(axes)
    stored = ramp(positions((15, 16, 17), affine)).astype(np.float32)
    with pytest.warns(UserWarning, match="oblique or sheared"):
        volume = read_volume(image_of(stored, affine))
    assert "resampled" in volume.notes[0]
    points = grid_points(volume.grid).numpy()
    index = (points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    inside = ((index > 0.01) & (index < np.array(stored.shape) - 1.01)).all(-1)
    assert inside.sum() > 500
    np.testing.assert_allclose(volume.data.numpy()[inside], ramp(points)[inside], atol=1e-4)
    far = ((index < -1) | (index > np.array(stored.shape))).any(-1)
    assert far.any()
    np.testing.assert_allclose(volume.data.numpy()[far], stored.min(), atol=1e-4)  # outside is the darkest value
    corners = positions((2, 2, 2), affine_of(axes @ np.diag(np.array(stored.shape) - 1.0))).reshape(-1, 3)
    assert (corners >= np.array(volume.grid.origin) - 1e-4).all()
    assert (corners <= np.array(volume.grid.last) + 1e-4).all()


def test_oblique_resampling_agrees_with_simpleitk(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    affine = affine_of(rotation(25) @ np.diag(SPACING))
    nib.save(image_of(rng.uniform(1, 2, size=(12, 13, 8)).astype(np.float32), affine), tmp_path / "oblique.nii.gz")
    with pytest.warns(UserWarning, match="oblique"):
        volume = read_volume(tmp_path / "oblique.nii.gz")
    save_volume(tmp_path / "straight.nii.gz", volume)
    reference = sitk.ReadImage(str(tmp_path / "straight.nii.gz"))
    truth = sitk.Resample(
        sitk.ReadImage(str(tmp_path / "oblique.nii.gz")), reference, sitk.Transform(), sitk.sitkLinear
    )
    theirs = sitk.GetArrayFromImage(truth).transpose(2, 1, 0)
    index = (grid_points(volume.grid).numpy() - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    inside = ((index >= 0) & (index <= np.array((12, 13, 8)) - 1)).all(-1)  # beyond, SimpleITK repeats the border
    assert inside.mean() > 0.2
    np.testing.assert_allclose(volume.data.numpy()[inside], theirs[inside], atol=1e-4)


def test_oblique_labels_stay_labels() -> None:
    labels = np.zeros((12, 13, 8), dtype=np.int16)
    labels[3:9, 4:10, 2:6] = 2035
    with pytest.warns(UserWarning, match="oblique"):
        volume = read_volume(image_of(labels, affine_of(rotation(30) @ np.diag(SPACING))), labels=True)
    assert volume.data.dtype == torch.int64
    assert volume.data.unique().tolist() == [0, 2035]
    volume_mm3 = float((volume.data > 0).sum()) * volume.grid.voxel_volume
    assert volume_mm3 == pytest.approx(6 * 6 * 4 * 3.0, rel=0.1)


def test_a_grid_that_strays_less_than_a_hundredth_of_a_voxel_is_left_alone(values: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        volume = read_volume(image_of(values, affine_of(rotation(0.01) @ np.diag(SPACING))))
    np.testing.assert_array_equal(volume.data, values)


def test_in_plane_rotation_of_a_2d_image_is_resampled() -> None:
    affine = affine_of(rotation(20) @ np.diag(SPACING))
    stored = ramp(positions((20, 21, 1), affine)[..., :2]).astype(np.float32)
    with pytest.warns(UserWarning, match="oblique"):
        volume = read_volume(nib.Nifti1Image(stored, affine))
    middle = tuple(n // 2 for n in volume.grid.shape)
    point = grid_points(volume.grid)[middle].numpy()
    assert volume.data[middle] == pytest.approx(ramp(point), abs=1e-4)


def test_scaled_integers_are_scaled(tmp_path: Path) -> None:
    image = image_of(np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16))
    image.header.set_slope_inter(0.5, -10)
    image.to_filename(tmp_path / "scaled.nii.gz")
    stored = nib.load(tmp_path / "scaled.nii.gz")
    np.testing.assert_array_equal(read_volume(stored).data.numpy(), stored.get_fdata().astype(np.float32))


def test_a_header_without_a_position_is_noted(values: np.ndarray) -> None:
    image = nib.Nifti1Image(values, None)
    assert "gives no position" in read_volume(image).notes[0]


# ---- bad input: one sentence each ----


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = folder / "whole.nii.gz"
    nib.save(image_of(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)), whole)
    raw = gzip.decompress(whole.read_bytes())
    contents = {
        "text.nii": (b"this is not an image, whatever its name says" * 20, "is not a NIfTI file"),
        "text.nii.gz": (b"nor is this" * 50, "is not a NIfTI file"),
        "image.png": (b"\x89PNG\r\n\x1a\n" + bytes(400), "is not a NIfTI file"),
        "empty.nii.gz": (b"", r"is empty \(0 bytes\)"),
        "header.nii.gz": (whole.read_bytes()[:100], "truncated|not a NIfTI"),
        "half.nii.gz": (whole.read_bytes()[:1500], "truncated"),
        "half.nii": (raw[: len(raw) // 2], "truncated"),
        "stub.nii": (raw[:200], "truncated|not a NIfTI"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {name: (folder / name, words) for name, (_, words) in contents.items()}


@pytest.mark.parametrize(
    "name",
    ["text.nii", "text.nii.gz", "image.png", "empty.nii.gz", "header.nii.gz", "half.nii.gz", "half.nii", "stub.nii"],
)
def test_a_bad_file_gives_one_sentence(name: str, tmp_path: Path) -> None:
    path, words = bad_files(tmp_path)[name]
    with pytest.raises(ValueError, match=words) as caught:
        _ = read_volume(path).data
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.endswith(".")
    assert "\n" not in message


def singular() -> nib.Nifti1Image:
    image = image_of(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    image._affine = affine_of(np.array([[1.0, 0, 1], [0, 1, 1], [0, 0, 0]]))  # nibabel itself checks nothing here
    return image


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (lambda: image_of(np.zeros((4, 5, 6, 3), np.float32)), r"is 4D \(4, 5, 6, 3\)"),
        (lambda: image_of(np.zeros((4, 0, 6), np.float32)), "is empty: its shape"),
        (lambda: image_of(np.full(SHAPE, 7, np.float32)), "constant: every voxel is 7"),
        (lambda: image_of(np.where(np.arange(693).reshape(SHAPE) < 2, np.nan, 1).astype(np.float32)), "2 voxels"),
        (lambda: image_of(np.where(np.arange(693).reshape(SHAPE) < 1, np.inf, 1).astype(np.float32)), "not finite"),
        (lambda: image_of(np.zeros((5, 1, 1), np.float32)), "a line, not an image"),
        (lambda: image_of(np.zeros(SHAPE, np.complex64)), "one real number"),
        (lambda: image_of(np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])), "one real number"),
        (lambda: nib.MGHImage(np.ones((3, 3, 3), np.float32), np.eye(4)), "is not a NIfTI file"),
        (singular, "singular affine"),
    ],
)
def test_a_bad_image_gives_one_sentence(image, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _ = read_volume(image()).data


def test_other_bad_arguments(tmp_path: Path, values: np.ndarray) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_volume(tmp_path / "missing.nii.gz")
    with pytest.raises(ValueError, match="is a folder"):
        read_volume(tmp_path)
    with pytest.raises(ValueError, match="not whole numbers"):
        _ = read_volume(image_of(values), labels=True).data
    with pytest.raises(ValueError, match=r"shape \(7, 9, 11\), but the grid has \(7, 9\)"):
        _ = Volume(torch.zeros(SHAPE), Grid((7, 9))).data


def test_a_constant_label_map_and_a_trailing_axis_are_allowed() -> None:
    volume = read_volume(image_of(np.zeros((*SHAPE, 1), np.uint8)), labels=True)
    assert volume.data.shape == SHAPE
    assert volume.data.sum() == 0


# ---- writing ----


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_saved_volume_comes_back(grid: Grid, suffix: str, tmp_path: Path) -> None:
    data = torch.randn(grid.shape)
    path = save_volume(tmp_path / f"image{suffix}", Volume(data, grid))
    back = read_volume(path)
    assert back.grid == grid
    assert back.notes == ()
    torch.testing.assert_close(back.data, data, rtol=0, atol=0)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("top", "stored"), [(1, "uint8"), (300, "uint16"), (2035, "uint16"), (100_000, "uint32")])
def test_saved_labels_are_small_integers(top: int, stored: str, tmp_path: Path) -> None:
    labels = torch.tensor([[0, top], [1, 2], [0, 1]])
    path = save_volume(tmp_path / "labels.nii.gz", Volume(labels, Grid((3, 2))))
    assert nib.load(path).get_data_dtype() == stored
    assert torch.equal(read_volume(path, labels=True).data, labels)


def test_a_saved_mask_is_integers(tmp_path: Path) -> None:
    mask = torch.tensor([[True, False], [False, True]])
    path = save_volume(tmp_path / "mask.nii", Volume(mask, Grid((2, 2))))
    assert torch.equal(read_volume(path, labels=True).data, mask.long())


@pytest.mark.parametrize("where", ["nibabel.save", "os.fsync", "os.replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, grid: Grid, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = save_volume(tmp_path / "image.nii.gz", Volume(torch.randn(grid.shape), grid))
    before = path.read_bytes()

    def fails(*given: Any) -> None:
        if where == "nibabel.save":
            given[1].write_bytes(b"half of it")
        raise OSError("the disk is full")

    monkeypatch.setattr(where, fails)
    with pytest.raises(OSError, match="disk is full"):
        save_volume(path, Volume(torch.randn(grid.shape), grid))
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["image.nii.gz"]


def test_saving_checks_name_folder_and_shape(tmp_path: Path, grid: Grid) -> None:
    with pytest.raises(ValueError, match=r"ends in \.nii or \.nii\.gz, not as 'image.png'"):
        save_volume(tmp_path / "image.png", Volume(torch.randn(grid.shape), grid))
    with pytest.raises(ValueError, match="does not exist"):
        save_volume(tmp_path / "no" / "image.nii", Volume(torch.randn(grid.shape), grid))
    with pytest.raises(ValueError, match="A displacement on this grid has the shape"):
        save_displacement(tmp_path / "u.nii.gz", torch.zeros(*grid.shape), grid)
    with pytest.raises(ValueError, match="not finite"):
        save_displacement(tmp_path / "u.nii.gz", torch.full((*grid.shape, grid.dim), torch.nan), grid)


# ---- displacement fields, read by ITK ----


def ras_to_lps(points: np.ndarray) -> np.ndarray:
    return points * np.array([-1.0, -1.0, 1.0])[: points.shape[-1]]


def test_the_header_of_a_displacement_is_itks(grid: Grid, tmp_path: Path) -> None:
    path = save_displacement(tmp_path / "u.nii.gz", torch.randn(*grid.shape, grid.dim), grid)
    header = nib.load(path).header
    assert header["intent_code"] == 1007
    assert nib.load(path).shape == (*grid.shape, *([1] * (4 - grid.dim)), grid.dim)
    assert header.get_xyzt_units()[0] == "mm"


def test_itk_maps_points_with_our_displacement(grid: Grid, tmp_path: Path) -> None:
    u = torch.randn(*grid.shape, grid.dim, dtype=torch.float64)
    path = save_displacement(tmp_path / "u.nii.gz", u, grid)
    itk = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
    assert itk.GetSize() == grid.shape
    assert itk.GetNumberOfComponentsPerPixel() == grid.dim
    transform = sitk.DisplacementFieldTransform(itk)  # takes the image's content
    rng = np.random.default_rng(0)
    last = np.array(grid.shape) - 1
    index = rng.uniform(0.0, 1.0, size=(50, grid.dim)) * last
    index[:10] = np.round(index[:10])  # some at voxel centres
    points = np.array(grid.origin) + index * grid.spacing
    field = torch.movedim(u, -1, 0)[None]
    ours = points + sample(field, torch.from_numpy(points)[None], grid)[0].T.numpy()
    theirs = np.array([ras_to_lps(np.array(transform.TransformPoint(p.tolist()))) for p in ras_to_lps(points)])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours - points).max() > 1  # the field does move them


def test_itk_warps_an_image_as_we_do(tmp_path: Path) -> None:
    grid = GRIDS[3]
    fixed = Grid((8, 10, 6), (1.2, 1.1, 3.0), tuple(o + 0.5 for o in grid.origin))
    moving = Volume(torch.rand(grid.shape), grid)
    u = 0.8 * torch.randn(*fixed.shape, 3)
    transform = sitk.DisplacementFieldTransform(
        sitk.ReadImage(str(save_displacement(tmp_path / "u.nii.gz", u, fixed)), sitk.sitkVectorFloat64)
    )
    itk = sitk.ReadImage(str(save_volume(tmp_path / "moving.nii.gz", moving)))
    reference = sitk.ReadImage(str(save_volume(tmp_path / "fixed.nii.gz", Volume(torch.rand(fixed.shape), fixed))))
    theirs = sitk.GetArrayFromImage(sitk.Resample(itk, reference, transform, sitk.sitkLinear, -1.0)).transpose(2, 1, 0)
    ours = sample(moving.batch, flat_points(fixed) + u.reshape(1, -1, 3), grid)[0, 0].reshape(fixed.shape).numpy()
    inside = theirs >= 0
    assert inside.mean() > 0.3
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=1e-3)


# ---- the template ----


def test_load_mni_reads_the_file_that_data_download_locates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run `python -m data_download mni152`"):
        load_mni()
    with pytest.raises(ValueError, match="has t1, grey_matter, white_matter, not 't2'"):
        load_mni("t2")
    (tmp_path / "mni152").mkdir()
    stored = image_of(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    nib.save(stored, tmp_path / "mni152" / "t1.nii.gz")
    assert load_mni().grid == Grid(SHAPE, SPACING, ORIGIN)


@pytest.mark.skipif(not data_download.present("mni152"), reason="mni152 is not here: python data_download mni152")
def test_the_real_template() -> None:
    volume = load_mni()
    assert volume.grid == Grid((197, 233, 189), (1, 1, 1), (-98, -134, -72))
    x, y, z = (round(-o) for o in volume.grid.origin)
    assert volume.data[x, y, z] > 0  # the anterior commissure, RAS (0, 0, 0), is inside the brain
    assert volume.data[0, 0, 0] == 0
    mirrored = volume.data.flip(0)  # the template is symmetric about x = 0
    assert (volume.data - mirrored).abs().mean() < 0.02 * volume.data.max()
