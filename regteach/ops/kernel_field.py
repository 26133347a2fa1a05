"""A field at any point from values at keypoints: a weighted mean over the K nearest.

    f(x) = sum_{y in N_K(x)} w(x, y) f(y),    w(x, y) = softmax over N_K(x) of logit(x, y)

Convention: positions in mm in tensor order, ``n d`` without a batch axis; values are displacements in mm, or anything
else with channels. A :class:`Weighting` gives the logit of a pair from its squared distance and, where it is learned,
from the product of a query (a vector of the point) and a key (a vector of the keypoint): each is computed once, for a
point or for a keypoint, and never for a pair.

:func:`kernel_field` is the plain form; :func:`kernel_field_on` gives the same numbers on a whole grid in blocks, and
holds no tensor of voxels x K x channels. Both are differentiable in the values, the positions, the queries and the
keys; which keypoints are the K nearest is a constant to them. The weights are positive with sum 1, so the field never
leaves the hull of the values, and it can not continue a slope: ``degree=1`` fits a plane with the same weights.

What is defined: K above the number of keypoints uses all of them. Equal distances go by the lower index. Keypoints at
one place are as many neighbours, with equal weights where their keys are equal. The field jumps where the K-th
neighbour changes, unless it is tapered.

Sources: Fogarollo et al., Implicit deformable medical image registration with learnable kernels, MICCAI 2025 (the
field, the bias 1 / (1 + |x - y|^2)); Shepard, ACM National Conference 1968 (inverse distances); Nadaraya, Watson, 1964
(weighted means); Cleveland, JASA 74 (1979) (locally weighted fits).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regteach.grid import Grid
from regteach.ops.neighbours import Blocks, Group, among_nearest, k_nearest, squared_length
from regteach.precision import exactly

NEAREST_MM = 1e-9  # inverse distance: a keypoint that is nearer counts as this near
LEAST_TAPER = 1e-6  # of 1 - (d / d_K)^2, so that its logarithm is finite
RIDGE = 1e-6  # of the neighbours' spread: a plane has no slope along a direction in which they have none
QueryFunction = Callable[[Tensor], Tensor]  # points "n d", mm -> queries "n c"


class Weighting(Protocol):
    """Anything with this method; weights are the softmax of what it returns, over the K nearest."""

    def logits(self, squared: Float[Tensor, "*any k"], products: Float[Tensor, "*any k"] | None) -> Tensor:
        """Logits of pairs of a point and a keypoint.

        Args:
            squared: squared distance of each pair, mm^2. Pairs that are no neighbours may be among them.
            products: query . key / sqrt(channels) of each pair; None where there are no queries and keys.
        """


@dataclass(frozen=True)
class Uniform:
    """All K neighbours alike: their mean."""

    def logits(self, squared: Tensor, products: Tensor | None) -> Tensor:
        """0."""
        return torch.zeros_like(squared)


@dataclass(frozen=True)
class InverseDistance:
    """Weights proportional to distance^-power; at a keypoint its own value."""

    power: float = 2.0

    def __post_init__(self) -> None:
        _check_positive("power", self.power)

    def logits(self, squared: Tensor, products: Tensor | None) -> Tensor:
        """-power log(distance)."""
        return -0.5 * self.power * squared.clamp_min(NEAREST_MM**2).log()


@dataclass(frozen=True)
class Gaussian:
    """Weights proportional to exp(-distance^2 / 2 sigma^2), sigma in mm, a number or a learned one."""

    sigma_mm: float | Tensor

    def __post_init__(self) -> None:
        _check_positive("sigma_mm", self.sigma_mm)

    def logits(self, squared: Tensor, products: Tensor | None) -> Tensor:
        """-distance^2 / (2 sigma^2)."""
        return squared * (-0.5 / self.sigma_mm**2)


@dataclass(frozen=True)
class SpatialBias:
    """Weights proportional to exp(1 / (1 + distance^2 / scale^2)); none is more than e times another.

    Args:
        scale_mm: the distance at which the bias is one half, mm, a number or a learned one. The paper has 1 in the
            unit of its distances, which it does not name.
    """

    scale_mm: float | Tensor

    def __post_init__(self) -> None:
        _check_positive("scale_mm", self.scale_mm)

    def logits(self, squared: Tensor, products: Tensor | None) -> Tensor:
        """1 / (1 + distance^2 / scale^2)."""
        return (1 + squared * (1 / self.scale_mm**2)).reciprocal()


@dataclass(frozen=True)
class Attention:
    """query . key / sqrt(channels), plus the :class:`SpatialBias` where ``scale_mm`` is not None."""

    scale_mm: float | Tensor | None = None

    def __post_init__(self) -> None:
        _check_positive("scale_mm", self.scale_mm)

    def logits(self, squared: Tensor, products: Tensor | None) -> Tensor:
        """The sum of the two."""
        if products is None:
            raise ValueError("Attention weighs by queries and keys, but none were given.")
        return products if self.scale_mm is None else products + SpatialBias(self.scale_mm).logits(squared, None)


@exactly
def kernel_field(
    query_mm: Float[Tensor, "n d"],
    keypoints_mm: Float[Tensor, "m d"],
    values: Float[Tensor, "m v"],
    weighting: Weighting,
    k: int,
    queries: Float[Tensor, "n c"] | None = None,
    keys: Float[Tensor, "m c"] | None = None,
    taper: bool = False,
    degree: int = 0,
) -> Float[Tensor, "n v"]:
    """The field at points, the plain way: gathers K keys and values for each point.

    Args:
        query_mm: where the field is wanted.
        keypoints_mm: where the values are known.
        values: one row for each keypoint.
        weighting: gives the logits.
        k: number of neighbours; all keypoints where there are fewer.
        queries: a vector for each point, for weightings that use one.
        keys: a vector for each keypoint, with as many channels.
        taper: multiply the weights by (1 - (d / d_K)^2)^2, which is 0 at the K-th neighbour. The field is then
            continuous, except where all K are equally far: everywhere in practice for K above the number of axes.
        degree: 0 for the weighted mean; 1 for the weighted least-squares plane, which reproduces affine fields. Along
            directions in which the neighbours have no spread its slope is 0; one alone gives its value.

    Raises:
        ValueError: if there are no keypoints, a number is not finite, shapes do not fit or a setting is unknown.
    """
    points, values, query = checked(keypoints_mm, values, k, degree, query_mm)
    nearest = k_nearest(query, points, k)  # n k
    offsets = points[nearest] - query[:, None]  # n k d
    squared = squared_length(offsets)
    products = None
    if queries is not None and keys is not None:
        queries = _checked_features("queries", queries, len(query), points)
        keys = _checked_features("keys", keys, len(points), points)
        _check_channels(queries, keys)
        products = torch.einsum("nc,nkc->nk", queries, keys[nearest]) / math.sqrt(keys.shape[1])
    elif queries is not None or keys is not None:
        raise ValueError("Queries and keys come together, but only one of them was given.")
    logits = weighting.logits(squared, products)
    if taper:
        logits = logits + taper_logits(squared, squared.amax(dim=-1, keepdim=True))
    weights = logits.softmax(dim=-1)
    if degree == 1:
        weights = _plane_weights(weights, offsets)
    return torch.einsum("nk,nkv->nv", weights, values[nearest])


@exactly
def kernel_field_on(
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
    pairs_at_once: int = 2**20,
) -> Float[Tensor, "*grid v"]:
    """The field at every voxel, in blocks: what :func:`kernel_field` gives at ``flat_points(grid)``, unflattened.

    In training nothing but the result is kept from the forward pass: the backward pass computes each group of blocks
    again.

    Args:
        grid: where the field is wanted.
        keypoints_mm: as in :func:`kernel_field`, and so are the arguments that are not named here.
        values: one row for each keypoint.
        weighting: gives the logits.
        k: number of neighbours.
        query_function: from points ``n d`` in mm to queries ``n c``. It is called for some blocks at a time, with the
            points in no particular order, and again in the backward pass.
        keys: a vector for each keypoint.
        taper: as above.
        degree: as above.
        edge_vox: voxels along the edge of a block.
        pairs_at_once: pairs of a voxel and a candidate that are worked on together. Each takes about 30 bytes in
            float32; a GPU wants 2**24 or more.

    Raises:
        ValueError: as above.
    """
    points, values, _ = checked(keypoints_mm, values, k, degree)
    if points.shape[1] != grid.dim:
        raise ValueError(f"Keypoints have {points.shape[1]} coordinates, but the grid has {grid.dim} axes.")
    if (query_function is None) != (keys is None):
        raise ValueError("A query function and keys come together, but only one of them was given.")
    if keys is not None:
        keys = _checked_features("keys", keys, len(points), points)
    if min(edge_vox, pairs_at_once) < 1:
        raise ValueError(f"edge_vox and pairs_at_once are 1 or more, not {edge_vox} and {pairs_at_once}.")
    blocks = Blocks(grid, points, k, edge_vox)
    results = []
    for group in blocks.groups(pairs_at_once):
        field = partial(_field_of_group, group, weighting, min(k, len(points)), query_function, taper, degree)
        if torch.is_grad_enabled():
            results.append(checkpoint(field, points, values, keys, use_reentrant=False))
        else:
            results.append(field(points, values, keys))
    return blocks.to_grid(results)


def _field_of_group(
    group: Group,
    weighting: Weighting,
    k: int,
    query_function: QueryFunction | None,
    taper: bool,
    degree: int,
    points: Float[Tensor, "m d"],
    values: Float[Tensor, "m v"],
    keys: Float[Tensor, "m c"] | None,
) -> Float[Tensor, "blocks voxels v"]:
    weights, _ = weights_of_group(group, weighting, k, query_function, taper, degree, points, keys)
    return weights @ values[group.candidates]


def weights_of_group(
    group: Group,
    weighting: Weighting,
    k: int,
    query_function: QueryFunction | None,
    taper: bool,
    degree: int,
    points: Float[Tensor, "m d"],
    keys: Float[Tensor, "m c"] | None,
) -> tuple[Float[Tensor, "blocks voxels m"], Bool[Tensor, "blocks voxels m"]]:
    """The weights of all candidates of a block, 0 for those that are not among a voxel's K nearest; and which are."""
    squared = group.squared_distances(points[group.candidates])
    inside = among_nearest(squared.detach(), k)
    products = None
    if query_function is not None and keys is not None:
        where = group.points()
        queries = _checked_features("queries", query_function(where.flatten(0, 1)), where[..., 0].numel(), points)
        _check_channels(queries, keys)
        scaled = queries.unflatten(0, where.shape[:2]) / math.sqrt(keys.shape[1])
        products = scaled @ keys[group.candidates].mT
    logits = weighting.logits(squared, products)
    if taper:
        logits = logits + taper_logits(squared, squared.masked_fill(~inside, 0).amax(dim=-1, keepdim=True))
    weights = logits.masked_fill(~inside, -torch.inf).softmax(dim=-1)
    if degree == 1:
        weights = _plane_weights(weights, points[group.candidates][:, None] - group.points()[:, :, None])
    return weights, inside


def taper_logits(squared: Float[Tensor, "*any k"], reach: Float[Tensor, "*any 1"]) -> Float[Tensor, "*any k"]:
    """Logarithm of (1 - (d / d_K)^2)^2; ``reach`` is the squared distance of the K-th neighbour, mm^2."""
    ratio = squared / reach.clamp_min(NEAREST_MM**2)
    return 2 * (1 - ratio).clamp_min(LEAST_TAPER).log()


def _plane_weights(weights: Float[Tensor, "*any k"], offsets: Float[Tensor, "*any k d"]) -> Float[Tensor, "*any k"]:
    """What each value counts in the weighted least squares plane, read at the point itself; the sum stays 1.

    The fit ``a + slopes . offset`` is linear in the values: with m their weighted mean offset, c the offsets from it
    and S their weighted spread, a = sum_k w_k (1 - m . S^-1 c_k) v_k.
    """
    middle = weights[..., None, :] @ offsets  # ... 1 d
    centred = offsets - middle
    spread = (weights[..., None] * centred).mT @ centred
    trace = spread.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    # Neighbours that are 10,000 times closer together than the point is to them count as being at one place.
    ridge = RIDGE * trace + 1e-8 * (middle @ middle.mT) + NEAREST_MM**2
    unit = torch.eye(spread.shape[-1]).to(spread)
    turned = torch.linalg.solve(spread + ridge * unit, middle.mT)  # ... d 1
    away = (centred @ turned)[..., 0]
    # Their weighted mean is 0 but for rounding, which counts where the neighbours are nearly at one place.
    return weights * (1 - away + (weights * away).sum(-1, keepdim=True))


# ---- what can be wrong ----


def checked(
    keypoints_mm: Tensor, values: Tensor, k: int, degree: int, query_mm: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keypoints, values and points in one precision, float32 at least; no points where none were given.

    Raises:
        ValueError: if they do not fit together, or a number is not finite.
    """
    if keypoints_mm.ndim != 2 or keypoints_mm.shape[1] not in (2, 3):
        raise ValueError(f"Keypoints are rows of 2 or 3 coordinates, but their shape is {tuple(keypoints_mm.shape)}.")
    if len(keypoints_mm) == 0:
        raise ValueError("There are no keypoints, and a field needs at least one.")
    if values.ndim != 2 or len(values) != len(keypoints_mm):
        raise ValueError(f"{len(keypoints_mm)} keypoints need as many rows of values, not shape {tuple(values.shape)}.")
    dim = keypoints_mm.shape[1]
    query_mm = keypoints_mm.new_zeros(0, dim) if query_mm is None else query_mm
    if query_mm.ndim != 2 or query_mm.shape[1] != dim:
        raise ValueError(f"Points are rows of {dim} coordinates as keypoints are, not shape {tuple(query_mm.shape)}.")
    if k < 1:
        raise ValueError(f"A point has 1 neighbour or more, but k is {k}.")
    if degree not in (0, 1):
        raise ValueError(f"degree is 0 (a weighted mean) or 1 (a weighted plane), not {degree}.")
    for name, tensor in (("keypoints", keypoints_mm), ("values", values), ("points", query_mm)):
        _check_finite(name, tensor)
    dtype = torch.promote_types(torch.promote_types(keypoints_mm.dtype, values.dtype), query_mm.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return keypoints_mm.to(dtype), values.to(dtype), query_mm.to(dtype)


def _checked_features(name: str, features: Tensor, rows: int, like: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) != rows or features.shape[1] == 0:
        raise ValueError(f"{rows} rows of {name} were expected, but their shape is {tuple(features.shape)}.")
    _check_finite(name, features)
    return features.to(like.dtype)


def _check_channels(queries: Tensor, keys: Tensor) -> None:
    if queries.shape[-1] != keys.shape[-1]:
        raise ValueError(f"Queries have {queries.shape[-1]} channels, but keys have {keys.shape[-1]}.")


def _check_finite(name: str, tensor: Tensor) -> None:
    if bool(tensor.detach().sum().isfinite()):  # then each is: one pass, where isfinite takes several
        return
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise ValueError(f"All {name} have to be finite, but {bad} of their numbers are not.")


def _check_positive(name: str, value: float | Tensor | None) -> None:
    if isinstance(value, float | int) and not 0 < value < math.inf:
        raise ValueError(f"{name} has to be positive, but it is {value}.")
