"""Uniform cubic B-splines on a control grid, their derivatives, and least-squares fits.

    f(x) = sum_k B((x - k_origin) / h - k) c_k,   in d dimensions the product of one such factor per axis

B is the centred cubic B-spline of support 4, h the control spacing in mm. Coefficients are ``b *ctrl e`` with any
number of components e (d for a displacement in mm). Coefficients outside the control grid count as 0, so beyond its
edge the function fades smoothly to 0 within two spacings; :func:`control_grid` leaves enough margin that this never
happens inside the image. Polynomials up to degree 3 are reproduced exactly.

Two evaluations of the same formula: :func:`evaluate`, plain, at any points, and :func:`evaluate_grid`, for the points
of a grid, where the product separates into one small matrix per axis. A test compares them.

Sources: Rueckert et al., Nonrigid registration using free-form deformations, IEEE TMI 18 (1999), eq. 1;
Unser, Splines: a perfect fit, IEEE Signal Processing Magazine 16 (1999).
"""

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regteach.grid import Grid, per_axis
from regteach.precision import exactly

# A displacement whose coefficients stay below this part of the control spacing, in every component, can not fold.
# Source: Choi and Lee, Injectivity conditions of 2D and 3D uniform cubic B-spline functions, Graph. Models 62 (2000).
FOLD_FREE = {2: 1 / 2.046392675, 3: 1 / 2.479472335}


def control_grid(grid: Grid, spacing_mm: float | Sequence[float]) -> Grid:
    """Smallest control grid of this spacing, centred on ``grid``, whose splines cover all of it.

    Every voxel centre then has its full four control points along each axis.
    """
    spacing = per_axis(spacing_mm, grid.dim, "spacing_mm")
    if min(spacing) <= 0:
        raise ValueError(f"The control spacing is a distance in mm and must be positive, but it is {spacing}.")
    spans = [(n - 1) * h for n, h in zip(grid.shape, grid.spacing, strict=True)]
    # ceil(span / s) intervals hold the voxels; one more control point on either side completes their support.
    shape = tuple(max(1, math.ceil(span / s - 1e-6)) + 3 for span, s in zip(spans, spacing, strict=True))
    origin = tuple(c - 0.5 * (n - 1) * s for c, n, s in zip(grid.centre, shape, spacing, strict=True))
    return Grid(shape, spacing, origin)


def basis(t: Tensor, derivative: int = 0) -> Tensor:
    """The centred cubic B-spline B(t), or its first or second derivative; t in control spacings.

    Raises:
        ValueError: for a derivative above 2.
    """
    a = t.abs()
    if derivative == 0:
        inner, outer = 2 / 3 - a**2 + a**3 / 2, (2 - a) ** 3 / 6
    elif derivative == 1:
        inner, outer = t.sign() * (1.5 * a**2 - 2 * a), -t.sign() * (2 - a) ** 2 / 2
    elif derivative == 2:
        inner, outer = 3 * a - 2, 2 - a
    else:
        raise ValueError(f"Derivatives 0, 1 and 2 of a cubic B-spline are offered, not {derivative}.")
    return torch.where(a < 1, inner, torch.where(a < 2, outer, torch.zeros_like(t)))


def evaluate(
    coefficients: Float[Tensor, "b *ctrl e"],
    ctrl: Grid,
    points: Float[Tensor, "b n d"],
    derivative: Sequence[int] | None = None,
) -> Float[Tensor, "b n e"]:
    """Value, or a partial derivative, of the spline at any points.

    Args:
        coefficients: on the control grid ``ctrl``.
        ctrl: the control grid.
        points: mm; a batch of one serves all coefficients, and the other way round.
        derivative: order per axis, (1, 0) for d/dx0; each order adds a unit of 1/mm.
    """
    orders = _check(coefficients, ctrl, derivative)
    if points.ndim != 3 or points.shape[-1] != ctrl.dim:
        raise ValueError(f"Points are batch x number x {ctrl.dim}, but the tensor is {tuple(points.shape)}.")
    if len({coefficients.shape[0], points.shape[0]} - {1}) > 1:
        raise ValueError(f"A batch of {coefficients.shape[0]} splines does not fit {points.shape[0]} sets of points.")
    batch = max(coefficients.shape[0], points.shape[0])
    flat = coefficients.flatten(1, ctrl.dim).expand(batch, -1, -1)
    position = (points - points.new_tensor(ctrl.origin)) / points.new_tensor(ctrl.spacing)
    first = position.floor().long() - 1  # the first of the four control points that reach a point
    total = coefficients.new_zeros(())
    for offset in itertools.product(range(4), repeat=ctrl.dim):
        index = first + torch.tensor(offset, device=points.device)
        weight, inside = _tensor_product(position - index, index, ctrl, orders)
        neighbour = _flat_index(index, ctrl).expand(batch, -1)
        values = flat.gather(1, neighbour[..., None].expand(-1, -1, flat.shape[-1]))
        total = total + (weight * inside)[..., None] * values
    return total


@exactly
def evaluate_grid(
    coefficients: Float[Tensor, "b *ctrl e"], ctrl: Grid, grid: Grid, derivative: Sequence[int] | None = None
) -> Float[Tensor, "b *grid e"]:
    """The same at all voxel centres of ``grid``: one matrix product per axis instead of 4^d gathers per voxel."""
    out = coefficients
    for axis, order in enumerate(_check(coefficients, ctrl, derivative)):
        weights = basis_matrix(ctrl, grid, axis, order, coefficients)
        out = torch.tensordot(out, weights, dims=([axis + 1], [1])).movedim(-1, axis + 1)
    return out


def basis_matrix(ctrl: Grid, grid: Grid, axis: int, derivative: int, like: Tensor) -> Float[Tensor, "n m"]:
    """Weight of each of the m control points at each of the n voxels along one axis, per mm^derivative."""
    spacing = ctrl.spacing[axis]
    voxels = torch.arange(grid.shape[axis], dtype=torch.float64) * grid.spacing[axis] + grid.origin[axis]
    controls = torch.arange(ctrl.shape[axis], dtype=torch.float64) * spacing + ctrl.origin[axis]
    weights = basis((voxels[:, None] - controls) / spacing, derivative) / spacing**derivative
    return weights.to(device=like.device, dtype=like.dtype)


@exactly
def fit(values: Float[Tensor, "b *grid e"], grid: Grid, ctrl: Grid) -> Float[Tensor, "b *ctrl e"]:
    """Coefficients whose spline is closest, in least squares over the voxels, to ``values``.

    With control points denser than voxels the solution of least norm is returned. The basis is a product over axes, and
    so is its pseudo-inverse: one small matrix per axis.
    """
    if tuple(values.shape[1:-1]) != grid.shape:
        raise ValueError(f"Values of shape {tuple(values.shape)} are not b x {grid.shape} x components.")
    out = values
    for axis in range(grid.dim):
        inverse = torch.linalg.pinv(basis_matrix(ctrl, grid, axis, 0, out.new_zeros((), dtype=torch.float64)))
        out = torch.tensordot(out, inverse.to(out), dims=([axis + 1], [1])).movedim(-1, axis + 1)
    return out


def _check(coefficients: Tensor, ctrl: Grid, derivative: Sequence[int] | None) -> tuple[int, ...]:
    if coefficients.ndim != ctrl.dim + 2 or tuple(coefficients.shape[1:-1]) != ctrl.shape:
        raise ValueError(
            f"Coefficients are batch x {' x '.join(map(str, ctrl.shape))} x components on this control grid, "
            f"but the tensor is {' x '.join(map(str, coefficients.shape))}."
        )
    orders = (0,) * ctrl.dim if derivative is None else tuple(derivative)
    if len(orders) != ctrl.dim:
        raise ValueError(f"derivative names one order per axis, {ctrl.dim} in all, but it is {orders}.")
    return orders


def _tensor_product(
    t: Float[Tensor, "b n d"], index: Int[Tensor, "b n d"], ctrl: Grid, orders: tuple[int, ...]
) -> tuple[Float[Tensor, "b n"], Tensor]:
    """Product over the axes of B(t), and whether the control point exists at all."""
    weight = torch.ones_like(t[..., 0])
    for axis, order in enumerate(orders):
        weight = weight * basis(t[..., axis], order) / ctrl.spacing[axis] ** order
    shape = torch.tensor(ctrl.shape, device=index.device)
    return weight, ((index >= 0) & (index < shape)).all(-1)


def _flat_index(index: Int[Tensor, "b n d"], ctrl: Grid) -> Int[Tensor, "b n"]:
    """Row-major index of a control point; one outside the grid is clamped (its weight is set to 0 elsewhere)."""
    flat = torch.zeros_like(index[..., 0])
    for axis, n in enumerate(ctrl.shape):
        flat = flat * n + index[..., axis].clamp(0, n - 1)
    return flat
