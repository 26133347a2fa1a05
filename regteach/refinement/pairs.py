"""Many pairs at once: what is remembered of each, and pairs that are refined one by one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regteach.refinement.settings import Refined, Refinement, Watch
from regteach.result import Result, Step, assemble


class Keeper:
    """Remembers, for each pair, the curve, the best numbers so far, and when it stopped falling.

    A loss that is nan is worse than any other.
    """

    def __init__(self, settings: Refinement) -> None:
        self.settings = settings
        self.curve: list[Tensor] = []
        self.best: list[Tensor] = []

    def note(self, losses: Tensor, parameters: list[Tensor]) -> bool:
        """Take in one evaluation; True once every pair has stopped."""
        losses = losses.detach().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
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
        self._keep(better, parameters)
        drop = self.settings.tolerance * self.reference.abs()  # a loss may be negative
        drop = torch.where(self.reference.isfinite(), drop, 0)  # from a first loss of nan, any number is a fall
        fell = losses < self.reference - drop
        self.reference = torch.where(fell, losses, self.reference)
        self.since = torch.where(fell, 0, self.since + 1)
        self.curve.append(torch.where(self.running, losses, self.curve[-1]))
        if self.settings.patience:
            self.running = self.running & (self.since < self.settings.patience)
        return not bool(self.running.any())

    def _keep(self, better: Tensor, parameters: list[Tensor]) -> None:
        """Take over the numbers of the pairs that got better. Where none did nothing is written: weights are many."""
        if bool(better.all()):  # of one pair these may be whole weights, which have no axis for pairs
            for z, kept in zip(parameters, self.best, strict=True):
                kept.copy_(z)
        elif bool(better.any()):
            for z, kept in zip(parameters, self.best, strict=True):
                kept[better] = z[better]

    def refined(self, best: tuple[Step, ...], features: tuple[Tensor, Tensor]) -> Refined:
        """What there is to return, given the steps of each pair's lowest loss."""
        return Refined(Result(assemble(best), features, best), torch.stack(self.curve), self.taken, self.lowest)


def one_by_one(alone: Callable[..., Refined], count: int, watch: Watch | None, *given: Any) -> Refined:
    """Refine each pair of a batch for itself.

    Args:
        alone: refines one pair, given its part of each of ``given``.
        count: of pairs.
        watch: None: whose transform would it be shown?
        given: batches: tensors, pairs of tensors, or None.

    Raises:
        ValueError: if somebody wants to watch.
    """
    if watch is not None:
        raise ValueError("This refinement goes pair by pair: watch one pair at a time.")
    return _joined([alone(*(pair_of(batch, i) for batch in given)) for i in range(count)])


def pair_of(batch: Any, i: int) -> Any:
    """One pair of a batch, which is a tensor or several; nothing of nothing."""
    if batch is None:
        return None
    return batch[i : i + 1].detach() if isinstance(batch, Tensor) else tuple(pair_of(part, i) for part in batch)


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
