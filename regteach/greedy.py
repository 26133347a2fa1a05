"""Greedy registration: a displacement follows the slope of a loss in small, smooth, composed steps.

At each step, with G a Gaussian and h the size of a voxel,

    v   = - rate h  G_update * dL/du  /  max |G_update * dL/du|     no point moves further than ``rate`` voxels
    phi = phi o (id + v),    that is  u(x) <- u(x + v(x)) + v(x)    composed, not added: what is smooth does not fold
    u   = G_whole * u                                               a little stiffness for the whole

so a step costs one look at the images, and no network takes part. This module knows the step alone; the levels of
resolution and the loss are those of :mod:`regteach.refinement`.

Sources: Christensen, Rabbitt and Miller, IEEE TIP 5 (1996): composed, smoothed updates; Joshi, Davis, Jomier and Gerig,
NeuroImage 23 (2004) S151, section 3: the greedy approximation of a flow, which gave the method its name.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from regteach.grid import Grid
from regteach.sampling import grid_points, smooth_field
from regteach.transforms import Dense


@torch.no_grad()
def descend(
    displacement: Float[Tensor, "b *grid d"],
    slope: Float[Tensor, "b *grid d"],
    grid: Grid,
    rate_vox: float,
    smoothing_vox: tuple[float, float],
) -> Float[Tensor, "b *grid d"]:
    """One step down a slope; each pair of a batch has its own.

    Args:
        displacement: u, fixed to moving, mm.
        slope: dL/du, any unit: its direction counts, and how it compares from voxel to voxel.
        grid: of both.
        rate_vox: how far the point that moves furthest is moved, voxels.
        smoothing_vox: standard deviations of G_update and of G_whole, voxels; 0 leaves a smoothing out.

    Returns:
        The new displacement, mm. Where the slope is 0 everywhere, nothing moves, but u is still smoothed.
    """
    spacing = slope.new_tensor(grid.spacing)
    update = -smooth_field(slope, smoothing_vox[0], grid)
    # Much faster than torch.norm along an axis of two or three.
    furthest = (update / spacing).square().sum(-1).flatten(1).amax(1).sqrt().clamp_min(torch.finfo(slope.dtype).tiny)
    update = update * (rate_vox / furthest).reshape(-1, *[1] * (grid.dim + 1))
    there = (grid_points(grid, update.device)[None] + update).flatten(1, -2)
    composed = Dense(displacement, grid)(there).unflatten(1, grid.shape) - grid_points(grid, update.device)
    return smooth_field(composed, smoothing_vox[1], grid)
