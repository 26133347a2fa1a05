"""Attention to the grid points near moving points: the formulas by a loop in NumPy, windows by SciPy, symmetries.

Windows jump where a point is as far from one grid point as from the next, so random positions keep away from there.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch import Tensor
from truths.fields import GRIDS, one_sentence, positions

from regteach.grid import Grid
from regteach.ops.neighbourhood import (
    fourier_features,
    in_slabs,
    neighbourhood_attention,
    neighbourhood_attention_plain,
    parent_attention,
    parent_attention_plain,
    windows,
)
from regteach.sampling import grid_points

CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10}
WINDOWS = (1, 2, 3, 4, 5)
LEAVES = ("query", "features", "points", "moved")  # what has a gradient
SMALL = Grid((3, 4, 2), spacing=(1.0, 1.5, 2.0), origin=(-3.0, 5.0, 10.5))
FLAT = Grid((6, 1, 5), spacing=(1.5, 4.0, 1.0), origin=(2.0, -7.0, 1.0))
EVERY_GRID = [GRIDS[2], GRIDS[3], SMALL, FLAT]
grids = pytest.mark.parametrize("grid", EVERY_GRID, ids=lambda grid: "x".join(map(str, grid.shape)))
forms = pytest.mark.parametrize("attention", [neighbourhood_attention_plain, neighbourhood_attention])
parent_forms = pytest.mark.parametrize("attention", [parent_attention_plain, parent_attention])


@dataclass(frozen=True)
class Case:
    """What the two operations ask for. Parents lie on the grid and have moved; children rest where the points are."""

    query: Tensor
    features: Tensor
    points: Tensor
    moved: Tensor
    rest: Tensor
    grid: Grid
    window: int
    frequencies: Tensor
    length_mm: float

    def near(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("moved", "rest")}

    def parents(self) -> dict[str, Any]:
        return dict(vars(self))


def case(
    grid: Grid, window: int, batch: int = 2, n: int = 40, c: int = 8, dtype: torch.dtype = torch.float64, out: float = 2
) -> Case:
    """Random inputs; the points reach ``out`` voxels beyond the border, half of them inside."""
    rng = np.random.default_rng(7)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    def somewhere(beyond: float) -> Tensor:
        """Between two switches of the window, which are voxels for an even one and half-way for an odd one."""
        shape = np.array(grid.shape)
        cell = np.floor(rng.uniform(-beyond, shape - 1 + beyond + (beyond == 0), (batch, n // 2, grid.dim)))
        vox = cell + rng.uniform(0.05, 0.95, cell.shape) - 0.5 * (window % 2)
        return torch.from_numpy(vox * grid.spacing + grid.origin).to(dtype)

    points = torch.cat([somewhere(0), somewhere(out)], dim=1)
    moved = grid_points(grid, dtype=dtype) + 0.7 * normal(batch, *grid.shape, grid.dim)
    frequencies = 2 * normal(grid.dim, c // 2)
    near = points + 0.5 * normal(*points.shape)
    return Case(
        normal(batch, n, c), normal(batch, c, *grid.shape), near, moved, points, grid, window, frequencies, 9.0
    )  # fmt: skip


def at_rest(given: Case) -> Case:
    """Points where the windows are known: those that are away from the switches."""
    return replace(given, points=given.rest)


# ---- the truths ----


def nearest_on_axis(t: float, n: int, window: int) -> list[int]:
    """The nearest of all integers, by SciPy's tree, that are on the axis; of two that are as near, the lower one.

    A position beyond the axis counts as its end.
    """
    integers = np.arange(-window - 1, n + window + 1)
    at = min(max(t, 0), n - 1) - 1e-6
    nearest = cKDTree(integers[:, None]).query([[at]], k=[*range(1, window + 1)])[1][0]
    return sorted(int(i) for i in integers[nearest] if 0 <= i < n)


def neighbours(point: np.ndarray, grid: Grid, window: int) -> list[tuple[int, ...]]:
    vox = (point - grid.origin) / grid.spacing
    axes = [nearest_on_axis(t, n, window) for t, n in zip(vox, grid.shape, strict=True)]
    return list(itertools.product(*axes))


def loop(given: Case, parents: bool, chosen: Callable[..., list[tuple[int, ...]]] = neighbours) -> np.ndarray:
    """The formulas, one point and one neighbour at a time."""
    query, features, points = given.query.numpy(), given.features.numpy(), given.points.numpy()
    who = given.rest.numpy() if parents else points
    where = given.moved.numpy() if parents else np.broadcast_to(positions(given.grid), given.moved.shape)
    result = np.zeros_like(query)
    for b, i in np.ndindex(query.shape[:2]):
        said = []
        for j in chosen(who[b, i], given.grid, given.window):
            turns = (points[b, i] - where[(b, *j)]) @ given.frequencies.numpy() / given.length_mm
            g = np.concatenate([np.sin(2 * np.pi * turns), np.cos(2 * np.pi * turns)])
            said.append(features[(b, slice(None), *j)] + g)
        logits = np.array([query[b, i] @ m for m in said])
        weights = np.exp(logits - logits.max())
        result[b, i] = (weights / weights.sum()) @ np.array(said)
    return result


def both(function: Callable[..., Tensor], given: dict[str, Any], seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """Value, and the gradients of a random sum of it by name."""
    leaves = {name: given[name].clone().requires_grad_() for name in LEAVES if name in given}
    value = function(**(given | leaves))
    ask = torch.from_numpy(np.random.default_rng(seed).standard_normal(value.shape)).to(value.dtype)
    found = torch.autograd.grad((value * ask).sum(), list(leaves.values()))
    return value.detach(), dict(zip(leaves, found, strict=True))


def assert_same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]], close: float) -> None:
    """Relative to the largest number, value and every gradient."""
    assert a[1].keys() == b[1].keys()
    for x, y in [(a[0], b[0]), *((a[1][name], b[1][name]) for name in a[1])]:
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert float((x - y).abs().max()) <= close * max(1.0, float(y.abs().max()))


def kept_bytes(function: Callable[..., Tensor], given: dict[str, Any]) -> int:
    """What backward holds: storages, each counted once, and the inputs themselves."""
    needs = {name: given[name].clone().requires_grad_() for name in LEAVES if name in given}
    held = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in needs.values()}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage()  # kept alive, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(**(given | needs))
    return sum(storage.nbytes() for storage in held.values())


# ---- the embedding ----


def test_the_embedding_is_sines_then_cosines_of_turns() -> None:
    frequencies = torch.tensor([[1.0, 0.25], [0.0, 2.0]], dtype=torch.float64)
    offsets = torch.tensor([[1.0, 0.0], [0.0, 0.5], [4.0, 4.0]], dtype=torch.float64)
    found = fourier_features(offsets, frequencies, 4.0)
    quarter, sixteenth = 1.0, np.sin(np.pi / 8)
    expected = [
        [quarter, sixteenth, 0, np.cos(np.pi / 8)],
        [0, 1.0, 1, 0.0],  # half a millimetre at two turns in four: a quarter of a turn
        [0, 1.0, 1, 0.0],  # one turn; two turns and a quarter
    ]
    assert np.allclose(found.numpy(), expected, atol=1e-12)


# ---- which neighbours ----


@grids
@pytest.mark.parametrize("window", WINDOWS)
def test_neighbours_are_the_nearest_of_each_axis(grid: Grid, window: int) -> None:
    points = case(grid, window, n=60).rest
    numbers, there = windows(points, grid, window)
    assert numbers.shape == there.shape == (*points.shape[:-1], window**grid.dim)
    assert int(numbers.min()) >= 0
    assert int(numbers.max()) < grid.size
    for b, i in np.ndindex(*points.shape[:2]):
        nearest = neighbours(points[b, i].numpy(), grid, window)
        found = [tuple(map(int, np.unravel_index(j, grid.shape))) for j in numbers[b, i][there[b, i]]]
        assert found == nearest  # in order: the last axis runs fastest


@pytest.mark.parametrize("window", [2, 4, 6])
def test_even_windows_lie_round_the_point(window: int) -> None:
    grid = Grid((11, 12), (1.0, 1.5), (-3.0, 5.0))
    middle = torch.tensor([[[5.5, 6.5]]], dtype=torch.float64) * torch.tensor(grid.spacing) + torch.tensor(grid.origin)
    numbers, there = windows(middle, grid, window)
    offsets = grid_points(grid, dtype=torch.float64).flatten(0, -2)[numbers[0, 0]] - middle[0]
    assert bool(there.all())
    assert torch.allclose(offsets.mean(0), torch.zeros(2, dtype=torch.float64))
    moved, _ = windows(middle + 0.49 * torch.tensor(grid.spacing), grid, window)
    assert torch.equal(moved, numbers)  # half a voxel to either side, and it is still the nearest
    moved, _ = windows(middle - 0.49 * torch.tensor(grid.spacing), grid, window)
    assert torch.equal(moved, numbers)


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_a_tie_is_a_nearest_window_and_does_not_hang_on_rounding(window: int) -> None:
    grid = Grid((9, 10), (0.7, 1.3), (-71.3, 105.9))
    vox = torch.cartesian_prod(torch.arange(2, 7), torch.arange(2, 7)).double() + 0.5 * ((window + 1) % 2 == 0)
    points = vox * torch.tensor(grid.spacing, dtype=torch.float64) + torch.tensor(grid.origin, dtype=torch.float64)
    numbers, there = windows(points, grid, window)
    assert bool(there.all())
    index = torch.stack([numbers // grid.shape[1], numbers % grid.shape[1]], dim=-1)
    assert float((index - vox[:, None]).abs().max()) == pytest.approx(window / 2)
    for nudged in (points - 1e-5, points + 1e-5, points.float()):
        assert torch.equal(windows(nudged, grid, window)[0], numbers)


@grids
@pytest.mark.parametrize("window", WINDOWS)
def test_a_point_far_outside_sees_the_border_nearest_to_it(grid: Grid, window: int) -> None:
    n, inner = grid.shape[0], grid.size // grid.shape[0]
    for side, border in ((1, n - 1), (-1, 0)):
        far = torch.tensor(grid.centre) + side * 1000.0 * torch.eye(grid.dim)[:1]
        numbers, there = windows(far, grid, window)
        seen = {int(j) // inner for j in numbers[there]}
        assert border in seen
        assert max(abs(j - border) for j in seen) <= window // 2
    everywhere = 40 * torch.randn(1, 200, grid.dim) * torch.tensor(grid.extent)
    assert bool(windows(everywhere, grid, window)[1].any(dim=-1).all())


@grids
@forms
def test_a_window_that_reaches_everywhere_is_attention_to_all_of_the_grid(
    grid: Grid, attention: Callable[..., Tensor]
) -> None:
    if grid.size > 100:
        grid = grid.cropped((0,) * grid.dim, (4,) * grid.dim)
    given = at_rest(case(grid, 2 * max(grid.shape) - 1, n=10))
    expected = loop(given, parents=False, chosen=lambda *_: list(np.ndindex(*grid.shape)))
    assert np.allclose(attention(**given.near()).numpy(), expected, atol=1e-10)


# ---- the formulas ----


@grids
@forms
@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_attention_is_the_loop(grid: Grid, attention: Callable[..., Tensor], window: int) -> None:
    given = at_rest(case(grid, window, n=16))
    assert np.allclose(attention(**given.near()).numpy(), loop(given, parents=False), atol=1e-10)


@grids
@parent_forms
@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_parent_attention_is_the_loop(grid: Grid, attention: Callable[..., Tensor], window: int) -> None:
    given = case(grid, window, n=16)
    assert np.allclose(attention(**given.parents()).numpy(), loop(given, parents=True), atol=1e-10)


@grids
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_refactored_form_is_the_plain_one(grid: Grid, window: int, dtype: torch.dtype) -> None:
    given = case(grid, window, dtype=dtype)
    near = at_rest(given).near()
    assert_same(both(neighbourhood_attention, near), both(neighbourhood_attention_plain, near), CLOSE[dtype])
    moved = given.parents()
    assert_same(both(parent_attention, moved), both(parent_attention_plain, moved), CLOSE[dtype])


@pytest.mark.parametrize("c", [2, 6, 32])
def test_more_points_than_a_block_holds(c: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regteach.ops.neighbourhood.BLOCK_BYTES", {"cpu": 27 * c * 8 * 7})  # seven points
    given = case(GRIDS[3], 3, n=40, c=c)
    near = at_rest(given).near()
    assert_same(both(neighbourhood_attention, near), both(neighbourhood_attention_plain, near), 1e-10)
    assert_same(both(parent_attention, given.parents()), both(parent_attention_plain, given.parents()), 1e-10)


@grids
@pytest.mark.parametrize("window", [2, 3])
def test_gradients_are_the_differences(grid: Grid, window: int) -> None:
    given = case(grid.cropped((0,) * grid.dim, [min(n, 3) for n in grid.shape]), window, n=4, c=4)
    near, parents = at_rest(given).near(), given.parents()
    for function, inputs in ((neighbourhood_attention, near), (parent_attention, parents)):
        names = [name for name in LEAVES if name in inputs]

        def of(*leaves: Tensor, function=function, inputs=inputs, names=names) -> Tensor:
            return function(**(inputs | dict(zip(names, leaves, strict=True))))

        assert torch.autograd.gradcheck(of, [inputs[name].clone().requires_grad_() for name in names], fast_mode=True)


@pytest.mark.parametrize("wanted", ["query", "features", "points"])
def test_one_gradient_alone(wanted: str) -> None:
    given = at_rest(case(GRIDS[3], 3)).near()
    all_of_them = both(neighbourhood_attention, given)[1]
    leaf = given[wanted].clone().requires_grad_()
    value = neighbourhood_attention(**(given | {wanted: leaf}))
    ask = torch.from_numpy(np.random.default_rng(3).standard_normal(value.shape))
    assert torch.allclose(torch.autograd.grad((value * ask).sum(), leaf)[0], all_of_them[wanted])


def test_a_second_derivative_is_refused() -> None:
    given = at_rest(case(GRIDS[2], 3)).near()
    query = given["query"].clone().requires_grad_()
    value = neighbourhood_attention(**(given | {"query": query}))
    (slope,) = torch.autograd.grad((value**2).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


# ---- what follows from the formulas ----


@grids
@forms
def test_nothing_beyond_the_border_has_weight(grid: Grid, attention: Callable[..., Tensor]) -> None:
    """A padded grid with a margin that shouts, and is masked, says what the grid alone says."""
    window, pad = 3, 3
    given = at_rest(case(grid, window, n=16, out=0.9))
    shouting = torch.nn.functional.pad(given.features, (pad, pad) * grid.dim, value=1e3)
    around = grid.padded(pad, pad)

    def masked(point: np.ndarray, padded: Grid, k: int) -> list[tuple[int, ...]]:
        inner = np.clip(point, grid.origin, grid.last)
        return [j for j in neighbours(inner, padded, k) if all(pad <= i < pad + n for i, n in zip(j, grid.shape))]  # noqa: B905

    expected = loop(replace(given, features=shouting, grid=around, moved=torch.zeros(2, *around.shape, grid.dim)),
                    parents=False, chosen=masked)  # fmt: skip
    assert np.allclose(attention(**given.near()).numpy(), expected, atol=1e-10)
    heard = attention(**(given.near() | {"features": shouting, "grid": around}))
    assert float((heard - torch.from_numpy(expected)).abs().max()) > 1  # unmasked, the margin is heard


@grids
@pytest.mark.parametrize("window", [2, 3])
def test_features_that_no_window_holds_get_no_gradient(grid: Grid, window: int) -> None:
    given = at_rest(case(grid, window, n=2)).near()
    gradient = both(neighbourhood_attention, given)[1]["features"]
    for b in range(2):
        held = {j for point in given["points"][b].numpy() for j in neighbours(point, grid, window)}
        felt = {tuple(map(int, j)) for j in gradient[b].abs().sum(0).nonzero()}
        assert felt == held


@grids
@forms
def test_weights_add_up_to_one(grid: Grid, attention: Callable[..., Tensor]) -> None:
    given = at_rest(case(grid, 3))
    constant = torch.arange(8.0, dtype=torch.float64).view(8, *[1] * grid.dim).expand_as(given.features)
    nothing = given.near() | {"features": torch.zeros_like(given.features)}
    raised = attention(**(given.near() | {"features": constant})) - attention(**nothing)
    assert torch.allclose(raised, torch.arange(8.0, dtype=torch.float64).expand_as(raised))


@forms
def test_a_query_of_nothing_takes_the_mean(attention: Callable[..., Tensor]) -> None:
    given = at_rest(case(GRIDS[3], 3))
    found = attention(**(given.near() | {"query": torch.zeros_like(given.query)}))
    said = np.zeros(found.shape)
    for b, i in np.ndindex(*found.shape[:2]):
        point = given.points[b, i].numpy()
        near = neighbours(point, GRIDS[3], 3)
        offsets = torch.from_numpy(np.stack([point - positions(GRIDS[3])[j] for j in near]))
        embedded = fourier_features(offsets, given.frequencies, given.length_mm).numpy()
        said[b, i] = np.mean([given.features[b, :, *j].numpy() for j in near] + embedded, axis=0)
    assert np.allclose(found.numpy(), said)


@forms
def test_logits_of_thousands_take_the_loudest(attention: Callable[..., Tensor]) -> None:
    given = at_rest(case(GRIDS[3], 3, dtype=torch.float32))
    found, slopes = both(attention, given.near() | {"query": 1e4 * given.query})
    assert bool(found.isfinite().all())
    assert all(bool(slope.isfinite().all()) for slope in slopes.values())


@grids
@pytest.mark.parametrize("window", [2, 3])
def test_axes_can_be_exchanged(grid: Grid, window: int) -> None:
    given = case(grid, window)
    for order in itertools.permutations(range(grid.dim)):
        take = list(order)
        turned = replace(
            given,
            features=given.features.permute(0, 1, *(2 + axis for axis in order)),
            points=given.points[..., take], rest=given.rest[..., take], frequencies=given.frequencies[take],
            moved=given.moved.permute(0, *(1 + axis for axis in order), grid.dim + 1)[..., take],
            grid=Grid(*(tuple(getattr(grid, name)[a] for a in order) for name in ("shape", "spacing", "origin"))),
        )  # fmt: skip
        near = neighbourhood_attention(**at_rest(given).near())
        assert torch.allclose(neighbourhood_attention(**at_rest(turned).near()), near)
        assert torch.allclose(parent_attention(**turned.parents()), parent_attention(**given.parents()))


@grids
def test_only_where_things_are_from_each_other_matters(grid: Grid) -> None:
    given = case(grid, 3)
    shift = 100 * torch.randn(grid.dim, dtype=torch.float64)
    origin = tuple(o + float(s) for o, s in zip(grid.origin, shift, strict=True))
    away = replace(given, points=given.points + shift, rest=given.rest + shift, moved=given.moved + shift,
                   grid=replace(grid, origin=origin))  # fmt: skip
    near = neighbourhood_attention(**at_rest(given).near())
    assert torch.allclose(neighbourhood_attention(**at_rest(away).near()), near)
    parents = parent_attention(**given.parents())
    assert torch.allclose(parent_attention(**away.parents()), parents)
    # Parents are who they were at rest: where everybody went together changes nothing either.
    together = replace(given, points=given.points + shift, moved=given.moved + shift)
    assert torch.allclose(parent_attention(**together.parents()), parents)
    alone = replace(given, points=given.points + shift)
    assert not torch.allclose(parent_attention(**alone.parents()), parents, atol=0.1)


@grids
def test_millimetres_count_and_voxels_do_not(grid: Grid) -> None:
    """One object at two spacings: all twice as long looks the same, one axis twice as long does not."""
    given = at_rest(case(grid, 3))
    origin, spacing = (torch.tensor(v, dtype=torch.float64) for v in (grid.origin, grid.spacing))

    def stretched(ratio: Tensor) -> dict[str, Any]:
        larger = replace(grid, spacing=tuple(float(v) for v in spacing * ratio))
        return given.near() | {"grid": larger, "points": origin + (given.points - origin) * ratio}

    found = neighbourhood_attention(**given.near())
    twice = stretched(torch.full((grid.dim,), 2.0, dtype=torch.float64))
    assert torch.allclose(neighbourhood_attention(**(twice | {"length_mm": 18.0})), found)
    assert not torch.allclose(neighbourhood_attention(**twice), found, atol=0.1)
    longer = torch.ones(grid.dim, dtype=torch.float64)
    longer[-1] = 2
    one_axis = stretched(longer)
    slower = given.frequencies / longer[:, None]
    assert torch.allclose(neighbourhood_attention(**(one_axis | {"frequencies": slower})), found)
    assert not torch.allclose(neighbourhood_attention(**one_axis), found, atol=0.1)


@pytest.mark.parametrize("window", WINDOWS)
def test_an_axis_of_one_voxel_is_an_axis_less(window: int) -> None:
    flat = Grid((6, 7), (1.5, 1.0), (2.0, 1.0))
    solid = Grid((6, 1, 7), (1.5, 4.0, 1.0), (2.0, -7.0, 1.0))
    given = at_rest(case(flat, window))
    points = torch.full((*given.points.shape[:2], 3), -7.0, dtype=torch.float64)
    points[..., [0, 2]] = given.points
    frequencies = torch.stack([given.frequencies[0], torch.randn(4, dtype=torch.float64), given.frequencies[1]])
    found = neighbourhood_attention(
        given.query, given.features.unsqueeze(3), points, solid, window, frequencies, given.length_mm
    )
    assert torch.allclose(found, neighbourhood_attention(**given.near()))


@grids
@pytest.mark.parametrize("window", [2, 3])
def test_parents_that_have_not_moved_are_the_grid(grid: Grid, window: int) -> None:
    given = case(grid, window)
    still = replace(given, moved=grid_points(grid, dtype=torch.float64).expand_as(given.moved), points=given.rest)
    assert torch.allclose(parent_attention(**still.parents()), neighbourhood_attention(**still.near()))


@grids
def test_items_of_a_batch_do_not_mix(grid: Grid) -> None:
    given = case(grid, 3, batch=3)
    for function, inputs in ((neighbourhood_attention, at_rest(given).near()), (parent_attention, given.parents())):
        together = function(**inputs)
        for b in range(3):
            own = {k: v[b : b + 1] if isinstance(v, Tensor) and k != "frequencies" else v for k, v in inputs.items()}
            assert torch.allclose(function(**own), together[b : b + 1])
        leaves = {name: inputs[name].clone().requires_grad_() for name in LEAVES if name in inputs}
        slopes = torch.autograd.grad(function(**(inputs | leaves))[1].sum(), list(leaves.values()))
        for slope in slopes:
            assert float(slope[[0, 2]].abs().max()) == 0
            assert float(slope[1].abs().max()) > 0


@forms
def test_far_from_the_origin_three_digits_more_stay(attention: Callable[..., Tensor]) -> None:
    """Of the millimetres that are given, in float32: a scanner's coordinates, and a length of one voxel."""
    given = case(Grid((9, 8, 7), (1.0, 1.5, 2.0), (-107.0, 93.0, 412.0)), 3, dtype=torch.float32)
    given = replace(given, length_mm=2.0)
    double = replace(given, **{k: v.double() for k, v in vars(given).items() if isinstance(v, Tensor)})
    near = attention(**at_rest(given).near()).double() - neighbourhood_attention_plain(**at_rest(double).near())
    assert float(near.abs().max()) < 2e-4
    parents = parent_attention(**given.parents()).double() - parent_attention_plain(**double.parents())
    assert float(parents.abs().max()) < 2e-4


@pytest.mark.parametrize(
    ("function", "parents"),
    [
        (neighbourhood_attention, False),
        (neighbourhood_attention_plain, False),
        (parent_attention, True),
        (parent_attention_plain, True),
    ],
)
def test_the_precision_of_a_network_is_not_that_of_positions(function: Callable[..., Tensor], parents: bool) -> None:
    """Under autocast products of matrices are bfloat16: none of them may be here."""
    given = case(GRIDS[3], 3, dtype=torch.float32)

    def half(**inputs: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(**inputs)

    inputs = given.parents() if parents else at_rest(given).near()
    assert_same(both(half, inputs), both(function, inputs), 1e-6)


def test_no_points_is_an_empty_answer() -> None:
    given = at_rest(case(GRIDS[3], 3, n=0)).near()
    value, slopes = both(neighbourhood_attention, given)
    assert value.shape == (2, 0, 8)
    assert float(slopes["features"].abs().max()) == 0


# ---- slabs ----


def head(query: Tensor, points: Tensor, **shared: Any) -> Tensor:
    return neighbourhood_attention(query=query, points=points, **shared)


def children(query: Tensor, rest: Tensor, points: Tensor, **shared: Any) -> Tensor:
    return parent_attention(query=query, rest=rest, points=points, **shared)


def near_in_slabs(size: int, query: Tensor, points: Tensor, **shared: Any) -> Tensor:
    return in_slabs(head, size, query, points, **shared)


def parents_in_slabs(size: int, query: Tensor, rest: Tensor, points: Tensor, **shared: Any) -> Tensor:
    return in_slabs(children, size, query, rest, points, **shared)


@pytest.mark.parametrize("size", [0, 1, 7, 20, 40, 1000])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=["2d", "3d"])
def test_slabs_give_the_same_numbers(grid: Grid, size: int) -> None:
    given = case(grid, 3)
    near, parents = at_rest(given).near(), given.parents()
    assert_same(both(lambda **all_: near_in_slabs(size, **all_), near), both(neighbourhood_attention, near), 1e-12)
    assert_same(both(lambda **all_: parents_in_slabs(size, **all_), parents), both(parent_attention, parents), 1e-12)
    with torch.no_grad():
        assert torch.allclose(near_in_slabs(size, **near), neighbourhood_attention(**near))


def test_fewer_bytes_are_kept() -> None:
    """The inputs are counted; in slabs nothing else is kept."""
    given = case(Grid((7, 7, 7)), 3, batch=1, n=2744, c=16, dtype=torch.float32)
    for plain, fast, slabs, inputs in (
        (neighbourhood_attention_plain, neighbourhood_attention, near_in_slabs, at_rest(given).near()),
        (parent_attention_plain, parent_attention, parents_in_slabs, given.parents()),
    ):
        forms = (plain, fast, lambda slabs=slabs, **all_: slabs(343, **all_))
        of_plain, of_fast, of_slabs = (kept_bytes(form, inputs) for form in forms)
        assert of_plain > 4.5 * of_fast
        assert of_fast > 3 * of_slabs
        assert of_slabs == sum(inputs[name].nbytes for name in (*LEAVES, "rest") if name in inputs)


# ---- what is wrong ----

WRONG = {
    "another number of queries": {"query": torch.zeros(2, 39, 8)},
    "another number of channels": {"query": torch.zeros(2, 40, 6)},
    "features of another grid": {"features": torch.zeros(2, 8, 7, 9, 10)},
    "features without a batch": {"features": torch.zeros(8, 7, 9, 11)},
    "features of one item for two": {"features": torch.zeros(1, 8, 7, 9, 11)},
    "points of a plane": {"points": torch.zeros(2, 40, 2)},
    "points without a batch": {"points": torch.zeros(40, 3)},
    "frequencies of a plane": {"frequencies": torch.zeros(2, 4)},
    "frequencies too many": {"frequencies": torch.zeros(3, 5)},
    "a flat grid": {"grid": GRIDS[2]},
    "no window": {"window": 0},
    "a negative window": {"window": -3},
    "no length": {"length_mm": 0.0},
    "a negative length": {"length_mm": -1.0},
    "a length that is no number": {"length_mm": float("nan")},
}


@forms
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_gets_a_sentence(wrong: dict[str, Any], attention: Callable[..., Tensor]) -> None:
    given = at_rest(case(GRIDS[3], 3, dtype=torch.float32)).near()
    with pytest.raises(ValueError) as caught:
        attention(**(given | wrong))
    assert one_sentence(caught.value)


WRONG_PARENTS = WRONG | {
    "moved on another grid": {"moved": torch.zeros(2, 7, 9, 10, 3)},
    "moved of one item for two": {"moved": torch.zeros(1, 7, 9, 11, 3)},
    "moved with its axes first": {"moved": torch.zeros(2, 3, 7, 9, 11)},
    "rest of fewer": {"rest": torch.zeros(2, 39, 3)},
    "rest of one item for two": {"rest": torch.zeros(1, 40, 3)},
}


@parent_forms
@pytest.mark.parametrize("wrong", WRONG_PARENTS.values(), ids=WRONG_PARENTS)
def test_parents_that_do_not_fit_get_a_sentence(wrong: dict[str, Any], attention: Callable[..., Tensor]) -> None:
    given = case(GRIDS[3], 3, dtype=torch.float32).parents()
    with pytest.raises(ValueError) as caught:
        attention(**(given | wrong))
    assert one_sentence(caught.value)
