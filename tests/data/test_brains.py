"""Brains: small heads of balls, at known places, in the layouts that a fetch leaves; the real donors where they are."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor

import data_download
from regteach.data import anatomy, heads
from regteach.data.brains import (
    DONOR_NUMBERS,
    DONORS,
    OASIS_NUMBERS,
    brain_grid,
    donor_folds,
    load_donors,
    load_oasis,
    load_synthseg,
)
from regteach.data.cohort import Cohort
from regteach.data.contrast import OUTSIDE, TISSUES
from regteach.data.heads import FREESURFER_NUMBERS, STRUCTURES
from regteach.data.scans import AAL_NUMBERS, load_colin, load_template
from regteach.data.volumes import Volume
from regteach.grid import Grid
from regteach.metrics import dice

HERE = data_download.present("allen-donors")
SMALL = {"spacing_mm": 2.0, "shape": (40, 44, 40)}  # the structures, not the whole brain
TURN = Rotation.from_euler("zyx", [7.0, -4.0, 15.0], degrees=True).as_matrix()
SHIFT = np.array([4.0, -11.0, 17.0])
RADIUS = 5.0
TEMPLATE = np.concatenate([np.array(anatomy.TEMPLATE), np.array(anatomy.TEMPLATE) * [-1, 1, 1]])


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    return tmp_path


def head(
    numbers: tuple[int, ...], turn: np.ndarray = TURN, shift: np.ndarray = SHIFT, background: int = 0
) -> np.ndarray:
    """Balls at the template's places after a turn and a shift; RAS, voxel (i, j, k) at 2 (i, j, k) - 80 mm."""
    centres = TEMPLATE @ turn.T + shift
    points = np.stack(np.meshgrid(*[np.arange(80) * 2.0 - 80.0] * 3, indexing="ij"), -1)
    labels = np.full((80, 80, 80), background, np.int16)
    for number, centre in zip(numbers, centres, strict=True):
        if number:
            labels[((points - centre) ** 2).sum(-1) < RADIUS**2] = number
    return labels


def save(path: Path, array: np.ndarray, lia: bool = False) -> None:
    """Write at 2 mm with the first voxel at -80, in RAS or with the axes stored left, down, front."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = -80.0
    image = nib.Nifti1Image(array, affine)
    if lia:
        ras, wanted = nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("LIA")
        image = image.as_reoriented(nib.orientations.ornt_transform(ras, wanted))
    nib.save(image, path)


def centroids(labels: Tensor, grid: Grid) -> np.ndarray:
    return anatomy.centroids(labels, grid).numpy()


def synthseg(root: Path, person: int, labels: np.ndarray) -> None:
    save(root / "synthseg_labels" / f"training_seg_{person:02d}.nii.gz", labels, lia=True)


def test_the_template_is_where_a_brain_has_its_structures() -> None:
    for name, (x, _, _) in zip(STRUCTURES, anatomy.TEMPLATE, strict=True):
        assert -30 < x < -5, name
    y, z = ({s: p[k] for s, p in zip(STRUCTURES, anatomy.TEMPLATE, strict=True)} for k in (1, 2))
    assert y["accumbens"] > y["caudate"] > y["putamen"] > y["amygdala"] > y["thalamus"] > y["hippocampus"]
    assert (
        z["caudate"] > z["thalamus"] > z["putamen"] > z["pallidum"] > z["accumbens"] > z["hippocampus"] > z["amygdala"]
    )


@pytest.mark.parametrize("numbers", [DONOR_NUMBERS, FREESURFER_NUMBERS, OASIS_NUMBERS, AAL_NUMBERS])
def test_every_structure_has_one_number(numbers: tuple[int, ...]) -> None:
    used = [number for number in numbers if number]
    assert len(numbers) == 14
    assert len(set(used)) == len(used) >= 12


def test_donor_numbers_are_those_of_the_atlas_table() -> None:
    if not HERE:
        pytest.skip("allen-donors not fetched")
    rows = data_download.locate("allen-donors", "labels.csv").read_text().splitlines()[1:]
    table = {int(row.split(",")[0]): row.split(",")[1:3] for row in rows}
    for k, number in enumerate(DONOR_NUMBERS):
        name, side = table[number]
        assert name.startswith(STRUCTURES[k % 7])
        assert side == "LR"[k // 7]


def test_grid_is_centred_on_the_brain() -> None:
    for spacing, shape in ((3.0, (64, 64, 64)), (2.0, (96, 112, 96))):
        grid = brain_grid(spacing, shape)
        assert grid.centre == pytest.approx(anatomy.BRAIN_CENTRE)
        assert grid.shape == shape


def test_a_turned_head_comes_to_lie_on_the_template(root: Path) -> None:
    synthseg(root, 1, head(FREESURFER_NUMBERS))
    cohort = load_synthseg(**SMALL)
    assert np.abs(centroids(cohort.labels[0], cohort.grid) - TEMPLATE).max() < 0.7
    assert cohort.people == ("synthseg-01",)
    only_shifted = load_synthseg(**SMALL, align="none")
    found = centroids(only_shifted.labels[0], cohort.grid)
    assert np.abs(found - ((TEMPLATE - TEMPLATE.mean(0)) @ TURN.T + TEMPLATE.mean(0))).max() < 0.7


def test_soi_are_fractions_with_the_volume_of_the_structure(root: Path) -> None:
    synthseg(root, 1, head(FREESURFER_NUMBERS))
    cohort = load_synthseg(**SMALL)
    assert cohort.soi.shape == (1, 14, 40, 44, 40)
    assert cohort.soi.min() == 0
    assert cohort.soi.max() == 1
    assert ((cohort.soi > 0) & (cohort.soi < 1)).any()
    volumes = cohort.soi.sum((2, 3, 4))[0] * cohort.grid.voxel_volume
    assert torch.allclose(volumes, torch.full((14,), 4 / 3 * np.pi * RADIUS**3), rtol=0.1)
    for channel, label in enumerate(cohort.structures):
        inside = cohort.labels[0] == label
        assert (cohort.soi[0, channel][inside] >= 1 / 3).all()
        assert inside[cohort.soi[0, channel] > 0.5].all()


def test_merged_sides_are_the_sum_of_the_two(root: Path) -> None:
    synthseg(root, 1, head(FREESURFER_NUMBERS))
    both, merged = load_synthseg(**SMALL), load_synthseg(**SMALL, sides="merged")
    assert list(both.structures.values()) == [f"{s} {name}" for s in ("left", "right") for name in STRUCTURES]
    assert merged.structures == dict(enumerate(STRUCTURES, start=1))
    assert torch.equal(merged.soi, both.soi[:, :7] + both.soi[:, 7:])


def test_tissue_map_of_synthseg(root: Path) -> None:
    labels = head(FREESURFER_NUMBERS, np.eye(3), np.zeros(3))
    # Slabs along x, away from the structures: white matter, cortex, fluid near and far, bone.
    slabs = {(0, 10): 515, (10, 16): 24, (16, 18): 3, (18, 20): 2, (20, 21): 4, (21, 22): 8, (22, 23): 16, (23, 24): 57}
    for (first, stop), number in slabs.items():
        labels[first:stop] = np.where(labels[first:stop] == 0, number, labels[first:stop])
    synthseg(root, 1, labels)
    shape = {"spacing_mm": 2.0, "shape": (81, 45, 41)}
    cohort = load_synthseg(**shape)
    column = cohort.tissue[0, :, 0, 0]
    at = [round((x - cohort.grid.origin[0]) / 2) for x in np.arange(80) * 2.0 - 80.0]

    def seen(index: int) -> int:
        return int(column[at[index]])

    names = {16: "cortex", 18: "white matter", 20: "ventricle", 21: "cerebellar cortex", 22: "brainstem", 23: "lesion"}
    for index, name in names.items():
        assert seen(index) == TISSUES[name], name
    assert seen(15) == TISSUES["csf"]
    assert seen(11) == 0, "fluid more than 4 mm from the brain"
    assert seen(5) == 0, "bone"
    for k, name in enumerate(STRUCTURES):
        assert (cohort.tissue[0][cohort.labels[0] == k + 8] == TISSUES[name]).all()
    kept = load_synthseg(**shape, skull="kept")
    assert int(kept.tissue[0, at[5], 0, 0]) == OUTSIDE + 15
    assert kept.synthesis(kept.tissue, kept.grid, torch.Generator().manual_seed(0)).shape == kept.images.shape


def test_synthseg_people_and_splits(root: Path) -> None:
    labels = head(FREESURFER_NUMBERS)
    for person in range(1, 7):
        synthseg(root, person, labels)
    cohort = load_synthseg(4.0, (20, 22, 20))
    assert len(cohort) == 6
    assert [len(cohort.splits[s]) for s in ("train", "validation", "test")] == [4, 1, 1]
    assert sorted(i for members in cohort.splits.values() for i in members) == list(range(6))
    assert cohort.origin.startswith("6 real people")
    assert cohort.synthesis is not None
    assert not torch.equal(cohort.images[0], cohort.images[1]), "the noise differs between people"
    assert torch.equal(cohort.images, load_synthseg(4.0, (20, 22, 20)).images)


@pytest.mark.parametrize(
    ("load", "name"),
    [
        (load_synthseg, "synthseg-labels"),
        (load_oasis, "neurite-oasis-3d"),
        (load_donors, "allen-donors"),
        (load_colin, "colin27-labels"),
        (load_template, "mni152-labels"),
    ],
)
def test_absent_data_names_the_command(root: Path, load: Callable[[], Cohort], name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"data_download {name}"):
        load()


def test_bad_arguments(root: Path) -> None:
    synthseg(root, 1, head(FREESURFER_NUMBERS))
    for wrong, message in (({"sides": "left"}, "sides"), ({"align": "affine"}, "align"), ({"skull": "off"}, "skull")):
        with pytest.raises(ValueError, match=message):
            load_synthseg(4.0, (20, 22, 20), **wrong)


def test_a_map_of_another_numbering_is_refused(root: Path) -> None:
    synthseg(root, 1, head(FREESURFER_NUMBERS[7:] + FREESURFER_NUMBERS[:7]))
    with pytest.raises(ValueError, match="numbering or the orientation"):
        load_synthseg(4.0, (20, 22, 20))


def test_a_missing_structure_is_named(root: Path) -> None:
    synthseg(root, 1, head(tuple(0 if n == 54 else n for n in FREESURFER_NUMBERS)))
    with pytest.raises(ValueError, match="no right amygdala \\(number 54\\)"):
        load_synthseg(4.0, (20, 22, 20))


def oasis(root: Path, folder: str, seed: int) -> None:
    path = root / "neurite_oasis_3d" / folder
    save(path / "aligned_seg35.nii.gz", head(OASIS_NUMBERS))
    x = np.arange(80) * 2.0 - 80.0
    ramp = np.broadcast_to(x[:, None, None] + 200.0 + seed, (80, 80, 80))  # T1 whose value is its own x + 200 mm
    save(path / "aligned_norm.nii.gz", np.ascontiguousarray(ramp, np.float32))


def test_oasis_reads_real_scans_and_keeps_a_person_together(root: Path) -> None:
    names = [f"OASIS_OAS1_{k:04d}_MR1" for k in range(1, 6)] + ["OASIS_OAS1_0002_MR2"]
    for k, name in enumerate(names):
        oasis(root, name, k)
    cohort = load_oasis(4.0, (20, 22, 20))
    assert cohort.people == ("OAS1_0001", "OAS1_0002", "OAS1_0002", "OAS1_0003", "OAS1_0004", "OAS1_0005")
    assert sorted(i for members in cohort.splits.values() for i in members) == list(range(6))
    split_of = {i: s for s, members in cohort.splits.items() for i in members}
    assert split_of[1] == split_of[2]
    assert np.abs(centroids(cohort.labels[0], cohort.grid) - TEMPLATE).max() < 1.4
    # On the template the ramp runs along the head's own x: a turned ramp, linear in every coordinate.
    points = np.stack(
        np.meshgrid(
            *[np.arange(n) * 4.0 + o for n, o in zip(cohort.grid.shape, cohort.grid.origin, strict=True)], indexing="ij"
        ),
        -1,
    )
    own_x = ((points - TEMPLATE.mean(0)) @ TURN.T + TEMPLATE.mean(0) @ TURN.T + SHIFT)[..., 0]
    image = cohort.images[0, 0].numpy()
    linear = (image > 0.02) & (image < 0.98)
    assert np.corrcoef(image[linear], own_x[linear])[0, 1] > 0.999
    assert len(load_oasis(4.0, (20, 22, 20), limit=2)) == 2
    for name, what in (("aligned_seg35.nii.gz", "label map"), ("aligned_norm.nii.gz", "scan")):
        there = root / "neurite_oasis_3d" / names[1] / name
        there.rename(there.with_suffix(".away"))
        with pytest.raises(FileNotFoundError, match=f"OASIS_OAS1_0002_MR1 of neurite-oasis-3d has no {what}"):
            load_oasis(4.0, (20, 22, 20))
        there.with_suffix(".away").rename(there)


def test_colin_has_no_accumbens(root: Path) -> None:
    save(root / "colin27_labels" / "aal.nii", head(AAL_NUMBERS))
    save(root / "colin27" / "t1.nii.gz", head(AAL_NUMBERS, background=50).astype(np.float32))
    cohort = load_colin(**SMALL)
    assert set(cohort.structures) == set(range(1, 15)) - {5, 12}
    assert cohort.soi.shape[1] == 12
    assert cohort.splits == {"train": (), "validation": (), "test": (0,)}
    assert cohort.tissue is None
    assert cohort.synthesis is None
    have = [k for k in range(14) if k not in (4, 11)]
    assert np.abs(centroids(cohort.labels[0], cohort.grid)[have] - TEMPLATE[have]).max() < 1.0
    assert set(load_colin(**SMALL, sides="merged").structures) == set(range(1, 8)) - {5}


def test_the_template_is_read_like_any_brain_and_keeps_its_own_grey(root: Path) -> None:
    """The T1 is turned onto the common grid with its labels, and what lies outside of the outline is taken off."""
    labels = head(FREESURFER_NUMBERS)
    save(root / "mni152_labels" / "aparc_aseg.nii.gz", labels)
    inside = ndimage.binary_dilation(labels > 0, iterations=8)
    for name in ("t1", "t2"):
        save(root / "mni152_t1_t2" / f"{name}.nii.gz", np.where(labels > 0, 90, 60).astype(np.float32))
    save(root / "mni152" / "t1.nii.gz", inside.astype(np.float32))
    cohort = load_template(**SMALL)
    assert set(cohort.structures) == set(range(1, 15))
    assert cohort.splits == {"train": (), "validation": (), "test": (0,)}
    assert cohort.synthesis is None
    assert np.abs(centroids(cohort.labels[0], cohort.grid) - TEMPLATE).max() < 1.0
    image, of_structures = cohort.images[0, 0], cohort.soi[0].sum(0)
    assert image[of_structures == 1].min() > 1.2 * image[(of_structures == 0) & (image > 0)].median(), "T1 and labels"
    assert (image == 0).any(), "what lies outside of the outline is taken off"
    assert set(load_template(**SMALL, sides="merged").structures) == set(range(1, 8))


@pytest.mark.skipif(
    not all(map(data_download.present, ("mni152-labels", "mni152-t1-t2", "mni152"))),
    reason="the template or its labels are not fetched: python -m data_download mni152-labels mni152-t1-t2 mni152",
)
def test_the_labels_lie_on_the_real_template() -> None:
    """Each structure is of one grey where the labels lie, and of several where they are 6 mm off, whichever way."""
    cohort = load_template(2.0, (64, 72, 64), sides="merged")
    image, labels = cohort.images[0, 0], cohort.labels[0]

    def spread(shift: tuple[int, int, int]) -> float:
        moved = torch.roll(labels, shift, (0, 1, 2))
        return sum(float(image[moved == label].std()) for label in cohort.structures)

    ways = [tuple(3 * sign * int(axis == k) for k in range(3)) for axis in range(3) for sign in (-1, 1)]
    assert spread((0, 0, 0)) < 0.8 * min(spread(way) for way in ways)
    grey = {name: float(image[labels == label].median()) for label, name in cohort.structures.items()}
    assert grey["pallidum"] > grey["thalamus"] > grey["caudate"], "as in any T1"


def test_folds_test_everyone_once(root: Path) -> None:
    for name in DONORS:
        save(root / "allen_donors" / f"{name}.nii.gz", head(DONOR_NUMBERS))
    cohort = load_donors(4.0, (20, 22, 20))
    folds = donor_folds(cohort)
    assert sorted(i for fold in folds for i in fold.splits["test"]) == list(range(6))
    for fold in folds:
        assert [len(fold.splits[s]) for s in ("train", "validation", "test")] == [3, 1, 2]
        assert sorted(i for members in fold.splits.values() for i in members) == list(range(6))
        assert fold.images is cohort.images
    assert cohort.splits == folds[0].splits
    synthseg(root, 1, head(FREESURFER_NUMBERS))
    with pytest.raises(ValueError, match="made for 6 people"):
        donor_folds(load_synthseg(4.0, (20, 22, 20)))


def shells(grid: Grid, hole: bool) -> tuple[Tensor, Tensor]:
    """Two half balls of cortex, a voxel thin, back to back; balls for the structures inside; a hole in each shell."""
    x, y, z = anatomy.axis_positions(grid)
    y, z = y + 2, z + 0
    labels = torch.zeros(grid.shape, dtype=torch.int16)
    for side, number in ((-1, 3), (1, 50)):
        r = ((side * x / 30) ** 2 + (y / 38) ** 2 + (z / 34) ** 2).sqrt()
        inside = (r < 1) & (side * x > 2)
        core = torch.from_numpy(ndimage.binary_erosion(inside.numpy(), np.ones((3, 3, 3))))
        labels[inside & ~core] = number
    structures = torch.zeros(grid.shape, dtype=torch.uint8)
    for label, centre in enumerate(TEMPLATE * 0.8, start=1):
        structures[((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2) < 3.0**2] = label
    if hole:
        labels[::, 20:22, 52:] = 0
    return labels, structures


@pytest.mark.parametrize("hole", [False, True])
def test_white_matter_is_what_the_cortex_encloses(hole: bool) -> None:
    grid = Grid((80, 96, 88), 1.0, (-39.5, -47.5, -43.5))
    labels, structures = shells(grid, hole)
    white, cortex = anatomy._white_and_cortex(labels, structures, grid)
    whole, _ = shells(grid, hole=False)
    enclosed = torch.from_numpy(ndimage.binary_fill_holes((whole > 0).numpy())) & (whole == 0) & (structures == 0)
    right = float((white & enclosed).sum() / enclosed.sum())
    wrong = float((white & ~enclosed).sum() / enclosed.sum())
    assert right > (0.97 if hole else 0.99)
    assert wrong < (0.03 if hole else 0.001)
    assert cortex[labels > 0].all()
    assert not (white & cortex).any()


def test_the_gap_between_the_hemispheres_is_not_white() -> None:
    grid = Grid((80, 96, 88), 1.0, (-39.5, -47.5, -43.5))
    labels, structures = shells(grid, hole=False)
    white, _ = anatomy._white_and_cortex(labels, structures, grid)
    assert not white[39:41, 20:70, 20:70].any()


def test_morphology_against_scipy() -> None:
    grid = Grid((30, 26, 28), (1.0, 1.0, 2.0))
    mask = torch.rand(grid.shape, generator=torch.Generator().manual_seed(0)) > 0.995
    box = np.ones((11, 11, 5), bool)  # 5 mm to each side
    assert np.array_equal(anatomy.dilated(mask, 5.0, grid), ndimage.binary_dilation(mask.numpy(), box))
    padded = np.pad(mask.numpy(), 12)
    closed = ndimage.binary_closing(padded, box)[12:-12, 12:-12, 12:-12]
    assert np.array_equal(anatomy.closed(mask, 5.0, grid), closed)
    assert np.array_equal(anatomy.touched(mask), ndimage.binary_dilation(mask.numpy()))


def test_reached_stops_at_what_is_not_free() -> None:
    grid = Grid((9, 2, 2))
    mask, free = torch.zeros(2, 9, 2, 2, dtype=torch.bool)
    mask[1], free[2:5], free[6:] = True, True, True
    assert anatomy.reached(mask, free, 1, 6.0, grid)[:, 0, 0].nonzero().flatten().tolist() == [1, 2, 3, 4]
    assert anatomy.reached(mask, free, 1, 2.0, grid)[:, 0, 0].nonzero().flatten().tolist() == [1, 2, 3]
    assert anatomy.reached(mask, free, -1, 6.0, grid)[:, 0, 0].nonzero().flatten().tolist() == [1]


def test_counts_and_most() -> None:
    fine = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0]).reshape(8, 1, 1)
    counts = heads.counts_of(fine, (4, 1, 1), 3)
    assert counts[:, :, 0, 0].tolist() == [[2, 1], [2, 0], [0, 3]]
    assert heads.most_of(counts).flatten().tolist() == [1, 2], "half a voxel is enough"


@pytest.mark.parametrize("part", [3, 7, 10])
def test_counts_of_large_voxels_do_not_run_over(part: int) -> None:
    """A voxel of 7 mm has 343 parts."""
    fine = torch.ones(2 * part, part, part, dtype=torch.int64)
    few = (part - 1) // 2 * part**2
    fine[:part, : (part - 1) // 2] = 2
    counts = heads.counts_of(fine, (part,) * 3, 3).flatten(1)
    assert counts.tolist() == [[0, 0], [part**3 - few, part**3], [few, 0]]
    assert heads.most_of(counts).tolist() == [1, 1]


def test_parts_of_large_voxels_are_those_of_small_ones(root: Path) -> None:
    synthseg(root, 1, head(FREESURFER_NUMBERS))
    fine, coarse = (load_synthseg(h, (n,) * 3).soi[0] for h, n in ((1.0, 84), (7.0, 12)))
    pooled = torch.nn.functional.avg_pool3d(fine[None], 7)[0]
    assert coarse.max() > 256 / 7**3
    torch.testing.assert_close(coarse, pooled, atol=1e-6, rtol=0)


def test_nearest_label_outside_the_volume_is_background() -> None:
    volume = Volume(torch.full((3, 3, 3), 7), Grid((3, 3, 3)))
    eye, zero = torch.eye(3).double(), torch.zeros(3).double()
    found = heads.nearest(volume, Grid((7, 7, 7), 1.0, -2.0), eye, zero, zero)
    assert (found > 0).sum() == 27
    assert (found[2:5, 2:5, 2:5] == 7).all()


def test_interpolated_is_numpys() -> None:
    z = torch.linspace(-9, 9, 50)
    at, values = [-5.0, -1.0, 4.0], [2.0, 7.0, 1.0]
    assert np.allclose(anatomy._interpolated(z, at, values), np.interp(z, at, values), atol=1e-5)


@pytest.mark.skipif(not HERE, reason="allen-donors not fetched")
def test_real_donors() -> None:
    cohort = load_donors(align="none")
    assert cohort.images.shape == (6, 1, 64, 64, 64)
    assert cohort.people == DONORS
    scores = [
        np.mean([float(v) for v in dice(cohort.labels[i, None, None], cohort.labels[j, None, None]).values()])
        for i in range(6)
        for j in range(i)
    ]
    # Aligned by the centroid of all sub-cortical voxels, without partial volumes, it is 0.515 (0.39 to 0.62) at 1 mm.
    assert 0.50 < np.mean(scores) < 0.62
    litres = {name: (cohort.tissue == number).sum((1, 2, 3)) * 27e-6 for name, number in TISSUES.items()}
    for name, low, high in (("white matter", 0.35, 0.85), ("cortex", 0.5, 1.0), ("ventricle", 0.005, 0.04)):
        assert (litres[name] > low).all(), name
        assert (litres[name] < high).all(), name
    for channel in range(7):
        left, right = cohort.soi[:, channel].sum((1, 2, 3)), cohort.soi[:, channel + 7].sum((1, 2, 3))
        assert ((left / right).log().abs() < 0.5).all(), STRUCTURES[channel]
    white = cohort.images[:, 0][cohort.tissue == TISSUES["white matter"]].median()
    grey = cohort.images[:, 0][cohort.tissue == TISSUES["cortex"]].median()
    fluid = cohort.images[:, 0][cohort.tissue == TISSUES["csf"]].median()
    assert fluid < grey < white
