"""Neighbouring keypoints agree: costs of matches, regularised over all keypoints at once.

Convention: costs ``n m`` of n keypoints and m candidate displacements, lower is better, points ``n d`` and candidates
``m d`` in mm. Both functions take costs and return costs of the same shape, for a soft-argmin.

| function       | penalty                                                   | solution                                |
|----------------|-----------------------------------------------------------|-----------------------------------------|
| mean_field     | smoothness sum_j |d_i - d_j|^2 / |x_i - x_j|, j the       | each in turn against the others' means: |
|                | nearest keypoints                                         | an approximation                        |
| tree_marginals | the same along the edges of the minimum spanning tree     | min-sum messages: exact                 |

Sources: mean field on displacements: Heinrich, Closing the gap between deep and conventional image registration using
probabilistic dense displacement networks, MICCAI 2019; messages on a minimum spanning tree: Heinrich et al., MRF-based
deformable registration and ventilation estimation of lung CT, IEEE TMI 32 (2013); minima taken axis by axis:
Felzenszwalb and Huttenlocher, IJCV 70 (2006).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from regteach.keypoints.costs import soft_argmin
from regteach.precision import exactly


@exactly
def mean_field(
    cost: Float[Tensor, "n m"],
    candidates_mm: Float[Tensor, "m d"],
    points_mm: Float[Tensor, "n d"],
    smoothness: float,
    temperature: float,
    neighbours: int = 8,
    iterations: int = 10,
) -> Float[Tensor, "n m"]:
    """Costs with a penalty for leaving the neighbours' current estimates, iterated.

    Each round takes the soft-argmin u of all keypoints and adds to the costs of keypoint i the penalty
    smoothness * sum_j |candidate - u_j|^2 / |x_i - x_j|, j being its nearest keypoints, ties by index.

    Args:
        cost: costs of each keypoint.
        candidates_mm: displacements that they are about.
        points_mm: where the keypoints are; distances below the candidates' step count as one step.
        smoothness: cost per mm.
        temperature: of the soft-argmin, in units of the cost.
        neighbours: how many; all others where there are fewer.
        iterations: rounds; 0 returns the costs as they are.

    Returns:
        The costs with the last penalty, for a soft-argmin. Differentiable in the costs.

    Raises:
        ValueError: if shapes do not agree, or smoothness, neighbours or iterations is negative.
    """
    _check_problem(cost, candidates_mm, points_mm, smoothness)
    if neighbours < 0 or iterations < 0:
        raise ValueError(f"Neighbours and iterations are 0 or more, not {neighbours} and {iterations}.")
    neighbours = min(neighbours, len(cost) - 1)
    if neighbours < 1:
        return cost
    candidates, points = candidates_mm.to(cost), points_mm.detach().to(cost)
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(torch.inf)
    distance, near = (x[:, :neighbours] for x in distance.sort(dim=1, stable=True))
    weights = smoothness / distance.clamp_min(_smallest_step(candidates))
    total = weights.sum(1, keepdim=True)
    squares = candidates.square().sum(-1)
    regularised = cost
    for _ in range(iterations):
        estimate, _ = soft_argmin(regularised, candidates, temperature)
        pull = (weights[..., None] * estimate[near]).sum(1)
        # sum_j w_j |c - u_j|^2 but for what does not depend on the candidate c
        regularised = cost + total * squares - 2 * pull @ candidates.T
    return regularised


@exactly
def tree_marginals(
    cost: Float[Tensor, "n m"],
    candidates_mm: Float[Tensor, "m d"],
    points_mm: Float[Tensor, "n d"],
    smoothness: float,
    truncation: float | None = None,
) -> Float[Tensor, "n m"]:
    """Least total cost of all keypoints, for each candidate of each keypoint; exact on the minimum spanning tree.

    The total is the sum of all costs plus, for each edge (i, j) of the tree, min(smoothness * |d_i - d_j|^2 /
    |x_i - x_j|, truncation). Messages run from the leaves to the first keypoint and back, a level of the tree at a
    time; the minimum over the neighbour's candidates is taken axis by axis, since the penalty is a sum over the axes.

    Args:
        cost: finite costs of each keypoint.
        candidates_mm: a whole lattice in order, as from :func:`~regteach.keypoints.search_window`.
        points_mm: where the keypoints are; distances below the candidates' step count as one step.
        smoothness: cost per mm.
        truncation: most that an edge may cost; no limit where left out.

    Returns:
        Marginals less their minimum, so each row's best candidate is at 0. Differentiable in the costs.

    Raises:
        ValueError: if shapes do not agree, a weight is negative, or the candidates are no lattice.
    """
    _check_problem(cost, candidates_mm, points_mm, smoothness)
    if truncation is not None and truncation < 0:
        raise ValueError(f"A truncation is a cost of 0 or more, but it is {truncation}.")
    axes = _lattice(candidates_mm.to(cost))
    if len(cost) == 0:
        return cost
    levels = _tree_levels(points_mm, smoothness, _smallest_step(candidates_mm))
    passed = partial(_message, axes=axes, truncation=truncation)
    beliefs = [cost[level.nodes] for level in levels]
    upward: list[Tensor] = [cost[:0]] * len(levels)
    for depth in range(len(levels) - 1, 0, -1):
        upward[depth] = passed(beliefs[depth], levels[depth].weight)
        beliefs[depth - 1] = beliefs[depth - 1].index_add(0, levels[depth].parent, upward[depth])
    for depth in range(1, len(levels)):
        # What the parent knows without this child, so that nothing comes back to where it came from.
        others = beliefs[depth - 1][levels[depth].parent] - upward[depth]
        beliefs[depth] = beliefs[depth] + passed(others, levels[depth].weight)
    marginals = torch.cat(beliefs)[torch.cat([level.nodes for level in levels]).argsort()]
    return marginals - marginals.amin(1, keepdim=True)


@dataclass(frozen=True)
class _Level:
    """Keypoints at one depth of the tree: their indices, their parents' places in the level above, the edges."""

    nodes: Int[Tensor, "k"]
    parent: Int[Tensor, "k"]
    weight: Float[Tensor, "k"]


def _tree_levels(points_mm: Tensor, smoothness: float, shortest: float) -> list[_Level]:
    """The minimum spanning tree by Prim's algorithm from keypoint 0; ties go to the lower index."""
    points = points_mm.detach().cpu().double().numpy()
    n = len(points)
    length, parent, depth = np.full(n, np.inf), np.zeros(n, int), np.zeros(n, int)
    waiting = np.ones(n, bool)
    current = 0
    for _ in range(n):
        waiting[current] = False
        depth[current] = depth[parent[current]] + 1 if current else 0
        distance = np.linalg.norm(points - points[current], axis=1)
        closer = waiting & (distance < length)
        length[closer], parent[closer] = distance[closer], current
        current = int(np.where(waiting, length, np.inf).argmin())
    place = np.zeros(n, int)
    levels = []
    for level in range(depth.max() + 1):
        nodes = np.flatnonzero(depth == level)
        place[nodes] = np.arange(len(nodes))
        weight = smoothness / np.maximum(length[nodes], shortest)
        nodes_at, parent_at = (torch.from_numpy(x).to(points_mm.device) for x in (nodes, place[parent[nodes]]))
        levels.append(_Level(nodes_at, parent_at, torch.from_numpy(weight).to(points_mm)))
    return levels


def _message(belief: Tensor, weight: Tensor, axes: Sequence[Tensor], truncation: float | None) -> Tensor:
    """min over b of belief(b) + min(weight |a - b|^2, truncation), for every candidate a, less its minimum."""
    belief = belief - belief.amin(1, keepdim=True)
    out = belief.unflatten(1, [len(axis) for axis in axes])
    for k, axis in enumerate(axes, start=1):
        penalty = weight[:, None, None].to(out) * (axis[:, None] - axis).square()
        penalty = penalty.reshape(len(out), *[1] * (len(axes) - 1), len(axis), len(axis))
        out = (out.movedim(k, -1)[..., None, :] + penalty).amin(-1).movedim(-1, k)
    out = out.flatten(1)
    return out if truncation is None else out.clamp_max(truncation)  # the belief's minimum is 0


def _lattice(candidates: Tensor) -> list[Tensor]:
    """The values along each axis of candidates that are all their combinations, the last axis running fastest."""
    axes = [column.unique() for column in candidates.T]
    lattice = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    if lattice.shape != candidates.shape or not torch.equal(lattice, candidates):
        raise ValueError("The tree needs candidates on a whole lattice in order, as search_window makes them.")
    return axes


def _smallest_step(candidates: Tensor) -> float:
    """Least distance of two different values along an axis, mm; 1 if there is one candidate only."""
    steps = [values.diff().min() for values in (column.unique() for column in candidates.T) if len(values) > 1]
    return float(min(steps)) if steps else 1.0


def _check_problem(cost: Tensor, candidates: Tensor, points: Tensor, smoothness: float) -> None:
    if cost.ndim != 2 or cost.shape != (len(points), len(candidates)) or points.ndim != 2 or candidates.ndim != 2:
        raise ValueError(
            f"Costs are keypoints x candidates, but they are {tuple(cost.shape)} for {len(points)} keypoints and "
            f"{len(candidates)} candidates."
        )
    if smoothness < 0:
        raise ValueError(f"Smoothness is a weight of 0 or more, but it is {smoothness}.")
