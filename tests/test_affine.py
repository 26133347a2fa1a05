"""The parts of an affine matrix, against matrices written by hand, SciPy's rotations and the stated bounds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from truths.fields import one_sentence

from regteach.affine import Affine, AffineBounds, AffineParts, rotation_matrix

ANGLES = {2: 1, 3: 3}


def random_parts(dim: int, batch: int = 4) -> AffineParts:
    draw = lambda n, size: size * (2 * torch.rand(batch, n, dtype=torch.float64) - 1)  # noqa: E731
    return AffineParts(
        translation=draw(dim, 10),
        rotation_rad=draw(ANGLES[dim], 1),
        scale=torch.exp(draw(dim, 0.4)),
        stretch_axes_rad=draw(ANGLES[dim], 1),
        shear=draw(ANGLES[dim], 0.3),
    )


def turn(dim: int, angles: np.ndarray) -> np.ndarray:
    """Rotation about axis 0 first, then 1, then 2 (SciPy's extrinsic xyz); in 2D about the axis out of the plane."""
    if dim == 3:
        return Rotation.from_euler("xyz", angles).as_matrix()
    return Rotation.from_euler("z", angles[0]).as_matrix()[:2, :2]


# Rotations


def test_a_quarter_turn_in_the_plane_takes_axis_0_to_axis_1():
    R = rotation_matrix(torch.tensor([[math.pi / 2]], dtype=torch.float64))[0]
    np.testing.assert_allclose(R, [[0, -1], [1, 0]], atol=1e-15)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_quarter_turn_about_an_axis_takes_the_next_to_the_one_after(axis):
    angles = torch.zeros(1, 3, dtype=torch.float64)
    angles[0, axis] = math.pi / 2
    R = rotation_matrix(angles)[0].numpy()
    unit = np.eye(3)
    np.testing.assert_allclose(R @ unit[(axis + 1) % 3], unit[(axis + 2) % 3], atol=1e-15)
    np.testing.assert_allclose(R @ unit[axis], unit[axis], atol=1e-15)


@pytest.mark.parametrize("dim", [2, 3])
def test_rotations_agree_with_scipy_and_are_orthonormal(dim):
    angles = 6 * torch.rand(20, ANGLES[dim], dtype=torch.float64) - 3
    R = rotation_matrix(angles)
    np.testing.assert_allclose(R, np.stack([turn(dim, a) for a in angles.numpy()]), atol=1e-14)
    np.testing.assert_allclose(R @ R.mT, np.broadcast_to(np.eye(dim), R.shape), atol=1e-14)
    np.testing.assert_allclose(torch.linalg.det(R), 1, atol=1e-14)


def test_rotation_needs_one_or_three_angles():
    with pytest.raises(ValueError) as caught:
        rotation_matrix(torch.zeros(1, 2))
    assert one_sentence(caught.value, "2")


# The matrix


@pytest.mark.parametrize("dim", [2, 3])
def test_matrix_is_the_stated_product(dim):
    parts = random_parts(dim)
    for b, M in enumerate(parts.matrix().numpy()):
        Q, R = turn(dim, parts.stretch_axes_rad[b].numpy()), turn(dim, parts.rotation_rad[b].numpy())
        K = np.eye(dim)
        K[np.triu_indices(dim, 1)] = parts.shear[b].numpy()  # (0,1), (0,2), (1,2)
        np.testing.assert_allclose(M, Q @ np.diag(parts.scale[b].numpy()) @ Q.T @ K @ R, atol=1e-14)


def test_matrix_by_hand():
    zero, one = torch.zeros(1, 1), torch.ones(1, 2)
    shear = AffineParts(torch.zeros(1, 2), zero, one, zero, torch.tensor([[0.5]])).matrix()[0]
    assert shear.tolist() == [[1, 0.5], [0, 1]]
    stretch = AffineParts(torch.zeros(1, 2), zero, torch.tensor([[2.0, 3.0]]), zero, zero).matrix()[0]
    assert stretch.tolist() == [[2, 0], [0, 3]]
    # twice as long along the diagonal: (1, 1) doubles and (1, -1) stays
    diagonal = AffineParts(torch.zeros(1, 2), zero, torch.tensor([[2.0, 1.0]]), zero + math.pi / 4, zero).matrix()[0]
    np.testing.assert_allclose(diagonal, [[1.5, 0.5], [0.5, 1.5]], atol=1e-6)


@pytest.mark.parametrize("dim", [2, 3])
def test_the_volume_changes_by_the_product_of_the_scales(dim):
    parts = random_parts(dim)
    np.testing.assert_allclose(torch.linalg.det(parts.matrix()), parts.scale.prod(-1), rtol=1e-12)


@pytest.mark.parametrize("dim", [2, 3])
def test_identity_parts(dim):
    parts = AffineParts.identity(dim, batch=2)
    assert torch.equal(parts.matrix(), torch.eye(dim).expand(2, dim, dim))
    assert parts.translation.abs().max() == 0
    points = torch.randn(1, 5, dim)
    torch.testing.assert_close(parts.about([3.0] * dim)(points), points.expand(2, -1, -1), rtol=0, atol=1e-6)
    assert AffineParts.identity(dim, like=torch.zeros(1, dtype=torch.float64)).matrix().dtype == torch.float64


@pytest.mark.parametrize("dim", [2, 3])
def test_stretch_axes_do_nothing_while_the_scales_are_equal(dim):
    zero = torch.zeros(1, ANGLES[dim], dtype=torch.float64)
    axes = (torch.rand(1, ANGLES[dim], dtype=torch.float64)).requires_grad_()
    scale = torch.full((1, dim), 1.3, dtype=torch.float64, requires_grad=True)
    rotation = torch.rand_like(zero)
    M = AffineParts(torch.zeros(1, dim, dtype=torch.float64), rotation, scale, axes, zero).matrix()
    np.testing.assert_allclose(M.detach()[0], 1.3 * turn(dim, rotation[0].numpy()), atol=1e-14)
    (M * torch.randn_like(M)).sum().backward()
    assert axes.grad is not None
    assert axes.grad.abs().max() <= 1e-14
    assert scale.grad is not None
    assert scale.grad.abs().min() > 1e-6
    # and something as soon as they differ
    uneven = torch.tensor([[1.3, 0.8, 1.1][:dim]], dtype=torch.float64)
    M = AffineParts(torch.zeros(1, dim, dtype=torch.float64), rotation, uneven, axes, zero).matrix()
    (gradient,) = torch.autograd.grad((M * torch.randn_like(M)).sum(), axes)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("dim", [2, 3])
def test_about_keeps_the_centre_but_for_the_translation(dim):
    parts, centre = random_parts(dim), torch.tensor((4.0, -7.0, 20.0)[:dim], dtype=torch.float64)
    affine = parts.about(centre)
    torch.testing.assert_close(affine(centre.expand(4, 1, dim))[:, 0], centre + parts.translation)
    points = torch.randn(4, 6, dim, dtype=torch.float64)
    expected = (
        np.einsum("bij,bnj->bni", parts.matrix(), points - centre) + (centre + parts.translation)[:, None].numpy()
    )
    np.testing.assert_allclose(affine(points), expected, atol=1e-12)
    np.testing.assert_allclose(parts.about(centre.tolist())(points), expected, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 3])
def test_gradcheck_in_every_part(dim):
    parts = random_parts(dim, batch=1)
    tensors = [
        t.requires_grad_()
        for t in (parts.translation, parts.rotation_rad, parts.scale, parts.stretch_axes_rad, parts.shear)
    ]
    points = torch.randn(1, 3, dim, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *p: AffineParts(*p).about([1.0] * dim)(points), tensors)


# The bounds


def test_counts_are_seven_and_fifteen():
    assert AffineBounds.counts(2) == (2, 1, 2, 1, 1)
    assert AffineBounds.counts(3) == (3, 3, 3, 3, 3)


@pytest.mark.parametrize("dim", [2, 3])
def test_zeros_are_the_identity(dim):
    bounds = AffineBounds(shear_ratio=0.2)
    parts = bounds.parts(torch.zeros(2, sum(AffineBounds.counts(dim))), dim)
    assert torch.equal(parts.matrix(), torch.eye(dim).expand(2, dim, dim))
    assert parts.translation.abs().max() == 0


BOUNDS = AffineBounds(translation_mm=7.0, rotation_deg=30.0, scale_ratio=1.25, stretch_axes_deg=20.0, shear_ratio=0.1)


@given(st.sampled_from([2, 3]), st.lists(st.floats(-1e6, 1e6), min_size=15, max_size=15))
def test_bounds_are_respected(dim, logits):
    z = torch.tensor([logits[: sum(AffineBounds.counts(dim))]], dtype=torch.float64)
    parts = BOUNDS.parts(z, dim)
    slack = 1 + 1e-12
    assert parts.translation.abs().max() <= 7 * slack
    assert parts.rotation_rad.abs().max() <= math.radians(30) * slack
    assert parts.scale.max() <= 1.25 * slack
    assert parts.scale.min() >= 1 / (1.25 * slack)
    assert parts.stretch_axes_rad.abs().max() <= math.radians(20) * slack
    assert parts.shear.abs().max() <= 0.1 * slack


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("sign", [-1, 1])
def test_bounds_are_reached_in_the_order_of_counts(dim, sign):
    z = torch.full((1, sum(AffineBounds.counts(dim))), sign * 50.0, dtype=torch.float64)
    parts = BOUNDS.parts(z, dim)
    np.testing.assert_allclose(parts.translation, sign * 7.0)
    np.testing.assert_allclose(parts.rotation_rad, sign * math.radians(30))
    np.testing.assert_allclose(parts.scale, 1.25**sign)
    np.testing.assert_allclose(parts.stretch_axes_rad, sign * math.radians(20))
    np.testing.assert_allclose(parts.shear, sign * 0.1)
    widths = AffineBounds.counts(dim)
    sizes = (parts.translation, parts.rotation_rad, parts.scale, parts.stretch_axes_rad, parts.shear)
    assert tuple(t.shape[1] for t in sizes) == widths
    # each logit moves its own part and no other
    start = 0
    for part, width in enumerate(widths):
        z = torch.zeros(1, sum(widths), dtype=torch.float64)
        z[0, start : start + width] = 1.0
        moved = BOUNDS.parts(z, dim)
        values = (moved.translation, moved.rotation_rad, moved.scale - 1, moved.stretch_axes_rad, moved.shear)
        assert [bool(v.abs().max() > 0) for v in values] == [k == part for k in range(5)]
        start += width


def test_tanh_is_the_squashing():
    z = torch.linspace(-2, 2, 7, dtype=torch.float64)[None]
    parts, t = BOUNDS.parts(z, 2), torch.tanh(z[0])
    torch.testing.assert_close(parts.translation[0], 7 * t[:2])
    torch.testing.assert_close(parts.rotation_rad[0], math.radians(30) * t[2:3])
    torch.testing.assert_close(parts.scale[0], 1.25 ** t[3:5])  # as far down as up, in ratio
    torch.testing.assert_close(parts.stretch_axes_rad[0], math.radians(20) * t[5:6])
    torch.testing.assert_close(parts.shear[0], 0.1 * t[6:7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_stays(dtype):
    assert (
        BOUNDS.parts(torch.zeros(1, 15, dtype=dtype), 3).about([0.0] * 3)(torch.zeros(1, 2, 3, dtype=dtype)).dtype
        == dtype
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: BOUNDS.parts(torch.zeros(1, 6), 2), "6"),
        (lambda: BOUNDS.parts(torch.zeros(1, 7), 3), "7"),
        (lambda: BOUNDS.parts(torch.zeros(1, 7), 4), "4"),
        (lambda: AffineBounds(scale_ratio=0.5), "0.5"),
        (lambda: AffineBounds(scale_ratio=0.0), "0"),
        (lambda: AffineBounds(translation_mm=-1.0), "-1"),
        (lambda: AffineBounds(rotation_deg=-10.0), "-10"),
    ],
)
def test_bad_input_gets_one_sentence(call, said):
    with pytest.raises(ValueError) as caught:
        call()
    assert one_sentence(caught.value, said)


def test_an_inverse_keeps_float32_under_autocast() -> None:
    torch.manual_seed(0)
    transform = Affine(torch.eye(3)[None] + 0.1 * torch.randn(1, 3, 3), 20 * torch.randn(1, 3), torch.zeros(3))
    with torch.autocast("cpu", torch.bfloat16):
        found = transform.inverse()
    torch.testing.assert_close(found.translation, transform.inverse().translation, atol=1e-4, rtol=0)
