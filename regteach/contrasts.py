"""Two contrasts, two encoders: what the second learns from the first, and which of them suits which image.

Each encoder draws in its contrast what the other draws of the same anatomy in its own, so features can be compared
where grey values can not.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regteach.objectives import relative_mse, scale_of


def alike(
    seen: Sequence[Float[Tensor, "b c *level"]], shown: Sequence[Float[Tensor, "b c *level"]]
) -> dict[str, Float[Tensor, "b"]]:
    """How far an encoder's features of an image are from those of another encoder, of the same anatomy in its contrast.

    :func:`~regteach.objectives.relative_mse` of each level, averaged over the levels; the features that are imitated
    are constants.

    Args:
        seen: a pyramid of features, finest first.
        shown: what they should be.
    """
    pairs = [(a.float(), b.detach().float()) for a, b in zip(seen, shown, strict=True)]  # half precision can not add up
    errors = [relative_mse(a, b, scale_of(b, b)) for a, b in pairs]
    return {"features": torch.stack(errors).mean(0)}


@torch.no_grad()
def contrasts_seen(
    encoders: Sequence[nn.Module], moving: Float[Tensor, "b c *grid"], fixed: Float[Tensor, "b c *grid"]
) -> Int[Tensor, "b 2"]:
    """Which of two encoders suits the moving, and which the fixed image: those two whose features agree best.

    Each encoder draws the same features of the same anatomy in its own contrast, so they agree on two images in the
    contrasts that they know, also where these are not aligned yet.

    Args:
        encoders: of the first and of the second contrast; each gives a pyramid of features.
        moving: the moving image.
        fixed: the fixed image.

    Returns:
        Of each pair the numbers of two encoders, 0 or 1: (0, 1) is the order in which the model takes its images,
        (1, 0) the other way round, and two equal numbers are two images of one contrast.
    """
    first, second = ([encoder(image) for encoder in encoders] for image in (moving, fixed))
    orders = [(0, 1), (1, 0), (0, 0), (1, 1)]
    apart = torch.stack([alike(second[j], first[i])["features"] for i, j in orders])
    return torch.tensor(orders, device=apart.device)[apart.argmin(0)]
