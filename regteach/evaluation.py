"""Measuring a model on people that it has never seen, the same way for every model.

Labels are warped by nearest voxel; Dice is the mean over the structures. Labels are used here and nowhere in inference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regteach import metrics
from regteach.data.cohort import Cohort
from regteach.refinement import Refinement, refine
from regteach.sampling import warp
from regteach.transforms import Transform, jacobian_determinant


@dataclass(frozen=True)
class PairFigures:
    """Figures of one pair; ``transform`` is what they were measured on."""

    dice: float
    folding_percent: float
    transform: Transform


def measure(
    model: Any,
    cohort: Cohort,
    pairs: Sequence[tuple[int, int]],
    device: torch.device | str = "cpu",
    refinement: Refinement | None = None,
) -> tuple[dict[str, float], list[PairFigures]]:
    """Register pairs of a cohort one by one, and measure: labels warped by nearest voxel, mean Dice of all structures.

    Args:
        model: takes moving, fixed, grid.
        cohort: of the images and labels; the labels are for measuring alone.
        pairs: (moving, fixed).
        device: where to compute.
        refinement: after the one pass; none for the one pass alone.

    Returns:
        Means, and the figures of each pair.

    Raises:
        ValueError: if there is no pair.
    """
    if not pairs:
        raise ValueError(f"There is no pair of {cohort.name} to measure.")
    rows = []
    for moving, fixed in pairs:
        images = cohort.images[[moving, fixed]].to(device)
        with torch.no_grad():
            result = model(images[:1], images[1:], cohort.grid)
        if refinement is not None:
            result = refine(model, result, cohort.grid, refinement).result
        rows.append(figures_of(cohort, moving, fixed, result.transform, device))
    return {"dice": mean_dice(rows), "folding_percent": sum(row.folding_percent for row in rows) / len(rows)}, rows


def mean_dice(rows: Sequence[PairFigures]) -> float:
    """Over the pairs that show a structure: where neither of two label maps has one, there is no Dice (nan)."""
    known = [row.dice for row in rows if not math.isnan(row.dice)]
    return sum(known) / len(known) if known else math.nan


@torch.no_grad()
def figures_of(
    cohort: Cohort, moving: int, fixed: int, transform: Transform, device: torch.device | str = "cpu"
) -> PairFigures:
    """Figures of one transform between two people of a cohort; what comes from outside of the grid is background."""
    labels = cohort.labels[[moving]][:, None].float().to(device)
    warped = warp(labels, transform, cohort.grid, order=0, padding="zeros").round().long().cpu()
    overlap = metrics.dice(warped, cohort.labels[[fixed]][:, None], labels=cohort.structures)
    det = jacobian_determinant(transform, cohort.grid)
    return PairFigures(float(metrics.mean_over_labels(overlap)[0]), float(metrics.folding_percent(det)[0]), transform)


def pairs_to_test(cohort: Cohort, count: int = 50) -> tuple[tuple[int, int], ...]:
    """The pairs of test people that cards and benchmarks use: ``count`` of them, or all, seed 0.

    Raises:
        ValueError: if no pair is asked for, or there is none.
    """
    if count < 1 or not cohort.pairs("test"):
        raise ValueError(f"{count} of the {len(cohort.pairs('test'))} test pairs of {cohort.name} were asked for.")
    return cohort.pairs("test", min(count, len(cohort.pairs("test"))), seed=0)
