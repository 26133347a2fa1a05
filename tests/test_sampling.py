"""Sampling and warping, against SciPy, SimpleITK, numpy.gradient, closed forms and finite differences."""

import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor
from truths.fields import GRIDS, LinearField, one_sentence, points_inside, positions
from truths.phantoms import noise

from regteach import sampling
from regteach.grid import Grid
from regteach.sampling import (
    flat_points,
    gradient,
    grid_points,
    mm_to_vox,
    resample,
    sample,
    smooth,
    smooth_field,
    vox_to_mm,
    warp,
)


def image_on(grid: Grid, batch: int = 1, channels: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(noise(grid, batch, channels)).to(dtype)


def shifted(*mm: float):
    return lambda points: points + torch.tensor(mm, dtype=points.dtype)


# Positions


def test_grid_points_are_the_voxel_centres(grid):
    points = grid_points(grid)
    assert points.shape == (*grid.shape, grid.dim)
    assert points.dtype == torch.float32
    np.testing.assert_allclose(points, positions(grid), atol=1e-5)


def test_flat_points_follow_the_memory_order_of_an_image(grid):
    points = flat_points(grid, dtype=torch.float64)
    assert points.shape == (1, grid.size, grid.dim)
    np.testing.assert_allclose(points[0], positions(grid).reshape(-1, grid.dim), atol=1e-12)


def test_mm_to_vox_of_the_voxel_centres_are_the_indices(grid):
    indices = np.moveaxis(np.indices(grid.shape), 0, -1)
    np.testing.assert_allclose(mm_to_vox(torch.from_numpy(positions(grid)), grid), indices, atol=1e-12)


@given(
    st.sampled_from([2, 3]),
    st.lists(st.floats(-200, 200), min_size=3, max_size=3),
    st.lists(st.floats(0.2, 5), min_size=3, max_size=3),
    st.lists(st.floats(-200, 200), min_size=3, max_size=3),
)
def test_vox_to_mm_undoes_mm_to_vox(dim, point, spacing, origin):
    grid = Grid((4,) * dim, tuple(spacing[:dim]), tuple(origin[:dim]))
    points = torch.tensor(point[:dim], dtype=torch.float64)
    torch.testing.assert_close(vox_to_mm(mm_to_vox(points, grid), grid), points, rtol=0, atol=1e-10)
    torch.testing.assert_close(mm_to_vox(vox_to_mm(points, grid), grid), points, rtol=0, atol=1e-10)


# Exactness


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_identity_gives_the_image_back(grid, order, padding):
    image = image_on(grid, batch=2, channels=3)
    error = (warp(image, lambda points: points, grid, order=order, padding=padding) - image).abs().max()
    assert error <= 1e-6


@pytest.mark.parametrize("shape", [(50, 41), (24, 31, 28), (1, 6), (5, 1, 4)])
def test_identity_on_other_shapes_even_of_one_voxel(shape):
    grid = Grid(shape, spacing=(0.7, 1.3, 2.1)[: len(shape)], origin=(-11.0, 4.0, 30.0)[: len(shape)])
    image = image_on(grid)
    # a point is met to n * 3e-8 voxels in each axis, and noise changes by at most 1 from voxel to voxel;
    # twice that for coordinates in mm that were rounded before
    tolerance = max(1e-6, 2 * 3e-8 * sum(shape) + 1e-6)
    assert (warp(image, lambda points: points, grid) - image).abs().max() <= tolerance


@pytest.mark.parametrize("order", [0, 1])
def test_whole_voxel_shifts_are_exact_along_every_axis(grid, order):
    image = image_on(grid)
    for axis in range(grid.dim):
        for voxels in (-2, -1, 1, 3):
            shift = np.zeros(grid.dim)
            shift[axis] = voxels * grid.spacing[axis]
            warped = warp(image, shifted(*shift), grid, order=order)
            index = np.clip(np.arange(grid.shape[axis]) + voxels, 0, grid.shape[axis] - 1)
            expected = image.index_select(axis + 2, torch.from_numpy(index))
            assert (warped - expected).abs().max() <= 1e-6, (axis, voxels)


def test_whole_voxel_shifts_with_zeros_outside(grid):
    image = image_on(grid) + 1
    warped = warp(image, shifted(*[s * 2 for s in grid.spacing]), grid, padding="zeros")
    expected = torch.zeros_like(image)
    inner = (slice(None), slice(None))
    source = inner + tuple(slice(2, None) for _ in grid.shape)
    target = inner + tuple(slice(None, -2) for _ in grid.shape)
    expected[target] = image[source]
    assert (warped - expected).abs().max() <= 1e-6


def test_a_linear_image_is_read_exactly_between_voxels(grid):
    weights = torch.tensor((0.3, -0.2, 0.1)[: grid.dim])
    ramp = (grid_points(grid) @ weights)[None, None]
    points = points_inside(grid, 200, dtype=torch.float32)
    torch.testing.assert_close(sample(ramp, points, grid)[0, 0], (points @ weights)[0], rtol=0, atol=1e-5)


def test_the_direction_is_fixed_to_moving():
    grid = GRIDS[2]
    image = torch.zeros(1, 1, *grid.shape)
    image[0, 0, 2, 4] = 1  # a bright voxel in the moving image
    warped = warp(image, shifted(1.0, 3.0), grid)  # fixed point x is found at x + (1, 3) mm = + (1, 2) voxels
    assert warped[0, 0, 1, 2] == pytest.approx(1, abs=1e-6)
    assert warped.sum() == pytest.approx(1, abs=1e-5)


# SciPy


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(("padding", "mode"), [("border", "nearest"), ("zeros", "grid-constant")])
@pytest.mark.parametrize("margin", [0.0, -1.7], ids=["inside", "outside too"])
def test_sample_agrees_with_map_coordinates(grid, order, padding, mode, margin):
    image = image_on(grid, batch=2, channels=2, dtype=torch.float64)
    points = points_inside(grid, 500, batch=2, margin=margin)
    vox = (points.numpy() - np.array(grid.origin)) / np.array(grid.spacing)
    expected = np.stack(
        [
            [ndimage.map_coordinates(channel, where.T, order=order, mode=mode, cval=0.0) for channel in item]
            for item, where in zip(image.numpy(), vox, strict=True)
        ]
    )
    np.testing.assert_allclose(sample(image, points, grid, order, padding), expected, atol=1e-12)
    single = sample(image.float(), points.float(), grid, order, padding)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected, atol=2e-5 if order == 1 else 1e-6)


def test_points_may_have_any_number_of_axes(grid):
    image = image_on(grid, batch=2, channels=3)
    points = points_inside(grid, 24, batch=2, dtype=torch.float32)
    flat = sample(image, points, grid)
    for shape in [(24,), (4, 6), (2, 3, 4), (24, 1, 1), (2, 2, 2, 3)]:
        out = sample(image, points.reshape(2, *shape, grid.dim), grid)
        assert out.shape == (2, 3, *shape)
        torch.testing.assert_close(out.reshape(2, 3, -1), flat, rtol=0, atol=1e-6)


def test_a_batch_of_one_serves_all(grid):
    images, points = image_on(grid, batch=3), points_inside(grid, 20, batch=3, dtype=torch.float32)
    several = torch.cat([sample(images[i : i + 1], points[i : i + 1], grid) for i in range(3)])
    torch.testing.assert_close(sample(images, points, grid), several)
    torch.testing.assert_close(
        sample(images, points[:1], grid), torch.cat([sample(images[i : i + 1], points[:1], grid) for i in range(3)])
    )
    torch.testing.assert_close(
        sample(images[:1], points, grid), torch.cat([sample(images[:1], points[i : i + 1], grid) for i in range(3)])
    )


# The split over threads


@pytest.mark.parametrize("shape", [(61, 57), (61, 57, 43)])
@pytest.mark.parametrize("order", [0, 1])
def test_a_single_large_image_is_read_as_by_plain_grid_sample(shape, order):
    grid = Grid(shape, spacing=(1.0, 1.5, 2.0)[: len(shape)], origin=(-3.0, 5.0, 10.5)[: len(shape)])
    image = image_on(grid, channels=2)
    # an odd number of points, so that no split is even; some lie outside
    points = points_inside(grid, 70_001, margin=-2, dtype=torch.float32)
    weight = torch.randn(1, 2, points.shape[1])

    n = torch.tensor(grid.shape)
    vox = (points - torch.tensor(grid.origin)) / torch.tensor(grid.spacing)
    unit = ((2 * vox + 1) / n - 1).flip(-1)

    def by_torch(image: Tensor, unit: Tensor) -> Tensor:
        mode = "bilinear" if order == 1 else "nearest"
        spread = unit.reshape(1, *(1,) * (grid.dim - 1), -1, grid.dim)
        out = F.grid_sample(image, spread, mode=mode, padding_mode="border", align_corners=False)
        return out.reshape(1, 2, -1)

    results = {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours, plain = image.clone().requires_grad_(), image.clone().requires_grad_()
            where, where_plain = points.clone().requires_grad_(), unit.clone().requires_grad_()
            a, b = sample(ours, where, grid, order), by_torch(plain, where_plain)
            # nearest: a point within rounding of a voxel face may fall to either side
            wrong = (a - b).abs() > 1e-4
            assert wrong.float().mean() <= (1e-4 if order == 0 else 0)
            (a * weight).sum().backward()
            (b * weight).sum().backward()
            assert ours.grad is not None
            if order == 1:
                torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-3, atol=1e-3)
                per_mm = where_plain.grad.flip(-1) * 2 / (n * torch.tensor(grid.spacing))
                # at a voxel centre the slope jumps, and rounding decides the side
                differs = ((where.grad - per_mm).abs() > 1e-3).any(-1)
                assert differs.float().mean() < 1e-3
            results[threads] = a.detach()
    finally:
        torch.set_num_threads(1)
    assert torch.equal(results[1], results[2])


# SimpleITK


def sitk_image(array: np.ndarray, grid: Grid) -> sitk.Image:
    """The same image for ITK: axes reversed, and LPS, where our right and anterior (axes 0 and 1) count as negative."""
    flip = np.array([-1.0, -1.0, 1.0][: grid.dim])
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose()))
    image.SetSpacing([float(s) for s in grid.spacing])
    image.SetOrigin([float(o) for o in flip * grid.origin])
    image.SetDirection(np.diag(flip).ravel().tolist())
    return image


def test_warp_between_grids_agrees_with_simpleitk(grid):
    dim = grid.dim
    fixed = Grid((9, 8, 7)[:dim], spacing=(0.8, 1.1, 2.3)[:dim], origin=(-2.6, 6.3, 12.0)[:dim])
    field = LinearField.of(dim, size=0.2, grid=grid)
    matrix, shift, centre = np.eye(dim) + field.matrix, field.offset, field.centre

    def transform(points: Tensor) -> Tensor:
        M, t, c = (torch.tensor(v, dtype=points.dtype) for v in (matrix, shift, centre))
        return (points - c) @ M.T + c + t

    array = noise(grid)[0, 0]
    ours = warp(torch.from_numpy(array)[None, None].float(), transform, grid, out_grid=fixed)[0, 0].numpy()

    flip = np.diag([-1.0, -1.0, 1.0][:dim])
    affine = sitk.AffineTransform(dim)
    affine.SetMatrix((flip @ matrix @ flip).ravel().tolist())
    affine.SetCenter((flip @ centre).tolist())
    affine.SetTranslation((flip @ shift).tolist())
    reference = sitk_image(np.zeros(fixed.shape), fixed)
    theirs = sitk.GetArrayFromImage(sitk.Resample(sitk_image(array, grid), reference, affine, sitk.sitkLinear, -1.0))
    theirs = theirs.transpose()

    moved = (positions(fixed) - centre) @ matrix.T + centre + shift
    vox = (moved - np.array(grid.origin)) / np.array(grid.spacing)
    inside = ((vox > 0) & (vox < np.array(grid.shape) - 1)).all(axis=-1)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=1e-4)


def test_resample_is_a_warp_by_the_identity(grid):
    image, other = image_on(grid), grid.with_spacing(1.3)
    assert torch.equal(resample(image, grid, other), warp(image, lambda points: points, grid, out_grid=other))
    assert resample(image, grid, other).shape == (1, 1, *other.shape)


def test_resampling_onto_a_pooled_grid_is_average_pooling_by_two(grid):
    # the coarse centre lies in the middle of 2^d voxels, where linear interpolation is their mean
    image = image_on(grid)
    pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[grid.dim]
    torch.testing.assert_close(resample(image, grid, grid.coarsened(2)), pool(image, 2), rtol=0, atol=1e-5)


def test_nearest_keeps_labels(grid):
    labels = (image_on(grid) * 5).floor()
    field = LinearField.of(grid.dim)

    def transform(points: Tensor) -> Tensor:
        return points + torch.from_numpy(field(points.double().numpy())).to(points)

    warped = warp(labels, transform, grid, order=0)
    assert set(warped.unique().tolist()) <= set(labels.unique().tolist())


# Smoothing and derivatives


@pytest.mark.parametrize("sigma_mm", [0.6, 1.5, 4.0, (0.5, 2.0, 3.0)])
def test_smooth_agrees_with_scipy(grid, sigma_mm):
    image = image_on(grid, batch=2, channels=2, dtype=torch.float64)
    sigma = sigma_mm if isinstance(sigma_mm, float) else sigma_mm[: grid.dim]
    sigma_vox = np.broadcast_to(sigma, grid.dim) / np.array(grid.spacing)
    expected = ndimage.gaussian_filter(image.numpy(), (0, 0, *sigma_vox), mode="nearest", truncate=4.0)
    np.testing.assert_allclose(smooth(image, sigma, grid), expected, atol=1e-10)
    single = smooth(image.float(), sigma, grid)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected, atol=1e-5)


def test_smooth_by_nothing_and_of_a_constant(grid):
    image = image_on(grid)
    torch.testing.assert_close(smooth(image, 0.0, grid), image)
    constant = torch.full_like(image, 3.0)
    torch.testing.assert_close(smooth(constant, 2.0, grid), constant)


def test_smooth_refuses_a_negative_sigma(grid):
    with pytest.raises(ValueError) as caught:
        smooth(image_on(grid), -1.0, grid)
    assert one_sentence(caught.value, "-1")


def test_gradient_agrees_with_numpy(grid):
    field = image_on(grid, batch=2, channels=3, dtype=torch.float64)
    expected = np.stack(np.gradient(field.numpy(), *grid.spacing, axis=tuple(range(2, grid.dim + 2))), axis=-1)
    ours = gradient(field, grid)
    assert ours.shape == (*field.shape, grid.dim)
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_gradient_of_an_axis_of_two_voxels_and_of_one():
    pair = Grid((2, 5), spacing=(2.0, 1.0))
    field = image_on(pair, dtype=torch.float64)
    expected = np.stack(np.gradient(field.numpy(), 2.0, 1.0, axis=(2, 3)), axis=-1)
    np.testing.assert_allclose(gradient(field, pair), expected, atol=1e-12)
    with pytest.raises(ValueError) as caught:
        gradient(torch.zeros(1, 1, 1, 5), Grid((1, 5)))
    assert one_sentence(caught.value)


# Gradients through sampling


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_gradcheck_of_sample_in_image_and_points(grid, padding):
    image = image_on(grid.resized((3, 4, 3)[: grid.dim]), dtype=torch.float64)
    small = grid.resized((3, 4, 3)[: grid.dim])
    # 0.2 to 0.8 of the way between two voxels: at a voxel centre the slope jumps
    cell = torch.stack([torch.randint(0, n - 1, (1, 5)) for n in small.shape], dim=-1)
    points = vox_to_mm(cell + 0.2 + 0.6 * torch.rand(1, 5, grid.dim, dtype=torch.float64), small)
    image.requires_grad_()
    points.requires_grad_()
    assert torch.autograd.gradcheck(lambda i, p: sample(i, p, small, padding=padding), (image, points))


def test_gradcheck_of_smooth_and_gradient():
    grid = Grid((3, 4), spacing=(1.0, 1.5))
    field = image_on(grid, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: smooth(f, 1.2, grid), (field,))
    assert torch.autograd.gradcheck(lambda f: gradient(f, grid), (field,))


# Errors


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda g, i, p: sample(i, p, g, order=3), "3"),
        (lambda g, i, p: sample(i, p, g, padding="reflect"), "reflect"),
        (lambda g, i, p: sample(i[0], p, g), "{shape}"),
        (lambda g, i, p: sample(i[..., :-1], p, g), "{shape}"),
        (lambda g, i, p: sample(i.int(), p, g), "int"),
        (lambda g, i, p: sample(i, p[..., :1], g), "1"),
        (lambda g, i, p: sample(i.expand(2, *i.shape[1:]), p.expand(3, -1, -1), g), "3"),
        (lambda g, i, p: warp(i[..., 1:], lambda x: x, g), "{shape}"),
        (lambda g, i, p: smooth(i[..., 1:], 1.0, g), "{shape}"),
        (lambda g, i, p: gradient(i[..., 1:], g), "{shape}"),
    ],
)
def test_bad_input_gets_one_sentence(grid, call, said):
    image, points = image_on(grid), points_inside(grid, 4, dtype=torch.float32)
    with pytest.raises(ValueError) as caught:
        call(grid, image, points)
    assert one_sentence(caught.value, said.format(shape=" x ".join(map(str, grid.shape))))


def test_grid_sample_is_called_in_one_module_only():
    package = Path(sampling.__file__).parent
    callers = {path.name for path in package.rglob("*.py") if re.search(r"\bgrid_sample\(", path.read_text("utf-8"))}
    assert callers == {"sampling.py"}


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("dim", [2, 3])
def test_nowhere_reads_nan_and_nothing_else_does(dim: int, order: int) -> None:
    """Also backwards, where torch's own gradient at nan positions ends the process in 2D."""
    grid = GRIDS[dim]
    image = torch.rand(2, 1, *grid.shape, requires_grad=True)
    points = points_inside(grid, 5, dtype=torch.float32)
    expected = sampling.sample(image, points, grid, order=order)
    points[0, 3, dim - 1] = torch.nan
    points.requires_grad_()
    found = sampling.sample(image, points, grid, order=order)
    assert found[:, :, 3].isnan().all()
    rest = [0, 1, 2, 4]
    assert torch.equal(found[:, :, rest], expected[:, :, rest])
    found.nansum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()


# Half and mixed precision

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("order", [0, 1])
def test_an_image_in_half_precision_is_read_where_it_is_asked(kind: torch.dtype, order: int) -> None:
    """On a large grid half precision knows a position to two voxels only: there the ramp would be off by as many."""
    grid = Grid((160, 192, 160), origin=(-100.0, -90.0, -80.0))
    image = torch.arange(192.0)[:, None].expand(grid.shape)[None, None].to(kind)
    points = points_inside(grid, 500, dtype=torch.float32)
    expected = sample(image.float(), points, grid, order)
    for found in (sample(image, points, grid, order), sample(image.expand(2, -1, -1, -1, -1), points, grid, order)[:1]):
        assert found.dtype == kind
        assert torch.equal(found, expected.to(kind))
    if order:
        slope = image.clone().requires_grad_()
        sample(slope, points, grid).float().sum().backward()
        assert slope.grad is not None
        assert slope.grad.dtype == kind
        assert float(slope.grad.float().sum()) == pytest.approx(500, rel=0.01)


@pytest.mark.parametrize("kind", HALVES)
def test_a_warp_of_an_image_in_half_precision_is_that_of_its_values(grid: Grid, kind: torch.dtype) -> None:
    image = image_on(grid, 2, 3).to(kind)
    move = shifted(*(0.3, -0.7, 1.1)[: grid.dim])
    found = warp(image, move, grid)
    assert found.dtype == kind
    assert torch.equal(found, warp(image.float(), move, grid).to(kind))


@pytest.mark.parametrize("points", [torch.float32, torch.float64])
@pytest.mark.parametrize("image", [torch.float32, torch.float64])
def test_the_values_have_the_precision_of_the_image(grid: Grid, image: torch.dtype, points: torch.dtype) -> None:
    found = sample(image_on(grid, dtype=image), points_inside(grid, 5, dtype=points), grid)
    assert found.dtype == image


@pytest.mark.parametrize("kind", HALVES)
def test_half_precision_is_smoothed_in_float32(grid: Grid, kind: torch.dtype) -> None:
    image = image_on(grid, 2, 3).to(kind)
    found = smooth(image, 1.7, grid)
    assert found.dtype == kind
    assert torch.equal(found, smooth(image.float(), 1.7, grid).to(kind))


def test_a_displacement_is_smoothed_to_its_last_digit_in_mixed_precision(grid: Grid) -> None:
    field = (24.5 + torch.rand(1, *grid.shape, grid.dim)).requires_grad_()
    image = image_on(grid)
    expected, plain = smooth_field(field, 1.2, grid), smooth(image, 1.2, grid)
    slope = torch.autograd.grad(expected.square().sum(), field)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = smooth_field(field, 1.2, grid)
        assert torch.equal(smooth(image, 1.2, grid), plain)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found.square().sum(), field)[0], slope)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.7])
def test_smoothing_is_the_convolution_with_a_gaussian(sigma: float) -> None:
    """The plain form: the border repeated, one kernel after the other; also where it is wider than the image."""
    grid = Grid((9, 40))
    image = torch.rand(2, 3, *grid.shape, dtype=torch.float64)
    radius = max(1, int(4 * sigma + 0.5))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).reshape(1, 1, -1)
    plain = image
    for axis in (2, 3):
        rows = plain.movedim(axis, -1)
        flat = F.pad(rows.reshape(-1, 1, rows.shape[-1]), (radius, radius), mode="replicate")
        plain = F.conv1d(flat, kernel).reshape(rows.shape).movedim(-1, axis)
    torch.testing.assert_close(sampling.smooth(image, sigma, grid), plain)
