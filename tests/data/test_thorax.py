"""The synthetic thorax: its motion against plain NumPy, its walls, its Jacobian, its mass, its landmarks."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from truths.fields import one_sentence

from regteach.data.breathing import Breathing, Lung
from regteach.data.thorax import ADULT, ThoraxCase, ThoraxConfig, generate_patient, generate_patients, thorax_grid
from regteach.data.thorax_anatomy import grow_tree, motion
from regteach.grid import Grid
from regteach.metrics import dice
from regteach.sampling import flat_points, warp
from regteach.transforms import determinant, jacobian_determinant

# Anisotropic, not cubic, off 0; coarse, so that a test takes a second.
GRIDS = {2: Grid((80, 90), (4.0, 3.5), (-100.0, 40.0)), 3: Grid((44, 34, 40), (7.0, 8.0, 8.0), (-60.0, 30.0, 5.0))}
PLAIN = ThoraxConfig(hollow=0, heart_bulge_mm=(0, 0), uneven=0, variation=(0, 0), noise_hu=0)


@pytest.fixture(scope="module", params=[2, 3], ids=["2d", "3d"])
def case(request: pytest.FixtureRequest) -> ThoraxCase:
    return generate_patient(GRIDS[request.param], seed=3)


def closed_form(x: np.ndarray, p: ThoraxConfig) -> np.ndarray:
    """The motion of a plain patient (elliptic lungs, no heart) at one point relative to its centre, written out."""
    lateral, z = x[:-1], x[-1]
    sign = np.array([1.0 if x[0] >= 0 else -1.0, 1.0])[: len(lateral)]
    radius, growth = np.array(p.lung_radius_mm)[: len(lateral)], np.array(p.rib_growth_mm)[: len(lateral)]
    offset = np.array([p.mediastinum_mm, p.coronal_mm])[: len(lateral)]
    summit = np.array([-sign[0] * p.summit[0], p.summit[1]])[: len(lateral)]

    def section(height: float, inhaled: bool) -> tuple[np.ndarray, np.ndarray]:
        h = min((p.apex_mm - height) / p.cap_mm, 1)
        cap = max(h * (2 - h), 1e-6)
        below = max(p.dome_mm - height, 0) / 90
        shrunk = 0 if inhaled else growth / 2 * cap * np.exp(-(below**2))
        half = radius * np.sqrt(cap) - shrunk
        middle = offset - np.array([0, 1])[: len(lateral)] * shrunk
        middle[0] = sign[0] * (offset[0] + half[0])
        return middle, half

    middle, half = section(z, False)
    w = (lateral - middle) / half
    q = np.linalg.norm(w)
    bowl = ((w * min(1, 1.2 / max(q, 1e-9)) - summit) ** 2).sum()
    dome = p.dome_mm - p.dome_depth_mm * bowl
    raised = dome + p.diaphragm_rise_mm - p.diaphragm_flattening_mm * bowl
    if q <= 1 and p.abdomen_mm < z < p.apex_mm:
        if z >= raised:
            z_new = p.apex_mm - (p.apex_mm - z) * (p.apex_mm - dome) / (p.apex_mm - raised)
        else:
            z_new = p.abdomen_mm + (z - p.abdomen_mm) * (dome - p.abdomen_mm) / (raised - p.abdomen_mm)
        middle, half = section(z_new, True)
        return np.append(middle + half * w, z_new)
    wide_middle, wide_half = section(z, True)
    s = np.clip(abs(x[0]) / (0.9 * p.mediastinum_mm), 0, 1)
    mean_radius = radius.mean()
    fade = np.exp(-(max(q, 1) - 1) * mean_radius / p.wall_decay_mm) * s * s * (3 - 2 * s)
    return np.append(lateral + (wide_middle - middle + (wide_half - half) * w) * fade, z)


@pytest.mark.parametrize("dim", [2, 3])
def test_the_motion_is_the_stated_closed_form(dim: int) -> None:
    transform = motion(PLAIN, GRIDS[dim], np.random.default_rng(0))
    centre = np.array(GRIDS[dim].centre)
    points = np.random.default_rng(1).uniform(-165, 165, (400, dim))
    expected = np.array([closed_form(x, PLAIN) for x in points]) + centre
    got = transform(torch.from_numpy(points + centre)[None])[0].numpy()
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.abs(expected - points - centre).max() > 20


def away_from_walls(transform: Breathing, points: torch.Tensor, margin: float = 1.0) -> torch.Tensor:
    """Points whose neighbours at ``margin`` mm along each axis are on the same side of wall, diaphragm and midline."""

    def place(x: torch.Tensor) -> torch.Tensor:
        local = (x - x.new_tensor(transform.centre))[0]
        kinds = []
        for lung in transform.lungs:
            z = local[:, -1]
            middle, half = lung.section(z, inhaled=False)
            w = (local[:, :-1] - middle) / half
            kinds += [lung.depth(w, z) <= 1, z >= lung.diaphragm(w, inhaled=False), lung.depth(w, z) > 1.19]
        return torch.stack([*kinds, local[:, 0] >= 0])

    here = place(points)
    same = torch.ones(points.shape[1], dtype=torch.bool)
    for axis in range(points.shape[-1]):
        for step in (-margin, margin):
            shifted = points.clone()
            shifted[..., axis] += step
            same &= (place(shifted) == here).all(0)
    return points[:, same]


def test_the_jacobian_is_that_of_finite_differences(case: ThoraxCase) -> None:
    grid, transform, h = case.grid, case.transform, 1e-4
    low, high = torch.tensor(grid.origin).double(), torch.tensor(grid.last).double()
    points = away_from_walls(transform, low + (high - low) * torch.rand(1, 3000, grid.dim, dtype=torch.float64))
    assert points.shape[1] > 500
    columns = []
    for axis in range(grid.dim):
        step = torch.zeros(grid.dim, dtype=torch.float64)
        step[axis] = h
        columns.append((transform(points + step) - transform(points - step)) / (2 * h))
    expected = torch.stack(columns, -1)
    error = (transform.jacobian(points) - expected).abs().amax((-1, -2))[0]
    # The cap and the growth of the ribs have kinks in their second derivative; nothing else may differ.
    assert error.quantile(0.995) < 1e-5
    assert error.max() < 1e-2
    inside = transform.lung_at(points)[0] > 0
    ratio = transform.volume_ratio(points)[0]
    assert inside.sum() > 50
    torch.testing.assert_close(ratio[inside], determinant(expected)[0, inside], rtol=1e-4, atol=1e-5)
    assert (ratio[~inside] == 1).all()


def test_nothing_folds(case: ThoraxCase) -> None:
    det = jacobian_determinant(case.transform, case.grid)
    assert det.min() > 0.2
    assert det.max() < 4


def on_the_wall(lung: Lung, z: torch.Tensor, inhaled: bool, out: float, dim: int) -> torch.Tensor:
    """Points at a part of the wall's radius, at each height, in several directions."""
    angles = (
        torch.linspace(0, 2 * np.pi, 9, dtype=torch.float64)[:-1] + 0.05 if dim == 3 else torch.tensor([0.0, np.pi])
    )
    points = []
    for angle in angles.double():
        unit = torch.stack([angle.cos().sign() if dim == 2 else angle.cos(), angle.sin()])[: dim - 1]
        w = unit.expand(len(z), dim - 1)
        middle, half = lung.section(z, inhaled)
        reach = torch.exp(lung.log_shape(w, z))[:, None]
        points.append(torch.cat([middle + half * w * reach * out, z[:, None]], -1))
    return torch.cat(points)


def test_both_sides_map_the_wall_onto_the_wall_and_slide_along_it(case: ThoraxCase) -> None:
    local = replace(case.transform, centre=(0.0,) * case.grid.dim)
    z = torch.linspace(-60, 110, 30, dtype=torch.float64)
    for lung in local.lungs:
        both = []
        for out in (1 - 1e-9, 1 + 1e-9):
            moved = local(on_the_wall(lung, z, False, out, case.grid.dim)[None])[0]
            middle, half = lung.section(moved[:, -1], inhaled=True)
            depth = lung.depth((moved[:, :-1] - middle) / half, moved[:, -1])
            torch.testing.assert_close(depth, torch.ones_like(depth), rtol=0, atol=1e-6)
            both.append(moved)
        slide = (both[0] - both[1]).norm(dim=-1)
        assert slide.max() > 15
        assert slide.min() > 0


@pytest.mark.parametrize("dim", [2, 3])
def test_where_the_wall_is_straight_the_jump_is_along_it(dim: int) -> None:
    local = replace(motion(PLAIN, GRIDS[dim], np.random.default_rng(0)), centre=(0.0,) * dim)
    z = torch.linspace(-30, -8, 12, dtype=torch.float64)  # below the cap, above where the growth of the ribs fades
    for lung in local.lungs:
        inner, outer = (local(on_the_wall(lung, z, False, out, dim)[None])[0] for out in (1 - 1e-9, 1 + 1e-9))
        above_dome = inner[:, -1] > PLAIN.dome_mm
        jump = (inner - outer)[above_dome]
        assert above_dome.sum() > 10
        assert jump[:, :-1].abs().max() < 1e-5  # the wall is vertical there
        assert jump[:, -1].abs().min() > 5


def test_the_exact_transform_makes_the_fixed_image_of_the_moving_one() -> None:
    grid = thorax_grid(2.0, dim=2)
    case = generate_patient(grid, seed=1, config=replace(ADULT, noise_hu=0, blur_mm=2.5))
    inside = torch.from_numpy(ndimage.binary_erosion(case.fixed_mask[0, 0].numpy(), iterations=3))
    ratio = case.transform.volume_ratio(flat_points(grid)).reshape(grid.shape)
    warped = -1000 + (warp(case.moving, case.transform, grid)[0, 0] + 1000) * ratio
    error = (warped - case.fixed[0, 0])[inside]
    before = (case.moving - case.fixed)[0, 0][inside]
    assert error.std() < 12
    assert before.std() > 6 * error.std()  # the images do differ
    # Negative control: without the change of density the grey values are wrong.
    assert (warp(case.moving, case.transform, grid)[0, 0] - case.fixed[0, 0])[inside].mean() < -20
    outside = ~torch.from_numpy(ndimage.binary_dilation(case.fixed_mask[0, 0].numpy(), iterations=4))
    assert (warp(case.moving, case.transform, grid) - case.fixed)[0, 0][outside].abs().median() < 3


def test_noise_is_white_and_independent_in_the_two_images() -> None:
    grid = GRIDS[2]
    noisy, clean = (generate_patient(grid, config=replace(ADULT, noise_hu=n)) for n in (20.0, 0.0))
    fixed, moving = ((getattr(noisy, k) - getattr(clean, k)).flatten() for k in ("fixed", "moving"))
    assert fixed.std() == pytest.approx(20, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([fixed, moving]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack([fixed[1:], fixed[:-1]]))[0, 1]) < 0.05


@pytest.mark.parametrize(("dim", "spacing", "percent"), [(2, 2.0, 2.0), (3, 6.0, 2.0)])
def test_mass_is_kept(dim: int, spacing: float, percent: float) -> None:
    case = generate_patient(thorax_grid(spacing, dim), seed=5)
    fixed, moving = (
        float(((image + 1000) * mask).sum())
        for image, mask in ((case.fixed, case.fixed_mask), (case.moving, case.moving_mask))
    )
    assert fixed == pytest.approx(moving, rel=percent / 100)
    assert case.moving_mask.sum() > 1.2 * case.fixed_mask.sum()  # volume is not


def test_landmarks_correspond_and_lie_in_the_lungs(case: ThoraxCase) -> None:
    assert case.fixed_landmarks_mm.shape == case.moving_landmarks_mm.shape
    assert case.fixed_landmarks_mm.shape[1] > 150
    error = (case.transform(case.fixed_landmarks_mm) - case.moving_landmarks_mm).norm(dim=-1)
    assert error.max() < 1e-3
    assert (case.transform.lung_at(case.fixed_landmarks_mm) > 0).float().mean() > 0.99
    assert (case.transform.lung_at(case.moving_landmarks_mm, inhaled=True) > 0).all()
    assert (case.fixed_landmarks_mm - case.moving_landmarks_mm).norm(dim=-1).mean() > 8
    with pytest.raises(ValueError) as error:
        case.transform.lung_inverse(torch.tensor(case.grid.centre)[None, None])
    assert one_sentence(error.value, "inside the lungs")


def test_labels_move_with_the_transform(case: ThoraxCase) -> None:
    points = flat_points(case.grid)
    lungs = case.transform.lung_at(case.transform(points), inhaled=True)
    assert (case.transform.lung_at(points) == lungs).float().mean() > 0.9999  # but for rounding on the wall
    warped = warp(case.moving_labels.float(), case.transform, case.grid, order=0)
    overlap = dice(warped.long(), case.fixed_labels, labels=(1, 2))
    assert all(float(value) > 0.93 for value in overlap.values())
    still = dice(case.moving_labels, case.fixed_labels, labels=(1, 2))
    assert all(float(overlap[k]) > float(still[k]) + 0.03 for k in (1, 2))
    right = (case.fixed_labels[0, 0] == 1).nonzero()[:, 0].float().mean()
    left = (case.fixed_labels[0, 0] == 2).nonzero()[:, 0].float().mean()
    assert right > left  # axis 0 runs to the right


def test_a_seed_fixes_the_patient_and_patients_differ() -> None:
    grid = GRIDS[2]
    a, b = generate_patients(grid, 2, seed=4)
    again = generate_patient(grid, seed=4, index=1)
    torch.testing.assert_close(b.fixed, again.fixed, rtol=0, atol=0)
    other = generate_patient(grid, seed=5)
    for one, two in ((a, b), (a, other)):
        assert one.transform != two.transform
        assert (one.fixed_mask != two.fixed_mask).float().mean() > 0.005
        assert (one.moving - two.moving)[one.moving_mask & two.moving_mask].std() > 30


def test_the_patient_does_not_depend_on_the_grid() -> None:
    grid = GRIDS[2]
    here = generate_patient(grid, seed=2)
    elsewhere = generate_patient(Grid(grid.shape, grid.spacing, (500.0, -300.0)), seed=2)
    shift = torch.tensor([600.0, -340.0])
    torch.testing.assert_close(elsewhere.fixed_landmarks_mm - shift, here.fixed_landmarks_mm, rtol=0, atol=2e-3)
    assert (elsewhere.fixed - here.fixed).abs().quantile(0.99) < 1
    fine = generate_patient(grid.resized((160, 180)), seed=2)
    torch.testing.assert_close(fine.fixed_landmarks_mm, here.fixed_landmarks_mm, rtol=0, atol=1e-3)


def test_motion_and_volumes_are_those_of_a_deep_breath() -> None:
    means, ratios = [], []
    for index in range(4):
        case = generate_patient(thorax_grid(8.0), seed=0, index=index)
        u = case.transform.displacement_on(case.grid)[0].norm(dim=-1)
        means.append(float(u[case.fixed_mask[0, 0]].mean()))
        litres = [float(m.sum()) * case.grid.voxel_volume / 1e6 for m in (case.fixed_mask, case.moving_mask)]
        assert 3 < litres[0] < litres[1] < 7.5
        ratios.append(litres[1] / litres[0])
    assert 15 < np.mean(means) < 25
    assert 1.2 < np.mean(ratios) < 1.7


def test_vessels_follow_murray() -> None:
    local = replace(motion(ADULT, GRIDS[3], np.random.default_rng(0)), centre=(0.0,) * 3)
    tree = grow_tree(local.lungs[0], local, ADULT, 60, np.random.default_rng(0))
    assert len(tree.radii) == 119
    for end, radius in zip(tree.ends, tree.radii, strict=True):
        children = tree.radii[(np.abs(tree.starts - end) < 1e-12).all(1)]
        if len(children):
            assert len(children) == 2
            assert radius**2.8 == pytest.approx((children**2.8).sum())


def test_grey_values_are_those_of_a_ct() -> None:
    case = generate_patient(thorax_grid(6.0), seed=0)
    lung = case.moving[case.moving_mask]
    assert -900 < lung.median() < -800
    assert case.fixed[case.fixed_mask].median() > lung.median() + 20  # denser when exhaled
    body = case.moving[(case.moving_labels == 3)]
    assert 0 < body.median() < 90
    assert case.moving.max() > 250  # bone
    assert abs(float(case.moving[case.moving_labels == 0].median()) + 1000) < 20
    assert "ynthetic" in case.note


def test_lessons_do_not_wait_for_it() -> None:
    for grid, seconds in ((Grid((96, 112), (3.0, 3.0), (-142.5, -166.5)), 0.3), (thorax_grid(6.0), 3.0)):
        generate_patient(grid)
        start = time.process_time()
        generate_patient(grid, seed=1)
        assert time.process_time() - start < 2 * seconds


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        ThoraxConfig(uneven=1.2)
    assert one_sentence(error.value, "1.2", "fold")
    with pytest.raises(ValueError) as error:
        ThoraxConfig(dome_mm=120)
    assert one_sentence(error.value, "apex")
    with pytest.raises(ValueError) as error:
        generate_patient(GRIDS[2], seed=-1)
    assert one_sentence(error.value, "-1")
