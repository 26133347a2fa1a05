"""Reading an image at points that are given in millimetres.

Convention: images ``b c *grid``, points ``... d`` in mm in tensor order, voxel centres at ``origin + index * spacing``.
This is the only module of the package that calls ``torch.nn.functional.grid_sample``, always with
``align_corners=False``, where voxel ``i`` of ``n`` has the coordinate ``(2 i + 1) / n - 1`` (which also serves an axis
of one voxel). ``grid_sample`` wants the last axis first; the flip is here and nowhere else.

Precision: float32 rounds a position to 6e-8 of its size, in mm and again between -1 and 1. A voxel centre is met to
within 1e-6 voxels on small grids near the origin, and about 1e-5 at 160 x 192 x 160 with an origin of -100 mm. Half
precision would be off by whole voxels there: its images are read and smoothed in float32, and come back in their own.

Source: Jaderberg et al., Spatial Transformer Networks, NeurIPS 2015, eqs 3 and 5 (resampling, bilinear kernel).
"""

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from regteach.grid import Grid, per_axis
from regteach.precision import exactly

PADDINGS = ("border", "zeros")
Mapping = Callable[[Tensor], Tensor]  # points "b n d" in fixed mm -> "b n d" in moving mm


@runtime_checkable
class GridMapping(Protocol):
    """A mapping that can also give its displacement on a whole grid, which is often faster than point by point."""

    def displacement_on(self, grid: Grid, like: Tensor | None = None) -> Float[Tensor, "b *grid d"]:
        """Moving minus fixed position at every voxel of ``grid``, mm."""


def grid_points(
    grid: Grid, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*grid d"]:
    """Positions of all voxel centres, mm."""
    axes = [
        origin + spacing * torch.arange(n, device=device, dtype=dtype)
        for n, spacing, origin in zip(grid.shape, grid.spacing, grid.origin, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def flat_points(
    grid: Grid, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "1 n d"]:
    """Positions of all voxel centres as one list of points, mm, the last axis running fastest."""
    return grid_points(grid, device, dtype).reshape(1, grid.size, grid.dim)


def mm_to_vox(points: Float[Tensor, "*any d"], grid: Grid) -> Float[Tensor, "*any d"]:
    """Positions in mm to (fractional) voxel indices of ``grid``."""
    return (points - points.new_tensor(grid.origin)) / points.new_tensor(grid.spacing)


def vox_to_mm(points_vox: Float[Tensor, "*any d"], grid: Grid) -> Float[Tensor, "*any d"]:
    """(Fractional) voxel indices of ``grid`` to positions in mm."""
    return points_vox * points_vox.new_tensor(grid.spacing) + points_vox.new_tensor(grid.origin)


def sample(
    image: Float[Tensor, "b c *grid"],
    points: Float[Tensor, "b *any d"],
    grid: Grid,
    order: int = 1,
    padding: str = "border",
) -> Float[Tensor, "b c *any"]:
    """Read an image at points.

    Args:
        image: image on ``grid``; a batch of one serves all points, and points of a batch of one serve all images.
        points: positions in mm, any number of axes between batch and coordinate.
        grid: where the image's voxels sit.
        order: 1 for (bi-, tri-) linear interpolation, differentiable in image and points; 0 for the nearest voxel,
            for labels.
        padding: what lies outside: ``"border"`` repeats the outermost voxel, ``"zeros"`` fades to 0 within one voxel.

    Returns:
        The values, in the image's precision; nan where a position is nan.

    Raises:
        ValueError: if shapes do not fit, or order or padding is unknown.
    """
    check_image(image, grid)
    if points.shape[-1] != grid.dim:
        raise ValueError(f"Points have {points.shape[-1]} coordinates, but the grid has {grid.dim} axes.")
    if order not in (0, 1):
        raise ValueError(f"order is 0 (nearest voxel) or 1 (linear), not {order}.")
    if padding not in PADDINGS:
        raise ValueError(f"padding is one of {', '.join(PADDINGS)}, not {padding!r}.")
    batch = _common_batch(image, points)
    where = points.shape[1:-1]
    points, values = at_least_float32(points), at_least_float32(image)
    # One product and sum, scale * x + offset, would be a third faster, and three times less exact at the far end.
    half = torch.tensor(grid.shape, device=points.device, dtype=points.dtype) / 2
    unit = (mm_to_vox(points, grid) + 0.5) / half - 1
    unit = unit.flip(-1).to(values.dtype).reshape(points.shape[0], -1, *[1] * (grid.dim - 1), grid.dim)
    # torch would read a voxel at the border there, as if all were well, and its gradient in 2D ends the process.
    nowhere = unit.isnan()
    unit = unit.masked_fill(nowhere, 0)
    mode = "bilinear" if order == 1 else "nearest"  # in 3D torch calls trilinear "bilinear" too
    if batch == 1:
        out = _grid_sample_in_parts(values, unit, mode, padding)
    else:
        values = values.expand(batch, *values.shape[1:])
        unit = unit.expand(batch, *unit.shape[1:])
        out = F.grid_sample(values, unit, mode=mode, padding_mode=padding, align_corners=False)
    out = out.flatten(2).masked_fill(nowhere.any(-1).flatten(1)[:, None], torch.nan)
    return out.reshape(batch, image.shape[1], *where).to(image.dtype)


def warp(
    image: Float[Tensor, "b c *grid"],
    transform: Mapping | GridMapping,
    grid: Grid,
    out_grid: Grid | None = None,
    order: int = 1,
    padding: str = "border",
) -> Float[Tensor, "b c *out"]:
    """Resample a moving image onto the fixed grid: ``warped(x) = image(transform(x))``.

    Args:
        image: the moving image, on ``grid``.
        transform: maps fixed points to moving points, both ``b n d`` in mm: any function, or a transform of
            ``regteach.transforms``.
        grid: grid of the moving image.
        out_grid: grid of the fixed image; the same as ``grid`` where left out.
        order: 1 linear, 0 nearest (labels).
        padding: as in :func:`sample`.
    """
    out_grid = out_grid or grid
    points = grid_points(out_grid, image.device, torch.promote_types(image.dtype, torch.float32))
    if isinstance(transform, GridMapping):
        moved = points + transform.displacement_on(out_grid, like=points)
    else:
        moved = transform(points.reshape(1, out_grid.size, out_grid.dim)).unflatten(1, out_grid.shape)
    return sample(image, moved, grid, order, padding)


def resample(
    image: Float[Tensor, "b c *grid"], grid: Grid, out_grid: Grid, order: int = 1, padding: str = "border"
) -> Float[Tensor, "b c *out"]:
    """Bring an image onto another grid in the same space. Smooth first when the new grid is coarser."""
    return warp(image, lambda points: points, grid, out_grid, order, padding)


@exactly
def smooth(
    image: Float[Tensor, "b c *grid"], sigma_mm: float | tuple[float, ...], grid: Grid
) -> Float[Tensor, "b c *grid"]:
    """Convolve with a Gaussian of standard deviation ``sigma_mm``, axis by axis; the border is repeated.

    The kernel ends at four standard deviations, rounded to whole voxels, as in scipy.ndimage.gaussian_filter.
    """
    check_image(image, grid)
    out = at_least_float32(image)
    for axis, (sigma, spacing) in enumerate(zip(per_axis(sigma_mm, grid.dim, "sigma_mm"), grid.spacing, strict=True)):
        if sigma < 0:
            raise ValueError(f"A standard deviation can not be negative, but sigma_mm is {sigma_mm}.")
        if sigma > 0:
            out = _smooth_axis(out, sigma / spacing, axis + 2)
    return out.to(image.dtype)


def smooth_field(field: Float[Tensor, "b *grid d"], sigma_vox: float, grid: Grid) -> Float[Tensor, "b *grid d"]:
    """:func:`smooth` for vectors at every voxel, equally many voxels along each axis; 0 changes nothing."""
    return smooth(field.movedim(-1, 1), tuple(sigma_vox * h for h in grid.spacing), grid).movedim(1, -1)


def gradient(field: Float[Tensor, "b c *grid"], grid: Grid) -> Float[Tensor, "b c *grid d"]:
    """Derivatives along each axis, per mm: central differences inside, one-sided at the two ends (as numpy.gradient).

    Raises:
        ValueError: if an axis has fewer than two voxels.
    """
    check_image(field, grid)
    if min(grid.shape) < 2:
        raise ValueError(f"A derivative needs two voxels along each axis, but the grid is {grid.shape}.")
    slopes = []
    for axis, spacing in enumerate(grid.spacing, start=2):
        # Repeating the end voxel turns the central difference there into half the one-sided one: hence the factor.
        n = field.shape[axis]
        ahead = torch.cat([field.narrow(axis, 1, n - 1), field.narrow(axis, n - 1, 1)], axis)
        behind = torch.cat([field.narrow(axis, 0, 1), field.narrow(axis, 0, n - 1)], axis)
        width = field.new_full((n,), 2 * spacing)
        width[[0, -1]] = spacing
        slopes.append((ahead - behind) / width.reshape(-1, *[1] * (field.ndim - 1 - axis)))
    return torch.stack(slopes, dim=-1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision, which has too few digits for positions, as float32; any other as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_image(image: Tensor, grid: Grid) -> None:
    """Raise a ValueError unless ``image`` is ``b c *grid`` of floats on this grid."""
    if image.ndim != grid.dim + 2 or tuple(image.shape[2:]) != grid.shape:
        raise ValueError(
            f"An image on this grid is batch x channel x {' x '.join(map(str, grid.shape))}, "
            f"but the tensor is {' x '.join(map(str, image.shape))}."
        )
    if not image.is_floating_point():
        raise ValueError(f"Images are sampled as floating point; convert this {image.dtype} tensor first.")


def _common_batch(image: Tensor, points: Tensor) -> int:
    sizes = {image.shape[0], points.shape[0]} - {1}
    if len(sizes) > 1:
        raise ValueError(f"A batch of {image.shape[0]} images does not fit {points.shape[0]} sets of points.")
    return sizes.pop() if sizes else 1


def _grid_sample_in_parts(image: Tensor, unit: Tensor, mode: str, padding: str) -> Tensor:
    """``grid_sample`` of one image, with the points split into a batch of one part a thread.

    On a CPU torch spreads the batch over threads, and leaves a batch of one to a single thread. The parts look at the
    same image (``expand`` copies nothing), so the numbers are those of the plain call.
    """
    n = unit.shape[1]
    parts = torch.get_num_threads() if image.device.type == "cpu" else 1
    if parts == 1 or n < 4096:  # below that the split costs more than it saves
        return F.grid_sample(image, unit, mode=mode, padding_mode=padding, align_corners=False)
    length = math.ceil(n / parts)
    # The last part is filled up with the image's middle; what is read there is cut off again.
    flat = F.pad(unit.reshape(n, -1), (0, 0, 0, length * parts - n))
    unit = flat.reshape(parts, length, *unit.shape[2:])
    image = image.expand(parts, *image.shape[1:])
    out = F.grid_sample(image, unit, mode=mode, padding_mode=padding, align_corners=False)
    return out.flatten(2).transpose(0, 1).reshape(1, image.shape[1], -1)[..., :n]


def _smooth_axis(image: Tensor, sigma_vox: float, axis: int) -> Tensor:
    """A product with the matrix that holds one shifted kernel a row.

    Ten times as fast on a CPU as a convolution of one channel, and on a GPU not rounded to TF32, as convolutions are:
    displacements are smoothed here, too.
    """
    n, radius = image.shape[axis], max(1, int(4 * sigma_vox + 0.5))
    offsets = torch.arange(-radius, radius + 1, device=image.device)
    kernel = torch.exp(-0.5 * (offsets.to(image.dtype) / sigma_vox) ** 2)
    kernel = kernel / kernel.sum()
    read = (torch.arange(n, device=image.device)[:, None] + offsets).clamp(0, n - 1)  # the border is repeated
    matrix = kernel.new_zeros(n, n).scatter_add_(1, read, kernel.expand(n, -1))
    return (image.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)
