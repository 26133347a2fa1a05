"""Shared by all tests: one torch thread, a fixed seed before each test, hypothesis without clocks or chance."""

import pytest
import torch
from hypothesis import settings
from truths.fields import GRIDS

from regteach.grid import Grid

torch.set_num_threads(1)
settings.register_profile("steady", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[2, 3], ids=["2d", "3d"])
def grid(request: pytest.FixtureRequest) -> Grid:
    """The anisotropic, non-cubic test grid with its origin away from 0, in two and in three dimensions."""
    return GRIDS[request.param]
