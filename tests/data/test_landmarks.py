"""Landmarks as maps: closed forms at the landmark, at known distances, and in millimetres of uneven voxels."""

import math
from typing import Any

import pytest
import torch
from truths.fields import one_sentence

from regteach.data.landmarks import landmark_maps
from regteach.grid import Grid

GRIDS = {2: Grid((12, 10), (1.0, 2.5), (3.0, -4.0)), 3: Grid((8, 9, 7), (1.0, 2.0, 3.0), (-5.0, 2.0, 1.0))}


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", ["blobs", "distances"])
def test_a_map_depends_on_the_distance_in_mm_alone(dim: int, kind: str) -> None:
    grid = GRIDS[dim]
    at = (4, 3, 2)[:dim]
    place = torch.tensor([o + i * h for o, i, h in zip(grid.origin, at, grid.spacing, strict=True)])
    found = landmark_maps(place[None, None], grid, 4.0, kind)
    assert found.shape == (1, 1, *grid.shape)
    assert found[(0, 0, *at)] == pytest.approx(1.0)
    for axis, spacing in enumerate(grid.spacing):
        for steps in (-1, 1, 2):
            there = [i + steps * (k == axis) for k, i in enumerate(at)]
            r = abs(steps) * spacing
            expected = math.exp(-(r**2) / 32) if kind == "blobs" else max(0.0, 1 - r / 4)
            assert float(found[(0, 0, *there)]) == pytest.approx(expected, abs=1e-5)


def test_maps_far_from_the_origin_are_as_exact() -> None:
    near, far = Grid((9, 8, 7)), Grid((9, 8, 7), origin=(-900.0, 700.0, -800.0))
    points = 0.3 + 6 * torch.rand(1, 30, 3, generator=torch.Generator().manual_seed(0))
    there = points + torch.tensor(far.origin)
    for kind in ("blobs", "distances"):
        torch.testing.assert_close(
            landmark_maps(there, far, 2.0, kind), landmark_maps(points, near, 2.0, kind), atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("kind", ["blobs", "distances"])
def test_merged_maps_show_the_nearest(kind: str) -> None:
    torch.manual_seed(0)
    grid = GRIDS[3]
    points = torch.rand(2, 5, 3) * torch.tensor(grid.extent) + torch.tensor(grid.origin)
    each, merged = (landmark_maps(points, grid, 3.0, kind, merged=both) for both in (False, True))
    assert each.shape == (2, 5, *grid.shape)
    torch.testing.assert_close(merged, each.amax(1, keepdim=True))
    moved = landmark_maps(points + 1, grid, 3.0, kind)
    assert not torch.allclose(moved, each, atol=0.05)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "crosses"}, "not 'crosses'"),
        ({"width_mm": 0.0}, "above 0"),
        ({"points_mm": torch.zeros(1, 2, 3)}, "x 2"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match="andmark") as error:
        landmark_maps(**{"points_mm": torch.zeros(1, 2, 2), "grid": GRIDS[2], "width_mm": 2.0} | change)
    assert one_sentence(error.value, says)
