"""Landmarks as maps: structures of interest (SoI) where only points are known.

    blobs:      s(x) = exp(-r^2 / (2 w^2))      smooth; its slope is steepest at the distance w
    distances:  s(x) = max(0, 1 - r / w)        falls in a straight line, as a map of distances does, cut off at w

with r the distance of x to the landmark, mm, and w a width, mm. Both are 1 at the landmark. What is far from every
landmark has no slope, so w says from how far two landmarks find each other.

Source: Lee et al., Image-and-Spatial Transformer Networks, MICCAI 2019: landmarks as structures of interest.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from regteach.grid import Grid
from regteach.sampling import flat_points

KINDS = ("blobs", "distances")


def landmark_maps(
    points_mm: Float[Tensor, "n k d"], grid: Grid, width_mm: float, kind: str = "blobs", merged: bool = False
) -> Float[Tensor, "n k *grid"]:
    """Maps of landmarks, one channel each.

    Args:
        points_mm: k landmarks in each of n images, mm; they may lie outside of the grid.
        grid: of the maps.
        width_mm: w, mm.
        kind: "blobs" or "distances".
        merged: one channel for all of them, ``n 1 *grid``: at each voxel that of the nearest landmark.

    Raises:
        ValueError: for an unknown kind, a width that is not above 0, or points of another dimension.
    """
    if points_mm.ndim != 3 or points_mm.shape[-1] != grid.dim:
        raise ValueError(f"Landmarks are n x k x {grid.dim} numbers, not {' x '.join(map(str, points_mm.shape))}.")
    # Not by a product of matrices, which rounds small distances far from the origin.
    exact = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(points_mm, flat_points(grid, points_mm.device, points_mm.dtype), compute_mode=exact)
    if merged:
        distance = distance.amin(1, keepdim=True)
    return shown(distance, width_mm, kind).unflatten(-1, grid.shape)


def shown(distance_mm: Tensor, width_mm: float, kind: str) -> Tensor:
    """What a map shows at a distance from its structure: 1 on it, and less with every mm.

    Args:
        distance_mm: of any shape.
        width_mm: w, mm.
        kind: "blobs" or "distances".

    Raises:
        ValueError: for an unknown kind, or a width that is not above 0.
    """
    if kind not in KINDS:
        raise ValueError(f"Landmarks are drawn as {' or '.join(KINDS)}, not {kind!r}.")
    if not width_mm > 0:
        raise ValueError(f"The width of a landmark's map is above 0 mm, not {width_mm}.")
    ratio = distance_mm / width_mm
    return (-0.5 * ratio.square()).exp() if kind == "blobs" else (1 - ratio).clamp_min(0)
