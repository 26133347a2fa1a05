"""The K nearest keypoints of points and of whole grids: exact, with ties broken in one way.

Convention: positions in mm in tensor order. Neighbours are ordered by (distance, index): of two keypoints that are
equally far, the one with the lower index counts as nearer. Distances are compared as they are computed, always by the
same operations in the same order, so that every form here finds the same neighbours, ties included. Positions are
subtracted before they are squared: |x|^2 - 2 x.y + |y|^2 would be a matrix product, and in float32 it would lose the
digits of a short distance far from the origin.

On a grid, neighbouring voxels have nearly the same neighbours. The voxels are taken in blocks. With c the middle of a
block and R the distance from c to its corners, every voxel x of it has d_K(x) <= d_K(c) + R, so each of its K nearest
lies within d_K(c) + 2 R of c, by the triangle inequality. These candidates are searched once a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regteach.grid import Grid

PAIRS_AT_ONCE = 2**22  # of point and keypoint, while neighbours are searched: 16 MB in float32
LARGE_EDGE = 16  # voxels, at most
SLACK = 1e-5  # relative; what rounding can do to a distance is far below it


def squared_distances(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """|x - y|^2 of every pair, mm^2."""
    return _added([(x[:, None, k] - y[None, :, k]).square() for k in range(x.shape[-1])])


def squared_length(offsets: Float[Tensor, "*any d"]) -> Float[Tensor, "*any"]:
    """Sum of squares, axis after axis: this order of operations is what makes distances comparable."""
    return _added([part.square() for part in offsets.unbind(-1)])


def k_nearest(query_mm: Float[Tensor, "n d"], keypoints_mm: Float[Tensor, "m d"], k: int) -> Int[Tensor, "n min(k,m)"]:
    """Indices of the K nearest keypoints of each point, by (distance, index); all of them where there are fewer."""
    k = min(k, len(keypoints_mm))
    rows = max(1, PAIRS_AT_ONCE // len(keypoints_mm))
    found = [query_mm.new_zeros(0, k, dtype=torch.long)]
    with torch.no_grad():
        for part in query_mm.split(rows):
            squared = squared_distances(part, keypoints_mm)
            # nonzero goes through the columns in order, so each row is sorted by index; a stable sort keeps that.
            index = among_nearest(squared, k).nonzero()[:, 1].view(len(part), k)
            order = squared.gather(1, index).sort(dim=1, stable=True).indices
            found.append(index.gather(1, order))
    return torch.cat(found)


def among_nearest(squared: Float[Tensor, "*any m"], k: int) -> Bool[Tensor, "*any m"]:
    """Which of the columns are the K smallest of their row, by (value, column): exactly K of them are."""
    kth = squared.topk(k, dim=-1, largest=False, sorted=False).values.amax(dim=-1, keepdim=True)
    inside = squared <= kth
    if int(inside.count_nonzero()) > inside[..., 0].numel() * k:  # some rows have a tie at the K-th place
        tied = squared == kth
        room = k - (inside & ~tied).sum(dim=-1, keepdim=True)
        inside &= ~tied | (tied.cumsum(dim=-1) <= room)
    return inside


@dataclass(frozen=True)
class Group:
    """Blocks of voxels that are worked on together.

    Args:
        axes_mm: for each axis, the coordinates of the voxels of each block along it.
        candidates: indices of the keypoints that can be neighbours, ascending; rows are filled up with 0.
        real: which of the candidates are not such filling.
        axes_vox: as axes_mm, indices.
    """

    axes_mm: tuple[Float[Tensor, "blocks edge"], ...]
    candidates: Int[Tensor, "blocks m"]
    real: Bool[Tensor, "blocks m"]
    axes_vox: tuple[Int[Tensor, "blocks edge"], ...]

    def points(self) -> Float[Tensor, "blocks voxels d"]:
        """Positions of the voxels, mm."""
        dim, full = len(self.axes_mm), (len(self.real), *(axis.shape[1] for axis in self.axes_mm))
        parts = [_along(axis, k, dim).expand(full) for k, axis in enumerate(self.axes_mm)]
        return torch.stack(parts, dim=-1).flatten(1, -2)

    def voxels(self, shape: tuple[int, ...]) -> Int[Tensor, "blocks voxels"]:
        """Place of each voxel among all of a grid of this shape, the last axis running fastest."""
        dim, place = len(shape), torch.zeros((), dtype=torch.long, device=self.real.device)
        for k, (index, n) in enumerate(zip(self.axes_vox, shape, strict=True)):
            place = place * n + _along(index, k, dim)
        return place.flatten(1)

    def rows(self, chosen: Bool[Tensor, "blocks"]) -> "Group":
        """Some of the blocks."""
        axes = [tuple(axis[chosen] for axis in of) for of in (self.axes_mm, self.axes_vox)]
        return Group(axes[0], self.candidates[chosen], self.real[chosen], axes[1])

    def squared_distances(self, candidates_mm: Float[Tensor, "blocks m d"]) -> Float[Tensor, "blocks voxels m"]:
        """|x - y|^2 of every voxel and candidate, mm^2; for the filling a number above all of them.

        Along an axis a block has ``edge`` different coordinates only, so that most of the work is two additions.
        """
        parts = [(axis[:, :, None] - candidates_mm[:, None, :, k]).square() for k, axis in enumerate(self.axes_mm)]
        # Finite, since infinity times a gradient of 0 is not 0.
        far = 1 + _added([part.detach().amax() for part in parts])
        parts[0] = torch.where(self.real[:, None], parts[0], far)
        return _added([_along(part, k, len(parts)) for k, part in enumerate(parts)]).flatten(1, -2)


class Blocks:
    """The voxels of a grid in blocks, with the keypoints that can be neighbours of any voxel of each.

    Args:
        grid: of the voxels.
        keypoints_mm: at least one.
        k: how many neighbours each voxel has.
        edge_vox: voxels along each edge of a block. Small blocks have fewer candidates, large ones less to look up.
            The last voxel of an axis is repeated where the axis is no multiple of this.
        first: leave out the blocks of which no voxel can have a keypoint from this number on among its K nearest.
    """

    def __init__(self, grid: Grid, keypoints_mm: Float[Tensor, "m d"], k: int, edge_vox: int, first: int = 0) -> None:
        self.grid, self.edge = grid, edge_vox
        keypoints = keypoints_mm.detach()
        self.axes = [
            _in_blocks(origin + spacing * torch.arange(n, device=keypoints.device, dtype=keypoints.dtype), edge_vox)
            for n, spacing, origin in zip(grid.shape, grid.spacing, grid.origin, strict=True)
        ]
        self.index = [_in_blocks(torch.arange(n, device=keypoints.device), edge_vox) for n in grid.shape]
        self.shape = tuple(len(axis) for axis in self.axes)
        self.held = torch.arange(torch.Size(self.shape).numel(), device=keypoints.device)
        factor = LARGE_EDGE // edge_vox
        if first and factor > 1:  # large blocks rule out most of the grid, and are few
            self.held = self._within(Blocks(grid, keypoints, k, edge_vox * factor, first))
        self.members, self.counts = self._candidates(keypoints, min(k, len(keypoints)))
        if first:
            owner = torch.arange(len(self.held), device=keypoints.device).repeat_interleave(self.counts)
            reached = torch.zeros_like(self.held).index_add(0, owner, (self.members >= first).long()) > 0
            self.members, self.counts = self.members[reached[owner]], self.counts[reached]
            self.held = self.held[reached]
        self.starts = self.counts.cumsum(0) - self.counts

    def _within(self, large: "Blocks") -> Int[Tensor, "blocks"]:
        """The blocks that lie in those of larger blocks."""
        factor = large.edge // self.edge
        parts = [
            (factor * place[:, None] + torch.arange(factor, device=place.device)).clamp_max(n - 1)
            for place, n in zip(torch.unravel_index(large.held, large.shape), self.shape, strict=True)
        ]
        every = torch.zeros((), dtype=torch.long, device=large.held.device)
        for axis, (part, n) in enumerate(zip(parts, self.shape, strict=True)):
            every = every * n + _along(part, axis, len(self.shape))
        return every.unique()

    def _candidates(self, keypoints: Tensor, k: int) -> tuple[Int[Tensor, "all"], Int[Tensor, "blocks"]]:
        """Candidates of one block after the other, and how many each has."""
        members, counts = [self.held.new_zeros(0, dtype=torch.int)], [self.held.new_zeros(0)]
        for block in self.held.split(max(1, PAIRS_AT_ONCE // len(keypoints))):
            axes = self._axes_of(block, self.axes)
            centre = torch.stack([(axis[:, 0] + axis[:, -1]) / 2 for axis in axes], dim=-1)
            radius = squared_length(torch.stack([(axis[:, -1] - axis[:, 0]) / 2 for axis in axes], dim=-1)).sqrt()
            squared = squared_distances(centre, keypoints)
            kth = squared.topk(k, dim=1, largest=False, sorted=False).values.amax(dim=1).sqrt()
            inside = squared <= ((kth + 2 * radius) * (1 + SLACK)).square()[:, None]
            members.append(inside.nonzero()[:, 1].int())
            counts.append(inside.sum(dim=1))
        return torch.cat(members), torch.cat(counts)

    def groups(self, pairs_at_once: int) -> Iterator[Group]:
        """All blocks, those with equally many candidates together; a group has about so many pairs of voxels and
        candidates, and at least one block.
        """
        order, voxels = self._order(), self.edge**self.grid.dim
        counts = self.counts[order].tolist()
        start = 0
        while start < len(counts):
            size = max(1, pairs_at_once // (voxels * counts[start]))  # counts descend: the first block has the most
            row = order[start : start + size]
            column = torch.arange(counts[start], device=row.device)
            real = column < self.counts[row, None]
            place = torch.where(real, self.starts[row, None] + column, 0)
            candidates = torch.where(real, self.members[place].long(), 0)
            block = self.held[row]
            yield Group(self._axes_of(block, self.axes), candidates, real, self._axes_of(block, self.index))
            start += size

    def to_grid(self, results: list[Float[Tensor, "_ voxels c"]]) -> Float[Tensor, "*grid c"]:
        """Results of the groups, in their order, put where their voxels are. Empties the list, to hold them once.

        For all blocks of a grid: where ``first`` left some out there is nothing to put there.
        """
        joined = torch.cat(results)
        results.clear()
        joined = joined[self._order().argsort()]
        dim, channels = self.grid.dim, joined.shape[-1]
        split = joined.view(*self.shape, *(self.edge,) * dim, channels)
        together = [axis for k in range(dim) for axis in (k, dim + k)]  # block, voxel in it; block, voxel in it; ...
        whole = split.permute(*together, 2 * dim).reshape(*(n * self.edge for n in self.shape), channels)
        return whole[tuple(slice(n) for n in self.grid.shape)].contiguous()

    def _order(self) -> Int[Tensor, "blocks"]:
        return self.counts.argsort(descending=True, stable=True)

    def _axes_of(self, block: Int[Tensor, "b"], axes: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(axis[i] for axis, i in zip(axes, torch.unravel_index(block, self.shape), strict=True))


def _in_blocks(coordinates: Float[Tensor, "n"], edge: int) -> Float[Tensor, "blocks edge"]:
    index = torch.arange(-(-len(coordinates) // edge) * edge, device=coordinates.device)
    return coordinates[index.clamp_max(len(coordinates) - 1)].view(-1, edge)


def _along(values: Tensor, axis: int, dim: int) -> Tensor:
    """``blocks edge ...`` with the edge at its place among ``dim`` axes of a block, for broadcasting."""
    shape = [1] * dim
    shape[axis] = values.shape[1]
    return values.view(len(values), *shape, *values.shape[2:])


def _added(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
