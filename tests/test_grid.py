"""Grid: positions, extents and the grids derived from it, by arithmetic and by property."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from truths.fields import GRIDS, one_sentence, positions

from regteach.grid import Grid, per_axis


@st.composite
def grids(draw: st.DrawFn, smallest: int = 1) -> Grid:
    dim = draw(st.sampled_from([2, 3]))
    number = st.floats(-500, 500, allow_nan=False)
    return Grid(
        tuple(draw(st.integers(smallest, 40)) for _ in range(dim)),
        tuple(draw(st.floats(0.1, 8)) for _ in range(dim)),
        tuple(draw(number) for _ in range(dim)),
    )


def faces(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    origin, spacing, shape = (np.array(v, dtype=float) for v in (grid.origin, grid.spacing, grid.shape))
    return origin - spacing / 2, origin + (shape - 0.5) * spacing


def test_numbers_of_the_test_grid():
    grid = GRIDS[3]
    assert grid.dim == 3
    assert grid.size == 7 * 9 * 11
    assert grid.voxel_volume == pytest.approx(3.0)
    assert grid.extent == pytest.approx((7, 13.5, 22))
    assert grid.last == pytest.approx((3, 17, 30.5))
    assert grid.centre == pytest.approx((0, 11, 20.5))


def test_voxel_area_in_two_dimensions():
    assert GRIDS[2].voxel_volume == pytest.approx(1.5)


def test_one_number_serves_all_axes():
    assert Grid((4, 5), spacing=(2.0,), origin=(1.0,)) == Grid((4, 5), spacing=(2.0, 2.0), origin=(1.0, 1.0))
    assert Grid((4, 5)) == Grid((4, 5), spacing=(1.0, 1.0), origin=(0.0, 0.0))
    assert len(Grid((4, 5, 6), spacing=(2.0,)).spacing) == 3


def test_a_grid_is_a_value():
    a, b = Grid((4, 5), (1.0, 2.0)), Grid((4, 5), (1.0, 2.0))
    assert a == b
    assert hash(a) == hash(b)
    assert {a: "found"}[b] == "found"
    assert a != Grid((4, 5), (2.0, 1.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.shape = (1, 1)  # type: ignore[misc]


def test_lists_and_numpy_numbers_become_plain_tuples():
    grid = Grid(list(np.array([4, 5])), list(np.array([1.0, 2.0], dtype=np.float32)), list(np.zeros(2)))  # type: ignore[arg-type]
    assert hash(grid) == hash(Grid((4, 5), (1.0, 2.0)))
    assert "np." not in repr(grid)


def test_centre_is_the_mean_of_all_voxels(grid):
    assert grid.centre == pytest.approx(tuple(positions(grid).reshape(-1, grid.dim).mean(axis=0)))


def test_coarsened_centres_are_the_means_of_the_pooled_voxels(grid):
    coarse = grid.coarsened(2)
    assert coarse.shape == tuple(n // 2 for n in grid.shape)
    assert coarse.spacing == pytest.approx(tuple(2 * s for s in grid.spacing))
    pooled = positions(grid)[tuple(slice(0, 2) for _ in grid.shape)].reshape(-1, grid.dim).mean(axis=0)
    assert coarse.origin == pytest.approx(tuple(pooled))


def test_coarsened_per_axis(grid):
    factors = (3, 1, 2)[: grid.dim]
    coarse = grid.coarsened(factors)
    assert coarse.shape == tuple(n // f for n, f in zip(grid.shape, factors, strict=True))
    assert coarse.origin[1] == grid.origin[1]
    assert coarse.origin[0] == pytest.approx(grid.origin[0] + grid.spacing[0])


@given(grids(), st.integers(1, 4))
def test_coarsened_keeps_the_extent_when_nothing_is_dropped(grid, factor):
    whole = Grid(tuple(n * factor for n in grid.shape), grid.spacing, grid.origin)
    np.testing.assert_allclose(faces(whole.coarsened(factor)), faces(whole), atol=1e-9)


@given(grids(), st.integers(1, 50), st.integers(1, 50))
def test_resized_keeps_both_outer_faces(grid, n, m):
    shape = (n, m, n)[: grid.dim]
    resized = grid.resized(shape)
    assert resized.shape == shape
    np.testing.assert_allclose(faces(resized), faces(grid), atol=1e-9)
    np.testing.assert_allclose(resized.extent, grid.extent, rtol=1e-12)


@given(grids())
def test_resized_there_and_back(grid):
    back = grid.resized(tuple(2 * n for n in grid.shape)).resized(grid.shape)
    np.testing.assert_allclose(back.origin, grid.origin, atol=1e-9)
    np.testing.assert_allclose(back.spacing, grid.spacing, rtol=1e-12)


@given(grids(smallest=4))
def test_coarsened_is_resized_when_the_shape_divides(grid):
    even = Grid(tuple(2 * (n // 2) for n in grid.shape), grid.spacing, grid.origin)
    resized = even.resized(tuple(n // 2 for n in even.shape))
    np.testing.assert_allclose(even.coarsened(2).origin, resized.origin, atol=1e-9)
    np.testing.assert_allclose(even.coarsened(2).spacing, resized.spacing, rtol=1e-12)


@given(grids(), st.floats(0.2, 9))
def test_with_spacing_covers_and_stays_centred(grid, spacing):
    other = grid.with_spacing(spacing)
    assert other.spacing == pytest.approx((spacing,) * grid.dim)
    np.testing.assert_allclose(other.centre, grid.centre, atol=1e-9)
    assert all(e >= f * (1 - 1e-6) for e, f in zip(other.extent, grid.extent, strict=True))
    # and wastes less than one voxel per axis
    assert all(e < f + spacing * (1 + 1e-6) for e, f in zip(other.extent, grid.extent, strict=True))


def test_with_spacing_does_not_grow_by_rounding():
    # 0.3 / 0.1 is 2.9999999999999996 or 3.0000000000000004 in floating point, never a fourth voxel.
    assert Grid((3, 3), spacing=(0.1,)).with_spacing(0.1).shape == (3, 3)
    assert Grid((30, 70), spacing=(0.7, 0.3)).with_spacing((0.1, 0.1)).shape == (210, 210)


def test_cropped_voxels_do_not_move(grid):
    start, stop = (2, 1, 4)[: grid.dim], (5, 8, 9)[: grid.dim]
    region = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    np.testing.assert_allclose(positions(grid.cropped(start, stop)), positions(grid)[region], atol=1e-12)


def test_padded_voxels_do_not_move(grid):
    before, after = (2, 0, 1)[: grid.dim], (1, 3, 0)[: grid.dim]
    padded = grid.padded(before, after)
    region = tuple(slice(b, b + n) for b, n in zip(before, grid.shape, strict=True))
    assert padded.shape == tuple(n + b + a for n, b, a in zip(grid.shape, before, after, strict=True))
    np.testing.assert_allclose(positions(padded)[region], positions(grid), atol=1e-12)


@given(grids(), st.integers(0, 5), st.integers(0, 5))
def test_cropping_undoes_padding(grid, before, after):
    padded = grid.padded(before, after)
    back = padded.cropped((before,) * grid.dim, tuple(before + n for n in grid.shape))
    assert back.shape == grid.shape
    np.testing.assert_allclose(back.origin, grid.origin, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (((0, 4),), "0"),
        (((-3, 4),), "-3"),
        (((4, 5), (1.0, 0.0)), "0"),
        (((4, 5), (1.0, -2.0)), "-2"),
        (((4, 5), (1.0, math.nan)), "nan"),
        (((4, 5), (1.0, math.inf)), "inf"),
        (((4, 5), (1.0, 1.0, 1.0)), "3"),
        (((4, 5), (1.0, 1.0), (0.0, 0.0, 0.0)), "3"),
        (((4, 5), (1.0, 1.0), (0.0, math.nan)), "nan"),
        (((4,),), "2 or 3"),
        (((4, 5, 6, 7),), "2 or 3"),
    ],
)
def test_bad_grids_get_one_sentence(arguments, said):
    with pytest.raises(ValueError) as caught:
        Grid(*arguments)
    assert one_sentence(caught.value, said)


@pytest.mark.parametrize(
    "derive",
    [
        lambda g: g.resized((0, 4, 4)[: g.dim]),
        lambda g: g.resized((4,)),
        lambda g: g.coarsened(0),
        lambda g: g.coarsened(100),
        lambda g: g.with_spacing(0.0),
        lambda g: g.with_spacing((1.0,) * (g.dim + 1)),
        lambda g: g.cropped((0,) * g.dim, (100,) * g.dim),
        lambda g: g.cropped((-1,) * g.dim, g.shape),
        lambda g: g.cropped((3,) * g.dim, (3,) * g.dim),
        lambda g: g.padded(-1, 0),
    ],
)
def test_bad_derived_grids_get_one_sentence(grid, derive):
    with pytest.raises(ValueError) as caught:
        derive(grid)
    assert one_sentence(caught.value)


def test_per_axis():
    assert per_axis(2, 3, "sigma") == (2, 2, 2)
    assert per_axis((1, 2), 2, "sigma") == (1, 2)
    assert per_axis(np.float32(2), 2, "sigma") == per_axis(np.int64(2), 2, "sigma") == (2, 2)
    with pytest.raises(ValueError) as caught:
        per_axis((1, 2, 3), 2, "sigma")
    assert one_sentence(caught.value, "sigma", "2", "3")
