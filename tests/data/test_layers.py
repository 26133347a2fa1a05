"""Layered images: curves as NumPy reads them, labels by hand, a map that is exact, invertible and never folds."""

import numpy as np
import pytest
import torch
from truths.fields import jacobian_by_differences, one_sentence

from regteach.data.layers import LayerMap, Visit, interpolated, layer_labels
from regteach.grid import Grid
from regteach.transforms import determinant

X = torch.linspace(-2, 8, 41, dtype=torch.float64)
TOP = 1 + 0.3 * torch.sin(X)


def visit(shift: float = 0.0, thin: float = 1.0, offset: float = 0.0) -> Visit:
    """Two layers, 0.5 and 0.8 mm thick (the first one times ``thin``), below a wave."""
    s = X + shift + 0.1 * torch.sin(X)
    first = TOP + offset
    return Visit(X, s, torch.stack([first, first + 0.5 * thin, first + 0.5 * thin + 0.8]))


def points(n: int = 400) -> torch.Tensor:
    return torch.rand(1, n, 2, dtype=torch.float64) * torch.tensor([3.5, 6.0])


def test_curves_are_read_as_numpy_reads_them_and_go_on_beyond_their_ends():
    knots, curves = torch.tensor([[0.0, 1.0, 4.0]]), torch.tensor([[[2.0, 5.0, 8.0], [0.0, -1.0, 1.0]]])
    x = torch.rand(1, 50) * 4
    for k in range(2):
        expected = np.interp(x[0].numpy(), knots[0].numpy(), curves[0, k].numpy())
        np.testing.assert_allclose(interpolated(x, knots, curves)[0, :, k], expected, atol=1e-6)
        np.testing.assert_allclose(interpolated(x, knots, curves[:, k])[0], expected, atol=1e-6)
    torch.testing.assert_close(
        interpolated(torch.tensor([[-1.0, 7.0]]), knots, curves[:, 0]), torch.tensor([[-1.0, 11]])
    )


def test_a_batch_of_curves_is_read_item_by_item():
    knots = torch.sort(torch.rand(3, 9), dim=1).values
    curves, x = torch.rand(3, 4, 9), torch.rand(3, 20)
    together = interpolated(x, knots, curves)
    for i in range(3):
        torch.testing.assert_close(together[[i]], interpolated(x[[i]], knots[[i]], curves[[i]]))


def test_labels_by_hand():
    grid = Grid((6, 3), (0.5, 1.0))
    boundaries = torch.tensor([[0.4, 0.5, 9.0], [1.1, 0.5, 9.0], [2.0, 2.1, float("nan")]])
    expected = torch.tensor([[0, 0, 0], [1, 2, 0], [1, 2, 0], [2, 2, 0], [0, 2, 0], [0, 0, 0]])
    assert torch.equal(layer_labels(boundaries, grid), expected)


def test_labels_need_a_value_a_column():
    with pytest.raises(ValueError) as caught:
        layer_labels(torch.zeros(2, 4), Grid((6, 3)))
    assert one_sentence(caught.value, "3 columns", "(2, 4)")


def test_the_coordinates_of_an_eye():
    one = visit(shift=0.25)
    x = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)  # on knots
    top = 1 + 0.3 * torch.sin(x)
    s, layer = one.coordinates(torch.stack([top + torch.tensor([-0.2, 0.125, 1.5]), x], -1)[None])
    torch.testing.assert_close(s[0], x + 0.25 + 0.1 * torch.sin(x))
    torch.testing.assert_close(layer[0], torch.tensor([-0.2, 0.25, 2.2], dtype=torch.float64))


def test_boundaries_and_lateral_places_map_onto_each_other():
    fixed, moving = visit(), visit(shift=0.4, thin=0.5, offset=0.3)
    transform = LayerMap.between(fixed, moving)
    x = points()[..., 1]
    for k in range(3):
        at = interpolated(x, fixed.x_mm[None], fixed.depth_mm[None])[..., k]
        there = transform(torch.stack([at, x], -1))
        expected = interpolated(there[..., 1], moving.x_mm[None], moving.depth_mm[None])[..., k]
        torch.testing.assert_close(there[..., 0], expected, rtol=0, atol=1e-9)
        places = [interpolated(p, v.x_mm[None], v.s_mm[None]) for p, v in ((x, fixed), (there[..., 1], moving))]
        torch.testing.assert_close(*places, rtol=0, atol=1e-9)
    middle = interpolated(x, X[None], (TOP + 0.25)[None])  # half-way down the layer that is half as thick
    there = transform(torch.stack([middle, x], -1))
    top = interpolated(there[..., 1], X[None], (TOP + 0.3)[None])
    torch.testing.assert_close(there[..., 0] - top, torch.full_like(x, 0.125), rtol=0, atol=1e-9)


def test_the_inverse_undoes_it():
    transform = LayerMap.between(visit(), visit(shift=0.4, thin=0.5, offset=0.3))
    p = points()
    torch.testing.assert_close(transform.inverse()(transform(p)), p, rtol=0, atol=1e-9)
    assert (transform(p) - p).abs().max() > 0.2


def test_the_jacobian_is_that_of_differences_and_never_negative():
    transform = LayerMap.between(visit(), visit(shift=0.4, thin=0.5, offset=0.3))
    p = points()
    exact, differences = transform.jacobian(p), jacobian_by_differences(transform, p, 1e-6)
    same = (exact - differences).abs().amax((-1, -2)) < 1e-4
    assert same.double().mean() > 0.98  # the others straddle a kink
    assert determinant(exact).min() > 0.4
    with torch.no_grad():
        torch.testing.assert_close(transform.jacobian(p), exact)


def test_each_map_of_a_batch_has_its_own_jacobian():
    maps = [LayerMap.between(visit(), visit(shift=s, thin=t, offset=0.3)) for s, t in ((0.4, 0.5), (-0.3, 0.8))]
    both = LayerMap(*(torch.cat(parts) for parts in zip(*(vars(m).values() for m in maps), strict=True)))
    p = points()[:1]
    alone = torch.cat([m.jacobian(p) for m in maps])
    torch.testing.assert_close(both.jacobian(p), alone)
    assert (alone[0] - alone[1]).abs().max() > 0.1


def test_a_visit_to_itself_is_the_identity_and_visits_must_fit():
    p = points()
    torch.testing.assert_close(LayerMap.between(visit(), visit())(p), p, rtol=0, atol=1e-12)
    with pytest.raises(ValueError) as caught:
        LayerMap.between(visit(), Visit(X + 1, X, visit().depth_mm))
    assert one_sentence(caught.value)
