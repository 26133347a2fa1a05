"""The VoxelMorph-style network: identity at the start, displacements in mm, learns a translation."""

import json
from dataclasses import asdict

import pytest
import torch

from regteach import objectives
from regteach.grid import Grid
from regteach.nets.voxelmorph import VoxelMorph, VoxelMorphConfig
from regteach.refinement import Refinement, refine
from regteach.regularity import bending_energy
from regteach.result import Step
from regteach.sampling import grid_points
from regteach.transforms import Dense, Velocity, displacement

GRIDS = [Grid((16, 24), (1.0, 2.0)), Grid((8, 16, 12), (1.0, 1.5, 2.0))]


def blob(grid: Grid, shift_mm: float = 0.0) -> torch.Tensor:
    points = grid_points(grid) - torch.tensor(grid.centre)
    points[..., 0] -= shift_mm
    return torch.exp(-points.square().sum(-1) / (2 * 3.0**2))[None, None]


@pytest.mark.parametrize("grid", GRIDS, ids=["2d", "3d"])
@pytest.mark.parametrize("steps", [0, 4])
def test_the_untrained_network_is_the_identity(grid: Grid, steps: int) -> None:
    torch.manual_seed(0)
    net = VoxelMorph(VoxelMorphConfig(grid, (8, 8, 8), steps=steps))
    result = net(torch.rand(2, 1, *grid.shape), torch.rand(2, 1, *grid.shape), grid)
    assert isinstance(result.transform, Velocity if steps else Dense)
    assert displacement(result.transform, grid).shape == (2, *grid.shape, grid.dim)
    assert displacement(result.transform, grid).abs().max() == 0


@pytest.mark.parametrize("grid", GRIDS, ids=["2d", "3d"])
def test_parameters_are_millimetres(grid: Grid) -> None:
    net = VoxelMorph(VoxelMorphConfig(grid, (8, 8)))
    step = net(blob(grid), blob(grid), grid).steps[0]
    shift = torch.arange(1.0, grid.dim + 1)
    built = step.build(shift.expand_as(step.parameters))
    assert torch.allclose(displacement(built, grid), shift.expand(1, *grid.shape, grid.dim), atol=1e-5)


def test_it_learns_a_translation_and_refinement_lowers_the_loss() -> None:
    torch.manual_seed(0)
    grid = Grid((24, 24))
    moving, fixed = blob(grid, 2.0), blob(grid)
    net = VoxelMorph(VoxelMorphConfig(grid, (8, 16, 16)))
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = objectives.total(objectives.multiscale(net(moving, fixed, grid), grid, "ncc", 1.0)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    result = net(moving, fixed, grid)
    middle = displacement(result.transform, grid)[0, 12, 12]
    assert torch.allclose(
        middle, torch.tensor([2.0, 0.0]), atol=0.5
    )  # fixed to moving: the blob lies 2 mm further down
    refined = refine(net, result, grid, Refinement(10, rate=0.02))
    assert refined.curve[-1] < refined.curve[0]


def test_a_velocity_pays_for_bending() -> None:
    grid = GRIDS[0]
    net = VoxelMorph(VoxelMorphConfig(grid, (8, 8), steps=4))
    step = net(blob(grid), blob(grid), grid).steps[0]
    bent = Step(torch.randn(step.parameters.shape, generator=torch.Generator().manual_seed(0)), step.build)
    field = displacement(bent.build(bent.parameters), grid.coarsened(2))
    expected = 3.0 * bending_energy(field, grid.coarsened(2))
    assert expected.min() > 0
    assert torch.allclose(objectives.regulariser((bent,), grid, 3.0)["bending"], expected)


def test_the_configuration_survives_json() -> None:
    config = VoxelMorphConfig(GRIDS[1], (8, 16, 16), 2, steps=3, similarity="local_ncc")
    assert VoxelMorphConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: VoxelMorphConfig(Grid((8, 8)), (8, 8), finest=2), "can not predict at level 2"),
        (lambda: VoxelMorphConfig(Grid((9, 8)), (8, 8)), "needs a grid that 2 divides"),
        (lambda: VoxelMorphConfig(Grid((8, 8)), (8, 8), similarity="nonsense"), "no dissimilarity 'nonsense'"),
        (lambda: VoxelMorphConfig.from_dict({"grid": {"shape": [8, 8]}, "colour": 1}), "no configuration"),
    ],
)
def test_bad_configurations_are_refused(change, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        change()


def test_bad_images_are_refused() -> None:
    grid = Grid((8, 8))
    net = VoxelMorph(VoxelMorphConfig(grid, (8, 8)))
    with pytest.raises(ValueError, match=r"voxels of \(1.0, 1.0\) mm"):
        net(blob(grid), blob(grid), grid.with_spacing((2.0, 2.0)))
    with pytest.raises(ValueError, match="2 moving and 1 fixed images are not pairs"):
        net(blob(grid).expand(2, -1, -1, -1), blob(grid), grid)
    odd = Grid((7, 8))
    with pytest.raises(ValueError, match=r"needs a grid that 2 divides: \(7, 8\)"):
        net(blob(odd), blob(odd), odd)
    with pytest.raises(ValueError, match="The fixed image has the shape"):
        net(blob(grid), blob(Grid((8, 10))), grid)
