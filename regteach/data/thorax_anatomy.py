"""What the synthetic thorax is made of: its lengths and grey values, how it moves, and its vessels.

Convention as in ``thorax``: mm and HU, relative to the patient's centre, RAS axes. Everything here is drawn in the
inhaled frame.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.polynomial import chebyshev

from regteach.data.breathing import Breathing, Lung, Terms
from regteach.grid import Grid

SIZES = ("lung_radius_mm", "apex_mm", "mediastinum_mm", "heart_bulge_mm", "dome_depth_mm")  # vary between patients
MOTIONS = ("diaphragm_rise_mm", "diaphragm_flattening_mm", "rib_growth_mm")


@dataclass(frozen=True)
class ThoraxConfig:
    """Every length in mm, every grey value in HU; pairs are (sideways, to the front) or (right, left) as said.

    Args:
        lung_radius_mm: half widths of an inhaled lung, sideways and to the front.
        apex_mm: height of the lungs' tips above the middle of the image.
        cap_mm: below the tip, over this length, a lung widens to its full width.
        coronal_mm: the lungs' axes are so far in front of (or behind) the middle; a 2D image lies there.
        mediastinum_mm: distance of the lungs from the midline.
        heart_bulge_mm: by how much the heart pushes the right and the left lung away from the midline.
        heart_mm: height of the heart's middle.
        heart_length_mm: its extent along the body, as a standard deviation.
        hollow: how much of its radius a lung lacks in the direction of the heart.
        dome_mm: height of the inhaled diaphragm's summit.
        dome_depth_mm: by how much its edge is lower.
        summit: where the summit is, in half widths: towards the midline, to the front.
        diaphragm_rise_mm: how much higher the summit is when exhaled.
        diaphragm_flattening_mm: by how much less the edge rises.
        abdomen_mm: height of the level that stays when the diaphragm moves.
        rib_growth_mm: how far the ribs move out from exhale to inhale, sideways and to the front.
        wall_decay_mm: over which distance outside the lung this fades to 1 / e.
        uneven: largest k of ``breathing``: how unevenly a lung opens along its height.
        variation: standard deviation between patients, relative: sizes, motions. (0, 0): all alike but for their trees.
        vessel_tips: ends of the tree of one lung, in 2D and in 3D; forks are one less.
        vessel_tip_mm: radius of a vessel there.
        murray: exponent of Murray's law.
        blur_mm: standard deviation of the scanner's blur; left out, 0.4 of the grid's mean spacing.
        noise_hu: standard deviation of the noise, independent in every voxel of both images.
        texture_hu: of the correlated texture of lung and of soft tissue.
        texture_mm: its grain.
        lung_hu: inhaled lung tissue between the vessels.
        gravity_hu: how much denser it is half a width to the back.
        vessel_hu: vessels.
        muscle_hu: soft tissue.
        fat_hu: the layer below the skin, and around the heart.
        liver_hu: below the right dome, and below the left one 15 less.
        bone_hu: ribs and spine.
    """

    lung_radius_mm: tuple[float, float] = (64.0, 90.0)
    apex_mm: float = 128.0
    cap_mm: float = 130.0
    coronal_mm: float = 0.0
    mediastinum_mm: float = 15.0
    heart_bulge_mm: tuple[float, float] = (12.0, 30.0)
    heart_mm: float = -40.0
    heart_length_mm: float = 45.0
    hollow: float = 0.3
    dome_mm: float = -78.0
    dome_depth_mm: float = 34.0
    summit: tuple[float, float] = (0.25, 0.15)
    diaphragm_rise_mm: float = 38.0
    diaphragm_flattening_mm: float = 8.0
    abdomen_mm: float = -260.0
    rib_growth_mm: tuple[float, float] = (7.0, 9.0)
    wall_decay_mm: float = 40.0
    uneven: float = 0.3
    variation: tuple[float, float] = (0.05, 0.15)
    vessel_tips: tuple[int, int] = (120, 800)
    vessel_tip_mm: float = 0.65
    murray: float = 2.8
    blur_mm: float | None = None
    noise_hu: float = 15.0
    texture_hu: tuple[float, float] = (20.0, 12.0)
    texture_mm: float = 6.0
    lung_hu: float = -870.0
    gravity_hu: float = 35.0
    vessel_hu: float = 40.0
    muscle_hu: float = 45.0
    fat_hu: float = -95.0
    liver_hu: float = 85.0
    bone_hu: float = 420.0

    def __post_init__(self) -> None:
        if not 0 <= self.uneven < 1:
            raise ValueError(f"uneven is at least 0 and below 1 (above, a lung would fold), not {self.uneven}.")
        if self.apex_mm - self.dome_mm - self.diaphragm_rise_mm < 20 or self.abdomen_mm > self.dome_mm - 100:
            raise ValueError(
                f"The exhaled dome, at {self.dome_mm + self.diaphragm_rise_mm:g} mm, has to lie 20 mm below the apex at"
                f" {self.apex_mm:g} mm, and the inhaled one 100 mm above the level that stays, {self.abdomen_mm:g} mm."
            )


@dataclass(frozen=True)
class Tree:
    """Vessels as straight pieces, in the patient's inhaled frame, mm: starts and ends ``n d``, radii ``n``."""

    starts: np.ndarray
    ends: np.ndarray
    radii: np.ndarray
    forks: np.ndarray  # ``m d``


ADULT = ThoraxConfig()


def individual(config: ThoraxConfig, rng: np.random.Generator) -> ThoraxConfig:
    """The average patient with sizes and motions of its own, each within two standard deviations."""

    def varied(names: tuple[str, ...], deviation: float) -> dict[str, float | tuple[float, ...]]:
        changed: dict[str, float | tuple[float, ...]] = {}
        for name in names:
            value = getattr(config, name)
            factors = 1 + deviation * np.clip(rng.standard_normal(np.size(value)), -2, 2)
            changed[name] = (
                tuple((np.asarray(value) * factors).tolist()) if np.ndim(value) else value * float(factors[0])
            )
        return changed

    sizes, motions = varied(SIZES, config.variation[0]), varied(MOTIONS, config.variation[1])
    return replace(config, **sizes, **motions)  # type: ignore[arg-type]


def motion(p: ThoraxConfig, grid: Grid, rng: np.random.Generator) -> Breathing:
    """The patient's lungs in both phases. In 2D w has one axis: the same numbers without those of the second."""
    lateral = grid.dim - 1
    heights = (-170.0, 170.0)

    def heart(x: np.ndarray) -> np.ndarray:
        return np.exp(-(((heights[1] * x - p.heart_mm) / p.heart_length_mm) ** 2))

    lungs = []
    for side, sign in enumerate((1.0, -1.0)):
        # The heart takes from the lung's inner side: the outer wall stays where it would be.
        bulge = p.heart_bulge_mm[side] * np.asarray(chebyshev.chebinterpolate(heart, 9), dtype=float)  # type: ignore
        # Towards the heart: inwards and to the front. A bump over the angle as a Fourier series, as Lung wants it.
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        bump = np.log(1 - p.hollow * np.exp(4 * (np.cos(angles - np.deg2rad(140)) - 1)))
        spectrum = np.fft.rfft(bump)[:6] / 32
        shape = tuple(((float(c.real) / (2 if j == 0 else 1),), (-float(c.imag),)) for j, c in enumerate(spectrum))
        summit = np.array([-sign * p.summit[0], p.summit[1]])[:lateral]
        tilt = rng.uniform(-1, 1, 2)[:lateral] * p.uneven / 4
        lungs.append(
            Lung(
                sign=sign,
                apex=p.apex_mm,
                cap=p.cap_mm,
                floor=p.abdomen_mm,
                heights=heights,
                medial=(p.mediastinum_mm + bulge[0], *bulge[1:].tolist()),
                centre=((p.coronal_mm,),)[: lateral - 1],
                radius=((p.lung_radius_mm[0] - bulge[0] / 2, *(-bulge[1:] / 2).tolist()), (p.lung_radius_mm[1],))[
                    :lateral
                ],
                shape=shape,
                dome=_bowl(p.dome_mm, p.dome_depth_mm, summit),
                rise=_bowl(p.diaphragm_rise_mm, p.diaphragm_flattening_mm, summit),
                uneven=(float(rng.uniform(-0.5, 0.5)) * p.uneven, *tilt.tolist()),
                growth=p.rib_growth_mm[:lateral],
                growth_above=p.dome_mm,
                growth_fade=90.0,
            )
        )
    return Breathing((lungs[0], lungs[1]), grid.centre, p.wall_decay_mm)


def _bowl(top: float, depth: float, summit: np.ndarray) -> Terms:
    """top - depth |w - summit|^2 as a polynomial."""
    unit = np.eye(len(summit), dtype=int)
    terms: list[tuple[tuple[int, ...], float]] = [((0,) * len(summit), top - depth * float(summit @ summit))]
    for axis, m in enumerate(summit):
        terms.append((tuple(unit[axis].tolist()), 2 * depth * float(m)))
        terms.append((tuple((2 * unit[axis]).tolist()), -depth))
    return tuple(terms)


def grow_tree(lung: Lung, local: Breathing, p: ThoraxConfig, tips: int, rng: np.random.Generator) -> Tree:
    """Grow a tree from the hilum into a cloud of points that fills the inhaled lung.

    Each branch runs part of the way to the middle of its cloud, which is then cut in two along the branch.
    """
    dim = len(local.centre)
    z = torch.tensor([0.5 * (p.apex_mm + p.dome_mm)])
    centre, radius = lung.section(z, inhaled=True)
    inwards = torch.zeros(dim - 1)
    inwards[0] = -0.6 * lung.sign
    hilum = torch.cat([(centre + radius * inwards)[0], z]).double().numpy()
    cloud, rounds = np.empty((0, dim)), 0
    while len(cloud) < tips:
        rounds += 1
        if rounds > 100:
            raise ValueError(
                "These lengths leave hardly any lung between the diaphragm and the apex to grow vessels in."
            )
        across_unit, height = (
            rng.uniform(-1, 1, (8 * tips, dim - 1)),
            rng.uniform(p.dome_mm - 120, p.apex_mm - 5, 8 * tips),
        )
        middles, widths = (a.numpy() for a in lung.section(torch.from_numpy(height), inhaled=True))
        points = torch.from_numpy(np.c_[middles + 0.93 * widths * across_unit, height])
        above_floor = points - torch.tensor([0.0] * (dim - 1) + [5.0])
        # Drawn evenly in w: fewer are kept where the section is narrow, so that space is filled evenly.
        even = rng.uniform(size=len(points)) < (widths / np.asarray(p.lung_radius_mm[: dim - 1])).prod(-1)
        good = even & lung.holds(points, inhaled=True).numpy() & lung.holds(above_floor, inhaled=True).numpy()
        cloud = np.concatenate([cloud, points.numpy()[good]])
    starts, ends, radii, forks = [], [], [], []
    stack: list[tuple[np.ndarray, np.ndarray]] = [(hilum, cloud[:tips])]
    while stack:
        start, members = stack.pop()
        middle = members.mean(0)
        end = start + (0.45 if len(members) > 1 else 1.0) * (middle - start)
        starts.append(start)
        ends.append(end)
        radii.append(p.vessel_tip_mm * len(members) ** (1 / p.murray))
        if len(members) == 1:
            continue
        forks.append(end)
        along = (middle - start) / max(float(np.linalg.norm(middle - start)), 1e-9)
        offsets = members - middle
        across = offsets - np.outer(offsets @ along, along)
        widest = np.linalg.eigh(across.T @ across)[1][:, -1]
        order = np.argsort(across @ widest)
        cut = min(max(1, round(len(members) * rng.uniform(0.35, 0.65))), len(members) - 1)
        stack += [(end, members[order[:cut]]), (end, members[order[cut:]])]
    marks = torch.from_numpy(np.array(forks))
    kept = lung.holds(marks, inhaled=True).numpy()
    return Tree(np.array(starts), np.array(ends), np.array(radii), np.array(forks)[kept])
