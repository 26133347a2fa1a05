"""The spline with a learned smoothing: what it reproduces, what it lets go of, and what it is used in."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from regteach.checkpoints import Model, load, save_model
from regteach.data.matches import random_field
from regteach.grid import Grid
from regteach.nets.kernel import KernelConfig, LearnedKernel
from regteach.nets.learned_spline import LearnedSpline
from regteach.sampling import flat_points

CONFIG = KernelConfig(width=8, rounds=0, degree=0, spline=True)
POINTS = 100 * torch.rand(150, 3, generator=torch.Generator().manual_seed(1))
QUERY = 20 + 60 * torch.rand(40, 3, generator=torch.Generator().manual_seed(2))
SLOPE = torch.tensor([[0.1, 0.0, 0.05], [0.0, -0.1, 0.0], [0.02, 0.0, 0.2]])


def shaken(config: KernelConfig = CONFIG) -> LearnedKernel:
    torch.manual_seed(0)
    model = LearnedKernel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return model.eval()


@pytest.mark.parametrize("dim", [2, 3])
def test_an_affine_motion_is_reproduced_whatever_was_learned(dim: int) -> None:
    model = shaken(replace(CONFIG, dim=dim))
    slope = SLOPE[:dim, :dim]
    found = model.reconstruct(POINTS[:, :dim], POINTS[:, :dim] @ slope + 3, QUERY[:, :dim])
    assert torch.allclose(found, QUERY[:, :dim] @ slope + 3, atol=1e-3)


def test_it_turns_with_its_input() -> None:
    spline = LearnedSpline(6, 8, 10)
    nn.init.normal_(spline.get_parameter("logits.4.weight"))
    motion = 5 * random_field(POINTS, 3, 40.0, torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5)))[0]
    said, doubt = torch.rand(150, 6), torch.rand(150)
    found = spline(POINTS, motion, said, doubt).at(QUERY)
    turned = spline(POINTS @ turn, motion @ turn, said, doubt).at(QUERY @ turn)
    # The polynomial is scaled by the box, which does not change what it spans.
    assert torch.allclose(turned.float(), (found @ turn.double()).float(), atol=1e-3)


def test_training_lets_go_of_the_wrong_ones() -> None:
    torch.manual_seed(0)
    model, generator = LearnedKernel(replace(CONFIG, neighbours=15)), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), 2e-2)

    def draw() -> tuple[torch.Tensor, ...]:
        points = 100 * torch.rand(120, 3, generator=generator)
        motion = 6 * random_field(points, 3, 50.0, generator)
        given, wrong = motion[:100].clone(), torch.rand(100, generator=generator) < 0.15
        given[wrong] += 15 * torch.randn(int(wrong.sum()), 3, generator=generator)
        return points[:100], given, points[100:], motion[100:]

    def error(count: int) -> torch.Tensor:
        terms = []
        for _ in range(count):
            points, given, query, truth = draw()
            terms.append((model.reconstruction(points, given).at(query) - truth).norm(dim=1).mean())
        return torch.stack(terms).mean()

    with torch.no_grad():
        before = error(10)
    for _ in range(40):
        optimiser.zero_grad()
        error(2).backward()
        optimiser.step()
    with torch.no_grad():
        after = error(10)
    assert after < 0.75 * before


def test_the_field_on_a_grid_is_that_at_its_points_also_with_one_more() -> None:
    model, grid = shaken(), Grid((5, 6, 4), (20.0,))
    motion = 5 * random_field(POINTS, 3, 40.0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        field = model.reconstruction(POINTS, motion)
        dense = field.on(grid)
        assert torch.allclose(dense.flatten(0, -2), field.at(flat_points(grid)[0]), atol=1e-4)
        place = torch.tensor([[40.0, 60.0, 40.0]])
        more, changed = field.added(place, place + 9.0, model, dense, grid)
        assert torch.allclose(changed, more.on(grid), atol=1e-4)
        assert torch.allclose(more.at(place), torch.full((1, 3), 9.0), atol=1.0)


def test_a_correspondence_that_is_given_is_passed_through() -> None:
    model, given = shaken(), torch.zeros(150, dtype=torch.bool)
    motion = 5 * random_field(POINTS, 3, 40.0, torch.Generator().manual_seed(0))
    motion[7] += 20.0
    given[7] = True
    with torch.no_grad():
        doubted = model.reconstruction(POINTS, motion).at(POINTS[[7]])
        trusted = model.reconstruction(POINTS, motion, given=given).at(POINTS[[7]])
    assert torch.allclose(trusted[0], motion[7], atol=0.5)
    assert (doubted[0] - motion[7]).norm() > 5


@pytest.mark.parametrize("few", ["five", "in one plane"])
def test_without_a_spline_the_kernel_is_alone(few: str) -> None:
    points = POINTS[:5] if few == "five" else POINTS * torch.tensor([1.0, 1.0, 0.0])
    model = shaken()
    field = model.reconstruction(points, torch.full_like(points, 2.0))
    assert field.start is None
    assert torch.allclose(field.at(QUERY), torch.full_like(QUERY, 2.0), atol=1e-4)


def test_two_matches_at_one_place_are_no_error() -> None:
    points = torch.cat([POINTS, POINTS[:3]])
    found = shaken().reconstruct(points, points @ SLOPE, QUERY)
    assert torch.allclose(found, QUERY @ SLOPE, atol=1e-3)


def test_it_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    model = shaken()
    assert KernelConfig.from_dict(asdict(CONFIG)) == CONFIG
    back = load(save_model(tmp_path / "k.safetensors", Model("k", model)))
    motion = 5 * random_field(POINTS, 3, 40.0, torch.Generator().manual_seed(0))
    assert back.network.config == CONFIG
    assert back.dim == 3
    there, here = (m.reconstruct(POINTS, motion, QUERY) for m in (back.network, model))
    assert torch.allclose(there, here, atol=0.05)  # half precision
    with pytest.raises(ValueError, match="works on keypoints and has no grid"):
        _ = back.grid
    with pytest.raises(ValueError, match="no configuration of a learned kernel"):
        KernelConfig.from_dict({"widht": 3})
