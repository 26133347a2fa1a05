"""Kernel fields: closed forms, SciPy's tree, blocked against plain, gradients, properties, and what is refused."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from torch import Tensor
from truths.fields import GRIDS, LinearField, one_sentence, points_inside

from regteach.grid import Grid
from regteach.ops.classical import gaussian, inverse_distance, local_affine, nearest
from regteach.ops.kernel_field import (
    Attention,
    Gaussian,
    InverseDistance,
    SpatialBias,
    Uniform,
    Weighting,
    kernel_field,
    kernel_field_on,
)
from regteach.ops.kernel_weights import kernel_field_added
from regteach.ops.neighbours import Blocks, among_nearest, k_nearest, squared_distances
from regteach.sampling import flat_points

WEIGHTINGS: dict[str, Weighting] = {
    "uniform": Uniform(),
    "inverse distance": InverseDistance(2.0),
    "Gaussian": Gaussian(3.0),
    "bias": SpatialBias(2.0),
    "attention": Attention(2.0),
}
CHANNELS = 5


def random_case(dim: int, m: int = 40, n: int = 30, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Points, keypoints, values, queries and keys."""
    query = points_inside(GRIDS[dim], n, margin=-1, dtype=dtype)[0]
    keypoints = points_inside(GRIDS[dim], m, margin=-1, dtype=dtype)[0]
    features = [torch.randn(rows, channels, dtype=dtype) for rows, channels in ((m, 3), (n, CHANNELS), (m, CHANNELS))]
    return query, keypoints, *features


def waves(points: Tensor) -> Tensor:
    """A query of each point, ``n c``."""
    phase = torch.arange(CHANNELS).to(points)
    return (0.4 * points.sum(-1, keepdim=True) + points[:, :1] * phase / 7 + phase).sin() * 2


# ---- neighbours ----


def by_distance_and_index(query: np.ndarray, keypoints: np.ndarray, k: int) -> np.ndarray:
    """In integers, so that ties are exact."""
    squared = ((query[:, None] - keypoints[None]) ** 2).sum(-1)
    return np.stack([np.lexsort((np.arange(len(keypoints)), row))[:k] for row in squared])


@pytest.mark.parametrize("dim", [2, 3])
def test_neighbours_are_those_of_a_tree(dim: int) -> None:
    query, keypoints, *_ = random_case(dim, m=300, n=200)
    _, expected = cKDTree(keypoints.numpy()).query(query.numpy(), k=12)
    assert np.array_equal(k_nearest(query, keypoints, 12).numpy(), expected)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("k", [1, 4, 9, 64])
def test_equal_distances_go_by_the_lower_index(dim: int, k: int) -> None:
    lattice = np.array(list(itertools.product(range(4), repeat=dim)))
    keypoints = np.concatenate([lattice, lattice[::3]])  # every distance comes many times, and some places twice
    keypoints = keypoints[np.random.default_rng(0).permutation(len(keypoints))]
    expected = by_distance_and_index(lattice, keypoints, min(k, len(keypoints)))
    found = k_nearest(torch.tensor(lattice).float(), torch.tensor(keypoints).float(), k)
    assert np.array_equal(found.numpy(), expected)


def test_neighbours_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keypoints, *_ = random_case(3)
    whole = k_nearest(query, keypoints, 7)
    monkeypatch.setattr("regteach.ops.neighbours.PAIRS_AT_ONCE", 3 * len(keypoints))
    assert torch.equal(k_nearest(query, keypoints, 7), whole)
    assert k_nearest(query[:0], keypoints, 7).shape == (0, 7)


def test_distances_keep_their_digits_far_from_the_origin() -> None:
    far = torch.full((1, 3), 8192.0)  # float32 has 0.001 mm here; a product of positions would be off by 16 mm^2
    assert squared_distances(far + torch.tensor([0.5, 0.25, 0.0]), far).item() == 0.3125


@pytest.mark.parametrize("edge", [1, 3, 16])
@pytest.mark.parametrize("where", ["inside", "outside", "corner", "one place", "lattice"])
def test_no_neighbour_is_lost_in_blocks(grid: Grid, edge: int, where: str) -> None:
    keypoints = keypoints_at(where, grid, 25)
    voxels = flat_points(grid)[0]
    for k in (1, 6, 25):
        blocks, found = Blocks(grid, keypoints, k, edge), []
        for group in blocks.groups(500):
            squared = group.squared_distances(keypoints[group.candidates])
            inside = among_nearest(squared, k)
            assert int(inside.sum()) == inside[..., 0].numel() * k
            assert not (inside & ~group.real[:, None]).any()
            found.append(group.candidates[inside.nonzero()[:, 0], inside.nonzero()[:, 2]].view(*inside.shape[:2], k))
        index = blocks.to_grid(found).reshape(-1, k)
        assert torch.equal(index, k_nearest(voxels, keypoints, k).sort(dim=1).values)


def keypoints_at(where: str, grid: Grid, m: int, dtype: torch.dtype = torch.float32) -> Tensor:
    low, high = torch.tensor(grid.origin, dtype=dtype), torch.tensor(grid.last, dtype=dtype)
    if where == "inside":
        return points_inside(grid, m, dtype=dtype)[0]
    if where == "outside":
        return high + 5 + 10 * torch.rand(m, grid.dim, dtype=dtype)
    if where == "corner":
        return low + 1.5 * torch.rand(m, grid.dim, dtype=dtype)
    if where == "one place":
        return low.expand(m, -1).clone()
    return flat_points(grid, dtype=dtype)[0][torch.randperm(grid.size)[:m]]  # on voxels: ties everywhere


# ---- closed forms ----


@pytest.mark.parametrize("dim", [2, 3])
def test_one_neighbour_is_the_nearest(dim: int) -> None:
    query, keypoints, values, *_ = random_case(dim)
    expected = values[torch.tensor(cKDTree(keypoints.numpy()).query(query.numpy())[1])]
    for weighting in (Uniform(), InverseDistance(), Gaussian(1.0), SpatialBias(1.0)):
        for taper in (False, True):
            assert torch.allclose(kernel_field(query, keypoints, values, weighting, 1, taper=taper), expected)
    assert torch.equal(nearest(query, keypoints, values), expected)


def test_two_points_by_hand() -> None:
    keypoints, values = torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0], [1.0]])
    query = torch.tensor([[1.0, 0.0]])  # 1 mm from the one, 2 mm from the other

    def far(weighting: Weighting, **more: Any) -> float:
        return kernel_field(query, keypoints, values, weighting, 2, **more).item()

    assert far(Uniform()) == pytest.approx(1 / 2)
    assert far(InverseDistance(1.0)) == pytest.approx(1 / 3)
    assert far(InverseDistance(2.0)) == pytest.approx(1 / 5)
    assert far(Gaussian(2.0)) == pytest.approx(1 / (1 + math.exp(3 / 8)))
    assert far(SpatialBias(2.0)) == pytest.approx(1 / (1 + math.exp(1 / 1.25 - 1 / 2)))
    features = {"queries": torch.tensor([[1.0, 2.0, 0.0, 0.0]]), "keys": torch.tensor([[1.0, 0, 0, 0], [3.0, 1, 0, 0]])}
    assert far(Attention(), **features) == pytest.approx(1 / (1 + math.exp(1 / 2 - 5 / 2)))
    assert far(Attention(2.0), **features) == pytest.approx(1 / (1 + math.exp(0.5 + 0.8 - 2.5 - 0.5)))


def test_the_taper_by_hand() -> None:
    keypoints, values = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-4.0, 0.0]]), torch.eye(3)
    weights = kernel_field(torch.zeros(1, 2), keypoints, values, Uniform(), 3, taper=True)[0]
    factors = torch.tensor([(1 - 1 / 16) ** 2, (1 - 4 / 16) ** 2, 0.0])
    assert torch.allclose(weights, factors / factors.sum(), atol=1e-6)
    # All at one distance: none is tapered more than another.
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert torch.allclose(
        kernel_field(torch.zeros(1, 2), square, values, Uniform(), 3, taper=True), torch.tensor(1 / 3)
    )
    assert torch.allclose(
        kernel_field(square[:1], square[[0, 0, 0]], values, Uniform(), 3, taper=True), torch.tensor(1 / 3)
    )


def test_a_softmax_over_the_neighbours_and_nothing_else() -> None:
    """The formula, one point at a time, in NumPy."""
    query, keypoints, values, queries, keys = random_case(3)
    found = kernel_field(query, keypoints, values, Attention(4.0), 6, queries, keys)
    tree = cKDTree(keypoints.numpy())
    for x, q, f in zip(query.numpy(), queries.numpy(), found.numpy(), strict=True):
        distance, index = tree.query(x, k=6)
        logit = keys.numpy()[index] @ q / math.sqrt(CHANNELS) + 1 / (1 + (distance / 4.0) ** 2)
        weight = np.exp(logit) / np.exp(logit).sum()
        assert np.allclose(weight @ values.numpy()[index], f, atol=1e-12)


def test_more_neighbours_than_keypoints_are_all_keypoints() -> None:
    query, keypoints, values, *_ = random_case(2, m=7)
    mean = values.mean(dim=0).expand(len(query), -1)
    for k in (7, 8, 1000):
        assert torch.allclose(kernel_field(query, keypoints, values, Uniform(), k), mean)
        assert torch.allclose(kernel_field_on(GRIDS[2], keypoints, values, Uniform(), k), mean[0])


def test_a_value_is_met_at_its_keypoint() -> None:
    _, keypoints, values, *_ = random_case(3, m=30)
    for power in (1.0, 2.0, 4.0):
        assert torch.allclose(inverse_distance(keypoints, keypoints, values, k=10, power=power), values, atol=1e-6)
    assert torch.allclose(gaussian(keypoints, keypoints, values, sigma_mm=1e-3), values)


def test_duplicates_count_each_with_equal_weights() -> None:
    keypoints = torch.tensor([[5.0, 5.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    values, query = torch.tensor([[9.0], [1.0], [2.0], [6.0]]), torch.tensor([[0.0, 0.0], [0.1, 0.0]])
    for weighting in (Uniform(), InverseDistance(), Gaussian(2.0), SpatialBias(1.0)):
        assert torch.allclose(kernel_field(query, keypoints, values, weighting, 3), torch.tensor(3.0))
        assert torch.allclose(kernel_field(query, keypoints, values, weighting, 2), torch.tensor(1.5))
        assert torch.allclose(kernel_field_on(Grid((2, 2)), keypoints, values, weighting, 2), torch.tensor(1.5))


# ---- planes ----


@pytest.mark.parametrize("dim", [2, 3])
def test_an_affine_field_is_reproduced_by_planes_and_not_by_means(dim: int) -> None:
    field = LinearField.of(dim)
    query, keypoints, *_ = random_case(dim)
    values, truth = (torch.tensor(field(points.numpy())) for points in (keypoints, query))
    exact = local_affine(query, keypoints, values, k=12, sigma_mm=5.0)
    assert (exact - truth).abs().max() < 1e-4 * truth.abs().max()
    assert (gaussian(query, keypoints, values, k=12, sigma_mm=5.0) - truth).abs().max() > 0.05 * truth.abs().max()
    dense = kernel_field_on(GRIDS[dim], keypoints, values, Gaussian(5.0), 12, degree=1)
    voxels = flat_points(GRIDS[dim], dtype=torch.float64)[0]
    assert np.allclose(dense.reshape(-1, dim).numpy(), field(voxels.numpy()), atol=1e-4 * float(truth.abs().max()))


def test_a_plane_is_the_least_squares_one() -> None:
    query, keypoints, values, *_ = random_case(3)
    found = local_affine(query, keypoints, values, k=9, sigma_mm=6.0)
    tree = cKDTree(keypoints.numpy())
    for x, f in zip(query.numpy(), found.numpy(), strict=True):
        distance, index = tree.query(x, k=9)
        root = np.exp(-(distance**2) / (4 * 6.0**2))[:, None]  # of the weights
        design = np.concatenate([np.ones((9, 1)), keypoints.numpy()[index] - x], axis=1)
        fit = np.linalg.lstsq(root * design, root * values.numpy()[index], rcond=None)[0]
        assert np.allclose(fit[0], f, atol=1e-3 * np.abs(values).max().item())


def test_degenerate_neighbourhoods_have_no_slope_where_they_have_no_spread() -> None:
    line = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    values = torch.tensor([[0.0], [1.0], [2.0]])
    on_and_off = torch.tensor([[3.0, 0.0, 0.0], [3.0, 2.0, 0.0], [3.0, 0.0, 50.0]])
    found = local_affine(on_and_off, line, values, k=3, sigma_mm=100.0)
    assert torch.allclose(found, torch.tensor(3.0), atol=1e-2)
    assert torch.allclose(local_affine(on_and_off, line[:1], values[:1] + 4), torch.tensor(4.0))
    assert torch.allclose(local_affine(on_and_off, line[[0, 0, 0]], values, sigma_mm=100.0), torch.tensor(1.0))


# ---- blocked and plain ----


def both(grid: Grid, keypoints: Tensor, k: int, weighting: Weighting, **more: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradients to positions, values, keys and a parameter of the queries: plain, and blocked."""
    outcomes = []
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(len(keypoints), c, generator=generator).to(keypoints) for c in (2, CHANNELS)]
    like = torch.randn(grid.size, 2, generator=generator).to(keypoints)
    for form in ("plain", "blocked"):
        points, values, keys = (t.clone().requires_grad_() for t in (keypoints, *draw))
        gain = torch.ones(CHANNELS).to(keypoints).requires_grad_()

        def query(x: Tensor, gain: Tensor = gain) -> Tensor:
            return waves(x) * gain

        if form == "plain":
            voxels = flat_points(grid, dtype=keypoints.dtype)[0]
            value = kernel_field(voxels, points, values, weighting, k, query(voxels), keys, **more)
        else:
            value = kernel_field_on(
                grid, points, values, weighting, k, query, keys, edge_vox=3, pairs_at_once=2000, **more
            ).flatten(0, -2)
        gradients = torch.autograd.grad((value * like).sum(), [points, values, keys, gain], allow_unused=True)
        outcomes.append([value.detach(), *(torch.zeros(()) if g is None else g for g in gradients)])
    return outcomes[0], outcomes[1]


def differs(plain: list[Tensor], blocked: list[Tensor]) -> tuple[float, float]:
    """Of the values, and of the gradients, relative to the largest of each."""
    pairs = zip(plain, blocked, strict=True)
    value, *gradients = (float((a - b).abs().max() / a.abs().max().clamp_min(1e-3)) for a, b in pairs)
    return value, max(gradients)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("where", ["inside", "outside", "corner", "lattice"])
def test_blocked_is_plain(grid: Grid, name: str, where: str) -> None:
    for k, taper in ((6, False), (6, True), (25, False)):
        keypoints = keypoints_at(where, grid, 25, torch.float64)
        if where == "lattice" and name == "inverse distance":
            keypoints = keypoints + 0.25  # at a keypoint the slope of these weights is a spike, not a number
        assert max(differs(*both(grid, keypoints, k, WEIGHTINGS[name], taper=taper))) < 1e-10
        value, gradient = differs(*both(grid, keypoints.float(), k, WEIGHTINGS[name], taper=taper))
        assert value < 1e-5
        assert gradient < 1e-4  # sums over hundreds of voxels, of terms that cancel: rounding in either form


@pytest.mark.parametrize("where", ["inside", "corner"])
def test_blocked_planes_are_plain_ones(grid: Grid, where: str) -> None:
    keypoints = keypoints_at(where, grid, 25, torch.float64)
    assert max(differs(*both(grid, keypoints, 8, Gaussian(6.0), degree=1))) < 1e-8


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    spacing=st.floats(0.3, 4.0),
    stretch=st.floats(0.3, 3.0),
    m=st.integers(1, 30),
    k=st.integers(1, 12),
    edge=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_blocked_is_plain_on_any_grid(
    shape: list[int], spacing: float, stretch: float, m: int, k: int, edge: int, seed: int
) -> None:
    dim, generator = len(shape), torch.Generator().manual_seed(seed)
    grid = Grid(tuple(shape), tuple(spacing * stretch**axis for axis in range(dim)), tuple(range(-40, -40 + dim)))
    spread = torch.tensor(grid.extent) * torch.rand(dim, generator=generator) * 2
    keypoints = torch.tensor(grid.centre) + spread * (torch.rand(m, dim, generator=generator) - 0.5)
    values = torch.randn(m, 2, generator=generator)
    plain = kernel_field(flat_points(grid)[0], keypoints, values, Gaussian(3 * spacing), k)
    blocked = kernel_field_on(grid, keypoints, values, Gaussian(3 * spacing), k, edge_vox=edge)
    assert blocked.shape == (*grid.shape, 2)
    assert torch.allclose(blocked.reshape(-1, 2), plain, atol=1e-5)


def test_the_groups_and_the_blocks_change_nothing(grid: Grid) -> None:
    _, keypoints, values, _, keys = random_case(grid.dim)
    fields = [
        kernel_field_on(grid, keypoints, values, Attention(2.0), 5, waves, keys, edge_vox=edge, pairs_at_once=pairs)
        for edge, pairs in ((1, 1), (4, 2**20), (100, 10**9))
    ]
    assert all(torch.allclose(field, fields[0], atol=1e-12) for field in fields)


@pytest.mark.parametrize("edge", [1, 2, 3, 4, 5, 6, 7, 12, 16, 20])
@pytest.mark.parametrize("degree", [0, 1])
def test_keypoints_are_added_in_blocks_of_any_size(edge: int, degree: int) -> None:
    """Also where the edge does not divide the 16 voxels of the large blocks."""
    grid = Grid((23, 18, 20), (1.0, 1.5, 2.0), (-3.0, 5.0, 10.5))
    keypoints = points_inside(grid, 70)[0]
    values = torch.randn(70, 3, dtype=torch.float64)
    settings: dict[str, Any] = {"weighting": Gaussian(4.0), "k": 6, "taper": True, "degree": degree}
    before = kernel_field_on(grid, keypoints[:66], values[:66], **settings)
    expected = kernel_field_on(grid, keypoints, values, **settings)
    found = kernel_field_added(before, 66, grid, keypoints, values, edge_vox=edge, **settings)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    same = (expected == before).all(-1)
    assert 0 < same.sum() < grid.size


def test_nothing_as_large_as_voxels_times_neighbours_times_channels_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, (m, k, channels) = Grid((40, 40, 40)), (100, 20, 32)
    keypoints, values, keys = 40 * torch.rand(m, 3), torch.randn(m, 3), torch.randn(m, channels)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    with Watch(), torch.no_grad():
        kernel_field_on(grid, keypoints, values, Attention(), k, lambda x: x.new_ones(len(x), channels), keys)
    assert largest < 4 * grid.size * k * channels / 10
    with Watch(), torch.no_grad():  # and the watch sees what it should
        voxels = flat_points(grid)[0]
        kernel_field(voxels, keypoints, values, Attention(), k, voxels.new_ones(len(voxels), channels), keys)
    assert largest >= 4 * grid.size * k * channels


# ---- gradients ----


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize(("taper", "degree"), [(False, 0), (True, 0), (False, 1)])
def test_gradients_of_the_plain_form(name: str, taper: bool, degree: int) -> None:
    query, keypoints, values, queries, keys = (t.requires_grad_() for t in random_case(2, m=9, n=3))

    def field(*tensors: Tensor) -> Tensor:
        x, y, f, q, k = tensors
        return kernel_field(x, y, f, WEIGHTINGS[name], 5, q, k, taper, degree)

    assert torch.autograd.gradcheck(field, (query, keypoints, values, queries, keys))


def test_gradients_of_the_blocked_form_and_of_learned_lengths() -> None:
    _, keypoints, values, _, keys = (t.requires_grad_() for t in random_case(3, m=8))
    length = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    grid = Grid((3, 2, 4), (1.0, 1.5, 2.0), GRIDS[3].origin)

    def field(y: Tensor, f: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        learned = kernel_field_on(grid, y, f, Attention(scale), 4, waves, k, edge_vox=2, pairs_at_once=100)
        return learned + kernel_field_on(grid, y, f, Gaussian(scale), 4, edge_vox=2, taper=True)

    assert torch.autograd.gradcheck(field, (keypoints, values, keys, length))


# ---- properties ----


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_mean_stays_in_the_hull_and_keeps_a_constant(grid: Grid, name: str) -> None:
    _, keypoints, values, _, keys = random_case(grid.dim)
    for taper in (False, True):
        field = kernel_field_on(grid, keypoints, values, WEIGHTINGS[name], 7, waves, keys, taper)
        assert (field <= values.amax(0) + 1e-12).all()
        assert (field >= values.amin(0) - 1e-12).all()
        constant = kernel_field_on(grid, keypoints, 0 * values + 2.5, WEIGHTINGS[name], 7, waves, keys, taper)
        assert torch.allclose(constant, torch.tensor(2.5, dtype=torch.float64))


@pytest.mark.parametrize("degree", [0, 1])
def test_moved_and_turned_space_moves_and_turns_the_field(grid: Grid, degree: int) -> None:
    _, keypoints, values, *_ = random_case(grid.dim)
    field = kernel_field_on(grid, keypoints, values, Gaussian(4.0), 7, degree=degree, taper=True)
    shift = torch.arange(1.0, grid.dim + 1, dtype=torch.float64) * 64
    moved = Grid(grid.shape, grid.spacing, tuple(o + float(s) for o, s in zip(grid.origin, shift, strict=True)))
    there = kernel_field_on(moved, keypoints + shift, values, Gaussian(4.0), 7, degree=degree, taper=True)
    assert torch.allclose(there, field, atol=1e-9)
    for order in itertools.permutations(range(grid.dim)):
        shape, spacing, origin = (tuple(part[a] for a in order) for part in (grid.shape, grid.spacing, grid.origin))
        turned = Grid(tuple(map(int, shape)), spacing, origin)
        there = kernel_field_on(turned, keypoints[:, list(order)], values, Gaussian(4.0), 7, degree=degree, taper=True)
        assert torch.allclose(there, field.permute(*order, grid.dim), atol=1e-9)


def test_the_order_of_the_keypoints_is_nothing() -> None:
    query, keypoints, values, queries, keys = random_case(3)
    field = kernel_field(query, keypoints, values, Attention(3.0), 7, queries, keys)
    order = torch.randperm(len(keypoints))
    again = kernel_field(query, keypoints[order], values[order], Attention(3.0), 7, queries, keys[order])
    assert torch.allclose(again, field, atol=1e-12)


@pytest.mark.parametrize("name", ["uniform", "Gaussian", "bias", "inverse distance"])
def test_tapered_fields_do_not_jump_where_the_neighbours_change(name: str) -> None:
    _, keypoints, values, *_ = random_case(2)
    line = torch.stack([torch.linspace(-3, 3, 40001, dtype=torch.float64), torch.full((40001,), 9.3)], dim=1)

    def largest_step(points: Tensor, taper: bool) -> float:
        field = kernel_field(points, keypoints, values, WEIGHTINGS[name], 6, taper=taper)
        return float(field.diff(dim=0).abs().max())

    # Steps of a continuous field shrink with those along the line; a jump stays as high as it is.
    coarse, fine = (largest_step(line[::step], taper=True) for step in (100, 1))
    assert fine < coarse / 30
    assert largest_step(line, taper=False) > 10 * fine


def test_half_precision_and_autocast_keep_float32() -> None:
    query, keypoints, values, queries, keys = random_case(3, dtype=torch.float32)
    field = kernel_field(query, keypoints, values, Attention(2.0), 5, queries, keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernel_field(query, keypoints, values, Attention(2.0), 5, queries, keys), field)
        dense = kernel_field_on(GRIDS[3], keypoints, values, Attention(2.0), 5, waves, keys)
    assert torch.equal(dense, kernel_field_on(GRIDS[3], keypoints, values, Attention(2.0), 5, waves, keys))
    half = kernel_field(query, keypoints, values.half(), Attention(2.0), 5, queries.bfloat16(), keys.bfloat16())
    assert half.dtype == torch.float32
    large = torch.full((len(keypoints), 3), 60000.0).half()  # finite, though their sum is not in half precision
    assert torch.allclose(kernel_field(query, keypoints, large, Uniform(), 5), large[0].float())
    assert kernel_field(query.double(), keypoints, values, Uniform(), 5).dtype == torch.float64


def test_no_points_have_no_field() -> None:
    _, keypoints, values, *_ = random_case(3)
    assert kernel_field(keypoints[:0], keypoints, values, Uniform(), 5).shape == (0, 3)
    assert local_affine(keypoints[:0], keypoints, values).shape == (0, 3)


# ---- what is refused ----


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no keypoints": ({"keypoints_mm": torch.zeros(0, 3), "values": torch.zeros(0, 3)}, "no keypoints"),
    "a batch": ({"keypoints_mm": torch.zeros(1, 9, 3)}, "(1, 9, 3)"),
    "one coordinate": ({"keypoints_mm": torch.zeros(9, 1)}, "(9, 1)"),
    "too few values": ({"values": torch.zeros(8, 3)}, "9 keypoints"),
    "flat values": ({"values": torch.zeros(9)}, "(9,)"),
    "a keypoint that is NaN": ({"keypoints_mm": torch.full((9, 3), math.nan)}, "27"),
    "a value that is infinite": ({"values": torch.eye(9, 3) / torch.zeros(1)}, "values"),
    "no neighbours": ({"k": 0}, "k is 0"),
    "another degree": ({"degree": 2}, "2"),
    "keys of other keypoints": ({"keys": torch.zeros(8, 4)}, "9 rows of keys"),
    "keys without channels": ({"keys": torch.zeros(9, 0)}, "(9, 0)"),
    "keys that are NaN": ({"keys": torch.full((9, 4), math.nan)}, "keys"),
    "keys of other channels": ({"keys": torch.zeros(9, 5)}, "4 channels"),
    "no keys": ({"keys": None}, "only one of them"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_a_sentence(name: str) -> None:
    changes, said = BAD[name]
    good: dict[str, Any] = {"keypoints_mm": torch.rand(9, 3), "values": torch.rand(9, 3), "weighting": Attention()}
    good |= {"k": 4, "keys": torch.rand(9, 4)}

    def plain(**more: Any) -> Tensor:
        return kernel_field(torch.rand(5, 3), queries=torch.rand(5, 4), **more)

    def dense(**more: Any) -> Tensor:
        return kernel_field_on(Grid((3, 3, 3)), query_function=lambda x: x.new_ones(len(x), 4), **more)

    for form in (plain, dense):
        form(**good)
        with pytest.raises(ValueError) as error:
            form(**good | changes)
        assert one_sentence(error.value, said)


def test_more_bad_input_is_refused_in_a_sentence() -> None:
    keypoints, values, keys = torch.rand(9, 3), torch.rand(9, 3), torch.rand(9, 4)
    bad: list[tuple[Callable[[], object], str]] = [
        (lambda: kernel_field(torch.rand(5, 2), keypoints, values, Uniform(), 3), "(5, 2)"),
        (lambda: kernel_field(torch.rand(5, 3) / 0, keypoints, values, Uniform(), 3), "points"),
        (lambda: kernel_field(torch.rand(5, 3), keypoints, values, Attention(), 3), "none were given"),
        (lambda: kernel_field(torch.rand(5, 3), keypoints, values, Uniform(), 3, torch.rand(4, 4), keys), "5 rows"),
        (lambda: kernel_field_on(Grid((4, 4)), keypoints, values, Uniform(), 3), "3 coordinates"),
        (lambda: kernel_field_on(Grid((4, 4, 4)), keypoints, values, Uniform(), 3, edge_vox=0), "edge_vox"),
        (lambda: kernel_field_on(Grid((4, 4, 4)), keypoints, values, Uniform(), 3, lambda x: x, keys), "3 channels"),
        (lambda: kernel_field_on(Grid((4, 4, 4)), keypoints, values, Uniform(), 3, lambda x: x[:2], keys), "rows of"),
        (lambda: Gaussian(0.0), "sigma_mm"),
        (lambda: InverseDistance(-1.0), "power"),
        (lambda: SpatialBias(math.nan), "scale_mm"),
        (lambda: Attention(0.0), "scale_mm"),
    ]
    for call, said in bad:
        with pytest.raises(ValueError) as error:
            call()
        assert one_sentence(error.value, said)


def test_a_weighting_of_ones_own() -> None:
    class Exponential:
        def logits(self, squared: Tensor, products: Tensor | None) -> Tensor:
            return -squared.sqrt()

    query, keypoints, values, *_ = random_case(3)
    found = kernel_field(query, keypoints, values, Exponential(), 4)
    distance, index = cKDTree(keypoints.numpy()).query(query.numpy(), k=4)
    weight = np.exp(-distance) / np.exp(-distance).sum(1, keepdims=True)
    assert np.allclose(np.einsum("nk,nkv->nv", weight, values.numpy()[index]), found.numpy())
