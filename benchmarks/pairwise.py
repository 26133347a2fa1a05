"""Registration without learning: an affine, and cubic B-splines after it, found on the very pair.

Adam descends on the images' dissimilarity and the bending energy of the splines, by the engine of test-time refinement,
first on averaged images and then on finer ones. The splines' coefficients stay below the bound under which they can
not fold.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from regteach import bspline, objectives
from regteach.affine import AffineBounds
from regteach.grid import Grid
from regteach.refinement import Refinement, refine
from regteach.result import Result, Step, assemble
from regteach.transforms import FreeForm, Transform


@dataclass(frozen=True)
class Optimisation:
    """How a pair is registered.

    Args:
        similarity: what is compared, a name of :func:`regteach.similarity.dissimilarity`.
        bounds: of the affine.
        control_mm: distance between the control points.
        bending: weight of the splines' bending energy, mm^2.
        affine: averages over cubes of so many voxels that the affine looks at, one after the other.
        splines: those that affine and splines look at together.
        steps: of Adam on each average.
        rate: of Adam, in parts of the bounds.
    """

    similarity: str
    bounds: AffineBounds
    control_mm: float
    bending: float
    affine: tuple[int, ...] = (4, 2)
    splines: tuple[int, ...] = (4, 2, 1)
    steps: int = 30
    rate: float = 0.03


def optimised(moving: Tensor, fixed: Tensor, grid: Grid, how: Optimisation, splines: bool) -> Transform:
    """The transform of each pair, fixed points to moving points.

    Args:
        moving: ``b c *grid``.
        fixed: likewise.
        grid: of both.
        how: to find it.
        splines: False stops after the affine.
    """
    settings = Refinement(how.steps, rate=how.rate, bending=how.bending)
    steps: tuple[Step, ...] = (affine_step(moving, grid, how.bounds),)
    for factor in how.affine:
        steps = descended(steps, (moving, fixed), grid, replace(settings, coarsen=factor), how.similarity)
    if splines:
        ctrl = bspline.control_grid(grid, how.control_mm)
        steps = (*steps, Step(moving.new_zeros(len(moving), *ctrl.shape, grid.dim), partial(_spline, ctrl=ctrl)))
        for factor in how.splines:
            steps = descended(steps, (moving, fixed), grid, replace(settings, coarsen=factor), how.similarity)
    return assemble(steps)


def affine_step(moving: Tensor, grid: Grid, bounds: AffineBounds) -> Step:
    """An affine of each image about the middle of the grid, the identity to begin with."""
    logits = moving.new_zeros(len(moving), sum(AffineBounds.counts(grid.dim)))
    return Step(logits, partial(_affine, bounds=bounds, grid=grid))


def descended(
    steps: tuple[Step, ...], images: tuple[Tensor, Tensor], grid: Grid, settings: Refinement, similarity: str
) -> tuple[Step, ...]:
    """The steps with the parameters at which the images, moving and fixed, are most alike."""
    compare = partial(objectives.image_refinement, similarity=similarity)
    return refine(_NoNetwork(), Result(assemble(steps), images, steps), grid, settings, compare).result.steps


def _affine(logits: Tensor, bounds: AffineBounds, grid: Grid) -> Transform:
    return bounds.parts(logits, grid.dim).about(grid.centre)


def _spline(logits: Tensor, ctrl: Grid) -> Transform:
    limit = bspline.FOLD_FREE[ctrl.dim] * torch.tensor(ctrl.spacing).to(logits)
    return FreeForm(logits.tanh() * limit, ctrl)


class _NoNetwork:
    """Refinement of parameters never asks the model."""

    def align(self, moving: Tensor, fixed: Tensor, grid: Grid) -> Result:
        raise NotImplementedError
