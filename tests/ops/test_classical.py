"""Splines against SciPy's, what they reproduce, their gradients, and what is refused."""

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import RBFInterpolator
from scipy.spatial import cKDTree
from torch import Tensor
from truths.fields import GRIDS, LinearField, one_sentence, points_inside

from regteach.ops import classical
from regteach.ops.classical import thin_plate_spline

SCIPY = {"thin_plate": "thin_plate_spline", "linear": "linear"}


def case(dim: int, m: int = 60, n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    points = [points_inside(GRIDS[dim], rows, margin=-2)[0] for rows in (n, m)]
    return points[0], points[1], torch.randn(m, 3, dtype=torch.float64)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(("kernel", "degree"), [("thin_plate", 1), ("linear", 1), ("linear", 0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.5, "each"])
def test_a_spline_is_scipys(dim: int, kernel: str, degree: int, smoothing: float | str) -> None:
    query, keypoints, values = case(dim)
    amount = float(smoothing) if smoothing != "each" else torch.rand(len(keypoints), dtype=torch.float64)
    theirs = RBFInterpolator(
        keypoints.numpy(), values.numpy(), kernel=SCIPY[kernel], degree=degree, smoothing=np.asarray(amount)[()]
    )
    ours = thin_plate_spline(query, keypoints, values, amount, kernel, degree)
    assert np.allclose(ours.numpy(), theirs(query.numpy()), atol=1e-8)
    single = thin_plate_spline(query.float(), keypoints.float(), values.float(), amount, kernel, degree)
    assert single.dtype == torch.float32
    assert np.allclose(single.numpy(), theirs(query.numpy()), atol=2e-4)


@pytest.mark.parametrize("kernel", SCIPY)
def test_a_spline_meets_its_values_and_reproduces_affine_fields(kernel: str) -> None:
    query, keypoints, values = case(3)
    assert torch.allclose(thin_plate_spline(keypoints, keypoints, values, kernel=kernel), values, atol=1e-8)
    field = LinearField.of(3)
    affine, truth = torch.tensor(field(keypoints.numpy())), torch.tensor(field(query.numpy()))
    for smoothing in (0.0, 10.0):
        found = thin_plate_spline(query, keypoints, affine, smoothing, kernel)
        assert torch.allclose(found, truth, atol=1e-8)
    constant = thin_plate_spline(query, keypoints, 0 * values + 3, kernel="linear", degree=0)
    assert torch.allclose(constant, torch.tensor(3.0, dtype=torch.float64))
    # Much smoothing leaves the least-squares plane.
    design = np.concatenate([np.ones((len(keypoints), 1)), keypoints.numpy()], axis=1)
    plane = np.linalg.lstsq(design, values.numpy(), rcond=None)[0]
    smooth = thin_plate_spline(query, keypoints, values, 1e9, kernel)
    assert np.allclose(smooth.numpy(), plane[0] + query.numpy() @ plane[1:], atol=1e-4)


def test_a_spline_moves_with_space() -> None:
    query, keypoints, values = case(3)
    field, shift = thin_plate_spline(query, keypoints, values), torch.tensor([500.0, -200.0, 64.0])
    assert torch.allclose(thin_plate_spline(query + shift, keypoints + shift, values), field, atol=1e-7)
    order = [2, 0, 1]
    assert torch.allclose(thin_plate_spline(query[:, order], keypoints[:, order], values), field, atol=1e-8)


def test_a_spline_is_evaluated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keypoints, values = case(3)
    whole = thin_plate_spline(query, keypoints, values)
    monkeypatch.setattr(classical, "PAIRS_AT_ONCE", 7 * len(keypoints))
    assert torch.allclose(thin_plate_spline(query, keypoints, values), whole, atol=1e-12)
    assert thin_plate_spline(query[:0], keypoints, values).shape == (0, 3)


@pytest.mark.parametrize("kernel", SCIPY)
def test_gradients_of_a_spline(kernel: str) -> None:
    query, keypoints, values = (t.requires_grad_() for t in case(2, m=7, n=3))
    smoothing = torch.full((7,), 0.3, dtype=torch.float64, requires_grad=True)

    def field(x: Tensor, y: Tensor, f: Tensor, amount: Tensor) -> Tensor:
        return thin_plate_spline(x, y, f, amount, kernel)

    assert torch.autograd.gradcheck(field, (query, keypoints, values, smoothing))
    at_keypoints = thin_plate_spline(keypoints, keypoints, values, kernel=kernel)
    assert all(g.isfinite().all() for g in torch.autograd.grad(at_keypoints.sum(), [keypoints, values]))


def test_the_local_ones_by_name() -> None:
    query, keypoints, values = case(3)
    distance, index = cKDTree(keypoints.numpy()).query(query.numpy(), k=8)
    for weight, found in (
        (distance**-3.0, classical.inverse_distance(query, keypoints, values, k=8, power=3.0)),
        (np.exp(-(distance**2) / 32), classical.gaussian(query, keypoints, values, k=8, sigma_mm=4.0)),
    ):
        mean = np.einsum("nk,nkv->nv", weight / weight.sum(1, keepdims=True), values.numpy()[index])
        assert np.allclose(found.numpy(), mean)
    assert np.array_equal(classical.nearest(query, keypoints, values).numpy(), values.numpy()[index[:, 0]])


def test_bad_splines_are_refused_in_a_sentence() -> None:
    query, keypoints, values = case(3)
    flat = keypoints * torch.tensor([1.0, 1.0, 0.0])
    twice = torch.cat([keypoints, keypoints[:1]])
    values_too = torch.cat([values, values[:1]])
    for arguments, said in (
        ((query, keypoints, values, 0.0, "cubic"), "cubic"),
        ((query, keypoints, values, 0.0, "thin_plate", 0), "degree"),
        ((query, keypoints, values, 0.0, "linear", 2), "2"),
        ((query, keypoints, values, -1.0), "negative"),
        ((query, keypoints, values, math.nan), "negative"),
        ((query, keypoints, values, torch.ones(3)), "each"),
        ((query, twice, values_too), "one place"),
        ((query, flat, values), "span"),
        ((query, keypoints[:3], values[:3]), "span"),
        ((query, keypoints[:0], values[:0]), "no keypoints"),
        ((query[:, :2], keypoints, values), "3 coordinates"),
    ):
        with pytest.raises(ValueError) as error:
            thin_plate_spline(*arguments)
        assert one_sentence(error.value, said)
    smooth = thin_plate_spline(query, twice, values_too, 0.1)
    assert smooth.isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 2.0, "each"])
def test_what_is_left_out_is_that_of_a_spline_without_it(smoothing: float | str) -> None:
    _, keypoints, values = case(3, m=25)
    amount = (
        torch.rand(25, dtype=torch.float64) if smoothing == "each" else torch.full((25,), float(smoothing)).double()
    )
    found = classical.left_out(keypoints, values, amount, "linear")
    for k in (0, 7, 24):
        others = torch.arange(25) != k
        spline = classical.fit_spline(keypoints[others], values[others], amount[others], "linear")
        assert torch.allclose(found[k], values[k] - spline.at(keypoints[[k]])[0], atol=1e-8)
