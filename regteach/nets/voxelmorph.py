"""A VoxelMorph-style network: both images into one U-Net, a displacement for every voxel out of it.

What GeoReg is compared with: the features of the two images are mixed from the first layer on, and how far a point can
be moved is limited by how far the U-Net sees.

Source: Balakrishnan et al., VoxelMorph: a learning framework for deformable medical image registration, IEEE TMI 38
(2019); with ``steps``, the field is a stationary velocity that is integrated: Dalca et al., Medical Image Analysis 57
(2019). The U-Net is ours (``nets.blocks``); the last layer starts at zero, so the untrained network is the identity.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regteach.grid import Grid
from regteach.nets.blocks import UNet, as_tuples, check_pair, conv, upsampled, zero_start
from regteach.result import Result, Step
from regteach.similarity import dissimilarity
from regteach.transforms import Dense, Transform, Velocity


@dataclass(frozen=True)
class VoxelMorphConfig:
    """Everything that fixes the network but its weights.

    Args:
        grid: the grid that images are brought to before they enter.
        widths: channels a level, finest first.
        finest: the field is predicted at this level, 0 for every voxel, 1 for every second one, and interpolated.
        channels: of an image.
        steps: squarings of a velocity field; 0 predicts the displacement itself.
        similarity: what the images are compared by, in training and in refinement.
    """

    grid: Grid
    widths: tuple[int, ...] = (16, 32, 32, 32)
    finest: int = 1
    channels: int = 1
    steps: int = 0
    similarity: str = "ncc"

    def __post_init__(self) -> None:
        if not 0 <= self.finest < len(self.widths):
            raise ValueError(f"A U-Net of {len(self.widths)} levels can not predict at level {self.finest}.")
        dissimilarity(self.similarity)  # an unknown name is refused here, not in the first step of a training
        check_divides(self.grid, 2**self.finest)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "VoxelMorphConfig":
        """Back from ``dataclasses.asdict`` (a checkpoint's header).

        Raises:
            ValueError: if a key is unknown, or one that has no default is missing.
        """
        try:
            return VoxelMorphConfig(**as_tuples(values) | {"grid": Grid(**as_tuples(values["grid"]))})
        except (KeyError, TypeError) as error:
            raise ValueError(f"This is no configuration of a VoxelMorph network ({error}).") from None


def check_divides(grid: Grid, factor: int) -> None:
    """Raise a ValueError unless a field can be predicted on every ``factor`` voxels of a grid."""
    if any(n % factor for n in grid.shape):
        raise ValueError(f"A field on every {factor} voxels needs a grid that {factor} divides: {grid.shape}.")


class VoxelMorph(nn.Module):
    """The model. Nothing is kept between calls.

    Args:
        config: what it is made of.
    """

    def __init__(self, config: VoxelMorphConfig) -> None:
        super().__init__()
        self.config = config
        dim, width = config.grid.dim, config.widths[config.finest]
        self.unet = UNet(dim, 2 * config.channels, width, config.widths, normalise=False, finest=config.finest)
        self.out = zero_start(conv(dim, width, dim, kernel=1))

    def forward(self, moving: Tensor, fixed: Tensor, grid: Grid) -> Result:
        """Register a batch of pairs.

        Args:
            moving: ``b c *grid`` in [0, 1].
            fixed: the same.
            grid: where both sit, of the configuration's spacing (a convolution counts voxels, not millimetres), and of
                a size that 2^finest divides.

        Returns:
            The transform; the images as features; one step, whose parameters are displacements (or velocities) in mm.
        """
        want = self.config.grid
        if grid.dim != want.dim or any(abs(a - b) > 1e-3 * b for a, b in zip(grid.spacing, want.spacing, strict=True)):
            raise ValueError(f"This network works on voxels of {want.spacing} mm, not {grid.spacing} mm.")
        check_divides(grid, 2**self.config.finest)
        check_pair(moving, fixed, self.config.channels, grid)
        field = self.out(F.relu(self.unet(torch.cat([moving, fixed], 1)))).float().movedim(1, -1)
        step = Step(field * max(grid.spacing), partial(_built, grid=grid, config=self.config))
        return Result(step.transform, (moving, fixed), (step,))

    def align(self, moving: Tensor, fixed: Tensor, grid: Grid) -> Result:
        """The same as a call: what refinement compares are the images themselves."""
        result: Result = self(moving, fixed, grid)
        return result


def _built(field: Tensor, grid: Grid, config: VoxelMorphConfig) -> Transform:
    coarse = grid.coarsened(2**config.finest)
    if config.steps:
        return Velocity(field, coarse, config.steps)
    return Dense(upsampled(field, coarse, grid) if config.finest else field, grid)
