"""Eyes as a drawing knows them, and visits that see them: the geometry of the synthetic B-scans of :mod:`retina`.

An eye has a lateral coordinate s of its own (mm, 0 near the middle of the image), and in depth it counts layers. What
belongs to the eye: the thickness of each layer, the pit of the fovea, the bend of the eyeball, texture, vessels. What
belongs to a visit: tilt, shifts, slow and quick movements of the eye during the scan, and, in the second visit, layers
that became thinner (or thicker) in some places. Above the choroid all comes down where a layer is thinner.

The layers' thicknesses are of the size found in healthy eyes.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from regteach.data.layers import Visit, interpolated
from regteach.grid import Grid
from regteach.sampling import smooth

# Thickness away from the fovea, mm, and how bright the layer is shown.
LAYERS = {
    "nerve fibres": (0.030, 0.80),
    "ganglion cells": (0.042, 0.56),
    "inner plexiform": (0.038, 0.64),
    "inner nuclear": (0.036, 0.45),
    "outer plexiform": (0.026, 0.60),
    "outer nuclear": (0.062, 0.38),
    "photoreceptors": (0.072, 0.58),
    "pigment epithelium": (0.024, 0.88),
    "choroid": (0.230, 0.56),
}
STRUCTURES = dict(enumerate(LAYERS, start=1))
INNER = 5  # the layers that thin out to nothing at the fovea
THINNEST_MM = 0.002
MARGIN_MM = 1.0  # curves are known this far beyond the sides of the image


@dataclass(frozen=True)
class RetinaConfig:
    """What a B-scan looks like, and how far two visits differ.

    Args:
        shape: pixels, depth and lateral.
        spacing_mm: of the pixels.
        retina_top: where the retina begins on average, as a fraction of the depth.
        tilt_deg: largest tilt of a visit.
        offset_mm: largest shift in depth of a visit.
        lateral_mm: largest lateral shift of a visit.
        drift: largest local lateral stretch within a visit, from slow movements of the eye during the scan.
        motion_mm: largest jump in depth of a block of columns, from quick movements during the scan.
        block_mm: mean width of such a block.
        ramp_mm: width over which one block goes over into the next.
        thinning: largest part of its thickness that a layer loses, or gains, between the visits.
        thinning_mm: smallest and largest width (standard deviation) of such a place.
        speckle_looks: number of independent speckle patterns that are averaged; 1 is the strongest speckle.
        speckle_mm: standard deviation of the blur of the speckle's amplitude, in depth and laterally.
        vessels: smallest and largest number of vessels.
        shadow: part of the light that the darkest shadow takes.
    """

    shape: tuple[int, int] = (160, 192)
    spacing_mm: tuple[float, float] = (0.0078, 0.030)
    retina_top: float = 0.3
    tilt_deg: float = 3.0
    offset_mm: float = 0.08
    lateral_mm: float = 0.3
    drift: float = 0.06
    motion_mm: float = 0.03
    block_mm: float = 0.7
    ramp_mm: float = 0.06
    thinning: float = 0.5
    thinning_mm: tuple[float, float] = (0.25, 0.8)
    speckle_looks: int = 4
    speckle_mm: tuple[float, float] = (0.004, 0.018)
    vessels: tuple[int, int] = (3, 6)
    shadow: float = 0.97

    def __post_init__(self) -> None:
        if self.speckle_looks < 1 or not 0 <= self.thinning < 1 or not 0 <= self.drift < 0.5 or self.ramp_mm <= 0:
            raise ValueError(
                "A B-scan has at least one look, a positive ramp, a thinning from 0 to below 1 and a drift from 0 to"
                f" below 0.5, not {self.speckle_looks}, {self.ramp_mm}, {self.thinning} and {self.drift}."
            )

    @property
    def grid(self) -> Grid:
        """Pixels of every B-scan; the first one is at (0, 0) mm."""
        return Grid(self.shape, self.spacing_mm)


@dataclass(frozen=True, eq=False)
class Eye:
    """One eye, as functions of its lateral coordinate s.

    Args:
        s_mm: where the tables below are given, evenly spaced.
        thickness: of each layer there, mm.
        bend: depth of the topmost boundary there, against a straight line, mm.
        texture: what the display shows brighter or darker, ``1 1 layers lateral``, over the layers and s.
        texture_grid: of it; axis 0 counts layers.
        vessels: position, width (both mm), and shadow of each.
    """

    s_mm: Float[Tensor, "w"]
    thickness: Float[Tensor, "k w"]
    bend: Float[Tensor, "w"]
    texture: Float[Tensor, "1 1 a l"]
    texture_grid: Grid
    vessels: Float[Tensor, "v 3"]


def draw_visits(config: RetinaConfig, key: int | tuple[int, ...]) -> tuple[Eye, tuple[Visit, Visit]]:
    """An eye and two visits: the second one finds it with thinner (or thicker) layers in some places.

    Args:
        config: how far they go.
        key: seed, or several numbers that together are one.
    """
    rng = np.random.default_rng(key)
    eye = _eye(config, rng)
    after = _changed(eye, config, rng)
    return eye, (_visit(eye, eye.thickness, config, rng), _visit(eye, after, config, rng))


def _eye(config: RetinaConfig, rng: np.random.Generator) -> Eye:
    half = config.grid.extent[1] / 2
    s = torch.arange(-half - 2 * MARGIN_MM, half + 2 * MARGIN_MM, 0.01)  # s is 0 in the middle of the average image
    fovea, nasal = rng.uniform(-0.5, 0.5), rng.choice((-1.0, 1.0))
    away = s - fovea
    pit = torch.exp(-0.5 * (away / 0.3) ** 2)
    rim = torch.exp(-0.5 * ((away.abs() - 1.0) / 0.45) ** 2)
    nasal_side = torch.sigmoid((nasal * away - 0.8) / 0.35)
    rows = []
    for number, (mm, _) in enumerate(LAYERS.values()):
        row = mm * rng.uniform(0.88, 1.12) * (1 + 0.06 * _wave(s, rng))
        if number < INNER:
            row = row * (1 + 0.35 * rim) * (1 - 0.97 * pit)
        if number == 0:  # nerve fibres gather towards the disc
            row = row * (0.5 + 1.4 * nasal_side)
        if number == INNER:
            row = row * (1 + 0.7 * pit)
        if number == len(LAYERS) - 1:
            row = row * (1 + 0.15 * _wave(s, rng))
        rows.append(row.clamp(min=THINNEST_MM))
    thickness = torch.stack(rows)
    # The pigment epithelium is bent like the eyeball, and so is all above it, but for the thicknesses.
    curve = -rng.uniform(0.004, 0.014) * s**2 + 0.006 * _wave(s, rng)
    above = thickness[:-1].sum(0)
    bend = curve - above + above.mean()
    lateral = Grid((4 * len(LAYERS) + 16, round(2 * (half + 2 * MARGIN_MM) / 0.02)), (0.25, 0.02), (-2.0, float(s[0])))
    noise = torch.from_numpy(rng.standard_normal((1, 1, *lateral.shape)).astype(np.float32))
    fine, broad = (smooth(noise, width, lateral) for width in ((0.2, 0.02), (0.3, 0.12)))
    coarse = smooth(noise.flip(-1), (0.15, 0.06), lateral)
    texture = 0.05 * fine / fine.std() + 0.05 * broad / broad.std()
    choroid = (torch.arange(lateral.shape[0]) * 0.25 - 2.0 >= len(LAYERS) - 1)[:, None]
    texture = texture + torch.where(choroid, 0.12 * coarse / coarse.std(), 0)  # vessels of the choroid
    count = int(rng.integers(config.vessels[0], config.vessels[1] + 1))
    sides = fovea + rng.choice((-1.0, 1.0), count) * rng.uniform(min(0.6, half / 2), half, count)
    vessels = np.stack([sides, rng.uniform(0.025, 0.06, count), config.shadow * rng.uniform(0.8, 1, count)], 1)
    return Eye(s, thickness, bend, texture, lateral, torch.from_numpy(vessels).float())


def _changed(eye: Eye, config: RetinaConfig, rng: np.random.Generator) -> Float[Tensor, "k w"]:
    """Thicknesses at the second visit: other ones, in one to three places."""
    factor = torch.ones_like(eye.thickness)
    half = config.grid.extent[1] / 2
    for place in range(int(rng.integers(1, 4))):
        first = int(rng.integers(0, len(LAYERS) - 2))
        last = first + int(rng.integers(1, 4))
        centre, width = rng.uniform(-0.8 * half, 0.8 * half), rng.uniform(*config.thinning_mm)
        loss = config.thinning * rng.uniform(0.4, 1)
        # The first place gets thinner; of the others one in three swells.
        sign = -1.0 if rng.random() < 0.67 or place == 0 else 0.6
        factor[first:last] *= 1 + sign * loss * torch.exp(-0.5 * ((eye.s_mm - centre) / width) ** 2)
    return (eye.thickness * factor).clamp(min=THINNEST_MM)


def _visit(eye: Eye, thickness: Tensor, config: RetinaConfig, rng: np.random.Generator) -> Visit:
    """Where a visit's image shows what: lateral position, tilt, jumps, and the boundaries that follow."""
    depth, width = config.grid.extent
    middle = config.grid.centre[1]
    x = torch.arange(-MARGIN_MM, width + MARGIN_MM, config.spacing_mm[1] / 2)
    # s'(x) = 1 + drift * wave: always positive.
    stretch = 1 + config.drift * _wave(x, rng)
    s = torch.cumsum(stretch, 0) * (config.spacing_mm[1] / 2)
    s = s - interpolated(torch.tensor([[middle]]), x[None], s[None])[0, 0] + config.lateral_mm * rng.uniform(-1, 1)
    slope = math.tan(math.radians(config.tilt_deg)) * rng.uniform(-1, 1)
    shift = config.retina_top * depth + config.offset_mm * rng.uniform(-1, 1)
    top = shift + slope * (x - middle) + _jumps(x, config, rng)
    lost = (eye.thickness - thickness)[:-1].sum(0)  # the choroid stays where it is; what is above comes down
    rows = torch.cat([torch.zeros_like(eye.bend)[None], thickness.cumsum(0)]) + eye.bend + lost
    at = interpolated(s[None].expand(len(rows), -1), eye.s_mm[None].expand(len(rows), -1), rows)
    return Visit(x, s, top + at, int(rng.integers(2**31)))


def _jumps(x: Tensor, config: RetinaConfig, rng: np.random.Generator) -> Tensor:
    """Blocks of columns, each at its own depth, with a steep but continuous step between two of them."""
    total = torch.zeros_like(x)
    if config.motion_mm == 0:
        return total
    edges, at, level = [], float(x[0]), 0.0
    while at < float(x[-1]):
        at += config.block_mm * rng.uniform(0.5, 1.5)
        edges.append(at)
    for edge in edges:
        new = config.motion_mm * rng.uniform(-1, 1)
        total = total + (new - level) * ((x - edge) / config.ramp_mm + 0.5).clamp(0, 1)
        level = new
    return total


def _wave(x: Tensor, rng: np.random.Generator) -> Tensor:
    """A smooth curve between -1 and 1: three sines of random phase, 2 to 8 mm long."""
    lengths, phases = rng.uniform(2, 8, 3), rng.uniform(0, 2 * np.pi, 3)
    return torch.stack([torch.sin(2 * np.pi * x / n + p) for n, p in zip(lengths, phases, strict=True)]).mean(0)
