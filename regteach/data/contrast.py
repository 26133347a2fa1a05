"""Brain images from maps of tissue: random contrasts to learn from, and one fixed T1-like contrast to look at.

A network that has seen one scanner knows that scanner. One that has seen a new contrast, bias field, blur and noise in
every image it was shown can rely on none of them, only on the anatomy: it then also works on real images that it never
saw (Billot et al.). :func:`synthesise` draws such images, :func:`t1_like` a plausible T1 of the same map. Neither is a
measurement, and whoever shows one says so.

An image is made in the order in which a scanner spoils it: a value for each tissue, its texture, the head's outline
(skull-stripped, now and then badly), the resolution of the scan (blur, and thick slices along one axis), the bias
field, noise, gamma, a cropped field of view, and the scale [0, 1] between two percentiles.

Convention: tissue maps ``b *grid`` with the numbers of :data:`TISSUES`; images ``b 1 *grid``; lengths in mm. All
random numbers come from the generator. A new draw of parameters for every image of the batch.

Source of the idea: Billot et al., SynthSeg: segmentation of brain MRI scans of any contrast and resolution without
retraining, Medical Image Analysis 86 (2023). The stages, their ranges and the code are ours.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regteach import bspline
from regteach.data.intensity import PERCENTILES
from regteach.grid import Grid

# The structures come last, so that 9 is the first of them; numbers above 15 are lesions, and tissue outside the brain.
TISSUES = {
    "background": 0,
    "csf": 1,
    "cortex": 2,
    "white matter": 3,
    "ventricle": 4,
    "cerebellar cortex": 5,
    "cerebellar white matter": 6,
    "brainstem": 7,
    "ventral diencephalon": 8,
    "thalamus": 9,
    "caudate": 10,
    "putamen": 11,
    "pallidum": 12,
    "accumbens": 13,
    "hippocampus": 14,
    "amygdala": 15,
    "lesion": 16,
}
OUTSIDE = 17  # the first number of tissue outside the brain: skull, scalp, muscle
MOST = 64  # numbers of tissues are below this
GRADUAL = ("thalamus", "pallidum", "ventral diencephalon", "brainstem", "cerebellar white matter")
# How bright a T1 shows each tissue, white matter being 1.
T1 = {
    "background": 0.0,
    "csf": 0.28,
    "cortex": 0.70,
    "white matter": 1.0,
    "ventricle": 0.24,
    "cerebellar cortex": 0.68,
    "cerebellar white matter": 0.93,
    "brainstem": 0.89,
    "ventral diencephalon": 0.88,
    "thalamus": 0.84,
    "caudate": 0.73,
    "putamen": 0.79,
    "pallidum": 0.90,
    "accumbens": 0.73,
    "hippocampus": 0.70,
    "amygdala": 0.69,
    "lesion": 0.80,
}


@dataclass(frozen=True)
class Contrast:
    """How far a drawn image may go. A number is the largest value of a uniform draw from 0, unless said otherwise.

    Args:
        t1_like: probability of the tissues' order in a T1; the rest have values at random.
        reversed_t1: probability, among the rest, of that order upside down (as in a T2) instead.
        spread: standard deviation of a tissue's value about its T1 value; white matter is 1.
        texture: standard deviation of the values within a tissue.
        blur_vox: smallest and largest standard deviation of the blur that mixes neighbouring tissues, voxels.
        soft: largest weight of a wide blur in the structures whose border with the white matter is gradual.
        thick_slices: probability of slices thicker than the voxels, along one axis.
        slice_mm: their thickness, if there are any.
        bias: standard deviation of the logarithm of the bias field.
        bias_spacing_mm: smallest and largest distance between the field's control points.
        noise: standard deviation of the noise of the scan; white matter, or the brightest tissue, is 1.
        log_gamma: largest logarithm of gamma, either way.
        stripped: probability that all is 0 outside the brain.
        rim: probability that a stripped brain keeps an outer rim of fluid, of random width.
        leaky: probability that the rim takes in what lies outside the brain, where the map has that.
        hindbrain_left_out: probability that cerebellum and brainstem are missing, as in a crop.
        cropped: probability that a part of the field of view is empty, from one side.
        crop: largest part of that axis which is empty.
    """

    t1_like: float = 0.5
    reversed_t1: float = 0.3
    spread: float = 0.06
    texture: float = 0.06
    blur_vox: tuple[float, float] = (0.4, 0.9)
    soft: float = 0.6
    thick_slices: float = 0.3
    slice_mm: float = 6.0
    bias: float = 0.3
    bias_spacing_mm: tuple[float, float] = (40.0, 120.0)
    noise: float = 0.06
    log_gamma: float = 0.4
    stripped: float = 0.95
    rim: float = 0.85
    leaky: float = 0.2
    hindbrain_left_out: float = 0.05
    cropped: float = 0.1
    crop: float = 0.15


def synthesise(
    tissue: Int[Tensor, "b *grid"], grid: Grid, generator: torch.Generator, config: Contrast = Contrast()
) -> Float[Tensor, "b 1 *grid"]:
    """One random image of each tissue map, in [0, 1].

    Args:
        tissue: numbers of :data:`TISSUES`, or from :data:`OUTSIDE` on for what is not brain.
        grid: of the maps.
        generator: source of all random numbers, on any device.
        config: how far to go.

    Raises:
        ValueError: if the maps do not fit the grid, or hold a number that is no tissue.
    """
    _check(tissue, grid)
    return torch.stack([_draw(item, grid, config, _Dice(generator, tissue.device)) for item in tissue.long()])


def t1_like(
    tissue: Int[Tensor, "b *grid"], grid: Grid, generator: torch.Generator, values: Mapping[str, float] = T1
) -> Float[Tensor, "b 1 *grid"]:
    """A plausible, skull-stripped T1 of each tissue map, in [0, 1]: mild noise and bias, the same contrast for all.

    Arguments as in :func:`synthesise`; ``values`` is how bright each tissue is: other ones give another contrast.
    """
    _check(tissue, grid)
    return torch.stack([_plain(item, grid, _Dice(generator, tissue.device), values) for item in tissue.long()])


class _Dice:
    """Random numbers of one generator, sent to the device where they are needed."""

    def __init__(self, generator: torch.Generator, device: torch.device):
        self.generator, self.device = generator, device

    def uniform(self, low: float, high: float) -> float:
        number = torch.rand((), generator=self.generator, device=self.generator.device)
        return low + (high - low) * float(number)

    def happens(self, probability: float) -> bool:
        return self.uniform(0, 1) < probability

    def one_of(self, n: int) -> int:
        return min(n - 1, int(self.uniform(0, n)))

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.generator.device).to(self.device)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device).to(self.device)


def _draw(tissue: Int[Tensor, "*grid"], grid: Grid, config: Contrast, dice: _Dice) -> Float[Tensor, "1 *grid"]:
    """One random image, stage by stage."""
    means = _means(config, dice)
    spreads = config.texture * dice.rand(MOST) * dice.uniform(0.3, 1)
    stripped = dice.happens(config.stripped)
    if stripped:
        tissue = _stripped(tissue, grid, config, dice)
        means[0] = spreads[0] = 0
    image = _blended(means[tissue], tissue, grid, config.soft * dice.uniform(0, 1))
    image = _blurred(image + spreads[tissue] * _grain(grid, dice), dice.uniform(*config.blur_vox))
    if dice.happens(config.thick_slices):
        image = _sliced(image, grid, dice.one_of(grid.dim), dice.uniform(0.4, 1) * config.slice_mm)
    image = image * _bias_field(grid, config.bias * dice.uniform(0, 1), config.bias_spacing_mm, dice)
    noise = config.noise * dice.uniform(0, 1)
    image = image + noise * dice.randn(*grid.shape)
    if stripped:  # before the scale is chosen: noise and blur outside are no signal
        image = image * (tissue > 0)
    image = _scaled(image)
    image = image ** math.exp(dice.uniform(-config.log_gamma, config.log_gamma))
    if stripped:
        image = image * (tissue > 0)
    if dice.happens(config.cropped):
        image = _cropped(image, dice.one_of(grid.dim), config.crop * dice.uniform(0, 1), dice.happens(0.5))
    return image[None]


def _plain(
    tissue: Int[Tensor, "*grid"], grid: Grid, dice: _Dice, values: Mapping[str, float]
) -> Float[Tensor, "1 *grid"]:
    means = torch.zeros(MOST, device=dice.device)
    means[: len(TISSUES)] = torch.tensor([values[name] for name in TISSUES], device=dice.device)
    tissue = torch.where(tissue >= OUTSIDE, 0, tissue)
    image = _blended(means[tissue], tissue, grid, 0.3) + 0.03 * (tissue > 0) * _grain(grid, dice)
    image = _blurred(image, 0.5) * _bias_field(grid, 0.03, (80.0, 80.0), dice)
    image = image + 0.012 * dice.randn(*grid.shape)
    # Masked before the scale is chosen, as any image is read: what is outside is no signal.
    return (_scaled(image * (tissue > 0)) * (tissue > 0))[None]


def _means(config: Contrast, dice: _Dice) -> Float[Tensor, "tissues"]:
    """A value for each number of a tissue; the highest of the brain is about 1."""
    means = 0.05 + 0.95 * dice.rand(MOST)
    t1 = torch.tensor([T1[name] for name in TISSUES], device=dice.device)
    kind = dice.uniform(0, 1)
    order = t1 + config.spread * dice.randn(len(t1))
    # How far the greys are from the whites differs between scanners, more than single tissues differ from each other.
    stretch = dice.uniform(0.7, 1.7)
    order = 1 - stretch * (1 - order)
    if kind < config.t1_like:
        means[: len(t1)] = order
    elif kind < config.t1_like + (1 - config.t1_like) * config.reversed_t1:
        means[: len(t1)] = 1.15 - order
    means[0] = 0.1 * dice.uniform(0, 1)
    return means.clamp(0.02, 1.3)


def _stripped(tissue: Int[Tensor, "*grid"], grid: Grid, config: Contrast, dice: _Dice) -> Int[Tensor, "*grid"]:
    """The brain alone, or with a rim of random width of the fluid around it, and now and then of the skull.

    Blurred, the brain without its fluid is a number that falls with the distance from it; where it is above a random
    level is inside. Wide blurs close the folds, so that narrow ones lose their fluid last, as in a real stripping.
    """
    inside = (tissue > 0) & (tissue < OUTSIDE)
    solid = inside & (tissue != TISSUES["csf"])
    if dice.happens(config.rim):
        near = _widely_blurred(solid.float(), grid, dice.uniform(2.0, 5.0))
        reach = tissue > 0 if dice.happens(config.leaky) else inside
        keep = solid | (reach & (near > dice.uniform(0.03, 0.3)))
    else:
        keep = solid
    if dice.happens(config.hindbrain_left_out):
        first, last = TISSUES["cerebellar cortex"], TISSUES["brainstem"]
        keep = keep & ~((tissue >= first) & (tissue <= last))
    return torch.where(keep, tissue, 0)


def _blended(
    image: Float[Tensor, "*grid"], tissue: Int[Tensor, "*grid"], grid: Grid, weight: float
) -> Float[Tensor, "*grid"]:
    """Structures full of fibres have no sharp border with the white matter: there, partly, a wide blur of the image."""
    gradual = torch.zeros(MOST, device=image.device)
    gradual[[TISSUES[name] for name in GRADUAL]] = weight
    return torch.lerp(image, _widely_blurred(image, grid, 3.0), gradual[tissue])


def _grain(grid: Grid, dice: _Dice) -> Float[Tensor, "*grid"]:
    """Noise of about unit variance: half of it from voxel to voxel, half of it in lumps of a few millimetres."""
    lumps = _enlarged(dice.randn(*(max(2, round(length / 5)) for length in grid.extent)), grid)
    return (1.7 * lumps + dice.randn(*grid.shape)) * math.sqrt(0.5)  # 1.7: interpolation makes noise smaller


def _bias_field(grid: Grid, size: float, spacing_mm: tuple[float, float], dice: _Dice) -> Float[Tensor, "*grid"]:
    """A smooth field about 1: the exponential of a cubic spline with random coefficients."""
    ctrl = bspline.control_grid(grid, dice.uniform(*spacing_mm))
    coarse = grid.resized([max(2, n // 4) for n in grid.shape])
    field = bspline.evaluate_grid(dice.randn(1, *ctrl.shape, 1), ctrl, coarse)[0, ..., 0]
    field = size * (field - field.mean()) / field.std()
    return torch.exp(_enlarged(field, grid))


def _enlarged(coarse: Float[Tensor, "*coarse"], grid: Grid) -> Float[Tensor, "*grid"]:
    """Linear interpolation between voxels that share the outer faces of the grid."""
    mode = "trilinear" if grid.dim == 3 else "bilinear"
    return F.interpolate(coarse[None, None], grid.shape, mode=mode)[0, 0]


def _widely_blurred(image: Float[Tensor, "*grid"], grid: Grid, sigma_mm: float) -> Float[Tensor, "*grid"]:
    """A blur of more than a voxel, at half the resolution."""
    pool = F.avg_pool3d if grid.dim == 3 else F.avg_pool2d
    half = pool(image[None, None], 2, ceil_mode=True)[0, 0]
    for axis in range(grid.dim):
        half = _averaged(half, axis, sigma_mm / (2 * grid.spacing[axis]))
    return _enlarged(half, grid)


def _blurred(image: Float[Tensor, "*grid"], sigma_vox: float) -> Float[Tensor, "*grid"]:
    """A Gaussian of less than a voxel, two voxels to either side along each axis."""
    for axis in range(image.ndim):
        image = _averaged(image, axis, sigma_vox, reach=2)
    return image


def _averaged(
    image: Float[Tensor, "*grid"], axis: int, sigma_vox: float, reach: int | None = None
) -> Float[Tensor, "*grid"]:
    """Along one axis, a Gaussian average over the voxels that are there: a border is no darker than what is inside."""
    at = torch.arange(image.shape[axis], device=image.device)
    apart = (at[:, None] - at).abs()
    weights = torch.exp(-0.5 * (apart / sigma_vox) ** 2)
    if reach is not None:
        weights = weights * (apart <= reach)
    return torch.tensordot(image, _rows(weights), dims=([axis], [1])).movedim(-1, axis)


def _sliced(image: Float[Tensor, "*grid"], grid: Grid, axis: int, thickness_mm: float) -> Float[Tensor, "*grid"]:
    """Averaged over slices of this thickness along one axis, and read at our voxels again, linearly."""
    n, spacing = grid.shape[axis], grid.spacing[axis]
    if thickness_mm <= spacing:
        return image
    at = torch.arange(n, device=image.device) * spacing
    count = max(2, math.ceil(n * spacing / thickness_mm))
    slices = torch.arange(count, device=image.device) * thickness_mm
    # A voxel belongs to a slice as far as the two overlap.
    average = _rows(((thickness_mm + spacing) / 2 - (slices[:, None] - at).abs()).clamp(0, spacing))
    between = _rows((1 - (at[:, None] - slices).abs() / thickness_mm).clamp(min=0))
    return torch.tensordot(image, between @ average, dims=([axis], [1])).movedim(-1, axis)


def _rows(weights: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-12)


def _scaled(image: Float[Tensor, "*grid"]) -> Float[Tensor, "*grid"]:
    """To [0, 1] between the percentiles of what is not 0, counted on one voxel in eight."""
    part = image[(slice(None, None, 2),) * image.ndim]
    signal = part[part.abs() > 1e-3].sort().values
    if len(signal) < 2:
        return torch.zeros_like(image)
    low, high = (signal[round(p / 100 * (len(signal) - 1))] for p in PERCENTILES)
    return ((image - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def _cropped(image: Float[Tensor, "*grid"], axis: int, part: float, at_the_end: bool) -> Float[Tensor, "*grid"]:
    n = image.shape[axis]
    empty = round(part * n)
    keep = torch.ones(n, device=image.device)
    keep[n - empty if at_the_end else 0 : n if at_the_end else empty] = 0
    return image * keep.reshape(-1, *[1] * (image.ndim - 1 - axis))


def _check(tissue: Tensor, grid: Grid) -> None:
    if tuple(tissue.shape[1:]) != grid.shape or tissue.is_floating_point():
        raise ValueError(
            f"Tissue maps are batch x {' x '.join(map(str, grid.shape))} whole numbers, "
            f"but the tensor is {' x '.join(map(str, tissue.shape))} of {tissue.dtype}."
        )
    if tissue.numel() and not 0 <= int(tissue.min()) <= int(tissue.max()) < MOST:
        raise ValueError(
            f"Tissues have numbers from 0 to {MOST - 1}, but these go from {tissue.min()} to {tissue.max()}."
        )


def brain(tissue: Int[Tensor, "b *grid"]) -> Bool[Tensor, "b *grid"]:
    """Where the map has brain, fluid around it left out."""
    return (tissue > TISSUES["csf"]) & (tissue < OUTSIDE)
