"""Layered images: boundaries as curves, labels from them, and the map that takes each layer to itself.

Convention: axis 0 is depth (downwards), axis 1 lateral, both mm. Boundaries are ``k w``: k curves from the top down, at
w lateral positions; layer j lies between boundary j - 1 and boundary j, counted from 1, and 0 is what is above the
first and below the last.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regteach.grid import Grid
from regteach.transforms import Transform, check_points


@dataclass(frozen=True, eq=False)
class Visit:
    """Where one image shows what.

    Args:
        x_mm: lateral positions in the image, rising.
        s_mm: the eye's own lateral coordinate there, rising.
        depth_mm: depth of each boundary there, rising from curve to curve.
        seed: of what is random in the image itself (speckle, noise).
    """

    x_mm: Float[Tensor, "w"]
    s_mm: Float[Tensor, "w"]
    depth_mm: Float[Tensor, "k w"]
    seed: int = 0

    def coordinates(self, points: Float[Tensor, "1 n 2"]) -> tuple[Float[Tensor, "1 n"], Float[Tensor, "1 n"]]:
        """The eye's coordinates of points of the image: s in mm, and layers counted from the top (0 to k - 1 inside).

        Above the first boundary and below the last one, the second coordinate counts millimetres from there.
        """
        x = points[..., 1]
        depths = interpolated(x, self.x_mm[None], self.depth_mm[None])
        return interpolated(x, self.x_mm[None], self.s_mm[None]), _layer_of(points[..., 0], depths)

    def boundaries(self, grid: Grid) -> Float[Tensor, "k w"]:
        """Depth of each boundary in each column of an image, mm."""
        x = grid.origin[1] + grid.spacing[1] * torch.arange(grid.shape[1], dtype=self.x_mm.dtype)
        return interpolated(x[None], self.x_mm[None], self.depth_mm[None])[0].T


@dataclass(frozen=True)
class LayerMap(Transform):
    """Each layer of the fixed image to the same layer of the moving one, each lateral place to the same place.

    Exact for images drawn from two :class:`Visit`. Within a layer, and laterally between two known positions, it is
    linear; above the first boundary and below the last one depth is only shifted. It never folds.

    Args:
        x_mm: ``b w``, lateral positions at which the curves are known; the same for both images.
        fixed_s: ``b w``, the own lateral coordinate of what the fixed image shows there, rising, mm.
        fixed_depth: ``b k w``, boundaries of the fixed image, mm.
        moving_s: as ``fixed_s``.
        moving_depth: as ``fixed_depth``.
    """

    x_mm: Float[Tensor, "b w"]
    fixed_s: Float[Tensor, "b w"]
    fixed_depth: Float[Tensor, "b k w"]
    moving_s: Float[Tensor, "b w"]
    moving_depth: Float[Tensor, "b k w"]

    @staticmethod
    def between(fixed: Visit, moving: Visit) -> "LayerMap":
        """The transform between two visits of one eye.

        Raises:
            ValueError: if they do not know their curves at the same positions.
        """
        if not torch.equal(fixed.x_mm, moving.x_mm) or fixed.depth_mm.shape != moving.depth_mm.shape:
            raise ValueError("The two visits do not have the same boundaries at the same lateral positions.")
        return LayerMap(
            fixed.x_mm[None], fixed.s_mm[None], fixed.depth_mm[None], moving.s_mm[None], moving.depth_mm[None]
        )

    def __call__(self, points: Tensor) -> Tensor:
        """Depth and lateral position in the moving image, mm."""
        check_points(points, 2, len(self.x_mm))
        z, x = points.unbind(-1)
        knots = self.x_mm.to(points)
        lateral = interpolated(interpolated(x, knots, self.fixed_s.to(points)), self.moving_s.to(points), knots)
        here = interpolated(x, knots, self.fixed_depth.to(points))
        there = interpolated(lateral, knots, self.moving_depth.to(points))
        return torch.stack([_depth_of(_layer_of(z, here), there), lateral], dim=-1)

    def jacobian(self, points: Tensor) -> Tensor:
        """Exact, by differentiating the formula; at a boundary or a knot it is that of one of the two sides."""
        with torch.enable_grad():
            count = max(len(points), len(self.x_mm))  # each item needs points of its own, or their slopes add up
            at = points.detach().expand(count, -1, -1).clone().requires_grad_()
            out = self(at)
            rows = [torch.autograd.grad(out[..., i].sum(), at, retain_graph=i == 0)[0] for i in range(2)]
        return torch.stack(rows, dim=-2)

    def inverse(self) -> "LayerMap":
        """The same map with fixed and moving exchanged."""
        return LayerMap(self.x_mm, self.moving_s, self.moving_depth, self.fixed_s, self.fixed_depth)


def layer_labels(boundaries: Float[Tensor, "k w"], grid: Grid) -> Int[Tensor, "*grid"]:
    """The layer of each pixel's centre: 1 to k - 1 from the top, 0 above, below, and where a boundary is not known.

    Args:
        boundaries: depth in each column, mm; nan where not known.
        grid: of the image.

    Raises:
        ValueError: if the boundaries do not fit the grid.
    """
    if boundaries.ndim != 2 or boundaries.shape[1] != grid.shape[1]:
        raise ValueError(
            f"Boundaries of {grid.shape[1]} columns are wanted, but their shape is {tuple(boundaries.shape)}."
        )
    z = grid.origin[0] + grid.spacing[0] * torch.arange(grid.shape[0], dtype=boundaries.dtype, device=boundaries.device)
    labels = torch.zeros(grid.shape, dtype=torch.long, device=boundaries.device)
    for number in range(1, len(boundaries)):
        labels[(z[:, None] >= boundaries[number - 1]) & (z[:, None] < boundaries[number])] = number
    return labels


def interpolated(
    x: Float[Tensor, "b n"], knots: Float[Tensor, "b w"], values: Float[Tensor, "b *k w"]
) -> Float[Tensor, "b n *k"]:
    """Piecewise linear curves, one or k of them on the same knots; beyond the ends the last piece goes on.

    Args:
        x: where to read.
        knots: rising.
        values: at the knots.
    """
    batch = max(len(x), len(knots))
    knots, x = knots.expand(batch, -1), x.expand(batch, -1)
    right = torch.searchsorted(knots.detach().contiguous(), x.detach().contiguous()).clamp(1, knots.shape[-1] - 1)
    left_x, right_x = knots.gather(1, right - 1), knots.gather(1, right)
    part = (x - left_x) / (right_x - left_x)
    if values.ndim == 2:
        curve = values.expand(batch, -1)
        return torch.lerp(curve.gather(1, right - 1), curve.gather(1, right), part)
    curves = values.expand(batch, -1, -1)
    index = right[:, None].expand(-1, curves.shape[1], -1)
    return torch.lerp(curves.gather(2, index - 1), curves.gather(2, index), part[:, None]).mT


def _layer_of(z: Float[Tensor, "b n"], depths: Float[Tensor, "b n k"]) -> Float[Tensor, "b n"]:
    """How many layers down: j + part inside the one between boundaries j and j + 1, else mm from the nearest of all."""
    k = depths.shape[-1]
    j = (z[..., None] >= depths).sum(-1).clamp(1, k - 1)[..., None] - 1
    above, below = depths.gather(-1, j)[..., 0], depths.gather(-1, j + 1)[..., 0]
    inside = j[..., 0] + (z - above) / (below - above)
    layer = torch.where(z < depths[..., 0], z - depths[..., 0], inside)
    return torch.where(z >= depths[..., -1], k - 1 + z - depths[..., -1], layer)


def _depth_of(layer: Float[Tensor, "b n"], depths: Float[Tensor, "b n k"]) -> Float[Tensor, "b n"]:
    """What :func:`_layer_of` undoes."""
    k = depths.shape[-1]
    j = layer.detach().floor().clamp(0, k - 2).long()[..., None]
    above, below = depths.gather(-1, j)[..., 0], depths.gather(-1, j + 1)[..., 0]
    inside = above + (layer - j[..., 0]) * (below - above)
    depth = torch.where(layer < 0, depths[..., 0] + layer, inside)
    return torch.where(layer >= k - 1, depths[..., -1] + layer - (k - 1), depth)
