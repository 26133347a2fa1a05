"""Greedy registration: a displacement follows the slope of a loss in small, smooth, composed steps.

At each step, with g = G_update * dL/du, G a Gaussian, and h the spacing of each axis,

    v   = - rate  g / max |g / h|                                   no point moves further than ``rate`` voxels
    phi = phi o (id + v),    that is  u(x) <- u(x + v(x)) + v(x)    composed, not added: what is smooth does not fold
    u   = G_whole * u                                               a little stiffness for the whole

so a step costs one look at the images, and no network takes part. The first steps see coarse images: a search goes from
resolution to resolution, and ends in the nearest valley of the last one.

Sources: Christensen, Rabbitt and Miller, IEEE TIP 5 (1996): composed, smoothed updates; Joshi, Davis, Jomier and Gerig,
NeuroImage 23 (2004) S151, section 3: the greedy approximation of a flow, which gave the method its name.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from regteach import objectives
from regteach.grid import Grid
from regteach.nets.blocks import upsampled
from regteach.refinement.looking import compared_maps, focus_of, loss_of, with_images
from regteach.refinement.pairs import Keeper, one_by_one
from regteach.refinement.settings import Loss, Refined, Refinement, Watch
from regteach.result import Result, assemble, dense_step
from regteach.sampling import grid_points, smooth_field
from regteach.transforms import Dense


def refine_greedily(
    start: Float[Tensor, "b *grid d"],
    features: tuple[Tensor, Tensor],
    images: tuple[Tensor, Tensor] | None,
    grid: Grid,
    settings: Refinement,
    loss: Loss,
    watch: Watch | None,
) -> Refined:
    """One displacement, mm, from level to level; the coarsest sees the images as they are averaged most.

    With a focus, only the displacements inside of it are computed with, and each pair has a focus of its own.
    """
    pairs = len(features[0])
    start = start.expand(pairs, *[-1] * (grid.dim + 1))
    if settings.focus_mm and pairs > 1:
        alone = partial(refine_greedily, grid=grid, settings=settings, loss=loss, watch=None)
        return one_by_one(alone, pairs, watch, start, features, images)
    here, found = grid, start
    levels = (*settings.coarser, settings.steps) if settings.steps else (0,)
    curves: list[Tensor] = []
    taken = torch.zeros(pairs, dtype=torch.long, device=found.device)
    for level, steps in enumerate(levels):
        at = replace(settings, coarsen=settings.coarsen * 2 ** (len(levels) - 1 - level), steps=steps)
        compared, coarse = compared_maps(features, grid, at)
        found, here = _brought(found, here, coarse), coarse
        both, focus = with_images(loss, images, at), focus_of(Dense(found, here), compared, here, at)
        box, part = (focus.grid, focus.voxels) if focus else (here, (...,))
        # The bending is a mean over the voxels of the box, and counts as one over all of them: outside nothing moves.
        at = replace(at, bending=at.bending * box.size / here.size)
        near = found[(slice(None), *part)]
        keeper = Keeper(at)
        for count in range(steps + 1):
            with torch.enable_grad():
                step = dense_step(near.requires_grad_(), box)
                transform = step.transform
                if watch is not None:
                    now = Dense(_put(found, part, near), here)
                    watch(sum(map(len, curves)) - level + count, now)
                losses = loss_of((step,), transform, compared, here, at, both, focus)
                (slope,) = torch.autograd.grad(losses.sum(), near) if count < steps else (None,)
            near = near.detach()
            if keeper.note(losses, [near]) or slope is None:
                break
            near = descend(near, slope, box, at.rate, at.smoothing_vox)
        found = _put(found, part, keeper.best[0])
        curves.append(torch.stack(keeper.curve))
        taken += keeper.taken
    last = dense_step(_brought(found, here, grid), grid)
    return Refined(Result(assemble((last,)), features, (last,)), torch.cat(curves), taken, keeper.lowest)


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
    spacing, tiny = slope.new_tensor(grid.spacing), torch.finfo(slope.dtype).tiny
    update = -smooth_field(slope, smoothing_vox[0], grid)
    # By its largest number first: the square of a tiny one is 0.
    update = update / update.abs().flatten(1).amax(1).clamp_min(tiny).reshape(-1, *[1] * (grid.dim + 1))
    # Much faster than torch.norm along an axis of two or three.
    furthest = (update / spacing).square().sum(-1).flatten(1).amax(1).sqrt().clamp_min(tiny)
    update = update * (rate_vox / furthest).reshape(-1, *[1] * (grid.dim + 1))
    there = (grid_points(grid, update.device)[None] + update).flatten(1, -2)
    composed = Dense(displacement, grid)(there).unflatten(1, grid.shape) - grid_points(grid, update.device)
    return smooth_field(composed, smoothing_vox[1], grid)


def better_of(first: Refined, second: Refined) -> Refined:
    """Of two greedy searches, for each pair the one with the lower loss; their curves follow each other."""
    better = second.loss < first.loss
    own, other = first.result.steps[0], second.result.steps[0]
    chosen = better.reshape(-1, *[1] * (own.parameters.ndim - 1))
    step = replace(own, parameters=torch.where(chosen, other.parameters, own.parameters))
    return Refined(
        Result(assemble((step,)), first.result.features, (step,)),
        torch.cat([first.curve, second.curve]),
        first.stopped + second.stopped,
        torch.where(better, second.loss, first.loss),
    )


def later(watch: Watch | None, by: int) -> Watch | None:
    """A watcher whose count begins at another number."""
    return None if watch is None else lambda count, transform: watch(by + count, transform)


def _put(whole: Float[Tensor, "b *grid d"], part: tuple[Any, ...], near: Tensor) -> Float[Tensor, "b *grid d"]:
    """The whole field with another part."""
    changed = whole.detach().clone()
    changed[(slice(None), *part)] = near.detach()
    return changed


def _brought(field: Float[Tensor, "b *here d"], here: Grid, there: Grid) -> Float[Tensor, "b *there d"]:
    """A displacement on another level's grid: averaged over cubes, or linear in between."""
    if there.shape == here.shape:
        return field
    if there.shape > here.shape:
        return upsampled(field, here, there)
    factor = round(there.spacing[0] / here.spacing[0])  # shapes would not tell: what no cube covers is cut off
    return objectives.averaged(field.movedim(-1, 1), factor).movedim(1, -1)
