"""Random changes of images and their structures, to learn from more people and scanners than there are.

Each change is drawn from the generator that is given, so an item of a training run is the same whenever it is drawn.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regteach.affine import AffineBounds
from regteach.data.cohort import Synthesis
from regteach.data.deformations import composed
from regteach.grid import Grid
from regteach.sampling import grid_points, resample, sample, smooth


@dataclass(frozen=True)
class Augmentation:
    """How far each change goes; 0 (or a ratio of 1) leaves it out. Every image draws its own.

    Args:
        shift_mm, rotation_deg, scale_ratio, shear: of a random affine.
        warp_mm: largest displacement of a smooth, fold-free deformation.
        warp_spacing_mm: its length scale.
        gamma: contrast, intensity ** (exp of a uniform number up to this).
        lift: how far the darkest signal may be lifted above the background, or by a quarter of that put down to it,
            x -> l + (1 - l) x with l from -lift / 4 to lift: a few dark voxels at the rim of a brain put the lower end
            of the scale far below its tissues, and without them it is among these.
        bias: amplitude of a smooth multiplicative field, in its logarithm.
        noise: largest standard deviation of Gaussian noise.
        blur_mm: largest standard deviation of a blur.
        synthetic: probability of a contrast drawn from the tissue map in the place of the image's own.

    Raises:
        ValueError: for a change that makes no sense.
    """

    shift_mm: float = 0.0
    rotation_deg: float = 0.0
    scale_ratio: float = 1.0
    shear: float = 0.0
    warp_mm: float = 0.0
    warp_spacing_mm: float = 16.0
    gamma: float = 0.0
    lift: float = 0.0
    bias: float = 0.0
    noise: float = 0.0
    blur_mm: float = 0.0
    synthetic: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least, most = {"scale_ratio": (1.0, math.inf), "synthetic": (0.0, 1.0), "lift": (0.0, 1.0)}.get(
                name, (0.0, math.inf)
            )
            if not least <= value <= most or math.isinf(value):
                raise ValueError(f"{name} of an augmentation is from {least:g} to {most:g}, not {value}.")
        if self.warp_spacing_mm == 0:
            raise ValueError("warp_spacing_mm is a length scale and can not be 0.")

    @property
    def moves(self) -> bool:
        """Whether any of the changes moves the image."""
        return bool(self.shift_mm or self.rotation_deg or self.scale_ratio > 1 or self.shear or self.warp_mm)


def augmented(
    image: Float[Tensor, "1 c *grid"],
    soi: Float[Tensor, "1 k *grid"],
    grid: Grid,
    settings: Augmentation,
    generator: torch.Generator,
    tissue: Int[Tensor, "1 *grid"] | None = None,
    synthesis: Synthesis | None = None,
) -> tuple[Float[Tensor, "1 c *grid"], Float[Tensor, "1 k *grid"]]:
    """One image and its structures, changed at random: moved together, then the image's intensities alone.

    Args:
        image: in [0, 1].
        soi: its structures.
        grid: of both; what moves in from outside repeats the outermost voxel.
        settings: how far to go.
        generator: source of all random numbers, on the CPU.
        tissue: the map from which a contrast is drawn.
        synthesis: draws it.

    Returns:
        The image, in [0, 1], and the structures.

    Raises:
        ValueError: if synthetic contrasts are asked for, and there is nothing to draw them from.
    """
    draw = _draw(generator)
    if settings.synthetic and (tissue is None or synthesis is None):
        raise ValueError("A synthetic contrast is asked for, but there is no tissue map to draw it from.")
    # From here on the tissue map is there exactly when its contrast takes the place of the image.
    if settings.synthetic == 0 or draw() >= settings.synthetic:
        tissue = None
    if settings.moves:
        bounds = AffineBounds(
            settings.shift_mm, settings.rotation_deg, settings.scale_ratio, shear_ratio=settings.shear
        )
        motion = composed(
            grid, bounds, settings.warp_spacing_mm, settings.warp_mm, generator, fold_free=settings.warp_mm > 0
        )
        where = grid_points(grid)[None] + motion.displacement_on(grid)
        soi = sample(soi, where, grid)
        if tissue is not None:
            tissue = sample(tissue[:, None].float(), where, grid, order=0)[:, 0].long()
        else:
            image = sample(image, where, grid)
    if tissue is not None and synthesis is not None:
        image = synthesis(tissue, grid, generator)
    return intensities(image, grid, settings, generator), soi


def intensities(
    image: Float[Tensor, "1 c *grid"], grid: Grid, settings: Augmentation, generator: torch.Generator
) -> Float[Tensor, "1 c *grid"]:
    """Another scanner: contrast, bias field, blur and noise; background that is exactly 0 stays 0."""
    draw = _draw(generator)
    inside = image > 0
    if settings.blur_mm:
        image = smooth(image, settings.blur_mm * draw(), grid)
    if settings.gamma:
        image = image.clamp(0, 1) ** float(torch.tensor((2 * draw() - 1) * settings.gamma).exp())
    if settings.lift:
        low = settings.lift * (1.25 * draw() - 0.25)
        image = low + (1 - low) * image
    if settings.bias:
        coarse = grid.resized((4,) * grid.dim)
        field = settings.bias * (2 * torch.rand((1, 1, *coarse.shape), generator=generator) - 1)
        image = image * resample(smooth(field, max(coarse.spacing) * 0.5, coarse), coarse, grid).exp()
    if settings.noise:
        image = image + settings.noise * draw() * torch.randn(image.shape, generator=generator)
    return torch.where(inside, image.clamp(0, 1), torch.zeros_like(image))


def _draw(generator: torch.Generator):  # type: ignore[no-untyped-def]
    return lambda: float(torch.rand((), generator=generator))
