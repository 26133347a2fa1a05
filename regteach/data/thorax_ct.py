"""A real thorax CT, and the same CT breathed out by a drawn motion that is known exactly.

Convention: RAS axes, mm, HU. The CT (inhale) is the moving image; the fixed image is the CT at the moved points,
I_fixed(x) = I_CT(phi(x)), read by linear interpolation, and inside the lungs denser by det D phi, so that mass is kept.
The anatomy is real; the motion is synthetic, of the kind of ``breathing``.

The motion needs the lungs as formulas. :func:`fit_lungs` measures them on a label map, one lung at a time:

- sections: per slice, 1st and 99th percentile of the positions along each lateral axis; smooth series in height through
  them. Below the slice of largest area the diaphragm cuts in: what the lung has between there and a slice counts too.
- shape: per slice, the outermost voxel in each of 36 directions, in half widths; a smooth series in angle and height.
- diaphragm: the lowest voxel of each column, a polynomial of degree 4, outliers weighed down.

So wall and diaphragm are approximated (``fit_dice`` says how well), and here and there lung slides along lung, or a rim
of soft tissue moves with it. That touches realism only: the transform is exact, whatever it is applied to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.polynomial import chebyshev
from torch import Tensor

import data_download
from regteach.data.breathing import Breathing, Lung, Terms
from regteach.data.thorax import ThoraxCase
from regteach.data.thorax_picture import AIR_HU
from regteach.data.volumes import read_volume
from regteach.grid import Grid
from regteach.sampling import flat_points, grid_points, sample, smooth

RIGHT_LOBES, LEFT_LOBES = (12, 13, 14), (10, 11)  # TotalSegmentator's numbers
LOWEST_HU = -1024.0  # below: outside the scanner's circle
SERIES, HARMONICS, SHAPE_SERIES, DEGREE = 6, 6, 4, 4  # sizes of the fits
AREA_MM2 = 400.0  # a smaller slice is no section
NOTE = "Real: a thorax CT (LIDC-IDRI, CC BY 3.0), the moving image. Synthetic: the motion, and so the fixed image."


@dataclass(frozen=True, eq=False)
class ThoraxScan:
    """A CT with its lungs.

    Args:
        image: ``1 1 *grid``, HU.
        labels: ``1 1 *grid``, 1 right lung, 2 left lung, 0 elsewhere.
        grid: of both.
    """

    image: Float[Tensor, "1 1 *grid"]
    labels: Int[Tensor, "1 1 *grid"]
    grid: Grid

    @property
    def mask(self) -> Bool[Tensor, "1 1 *grid"]:
        """Both lungs."""
        return self.labels > 0


def load_thorax_ct(spacing_mm: float | Sequence[float] = 3.0, margin_mm: float = 30.0) -> ThoraxScan:
    """The thorax CT, cut to the lungs, at a spacing.

    Args:
        spacing_mm: of the new grid; the scan has 0.70 x 0.70 x 2.5 mm. It is smoothed where that is coarser.
        margin_mm: what is kept around the lungs, as far as the scan goes.

    Raises:
        FileNotFoundError: if it has not been fetched; the message has the command.
        ValueError: if image and labels do not lie on one grid, or there is no lung in them.
    """
    image = read_volume(data_download.locate("thorax-ct", "ct.nii.gz"))
    labels = read_volume(data_download.locate("thorax-ct", "labels.nii.gz"), labels=True)
    if image.grid != labels.grid:
        raise ValueError(f"The CT lies on {image.grid.shape} voxels, but its labels on {labels.grid.shape}, elsewhere.")
    lungs = torch.isin(labels.data, torch.tensor(RIGHT_LOBES)).long()
    lungs[torch.isin(labels.data, torch.tensor(LEFT_LOBES))] = 2
    if not lungs.any():
        raise ValueError("The labels of the CT hold none of the lung lobes 10 to 14.")
    start, stop = [], []
    for axis, (n, h) in enumerate(zip(image.grid.shape, image.grid.spacing, strict=True)):
        there = lungs.flatten(axis + 1).amax(-1) if axis < 2 else lungs
        there = there.reshape(-1, n).amax(0).nonzero()[:, 0]
        start.append(max(0, int(there[0]) - round(margin_mm / h)))
        stop.append(min(n, int(there[-1]) + 1 + round(margin_mm / h)))
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    old = image.grid.cropped(start, stop)
    new = old.with_spacing(spacing_mm)
    sigma = tuple(0.4 * max(b * b - a * a, 0.0) ** 0.5 for a, b in zip(old.spacing, new.spacing, strict=True))
    hu = smooth(image.data[box][None, None].clamp_min(LOWEST_HU), sigma, old)
    points = grid_points(new)[None]
    parts = [sample((lungs[box] == k)[None, None].float(), points, old) for k in (1, 2)]
    both = torch.where(parts[0] > 0.5, 1, torch.where(parts[1] > 0.5, 2, 0))
    return ThoraxScan(sample(hu, points, old), both, new)


def fit_lungs(
    labels: Int[Tensor, "1 1 *grid"],
    grid: Grid,
    rise_mm: float = 36.0,
    rib_growth_mm: tuple[float, float] = (6.0, 8.0),
    decay_mm: float = 40.0,
    uneven: float = 0.1,
) -> Breathing:
    """The motion of ``breathing`` for the lungs of an inhaled image.

    Args:
        labels: 1 right lung, 2 left lung.
        grid: of the labels, 3D.
        rise_mm: how much higher the summit of each dome is when exhaled; its edge rises three quarters of that.
        rib_growth_mm: how far the ribs move out, sideways and to the front.
        decay_mm: as in :class:`Breathing`.
        uneven: as in :class:`Lung`: the lower part opens more.

    Raises:
        ValueError: if the labels are not 3D, or a lung is missing or too small.
    """
    if grid.dim != 3:
        raise ValueError(f"Lungs are measured on 3D labels, but this grid has {grid.dim} axes.")
    places = [grid_points(grid, dtype=torch.float64)[labels[0, 0] == k].numpy() for k in (1, 2)]
    if min(len(p) for p in places) * grid.voxel_volume < 1e5:
        raise ValueError("The labels need a right (1) and a left lung (2) of at least 0.1 litres each.")
    inner = [np.percentile(places[0][:, 0], 2), np.percentile(places[1][:, 0], 98)]
    both = np.concatenate(places)
    centre = (float(np.mean(inner)), *(float((both[:, k].min() + both[:, k].max()) / 2) for k in (1, 2)))
    sizes = {"growth": rib_growth_mm, "uneven": (uneven, 0.0, 0.0)}
    lungs = [
        _fitted(p - np.asarray(centre), sign, grid, rise_mm, sizes) for p, sign in zip(places, (1.0, -1.0), strict=True)
    ]
    return Breathing((lungs[0], lungs[1]), centre, decay_mm)


def fit_dice(transform: Breathing, labels: Int[Tensor, "1 1 *grid"], grid: Grid) -> float:
    """Overlap of the lungs as formulas with the lungs of the label map, from 0 to 1."""
    model = transform.lung_at(flat_points(grid), inhaled=True).reshape(labels.shape) > 0
    return float(2 * (model & (labels > 0)).sum() / (model.sum() + (labels > 0).sum()))


def warp_ct(
    scan: ThoraxScan,
    transform: Breathing | None = None,
    landmarks: int = 500,
    noise_hu: float = 0.0,
    seed: int = 0,
) -> ThoraxCase:
    """A pair from one CT: itself (moving, inhale) and itself breathed out (fixed).

    Args:
        scan: the CT.
        transform: fixed to moving; that of :func:`fit_lungs` where left out.
        landmarks: number of random points of the fixed lungs (they are places, no anatomical landmarks).
        noise_hu: standard deviation of noise that is added to the fixed image, whose own noise is that of the CT,
            moved: a method could match the noise.
        seed: of landmarks and noise.

    Raises:
        ValueError: if there is no lung to put landmarks in.
    """
    transform = transform or fit_lungs(scan.labels, scan.grid)
    generator = torch.Generator().manual_seed(seed)
    points = flat_points(scan.grid)
    moved = transform(points)
    shape = scan.image.shape
    labels = sample(scan.labels.float(), moved, scan.grid, order=0).reshape(shape).round().long()
    ratio = torch.where(labels > 0, transform.volume_ratio(points).reshape(shape), 1)
    fixed = AIR_HU + (sample(scan.image, moved, scan.grid).reshape(shape) - AIR_HU) * ratio
    fixed = fixed + noise_hu * torch.randn(shape, generator=generator)
    inside = (labels > 0).flatten().nonzero()[:, 0]
    if len(inside) == 0:
        raise ValueError("The fixed image has no lung: no landmark can be put there.")
    marks = points[:, inside[torch.randperm(len(inside), generator=generator)[:landmarks]]]
    return ThoraxCase(fixed, scan.image, scan.grid, transform, labels, scan.labels, marks, transform(marks), NOTE)


def _fitted(
    places: Float[np.ndarray, "n 3"], sign: float, grid: Grid, rise_mm: float, sizes: dict[str, tuple[float, ...]]
) -> Lung:
    """One lung from its voxels, relative to the patient's centre."""
    step = grid.spacing[2]
    places = places * np.array([sign, 1, 1])  # outwards is positive on both sides
    levels = np.unique(places[:, 2])
    slices = [places[np.isclose(places[:, 2], z)] for z in levels]
    area = np.array([len(s) for s in slices]) * grid.spacing[0] * grid.spacing[1]
    widest = int(np.argmax(area))
    for k in range(widest - 1, -1, -1):  # from there down, each slice takes over what is above it
        above = np.column_stack([slices[k + 1][:, :2], np.full(len(slices[k + 1]), levels[k])])
        slices[k] = np.unique(np.round(np.concatenate([slices[k], above]), 3), axis=0)
    keep = (area > AREA_MM2) | (np.arange(len(levels)) < widest)
    levels, slices = levels[keep], [s for s, k in zip(slices, keep, strict=True) if k]
    apex, low = float(places[:, 2].max() + step / 2), float(levels[0])
    cap = 0.5 * (apex - low)
    opening = np.clip((apex - levels) / cap, 0, 1)
    opening = np.sqrt(opening * (2 - opening))
    ends = np.array([np.percentile(s[:, :2], (1, 99), axis=0) for s in slices])  # slice, end, axis
    half = np.asarray(grid.spacing[:2]) / 2
    x = np.clip((2 * levels - low - apex) / (apex - low), -1, 1)

    def series(values: np.ndarray, weights: np.ndarray) -> tuple[float, ...]:
        return tuple(chebyshev.chebfit(x, values, SERIES - 1, w=weights).tolist())

    width = (ends[:, 1] - ends[:, 0]) / 2 + half
    lung = Lung(
        sign=sign,
        apex=apex,
        cap=cap,
        floor=float(places[:, 2].min() - 150),
        heights=(low, apex),
        medial=series(np.maximum(ends[:, 0, 0] - half[0], 4), np.ones(len(x))),
        centre=(series(ends[:, :, 1].mean(1), np.ones(len(x))),),
        radius=tuple(series(width[:, k] / opening, opening) for k in (0, 1)),
        shape=(),
        dome=(),
        rise=(),
        uneven=sizes["uneven"],
        growth=sizes["growth"],
        growth_above=low,
        growth_fade=90.0,
    )
    lung = replace(lung, shape=_fitted_shape(lung, slices, x))
    lung = replace(lung, dome=_fitted_dome(lung, places))
    return replace(lung, rise=(((0, 0), rise_mm), ((2, 0), -rise_mm / 4), ((0, 2), -rise_mm / 4)))


def _in_section(lung: Lung, places: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 2"]:
    """w of points whose first axis is outwards; that of w too."""
    centre, radius = (a.numpy() for a in lung.section(torch.from_numpy(places[:, 2]), inhaled=True))
    return (places[:, :2] - centre * [lung.sign, 1]) / radius


def _fitted_shape(
    lung: Lung, slices: list[np.ndarray], x: np.ndarray, directions: int = 36
) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]:
    """log g as a series in angle and height through the outermost voxels in each direction."""
    rows, values = [], []
    for section, height in zip(slices, x, strict=True):
        w = _in_section(lung, section)
        angle, reach = np.arctan2(w[:, 1], w[:, 0]), np.hypot(w[:, 0], w[:, 1])
        bins = np.floor((angle + np.pi) / (2 * np.pi) * directions).astype(int) % directions
        for k in np.unique(bins):
            outermost = np.flatnonzero(bins == k)[reach[bins == k].argmax()]
            heights = chebyshev.chebvander(height, SHAPE_SERIES - 1).ravel()
            waves = [f(j * angle[outermost]) for j in range(HARMONICS) for f in (np.cos, np.sin)]
            rows.append(np.outer(waves, heights).ravel())
            values.append(np.log(np.clip(reach[outermost], 0.4, 1.25)))
    matrix = np.asarray(rows)
    # A ridge that grows with order keeps the shape from changing fast along angle and height.
    order = np.add.outer(np.repeat(np.arange(HARMONICS), 2) ** 2, 4 * np.arange(SHAPE_SERIES) ** 2).ravel()
    ridge = np.diag(1e-3 * len(matrix) * order)
    fit = np.linalg.solve(matrix.T @ matrix + ridge + 1e-6 * np.eye(len(order)), matrix.T @ np.asarray(values))
    table = fit.reshape(HARMONICS, 2, SHAPE_SERIES)
    return tuple((tuple(even.tolist()), tuple(odd.tolist())) for even, odd in table)


def _fitted_dome(lung: Lung, places: Float[np.ndarray, "n 3"]) -> Terms:
    """The diaphragm as a polynomial in w, through the lowest voxel of each column, outliers weighed down."""
    order = np.lexsort((places[:, 2], places[:, 1], places[:, 0]))
    sorted_places = places[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (np.abs(np.diff(sorted_places[:, :2], axis=0)) > 1e-6).any(1)
    lowest = sorted_places[first]
    w = _in_section(lung, lowest)
    w[:, 0] *= lung.sign
    good = np.hypot(w[:, 0], w[:, 1]) < 1.1
    w, height = w[good], lowest[good, 2]
    exponents = [(i, j) for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i)]
    matrix = np.stack([w[:, 0] ** i * w[:, 1] ** j for i, j in exponents], 1)
    weights = np.ones(len(w))
    # Without it the polynomial swings at the inner edge of a real lung, and the motion folds there.
    ridge = 3e-3 * len(w) * np.eye(len(exponents))
    for _ in range(10):
        weighted = matrix * weights[:, None]
        fit = np.linalg.solve(matrix.T @ weighted + ridge, weighted.T @ height)
        residual = (height - matrix @ fit) / 8.0  # mm: farther from the surface than that, a column counts less
        weights = 1 / (1 + residual**2)
    return tuple(zip(exponents, fit.tolist(), strict=True))
