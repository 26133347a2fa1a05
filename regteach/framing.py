"""Bring a user's image to the grid and the scale of a network: find what it shows, place the grid, read it there.

A network was trained on images of one spacing, with the anatomy in the middle, values in [0, 1] and a background of 0.
A file from a scanner has any spacing, any field of view, and air that is 0, -1024 or noise. This module is all that
lies between the two; nothing here looks at labels, and nothing here knows a network.

Convention: positions in mm, in the world coordinates of the files; images ``1 1 *grid``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from regteach.affine import Affine
from regteach.data.intensity import normalised
from regteach.data.volumes import Volume
from regteach.grid import Grid
from regteach.sampling import Mapping, smooth, warp
from regteach.transforms import Identity, Transform

Box = tuple[tuple[float, ...], tuple[float, ...]]

COARSE = 64  # voxels along an axis are enough to see where something is; averaging takes the noise away
CLEAR = 0.1  # a border that varies by less than this part of the signal is background
SPECKS = 0.01  # of the signal, at either end of an axis: a speck is no anatomy
FAR = 1 / 8  # of the working grid's extent: middles further apart than this, and
APART = 0.9  # boxes that share less than this part of the smaller one along an axis, lie far apart
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


def start(moving: Framed, fixed: Framed, grid: Grid) -> tuple[Transform, float]:
    """Where the search starts: the world coordinates as they are; or a shift from middle to middle.

    The shift is for images that lie far apart. Images that show more or less of the same space (a head and its brain)
    have middles apart, but one box within the other: they stay as they are.

    Returns:
        Fixed to moving points, and the distance of the shift, mm (0 for none).
    """
    shift = [m - f for m, f in zip(moving.middle, fixed.middle, strict=True)]
    middles = any(abs(s) > FAR * length for s, length in zip(shift, grid.extent, strict=True))
    if not middles or min(_shared(moving.box, fixed.box)) >= APART:
        return Identity(grid.dim), 0.0
    unit = torch.eye(grid.dim)[None]
    return Affine(unit, torch.tensor([shift]), torch.tensor(grid.centre)), math.hypot(*shift)


class Reader:
    """Reads an image on the working grid, through any transform.

    Only the part around the working grid is kept. Where its voxels are much smaller than those of the working grid it
    is smoothed first, as averaging would do.

    Args:
        image: what to read.
        working: where.
        begin: the transform that the search starts from.
        device: where to compute.
    """

    def __init__(self, image: Framed, working: Grid, begin: Transform, device: torch.device) -> None:
        corner, opposite = (begin(torch.tensor([[p]]))[0, 0].tolist() for p in (working.origin, working.last))
        low, high = [], []
        for axis, (a, b) in enumerate(zip(corner, opposite, strict=True)):
            own, n, room = image.grid.spacing[axis], image.grid.shape[axis], ROOM * working.extent[axis]
            first = math.floor((a - room - image.grid.origin[axis]) / own)
            last = math.ceil((b + room - image.grid.origin[axis]) / own)
            low.append(min(max(first, 0), n - 1))
            high.append(max(min(last + 1, n), low[-1] + 1))
        self.working, self.grid = working, image.grid.cropped(low, high)
        voxels = [slice(a, b) for a, b in zip(low, high, strict=True)]
        part = image.image[(slice(None), slice(None), *voxels)].to(device)
        ratio = [w / h for w, h in zip(working.spacing, self.grid.spacing, strict=True)]
        if max(ratio) > 1.5:
            # A Gaussian as wide as the new voxel, less the width of the old one, in quadrature.
            widths = zip(ratio, self.grid.spacing, strict=True)
            part = smooth(part, tuple(0.42 * h * math.sqrt(max(0.0, r * r - 1)) for r, h in widths), self.grid)
        self.part = part

    def __call__(self, transform: Mapping) -> Float[Tensor, "1 1 *working"]:
        """The image in [0, 1] on the working grid; 0 outside of it.

        Raises:
            ValueError: if there is nothing to see.
        """
        return normalised(warp(self.part, transform, self.grid, self.working, padding="zeros"))


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
    """The image averaged over blocks, to about COARSE voxels along each axis; the last block may be a smaller one."""
    blocks = [max(1, n // COARSE) for n in grid.shape]
    small = {2: F.avg_pool2d, 3: F.avg_pool3d}[grid.dim](image, blocks, ceil_mode=True)
    spacing = tuple(h * b for h, b in zip(grid.spacing, blocks, strict=True))
    origin = tuple(o + 0.5 * (b - 1) * h for o, b, h in zip(grid.origin, blocks, grid.spacing, strict=True))
    return small, Grid(tuple(small.shape[2:]), spacing, origin)


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


def _shared(a: Box, b: Box) -> list[float]:
    """Part of the smaller box that lies in the other one, along each axis."""
    parts: list[float] = []
    for low_a, low_b, high_a, high_b in zip(a[0], b[0], a[1], b[1], strict=True):
        smaller = max(min(high_a - low_a, high_b - low_b), 1e-6)
        parts.append(max(0.0, min(high_a, high_b) - max(low_a, low_b)) / smaller)
    return parts


def span(values: Sequence[float]) -> str:
    """Lengths as people write them: 1 x 1 x 2.5."""
    return " x ".join(f"{v:g}" for v in values)
