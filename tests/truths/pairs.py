"""Pairs of images whose true transform is known, as files and arrays, and a model that has learnt nothing.

The untrained network predicts the identity and has no ITN, so that what registers is the refinement alone: the truth
does not depend on weights.
"""

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from regteach.checkpoints import Model
from regteach.grid import Grid
from regteach.nets.istn import ISTN, AffineStage, ISTNConfig, SplineStage
from regteach.refinement import Refinement

from .fields import positions

NETS = {2: Grid((48, 56), (2.0,)), 3: Grid((32, 36, 32), (3.0,))}
# Other voxels, and another field of view, in each of the two; both hold all of the phantom.
FIXED = {2: Grid((100, 112), (1.0,), (-50.0, -52.0)), 3: Grid((50, 44, 54), (2.0, 2.5, 1.8), (-50.0, -56.0, -48.0))}
MOVING = {2: Grid((60, 48), (2.0, 2.5), (-58.0, -66.0)), 3: Grid((56, 36, 60), (2.0, 3.0, 1.9), (-52.0, -60.0, -58.0))}


def untrained(dim: int, spline: bool = True) -> Model:
    """A model that predicts the identity; its refinement turns an affine, and a spline unless it is left out."""
    torch.manual_seed(0)
    stages = (AffineStage(widths=(4, 8), hidden=8), SplineStage(16.0, widths=(4, 8)))
    network = ISTN(ISTNConfig(NETS[dim], stages if spline else stages[:1], itn=())).eval().requires_grad_(False)
    return Model(f"untrained-{dim}d", network, Refinement(60, rate=0.05))


@dataclass(frozen=True)
class Motion:
    """T(x) = A x + t, about the origin, from fixed to moving points, mm."""

    matrix: np.ndarray
    shift: np.ndarray

    @staticmethod
    def of(dim: int) -> "Motion":
        """A fixed one, with turn, scale and shear: 3 to 11 mm within the blobs."""
        matrix = np.array([[1.06, 0.08, -0.03], [-0.10, 0.95, 0.04], [0.02, -0.05, 1.04]])
        return Motion(matrix[:dim, :dim], np.array([5.0, -4.0, 3.0])[:dim])

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Fixed points ``... d`` to moving points."""
        return points @ self.matrix.T + self.shift

    def back(self, points: np.ndarray) -> np.ndarray:
        """Moving points to fixed points."""
        return (points - self.shift) @ np.linalg.inv(self.matrix).T


def blobs(points: np.ndarray) -> np.ndarray:
    """Twelve smooth blobs within 45 mm of the origin, on nothing (0), at points ``... d``."""
    dim = points.shape[-1]
    rng = np.random.default_rng(5)
    centres, widths, heights = rng.uniform(-22, 22, (12, dim)), rng.uniform(5, 9, 12), rng.uniform(0.4, 1, 12)
    value = sum(
        h * np.exp(-((points - c) ** 2).sum(-1) / (2 * w**2)) for h, c, w in zip(heights, centres, widths, strict=True)
    )
    return np.where(value > 0.05, value, 0).astype(np.float32)


def pair(dim: int, motion: Motion, moving: Grid | None = None, fixed: Grid | None = None) -> tuple[np.ndarray, ...]:
    """The blobs, moved and fixed, as arrays on these grids."""
    moving, fixed = moving or MOVING[dim], fixed or FIXED[dim]
    return blobs(motion.back(positions(moving))), blobs(positions(fixed))


def seen(grid: Grid, most: int = 2000) -> np.ndarray:
    """Voxel centres of a fixed grid where there are blobs, ``n d``."""
    points = positions(grid)[blobs(positions(grid)) > 0.1]
    return points[:: max(1, len(points) // most)]


def error_mm(result, motion: Motion) -> np.ndarray:
    """Distance of each of these points from where it belongs."""
    points = seen(result.fixed.grid)
    return np.linalg.norm(result.transform(points) - motion(points), axis=-1)


def affine_of(grid: Grid) -> np.ndarray:
    """The grid as a file says it, 4 x 4."""
    affine = np.eye(4)
    affine[range(grid.dim), range(grid.dim)] = grid.spacing
    affine[: grid.dim, 3] = grid.origin
    return affine


def write(path: Path, array: np.ndarray, grid: Grid | None = None, affine: np.ndarray | None = None) -> Path:
    """A NIfTI file; 2D as one slice."""
    affine = affine_of(grid) if affine is None else affine
    nib.save(nib.Nifti1Image(array.reshape((*array.shape, 1)[:3]), affine), path)
    return path
