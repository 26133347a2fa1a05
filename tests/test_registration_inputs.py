"""What users bring: voxel types, units, sizes and settings that are odd, each understood, remarked on or refused."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from truths import pairs
from truths.fields import one_sentence
from truths.pairs import FIXED, MOVING, NETS, Motion, untrained, write

from regteach import cli
from regteach.affine import Affine
from regteach.checkpoints import load, save_model
from regteach.data.volumes import Volume, read_volume, save_volume
from regteach.framing import as_volume, framed, outside
from regteach.grid import Grid
from regteach.refinement import Refinement, refine
from regteach.registration import Registration, register
from regteach.sampling import grid_points
from regteach.transforms import Identity

MODEL = untrained(2)
MOVED, STILL = pairs.pair(2, Motion.of(2))
LABELS = (MOVED > 0.3).astype(np.int64)
PAIR = ((MOVED, MOVING[2]), (STILL, FIXED[2]))


@pytest.fixture(scope="module")
def result() -> Registration:
    return register(*PAIR, model=MODEL, refine=3)


# ---- voxel types ----


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.uint16, torch.int32, torch.int64, torch.float64])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("form", ["volume", "pair"])
def test_every_type_of_voxel_is_warped_alike(result: Registration, kind: torch.dtype, order: int, form: str) -> None:
    data = torch.from_numpy(LABELS)
    given = data.to(kind)
    source = Volume(given, MOVING[2]) if form == "volume" else (given, MOVING[2])
    expected = result.warp((LABELS.astype(np.float32), MOVING[2]), order=order).data
    warped = result.warp(source, order=order).data
    assert warped.dtype == (torch.int64 if order == 0 else torch.float32)
    assert torch.equal(warped, expected)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.uint8])
def test_images_of_fewer_bits_are_registered(kind: torch.dtype) -> None:
    scale = 200.0 if kind is torch.uint8 else 1.0
    coarse = [((scale * torch.from_numpy(image)).to(kind), grid) for image, grid in PAIR]
    same = [(image.float().numpy(), grid) for image, grid in coarse]
    np.testing.assert_array_equal(*(register(*p, model=MODEL, refine=2).displacement() for p in (coarse, same)))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", ["volume", "array"])
def test_an_image_to_warp_is_finite(result: Registration, wrong: float, form: str) -> None:
    values = MOVED.astype(np.float64)
    values[0, 0] = wrong
    source = (values, MOVING[2]) if form == "array" else Volume(torch.from_numpy(values), MOVING[2])
    with pytest.raises(ValueError, match=r"holds values that are not finite \(NaN or infinity\): 1 of them") as caught:
        result.warp(source)
    assert one_sentence(caught.value)


@pytest.mark.parametrize("value", [np.float64(1e19), np.uint64(2**63)])
def test_a_label_that_can_not_be_kept_is_refused(result: Registration, value: np.generic) -> None:
    labels = np.where(LABELS > 0, value, value.dtype.type(0))
    with pytest.raises(ValueError, match="large") as caught:
        result.warp((labels, MOVING[2]), order=0)
    assert one_sentence(caught.value)


@pytest.mark.parametrize("values", [(-1, 3_000_000_000), (0, 2**40), (0, 2**62)])
def test_labels_of_any_size_are_saved(result: Registration, values: tuple[int, int], tmp_path: Path) -> None:
    labels = np.where(LABELS > 0, values[1], values[0])
    result.save(tmp_path, (labels, MOVING[2]))
    expected = result.warp((labels, MOVING[2]), order=0).data
    assert torch.equal(read_volume(tmp_path / "warped_labels.nii.gz", labels=True).data, expected)
    assert values[1] in expected.unique().tolist()


# ---- units ----


@pytest.mark.parametrize(("unit", "per_mm"), [("meter", 1e-3), ("mm", 1.0), ("micron", 1e3), ("unknown", 1.0)])
def test_a_header_in_any_unit_is_read_in_mm_as_itk_does(unit: str, per_mm: float, tmp_path: Path) -> None:
    grid = Grid((9, 12, 10), (1.5, 2.0, 3.0), (-4.0, 5.0, 6.0))
    affine = np.diag([*grid.spacing, 1.0])
    affine[:3, 3] = grid.origin
    affine[:3] *= per_mm
    image = nib.Nifti1Image(np.random.default_rng(0).random(grid.shape, np.float32), affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "image.nii")
    found = read_volume(tmp_path / "image.nii").grid
    np.testing.assert_allclose([*found.spacing, *found.origin], [*grid.spacing, *grid.origin], rtol=1e-5)
    itk = sitk.ReadImage(tmp_path / "image.nii")
    np.testing.assert_allclose(itk.GetSpacing(), found.spacing, rtol=1e-5)
    save_volume(tmp_path / "again.nii", read_volume(tmp_path / "image.nii"))
    assert nib.load(tmp_path / "again.nii").header.get_xyzt_units()[0] == "mm"


# ---- slices of a body ----


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_slice_stays_where_it_was_cut(axis: int, tmp_path: Path) -> None:
    """Saved beside the fixed slice, what was warped overlays it: for SimpleITK, too."""
    grid, at = Grid(FIXED[2].shape, FIXED[2].spacing, (-20.0, 11.0)), 40.5
    kept = [a for a in range(3) if a != axis]
    affine = np.eye(4)
    affine[axis, 3] = at
    affine[kept, kept], affine[kept, 3] = grid.spacing, grid.origin
    for name, image in (("moving", np.roll(STILL, 2, 0)), ("fixed", STILL)):
        nib.save(nib.Nifti1Image(np.expand_dims(image.astype(np.float32), axis), affine), tmp_path / f"{name}.nii.gz")
    found = register(tmp_path / "moving.nii.gz", tmp_path / "fixed.nii.gz", MODEL)
    assert found.fixed.across == found.warp().across == (axis, at)
    folder = found.save(tmp_path, (STILL > 0.3, found.moving.grid))
    given = sitk.ReadImage(tmp_path / "fixed.nii.gz")
    for name in ("warped.nii.gz", "warped_labels.nii.gz"):
        written = sitk.ReadImage(folder / name)
        assert written.GetSize() == given.GetSize()
        for ours, theirs in (
            (written.GetOrigin(), given.GetOrigin()),
            (written.GetSpacing(), given.GetSpacing()),
            (written.GetDirection(), given.GetDirection()),
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert read_volume(folder / "warped.nii.gz").across == (axis, at)


def test_slices_of_different_planes_are_refused() -> None:
    moving, fixed = (
        Volume(torch.from_numpy(image), grid, across=(axis, 3.0))
        for (image, grid), axis in zip(PAIR, (1, 2), strict=True)
    )
    with pytest.raises(ValueError, match="across the y axis, and the fixed image one across the z axis") as caught:
        register(moving, fixed, MODEL)
    assert one_sentence(caught.value)


# ---- more than the network looks at ----


def test_the_share_outside_of_the_working_grid_is_that_of_the_box() -> None:
    grid, working = Grid((60, 60)), Grid((20, 40), 1.0, (20.0, 20.0))
    image = torch.zeros(grid.shape)
    image[10:50, 15:45] = 1 + torch.rand(40, 30)
    seen = framed(Volume(image, grid))
    (low, high), inside = seen.box, 1.0
    for a, b, first, last in zip(low, high, working.origin, working.last, strict=True):
        inside *= (min(b, last) - max(a, first)) / (b - a)
    assert outside(seen, working, Identity(2)) == pytest.approx(1 - inside)
    assert 0.4 < 1 - inside < 0.7
    assert outside(seen, grid, Identity(2)) == 0
    away = Affine(torch.eye(2)[None], torch.tensor([[100.0, 0.0]]), torch.zeros(2))
    assert outside(seen, working, away) == 1


def test_what_lies_beyond_the_networks_sight_is_remarked_on() -> None:
    side = NETS[2].extent[0]
    for factor, remarked in ((0.6, False), (2.5, True)):
        grid = Grid((90, 90), factor * side / 60)  # the object is about two thirds of the image
        away = (grid_points(grid) - torch.tensor(grid.centre)).norm(dim=-1) / (factor * side)
        image = (torch.cos(12 * away) + 2) * (away < 0.5)
        notes = register((image.roll(1, 0), grid), (image, grid), model=MODEL).report["notes"]
        told = [note for note in notes if "lies outside of" in note]
        assert len(told) == (2 if remarked else 0)
        assert all("continued, not found" in note and one_sentence(ValueError(note)) for note in told)


# ---- settings ----


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": np.nan}, {"images": np.inf}, {"sharpen": np.nan}, {"sharpen": np.inf}, {"coarsen": 1.5},
        {"steps": 2.5}, {"patience": 1.5}, {"window_vox": 2.5}, {"smoothing_vox": 1.0}, {"smoothing_vox": (1.0,)},
        {"smoothing_vox": (np.nan, 1.0)}, {"mode": "greedy", "coarser": 3}, {"mode": "greedy", "coarser": (2.5,)},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_one_sentence(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        Refinement(**wrong)
    assert one_sentence(caught.value)


@pytest.mark.parametrize("given", [2.7, "many", True])
def test_steps_of_another_kind_are_refused(given: object) -> None:
    with pytest.raises(ValueError, match="refine is None, a whole number of steps, or a Refinement") as caught:
        register(*PAIR, model=MODEL, refine=given)
    assert one_sentence(caught.value)


def test_steps_may_be_a_whole_number_of_numpy() -> None:
    assert register(*PAIR, model=MODEL, refine=np.int64(2)).report["refinement_steps"] == 2


@pytest.mark.parametrize("settings", [Refinement(2, coarsen=64), Refinement(2, "greedy", coarser=(1,) * 7)])
def test_a_refinement_that_is_too_coarse_for_the_grid_is_refused(settings: Refinement) -> None:
    with pytest.raises(ValueError, match="nothing is left to compare") as caught:
        register(*PAIR, model=MODEL, refine=settings)
    assert one_sentence(caught.value)


def test_a_curve_that_is_not_finite_can_be_saved(result: Registration, tmp_path: Path, monkeypatch) -> None:
    from regteach import objectives

    def never(*arguments: object) -> torch.Tensor:
        return torch.full((1,), torch.nan) * arguments[1](torch.zeros(1, 1, 2)).sum()  # type: ignore[operator]

    monkeypatch.setattr(objectives, "at_test_time", lambda *arguments: never)
    folder = register(*PAIR, model=MODEL, refine=2).save(tmp_path)
    assert json.loads((folder / "report.json").read_text())["curve"] == [None] * 3


# ---- where it is called from ----


@pytest.mark.parametrize("mode", ["parameters", "corrections", "greedy", "weights"])
def test_inference_mode_changes_nothing(mode: str) -> None:
    settings = Refinement(2, mode, rate=0.01)
    plain = register(*PAIR, model=MODEL, refine=settings).displacement()
    with torch.inference_mode():
        inside = register(*PAIR, model=MODEL, refine=settings).displacement()
        images = [as_volume(source, "an image").batch for source in PAIR]
        images = [torch.nn.functional.interpolate(image, NETS[2].shape) for image in images]
        begun = MODEL.network(*images, NETS[2])
    np.testing.assert_array_equal(inside, plain)
    after = refine(MODEL.network, begun, NETS[2], settings)
    copied = [image.clone() for image in images]
    with torch.no_grad():
        usual = MODEL.network(*copied, NETS[2])
    assert torch.equal(after.curve, refine(MODEL.network, usual, NETS[2], settings).curve)


def test_a_device_that_is_not_there_is_one_sentence_when_a_model_is_read(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model.safetensors", MODEL)
    with pytest.raises(ValueError, match="There is no device 'foo'") as caught:
        load(path, "foo")
    assert one_sentence(caught.value)
    with pytest.raises(ValueError, match="neither") as caught:
        load(None)  # type: ignore[arg-type]
    assert one_sentence(caught.value)


def test_a_result_and_a_model_say_what_they_are_in_a_line(result: Registration) -> None:
    assert repr(result).startswith("<Registration by ")
    assert "correlation" in repr(result)
    for thing in (result, MODEL):
        assert len(repr(thing)) < 1000
        assert "tensor" not in repr(thing)


def test_a_file_is_not_overwritten_by_its_own_result(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(Path("model.safetensors"), MODEL)
    Path("registration").mkdir()
    write(Path("registration/warped.nii.gz"), MOVED, MOVING[2])
    write(Path("fixed.nii.gz"), STILL, FIXED[2])
    before = Path("registration/warped.nii.gz").read_bytes()
    line = "register registration/../registration/warped.nii.gz fixed.nii.gz --model model.safetensors --refine 0"
    assert cli.main(line.split()) == 2
    assert "would be overwritten by its own result" in capsys.readouterr().err
    assert Path("registration/warped.nii.gz").read_bytes() == before
    assert cli.main([*line.split(), "--out", "second"]) == 0
    assert Path("registration/warped.nii.gz").read_bytes() == before
