"""Random deformations: reproducible, exact at points, within their ranges, folding only where they say so."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.interpolate import RegularGridInterpolator
from truths.fields import jacobian_by_autograd, one_sentence, points_inside, positions

from regteach.affine import AffineBounds
from regteach.data.deformations import (
    OCTAVES,
    SAFE_AMPLITUDE,
    brownian,
    composed,
    fractal,
    random_affine,
    random_smooth,
)
from regteach.grid import Grid
from regteach.transforms import Compose, Dense, FreeForm, Sum, determinant, displacement, jacobian_determinant

F64 = torch.zeros((), dtype=torch.float64)
BOUNDS = AffineBounds(translation_mm=5.0, rotation_deg=25.0, scale_ratio=1.3, shear_ratio=0.1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MAKERS = {
    "affine": lambda grid, generator, **more: random_affine(grid, BOUNDS, generator, **more),
    "smooth": lambda grid, generator, **more: random_smooth(grid, 4.0, 1.0, generator, **more),
    "fold free": lambda grid, generator, **more: random_smooth(grid, 4.0, 8.0, generator, fold_free=True, **more),
    "brownian": lambda grid, generator, **more: brownian(grid, 0.1, generator, **more),
    "composed": lambda grid, generator, **more: composed(grid, BOUNDS, 4.0, 1.0, generator, **more),
    "fractal": lambda grid, generator, **more: fractal(grid, 0.3, generator, **more),
}


def part_that_folds(transform, grid: Grid, n: int = 4000) -> float:
    """Share of space where the exact determinant is not positive, by autograd at random points."""
    points = points_inside(grid, n, margin=0.0)
    return float((determinant(jacobian_by_autograd(transform, points)) <= 0).double().mean())


# What they have in common


@pytest.mark.parametrize("name", MAKERS)
def test_a_seed_fixes_everything_and_another_changes_it(grid, name):
    points = points_inside(grid, 20, dtype=torch.float32)
    first, again, other = (MAKERS[name](grid, seeded(s))(points) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-2


@pytest.mark.parametrize("name", MAKERS)
def test_the_global_generator_is_left_alone(grid, name):
    before = torch.random.get_rng_state()
    MAKERS[name](grid, seeded())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", MAKERS)
def test_a_batch_holds_different_deformations(grid, name):
    points = points_inside(grid, 20, dtype=torch.float32)
    moved = MAKERS[name](grid, seeded(), batch=3)(points)
    assert moved.shape == (3, 20, grid.dim)
    assert moved.dtype == torch.float32
    for i, k in ((0, 1), (0, 2), (1, 2)):
        assert (moved[i] - moved[k]).abs().max() > 1e-2


@pytest.mark.parametrize("name", MAKERS)
def test_like_gives_the_dtype_and_not_other_numbers(grid, name):
    points = points_inside(grid, 20)
    double = MAKERS[name](grid, seeded(), like=F64)(points)
    assert double.dtype == torch.float64
    torch.testing.assert_close(MAKERS[name](grid, seeded())(points.float()).double(), double, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["brownian", "affine", "fractal"])
def test_the_truth_does_not_depend_on_the_sampling_of_the_image(grid, name):
    finer = grid.resized(tuple(3 * n for n in grid.shape))
    points = points_inside(grid, 50)
    coarse, fine = (MAKERS[name](g, seeded(), like=F64)(points) for g in (grid, finer))
    torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-9)


# Affine


def test_affine_stays_within_its_bounds_and_uses_them(grid):
    bounds = AffineBounds(translation_mm=5.0, rotation_deg=0.0, scale_ratio=1.3, stretch_axes_deg=0.0)
    affine = random_affine(grid, bounds, seeded(), batch=2000)
    assert affine.translation.abs().max() <= 5
    scale = affine.matrix.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(affine.matrix, torch.diag_embed(scale))
    # uniform, by the test of Kolmogorov and Smirnov: the seed is fixed, so this holds or not once and for all
    for numbers in (affine.translation / 5, scale.log() / math.log(1.3)):
        for axis in numbers.unbind(-1):
            assert stats.kstest(axis.numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01


def test_affine_turns_about_the_middle_by_at_most_its_bound(grid):
    bounds = AffineBounds(translation_mm=0.0, rotation_deg=25.0, scale_ratio=1.0)
    affine = random_affine(grid, bounds, seeded(), batch=500)
    middle = torch.tensor(grid.centre)
    torch.testing.assert_close(affine(middle[None, None])[:, 0], middle.expand(500, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(affine.matrix @ affine.matrix.mT, torch.eye(grid.dim).expand(500, -1, -1))
    if grid.dim == 2:
        angle = torch.rad2deg(torch.atan2(affine.matrix[:, 1, 0], affine.matrix[:, 0, 0]))
        assert 24 < angle.abs().max() <= 25
        assert angle.min() < -24


def test_affine_never_folds(grid):
    assert torch.linalg.det(random_affine(grid, BOUNDS, seeded(), batch=500).matrix).min() > 0


# Smooth


def test_smooth_displacements_stay_below_the_amplitude(grid):
    transform = random_smooth(grid, 4.0, 2.5, seeded(), batch=8)
    assert isinstance(transform, FreeForm)
    largest = displacement(transform, grid).abs().max()
    assert 0.8 < largest <= 2.5
    assert transform.grid.spacing == (4.0,) * grid.dim


def test_fold_free_removes_the_folds_and_touches_nothing_else(grid):
    wild = random_smooth(grid, 4.0, 8.0, seeded(), batch=8)
    tame = random_smooth(grid, 4.0, 8.0, seeded(), batch=8, fold_free=True)
    before, after = (jacobian_determinant(t, grid).flatten(1).amin(1) for t in (wild, tame))
    assert before.min() < 0
    assert after.min() > 0
    factor = (tame.coefficients / wild.coefficients).flatten(1)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-4, atol=0)  # each shrunk as a whole
    assert torch.equal(factor[:, 0] < 0.999, before < 0.1)


def test_a_small_amplitude_is_fold_free_by_the_bound_of_choi_and_lee(grid):
    # the worst signs are somewhere among these: every coefficient at plus or minus the bound
    ctrl = Grid((6,) * grid.dim, spacing=(3.0,) * grid.dim)
    signs = torch.randn(200, *ctrl.shape, grid.dim).sign().double()
    points = points_inside(ctrl, 300, margin=1.0)
    at_the_bound = FreeForm(signs * 3.0 * SAFE_AMPLITUDE[grid.dim], ctrl)
    assert determinant(at_the_bound.jacobian(points)).min() > 0
    above = FreeForm(signs * 3.0 * SAFE_AMPLITUDE[grid.dim] * 2.2, ctrl)
    assert determinant(above.jacobian(points)).min() < 0
    quiet = random_smooth(grid, 4.0, 4.0 * 0.99 * SAFE_AMPLITUDE[grid.dim], seeded(), batch=4)
    asked = random_smooth(grid, 4.0, 4.0 * 0.99 * SAFE_AMPLITUDE[grid.dim], seeded(), batch=4, fold_free=True)
    assert torch.equal(quiet.coefficients, asked.coefficients)


# Brownian


def test_brownian_is_the_mean_of_its_octaves_read_linearly(grid):
    transform = brownian(grid, 0.125, seeded(), like=F64)
    assert isinstance(transform, Sum)
    points = points_inside(grid, 200, margin=-0.5)  # up to the outer faces
    low = np.array(grid.origin) - np.array(grid.spacing) / 2
    high = low + np.array(grid.extent)
    expected = points[0].numpy().copy()
    for nodes, part in zip(OCTAVES, transform.transforms, strict=True):
        assert isinstance(part, Dense)
        axes = tuple(np.linspace(a, b, nodes) for a, b in zip(low, high, strict=True))
        values = part.displacement[0].numpy()
        assert values.shape == (nodes,) * grid.dim + (grid.dim,)
        expected += RegularGridInterpolator(axes, values)(points[0].numpy())
    np.testing.assert_allclose(transform(points)[0], expected, atol=1e-10)


def test_brownian_amplitude_is_a_fraction_of_half_the_extent_of_each_axis(grid):
    for part in brownian(grid, 0.125, seeded()).transforms:
        for axis in range(grid.dim):
            bound = 0.125 * grid.extent[axis] / 2 / 3  # the mean of three octaves
            unit = (part.displacement[..., axis] / bound).flatten()
            assert unit.abs().max() <= 1 + 1e-6
            assert stats.kstest(unit.numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.001


def test_brownian_folds_as_its_docstring_says(grid):
    shares = [part_that_folds(brownian(grid, a, seeded(), like=F64), grid) for a in (0.03, 0.0625, 0.125)]
    assert shares[0] < 0.001
    assert 0.02 < shares[1] < 0.12
    assert 0.25 < shares[2] < 0.45


@pytest.mark.parametrize("octaves", [(), (1,), (16, 1)])
def test_brownian_needs_octaves_of_two_nodes(grid, octaves):
    with pytest.raises(ValueError) as caught:
        brownian(grid, 0.1, seeded(), octaves=octaves)
    assert one_sentence(caught.value, str(octaves))


# Fractal


def test_fractal_is_one_spline_over_the_faces_of_the_image(grid):
    transform = fractal(grid, 0.2, seeded(), batch=3)
    assert isinstance(transform, FreeForm)
    assert transform.coefficients.shape == (3, *(15,) * grid.dim, grid.dim)
    for k in range(grid.dim):
        assert transform.grid.spacing[k] == pytest.approx(grid.extent[k] / 12)
        assert transform.grid.origin[k] + transform.grid.spacing[k] == pytest.approx(
            grid.origin[k] - grid.spacing[k] / 2
        )


def test_fractal_is_the_sum_of_its_octaves_each_half_as_large(grid):
    transform = fractal(grid, 0.1, seeded(), octaves=(2, 4), like=F64)
    generator = seeded()
    ctrl = transform.grid
    targets = positions(ctrl)
    expected = np.zeros((*ctrl.shape, grid.dim))
    for octave, nodes in enumerate((2, 4)):
        noise = 2 * torch.rand((1, grid.dim, *(nodes + 3,) * grid.dim), generator=generator).double() - 1
        step = np.array(grid.extent) / nodes
        first = np.array(grid.origin) - np.array(grid.spacing) / 2 - step
        axes = tuple(f + s * np.arange(nodes + 3) for f, s in zip(first, step, strict=True))
        for k in range(grid.dim):
            values = RegularGridInterpolator(axes, noise[0, k].numpy(), bounds_error=False, fill_value=None)(targets)
            expected[..., k] += values / 2**octave / 1.5 * 0.1 * grid.extent[k] / 2
    np.testing.assert_allclose(transform.coefficients[0], expected, atol=1e-6)


@pytest.mark.parametrize("amplitude", [0.1, 0.375, 0.8])
def test_fractal_never_folds_and_stays_within_its_amplitude(grid, amplitude):
    transform = fractal(grid, amplitude, seeded(), batch=4, like=F64)
    assert part_that_folds(transform, grid, 2000) == 0
    for k in range(grid.dim):
        assert displacement(transform, grid)[..., k].abs().max() <= amplitude * grid.extent[k] / 2


def test_fractal_is_shrunk_as_a_whole_and_only_where_it_must_be(grid):
    quiet, wild = (fractal(grid, a, seeded(), batch=8, like=F64).coefficients.flatten(1) for a in (0.05, 0.4))
    factor = wild / quiet
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-6, atol=0)
    steps = (factor[:, 0] / 8).log() / math.log(0.9)  # eight times as large, then steps of a tenth
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
    assert steps.min() >= 0
    assert steps.max() >= 1


@pytest.mark.parametrize("octaves", [(), (0, 3), (6, 3), (3, 3)])
def test_fractal_needs_rising_octaves(grid, octaves):
    with pytest.raises(ValueError) as caught:
        fractal(grid, 0.1, seeded(), octaves=octaves)
    assert one_sentence(caught.value, str(octaves))


# Composed


def test_composed_is_smooth_first_and_then_affine(grid):
    both = composed(grid, BOUNDS, 4.0, 1.0, seeded())
    assert isinstance(both, Compose)
    generator = seeded()
    smooth = random_smooth(grid, 4.0, 1.0, generator)
    affine = random_affine(grid, BOUNDS, generator)
    points = points_inside(grid, 20, dtype=torch.float32)
    assert torch.equal(both(points), affine(smooth(points)))
