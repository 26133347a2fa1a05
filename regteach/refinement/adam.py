"""Refinement by Adam: of the transform's parameters, of corrections to it, or of the weights that predict it."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from regteach.grid import Grid
from regteach.refinement.looking import compared_maps, focus_of, loss_of, with_images
from regteach.refinement.pairs import Keeper, one_by_one, pair_of
from regteach.refinement.settings import Loss, Refined, Refinement, Watch
from regteach.result import Result, Step, assemble, dense_step
from regteach.transforms import Transform, displacement

COARSER = (4, 2, 1)  # how many voxels an interval of the corrections' grids spans, where the grid can be halved so


class Aligner(Protocol):
    """A model that can predict a transform from features that are given."""

    def align(self, moving: Tensor, fixed: Tensor, grid: Grid) -> Result:
        """Features of both images, ``b k *grid``, to a result."""


@torch.no_grad()
def corrections(transform: Transform, grid: Grid) -> tuple[Step, ...]:
    """A transform as one displacement, mm, and corrections of it, zero at first, coarse to fine.

    Args:
        transform: fixed to moving.
        grid: of the displacement, and of the finest correction.
    """
    found = displacement(transform, grid)
    grids = [
        grid.coarsened(factor) for factor in COARSER if all(n % factor == 0 and n >= 3 * factor for n in grid.shape)
    ]
    return (dense_step(found, grid), *(dense_step(found.new_zeros(len(found), *g.shape, g.dim), g) for g in grids))


def refine_parameters(
    steps: tuple[Step, ...],
    features: tuple[Tensor, Tensor],
    grid: Grid,
    settings: Refinement,
    loss: Loss,
    watch: Watch | None,
) -> Refined:
    """Turn the parameters of the steps. Adam works number by number: pairs of a batch do not feel each other."""
    turned = [step.parameters.detach().clone().requires_grad_() for step in steps]
    compared, coarse = compared_maps(features, grid, settings)
    focus = focus_of(assemble(steps), compared, coarse, settings)

    def with_parameters(numbers: Sequence[Tensor]) -> tuple[Step, ...]:
        return tuple(replace(step, parameters=z) for z, step in zip(numbers, steps, strict=True))

    def now(count: int) -> Tensor:
        current = with_parameters(turned)
        transform = assemble(current)
        if watch is not None:
            watch(count, transform)
        return loss_of(current, transform, compared, coarse, settings, loss, focus)

    keeper = _by_adam(turned, now, settings)
    return keeper.refined(with_parameters(keeper.best), features)


def refine_weights(
    given: Aligner,
    features: tuple[Tensor, Tensor],
    images: tuple[Tensor, Tensor] | None,
    grid: Grid,
    settings: Refinement,
    loss: Loss,
    watch: Watch | None,
) -> Refined:
    """Turn the weights of the part that aligns: a copy for each pair. The ITN takes no part: its maps are given."""
    if len(features[0]) > 1:
        with torch.no_grad():
            moving, fixed = pair_of(features, 0)
            one = given.align(moving, fixed, grid)
        if any(step.own_pairs for step in one.steps):
            raise ValueError("The weights of this model are refined for one pair at a time.")
        alone = partial(refine_weights, given, grid=grid, settings=settings, loss=loss, watch=None)
        return one_by_one(alone, len(features[0]), watch, features, images)
    model: Any = copy.deepcopy(given)
    turned = list(model.requires_grad_(True).parameters())
    compared, coarse = compared_maps(features, grid, settings)
    both = with_images(loss, images, settings)
    with torch.no_grad():
        focus = focus_of(model.align(*features, grid).transform, compared, coarse, settings)

    def now(count: int) -> Tensor:
        result = model.align(*features, grid)
        if watch is not None:
            watch(count, result.transform)
        return loss_of(result.steps, result.transform, compared, coarse, settings, both, focus)

    keeper = _by_adam(turned, now, settings)
    with torch.no_grad():
        for weight, best in zip(turned, keeper.best, strict=True):
            weight.copy_(best.reshape(weight.shape))
        # Asked once more, and not put together of remembered numbers: a step may know more of its pair than those.
        return keeper.refined(model.align(*features, grid).steps, features)


def _by_adam(turned: Sequence[Tensor], now: Callable[[int], Tensor], settings: Refinement) -> Keeper:
    """Turn numbers until the loss is low: ``now``, of the count of turns, says how low it is, for each pair."""
    optimiser = torch.optim.Adam(turned, lr=settings.rate, fused=True)
    keeper = Keeper(settings)
    with torch.enable_grad():
        for count in range(settings.steps + 1):
            losses = now(count)
            if keeper.note(losses, [z.detach() for z in turned]) or count == settings.steps:
                break
            optimiser.zero_grad()
            losses.sum().backward(inputs=list(turned))  # and not into the network that made the steps
            optimiser.step()
    return keeper
