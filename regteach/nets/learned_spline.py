"""A spline that goes near its values: how near to each of them is learned.

The linear spline of ``ops.classical`` with a smoothing of its own for every match. A match that its neighbours, and the
spline through all others, do not confirm is let go of; good ones are kept. What a match is judged by does not depend on
where it is or on which way is up, so the result turns with its input.

In the language of statistics this is kriging with a linear variogram, where the noise of each measurement is estimated
by a network. A first spline, which lets go of what differs most from its neighbours, shows how far each match is from
what all others say; that and the evidence of the neighbours is what the network sees.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regteach.nets.blocks import zero_start
from regteach.ops.classical import Spline, fit_spline, left_out
from regteach.ops.neighbours import k_nearest
from regteach.precision import exactly

START_MM = 5.0  # smoothing of the untrained spline, in the unit of distance
FIRST_MM = 2.0  # of the first spline, for a match that agrees with its neighbours
LEAST, MOST = -6.0, 12.0  # its logarithm: from passing through a value to not hearing it
FEWEST = 8  # matches: fewer can not be judged by each other
FAR_MM = 1e3


class LearnedSpline(nn.Module):
    """The spline. Nothing is kept between calls.

    Args:
        evidence: numbers that speak for or against a match, as ``nets.evidence`` gives them.
        width: of the hidden layers.
        neighbours: among which a match is judged.
    """

    def __init__(self, evidence: int, width: int, neighbours: int) -> None:
        super().__init__()
        self.neighbours = neighbours
        # Of its own, the mean of its neighbours, the middle of all; with two numbers from the first spline.
        self.logits = _mlp(3 * (evidence + 2), width)
        self.log_smoothing = nn.Parameter(torch.tensor(math.log(START_MM)))

    @exactly
    def forward(
        self,
        keypoints_mm: Float[Tensor, "m d"],
        displacements_mm: Float[Tensor, "m d"],
        said: Float[Tensor, "m e"],
        doubt: Float[Tensor, "m"],
        given: Tensor | None = None,
    ) -> Spline | None:
        """The spline through matches; None where they are fewer than 8, or all lie in one plane.

        Args:
            keypoints_mm: positions.
            displacements_mm: what is known there.
            said: evidence of each match.
            doubt: how many times as far it is from its neighbours as they are from each other.
            given: bool ``m``, those that a person gave: the spline passes through them.
        """
        if len(keypoints_mm) < FEWEST or not _spans(keypoints_mm):
            return None
        near = k_nearest(keypoints_mm, keypoints_mm, self.neighbours + 1)
        with torch.no_grad():  # evidence is looked at, and not changed
            first = FIRST_MM * (1 + doubt).square()
            off = left_out(keypoints_mm, displacements_mm, first, "linear").norm(dim=1)
            off = off.nan_to_num(0.0).clamp(0.0, FAR_MM)
            beside = off / (off[near].median(1).values + 0.1)
            more = torch.stack([off, beside], 1).log1p()
        logits = self.logits(_in_company(torch.cat([said, more], 1), near))[:, 0]
        logarithm = (self.log_smoothing + logits).clamp(LEAST, MOST)
        smoothing = (logarithm if given is None else torch.where(given, LEAST, logarithm)).exp()
        return fit_spline(keypoints_mm, displacements_mm, smoothing, "linear")


def _in_company(said: Float[Tensor, "m e"], near: Tensor) -> Float[Tensor, "m f"]:
    """What is said of a match, of its neighbours on average, and of the middle one of all."""
    return torch.cat([said, said[near].mean(1), said.median(0).values.expand_as(said)], 1)


def _spans(points: Float[Tensor, "m d"]) -> bool:
    middle = points.detach().double() - points.detach().double().mean(0)
    return int(torch.linalg.matrix_rank(middle, rtol=1e-6)) == points.shape[1]


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), zero_start(nn.Linear(width, 1))
    )
