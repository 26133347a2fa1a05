"""A displacement field that keypoints define: read anywhere, made dense, and changed by one more correspondence.

Once the matches are there, the field is linear in the displacements at the keypoints: :class:`KeypointTransform` keeps
the weights of a grid's voxels, so that refinement can turn the displacements at little cost.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from regteach.grid import Grid
from regteach.nets.kernel import LearnedKernel, Reconstruction
from regteach.ops.classical import thin_plate_spline
from regteach.precision import exactly
from regteach.sampling import flat_points
from regteach.transforms import Dense, Transform

AT_ONCE = 2**13  # points that the plain form of the field is asked for
Points = tuple[Float[Tensor, "k d"], Float[Tensor, "k d"]]  # in the fixed and in the moving image, mm


@dataclass(frozen=True, eq=False)
class Spline:
    """What the kernel is compared with: a smoothing thin-plate spline through the same matches.

    Args:
        keypoints_mm: ``m d``.
        displacements_mm: ``m d``.
        smoothing: one number, mm in 3D.
    """

    keypoints_mm: Tensor
    displacements_mm: Tensor
    smoothing: Tensor

    def at(self, points_mm: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Displacement at points, mm."""
        # The spline of least bending has r^2 log r in 2D, and r in 3D.
        kernel = "thin_plate" if self.keypoints_mm.shape[1] == 2 else "linear"
        return thin_plate_spline(points_mm, self.keypoints_mm, self.displacements_mm, self.smoothing, kernel)

    def on(self, grid: Grid) -> Float[Tensor, "*grid d"]:
        """Displacement at every voxel, mm."""
        return self.at(flat_points(grid, self.keypoints_mm.device)[0]).unflatten(0, grid.shape)


@dataclass(frozen=True, eq=False)
class Field:
    """A displacement field of one pair, defined at keypoints.

    Args:
        part: what interpolates.
        free: how many of its keypoints, the first ones, were found; a person gave the others.
        linear: slopes and offset of the affine part, ``d + 1  d``, if that is apart.
        kernel: that made the part, if it was one.
        features: that it saw.
    """

    part: Reconstruction | Spline
    free: int
    linear: Tensor | None = None
    kernel: LearnedKernel | None = None
    features: Callable[[Tensor], Tensor] | None = None

    @property
    def keypoints_mm(self) -> Float[Tensor, "m d"]:
        """Where it is defined."""
        return self.part.keypoints_mm

    @property
    def displacements_mm(self) -> Float[Tensor, "m d"]:
        """What is handed to the interpolation, which may differ from what was matched."""
        return self.part.displacements_mm

    @exactly
    def at(self, points_mm: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Displacement at points, mm."""
        found = torch.cat([self.part.at(some) for some in points_mm.split(AT_ONCE)])
        return found if self.linear is None else found + read_affine(self.linear, points_mm)

    @exactly
    def on(self, grid: Grid) -> Float[Tensor, "*grid d"]:
        """Displacement at every voxel, mm."""
        return self._with_linear(self.part.on(grid), grid)

    def turned(self, displacements_mm: Float[Tensor, "n d"]) -> "Field":
        """The same with other displacements at the keypoints that were found; more rows are filling."""
        whole = torch.cat([displacements_mm[: self.free], self.displacements_mm[self.free :]])
        return replace(self, part=replace(self.part, displacements_mm=whole))

    @torch.no_grad()
    def added(
        self, points: Points, field: Float[Tensor, "*grid d"], grid: Grid
    ) -> "tuple[Field, Float[Tensor, '*grid d']]":
        """With correspondences that a person gives: the field anew where they are heard, and as it was elsewhere.

        Args:
            points: given, fixed and moving, mm.
            field: what :meth:`on` gave.
            grid: of the field.

        Raises:
            ValueError: if the points do not fit.
        """
        fixed, moving = points
        apart = 0 if self.linear is None else read_affine(self.linear, fixed)
        if isinstance(self.part, Reconstruction) and self.kernel is not None:
            before = field if self.linear is None else field - self._with_linear(torch.zeros_like(field), grid)
            part, after = self.part.added(fixed, moving - apart, self.kernel, before, grid, self.features)
            return replace(self, part=part), self._with_linear(after, grid)
        joined = replace(
            self.part,
            keypoints_mm=torch.cat([self.part.keypoints_mm, fixed]),
            displacements_mm=torch.cat([self.part.displacements_mm, moving - fixed - apart]),
        )
        found = replace(self, part=joined)  # every point of a spline hears every keypoint
        return found, found.on(grid)

    def through(self, weights: tuple[Tensor, Tensor] | None, grid: Grid) -> Float[Tensor, "*grid d"]:
        """:meth:`on` by weights that were worked out before (:meth:`weights`); a spline has none."""
        if weights is None or not isinstance(self.part, Reconstruction):
            return self.on(grid)
        return self._with_linear(self.part.through(weights, grid), grid)

    @torch.no_grad()
    def weights(self, grid: Grid) -> tuple[Tensor, Tensor] | None:
        """Neighbours of every voxel and their weights; the field is their sum."""
        return self.part.weights_on(grid) if isinstance(self.part, Reconstruction) else None

    def _with_linear(self, found: Tensor, grid: Grid) -> Tensor:
        if self.linear is None:
            return found
        return found + read_affine(self.linear, flat_points(grid, found.device)[0]).unflatten(0, grid.shape)


@dataclass(frozen=True, eq=False)
class KeypointTransform(Transform):
    """x + the field of keypoints, as a function of the displacements there: what refinement turns.

    Args:
        displacements_mm: ``b n d``.
        fields: one a pair, whose displacements these take the place of.
        grid: where the field is made dense.
        weights: of the voxels of a grid, remembered.
    """

    displacements_mm: Float[Tensor, "b n d"]
    fields: tuple[Field, ...]
    grid: Grid
    weights: Callable[[Grid], list[tuple[Tensor, Tensor] | None]]

    def __call__(self, points: Tensor) -> Tensor:
        """x + u(x), exact at any point."""
        every = points.expand(len(self.fields), *points.shape[1:])
        return every + torch.stack([field.at(x.float()) for field, x in zip(self.pairs(), every, strict=True)])

    def displacement_on(self, grid: Grid, like: Tensor | None = None) -> Float[Tensor, "b *grid d"]:
        """The field at the voxels of a grid."""
        known = self.weights(grid)
        found = [field.through(weights, grid) for field, weights in zip(self.pairs(), known, strict=True)]
        return torch.stack(found) if like is None else torch.stack(found).to(like)

    def jacobian(self, points: Tensor) -> Tensor:
        """I + central differences of the field on its grid, interpolated linearly."""
        return Dense(self.displacement_on(self.grid), self.grid).jacobian(points)

    def jacobian_on(self, grid: Grid, like: Tensor | None = None) -> Float[Tensor, "b *grid d d"]:
        """The same at voxels: I + central differences of the field there."""
        return Dense(self.displacement_on(grid, like), grid).jacobian_on(grid)

    def pairs(self) -> list[Field]:
        """The field of each pair, with these displacements."""
        return [field.turned(z) for field, z in zip(self.fields, self.displacements_mm, strict=True)]


def remembered_weights(found: tuple[Field, ...]) -> Callable[[Grid], list[tuple[Tensor, Tensor] | None]]:
    """The weights of a grid's voxels, worked out when they are first asked for."""
    return cache(lambda grid: [field.weights(grid) for field in found])


@exactly
def affine_part(keypoints_mm: Float[Tensor, "n d"], displacements_mm: Float[Tensor, "n d"]) -> Float[Tensor, "e d"]:
    """Slopes and offset of the affine displacement nearest to these, by least squares; e is d + 1.

    Along directions in which the keypoints have no extent its slope is 0.
    """
    middle = keypoints_mm.mean(0)
    centred, mean = (keypoints_mm - middle).double(), displacements_mm.mean(0)
    spread = centred.mT @ centred
    spread = spread + torch.eye(len(middle)).to(spread) * (1e-6 * spread.diagonal().sum() + 1e-9)
    slopes = torch.linalg.solve(spread, centred.mT @ (displacements_mm - mean).double()).to(displacements_mm)
    return torch.cat([slopes, (mean - middle @ slopes)[None]])


@exactly
def read_affine(linear: Float[Tensor, "e d"], points: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Displacement of an affine part at points, mm."""
    return points.to(linear) @ linear[:-1] + linear[-1]
