"""What a refinement looks at: maps, sharpened or averaged, in a part of the grid, and the images beside them."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from regteach import objectives
from regteach.focus import Focus, focus_on
from regteach.grid import Grid
from regteach.refinement.settings import Loss, Refinement
from regteach.result import Step
from regteach.transforms import Transform


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


def compared_maps(
    features: tuple[Tensor, Tensor], grid: Grid, settings: Refinement
) -> tuple[tuple[Tensor, Tensor], Grid]:
    """The maps that are compared, and where they sit: sharpened or not, and averaged over cubes or not."""
    first, second = (objectives.averaged(sharpened(maps, settings.sharpen), settings.coarsen) for maps in features)
    return (first, second), grid.coarsened(settings.coarsen)


@torch.no_grad()
def focus_of(transform: Transform, features: tuple[Tensor, Tensor], grid: Grid, settings: Refinement) -> Focus | None:
    """The part of the grid round what the maps show as they lie now, where only that is looked at."""
    if not settings.focus_mm:
        return None
    return focus_on(features, transform, grid, settings.focus_mm, settings.pyramid)


def with_images(loss: Loss, images: tuple[Tensor, Tensor] | None, settings: Refinement) -> Loss:
    """The loss, and beside it what the images themselves say, where they are wanted."""
    if not settings.images:
        return loss
    if images is None:
        raise ValueError("The refinement is to look at the images beside the maps, but the result carries no images.")
    compared = tuple(objectives.averaged(image.detach(), settings.coarsen) for image in images)

    def both(
        features: tuple[Tensor, Tensor], transform: Transform, grid: Grid, focus: Focus | None
    ) -> Float[Tensor, "b"]:
        seen = objectives.image_refinement(
            (compared[0], compared[1]), transform, grid, focus, "local_ncc", settings.window_vox
        )
        return loss(features, transform, grid, focus) + settings.images * seen

    return both


def loss_of(
    steps: tuple[Step, ...],
    transform: Transform,
    features: tuple[Tensor, Tensor],
    grid: Grid,
    settings: Refinement,
    loss: Loss,
    focus: Focus | None,
) -> Float[Tensor, "b"]:
    """What is minimised: the loss of the maps, and the bending energy of the steps."""
    terms = {"features": loss(features, transform, grid, focus)} | objectives.regulariser(steps, grid, settings.bending)
    return objectives.total(terms)
