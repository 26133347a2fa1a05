"""What it costs to match a keypoint with each of its candidates.

Convention: features ``1 c *grid`` of one pair of images (intensities, MIND or learned), points ``n d`` in mm,
candidates ``m d``: displacements in mm that are tried for every keypoint. A match is moving = start + candidate, where
the start is the point itself or where an earlier transform takes it. Costs ``n m``, lower is better.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regteach.grid import Grid, per_axis
from regteach.precision import exactly
from regteach.sampling import Mapping, at_least_float32, check_image, sample

BUDGET = 8_000_000  # numbers that a chunk of keypoints may hold at once


def search_window(
    grid: Grid, radius_mm: float | Sequence[float], step_mm: float | Sequence[float] | None = None
) -> Float[Tensor, "m d"]:
    """All displacements of a regular lattice about 0 that are at most ``radius_mm`` long along each axis, mm.

    Args:
        grid: gives the number of axes, and the step where it is left out: one voxel.
        radius_mm: half the width of the window; one number or one per axis, where 0 means no search along that axis.
        step_mm: distance of neighbouring candidates; one number or one per axis.

    Returns:
        Candidates on the CPU in float32, the last axis running fastest; the middle one is 0.

    Raises:
        ValueError: if a step is not positive, or the window holds no candidate beside 0.
    """
    radius = per_axis(radius_mm, grid.dim, "radius_mm")
    step = per_axis(grid.spacing if step_mm is None else step_mm, grid.dim, "step_mm")
    if min(step) <= 0:
        raise ValueError(f"The step between candidates is a distance in mm and must be positive, but it is {step}.")
    # 1e-6 of a step of slack: 0.3 mm at 0.1 mm is 3 steps, not 2 because of rounding.
    reach = [math.floor(r / h + 1e-6) for r, h in zip(radius, step, strict=True)]
    if min(reach) < 0 or max(reach) == 0:
        raise ValueError(f"A search window of {radius} mm in steps of {step} mm holds no candidate to choose from.")
    axes = [h * torch.arange(-r, r + 1) for r, h in zip(reach, step, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, grid.dim).float()


@exactly
def cost_volume(
    fixed_features: Float[Tensor, "1 c *fixed"],
    moving_features: Float[Tensor, "1 c *moving"],
    grid: Grid,
    points_mm: Float[Tensor, "n d"],
    candidates_mm: Float[Tensor, "m d"],
    patch_radius_vox: int = 1,
    transform: Mapping | None = None,
    grid_moving: Grid | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "n m"]:
    """Mean squared difference of the patch about each keypoint and the patch about each of its candidates.

    A patch is (2 radius + 1) voxels of the fixed grid wide along each axis, and the mean is over its voxels and the
    channels: the unit is the features' squared. Features are read between voxels by linear interpolation; beyond the
    border the outermost voxel is repeated. A candidate that lies outside of the moving image costs as much as the
    worst one inside, so that the repeated border is never a match.

    Keypoints are taken in chunks, which changes no number. In training each chunk is computed again when its gradient
    is, so memory stays bounded there too. Differentiable in both features, and in the points and what ``transform``
    makes of them.

    Args:
        fixed_features: what the keypoints look like.
        moving_features: where they are looked for.
        grid: where the fixed features sit.
        points_mm: keypoints; (0, d) gives costs of shape (0, m).
        candidates_mm: displacements to try, as from :func:`search_window`; any other list will do.
        patch_radius_vox: 0 compares single positions.
        transform: where the search starts: fixed points ``1 n d`` to moving points. Left out, at the point itself.
        grid_moving: where the moving features sit; ``grid`` where left out.
        chunk: keypoints at a time; where left out, as many as hold about 8 million numbers.

    Raises:
        ValueError: if shapes do not fit, there is no candidate, or a radius or chunk is impossible.
    """
    grid_moving = grid_moving or grid
    _check(fixed_features, moving_features, grid, grid_moving, points_mm, candidates_mm)
    if patch_radius_vox < 0 or (chunk is not None and chunk < 1):
        raise ValueError(f"A patch radius is 0 or more and a chunk 1 or more, not {patch_radius_vox} and {chunk}.")
    dtype = torch.promote_types(fixed_features.dtype, torch.float32)
    fixed, moving = fixed_features.to(dtype), moving_features.to(dtype)
    # Differences do not see a common offset, but squares lose digits to it.
    offset = fixed.detach().flatten(2).mean(-1)[(..., *[None] * grid.dim)]
    fixed, moving = fixed - offset, moving - offset
    points, candidates = points_mm.to(fixed), candidates_mm.to(fixed)
    start = points if transform is None else transform(points[None])[0].to(fixed)
    if start.shape != points.shape:
        raise ValueError(f"The transform made {tuple(start.shape)} of {len(points)} points in {grid.dim}D.")
    offsets = torch.arange(-patch_radius_vox, patch_radius_vox + 1)
    patch = torch.cartesian_prod(*[offsets] * grid.dim).to(fixed) * fixed.new_tensor(grid.spacing)
    around, table = _shared_offsets(candidates, patch)
    # Row p of a keypoint's table of differences holds voxel p of its patch against every position of `around`.
    bags = table + torch.arange(len(patch), device=table.device) * len(around)

    def costs(points: Tensor, start: Tensor, fixed: Tensor, moving: Tensor) -> Float[Tensor, "k m"]:
        here = sample(fixed, (points[:, None] + patch)[None], grid)[0].permute(1, 2, 0)  # k p c
        there = sample(moving, (start[:, None] + around)[None], grid_moving)[0].permute(1, 0, 2)  # k c u
        squares = here.square().sum(2, keepdim=True) + there.square().sum(1, keepdim=True)
        differences = torch.baddbmm(squares, here, there, alpha=-2).clamp_min(0)  # k p u
        # Every candidate adds up one entry of each row; the sum is over keypoints at once, as columns of a matrix.
        sums = F.embedding_bag(bags, differences.flatten(1).T.contiguous(), mode="sum").T
        sums = sums / (len(patch) * fixed.shape[1])
        inside = _inside(start[:, None] + candidates, grid_moving)
        worst = torch.where(inside, sums.detach(), -torch.inf).amax(1, keepdim=True)
        return torch.where(inside | worst.isinf(), sums, worst)

    training = torch.is_grad_enabled() and any(x.requires_grad for x in (fixed, moving, start))
    chunk = chunk or max(1, BUDGET // (len(around) * (fixed.shape[1] + 2 * len(patch))))
    parts = [points.new_zeros(0, len(candidates))]
    for some, begin in zip(points.split(chunk), start.split(chunk), strict=True):
        if len(some) and training:
            parts.append(checkpoint(costs, some, begin, fixed, moving, use_reentrant=False))
        elif len(some):
            parts.append(costs(some, begin, fixed, moving))
    return torch.cat(parts)


@exactly
def soft_argmin(
    cost: Float[Tensor, "*any m"], candidates_mm: Float[Tensor, "m d"], temperature: float
) -> tuple[Float[Tensor, "*any d"], Float[Tensor, "*any"]]:
    """Mean of the candidates under the weights softmax(-cost / temperature), and how far they spread.

    Args:
        cost: finite costs; half precision is computed in float32.
        candidates_mm: the displacement that each of them is about.
        temperature: in units of the cost; near 0 the cheapest candidate wins, a high one gives the window's middle.

    Returns:
        The displacement, mm, between the candidates; and the root of its mean squared distance from the candidates
        under the same weights, mm: 0 for a single sharp minimum.

    Raises:
        ValueError: if there is no candidate, the numbers do not agree, or the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"A temperature is positive, but this one is {temperature}.")
    if len(candidates_mm) == 0 or cost.shape[-1] != len(candidates_mm):
        raise ValueError(f"{cost.shape[-1]} costs a keypoint need as many candidates, but {len(candidates_mm)} exist.")
    cost = at_least_float32(cost)
    candidates = candidates_mm.to(cost)
    weights = torch.softmax(-cost / temperature, dim=-1)
    mean = weights @ candidates
    variance = weights @ candidates.square().sum(-1) - mean.square().sum(-1)
    # A root has no slope at 0: below a ten thousandth of the window the spread is 0, and so is its gradient.
    smallest = 1e-8 * candidates.square().sum(-1).max()
    sharp = variance <= smallest
    return mean, torch.where(sharp, 0, torch.where(sharp, 1, variance).sqrt())


def _shared_offsets(candidates: Tensor, patch: Tensor) -> tuple[Float[Tensor, "u d"], Int[Tensor, "m p"]]:
    """The different values of candidate + patch offset, and where each pair is found among them.

    Patches about neighbouring candidates overlap: on a lattice of 11^3 with patches of 3^3, 13^3 positions serve.
    """
    total = (candidates[:, None] + patch).reshape(-1, candidates.shape[1])
    key = torch.zeros(len(total), dtype=torch.long, device=total.device)
    for column in (total.detach() * 1e4).round().long().T:  # a tenth of a micrometre apart is the same place
        values, place = column.unique(return_inverse=True)
        key = key * len(values) + place
    _, place = key.unique(return_inverse=True)
    around = total.new_empty(int(place.max()) + 1, total.shape[1])
    around[place] = total
    return around, place.reshape(len(candidates), len(patch))


def _inside(points: Tensor, grid: Grid) -> Tensor:
    """Whether points lie between the outer faces of the grid's voxels, with a hundredth of a voxel of slack."""
    spacing = points.new_tensor(grid.spacing)
    low, high = points.new_tensor(grid.origin) - 0.51 * spacing, points.new_tensor(grid.last) + 0.51 * spacing
    return ((points >= low) & (points <= high)).all(-1)


def check_points(points: Tensor, grid: Grid) -> None:
    """Raise a ValueError unless the points are ``n d``, finite, and inside the image."""
    if points.ndim != 2 or points.shape[1] != grid.dim or not points.is_floating_point():
        raise ValueError(
            f"Keypoints of this image are number x {grid.dim} in mm, not {tuple(points.shape)} of {points.dtype}."
        )
    if not bool(points.isfinite().all()):
        raise ValueError("The keypoints hold numbers that are not finite.")
    outside = ~_inside(points, grid)
    if bool(outside.any()):
        first = int(outside.int().argmax())
        place = ", ".join(f"{x:.4g}" for x in points[first].tolist())
        reach = " x ".join(f"{a:.4g} to {b:.4g}" for a, b in zip(grid.origin, grid.last, strict=True))
        raise ValueError(
            f"{int(outside.sum())} of {len(points)} keypoints lie outside of the image, which reaches over {reach} mm: "
            f"the first is number {first} at ({place}) mm."
        )


def _check(fixed: Tensor, moving: Tensor, grid: Grid, grid_moving: Grid, points: Tensor, candidates: Tensor) -> None:
    check_image(fixed, grid)
    check_image(moving, grid_moving)
    if len(fixed) != 1 or len(moving) != 1 or fixed.shape[1] != moving.shape[1]:
        raise ValueError(
            f"One pair of features with as many channels is compared, not {tuple(fixed.shape[:2])} (batch, channels) "
            f"with {tuple(moving.shape[:2])}."
        )
    if points.ndim != 2 or points.shape[1] != grid.dim:
        raise ValueError(f"Keypoints of this image are number x {grid.dim}, not {tuple(points.shape)}.")
    if candidates.ndim != 2 or candidates.shape[1] != grid.dim or len(candidates) == 0:
        raise ValueError(f"Candidates are at least one displacement x {grid.dim}, not {tuple(candidates.shape)}.")
