"""Where to look: points of an image that can be told from their surroundings in every direction.

Convention: one image ``1 c *grid`` of floating point, points ``n d`` in mm in tensor order. Sizes are in mm; where left
out they are counted in mean spacings (the geometric mean over the axes). Few points, or none, are no error: what is
found is returned, and nothing found is an empty tensor of shape (0, d), which every function of this package accepts.

Sources: Foerstner and Guelch, A fast operator for detection and precise location of distinct points, ISPRS 1987;
farthest point sampling: Eldar et al., IEEE TIP 6 (1997); the derivative filter, the smoothing of 1.4 voxels and the
window of 5: Heinrich et al., Closing the gap between deep and conventional image registration using probabilistic
dense displacement networks, MICCAI 2019, and its published code.
"""

import importlib
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from regteach.grid import Grid
from regteach.sampling import check_image, smooth, vox_to_mm

Detector = Callable[[Float[np.ndarray, "a b"]], Float[np.ndarray, "n 2"]]  # a slice in [0, 1] -> positions in voxels

DERIVATIVE = (1.0, -8.0, 0.0, 8.0, -1.0)  # twelfths; exact for polynomials up to degree 4
LIBRARY = ("orb", "sift")


def distinctiveness(
    image: Float[Tensor, "b c *grid"], grid: Grid, sigma_mm: float | None = None
) -> Float[Tensor, "b 1 *grid"]:
    """1 / trace(S^-1) of the structure tensor S: large where the image changes along every axis, 0 along an edge.

    S is the product of the gradient (per mm) with itself, added over the channels and smoothed. Its inverse is, up to
    the noise, the covariance of the position that the surroundings determine. The unit is (intensity / mm)^2.

    Args:
        image: any number of channels.
        grid: where its voxels sit.
        sigma_mm: standard deviation of the smoothing; 1.4 mean spacings where left out.

    Raises:
        ValueError: if the image does not fit the grid.
    """
    check_image(image, grid)
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    sigma_mm = 1.4 * _mean_spacing(grid) if sigma_mm is None else sigma_mm
    slopes = [_derivative(image, axis, grid.spacing[axis]) for axis in range(grid.dim)]
    # What rounding leaves of a constant is no slope.
    rounding = 8 * torch.finfo(image.dtype).eps * image.abs().flatten(1).amax(1).reshape(-1, *[1] * (grid.dim + 1))
    slopes = [
        torch.where(slope.abs() * spacing > rounding, slope, 0)
        for slope, spacing in zip(slopes, grid.spacing, strict=True)
    ]

    def entry(i: int, k: int) -> Tensor:
        # Products of small numbers cancel in the determinant: from here on in double precision.
        return smooth((slopes[i] * slopes[k]).sum(1, keepdim=True), sigma_mm, grid).double()

    if grid.dim == 2:
        a, b, c = entry(0, 0), entry(0, 1), entry(1, 1)
        trace, minors, determinant = a + c, a + c, a * c - b * b
        rank_two = minors > 0
    else:
        a, b, c, d, e, f = (entry(i, k) for i, k in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)))
        trace, minors = a + d + f, (a * d - b * b) + (a * f - c * c) + (d * f - e * e)
        determinant = a * (d * f - e * e) - b * (b * f - c * e) + c * (b * e - c * d)
        # On a plane edge both are 0 but for rounding, and so is the answer: it is below 1e-8 of the trace.
        rank_two = minors > 1e-8 * trace**2
    value = torch.where(rank_two, determinant.clamp_min(0) / torch.where(rank_two, minors, 1), 0)
    return value.to(image.dtype)


@torch.no_grad()
def foerstner(
    image: Float[Tensor, "1 c *grid"],
    grid: Grid,
    count: int,
    mask: Tensor | None = None,
    sigma_mm: float | None = None,
    window_mm: float | None = None,
    threshold: float = 1e-4,
    margin_mm: float | None = None,
) -> Float[Tensor, "n d"]:
    """Up to ``count`` distinctive points, spread evenly: local maxima of :func:`distinctiveness`, farthest first.

    A point is the only, or the first, maximum of the window about it, lies in the mask and away from the mask's edge,
    and exceeds the threshold. If these are more than ``count``, :func:`farthest_points` chooses, starting at the most
    distinctive one. Equal values are decided by the voxel's index, so that a result can be repeated.

    Args:
        image: one image of any number of channels.
        grid: where its voxels sit.
        count: how many points at most; fewer are returned where fewer exist, (0, d) for a constant image.
        mask: voxels that may be points, ``1 1 *grid``; all of them where left out.
        sigma_mm: as in :func:`distinctiveness`.
        window_mm: width of the window of a maximum, at least 3 voxels along each axis; 5 mean spacings if left out.
        threshold: smallest distinctiveness, as part of the largest inside the mask. It grows with contrast squared.
        margin_mm: points keep at least this distance along each axis, rounded to voxels, from what is outside of the
            mask or of the image; one mean spacing where left out.

    Raises:
        ValueError: for a count below 1, more than one image, numbers that are not finite, or a mask on another grid.
    """
    _check_request(image, grid, count)
    spacing = _mean_spacing(grid)
    window_mm = 5 * spacing if window_mm is None else window_mm
    margin_mm = spacing if margin_mm is None else margin_mm
    if mask is not None and tuple(mask.shape) != (1, 1, *grid.shape):
        raise ValueError(f"A mask for these keypoints is 1 x 1 x the grid {grid.shape}, not {tuple(mask.shape)}.")
    values = distinctiveness(image, grid, sigma_mm)
    blocked = torch.zeros_like(values) if mask is None else (mask == 0).to(values)
    free = _window_max(blocked, [round(margin_mm / h) for h in grid.spacing], outside=1.0) == 0
    values = torch.where(free, values, 0)
    reach = [max(1, round(window_mm / h / 2 - 0.5)) for h in grid.spacing]
    peaks = (values == _window_max(values, reach, outside=0.0)) & (values > threshold * values.max())
    # On a plateau every voxel is its window's maximum: the first in order of index stays.
    rank = torch.arange(grid.size, 0, -1, device=values.device, dtype=torch.float64).reshape(values.shape)
    rank = torch.where(peaks, rank, 0)
    peaks &= rank == _window_max(rank, reach, outside=0.0)
    found = peaks[0, 0].nonzero()
    points = vox_to_mm(found.to(values), grid)
    if len(points) <= count:
        return points
    start = int(values[0, 0][tuple(found.T)].argmax())
    return points[farthest_points(points, count, start)]


@torch.no_grad()
def farthest_points(points_mm: Float[Tensor, "n d"], count: int, start: int = 0) -> Int[Tensor, "m"]:
    """Choose points one by one, each the farthest from all chosen before; ties go to the lower index.

    Args:
        points_mm: the points.
        count: how many to choose; all of them, in this order, where there are not as many.
        start: index of the first.

    Returns:
        min(count, n) different indices, in the order of choice. Duplicates are chosen last.

    Raises:
        ValueError: for a count below 1, or a start that is none of the points.
    """
    if count < 1:
        raise ValueError(f"At least one point is chosen, but count is {count}.")
    n = len(points_mm)
    if n == 0:
        return torch.zeros(0, dtype=torch.long, device=points_mm.device)
    if not 0 <= start < n:
        raise ValueError(f"The first point is one of 0 to {n - 1}, but start is {start}.")
    points = points_mm.double()
    nearest = points.new_full((n,), torch.inf)  # squared distance to the chosen ones
    chosen = torch.empty(min(count, n), dtype=torch.long, device=points.device)
    current = torch.tensor(start, device=points.device)
    for i in range(len(chosen)):
        chosen[i] = current
        nearest = torch.minimum(nearest, (points - points[current]).square().sum(-1))
        nearest[current] = -1  # never again, also where only duplicates are left
        current = nearest.argmax()
    return chosen


def library_keypoints(
    image: Float[Tensor, "1 1 *grid"],
    grid: Grid,
    count: int,
    detector: str | Detector = "sift",
    axis: int = -1,
) -> Float[Tensor, "n d"]:
    """Keypoints of a 2D detector, in 3D slice by slice, brought down to ``count`` by :func:`farthest_points`.

    The detector sees each slice as an array, intensities of the whole image stretched to [0, 1]. It counts in voxels
    and knows no spacing; slices that are constant are not shown to it.

    Args:
        image: one image of one channel.
        grid: where its voxels sit.
        count: how many points at most.
        detector: "orb" or "sift" of scikit-image, or a function from a slice to voxel positions ``n x 2``.
        axis: the axis across the slices, in 3D; not used in 2D.

    Raises:
        ValueError: as :func:`foerstner`, for an unknown detector, or an axis that the grid does not have.
        ImportError: if scikit-image is needed and not installed.
    """
    _check_request(image, grid, count)
    if image.shape[1] != 1:
        raise ValueError(f"Detectors of libraries take one channel, but this image has {image.shape[1]}.")
    if not -grid.dim <= axis < grid.dim:
        raise ValueError(f"The slices lie across one of {grid.dim} axes, but axis is {axis}.")
    detect = _library(detector, count) if isinstance(detector, str) else detector
    values = image[0, 0].detach().cpu().double().numpy()
    low, high = values.min(), values.max()
    values = (values - low) / (high - low if high > low else 1)
    axis = axis % grid.dim
    slices = [values] if grid.dim == 2 else list(np.moveaxis(values, axis, 0))
    found = []
    for i, plane in enumerate(slices):
        if np.ptp(plane) > 0:
            positions = np.asarray(detect(plane), dtype=float).reshape(-1, 2)
            found.append(positions if grid.dim == 2 else np.insert(positions, axis, i, axis=1))
    points_vox = np.concatenate(found) if found else np.zeros((0, grid.dim))
    points = vox_to_mm(torch.from_numpy(points_vox), grid).to(image)
    return points[farthest_points(points, count)]


def _library(name: str, count: int) -> Detector:
    if name not in LIBRARY:
        raise ValueError(f"A detector is one of {', '.join(LIBRARY)} or a function, not {name!r}.")
    try:
        feature = importlib.import_module("skimage.feature")
    except ModuleNotFoundError as error:
        raise ImportError(f"The detector {name!r} needs scikit-image, which is not installed.") from error

    def detect(plane: np.ndarray) -> np.ndarray:
        extractor = feature.ORB(n_keypoints=count) if name == "orb" else feature.SIFT()
        try:
            extractor.detect(plane)
        except RuntimeError as error:
            if "no features" in str(error):  # how SIFT says that there are none
                return np.zeros((0, 2))
            raise
        return extractor.keypoints

    return detect


def _derivative(image: Tensor, axis: int, spacing: float) -> Tensor:
    """Slope along one axis, per mm; beyond the border the outermost voxel is repeated."""
    n = image.shape[axis + 2]
    ends = [image.narrow(axis + 2, i, 1) for i in (0, 0, n - 1, n - 1)]
    padded = torch.cat([*ends[:2], image, *ends[2:]], axis + 2)
    terms = (w * padded.narrow(axis + 2, i, n) for i, w in enumerate(DERIVATIVE) if w)
    return sum(terms, torch.zeros_like(image)) / (12 * spacing)


def _window_max(image: Tensor, reach_vox: list[int], outside: float) -> Tensor:
    """Largest value within ``reach_vox`` voxels along each axis; beyond the border lies ``outside``."""
    dim = image.ndim - 2
    pool = F.max_pool2d if dim == 2 else F.max_pool3d
    for axis, reach in enumerate(reach_vox):
        margins = [0] * (2 * dim)
        margins[2 * (dim - 1 - axis)] = margins[2 * (dim - 1 - axis) + 1] = reach
        width = [2 * reach + 1 if k == axis else 1 for k in range(dim)]
        image = pool(F.pad(image, margins, value=outside), width, stride=1)
    return image


def _mean_spacing(grid: Grid) -> float:
    return math.prod(grid.spacing) ** (1 / grid.dim)


def _check_request(image: Tensor, grid: Grid, count: int) -> None:
    check_image(image, grid)
    if len(image) != 1:
        raise ValueError(f"Keypoints are found in one image at a time, but the batch holds {len(image)}.")
    if count < 1:
        raise ValueError(f"At least one keypoint is asked for, but count is {count}.")
    if not bool(image.isfinite().all()):
        raise ValueError("The image holds numbers that are not finite, so no keypoint can be found in it.")
