"""What speaks for and against a match of keypoints: how far from its neighbours it is, and how far they agree."""

import torch
from jaxtyping import Float
from torch import Tensor

from regteach.ops.neighbours import k_nearest
from regteach.precision import exactly
from regteach.sampling import at_least_float32

EVIDENCE = 6  # numbers about a match
RIDGE = 1e-3  # of a plane's spread, so that neighbours in a row define one too


def evidence(
    keypoints_mm: Float[Tensor, "m d"],
    displacements_mm: Float[Tensor, "m d"],
    neighbours: int,
    spread_mm: Float[Tensor, "m"] | None = None,
) -> Float[Tensor, "m 6"]:
    """What speaks for and against a match: how far it is from what its neighbours say, and how far they agree.

    Distance from the plane through the neighbours and from their median; how much the neighbours scatter; both
    distances in units of that scatter; the spread of the match's own costs. All as log(1 + mm), or log(1 + ratio).
    """
    if len(keypoints_mm) < 3:
        return keypoints_mm.new_zeros(len(keypoints_mm), EVIDENCE)
    plane, median, scatter = leave_one_out(keypoints_mm, displacements_mm, neighbours)
    from_plane, from_median = (
        (displacements_mm - other).square().sum(1).clamp_min(1e-12).sqrt() for other in (plane, median)
    )
    unit = scatter + 0.1
    spread = torch.zeros_like(scatter) if spread_mm is None else spread_mm
    said = [from_plane, from_median, scatter, from_plane / unit, from_median / unit, spread]
    return torch.stack(said, 1).log1p()


@exactly
def leave_one_out(
    keypoints_mm: Float[Tensor, "m d"], displacements_mm: Float[Tensor, "m d"], neighbours: int
) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m d"], Float[Tensor, "m"]]:
    """What the neighbours of each keypoint say about it, itself left out.

    Returns:
        The plane through them (least squares), read at the keypoint; their median, axis by axis; and the median
        distance of theirs from it, mm.
    """
    if len(keypoints_mm) < 2:
        raise ValueError("What the others say about a keypoint needs at least 2 of them.")
    keypoints_mm, displacements_mm = at_least_float32(keypoints_mm), at_least_float32(displacements_mm)
    near = k_nearest(keypoints_mm, keypoints_mm, neighbours + 1)
    own = torch.arange(len(near), device=near.device)[:, None]
    # It is one of its own nearest, but among keypoints at one place not always the first: the farthest takes its seat.
    near = torch.where(near == own, near[:, -1:], near)[:, :-1]
    said, offsets = displacements_mm[near], keypoints_mm[near] - keypoints_mm[:, None]
    median = _median(said)
    scatter = _median((said - median[:, None]).square().sum(-1).clamp_min(1e-12).sqrt())
    middle, mean = offsets.mean(1, keepdim=True), said.mean(1, keepdim=True)
    centred = offsets - middle
    spread = centred.mT @ centred
    ridge = RIDGE * spread.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-6
    slopes = torch.linalg.solve(spread + ridge * torch.eye(spread.shape[-1]).to(spread), centred.mT @ (said - mean))
    return (mean - middle @ slopes)[:, 0], median, scatter


def _median(values: Tensor) -> Tensor:
    """Along axis 1; of an even number the mean of the two in the middle, which torch's median is not."""
    ordered, count = values.sort(1).values, values.shape[1]
    return 0.5 * (ordered[:, (count - 1) // 2] + ordered[:, count // 2])
