"""Registration as a user meets it: known transforms, SimpleITK on the files it writes, and whatever can be wrong."""

import gzip
import json
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from truths import pairs
from truths.fields import one_sentence, positions
from truths.pairs import FIXED, MOVING, NETS, Motion, affine_of, error_mm, untrained, write

import regteach
from regteach import registration, remarks
from regteach.checkpoints import Model, save_model
from regteach.data.volumes import Volume, read_volume
from regteach.grid import Grid
from regteach.nets.istn import ISTN, AffineStage, ISTNConfig, SplineStage
from regteach.refinement import Refinement
from regteach.registration import Registration, as_volume, register, writable

KEYS = {
    "model": str,
    "similarity": dict,
    "feature_loss": dict,
    "folding_percent": float,
    "sdlogj": float,
    "folding_measured_on": str,
    "refinement_steps": int,
    "refinement_mode": str,
    "curve": list,
    "start": str,
    "working_grid": dict,
    "notes": list,
    "device": str,
    "seconds": float,
    "use": str,
}
MODELS = {dim: untrained(dim) for dim in (2, 3)}
AFFINE = {dim: untrained(dim, spline=False) for dim in (2, 3)}


@pytest.fixture(scope="module", params=[2, 3], ids=["2d", "3d"])
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Registration, Motion, Path]:
    """A pair of files of different grids, registered: the result, the truth, and the folder of the files."""
    dim, folder = request.param, tmp_path_factory.mktemp("files")
    motion = Motion.of(dim)
    moving, fixed = pairs.pair(dim, motion)
    paths = write(folder / "moving.nii.gz", moving, MOVING[dim]), write(folder / "fixed.nii.gz", fixed, FIXED[dim])
    write(folder / "labels.nii.gz", (moving > 0.3).astype(np.int16) * 2000, MOVING[dim])
    save_model(folder / "untrained.safetensors", MODELS[dim])
    return register(*paths, model=MODELS[dim], refine=60), motion, folder


# ---- what it finds ----


def test_a_known_affine_is_found_to_less_than_a_voxel(found) -> None:
    result, motion, _ = found
    before = np.linalg.norm(pairs.seen(result.fixed.grid) - motion(pairs.seen(result.fixed.grid)), axis=-1)
    error = error_mm(result, motion)
    assert before.mean() > 3
    assert error.mean() < 1.0 <= min(result.fixed.grid.spacing)
    assert np.percentile(error, 90) < min(NETS[result.fixed.grid.dim].spacing)


def test_none_refines_as_the_model_recommends_and_the_report_counts_every_step() -> None:
    moving, fixed = pairs.pair(2, Motion.of(2))
    own = Refinement(4, "greedy", 0.5, coarser=(2, 3))
    model = replace(AFFINE[2], refinement=own)
    chosen, recommended = (register((moving, MOVING[2]), (fixed, FIXED[2]), model, refine=r) for r in (own, None))
    np.testing.assert_array_equal(recommended.displacement(), chosen.displacement())
    assert recommended.report["refinement_steps"] == 4 + 2 + 3
    assert recommended.report["refinement_mode"] == "greedy"
    once = register((moving, MOVING[2]), (fixed, FIXED[2]), model)
    assert once.report["refinement_steps"] == 0


def test_what_is_warped_matches_the_fixed_image_better(found) -> None:
    result, _, _ = found
    warped, fixed = result.warp(), result.fixed.data
    assert isinstance(warped, Volume)
    assert warped.grid == result.fixed.grid
    untouched = Registration(regteach.Identity(fixed.ndim), result.fixed, result.moving, {}).warp()
    assert (warped.data - fixed).abs().mean() < 0.3 * (untouched.data - fixed).abs().mean()


@pytest.mark.parametrize("kind", ["shift", "scale"])
def test_a_shift_and_a_scale_are_found(kind: str) -> None:
    motion = Motion(np.eye(2), np.array([7.0, -6.0])) if kind == "shift" else Motion(np.diag([1.15, 0.9]), np.zeros(2))
    moving, fixed = pairs.pair(2, motion)
    result = register((moving, MOVING[2]), (fixed, FIXED[2]), AFFINE[2], refine=60)
    assert error_mm(result, motion).mean() < 1.0


def test_moving_at_1_mm_and_fixed_at_3_mm_and_the_other_way() -> None:
    fine, coarse = Grid((100, 104), 1.0, -50.0), Grid((36, 36), 3.0, -53.0)
    motion = Motion.of(2)
    for moving_grid, fixed_grid in ((fine, coarse), (coarse, fine)):
        moving, fixed = pairs.pair(2, motion, moving_grid, fixed_grid)
        result = register((moving, moving_grid), (fixed, fixed_grid), AFFINE[2], refine=60)
        assert error_mm(result, motion).mean() < 1.0
        assert result.warp().grid == fixed_grid


def test_without_refinement_an_untrained_model_is_the_identity_on_world_coordinates() -> None:
    for dim in (2, 3):
        moving, fixed = pairs.pair(dim, Motion.of(dim))
        result = register((moving, MOVING[dim]), (fixed, FIXED[dim]), MODELS[dim])
        points = pairs.seen(FIXED[dim])
        np.testing.assert_allclose(result.transform(points), points, atol=1e-4)
        assert np.abs(result.displacement()).max() < 1e-4
        assert result.report["start"] == "world coordinates"
        assert result.report["folding_percent"] == 0
        assert result.report["sdlogj"] < 1e-5
        assert result.report["curve"] == []
        assert result.report["refinement_mode"] is None


def test_images_far_apart_start_from_aligned_middles_and_the_report_says_so() -> None:
    away = np.array([300.0, -250.0])
    shape = {"moving": MOVING[2], "fixed": FIXED[2]}
    far = replace(shape["moving"], origin=tuple(np.array(shape["moving"].origin) + away))
    motion = Motion(np.eye(2), away)
    moving, fixed = pairs.pair(2, motion, far)
    result = register((moving, far), (fixed, FIXED[2]), AFFINE[2])
    points = pairs.seen(FIXED[2])
    start = result.transform(points) - points
    # One shift for all points, and, as both show the same, the right one.
    np.testing.assert_allclose(start, start[:1].repeat(len(start), 0), atol=1e-3)
    np.testing.assert_allclose(start[0], away, atol=3.0)
    assert result.report["start"] == f"middles aligned ({np.hypot(*start[0]):.1f} mm apart)"
    refined = register((moving, far), (fixed, FIXED[2]), AFFINE[2], refine=40)
    assert error_mm(refined, motion).mean() < 1.0


def test_a_part_of_the_same_space_keeps_its_world_coordinates() -> None:
    """A crop of one half of the image: its middle is far from that of the whole, but it lies within it."""
    whole = blob_image = pairs.blobs(positions(FIXED[2]))
    half = FIXED[2].cropped((50, 0), (100, 112))
    assert blob_image[50:].max() > 0.5
    result = register((whole[50:], half), (whole, FIXED[2]), MODELS[2])
    assert result.report["start"] == "world coordinates"


def test_the_similarity_of_the_report_rises_and_the_curve_falls(found) -> None:
    report = found[0].report
    assert report["similarity"]["before"] < 0.95 < 0.99 < report["similarity"]["after"] <= 1
    assert report["feature_loss"]["after"] == pytest.approx(min(report["curve"]), abs=1e-5)
    assert report["feature_loss"]["before"] == pytest.approx(report["curve"][0], abs=1e-5)
    assert len(report["curve"]) == 61
    assert report["folding_percent"] == 0
    assert 0 < report["sdlogj"] < 0.3


@pytest.mark.parametrize("pyramid", [1, 2, 4])
def test_the_feature_loss_is_what_refinement_makes_small(pyramid: int) -> None:
    """At as many resolutions as the refinement compares."""
    motion = Motion.of(2)
    pair = [(image, grid) for image, grid in zip(pairs.pair(2, motion), (MOVING[2], FIXED[2]), strict=True)]
    report = register(*pair, MODELS[2], refine=Refinement(5, rate=0.05, pyramid=pyramid)).report
    assert report["feature_loss"]["before"] == pytest.approx(report["curve"][0], abs=1e-5)
    assert report["feature_loss"]["after"] == pytest.approx(min(report["curve"]), abs=1e-5)


def test_a_model_stays_on_the_device_of_its_owner(found) -> None:
    """Where an image can not follow, here to a device without memory, nothing has happened to the model."""
    folder, model = found[2], MODELS[found[0].fixed.grid.dim]
    with pytest.raises((NotImplementedError, RuntimeError)):
        register(folder / "moving.nii.gz", folder / "fixed.nii.gz", model, device="meta")
    assert {p.device.type for p in model.network.parameters()} == {"cpu"}


def test_the_same_image_twice_is_remarked_on(found) -> None:
    image, model = (pairs.blobs(positions(FIXED[2])), FIXED[2]), MODELS[2]
    assert any("are the same" in note for note in register(image, image, model).report["notes"])
    assert found[0].report["notes"] == []


def test_features_that_agree_less_are_remarked_on() -> None:
    moving, fixed = torch.rand(2, 1, 1, 8, 8)
    assert remarks.on_doubts(moving, fixed, 0.5, 0.4) == []
    assert remarks.on_doubts(moving, fixed, 0.5, 0.5 + 1e-5) == []
    assert remarks.on_doubts(moving, fixed, None, None) == []
    (told,) = remarks.on_doubts(moving, fixed, 0.4, 0.5)
    assert "agree less" in told


def test_the_same_call_gives_the_same_numbers(found) -> None:
    result, _, folder = found
    again = register(folder / "moving.nii.gz", folder / "fixed.nii.gz", MODELS[result.fixed.grid.dim], refine=60)
    assert np.array_equal(result.displacement(), again.displacement())
    different = {key for key in result.report if result.report[key] != again.report[key]}
    assert different <= {"seconds"}


# ---- the contract ----


def test_every_line_of_the_contract(found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, folder = found
    monkeypatch.chdir(folder)
    monkeypatch.setattr("regteach.checkpoints.WEIGHTS", folder)
    model = regteach.load("untrained")
    result = regteach.register("moving.nii.gz", "fixed.nii.gz", model=model, refine=5)
    grid = result.fixed.grid
    labels = result.warp("labels.nii.gz", order=0)
    assert isinstance(labels, Volume)
    assert labels.grid == grid
    assert set(labels.data.unique().tolist()) == {0, 2000}
    points_mm = pairs.seen(grid)
    moved = result.transform(points_mm)
    assert isinstance(moved, np.ndarray)
    assert moved.shape == points_mm.shape
    field = result.displacement()
    assert isinstance(field, np.ndarray)
    assert field.shape == (*grid.shape, grid.dim)
    assert {name: type(value) for name, value in result.report.items()} == KEYS
    assert {"before", "after"} <= set(result.report["similarity"])
    assert len(result.report["curve"]) == 6
    out = result.save(tmp_path / "a" / "out")
    assert sorted(p.name for p in out.iterdir()) == ["displacement.nii.gz", "report.json", "warped.nii.gz"]
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(result.report))
    assert "clinical" in result.report["use"]
    np.testing.assert_allclose(read_volume(out / "warped.nii.gz").data, result.warp().data, atol=1e-5)


def test_points_and_field_say_the_same(found) -> None:
    result, _, _ = found
    points = positions(result.fixed.grid)
    moved = result.transform(points.reshape(-1, points.shape[-1])[::7])
    field = result.displacement()
    np.testing.assert_allclose(moved, (points + field).reshape(-1, points.shape[-1])[::7], atol=2e-4)
    tensor = result.transform(torch.tensor(points.reshape(-1, points.shape[-1])[:9]))
    assert isinstance(tensor, torch.Tensor)
    assert not tensor.requires_grad
    np.testing.assert_array_equal(tensor, result.transform(points.reshape(-1, points.shape[-1])[:9]))
    assert result.transform(points.reshape(-1, points.shape[-1])[:0]).shape == (0, points.shape[-1])


def test_any_kind_of_input_gives_the_same_result(found) -> None:
    result, _, folder = found
    dim = result.fixed.grid.dim
    names = folder / "moving.nii.gz", folder / "fixed.nii.gz"
    kinds = {
        "str": [str(n) for n in names],
        "nibabel": [nib.load(n) for n in names],
        "array": [(read_volume(n).data.numpy(), read_volume(n).grid) for n in names],
        "tensor": [(read_volume(n).data, read_volume(n).grid) for n in names],
        "volume": [read_volume(n) for n in names],
        "mixed": [names[0], read_volume(names[1])],
    }
    expected = register(*names, MODELS[dim], refine=3).displacement()
    for kind, (moving, fixed) in kinds.items():
        np.testing.assert_array_equal(register(moving, fixed, MODELS[dim], refine=3).displacement(), expected, kind)


def test_a_model_by_object_by_path_and_by_name_and_settings_for_its_refinement(found, monkeypatch) -> None:
    result, _, folder = found
    dim, names = result.fixed.grid.dim, (folder / "moving.nii.gz", folder / "fixed.nii.gz")
    monkeypatch.setattr("regteach.checkpoints.WEIGHTS", folder)
    path = folder / "untrained.safetensors"
    given = [MODELS[dim], path, str(path), "untrained", regteach.load("untrained")]
    fields = [register(*names, model=model, refine=2).displacement() for model in given]
    assert all(np.array_equal(field, fields[0]) for field in fields)
    own = Refinement(2, rate=0.05, mode="weights")
    by_weights = register(*names, model=path, refine=own)
    assert by_weights.report["refinement_mode"] == "weights"
    assert len(by_weights.report["curve"]) == 3
    same = register(*names, model=path, refine=Refinement(2, rate=0.05))
    np.testing.assert_array_equal(same.displacement(), fields[0])


def test_registering_changes_neither_the_model_nor_the_images(found) -> None:
    result, _, folder = found
    dim = result.fixed.grid.dim
    weights = {key: value.clone() for key, value in MODELS[dim].network.state_dict().items()}
    moving, fixed = (as_volume(folder / name, "an image") for name in ("moving.nii.gz", "fixed.nii.gz"))
    kept = [moving.data.clone(), fixed.data.clone()]
    register(moving, fixed, MODELS[dim], refine=Refinement(2, mode="weights"))
    assert torch.equal(moving.data, kept[0])
    assert torch.equal(fixed.data, kept[1])
    assert all(torch.equal(value, weights[key]) for key, value in MODELS[dim].network.state_dict().items())


# ---- files for others ----


def test_simpleitk_warps_and_maps_points_as_we_do(found, tmp_path: Path) -> None:
    result, _, folder = found
    grid = result.fixed.grid
    result.save(tmp_path)
    field = sitk.ReadImage(str(tmp_path / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(field)
    # ITK reads our one-slice files of 2D images as 3D: the array route avoids its z axis.
    arrays = {name: read_volume(folder / f"{name}.nii.gz") for name in ("moving", "fixed")}
    itk = {name: _itk(volume) for name, volume in arrays.items()}
    theirs = sitk.GetArrayFromImage(sitk.Resample(itk["moving"], itk["fixed"], transform, sitk.sitkLinear, -1.0)).T
    ours = read_volume(tmp_path / "warped.nii.gz").data.numpy()
    inside = theirs >= 0
    assert inside.mean() > 0.5
    assert ours.max() > 0.5
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=2e-4)
    to_lps = np.array([-1.0, -1.0, 1.0])[: grid.dim]
    # At voxel centres the field is exact; between them ITK reads it linearly, which is near.
    points = pairs.seen(grid, 200)
    mapped = np.array([transform.TransformPoint(p) for p in (points * to_lps).tolist()]) * to_lps
    np.testing.assert_allclose(mapped, result.transform(points), atol=1e-3)
    between = points + 0.4 * np.array(grid.spacing)
    mapped = np.array([transform.TransformPoint(p) for p in (between * to_lps).tolist()]) * to_lps
    np.testing.assert_allclose(mapped, result.transform(between), atol=0.02)


def _itk(volume: Volume) -> sitk.Image:
    """The same image for ITK: flipped and negated into LPS."""
    image, dim = sitk.GetImageFromArray(volume.data.numpy().T), volume.grid.dim
    image.SetSpacing(volume.grid.spacing)
    image.SetOrigin([s * o for s, o in zip((-1, -1, 1), volume.grid.origin, strict=False)])
    image.SetDirection(np.diag([-1.0, -1.0, 1.0][:dim]).ravel().tolist())
    return image


def test_simpleitk_reads_the_saved_files_themselves(tmp_path: Path) -> None:
    """In 3D without any help: the moving file, the fixed file and the field as they are on the disk."""
    moving, fixed = pairs.pair(3, Motion.of(3))
    files = write(tmp_path / "m.nii.gz", moving, MOVING[3]), write(tmp_path / "f.nii.gz", fixed, FIXED[3])
    result = register(*files, MODELS[3], refine=20)
    result.save(tmp_path)
    read = {name: sitk.ReadImage(str(tmp_path / f"{name}.nii.gz")) for name in ("m", "f", "warped")}
    transform = sitk.DisplacementFieldTransform(
        sitk.ReadImage(str(tmp_path / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    )
    theirs = sitk.GetArrayFromImage(sitk.Resample(read["m"], read["f"], transform, sitk.sitkLinear, -1.0))
    ours = sitk.GetArrayFromImage(read["warped"])
    assert read["warped"].GetOrigin() == pytest.approx(read["f"].GetOrigin())
    inside = theirs >= 0
    assert inside.mean() > 0.5
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=2e-4)
    untouched = sitk.GetArrayFromImage(sitk.Resample(read["m"], read["f"], sitk.Transform(), sitk.sitkLinear, -1.0))
    assert np.abs(ours - untouched)[inside].max() > 0.2


def test_any_orientation_of_the_files_gives_the_same_result_and_places(tmp_path: Path) -> None:
    motion = Motion.of(3)
    moving, fixed = pairs.pair(3, motion)
    write(tmp_path / "f.nii.gz", fixed, FIXED[3])
    expected = register((moving, MOVING[3]), tmp_path / "f.nii.gz", MODELS[3], refine=3)
    for code in ("LAS", "LPI", "PIR"):
        image = nib.Nifti1Image(moving, affine_of(MOVING[3]))
        target = nib.orientations.axcodes2ornt(code)
        turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), target))
        assert "".join(nib.aff2axcodes(turned.affine)) == code
        result = register(turned, tmp_path / "f.nii.gz", MODELS[3], refine=3)
        np.testing.assert_allclose(result.displacement(), expected.displacement(), atol=1e-4)
        labels = nib.Nifti1Image((np.asarray(turned.dataobj) > 0.3).astype(np.int16), turned.affine)
        assert torch.equal(
            result.warp(labels, order=0).data, expected.warp(((moving > 0.3).astype(int), MOVING[3]), order=0).data
        )


def test_an_oblique_scan_is_resampled_and_the_report_says_so(tmp_path: Path) -> None:
    """Turned by 20 degrees in its header: the same anatomy at the same world coordinates."""
    motion = Motion.of(3)
    turn, c, s = np.eye(4), np.cos(np.radians(20)), np.sin(np.radians(20))
    turn[:2, :2] = [[c, -s], [s, c]]
    affine = turn @ affine_of(Grid((60, 60, 56), 2.0, (-62.0, -58.0, -56.0)))
    index = np.stack(np.meshgrid(*[np.arange(n) for n in (60, 60, 56)], indexing="ij"), -1)
    array = pairs.blobs(motion.back(index @ affine[:3, :3].T + affine[:3, 3]))
    moving = write(tmp_path / "oblique.nii.gz", array, affine=affine)
    labels = write(tmp_path / "labels.nii.gz", (array > 0.3).astype(np.uint8), affine=affine)
    fixed = pairs.pair(3, motion)[1]
    with pytest.warns(UserWarning, match="oblique"):
        result = register(moving, (fixed, FIXED[3]), AFFINE[3], refine=60)
    assert len(result.report["notes"]) == 1
    assert "oblique" in result.report["notes"][0]
    assert error_mm(result, motion).mean() < 1.0
    with pytest.warns(UserWarning, match="oblique"):
        warped = result.warp(labels, order=0).data
    wanted = torch.from_numpy(fixed > 0.3)
    assert 2 * (wanted & (warped > 0)).sum() / (wanted.sum() + warped.sum()) > 0.9


def test_slices_as_two_axes_and_as_a_third_of_length_one(tmp_path: Path) -> None:
    moving, fixed = pairs.pair(2, Motion.of(2))
    flat = [nib.Nifti1Image(a, affine_of(g)) for a, g in ((moving, MOVING[2]), (fixed, FIXED[2]))]
    thick = [nib.Nifti1Image(a[..., None], affine_of(g)) for a, g in ((moving, MOVING[2]), (fixed, FIXED[2]))]
    fields = [register(*images, MODELS[2], refine=3).displacement() for images in (flat, thick)]
    assert fields[0].shape == (*FIXED[2].shape, 2)
    np.testing.assert_array_equal(*fields)


def scores(image: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 within, and the background put back to 0: in the middle of the tissue's values."""
    inside = image > 0
    return np.where(inside, (image - image[inside].mean()) / image[inside].std(), 0)


def rician(image: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 0.03, (2, *image.shape))
    return 400 * np.hypot(image + noise[0], noise[1])


@pytest.mark.parametrize(
    "scale",
    [
        lambda image: image * 1500 - 1024,
        rician,
        scores,
        lambda image: (image * 3000).astype(np.uint16),
        lambda image: image.astype(">f4")[::-1][::-1],
    ],
    ids=["Hounsfield", "noise", "scores", "integers", "big-endian, reversed"],
)
def test_background_and_scale_of_the_intensities_do_not_matter(scale) -> None:
    motion = Motion.of(2)
    moving, fixed = (scale(image) for image in pairs.pair(2, motion))
    result = register((moving, MOVING[2]), (fixed, FIXED[2]), AFFINE[2], refine=60)
    assert error_mm(result, motion).mean() < 1.0
    assert result.report["start"] == "world coordinates"


def test_outside_of_the_moving_image_is_its_smallest_value_and_no_label() -> None:
    moving, fixed = pairs.pair(2, Motion.of(2))
    part = MOVING[2].cropped((0, 0), (30, 48))
    result = register((moving[:30] * 1500 - 1024, part), (fixed, FIXED[2]), MODELS[2])
    outside = positions(FIXED[2])[..., 0] > part.last[0] + part.spacing[0]
    assert outside.any()
    assert np.unique(result.warp().data.numpy()[outside]).tolist() == [-1024]
    labels = result.warp((np.full(part.shape, 7), part), order=0).data.numpy()
    assert np.unique(labels[outside]).tolist() == [0]
    assert 7 in labels
    nearest = result.warp(order=0)
    assert nearest.data.is_floating_point()
    assert set(nearest.data[~torch.from_numpy(outside)].tolist()) <= {*result.moving.data.flatten().tolist(), 0.0}


def test_large_label_numbers_stay_what_they_are() -> None:
    moving, fixed = pairs.pair(2, Motion.of(2))
    result = register((moving, MOVING[2]), (fixed, FIXED[2]), MODELS[2])
    number = 2**24 + 1  # the first that float32 has not
    warped = result.warp(((moving > 0.3) * np.int64(number), MOVING[2]), order=0)
    assert set(warped.data.unique().tolist()) == {0, number}


# ---- beyond the working grid ----


def test_the_map_is_continuous_and_sane_far_outside_of_the_working_grid() -> None:
    """A brain in a huge field of view: displacements fade into the affine, without a jump at any border."""
    big = Grid((70, 72, 71), 8.0, (-270.0, -280.0, -290.0))
    motion = Motion.of(3)
    moving, fixed = pairs.pair(3, motion, big, big)
    result = register((moving, big), (fixed, big), MODELS[3], refine=40)
    shape = result.report["working_grid"]["shape"]
    assert np.prod(shape) * 27 < 0.2 * np.prod(big.extent)  # most of it lies outside
    along = np.linspace(-250, 250, 5001)
    for axis in range(3):
        line = np.zeros((len(along), 3))
        line[:, axis] = along
        u = result.transform(line) - line
        slope = np.linalg.norm(np.diff(u, axis=0), axis=1) / np.diff(along)
        assert slope.max() < 1.5
        # From 100 mm on the spline has ended, and what is left is straight.
        for end in (u[along < -100], u[along > 100]):
            assert np.abs(np.diff(end, 2, axis=0)).max() < 1e-3
    field = result.displacement()
    assert np.isfinite(field).all()
    assert np.abs(field).max() < 0.5 * max(big.extent)


def test_slabs_are_those_of_the_whole(found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, _, folder = found
    whole = result.displacement(), result.warp().data, result.warp(folder / "labels.nii.gz", order=0).data
    monkeypatch.setattr(registration, "SLAB", 700)
    assert len(list(registration._slabs(result.fixed.grid))) > 10
    np.testing.assert_allclose(result.displacement(), whole[0], atol=1e-4)
    torch.testing.assert_close(result.warp().data, whole[1], rtol=0, atol=1e-4)
    result.save(tmp_path, folder / "labels.nii.gz")
    torch.testing.assert_close(read_volume(tmp_path / "warped.nii.gz").data, whole[1], rtol=0, atol=1e-4)
    saved = read_volume(tmp_path / "warped_labels.nii.gz", labels=True).data
    assert (saved != whole[2]).float().mean() < 1e-3


# ---- what can be wrong ----


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    moving, fixed = pairs.pair(3, Motion.of(3))
    folder = tmp_path_factory.mktemp("good")
    write(folder / "moving.nii.gz", moving, MOVING[3])
    write(folder / "fixed.nii.gz", fixed, FIXED[3])
    return folder


def bad_file(kind: str, folder: Path) -> tuple[Path, str]:
    """A file with this fault, and what the sentence says."""
    path, grid = folder / "bad.nii.gz", MOVING[3]
    array = pairs.pair(3, Motion.of(3))[0]
    if kind == "not a NIfTI":
        path.write_bytes(b"no image at all, but long enough" * 40)
        return path, "not a NIfTI"
    if kind == "truncated":
        content = gzip.decompress(write(path, array, grid).read_bytes())
        path.write_bytes(gzip.compress(content[: len(content) // 2]))
        return path, "truncated"
    if kind == "cut short":
        content = write(path, array, grid).read_bytes()
        path.write_bytes(content[: len(content) // 2])
        return path, "truncated"
    if kind == "empty":
        path.write_bytes(b"")
        return path, "empty"
    if kind == "4D":
        nib.save(nib.Nifti1Image(np.stack([array, array], -1), affine_of(grid)), path)
        return path, "4D"
    if kind == "not finite":
        array[3, 4, 5] = np.nan
        return write(path, array, grid), "not finite"
    if kind == "constant":
        return write(path, np.full_like(array, 3), grid), "constant"
    if kind == "singular":
        content = bytearray(gzip.decompress(write(path, array, grid).read_bytes()))
        content[280 + 16 : 280 + 32] = content[280 : 280 + 16]  # srow_y is srow_x; nibabel itself writes no such file
        path.write_bytes(gzip.compress(bytes(content)))
        return path, "singular"
    if kind == "2D":
        return write(path, array[:, :, 20], affine=np.eye(4)), "2D"
    if kind == "too small":
        return write(path, array[:, 20:26], affine=np.eye(4)), "voxels"
    assert kind == "complex"
    return write(path, array.astype(np.complex64), grid), "complex64"


FAULTS = ["not a NIfTI", "truncated", "cut short", "empty", "4D", "not finite", "constant", "singular"]
FAULTS += ["2D", "too small", "complex"]


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("role", ["moving", "fixed"])
def test_a_bad_file_is_one_sentence(kind: str, role: str, good: Path, tmp_path: Path) -> None:
    path, word = bad_file(kind, tmp_path)
    files = {"moving": good / "moving.nii.gz", "fixed": good / "fixed.nii.gz"} | {role: path}
    with pytest.raises(ValueError) as caught:
        register(files["moving"], files["fixed"], MODELS[3])
    assert one_sentence(caught.value, word), caught.value
    assert "bad.nii.gz" in str(caught.value) or role in str(caught.value)


def test_a_file_that_is_not_there(good: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        register(good / "moving.nii.gz", good / "gone.nii.gz", MODELS[3])
    assert one_sentence(caught.value, "gone.nii.gz")


def bad_arrays() -> dict[str, tuple[object, str]]:
    array, grid = pairs.pair(2, Motion.of(2))[0], MOVING[2]
    hole = array.copy()
    hole[3, 3] = np.inf
    return {
        "no grid": (array, "pair (array, Grid)"),
        "a list": ([array, grid], "pair (array, Grid)"),
        "nothing": (None, "pair (array, Grid)"),
        "the grid of another": ((array, FIXED[2]), "its grid has"),
        "infinite": ((hole, grid), "not finite"),
        "constant": ((np.zeros(grid.shape), grid), "constant"),
        "complex": ((array + 1j, grid), "complex"),
        "text": ((np.full(grid.shape, "a"), grid), "holds <U1"),
    }


@pytest.mark.parametrize("kind", list(bad_arrays()))
def test_a_bad_array_is_one_sentence(kind: str) -> None:
    given, said = bad_arrays()[kind]
    fixed = pairs.pair(2, Motion.of(2))[1]
    with pytest.raises(ValueError) as caught:
        register(given, (fixed, FIXED[2]), MODELS[2])
    assert one_sentence(caught.value, said), caught.value
    assert "moving" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"refine": -1}, "0 steps or more"),
        ({"model": "istn-hipocampus"}, "no model 'istn-hipocampus'"),
        ({"model": Path("weights.pt")}, "no model 'weights.pt'"),
        ({"device": "abacus"}, "no device 'abacus'"),
    ],
)
def test_a_bad_option_is_one_sentence(options: dict, said: str) -> None:
    moving, fixed = pairs.pair(2, Motion.of(2))
    with pytest.raises(ValueError) as caught:
        register((moving, MOVING[2]), (fixed, FIXED[2]), **{"model": MODELS[2]} | options)
    assert one_sentence(caught.value, said), caught.value


def test_an_unknown_model_is_told_the_nearest_name(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("regteach.checkpoints.WEIGHTS", tmp_path)
    for name in ("istn-hippocampus", "istn-brains"):
        save_model(tmp_path / f"{name}.safetensors", MODELS[2])
    with pytest.raises(ValueError, match="the nearest is 'istn-hippocampus'") as caught:
        register("a.nii.gz", "b.nii.gz", model="istn-hipocampus")
    assert one_sentence(caught.value)


@pytest.mark.parametrize(
    "kind", ["another shape", "another spacing", "another place", "another dimension", "not whole"]
)
def test_labels_that_do_not_fit_are_refused_before_anything_is_written(kind: str, found, tmp_path: Path) -> None:
    result, _, folder = found
    grid = result.moving.grid
    array = (result.moving.data.numpy() > 0.3).astype(np.float32)
    others = {
        "another shape": (array[1:], grid.cropped((1, *[0] * (grid.dim - 1)), grid.shape)),
        "another spacing": (array, replace(grid, spacing=(1.1, *grid.spacing[1:]))),
        "another place": (array, replace(grid, origin=tuple(o + 0.5 for o in grid.origin))),
        "another dimension": (np.ones((9, 9, 9)[: 5 - grid.dim]), Grid((9, 9, 9)[: 5 - grid.dim])),
        "not whole": (array * 0.5, grid),
    }
    with pytest.raises(ValueError) as caught:
        result.save(tmp_path / "out", labels=others[kind])
    assert one_sentence(caught.value, "whole" if kind == "not whole" else "must be on the moving image's grid")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError):
        result.warp(others[kind], order=0)


def test_points_outside_the_fixed_image_are_refused(found) -> None:
    result, _, _ = found
    grid = result.fixed.grid
    inside = pairs.seen(grid)
    edge = np.array([grid.last]) + 0.5 * np.array(grid.spacing)  # the outer face of the last voxel
    assert np.isfinite(result.transform(edge)).all()
    for wrong, said in (
        (np.concatenate([inside, edge + 0.5]), f"1 of {len(inside) + 1} points lie outside"),
        (np.concatenate([inside, inside[:2] * np.nan]), f"2 of {len(inside) + 2} points are not finite"),
        (inside[0], f"n rows and {grid.dim} columns"),
        (np.zeros((4, grid.dim + 1)), f"n rows and {grid.dim} columns"),
    ):
        with pytest.raises(ValueError) as caught:
            result.transform(wrong)
        assert one_sentence(caught.value, said), caught.value


def test_an_order_that_is_none(found) -> None:
    with pytest.raises(ValueError) as caught:
        found[0].warp(order=3)
    assert one_sentence(caught.value, "order is 0")


def test_a_folder_that_can_not_be_written(found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, _, _ = found
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        for attempt in (result.save, writable):
            with pytest.raises(ValueError) as caught:
                attempt(folder)
            assert one_sentence(caught.value, "can not be written", "is a file")
    monkeypatch.setattr(registration.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError) as caught:
        result.save(tmp_path / "locked")
    assert one_sentence(caught.value, "not yours to write to")
    assert not (tmp_path / "locked").exists()


def test_a_disk_that_fills_up_leaves_no_report_and_no_half_file(found, tmp_path: Path, monkeypatch) -> None:
    result, _, folder = found
    result.save(tmp_path, labels=folder / "labels.nii.gz")
    assert (tmp_path / "warped_labels.nii.gz").exists()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(registration, "save_displacement", full)
    with pytest.raises(ValueError) as caught:
        result.save(tmp_path)
    assert one_sentence(caught.value, "No space left")
    # No report says that the files belong together, and the labels of the run before are gone.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["displacement.nii.gz", "warped.nii.gz"]


def test_an_image_that_shows_nothing_where_the_network_looks() -> None:
    """Two specks, far apart: the working grid lies between them, on nothing."""
    grid = Grid((400, 400), 1.0)
    array = np.zeros(grid.shape, np.float32)
    array[:5, :5] = array[-5:, -5:] = 1
    with pytest.raises(ValueError) as caught:
        register((array, grid), (array, grid), MODELS[2])
    assert one_sentence(caught.value, "shows nothing")


# ---- size ----


def test_a_whole_head_at_1_mm_needs_seconds_and_little_memory() -> None:
    """256 x 256 x 256: what is allocated at a time stays far below a field of doubles for each step of the way."""
    working = Grid((64, 72, 64), 2.0)
    stages = (AffineStage(widths=(4, 8), hidden=8), SplineStage(16.0, widths=(4, 8)))
    model = Model("small", ISTN(ISTNConfig(working, stages, itn=())).eval().requires_grad_(False))
    grid = Grid((256, 256, 256))
    axes = [torch.exp(-(((torch.arange(256) - c) / 45.0) ** 4)) for c in (130, 120, 125)]
    image = (1000 * axes[0][:, None, None] * axes[1][:, None] * axes[2]).clamp_min(5) - 5
    begun = time.process_time()
    result = register((image, grid), (image.flip(0), grid), model)
    assert time.process_time() - begun < 20
    assert len(list(registration._slabs(grid))) == 8
    points = torch.rand(50, 3) * 250
    torch.testing.assert_close(result.transform(points), points, rtol=0, atol=1e-3)
