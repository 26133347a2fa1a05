"""A learned kernel: from displacements at keypoints to a displacement anywhere.

    u(x) = sum over the K nearest keypoints y of w(x, y) d(y)        (or the plane through them, with these weights)
    w(x, y) = softmax of  <q_s(x), k_s(y)> + <q_f(x), k_f(y)>        geometry and semantics: two heads, one product
                        + 1 / (1 + |x - y|^2 / s^2) - |x - y|^2 / (2 r^2)      how near
                        + t(y)                                       how far y is to be trusted

The geometry head sees positions (Fourier features), the semantics head image features at x and at y. Both work where
only one is there: :class:`LearnedKernel` without semantics needs no images at all. Trust looks at what y says beside
what its own neighbours say (``nets.evidence``): a match that nobody confirms is heard less.

The weights of a softmax are positive, so a weighted mean can not continue a slope; the plane through the neighbours
(``degree=1``) can, and an affine motion is then reproduced whatever the weights are. Or a spline does
(``spline=True``, see ``nets.learned_spline``), and the kernel reads what it leaves.

Source: Fogarollo et al., Implicit Deformable Medical Image Registration with Learnable Kernels, MICCAI 2025: the two
heads, K, the bias 1 / (1 + |x - y|^2). How the heads combine, the unit of the distance (a learned length s, mm), the
term in r, trust and the plane are ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regteach.grid import Grid
from regteach.nets.blocks import as_tuples, zero_start
from regteach.nets.evidence import EVIDENCE, evidence
from regteach.nets.learned_spline import LearnedSpline
from regteach.ops.classical import Spline
from regteach.ops.kernel_field import kernel_field, kernel_field_on
from regteach.ops.kernel_weights import kernel_field_added, kernel_weights_on, weighted_sum
from regteach.ops.neighbourhood import fourier_features
from regteach.precision import exactly
from regteach.sampling import at_least_float32, flat_points

HEADS = ("geometry", "semantics")
GIVEN = 6.0  # logit of a correspondence that a person gave: e^6 times as much as a match of average trust


@dataclass(frozen=True)
class KernelConfig:
    """Everything that fixes a learned kernel but its weights.

    Args:
        dim: 2 or 3.
        semantics: channels of the image features; 0 for none.
        width: channels of an encoding and of a head.
        neighbours: K.
        heads: "geometry", "semantics" or both.
        bias: whether nearness plays a part of its own (both terms above).
        trust: whether keypoints are weighed by what their neighbours say.
        rounds: how often what the field misses at the keypoints is added to their displacements: a mean of many is
            too smooth for matches that can be trusted, and how far each can be is learned.
        degree: 0 for the weighted mean, 1 for the weighted plane.
        taper: let the weights go to 0 at the K-th neighbour, so that the field has no jumps.
        length_mm: scale of the geometry: a frequency of 1 makes a turn in it; s and r start with it.
        spline: subtract a spline first, which is near each match as far as it can be trusted; the kernel reads the
            rest. For matches without images, where most is to be gained from telling the wrong ones.
    """

    dim: int = 3
    semantics: int = 0
    width: int = 64
    neighbours: int = 30
    heads: tuple[str, ...] = ("geometry",)
    bias: bool = True
    trust: bool = True
    rounds: int = 4
    degree: int = 1
    taper: bool = True
    length_mm: float = 20.0
    spline: bool = False

    def __post_init__(self) -> None:
        if self.dim not in (2, 3) or self.degree not in (0, 1) or self.rounds < 0:
            raise ValueError("A kernel has 2 or 3 axes, degree 0 or 1, and 0 rounds or more.")
        if not self.heads or not set(self.heads) <= set(HEADS) or len(set(self.heads)) < len(self.heads):
            raise ValueError(f"A kernel has the heads {' and '.join(HEADS)}, or one of them, not {self.heads}.")
        if ("semantics" in self.heads) != bool(self.semantics):
            raise ValueError("A semantics head needs image features, and image features need a semantics head.")
        if self.neighbours < 1 or self.width < 2 or self.width % 2 or not self.length_mm > 0:
            raise ValueError("A kernel has at least 1 neighbour, an even width and a positive length.")

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "KernelConfig":
        """Back from ``dataclasses.asdict`` (a checkpoint's header).

        Raises:
            ValueError: if a key is unknown.
        """
        try:
            return KernelConfig(**as_tuples(values))
        except TypeError as error:
            raise ValueError(f"This is no configuration of a learned kernel ({error}).") from None


@dataclass(frozen=True)
class Nearness:
    """Logits of :class:`LearnedKernel`: the product of the heads, and how near a keypoint is.

    Args:
        scale_mm: s; None leaves both terms out.
        reach_mm: r.
        channels: of a query: the product is given divided by their root, which is undone.
    """

    scale_mm: Tensor | None
    reach_mm: Tensor | None
    channels: int

    def logits(self, squared: Tensor, products: Tensor | None) -> Tensor:
        """Of pairs: squared distance, mm^2, and product."""
        total = torch.zeros_like(squared) if products is None else products * math.sqrt(self.channels)
        if self.scale_mm is None or self.reach_mm is None:
            return total
        return total + (1 + squared / self.scale_mm**2).reciprocal() - 0.5 * squared / self.reach_mm**2


class LearnedKernel(nn.Module):
    """The kernel. Nothing is kept between calls.

    Args:
        config: what it is made of.
    """

    frequencies: Tensor

    def __init__(self, config: KernelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        inputs = {"geometry": width, "semantics": config.semantics}
        self.encoders = nn.ModuleDict({head: _mlp(inputs[head], 2 * width, width) for head in config.heads})
        self.queries = nn.ModuleDict({head: nn.Linear(width, width) for head in config.heads})
        # All keys start at zero: the untrained kernel is the nearness alone.
        self.keys = nn.ModuleDict({head: zero_start(nn.Linear(width, width)) for head in config.heads})
        self.trust = nn.Sequential(nn.Linear(EVIDENCE, width), nn.ReLU(), zero_start(nn.Linear(width, 2)))
        # How far to look depends on how far the matches agree: the more they scatter, the more must be averaged.
        self.lengths = nn.Sequential(nn.Linear(2 * EVIDENCE, width), nn.ReLU(), zero_start(nn.Linear(width, 2)))
        if not config.trust:
            self.trust, self.lengths = nn.Sequential(), nn.Sequential()
        start = torch.tensor(float(config.length_mm)).log()
        self.log_lengths = nn.Parameter(start.expand(2).clone())
        self.register_buffer("frequencies", torch.randn(config.dim, width // 2))
        self.spline = LearnedSpline(EVIDENCE, width, config.neighbours) if config.spline else None

    @exactly
    def reconstruction(
        self,
        keypoints_mm: Float[Tensor, "m d"],
        displacements_mm: Float[Tensor, "m d"],
        features: Callable[[Tensor], Tensor] | None = None,
        spread_mm: Float[Tensor, "m"] | None = None,
        given: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> "Reconstruction":
        """A field from what is known at keypoints.

        Args:
            keypoints_mm: positions.
            displacements_mm: what is known there.
            features: image features at points ``n d``, ``n c``; needed by the semantics head, which is left out where
                there is none.
            spread_mm: how sharp each match was, where that is known.
            given: bool ``m``, the correspondences that a person gave: they are trusted.
            origin: of the geometry, ``d``; the middle of the keypoints where left out.

        Raises:
            ValueError: if there is no keypoint, a number is not finite, or the shapes do not fit.
        """
        _check(keypoints_mm, displacements_mm, self.config.dim)
        _check_extras(keypoints_mm, spread_mm, given, origin)
        keypoints_mm, displacements_mm = at_least_float32(keypoints_mm), at_least_float32(displacements_mm)
        centre = keypoints_mm.detach().mean(0) if origin is None else origin
        start = None
        if self.spline is not None:
            said = evidence(keypoints_mm, displacements_mm, self.config.neighbours, spread_mm)
            # The fifth is log(1 + distance from the neighbours' median / their own scatter).
            start = self.spline(keypoints_mm, displacements_mm, said, said[:, 4].expm1(), given)
        if start is not None:
            displacements_mm = displacements_mm - start.at(keypoints_mm).to(displacements_mm)
        heads = [head for head in self.config.heads if head == "geometry" or features is not None]
        parts = [self.keys[head](self._encoded(head, keypoints_mm, centre, features)) for head in heads]
        logit = held = keypoints_mm.new_zeros(len(keypoints_mm))
        lengths = self.log_lengths
        if self.config.trust:
            said = evidence(keypoints_mm, displacements_mm, self.config.neighbours, spread_mm)
            logit, held = self.trust(said).unbind(1)
            lengths = lengths + self.lengths(torch.cat([said.mean(0), said.median(0).values]))
        if given is not None:
            logit, held = torch.where(given, GIVEN, logit), torch.where(given, GIVEN, held)
        # Trust is one channel more, for which every point has the same query: 1.
        keys = torch.cat([*parts, logit[:, None]], 1)
        scale, reach = lengths.exp() if self.config.bias else (None, None)

        def queries(points: Tensor) -> Tensor:
            asked = [self.queries[head](self._encoded(head, points, centre, features)) for head in heads]
            return torch.cat([*(q / math.sqrt(self.config.width) for q in asked), points.new_ones(len(points), 1)], 1)

        weighting = Nearness(scale, reach, keys.shape[1])
        field = Reconstruction(keypoints_mm, displacements_mm, keys, queries, weighting, centre, self.config)
        for _ in range(self.config.rounds):
            missing = displacements_mm - field.at(keypoints_mm)
            field = replace(field, displacements_mm=field.displacements_mm + held.sigmoid()[:, None] * missing)
        return replace(field, start=start)

    @torch.no_grad()
    def reconstruct(
        self,
        keypoints_mm: Float[Tensor, "m d"],
        displacements_mm: Float[Tensor, "m d"],
        query_mm: Float[Tensor, "n d"],
    ) -> Float[Tensor, "n d"]:
        """Displacement at any points from that at keypoints, without images: the geometry head alone.

        Raises:
            ValueError: as in :meth:`reconstruction`; if a query is no point of as many finite coordinates.
        """
        field = self.reconstruction(keypoints_mm, displacements_mm)
        if not bool(query_mm.isfinite().all()):
            raise ValueError("Points to read the field at have to be finite numbers.")
        # In parts: the plain form gathers K keys for each point.
        return torch.cat([field.at(part) for part in query_mm.split(2**13)])

    def _encoded(
        self, head: str, points: Tensor, origin: Tensor, features: Callable[[Tensor], Tensor] | None
    ) -> Float[Tensor, "n c"]:
        if head == "geometry":
            return self.encoders[head](fourier_features(points - origin, self.frequencies, self.config.length_mm))
        if features is None:
            raise ValueError("The semantics head needs image features, but there are none.")
        found = features(points)
        if found.shape != (len(points), self.config.semantics):
            raise ValueError(
                f"{len(points)} points need image features of {self.config.semantics} channels each, not shape "
                f"{tuple(found.shape)}."
            )
        return self.encoders[head](at_least_float32(found))


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A displacement field, defined by what is known at keypoints.

    Args:
        keypoints_mm: ``m d``.
        displacements_mm: ``m d``; what the spline leaves of them, where there is one.
        keys: ``m c``.
        queries: of points ``n d``, ``n c``.
        weighting: of the pairs.
        origin: of the geometry.
        config: of the kernel.
        start: the spline that was subtracted first.
    """

    keypoints_mm: Tensor
    displacements_mm: Tensor
    keys: Tensor
    queries: Callable[[Tensor], Tensor]
    weighting: Nearness
    origin: Tensor
    config: KernelConfig
    start: Spline | None = None

    @exactly
    def at(self, points_mm: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Displacement at points, mm."""
        dim = self.config.dim
        if points_mm.ndim != 2 or points_mm.shape[1] != dim:
            raise ValueError(f"Points are rows of {dim} coordinates, not shape {tuple(points_mm.shape)}.")
        points_mm = at_least_float32(points_mm)
        found = kernel_field(
            points_mm, self.keypoints_mm, self.displacements_mm, self.weighting, self.config.neighbours,
            self.queries(points_mm), self.keys, self._taper, self.config.degree,
        )  # fmt: skip
        return found if self.start is None else found + self.start.at(points_mm).to(found)

    def on(self, grid: Grid) -> Float[Tensor, "*grid d"]:
        """Displacement at every voxel, mm, in blocks."""
        self._check_grid(grid)
        found = kernel_field_on(
            grid, self.keypoints_mm, self.displacements_mm, self.weighting, self.config.neighbours,
            self.queries, self.keys, self._taper, self.config.degree,
        )  # fmt: skip
        return found + self._start_on(grid, found)

    def weights_on(self, grid: Grid) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
        """Keypoints that each voxel hears, and how much: :meth:`through` these is :meth:`on`."""
        self._check_grid(grid)
        return kernel_weights_on(
            grid, self.keypoints_mm, self.weighting, self.config.neighbours,
            self.queries, self.keys, self._taper, self.config.degree,
        )  # fmt: skip

    def through(self, weights: tuple[Tensor, Tensor], grid: Grid) -> Float[Tensor, "*grid d"]:
        """:meth:`on` for whoever changes the displacements alone, and has the weights: far faster."""
        found = weighted_sum(self.displacements_mm, *weights).unflatten(0, grid.shape)
        return found + self._start_on(grid, found)

    @torch.no_grad()
    def added(
        self, fixed_mm: Float[Tensor, "k d"], moving_mm: Float[Tensor, "k d"], kernel: LearnedKernel,
        field: Float[Tensor, "*grid d"], grid: Grid, features: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple["Reconstruction", Float[Tensor, "*grid d"]]:  # fmt: skip
        """The field with correspondences that a person gave; computed again only where one is among the K nearest.

        Args:
            fixed_mm, moving_mm: the new correspondences.
            kernel: that made this reconstruction.
            field: what :meth:`on` gave for ``grid``.
            grid: of the field.
            features: image features at points, as when the reconstruction was made.

        Raises:
            ValueError: if the correspondences, the field or the features do not fit.
        """
        _check(fixed_mm, moving_mm, self.config.dim)
        self._check_grid(grid)
        if field.shape != (*grid.shape, self.config.dim):
            raise ValueError(
                f"A field on this grid has the shape {(*grid.shape, self.config.dim)}, not {tuple(field.shape)}."
            )
        every = torch.ones(len(fixed_mm), dtype=torch.bool, device=fixed_mm.device)
        alone = kernel.reconstruction(fixed_mm, moving_mm - fixed_mm, features, None, every, self.origin)
        if alone.keys.shape[1] != self.keys.shape[1]:
            raise ValueError("An addition needs image features exactly where the reconstruction had them.")
        motion = moving_mm - fixed_mm
        if self.start is not None:
            motion = motion - self.start.at(fixed_mm).to(motion)
        # Their keys are what they would be among the others but for trust, which is given; the old keys stay.
        joined = replace(
            self,
            keypoints_mm=torch.cat([self.keypoints_mm, fixed_mm]),
            displacements_mm=torch.cat([self.displacements_mm, motion]),
            keys=torch.cat([self.keys, alone.keys]),
        )
        if joined._taper != self._taper:  # there are now more keypoints than neighbours, and that changes every voxel
            return joined, joined.on(grid).to(field)
        start = self._start_on(grid, field)
        changed = kernel_field_added(
            field - start, len(self.keypoints_mm), grid, joined.keypoints_mm, joined.displacements_mm, self.weighting,
            self.config.neighbours, self.queries, joined.keys, self._taper, self.config.degree,
        )  # fmt: skip
        return joined, changed + start

    def _start_on(self, grid: Grid, like: Tensor) -> Tensor:
        """The spline at every voxel, ``*grid d``; 0 where there is none."""
        if self.start is None:
            return like.new_zeros(())
        return self.start.at(flat_points(grid, like.device, like.dtype)[0]).to(like).unflatten(0, grid.shape)

    def _check_grid(self, grid: Grid) -> None:
        if grid.dim != self.config.dim:
            raise ValueError(f"This kernel has {self.config.dim} axes, but the grid has {grid.dim}.")

    @property
    def _taper(self) -> bool:
        return self.config.taper and len(self.keypoints_mm) > self.config.neighbours


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs), nn.ReLU())


def _check(keypoints: Tensor, displacements: Tensor, dim: int) -> None:
    if keypoints.ndim != 2 or keypoints.shape[1] != dim or displacements.shape != keypoints.shape:
        raise ValueError(
            f"This kernel takes positions and displacements of {dim} coordinates each, not "
            f"{tuple(keypoints.shape)} and {tuple(displacements.shape)}."
        )
    if not len(keypoints):
        raise ValueError("There are no keypoints, and a field needs at least one.")
    if not bool((keypoints.isfinite() & displacements.isfinite()).all()):
        raise ValueError("Keypoints and displacements have to be finite numbers.")


def _check_extras(keypoints: Tensor, spread: Tensor | None, given: Tensor | None, origin: Tensor | None) -> None:
    count, dim = keypoints.shape
    for name, extra, shape in (("spread_mm", spread, (count,)), ("given", given, (count,)), ("origin", origin, (dim,))):
        if extra is not None and extra.shape != shape:
            raise ValueError(f"{name} has the shape {shape} here, not {tuple(extra.shape)}.")
    if given is not None and given.dtype != torch.bool:
        raise ValueError(f"given says true or false of each keypoint, and is not {given.dtype}.")
    if origin is not None and not bool(origin.isfinite().all()):
        raise ValueError("The origin has to be finite numbers.")
    if spread is not None and not bool((spread.isfinite() & (spread >= 0)).all()):
        raise ValueError("Spreads have to be finite numbers, 0 or more.")
