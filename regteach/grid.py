"""A grid: where the voxels of an image sit in space.

Convention: axes in tensor order (axis 0 of the array is axis 0 of every tuple here), lengths in millimetres,
voxel centres at ``origin + index * spacing``. The grid is parallel to the axes; images that are not are resampled
when they are read. A grid holds no tensor and knows no device, so that it can be a dictionary key, be compared with
``==``, and be printed.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Vector = tuple[float, ...]


@dataclass(frozen=True)
class Grid:
    """A regular grid of points, in two or three dimensions.

    Args:
        shape: number of voxels along each axis.
        spacing: distance between neighbouring voxel centres along each axis, mm; one number serves all axes.
        origin: position of the centre of voxel (0, 0, ...), mm; one number serves all axes.

    Raises:
        ValueError: if an axis is empty, a spacing is not positive, or the lengths do not agree.

    >>> grid = Grid((7, 9, 11), spacing=(1, 1.5, 2))
    >>> grid.extent
    (7.0, 13.5, 22.0)
    """

    shape: tuple[int, ...]
    spacing: Vector = (1.0,)
    origin: Vector = (0.0,)

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) not in (2, 3):
            raise ValueError(f"A grid has 2 or 3 axes, but this shape has {len(shape)}: {shape}.")
        if min(shape) < 1:
            raise ValueError(f"Every axis of a grid needs at least one voxel, but the shape is {shape}.")
        # The class is frozen: __post_init__ is the one place that may normalise what was given.
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "spacing", per_axis(self.spacing, len(shape), "spacing"))
        object.__setattr__(self, "origin", per_axis(self.origin, len(shape), "origin"))
        if min(self.spacing) <= 0:
            raise ValueError(f"Spacing is a distance in mm and must be positive, but it is {self.spacing}.")

    @property
    def dim(self) -> int:
        """Number of axes, 2 or 3."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel in mm^3 (in 2D its area in mm^2)."""
        return math.prod(self.spacing)

    @property
    def extent(self) -> Vector:
        """Length of each axis in mm, from the outer face of the first voxel to that of the last."""
        return tuple(n * h for n, h in zip(self.shape, self.spacing, strict=True))

    @property
    def centre(self) -> Vector:
        """Middle of the grid, mm."""
        return tuple(o + 0.5 * (n - 1) * h for n, h, o in zip(self.shape, self.spacing, self.origin, strict=True))

    @property
    def last(self) -> Vector:
        """Position of the last voxel centre, mm."""
        return tuple(o + (n - 1) * h for n, h, o in zip(self.shape, self.spacing, self.origin, strict=True))

    def resized(self, shape: Sequence[int]) -> "Grid":
        """Cover the same extent with another number of voxels; spacing and origin follow.

        The outer faces stay where they are, so a coarse voxel centre lies in the middle of the voxels it replaces.
        """
        if len(shape) != self.dim:
            raise ValueError(f"The new shape {tuple(shape)} has {len(shape)} axes, the grid has {self.dim}.")
        if min(shape) < 1:
            raise ValueError(f"Every axis of a grid needs at least one voxel, but the new shape is {tuple(shape)}.")
        spacing = tuple(length / n for length, n in zip(self.extent, shape, strict=True))
        origin = tuple(o + 0.5 * (new - old) for o, old, new in zip(self.origin, self.spacing, spacing, strict=True))
        return Grid(tuple(shape), spacing, origin)

    def coarsened(self, factor: int | Sequence[int]) -> "Grid":
        """Grid after average pooling by ``factor`` (the remainder of an axis is dropped, as pooling does).

        A centre lands between the voxels that were averaged: pooling by 2 puts the first one at voxel 0.5.
        """
        factors = [int(f) for f in per_axis(factor, self.dim, "factor")]
        if min(factors) < 1:
            raise ValueError(f"A grid is pooled by factors of 1 or more, but they are {tuple(factors)}.")
        shape = tuple(n // f for n, f in zip(self.shape, factors, strict=True))
        if min(shape) < 1:
            raise ValueError(f"A grid of {self.shape} voxels is too small to be pooled by {tuple(factors)}.")
        spacing = tuple(h * f for h, f in zip(self.spacing, factors, strict=True))
        origin = tuple(o + 0.5 * (f - 1) * h for o, f, h in zip(self.origin, factors, self.spacing, strict=True))
        return Grid(shape, spacing, origin)

    def with_spacing(self, spacing: float | Sequence[float]) -> "Grid":
        """Cover at least the same extent at another spacing, about the same centre."""
        new = per_axis(spacing, self.dim, "spacing")
        if min(new) <= 0:
            raise ValueError(f"Spacing is a distance in mm and must be positive, but it is {new}.")
        # 1e-6 of a voxel of slack: 10 mm at 0.1 mm is 100 voxels, not 101 because of rounding.
        shape = tuple(max(1, math.ceil(e / h - 1e-6)) for e, h in zip(self.extent, new, strict=True))
        origin = tuple(c - 0.5 * (n - 1) * h for c, n, h in zip(self.centre, shape, new, strict=True))
        return Grid(shape, new, origin)

    def cropped(self, start_vox: Sequence[int], stop_vox: Sequence[int]) -> "Grid":
        """Grid of ``image[start:stop]`` along each axis; the voxels that stay do not move in space."""
        for axis, (a, b, n) in enumerate(zip(start_vox, stop_vox, self.shape, strict=True)):
            if not 0 <= a < b <= n:
                raise ValueError(f"Voxels {a} to {b} of axis {axis} are not inside its {n} voxels.")
        shape = tuple(b - a for a, b in zip(start_vox, stop_vox, strict=True))
        origin = tuple(o + a * h for o, a, h in zip(self.origin, start_vox, self.spacing, strict=True))
        return Grid(shape, self.spacing, origin)

    def padded(self, before_vox: int | Sequence[int], after_vox: int | Sequence[int]) -> "Grid":
        """Grid with voxels added at the start and at the end of each axis."""
        before = [int(v) for v in per_axis(before_vox, self.dim, "before_vox")]
        after = [int(v) for v in per_axis(after_vox, self.dim, "after_vox")]
        if min(before + after) < 0:
            raise ValueError(f"Padding adds voxels, but {before} and {after} were given; use cropped to remove some.")
        shape = tuple(n + b + a for n, b, a in zip(self.shape, before, after, strict=True))
        origin = tuple(o - b * h for o, b, h in zip(self.origin, before, self.spacing, strict=True))
        return Grid(shape, self.spacing, origin)


def per_axis(value: float | Sequence[float], dim: int, name: str) -> Vector:
    """One number per axis, from one number for all axes or from a sequence of ``dim`` numbers."""
    values = tuple(value) if isinstance(value, Iterable) else (value,)  # NumPy's numbers are neither int nor float
    numbers = tuple(float(v) for v in values)
    if len(numbers) == 1:
        numbers *= dim
    if len(numbers) != dim:
        raise ValueError(f"{name} needs one number or {dim}, but {len(numbers)} were given: {numbers}.")
    if not all(math.isfinite(v) for v in numbers):
        raise ValueError(f"{name} holds a number that is not finite: {numbers}.")
    return numbers
