"""GeoReg: coarse-to-fine registration by points that move.

Each image becomes a pyramid of features, for itself. The points that move are those of the **fixed** image's grids: at
each level a point looks round its present position among the features of the moving image, listens to some of them, and
takes a step; the next finer level inherits the positions of its parents and corrects what it inherited.

    coarsest level:  x = rest position
    finer levels:    x = linear interpolation of the parents' positions + u(attention to the parents)
    every level:     x <- x + u(attention to the moving features round x),  several times

Positions are continuous, mm; features are never resampled. With the attention of ``ops.neighbourhood``,

    h = LN(f + Wo Wv z),  h <- LN(h + W2 relu(W1 h)),  u = s Wb relu(Wa h)

where f is the fixed point's own feature and s the largest spacing, mm, of those attended to (on the configuration's
grid). Wb starts at zero, so the untrained network is the identity.

Source: Sideri-Lampretsa et al., Interpretable deformable image registration: a geometric deep learning perspective,
arXiv 2412.13294: section 3, eqs 4 to 7. Its source points are our fixed points: both are mapped into the other image.
Ours: offsets are measured in millimetres, so an offset means the same at any spacing (a window holds k voxels an axis,
whatever they measure); the affine part of a motion passes from level to level exactly, also at the border; and u may be
smoothed by a Gaussian, u <- G_sigma * u, before a point takes the step.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regteach.grid import Grid
from regteach.nets.blocks import as_tuples, check_pair, conv, upsampled, zero_start
from regteach.ops.neighbourhood import in_slabs, neighbourhood_attention, parent_attention
from regteach.precision import exactly
from regteach.result import Result, Step, after_each
from regteach.sampling import flat_points, grid_points, sample, smooth_field, warp
from regteach.similarity import dissimilarity
from regteach.transforms import Dense, Transform

# Of query, rest positions, positions; then window, frequencies and length_mm of the Deformation that asks, by name.
Attention = Callable[..., Float[Tensor, "b n c"]]

MOVES, INTERPOLATIONS, SUPERVISIONS = ("points", "features"), ("learned", "linear"), ("across", "within")


@dataclass(frozen=True)
class GeoRegConfig:
    """Everything that fixes a GeoReg but its weights. Levels are listed finest first.

    Args:
        grid: the grid that images are brought to before they enter; divisible by 2^(levels - 1).
        widths: channels a level, even.
        windows: neighbours an axis in the moving image, a level; 0 for a level that only interpolates.
        parents: neighbours an axis among the parents, for all levels but the coarsest; 0: linear interpolation alone.
        iterations: steps a level; 1 each where left out.
        channels: of an image.
        encoders: 1 for both images, or 2, one for the moving and one for the fixed image (two modalities).
        contrasts: of two encoders, what the moving and what the fixed image are, in words: ("T1", "T2").
        similarity: what the images are compared by, in training and in refinement: "ncc", "local_ncc", ...
        moves: "points" (coordinates move, steps add up), or "features": the moving features are resampled at the points
            instead, looked at from their rest positions, and steps are composed. For comparison.
        interpolation: of the parents' motion: "learned", or "linear" alone. For comparison.
        supervision: "across" levels, or "within": then no gradient passes from a level to the motion found before it
            (the parents' features, which an interpolation reads, it still trains). For comparison.
        carry: hand the parents' features h down too, not only their positions.
        smoothing_vox: standard deviation of a Gaussian that smooths the displacement of a step, voxels of its level; 0,
            as in the paper, leaves each point to itself. Smoothed, a point inside of one tissue, where nothing tells it
            where to go, goes with the borders round it.
        slab: points computed at a time where gradients are kept: more points than that cost time, not memory.
        checkpointed: recompute the encoder's features in backward: less memory, more time.
    """

    grid: Grid
    widths: tuple[int, ...] = (16, 32, 64)
    windows: tuple[int, ...] = (0, 3, 3)
    parents: tuple[int, ...] = (3, 3)
    iterations: tuple[int, ...] = ()
    channels: int = 1
    encoders: int = 1
    contrasts: tuple[str, ...] = ()
    similarity: str = "ncc"
    moves: str = "points"
    interpolation: str = "learned"
    supervision: str = "across"
    carry: bool = False
    smoothing_vox: float = 0.0
    slab: int = 2**18
    checkpointed: bool = False

    def __post_init__(self) -> None:
        levels = len(self.widths)
        if not levels or len(self.windows) != levels or len(self.parents) != levels - 1:
            raise ValueError(
                f"A GeoReg of {levels} levels needs as many windows and one parents' window less, not "
                f"{len(self.windows)} and {len(self.parents)}."
            )
        if len(self.iterations) not in (0, levels):
            raise ValueError(f"Iterations are one number for each of the {levels} levels, or none at all.")
        if not self.steps[-1]:
            raise ValueError("The coarsest level has nothing to interpolate from: it has a window, and takes a step.")
        whole = (*self.windows, *self.parents, *self.iterations, self.slab)
        if not all(isinstance(n, int) and n >= 0 for n in whole):
            raise ValueError(f"Windows, iterations and the slab are whole numbers of 0 or more, not {whole}.")
        if any(width % 2 or width < 2 for width in self.widths):
            raise ValueError("Widths are even numbers of at least 2.")
        if not 0 <= self.smoothing_vox < math.inf:
            raise ValueError(f"A smoothing is a finite number of voxels of 0 or more, not {self.smoothing_vox}.")
        for name, options in (("moves", MOVES), ("interpolation", INTERPOLATIONS), ("supervision", SUPERVISIONS)):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} is one of {', '.join(options)}, not {getattr(self, name)!r}.")
        if self.encoders not in (1, 2):
            raise ValueError(f"Two images have 1 encoder or 2, not {self.encoders}.")
        if self.contrasts and (self.encoders, len(self.contrasts)) != (2, 2):
            raise ValueError(f"Two contrasts are those of two encoders, not {self.contrasts} of {self.encoders}.")
        dissimilarity(self.similarity)  # an unknown name is refused here, not in the first step of a training
        check_size(self.grid, levels)

    @property
    def steps(self) -> tuple[int, ...]:
        """Deformation steps a level, finest first."""
        times = self.iterations or (1,) * len(self.widths)
        return tuple(n if window else 0 for n, window in zip(times, self.windows, strict=True))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "GeoRegConfig":
        """Back from ``dataclasses.asdict`` (a checkpoint's header).

        Raises:
            ValueError: if a key is unknown, or one that has no default is missing.
        """
        try:
            return GeoRegConfig(**as_tuples(values) | {"grid": Grid(**as_tuples(values["grid"]))})
        except (KeyError, TypeError) as error:
            raise ValueError(f"This is no configuration of a GeoReg ({error}).") from None


def check_size(grid: Grid, levels: int) -> None:
    """Raise a ValueError unless a grid can be halved so often that each level is an average of the one before."""
    factor = 2 ** (levels - 1)
    if any(n % factor for n in grid.shape):
        near = tuple(-(-n // factor) * factor for n in grid.shape)
        raise ValueError(
            f"A GeoReg of {levels} levels halves the grid {levels - 1} times, which {grid.shape} voxels do not allow; "
            f"{near} would."
        )


@dataclass(frozen=True, eq=False)
class _Level:
    """Where the points of one level are by now, and what they know."""

    grid: Grid
    own: Float[Tensor, "b c *grid"]  # features of the fixed points
    other: Float[Tensor, "b c *grid"]  # features of the moving image
    displacement: Float[Tensor, "b *grid d"]  # mm
    state: Float[Tensor, "b c *grid"]  # h of the last step

    @staticmethod
    def at_rest(grid: Grid, own: Tensor, other: Tensor) -> "_Level":
        """Before the first step: nothing has moved, and h is the points' own feature."""
        return _Level(grid, own, other, own.new_zeros(len(own), *grid.shape, grid.dim), own)


class GeoReg(nn.Module):
    """The model. Nothing is kept between calls.

    Args:
        config: what it is made of.
    """

    def __init__(self, config: GeoRegConfig) -> None:
        super().__init__()
        self.config = config
        dim, widths = config.grid.dim, config.widths
        self.encoders = nn.ModuleList(PyramidEncoder(dim, config.channels, widths) for _ in range(config.encoders))
        spacings = [max(config.grid.spacing) * 2**level for level in range(len(widths))]
        # One deformation step for all iterations of a level; modules are stored finest first, like everything.
        self.deform = nn.ModuleList(
            Deformation(dim, width, width, spacing, window) if steps else nn.Identity()
            for width, spacing, window, steps in zip(widths, spacings, config.windows, config.steps, strict=True)
        )
        learned = config.interpolation == "learned"
        self.inherit = nn.ModuleList(
            Deformation(dim, child, parent, spacing, window) if learned and window else nn.Identity()
            for (child, parent), spacing, window in zip(
                itertools.pairwise(widths), spacings[1:], config.parents, strict=True
            )
        )
        self.hand_down = nn.ModuleList(
            nn.Linear(parent, child, bias=False) for child, parent in itertools.pairwise(widths) if config.carry
        )

    def forward(self, moving: Tensor, fixed: Tensor, grid: Grid, finest: int = 0) -> Result:
        """Register a batch of pairs.

        Args:
            moving: ``b c *grid`` in [0, 1].
            fixed: the same.
            grid: where both sit; any size that can be halved as often as needed, any spacing.
            finest: stop after this level, counted from the finest, 0: a coarse answer, and most of the time saved.

        Returns:
            The transform, a Dense on ``grid``, or on that of the level where it stops; the images as features; a step
            for every position update, coarse to fine, whose parameters are displacements in mm on its level's grid.

        Raises:
            ValueError: if the grid can not be halved so often or has another number of axes, the images do not fit it,
                or ``finest`` is no level.
        """
        self._check(moving, fixed, grid)
        if not 0 <= finest < len(self.config.widths):
            raise ValueError(f"Levels are counted from 0, the finest, to {len(self.config.widths) - 1}, not {finest}.")
        pyramids = [
            encoder(image, self.config.checkpointed)
            for encoder, image in zip((self.encoders[0], self.encoders[-1]), (moving, fixed), strict=True)
        ]
        steps = self._decode(pyramids[0], pyramids[1], grid, finest)
        kept = (tuple(pyramids[0]), tuple(pyramids[1])) if self.training else None
        return Result(after_each(steps)[-1], (moving, fixed), steps, pyramids=kept)

    def align(self, moving: Tensor, fixed: Tensor, grid: Grid) -> Result:
        """The same as a call: what refinement compares are the images themselves."""
        result: Result = self(moving, fixed, grid)
        return result

    @exactly
    def _decode(self, moving: list[Tensor], fixed: list[Tensor], grid: Grid, finest: int) -> tuple[Step, ...]:
        steps: list[Step] = []
        parent: _Level | None = None
        for level in reversed(range(finest, len(self.config.widths))):
            here = _Level.at_rest(grid.coarsened(2**level), fixed[level].float(), moving[level].float())
            if parent is not None:
                here, own = self._inherited(level, here, parent)
                steps.append(_step(own, here.grid))
            for _ in range(self.config.steps[level]):
                here, own = self._deformed(level, here)
                steps.append(_step(own, here.grid))
            parent = here
        return tuple(steps)

    def _inherited(self, level: int, here: _Level, parent: _Level) -> tuple[_Level, Tensor]:
        """Positions from the parents: linear, and corrected by attention to them; and the correction, mm."""
        moved = parent.displacement.detach() if self.config.supervision == "within" else parent.displacement
        if self.config.carry:
            state = parent.state.detach() if self.config.supervision == "within" else parent.state
            told = self.hand_down[level](state.movedim(1, -1)).movedim(-1, 1)
            here = replace(here, own=here.own + sample(told, grid_points(here.grid, told.device)[None], parent.grid))
        here = replace(here, displacement=upsampled(moved, parent.grid, here.grid), state=here.own)
        if isinstance(self.inherit[level], nn.Identity):
            return here, torch.zeros_like(here.displacement)
        positions = grid_points(parent.grid, moved.device) + moved

        def to_parents(query: Tensor, rest: Tensor, points: Tensor, **asked: Any) -> Tensor:
            return parent_attention(query, parent.own, positions, rest, points, parent.grid, **asked)

        return self._moved(self.inherit[level], here, to_parents)

    def _deformed(self, level: int, here: _Level) -> tuple[_Level, Tensor]:
        """One step at a level: attention to the moving image round the present positions; and the step, mm."""
        resampled = self.config.moves == "features"  # the ablation: resample, and look from the rest positions
        features = warp(here.other, Dense(here.displacement, here.grid), here.grid) if resampled else here.other

        def to_moving(query: Tensor, rest: Tensor, points: Tensor, **asked: Any) -> Tensor:
            return neighbourhood_attention(query, features, rest if resampled else points, here.grid, **asked)

        moved, step = self._moved(self.deform[level], here, to_moving)
        if not resampled:
            return moved, step
        # What is seen from rest is taken from rest: first the step, then all that was before it.
        rest = flat_points(here.grid, step.device)
        after = (Dense(here.displacement, here.grid)(rest + step.flatten(1, -2)) - rest).unflatten(1, here.grid.shape)
        return replace(moved, displacement=after), after - here.displacement

    def _moved(self, module: nn.Module, here: _Level, attend: Attention) -> tuple[_Level, Tensor]:
        """Apply a deformation module to every point of a level, in slabs where there are many."""
        own = here.own.flatten(2).mT
        rest = flat_points(here.grid, own.device).expand(len(own), -1, -1)
        points = rest + here.displacement.flatten(1, -2)
        slab = self.config.slab if torch.is_grad_enabled() and self.config.slab < own.shape[1] else 0
        shift, state = in_slabs(partial(module, attend), slab, own, rest, points).tensor_split([here.grid.dim], -1)
        shift = smooth_field(shift.unflatten(1, here.grid.shape), self.config.smoothing_vox, here.grid)
        state = state.mT.unflatten(2, here.grid.shape)
        return replace(here, displacement=here.displacement + shift, state=state), shift

    def _check(self, moving: Tensor, fixed: Tensor, grid: Grid) -> None:
        check_size(grid, len(self.config.widths))
        if grid.dim != self.config.grid.dim:
            raise ValueError(f"This network registers images of {self.config.grid.dim} axes, not {grid.dim}.")
        check_pair(moving, fixed, self.config.channels, grid)


class PyramidEncoder(nn.Module):
    """Features of one image at several resolutions: two residual blocks a level, average pooling between levels.

    A level's features sit on ``grid.coarsened(2**level)``: a pooled voxel lies in the middle of what was pooled.

    Args:
        dim: 2 or 3.
        inputs: channels of the image.
        widths: channels a level, finest first.
    """

    def __init__(self, dim: int, inputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[dim]
        self.levels = nn.ModuleList(
            nn.Sequential(_Residual(dim, a, b), _Residual(dim, b, b)) for a, b in itertools.pairwise((inputs, *widths))
        )

    def forward(self, image: Float[Tensor, "b i *grid"], checkpointed: bool = False) -> list[Tensor]:
        """One feature image a level, finest first."""
        found = []
        for level, blocks in enumerate(self.levels):
            image = image if level == 0 else self.pool(image, 2)
            image = checkpoint(blocks, image, use_reentrant=False) if checkpointed else blocks(image)
            found.append(image)
        return found


class _Residual(nn.Module):
    """relu(x + conv(relu(conv(x)))), with a projection of x where the width changes."""

    def __init__(self, dim: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = conv(dim, inputs, outputs), conv(dim, outputs, outputs)
        self.skip = nn.Identity() if inputs == outputs else conv(dim, inputs, outputs, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.second(F.relu(self.first(x))))


class Deformation(nn.Module):
    """Attention, two normalised residual layers, and a displacement: one step of points.

    Args:
        dim: 2 or 3.
        asks: channels of the points.
        answers: channels of those they attend to.
        spacing_mm: distance between those.
        window: neighbours an axis.
    """

    frequencies: Tensor

    def __init__(self, dim: int, asks: int, answers: int, spacing_mm: float, window: int) -> None:
        super().__init__()
        self.window = window
        # An offset across the whole window makes one turn of a frequency of 1.
        self.spacing_mm, self.length_mm = spacing_mm, spacing_mm * window
        self.query, self.key = nn.Linear(asks, answers), nn.Linear(answers, answers, bias=False)
        self.value, self.out = nn.Linear(answers, asks), nn.Linear(asks, asks)
        self.norms = nn.ModuleList(nn.LayerNorm(asks) for _ in range(2))
        self.feed = nn.Sequential(nn.Linear(asks, 2 * asks), nn.ReLU(), nn.Linear(2 * asks, asks))
        self.head = nn.Sequential(nn.Linear(asks, 2 * asks), nn.ReLU(), nn.Linear(2 * asks, dim, bias=False))
        zero_start(self.head[-1])
        self.register_buffer("frequencies", torch.randn(dim, answers // 2))

    def forward(self, attend: Attention, own: Tensor, rest: Tensor, points: Tensor) -> Float[Tensor, "b n k"]:
        """Displacement (mm) and new features of each point, side by side: a slab is one tensor.

        Args:
            attend: to whom.
            own: ``b n c``, features of the points.
            rest: ``b n d``, where they were, mm.
            points: ``b n d``, where they are, mm.
        """
        # The key's projection is absorbed into the query; its bias would cancel in the softmax.
        query = self.query(own) @ self.key.weight * own.new_tensor(self.frequencies.shape[1] * 2).rsqrt()
        heard = attend(query, rest, points, window=self.window, frequencies=self.frequencies, length_mm=self.length_mm)
        state = self.norms[0](own + self.out(self.value(heard)))
        state = self.norms[1](state + self.feed(state))
        return torch.cat([self.spacing_mm * self.head(state), state], -1)


# ---- steps ----


def _step(own: Tensor, grid: Grid) -> Step:
    return Step(own, partial(_dense, grid=grid), _added)


def _dense(displacement: Tensor, grid: Grid) -> Dense:
    return Dense(displacement, grid)


def _added(before: Transform, own: Transform) -> Transform:
    """The positions before a step, brought to its grid, and the step: displacements add up, nothing is composed."""
    if not isinstance(before, Dense) or not isinstance(own, Dense):
        raise TypeError("The steps of a GeoReg are displacements on grids.")
    same = before.grid.shape == own.grid.shape
    inherited = before.displacement if same else upsampled(before.displacement, before.grid, own.grid)
    return Dense(inherited + own.displacement, own.grid)
