"""Intensities: the same scale for every image, at training and at test time."""

import torch
from jaxtyping import Float
from torch import Tensor

PERCENTILES = (1.0, 99.0)


def normalised(
    images: Float[Tensor, "b c *grid"], percentiles: tuple[float, float] = PERCENTILES
) -> Float[Tensor, "b c *grid"]:
    """Each channel of each image to [0, 1] between two of its percentiles, clipped.

    Percentiles instead of the extremes: one bright vessel must not darken the rest. Zeros are left out of the count
    where nothing is below them: there they are background, of which an image may have any amount. Among negative values
    (CT, where 0 is water) they are signal like any other. Where the two percentiles are the same (a nearly binary
    image), the extremes serve.

    Args:
        images: of any number type; whole numbers become float32.
        percentiles: between 0 and 100, the lower one first.

    Raises:
        ValueError: if an image is constant or holds numbers that are not finite, or the percentiles make no sense.
    """
    if not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise ValueError(f"Two percentiles lie between 0 and 100, the lower one first, but these are {percentiles}.")
    images = images if images.is_floating_point() else images.float()
    flat = images.flatten(2)
    low, high = torch.empty_like(flat[..., 0]), torch.empty_like(flat[..., 0])
    for b in range(flat.shape[0]):
        for c in range(flat.shape[1]):
            values = flat[b, c]
            if not bool(values.isfinite().all()):
                raise ValueError(f"Image {b} holds numbers that are not finite (nan or inf).")
            least, most = values.aminmax()
            if least == most:
                raise ValueError(f"Image {b} is constant ({values[0]:g}): there is nothing to register.")
            signal = (values[values != 0] if least == 0 else values).sort().values
            at = [round(p / 100 * (len(signal) - 1)) for p in percentiles]
            low[b, c], high[b, c] = signal[at[0]], signal[at[1]]
            if low[b, c] == high[b, c]:
                low[b, c], high[b, c] = least, most
    shape = (*images.shape[:2], *[1] * (images.ndim - 2))
    low, high = low.reshape(shape), high.reshape(shape)
    return ((images - low) / (high - low)).clamp(0, 1)
