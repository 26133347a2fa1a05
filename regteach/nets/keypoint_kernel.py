"""Registration by keypoints and a learned kernel: sparse matches, scale after scale, and one dense field at the end.

    keypoints p of the fixed image (Foerstner, farthest point sampling)
    for each scale, coarse to fine:
        start  s = p + d                           where the scales before have led, composed on points
        match  m = s + soft-argmin of the costs    of the features about p against those about s + candidate
        field  u = kernel(p -> x; m - p)           read at the keypoints: the next scale starts there
    dense      u on the grid, once

Features are MIND beside those of a U-Net that starts small: the untrained model already matches, and training adds what
MIND does not see. The kernel is that of ``nets.kernel``; its semantics are the features of the fixed image, at the
keypoint and at the point that asks.

Once the matches are there, the field is linear in the displacements at the keypoints. So refinement turns these, with
the kernel's weights worked out once; and a correspondence that a person gives is one more keypoint that is trusted.

Source: Fogarollo et al., Implicit Deformable Medical Image Registration with Learnable Kernels, MICCAI 2025: keypoints,
cost volumes on learned features, five scales with residual matches, K = 30, 1,024 keypoints, a kernel of about 150,000
parameters. Windows, features and their sizes are ours, as is what ``nets.kernel`` says of itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regteach.grid import Grid
from regteach.keypoints import Search, find, foerstner
from regteach.nets.blocks import UNet, as_tuples, check_pair
from regteach.nets.kernel import HEADS, KernelConfig, LearnedKernel
from regteach.nets.keypoint_field import (
    Field,
    KeypointTransform,
    Points,
    Spline,
    affine_part,
    read_affine,
    remembered_weights,
)
from regteach.precision import exactly
from regteach.result import Result, Step
from regteach.sampling import sample
from regteach.similarity import dissimilarity, mind_descriptor
from regteach.transforms import Dense

MIND = {2: 4, 3: 12}  # channels of the descriptor
RECONSTRUCTIONS = ("kernel", "thin_plate")
SMALL = 0.2  # of their usual start, for the weights that make the learned features
NARROW = 3  # voxels, window of the keypoints: in a coarse image they lie close together


@dataclass(frozen=True)
class Scale:
    """One round of matching: candidates on a lattice about where the scales before have led.

    Args:
        pooled: features are averaged over cubes of this many voxels, and a patch is 3 of these cubes wide.
        reach: candidates to either side along each axis.
        finer: they are a cube's width over this whole number apart.
    """

    pooled: int = 1
    reach: int = 2
    finer: int = 1

    def __post_init__(self) -> None:
        if min(self.pooled, self.reach, self.finer) < 1:
            raise ValueError("A scale pools 1 voxel or more, reaches 1 candidate or more, and divides by 1 or more.")


# At 3 mm: 48 mm in steps of 12, 18 in steps of 6, 6 in steps of 3 (twice), 3 in steps of 1.5.
FIVE = (Scale(4, 4), Scale(2, 3), Scale(2, 2, 2), Scale(1, 2), Scale(1, 2, 2))
ONE = (Scale(2, 7),)  # at 3 mm: 42 mm in steps of 6


@dataclass(frozen=True)
class KeypointKernelConfig:
    """Everything that fixes the model but its weights; :meth:`of` fills in the kernel.

    Args:
        grid: the grid that images are brought to before they enter.
        kernel: of the field; its semantics are as many as the features.
        scales: coarse to fine.
        features: channels that the U-Net adds to MIND; 0 for none.
        widths: channels a level of the U-Net.
        keypoints: at most.
        channels: of an image.
        temperature: of the soft-argmin, in contrasts of the costs.
        smoothness: how much neighbouring keypoints pull each other while matching, in contrasts per mm.
        reconstruction: "kernel"; or "thin_plate", a smoothing spline whose smoothness is learned, for comparison.
        affine: fit an affine part to the matches first; the kernel adds what it leaves. For comparison: a kernel of
            degree 1 reproduces it anyway.
        similarity: what refinement compares the images by.
    """

    grid: Grid
    kernel: KernelConfig
    scales: tuple[Scale, ...] = FIVE
    features: int = 8
    widths: tuple[int, ...] = (8, 16, 16)
    keypoints: int = 1024
    channels: int = 1
    temperature: float = 0.05
    smoothness: float = 0.03
    reconstruction: str = "kernel"
    affine: bool = False
    similarity: str = "local_ncc"

    def __post_init__(self) -> None:
        if not self.scales or self.features < 0 or self.channels < 1 or self.keypoints < 1:
            raise ValueError("A model of keypoints has at least one scale, one channel and one keypoint.")
        if self.reconstruction not in RECONSTRUCTIONS:
            raise ValueError(f"reconstruction is one of {', '.join(RECONSTRUCTIONS)}, not {self.reconstruction!r}.")
        if not self.temperature > 0 or not self.smoothness >= 0:
            raise ValueError("The temperature is positive, and the smoothness is not negative.")
        dissimilarity(self.similarity)  # an unknown name is refused here, not in a refinement
        described = MIND[self.grid.dim] * self.channels + self.features
        want = described if "semantics" in self.kernel.heads else 0
        if self.kernel.dim != self.grid.dim or self.kernel.semantics != want:
            raise ValueError(
                f"The kernel of a model in {self.grid.dim}D with these features has dim {self.grid.dim} and {want} "
                f"channels of semantics, not {self.kernel.dim} and {self.kernel.semantics}."
            )
        most = max(scale.pooled for scale in self.scales)
        if min(self.grid.shape) < 2 * most:
            raise ValueError(f"A grid of {self.grid.shape} voxels is too small for features pooled by {most}.")

    @staticmethod
    def of(grid: Grid, **settings: Any) -> "KeypointKernelConfig":
        """The full model for a grid, with changes of its own settings and of its kernel's, all by name.

        Both heads and a width of 120: about 150,000 parameters in the kernel.
        """
        names = {setting.name for setting in fields(KernelConfig)} - {"dim", "semantics"}
        chosen: dict[str, Any] = {"heads": HEADS, "width": 120} | {k: v for k, v in settings.items() if k in names}
        own = {k: v for k, v in settings.items() if k not in names}
        described = MIND[grid.dim] * own.get("channels", 1) + own.get("features", 8)
        semantics = described if "semantics" in chosen["heads"] else 0
        return KeypointKernelConfig(grid, KernelConfig(dim=grid.dim, semantics=semantics, **chosen), **own)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "KeypointKernelConfig":
        """Back from ``dataclasses.asdict`` (a checkpoint's header).

        Raises:
            ValueError: if a key is unknown, or one that has no default is missing.
        """
        try:
            parts = {
                "grid": Grid(**as_tuples(values["grid"])),
                "kernel": KernelConfig(**as_tuples(values["kernel"])),
                "scales": tuple(Scale(**scale) for scale in values["scales"]),
            }
            return KeypointKernelConfig(**as_tuples(values) | parts)
        except (KeyError, TypeError) as error:
            raise ValueError(f"This is no configuration of a keypoint model ({error}).") from None


class KeypointKernel(nn.Module):
    """The model. Nothing is kept between calls.

    Args:
        config: what it is made of.
    """

    def __init__(self, config: KeypointKernelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.grid.dim
        self.unet = UNet(dim, config.channels, config.features, config.widths) if config.features else None
        if self.unet is not None:
            # Not zero: a squared difference of zeros has no slope, and nothing would be learned.
            for weight in self.unet.head[-1].parameters():
                weight.data *= SMALL
        if config.reconstruction == "kernel":
            self.kernel = LearnedKernel(config.kernel)
        else:
            self.log_smoothing = nn.Parameter(torch.tensor(math.log(config.kernel.length_mm)))

    def forward(self, moving: Tensor, fixed: Tensor, grid: Grid, points: Points | None = None) -> Result:
        """Register a batch of pairs, one after the other: each has keypoints of its own.

        Args:
            moving, fixed: ``b c *grid``.
            grid: where both sit.
            points: correspondences that a person gives, ``k d`` each: fixed and moving, mm; for one pair.

        Returns:
            The transform, a Dense on ``grid``; the images as features; one step, whose parameters are the
            displacements at the keypoints, mm (``b n d``, those of given points left out; pairs with fewer keypoints
            are filled up with zeros).

        Raises:
            ValueError: if the images do not fit, points are given for several pairs, or a fixed image has no keypoint
                and no point is given.
        """
        check_pair(moving, fixed, self.config.channels, grid)
        if points is not None and len(moving) != 1:
            raise ValueError(f"Points are given for one pair of images, not for a batch of {len(moving)}.")
        pairs = zip(moving[:, None], fixed[:, None], strict=True)
        found = tuple(self.scales(*pair, grid, points)[-1] for pair in pairs)
        most = max(one.free for one in found)
        parameters = [F.pad(one.displacements_mm[: one.free], (0, 0, 0, most - one.free)) for one in found]
        build = partial(KeypointTransform, fields=found, grid=grid, weights=remembered_weights(found))
        step = Step(torch.stack(parameters), build, own_pairs=True)
        dense = Dense(torch.stack([one.on(grid) for one in found]), grid)
        return Result(dense, (moving, fixed), (step,))

    def align(self, moving: Tensor, fixed: Tensor, grid: Grid) -> Result:
        """The same as a call: what refinement compares are the images themselves."""
        result: Result = self(moving, fixed, grid)
        return result

    @torch.no_grad()
    def reconstruct(
        self, keypoints_mm: Float[Tensor, "m d"], displacements_mm: Float[Tensor, "m d"], query_mm: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n d"]:
        """Displacement at any points from that at keypoints, without images: the geometry head alone.

        Raises:
            ValueError: if there is no keypoint, a number is not finite, or the shapes do not fit.
        """
        if self.config.reconstruction == "kernel":
            return self.kernel.reconstruct(keypoints_mm, displacements_mm, query_mm)
        return self.field(keypoints_mm, displacements_mm).at(query_mm)

    def scales(
        self,
        moving: Float[Tensor, "1 c *grid"],
        fixed: Float[Tensor, "1 c *grid"],
        grid: Grid,
        points: Points | None = None,
        keypoints_mm: Float[Tensor, "n d"] | None = None,
        features: tuple[Tensor, Tensor] | None = None,
    ) -> list[Field]:
        """The field after each scale, of one pair: training judges them all.

        Args:
            moving, fixed: images.
            grid: where both sit.
            points: given correspondences.
            keypoints_mm: in the place of those that are detected in the fixed image.
            features: of the moving and of the fixed image, where they are known already.

        Raises:
            ValueError: if there is no keypoint and no given point.
        """
        check_pair(moving, fixed, self.config.channels, grid)
        keypoints = self.keypoints(fixed, grid) if keypoints_mm is None else keypoints_mm.to(fixed)
        if not len(keypoints) and points is None:
            raise ValueError("The fixed image shows nothing that can be found again, so it has no keypoint.")
        maps = [self.features(image) for image in (moving, fixed)] if features is None else list(features)
        read = partial(_read, features=maps[1], grid=grid)
        given = None if points is None else (points[0].to(fixed), (points[1] - points[0]).to(fixed))
        shift, found = torch.zeros_like(keypoints), []
        for scale in self.config.scales:
            matched, spread = self._matched(maps, grid, keypoints, keypoints + shift, scale)
            found.append(self.field(keypoints, matched - keypoints, read, spread, given))
            shift = found[-1].at(keypoints)
        return found

    def features(self, image: Float[Tensor, "1 c *grid"]) -> Float[Tensor, "1 k *grid"]:
        """MIND, which has nothing to learn, and what the U-Net adds."""
        with torch.no_grad():
            described = mind_descriptor(image.float(), 1, 2)
        return described if self.unet is None else torch.cat([described, self.unet(image).float()], 1)

    def keypoints(self, fixed: Float[Tensor, "1 c *grid"], grid: Grid) -> Float[Tensor, "n d"]:
        """Where the fixed image can be recognised, mm."""
        window_mm = NARROW * math.prod(grid.spacing) ** (1 / grid.dim)
        return foerstner(fixed.float(), grid, self.config.keypoints, window_mm=window_mm)

    @exactly
    def field(
        self,
        keypoints_mm: Float[Tensor, "n d"],
        displacements_mm: Float[Tensor, "n d"],
        features: Callable[[Tensor], Tensor] | None = None,
        spread_mm: Float[Tensor, "n"] | None = None,
        given: Points | None = None,
    ) -> Field:
        """A field from matches.

        Args:
            keypoints_mm: positions.
            displacements_mm: what was found there.
            features: of the fixed image at points; without them the semantics head is left out.
            spread_mm: how sharp each match was.
            given: positions and displacements that a person gave, which are trusted.
        """
        free, trusted = len(keypoints_mm), None
        if given is not None:
            trusted = torch.arange(free + len(given[0]), device=keypoints_mm.device) >= free
            keypoints_mm = torch.cat([keypoints_mm, given[0]])
            displacements_mm = torch.cat([displacements_mm, given[1]])
            spread_mm = None if spread_mm is None else torch.cat([spread_mm, spread_mm.new_zeros(len(given[0]))])
        linear = affine_part(keypoints_mm, displacements_mm) if self.config.affine else None
        left = displacements_mm if linear is None else displacements_mm - read_affine(linear, keypoints_mm)
        if self.config.reconstruction == "thin_plate":
            return Field(Spline(keypoints_mm, left, self.log_smoothing.exp()), free, linear)
        semantics = features if "semantics" in self.config.kernel.heads else None
        part = self.kernel.reconstruction(keypoints_mm, left, semantics, spread_mm, trusted)
        return Field(part, free, linear, self.kernel, semantics)

    def _matched(
        self, maps: Sequence[Tensor], grid: Grid, keypoints: Tensor, start: Tensor, scale: Scale
    ) -> tuple[Tensor, Tensor]:
        """Where each keypoint is found about its start, and how sharp the costs were, mm."""
        moving, fixed = (_pooled(features, scale.pooled) for features in maps)
        coarse = grid.coarsened(scale.pooled)
        step = tuple(h / scale.finer for h in coarse.spacing)
        search = Search(
            tuple(scale.reach * h for h in step), step, 1, "mean_field", self.config.smoothness, self.config.temperature
        )
        if not len(keypoints):
            return keypoints, keypoints.new_zeros(0)
        return find(fixed, moving, coarse, coarse, keypoints, start, search)


def _read(points: Float[Tensor, "n d"], features: Float[Tensor, "1 c *grid"], grid: Grid) -> Float[Tensor, "n c"]:
    return sample(features, points[None], grid)[0].T


def _pooled(maps: Tensor, factor: int) -> Tensor:
    return maps if factor == 1 else {2: F.avg_pool2d, 3: F.avg_pool3d}[maps.ndim - 2](maps, factor)
