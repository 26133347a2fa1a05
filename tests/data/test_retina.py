"""Synthetic B-scans: the truth between two visits, speckle of known distribution, eyes that stay apart."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from truths.fields import one_sentence

from regteach.data.eyes import LAYERS, RetinaConfig, draw_visits
from regteach.data.layers import LayerMap, interpolated
from regteach.data.retina import Retina, _speckle, generate_retina, render
from regteach.grid import Grid
from regteach.metrics import dice, mean_over_labels
from regteach.sampling import grid_points, warp
from regteach.transforms import displacement, jacobian_determinant

CONFIG = RetinaConfig(shape=(120, 96), spacing_mm=(0.01, 0.05))
STILL = replace(CONFIG, tilt_deg=0.0, offset_mm=0.0, lateral_mm=0.0, drift=0.0, motion_mm=0.0, thinning=0.0)


@pytest.fixture(scope="module")
def retina() -> Retina:
    return generate_retina(2, 1, 2, seed=0, config=CONFIG)


def test_a_cohort_of_pairs_apart_by_eye(retina):
    assert retina.images.shape == (10, 1, 120, 96)
    assert retina.grid == Grid((120, 96), (0.01, 0.05))
    assert 0 <= retina.images.min() < retina.images.max() <= 1
    assert list(retina.structures.values()) == list(LAYERS)
    assert {s: len(p) for s, p in retina.given_pairs.items()} == {"train": 4, "validation": 2, "test": 4}
    for split, members in retina.splits.items():
        assert all(retina.people[i].startswith(split) for i in members)
    assert all(retina.people[m] == retina.people[f] and m != f for p in retina.given_pairs.values() for m, f in p)
    assert "synthetic" in retina.origin


def test_every_layer_is_there_from_the_top_down(retina):
    for index in range(len(retina)):
        boundaries = retina.boundaries(index)
        assert boundaries.shape == (10, 96)
        assert boundaries.diff(dim=0).min() > 0
        assert set(range(1, 9)) <= set(retina.labels[index].unique().tolist())
        # What a pixel's centre says against what its labels say.
        z = grid_points(retina.grid)[..., 0]
        count = (z[..., None] >= boundaries.T).sum(-1)
        assert torch.equal(retina.labels[index], torch.where(count == 10, 0, count))


def test_the_truth_takes_every_boundary_to_itself(retina):
    for moving, fixed in retina.pairs("train"):
        truth = retina.truth(moving, fixed)
        x = retina.grid.origin[1] + retina.grid.spacing[1] * torch.arange(96.0)
        for k, depth in enumerate(retina.boundaries(fixed)):
            there = truth(torch.stack([depth, x], -1)[None])
            visit = retina.visits[moving]
            expected = interpolated(there[..., 1], visit.x_mm[None], visit.depth_mm[None])[..., k]
            torch.testing.assert_close(there[..., 0], expected, rtol=0, atol=1e-5)


def test_warping_the_moving_image_by_the_truth_gives_the_fixed_one(retina):
    for moving, fixed in retina.pairs("test"):
        truth = retina.truth(moving, fixed)
        before = (retina.clean[moving] - retina.clean[fixed]).abs().mean()
        after = (warp(retina.clean[[moving]], truth, retina.grid)[0] - retina.clean[fixed]).abs().mean()
        assert after < 0.025 < 0.05 < before
        maps = [retina.labels[[i]][:, None] for i in (moving, fixed)]
        moved = warp(maps[0].float(), truth, retina.grid, order=0, padding="zeros").long()
        inner = slice(12, -12)  # further out, the moving image may not show it
        assert mean_over_labels(dice(moved[..., inner], maps[1][..., inner])) > 0.9
        assert mean_over_labels(dice(maps[0][..., inner], maps[1][..., inner])) < 0.75


def test_a_shuffled_truth_does_not(retina):
    (m, f), (_, other) = retina.pairs("test")[0], retina.pairs("test")[2]
    wrong = LayerMap.between(retina.visits[other], retina.visits[m])
    assert (warp(retina.clean[[m]], wrong, retina.grid)[0] - retina.clean[f]).abs().mean() > 0.05


def test_it_never_folds_and_goes_back(retina):
    for moving, fixed in retina.pairs("train"):
        truth = retina.truth(moving, fixed)
        assert jacobian_determinant(truth, retina.grid).min() > 0
        points = grid_points(retina.grid).reshape(1, -1, 2)
        torch.testing.assert_close(retina.truth(fixed, moving)(truth(points)), points, rtol=0, atol=1e-5)


def test_two_eyes_have_no_truth_between_them(retina):
    with pytest.raises(ValueError) as caught:
        retina.truth(0, 2)
    assert one_sentence(caught.value, "different eyes")


# Each part of a visit, alone


def test_with_nothing_changed_the_truth_is_the_identity():
    eye, (first, second) = draw_visits(STILL, 1)
    points = grid_points(STILL.grid).reshape(1, -1, 2)
    torch.testing.assert_close(LayerMap.between(first, second)(points), points, rtol=0, atol=1e-5)
    scans = [render(eye, visit, STILL, visit.seed) for visit in (first, second)]
    torch.testing.assert_close(scans[0][1], scans[1][1], rtol=0, atol=1e-4)
    assert (scans[0][0] - scans[1][0]).std() > 0.05  # speckle is each visit's own


@pytest.mark.parametrize(
    ("part", "value"), [("offset_mm", 0.2), ("lateral_mm", 0.5), ("tilt_deg", 5.0), ("motion_mm", 0.05), ("drift", 0.1)]
)
def test_each_motion_is_of_its_kind_and_within_its_bound(part, value):
    config = replace(STILL, **{part: value})
    largest = 0.0
    for seed in range(8):
        _, (first, second) = draw_visits(config, seed)
        u = displacement(LayerMap.between(first, second), config.grid)[0]
        axial, lateral = u[..., 0], u[..., 1]
        if part == "lateral_mm":
            assert lateral.std() < 1e-5
            largest = max(largest, float(lateral.abs().max()))
        elif part == "drift":
            assert jacobian_determinant(LayerMap.between(first, second), config.grid).sub(1).abs().max() < 0.25
            largest = max(largest, float(first.s_mm.diff().div(first.x_mm.diff()).sub(1).abs().max()) * 2)
        else:
            assert lateral.abs().max() < 1e-4
            assert axial.std(dim=0).max() < 1e-4  # a whole column moves as one
            if part == "tilt_deg":
                slopes = axial.mean(0).diff() / config.spacing_mm[1]
                assert slopes.std() < 1e-3
                angles = [math.tan(math.radians(value))] * 2
                assert slopes.abs().max() <= sum(angles) + 1e-3
                largest = max(largest, float(slopes.abs().max()) * value / angles[0])
            else:
                largest = max(largest, float(axial.abs().max()))
    assert 0.3 * value < largest <= 2.01 * value  # two visits differ by twice a bound at most


def test_eye_motion_comes_in_blocks_with_steps_between():
    config = replace(STILL, motion_mm=0.05)
    _, (first, second) = draw_visits(config, 2)
    column = displacement(LayerMap.between(first, second), config.grid)[0, 0, :, 0]
    step = column.diff().abs()
    assert (step < 1e-5).float().mean() > 0.5
    assert step.max() > 0.01


def test_thinning_is_local_lies_above_the_choroid_and_leaves_it_in_place():
    config = replace(STILL, thinning=0.6)
    for seed in range(5):
        eye, (first, second) = draw_visits(config, seed)
        before, after = (visit.depth_mm.diff(dim=0) for visit in (first, second))
        ratio = after / before
        assert 0.02 < ratio.min() < 0.85
        assert ratio.max() < 2.5
        assert (ratio[:8].sub(1).abs() < 0.02).float().mean() > 0.3  # most of it is as it was
        torch.testing.assert_close(first.depth_mm[-2:], second.depth_mm[-2:], rtol=0, atol=1e-5)
        u = displacement(LayerMap.between(second, first), config.grid)
        assert u[..., 1].abs().max() < 1e-4
        assert u[..., 0].abs().max() > 0.003


def test_layers_have_the_thickness_they_should_and_the_fovea_is_a_pit():
    eye, _ = draw_visits(STILL, 3)
    total = eye.thickness[:8].sum(0)
    assert 0.2 < total.median() < 0.45
    inner = eye.thickness[:5].sum(0)
    assert inner.min() < 0.15 * inner.median()
    middle = eye.s_mm[inner.argmin()]
    assert middle.abs() < 0.6
    assert 0.1 < total[inner.argmin()] < 0.28


# Looks


@pytest.mark.parametrize("looks", [1, 4])
def test_speckle_has_a_gamma_distribution_of_mean_one(looks):
    config = replace(CONFIG, speckle_looks=looks, speckle_mm=(0.0, 0.0))
    values = _speckle(Grid((200, 150), CONFIG.spacing_mm), config, torch.Generator().manual_seed(0)).flatten()
    assert stats.kstest(values.numpy(), stats.gamma(looks, scale=1 / looks).cdf).pvalue > 0.01


def test_speckle_is_correlated_laterally_as_its_blur_says():
    config = replace(CONFIG, speckle_looks=1, speckle_mm=(0.0, 0.075))
    field = _speckle(Grid((300, 300), CONFIG.spacing_mm), config, torch.Generator().manual_seed(0)).numpy()
    assert field.mean() == pytest.approx(1, abs=0.03)
    assert field.std() == pytest.approx(1, abs=0.06)  # an exponential distribution
    for lag in (1, 2, 3):
        amplitude = math.exp(-((lag * 0.05) ** 2) / (4 * 0.075**2))  # of a Gaussian field blurred by a Gaussian
        lateral = np.corrcoef(field[:, lag:].ravel(), field[:, :-lag].ravel())[0, 1]
        assert lateral == pytest.approx(amplitude**2, abs=0.06)
        assert abs(np.corrcoef(field[lag:].ravel(), field[:-lag].ravel())[0, 1]) < 0.05


def test_more_looks_less_speckle(retina):
    eye, (visit, _) = draw_visits(CONFIG, 0)
    rough, fine = (render(eye, visit, replace(CONFIG, speckle_looks=n), 0) for n in (1, 16))
    assert torch.equal(rough[1], fine[1])
    assert (fine[0] - fine[1]).std() < 0.6 * (rough[0] - rough[1]).std()


def test_layers_differ_in_brightness_and_vessels_cast_shadows():
    config = replace(STILL, vessels=(4, 4), shadow=0.97)
    eye, (visit, _) = draw_visits(config, 5)
    scan, clean = render(eye, visit, config, 0)
    _, without = render(replace_vessels(eye), visit, config, 0)
    s, layer = visit.coordinates(grid_points(config.grid).reshape(1, -1, 2))
    s, layer = (part.reshape(config.shape) for part in (s, layer))
    band = (layer > 7) & (layer < 8)
    assert without[0][band].mean() > 1.5 * without[0][(layer > 5) & (layer < 6)].mean()
    assert without[0][layer < -0.05].mean() < 0.2
    inside = [p for p, _, _ in eye.vessels.tolist() if abs(p) < 2]
    assert inside
    for position in inside:
        under = band & ((s - position).abs() < 0.03)
        assert clean[0][under].mean() < 0.85 * without[0][under].mean()
    away = band & (torch.stack([(s - p).abs() for p, _, _ in eye.vessels.tolist()]).amin(0) > 0.35)
    torch.testing.assert_close(clean[0][away], without[0][away], rtol=0, atol=1e-3)


def replace_vessels(eye):
    return replace(eye, vessels=torch.zeros(0, 3))


# Seeds and bad input


def test_an_eye_depends_on_the_seed_its_split_and_its_number_alone(retina):
    again = generate_retina(1, 1, 1, seed=0, config=CONFIG)
    assert torch.equal(again.images[again.splits["test"][0]], retina.images[retina.splits["test"][0]])
    assert torch.equal(again.images[0], retina.images[0])
    other = generate_retina(1, 0, 0, seed=1, config=CONFIG)
    assert not torch.equal(other.labels[0], retina.labels[0])
    assert not torch.equal(retina.labels[0], retina.labels[2])


@pytest.mark.parametrize("spacing", [(0.0039, 0.0117), (0.01, 0.02)])
def test_spacing_is_honoured(spacing):
    config = replace(STILL, shape=(128, 80), spacing_mm=spacing)
    eye, (visit, _) = draw_visits(config, 0)
    scan, _ = render(eye, visit, config, 0)
    assert scan.shape == (1, 128, 80)
    centre = int(eye.s_mm.abs().argmin())
    depth = visit.boundaries(config.grid)[:, 40]
    assert float(depth[8] - depth[0]) == pytest.approx(float(eye.thickness[:8, centre].sum()), rel=0.1)


@pytest.mark.parametrize("options", [{"train": -1}, {"train": 0, "validation": 0, "test": 0}, {"seed": -2}])
def test_wrong_numbers_are_refused(options):
    with pytest.raises(ValueError) as caught:
        generate_retina(**options, config=CONFIG)
    assert one_sentence(caught.value, "eye")


@pytest.mark.parametrize("wrong", [{"speckle_looks": 0}, {"thinning": 1.0}, {"drift": 0.6}, {"ramp_mm": 0.0}])
def test_a_config_that_can_not_be_drawn_is_refused(wrong):
    with pytest.raises(ValueError) as caught:
        RetinaConfig(**wrong)
    assert one_sentence(caught.value, str(next(iter(wrong.values()))))
