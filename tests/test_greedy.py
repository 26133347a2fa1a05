"""Greedy steps: closed forms, a plain version with SciPy, no folds, and pairs that do not feel each other."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from truths.fields import GRIDS, positions

from regteach.grid import Grid
from regteach.refinement.greedy import _brought, descend
from regteach.sampling import grid_points
from regteach.transforms import Dense, jacobian_determinant

STILL = (0.0, 0.0)


def field(grid: Grid, *vector: float) -> Tensor:
    return torch.tensor(vector, dtype=torch.float64).expand(1, *grid.shape, grid.dim)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_slope_that_is_the_same_everywhere_moves_everything_by_the_rate_against_it(dim):
    grid = GRIDS[dim]
    slope = field(grid, *(2.0, 0.0, 0.0)[:dim])
    for smoothing in (STILL, (1.5, 0.7)):
        moved = descend(torch.zeros_like(slope), slope, grid, 0.25, smoothing)
        torch.testing.assert_close(moved, field(grid, *(-0.25 * grid.spacing[0], 0.0, 0.0)[:dim]))


@pytest.mark.parametrize("dim", [2, 3])
def test_no_point_is_moved_further_than_the_rate_in_voxels_and_one_is(dim):
    grid = GRIDS[dim]
    slope = torch.randn(2, *grid.shape, dim, dtype=torch.float64)
    moved = descend(torch.zeros_like(slope), slope, grid, 0.4, STILL)
    furthest = (moved / torch.tensor(grid.spacing)).norm(dim=-1).flatten(1).amax(1)
    torch.testing.assert_close(furthest, torch.full((2,), 0.4, dtype=torch.float64))


def test_a_slope_of_nothing_moves_nothing():
    grid = GRIDS[2]
    before = torch.rand(1, *grid.shape, 2)
    torch.testing.assert_close(descend(before, torch.zeros_like(before), grid, 0.5, STILL), before)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_step_is_composed_not_added(dim):
    """With u = A x + b and a constant step v, u(x + v) + v = u(x) + A v + v away from the border."""
    grid = GRIDS[dim]
    matrix = torch.tensor([[0.1, 0.05, -0.02], [-0.08, 0.04, 0.03], [0.02, -0.06, 0.07]], dtype=torch.float64)[
        :dim, :dim
    ]
    linear = torch.tensor(positions(grid)) @ matrix.T
    moved = descend(linear[None], field(grid, *(0.0, 1.0, 0.0)[:dim]), grid, 0.5, STILL)
    step = -0.5 * grid.spacing[1] * torch.eye(dim, dtype=torch.float64)[1]
    inside = (0, *[slice(1, -1)] * dim)
    torch.testing.assert_close(moved[inside], (linear + matrix @ step + step)[inside[1:]])
    assert (moved[inside] - (linear + step)[inside[1:]]).abs().max() > 0.01  # what adding would give


@pytest.mark.parametrize("dim", [2, 3])
def test_it_is_the_plain_form(dim):
    """The formula, one component and one pair at a time, by SciPy."""
    grid = GRIDS[dim]
    generator = np.random.default_rng(0)
    before, slope = generator.normal(size=(2, 2, *grid.shape, dim))
    spacing, rate, sigmas = np.array(grid.spacing), 0.3, (1.2, 0.6)

    def smoothed(f: np.ndarray, sigma: float) -> np.ndarray:
        return np.stack([ndimage.gaussian_filter(f[..., k], sigma, mode="nearest") for k in range(dim)], -1)

    expected = []
    for u, s in zip(before, slope, strict=True):
        v = -smoothed(s, sigmas[0])
        v *= rate / np.linalg.norm(v / spacing, axis=-1).max()
        where = np.moveaxis(np.indices(grid.shape), 0, -1) + v / spacing
        read = [
            ndimage.map_coordinates(u[..., k], np.moveaxis(where, -1, 0), order=1, mode="nearest") for k in range(dim)
        ]
        expected.append(smoothed(np.stack(read, -1) + v, sigmas[1]))
    moved = descend(torch.tensor(before), torch.tensor(slope), grid, rate, sigmas)
    np.testing.assert_allclose(moved.numpy(), np.stack(expected), atol=1e-9)


def test_pairs_do_not_feel_each_other():
    grid = GRIDS[3]
    before, slope = torch.randn(2, 3, *grid.shape, 3, dtype=torch.float64)
    slope[1] *= 1e6
    together = descend(before, slope, grid, 0.5, (1.0, 0.5))
    for i in range(3):
        torch.testing.assert_close(together[[i]], descend(before[[i]], slope[[i]], grid, 0.5, (1.0, 0.5)))


def test_smooth_composed_steps_do_not_fold_where_added_ones_do():
    """A slope that stays the same and squeezes everything onto a line: composed steps stay one to one."""
    grid = Grid((40, 40))
    x = torch.arange(40.0) - 19.5
    pull = torch.zeros(1, 40, 40, 2)
    pull[..., 0] = torch.where(x.abs() < 12, -x.sign(), 0)[None, :, None]
    composed, added = torch.zeros_like(pull), torch.zeros_like(pull)
    for _ in range(20):
        composed = descend(composed, pull, grid, 0.4, (1.7, 0.0))
        added = added + descend(torch.zeros_like(pull), pull, grid, 0.4, (1.7, 0.0))
    assert jacobian_determinant(Dense(composed, grid), grid).min() > 0
    assert jacobian_determinant(Dense(added, grid), grid).min() < 0


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_the_size_of_a_slope_does_not_count(size: float) -> None:
    grid = GRIDS[2]
    slope = torch.randn(1, *grid.shape, 2)
    start = torch.zeros_like(slope)
    once, again = (descend(start, slope * s, grid, 0.5, (1.0, 0.5)) for s in (1.0, size))
    torch.testing.assert_close(again, once, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("shape", "factor"), [((28, 28), 8), ((20, 18, 16), 8), ((22, 28), 8), ((11, 12), 4)])
def test_a_linear_displacement_is_brought_to_a_coarser_level_as_it_is(shape: tuple[int, ...], factor: int) -> None:
    """Also where cubes do not fill the grid: what is left over is cut off, and nothing moves."""
    grid = Grid(shape, (1.0, 1.5, 2.0)[: len(shape)], (3.0, -4.0, 5.0)[: len(shape)])
    coarse = grid.coarsened(factor)
    slopes = torch.tensor([[0.3, -0.1, 0.2], [0.0, 0.2, 0.1], [-0.2, 0.1, 0.4]])[: grid.dim, : grid.dim]
    brought = _brought((grid_points(grid) @ slopes)[None], grid, coarse)
    torch.testing.assert_close(brought, (grid_points(coarse) @ slopes)[None], rtol=1e-5, atol=1e-5)
