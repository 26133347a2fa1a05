"""The picture of the synthetic thorax: grey values as a function of points of the inhaled frame.

Convention as in ``thorax``: mm and HU, relative to the patient's centre, RAS axes.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.spatial import cKDTree
from torch import Tensor

from regteach.data.breathing import Breathing, Lung, length
from regteach.data.thorax_anatomy import ThoraxConfig, Tree
from regteach.grid import Grid
from regteach.sampling import sample

AIR_HU = -1000.0
Painter = Callable[[Float[Tensor, "n d"]], tuple[Float[Tensor, "n"], Bool[Tensor, "n"]]]
# The frame that is the same for all patients, mm.
CHEST_WALL, SKIN_FAT, RIB_GAP, RIB_HALF, RIB_PITCH, RIB_SLANT = 22.0, 9.0, 8.0, (3.5, 5.5), 29.0, 0.35
SPINE_RADIUS, VERTEBRA, CANAL_RADIUS, WINDPIPE_RADIUS = 18.0, 27.0, 8.0, 9.0


def painter(p: ThoraxConfig, local: Breathing, trees: list[Tree], grid: Grid, rng: np.random.Generator) -> Painter:
    """The inhaled image as a function of points: HU without noise, and whether a point is in the body."""
    blur = p.blur_mm if p.blur_mm is not None else 0.4 * sum(grid.spacing) / grid.dim
    grain = Grid((round(400 / p.texture_mm),) * grid.dim, (p.texture_mm,), (-200.0 + p.texture_mm / 2,))
    texture = torch.from_numpy(rng.standard_normal((1, 1, *grain.shape), dtype=np.float32))
    vessels = [_Vessels(tree, blur) for tree in trees]

    def step(distance_mm: Tensor) -> Tensor:
        """0 outside, 1 inside, blurred."""
        return 0.5 * (1 + torch.erf(distance_mm / (blur * 2**0.5)))

    def draw(y: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n"], Bool[Tensor, "n"]]:
        noise = sample(texture, y[None], grain)[0, 0]
        x, front, z = y[:, 0], y[:, 1] if grid.dim == 3 else torch.full_like(y[:, 0], p.coronal_mm), y[:, -1]
        inner = p.mediastinum_mm
        half_width, half_depth = inner + 2 * p.lung_radius_mm[0] + CHEST_WALL, p.lung_radius_mm[1] + CHEST_WALL + 8
        skin = (
            1 - ((x / half_width).abs() ** 2.6 + ((front - p.coronal_mm) / half_depth).abs() ** 2.6) ** (1 / 2.6)
        ) * half_depth
        hu = p.fat_hu + (p.muscle_hu - p.fat_hu) * step(skin - SKIN_FAT)
        # Fat between the lungs, in it the heart.
        bulge = sum(p.heart_bulge_mm) / 2
        between = torch.exp(-((x / (inner + 15)) ** 4) - ((front - p.coronal_mm) / (0.8 * p.lung_radius_mm[1])) ** 4)
        hu = hu + 0.7 * between * step(p.apex_mm + 30 - z) * (p.fat_hu - hu)
        shift = (p.heart_bulge_mm[0] - p.heart_bulge_mm[1]) / 2
        heart = torch.stack([(x - shift) / (inner + bulge + 6), (front - 12) / 52, (z - p.heart_mm) / 62], -1)
        hu = hu + step((1 - length(heart)) * 50) * (p.muscle_hu - hu)
        hu = hu + p.texture_hu[1] * noise
        back = p.coronal_mm - p.lung_radius_mm[1]
        disc = step(((z / VERTEBRA + 0.5) % 1 - 0.5).abs() * VERTEBRA - 3.5)
        spine = step(SPINE_RADIUS - torch.hypot(x, front - back - 22))
        hu = hu + spine * (0.75 * p.bone_hu * disc + 90 * (1 - disc) - hu)
        hu = hu + step(SPINE_RADIUS - 4 - torch.hypot(0.6 * x, front - back + 16)) * (
            0.7 * p.bone_hu * disc + 45 * (1 - disc) - hu
        )
        hu = hu + step(CANAL_RADIUS - torch.hypot(x, front - back + 6)) * (30 - hu)
        chest = p.coronal_mm + p.lung_radius_mm[1] + 11
        plate = (
            step(17 - x.abs()) * step(5 - (front - chest).abs()) * step(z - p.heart_mm - 10) * step(p.apex_mm - 15 - z)
        )
        hu = hu + plate * (0.6 * p.bone_hu - hu)
        hu = hu + step(_windpipe(p, local, y, front)) * (AIR_HU + 10 - hu)
        for lung, tree in zip(local.lungs, vessels, strict=True):
            side = (x >= 0) if lung.sign > 0 else (x < 0)
            hu[side] = _lung_picture(p, lung, tree, step, y[side], front[side], hu[side], noise[side])
        return AIR_HU + step(skin) * (hu - AIR_HU), skin > 0

    return draw


def _lung_picture(
    p: ThoraxConfig,
    lung: Lung,
    tree: "_Vessels",
    step: Callable[[Tensor], Tensor],
    y: Float[Tensor, "n d"],
    front: Float[Tensor, "n"],
    hu: Float[Tensor, "n"],
    noise: Float[Tensor, "n"],
) -> Float[Tensor, "n"]:
    """One side of the body: its ribs, what is below the diaphragm, and the lung, over what is there already."""
    z = y[:, -1]
    centre, radius = lung.section(z, inhaled=True)
    w = (y[:, :-1] - centre) / radius
    q = lung.depth(w, z)
    outwards = (q - 1) * length(y[:, :-1] - centre) / q  # mm from the wall, along the ray from the lung's axis
    dome = lung.diaphragm(w, inhaled=True)
    organ = p.liver_hu if lung.sign > 0 else p.liver_hu - 15
    hu = hu + step(2 - outwards) * step(dome - z) * (organ + p.texture_hu[1] * noise - hu)
    slanted = (z + RIB_SLANT * front) / RIB_PITCH
    along = ((slanted - slanted.round()) * RIB_PITCH).abs()
    shell = step(RIB_HALF[0] - (outwards - RIB_GAP).abs()) * step(RIB_HALF[1] - along)
    shell = (
        shell * step(40 * (lung.sign * w[:, 0] / length(w) + 0.6)) * step(z - p.dome_mm + 60) * step(p.apex_mm - 12 - z)
    )
    hu = hu + shell * (p.bone_hu - hu)
    inside = step(-outwards) * step(z - dome) * step(p.apex_mm - z)
    near = inside > 1e-4
    tissue = (
        p.lung_hu - p.gravity_hu * (front[near] - p.coronal_mm) / p.lung_radius_mm[1] + p.texture_hu[0] * noise[near]
    )
    tissue = tissue + tree(y[near]) * (p.vessel_hu - tissue)
    hu[near] += inside[near] * (tissue - hu[near])
    return hu


def _windpipe(p: ThoraxConfig, local: Breathing, y: Float[Tensor, "n d"], front: Tensor) -> Float[Tensor, "n"]:
    """mm inside (positive) the windpipe and its first two branches."""
    low = 0.5 * (p.apex_mm + p.dome_mm) + 30
    points = torch.stack([y[:, 0], front, y[:, -1]], -1)
    fork = torch.tensor([0.0, p.coronal_mm, low])
    inner = p.mediastinum_mm + 8
    pieces = [(fork, torch.tensor([0.0, p.coronal_mm, 400.0]), WINDPIPE_RADIUS)]
    for lung in local.lungs:
        pieces.append((fork, torch.tensor([lung.sign * inner, p.coronal_mm, low - 28]), 0.7 * WINDPIPE_RADIUS))
    return torch.stack([r - _to_segment(points, a, b) for a, b, r in pieces]).amax(0)


def _to_segment(points: Float[Tensor, "n d"], a: Tensor, b: Tensor) -> Float[Tensor, "n"]:
    """Distance of points from pieces of a line: one piece for all, or one for each."""
    ab = b - a
    part = (((points - a) * ab).sum(-1) / ab.square().sum(-1).clamp_min(1e-9)).clamp(0, 1)
    return (points - a - part[..., None] * ab).norm(dim=-1)


class _Vessels:
    """How much of a point's surroundings is vessel, 0 to 1: the nearest vessel of each size, blurred."""

    def __init__(self, tree: Tree, blur: float, step_mm: float = 2.0) -> None:
        self.blur = blur
        self.groups = []
        order = np.argsort(tree.radii)
        thin, middle = np.searchsorted(tree.radii[order], (1.3, 2.8))
        for members in np.split(order, (thin, middle)):
            if len(members):
                a, b, radii = tree.starts[members], tree.ends[members], tree.radii[members]
                counts = np.ceil(np.linalg.norm(b - a, axis=1) / step_mm).astype(int) + 1
                owner = np.repeat(np.arange(len(members)), counts)
                place = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) / (
                    counts[owner] - 1
                ).clip(1)
                self.groups.append((cKDTree(a[owner] + place[:, None] * (b - a)[owner]), owner, a, b, radii))

    def __call__(self, points: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:
        most = torch.zeros(len(points))
        for finder, owner, a, b, radii in self.groups:
            _, nearest = finder.query(points.numpy(), distance_upper_bound=radii.max() + 3 * self.blur + 1)
            found = np.flatnonzero(nearest < len(owner))
            which = owner[nearest[found]]
            start, end, r = (torch.from_numpy(values[which]).float() for values in (a, b, radii))
            distance = _to_segment(points[found], start, end)
            spread = self.blur * 2**0.5
            # On the axis of a thin vessel the blur leaves 1 - exp(-r^2 / 2 blur^2); across it, a blurred edge.
            share = (
                (1 - torch.exp(-((r / spread) ** 2))) * torch.erfc((distance - r) / spread) / torch.erfc(-r / spread)
            )
            most[found] = torch.maximum(most[found], share)
        return most
