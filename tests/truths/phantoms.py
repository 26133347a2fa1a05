"""Images whose content is known in closed form, and the hardest one to index."""

import numpy as np

from regteach.grid import Grid


def ball(points: np.ndarray, centre: np.ndarray, radius_mm: float) -> np.ndarray:
    """1 inside a ball and 0 outside, at points ``... d``."""
    return (((points - centre) ** 2).sum(axis=-1) <= radius_mm**2).astype(float)


def noise(grid: Grid, batch: int = 1, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Uniform noise in [0, 1) on a grid, ``b c *grid``: the hardest image for an index that is off by one."""
    return np.random.default_rng(seed).random((batch, channels, *grid.shape))
