"""Where the parts of a brain are, and what has to be invented where a label map leaves them out.

The donors' maps name the cortex and fourteen sub-cortical structures, and nothing else. :func:`completed` fills in
white matter, ventricles, a rim of fluid, cerebellum, brainstem and ventral diencephalon, from geometry: enough for an
image drawn from the map to pass for a brain, and not anatomy. What it needs of morphology is here too.

Convention: positions in mm about a fixed template with the axes of the MNI space, x = 0 between the hemispheres.

Source of the rotation: Kabsch, Acta Crystallographica A32 (1976).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regteach.data.contrast import TISSUES
from regteach.grid import Grid

# Centroids of the structures on the left, mm; on the right x is positive. Mean of the six donors after rigid
# alignment, made symmetric, and turned onto the same structures of Colin27, which is in MNI space.
TEMPLATE = (
    (-11.7, -16.1, 8.3),
    (-11.4, 11.2, 10.7),
    (-25.9, 3.1, 1.0),
    (-19.1, 0.2, -1.1),
    (-7.6, 12.8, -4.6),
    (-24.8, -18.7, -10.9),
    (-20.7, -1.7, -15.5),
)


BRAIN_CENTRE = (0.0, -18.0, 6.0)  # middle of the brain on the template, mm: the middle of the grid


@dataclass(frozen=True)
class Fine:
    """One person on the common grid, each of its voxels divided into ``parts``."""

    labels: Int[Tensor, "*fine"]
    structures: Int[Tensor, "*fine"]
    t1: Float[Tensor, "*fine"] | None
    grid: Grid
    parts: tuple[int, ...]


def turn_onto(own: Float[Tensor, "n 3"], template: Float[Tensor, "n 3"]) -> Float[Tensor, "3 3"]:
    """The turn R about the centroids that brings the points closest to those of the template (Kabsch): x is at R x."""
    left, _, right = torch.linalg.svd((template - template.mean(0)).T @ (own - own.mean(0)))
    one = left.new_ones(())
    return left @ torch.diag(torch.stack([one, one, torch.det(left @ right).sign()])) @ right


def with_structures(tissue: Tensor, structures: Tensor) -> Tensor:
    """A tissue map with the sub-cortical structures laid over it; left and right are one tissue."""
    merged = torch.where(structures > 7, structures - 7, structures)
    return torch.where(structures > 0, merged + TISSUES["thalamus"] - 1, tissue)


def dilated(mask: Bool[Tensor, "*fine"], radius_mm: float, grid: Grid) -> Bool[Tensor, "*fine"]:
    """All that is within a box of ``radius_mm``; the shifts double, so that a wide box costs little more."""
    for axis, h in enumerate(grid.spacing):
        radius, reach = max(1, round(radius_mm / h)), 0
        while reach < radius:
            step = min(2 * reach + 1, radius - reach)
            mask, reach = _widened(mask, axis, step), reach + step
    return mask


def reached(
    mask: Bool[Tensor, "*fine"], free: Bool[Tensor, "*fine"], direction: int, reach_mm: float, grid: Grid
) -> Bool[Tensor, "*fine"]:
    """The mask, drawn out along x through what is free: to the right (1) or to the left (-1)."""
    for _ in range(round(reach_mm / grid.spacing[0])):
        mask = mask | (torch.roll(mask, direction, 0) & free)
    return mask


def _widened(mask: Bool[Tensor, "*fine"], axis: int, step: int) -> Bool[Tensor, "*fine"]:
    out, n = mask.clone(), mask.shape[axis]
    out.narrow(axis, step, n - step).logical_or_(mask.narrow(axis, 0, n - step))
    out.narrow(axis, 0, n - step).logical_or_(mask.narrow(axis, step, n - step))
    return out


def completed(fine: Fine) -> Int[Tensor, "*fine"]:
    """A donor's tissue map: what is labelled, the white matter inside the cortex, and what no donor's map has.

    Invented, from where the person's own structures are: lateral ventricles (between caudate and midline, above the
    thalamus, at the tail of the hippocampus) and the third one (between the thalami); brainstem, ventral diencephalon,
    cerebellum and fourth ventricle (a few ellipsoids and a bent tube, at the places that they have in MNI space); and
    2 mm of fluid around everything.
    """
    where = (fine.labels > 0).nonzero()
    # Room for fluid on all sides, and for the hindbrain below.
    room = torch.tensor([[6, 6, 50], [6, 6, 6]]) / torch.tensor(fine.grid.spacing)
    low = (where.amin(0) - room[0].long()).clamp(min=0).tolist()
    high = torch.minimum(where.amax(0) + room[1].long(), torch.tensor(fine.grid.shape)).tolist()
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    tissue = torch.zeros(fine.grid.shape, dtype=torch.uint8)
    tissue[box] = _completed_part(fine.labels[box], fine.structures[box], fine.grid.cropped(low, high))
    return tissue


def _completed_part(labels: Int[Tensor, "*fine"], structures: Int[Tensor, "*fine"], grid: Grid) -> Int[Tensor, "*fine"]:
    white, cortex = _white_and_cortex(labels, structures, grid)
    tissue = torch.zeros(grid.shape, dtype=torch.uint8)
    tissue[white] = TISSUES["white matter"]
    own, template = centroids(structures, grid), template_points()
    size = float((own - own.mean(0)).norm() / (template - template.mean(0)).norm())
    # Positions on the template, this person's turn, shift and size taken out.
    turn = (turn_onto(own, template) / size).float()
    offset = (template.mean(0) - turn.double() @ own.mean(0)).float()
    axes = axis_positions(grid)
    x, y, z = (offset[k] + turn[k, 0] * axes[0] + turn[k, 1] * axes[1] + turn[k, 2] * axes[2] for k in range(3))
    tissue[white & (z < -6) & (x.abs() < 20) & (y < 8) & ~dilated(cortex, 3, grid)] = TISSUES["csf"]
    room = ~dilated(cortex, 1, grid) & (structures == 0)
    # All of the hindbrain is below the thalamus, and behind its front.
    front, top = ((own[0] - torch.tensor(grid.origin)) / torch.tensor(grid.spacing)).long().tolist()[1:]
    part = (slice(None), slice(0, front + round(25 / grid.spacing[1])), slice(0, top))
    for name, place in _hindbrain(x[part], y[part], z[part]).items():
        tissue[part][place & room[part]] = TISSUES[name]
    tissue[_ventricles(structures, white, x, grid)] = TISSUES["ventricle"]
    tissue[cortex] = TISSUES["cortex"]
    tissue = with_structures(tissue, structures)
    tissue[(tissue == 0) & dilated(tissue > TISSUES["csf"], 2, grid)] = TISSUES["csf"]
    return tissue


def _white_and_cortex(
    labels: Int[Tensor, "*fine"], structures: Int[Tensor, "*fine"], grid: Grid
) -> tuple[Bool[Tensor, "*fine"], Bool[Tensor, "*fine"]]:
    """White matter, and the cortex around it, from the cortex alone.

    Two fronts start from what is surely inside (around the structures, and deep in the brain), and from what is surely
    outside (beyond the hull, and between left and right cortex); the cortex stops both, and they stop each other.
    """
    left, right = (labels > 0) & (labels < 35), (labels > 41) & (labels < 76)
    cortex = left | right
    free = ~cortex & (structures == 0)
    hull = closed(cortex | (structures > 0), 16, grid)
    fissure = reached(left, free, 1, 10, grid) & reached(right, free, -1, 10, grid) & free
    deep = dilated(structures > 0, 3, grid) | (eroded(hull, 10, grid) & ~dilated(cortex, 4, grid))
    # The ribbon of these maps is a voxel thin in places, and has holes: the fronts first run against it mended.
    mended = closed(cortex, 1, grid) & ~fissure
    outside = ~hull | fissure
    white = deep & free & ~outside
    for way, steps in ((free & ~mended, 30), (free, 6)):
        for _ in range(steps):
            white |= touched(white) & way & ~outside
            outside |= touched(outside) & way & ~white
    # A cortex is thicker than the ribbon: it grows to the outside; what neither front has reached lies within it.
    cortex = cortex | (touched(cortex) & outside) | (free & ~white & ~outside)
    return white, cortex


def _hindbrain(x: Tensor, y: Tensor, z: Tensor) -> dict[str, Bool[Tensor, "*fine"]]:
    """Where the parts of the hindbrain are in MNI space, by eye, later ones over earlier ones; mm."""

    def ellipsoid(cx: float, cy: float, cz: float, rx: float, ry: float, rz: float) -> Tensor:
        return ((x.abs() - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2

    cerebellum = (ellipsoid(22, -62, -36, 28, 27, 19) < 1) | (ellipsoid(0, -60, -28, 10, 20, 22) < 1)
    core = ellipsoid(17, -56, -36, 17, 14, 9)
    # Leaves: white sheets between the grey ones, wider towards the core.
    leaves = torch.cos(2 * math.pi * (z + 0.5 * y) / 6) > (core.sqrt() - 1.2)
    # The tube: level, its middle, and its half widths to the side and to the front.
    level = [-70.0, -56.0, -44.0, -32.0, -20.0, -12.0, -4.0]
    middle, side, front = (
        _interpolated(z, level, values)
        for values in (
            [-45.0, -40.0, -34.0, -28.0, -26.0, -26.0, -24.0],
            [6.0, 8.0, 11.0, 16.0, 15.0, 16.0, 16.0],
            [6.0, 7.0, 9.0, 13.0, 11.0, 9.0, 8.0],
        )
    )
    tube = (x / side) ** 2 + ((y - middle) / front) ** 2 < 1
    return {
        "cerebellar cortex": cerebellum,
        "cerebellar white matter": cerebellum & ((core < 1) | (leaves & (core < 4))),
        "ventral diencephalon": ellipsoid(9, -13, -5, 9, 9, 6) < 1,
        "brainstem": tube & (z > -70) & (z < -4),
        "ventricle": ellipsoid(0, -42, -33, 5, 3.5, 8) < 1,
    }


def _ventricles(
    structures: Int[Tensor, "*fine"], white: Bool[Tensor, "*fine"], x: Tensor, grid: Grid
) -> Bool[Tensor, "*fine"]:
    """Where the white matter of :func:`_white_and_cortex` is more likely a ventricle."""
    found = torch.zeros_like(white)
    mm = grid.spacing[0]
    for side, first in ((-1, 1), (1, 8)):
        thalamus, caudate, hippocampus = (structures == first + k for k in (0, 1, 5))
        # From the caudate towards the midline.
        row = caudate
        for _ in range(round(9 / mm)):
            row = row | torch.roll(row, -side, 0)
        found |= row & ((x * side) > 1.2)
        # Above the thalamus.
        above = thalamus
        for _ in range(round(4 / grid.spacing[2])):
            above = above | torch.roll(above, 1, 2)
        found |= above & ((x * side) > 1.2) & ((x * side) < 12)
        # Around the tail of the hippocampus, and beside its body.
        where = hippocampus.nonzero().float()
        tail = where[where[:, 1] <= where[:, 1].quantile(0.1)].mean(0) * torch.tensor(grid.spacing)
        tail = tail + torch.tensor(grid.origin) + torch.tensor([2.0 * side, -5.0, 6.0])
        px, py, pz = axis_positions(grid)
        found |= ((px - tail[0]) / 5) ** 2 + ((py - tail[1]) / 9) ** 2 + ((pz - tail[2]) / 8) ** 2 < 1
        found |= torch.roll(hippocampus, side, 0)
    # The third one: between the thalami, and a little below.
    gap = dilated(structures == 1, 4, grid) & dilated(structures == 8, 4, grid) & (x.abs() < 2)
    for _ in range(round(6 / grid.spacing[2])):
        gap = gap | torch.roll(gap, -1, 2)
    return (found & white) | (gap & (white | (structures == 0)))


def _interpolated(z: Tensor, at: Sequence[float], values: Sequence[float]) -> Tensor:
    """Piecewise linear, constant beyond the ends."""
    out = torch.full_like(z, values[0])
    for k in range(len(at) - 1):
        part = ((z - at[k]) / (at[k + 1] - at[k])).clamp(0, 1)
        out = out + part * (values[k + 1] - values[k])
    return out


def axis_positions(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Positions along each axis, mm, shaped to be combined."""
    x, y, z = (torch.arange(n) * h + o for n, h, o in zip(grid.shape, grid.spacing, grid.origin, strict=True))
    return x[:, None, None], y[:, None], z


def centroids(structures: Int[Tensor, "*fine"], grid: Grid) -> Float[Tensor, "14 3"]:
    """Middle of each of the fourteen structures, mm."""
    where = structures.nonzero()
    which = structures[tuple(where.T)].long()
    count = torch.bincount(which, minlength=15)[1:, None]
    total = torch.zeros(15, 3, dtype=torch.float64).index_add_(0, which, where.double())[1:]
    return total / count * torch.tensor(grid.spacing).double() + torch.tensor(grid.origin).double()


def template_points() -> Float[Tensor, "14 3"]:
    """Middles of the fourteen structures on the template, mm, left then right."""
    left = torch.tensor(TEMPLATE, dtype=torch.float64)
    return torch.cat([left, left * left.new_tensor([-1.0, 1.0, 1.0])])


def touched(mask: Bool[Tensor, "*fine"]) -> Bool[Tensor, "*fine"]:
    """Neighbours across a face: what is within one diagonal step only can lie behind a sheet of labels."""
    out = mask.clone()
    for axis, n in enumerate(mask.shape):
        out.narrow(axis, 1, n - 1).logical_or_(mask.narrow(axis, 0, n - 1))
        out.narrow(axis, 0, n - 1).logical_or_(mask.narrow(axis, 1, n - 1))
    return out


def closed(mask: Bool[Tensor, "*fine"], radius_mm: float, grid: Grid) -> Bool[Tensor, "*fine"]:
    """Grown by ``radius_mm`` and shrunk again, with room around: gaps narrower than twice that are filled."""
    room = [round(radius_mm / h) + 1 for h in grid.spacing]
    wide = dilated(F.pad(mask, [r for r in reversed(room) for _ in range(2)]), radius_mm, grid)
    closed = eroded(wide, radius_mm, grid)
    return closed[tuple(slice(r, -r) for r in room)]


def eroded(mask: Bool[Tensor, "*fine"], radius_mm: float, grid: Grid) -> Bool[Tensor, "*fine"]:
    """A mask without what is nearer than a radius to its outside."""
    return ~dilated(~mask, radius_mm, grid)
