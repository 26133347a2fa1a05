"""Synthetic OCT B-scans of the retina: two visits of one eye, with the exact displacement between them.

Everything here is synthetic, and made to look like a B-scan: layers with their reflectivity, speckle, vessels with
their shadows, the pit of the fovea, tilt, eye motion during the scan, and layers that got thinner somewhere between
two visits. It is not a model of the optics and says nothing about disease.

Convention: axis 0 is depth, downwards (from the vitreous to the sclera), axis 1 is lateral; lengths in mm, where one
pixel is a few micrometres deep and several times as wide. Labels are the layers of :data:`LAYERS`, 1 to 9 from the
top; 0 is what lies above and below.

How the truth comes about: an eye has a lateral coordinate s of its own, and a coordinate of depth that counts layers
(2.5 is the middle of the third one). A visit says where in its image each s is, and, for every column, at which depths
the ten boundaries lie; in between, depth runs evenly. From a point of the fixed visit to the eye's own coordinates and
on to the moving visit: that is :class:`LayerMap`, without noise and without a fold. Texture belongs to the eye, speckle
to the visit.

Sources: what such images contain: Drexler and Fujimoto, Optical Coherence Tomography, 2015; speckle as the mean of
squared complex Gaussian fields: Goodman, Speckle Phenomena in Optics, 2007.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from regteach.data.cohort import SPLITS, Cohort, one_hot
from regteach.data.eyes import LAYERS, STRUCTURES, Eye, RetinaConfig, draw_visits
from regteach.data.intensity import normalised
from regteach.data.layers import LayerMap, Visit, layer_labels
from regteach.grid import Grid
from regteach.sampling import flat_points, sample, smooth

VITREOUS, SCLERA = 0.14, 0.42  # how bright what is above and below is shown
NOISE = 0.12  # how bright the instrument's noise is shown


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Retina(Cohort):
    """Two visits of each of many eyes; the other arguments are those of ``Cohort``.

    Args:
        visits: where each image shows what.
        clean: the images without speckle and noise, ``n 1 *grid``, scaled as the images are drawn, for looking.
    """

    visits: tuple[Visit, ...]
    clean: Float[Tensor, "n 1 *grid"]

    def truth(self, moving: int, fixed: int) -> LayerMap:
        """The exact transform between two images of one eye, fixed points to moving points.

        Raises:
            ValueError: if they show different eyes.
        """
        if self.people[moving] != self.people[fixed]:
            raise ValueError(f"Images {moving} and {fixed} show different eyes, and no transform between them is true.")
        return LayerMap.between(self.visits[fixed], self.visits[moving])

    def boundaries(self, index: int) -> Float[Tensor, "k w"]:
        """Depth of the ten boundaries in each column of one image, mm."""
        return self.visits[index].boundaries(self.grid)


def generate_retina(
    train: int = 40, validation: int = 8, test: int = 20, seed: int = 0, config: RetinaConfig | None = None
) -> Retina:
    """Draw eyes, and two visits of each: the pairs are (first, second) and (second, first).

    An eye depends on the seed, its split and its number alone. No eye is in two splits.

    Args:
        train: number of eyes to train on.
        validation: to validate.
        test: to test.
        seed: of everything.
        config: what the B-scans look like; the defaults of :class:`RetinaConfig` where left out.

    Raises:
        ValueError: for a negative number of eyes or seed, or no eye at all.
    """
    config = RetinaConfig() if config is None else config
    numbers = {"train": train, "validation": validation, "test": test}
    if min(*numbers.values(), seed) < 0 or not any(numbers.values()):
        raise ValueError(
            f"Numbers of eyes and the seed are 0 or more, and some eye is drawn, but not {numbers}, {seed}."
        )
    drawn = {
        (split, number): draw_visits(config, (seed, part, number))
        for part, split in enumerate(SPLITS)
        for number in range(numbers[split])
    }
    visits = [visit for _, pair in drawn.values() for visit in pair]
    scans = [render(eye, visit, config, visit.seed) for eye, pair in drawn.values() for visit in pair]
    labels = torch.stack([layer_labels(visit.boundaries(config.grid), config.grid) for visit in visits])
    places: dict[str, list[tuple[int, int]]] = {split: [] for split in SPLITS}
    for k, (split, _) in enumerate(drawn):
        places[split].append((2 * k, 2 * k + 1))
    return Retina(
        name="retina",
        images=normalised(torch.stack([image for image, _ in scans])),
        soi=one_hot(labels, STRUCTURES),
        labels=labels,
        grid=config.grid,
        people=tuple(f"{split} eye {number + 1}" for split, number in drawn for _ in range(2)),
        structures=STRUCTURES,
        splits={split: tuple(i for pair in pairs for i in pair) for split, pairs in places.items()},
        origin="Everything is synthetic: drawn B-scans of drawn eyes, two visits of each.",
        given_pairs={split: tuple((a, b) for m, f in ps for a, b in ((m, f), (f, m))) for split, ps in places.items()},
        visits=tuple(visits),
        clean=torch.stack([clean for _, clean in scans]),
    )


def render(
    eye: Eye, visit: Visit, config: RetinaConfig, seed: int
) -> tuple[Float[Tensor, "1 *grid"], Float[Tensor, "1 *grid"]]:
    """The B-scan of a visit, and the same without speckle and noise; the scale of both is that of a display.

    Args:
        eye: what is seen.
        visit: where it is seen.
        config: of speckle.
        seed: of speckle and noise.
    """
    grid = config.grid
    deep = grid.resized((3 * grid.shape[0], grid.shape[1]))  # layers of three pixels: averaged over thirds of a pixel
    s, layer = (part.unflatten(1, deep.shape)[0] for part in visit.coordinates(flat_points(deep)))
    shown = _brightness(eye, s, layer).clamp(min=0.02)
    # A display shows the fourth root of the reflected light, roughly. Light is what shadows take away.
    light = (shown**4 * _lit(eye, s, layer)).reshape(grid.shape[0], 3, grid.shape[1]).mean(1)
    generator = torch.Generator().manual_seed(seed)
    floor = NOISE**4 * _speckle(grid, config, generator)  # noise of the instrument, as grainy as speckle
    scan = light * _speckle(grid, config, generator) + floor
    return scan[None] ** 0.25, light[None] ** 0.25


def _brightness(eye: Eye, s: Tensor, layer: Tensor) -> Tensor:
    """How bright the display shows the eye at its own coordinates, without shadows."""
    levels = torch.tensor([VITREOUS, *(shown for _, shown in LAYERS.values()), SCLERA])
    which = layer.floor().clamp(-1, len(LAYERS)).long()
    shown = levels[which + 1]
    # Photoreceptors: a faint line at their upper border, a bright one below it. Elsewhere a layer is even.
    inside, receptors = layer - 6, which == 6
    shown = shown + torch.where(receptors, 0.30 * torch.exp(-0.5 * ((inside - 0.42) / 0.07) ** 2), 0)
    shown = shown - torch.where(receptors & (inside < 0.34), 0.14, 0)
    shown = shown + torch.where(receptors, 0.12 * torch.exp(-0.5 * (inside / 0.06) ** 2), 0)
    # Light fades in the choroid and below it, which counts millimetres beyond the last boundary.
    shown = shown - 0.10 * (layer - 8).clamp(0, 1) - 0.5 * (layer - 9).clamp(0, 0.5)
    texture = sample(eye.texture, torch.stack([layer, s], -1)[None], eye.texture_grid)[0, 0]
    tissue = (which >= 0) & (which < len(LAYERS))
    shown = shown + torch.where(tissue, texture, 0)
    for position, width, _ in eye.vessels.tolist():
        vessel = torch.exp(-0.5 * ((s - position) / width) ** 2 - 0.5 * ((layer - 0.7) / 0.5) ** 2)
        shown = shown + torch.where(tissue, 0.2 * vessel, 0)
    return shown


def _lit(eye: Eye, s: Tensor, layer: Tensor) -> Tensor:
    """The part of the light that the vessels above let through."""
    lit = torch.ones_like(s)
    for position, width, shadow in eye.vessels.tolist():
        lit = lit * (1 - shadow * torch.exp(-0.5 * ((s - position) / width) ** 2) * torch.sigmoid((layer - 1.4) / 0.1))
    return lit


def _speckle(grid: Grid, config: RetinaConfig, generator: torch.Generator) -> Float[Tensor, "*grid"]:
    """Factors of mean 1 with a gamma distribution of shape ``speckle_looks``: the mean of squared complex fields."""
    rim = [math.ceil(4 * sigma / h) + 1 for sigma, h in zip(config.speckle_mm, grid.spacing, strict=True)]
    wide = grid.padded(rim, rim)  # at the border of an image a blur is another one: what it spoils is cut off
    blurred = smooth(
        torch.randn((2 * config.speckle_looks, 1, *wide.shape), generator=generator), config.speckle_mm, wide
    )
    inner = blurred[:, 0, rim[0] : -rim[0], rim[1] : -rim[1]]
    impulse = torch.zeros(1, 1, *(2 * n + 1 for n in rim))
    impulse[0, 0, rim[0], rim[1]] = 1
    gain = smooth(impulse, config.speckle_mm, Grid(tuple(impulse.shape[2:]), grid.spacing)).square().sum().sqrt()
    return ((inner / gain) ** 2).mean(0)
