"""Large deformations: the parts of each family, exact truth between the images, splits that stay apart."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from truths.fields import one_sentence

from regteach.affine import Affine
from regteach.data.cohort import Cohort
from regteach.data.large import (
    FAMILIES,
    RANGES,
    LargeDeformation,
    deformed,
    deformed_pair,
    item,
    large_deformation,
    visible,
)
from regteach.grid import Grid
from regteach.metrics import dice, mean_over_labels
from regteach.sampling import flat_points, grid_points, warp
from regteach.transforms import Compose, FreeForm, displacement, fixed_point_inverse, jacobian_determinant

SMALL = Grid((24, 20), (1.0, 1.5), (-5.0, 3.0))


def blobs(n: int, grid: Grid = SMALL) -> Cohort:
    """People with a bright ellipse each, of their own size."""
    points = grid_points(grid)
    off = (points - torch.tensor(grid.centre)) / torch.tensor(grid.extent)
    images = torch.stack([(1.2 - (off.norm(dim=-1) * (5 + 0.2 * i)) ** 2).clamp(0, 1) for i in range(n)])[:, None]
    labels = (images[:, 0] > 0.5).long()
    splits = {"train": tuple(range(n - 3)), "validation": (n - 3,), "test": (n - 2, n - 1)}
    return Cohort(
        "blobs", images, labels[:, None].float(), labels, grid, tuple(f"p{i}" for i in range(n)), {1: "blob"}, splits,
        "Synthetic.", tissue=labels * 3,
    )  # fmt: skip


def affine_fit(points: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Least-squares matrix from points to moved points, both about their means."""
    solution, *_ = np.linalg.lstsq(points - points.mean(0), moved - moved.mean(0), rcond=None)
    return solution.T


def procrustes_deg(points: np.ndarray, moved: np.ndarray) -> float:
    """The turn of the rotation that fits best (Kabsch)."""
    u, _, vt = np.linalg.svd((points - points.mean(0)).T @ (moved - moved.mean(0)))
    sign = np.eye(points.shape[1])
    sign[-1, -1] = np.sign(np.linalg.det(vt.T @ u.T))
    rotation = vt.T @ sign @ u.T
    dim = points.shape[1]
    return math.degrees(math.acos(np.clip((np.trace(rotation) - (dim - 2)) / 2, -1, 1)))


def test_the_five_families_and_three_ranges_are_there():
    assert list(FAMILIES) == ["brownian", "rotation", "scaling", "translation", "all"]
    assert list(RANGES) == ["small", "medium", "large"]


@pytest.mark.parametrize("level", RANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_its_parts_and_no_others(grid, family, level):
    transform = large_deformation(grid, family, level, seed=0, batch=8 * (4 - grid.dim))
    if family == "brownian":
        assert isinstance(transform, FreeForm)
        return
    assert isinstance(transform, Compose)
    noise, affine = transform.transforms
    assert isinstance(noise, FreeForm)
    assert isinstance(affine, Affine)
    limit = RANGES[level]
    reach = limit.translation * min(grid.extent) / 2
    if family in ("translation", "all"):
        assert 0.8 * reach < affine.translation.abs().max() <= reach
    else:
        assert affine.translation.abs().max() == 0
    stretch = torch.linalg.svdvals(affine.matrix)
    if family in ("scaling", "all"):
        assert 1 + 0.7 * (limit.scale_ratio - 1) < stretch.max() <= limit.scale_ratio * (1 + 1e-5)
        assert stretch.min() >= (1 - 1e-5) / limit.scale_ratio
    else:
        torch.testing.assert_close(stretch, torch.ones_like(stretch))
    turned = (affine.matrix - affine.matrix.mT).abs().max()
    assert turned > 0.1 if family in ("rotation", "all") else turned < 1e-6


@pytest.mark.parametrize(("level", "limit_deg"), [("small", 10), ("medium", 20), ("large", 30)])
def test_the_turn_is_found_again_by_a_procrustes_fit(level, limit_deg):
    grid = Grid((20, 24), (2.0, 1.5), (4.0, -7.0))
    points = flat_points(grid)
    found, told = [], []
    transform = large_deformation(grid, "rotation", level, seed=3, batch=40)
    for i in range(40):
        one = item(transform, i)
        found.append(procrustes_deg(points[0].numpy(), one(points)[0].numpy()))
        matrix = one.transforms[1].matrix[0]
        told.append(abs(math.degrees(math.atan2(float(matrix[1, 0]), float(matrix[0, 0])))))
    assert max(told) <= limit_deg + 1e-3
    assert max(told) > 0.9 * limit_deg
    # The noise has a turn of its own, of a few degrees at most.
    assert np.abs(np.array(found) - np.array(told)).max() < 0.25 * limit_deg


@pytest.mark.parametrize(("level", "ratio"), [("small", 1.1), ("medium", 1.2), ("large", 1.3)])
def test_scaling_and_translation_are_found_again_by_least_squares(grid, level, ratio):
    points = flat_points(grid)[0].numpy()
    scaled = large_deformation(grid, "scaling", level, seed=1, batch=45 // grid.dim)
    told = scaled.transforms[1].matrix.diagonal(dim1=-2, dim2=-1)
    assert told.max() <= ratio * (1 + 1e-5)
    assert told.max() > 1 + 0.7 * (ratio - 1)
    fits = np.stack([np.diag(affine_fit(points, moved)) for moved in scaled(flat_points(grid)).numpy()])
    # The linear part of the noise has mean 0: over many draws it is the affine's that is left.
    assert np.abs((fits - told.numpy()).mean()) < 0.25 * (ratio - 1)
    assert np.corrcoef(fits.reshape(-1), told.numpy().reshape(-1))[0, 1] > 0.4
    shifted = large_deformation(grid, "translation", level, seed=1, batch=45 // grid.dim)
    moved = (shifted(flat_points(grid)) - flat_points(grid)).mean(1)
    error = (moved - shifted.transforms[1].translation).abs() / torch.tensor(grid.extent)
    assert error.mean() < 0.4 * RANGES[level].noise


@pytest.mark.parametrize("family", FAMILIES)
def test_a_larger_range_moves_further(grid, family):
    moved = [
        displacement(large_deformation(grid, family, level, 0, batch=6), grid).norm(dim=-1).mean() for level in RANGES
    ]
    assert moved[1] > 1.5 * moved[0]
    assert moved[2] > 1.15 * moved[1]


@pytest.mark.parametrize("level", RANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_deformation_folds_on_a_grid_of_pixels(family, level):
    grid = Grid((28, 28))
    det = jacobian_determinant(large_deformation(grid, family, level, seed=5, batch=20), grid)
    assert det.min() > 0


def test_the_units_are_those_of_the_grid():
    grid = Grid((20, 30), (2.0, 0.5))
    wanted = LargeDeformation("all", "large")
    assert wanted.noise_mm(grid) == pytest.approx((0.375 * 20, 0.375 * 7.5))
    bounds = wanted.bounds(grid)
    assert (bounds.translation_mm, bounds.rotation_deg, bounds.scale_ratio) == pytest.approx((0.3 * 7.5, 30, 1.3))
    assert LargeDeformation("brownian", "large").bounds(grid).rotation_deg == 0


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_all_lengths_go_with_the_extent(grid, factor):
    larger = Grid(grid.shape, tuple(factor * h for h in grid.spacing), tuple(factor * o for o in grid.origin))
    one, other = (displacement(large_deformation(g, "translation", "medium", 2), g) for g in (grid, larger))
    torch.testing.assert_close(other, factor * one, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


def test_seeds_and_numbered_levels():
    grid = Grid((16, 18), (1.0, 2.0))
    first, again, other = (displacement(large_deformation(grid, "all", 3, s), grid) for s in (4, 4, 5))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1
    assert LargeDeformation("all", 3) == LargeDeformation("all", "large")
    before = torch.random.get_rng_state()
    large_deformation(grid, "all", 1, 0)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("family", "level", "near"),
    [
        ("rotations", "small", "'rotation'"),
        ("all", "huge", "'large'"),
        ("all", 4, "'4'"),
        ("all", 0, "'0'"),
    ],
)
def test_an_unknown_name_gets_the_nearest(family, level, near):
    with pytest.raises(ValueError) as caught:
        LargeDeformation(family, level)
    assert one_sentence(caught.value, near)


# Pairs


def test_the_fixed_image_is_the_moving_one_read_at_the_truth_as_scipy_does_it(grid):
    image = torch.rand(1, 1, *grid.shape, dtype=torch.float64)
    transform = large_deformation(grid, "all", "small", 0, like=image)
    moving, fixed = deformed_pair(image, grid, transform)
    assert moving is image
    points = transform(flat_points(grid, dtype=torch.float64))[0].numpy()
    at = ((points - np.array(grid.origin)) / np.array(grid.spacing)).T
    expected = map_coordinates(image[0, 0].numpy(), at, order=1, mode="grid-constant").reshape(grid.shape)
    np.testing.assert_allclose(fixed[0, 0], expected, atol=1e-9)


def test_warping_by_the_truth_gives_the_fixed_image_and_by_the_inverse_the_moving_one():
    grid = Grid((48, 40), (1.0, 1.5))
    off = (grid_points(grid) - torch.tensor(grid.centre)) / torch.tensor(grid.extent)
    image = torch.exp(-(off.norm(dim=-1) ** 2) / 0.02)[None, None]
    transform = large_deformation(grid, "translation", "small", 1)
    moving, fixed = deformed_pair(image, grid, transform)
    assert torch.equal(warp(moving, transform, grid, padding="zeros"), fixed)
    inverse, residual = fixed_point_inverse(transform, grid, 100)
    assert residual.max() < 1e-2
    back = warp(fixed, inverse, grid)
    assert (back - moving).abs().max() < 0.05
    assert (fixed - moving).abs().max() > 0.2  # and it was far away before


def test_noise_is_where_the_image_is_and_its_seed_fixes_it():
    image = blobs(4).images[:1]
    transform = large_deformation(SMALL, "brownian", "small", 0)
    plain = deformed_pair(image, SMALL, transform)[1]
    one, again, other = (deformed_pair(image, SMALL, transform, seed, noise=0.05)[1] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert (one[plain == 0] == 0).all()
    inside = (plain > 0.2) & (plain < 0.8)
    assert 0.03 < (one - plain)[inside].std() < 0.07


def test_visible_is_where_the_partner_is_inside(grid):
    shift = Affine(torch.eye(grid.dim)[None], torch.tensor([[2.0 * h for h in grid.spacing]]), torch.zeros(grid.dim))
    expected = torch.ones(grid.shape, dtype=torch.bool)
    for axis, n in enumerate(grid.shape):
        expected.narrow(axis, n - 2, 2).fill_(False)
    assert torch.equal(visible(shift, grid, -1e-3)[0, 0], expected)
    assert visible(shift, grid, 1.0).sum() < expected.sum()


# Cohorts


def test_a_deformed_cohort_holds_its_truth():
    cohort = deformed(blobs(7), "all", "medium", seed=1, copies=2, noise=0.0)
    assert {split: len(pairs) for split, pairs in cohort.given_pairs.items()} == {
        "train": 8,
        "validation": 2,
        "test": 4,
    }
    assert len(cohort) == 7 + 14
    for pair in cohort.pairs("train"):
        moving, fixed = pair
        assert cohort.people[moving] == cohort.people[fixed]
        truth = cohort.truth(*pair)
        again = warp(cohort.images[[moving]], truth, SMALL, padding="zeros")
        torch.testing.assert_close(again, cohort.images[[fixed]])
        labels = warp(cohort.labels[[moving]][:, None].float(), truth, SMALL, order=0, padding="zeros").long()
        assert torch.equal(labels[0], cohort.labels[[fixed]])
        assert torch.equal(cohort.tissue[fixed], 3 * cohort.labels[fixed])
        torch.testing.assert_close(
            warp(cohort.soi[[moving]], truth, SMALL, padding="zeros"), cohort.soi[[fixed]], rtol=0, atol=1e-6
        )
    assert len({tuple(cohort.truth(*p).transforms[1].matrix.flatten().tolist()) for p in cohort.pairs("train")}) == 8


def test_splits_stay_apart_and_do_not_depend_on_each_other():
    full = deformed(blobs(9), "rotation", "large", seed=3)
    few = deformed(blobs(9), "rotation", "large", seed=3, limits={"train": 2})
    sets = [{full.people[i] for i in full.splits[s]} for s in ("train", "validation", "test")]
    assert sum(map(len, sets)) == len(set().union(*sets)) == 9
    assert len(few.given_pairs["train"]) == 2
    pairs = list(zip(full.pairs("test"), few.pairs("test"), strict=True))
    assert [full.people[a[0]] for a, _ in pairs] == [few.people[b[0]] for _, b in pairs]
    for a, b in pairs:
        assert torch.equal(full.images[a[1]], few.images[b[1]])
    other = deformed(blobs(9), "rotation", "large", seed=4)
    assert not torch.equal(full.images[full.pairs("test")[0][1]], other.images[other.pairs("test")[0][1]])


def test_partners_give_the_fixed_images_another_contrast():
    cohort = blobs(7)
    inverted = torch.where(cohort.images > 0, 1 - 0.5 * cohort.images, cohort.images)
    both = Cohort(
        "two", torch.cat([cohort.images, inverted]), cohort.soi.repeat(2, 1, 1, 1), cohort.labels.repeat(2, 1, 1),
        SMALL, cohort.people * 2, cohort.structures, {k: (*v, *(i + 7 for i in v)) for k, v in cohort.splits.items()},
        "Synthetic.",
    )  # fmt: skip
    pairs = deformed(both, "brownian", "small", noise=0.0, partners={i: i + 7 for i in range(7)})
    assert len(pairs) == 14
    moving, fixed = pairs.pairs("test")[0]
    torch.testing.assert_close(
        warp(inverted[[int(pairs.people[moving][1:])]], pairs.truth(moving, fixed), SMALL, padding="zeros")[0],
        pairs.images[fixed],
    )


def test_the_identity_is_a_bad_answer_and_the_truth_a_good_one():
    cohort = deformed(blobs(9), "translation", "large", seed=0)
    before, after = [], []
    for moving, fixed in cohort.pairs("train"):
        maps = [cohort.labels[[i]][:, None] for i in (moving, fixed)]
        moved = warp(maps[0].float(), cohort.truth(moving, fixed), SMALL, order=0, padding="zeros").long()
        before.append(mean_over_labels(dice(maps[0], maps[1])))
        after.append(mean_over_labels(dice(moved, maps[1])))
    assert torch.cat(before).mean() < 0.8
    assert torch.cat(after).min() == 1


@pytest.mark.parametrize("options", [{"copies": 0}, {"limits": {"train": 0, "validation": 0, "test": 0}}])
def test_no_pair_is_an_error(options):
    with pytest.raises(ValueError) as caught:
        deformed(blobs(5), "all", "small", **options)
    assert one_sentence(caught.value, "blobs")


def test_a_truth_is_that_of_a_pair():
    cohort = deformed(blobs(5), "all", "small")
    with pytest.raises(ValueError) as caught:
        cohort.truth(0, 1)
    assert one_sentence(caught.value, "no pair")


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"limits": {"tests": 1}}, "but not 'tests'"),
        ({"limits": {"test": -1}}, "0 or more"),
        ({"noise": -1.0}, "0 or more"),
        ({"seed": -1}, "0 or more"),
    ],
)
def test_limits_and_numbers_that_make_no_sense(wrong, match):
    with pytest.raises(ValueError, match=match) as caught:
        deformed(blobs(6), "rotation", "small", **wrong)
    assert one_sentence(caught.value)
