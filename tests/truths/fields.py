"""Grids, analytic displacement fields with their Jacobians, and derivatives by autograd.

Everything is in millimetres, in tensor order. The fields are plain functions of points ``... d``, so that a test can
evaluate them at voxels, between them, and after a transform.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from regteach.grid import Grid

# Non-cubic, anisotropic, away from 0: an exchanged axis, a forgotten spacing or a forgotten origin changes the numbers.
GRIDS = {
    2: Grid((7, 9), spacing=(1.0, 1.5), origin=(-3.0, 5.0)),
    3: Grid((7, 9, 11), spacing=(1.0, 1.5, 2.0), origin=(-3.0, 5.0, 10.5)),
}


def positions(grid: Grid) -> np.ndarray:
    """Voxel centres ``*grid d`` in mm, by NumPy."""
    axes = [o + s * np.arange(n) for n, s, o in zip(grid.shape, grid.spacing, grid.origin, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


def points_inside(
    grid: Grid, n: int, batch: int = 1, margin: float = 0.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Random points between the outermost voxel centres, ``margin`` voxels away from them; a negative margin leaves."""
    low = torch.tensor(grid.origin, dtype=dtype) + margin * torch.tensor(grid.spacing, dtype=dtype)
    span = (torch.tensor(grid.shape, dtype=dtype) - 1 - 2 * margin) * torch.tensor(grid.spacing, dtype=dtype)
    return low + span * torch.rand(batch, n, grid.dim, dtype=dtype)


@dataclass(frozen=True)
class LinearField:
    """u(x) = A (x - c) + b, whose flow for unit time is known in closed form."""

    matrix: np.ndarray
    offset: np.ndarray
    centre: np.ndarray

    @staticmethod
    def of(dim: int, size: float = 0.15, grid: Grid | None = None) -> "LinearField":
        """A fixed full matrix (stretch, shear and turn at once) about the middle of the test grid."""
        full = np.array([[-0.9, 0.5, -0.3], [-0.7, -0.4, 0.2], [0.1, -0.6, -0.8]])
        offset = np.array([0.3, -0.2, 0.4])
        grid = grid or GRIDS[dim]
        centre = positions(grid).reshape(-1, dim).mean(axis=0)
        return LinearField(size * full[:dim, :dim], size * offset[:dim], centre)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """The field at points ``... d``."""
        return (points - self.centre) @ self.matrix.T + self.offset

    def flow(self, points: np.ndarray) -> np.ndarray:
        """Where dx/dt = u(x) takes the points in unit time: the matrix exponential in homogeneous coordinates."""
        dim = len(self.offset)
        homogeneous = np.zeros((dim + 1, dim + 1))
        homogeneous[:dim, :dim], homogeneous[:dim, dim] = self.matrix, self.offset
        flow = scipy.linalg.expm(homogeneous)
        return (points - self.centre) @ flow[:dim, :dim].T + flow[:dim, dim] + self.centre


@dataclass(frozen=True)
class WaveField:
    """u_i(x) = a sin(2 pi x_{i+1} / wavelength + i), axes counted round: smooth, with a closed-form Jacobian.

    Component i depends on the next axis alone, so in 2D det(I + J) = 1 - product of the two slopes.
    """

    amplitude: float
    wavelength: float

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """The field at points ``... d``."""
        return self.amplitude * np.sin(self._phase(points))

    def jacobian(self, points: np.ndarray) -> np.ndarray:
        """du_i/dx_k, ``... d d``, without the identity."""
        dim = points.shape[-1]
        slope = self.amplitude * 2 * np.pi / self.wavelength * np.cos(self._phase(points))
        jacobian = np.zeros((*points.shape, dim))
        for i in range(dim):
            jacobian[..., i, (i + 1) % dim] = slope[..., i]
        return jacobian

    def _phase(self, points: np.ndarray) -> np.ndarray:
        dim = points.shape[-1]
        return 2 * np.pi * np.roll(points, -1, axis=-1) / self.wavelength + np.arange(dim)


@dataclass(frozen=True)
class CubicField:
    """Each component a random polynomial with all monomials of degree at most 3 per axis: splines give it exactly."""

    coefficients: np.ndarray  # components, then 4 per axis
    centre: np.ndarray
    scale: float

    @staticmethod
    def of(grid: Grid, components: int = 2) -> "CubicField":
        """Coefficients in [-1, 1], on coordinates shifted to the grid's middle and divided by 10 mm."""
        rng = np.random.default_rng(3)
        centre = positions(grid).reshape(-1, grid.dim).mean(axis=0)
        return CubicField(rng.uniform(-1, 1, (components, *(4,) * grid.dim)), centre, 10.0)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Values ``... components``."""
        local = np.moveaxis((points - self.centre) / self.scale, -1, 0)
        evaluate = {2: np.polynomial.polynomial.polyval2d, 3: np.polynomial.polynomial.polyval3d}[len(local)]
        return np.stack([evaluate(*local, c) for c in self.coefficients], axis=-1)


def jacobian_by_autograd(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """d function_i / d x_k at each of the points ``b n d``, by one backward pass per component."""
    points = points.detach().requires_grad_()
    out = function(points)
    rows = [torch.autograd.grad(out[..., i].sum(), points, retain_graph=True)[0] for i in range(out.shape[-1])]
    return torch.stack(rows, dim=-2)


def jacobian_by_differences(function: Callable[[Tensor], Tensor], points: Tensor, step: float = 1e-4) -> Tensor:
    """The same by central differences with this step in mm; wants float64."""
    columns = []
    for k in range(points.shape[-1]):
        shift = torch.zeros(points.shape[-1], dtype=points.dtype)
        shift[k] = step
        columns.append((function(points + shift) - function(points - shift)) / (2 * step))
    return torch.stack(columns, dim=-1)


def one_sentence(error: BaseException, *said: str) -> bool:
    """Whether the error's text is one line, one sentence, and says each of these."""
    text = str(error)
    return "\n" not in text and ". " not in text and len(text) > 15 and all(word in text for word in said)
