"""How smooth a displacement field is: one number per field, in mm, the same for any sampling of one field.

Convention: displacements ``b *grid d`` in mm on a :class:`~regteach.grid.Grid`, results ``b``. Every term is a mean of
squared derivatives per mm, so it estimates an integral over the image divided by its volume: doubling the number of
voxels changes the estimate, not what is estimated.

Derivatives here are differences of neighbours, each taken where it is exact to second order: a slope half way between
two voxels, a mixed derivative in the middle of four, a curvature at a voxel between its two neighbours. Nothing is made
up beyond the border. (A repeated border would bend every linear field there, and an affine motion would not be free.)
Unlike the central differences of ``sampling.gradient`` they also see a field that zigzags from voxel to voxel.

Sources: diffusion: Fischer and Modersitzki, Fast diffusion registration, Contemporary Mathematics 313 (2002); bending
energy: Rueckert et al., IEEE TMI 18 (1999), eq. 2, here a mean where the paper divides by the volume.
"""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from regteach import bspline
from regteach.grid import Grid
from regteach.precision import exactly
from regteach.sampling import gradient
from regteach.transforms import determinant

LEAST_TO_BEND = 3  # voxels along each axis: second derivatives


def diffusion(displacement: Float[Tensor, "b *grid d"], grid: Grid) -> Float[Tensor, "b"]:
    """Mean of |grad u|^2: the squared slopes of all components along all axes, added up; without unit (mm per mm).

    A translation is free; a linear field u = A x costs the sum of A's squared entries.

    Raises:
        ValueError: if the field is not on the grid, or an axis has fewer than two voxels.
    """
    _check(displacement, grid, least=2)
    slopes = (_difference(displacement, grid, axis) for axis in range(grid.dim))
    return sum((_mean_square(slope) for slope in slopes), displacement.new_zeros(()))


def bending_energy(displacement: Float[Tensor, "b *grid d"], grid: Grid) -> Float[Tensor, "b"]:
    """Mean of the squared second derivatives of all components, 1/mm^2: pure ones once, mixed ones twice.

        sum_i sum_kl (d^2 u_i / dx_k dx_l)^2, averaged for each k, l over the places where the difference exists

    An affine displacement is free. Exact for quadratic fields.

    Raises:
        ValueError: if the field is not on the grid, or an axis has fewer than three voxels.
    """
    _check(displacement, grid, least=LEAST_TO_BEND)
    total = displacement.new_zeros(())
    for k, m in itertools.combinations_with_replacement(range(grid.dim), 2):
        second = _difference(_difference(displacement, grid, k), grid, m)
        total = total + (1 if k == m else 2) * _mean_square(second)
    return total


@exactly
def bending_energy_spline(coefficients: Float[Tensor, "b *ctrl d"], ctrl: Grid, grid: Grid) -> Float[Tensor, "b"]:
    """Bending energy of a free-form deformation, 1/mm^2, from the spline's own second derivatives.

    The derivatives are exact; the mean is over the voxels of ``grid``, which only have to be close enough together to
    sample the spline.

    Args:
        coefficients: of a :class:`~regteach.transforms.FreeForm`, mm.
        ctrl: its control grid.
        grid: the image's grid.
    """
    # The mean over the voxels of (B c)^2 is c^T (B^T B / n) c, and B is a product over axes: one small matrix an axis
    # serves, and no voxel is visited. `bending_energy_spline_plain` visits them; a test compares the two.
    gram = [[_gram(ctrl, grid, axis, order, coefficients) for order in range(3)] for axis in range(grid.dim)]
    total = coefficients.new_zeros(())
    for k, m, orders in _second_orders(grid.dim):
        out = coefficients
        for axis, order in enumerate(orders):
            out = torch.tensordot(out, gram[axis][order], dims=([axis + 1], [0])).movedim(-1, axis + 1)
        total = total + (1 if k == m else 2) * (out * coefficients).flatten(1).sum(1)
    return total


def bending_energy_spline_plain(coefficients: Float[Tensor, "b *ctrl d"], ctrl: Grid, grid: Grid) -> Float[Tensor, "b"]:
    """The same, as it is defined: every second derivative at every voxel."""
    total = coefficients.new_zeros(())
    for k, m, orders in _second_orders(grid.dim):
        total = total + (1 if k == m else 2) * _mean_square(bspline.evaluate_grid(coefficients, ctrl, grid, orders))
    return total


def jacobian_penalty(displacement: Float[Tensor, "b *grid d"], grid: Grid, smallest: float = 0.1) -> Float[Tensor, "b"]:
    """Mean of max(0, smallest - det J) over the voxels, without unit: what is folded, or squeezed nearly flat, pays.

    J = I + grad u by the central differences of ``sampling.gradient``: the determinant of ``Dense``, which
    ``metrics.folding_percent`` counts, so that the penalty acts on what is reported. It is blind to a zigzag between
    neighbours; combine it with a smoothness term.

    Args:
        displacement: mm.
        grid: where the displacements sit.
        smallest: ratio of volumes down to which shrinking is free; 0 for a penalty on folds alone.

    Raises:
        ValueError: if the field is not on the grid, or an axis has fewer than two voxels.
    """
    _check(displacement, grid, least=2)
    slopes = gradient(displacement.movedim(-1, 1), grid).movedim(1, -2)  # b *grid i k
    det = determinant(slopes + torch.eye(grid.dim).to(slopes))
    return (smallest - det).relu().flatten(1).mean(1)


def _second_orders(dim: int) -> list[tuple[int, int, list[int]]]:
    """Pairs of axes (k, m), k <= m, and the order of the derivative along each axis."""
    pairs = itertools.combinations_with_replacement(range(dim), 2)
    return [(k, m, [int(axis == k) + int(axis == m) for axis in range(dim)]) for k, m in pairs]


def _gram(ctrl: Grid, grid: Grid, axis: int, order: int, like: Tensor) -> Float[Tensor, "m m"]:
    """Products of the basis functions' derivatives along one axis, averaged over its voxels."""
    basis = bspline.basis_matrix(ctrl, grid, axis, order, like.new_zeros((), dtype=torch.float64))
    return (basis.T @ basis / grid.shape[axis]).to(like)


def _difference(field: Tensor, grid: Grid, axis: int) -> Tensor:
    """Slope along one axis between neighbours, per mm; one place fewer along that axis."""
    return field.diff(dim=axis + 1) / grid.spacing[axis]


def _mean_square(derivative: Tensor) -> Float[Tensor, "b"]:
    """Squares added over the components, averaged over the places."""
    return derivative.square().sum(-1).flatten(1).mean(1)


def _check(displacement: Tensor, grid: Grid, least: int) -> None:
    if tuple(displacement.shape[1:]) != (*grid.shape, grid.dim):
        raise ValueError(
            f"A displacement on this grid is batch x {' x '.join(map(str, grid.shape))} x {grid.dim}, "
            f"but the tensor is {' x '.join(map(str, displacement.shape))}."
        )
    if min(grid.shape) < least:
        raise ValueError(f"These derivatives need {least} voxels along each axis, but the grid is {grid.shape}.")
