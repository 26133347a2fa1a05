"""How good a registration is: overlap, surfaces, points, and whether the deformation is plausible.

Convention: label maps ``b 1 *grid`` of whole numbers (0 is background), points (landmarks ``b n d``) and
displacements in mm, determinants ``b *grid``, masks ``b 1 *grid``; one number per batch item, as a tensor ``b``.

What is missing is never made up:

| case                                  | Dice | surface distance, HD95 |
|---------------------------------------|------|------------------------|
| label in both maps                    | 0-1  | mm                     |
| label in one map only                 | 0    | inf: it was not found  |
| label in neither map                  | nan  | nan: nothing to measure|

``mean_over_labels`` leaves the nan out and keeps the inf. A mask that selects no voxel gives nan.

Sources: average symmetric surface distance: Heimann et al., IEEE TMI 28 (2009); Hausdorff distance with a quantile:
Huttenlocher et al., IEEE PAMI 15 (1993); the Learn2Reg form of SDlogJ: Hering et al., Learn2Reg, IEEE TMI 42 (2023),
and the challenge's evaluation code.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor

from regteach.grid import Grid

PerLabel = dict[int, Float[Tensor, "b"]]
Distances = Float[np.ndarray, "n"]
Mapping = Callable[[Tensor], Tensor]  # points "b n d" in fixed mm -> "b n d" in moving mm


def dice(a: Tensor, b: Tensor, labels: Iterable[int] | None = None) -> PerLabel:
    """Overlap of each label, 2 |A and B| / (|A| + |B|): 1 if the same, 0 if apart, nan if in neither map.

    Args:
        a: label map, ``b 1 *grid``.
        b: the other, on the same grid.
        labels: labels to compare; where left out, every one but 0 that occurs in either map, in rising order.

    Raises:
        ValueError: if the maps differ in shape or hold other than whole numbers.
    """

    def overlap(mask_a: Tensor, mask_b: Tensor) -> Tensor:
        common = (mask_a & mask_b).flatten(1).sum(1)
        both = mask_a.flatten(1).sum(1) + mask_b.flatten(1).sum(1)
        return 2 * common / both  # 0 / 0 is nan

    return {label: overlap(a == label, b == label) for label in _labels(a, b, labels)}


def average_surface_distance(a: Tensor, b: Tensor, grid: Grid, labels: Iterable[int] | None = None) -> PerLabel:
    """Mean distance between the surfaces of each label, mm: over the surface voxels of both, pooled.

    Arguments and errors as in :func:`dice`; distances as in :func:`surface_distances`.
    """
    return _per_label(lambda there, back: float(np.mean(np.concatenate([there, back]))), a, b, grid, labels)


def hausdorff95(a: Tensor, b: Tensor, grid: Grid, labels: Iterable[int] | None = None) -> PerLabel:
    """95 % Hausdorff distance of each label, mm: the larger of the two directions' 95th percentiles.

    The percentile interpolates linearly. (Some tools pool both directions first, which gives smaller values.) Arguments
    and errors as in :func:`dice`; distances as in :func:`surface_distances`.
    """
    return _per_label(lambda *both: float(max(np.percentile(one, 95) for one in both)), a, b, grid, labels)


def surface_distances(
    a: Bool[Tensor, "*grid"] | np.ndarray, b: Bool[Tensor, "*grid"] | np.ndarray, grid: Grid
) -> tuple[Distances, Distances]:
    """Distance, in mm, from each surface voxel of one mask to the nearest surface voxel of the other, both ways.

    A surface voxel belongs to the mask and has a neighbour across a face (4 in 2D, 6 in 3D) that does not; beyond the
    grid nothing belongs to the mask. Distances are between voxel centres.

    Args:
        a: mask of one object; no batch, no channel.
        b: mask of the other.
        grid: where the voxels sit.

    Returns:
        From ``a`` to ``b`` and from ``b`` to ``a``. Where only one mask is empty, the distances to it are inf; from an
        empty mask there are none, and two empty masks give two empty arrays.
    """
    masks = [np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask, dtype=bool) for mask in (a, b)]
    if any(mask.shape != grid.shape for mask in masks):
        raise ValueError(f"The masks, {masks[0].shape} and {masks[1].shape}, are not on this grid of {grid.shape}.")
    # Both surfaces lie in the smallest box around both masks: distances need not be known outside it.
    box = ndimage.find_objects(np.asarray(masks[0] | masks[1], dtype=np.uint8)) or [(slice(0),) * grid.dim]
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (mask[box[0]] for mask in masks)]
    there, back = (
        ndimage.distance_transform_edt(~to, sampling=grid.spacing)[of] if to.any() else np.full(of.sum(), np.inf)
        for of, to in (surfaces, surfaces[::-1])
    )
    return there, back


def mean_over_labels(values: PerLabel) -> Float[Tensor, "b"]:
    """Mean of a metric over the labels that could be measured (not nan); nan for an item where none could."""
    if not values:
        raise ValueError("There is no label to average over.")
    return torch.stack(list(values.values())).nanmean(0)


def target_registration_error(
    transform: Mapping, fixed_points: Float[Tensor, "b n d"], moving_points: Float[Tensor, "b n d"]
) -> Float[Tensor, "b n"]:
    """Distance, in mm, from where a transform takes each fixed landmark to its partner in the moving image.

    Args:
        transform: fixed points to moving points, mm.
        fixed_points: landmarks in the fixed image, mm.
        moving_points: the same landmarks, in the same order, in the moving image, mm.
    """
    if fixed_points.shape[1:] != moving_points.shape[1:]:
        raise ValueError(
            f"Landmarks come in pairs, but there are {tuple(fixed_points.shape)} fixed "
            f"and {tuple(moving_points.shape)} moving ones (batch, number, axes)."
        )
    return (transform(fixed_points) - moving_points).norm(dim=-1)


def end_point_error(
    u: Float[Tensor, "b *any d"], v: Float[Tensor, "b *any d"], mask: Tensor | None = None
) -> Float[Tensor, "b"]:
    """Mean length of the difference of two displacement fields, mm; with a mask ``b 1 *any``, over its voxels."""
    if u.shape != v.shape:
        raise ValueError(f"The two fields differ in shape: {tuple(u.shape)} and {tuple(v.shape)}.")
    return _masked_mean((u - v).norm(dim=-1), mask)


def folding_percent(det: Float[Tensor, "b *grid"], mask: Tensor | None = None) -> Float[Tensor, "b"]:
    """Percentage of voxels whose Jacobian determinant is 0 or less: there the deformation turns space inside out.

    Args:
        det: from ``transforms.jacobian_determinant``.
        mask: voxels that count, ``b 1 *grid`` of bool; all of them where left out.
    """
    return 100 * _masked_mean((_finite(det) <= 0).to(det), mask)


def sdlogj(det: Float[Tensor, "b *grid"], mask: Tensor | None = None) -> Float[Tensor, "b"]:
    """Standard deviation of log det J, over the voxels with det J > 0: how unevenly volumes change; 0 for any affine.

    A fold has no logarithm. Folds are left out here and counted by :func:`folding_percent`: give both numbers together.
    Where everything is folded the value is nan. Arguments as in :func:`folding_percent`.
    """
    unfolded = _finite(det) > 0
    counted = unfolded if mask is None else unfolded & _fitting(mask, det)
    log = torch.where(unfolded, det, 1).log()
    return _masked_deviation(log, counted)


def sdlogj_learn2reg(det: Float[Tensor, "b *grid"], mask: Tensor | None = None) -> Float[Tensor, "b"]:
    """SDlogJ as the Learn2Reg challenge computes it: standard deviation of log(clip(det J + 3, 1e-9, 1e9)).

    Two voxels are cropped at every border. The + 3 keeps folds out of the logarithm and, near det J = 1, shrinks the
    value about fourfold: not to be compared with :func:`sdlogj`. Arguments as in :func:`folding_percent`.
    """
    if min(det.shape[1:]) < 5:
        raise ValueError(f"Two voxels are cropped at every border, and {tuple(det.shape[1:])} voxels leave nothing.")
    inside = (slice(None), *(slice(2, -2),) * (det.ndim - 1))
    counted = torch.ones_like(det, dtype=torch.bool) if mask is None else _fitting(mask, det)
    return _masked_deviation((_finite(det) + 3).clamp(1e-9, 1e9).log()[inside], counted[inside])


def _per_label(
    summary: Callable[[Distances, Distances], float], a: Tensor, b: Tensor, grid: Grid, labels: Iterable[int] | None
) -> PerLabel:
    """A number made from the surface distances of each label and batch item."""

    def measure(mask_a: Tensor, mask_b: Tensor) -> float:
        there, back = surface_distances(mask_a, mask_b, grid)
        if there.size == 0 or back.size == 0:
            return float("nan") if there.size == back.size else float("inf")
        return summary(there, back)

    return {
        label: torch.tensor([measure(x[0] == label, y[0] == label) for x, y in zip(a, b, strict=True)], device=a.device)
        for label in _labels(a, b, labels)
    }


def _labels(a: Tensor, b: Tensor, labels: Iterable[int] | None) -> list[int]:
    if a.shape != b.shape or a.ndim not in (4, 5) or a.shape[1] != 1:
        raise ValueError(
            f"Label maps are batch x 1 x grid and of one shape, but these are {tuple(a.shape)} and {tuple(b.shape)}."
        )
    for values in (a, b):
        if values.is_floating_point() and bool((values != values.round()).any()):
            raise ValueError("A label map holds whole numbers, but this one does not: warp label maps with order=0.")
    if labels is not None:
        return [int(label) for label in labels]
    return [int(label) for label in torch.cat([a.unique(), b.unique()]).unique() if label != 0]


def _fitting(mask: Tensor, values: Float[Tensor, "b *grid"]) -> Bool[Tensor, "b *grid"]:
    if mask.shape[1:] != (1, *values.shape[1:]) or mask.shape[0] not in (1, len(values)):
        raise ValueError(f"A mask for {tuple(values.shape)} values is batch x 1 x grid, not {tuple(mask.shape)}.")
    return (mask[:, 0] != 0).expand(values.shape)


def _masked_mean(values: Float[Tensor, "b *grid"], mask: Tensor | None) -> Float[Tensor, "b"]:
    if mask is None:
        return values.flatten(1).mean(1)
    counted = _fitting(mask, values)
    return torch.where(counted, values, 0).flatten(1).sum(1) / counted.flatten(1).sum(1)


def _masked_deviation(values: Float[Tensor, "b *grid"], mask: Bool[Tensor, "b *grid"]) -> Float[Tensor, "b"]:
    """Standard deviation (divided by n, as NumPy does) over the mask; nan where it is empty."""
    expand = (..., *[None] * (values.ndim - 1))
    mean = _masked_mean(values, mask[:, None])
    return _masked_mean((values - mean[expand]) ** 2, mask[:, None]).sqrt()


def _finite(det: Tensor) -> Tensor:
    if not bool(det.isfinite().all()):
        raise ValueError("The Jacobian determinant holds numbers that are not finite.")
    return det
