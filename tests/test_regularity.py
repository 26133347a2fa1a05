"""Regularity terms against closed forms, plain loops, MONAI and gradcheck, and on two samplings of one field."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from monai.losses import BendingEnergyLoss
from torch import Tensor
from torch.autograd import gradcheck
from truths.fields import GRIDS, LinearField, WaveField, one_sentence, positions

from regteach import bspline
from regteach.grid import Grid
from regteach.regularity import (
    bending_energy,
    bending_energy_spline,
    bending_energy_spline_plain,
    diffusion,
    jacobian_penalty,
)
from regteach.sampling import flat_points, gradient
from regteach.transforms import Dense, FreeForm, jacobian_determinant

F64 = torch.float64
TERMS = {"diffusion": diffusion, "bending_energy": bending_energy, "jacobian_penalty": jacobian_penalty}
SMALL = {2: Grid((4, 5), (1, 1.5)), 3: Grid((3, 4, 5), (1, 1.5, 2))}
# The same 24 x 36 x 48 mm at half the spacing: 8 times as many voxels in 3D, 4 times in 2D.
COARSE = {2: Grid((32, 48), (0.75, 0.75)), 3: Grid((24, 24, 24), (1, 1.5, 2))}


def on_grid(field, grid: Grid) -> Tensor:
    return torch.from_numpy(field(positions(grid)))[None]


def random_field(grid: Grid, batch: int = 2) -> Tensor:
    return torch.rand(batch, *grid.shape, grid.dim, dtype=F64)


def quadratic(grid: Grid) -> tuple[Tensor, float]:
    """u_i = x^T Q_i x with random full matrices, and its bending energy: the Hessians are Q_i + Q_i^T everywhere."""
    q = np.random.default_rng(0).normal(size=(grid.dim,) * 3)
    field = on_grid(lambda x: np.einsum("...k,ikl,...l->...i", x, q, x), grid)
    return field, float(((q + q.transpose(0, 2, 1)) ** 2).sum())


# Closed forms


def test_a_translation_is_free(grid):
    field = torch.ones(1, *grid.shape, grid.dim, dtype=F64)
    for term in TERMS.values():
        assert term(field, grid).item() == 0


def test_diffusion_of_a_linear_field_is_the_sum_of_its_squared_slopes(grid):
    linear = LinearField.of(grid.dim)
    field = on_grid(linear, grid)
    assert diffusion(field, grid).item() == pytest.approx((linear.matrix**2).sum(), rel=1e-12)


def test_bending_energy_of_an_affine_motion_is_zero(grid):
    field = on_grid(LinearField.of(grid.dim), grid)
    assert bending_energy(field, grid).item() == pytest.approx(0, abs=1e-28)
    assert bending_energy(field.float(), grid).item() == pytest.approx(0, abs=1e-11)


def test_bending_energy_of_a_quadratic_field_is_exact(grid):
    field, expected = quadratic(grid)
    assert bending_energy(field, grid).item() == pytest.approx(expected, rel=1e-10)


def test_mixed_derivatives_count_twice(grid):
    shape, axes = grid.shape, range(grid.dim)
    for k, m in itertools.combinations(axes, 2):
        field = torch.zeros(1, *shape, grid.dim, dtype=F64)
        field[..., 0] = on_grid(lambda x, k=k, m=m: x[..., k] * x[..., m], grid)
        assert bending_energy(field, grid).item() == pytest.approx(2, rel=1e-10)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_sines_over_whole_periods(axis):
    """One component, a sine of wavelength L along one axis over whole periods: means of cos^2 and sin^2 are 1/2."""
    period_vox, amplitude = 40, 1.3
    shape = [5, 5, 5]
    shape[axis] = 2 * period_vox + 1
    grid = Grid(tuple(shape), (1, 1.5, 2))
    spacing = grid.spacing[axis]
    k = 2 * np.pi / (period_vox * spacing)
    field = torch.zeros(1, *shape, 3, dtype=F64)
    field[..., 1] = on_grid(lambda x: amplitude * np.sin(k * x[..., axis] + 0.4), grid)
    # A difference over h sees the slope times sin(kh/2) / (kh/2); twice that for the curvature.
    seen = np.sinc(k * spacing / 2 / np.pi)
    slope, curvature = amplitude**2 * k**2 / 2, amplitude**2 * k**4 / 2
    assert diffusion(field, grid).item() == pytest.approx(slope * seen**2, rel=1e-9)
    assert diffusion(field, grid).item() == pytest.approx(slope, rel=0.01)
    assert bending_energy(field, grid).item() == pytest.approx(curvature * seen**4, rel=0.02)


def test_jacobian_penalty_of_uniform_scaling(grid):
    """Scaled by s everywhere, det J = s^d; mirrored along one axis, det J = -1."""
    middle = np.array(grid.centre)
    for s in (1.0, 0.7, 0.3):
        field = on_grid(lambda x, s=s: (s - 1) * (x - middle), grid)
        assert jacobian_penalty(field, grid).item() == pytest.approx(max(0, 0.1 - s**grid.dim), abs=1e-12)
        assert jacobian_penalty(field, grid, smallest=0.9).item() == pytest.approx(max(0, 0.9 - s**grid.dim), abs=1e-12)
    mirrored = on_grid(lambda x: (x - middle) * np.eye(grid.dim)[0] * -2, grid)
    assert jacobian_penalty(mirrored, grid).item() == pytest.approx(1.1)
    assert jacobian_penalty(mirrored, grid, smallest=0).item() == pytest.approx(1)


# The same by plain loops


def plain_diffusion(u: np.ndarray, spacing: tuple[float, ...]) -> float:
    total = 0.0
    for axis, h in enumerate(spacing):
        step = np.eye(len(spacing), dtype=int)[axis]
        places = [v for v in np.ndindex(u.shape[:-1]) if v[axis] + 1 < u.shape[axis]]
        total += np.mean([((u[tuple(v + step)] - u[v]) ** 2).sum() / h**2 for v in places])
    return total


def plain_bending(u: np.ndarray, spacing: tuple[float, ...]) -> float:
    total, dim = 0.0, len(spacing)
    steps = np.eye(dim, dtype=int)
    for k, m in itertools.product(range(dim), repeat=2):  # mixed terms come up twice here
        values = []
        for v in np.ndindex(u.shape[:-1]):
            far = np.array(v) + steps[k] + steps[m]
            if (far < u.shape[:-1]).all():
                corner = u[tuple(far)] - u[tuple(v + steps[k])] - u[tuple(v + steps[m])] + u[v]
                values.append(((corner / (spacing[k] * spacing[m])) ** 2).sum())
        total += np.mean(values)
    return total


def test_diffusion_and_bending_energy_are_their_plain_loops(grid):
    field = random_field(grid)
    for term, plain in ((diffusion, plain_diffusion), (bending_energy, plain_bending)):
        expected = [plain(u.numpy(), grid.spacing) for u in field]
        np.testing.assert_allclose(term(field, grid), expected, rtol=1e-11)


def test_bending_energy_is_monais_inside_but_for_the_places_of_the_mixed_terms():
    """Along one axis alone there are no mixed terms, and MONAI (in voxels, per component) differs by known factors."""
    grid = Grid((7, 9, 11), 2.0)
    profile = torch.rand(11, dtype=F64)
    field = profile.expand(grid.shape)[None, ..., None] * torch.tensor([1.0, 0, 0], dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monai = BendingEnergyLoss()(field.movedim(-1, 1)).item()
    assert bending_energy(field, grid).item() == pytest.approx(monai * 3 / 2.0**4, rel=1e-9)


def test_jacobian_penalty_acts_on_the_determinant_of_dense(grid):
    field = 3 * random_field(grid)
    det = jacobian_determinant(Dense(field, grid), grid, field)
    assert bool((det < 0).any())
    expected = (0.1 - det).clamp_min(0).flatten(1).mean(1)
    torch.testing.assert_close(jacobian_penalty(field, grid), expected, rtol=1e-6, atol=1e-8)


def test_descending_the_jacobian_penalty_unfolds():
    grid = Grid((12, 14), (1, 1.5))
    field = on_grid(WaveField(4.0, 15.0), grid).requires_grad_()
    folded = (jacobian_determinant(Dense(field, grid), grid, field) <= 0).sum().item()
    assert folded > 10
    optimiser = torch.optim.Adam([field], lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        jacobian_penalty(field, grid).sum().backward()
        optimiser.step()
    assert (jacobian_determinant(Dense(field, grid), grid, field) <= 0).sum().item() == 0


# One field, two samplings


def spline(dim: int, amplitude: float = 2.0) -> tuple[Tensor, Grid]:
    ctrl = bspline.control_grid(COARSE[dim], 12.0)
    return amplitude * (2 * torch.rand(1, *ctrl.shape, dim, dtype=F64) - 1), ctrl


@pytest.mark.parametrize("term", [diffusion, bending_energy])
@pytest.mark.parametrize("dim", [2, 3])
def test_one_field_on_two_samplings_within_two_percent(dim, term):
    coarse = COARSE[dim]
    fine = coarse.resized([2 * n for n in coarse.shape])
    wave = WaveField(1.0, 24.0)
    values = [term(on_grid(wave, grid), grid).item() for grid in (coarse, fine)]
    assert values[0] == pytest.approx(values[1], rel=0.02)
    # Negative control: the same field with the spacing forgotten.
    forgotten = [term(on_grid(wave, grid), Grid(grid.shape)).item() for grid in (coarse, fine)]
    assert forgotten[0] > 3.5 * forgotten[1]


@pytest.mark.parametrize("dim", [2, 3])
def test_the_spline_energy_is_independent_of_the_sampling(dim):
    coefficients, ctrl = spline(dim)
    coarse = COARSE[dim]
    grids = [coarse, coarse.resized([2 * n for n in coarse.shape]), coarse.resized([n // 2 for n in coarse.shape])]
    values = [bending_energy_spline(coefficients, ctrl, grid).item() for grid in grids]
    np.testing.assert_allclose(values, values[0], rtol=0.02)


@pytest.mark.parametrize("dim", [2, 3])
def test_differences_approach_the_spline_energy(dim):
    coefficients, ctrl = spline(dim)
    grid = COARSE[dim].resized([{2: 8, 3: 3}[dim] * n for n in COARSE[dim].shape])
    field = FreeForm(coefficients, ctrl).displacement_on(grid)
    exact = bending_energy_spline(coefficients, ctrl, grid).item()
    assert bending_energy(field, grid).item() == pytest.approx(exact, rel=0.02)


def test_spline_energy_is_the_mean_over_voxels_of_plain_second_derivatives(grid):
    ctrl = bspline.control_grid(grid, (3.0, 4.0, 5.0)[: grid.dim])
    coefficients = torch.rand(2, *ctrl.shape, grid.dim, dtype=F64)
    points = flat_points(grid, dtype=F64)
    expected = torch.zeros(2, dtype=F64)
    for k, m in itertools.product(range(grid.dim), repeat=2):
        orders = np.eye(grid.dim, dtype=int)[k] + np.eye(grid.dim, dtype=int)[m]
        expected += bspline.evaluate(coefficients, ctrl, points, orders.tolist()).square().sum(-1).mean(1)
    torch.testing.assert_close(bending_energy_spline(coefficients, ctrl, grid), expected)


def test_spline_energy_of_a_quadratic_field_is_exact(grid):
    ctrl = bspline.control_grid(grid, (2.5, 3.0, 5.0)[: grid.dim])
    field, expected = quadratic(grid)
    coefficients = bspline.fit(field, grid, ctrl)
    assert bending_energy_spline(coefficients, ctrl, grid).item() == pytest.approx(expected, rel=1e-6)


def test_spline_energy_of_an_affine_motion_is_zero(grid):
    ctrl = bspline.control_grid(grid, 3.0)
    coefficients = on_grid(LinearField.of(grid.dim), ctrl)  # linear coefficients are a linear field
    assert bending_energy_spline_plain(coefficients, ctrl, grid).item() == pytest.approx(0, abs=1e-25)
    # products of the basis lose half of the digits, where the parts cancel: of 1e-4 per mm^2 that single terms have
    assert bending_energy_spline(coefficients, ctrl, grid).item() == pytest.approx(0, abs=1e-16)
    assert bending_energy_spline(coefficients.float(), ctrl, grid).item() == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_spline_energy_by_products_of_the_basis_is_the_plain_one(dim, batch):
    grid = Grid((15, 11, 9)[:dim], (1.0, 1.5, 2.0)[:dim], (-3.0, 5.0, 10.5)[:dim])
    ctrl = bspline.control_grid(grid, (3.0, 4.0, 5.5)[:dim])
    double = torch.randn(batch, *ctrl.shape, dim, dtype=F64) * torch.arange(1, batch + 1).reshape(-1, *[1] * (dim + 1))
    for dtype, tolerance in ((F64, 1e-12), (torch.float32, 1e-5)):
        coefficients = [double.to(dtype).clone().requires_grad_() for _ in range(2)]
        fast, plain = (
            energy(c, ctrl, grid)
            for energy, c in zip((bending_energy_spline, bending_energy_spline_plain), coefficients, strict=True)
        )
        assert fast.shape == (batch,)
        assert fast.dtype == dtype
        torch.testing.assert_close(fast, plain, rtol=tolerance, atol=0)
        fast.sum().backward()
        plain.sum().backward()
        largest = coefficients[1].grad.abs().max().item()
        torch.testing.assert_close(coefficients[0].grad, coefficients[1].grad, rtol=0, atol=tolerance * largest)


def test_the_spline_energy_is_that_of_the_image_and_not_of_the_control_points(grid):
    """An image that covers a part of the control grid sees the bending of that part."""
    ctrl = bspline.control_grid(grid, 3.0)
    coefficients = torch.randn(1, *ctrl.shape, grid.dim, dtype=F64)
    part = grid.cropped([2] * grid.dim, [6] * grid.dim)
    whole, seen = (bending_energy_spline(coefficients, ctrl, g) for g in (grid, part))
    torch.testing.assert_close(seen, bending_energy_spline_plain(coefficients, ctrl, part), rtol=1e-10, atol=0)
    assert not torch.allclose(whole, seen, rtol=0.01)


# What all have in common


def test_a_zigzag_is_seen_by_differences_of_neighbours(grid):
    zigzag = torch.ones(grid.shape, dtype=F64)
    zigzag[1::2] = -1
    field = zigzag[None, ..., None].expand(1, *grid.shape, grid.dim)
    inside = gradient(field.movedim(-1, 1), grid)[:, :, 1:-1]
    assert inside.abs().max() == 0  # central differences do not see it
    assert diffusion(field, grid).item() == pytest.approx(grid.dim * 4 / grid.spacing[0] ** 2)
    assert bending_energy(field, grid).item() == pytest.approx(grid.dim * 16 / grid.spacing[0] ** 4)


@pytest.mark.parametrize("name", TERMS)
def test_gradients_are_right(grid, name):
    small = SMALL[grid.dim]
    field = (2 * random_field(small, 1)).requires_grad_()
    assert gradcheck(lambda u: TERMS[name](u, small), field)


def test_gradient_of_the_spline_energy_is_right(grid):
    ctrl = bspline.control_grid(SMALL[grid.dim], 6.0)
    coefficients = random_field(ctrl, 1).requires_grad_()
    assert gradcheck(lambda c: bending_energy_spline(c, ctrl, SMALL[grid.dim]), coefficients)


@pytest.mark.parametrize("name", TERMS)
def test_items_of_a_batch_do_not_mix_and_float32_will_do(grid, name):
    field = random_field(grid)
    field[1] *= 3
    values = TERMS[name](field, grid)
    assert values.shape == (2,)
    torch.testing.assert_close(values, torch.cat([TERMS[name](u[None], grid) for u in field]))
    torch.testing.assert_close(TERMS[name](field.float(), grid), values.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["diffusion", "bending_energy"])
def test_energies_are_quadratic(grid, name):
    field = random_field(grid)
    torch.testing.assert_close(TERMS[name](3 * field, grid), 9 * TERMS[name](field, grid))


@pytest.mark.parametrize("name", TERMS)
def test_a_field_on_another_grid_gets_one_sentence(name):
    with pytest.raises(ValueError) as caught:
        TERMS[name](torch.zeros(1, 9, 7, 2), GRIDS[2])
    assert one_sentence(caught.value, "7 x 9 x 2", "1 x 9 x 7 x 2")


@pytest.mark.parametrize(("name", "least"), [("diffusion", 2), ("bending_energy", 3), ("jacobian_penalty", 2)])
def test_too_few_voxels_get_one_sentence(name, least):
    thin = Grid((least - 1, 9))
    with pytest.raises(ValueError) as caught:
        TERMS[name](torch.zeros(1, *thin.shape, 2), thin)
    assert one_sentence(caught.value, f"{least} voxels")
    assert bool(TERMS[name](torch.zeros(1, least, 9, 2), Grid((least, 9))).isfinite().all())
