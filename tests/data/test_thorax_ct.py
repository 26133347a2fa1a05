"""A CT breathed out: on a small made-up scan in the real one's layout, whose lungs are those of the phantom."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from truths.fields import one_sentence

import data_download
from regteach.data.breathing import Breathing
from regteach.data.thorax import ThoraxConfig, generate_patient
from regteach.data.thorax_ct import ThoraxScan, fit_dice, fit_lungs, load_thorax_ct, warp_ct
from regteach.grid import Grid
from regteach.sampling import flat_points, sample
from regteach.transforms import jacobian_determinant

GRID = Grid((60, 50, 44), (6.0, 6.0, 8.0), (-177.0, -140.0, -172.0))
HERE = data_download.present("thorax-ct")


@pytest.fixture(scope="module")
def scan() -> ThoraxScan:
    case = generate_patient(GRID, seed=1, config=ThoraxConfig(vessel_tips=(20, 100)))
    return ThoraxScan(case.moving, torch.where(case.moving_mask, case.moving_labels, 0), GRID)


@pytest.fixture(scope="module")
def transform(scan: ThoraxScan) -> Breathing:
    return fit_lungs(scan.labels, GRID)


def write(root: Path, scan: ThoraxScan, labels: np.ndarray | None = None) -> None:
    """As the package holds it: axes to the left and to the back, lobes 10 to 14, something else beside them."""
    lobes = np.array([255, 13, 10], np.uint8)[scan.labels[0, 0].numpy()] if labels is None else labels
    lobes = np.where(lobes == 255, 51, lobes)
    half = scan.grid.shape[2] // 2
    lower = lobes[..., :half]
    lower[lower == 10] = 11
    lower[lower == 13] = 14
    affine = np.diag([-scan.grid.spacing[0], -scan.grid.spacing[1], scan.grid.spacing[2], 1])
    affine[:3, 3] = [scan.grid.last[0], scan.grid.last[1], scan.grid.origin[2]]
    folder = root / "thorax_ct"
    folder.mkdir()
    for name, array in (("ct", scan.image[0, 0].numpy().round().astype(np.int16)), ("labels", lobes)):
        nib.save(nib.Nifti1Image(array[::-1, ::-1], affine), folder / f"{name}.nii.gz")


def test_the_scan_is_cut_to_the_lungs_in_ras(scan: ThoraxScan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as missing:
        load_thorax_ct()
    assert "thorax-ct" in str(missing.value)
    write(tmp_path, scan)
    same = load_thorax_ct(GRID.spacing, margin_mm=16)
    start = [round((a - b) / h) for a, b, h in zip(same.grid.origin, GRID.origin, GRID.spacing, strict=True)]
    box = tuple(slice(a, a + n) for a, n in zip(start, same.grid.shape, strict=True))
    torch.testing.assert_close(same.labels[0, 0], scan.labels[0, 0][box])
    expected = scan.image[0, 0][box].clamp_min(-1024)
    torch.testing.assert_close(same.image[0, 0], expected, rtol=0, atol=0.6)
    assert same.mask.sum() == scan.mask.sum()  # nothing of the lungs was cut off
    coarse = load_thorax_ct(10.0)
    litres = [float(s.mask.sum()) * s.grid.voxel_volume / 1e6 for s in (same, coarse)]
    assert litres[1] == pytest.approx(litres[0], rel=0.05)
    assert coarse.grid.spacing == (10.0, 10.0, 10.0)


def test_labels_without_lungs_are_refused(scan: ThoraxScan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    labels = np.zeros(GRID.shape, np.uint8)
    labels[3:5] = 1
    write(tmp_path, scan, labels)
    with pytest.raises(ValueError) as error:
        load_thorax_ct()
    assert one_sentence(error.value, "lobes")
    for bad in (torch.zeros_like(scan.labels), scan.labels.clamp(max=1)):
        with pytest.raises(ValueError) as error:
            fit_lungs(bad, GRID)
        assert one_sentence(error.value, "litres")
    with pytest.raises(ValueError) as error:
        fit_lungs(torch.ones(1, 1, 5, 5, dtype=torch.long), Grid((5, 5)))
    assert one_sentence(error.value, "2 axes")


def test_lungs_are_found_again_as_formulas(scan: ThoraxScan, transform: Breathing) -> None:
    assert fit_dice(transform, scan.labels, GRID) > 0.93
    det = jacobian_determinant(transform, GRID)
    assert det.min() > 0.1
    flat = flat_points(GRID)
    lungs = transform.lung_at(flat)[0]
    assert set(lungs.unique().tolist()) == {0, 1, 2}
    assert flat[0, lungs == 1, 0].mean() > flat[0, lungs == 2, 0].mean()


def test_the_pair_is_the_ct_at_the_moved_points(scan: ThoraxScan, transform: Breathing) -> None:
    case = warp_ct(scan, transform, landmarks=100)
    points = flat_points(GRID)
    moved = transform(points)
    read = sample(scan.image, moved, GRID).reshape(scan.image.shape)
    ratio = transform.volume_ratio(points).reshape(scan.image.shape)
    torch.testing.assert_close(case.fixed[~case.fixed_mask], read[~case.fixed_mask], rtol=0, atol=1e-2)
    inside = case.fixed_mask
    torch.testing.assert_close((case.fixed + 1000)[inside], ((read + 1000) * ratio)[inside], rtol=1e-4, atol=0.1)
    assert torch.equal(case.moving, scan.image)
    torch.testing.assert_close(transform(case.fixed_landmarks_mm), case.moving_landmarks_mm)
    assert case.fixed_landmarks_mm.shape == (1, 100, 3)
    u = transform.displacement_on(GRID)[0].norm(dim=-1)[case.fixed_mask[0, 0]]
    assert 8 < u.mean() < 30
    mass = [float(((i + 1000) * m).sum()) for i, m in ((case.fixed, inside), (case.moving, case.moving_mask))]
    assert mass[0] == pytest.approx(mass[1], rel=0.08)  # the fitted wall is not quite that of the labels
    assert "Real" in case.note
    assert "ynthetic" in case.note


def test_noise_is_added_to_the_fixed_image_alone_and_by_seed(scan: ThoraxScan, transform: Breathing) -> None:
    quiet, noisy, again = (warp_ct(scan, transform, 20, noise, seed=2) for noise in (0.0, 25.0, 25.0))
    assert (noisy.fixed - quiet.fixed).std() == pytest.approx(25, rel=0.05)
    assert torch.equal(noisy.fixed, again.fixed)
    assert torch.equal(noisy.moving, quiet.moving)
    with pytest.raises(ValueError) as error:
        warp_ct(ThoraxScan(scan.image, torch.zeros_like(scan.labels), GRID), transform)
    assert one_sentence(error.value, "no lung")


@pytest.mark.skipif(not HERE, reason="the thorax CT is not fetched")
@pytest.mark.parametrize("spacing_mm", [6.0, 4.0, 3.0])
def test_the_real_ct_breathes_without_folding(spacing_mm: float) -> None:
    scan = load_thorax_ct(spacing_mm)
    assert float(scan.mask.sum()) * scan.grid.voxel_volume / 1e6 == pytest.approx(3.69, rel=0.03)
    transform = fit_lungs(scan.labels, scan.grid)
    assert fit_dice(transform, scan.labels, scan.grid) > 0.85
    assert jacobian_determinant(transform, scan.grid).min() > 0.1
