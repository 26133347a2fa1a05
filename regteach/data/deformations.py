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
| :func:`fractal` | fractal noise as the coefficients of a spline: C2 | never |

The families of large deformations, which are made of these, are in :mod:`large`.

Sources: the fractal noise follows Sideri-Lampretsa et al., Interpretable deformable image registration: a geometric
deep learning perspective, arXiv 2412.13294. The bound below which a spline can not fold: Choi and Lee, Injectivity
conditions of 2D and 3D uniform cubic B-spline functions, Graphical Models 62 (2000).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from regteach import bspline
from regteach.affine import Affine, AffineBounds
from regteach.grid import Grid, per_axis
from regteach.sampling import flat_points, sample
from regteach.transforms import Compose, Dense, FreeForm, Sum, determinant

OCTAVES = (16, 32, 64)
SMOOTH_OCTAVES = (3, 6, 12)
# No component of any coefficient above this part of the control spacing: the spline can not fold (Choi and Lee 2000).
SAFE_AMPLITUDE = bspline.FOLD_FREE


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


def fractal(
    grid: Grid,
    amplitude: float | Sequence[float],
    generator: torch.Generator,
    batch: int = 1,
    octaves: Sequence[int] = SMOOTH_OCTAVES,
    like: Tensor | None = None,
) -> FreeForm:
    """Fractal noise that can be undone: a cubic B-spline whose coefficients are a sum of octaves, without folds.

    Each octave is uniform noise with as many nodes per axis, read linearly at the control points of the last; it has
    half the amplitude of the one before, so that all are about equally steep. Component k of the displacement stays
    within ``amplitude * extent[k] / 2`` mm everywhere, as in :func:`brownian`.

    A deformation is shrunk, where needed, until det J is at least 0.1 on a lattice of three points a control spacing.
    In 2D and 3D, this begins to happen at an amplitude of about 0.3, and at 0.375 it takes off a tenth or two of some.
    The numbers do not depend on how finely the image is sampled.

    Args:
        grid: the image's grid.
        amplitude: fraction of half the extent, one number or one per axis.
        generator: source of all random numbers.
        batch: how many transforms.
        octaves: control spacings per axis of each octave, in rising order.
        like: tensor that gives device and dtype; float32 on the generator's device where left out.

    Raises:
        ValueError: if the octaves are none, or not positive and rising.
    """
    if not octaves or min(octaves) < 1 or list(octaves) != sorted(set(octaves)):
        raise ValueError(f"The octaves of fractal noise are positive numbers in rising order, not {tuple(octaves)}.")
    ctrl = _over_faces(grid, octaves[-1])
    total = torch.zeros(())
    for k, nodes in enumerate(octaves):
        coarse = _over_faces(grid, nodes)
        noise = _uniform((batch, grid.dim, *coarse.shape), generator, like)
        at_controls = sample(noise, flat_points(ctrl, noise.device, noise.dtype), coarse)
        total = total + at_controls.unflatten(-1, ctrl.shape) / 2**k
    weights = sum(0.5**k for k in range(len(octaves)))
    reach = total.new_tensor(
        [a * e / 2 for a, e in zip(per_axis(amplitude, grid.dim, "amplitude"), grid.extent, strict=True)]
    )
    coefficients = total.movedim(1, -1) * reach / weights
    return _shrunk_until_unfolded(FreeForm(coefficients, ctrl), grid.resized((3 * octaves[-1],) * grid.dim))


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


def _uniform(shape: tuple[int, ...], generator: torch.Generator, like: Tensor | None) -> Tensor:
    """Uniform numbers in [-1, 1), drawn in float32 on the generator's device, so that a seed gives them anywhere."""
    numbers = 2 * torch.rand(shape, generator=generator, device=generator.device) - 1
    return numbers if like is None else numbers.to(like)


def _face_to_face(grid: Grid, nodes: int) -> Grid:
    """Grid of ``nodes`` points per axis with the first and the last on the outer faces of ``grid``."""
    origin = tuple(o - h / 2 for o, h in zip(grid.origin, grid.spacing, strict=True))
    return Grid((nodes,) * grid.dim, tuple(length / (nodes - 1) for length in grid.extent), origin)


def _over_faces(grid: Grid, nodes: int) -> Grid:
    """Control grid with ``nodes`` spacings from face to face, and one more control point on either side."""
    spacing = tuple(length / nodes for length in grid.extent)
    origin = tuple(c - 0.5 * (nodes + 2) * h for c, h in zip(grid.centre, spacing, strict=True))
    return Grid((nodes + 3,) * grid.dim, spacing, origin)


def _shrunk_until_unfolded(transform: FreeForm, grid: Grid, least: float = 0.1) -> FreeForm:
    """Shrink each item of the batch by steps of a tenth until det J at the voxels is at least ``least``."""
    coefficients = transform.coefficients.clone()
    safe = SAFE_AMPLITUDE[grid.dim] * min(transform.grid.spacing)
    left = torch.arange(len(coefficients), device=coefficients.device)  # those that may still fold
    while len(left):
        part = coefficients[left]
        smallest = determinant(FreeForm(part, transform.grid).jacobian_on(grid)).flatten(1).amin(1)
        left = left[(smallest < least) & (part.flatten(1).abs().amax(1) > safe)]
        coefficients[left] *= 0.9
    return FreeForm(coefficients, transform.grid)
