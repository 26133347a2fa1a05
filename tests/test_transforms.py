"""Transforms against closed forms, matrix exponentials, autograd and finite differences."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from truths.fields import (
    GRIDS,
    LinearField,
    WaveField,
    jacobian_by_autograd,
    jacobian_by_differences,
    one_sentence,
    points_inside,
    positions,
)

from regteach import bspline
from regteach.affine import Affine
from regteach.grid import Grid
from regteach.sampling import flat_points, warp
from regteach.transforms import (
    Compose,
    Dense,
    FreeForm,
    Identity,
    NotInvertibleError,
    Sum,
    Transform,
    Velocity,
    determinant,
    displacement,
    fixed_point_inverse,
    jacobian_determinant,
)

F64 = torch.float64


def affine_of(field: LinearField, dtype: torch.dtype = F64) -> Affine:
    """x + A (x - c) + b as an Affine."""
    dim = len(field.offset)
    matrix, shift, centre = (
        torch.tensor(v, dtype=dtype) for v in (np.eye(dim) + field.matrix, field.offset, field.centre)
    )
    return Affine(matrix[None], shift[None], centre)


def free_form(grid: Grid, amplitude: float = 0.5, batch: int = 1, dtype: torch.dtype = F64) -> FreeForm:
    ctrl = bspline.control_grid(grid, (3.0, 4.0, 5.0)[: grid.dim])
    return FreeForm(amplitude * (2 * torch.rand(batch, *ctrl.shape, grid.dim, dtype=dtype) - 1), ctrl)


def on_grid(field, grid: Grid, dtype: torch.dtype = F64) -> Tensor:
    return torch.from_numpy(field(positions(grid))).to(dtype)[None]


def wide(grid: Grid, n: int = 24) -> Grid:
    """A grid about the same centre with a few voxels more in each axis: room for an interior."""
    return grid.padded(n // 3, n // 3)


def examples(grid: Grid, dtype: torch.dtype = F64) -> dict[str, Transform]:
    """One of each class. Dense and Velocity hold linear fields, on which linear interpolation is exact."""
    field, dim = LinearField.of(grid.dim, size=0.05), grid.dim
    other = dataclasses.replace(field, matrix=-2 * field.matrix.T)  # does not commute with the first
    room = wide(grid)
    made: dict[str, Transform] = {
        "identity": Identity(dim),
        "affine": affine_of(field, dtype),
        "free form": free_form(grid, dtype=dtype),
        "dense": Dense(on_grid(other, room, dtype), room),
        "velocity": Velocity(on_grid(field, room, dtype), room, steps=4),
    }
    made["compose"] = Compose((made["affine"], made["free form"], made["dense"]))
    made["sum"] = Sum((made["affine"], made["free form"], made["dense"]))
    return made


def remade(transform: Transform, change: Callable[[Tensor], Tensor], keep: tuple[str, ...] = ()) -> Transform:
    """The same transform with every tensor changed, but for the fields named in ``keep``."""
    changed: dict[str, object] = {}
    for field in dataclasses.fields(transform):  # type: ignore[arg-type]
        value = getattr(transform, field.name)
        if isinstance(value, Tensor) and field.name not in keep:
            changed[field.name] = change(value)
        elif isinstance(value, tuple):
            changed[field.name] = tuple(remade(part, change, keep) for part in value)
    return dataclasses.replace(transform, **changed)  # type: ignore[type-var]


NAMES = ["identity", "affine", "free form", "dense", "velocity", "compose", "sum"]
WITH_TENSORS = NAMES[1:]


# All classes


@pytest.mark.parametrize("name", NAMES)
def test_jacobians_against_autograd(grid, name):
    transform = examples(grid)[name]
    points = points_inside(grid, 40)
    ours = transform.jacobian(points)
    assert ours.shape == (1, 40, grid.dim, grid.dim)
    torch.testing.assert_close(ours, jacobian_by_autograd(transform, points), rtol=0, atol=1e-9)
    torch.testing.assert_close(ours, jacobian_by_differences(transform, points), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one_serves_many_point_sets(grid, name):
    transform = examples(grid)[name]
    points = points_inside(grid, 6, batch=3)
    each = torch.cat([transform(p[None]) for p in points])
    torch.testing.assert_close(transform(points), each, rtol=0, atol=1e-12)
    each = torch.cat([transform.jacobian(p[None]) for p in points])
    torch.testing.assert_close(transform.jacobian(points), each, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_dtype_stays(grid, name, dtype):
    transform = examples(grid, dtype)[name]
    points = points_inside(grid, 3, dtype=dtype)
    like = points
    assert transform(points).dtype == dtype
    assert transform.jacobian(points).dtype == dtype
    assert displacement(transform, grid, like=like).dtype == dtype
    assert jacobian_determinant(transform, grid, like=like).dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_float64(grid, name):
    double = examples(grid)[name]
    single = remade(double, lambda tensor: tensor.float())
    points = points_inside(grid, 20)
    torch.testing.assert_close(single(points.float()).double(), double(points), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_displacement_and_determinant_are_the_transform_at_the_voxels(grid, name):
    transform = examples(grid)[name]
    points = flat_points(grid, dtype=F64)
    expected = (transform(points) - points).reshape(1, *grid.shape, grid.dim)
    torch.testing.assert_close(displacement(transform, grid, like=points), expected, rtol=0, atol=1e-11)
    expected = torch.linalg.det(transform.jacobian(points)).reshape(1, *grid.shape)
    torch.testing.assert_close(jacobian_determinant(transform, grid, like=points), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_warping_by_grid_is_warping_point_by_point(grid, name):
    transform = examples(grid)[name]
    image = torch.rand(1, 2, *grid.shape, dtype=F64)
    for out in (grid, grid.with_spacing(1.3)):
        by_points = warp(image, lambda points, t=transform: t(points), grid, out)
        torch.testing.assert_close(warp(image, transform, grid, out), by_points, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_two_items_are_two_transforms(grid, name):
    first = examples(grid)[name]
    second = remade(first, lambda tensor: 1.5 * tensor, keep=("centre",))
    both = remade(first, lambda tensor: torch.cat([tensor, 1.5 * tensor]), keep=("centre",))
    points = points_inside(grid, 5)
    torch.testing.assert_close(both(points), torch.cat([first(points), second(points)]), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        both.jacobian(points), torch.cat([first.jacobian(points), second.jacobian(points)]), rtol=0, atol=1e-12
    )
    assert displacement(both, grid).shape == (2, *grid.shape, grid.dim)
    assert jacobian_determinant(both, grid).shape == (2, *grid.shape)


def test_identity_holds_no_tensor_and_gives_float32(grid):
    assert displacement(Identity(grid.dim), grid).dtype == torch.float32
    assert displacement(Identity(grid.dim), grid, like=torch.zeros(1, dtype=F64)).dtype == F64


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_device_and_dtype_are_those_of_the_transform(grid, name):
    transform = examples(grid)[name]
    assert displacement(transform, grid).dtype == F64
    assert jacobian_determinant(transform, grid).dtype == F64
    assert fixed_point_inverse(transform, grid, iterations=1)[0].displacement.dtype == F64
    # the "meta" device stands for a GPU: a tensor left on the CPU is refused there
    assert displacement(remade(transform, lambda tensor: tensor.to("meta")), grid).device.type == "meta"


@pytest.mark.parametrize("name", NAMES)
def test_transforms_are_frozen(grid, name):
    transform = examples(grid)[name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(transform, dataclasses.fields(transform)[0].name, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_points_of_another_dimension_get_one_sentence(grid, name):
    with pytest.raises(ValueError) as caught:
        examples(grid)[name](torch.zeros(1, 4, 5 - grid.dim, dtype=F64))
    assert one_sentence(caught.value, str(grid.dim))


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_batches_that_do_not_fit_get_one_sentence(grid, name):
    two = remade(examples(grid)[name], lambda tensor: torch.cat([tensor, tensor]), keep=("centre",))
    with pytest.raises(ValueError) as caught:
        two(points_inside(grid, 4, batch=3))
    assert one_sentence(caught.value, "2", "3")


# Affine


def test_affine_by_hand():
    # a quarter turn about (1, 1), then 10 to the right: (2, 1) -> (1, 2) -> (11, 2)
    affine = Affine(torch.tensor([[[0.0, -1.0], [1.0, 0.0]]]), torch.tensor([[10.0, 0.0]]), torch.tensor([1.0, 1.0]))
    assert affine(torch.tensor([[[2.0, 1.0], [1.0, 1.0]]])).tolist() == [[[11.0, 2.0], [11.0, 1.0]]]
    back = affine.inverse()
    assert back(torch.tensor([[[11.0, 2.0], [11.0, 1.0]]])).tolist() == [[[2.0, 1.0], [1.0, 1.0]]]


def test_affine_inverse_both_ways(grid):
    affine, points = affine_of(LinearField.of(grid.dim, size=0.5)), points_inside(grid, 30)
    inverse = affine.inverse()
    assert isinstance(inverse, Affine)
    torch.testing.assert_close(inverse(affine(points)), points, rtol=0, atol=1e-11)
    torch.testing.assert_close(affine(inverse(points)), points, rtol=0, atol=1e-11)


def test_affine_with_a_centre_per_item(grid):
    affine = affine_of(LinearField.of(grid.dim))
    centres = torch.stack([affine.centre, affine.centre + 3])
    two = Affine(affine.matrix.expand(2, -1, -1), affine.translation.expand(2, -1), centres)
    points = points_inside(grid, 4)
    torch.testing.assert_close(two(points)[0], affine(points)[0])
    torch.testing.assert_close(two(points)[1], Affine(affine.matrix, affine.translation, affine.centre + 3)(points)[0])
    torch.testing.assert_close(two.inverse()(two(points)), points.expand(2, -1, -1))


def test_a_singular_matrix_has_no_inverse(grid):
    flat = torch.eye(grid.dim)
    flat[0, 0] = 0
    with pytest.raises(NotInvertibleError) as caught:
        Affine(flat[None], torch.zeros(1, grid.dim), torch.zeros(grid.dim)).inverse()
    assert one_sentence(caught.value)


def test_a_reflection_has_a_negative_determinant(grid):
    mirror = torch.eye(grid.dim)
    mirror[0, 0] = -1
    affine = Affine(mirror[None], torch.zeros(1, grid.dim), torch.zeros(grid.dim))
    assert (jacobian_determinant(affine, grid) == -1).all()


@pytest.mark.parametrize("n", [2, 3])
def test_determinant_written_out(n):
    matrices = torch.randn(2, 5, n, n, dtype=F64)
    torch.testing.assert_close(determinant(matrices), torch.linalg.det(matrices), rtol=1e-10, atol=1e-12)


def test_determinant_of_other_sizes_gets_one_sentence():
    with pytest.raises(ValueError) as caught:
        determinant(torch.zeros(4, 4))
    assert one_sentence(caught.value, "4")


# FreeForm


def test_free_form_is_x_plus_the_spline(grid):
    transform, points = free_form(grid), points_inside(grid, 30, margin=-3)
    expected = points + bspline.evaluate(transform.coefficients, transform.grid, points)
    torch.testing.assert_close(transform(points), expected)


def test_free_form_separable_forms_equal_the_plain_ones(grid):
    transform = free_form(grid, batch=2)
    for where in (grid, grid.with_spacing(1.7), wide(grid)):
        points = flat_points(where, dtype=F64)
        moved = (transform(points) - points).reshape(2, *where.shape, grid.dim)
        torch.testing.assert_close(transform.displacement_on(where), moved, rtol=0, atol=1e-12)
        matrices = transform.jacobian(points).reshape(2, *where.shape, grid.dim, grid.dim)
        torch.testing.assert_close(transform.jacobian_on(where), matrices, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spacing", [4.0, (3.0, 5.0, 4.0)])
def test_free_form_identity(grid, spacing):
    start = FreeForm.identity(grid, spacing if isinstance(spacing, float) else spacing[: grid.dim], batch=2)
    assert start.coefficients.shape == (2, *start.grid.shape, grid.dim)
    assert start.grid == bspline.control_grid(grid, spacing if isinstance(spacing, float) else spacing[: grid.dim])
    points = points_inside(grid, 9, dtype=torch.float32)
    assert torch.equal(start(points), points.expand(2, -1, -1))
    assert FreeForm.identity(grid, 4.0, like=torch.zeros(1, dtype=F64)).coefficients.dtype == F64


def test_equal_coefficients_are_a_translation(grid):
    ctrl = bspline.control_grid(grid, 4.0)
    shift = torch.tensor((1.0, -2.0, 0.5)[: grid.dim], dtype=F64)
    transform = FreeForm(shift.expand(1, *ctrl.shape, -1), ctrl)
    points = points_inside(grid, 9)
    torch.testing.assert_close(transform(points), points + shift)


@pytest.mark.parametrize("name", ["free form", "dense", "sum"])
def test_what_has_no_exact_inverse_says_so(grid, name):
    with pytest.raises(NotInvertibleError) as caught:
        examples(grid)[name].inverse()
    assert one_sentence(caught.value)
    with pytest.raises(NotInvertibleError):
        Compose((examples(grid)["affine"], examples(grid)[name])).inverse()


# Dense


def test_dense_is_linear_between_voxels_and_repeats_the_border(grid):
    field = LinearField.of(grid.dim)
    transform = Dense(on_grid(field, grid), grid)
    inside = points_inside(grid, 50)
    torch.testing.assert_close(transform(inside), inside + torch.from_numpy(field(inside.numpy())), rtol=0, atol=1e-12)
    outside = points_inside(grid, 200, margin=-3)
    low, high = torch.tensor(grid.origin, dtype=F64), torch.tensor(grid.last, dtype=F64)
    nearest = outside.clamp(low, high)
    expected = outside + torch.from_numpy(field(nearest.numpy()))
    torch.testing.assert_close(transform(outside), expected, rtol=0, atol=1e-12)


def test_dense_jacobian_is_numpy_gradient_at_the_voxels(grid):
    u = torch.randn(1, *grid.shape, grid.dim, dtype=F64)
    slopes = np.gradient(u[0].numpy(), *grid.spacing, axis=tuple(range(grid.dim)))
    expected = np.stack(slopes, axis=-1) + np.eye(grid.dim)
    ours = Dense(u, grid).jacobian(flat_points(grid, dtype=F64)).reshape(*grid.shape, grid.dim, grid.dim)
    np.testing.assert_allclose(ours, expected, atol=1e-10)


def test_dense_jacobian_converges_with_the_square_of_the_spacing(grid):
    wave = WaveField(amplitude=1.5, wavelength=25.0)
    points = points_inside(grid, 100, margin=1.0)
    expected = wave.jacobian(points.numpy()) + np.eye(grid.dim)
    errors = []
    for factor in (1, 2, 4):
        fine = grid.resized(tuple(n * factor for n in grid.shape))
        errors.append(np.abs(Dense(on_grid(wave, fine), fine).jacobian(points).numpy() - expected).max())
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


def test_determinant_of_a_wave_against_its_closed_form(grid):
    wave = WaveField(amplitude=2.0, wavelength=30.0)
    fine = grid.resized(tuple(4 * n for n in grid.shape))
    expected = np.linalg.det(np.eye(grid.dim) + wave.jacobian(positions(fine)))
    ours = jacobian_determinant(Dense(on_grid(wave, fine), fine), fine, like=torch.zeros(1, dtype=F64))[0]
    inner = tuple(slice(1, -1) for _ in fine.shape)  # one-sided differences at the border are less exact
    np.testing.assert_allclose(ours[inner], expected[inner], atol=5e-3)
    assert expected.std() > 0.015


# Velocity


def homogeneous_power(field: LinearField, steps: int, sign: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(I + H / 2^n) to the power 2^n, in homogeneous coordinates: what scaling and squaring computes exactly."""
    dim = len(field.offset)
    H = np.zeros((dim + 1, dim + 1))
    H[:dim, :dim], H[:dim, dim] = sign * field.matrix, sign * field.offset
    power = np.linalg.matrix_power(np.eye(dim + 1) + H / 2**steps, 2**steps)
    return power[:dim, :dim], power[:dim, dim]


@pytest.mark.parametrize("steps", [0, 1, 4, 7])
def test_velocity_squares_as_stated(grid, steps):
    field, room = LinearField.of(grid.dim), wide(grid)
    transform = Velocity(on_grid(field, room), room, steps=steps)
    points = points_inside(grid, 60, margin=1.0)
    M, t = homogeneous_power(field, steps)
    expected = (points.numpy() - field.centre) @ M.T + t + field.centre
    np.testing.assert_allclose(transform(points), expected, atol=1e-9)


def test_velocity_converges_to_the_matrix_exponential(grid):
    field, room = LinearField.of(grid.dim), wide(grid)
    points = points_inside(grid, 60, margin=1.0)
    truth = field.flow(points.numpy())
    assert np.abs(truth - points.numpy()).max() > 0.5
    errors = [np.abs(Velocity(on_grid(field, room), room, steps=n)(points).numpy() - truth).max() for n in (3, 5, 7)]
    assert errors[2] < 5e-3
    # the error halves with every step
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.2)
    assert errors[2] == pytest.approx(errors[1] / 4, rel=0.2)


def test_velocity_inverse_is_the_flow_of_the_negative_field(grid):
    field, room = LinearField.of(grid.dim), wide(grid)
    back = Velocity(on_grid(field, room), room).inverse()
    points = points_inside(grid, 30, margin=1.0)
    M, t = homogeneous_power(field, 7, sign=-1.0)
    np.testing.assert_allclose(back(points), (points.numpy() - field.centre) @ M.T + t + field.centre, atol=1e-9)


def folding_wave(dim: int) -> tuple[WaveField, Grid]:
    """x + v(x) folds: the slope reaches 1.6. On a grid of 1 mm, 16 voxels per wave."""
    return WaveField(amplitude=4.0, wavelength=16.0), Grid((40, 36, 32)[:dim])


@pytest.mark.parametrize("dim", [2, 3])
def test_velocity_is_invertible_where_the_field_itself_folds(dim):
    wave, grid = folding_wave(dim)
    v = on_grid(wave, grid, torch.float32)
    assert jacobian_determinant(Dense(v, grid), grid).min() < -0.1
    forward = Velocity(v, grid)
    inner = tuple(slice(6, -6) for _ in grid.shape)  # the wave does not stop at the border
    assert jacobian_determinant(forward, grid)[0][inner].min() > 0
    points = points_inside(grid, 500, margin=8.0, dtype=torch.float32)
    moved = forward(points)
    there_and_back = (forward.inverse()(moved) - points).norm(dim=-1)
    assert (moved - points).norm(dim=-1).max() > 3
    assert there_and_back.mean() < 0.1
    assert there_and_back.max() < 0.35


def test_inverse_consistency_is_limited_by_the_grid_alone():
    wave, grid = folding_wave(2)
    points = points_inside(grid, 500, margin=8.0)
    errors = []
    for factor in (1, 2, 4):
        fine = grid.resized(tuple(n * factor for n in grid.shape))
        forward = Velocity(on_grid(wave, fine), fine, steps=12)
        errors.append(float((forward.inverse()(forward(points)) - points).norm(dim=-1).mean()))
    assert errors[1] < errors[0] / 2.5
    assert errors[2] < errors[1] / 2.5


@pytest.mark.parametrize("dim", [2, 3])
def test_inverse_consistency_of_a_smooth_velocity(dim):
    grid = Grid((40, 36, 32)[:dim])
    forward = Velocity(on_grid(WaveField(amplitude=2.0, wavelength=40.0), grid, torch.float32), grid)
    points = points_inside(grid, 500, margin=6.0, dtype=torch.float32)
    assert (forward.inverse()(forward(points)) - points).norm(dim=-1).max() < 0.03
    assert (forward(forward.inverse()(points)) - points).norm(dim=-1).max() < 0.03


def test_velocity_integrated_is_the_same_transform(grid):
    velocity = examples(grid)["velocity"]
    dense, points = velocity.integrated(), points_inside(grid, 9)
    assert isinstance(dense, Dense)
    torch.testing.assert_close(dense(points), velocity(points))


def test_negative_steps_get_one_sentence(grid):
    with pytest.raises(ValueError) as caught:
        Velocity(torch.zeros(1, *grid.shape, grid.dim), grid, steps=-1)(flat_points(grid))
    assert one_sentence(caught.value, "-1")


# Compose and Sum


def test_the_first_transform_is_applied_first(grid):
    dim = grid.dim
    turn = torch.eye(dim, dtype=F64)
    turn[:2, :2] = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    zero, step = torch.zeros(1, dim, dtype=F64), torch.zeros(1, dim, dtype=F64)
    step[0, 0] = 1
    rotate, shift = Affine(turn[None], zero, zero[0]), Affine(torch.eye(dim, dtype=F64)[None], step, zero[0])
    origin = torch.zeros(1, 1, dim, dtype=F64)
    assert Compose((shift, rotate))(origin)[0, 0, :2].tolist() == [0, 1]  # shifted to (1, 0), then turned
    assert Compose((rotate, shift))(origin)[0, 0, :2].tolist() == [1, 0]


def test_compose_inverse_reverses(grid):
    a, b = affine_of(LinearField.of(grid.dim, 0.3)), affine_of(LinearField.of(grid.dim, -0.2))
    both, points = Compose((a, b)), points_inside(grid, 20)
    torch.testing.assert_close(both.inverse()(both(points)), points, rtol=0, atol=1e-11)
    torch.testing.assert_close(both(both.inverse()(points)), points, rtol=0, atol=1e-11)


CHAINS = [
    ("affine", "free form"),
    ("free form", "affine"),
    ("dense", "free form", "affine"),
    ("velocity", "compose"),
    ("compose", "identity", "sum"),
    ("identity", "dense"),
    ("free form",),
    (),
]


@pytest.mark.parametrize("chain", CHAINS, ids=", ".join)
def test_compose_on_a_grid_is_compose_at_its_points(grid, chain):
    whole = Compose(tuple(examples(grid)[name] for name in chain))
    for where in (grid, wide(grid, 3), grid.with_spacing(1.3)):
        plain = Transform.displacement_on(whole, where)
        assert plain.shape == (1, *where.shape, grid.dim)
        torch.testing.assert_close(whole.displacement_on(where), plain, rtol=0, atol=1e-11)
        torch.testing.assert_close(whole.jacobian_on(where), Transform.jacobian_on(whole, where), rtol=0, atol=1e-11)
    like = torch.zeros(1, dtype=F64)
    assert whole.displacement_on(grid, like).dtype == whole.jacobian_on(grid, like).dtype == F64


def test_compose_on_a_grid_keeps_the_items_of_a_batch(grid):
    three, one = free_form(grid, batch=3), affine_of(LinearField.of(grid.dim))
    for whole in (Compose((three, one)), Compose((one, three))):
        plain = Transform.displacement_on(whole, grid)
        assert plain.shape == (3, *grid.shape, grid.dim)
        torch.testing.assert_close(whole.displacement_on(grid), plain, rtol=0, atol=1e-12)
        torch.testing.assert_close(whole.jacobian_on(grid), Transform.jacobian_on(whole, grid), rtol=0, atol=1e-12)


def test_jacobians_of_compose_keep_float32_under_autocast(grid):
    parts = examples(grid, torch.float32)
    whole, points = Compose((parts["affine"], parts["compose"])), points_inside(grid, 30, dtype=torch.float32)
    expected = whole.jacobian(points), whole.jacobian_on(grid), jacobian_determinant(whole, grid)
    with torch.autocast("cpu", torch.bfloat16):
        found = whole.jacobian(points), whole.jacobian_on(grid), jacobian_determinant(whole, grid)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_compose_on_a_grid_passes_gradients_to_every_part(grid):
    ctrl = bspline.control_grid(grid, 4.0)
    parts = [(0.3 * torch.randn(1, *ctrl.shape, grid.dim, dtype=F64)).requires_grad_() for _ in range(2)]
    whole = Compose(tuple(FreeForm(c, ctrl) for c in parts))
    weight = torch.randn(1, *grid.shape, grid.dim, dtype=F64)
    fast, plain = (
        torch.autograd.grad((on(grid) * weight).sum(), parts)
        for on in (whole.displacement_on, lambda g: Transform.displacement_on(whole, g))
    )
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_sum_adds_displacements(grid):
    parts = [examples(grid)[name] for name in ("affine", "free form", "dense")]
    points = points_inside(grid, 20)
    expected = points + sum(t(points) - points for t in parts)
    torch.testing.assert_close(Sum(tuple(parts))(points), expected)
    torch.testing.assert_close(displacement(Sum(tuple(parts)), grid), sum(displacement(t, grid) for t in parts))


@pytest.mark.parametrize("kind", [Compose, Sum])
def test_nothing_composed_or_added_is_the_identity(kind):
    points = torch.randn(1, 4, 2)
    assert torch.equal(kind(())(points), points)
    assert torch.equal(kind(()).jacobian(points), torch.eye(2).expand(1, 4, 2, 2))


# Fixed-point inverse


def test_fixed_point_inverse_of_an_affine_is_its_inverse(grid):
    affine = affine_of(LinearField.of(grid.dim))
    inverse, residual = fixed_point_inverse(affine, grid, like=affine.matrix)
    points = flat_points(grid, dtype=F64)
    torch.testing.assert_close(inverse(points), affine.inverse()(points), rtol=0, atol=1e-9)
    assert residual.shape == (1,)
    assert residual.max() < 1e-9


def test_fixed_point_residual_tells_a_smooth_field_from_a_fold(grid):
    smooth, fold = free_form(grid, amplitude=0.4), free_form(grid, amplitude=6.0)
    assert jacobian_determinant(smooth, grid).min() > 0
    assert jacobian_determinant(fold, grid).min() < 0
    both = FreeForm(torch.cat([smooth.coefficients, fold.coefficients]), smooth.grid)
    inverse, residual = fixed_point_inverse(both, grid, like=both.coefficients)
    assert inverse.displacement.shape == (2, *grid.shape, grid.dim)
    assert residual[0] < 1e-6
    assert residual[1] > 0.1
    # the residual is what it says
    points = flat_points(grid, dtype=F64)
    error = (both(inverse(points)) - points).norm(dim=-1).amax(1)
    torch.testing.assert_close(residual, error, rtol=1e-6, atol=1e-9)


def test_fixed_point_inverse_gets_better_with_iterations(grid):
    transform = free_form(grid, amplitude=0.8)
    residuals = [float(fixed_point_inverse(transform, grid, n, like=transform.coefficients)[1]) for n in (1, 5, 20)]
    assert residuals[0] > residuals[1] > residuals[2]


# Gradients


def test_gradcheck_of_every_kind():
    grid = GRIDS[2].resized((4, 4))
    ctrl = bspline.control_grid(grid, 8.0)
    coefficients = (0.3 * torch.randn(1, *ctrl.shape, 2, dtype=F64)).requires_grad_()
    field = (0.1 * torch.randn(1, *grid.shape, 2, dtype=F64)).requires_grad_()
    matrix = (torch.eye(2, dtype=F64) + 0.1 * torch.randn(1, 2, 2, dtype=F64)).requires_grad_()
    shift = torch.randn(1, 2, dtype=F64).requires_grad_()
    points = points_inside(grid, 3, margin=0.3)
    points.requires_grad_()
    centre = torch.tensor(grid.centre, dtype=F64)
    check = torch.autograd.gradcheck
    assert check(lambda c, p: FreeForm(c, ctrl)(p), (coefficients, points))
    assert check(lambda c, p: FreeForm(c, ctrl).jacobian(p), (coefficients, points))
    assert check(lambda c: jacobian_determinant(FreeForm(c, ctrl), grid, like=c), (coefficients,))
    assert check(lambda c: displacement(FreeForm(c, ctrl), grid, like=c), (coefficients,))
    assert check(lambda u, p: Dense(u, grid)(p), (field, points))
    assert check(lambda u: jacobian_determinant(Dense(u, grid), grid, like=u), (field,))
    assert check(lambda v, p: Velocity(v, grid, steps=3)(p), (field, points))
    assert check(lambda m, t, p: Affine(m, t, centre)(p), (matrix, shift, points))
    assert check(lambda m, t, p: Affine(m, t, centre).inverse()(p), (matrix, shift, points))
    assert check(
        lambda m, t, c, u, p: Compose((Affine(m, t, centre), Sum((FreeForm(c, ctrl), Dense(u, grid)))))(p),
        (matrix, shift, coefficients, field, points),
    )


# Shapes


@pytest.mark.parametrize(
    "make",
    [
        lambda g: Dense(torch.zeros(1, *g.shape, g.dim + 1), g),
        lambda g: Dense(torch.zeros(1, *g.shape[1:], g.shape[0], g.dim), g),
        lambda g: Dense(torch.zeros(*g.shape, g.dim), g),
        lambda g: Velocity(torch.zeros(1, *g.shape, g.dim + 1), g),
        lambda g: FreeForm(torch.zeros(1, *g.shape, g.dim + 1), g),
        lambda g: FreeForm(torch.zeros(1, *g.shape[:-1], g.dim), g),
        lambda g: Affine(torch.zeros(1, g.dim, g.dim + 1), torch.zeros(1, g.dim), torch.zeros(g.dim)),
        lambda g: Affine(torch.zeros(1, g.dim, g.dim), torch.zeros(1, 5 - g.dim), torch.zeros(g.dim)),
        lambda g: Affine(torch.zeros(1, g.dim, g.dim), torch.zeros(1, g.dim), torch.zeros(5 - g.dim)),
    ],
)
def test_tensors_of_the_wrong_shape_get_one_sentence(grid, make):
    with pytest.raises(ValueError) as caught:
        make(grid)(flat_points(grid))
    assert one_sentence(caught.value)
