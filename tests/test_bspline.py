"""Cubic B-splines against scipy.interpolate, polynomials, autograd and finite differences."""

import itertools

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline, NdBSpline
from torch import Tensor
from truths.fields import GRIDS, CubicField, jacobian_by_autograd, one_sentence, points_inside, positions

from regteach.bspline import basis, basis_matrix, control_grid, evaluate, evaluate_grid, fit
from regteach.grid import Grid

SPACINGS = [3.0, 4.5, (2.5, 4.0, 7.0)]


def control_of(grid: Grid, spacing: float | tuple[float, ...] = (2.5, 4.0, 7.0)) -> Grid:
    return control_grid(grid, spacing[: grid.dim] if isinstance(spacing, tuple) else spacing)


def random_coefficients(ctrl: Grid, batch: int = 1, components: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, *ctrl.shape, components, dtype=dtype)


def scipy_spline(coefficients: np.ndarray, ctrl: Grid) -> NdBSpline:
    """The same spline in control-point units; three zero coefficients all round give SciPy the fade-out."""
    padded = np.pad(coefficients, [(3, 3)] * ctrl.dim + [(0, 0)])
    # the cubic basis function with index j has knots j ... j + 4 and its middle at j + 2
    knots = tuple(np.arange(n + 6 + 4) - 5.0 for n in ctrl.shape)
    return NdBSpline(knots, padded, k=3)


def in_control_units(points: np.ndarray, ctrl: Grid) -> np.ndarray:
    return (points - np.array(ctrl.origin)) / np.array(ctrl.spacing)


def orders_up_to_two(dim: int) -> list[tuple[int, ...]]:
    return [o for o in itertools.product((0, 1, 2), repeat=dim) if sum(o) <= 2]


# The basis function


@pytest.mark.parametrize("derivative", [0, 1, 2])
def test_basis_agrees_with_scipy(derivative):
    t = np.linspace(-1.999, 1.999, 401)
    expected = BSpline.basis_element([-2, -1, 0, 1, 2]).derivative(derivative)(t) if derivative else None
    if expected is None:
        expected = BSpline.basis_element([-2, -1, 0, 1, 2])(t)
    np.testing.assert_allclose(basis(torch.from_numpy(t), derivative), expected, atol=1e-12)


def test_basis_has_support_four_and_known_values():
    at = basis(torch.tensor([-5.0, -2.0, -1.0, 0.0, 1.0, 2.0, 5.0], dtype=torch.float64))
    np.testing.assert_allclose(at, [0, 0, 1 / 6, 2 / 3, 1 / 6, 0, 0], atol=1e-15)
    for derivative in (1, 2):
        assert basis(torch.tensor([-2.5, 2.5, 7.0]), derivative).abs().max() == 0


@pytest.mark.parametrize(("derivative", "total"), [(0, 1.0), (1, 0.0), (2, 0.0)])
def test_partition_of_unity_and_of_its_derivatives(derivative, total):
    t = torch.linspace(0, 1, 57, dtype=torch.float64)
    summed = sum(basis(t - k, derivative) for k in range(-3, 5))
    np.testing.assert_allclose(summed, total, atol=1e-14)


@pytest.mark.parametrize("derivative", [3, -1])
def test_basis_refuses_other_derivatives(derivative):
    with pytest.raises(ValueError) as caught:
        basis(torch.zeros(1), derivative)
    assert one_sentence(caught.value, str(derivative))


# The control grid


@pytest.mark.parametrize("spacing", SPACINGS)
def test_control_grid_covers_centred_and_smallest(grid, spacing):
    ctrl = control_of(grid, spacing)
    assert ctrl.spacing == pytest.approx(tuple(np.broadcast_to(spacing, (3,))[: grid.dim]))
    np.testing.assert_allclose(ctrl.centre, grid.centre, atol=1e-9)
    low, high = in_control_units(np.array([grid.origin, grid.last]), ctrl)
    # the four control points of x are floor(x) - 1 ... floor(x) + 2
    assert (low >= 1 - 1e-9).all()
    assert (high <= np.array(ctrl.shape) - 2 + 1e-9).all()
    # one control point fewer would not do: half of it is missing on each side
    assert ((low - 0.5 < 1) & (high + 0.5 > np.array(ctrl.shape) - 2)).all()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_constant_coefficients_give_the_constant_all_over_the_image(grid, spacing):
    ctrl = control_of(grid, spacing)
    coefficients = torch.full((1, *ctrl.shape, 1), 2.5, dtype=torch.float64)
    np.testing.assert_allclose(evaluate_grid(coefficients, ctrl, grid), 2.5, atol=1e-12)
    for axis in range(grid.dim):
        order = tuple(int(k == axis) for k in range(grid.dim))
        np.testing.assert_allclose(evaluate_grid(coefficients, ctrl, grid, order), 0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 5), (1, 1, 1)])
def test_control_grid_of_a_thin_image(shape):
    thin = Grid(shape)
    ctrl = control_grid(thin, 4.0)
    ones = torch.ones(1, *ctrl.shape, 1, dtype=torch.float64)
    np.testing.assert_allclose(evaluate_grid(ones, ctrl, thin), 1, atol=1e-12)


# Evaluation


@pytest.mark.parametrize("margin", [0.0, -4.0], ids=["inside", "outside too"])
def test_evaluate_agrees_with_scipy_in_value_and_derivatives(grid, margin):
    ctrl = control_of(grid)
    coefficients = random_coefficients(ctrl)
    points = points_inside(grid, 300, margin=margin)
    where = in_control_units(points[0].numpy(), ctrl)
    # SciPy's knots end three control points beyond the grid; further out the truth is 0
    known = ((where > -3) & (where < np.array(ctrl.shape) + 2)).all(axis=-1)
    spline = scipy_spline(coefficients[0].numpy(), ctrl)
    for order in orders_up_to_two(grid.dim):
        expected = np.zeros((len(where), 2))
        expected[known] = spline(where[known], nu=order) / np.prod(np.array(ctrl.spacing) ** order)
        ours = evaluate(coefficients, ctrl, points, order)[0]
        np.testing.assert_allclose(ours, expected, atol=1e-10, err_msg=f"derivative {order}")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_evaluate_grid_equals_evaluate(grid, spacing):
    ctrl = control_of(grid, spacing)
    coefficients = random_coefficients(ctrl, batch=2, components=3)
    points = torch.from_numpy(positions(grid)).reshape(1, -1, grid.dim)
    for order in [None, *orders_up_to_two(grid.dim)]:
        plain = evaluate(coefficients, ctrl, points, order).reshape(2, *grid.shape, 3)
        fast = evaluate_grid(coefficients, ctrl, grid, order)
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)


def test_evaluate_grid_on_a_grid_that_leaves_the_control_points(grid):
    ctrl = control_of(grid)
    wide = grid.padded(9, 7)
    coefficients = random_coefficients(ctrl)
    points = torch.from_numpy(positions(wide)).reshape(1, -1, grid.dim)
    plain = evaluate(coefficients, ctrl, points).reshape(1, *wide.shape, 2)
    torch.testing.assert_close(evaluate_grid(coefficients, ctrl, wide), plain, rtol=0, atol=1e-12)


def test_basis_matrix_is_the_basis_function(grid):
    ctrl = control_of(grid)
    for axis in range(grid.dim):
        x = grid.origin[axis] + grid.spacing[axis] * np.arange(grid.shape[axis])
        t = (x[:, None] - ctrl.origin[axis]) / ctrl.spacing[axis] - np.arange(ctrl.shape[axis])
        for derivative in (0, 1, 2):
            matrix = basis_matrix(ctrl, grid, axis, derivative, torch.zeros(1, dtype=torch.float64))
            expected = basis(torch.from_numpy(t), derivative) / ctrl.spacing[axis] ** derivative
            torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-12)


def test_first_derivatives_against_autograd(grid):
    ctrl = control_of(grid)
    coefficients = random_coefficients(ctrl)
    points = points_inside(grid, 50, margin=-3)
    jacobian = jacobian_by_autograd(lambda x: evaluate(coefficients, ctrl, x), points)
    for axis in range(grid.dim):
        order = tuple(int(k == axis) for k in range(grid.dim))
        torch.testing.assert_close(evaluate(coefficients, ctrl, points, order), jacobian[..., axis], rtol=0, atol=1e-10)


def test_second_derivatives_against_finite_differences(grid):
    ctrl = control_of(grid)
    coefficients = random_coefficients(ctrl)
    points = points_inside(grid, 50)
    step = 1e-4
    for first, second in itertools.product(range(grid.dim), repeat=2):
        inner = tuple(int(k == first) for k in range(grid.dim))
        both = tuple(int(k == first) + int(k == second) for k in range(grid.dim))
        shift = torch.zeros(grid.dim, dtype=torch.float64)
        shift[second] = step
        ahead, behind = (evaluate(coefficients, ctrl, points + s * shift, inner) for s in (1, -1))
        # second derivatives are continuous but have corners at control points: an error of order `step` there
        torch.testing.assert_close(
            evaluate(coefficients, ctrl, points, both), (ahead - behind) / (2 * step), rtol=0, atol=1e-3
        )


def test_the_fade_out_beyond_the_control_grid_is_continuous_and_ends_after_two_spacings(grid):
    ctrl = control_of(grid)
    coefficients = 1 + torch.rand(1, *ctrl.shape, 1, dtype=torch.float64)
    for axis in range(grid.dim):
        # a walk along one axis through the middle, from well inside to well outside
        steps = torch.linspace(-1.5, 3.0, 4501, dtype=torch.float64)
        line = torch.tensor(ctrl.centre, dtype=torch.float64).repeat(len(steps), 1)
        line[:, axis] = ctrl.last[axis] + steps * ctrl.spacing[axis]
        value = evaluate(coefficients, ctrl, line[None])[0, :, 0]
        slope = evaluate(coefficients, ctrl, line[None], tuple(int(k == axis) for k in range(grid.dim)))[0, :, 0]
        assert value[steps >= 2].abs().max() <= 1e-12
        assert (value[steps < 1.9] > 0).all()
        # coefficients are at most 2: a jump would show against the largest slope that a step of 1e-3 allows
        assert (value[1:] - value[:-1]).abs().max() <= 2 * 1e-3
        assert (slope[1:] - slope[:-1]).abs().max() <= 2 * 2 * 1e-3 / ctrl.spacing[axis] * 2


def test_a_batch_of_one_serves_all(grid):
    ctrl = control_of(grid)
    coefficients, points = random_coefficients(ctrl, batch=3), points_inside(grid, 10, batch=3)
    for several_c, several_p in [(coefficients, points), (coefficients[:1], points), (coefficients, points[:1])]:
        expected = torch.cat(
            [
                evaluate(c[None], ctrl, p[None])
                for c, p in zip(several_c.expand(3, *[-1] * (grid.dim + 1)), several_p.expand(3, -1, -1), strict=True)
            ]
        )
        torch.testing.assert_close(evaluate(several_c, ctrl, several_p), expected)


def test_gradcheck_in_coefficients_and_points():
    ctrl = control_grid(GRIDS[2], 6.0)
    coefficients = random_coefficients(ctrl).requires_grad_()
    points = points_inside(GRIDS[2], 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda c, p: evaluate(c, ctrl, p), (coefficients, points))
    small = GRIDS[2].resized((3, 4))
    assert torch.autograd.gradcheck(lambda c: evaluate_grid(c, ctrl, small, (1, 0)), (coefficients,))


# Fitting


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_cubic_polynomial_is_fitted_exactly(grid, spacing, dtype, tolerance):
    field, ctrl = CubicField.of(grid), control_of(grid, spacing)
    values = torch.from_numpy(field(positions(grid)))
    coefficients = fit(values.to(dtype)[None], grid, ctrl)
    assert coefficients.dtype == dtype
    fitted = evaluate_grid(coefficients, ctrl, grid)[0].double()
    assert (fitted - values).abs().max() <= tolerance * values.abs().max()


@pytest.mark.parametrize("spacing", [(2.5, 4.0, 7.0), (3.0, 3.0, 5.0)])
def test_the_fitted_polynomial_holds_between_the_voxels_and_in_its_derivatives(spacing):
    # more voxels than control points along every axis: the polynomial's coefficients are the only solution
    grid = Grid((12, 13, 14), (1.0, 1.5, 2.0), (-3.0, 5.0, 10.5))
    field, ctrl = CubicField.of(grid), control_grid(grid, spacing)
    coefficients = fit(torch.from_numpy(field(positions(grid)))[None], grid, ctrl)
    points = points_inside(grid, 200)
    expected = torch.from_numpy(field(points.numpy()))
    assert (evaluate(coefficients, ctrl, points) - expected).abs().max() <= 1e-10 * expected.abs().max()
    step = 1e-5
    ahead, behind = (field(points.numpy() + s * np.array([0, step, 0])) for s in (1, -1))
    np.testing.assert_allclose(
        evaluate(coefficients, ctrl, points, (0, 1, 0)), (ahead - behind) / (2 * step), rtol=0, atol=1e-6
    )


def test_fit_is_the_least_squares_solution(grid):
    ctrl = control_of(grid)
    values = torch.randn(1, *grid.shape, 2, dtype=torch.float64)
    rows = [basis_matrix(ctrl, grid, axis, 0, values).numpy() for axis in range(grid.dim)]
    full = rows[0]
    for row in rows[1:]:
        full = np.kron(full, row)
    expected = np.linalg.lstsq(full, values[0].reshape(-1, 2).numpy(), rcond=1e-10)[0]
    ours = fit(values, grid, ctrl)[0].reshape(-1, 2)
    np.testing.assert_allclose(full @ ours.numpy(), full @ expected, atol=1e-8)
    assert np.linalg.norm(ours) <= np.linalg.norm(expected) * (1 + 1e-6)


def test_fit_gives_the_coefficients_back(grid):
    # fewer control points than voxels: the coefficients are determined
    dense = grid.resized(tuple(4 * n for n in grid.shape))
    ctrl = control_of(grid)
    coefficients = random_coefficients(ctrl)
    torch.testing.assert_close(
        fit(evaluate_grid(coefficients, ctrl, dense), dense, ctrl), coefficients, rtol=0, atol=1e-7
    )


# Errors, dtypes


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda c, g, x, p: evaluate(c[:, 1:], g, p), "x"),
        (lambda c, g, x, p: evaluate_grid(c[:, 1:], g, x), "x"),
        (lambda c, g, x, p: evaluate(c, g, p, (1,)), "1"),
        (lambda c, g, x, p: evaluate(c, g, p, (3, 0, 0)[: g.dim]), "3"),
        (lambda c, g, x, p: evaluate(c, g, p[..., :1]), "1"),
        (lambda c, g, x, p: evaluate(c.repeat(2, *[1] * (g.dim + 1)), g, p.repeat(3, 1, 1)), "3"),
        (lambda c, g, x, p: fit(c[:, 1:], g, x), "x"),
        (lambda c, g, x, p: control_grid(x, 0.0), "0"),
        (lambda c, g, x, p: control_grid(x, -3.0), "-3"),
    ],
)
def test_bad_input_gets_one_sentence(grid, call, said):
    ctrl = control_of(grid)
    with pytest.raises(ValueError) as caught:
        call(random_coefficients(ctrl), ctrl, grid, points_inside(grid, 3))
    assert one_sentence(caught.value, said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_stays(grid, dtype):
    ctrl = control_of(grid)
    coefficients = random_coefficients(ctrl, dtype=dtype)
    assert evaluate(coefficients, ctrl, points_inside(grid, 3, dtype=dtype)).dtype == dtype
    assert evaluate_grid(coefficients, ctrl, grid).dtype == dtype
    assert fit(evaluate_grid(coefficients, ctrl, grid), grid, ctrl).dtype == dtype


def test_a_fit_keeps_float32_under_autocast() -> None:
    grid = Grid((12, 10))
    ctrl = control_grid(grid, 4.0)
    torch.manual_seed(0)
    values = 20 * torch.randn(1, *grid.shape, 2)
    expected = fit(values, grid, ctrl)
    with torch.autocast("cpu", torch.bfloat16):
        found = fit(values, grid, ctrl)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
