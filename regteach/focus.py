"""Looking at a part of an image only: the box round what its maps show, and nothing else costs time."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from regteach.grid import Grid
from regteach.sampling import warp
from regteach.transforms import Transform


@dataclass(frozen=True)
class Focus:
    """The part of the fixed grid that a loss looks at.

    Args:
        voxels: one slice an axis of the fixed grid.
        grid: the grid of those voxels.
        mask: ``b 1 *part``, 1 where a pair is looked at: pairs of a batch share the voxels, not the mask.
    """

    voxels: tuple[slice, ...]
    grid: Grid
    mask: Float[Tensor, "b 1 *part"]


def focus_on(
    features: tuple[Tensor, Tensor],
    transform: Transform,
    grid: Grid,
    margin_mm: float,
    levels: int,
    shown: float = 0.25,
) -> Focus:
    """A box around what the maps show, in the fixed map and in the moving map as it lies now, and a margin.

    Its edges lie on multiples of the pyramid's largest cube, so that the cubes are those of the whole image, and it is
    wide enough for all of the pyramid.

    Args:
        features: moving and fixed maps, ``b k *grid``.
        transform: where the search starts.
        grid: of the maps.
        margin_mm: how far around.
        levels: of the pyramid by which the maps are compared.
        shown: part of a map's largest value above which it shows something.
    """
    maps = torch.stack([features[1], warp(features[0], transform, grid)]).abs().amax((0, 2))  # b *grid
    seen = maps > shown * maps.flatten(1).amax(1).reshape(-1, *[1] * grid.dim)
    boxes = torch.zeros_like(seen)
    for pair, box in zip(seen, boxes, strict=True):
        margins = [math.ceil(margin_mm / spacing) for spacing in grid.spacing]
        box[tuple(_edges(pair, axis, margin, levels) for axis, margin in enumerate(margins))] = True
    every = boxes.any(0).nonzero()
    low, high = every.amin(0).tolist(), (every.amax(0) + 1).tolist()
    voxels = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    return Focus(voxels, grid.cropped(low, high), boxes[(slice(None), *voxels)][:, None].to(features[0].dtype))


def _edges(seen: Tensor, axis: int, margin: int, levels: int) -> slice:
    """From the first to the last voxel seen along an axis, widened to whole cubes, two at least."""
    n, cube = seen.shape[axis], 2 ** (levels - 1)
    where = seen.movedim(axis, 0).flatten(1).any(1).nonzero()[:, 0]
    first, last = (int(where[0]), int(where[-1])) if len(where) else (0, n - 1)
    start, stop = max(0, first - margin) // cube * cube, min(n, -(-(last + 1 + margin) // cube) * cube)
    if stop - start < 2 * cube:
        start = max(0, min(start, (n - 2 * cube) // cube * cube))
        stop = max(stop, min(n, start + 2 * cube))
    return slice(start, stop)
