"""Convolutional parts that several models share, in 2D and 3D from one code.

Convention: images ``b c *grid``. Spatial sizes are whatever comes in: :class:`UNet` pads what does not divide.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regteach.grid import Grid
from regteach.sampling import grid_points, sample

SLOPE = 0.01  # of the leaky ReLU


def conv(
    dim: int, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int | None = None
) -> nn.Module:
    """A convolution in 2D or 3D; "same" padding where none is given."""
    kind = {2: nn.Conv2d, 3: nn.Conv3d}[dim]
    return kind(inputs, outputs, kernel, stride, kernel // 2 if padding is None else padding)


def unit(dim: int, inputs: int, outputs: int, normalise: bool, **options: int) -> nn.Sequential:
    """Convolution, instance normalisation if asked, ReLU (leaky where normalised)."""
    layers = [conv(dim, inputs, outputs, **options)]
    if normalise:
        layers += [{2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dim](outputs, affine=True), nn.LeakyReLU(SLOPE)]
    else:
        layers += [nn.ReLU()]
    return nn.Sequential(*layers)


def fast_layout(module: nn.Module, dim: int) -> nn.Module:
    """Store the weights channels last: the layout in which CPUs and GPUs convolve fastest, in place."""
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[dim]
    return module.to(memory_format=layout)  # type: ignore[call-overload]


def as_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where a configuration has tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def check_pair(moving: Tensor, fixed: Tensor, channels: int, grid: Grid) -> None:
    """Raise a ValueError unless both are as many images ``b c *grid`` of this many channels on this grid."""
    for name, image in (("moving", moving), ("fixed", fixed)):
        if tuple(image.shape[1:]) != (channels, *grid.shape):
            raise ValueError(
                f"The {name} image has the shape {tuple(image.shape)}, but this network takes "
                f"a batch x {channels} x {' x '.join(map(str, grid.shape))}."
            )
    if len(moving) != len(fixed):
        raise ValueError(f"{len(moving)} moving and {len(fixed)} fixed images are not pairs.")


def zero_start(layer: nn.Module) -> nn.Module:
    """Set a layer's weights and bias to 0, so that what it feeds starts at 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def upsampled(displacement: Float[Tensor, "b *coarse d"], coarse: Grid, fine: Grid) -> Float[Tensor, "b *fine d"]:
    """A displacement on a finer grid: linear between its points, and going on straight beyond the outermost ones.

    The children at the border lie outside of their parents: with a repeated border they would fall behind, and a
    rotation would arrive bent.
    """
    field = displacement.movedim(-1, 1)
    for axis in range(2, field.ndim):
        if field.shape[axis] > 1:
            first, second = field.narrow(axis, 0, 1), field.narrow(axis, 1, 1)
            last, before = field.narrow(axis, -1, 1), field.narrow(axis, -2, 1)
            field = torch.cat([2 * first - second, field, 2 * last - before], axis)
    pads = [int(n > 1) for n in coarse.shape]
    points = grid_points(fine, displacement.device, displacement.dtype)[None]
    return sample(field, points.expand(len(field), *points.shape[1:]), coarse.padded(pads, pads)).movedim(1, -1)


class UNet(nn.Module):
    """Encoder and decoder with additive skips: narrow at full resolution, where the voxels are.

    Two convolutions at full resolution, then one halving and one convolution a level; on the way up a doubling, the
    skip added, a convolution. The last is linear.

    Args:
        dim: 2 or 3.
        inputs, outputs: channels.
        widths: channels a level, finest first.
        normalise: instance normalisation after each convolution.
        finest: level at which the decoder stops: 0 gives the input's size, l gives it divided by 2^l.
    """

    def __init__(
        self, dim: int, inputs: int, outputs: int, widths: Sequence[int], normalise: bool = True, finest: int = 0
    ) -> None:
        super().__init__()
        if not 0 <= finest < len(widths):
            raise ValueError(f"A U-Net of {len(widths)} levels can not stop at level {finest}.")
        half = max(1, widths[0] // 2)
        self.factor = 2 ** (len(widths) - 1)
        self.finest = finest
        self.stem = nn.Sequential(unit(dim, inputs, half, normalise), unit(dim, half, widths[0], normalise))
        self.down = nn.ModuleList(
            nn.Sequential(unit(dim, a, b, normalise, kernel=2, stride=2, padding=0), unit(dim, b, b, normalise))
            for a, b in itertools.pairwise(widths)
        )
        up = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dim]
        levels = list(reversed(range(finest, len(widths) - 1)))
        self.up = nn.ModuleList(up(widths[level + 1], widths[level], 2, stride=2) for level in levels)
        # At the last level the head follows at once; a convolution of its own would be one more at the full size.
        self.merge = nn.ModuleList(
            nn.Identity() if level == finest else unit(dim, widths[level], widths[level], normalise) for level in levels
        )
        last = max(1, widths[finest] // 2)
        self.head = nn.Sequential(
            unit(dim, widths[finest], last, normalise), unit(dim, last, last, normalise), conv(dim, last, outputs)
        )

    def forward(self, image: Float[Tensor, "b i *grid"]) -> Float[Tensor, "b o *out"]:
        """Map an image; sizes that the levels do not divide are padded at the end, and cut again."""
        size = image.shape[2:]
        x = self.stem(_padded(image, self.factor))
        skips = [x]
        for down in self.down:
            x = down(x)
            skips.append(x)
        for level, (up, merge) in enumerate(zip(self.up, self.merge, strict=True), start=2):
            x = merge(F.relu(up(x)) + skips[-level])
        out = self.head(x)
        return out[(..., *[slice(-(-n // 2**self.finest)) for n in size])]


class Encoder(nn.Module):
    """Convolution, activation, average pooling by two, once a level; then all that is left as one vector.

    Args:
        dim: 2 or 3.
        inputs: channels.
        widths: channels a level.
        shape: size of the images, from which the length of the vector follows.
        kernel: of the convolutions.
        padded: keep the size in each convolution, and pool the last level to ``cells`` per axis, whatever is left.
        normalise: instance normalisation.
    """

    def __init__(
        self,
        dim: int,
        inputs: int,
        widths: Sequence[int],
        shape: Sequence[int],
        kernel: int = 3,
        padded: bool = True,
        normalise: bool = True,
        cells: int = 4,
    ) -> None:
        super().__init__()
        pool = {2: nn.AvgPool2d, 3: nn.AvgPool3d}[dim]
        layers: list[nn.Module] = []
        size = list(shape)
        for a, b in itertools.pairwise((inputs, *widths)):
            layers += [unit(dim, a, b, normalise, kernel=kernel, padding=kernel // 2 if padded else 0), pool(2)]
            size = [(n if padded else n - kernel + 1) // 2 for n in size]
        if min(size) < 1:
            raise ValueError(f"A grid of {tuple(shape)} voxels is too small for {len(widths)} levels of this network.")
        if padded:
            size = [min(n, cells) for n in size]
            layers.append({2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dim](tuple(size)))
        self.layers = nn.Sequential(*layers)
        self.length = widths[-1] * torch.Size(size).numel()

    def forward(self, image: Float[Tensor, "b i *grid"]) -> Float[Tensor, "b n"]:
        """One vector an image."""
        return self.layers(image).flatten(1)


def _padded(image: Tensor, factor: int) -> Tensor:
    missing = [(-n) % factor for n in image.shape[2:]]
    if not any(missing):
        return image
    return F.pad(image, [amount for m in reversed(missing) for amount in (0, m)])
