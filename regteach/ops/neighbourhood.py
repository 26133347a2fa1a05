"""Attention of moving points to the grid points near them: the operation that GeoReg is built on.

A point i at any position x_i asks the k^d grid points j of a window round it, and takes from each as much as it
listens to it. Features stay on their grid, and positions are never rounded:

    m_ij = f_j + g(x_i - x_j)                        what j says, and from where
    a_ij = softmax over j of <q_i, m_ij>             how much i listens
    z_i  = sum over j of a_ij m_ij

    g(r) = [sin 2 pi B r / L, cos 2 pi B r / L]      Fourier features of an offset r, mm

with fixed frequencies B and a length L in mm. Projections of one head need no place in here: the query's and the key's
go into q (a key's bias cancels in the softmax), and the value's is applied to z (the weights add up to 1).

The window of a point holds the k grid points of each axis that are nearest to it, for odd and even k alike (of two
windows that are equally near, the lower one: an even k at a grid point). A point outside of the grid has the window of
the nearest position inside; offsets are measured from where it is. Neighbours beyond the border are left out of the
softmax; at least one is always there.

:func:`neighbourhood_attention` and :func:`parent_attention` have plain forms beside them, which read like the formulas
and keep every neighbour of every point. The others gather in blocks, keep nothing but the weights, and take the
positions apart by the theorems of addition: g(x_i - x_j) is a rotation of what depends on i alone, by an angle that
depends on j alone.

Source: Sideri-Lampretsa et al., Interpretable deformable image registration: a geometric deep learning perspective,
arXiv 2412.13294, eqs 4 to 7; Fourier features: Tancik et al., NeurIPS 2020. The refactoring is ours.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regteach.grid import Grid
from regteach.precision import exactly
from regteach.sampling import grid_points

TIE_VOX = 1e-3  # positions this near to a tie between two windows take the lower one, so that rounding does not choose
BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**28}  # of gathered rows at a time: what a cache holds, what keeps a GPU busy


def fourier_features(
    offsets: Float[Tensor, "*any d"], frequencies: Float[Tensor, "d f"], length_mm: float
) -> Float[Tensor, "*any 2f"]:
    """g(r): sines, then cosines, of an offset in mm.

    Args:
        offsets: mm.
        frequencies: B, in turns a length.
        length_mm: L, the distance after which a frequency of 1 has made a whole turn.
    """
    angles = 2 * math.pi * (offsets @ frequencies) / length_mm
    return torch.cat([angles.sin(), angles.cos()], -1)


def windows(
    points: Float[Tensor, "*any d"], grid: Grid, window: int
) -> tuple[Int[Tensor, "*any k"], Bool[Tensor, "*any k"]]:
    """The neighbours of each point: their numbers on the flattened grid, and which of them are there.

    Args:
        points: mm.
        grid: whose points are the neighbours.
        window: neighbours an axis; k of the result is window^d, the last axis running fastest.

    Returns:
        Numbers (of a border point where there is none), and False for those beyond the border.
    """
    return _neighbours(_starts(points, grid, window), grid.shape, window)


@exactly
def neighbourhood_attention_plain(
    query: Float[Tensor, "b n c"],
    features: Float[Tensor, "b c *grid"],
    points: Float[Tensor, "b n d"],
    grid: Grid,
    window: int,
    frequencies: Float[Tensor, "d f"],
    length_mm: float,
) -> Float[Tensor, "b n c"]:
    """What :func:`neighbourhood_attention` computes, as the formulas say it. Keeps b n k^d c numbers several times."""
    _check(query, features, points, grid, window, frequencies, length_mm)
    neighbours, inside = windows(points, grid, window)
    positions = grid_points(grid, points.device, points.dtype).flatten(0, -2)[neighbours]
    said = _rows(features, neighbours) + fourier_features(points.unsqueeze(-2) - positions, frequencies, length_mm)
    return _listen(query, said, inside)


@exactly
def parent_attention_plain(
    query: Float[Tensor, "b n c"],
    features: Float[Tensor, "b c *grid"],
    moved: Float[Tensor, "b *grid d"],
    rest: Float[Tensor, "b n d"],
    points: Float[Tensor, "b n d"],
    grid: Grid,
    window: int,
    frequencies: Float[Tensor, "d f"],
    length_mm: float,
) -> Float[Tensor, "b n c"]:
    """What :func:`parent_attention` computes, as the formulas say it."""
    _check(query, features, points, grid, window, frequencies, length_mm)
    _check_parents(moved, rest, points, grid)
    neighbours, inside = windows(rest, grid, window)
    positions = _rows(moved.movedim(-1, 1), neighbours)
    said = _rows(features, neighbours) + fourier_features(points.unsqueeze(-2) - positions, frequencies, length_mm)
    return _listen(query, said, inside)


@exactly
def neighbourhood_attention(
    query: Float[Tensor, "b n c"],
    features: Float[Tensor, "b c *grid"],
    points: Float[Tensor, "b n d"],
    grid: Grid,
    window: int,
    frequencies: Float[Tensor, "d f"],
    length_mm: float,
) -> Float[Tensor, "b n c"]:
    """z of the points: attention to the grid points in the window round each.

    Differentiable in the query, the features and the positions (within a window; where it jumps to the next one, z
    jumps too, as far as the weights at its edge are not zero).

    Args:
        query: q, already projected and divided by sqrt c.
        features: f, of the grid points.
        points: x, mm.
        grid: of the features.
        window: k, neighbours an axis, of which those beyond the border are missing: 2 n - 1 see all of n from anywhere.
        frequencies: B, half as many as channels.
        length_mm: L.

    Raises:
        ValueError: if the shapes do not fit, or a window or a length is not positive.
    """
    _check(query, features, points, grid, window, frequencies, length_mm)
    start = _starts(points, grid, window)
    spacing, origin = points.new_tensor(grid.spacing), points.new_tensor(grid.origin)
    # x_i - x_j = (x_i - first of the window) - (j - first): the second takes only k^d values, the same for all points.
    along = fourier_features(points - (origin + start * spacing), frequencies, length_mm)
    steps = points.new_tensor(list(itertools.product(range(window), repeat=grid.dim)))
    table = _turned(fourier_features(steps * spacing, frequencies, length_mm))
    taken, weights = _gathered(query, features, start, window, _asked(query, along) @ table.T)
    return taken + _told(weights @ table, along)


@exactly
def parent_attention(
    query: Float[Tensor, "b n c"],
    features: Float[Tensor, "b c *grid"],
    moved: Float[Tensor, "b *grid d"],
    rest: Float[Tensor, "b n d"],
    points: Float[Tensor, "b n d"],
    grid: Grid,
    window: int,
    frequencies: Float[Tensor, "d f"],
    length_mm: float,
) -> Float[Tensor, "b n c"]:
    """z of child points: attention to the parents round each, which have moved.

    Who is a parent of whom was settled at rest, and stays so; how far they are from each other is measured where they
    are now: m_ij = f_j + g(x_i - y_j).

    Args:
        query: q of the children, already projected and divided by sqrt c.
        features: f of the parents, on the coarser grid.
        moved: y, where the parents are now, mm.
        rest: where the children were, mm; chooses their parents.
        points: x, where the children are now, mm.
        grid: of the parents at rest.
        window: k, parents an axis.
        frequencies: B, half as many as channels.
        length_mm: L.

    Raises:
        ValueError: if the shapes do not fit, or a window or a length is not positive.
    """
    _check(query, features, points, grid, window, frequencies, length_mm)
    _check_parents(moved, rest, points, grid)
    here = _phases(points, frequencies, length_mm)
    there = _turned(_phases(moved, frequencies, length_mm)).movedim(-1, 1)
    # The parents' angles are gathered with their features: as many channels again, and no table.
    both, _ = _gathered(
        torch.cat([query, _asked(query, here)], -1), torch.cat([features, there], 1), _starts(rest, grid, window),
        window, None,
    )  # fmt: skip
    taken, turned = both.chunk(2, -1)
    return taken + _told(turned, here)


def in_slabs(
    function: Callable[..., Tensor], size: int, *points: Float[Tensor, "b n _"], **shared: Any
) -> Float[Tensor, "b n _"]:
    """A function of independent points, computed for some of them at a time and, in training, again for the gradient.

    Gives the same numbers as the function at once, and keeps only what goes in and what comes out.

    Args:
        function: of the tensors and what is shared; one result a point.
        size: points at a time; 0 computes all at once, and keeps everything.
        points: tensors that are cut along their second axis.
        shared: passed on whole.
    """
    if not size:
        return function(*points, **shared)
    parts = [
        checkpoint(function, *cut, use_reentrant=False, **shared)
        for cut in zip(*(tensor.split(size, 1) for tensor in points), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


# ---- positions taken apart ----
#
# With t = 2 pi B r / L, g(r) = [sin t, cos t]. For an offset that is a difference, t = t_i - t_j,
#     <q, g> = sum of q_s sin(t_i - t_j) + q_c cos(t_i - t_j)
#            = sum of cos t_j (q_s sin t_i + q_c cos t_i) + sin t_j (q_c sin t_i - q_s cos t_i)
#            = <_asked(q, g_i), e_j>,   e_j = [cos t_j, sin t_j] = _turned(g_j),
# and with the transpose of that map, g(x_i - x_j) = _told(e_j, g_i), which is linear in e_j: the weights can be summed
# over the e_j first.


def _turned(embedding: Tensor) -> Tensor:
    sin, cos = embedding.chunk(2, -1)
    return torch.cat([cos, sin], -1)


def _asked(query: Tensor, embedding: Tensor) -> Tensor:
    (for_sin, for_cos), (sin, cos) = query.chunk(2, -1), embedding.chunk(2, -1)
    return torch.cat([for_sin * sin + for_cos * cos, for_cos * sin - for_sin * cos], -1)


def _told(turned: Tensor, embedding: Tensor) -> Tensor:
    (cos_j, sin_j), (sin, cos) = turned.chunk(2, -1), embedding.chunk(2, -1)
    return torch.cat([sin * cos_j - cos * sin_j, cos * cos_j + sin * sin_j], -1)


def _phases(points: Tensor, frequencies: Tensor, length_mm: float) -> Tensor:
    """Fourier features of positions, not of offsets: many turns, of which only the last, unfinished one counts.

    Whole turns are taken off in double precision, or the sine of a thousand radians would lose four digits.
    """
    turns = points.double() @ frequencies.double() / length_mm
    angles = (2 * math.pi * (turns - turns.detach().round())).to(points.dtype)
    return torch.cat([angles.sin(), angles.cos()], -1)


# ---- gathering ----


def _gathered(
    query: Tensor, features: Tensor, start: Tensor, window: int, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention to raw rows, and its weights ``b n k``; ``bias`` is added to <q, f_j>."""
    found: tuple[Tensor, Tensor] = _Gather.apply(query, features.flatten(2).mT, start, bias, features.shape[2:], window)
    return found


class _Gather(torch.autograd.Function):
    """z = sum of a f, a = softmax(<q, f> + bias): in blocks that fit a cache; backward gathers once more."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, rows: Tensor, start: Tensor, bias: Tensor | None, shape: torch.Size, window: int
    ) -> tuple[Tensor, Tensor]:
        rows = rows.contiguous()
        taken, weights = torch.empty_like(query), query.new_empty(*query.shape[:2], window ** len(shape))
        for at, _, inside, told in _blocks(rows, start, shape, window):
            logits = torch.bmm(told, query[at].unsqueeze(-1)).squeeze(-1)
            if bias is not None:
                logits += bias[at]
            weights[at] = logits.masked_fill_(~inside, -math.inf).softmax(-1)
            taken[at] = torch.bmm(weights[at].unsqueeze(-2), told).squeeze(-2)
        ctx.save_for_backward(query, rows, start, weights)
        ctx.layout = shape, window, bias is not None
        return taken, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    @exactly
    def backward(ctx: Any, of_taken: Tensor, of_weights: Tensor) -> tuple[Tensor | None, ...]:
        query, rows, start, weights = ctx.saved_tensors
        shape, window, biased = ctx.layout
        of_query, of_rows, of_logits = torch.empty_like(query), torch.zeros_like(rows), torch.empty_like(weights)
        for at, neighbours, _, told in _blocks(rows, start, shape, window):
            a, outer = weights[at], of_taken[at]
            of_a = torch.bmm(told, outer.unsqueeze(-1)).squeeze(-1) + of_weights[at]
            change = a * (of_a - (a * of_a).sum(-1, keepdim=True))
            of_logits[at] = change
            of_query[at] = torch.bmm(change.unsqueeze(-2), told).squeeze(-2)
            # Each row took part as a key and as a value.
            torch.mul(change.unsqueeze(-1), query[at].unsqueeze(-2), out=told)
            told.addcmul_(a.unsqueeze(-1), outer.unsqueeze(-2))
            of_rows[at[0]].index_add_(0, neighbours.flatten(), told.flatten(0, 1))
        return of_query, of_rows, None, of_logits if biased else None, None, None


def _blocks(
    rows: Tensor, start: Tensor, shape: torch.Size, window: int
) -> Iterator[tuple[tuple[int, slice], Tensor, Tensor, Tensor]]:
    """Item and points of each block, their neighbours, which of these are there, and what they say, ``n k c``."""
    per_point, channels = window ** len(shape), rows.shape[-1]
    count = max(1, BLOCK_BYTES.get(rows.device.type, 2**24) // (per_point * channels * rows.element_size()))
    buffer = rows.new_empty(min(count, start.shape[1]) * per_point, channels)
    for item in range(len(rows)):
        for first in range(0, start.shape[1], count):
            at = item, slice(first, min(first + count, start.shape[1]))
            neighbours, inside = _neighbours(start[at], shape, window)
            told = buffer[: neighbours.numel()]
            torch.index_select(rows[item], 0, neighbours.flatten(), out=told)
            yield at, neighbours, inside, told.unflatten(0, neighbours.shape)


# ---- windows ----


def _starts(points: Tensor, grid: Grid, window: int) -> Int[Tensor, "*any d"]:
    """First voxel of each window: k grid points lie in the k voxels round a position."""
    points = points.detach()
    vox = (points - points.new_tensor(grid.origin)) / points.new_tensor(grid.spacing)
    vox = vox.clamp(points.new_zeros(grid.dim), points.new_tensor(grid.shape) - 1)
    return (vox - (0.5 * window + TIE_VOX)).ceil().int()


def _neighbours(start: Tensor, shape: Sequence[int], window: int) -> tuple[Tensor, Tensor]:
    numbers = torch.zeros((), dtype=torch.int, device=start.device)
    inside = torch.ones((), dtype=torch.bool, device=start.device)
    for axis, size in enumerate(shape):
        along = start[..., axis, None] + torch.arange(window, dtype=torch.int, device=start.device)
        along = along.unflatten(-1, [window if a == axis else 1 for a in range(len(shape))])
        numbers = numbers * size + along.clamp(0, size - 1)
        inside = inside & (along >= 0) & (along < size)
    return numbers.flatten(-len(shape)), inside.flatten(-len(shape))


def _rows(values: Float[Tensor, "b c *grid"], numbers: Int[Tensor, "b n k"]) -> Float[Tensor, "b n k c"]:
    return torch.stack([rows[at] for rows, at in zip(values.flatten(2).mT, numbers, strict=True)])


def _listen(query: Tensor, said: Float[Tensor, "b n k c"], inside: Tensor) -> Float[Tensor, "b n c"]:
    logits = (said * query.unsqueeze(-2)).sum(-1).masked_fill(~inside, -math.inf)
    return (logits.softmax(-1).unsqueeze(-1) * said).sum(-2)


def _check(
    query: Tensor, features: Tensor, points: Tensor, grid: Grid, window: int, frequencies: Tensor, length_mm: float
) -> None:
    channels = 2 * frequencies.shape[-1]
    if query.shape != (*points.shape[:2], channels) or tuple(features.shape) != (len(points), channels, *grid.shape):
        raise ValueError(
            f"Queries of the shape {tuple(query.shape)} and features of the shape {tuple(features.shape)} do not fit "
            f"{points.shape[1]} points, a grid of {grid.shape} voxels and {frequencies.shape[-1]} frequencies, which "
            f"make {channels} channels."
        )
    if points.shape[-1] != grid.dim or len(frequencies) != grid.dim:
        raise ValueError(
            f"Points of {points.shape[-1]} coordinates and frequencies of {len(frequencies)} do not fit a grid of "
            f"{grid.dim} axes."
        )
    if window < 1 or not length_mm > 0:
        raise ValueError(f"A window of {window} voxels and a length of {length_mm} mm must both be positive.")


def _check_parents(moved: Tensor, rest: Tensor, points: Tensor, grid: Grid) -> None:
    if moved.shape != (len(points), *grid.shape, grid.dim) or rest.shape != points.shape:
        raise ValueError(
            f"The parents' positions have the shape {tuple(moved.shape)} and the children's {tuple(rest.shape)}, which "
            f"does not fit a grid of {grid.shape} voxels and {points.shape[1]} children."
        )
