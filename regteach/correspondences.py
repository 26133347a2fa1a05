"""Points that a user gives: checked, brought into the frame of a network, and added to a field of keypoints."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from regteach import framing
from regteach.data.volumes import Volume
from regteach.framing import span
from regteach.grid import Grid
from regteach.nets.keypoint_field import Field
from regteach.transforms import Dense, Transform, jacobian_determinant

Table = np.ndarray | Tensor | Sequence[Sequence[float]]  # n rows of coordinates


@dataclass(frozen=True, eq=False)
class Keypoints:
    """What a field of keypoints needs to take in one more: of models with a kernel.

    Args:
        field: on the working grid, with a network of its own.
        dense: the same at every voxel, ``1 *grid d``, mm.
        det: Jacobian determinants of the transform there, ``1 *grid``.
        grid: the working grid.
        start: from the working grid's moving frame to the moving image's world.
        fixed: the fixed image on the working grid.
        read: the moving image on the working grid, through any transform to world coordinates.
        given: correspondences that people gave, fixed and moving, ``n d`` each, world mm.
    """

    field: Field
    dense: Float[Tensor, "1 *grid d"]
    det: Float[Tensor, "1 *grid"]
    grid: Grid
    start: Transform
    fixed: Float[Tensor, "1 1 *grid"]
    read: framing.Reader
    given: tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]

    @property
    def count(self) -> int:
        """How many correspondences were given."""
        return len(self.given[0])

    @property
    def transform(self) -> Dense:
        """On the working grid."""
        return Dense(self.dense, self.grid)

    def added(self, fixed: Volume, moving: Volume, points: tuple[Table, Table]) -> "Keypoints":
        """With correspondences more, in the worlds of both images; a ValueError where they do not fit."""
        new = correspondences(points, fixed, moving)
        given = torch.cat([self.given[0], new[0]]), torch.cat([self.given[1], new[1]])
        _check_one_place_each(*given)
        there = in_working_frame(new, self.grid, self.start, self.fixed.device)
        field, dense = self.field.added(there, self.dense[0], self.grid)
        det = _determinant_again(self.det, self.dense, dense[None], self.grid)
        return replace(self, field=field, dense=dense[None], det=det, given=given)


def _points(points: Table) -> Tensor:
    """In double precision: whether a point lies inside must not depend on rounding."""
    if isinstance(points, Tensor):
        return points.detach().cpu().double()
    return torch.from_numpy(np.array(points, dtype=np.float64))


def inside(points: Table, grid: Grid, name: str, where: str) -> Float[Tensor, "n d"]:
    """A table of finite points on a grid, or a ValueError."""
    try:
        given = _points(points)
    except (TypeError, ValueError):
        raise ValueError(f"{name.capitalize()} are a table of n rows and {grid.dim} columns of numbers.") from None
    if given.ndim != 2 or given.shape[1] != grid.dim:
        raise ValueError(
            f"{name.capitalize()} are a table of n rows and {grid.dim} columns, but this is {tuple(given.shape)}."
        )
    wrong = int((~given.isfinite()).any(1).sum())
    if wrong:
        raise ValueError(f"{wrong} of {len(given)} {name} are not finite (NaN or infinity).")
    # A voxel reaches half its width beyond its centre; a thousandth of it is left for rounding.
    half = 0.501 * given.new_tensor(grid.spacing)
    low, high = given.new_tensor(grid.origin) - half, given.new_tensor(grid.last) + half
    outside = int(((given < low) | (given > high)).any(1).sum())
    if outside:
        raise ValueError(
            f"{outside} of {len(given)} {name} lie outside of {where}, which reaches from "
            f"{span(low.tolist())} to {span(high.tolist())} mm."
        )
    return given


def correspondences(points: Any, fixed: Volume, moving: Volume) -> tuple[Tensor, Tensor]:
    """The pair of tables of ``points=``, world mm, or a ValueError."""
    if not isinstance(points, tuple | list) or len(points) != 2:
        raise ValueError("Known points are a pair of tables, (fixed_mm, moving_mm), of n rows each.")
    first = inside(points[0], fixed.grid, "points in fixed_mm", "the fixed image")
    second = inside(points[1], moving.grid, "points in moving_mm", "the moving image")
    if len(first) != len(second):
        raise ValueError(f"{len(first)} points in fixed_mm and {len(second)} in moving_mm are no pairs.")
    if not len(first):
        raise ValueError("There is no point in fixed_mm and moving_mm.")
    _check_one_place_each(first, second)
    return first, second


def _check_one_place_each(fixed: Float[Tensor, "n d"], moving: Float[Tensor, "n d"]) -> None:
    """A ValueError if one point of the fixed image is given two places in the moving one."""
    for place, there in zip(fixed, moving, strict=True):
        same = (fixed == place).all(1)
        if bool((moving[same] != there).any()):
            raise ValueError(f"The point {tuple(place.tolist())} mm of fixed_mm is given two places in moving_mm.")


def in_working_frame(
    points: tuple[Tensor, Tensor], grid: Grid, start: Transform, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Points of the two worlds, in the frame that the network works in."""
    fixed, moving = (table.float().to(device) for table in points)
    inside(points[0], grid, "points in fixed_mm", "what the network looks at")
    return fixed, start.inverse()(moving[None])[0]


def takes_no_points(name: str) -> str:
    """What is said of a model that correspondences were given to in vain."""
    return f"{name} takes no points: only models of keypoints do, refined by their parameters or not at all."


def _determinant_again(
    det: Float[Tensor, "1 *grid"], before: Float[Tensor, "1 *grid d"], after: Float[Tensor, "1 *grid d"], grid: Grid
) -> Float[Tensor, "1 *grid"]:
    """Jacobian determinants of a field of which a part has changed: computed for the box around that part."""
    where = (after != before).any(-1)[0].nonzero()
    if not len(where):
        return det
    ends = list(zip(where.amin(0).tolist(), where.amax(0).tolist(), grid.shape, strict=True))
    # A voxel's slopes look one voxel further: those one beyond the change are new, and need one more.
    (low, high), (first, stop) = (
        ([max(0, a - m) for a, _, _ in ends], [min(n, b + 1 + m) for _, b, n in ends]) for m in (2, 1)
    )
    box = (slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))
    part = grid.cropped(low, high)
    found = jacobian_determinant(Dense(after[box], part), part)
    inner = [slice(a - shift, b - shift) for a, b, shift in zip(first, stop, low, strict=True)]
    changed = det.clone()
    changed[(slice(None), *(slice(a, b) for a, b in zip(first, stop, strict=True)))] = found[(slice(None), *inner)]
    return changed
