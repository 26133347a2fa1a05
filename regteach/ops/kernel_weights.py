"""Kernel fields that change a little: the same weights for other values, and a few more keypoints.

Convention as in ``kernel_field``. A field is linear in its values, so for whoever changes only these (a refinement) the
K weights of every voxel are worked out once. And a new keypoint is heard only where it is among the K nearest: there
the field is computed again, everywhere else it stays as it is, to the last bit.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from regteach.grid import Grid
from regteach.ops.kernel_field import QueryFunction, Weighting, weights_of_group
from regteach.ops.neighbours import Blocks, among_nearest
from regteach.precision import exactly


@torch.no_grad()
@exactly
def kernel_weights_on(
    grid: Grid,
    keypoints_mm: Float[Tensor, "m d"],
    weighting: Weighting,
    k: int,
    query_function: QueryFunction | None = None,
    keys: Float[Tensor, "m c"] | None = None,
    taper: bool = False,
    degree: int = 0,
    edge_vox: int = 4,
    pairs_at_once: int = 2**19,
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """The K nearest keypoints of every voxel and what each counts, so that :func:`weighted_sum` gives the field.

    Arguments as in :func:`~regteach.ops.kernel_field.kernel_field_on`; no gradient. 8 bytes for each of the n x K.
    """
    blocks, k = Blocks(grid, keypoints_mm, k, edge_vox), min(k, len(keypoints_mm))
    index = torch.empty(grid.size, k, dtype=torch.int32, device=keypoints_mm.device)
    found = keypoints_mm.new_empty(grid.size, k)
    for group in blocks.groups(pairs_at_once):
        weights, inside = weights_of_group(group, weighting, k, query_function, taper, degree, keypoints_mm, keys)
        voxels = group.voxels(grid.shape).flatten()
        own = group.candidates.int()[:, None].expand(inside.shape)
        index[voxels] = own[inside].view(-1, k)
        found[voxels] = weights[inside].view(-1, k)
    return index, found


def weighted_sum(
    values: Float[Tensor, "m v"], index: Int[Tensor, "n k"], weights: Float[Tensor, "n k"]
) -> Float[Tensor, "n v"]:
    """sum_k weights_k values[index_k], differentiable in the values."""
    return F.embedding_bag(index, values, mode="sum", per_sample_weights=weights.to(values))


@torch.no_grad()
@exactly
def kernel_field_added(
    field: Float[Tensor, "*grid v"],
    first: int,
    grid: Grid,
    keypoints_mm: Float[Tensor, "m d"],
    values: Float[Tensor, "m v"],
    weighting: Weighting,
    k: int,
    query_function: QueryFunction | None = None,
    keys: Float[Tensor, "m c"] | None = None,
    taper: bool = False,
    degree: int = 0,
    edge_vox: int = 4,
    pairs_at_once: int = 2**19,
) -> Float[Tensor, "*grid v"]:
    """``field`` with the keypoints from number ``first`` on, which it did not have yet.

    Other arguments as in :func:`~regteach.ops.kernel_field.kernel_field_on`, which gives the same numbers.

    Args:
        field: of the keypoints before ``first``, with as many neighbours, the same taper and degree.
        first: number of the first new keypoint.
    """
    changed, k = field.flatten(0, -2).clone(), min(k, len(keypoints_mm))
    for whole in Blocks(grid, keypoints_mm, k, edge_vox, first).groups(pairs_at_once):
        heard = _hear(whole.squared_distances(keypoints_mm[whole.candidates]), whole.candidates, whole.real, first, k)
        rows = heard.any(1)
        if not bool(rows.any()):
            continue
        group = whole.rows(rows)
        weights, _ = weights_of_group(group, weighting, k, query_function, taper, degree, keypoints_mm, keys)
        near = heard[rows]
        changed[group.voxels(grid.shape)[near]] = (weights @ values[group.candidates])[near].to(changed)
    return changed.unflatten(0, grid.shape)


def _hear(squared: Tensor, candidates: Tensor, real: Tensor, first: int, k: int) -> Tensor:
    """Which voxels of the blocks have a new keypoint among their K nearest."""
    new = (candidates >= first) & real
    return (among_nearest(squared, k) & new[:, None]).any(-1)
