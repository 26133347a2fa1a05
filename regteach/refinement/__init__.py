"""Refinement: a trained model's answer for one pair, improved on that very pair, without labels.

The features of both images are computed once. Then Adam turns either

- the transform's own parameters, starting from what the network predicted (``"parameters"``), or
- the displacement that the network predicted, and small ones composed with it, which start at zero, on grids four and
  two times as coarse and on the same grid (``"corrections"``), or
- the weights of the part of the network that predicts them (``"weights"``, as in the ISTN paper),

so that the loss of the test images falls. Or, without Adam, the displacement follows the slope of the loss in smooth
composed steps, on coarse images first (``"greedy"``, see :mod:`regteach.refinement.greedy`).

The engine is the same for every model of the package: it knows a
:class:`~regteach.result.Result` and a loss, and nothing of networks. Each pair is refined for itself: many pairs at
once give the same numbers as one by one, up to rounding. Adam divides a slope by its size, and makes whole steps
of rounding where a loss has next to no slope: there corrections differ by up to two tenths of a millimetre, and the
losses by less than a thousandth.

Source: Lee et al., Image-and-Spatial Transformer Networks, MICCAI 2019, section 2.3 (weights, ITN fixed); a fresh
Adam at the training rate and 50 steps are its public code's. Refining the parameters is ours: it is faster, and forgets
nothing. Ours, too, are sharpened maps, the images beside them, and the corrections: of parameters that add up, as those
of a GeoReg, the finest ones soon fold; smooth ones that are composed do so later.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from regteach import objectives
from regteach.grid import Grid
from regteach.refinement.adam import Aligner, corrections, refine_parameters, refine_weights
from regteach.refinement.greedy import better_of, later, refine_greedily
from regteach.refinement.looking import sharpened, with_images
from regteach.refinement.settings import MODES, Loss, Refined, Refinement, Watch
from regteach.result import Result
from regteach.transforms import displacement

__all__ = ["MODES", "Aligner", "Refined", "Refinement", "corrections", "refine", "search", "sharpened"]


@torch.inference_mode(False)
def refine(
    model: Aligner,
    result: Result,
    grid: Grid,
    settings: Refinement | None = None,
    loss: Loss | None = None,
    watch: Watch | None = None,
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
        ValueError: if maps or images hold numbers that are not finite, images are wanted that the result lacks, or
            several pairs are watched at once of which each is refined alone: by weights, or greedily with a focus; or
            several pairs of a model of keypoints are refined by weights; or if the grid has too few voxels for the
            coarsest of the settings.
    """
    settings = settings or Refinement()
    cube = settings.coarsen * 2 ** len(settings.coarser)
    if min(grid.shape) < 2 * cube and settings.steps:
        raise ValueError(
            f"Averaged over cubes of {cube} voxels, as this refinement begins, nothing is left to compare of "
            f"{' x '.join(map(str, grid.shape))} voxels."
        )
    loss = loss or objectives.at_test_time(model, settings.window_vox, settings.pyramid)
    result = _with_slopes(result)
    features = (result.features[0].detach(), result.features[1].detach())
    _check_finite(*features, *(result.images or ()))
    # Outside of mixed precision, whoever calls: coordinates need all the digits of float32.
    with torch.autocast(features[0].device.type, enabled=False):
        if settings.mode == "weights":
            found = refine_weights(model, features, result.images, grid, settings, loss, watch)
        elif settings.mode == "greedy":
            start = displacement(result.transform, grid).detach()
            found = refine_greedily(start, features, result.images, grid, settings, loss, watch)
            if settings.restart and settings.steps:
                nothing, seen = torch.zeros_like(start), later(watch, int(found.stopped.max()) + 1)
                again = refine_greedily(nothing, features, result.images, grid, settings, loss, seen)
                found = better_of(found, again)
        else:
            steps = result.steps if settings.mode == "parameters" else corrections(result.transform, grid)
            both = with_images(loss, result.images, settings)
            found = refine_parameters(steps, features, grid, settings, both, watch)
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
        ValueError: for another mode: without a network there are no parameters and no weights to turn; or if the images
            hold numbers that are not finite.
    """
    if settings.mode != "greedy":
        raise ValueError(f"A search without a network is greedy: there are no {settings.mode} to turn.")
    _check_finite(moving, fixed)
    loss = partial(objectives.image_refinement, similarity=similarity, window_vox=settings.window_vox)
    start = moving.new_zeros(len(moving), *grid.shape, grid.dim)
    with torch.autocast(moving.device.type, enabled=False):
        return refine_greedily(start, (moving, fixed), None, grid, settings, loss, None)


def _with_slopes(result: Result) -> Result:
    """The same, of tensors that may have slopes: what inference mode made has none, and is copied."""

    def able(maps: tuple[Tensor, Tensor] | None) -> Any:
        return maps and tuple(one.clone() if one.is_inference() else one for one in maps)

    return replace(result, features=able(result.features), images=able(result.images))


def _check_finite(*maps: Tensor) -> None:
    if not all(bool(values.isfinite().all()) for values in maps):
        raise ValueError("What is to be compared holds numbers that are not finite.")
