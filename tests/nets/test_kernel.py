"""The learned kernel: what it does untrained, what its heads hear, trust, learning, additions, refusals."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from truths.fields import GRIDS, one_sentence, points_inside

from regteach.grid import Grid
from regteach.nets.evidence import evidence, leave_one_out
from regteach.nets.kernel import HEADS, KernelConfig, LearnedKernel, Reconstruction
from regteach.sampling import flat_points

SMALL = KernelConfig(dim=2, width=16, neighbours=8, length_mm=5.0)


def small_kernel(dim: int = 2, stir: float = 0.0, dtype: torch.dtype = torch.float64, **settings: Any) -> LearnedKernel:
    """A small kernel; ``stir`` moves its weights away from where they start, as training would."""
    kernel = LearnedKernel(replace(SMALL, dim=dim, **settings)).to(dtype)
    with torch.no_grad():
        for weights in kernel.parameters():
            weights.add_(stir * torch.randn_like(weights))
    return kernel


def scattered(dim: int, count: int, dtype: torch.dtype = torch.float64, sizes_mm: float = 20.0) -> Tensor:
    """Points in a cube whose corner is away from 0."""
    return torch.rand(count, dim, dtype=dtype) * sizes_mm - 5


def affine(dim: int) -> Callable[[Tensor], Tensor]:
    """An affine field."""
    slopes, shift = 0.3 * torch.randn(dim, dim, dtype=torch.float64), 4 * torch.randn(dim, dtype=torch.float64)
    return lambda points: points @ slopes.to(points) + shift.to(points)


def two_sides(points: Tensor) -> Tensor:
    """Features that name the side of a wall at 0 of axis 0, ``n 2``."""
    right = (points[:, :1] > 0).to(points)
    return torch.cat([right, 1 - right], 1)


def sliding(points: Tensor) -> Tensor:
    """Each side of the wall moves along it, against the other."""
    along = torch.zeros_like(points)
    along[:, 1] = torch.where(points[:, 0] > 0, 3.0, -3.0)
    return along


def smooth(points: Tensor) -> Tensor:
    """A smooth field of about 3 mm."""
    return 3 * torch.stack([(points[:, axis - 1] / 6 + axis).sin() for axis in range(points.shape[1])], 1)


def rmse(field: Tensor, truth: Tensor) -> float:
    """Root mean square length of the difference."""
    return float((field.detach() - truth).square().sum(1).mean().sqrt())


# ---- untrained ----


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("stir", [0.0, 0.3])
@pytest.mark.parametrize("rounds", [0, 4])
def test_planes_reproduce_affine_fields_whatever_the_weights(dim: int, stir: float, rounds: int) -> None:
    field, keypoints = affine(dim), scattered(dim, 60)
    kernel, query = small_kernel(dim, stir, neighbours=12, rounds=rounds), scattered(dim, 50)
    found = kernel.reconstruction(keypoints, field(keypoints)).at(query)
    torch.testing.assert_close(found, field(query), atol=2e-3, rtol=0)


@pytest.mark.parametrize("dim", [2, 3])
def test_an_affine_field_goes_on_outside_the_keypoints(dim: int) -> None:
    """As far as the neighbours are heard: with a reach of the size of the cloud, one cloud further."""
    field, keypoints = affine(dim), scattered(dim, 60)
    query = scattered(dim, 50) + 20
    found = small_kernel(dim, length_mm=20.0, neighbours=20).reconstruction(keypoints, field(keypoints)).at(query)
    torch.testing.assert_close(found, field(query), atol=1e-2, rtol=0)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("taper", [True, False])
def test_a_weighted_mean_stays_in_the_hull(dim: int, taper: bool) -> None:
    keypoints, values = scattered(dim, 50), torch.randn(50, dim, dtype=torch.float64)
    kernel = small_kernel(dim, 0.3, degree=0, rounds=0, taper=taper)
    found = kernel.reconstruction(keypoints, values).at(2 * scattered(dim, 200))
    directions = torch.randn(dim, 64, dtype=torch.float64)
    assert ((found @ directions) <= (values @ directions).amax(0) + 1e-9).all()


def test_a_constant_field_is_kept_by_a_mean() -> None:
    keypoints = scattered(2, 30)
    values = torch.tensor([1.0, -2.0], dtype=torch.float64).expand(30, 2)
    found = small_kernel(2, 0.3, degree=0).reconstruction(keypoints, values).at(scattered(2, 50))
    torch.testing.assert_close(found, values[:1].expand(50, 2))


@pytest.mark.parametrize("dim", [2, 3])
def test_the_field_is_continuous_where_it_is_tapered(dim: int) -> None:
    keypoints, values = scattered(dim, 60), 3 * torch.randn(60, dim, dtype=torch.float64)
    start, stop = scattered(dim, 2)
    steps = torch.linspace(0, 1, 8001, dtype=torch.float64)[:, None]
    line = start + steps * (stop - start)
    kernel = small_kernel(dim, 0.1, degree=0, rounds=0)
    jumps = kernel.reconstruction(keypoints, values).at(line).diff(dim=0).norm(dim=1).max()
    hard = small_kernel(dim, 0.1, degree=0, rounds=0, taper=False)
    cut = hard.reconstruction(keypoints, values).at(line).diff(dim=0).norm(dim=1).max()
    assert jumps < 0.05
    assert cut > 5 * jumps


# ---- points and grids ----


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("degree", [0, 1])
def test_points_and_grid_agree(dim: int, degree: int) -> None:
    grid = GRIDS[dim]
    keypoints = points_inside(grid, 40, margin=-1, dtype=torch.float64)[0].requires_grad_()
    values = torch.randn(40, dim, dtype=torch.float64, requires_grad=True)
    kernel = small_kernel(dim, 0.1, degree=degree, semantics=2, heads=("geometry", "semantics"))
    pull = torch.randn(grid.size, dim, dtype=torch.float64)
    results = []
    for on_grid in (False, True):
        found = kernel.reconstruction(keypoints, values, features=lambda p: torch.cat([p.sin(), p.cos()], 1)[:, :2])
        field = found.on(grid).reshape(-1, dim) if on_grid else found.at(flat_points(grid, dtype=torch.float64)[0])
        inputs = [keypoints, values, *kernel.parameters()]
        results.append((field, torch.autograd.grad((field * pull).sum(), inputs, allow_unused=True)))
    (plain, plain_grads), (blocks, block_grads) = results
    torch.testing.assert_close(blocks, plain, atol=1e-7, rtol=1e-6)
    for one, other in zip(block_grads, plain_grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_the_grid_is_the_same_without_gradients() -> None:
    grid, keypoints = GRIDS[3], points_inside(GRIDS[3], 40, margin=-1, dtype=torch.float32)[0]
    found = small_kernel(3, 0.1, dtype=torch.float32).reconstruction(keypoints, smooth(keypoints))
    with torch.no_grad():
        quiet = found.on(grid)
    assert quiet.shape == (*grid.shape, 3)
    assert quiet.dtype == torch.float32
    torch.testing.assert_close(quiet, found.on(grid), atol=1e-5, rtol=1e-5)


# ---- symmetries ----


@pytest.mark.parametrize("given_origin", [True, False])
def test_the_place_in_space_does_not_matter(given_origin: bool) -> None:
    keypoints, query, move = scattered(3, 40), scattered(3, 30), torch.tensor([300.0, -170.0, 55.5]).double()
    kernel, values = small_kernel(3, 0.1), smooth(keypoints)
    origin = torch.tensor([1.0, 2.0, 3.0]).double() if given_origin else None
    here = kernel.reconstruction(keypoints, values, origin=origin).at(query)
    moved = None if origin is None else origin + move
    there = kernel.reconstruction(keypoints + move, values, origin=moved).at(query + move)
    torch.testing.assert_close(there, here, atol=1e-6, rtol=0)


def test_another_origin_is_heard() -> None:
    keypoints, query = scattered(2, 40), scattered(2, 30)
    kernel = small_kernel(2, 0.3, degree=0)
    fields = [
        kernel.reconstruction(keypoints, smooth(keypoints), origin=torch.full((2,), at).double()).at(query)
        for at in (0.0, 3.0)
    ]
    assert (fields[0] - fields[1]).abs().max() > 1e-3


@pytest.mark.parametrize("trust", [True, False])
def test_the_order_of_the_keypoints_does_not_matter(trust: bool) -> None:
    keypoints, query, order = scattered(3, 40), scattered(3, 30), torch.randperm(40)
    kernel = small_kernel(3, 0.2, trust=trust, semantics=2, heads=("geometry", "semantics"))
    values, spread, given = smooth(keypoints), torch.rand(40).double(), torch.rand(40) > 0.8

    def field(rows: Tensor) -> Tensor:
        found = kernel.reconstruction(
            keypoints[rows], values[rows], features=two_sides, spread_mm=spread[rows], given=given[rows]
        )
        return found.at(query)

    torch.testing.assert_close(field(order), field(torch.arange(40)), atol=1e-7, rtol=1e-7)


# ---- the heads ----


def test_semantics_are_left_out_where_there_are_no_features() -> None:
    keypoints, query = scattered(2, 40), scattered(2, 30)
    both = small_kernel(2, 0.2, semantics=2, heads=("geometry", "semantics"))
    alone = small_kernel(2, heads=("geometry",))
    missing = alone.load_state_dict(both.state_dict(), strict=False)
    assert not missing.missing_keys
    values = smooth(keypoints)
    silent = both.reconstruction(keypoints, values).at(query)
    torch.testing.assert_close(silent, alone.reconstruction(keypoints, values).at(query))
    heard = both.reconstruction(keypoints, values, features=two_sides).at(query)
    assert (silent - heard).abs().max() > 1e-3


def test_features_are_not_heard_by_a_kernel_without_semantics() -> None:
    keypoints, query, kernel = scattered(2, 40), scattered(2, 30), small_kernel(2, 0.2)
    values = smooth(keypoints)
    found = kernel.reconstruction(keypoints, values, features=two_sides).at(query)
    torch.testing.assert_close(found, kernel.reconstruction(keypoints, values).at(query))


def test_semantics_alone_without_features_leave_nearness() -> None:
    """And nothing is left where nearness is switched off too: the mean of the K nearest."""
    keypoints, query = scattered(2, 40), scattered(2, 30)
    settings: dict[str, Any] = {"semantics": 2, "heads": ("semantics",), "trust": False, "rounds": 0, "degree": 0}
    kernel = small_kernel(2, 0.2, bias=False, taper=False, **settings)
    found = kernel.reconstruction(keypoints, smooth(keypoints)).at(query)
    nearest = torch.cdist(query, keypoints).argsort(1)[:, : SMALL.neighbours]
    torch.testing.assert_close(found, smooth(keypoints)[nearest].mean(1))


@pytest.mark.parametrize("degree", [0, 1])
def test_features_separate_the_sides_of_a_sliding_wall(degree: int) -> None:
    """Trained on one set of keypoints, read on another."""
    errors = {}
    for heads in (("geometry",), ("geometry", "semantics")):
        torch.manual_seed(0)
        kernel = small_kernel(2, dtype=torch.float32, degree=degree, semantics=2 * (len(heads) - 1), heads=heads)
        optimiser = torch.optim.Adam(kernel.parameters(), 1e-2)

        def case(kernel: LearnedKernel = kernel) -> tuple[Tensor, Tensor]:
            keypoints, query = (20 * torch.rand(count, 2) - 10 for count in (60, 100))
            found = kernel.reconstruction(keypoints, sliding(keypoints), features=two_sides)
            return found.at(query), sliding(query)

        for _ in range(50):
            optimiser.zero_grad()
            field, truth = case()
            (field - truth).abs().mean().backward()
            optimiser.step()
        errors[heads] = np.mean([rmse(*case()) for _ in range(5)])
    assert errors["geometry", "semantics"] < 0.4 * errors["geometry",]


# ---- trust ----


def by_loop(keypoints: np.ndarray, values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Planes through the k nearest others, their medians, and how far theirs are from it."""
    planes, medians, scatter = [], [], []
    for index, place in enumerate(keypoints):
        squared = ((keypoints - place) ** 2).sum(1)
        squared[index] = np.inf
        others = np.argsort(squared, kind="stable")[: min(k, len(keypoints) - 1)]
        design = np.concatenate([np.ones((len(others), 1)), keypoints[others] - place], 1)
        planes.append(np.linalg.lstsq(design, values[others], rcond=None)[0][0])
        medians.append(np.median(values[others], 0))
        scatter.append(np.median(np.linalg.norm(values[others] - medians[-1], axis=1)))
    return np.stack(planes), np.stack(medians), np.stack(scatter)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("k", [9, 12, 25, 100])
@pytest.mark.parametrize("twice", [False, True])
def test_leave_one_out_is_a_plain_loop(dim: int, k: int, twice: bool) -> None:
    keypoints = scattered(dim, 40)
    if twice:
        keypoints[7], keypoints[20], keypoints[21] = keypoints[3], keypoints[30], keypoints[30]
    values = torch.randn_like(keypoints)
    found = leave_one_out(keypoints, values, k)
    plane, median, scatter = (torch.from_numpy(part) for part in by_loop(keypoints.numpy(), values.numpy(), k))
    torch.testing.assert_close(found[0], plane, atol=0.03, rtol=0)  # the fit has a small ridge
    torch.testing.assert_close(found[1], median)
    torch.testing.assert_close(found[2], scatter, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dim", [2, 3])
def test_leave_one_out_of_an_affine_field_is_the_field(dim: int) -> None:
    keypoints = scattered(dim, 40)
    values = affine(dim)(keypoints)
    torch.testing.assert_close(leave_one_out(keypoints, values, 12)[0], values, atol=0.05, rtol=0)


@pytest.mark.parametrize("dim", [2, 3])
def test_coordinates_keep_float32_under_autocast(dim: int) -> None:
    """Far from 0, where bfloat16 would be off by millimetres."""
    keypoints, query = (scattered(dim, n, torch.float32, 60.0) + 100 for n in (60, 40))
    values = (10 * smooth(keypoints)).requires_grad_()
    kernel = small_kernel(dim, 0.1, torch.float32, spline=True)

    def found() -> tuple[Tensor, ...]:
        field = kernel.reconstruction(keypoints, values)
        said = *leave_one_out(keypoints, values, 12), evidence(keypoints, values, 12)
        return *said, field.at(query), kernel.reconstruct(keypoints, values, query)

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = found()
    for ours, theirs in zip(mixed, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    for place in (0, 4):  # the plane, and the field
        ours, theirs = (torch.autograd.grad(every[place].mean(), values)[0] for every in (mixed, expected))
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


def test_features_and_displacements_in_half_precision_are_heard_in_float32() -> None:
    keypoints, query = scattered(2, 40, torch.float32), scattered(2, 10, torch.float32)
    kernel = small_kernel(2, 0.1, torch.float32, semantics=2, heads=HEADS)
    values = smooth(keypoints).bfloat16()
    expected = kernel.reconstruction(keypoints, values.float(), two_sides).at(query)
    with torch.autocast("cpu", torch.bfloat16):
        found = kernel.reconstruction(keypoints, values, lambda points: two_sides(points).bfloat16()).at(query)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("spread", [True, False])
def test_an_outlier_is_the_farthest_from_the_plane(dim: int, spread: bool) -> None:
    keypoints = scattered(dim, 80)
    for outlier in (0, 17, 79):
        values = smooth(keypoints)
        values[outlier] += 8 / dim**0.5
        found = evidence(keypoints, values, 12, torch.ones(80).double() if spread else None)
        assert found.shape == (80, 6)
        assert found.isfinite().all()
        assert found[:, 0].argmax() == outlier
        plane, median, scatter = leave_one_out(keypoints, values, 12)
        torch.testing.assert_close(found[:, 0], (values - plane).norm(dim=1).log1p())
        torch.testing.assert_close(found[:, 1], (values - median).norm(dim=1).log1p())
        torch.testing.assert_close(found[:, 2], scatter.log1p())


def test_evidence_has_no_place_and_no_direction() -> None:
    keypoints, turn = scattered(2, 50), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double()
    here = evidence(keypoints, smooth(keypoints), 10)
    there = evidence(keypoints @ turn + 40, smooth(keypoints) @ turn, 10)
    torch.testing.assert_close(here, there, atol=1e-6, rtol=1e-6)


def planted(dim: int, count: int = 100, wrong: float = 0.15) -> tuple[Tensor, Tensor, Tensor]:
    """Keypoints, matches of which some are wrong, and the truth."""
    keypoints = scattered(dim, count, torch.float32)
    matches = smooth(keypoints)
    outliers = torch.rand(count) < wrong
    return keypoints, torch.where(outliers[:, None], matches + 8 * torch.randn_like(matches), matches), outliers


def test_learning_finds_planted_outliers() -> None:
    kernel = small_kernel(2, dtype=torch.float32, neighbours=15)
    optimiser = torch.optim.Adam(kernel.parameters(), 1e-2)

    def error(seed: int) -> float:
        torch.manual_seed(seed)
        keypoints, matches, _ = planted(2)
        query = scattered(2, 200, torch.float32)
        with torch.no_grad():
            return rmse(kernel.reconstruction(keypoints, matches).at(query), smooth(query))

    before = np.mean([error(seed) for seed in range(5)])
    torch.manual_seed(100)
    for _ in range(60):
        optimiser.zero_grad()
        keypoints, matches, _ = planted(2)
        query = scattered(2, 100, torch.float32)
        (kernel.reconstruction(keypoints, matches).at(query) - smooth(query)).abs().mean().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in kernel.parameters())
        optimiser.step()
    after = np.mean([error(seed) for seed in range(5)])
    assert after < 0.6 * before


def test_every_parameter_is_heard() -> None:
    """No weight of the whole kernel is out of reach of the loss, once none is 0."""
    kernel = small_kernel(3, 0.1, semantics=4, heads=("geometry", "semantics"))
    keypoints = scattered(3, 60)
    found = kernel.reconstruction(
        keypoints,
        smooth(keypoints) + torch.randn(60, 3).double(),
        features=lambda p: (p @ torch.ones(3, 4).double()).sin(),
        spread_mm=torch.rand(60).double(),
        given=torch.arange(60) < 5,
    )
    found.at(scattered(3, 50)).square().sum().backward()
    silent = [name for name, p in kernel.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


# ---- given correspondences ----


def test_a_given_correspondence_is_heard() -> None:
    keypoints = torch.cat([scattered(2, 60), torch.tensor([[4.0, 5.0]]).double()])
    values = smooth(keypoints)
    values[-1] += torch.tensor([5.0, -4.0])
    given = torch.arange(61) == 60
    kernel = small_kernel(2, neighbours=12)
    miss = {
        flag: (kernel.reconstruction(keypoints, values, given=given if flag else None).at(keypoints[-1:]) - values[-1:])
        .norm()
        .item()
        for flag in (False, True)
    }
    assert miss[True] < 0.5 * miss[False]
    assert miss[True] < 1.5


def added_case(dim: int, **settings: Any) -> tuple[LearnedKernel, Tensor, Tensor, Grid, Tensor, Tensor]:
    """A kernel, keypoints and displacements, a grid, and two new correspondences."""
    grid = Grid((24, 20) if dim == 2 else (14, 12, 10), spacing=(1.5,) * dim, origin=(-4.0,) * dim)
    keypoints = points_inside(grid, 120, margin=0, dtype=torch.float64)[0]
    fixed = torch.tensor(grid.centre).double() + torch.tensor([[0.3] * dim, [-4.2] * dim]).double()
    return small_kernel(dim, 0.1, **settings), keypoints, smooth(keypoints), grid, fixed, fixed + smooth(fixed) + 2


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("settings", [{}, {"rounds": 0}, {"trust": False}, {"degree": 0, "taper": False}])
def test_additions_change_the_field_where_they_are_near(dim: int, settings: dict[str, Any]) -> None:
    kernel, keypoints, values, grid, fixed, moving = added_case(dim, **settings)
    before = kernel.reconstruction(keypoints, values)
    field = before.on(grid).detach()
    kept = field.clone()
    after, updated = before.added(fixed, moving, kernel, field, grid)
    assert torch.equal(field, kept)
    torch.testing.assert_close(updated, after.on(grid), atol=1e-5, rtol=0)
    points, joined = flat_points(grid, dtype=torch.float64)[0], torch.cat([keypoints, fixed])
    near = (torch.cdist(points, joined).argsort(dim=1, stable=True)[:, : SMALL.neighbours] >= len(keypoints)).any(1)
    changed = (updated - field).reshape(-1, dim)
    assert 0 < near.sum() < 0.9 * grid.size
    assert (changed[~near] == 0).all()
    assert changed[near].abs().max() > 0.5
    at_new = after.at(fixed) - (moving - fixed)
    assert at_new.norm(dim=1).max() < 0.7 * (before.at(fixed) - (moving - fixed)).norm(dim=1).max()


def test_additions_one_after_the_other_are_additions_together() -> None:
    kernel, keypoints, values, grid, fixed, moving = added_case(2)
    before = kernel.reconstruction(keypoints, values)
    field = before.on(grid).detach()
    _, together = before.added(fixed, moving, kernel, field, grid)
    first, halfway = before.added(fixed[:1], moving[:1], kernel, field, grid)
    second, apart = first.added(fixed[1:], moving[1:], kernel, halfway, grid)
    torch.testing.assert_close(apart, second.on(grid), atol=1e-5, rtol=0)
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=0)


def test_additions_with_features() -> None:
    kernel, keypoints, values, grid, fixed, moving = added_case(2, semantics=2, heads=("geometry", "semantics"))
    before = kernel.reconstruction(keypoints, values, features=two_sides)
    after, updated = before.added(fixed, moving, kernel, before.on(grid).detach(), grid, features=two_sides)
    torch.testing.assert_close(updated, after.on(grid), atol=1e-5, rtol=0)


def test_an_addition_that_brings_the_taper_in_changes_every_voxel() -> None:
    """K keypoints are not tapered, K + 1 are; the new one lies outside, so that it is not everywhere among the K."""
    kernel, keypoints, values, grid, fixed, _ = added_case(2)
    before = kernel.reconstruction(keypoints[:8], values[:8])
    fixed = torch.full_like(fixed[:1], -30.0)
    after, updated = before.added(fixed, fixed + 2, kernel, before.on(grid).detach(), grid)
    torch.testing.assert_close(updated, after.on(grid), atol=1e-5, rtol=0)


def test_additions_far_from_the_origin_find_their_voxels_in_single_precision() -> None:
    torch.manual_seed(1)
    grid = Grid((24, 20), spacing=(1.5, 1.5), origin=(900.0, -700.0))
    keypoints = points_inside(grid, 120, dtype=torch.float32)[0]
    kernel = small_kernel(2, dtype=torch.float32, taper=False, degree=0)
    before = kernel.reconstruction(keypoints, smooth(keypoints))
    field = before.on(grid).detach()
    fixed = torch.tensor(grid.centre)[None] + 0.3
    after, updated = before.added(fixed, fixed + 9, kernel, field, grid)
    torch.testing.assert_close(updated, after.on(grid).detach(), atol=1e-4, rtol=0)


def test_an_addition_to_fewer_keypoints_than_neighbours_reaches_everywhere() -> None:
    kernel, keypoints, values, grid, fixed, moving = added_case(2)
    before = kernel.reconstruction(keypoints[:4], values[:4])
    after, updated = before.added(fixed, moving, kernel, before.on(grid).detach(), grid)
    torch.testing.assert_close(updated, after.on(grid), atol=1e-5, rtol=0)


# ---- size ----


def test_the_whole_kernel_has_the_size_of_the_paper() -> None:
    """About 150,000 parameters with both heads and a width of 120; 45,190 with the 64 that it starts from."""
    for width, count in ((64, 45_190), (120, 151_926)):
        kernel = LearnedKernel(KernelConfig(semantics=16, heads=HEADS, width=width))
        assert sum(weights.numel() for weights in kernel.parameters()) == count


# ---- few and bad ----


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("degree", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_few_keypoints_are_defined(dim: int, degree: int, count: int) -> None:
    keypoints = scattered(dim, count).requires_grad_()
    value = torch.tensor([2.0, -1.0, 0.5][:dim]).double().expand(count, dim)
    kernel = small_kernel(dim, 0.1, degree=degree)
    found = kernel.reconstruction(keypoints, value)
    torch.testing.assert_close(found.at(scattered(dim, 20)), value[:1].expand(20, dim), atol=1e-3, rtol=0)
    assert (found.on(GRIDS[dim]) - value[0]).abs().max() < 1e-3
    found.at(scattered(dim, 20)).square().sum().backward()
    assert keypoints.grad is not None
    assert keypoints.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in kernel.parameters())


@pytest.mark.parametrize("degree", [0, 1])
def test_keypoints_at_one_place_are_defined(degree: int) -> None:
    keypoints = torch.full((12, 2), 3.0).double().requires_grad_()
    values = torch.randn(12, 2).double()
    kernel = small_kernel(2, 0.1, degree=degree)
    field = kernel.reconstruction(keypoints, values).at(scattered(2, 20))
    field.square().sum().backward()
    assert field.isfinite().all()
    assert keypoints.grad is not None
    assert keypoints.grad.isfinite().all()


def test_exact_matches_have_finite_gradients() -> None:
    """Distances from planes and medians of 0, and a point on a keypoint."""
    keypoints = scattered(3, 40)
    values = torch.zeros(40, 3).double().requires_grad_()
    kernel = small_kernel(3, 0.1)
    kernel.reconstruction(keypoints, values).at(keypoints).sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in kernel.parameters())


def refused(call: Callable[[], Any]) -> None:
    """That something is refused, in one sentence."""
    with pytest.raises(ValueError) as caught:
        call()
    assert one_sentence(caught.value)


@pytest.mark.parametrize("bad", ["none", "nan point", "infinite value", "3D in 2D", "lengths", "flat", "values in 3D"])
def test_bad_keypoints_are_refused(bad: str) -> None:
    keypoints, values = scattered(2, 20), torch.randn(20, 2).double()
    if bad == "none":
        keypoints, values = keypoints[:0], values[:0]
    elif bad == "nan point":
        keypoints[3, 1] = torch.nan
    elif bad == "infinite value":
        values[3, 1] = torch.inf
    elif bad == "3D in 2D":
        keypoints, values = scattered(3, 20), scattered(3, 20)
    elif bad == "lengths":
        values = values[:-1]
    elif bad == "flat":
        keypoints = keypoints[0]
    else:
        values = scattered(3, 20)
    refused(lambda: small_kernel(2).reconstruction(keypoints, values))


@pytest.mark.parametrize("bad", ["spread length", "spread nan", "given length", "origin", "features rows", "channels"])
def test_bad_extras_are_refused(bad: str) -> None:
    keypoints, values = scattered(2, 20), torch.randn(20, 2).double()
    extras: dict[str, dict[str, Any]] = {
        "spread length": {"spread_mm": torch.ones(19).double()},
        "spread nan": {"spread_mm": torch.full((20,), torch.nan).double()},
        "given length": {"given": torch.ones(19, dtype=torch.bool)},
        "origin": {"origin": torch.zeros(3).double()},
        "features rows": {"features": lambda points: two_sides(points)[1:]},
        "channels": {"features": lambda points: points[:, :1]},
    }
    kernel = small_kernel(2, semantics=2, heads=("geometry", "semantics"))
    refused(lambda: kernel.reconstruction(keypoints, values, **extras[bad]))


@pytest.mark.parametrize("bad", [torch.nan, "3D"])
def test_bad_points_are_refused(bad: Any) -> None:
    keypoints = scattered(2, 20)
    found = small_kernel(2).reconstruction(keypoints, smooth(keypoints))
    refused(lambda: found.at(scattered(3, 4) if bad == "3D" else torch.full((4, 2), bad).double()))


def test_a_grid_of_another_dimension_is_refused() -> None:
    keypoints = scattered(2, 20)
    found = small_kernel(2).reconstruction(keypoints, smooth(keypoints))
    refused(lambda: found.on(GRIDS[3]))


def test_additions_without_the_features_are_refused() -> None:
    kernel, keypoints, values, grid, fixed, moving = added_case(2, semantics=2, heads=("geometry", "semantics"))
    before = kernel.reconstruction(keypoints, values, features=two_sides)
    refused(lambda: before.added(fixed, moving, kernel, before.on(grid).detach(), grid))


@pytest.mark.parametrize("bad", ["nan", "lengths", "3D", "field"])
def test_bad_additions_are_refused(bad: str) -> None:
    kernel, keypoints, values, grid, fixed, moving = added_case(2)
    before = kernel.reconstruction(keypoints, values)
    field = before.on(grid).detach()
    if bad == "nan":
        moving = moving * torch.nan
    elif bad == "lengths":
        moving = moving[:1]
    elif bad == "3D":
        fixed = moving = scattered(3, 2)
    else:
        field = field[1:]
    refused(lambda: before.added(fixed, moving, kernel, field, grid))


@pytest.mark.parametrize(
    "settings",
    [
        {"dim": 4},
        {"neighbours": 0},
        {"heads": ()},
        {"heads": ("colour",)},
        {"heads": ("semantics",)},
        {"heads": ("geometry", "geometry")},
        {"degree": 2},
        {"rounds": -1},
        {"width": 0},
        {"semantics": -1},
        {"semantics": 4},
        {"width": 15},
        {"length_mm": 0.0},
        {"length_mm": float("nan")},
    ],
    ids=str,
)
def test_bad_configurations_are_refused(settings: dict[str, Any]) -> None:
    refused(lambda: KernelConfig(**settings))


@pytest.mark.parametrize("heads", [("geometry",), ("semantics",), ("geometry", "semantics")], ids="+".join)
def test_every_combination_of_switches_runs(heads: tuple[str, ...]) -> None:
    keypoints, query = scattered(2, 30), scattered(2, 9)
    for switches in itertools.product((True, False), (True, False), (True, False), (0, 1), (0, 2)):
        settings: dict[str, Any] = dict(zip(("bias", "trust", "taper", "degree", "rounds"), switches, strict=True))
        kernel = small_kernel(2, heads=heads, semantics=2 * ("semantics" in heads), **settings)
        found = kernel.reconstruction(keypoints, smooth(keypoints), features=two_sides)
        assert isinstance(found, Reconstruction)
        assert found.at(query).isfinite().all()
