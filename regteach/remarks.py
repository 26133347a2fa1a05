"""What the report of a registration remarks on: two contrasts, and reasons to doubt the result."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from regteach import contrasts
from regteach.checkpoints import Model
from regteach.nets.georeg import GeoReg

ROUNDING = 1e-3  # a loss that rises by less has not changed
MUCH = 0.1  # of what an image shows: so much outside of the working grid is worth a word


def on_contrasts(model: Model, moving: Float[Tensor, "1 c *grid"], fixed: Float[Tensor, "1 c *grid"]) -> list[str]:
    """Of a model for two contrasts: which image is which, and whether they look exchanged, or both of one contrast."""
    if not isinstance(model.network, GeoReg) or model.network.config.encoders == 1:
        return []
    first, second = model.network.config.contrasts or ("the first contrast", "the second contrast")
    told = [f"{model.name} takes {first} as the moving image and {second} as the fixed image."]
    seen = contrasts.contrasts_seen(list(model.network.encoders), moving, fixed)[0].tolist()
    if seen == [1, 0]:
        told.append("These two look exchanged: register them the other way round.")
    elif seen in ([0, 0], [1, 1]):
        told.append("The two look like one contrast: this model is not meant for two of a kind.")
    return told


def on_the_rest(shares: Mapping[str, float], extent_mm: Sequence[float]) -> list[str]:
    """Of images that show more than the network looks at: there nothing was found, and the transform only goes on.

    Args:
        shares: of what each image shows ("moving", "fixed"), the part outside of the working grid.
        extent_mm: of the working grid.
    """
    looked = " x ".join(f"{length:.0f}" for length in extent_mm)
    return [
        f"{share:.0%} of what the {name} image shows lies outside of the {looked} mm that the network looks at: there "
        "the transform is continued, not found."
        for name, share in shares.items()
        if share > MUCH
    ]


def on_doubts(
    moving: Float[Tensor, "1 c *grid"],
    fixed: Float[Tensor, "1 c *grid"],
    before: float | None,
    after: float | None,
) -> list[str]:
    """Whether there was anything to register, and whether the features agree less than they did at the start.

    A network has no rule that says "these are the same, move nothing": where nothing has to move, it moves a little all
    the same, and most of all where there is nothing to see.

    Nothing is said of images that agree less than at the start: of 20 good answers of ``istn-hippocampus`` seven are
    such, for it aligns structures.

    Args:
        moving, fixed: as the network saw them.
        before, after: loss of the features, at the start and by the result; None where it is not a number.
    """
    told = []
    if torch.equal(moving, fixed):
        told.append("The two images are the same: nothing has to move, and what moves is the network's own error.")
    if before is not None and after is not None and after > before + ROUNDING:
        told.append("The features agree less than at the start: refine the result, or doubt it.")
    return told
