"""From what a user has to what a network sees: take the image in, find what it shows, place the grid, read it there.

A network was trained on images of one spacing, with the anatomy in the middle, values in [0, 1] and a background of 0.
A file from a scanner has any spacing, any field of view, and air that is 0, -1024 or noise. This module is all that
lies between the two; nothing here looks at labels, and nothing here knows a network.

Convention: positions in mm, in the world coordinates of the files; images ``1 1 *grid``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from nibabel.filebasedimages import FileBasedImage
from torch import Tensor

from regteach.affine import Affine
from regteach.data.intensity import PERCENTILES
from regteach.data.volumes import Volume, read_volume
from regteach.grid import Grid
from regteach.sampling import Mapping, smooth, warp
from regteach.transforms import Identity, Transform

Source = str | PathLike[str] | nib.Nifti1Image | Volume | tuple[Any, Grid]
Box = tuple[tuple[float, ...], tuple[float, ...]]

COARSE = 64  # voxels along an axis are enough to see where something is
CLEAR = 0.1  # a border that varies by less than this part of the signal is background
SPECKS = 0.01  # of the signal, at either end of an axis: a speck is no anatomy
FAR = 1 / 8  # of the working grid's extent: when one box sticks out of the other by more, they lie far apart
COUNTED = 2**20  # voxels, at most about that many, are enough for a percentile
LARGEST = 2**63 - 1  # of the labels
ROOM = 1 / 4  # of the working grid's extent: how far around it an image is kept, for what moves in


@dataclass(frozen=True, eq=False)
class Framed:
    """An image and what it shows.

    Args:
        image: ``1 1 *grid``; the background is 0, and the rest is above it.
        grid: where it sits.
        box: lowest and highest position of what it shows, mm; of all of it where no background was found.
    """

    image: Float[Tensor, "1 1 *grid"]
    grid: Grid
    box: Box

    @property
    def middle(self) -> tuple[float, ...]:
        """Middle of what the image shows, mm."""
        return tuple((a + b) / 2 for a, b in zip(*self.box, strict=True))


def as_volume(source: Source, name: str, labels: bool = False) -> Volume:
    """A volume from whatever a user has.

    Raises:
        FileNotFoundError, ValueError: as ``read_volume``; and if an array does not fit its grid or can not be used.
    """
    title = name[0].upper() + name[1:]
    if isinstance(source, Volume):
        return replace(source, source=_usable(source.data, title, labels))
    if isinstance(source, str | PathLike | FileBasedImage):
        return read_volume(source, labels)
    if not isinstance(source, tuple) or len(source) != 2 or not isinstance(source[1], Grid):
        raise ValueError(f"{title} is a path, an image of nibabel, a volume, or a pair (array, Grid).")
    array, grid = source
    values = array if isinstance(array, Tensor) else _as_tensor(np.asarray(array), title)
    if tuple(values.shape) != grid.shape:
        raise ValueError(f"{title} has the shape {tuple(values.shape)}, but its grid has {grid.shape}.")
    return Volume(_usable(values.detach().cpu(), title, labels), grid)


def framed(volume: Volume) -> Framed:
    """Take the background of a volume away, and find what is left."""
    image, grid = volume.batch.float(), volume.grid
    small, coarse = _averaged(image, grid)
    level, spread = _border(small)
    away = (small - level).abs()
    signal = away[away > 4 * spread]
    top = float(signal.sort().values[int(0.95 * len(signal))]) if len(signal) else 0.0
    clear = spread < CLEAR * top
    box = _box((away > max(4 * spread, CLEAR * top))[0, 0], coarse) if clear else (grid.origin, grid.last)
    return Framed(_on_zero(image, clear), grid, box)


def working_grid(grid: Grid, fixed: Framed) -> Grid:
    """The network's grid, on the middle of what the fixed image shows.

    Along axes of the same spacing its voxels fall on those of the image, so that nothing is interpolated.
    """
    origin = []
    for axis, (middle, n, h) in enumerate(zip(fixed.middle, grid.shape, grid.spacing, strict=True)):
        first, own, zero = middle - 0.5 * (n - 1) * h, fixed.grid.spacing[axis], fixed.grid.origin[axis]
        if abs(own - h) < 1e-3 * h:
            first = zero + math.floor((first - zero) / own + 0.5) * own
        origin.append(first)
    return Grid(grid.shape, grid.spacing, tuple(origin))


def outside(image: Framed, working: Grid, begin: Transform) -> float:
    """The share of what an image shows (of its box) that lies outside of the working grid, from 0 to 1."""
    corners = [begin(torch.tensor([[p]]))[0, 0].tolist() for p in (working.origin, working.last)]
    share = 1.0
    for low, high, first, last in zip(*image.box, *corners, strict=True):
        if high > low:
            share *= max(0.0, min(high, last) - max(low, first)) / (high - low)
    return 1 - share


def start(moving: Framed, fixed: Framed, grid: Grid) -> tuple[Transform, float]:
    """Where the search starts: the world coordinates as they are; or a shift from middle to middle.

    The shift is for images that lie far apart. Those that show more or less of the same space (a head and its brain)
    stay as they are: their middles are apart, but what one shows lies within what the other shows.

    Returns:
        Fixed to moving points, and the distance of the shift, mm (0 for none).
    """
    if all(out <= FAR * length for out, length in zip(_sticks_out(moving.box, fixed.box), grid.extent, strict=True)):
        return Identity(grid.dim), 0.0
    shift = [m - f for m, f in zip(moving.middle, fixed.middle, strict=True)]
    unit = torch.eye(grid.dim)[None]
    return Affine(unit, torch.tensor([shift]), torch.tensor(grid.centre)), math.hypot(*shift)


class Reader:
    """Reads an image on the working grid, through any transform.

    Only the part around the working grid is kept. Where its voxels are much smaller than those of the working grid it
    is smoothed first. The scale is that of the training (``normalised``): [0, 1] between two percentiles of what is not
    background, counted where the working grid lies.

    Args:
        image: what to read.
        working: where.
        begin: the transform that the search starts from.
        device: where to compute.

    Raises:
        ValueError: if there is nothing to see.
    """

    def __init__(self, image: Framed, working: Grid, begin: Transform, device: torch.device) -> None:
        corners = [begin(torch.tensor([[p]]))[0, 0].tolist() for p in (working.origin, working.last)]
        low, high = _voxels(image.grid, corners, [ROOM * length for length in working.extent])
        self.working, self.grid = working, image.grid.cropped(low, high)
        part = image.image[_slices(low, high)].to(device)
        ratio = [w / h for w, h in zip(working.spacing, self.grid.spacing, strict=True)]
        self.part = part
        if max(ratio) > 1.5:
            # A Gaussian as wide as the new voxel, less the width of the old one, in quadrature.
            widths = zip(ratio, self.grid.spacing, strict=True)
            self.part = smooth(part, tuple(0.42 * h * math.sqrt(max(0.0, r * r - 1)) for r, h in widths), self.grid)
        box = _slices(*_voxels(self.grid, corners, [0.0] * working.dim))
        self.low, self.high = _scale(self.part[box][part[box] > 0])

    def __call__(self, transform: Mapping) -> Float[Tensor, "1 1 *working"]:
        """The image in [0, 1] on the working grid; 0 outside of it."""
        read = warp(self.part, transform, self.grid, self.working, padding="zeros")
        return ((read - self.low) / (self.high - self.low)).clamp(0, 1)


def _as_tensor(values: np.ndarray, title: str) -> Tensor:
    """An array of any byte order and any real type."""
    if values.dtype.kind not in "iufb":
        raise ValueError(f"{title} holds {values.dtype}, but an image holds one real number a voxel.")
    if values.dtype.kind == "f":
        return torch.from_numpy(values.astype(np.float64 if values.dtype.itemsize > 4 else np.float32))
    if values.dtype.kind == "u" and values.size and values.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{title} holds a number of {values.max()}, but {LARGEST} is the largest that can be kept.")
    return torch.from_numpy(values.astype(np.int64))


def _usable(values: Tensor, title: str, labels: bool) -> Tensor:
    """Whole numbers of 64 bits for labels, and finite ones of at most single precision for an image."""
    if values.is_complex():
        raise ValueError(f"{title} holds {values.dtype}, but an image holds one real number a voxel.")
    if labels:
        return _whole(values, title) if values.is_floating_point() else values.long()
    image = values.float()
    wrong = int((~image.isfinite()).sum())
    if wrong:
        raise ValueError(f"{title} holds values that are not finite (NaN or infinity): {wrong:,} of them.")
    return image


def _whole(data: Tensor, title: str) -> Tensor:
    if not bool((data == data.round()).all()):
        raise ValueError(f"{title} is no label map: its values are not whole numbers.")
    if data.numel() and float(data.abs().max()) >= LARGEST:
        raise ValueError(f"{title} holds a number of {float(data.abs().max()):g}: that is too large for a label.")
    return data.long()


def _voxels(grid: Grid, corners: list[list[float]], room: list[float]) -> tuple[list[int], list[int]]:
    """First voxel, and one beyond the last, of a box between two points (mm) with room around; one voxel at least."""
    low, high = [], []
    for a, b, extra, n, h, zero in zip(*corners, room, grid.shape, grid.spacing, grid.origin, strict=True):
        low.append(min(max(math.floor((a - extra - zero) / h), 0), n - 1))
        high.append(max(min(math.ceil((b + extra - zero) / h) + 1, n), low[-1] + 1))
    return low, high


def _slices(low: Sequence[int], high: Sequence[int]) -> tuple[slice, ...]:
    return (slice(None), slice(None), *[slice(a, b) for a, b in zip(low, high, strict=True)])


def _scale(signal: Float[Tensor, "n"]) -> tuple[float, float]:
    """What becomes 0 and what becomes 1, of the values that count."""
    ordered = signal[:: max(1, len(signal) // COUNTED)].sort().values
    if not len(ordered):
        raise ValueError("There is nothing but background.")
    low, high = (float(ordered[round(p / 100 * (len(ordered) - 1))]) for p in PERCENTILES)
    return (low, high) if low < high else (0.0, float(ordered[-1]))


def _on_zero(image: Tensor, clear: bool) -> Tensor:
    """The image with its background at 0 and everything else above: where it ends, nothing changes.

    The background is the value that most of the border has; failing that the border's median if the border is even
    (``clear``), and all that is darker counts as noise. Without a background the darkest voxel is put to 0.
    """
    level = _faces(image).median()
    same = _faces(image) == level
    if bool(same.float().mean() >= 0.5):
        inside = image != level
        darker = float((image < level).sum() / inside.sum())
        if 0.1 < darker < 0.9:  # scores, say, with the background at the mean: it is no tissue, and becomes the darkest
            return torch.where(inside, image - image.min(), 0)
        return image - image.min() if darker >= 0.9 else (image - level).clamp_min(0)
    return (image - level).clamp_min(0) if clear else image - image.min()


def _averaged(image: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """The image averaged over blocks, to about COARSE voxels along each axis, and smoothed by one."""
    blocks = [max(1, n // COARSE) for n in grid.shape]
    small = {2: F.avg_pool2d, 3: F.avg_pool3d}[grid.dim](image, blocks, ceil_mode=True)
    spacing = tuple(h * b for h, b in zip(grid.spacing, blocks, strict=True))
    origin = tuple(o + 0.5 * (b - 1) * h for o, b, h in zip(grid.origin, blocks, grid.spacing, strict=True))
    coarse = Grid(tuple(small.shape[2:]), spacing, origin)
    return smooth(small, spacing, coarse), coarse


def _border(image: Tensor) -> tuple[float, float]:
    """Median of the outermost voxels, and how far they spread (a robust standard deviation)."""
    faces = _faces(image).sort().values
    low, level, high = (float(faces[int(part * (len(faces) - 1))]) for part in (0.25, 0.5, 0.75))
    return level, (high - low) / 1.35


def _faces(image: Tensor) -> Tensor:
    return torch.cat([image.select(axis, end).reshape(-1) for axis in range(2, image.ndim) for end in (0, -1)])


def _box(signal: Tensor, grid: Grid) -> Box:
    """From the first to the last voxel of the signal along each axis, but for specks."""
    low, high = [], []
    for axis, (zero, h) in enumerate(zip(grid.origin, grid.spacing, strict=True)):
        profile = signal.double().sum([a for a in range(grid.dim) if a != axis]).cumsum(0)
        share = profile / profile[-1]
        low.append(zero + h * float((share < SPECKS).sum()))
        high.append(zero + h * float((share < 1 - SPECKS).sum()))
    return tuple(low), tuple(high)


def _sticks_out(a: Box, b: Box) -> list[float]:
    """How far, in mm along each axis, the smaller box reaches beyond the other one."""
    out = []
    for low_a, high_a, low_b, high_b in zip(*a, *b, strict=True):
        first, second = (low_a - low_b, high_a - high_b), (low_b - low_a, high_b - high_a)
        small = first if high_a - low_a <= high_b - low_b else second
        out.append(max(-small[0], small[1], 0.0))
    return out


def span(values: Sequence[float]) -> str:
    """Lengths as people write them: 1 x 1 x 2.5."""
    return " x ".join(f"{v:g}" for v in values)
