"""Two contrasts, two encoders: what the second learns from the first, and which of them suits which image.

Each encoder draws in its contrast what the other draws of the same anatomy in its own, so features can be compared
where grey values can not.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regteach.objectives import relative_mse, scale_of

CLEARLY = 0.85  # of the second smallest error: a smaller one is no accident


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
    contrasts that they know, as long as these lie roughly where they belong: the further apart, the less is told by
    voxels that are compared in their places.

    Args:
        encoders: of the first and of the second contrast; each gives a pyramid of features.
        moving: the moving image.
        fixed: the fixed image.

    Returns:
        Of each pair the numbers of two encoders, 0 or 1: (0, 1) is the order in which the model takes its images,
        (1, 0) the other way round, and two equal numbers are two images of one contrast. (-1, -1) where none of these
        three is clearly better than the others.
    """
    first, second = ([encoder(image) for encoder in encoders] for image in (moving, fixed))
    orders = [(0, 1), (1, 0), (0, 0), (1, 1)]
    apart = torch.stack([_apart(first[i], second[j]) for i, j in orders])
    verdicts = torch.stack([apart[0], apart[1], apart[2:].amin(0)])
    best, next_best = verdicts.sort(0).values[:2]
    found = torch.tensor(orders, device=apart.device)[apart.argmin(0)]
    return torch.where((best < CLEARLY * next_best)[:, None], found, -1)


def _apart(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, "b"]:
    """Squared error over squares of each level, all channels as one: a channel that is nearly empty says little."""
    levels = [(x.float().flatten(1)[:, None], y.float().flatten(1)[:, None]) for x, y in zip(a, b, strict=True)]
    return torch.stack([relative_mse(x, y) for x, y in levels]).mean(0)
