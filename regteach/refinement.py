"""Refinement: a trained model's answer for one pair, improved on that very pair, without labels.

The features of both images are computed once. Then Adam turns either

- the transform's own parameters, starting from what the network predicted (``"parameters"``), or
- the displacement that the network predicted, and small ones composed with it, which start at zero, on grids four and
  two times as coarse and on the same grid (``"corrections"``), or
- the weights of the part of the network that predicts them (``"weights"``, as in the ISTN paper),

so that the loss of the test images falls. Or, without Adam, the displacement follows the slope of the loss in smooth
composed steps, on coarse images first (``"greedy"``, see :mod:`regteach.greedy`).

The engine is the same for every model of the package: it knows a
:class:`~regteach.result.Result` and a loss, and nothing of networks. Each pair is refined for itself: many pairs at
once give the same numbers as one by one.

Source: Lee et al., Image-and-Spatial Transformer Networks, MICCAI 2019, section 2.3 (weights; a fresh Adam at the
training rate, 50 steps, ITN fixed). Refining the parameters is ours: it is faster, and forgets nothing. Ours, too, are
sharpened maps, the images beside them, and the corrections: of parameters that add up, as those of a GeoReg, the finest
ones soon fold; smooth ones that are composed do so later.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regteach import greedy, objectives
from regteach.grid import Grid
from regteach.nets.blocks import upsampled
from regteach.result import Result, Step, assemble
from regteach.transforms import Dense, Transform, displacement

MODES = ("parameters", "corrections", "greedy", "weights")
COARSER = (4, 2, 1)  # how many voxels an interval of the corrections' grids spans, where the grid can be halved so
Loss = Callable[[tuple[Tensor, Tensor], Transform, Grid, objectives.Focus | None], Float[Tensor, "b"]]


class Aligner(Protocol):
    """A model that can predict a transform from features that are given."""

    def align(self, moving: Tensor, fixed: Tensor, grid: Grid) -> Result:
        """Features of both images, ``b k *grid``, to a result."""


@dataclass(frozen=True)
class Refinement:
    """How to refine.

    Args:
        steps: of Adam, or greedy ones.
        mode: "parameters", "corrections", "greedy" or "weights".
        rate: step size of Adam, in the unit of the parameters (a bound's fraction, near 0; mm for displacements) or of
            the weights; of a greedy step, how far the point that moves furthest is moved, voxels.
        bending: weight of the bending energy, mm^2.
        images: weight of 1 - local NCC of the images themselves beside the maps, for a model whose features are maps:
            they say where a structure lies, the images how its border runs, and what lies between.
        sharpen: slope of a logistic curve through a half, put on maps in [0, 1] before they are compared; 0 leaves them
            as they are. What counts is on which side of a half a voxel lies, and so where the border runs: without it,
            the alignment also trades borders for places where the network was more or less sure of the inside.
        focus_mm: look only this far around what the maps show; 0 looks everywhere. Faster, and the same where the maps
            are empty elsewhere. Greedy steps move nothing outside of it.
        coarsen: compare the maps averaged over cubes of this many voxels: eight times as fast in 3D for 2, and blind to
            what is finer.
        pyramid: how many resolutions of the maps are compared at once, each half as fine as the one before. A greedy
            search that begins coarsely has seen the coarse ones: 1 is enough for it, and lets it look at what is fine.
        coarser: greedy steps before the others, on images averaged over cubes of 2 voxels (the last of these numbers),
            of 4 (the one before it), and so on: cheap, and far-sighted.
        restart: search a second time, greedily, from the identity, and keep of each pair what ends with the lower loss.
            A greedy search ends in the nearest valley, and of two the loss finds the better one.
        smoothing_vox: standard deviations of the Gaussians that smooth each greedy step, and all of the displacement.
        window_vox: width of the windows where images are compared by local NCC.
        patience: stop a pair when its loss has not fallen for so many steps; 0 never stops.
        tolerance: a fall counts when it is at least this part of the loss.
    """

    steps: int = 50
    mode: str = "parameters"
    rate: float = 0.03
    bending: float = 0.0
    images: float = 0.0
    sharpen: float = 0.0
    focus_mm: float = 0.0
    coarsen: int = 1
    pyramid: int = objectives.LEVELS
    coarser: tuple[int, ...] = ()
    restart: bool = False
    smoothing_vox: tuple[float, float] = (1.732, 0.7071)
    window_vox: int = 9
    patience: int = 0
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"A mode of refinement is one of {', '.join(MODES)}, not {self.mode!r}.")
        if self.sharpen < 0:
            raise ValueError(f"Maps are sharpened by a slope of 0 or more, not {self.sharpen}.")
        if self.images < 0:
            raise ValueError(f"The images have a weight of 0 or more beside the maps, not {self.images}.")
        if (self.coarser or self.restart) and self.mode != "greedy":
            said = "Steps on coarser images" if self.coarser else "Second searches"
            raise ValueError(f"{said} are for greedy refinement, not for that of {self.mode}.")
        if min(self.coarser, default=1) < 1 or min(self.smoothing_vox) < 0:
            raise ValueError("Coarser levels take 1 step or more each, and a smoothing is 0 or more.")
        if self.pyramid < 1:
            raise ValueError(f"Maps are compared at 1 resolution or more, not {self.pyramid}.")
        if self.steps < 0:
            raise ValueError(f"A refinement has 0 steps or more, not {self.steps}.")


@dataclass(frozen=True)
class Refined:
    """A refined result.

    Args:
        result: the transform of each pair's lowest loss, and its steps.
        curve: ``s b``, loss before each step and after the last; once a pair has stopped, its loss stays. s is the
            number of steps and one, or less where every pair stopped sooner. Greedy levels follow each other, each with
            the loss of its own images; so do two searches.
        stopped: ``b``, number of steps that each pair took.
        loss: ``b``, of the result.
    """

    result: Result
    curve: Float[Tensor, "s b"]
    stopped: Int[Tensor, "b"]
    loss: Float[Tensor, "b"]


def refine(
    model: Aligner,
    result: Result,
    grid: Grid,
    settings: Refinement | None = None,
    loss: Loss | None = None,
    watch: Callable[[int, Transform], None] | None = None,
) -> Refined:
    """Refine what a model found for a batch of pairs.

    Args:
        model: has ``align(moving_features, fixed_features, grid) -> Result``; it is not changed.
        result: the model's result for the pairs.
        grid: where the features sit.
        settings: how.
        loss: of features, transform, grid and focus (a part of the grid, or None), one value a pair; left out, what
            the model was trained to align by.
        watch: called with the number of steps taken and the current transform: for curves against labels, which the
            refinement itself never sees.

    Raises:
        ValueError: if images are wanted that the result lacks, or several pairs are watched at once of which each is
            refined alone: by weights, or greedily with a focus.
    """
    settings = settings or Refinement()
    loss = loss or objectives.at_test_time(model, settings.window_vox, settings.pyramid)
    features = (result.features[0].detach(), result.features[1].detach())
    # Outside of mixed precision, whoever calls: coordinates need all the digits of float32.
    with torch.autocast(features[0].device.type, enabled=False):
        if settings.mode == "weights":
            found = _refine_weights(model, features, result.images, grid, settings, loss, watch)
        elif settings.mode == "greedy":
            start = displacement(result.transform, grid).detach()
            found = _refine_greedily(start, features, result.images, grid, settings, loss, watch)
            if settings.restart and settings.steps:
                nothing, seen = torch.zeros_like(start), _later(watch, int(found.stopped.max()) + 1)
                again = _refine_greedily(nothing, features, result.images, grid, settings, loss, seen)
                found = _better(found, again)
        else:
            steps = result.steps if settings.mode == "parameters" else corrections(result.transform, grid)
            both = _with_images(loss, result.images, settings)
            found = _refine_parameters(steps, features, grid, settings, both, watch)
    return replace(found, result=replace(found.result, features=features, images=result.images))


def search(
    moving: Float[Tensor, "b c *grid"],
    fixed: Float[Tensor, "b c *grid"],
    grid: Grid,
    settings: Refinement,
    similarity: str = "local_ncc",
) -> Refined:
    """Register images with no network at all: the same engine, from the identity.

    Args:
        moving, fixed: pairs of images.
        grid: where they sit.
        settings: "greedy"; a restart adds nothing, for this search starts from the identity already.
        similarity: by which they are compared.

    Raises:
        ValueError: for another mode: without a network there are no parameters and no weights to turn.
    """
    if settings.mode != "greedy":
        raise ValueError(f"A search without a network is greedy: there are no {settings.mode} to turn.")
    loss = partial(objectives.image_refinement, similarity=similarity, window_vox=settings.window_vox)
    start = moving.new_zeros(len(moving), *grid.shape, grid.dim)
    with torch.autocast(moving.device.type, enabled=False):
        return _refine_greedily(start, (moving, fixed), None, grid, settings, loss, None)


def _with_images(loss: Loss, images: tuple[Tensor, Tensor] | None, settings: Refinement) -> Loss:
    """The loss, and beside it what the images themselves say, where they are wanted."""
    if not settings.images:
        return loss
    if images is None:
        raise ValueError("The refinement is to look at the images beside the maps, but the result carries no images.")
    compared = tuple(objectives.averaged(image.detach(), settings.coarsen) for image in images)

    def both(
        features: tuple[Tensor, Tensor], transform: Transform, grid: Grid, focus: objectives.Focus | None
    ) -> Float[Tensor, "b"]:
        seen = objectives.image_refinement(
            (compared[0], compared[1]), transform, grid, focus, "local_ncc", settings.window_vox
        )
        return loss(features, transform, grid, focus) + settings.images * seen

    return both


def sharpened(maps: Float[Tensor, "b k *grid"], slope: float) -> Float[Tensor, "b k *grid"]:
    """Maps in [0, 1] with steeper borders in the same places: 0, 1/2 and 1 stay, what lies between is pushed apart.

        s(x) = 1/2 + tanh(slope (x - 1/2) / 2) / (2 tanh(slope / 4))

    which is a logistic curve of that slope about 1/2, stretched to run from 0 to 1.

    Args:
        maps: of structures.
        slope: 0 changes nothing; towards infinity every voxel is inside or outside.
    """
    if slope == 0:
        return maps
    return 0.5 + torch.tanh(slope / 2 * (maps - 0.5)) / (2 * math.tanh(slope / 4))


@torch.no_grad()
def corrections(transform: Transform, grid: Grid) -> tuple[Step, ...]:
    """A transform as one displacement, mm, and corrections of it, zero at first, coarse to fine.

    Args:
        transform: fixed to moving.
        grid: of the displacement, and of the finest correction.
    """
    found = displacement(transform, grid)
    grids = [
        grid.coarsened(factor) for factor in COARSER if all(n % factor == 0 and n >= 2 * factor for n in grid.shape)
    ]
    return (_dense(found, grid), *(_dense(found.new_zeros(len(found), *g.shape, g.dim), g) for g in grids))


def _dense(own: Tensor, grid: Grid) -> Step:
    return Step(own, partial(Dense, grid=grid))


def _refine_parameters(
    steps: tuple[Step, ...],
    features: tuple[Tensor, Tensor],
    grid: Grid,
    settings: Refinement,
    loss: Loss,
    watch: Callable[[int, Transform], None] | None,
) -> Refined:
    """Adam works number by number, so pairs in one batch do not feel each other."""
    turned = [step.parameters.detach().clone().requires_grad_() for step in steps]
    compared, coarse = _compared(features, grid, settings)
    focus = _focus(assemble(steps), compared, coarse, settings)

    def now(count: int) -> tuple[Tensor, tuple[Step, ...]]:
        current = tuple(replace(step, parameters=z) for z, step in zip(turned, steps, strict=True))
        transform = assemble(current)
        if watch is not None:
            watch(count, transform)
        return _loss(current, transform, compared, coarse, settings, loss, focus), current

    return _by_adam(turned, now, features, settings)


def _by_adam(
    turned: Iterable[Tensor],
    now: Callable[[int], tuple[Tensor, tuple[Step, ...]]],
    features: tuple[Tensor, Tensor],
    settings: Refinement,
) -> Refined:
    """Turn numbers until the loss is low: ``now``, of the count of turns, says how low it is, and by which steps."""
    optimiser = torch.optim.Adam(turned, lr=settings.rate)
    keeper = _Keeper(settings)
    with torch.enable_grad():
        for count in range(settings.steps + 1):
            losses, steps = now(count)
            if keeper.note(losses, [step.parameters.detach() for step in steps]) or count == settings.steps:
                break
            optimiser.zero_grad()
            losses.sum().backward()
            optimiser.step()
    return keeper.refined(steps, features)


def _refine_greedily(
    start: Float[Tensor, "b *grid d"],
    features: tuple[Tensor, Tensor],
    images: tuple[Tensor, Tensor] | None,
    grid: Grid,
    settings: Refinement,
    loss: Loss,
    watch: Callable[[int, Transform], None] | None,
) -> Refined:
    """One displacement, mm, from level to level; the coarsest sees the images as they are averaged most.

    With a focus, only the displacements inside of it are computed with, and each pair has a focus of its own.
    """
    pairs = len(features[0])
    if settings.focus_mm and pairs > 1:
        _watch_one(watch)
        starts = start.expand(pairs, *[-1] * (grid.dim + 1))
        alone = partial(_refine_greedily, grid=grid, settings=settings, loss=loss, watch=None)
        return _joined([alone(starts[i : i + 1], _pair(features, i), _pair(images, i)) for i in range(pairs)])
    here, found = grid, start.expand(pairs, *[-1] * (grid.dim + 1))
    levels = (*settings.coarser, settings.steps) if settings.steps else (0,)
    curves: list[Tensor] = []
    taken = torch.zeros(pairs, dtype=torch.long, device=found.device)
    for level, steps in enumerate(levels):
        at = replace(settings, coarsen=settings.coarsen * 2 ** (len(levels) - 1 - level), steps=steps)
        compared, coarse = _compared(features, grid, at)
        found, here = _brought(found, here, coarse), coarse
        both, focus = _with_images(loss, images, at), _focus(Dense(found, here), compared, here, at)
        box, part = (focus.grid, focus.voxels) if focus else (here, (...,))
        near = found[(slice(None), *part)]
        keeper = _Keeper(at)
        for count in range(steps + 1):
            with torch.enable_grad():
                step = _dense(near.requires_grad_(), box)
                transform = step.build(near)
                if watch is not None:
                    now = Dense(_put(found, part, near), here)
                    watch(sum(map(len, curves)) - level + count, now)
                losses = _loss((step,), transform, compared, here, at, both, focus)
                (slope,) = torch.autograd.grad(losses.sum(), near) if count < steps else (None,)
            near = near.detach()
            if keeper.note(losses, [near]) or slope is None:
                break
            near = greedy.descend(near, slope, box, at.rate, at.smoothing_vox)
        found = _put(found, part, keeper.best[0])
        curves.append(torch.stack(keeper.curve))
        taken += keeper.taken
    last = _dense(_brought(found, here, grid), grid)
    return Refined(Result(assemble((last,)), features, (last,)), torch.cat(curves), taken, keeper.lowest)


def _better(first: Refined, second: Refined) -> Refined:
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


def _later(watch: Callable[[int, Transform], None] | None, by: int) -> Callable[[int, Transform], None] | None:
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
    return objectives.averaged(field.movedim(-1, 1), here.shape[0] // there.shape[0]).movedim(1, -1)


def _watch_one(watch: Callable[[int, Transform], None] | None) -> None:
    if watch is not None:
        raise ValueError("This refinement goes pair by pair: watch one pair at a time.")


def _joined(each: Sequence[Refined]) -> Refined:
    """Pairs that were refined one by one, as one batch: the curve of a pair that stopped sooner goes on as it ended."""
    steps = tuple(
        replace(step, parameters=torch.cat([one.result.steps[k].parameters for one in each]))
        for k, step in enumerate(each[0].result.steps)
    )
    features = tuple(torch.cat([one.result.features[side] for one in each]) for side in (0, 1))
    longest = max(len(one.curve) for one in each)
    curves = [torch.cat([one.curve, one.curve[-1:].expand(longest - len(one.curve), -1)]) for one in each]
    found = Result(assemble(steps), (features[0], features[1]), steps)
    stopped, loss = (torch.cat([getattr(one, name) for one in each]) for name in ("stopped", "loss"))
    return Refined(found, torch.cat(curves, 1), stopped, loss)


def _pair(both: Any, i: int) -> Any:
    """One pair of a batch of two tensors; nothing of nothing."""
    return None if both is None else (both[0][i : i + 1].detach(), both[1][i : i + 1].detach())


def _refine_weights(
    given: Aligner,
    features: tuple[Tensor, Tensor],
    images: tuple[Tensor, Tensor] | None,
    grid: Grid,
    settings: Refinement,
    loss: Loss,
    watch: Callable[[int, Transform], None] | None,
) -> Refined:
    """A copy of the network for each pair. The ITN takes no part: its maps are given."""
    if len(features[0]) > 1:
        _watch_one(watch)
        alone = partial(_refine_weights, given, grid=grid, settings=settings, loss=loss, watch=None)
        return _joined([alone(_pair(features, i), _pair(images, i)) for i in range(len(features[0]))])
    model: Any = copy.deepcopy(given)
    compared, coarse = _compared(features, grid, settings)
    both = _with_images(loss, images, settings)
    with torch.no_grad():
        focus = _focus(model.align(*features, grid).transform, compared, coarse, settings)

    def now(count: int) -> tuple[Tensor, tuple[Step, ...]]:
        result = model.align(*features, grid)
        if watch is not None:
            watch(count, result.transform)
        return _loss(result.steps, result.transform, compared, coarse, settings, both, focus), result.steps

    return _by_adam(model.requires_grad_(True).parameters(), now, features, settings)


def _compared(features: tuple[Tensor, Tensor], grid: Grid, settings: Refinement) -> tuple[tuple[Tensor, Tensor], Grid]:
    """What the loss looks at, and where it sits: the maps, sharpened or not, or their averages over cubes."""
    first, second = (objectives.averaged(sharpened(maps, settings.sharpen), settings.coarsen) for maps in features)
    return (first, second), grid.coarsened(settings.coarsen)


@torch.no_grad()
def _focus(
    transform: Transform, features: tuple[Tensor, Tensor], grid: Grid, settings: Refinement
) -> objectives.Focus | None:
    if not settings.focus_mm:
        return None
    return objectives.focus_on(features, transform, grid, settings.focus_mm, settings.pyramid)


def _loss(
    steps: tuple[Step, ...],
    transform: Transform,
    features: tuple[Tensor, Tensor],
    grid: Grid,
    settings: Refinement,
    loss: Loss,
    focus: objectives.Focus | None,
) -> Float[Tensor, "b"]:
    terms = {"features": loss(features, transform, grid, focus)} | objectives.regulariser(steps, grid, settings.bending)
    return objectives.total(terms)


class _Keeper:
    """Remembers, for each pair, the curve, the best parameters so far, and when it stopped falling."""

    def __init__(self, settings: Refinement) -> None:
        self.settings = settings
        self.curve: list[Tensor] = []
        self.best: list[Tensor] = []

    def note(self, losses: Tensor, parameters: list[Tensor]) -> bool:
        """Take in one evaluation; True once every pair has stopped."""
        losses = losses.detach()
        if not self.curve:
            self.lowest, self.reference = losses.clone(), losses.clone()
            self.best = [z.clone() for z in parameters]
            self.since = torch.zeros_like(losses, dtype=torch.long)
            self.running = torch.ones_like(losses, dtype=torch.bool)
            self.taken = torch.zeros_like(losses, dtype=torch.long)
            self.curve.append(losses)
            return False
        self.taken += self.running
        better = self.running & (losses < self.lowest)
        self.lowest = torch.where(better, losses, self.lowest)
        self.best = [
            torch.where(better.reshape(-1, *[1] * (z.ndim - 1)), z, kept)
            for z, kept in zip(parameters, self.best, strict=True)
        ]
        fell = losses < self.reference - self.settings.tolerance * self.reference.abs()  # a loss may be negative
        self.reference = torch.where(fell, losses, self.reference)
        self.since = torch.where(fell, 0, self.since + 1)
        self.curve.append(torch.where(self.running, losses, self.curve[-1]))
        if self.settings.patience:
            self.running = self.running & (self.since < self.settings.patience)
        return not bool(self.running.any())

    def refined(self, steps: tuple[Step, ...], features: tuple[Tensor, Tensor]) -> Refined:
        """What there is to return."""
        best = tuple(replace(step, parameters=z) for z, step in zip(self.best, steps, strict=True))
        return Refined(Result(assemble(best), features, best), torch.stack(self.curve), self.taken, self.lowest)
