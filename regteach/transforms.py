"""Spatial transforms: functions from fixed points to moving points.

Convention: points ``b n d`` in mm in tensor order. ``transform(x)`` is where, in the moving image, the fixed image's
point x is found; the moving image is warped onto the fixed grid by reading it there (see ``sampling.warp``). Jacobians
are ``J[..., i, k] = d transform_i / d x_k``, without unit. Every transform is a frozen dataclass of tensors
with a batch axis, differentiable in its tensors and in the points; a batch of one serves any number of point sets.

Sources: FreeForm: Rueckert et al., IEEE TMI 18 (1999), eq. 1; Velocity: Arsigny et al., A log-Euclidean framework for
statistics on diffeomorphisms, MICCAI 2006; inverse: Chen et al., Medical Physics 35 (2008).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from regteach import bspline
from regteach.grid import Grid
from regteach.precision import exactly
from regteach.sampling import flat_points, gradient, sample


class NotInvertibleError(ValueError):
    """The transform has no inverse of its own kind; :func:`fixed_point_inverse` approximates one on a grid."""


class Transform(ABC):
    """A function from fixed to moving points, with its Jacobian and, where one exists, its inverse."""

    @abstractmethod
    def __call__(self, points: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Fixed points to moving points, mm."""

    @abstractmethod
    def jacobian(self, points: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d d"]:
        """Matrix of partial derivatives at each fixed point, analytic where the class says so."""

    def displacement_on(self, grid: Grid, like: Tensor | None = None) -> Float[Tensor, "b *grid d"]:
        """transform(x) - x at every voxel of ``grid``, mm: what :func:`displacement` and ``sampling.warp`` use.

        This is the plain way; a class overrides it where it knows a faster one with the same numbers.
        """
        points = _points_for(self, grid, like)
        return (self(points) - points).unflatten(1, grid.shape)

    def jacobian_on(self, grid: Grid, like: Tensor | None = None) -> Float[Tensor, "b *grid d d"]:
        """Jacobian at every voxel of ``grid``; overridden like :meth:`displacement_on`."""
        return self.jacobian(_points_for(self, grid, like)).unflatten(1, grid.shape)

    def inverse(self) -> "Transform":
        """Moving points to fixed points.

        Raises:
            NotInvertibleError: if this kind of transform has no exact inverse.
        """
        raise NotInvertibleError(
            f"{type(self).__name__} has no closed inverse; fixed_point_inverse approximates one on a grid."
        )


@dataclass(frozen=True)
class Identity(Transform):
    """Every point stays where it is."""

    dim: int

    def __call__(self, points: Tensor) -> Tensor:
        """The points themselves."""
        check_points(points, self.dim)
        return points

    def jacobian(self, points: Tensor) -> Tensor:
        """The unit matrix (analytic)."""
        return torch.eye(self.dim, device=points.device, dtype=points.dtype).expand(*points.shape, -1)

    def inverse(self) -> "Identity":
        """Itself."""
        return self


@dataclass(frozen=True)
class FreeForm(Transform):
    """Free-form deformation: x plus a cubic B-spline displacement.

    Args:
        coefficients: ``b *ctrl d``, mm.
        grid: the control grid (``bspline.control_grid``), of any spacing.
    """

    coefficients: Float[Tensor, "b *ctrl d"]
    grid: Grid

    def __post_init__(self) -> None:
        _check_field(self.coefficients, self.grid)

    @staticmethod
    def identity(
        grid: Grid, spacing_mm: float | Sequence[float], batch: int = 1, like: Tensor | None = None
    ) -> "FreeForm":
        """Zero displacement, with control points every ``spacing_mm`` over an image on ``grid``."""
        like = torch.zeros(()) if like is None else like
        ctrl = bspline.control_grid(grid, spacing_mm)
        return FreeForm(like.new_zeros(batch, *ctrl.shape, grid.dim), ctrl)

    def __call__(self, points: Tensor) -> Tensor:
        """x + sum_k B(x - k) c_k."""
        check_points(points, self.grid.dim, len(self.coefficients))
        return points + bspline.evaluate(self.coefficients, self.grid, points)

    def jacobian(self, points: Tensor) -> Tensor:
        """I + the spline's derivatives (analytic)."""
        slopes = [
            bspline.evaluate(self.coefficients, self.grid, points, _unit_orders(axis, self.grid.dim))
            for axis in range(self.grid.dim)
        ]
        return torch.stack(slopes, dim=-1) + torch.eye(self.grid.dim).to(points)

    def displacement_on(self, grid: Grid, like: Tensor | None = None) -> Float[Tensor, "b *grid d"]:
        """Displacement at the voxels of ``grid``, mm: the separable evaluation, much faster than point by point."""
        return bspline.evaluate_grid(_as(self.coefficients, like), self.grid, grid)

    def jacobian_on(self, grid: Grid, like: Tensor | None = None) -> Float[Tensor, "b *grid d d"]:
        """Jacobian at the voxels of ``grid`` (analytic, separable)."""
        coefficients = _as(self.coefficients, like)
        slopes = [
            bspline.evaluate_grid(coefficients, self.grid, grid, _unit_orders(axis, grid.dim))
            for axis in range(grid.dim)
        ]
        return torch.stack(slopes, dim=-1) + torch.eye(grid.dim).to(coefficients)


@dataclass(frozen=True)
class Dense(Transform):
    """x plus a displacement that is stored per voxel and interpolated linearly; beyond the grid the border is repeated.

    Args:
        displacement: ``b *grid d``, mm.
        grid: where the displacements sit.
    """

    displacement: Float[Tensor, "b *grid d"]
    grid: Grid

    def __post_init__(self) -> None:
        _check_field(self.displacement, self.grid)

    def __call__(self, points: Tensor) -> Tensor:
        """x + u(x)."""
        check_points(points, self.grid.dim, len(self.displacement))
        return points + sample(self.displacement.movedim(-1, 1), points, self.grid).movedim(1, -1)

    def jacobian(self, points: Tensor) -> Tensor:
        """I + central differences of u on the grid, interpolated linearly (exact where u is linear)."""
        slopes = gradient(self.displacement.movedim(-1, 1), self.grid)
        channels = slopes.movedim(-1, 2).flatten(1, 2)  # b (i k) *grid
        values = sample(channels, points, self.grid).movedim(1, -1)
        return values.unflatten(-1, (self.grid.dim,) * 2) + torch.eye(self.grid.dim).to(points)

    def displacement_on(self, grid: Grid, like: Tensor | None = None) -> Float[Tensor, "b *grid d"]:
        """The displacements themselves on their own grid, which needs no interpolation; elsewhere interpolated."""
        return _as(self.displacement, like) if grid == self.grid else super().displacement_on(grid, like)

    def jacobian_on(self, grid: Grid, like: Tensor | None = None) -> Float[Tensor, "b *grid d d"]:
        """I + central differences of u, on its own grid without interpolation."""
        if grid != self.grid:
            return super().jacobian_on(grid, like)
        slopes = gradient(_as(self.displacement, like).movedim(-1, 1), grid).movedim(1, -2)
        return slopes + torch.eye(grid.dim).to(slopes)


@dataclass(frozen=True)
class Velocity(Transform):
    """Flow of a stationary velocity field for unit time, by scaling and squaring.

    The field is halved ``steps`` times, taken as a small displacement, and composed with itself ``steps`` times. With
    enough steps the result is invertible, and the inverse is the flow of the negative field.

    Args:
        velocity: ``b *grid d``, mm per unit time.
        grid: where the velocities sit.
        steps: number of squarings.
    """

    velocity: Float[Tensor, "b *grid d"]
    grid: Grid
    steps: int = 7

    def __post_init__(self) -> None:
        _check_field(self.velocity, self.grid)
        if self.steps < 0:
            raise ValueError(f"steps is a number of squarings, 0 or more, not {self.steps}.")

    def __call__(self, points: Tensor) -> Tensor:
        """exp(v)(x)."""
        return self.integrated()(points)

    def jacobian(self, points: Tensor) -> Tensor:
        """Jacobian of the integrated field, by central differences."""
        return self.integrated().jacobian(points)

    def inverse(self) -> "Velocity":
        """exp(-v)."""
        return Velocity(-self.velocity, self.grid, self.steps)

    def displacement_on(self, grid: Grid, like: Tensor | None = None) -> Float[Tensor, "b *grid d"]:
        """The integrated displacement, without interpolation on the field's own grid."""
        return self.integrated().displacement_on(grid, like)

    def integrated(self) -> Dense:
        """The displacement exp(v) - id on the grid."""
        flow = Dense(self.velocity / 2**self.steps, self.grid)
        points = flat_points(self.grid, self.velocity.device, self.velocity.dtype)
        for _ in range(self.steps):
            once = points + flow.displacement.flatten(1, -2)  # at its own voxels the field needs no interpolation
            twice = flow(once)
            flow = Dense((twice - points).unflatten(1, self.grid.shape), self.grid)
        return flow


@dataclass(frozen=True)
class Compose(Transform):
    """One transform after another: ``Compose((a, b))(x) = b(a(x))``, the first in the tuple is applied first."""

    transforms: tuple[Transform, ...]

    def __call__(self, points: Tensor) -> Tensor:
        """Through all transforms in turn."""
        for transform in self.transforms:
            points = transform(points)
        return points

    @exactly
    def jacobian(self, points: Tensor) -> Tensor:
        """The chain rule: product of the Jacobians, each where its transform is applied."""
        total = Identity(points.shape[-1]).jacobian(points)
        for transform in self.transforms:
            total = transform.jacobian(points) @ total
            points = transform(points)
        return total

    def displacement_on(self, grid: Grid, like: Tensor | None = None) -> Float[Tensor, "b *grid d"]:
        """The first transform in its own fast way; the others at the points that it has moved."""
        if not self.transforms:
            return super().displacement_on(grid, like)
        points = _points_for(self, grid, like)
        moved = points + self.transforms[0].displacement_on(grid, points).flatten(1, -2)
        for transform in self.transforms[1:]:
            moved = transform(moved)
        return (moved - points).unflatten(1, grid.shape)

    @exactly
    def jacobian_on(self, grid: Grid, like: Tensor | None = None) -> Float[Tensor, "b *grid d d"]:
        """The chain rule, with the first transform in its own fast way."""
        if not self.transforms:
            return super().jacobian_on(grid, like)
        points = _points_for(self, grid, like)
        total = self.transforms[0].jacobian_on(grid, points).flatten(1, -3)
        moved = points + self.transforms[0].displacement_on(grid, points).flatten(1, -2)
        for transform in self.transforms[1:]:
            total = transform.jacobian(moved) @ total
            moved = transform(moved)
        return total.unflatten(1, grid.shape)

    def inverse(self) -> "Compose":
        """The inverses in reverse order."""
        return Compose(tuple(transform.inverse() for transform in reversed(self.transforms)))


@dataclass(frozen=True)
class Sum(Transform):
    """Displacements added up: ``Sum((a, b))(x) = x + (a(x) - x) + (b(x) - x)``."""

    transforms: tuple[Transform, ...]

    def __call__(self, points: Tensor) -> Tensor:
        """x plus the sum of all displacements at x."""
        total = points
        for transform in self.transforms:
            total = total + (transform(points) - points)
        return total

    def jacobian(self, points: Tensor) -> Tensor:
        """I plus the sum of the displacements' Jacobians."""
        unit = Identity(points.shape[-1]).jacobian(points)
        total = unit
        for transform in self.transforms:
            total = total + (transform.jacobian(points) - unit)
        return total


def displacement(transform: Transform, grid: Grid, like: Tensor | None = None) -> Float[Tensor, "b *grid d"]:
    """transform(x) - x at every voxel of ``grid``, mm.

    ``like`` gives device and dtype; without it they are those of the transform's own tensors.
    """
    return transform.displacement_on(grid, like)


def jacobian_determinant(transform: Transform, grid: Grid, like: Tensor | None = None) -> Float[Tensor, "b *grid"]:
    """det J at every voxel: 1 keeps volume, below 1 shrinks, 0 or less folds."""
    return determinant(transform.jacobian_on(grid, like))


def determinant(matrices: Float[Tensor, "*any d d"]) -> Float[Tensor, "*any"]:
    """Determinant of 2 x 2 or 3 x 3 matrices, written out: far faster than a factorisation of each."""
    m = matrices
    if m.shape[-2:] not in ((2, 2), (3, 3)):
        raise ValueError(f"Determinants are written out for 2 x 2 and 3 x 3 matrices, not {tuple(m.shape)}.")
    if m.shape[-1] == 2:
        return m[..., 0, 0] * m[..., 1, 1] - m[..., 0, 1] * m[..., 1, 0]
    return (m[..., 0, :] * torch.linalg.cross(m[..., 1, :], m[..., 2, :])).sum(-1)


def fixed_point_inverse(
    transform: Transform, grid: Grid, iterations: int = 50, like: Tensor | None = None
) -> tuple[Dense, Float[Tensor, "b"]]:
    """Inverse of a transform on a grid, by the iteration w <- -u(y + w), and how good it is.

    Converges where the displacement changes by less than 1 mm per mm; a fold has no inverse: its residual stays large.

    Args:
        transform: fixed to moving.
        grid: where the inverse is wanted: a grid in the moving image's space.
        iterations: number of updates.
        like: tensor that gives device and dtype; left out, the transform's own tensors do.

    Returns:
        The inverse displacement, and per batch item the largest residual |transform(inverse(y)) - y|, mm.

    Source: Chen et al., A simple fixed-point approach to invert a deformation field, Medical Physics 35 (2008), eq. 9.
    """
    points = _points_for(transform, grid, like)
    inverse = points
    for _ in range(iterations):
        inverse = points - (transform(inverse) - inverse)
    residual = (transform(inverse) - points).norm(dim=-1).amax(-1)
    shift = (inverse - points).unflatten(1, grid.shape)
    return Dense(shift, grid), residual


def _as(tensor: Tensor, like: Tensor | None) -> Tensor:
    return tensor if like is None else tensor.to(like)


def _unit_orders(axis: int, dim: int) -> tuple[int, ...]:
    return tuple(int(k == axis) for k in range(dim))


def _points_for(transform: Transform, grid: Grid, like: Tensor | None) -> Float[Tensor, "1 n d"]:
    like = next(_tensors(transform), None) if like is None else like
    return flat_points(grid) if like is None else flat_points(grid, like.device, like.dtype)


def _tensors(transform: Transform) -> Iterator[Tensor]:
    """The tensors of a transform, and of those it is made of."""
    for value in vars(transform).values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Tensor):
                yield part
            elif isinstance(part, Transform):
                yield from _tensors(part)


def _check_field(field: Tensor, grid: Grid) -> None:
    if tuple(field.shape[1:]) != (*grid.shape, grid.dim):
        raise ValueError(
            f"A field on this grid is batch x {' x '.join(map(str, grid.shape))} x {grid.dim}, "
            f"but the tensor is {' x '.join(map(str, field.shape))}."
        )


def check_points(points: Tensor, dim: int, batch: int = 1) -> None:
    """Raise a ValueError unless ``points`` is ``b n d`` and its batch fits that of a transform."""
    if points.ndim != 3 or points.shape[-1] != dim:
        raise ValueError(
            f"A {dim}D transform moves points of shape batch x number x {dim}, "
            f"not {' x '.join(map(str, points.shape))}."
        )
    if len({points.shape[0], batch} - {1}) > 1:
        raise ValueError(f"A batch of {batch} transforms does not fit {points.shape[0]} sets of points.")
