"""Keypoints and matches: against plain NumPy, brute force, and motions that are known."""

import importlib
import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.autograd import gradcheck
from truths.fields import one_sentence, points_inside

from regteach import keypoints as kp
from regteach.affine import Affine
from regteach.grid import Grid
from regteach.keypoints import agreement
from regteach.sampling import grid_points, mm_to_vox, sample

F64 = torch.float64
LARGE = {  # room for a window and patches; non-cubic, anisotropic, away from 0
    2: Grid((48, 40), spacing=(1.0, 1.5), origin=(-3.0, 5.0)),
    3: Grid((30, 26, 22), spacing=(1.0, 1.5, 2.0), origin=(-3.0, 5.0, 10.5)),
}


def texture(grid: Grid, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Smooth noise of two sizes, ``1 1 *grid``."""
    noise = [np.random.default_rng(seed + i).normal(size=grid.shape) for i in range(2)]
    layers = [ndimage.gaussian_filter(n, s, mode="nearest") for n, s in zip(noise, (1.0, 2.5), strict=True)]
    return torch.from_numpy(sum(layer / layer.std() for layer in layers)).to(dtype)[None, None]


def pair(grid: Grid, displacement) -> tuple[Tensor, Tensor]:
    """A fixed image and the textured moving image that it is read from: fixed(x) = moving(x + displacement(x))."""
    moving = texture(grid)
    points = grid_points(grid)
    return sample(moving, (points + displacement(points))[None], grid), moving


def staying(points: Tensor, displacement, grid: Grid, margin_vox: float = 2.0) -> Tensor:
    """Which points have their truth inside the moving image, away from its border."""
    vox = mm_to_vox(points + displacement(points), grid)
    return ((vox >= margin_vox) & (vox <= torch.tensor(grid.shape) - 1 - margin_vox)).all(-1)


# Detection


def numpy_distinctiveness(image: np.ndarray, grid: Grid, sigma_mm: float) -> np.ndarray:
    slopes = [
        ndimage.correlate1d(image, np.array([1, -8, 0, 8, -1]) / 12, axis=k, mode="nearest") / h
        for k, h in enumerate(grid.spacing)
    ]
    tensor = np.zeros((*grid.shape, grid.dim, grid.dim))
    for i, k in itertools.product(range(grid.dim), repeat=2):
        sigma = [sigma_mm / h for h in grid.spacing]
        tensor[..., i, k] = ndimage.gaussian_filter(slopes[i] * slopes[k], sigma, mode="nearest")
    return 1 / np.trace(np.linalg.inv(tensor), axis1=-2, axis2=-1)


def test_distinctiveness_is_the_plain_formula(grid):
    image = texture(grid, dtype=F64)
    expected = numpy_distinctiveness(image[0, 0].numpy(), grid, 2.0)
    np.testing.assert_allclose(kp.distinctiveness(image, grid, 2.0)[0, 0], expected, rtol=1e-9)


def test_one_direction_alone_is_not_distinct(grid):
    # Without smoothing S has a single direction at every voxel: rounding must not pass for a second one.
    image = texture(grid)
    squares = (kp.distinctiveness(image, grid).max(), kp.distinctiveness(image, grid, 0.0).max())
    assert squares[1] < 1e-5 * squares[0]
    assert kp.distinctiveness(torch.full_like(image, 7.0), grid).max() == 0


def test_an_axis_parallel_edge_has_no_distinctiveness(grid):
    edge = torch.zeros(1, 1, *grid.shape)
    edge[:, :, grid.shape[0] // 2 :] = 1000.0
    assert kp.distinctiveness(edge, grid).max() == 0
    assert kp.foerstner(edge, grid, 10).shape == (0, grid.dim)


@pytest.mark.parametrize("dim", [2, 3])
def test_corners_of_a_box_are_found(dim):
    grid = LARGE[dim]
    low, high = [7, 8, 6][:dim], [n - 8 for n in grid.shape]
    image = torch.zeros(1, 1, *grid.shape)
    image[(0, 0, *(slice(a, b) for a, b in zip(low, high, strict=True)))] = 100.0
    truth = np.array(list(itertools.product(*[(a, b - 1) for a, b in zip(low, high, strict=True)])))  # corner voxels
    points = kp.foerstner(image, grid, 100, sigma_mm=1.0, threshold=0.3)
    assert len(points) == 2**dim
    distance = np.abs(mm_to_vox(points, grid).numpy()[:, None] - truth).max(-1)
    assert distance.min(0).max() <= 1.0
    assert sorted(distance.argmin(1)) == list(range(2**dim))


@pytest.mark.parametrize("dim", [2, 3])
def test_keypoints_turn_with_the_axes(dim):
    # Spacings without a common measure, so that no two distances are the same.
    grid, order = Grid(LARGE[dim].shape, (1.013, 1.497, 2.031)[:dim], (-3.0,)), list(range(dim))[::-1]
    turned = Grid(*(tuple(x[i] for i in order) for x in (grid.shape, grid.spacing, grid.origin)))
    image = texture(grid, dtype=F64)
    points = kp.foerstner(image, grid, 20)
    again = kp.foerstner(image.permute(0, 1, *(i + 2 for i in order)).contiguous(), turned, 20)
    assert len(points) == 20
    torch.testing.assert_close(again[:, order], points)


def test_keypoints_are_separate_maxima_inside_the_mask(grid):
    grid = LARGE[grid.dim]
    image, mask = texture(grid), torch.zeros(1, 1, *grid.shape)
    mask[:, :, 8:-6, 5:-9] = 1
    points = kp.foerstner(image, grid, 1000, mask, window_mm=6.0, margin_mm=2.0)
    assert 3 < len(points) < 1000
    index = mm_to_vox(points, grid).round().long()
    value = kp.distinctiveness(image, grid)[0, 0]
    reach = [max(1, round(6.0 / h / 2 - 0.5)) for h in grid.spacing]
    for one in index:
        window = tuple(slice(max(0, int(i) - r), int(i) + r + 1) for i, r in zip(one, reach, strict=True))
        margin = tuple(
            slice(int(i) - round(2 / h), int(i) + round(2 / h) + 1) for i, h in zip(one, grid.spacing, strict=True)
        )
        assert mask[0, 0][margin].min() == 1
        # No other voxel of the window that may be a point is better.
        free = ndimage.binary_erosion(mask[0, 0].numpy(), np.ones([2 * round(2 / h) + 1 for h in grid.spacing]))
        assert value[tuple(one)] == (value * torch.from_numpy(free))[window].max()
    assert len(torch.unique(index, dim=0)) == len(index)


def test_a_plateau_gives_its_first_voxel(monkeypatch, grid):
    from regteach.keypoints import detection

    plateau = torch.zeros(1, 1, *grid.shape)
    plateau[(0, 0, *(slice(2, 4) for _ in range(grid.dim)))] = 1.0
    monkeypatch.setattr(detection, "distinctiveness", lambda *_: plateau)
    points = kp.foerstner(plateau, grid, 5)
    torch.testing.assert_close(mm_to_vox(points, grid), torch.full((1, grid.dim), 2.0))


def test_scale_offset_and_count(grid):
    grid = LARGE[grid.dim]
    image = texture(grid)
    everything = kp.foerstner(image, grid, 10_000)
    some = kp.foerstner(-3 * image + 100, grid, 12)
    assert len(some) == 12 < len(everything)
    assert {tuple(p) for p in some.tolist()} <= {tuple(p) for p in everything.tolist()}
    assert len(torch.unique(some, dim=0)) == 12


def naive_farthest(points: np.ndarray, count: int, start: int) -> list[int]:
    chosen = [start]
    while len(chosen) < min(count, len(points)):
        rest = [i for i in range(len(points)) if i not in chosen]
        gaps = [min(float(((points[i] - points[j]) ** 2).sum()) for j in chosen) for i in rest]
        chosen.append(rest[int(np.argmax(gaps))])
    return chosen


@pytest.mark.parametrize(("n", "count"), [(40, 15), (12, 12), (5, 9), (1, 3)])
def test_farthest_points_are_the_naive_ones(n, count):
    # Corners of a cube: ties, and with more than 8 points duplicates.
    points = np.random.default_rng(n).integers(0, 2, (n, 3)).astype(float)
    chosen = kp.farthest_points(torch.from_numpy(points), count, start=n // 2)
    assert chosen.tolist() == naive_farthest(points, count, n // 2)
    assert len(set(chosen.tolist())) == min(n, count)


def test_library_keypoints_are_in_mm_and_slice_by_slice():
    grid = LARGE[3]

    def corners(plane: np.ndarray) -> np.ndarray:
        assert plane.shape == (grid.shape[0], grid.shape[2])
        assert plane.min() >= 0
        assert plane.max() <= 1
        return np.array([[2.0, 3.0]])

    points = kp.library_keypoints(texture(grid), grid, 1000, corners, axis=1)
    assert len(points) == grid.shape[1]
    vox = mm_to_vox(points, grid)
    torch.testing.assert_close(vox[:, [0, 2]], torch.tensor([[2.0, 3.0]]).expand(len(points), -1))
    assert sorted(vox[:, 1].round().int().tolist()) == list(range(grid.shape[1]))
    assert len(kp.library_keypoints(texture(grid), grid, 7, corners, axis=1)) == 7


@pytest.mark.parametrize("detector", ["orb", "sift"])
def test_detectors_of_scikit_image(detector):
    pytest.importorskip("skimage", reason="the optional detectors are scikit-image's, which is not installed")
    grid = Grid((90, 100), spacing=(1.0, 1.5), origin=(-3.0, 5.0))
    image = torch.zeros(1, 1, *grid.shape)
    yy, xx = np.mgrid[: grid.shape[0], : grid.shape[1]]
    for y, x in ((30, 40), (60, 70)):
        image[0, 0] += torch.from_numpy(np.exp(-((yy - y) ** 2 + (xx - x) ** 2) / (2 * 3.0**2)))
    image += (image > 0.5).float()  # a disc with a rim: a blob for SIFT, corners for ORB's FAST
    points = mm_to_vox(kp.library_keypoints(image, grid, 50, detector), grid)
    assert 2 <= len(points) <= 50
    nearest = torch.cdist(points, torch.tensor([[30.0, 40.0], [60.0, 70.0]]))
    assert nearest.min(1).values.max() < 10
    assert nearest.min(0).values.max() < 10
    assert kp.library_keypoints(torch.zeros_like(image), grid, 5, detector).shape == (0, 2)


def test_a_missing_library_is_said_in_one_sentence(monkeypatch):
    def missing(name: str):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError) as error:
        kp.library_keypoints(texture(LARGE[2]), LARGE[2], 5, "orb")
    assert one_sentence(error.value, "scikit-image", "'orb'")


# Costs


def test_search_window_is_a_symmetric_lattice(grid):
    window = kp.search_window(grid, 3.0)
    reach = [3, 2, 1][: grid.dim]
    assert len(window) == np.prod([2 * r + 1 for r in reach])
    torch.testing.assert_close(window, -window.flip(0))
    assert window[len(window) // 2].abs().max() == 0
    assert window.abs().amax(0).tolist() == [r * h for r, h in zip(reach, grid.spacing, strict=True)]
    flat = kp.search_window(grid, [0.3, *[0] * (grid.dim - 1)], 0.1)
    assert len(flat) == 7
    assert flat[:, 1:].abs().max() == 0


@pytest.mark.parametrize("radius", [0, 1])
@pytest.mark.parametrize("step", [1.0, 0.7])
def test_costs_are_the_plain_mean_of_squares(grid, radius, step):
    other = Grid(tuple(n + 1 for n in grid.shape), tuple(0.9 * h for h in grid.spacing), grid.origin)
    fixed, moving = torch.rand(1, 3, *grid.shape, dtype=F64), torch.rand(1, 3, *other.shape, dtype=F64)
    points = points_inside(grid, 5, margin=1.2)[0]
    candidates = kp.search_window(grid, 1.0, step * 0.9)
    shift = 0.1 * torch.arange(1, grid.dim + 1, dtype=F64)
    costs = kp.cost_volume(fixed, moving, grid, points, candidates, radius, lambda x: x + shift, other, chunk=2)
    patch = np.array(list(itertools.product(range(-radius, radius + 1), repeat=grid.dim))) * grid.spacing
    inside = np.ones((5, len(candidates)), bool)
    expected = np.zeros((5, len(candidates)))
    for i, k in itertools.product(range(5), range(len(candidates))):
        here, there = points[i] + torch.from_numpy(patch), (points[i] + shift + candidates[k])
        difference = sample(fixed, here[None], grid) - sample(moving, (there + torch.from_numpy(patch))[None], other)
        expected[i, k] = difference.square().mean()
        vox = mm_to_vox(there, other).numpy()
        inside[i, k] = ((vox >= -0.5) & (vox <= np.array(other.shape) - 0.5)).all()
    worst = np.where(inside, expected, 0).max(1, keepdims=True)
    np.testing.assert_allclose(costs, np.where(inside, expected, worst), atol=1e-12)


def test_chunks_change_no_number(grid):
    grid = LARGE[grid.dim]
    fixed, moving = torch.rand(1, 4, *grid.shape), torch.rand(1, 4, *grid.shape)
    points, candidates = points_inside(grid, 23, dtype=torch.float32)[0], kp.search_window(grid, 3.0)
    whole = kp.cost_volume(fixed, moving, grid, points, candidates)
    for chunk in (1, 7, 23):
        part = kp.cost_volume(fixed, moving, grid, points, candidates, chunk=chunk)
        torch.testing.assert_close(part, whole, rtol=1e-6, atol=1e-6)


def test_a_common_offset_costs_no_digits(grid):
    image = texture(grid)
    points, candidates = points_inside(grid, 4, margin=1, dtype=torch.float32)[0], kp.search_window(grid, 2.0)
    near = kp.cost_volume(image, image, grid, points, candidates)
    far = kp.cost_volume(image + 1000, image + 1000, grid, points, candidates)
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-3)


def test_a_candidate_outside_is_never_the_best(grid):
    # Beyond the border the last voxel is repeated: without care a flat margin would match everywhere out there.
    fixed, moving = torch.rand(1, 1, *grid.shape), torch.rand(1, 1, *grid.shape)
    corner = torch.tensor([grid.origin])
    window = kp.search_window(grid, 3.0)
    cost = kp.cost_volume(fixed, moving, grid, corner, window, patch_radius_vox=0)
    outside = (window < -0.51 * torch.tensor(grid.spacing)).any(1)
    torch.testing.assert_close(cost[0, outside], cost[0, ~outside].max().expand(int(outside.sum())))


def test_gradients(grid):
    small = Grid((3, 4, 3)[: grid.dim], grid.spacing, grid.origin)
    fixed, moving = (torch.rand(1, 1, *small.shape, dtype=F64, requires_grad=True) for _ in range(2))
    points, window = points_inside(small, 2, margin=0.7)[0], kp.search_window(small, 0.6, 0.6)

    def estimate(fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        cost = kp.cost_volume(fixed, moving, small, points, window, 0, chunk=1)
        return kp.soft_argmin(kp.mean_field(cost, window, points, 0.1, 0.3, iterations=2), window, 0.3)

    assert gradcheck(estimate, (fixed, moving))
    cost = torch.rand(3, len(window), dtype=F64, requires_grad=True)
    assert gradcheck(lambda c: kp.soft_argmin(c, window, 0.2), cost)
    line = points_inside(small, 3)[0]
    assert gradcheck(lambda c: kp.tree_marginals(c, window, line, 0.3, truncation=0.4), cost)


def test_soft_argmin_between_and_at_its_ends():
    window = kp.search_window(Grid((5, 5)), 3.0, 0.5)
    truth = torch.tensor([0.3, -0.6])
    bowl = (window - truth).square().sum(-1)[None]
    displacement, spread = kp.soft_argmin(bowl, window, 0.4)
    torch.testing.assert_close(displacement[0], truth, atol=0.02, rtol=0)
    assert spread[0] == pytest.approx(np.sqrt(2 * 0.4 / 2), abs=0.05)  # exp(-x^2 / T) has a variance of T / 2 an axis
    sharp, none = kp.soft_argmin(bowl, window, 1e-6)
    assert sharp[0].tolist() == [0.5, -0.5]
    assert none[0] == 0
    flat, wide = kp.soft_argmin(torch.ones(1, 169), window, 1.0)
    torch.testing.assert_close(flat, torch.zeros(1, 2), atol=1e-6, rtol=0)
    assert wide[0] == pytest.approx(np.sqrt(7.0))  # an axis has a variance of step^2 (13^2 - 1) / 12 = 3.5


def test_soft_argmin_keeps_its_digits_in_mixed_precision():
    window = kp.search_window(Grid((5, 5, 5)), 24.0, 3.0)
    cost = (window - torch.tensor([13.3, -17.6, 20.2])).square().sum(-1)[None].requires_grad_()
    displacement, spread = kp.soft_argmin(cost, window, 9.0)
    expected = torch.autograd.grad(displacement.sum(), cost)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed, wide = kp.soft_argmin(cost, window, 9.0)
    assert mixed.dtype == wide.dtype == torch.float32
    assert torch.equal(mixed, displacement)
    assert torch.equal(wide, spread)
    assert torch.equal(torch.autograd.grad(mixed.sum(), cost)[0], expected)
    half = cost.detach().bfloat16()  # costs may be rounded, candidates and their mean are not
    found, wide = kp.soft_argmin(half, window, 9.0)
    assert found.dtype == wide.dtype == torch.float32
    assert torch.equal(found, kp.soft_argmin(half.float(), window, 9.0)[0])


@pytest.mark.parametrize("method", ["plain", "mean_field", "tree"])
def test_matches_are_the_same_in_mixed_precision(method):
    grid = LARGE[3]
    fixed, moving = pair(grid, lambda points: torch.tensor([1.4, -2.1, 2.6]).expand_as(points))
    points = kp.foerstner(fixed, grid, 20)
    search = kp.Search(5.0, 1.0, method=method)
    expected = kp.match(fixed, moving, grid, grid, points, search)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kp.foerstner(fixed, grid, 20), points)
        found = kp.match(fixed, moving, grid, grid, points, search)
    assert found.moving_mm.dtype == torch.float32
    torch.testing.assert_close(found.moving_mm, expected.moving_mm, atol=1e-3, rtol=0)


# Agreement


def energy(labels, cost, window, edges, weights, truncation) -> float:
    total = sum(float(cost[i, d]) for i, d in enumerate(labels))
    for (i, j), w in zip(edges, weights, strict=True):
        gap = w * float((window[labels[i]] - window[labels[j]]).square().sum())
        total += gap if truncation is None else min(gap, truncation)
    return total


@pytest.mark.parametrize("truncation", [None, 0.3])
@pytest.mark.parametrize("dim", [2, 3])
def test_messages_on_the_tree_find_what_brute_force_finds(dim, truncation):
    window = torch.cartesian_prod(*(torch.tensor(v, dtype=F64) for v in ((-1.0, 0.0, 1.0), (0.0, 1.5), (0.0,))[:dim]))
    points = torch.rand(5, dim, dtype=F64) * 10
    cost = torch.rand(5, len(window), dtype=F64)
    tree = minimum_spanning_tree(cdist(points, points)).tocoo()  # SciPy's, not ours
    weights = 0.8 / np.maximum(tree.data, 1.0)
    edges = list(zip(tree.row, tree.col, strict=True))
    expected = np.full(cost.shape, np.inf)
    for labels in itertools.product(range(len(window)), repeat=5):
        total = energy(labels, cost, window, edges, weights, truncation)
        for i, d in enumerate(labels):
            expected[i, d] = min(expected[i, d], total)
    found = kp.tree_marginals(cost, window, points, 0.8, truncation)
    np.testing.assert_allclose(found, expected - expected.min(1, keepdims=True), atol=1e-12)


def test_the_tree_is_the_shortest_one():
    points = torch.rand(60, 3, dtype=F64)
    levels = agreement._tree_levels(points, 1.0, 1e-9)
    assert sorted(torch.cat([level.nodes for level in levels]).tolist()) == list(range(60))
    total = sum(float((1 / level.weight).sum()) for level in levels[1:])
    assert total == pytest.approx(minimum_spanning_tree(cdist(points, points)).sum())


def test_mean_field_on_two_keypoints_is_the_closed_form():
    # Two bowls with a weight w between them: at low temperature the rounds end where each minimises its own sum.
    window = kp.search_window(Grid((9, 9)), 4.0, 0.25).double()
    centres = torch.tensor([[2.0, -1.0], [-1.0, 1.0]], dtype=F64)
    cost = (window - centres[:, None]).square().sum(-1)
    points, w = torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=F64), 1.0 / 2.0
    regularised = kp.mean_field(cost, window, points, 1.0, 0.05, iterations=60)
    estimate, _ = kp.soft_argmin(regularised, window, 0.05)
    expected = ((1 + w) * centres + w * centres.flip(0)) / (1 + 2 * w)
    torch.testing.assert_close(estimate, expected, atol=1e-3, rtol=0)
    assert kp.mean_field(cost, window, points, 1.0, 0.05, iterations=0) is cost


@pytest.mark.parametrize("method", ["mean_field", "tree"])
def test_agreement_does_not_depend_on_the_order(method):
    window, order = kp.search_window(Grid((5, 5)), 2.0), torch.randperm(30)
    cost, points = torch.rand(30, 25), torch.rand(30, 2) * 20

    def regularised(cost: Tensor, points: Tensor) -> Tensor:
        if method == "tree":
            return kp.tree_marginals(cost, window, points, 0.1)
        return kp.mean_field(cost, window, points, 0.1, 0.1)

    torch.testing.assert_close(regularised(cost[order], points[order]), regularised(cost, points)[order])


@pytest.mark.parametrize("method", ["mean_field", "tree"])
def test_neighbours_outvote_a_keypoint_with_two_minima(method):
    window = kp.search_window(Grid((9, 9)), 4.0)
    points = torch.rand(40, 2) * 30
    truth = torch.tensor([2.0, -1.0])
    bowl = (window - truth).square().sum(-1)
    cost = bowl.expand(40, -1).clone()
    cost[::8] = torch.minimum(bowl + 0.5, (window + 3).square().sum(-1))  # the wrong place is a little cheaper
    if method == "mean_field":
        regularised = kp.mean_field(cost, window, points, 1.0, 0.05)
    else:
        regularised = kp.tree_marginals(cost, window, points, 1.0)
    before, after = (kp.soft_argmin(c, window, 0.05)[0] - truth for c in (cost, regularised))
    assert before.norm(dim=-1).max() > 5
    assert after.norm(dim=-1).max() < 0.5


# Matches

MOTIONS = {
    "translation": lambda x, c: torch.tensor([2.0, -1.5, 2.0])[: len(c)].expand_as(x),
    "affine": lambda x, c: (
        (x - c) @ (0.1 * torch.tensor([[0.5, 0.8, -0.3], [-0.8, -0.5, 0.2], [0.3, -0.2, 0.4]]))[: len(c), : len(c)].T
        + torch.tensor([0.5, -1.0, 0.7])[: len(c)]
    ),
    "wave": lambda x, c: 1.8 * torch.sin(2 * torch.pi * (x - c).roll(-1, -1) / 45 + 0.5),
}


@pytest.mark.parametrize("method", ["plain", "mean_field", "tree"])
@pytest.mark.parametrize("name", MOTIONS)
@pytest.mark.parametrize("dim", [2, 3])
def test_known_motions_are_recovered(dim, name, method):
    grid = LARGE[dim]
    motion = lambda x: MOTIONS[name](x, torch.tensor(grid.centre))  # noqa: E731
    fixed, moving = pair(grid, motion)
    points = kp.foerstner(fixed, grid, 150, window_mm=4.0)
    points = points[staying(points, motion, grid)]
    assert len(points) >= 15
    # Brightness and contrast of the moving image differ: MIND does not see it.
    found = kp.match(fixed, 5 - 2 * moving, grid, grid, points, kp.Search(6.0, method=method))
    error = (found.displacement_mm - motion(points)).norm(dim=-1)
    moved = motion(points).norm(dim=-1)
    limit = {"plain": 1.5, "mean_field": 1.0, "tree": 1.0}[method]
    assert error.median() < limit
    if method != "plain":
        assert error.median() < 0.6 * moved.median()  # what staying put would give


def test_matches_on_a_tiny_anisotropic_grid(grid):
    moving = torch.rand(1, 1, *grid.shape)
    step = torch.tensor(grid.spacing) * torch.tensor([1.0, -1.0, 1.0])[: grid.dim]
    fixed = sample(moving, (grid_points(grid) + step)[None], grid)
    points = points_inside(grid, 6, margin=2, dtype=torch.float32)[0]
    search = kp.Search(2.0, temperature=0.01, method="plain", patch_radius_vox=1)
    found = kp.match(fixed, moving, grid, grid, points, search, features=None)
    assert (found.displacement_mm - step).norm(dim=-1).median() < 0.2


def test_a_large_motion_needs_the_earlier_transform():
    grid = LARGE[3]
    far = torch.tensor([7.0, -6.0, 8.0])
    motion = lambda x: (far + torch.tensor([0.5, 0.8, -1.0])).expand_as(x)  # noqa: E731
    fixed, moving = pair(grid, motion)
    points = kp.foerstner(fixed, grid, 200, window_mm=4.0)
    points = points[staying(points, motion, grid)]
    earlier = Affine(torch.eye(3)[None], far[None], torch.zeros(3))
    search = kp.Search(4.0)
    without = kp.match(fixed, moving, grid, grid, points, search)
    found = kp.match(fixed, moving, grid, grid, points, search, earlier)
    error = (found.displacement_mm - motion(points)).norm(dim=-1)
    assert error.median() < 0.8
    assert (without.displacement_mm - motion(points)).norm(dim=-1).median() > 5
    assert found.confidence.median() > 1.5 * without.confidence.median()


def test_different_grids_share_the_world():
    grid = LARGE[2]
    motion = lambda x: torch.tensor([1.5, -2.0]).expand_as(x)  # noqa: E731
    fixed, moving = pair(grid, motion)
    other = grid.cropped((2, 1), (46, 39))
    part = moving[:, :, 2:46, 1:39]
    points = kp.foerstner(fixed, grid, 60, window_mm=4.0)
    points = points[staying(points, motion, grid, margin_vox=6)]
    whole = kp.match(fixed, moving, grid, grid, points, kp.Search(5.0), features=None)
    cropped = kp.match(fixed, part, grid, other, points, kp.Search(5.0), features=None)
    torch.testing.assert_close(cropped.moving_mm, whole.moving_mm, atol=0.1, rtol=0)


def test_confidence_ranks_what_was_found_above_what_is_gone():
    grid = Grid((96, 80), (1.0, 1.5))
    motion = lambda x: torch.tensor([2.0, -1.5]).expand_as(x)  # noqa: E731
    fixed, moving = pair(grid, motion)
    moving = moving.clone()
    moving[:, :, 48:] = texture(grid, seed=9)[:, :, 48:]  # half of the content is not there any more
    points = kp.foerstner(fixed, grid, 300, window_mm=4.0)
    points = points[staying(points, motion, grid)]
    search = kp.Search(6.0, method="plain", temperature=0.1)
    found = kp.match(fixed, moving, grid, grid, points, search)
    gone = points[:, 0] + 2 > 52
    kept = points[:, 0] + 2 < 44
    wins = (found.confidence[kept][:, None] > found.confidence[gone]).float().mean()
    assert wins > 0.8  # area under the curve; 0.5 by chance
    strong = found.where(found.confidence > 0.5)
    assert 0 < len(strong) < len(found)
    error = (strong.displacement_mm - torch.tensor([2.0, -1.5])).norm(dim=-1)
    assert error.mean() < 0.7 * (found.displacement_mm - torch.tensor([2.0, -1.5])).norm(dim=-1).mean()


def test_the_way_back_ends_where_it_began_only_for_true_matches():
    grid = LARGE[2]
    motion = lambda x: torch.tensor([2.0, -3.0]).expand_as(x)  # noqa: E731
    fixed, moving = pair(grid, motion)
    points = kp.foerstner(fixed, grid, 60, window_mm=4.0)
    points = points[staying(points, motion, grid, margin_vox=5)]
    search = kp.Search(6.0, method="plain", temperature=0.02)
    arguments = (fixed, moving, grid, grid, points)
    right = kp.forward_backward(*arguments, points + motion(points), points, search)
    wrong = kp.forward_backward(*arguments, points + motion(points).flip(-1), points, search)
    assert right.median() < 0.2
    assert wrong.median() > 2


def test_matches_turn_with_the_axes():
    grid = LARGE[3]
    turned = Grid(*(x[::-1] for x in (grid.shape, grid.spacing, grid.origin)))
    fixed, moving = texture(grid, dtype=F64), texture(grid, seed=3, dtype=F64)
    points = points_inside(grid, 20, margin=3)[0]
    search = kp.Search(4.0)
    there = kp.match(fixed, moving, grid, grid, points, search)
    flipped = [x.permute(0, 1, 4, 3, 2).contiguous() for x in (fixed, moving)]
    again = kp.match(*flipped, turned, turned, points.flip(-1), search)
    torch.testing.assert_close(again.moving_mm.flip(-1), there.moving_mm)
    torch.testing.assert_close(again.confidence, there.confidence)


# Little or bad input


@pytest.mark.parametrize("method", ["plain", "mean_field", "tree"])
def test_none_one_and_the_same_keypoint(grid, method):
    image, search = texture(grid), kp.Search(2.0, method=method)
    none = torch.zeros(0, grid.dim)
    assert len(kp.farthest_points(none, 5)) == 0
    empty = kp.match(image, image, grid, grid, none, search)
    assert len(empty) == 0
    assert empty.displacement_mm.shape == (0, grid.dim)
    assert len(empty.where(empty.confidence > 0.5)) == 0
    same = torch.tensor(grid.centre).expand(4, -1)  # all in one place
    for points in (same[:1], same):
        found = kp.match(image, image, grid, grid, points, search)
        assert found.displacement_mm.norm(dim=-1).max() < 0.5
        torch.testing.assert_close(found.moving_mm, found.moving_mm[:1].expand_as(points), atol=1e-2, rtol=0)


def test_no_points_has_gradients_too(grid):
    features = torch.rand(1, 2, *grid.shape, requires_grad=True)
    window = kp.search_window(grid, 2.0)
    cost = kp.cost_volume(features, features, grid, torch.zeros(0, grid.dim), window)
    assert cost.shape == (0, len(window))
    displacement, spread = kp.soft_argmin(cost, window, 1.0)
    assert displacement.shape == (0, grid.dim)
    assert spread.shape == (0,)


@pytest.mark.parametrize("features", [True, False], ids=["mind", "intensities"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1234.5])
def test_a_constant_image_has_no_keypoints_and_no_confident_matches(grid, value, features):
    grid = LARGE[grid.dim]
    image = torch.full((1, 1, *grid.shape), value)
    assert kp.foerstner(image, grid, 10).shape == (0, grid.dim)
    points = points_inside(grid, 5, margin=8, dtype=torch.float32)[0]
    options = {} if features else {"features": None}
    found = kp.match(image, image, grid, grid, points, kp.Search(8.0), **options)
    torch.testing.assert_close(found.moving_mm, points, atol=1e-3, rtol=0)
    assert found.confidence.max() < 0.3


def test_bad_input_gets_one_sentence(grid):
    image, inside = texture(grid), torch.tensor([grid.centre])
    window, search = kp.search_window(grid, 2.0), kp.Search(2.0)
    hurt = image.clone()
    hurt[0, 0, 0, 0] = torch.nan
    outside = torch.cat([inside, inside + 100])
    d, other = grid.dim, Grid((5,) * grid.dim)
    bad = [
        (lambda: kp.foerstner(hurt, grid, 5), "not finite"),
        (lambda: kp.foerstner(image, grid, 0), "count is 0"),
        (lambda: kp.foerstner(image.expand(2, *image.shape[1:]), grid, 5), "holds 2"),
        (lambda: kp.foerstner(image, grid, 5, mask=torch.ones(1, 1, *other.shape)), "mask"),
        (lambda: kp.farthest_points(inside, 0), "count is 0"),
        (lambda: kp.farthest_points(inside, 1, start=1), "start is 1"),
        (lambda: kp.library_keypoints(image, grid, 5, "surf"), "'surf'"),
        (lambda: kp.library_keypoints(image, grid, 5, "orb", axis=3), "axis is 3"),
        (lambda: kp.search_window(grid, 0.5), "no candidate"),
        (lambda: kp.search_window(grid, -1), "no candidate"),
        (lambda: kp.search_window(grid, 1, 0), "positive"),
        (lambda: kp.cost_volume(image, image, grid, inside, window[:0]), "at least one"),
        (lambda: kp.cost_volume(image, image, grid, inside[None], window), f"number x {d}"),
        (lambda: kp.cost_volume(image, image.expand(1, 2, *grid.shape), grid, inside, window), "channels"),
        (lambda: kp.cost_volume(image, image, grid, inside, window, -1), "-1"),
        (lambda: kp.cost_volume(image, image, grid, inside, window, chunk=0), "0"),
        (lambda: kp.soft_argmin(torch.rand(3, 4), window, 1.0), "4 costs"),
        (lambda: kp.soft_argmin(torch.rand(3, len(window)), window, 0.0), "0.0"),
        (lambda: kp.tree_marginals(torch.rand(1, 2), window[[0, -1]], inside, 1.0), "lattice"),
        (lambda: kp.tree_marginals(torch.rand(2, 2), window, inside, 1.0), "keypoints x candidates"),
        (lambda: kp.mean_field(torch.rand(1, len(window)), window, inside, -1.0, 1.0), "-1.0"),
        (lambda: kp.Search(2.0, method="magic"), "'magic'"),
        (lambda: kp.match(hurt, image, grid, grid, inside, search), "fixed image"),
        (lambda: kp.match(image, hurt, grid, grid, inside, search), "moving image"),
        (lambda: kp.match(image, image, grid, grid, outside, search), "1 of 2"),
        (lambda: kp.match(image, image, grid, grid, inside * torch.nan, search), "not finite"),
        (lambda: kp.match(image, image, grid, grid, inside, search, tolerance_mm=0.0), "0.0"),
        (lambda: kp.match(image, image, grid, other, inside, search), "5 x 5"),
        (lambda: kp.Matches(inside, inside * torch.nan, torch.ones(1)), "not finite"),
        (lambda: kp.Matches(inside, inside, torch.full((1,), 1.5)), "between 0 and 1"),
        (lambda: kp.Matches(inside, outside, torch.ones(1)), "a confidence each"),
    ]
    for call, said in bad:
        with pytest.raises(ValueError) as error:
            call()
        assert one_sentence(error.value, said), str(error.value)
