"""Two contrasts: the order of tissues turned over, pairs across people and contrasts, the real template pair."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from truths.fields import one_sentence

import data_download
from regteach.data import modalities
from regteach.data.cohort import Cohort
from regteach.data.contrast import T1, TISSUES, t1_like
from regteach.data.intensity import normalised
from regteach.data.large import deformed
from regteach.data.modalities import T2, load_mni_contrasts, load_mni_pair, same_anatomy, t2_like, two_contrasts
from regteach.data.volumes import Volume
from regteach.grid import Grid
from regteach.sampling import resample, warp
from regteach.similarity import mutual_information, ncc

GRID = Grid((20, 24, 22), (2.0, 2.0, 2.5), (-20.0, 3.0, 0.0))
NEEDED = ("mni152-t1-t2", "mni152")
HERE = all(data_download.present(name) for name in NEEDED)


def tissue(person: int) -> torch.Tensor:
    """Shells in each other: fluid, cortex, white matter, a ventricle, a thalamus; the size is the person's own."""
    points = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in GRID.shape), indexing="ij"), -1)
    radius = points.norm(dim=-1) * (1 + 0.04 * person)
    out = torch.zeros(GRID.shape, dtype=torch.int64)
    for limit, name in ((0.95, "csf"), (0.85, "cortex"), (0.65, "white matter"), (0.3, "ventricle")):
        out[radius < limit] = TISSUES[name]
    out[(radius < 0.6) & (points[..., 0].abs() < 0.2) & (radius > 0.3)] = TISSUES["thalamus"]
    return out


def people(n: int = 4) -> Cohort:
    maps = torch.stack([tissue(i) for i in range(n)])
    images = torch.cat([normalised(t1_like(maps[[i]], GRID, torch.Generator().manual_seed(i))) for i in range(n)])
    labels = (maps == TISSUES["thalamus"]).long()
    splits = {"train": tuple(range(n - 2)), "validation": (), "test": (n - 2, n - 1)}
    names = tuple(f"p{i}" for i in range(n))
    return Cohort(
        "people", images, labels[:, None].float(), labels, GRID, names, {1: "thalamus"}, splits, "Synthetic.", maps
    )


def means(image: torch.Tensor, tissues: torch.Tensor) -> dict[str, float]:
    names = ("csf", "cortex", "white matter", "ventricle", "thalamus")
    return {name: float(image[tissues == TISSUES[name]].mean()) for name in names}


def test_both_tables_name_every_tissue_and_their_orders_are_opposite():
    assert list(T2) == list(T1) == list(TISSUES)[: len(T1)]
    names = [name for name in T1 if name not in ("background", "lesion")]
    ranks = [np.argsort(np.argsort([table[name] for name in names])) for table in (T1, T2)]
    assert np.corrcoef(*ranks)[0, 1] < -0.8


def test_fluid_is_the_brightest_in_t2_and_the_darkest_in_t1():
    maps = tissue(0)[None]
    first = means(t1_like(maps, GRID, torch.Generator().manual_seed(0))[0, 0], maps[0])
    second = means(t2_like(maps, GRID, torch.Generator().manual_seed(0))[0, 0], maps[0])
    assert first["ventricle"] < first["cortex"] < first["thalamus"] < first["white matter"]
    assert second["ventricle"] > second["cortex"] > second["thalamus"] > second["white matter"] > 0.03
    assert second["ventricle"] > 0.9


def test_a_t2_is_in_range_and_zero_outside():
    maps = tissue(0)[None]
    image = t2_like(maps, GRID, torch.Generator().manual_seed(0))
    assert image.shape == (1, 1, *GRID.shape)
    assert 0 <= image.min() < image.max() <= 1
    assert not image[0, 0][maps[0] == 0].any()
    assert (image[0, 0] > 0)[maps[0] > 0].float().mean() > 0.98  # the darkest in a hundred are its 0


@pytest.mark.parametrize("draw", [t1_like, t2_like])
def test_what_is_drawn_has_the_scale_of_what_is_read(draw):
    """A file is scaled by its percentiles (``normalised``) before a network sees it: training sees the same scale."""
    image = draw(tissue(0)[None], GRID, torch.Generator().manual_seed(0))
    assert (normalised(image) - image).abs().max() < 0.04  # the count takes one voxel in eight


@pytest.mark.parametrize("moving", ["T1", "T2"])
def test_pairs_are_of_different_people_and_different_contrasts(moving):
    cohort = two_contrasts(people(), moving=moving)
    assert len(cohort) == 8
    for split, pairs in cohort.given_pairs.items():
        members = cohort.splits[split]
        for m, f in pairs:
            assert m in members
            assert f in members
            assert cohort.people[m] != cohort.people[f]
            assert (m < 4) == (moving == "T1")
            assert (f < 4) == (moving == "T2")
    assert {split: len(pairs) for split, pairs in cohort.given_pairs.items()} == {
        "train": 2,
        "validation": 0,
        "test": 2,
    }
    assert "synthetic" in cohort.origin


def test_the_two_images_of_a_person_share_their_anatomy_and_not_their_contrast():
    plain = people()
    cohort = two_contrasts(plain)
    assert torch.equal(cohort.images[:4], plain.images)
    for i, other in same_anatomy(cohort).items():
        assert cohort.people[i] == cohort.people[other]
        assert torch.equal(cohort.labels[i], cohort.labels[other])
        assert torch.equal(cohort.tissue[i], cohort.tissue[other])
        inside = (cohort.tissue[[i]] > 0)[:, None]
        pair = cohort.images[[i]], cohort.images[[other]]
        assert ncc(*pair, inside) < -0.3
        shifted = pair[1].roll(4, 2)
        assert mutual_information(*pair) > 1.2 * mutual_information(pair[0], shifted)
    assert same_anatomy(cohort, "T2") == {4 + i: i for i in range(4)}
    assert [cohort.twin(i) for i in range(8)] == [4, 5, 6, 7, 0, 1, 2, 3]


def test_the_seed_fixes_the_t2():
    first, again, other = (two_contrasts(people(), seed=s).images[4:] for s in (0, 0, 7))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.01


def test_known_deformations_across_contrasts():
    cohort = two_contrasts(people())
    pairs = deformed(cohort, "translation", "small", noise=0.0, partners=same_anatomy(cohort))
    m, f = pairs.pairs("test")[0]
    source = cohort.people.index(pairs.people[m]) + 4
    expected = warp(cohort.images[[source]], pairs.truth(m, f), GRID, padding="zeros")
    torch.testing.assert_close(pairs.images[[f]], expected)


def test_what_can_not_be_done_is_said():
    from dataclasses import replace

    with pytest.raises(ValueError) as caught:
        two_contrasts(replace(people(), tissue=None))
    assert one_sentence(caught.value, "map of tissues")
    with pytest.raises(ValueError) as caught:
        two_contrasts(people(), moving="FLAIR")
    assert one_sentence(caught.value, "'FLAIR'")


# The template


def write_template(root: Path, shift: float = 0.0) -> None:
    """A head in the layout of a fetch: a ball of brain in a shell of skull, on two grids."""

    def save(path: Path, array: np.ndarray, origin: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        affine = np.diag([4.0, 4.0, 4.0, 1.0])
        affine[:3, 3] = origin
        nib.save(nib.Nifti1Image(array.astype(np.float32), affine), path)

    def radius(n: int, origin: float) -> np.ndarray:
        axis = origin + 4.0 * np.arange(n)
        return np.sqrt(sum(a**2 for a in np.meshgrid(axis, axis + 18, axis - 6, indexing="ij")))

    r = radius(48, -96)
    grey, white = (r < 60) & (r > 40), r <= 40
    for name, values in (("t1", (70, 100, 90)), ("t2", (60, 40, 10))):
        head = np.select([white, grey, (r > 66) & (r < 80)], [values[1], values[0], values[2]], 0)
        save(root / "mni152_t1_t2" / f"{name}.nii.gz", head, -96 + (shift if name == "t2" else 0))
    r = radius(50, -98)
    grey, white = (r < 60) & (r > 40), r <= 40
    for name, head in (("t1", 100 * (r < 60)), ("grey_matter", 255 * grey), ("white_matter", 255 * white)):
        save(root / "mni152" / f"{name}.nii.gz", head, -98)


@pytest.mark.parametrize("spacing", [2.0, 3.5])
def test_a_template_is_read_as_the_package_reads_and_pools(spacing):
    old = Grid((12, 15, 11), (1.0, 1.0, 1.0), (-3.0, 2.0, 0.5))
    new = Grid((4, 5, 3), (spacing,) * 3, (-2.0, 1.0, 1.5))
    volume = Volume(torch.rand(old.shape), old)
    parts = round(spacing)
    fine = new.resized([parts * n for n in new.shape])
    expected = torch.nn.functional.avg_pool3d(resample(volume.batch, old, fine, padding="zeros"), parts)
    torch.testing.assert_close(modalities._on(volume, new), expected, rtol=0, atol=1e-5)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    return tmp_path


def test_the_pair_comes_with_and_without_its_skull(root: Path):
    write_template(root)
    whole, stripped = load_mni_pair(stripped=False), load_mni_pair()
    for before, after in zip(whole, stripped, strict=True):
        assert before.grid == after.grid == whole[0].grid
        kept = after.data != 0
        assert torch.equal(after.data[kept], before.data[kept])
        assert 0 < kept.sum() < (before.data != 0).sum()
        assert any("skull" in note for note in after.notes)


def test_the_pair_as_a_cohort(root: Path):
    write_template(root)
    cohort = load_mni_contrasts(8.0, (24, 24, 24))
    assert cohort.pairs("test") == ((0, 1),)
    assert cohort.pairs("train") == ()
    assert cohort.grid.spacing == (8, 8, 8)
    for label, name in modalities.MATTER.items():
        assert cohort.structures[label] == name
        assert (cohort.labels[0] == label).any()
    white, grey = ((cohort.labels[0] == k) for k in (2, 1))
    assert cohort.images[0, 0][white].mean() > cohort.images[0, 0][grey].mean()
    assert cohort.images[1, 0][white].mean() < cohort.images[1, 0][grey].mean()


def test_two_grids_are_refused(root: Path):
    write_template(root, shift=1.0)
    with pytest.raises(ValueError) as caught:
        load_mni_pair()
    assert one_sentence(caught.value, "different grids")


def test_absent_data_name_the_command(root: Path):
    with pytest.raises(FileNotFoundError, match="data_download mni152-t1-t2"):
        load_mni_pair()


@pytest.mark.skipif(not HERE, reason="mni152-t1-t2 or mni152 is not fetched: python -m data_download mni152-t1-t2")
def test_the_real_pair():
    cohort = load_mni_contrasts(4.0, (48, 56, 48))
    white, grey = ((cohort.labels[0] == k) for k in (2, 1))
    first, second = cohort.images[:, 0]
    assert first[white].mean() > first[grey].mean() + 0.1
    assert second[white].mean() < second[grey].mean() - 0.05
    inside = (cohort.labels[[0]] > 0)[:, None]
    assert ncc(cohort.images[[0]], cohort.images[[1]], inside) < 0
