"""Random deformations whose truth is known exactly, at every point of space.

Each function returns a transform (fixed points to moving points, mm), not a resampled field: its value at a point is
the truth, whatever grid the images live on. All numbers come from the given ``torch.Generator``, so a seed fixes them;
``batch`` draws that many different deformations at once.

| function | what it is | folds? |
|---|---|---|
| :func:`random_affine` | turn, scale, shear, shift | never |
| :func:`random_smooth` | cubic B-spline, C2 | not with ``fold_free``, nor below 0.4 of its spacing; above 1, mostly |
| :func:`composed` | a smooth one, then an affine | as its smooth part |
| :func:`brownian` | fractal noise: continuous, with corners at its nodes | from an amplitude of about 0.04 on |
| :func:`family` | brownian, alone or plus an affine | small hardly, medium in places, large in a third of space |

Sources: the fractal noise and the five families follow Sideri-Lampretsa et al., Interpretable deformable image
registration: a geometric deep learning perspective, arXiv 2412.13294, Table 3; the numbers in :data:`RANGES` are ours,
not the paper's. The bound below which a spline can not fold: Choi and Lee, Injectivity conditions of 2D and 3D uniform
cubic B-spline functions, Graphical Models 62 (2000).
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from regteach import bspline
from regteach.affine import Affine, AffineBounds
from regteach.grid import Grid
from regteach.transforms import Compose, Dense, FreeForm, Sum, determinant

T = TypeVar("T")

OCTAVES = (16, 32, 64)
# No component of any coefficient above this part of the control spacing: the spline can not fold (Choi and Lee 2000).
SAFE_AMPLITUDE = bspline.FOLD_FREE


@dataclass(frozen=True)
class Range:
    """How far the parts of a family go.

    Args:
        brownian: amplitude of each octave of noise, as a fraction of half the extent of each axis.
        rotation_deg: largest turn about each axis.
        scale_ratio: largest factor along each axis, 1.2 for 1/1.2 to 1.2.
        translation: largest shift along each axis, as a fraction of half the shortest extent.
    """

    brownian: float
    rotation_deg: float
    scale_ratio: float
    translation: float


RANGES = {
    "small": Range(brownian=0.03125, rotation_deg=10.0, scale_ratio=1.1, translation=0.1),
    "medium": Range(brownian=0.0625, rotation_deg=20.0, scale_ratio=1.2, translation=0.2),
    "large": Range(brownian=0.125, rotation_deg=30.0, scale_ratio=1.3, translation=0.3),
}
# Which parts of a Range each family uses; the noise is in all of them.
FAMILIES = {
    "brownian": (),
    "rotation": ("rotation_deg",),
    "scaling": ("scale_ratio",),
    "translation": ("translation",),
    "all": ("rotation_deg", "scale_ratio", "translation"),
}


def random_affine(
    grid: Grid, bounds: AffineBounds, generator: torch.Generator, batch: int = 1, like: Tensor | None = None
) -> Affine:
    """A random affine transform about the middle of the grid; it never folds.

    Args:
        grid: the image's grid; its centre is the centre of rotation.
        bounds: every part is uniform between minus and plus its bound; scales are uniform in their logarithm.
        generator: source of all random numbers.
        batch: how many transforms.
        like: tensor that gives device and dtype; float32 on the generator's device where left out.
    """
    uniform = _uniform((batch, sum(AffineBounds.counts(grid.dim))), generator, like)
    # AffineBounds squashes by tanh, which this undoes: what is left is uniform.
    return bounds.parts(torch.atanh(uniform.clamp(-1 + 1e-6, 1 - 1e-6)), grid.dim).about(grid.centre)


def random_smooth(
    grid: Grid,
    spacing_mm: float | Sequence[float],
    amplitude_mm: float,
    generator: torch.Generator,
    batch: int = 1,
    fold_free: bool = False,
    like: Tensor | None = None,
) -> FreeForm:
    """A random free-form deformation: smooth (twice continuously differentiable), and fold-free if asked.

    Args:
        grid: the image's grid.
        spacing_mm: distance between control points, one number or one per axis: the length scale.
        amplitude_mm: coefficients are uniform within minus and plus this, and no displacement component exceeds it.
        generator: source of all random numbers.
        batch: how many transforms.
        fold_free: shrink each deformation, where needed, until det J is at least 0.1 at every voxel. One whose
            amplitude is below 0.48 (2D) or 0.40 (3D) of the smallest spacing can not fold anywhere, and is left as
            it is.
        like: tensor that gives device and dtype; float32 on the generator's device where left out.
    """
    ctrl = bspline.control_grid(grid, spacing_mm)
    coefficients = amplitude_mm * _uniform((batch, *ctrl.shape, grid.dim), generator, like)
    transform = FreeForm(coefficients, ctrl)
    return _shrunk_until_unfolded(transform, grid) if fold_free else transform


def brownian(
    grid: Grid,
    amplitude: float,
    generator: torch.Generator,
    batch: int = 1,
    octaves: Sequence[int] = OCTAVES,
    like: Tensor | None = None,
) -> Sum:
    """Fractal noise: the mean of octaves of uniform noise, each on its own coarse grid and interpolated linearly.

    The source adds noise of amplitude 0.125 in coordinates that run from -1 to 1 over the image. One such unit is half
    the extent (outer face to outer face) of an axis, so component k of a node's displacement is uniform within
    ``amplitude * extent[k] / 2`` mm. The first and the last node of an octave lie on the outer faces of the image.

    All octaves have the same amplitude, so the finest is the steepest, and it folds: of space, nothing at amplitude
    0.03, about 6 % at 0.0625, about a third at 0.125, in 2D and 3D alike. The transform is exact at any point. Its
    ``jacobian`` is that of ``Dense``, central differences over the nodes, which smooths: at 0.125 it shows 2 or 3 %.

    Args:
        grid: the image's grid.
        amplitude: fraction of half the extent; 0.125 in the source.
        generator: source of all random numbers.
        batch: how many transforms.
        octaves: nodes per axis of each octave, at least 2.
        like: tensor that gives device and dtype; float32 on the generator's device where left out.

    Raises:
        ValueError: if there is no octave, or one has fewer than two nodes.
    """
    if not octaves or min(octaves) < 2:
        raise ValueError(f"Fractal noise needs octaves of at least two nodes per axis, not {tuple(octaves)}.")
    parts = []
    for nodes in octaves:
        coarse = _face_to_face(grid, nodes)
        noise = _uniform((batch, *coarse.shape, grid.dim), generator, like)
        half_extent = noise.new_tensor(grid.extent) / 2
        parts.append(Dense(noise * half_extent * (amplitude / len(octaves)), coarse))
    return Sum(tuple(parts))


def composed(
    grid: Grid,
    bounds: AffineBounds,
    spacing_mm: float | Sequence[float],
    amplitude_mm: float,
    generator: torch.Generator,
    batch: int = 1,
    fold_free: bool = False,
    like: Tensor | None = None,
) -> Compose:
    """A random smooth deformation followed by a random affine: ``affine(smooth(x))``; folds where the smooth part does.

    Arguments as in :func:`random_smooth` and :func:`random_affine`.
    """
    smooth = random_smooth(grid, spacing_mm, amplitude_mm, generator, batch, fold_free, like)
    return Compose((smooth, random_affine(grid, bounds, generator, batch, like)))


def family(
    name: str, size: str, grid: Grid, generator: torch.Generator, batch: int = 1, like: Tensor | None = None
) -> Sum:
    """One of the five families of large deformations, in one of three ranges.

    Displacements of the noise and of the affine are added, both at the fixed point, as in the source.

    Args:
        name: "brownian" (noise alone), "rotation", "scaling", "translation" (noise plus that), "all".
        size: "small", "medium" or "large", see :data:`RANGES`.
        grid: the image's grid.
        generator: source of all random numbers.
        batch: how many transforms.
        like: tensor that gives device and dtype; float32 on the generator's device where left out.

    Raises:
        ValueError: for an unknown name or size, with the nearest known one.
    """
    parts, limit = _known(name, FAMILIES, "family"), _known(size, RANGES, "range")
    noise = brownian(grid, limit.brownian, generator, batch, like=like)
    if not parts:
        return noise
    used = replace(Range(0.0, 0.0, 1.0, 0.0), **{part: getattr(limit, part) for part in parts})
    bounds = AffineBounds(
        translation_mm=used.translation * min(grid.extent) / 2,
        rotation_deg=used.rotation_deg,
        scale_ratio=used.scale_ratio,
        stretch_axes_deg=0.0,
    )
    return Sum((random_affine(grid, bounds, generator, batch, like), *noise.transforms))


def _uniform(shape: tuple[int, ...], generator: torch.Generator, like: Tensor | None) -> Tensor:
    """Uniform numbers in [-1, 1), drawn in float32 on the generator's device, so that a seed gives them anywhere."""
    numbers = 2 * torch.rand(shape, generator=generator, device=generator.device) - 1
    return numbers if like is None else numbers.to(like)


def _face_to_face(grid: Grid, nodes: int) -> Grid:
    """Grid of ``nodes`` points per axis with the first and the last on the outer faces of ``grid``."""
    origin = tuple(o - h / 2 for o, h in zip(grid.origin, grid.spacing, strict=True))
    return Grid((nodes,) * grid.dim, tuple(length / (nodes - 1) for length in grid.extent), origin)


def _shrunk_until_unfolded(transform: FreeForm, grid: Grid, least: float = 0.1) -> FreeForm:
    """Shrink each item of the batch by steps of a tenth until det J at the voxels is at least ``least``."""
    coefficients = transform.coefficients
    safe = SAFE_AMPLITUDE[grid.dim] * min(transform.grid.spacing)
    while True:
        smallest = determinant(FreeForm(coefficients, transform.grid).jacobian_on(grid)).flatten(1).amin(1)
        largest = coefficients.flatten(1).abs().amax(1)
        folded = (smallest < least) & (largest > safe)
        if not bool(folded.any()):
            return FreeForm(coefficients, transform.grid)
        factor = torch.where(folded, 0.9, 1.0).to(coefficients)
        coefficients = coefficients * factor.reshape(-1, *[1] * (coefficients.ndim - 1))


def _known(name: str, table: dict[str, T], what: str) -> T:
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"There is no {what} {name!r}; the nearest is {near!r}, and the others are {', '.join(table)}."
        )
    return table[name]
