"""Correspondences with faults of known size: what a machine's matches are like, made from good ones.

Convention: positions and displacements in mm, ``n d`` without a batch axis. Four faults, each drawn from one generator:

- noise: independent at every match, Gaussian;
- unevenness: the noise differs from place to place, smoothly, as it does between clear and blurred parts of an image;
- drift: an error that neighbours share, a smooth random field, as where a whole vessel was taken for the next one;
- outliers: matches that are wrong by far, each for itself.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

WAVES = 64  # of a random field: enough that its values are Gaussian


@dataclass(frozen=True)
class Faults:
    """How wrong matches are.

    Args:
        noise_mm: standard deviation along each axis.
        outliers: share of matches that are wrong by far.
        drift_mm: standard deviation, along each axis, of the error that neighbours share.
        uneven: how much the noise differs from place to place: standard deviation of its logarithm.
        outlier_mm: standard deviation of an outlier's error along each axis.
        length_mm: over which drift and unevenness change.

    Raises:
        ValueError: if a number is negative or not finite, or the share is above 1.
    """

    noise_mm: float = 0.0
    outliers: float = 0.0
    drift_mm: float = 0.0
    uneven: float = 0.0
    outlier_mm: float = 15.0
    length_mm: float = 25.0

    def __post_init__(self) -> None:
        numbers = (self.noise_mm, self.outliers, self.drift_mm, self.uneven, self.outlier_mm)
        if not all(0 <= number < math.inf for number in numbers) or self.outliers > 1 or not self.length_mm > 0:
            raise ValueError("Faults are finite and not negative, outliers a share of at most 1, and a length above 0.")


def corrupted(
    keypoints_mm: Float[Tensor, "n d"],
    displacements_mm: Float[Tensor, "n d"],
    faults: Faults,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "n d"], Bool[Tensor, "n"]]:
    """The displacements with faults, and which of them are outliers.

    The same numbers are drawn whatever the faults are: twice the noise is the same noise, twice as large.
    """
    noise = torch.randn(displacements_mm.shape, generator=generator)
    wrong = torch.rand(len(displacements_mm), generator=generator) < faults.outliers
    far = torch.randn(displacements_mm.shape, generator=generator)
    drift = random_field(keypoints_mm, displacements_mm.shape[1], faults.length_mm, generator)
    level = (faults.uneven * random_field(keypoints_mm, 1, faults.length_mm, generator)).exp()
    found = displacements_mm + faults.noise_mm * level * noise + faults.drift_mm * drift
    return found + faults.outlier_mm * wrong[:, None] * far, wrong


def random_field(
    points_mm: Float[Tensor, "n d"], channels: int, length_mm: float, generator: torch.Generator
) -> Float[Tensor, "n c"]:
    """A smooth random field at points: Gaussian, mean 0, deviation 1, correlation exp(-r^2 / 2 length^2).

    (A sum of waves with random directions and phases: random Fourier features.)
    """
    waves = torch.randn(points_mm.shape[1], WAVES * channels, generator=generator) / length_mm
    phases = 2 * math.pi * torch.rand(WAVES * channels, generator=generator)
    values = (points_mm @ waves + phases).cos() * math.sqrt(2 / WAVES)
    return values.unflatten(1, (channels, WAVES)).sum(-1)
