"""Metrics against closed forms, brute force, MONAI and SimpleITK, with what is empty or missing defined."""

import math
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance
from scipy import ndimage
from scipy.spatial.distance import cdist
from torch import Tensor
from truths.fields import GRIDS, LinearField, one_sentence, points_inside, positions
from truths.phantoms import ball

from regteach.affine import Affine
from regteach.grid import Grid
from regteach.metrics import (
    average_surface_distance,
    dice,
    end_point_error,
    folding_percent,
    hausdorff95,
    mean_over_labels,
    sdlogj,
    sdlogj_learn2reg,
    surface_distances,
    target_registration_error,
)
from regteach.transforms import Dense, FreeForm, Identity, jacobian_determinant

NAN, INF = float("nan"), float("inf")


def random_labels(grid: Grid, batch: int = 2, seed: int = 0, top: int = 3) -> Tensor:
    """Smooth blobs of labels 0 to ``top``, ``b 1 *grid``."""
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(batch):
        smooth = ndimage.gaussian_filter(rng.normal(size=grid.shape), 1.0)
        ranks = smooth.ravel().argsort().argsort().reshape(grid.shape)
        maps.append(ranks * (top + 1) // smooth.size)
    return torch.from_numpy(np.stack(maps))[:, None]


def one_hot(labels: Tensor, top: int = 3) -> Tensor:
    return torch.cat([labels == label for label in range(top + 1)], dim=1).float()


def sitk_image(mask: np.ndarray, grid: Grid) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(mask.T.astype(np.uint8)))
    image.SetSpacing(grid.spacing)
    return image


def label_maps(grid: Grid) -> tuple[Tensor, Tensor]:
    return random_labels(grid, seed=0), random_labels(grid, seed=1)


# Dice


def test_dice_of_known_overlaps():
    a = torch.tensor([0, 1, 1, 1, 2, 2, 0, 0]).reshape(1, 1, 2, 4)
    b = torch.tensor([1, 1, 1, 0, 2, 0, 0, 3]).reshape(1, 1, 2, 4)
    values = {label: value.item() for label, value in dice(a, b).items()}
    assert values == pytest.approx({1: 2 * 2 / 6, 2: 2 * 1 / 3, 3: 0})


def test_dice_is_monais(grid):
    a, b = label_maps(grid)
    expected = compute_dice(one_hot(a), one_hot(b))
    for label, values in dice(a, b, labels=range(4)).items():
        torch.testing.assert_close(values, expected[:, label])


def test_dice_is_simpleitks(grid):
    a, b = label_maps(grid)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*(sitk_image(x[0, 0].numpy(), grid) for x in (a, b)))
    for label, values in dice(a, b).items():
        assert values[0].item() == pytest.approx(overlap.GetDiceCoefficient(label), rel=1e-6)


def test_labels_are_those_of_either_map_but_the_background(grid):
    a, b = torch.zeros(2, 1, 1, *grid.shape, dtype=torch.long)
    a[..., 0], b[..., 1] = 7, 2
    assert list(dice(a, b)) == [2, 7]
    assert list(dice(a, b, labels=[7, 0])) == [7, 0]
    assert list(hausdorff95(a, b, grid)) == [2, 7]
    assert dice(torch.zeros_like(a), torch.zeros_like(a)) == {}


def test_floating_point_label_maps_serve_as_long_as_they_are_whole(grid):
    a, b = label_maps(grid)
    for label, values in dice(a.float(), b).items():
        torch.testing.assert_close(values, dice(a, b)[label])


# Surfaces


def surface_points(mask: np.ndarray, grid: Grid) -> np.ndarray:
    """Positions of the voxels that have a neighbour across a face outside the mask, one by one."""
    inside = np.pad(mask, 1)
    steps = [s * e for e in np.eye(grid.dim, dtype=int) for s in (-1, 1)]
    chosen = [v for v in np.argwhere(inside) if not all(inside[tuple(v + step)] for step in steps)]
    return (np.array(chosen) - 1) * np.array(grid.spacing) + grid.origin


def test_surface_distances_are_brute_force(grid):
    a, b = (x[0, 0] == 2 for x in label_maps(grid))
    pairs = cdist(surface_points(a.numpy(), grid), surface_points(b.numpy(), grid))
    there, back = surface_distances(a, b, grid)
    np.testing.assert_allclose(there, pairs.min(1), atol=1e-12)
    np.testing.assert_allclose(back, pairs.min(0), atol=1e-12)


def test_surface_distances_are_those_of_simpleitks_distance_map(grid):
    padded = grid.padded(2, 2)  # SimpleITK's contour takes the image's edge for the inside
    masks = []
    for x in label_maps(grid):
        mask = np.zeros(padded.shape, bool)
        mask[(slice(2, -2),) * grid.dim] = x[0, 0].numpy() == 1
        masks.append(mask)
    contours = [sitk.LabelContour(sitk_image(mask, padded), fullyConnected=False) for mask in masks]
    maps = [
        sitk.SignedMaurerDistanceMap(c, squaredDistance=False, useImageSpacing=True, insideIsPositive=False)
        for c in contours
    ]
    surfaces, distances = ([sitk.GetArrayFromImage(i).T for i in images] for images in (contours, maps))
    expected = [np.abs(distances[1][surfaces[0] > 0]), np.abs(distances[0][surfaces[1] > 0])]
    for ours, theirs in zip(surface_distances(masks[0], masks[1], padded), expected, strict=True):
        np.testing.assert_allclose(np.sort(ours), np.sort(theirs), atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
def test_two_sheets_are_as_far_apart_as_their_spacing_says(grid, steps):
    for axis in range(grid.dim):
        a, b = torch.zeros(2, 1, 1, *grid.shape, dtype=torch.long)
        a.select(axis + 2, 2)[:] = 1
        b.select(axis + 2, 2 + steps)[:] = 1
        expected = steps * grid.spacing[axis]
        assert average_surface_distance(a, b, grid)[1].item() == pytest.approx(expected)
        assert hausdorff95(a, b, grid)[1].item() == pytest.approx(expected)


def test_concentric_balls_are_the_difference_of_their_radii_apart():
    grid = Grid((44, 30, 24), (1, 1.5, 2))
    where, centre = positions(grid), np.array(grid.centre)
    a, b = (torch.from_numpy(ball(where, centre, radius))[None, None] for radius in (12.0, 17.0))
    assert average_surface_distance(a, b, grid)[1].item() == pytest.approx(5, abs=0.5)
    assert hausdorff95(a, b, grid)[1].item() == pytest.approx(5, abs=1.0)
    assert dice(a, b)[1].item() == pytest.approx(2 * 12**3 / (12**3 + 17**3), rel=0.03)


def test_surface_distance_and_hausdorff95_are_monais(grid):
    a, b = label_maps(grid)
    hot = one_hot(a), one_hot(b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        average = compute_average_surface_distance(
            *hot, include_background=True, symmetric=True, spacing=list(grid.spacing)
        )
        quantile = compute_hausdorff_distance(*hot, include_background=True, percentile=95, spacing=list(grid.spacing))
    for label in range(4):
        torch.testing.assert_close(
            average_surface_distance(a, b, grid, range(4))[label], average[:, label], rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(hausdorff95(a, b, grid, range(4))[label], quantile[:, label], rtol=1e-5, atol=1e-6)


def test_hausdorff95_is_the_larger_direction_and_not_the_pool():
    grid = Grid((40, 40))
    a, b = torch.zeros(2, 1, 1, 40, 40, dtype=torch.long)
    a[..., 5, :] = b[..., 5, :] = 1
    b[..., 15, 18:22] = 1  # 4 of b's 44 surface voxels, 10 mm off: more than 5 % of b, less of both together
    there, back = surface_distances(a[0, 0] == 1, b[0, 0] == 1, grid)
    assert np.percentile(np.concatenate([there, back]), 95) == 0
    assert there.max() == 0
    assert hausdorff95(a, b, grid)[1].item() == pytest.approx(np.percentile(back, 95)) == pytest.approx(10)


def test_surface_metrics_are_symmetric_and_zero_for_the_same(grid):
    a, b = label_maps(grid)
    for metric in (average_surface_distance, hausdorff95):
        for label, values in metric(a, b, grid).items():
            torch.testing.assert_close(values, metric(b, a, grid)[label])
            assert bool((values > 0).all())
        assert all(bool((values == 0).all()) for values in metric(a, a, grid).values())


# What is missing


def test_missing_labels(grid):
    """Item 0 has label 1 in both maps, item 1 in one map, item 2 in neither."""
    a, b = torch.zeros(2, 3, 1, *grid.shape, dtype=torch.long)
    a[:2, :, 2:4], b[0, :, 2:4] = 1, 1
    expected = {dice: [1, 0, NAN], average_surface_distance: [0, INF, NAN], hausdorff95: [0, INF, NAN]}
    for metric, values in expected.items():
        for pair in ((a, b), (b, a)):
            result = metric(*pair, *(() if metric is dice else (grid,)), labels=[1])
            torch.testing.assert_close(result[1], torch.tensor(values), equal_nan=True)


def test_distances_to_and_from_nothing(grid):
    full, empty = np.ones(grid.shape, bool), np.zeros(grid.shape, bool)
    there, back = surface_distances(full, empty, grid)
    assert there.size == surface_points(full, grid).shape[0]
    assert np.isinf(there).all()
    assert back.size == 0
    assert [d.size for d in surface_distances(empty, empty, grid)] == [0, 0]


def test_mean_over_labels_leaves_out_what_could_not_be_measured():
    values = {1: torch.tensor([0.5, NAN, NAN, 1.0]), 2: torch.tensor([0.7, 0.2, NAN, INF])}
    torch.testing.assert_close(mean_over_labels(values), torch.tensor([0.6, 0.2, NAN, INF]), equal_nan=True)
    with pytest.raises(ValueError) as caught:
        mean_over_labels({})
    assert one_sentence(caught.value, "label")


# Points and fields


def test_target_registration_error_is_the_distance_left(grid):
    linear = LinearField.of(grid.dim)
    transform = Affine(
        torch.from_numpy(np.eye(grid.dim) + linear.matrix)[None],
        torch.from_numpy(linear.offset)[None],
        torch.from_numpy(linear.centre),
    )
    fixed = points_inside(grid, 6, batch=2)
    moving = fixed + torch.from_numpy(linear(fixed.numpy()))
    off = torch.zeros(2, 6, grid.dim, dtype=torch.float64)
    off[..., :2] = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(
        target_registration_error(transform, fixed, moving + off), torch.full((2, 6), 5.0).double()
    )
    assert target_registration_error(transform, fixed, moving).max() < 1e-9
    # Negative controls: the inverse direction, and no transform at all.
    assert target_registration_error(transform.inverse(), fixed, moving).mean() > 0.5
    before = target_registration_error(Identity(grid.dim), fixed, moving)
    torch.testing.assert_close(before, torch.from_numpy(np.linalg.norm(linear(fixed.numpy()), axis=-1)))


def test_end_point_error_is_the_mean_length(grid):
    u, v = torch.rand(2, 2, *grid.shape, grid.dim, dtype=torch.float64)
    mask = torch.rand(2, 1, *grid.shape) < 0.5
    lengths = np.linalg.norm((u - v).numpy(), axis=-1)
    np.testing.assert_allclose(end_point_error(u, v), lengths.reshape(2, -1).mean(1))
    expected = [lengths[i][mask[i, 0].numpy()].mean() for i in range(2)]
    np.testing.assert_allclose(end_point_error(u, v, mask), expected)
    shift = torch.zeros(grid.dim, dtype=u.dtype)
    shift[:2] = torch.tensor([0.3, 0.4])
    np.testing.assert_allclose(end_point_error(u, u + shift), 0.5)


# Determinants


def test_folding_percent_counts_zero_and_less(grid):
    det = torch.full((2, *grid.shape), 0.01)
    det[0, 0], det[0, 1] = -3.0, 0.0
    expected = torch.tensor([200 / grid.shape[0], 0.0])
    torch.testing.assert_close(folding_percent(det), expected)
    mask = torch.zeros(2, 1, *grid.shape, dtype=torch.bool)
    mask[:, :, 1:3] = True
    torch.testing.assert_close(folding_percent(det, mask), torch.tensor([50.0, 0.0]))


def test_folding_of_a_mirrored_half(grid):
    """x0 goes to |x0 - c|: from the middle row on nothing is folded; before it everything is mirrored."""
    middle = torch.from_numpy(positions(grid)[..., 0])
    displacement = torch.zeros(1, *grid.shape, grid.dim, dtype=torch.float64)
    centre = grid.origin[0] + 3
    displacement[..., 0] = (middle - centre).abs() - (middle - centre)
    det = jacobian_determinant(Dense(displacement, grid), grid, displacement)
    # Of 7 rows, 0 to 2 are mirrored, and at row 3 the central difference of |x| is 0.
    assert folding_percent(det).item() == pytest.approx(100 * 4 / 7)


@pytest.mark.parametrize("sigma", [0.05, 0.4])
def test_sdlogj_of_log_normal_determinants(sigma):
    logs = torch.from_numpy(np.random.default_rng(0).normal(0.3, sigma, (2, 30, 31, 32)))
    np.testing.assert_allclose(sdlogj(logs.exp()), logs.flatten(1).numpy().std(1), rtol=1e-9)
    np.testing.assert_allclose(sdlogj(logs.exp()), sigma, rtol=0.02)


def test_sdlogj_of_an_affine_is_zero(grid):
    transform = Affine(torch.diag(torch.full((grid.dim,), 1.3))[None], torch.zeros(1, grid.dim), torch.zeros(grid.dim))
    det = jacobian_determinant(transform, grid)
    assert sdlogj(det).item() == pytest.approx(0, abs=1e-6)
    assert sdlogj_learn2reg(det).item() == pytest.approx(0, abs=1e-6)
    assert folding_percent(det).item() == 0


def test_sdlogj_leaves_folds_out(grid):
    det = torch.rand(2, *grid.shape, dtype=torch.float64) + 0.5
    det[0, :3] = -det[0, :3]
    det[1] = -1
    expected = np.log(det[0, 3:].numpy()).std()
    ours = sdlogj(det)
    assert ours[0].item() == pytest.approx(expected)
    assert math.isnan(ours[1].item())
    torch.testing.assert_close(folding_percent(det), torch.tensor([300 / grid.shape[0], 100.0], dtype=det.dtype))


def test_sdlogj_within_a_mask(grid):
    det = torch.rand(2, *grid.shape, dtype=torch.float64) + 0.5
    mask = torch.rand(2, 1, *grid.shape) < 0.5
    expected = [np.log(det[i][mask[i, 0]].numpy()).std() for i in range(2)]
    np.testing.assert_allclose(sdlogj(det, mask), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_sdlogj_learn2reg_is_the_challenges_formula(grid, masked):
    """np.ma.MaskedArray(log((det + 3).clip(1e-9, 1e9)), 1 - mask).std(), with two voxels cropped at every border."""
    det = torch.randn(2, *grid.shape, dtype=torch.float64) * 3
    assert bool((det < -3).any())
    mask = torch.rand(2, 1, *grid.shape) < 0.6
    inside = (slice(2, -2),) * grid.dim
    expected = []
    for item in range(2):
        log = np.log((det[item].numpy()[inside] + 3).clip(1e-9, 1e9))
        hidden = 1 - mask[item, 0].numpy()[inside].astype(int) if masked else np.zeros(log.shape)
        expected.append(np.ma.MaskedArray(log, hidden).std())
    np.testing.assert_allclose(sdlogj_learn2reg(det, mask if masked else None), expected, rtol=1e-9)


def test_the_learn2reg_form_is_about_four_times_smaller():
    det = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (1, 20, 21, 22))).exp()
    assert (sdlogj(det) / sdlogj_learn2reg(det)).item() == pytest.approx(4, rel=0.05)


def test_an_empty_mask_gives_nan(grid):
    det = torch.ones(2, *grid.shape)
    mask = torch.ones(2, 1, *grid.shape, dtype=torch.bool)
    mask[1] = False
    u = torch.zeros(2, *grid.shape, grid.dim)
    for values in (
        folding_percent(det, mask),
        sdlogj(det, mask),
        sdlogj_learn2reg(det, mask),
        end_point_error(u, u, mask),
    ):
        torch.testing.assert_close(values, torch.tensor([0.0, NAN]), equal_nan=True)


def test_a_smooth_deformation_does_not_fold_and_a_wild_one_does():
    grid = GRIDS[3]
    percents = []
    for amplitude in (0.1, 8.0):
        transform = FreeForm.identity(grid, 4.0)
        coefficients = amplitude * (2 * torch.rand_like(transform.coefficients) - 1)
        percents.append(folding_percent(jacobian_determinant(FreeForm(coefficients, transform.grid), grid)).item())
    assert percents[0] == 0
    assert percents[1] > 5


# Bad input

LABELS = torch.zeros(1, 1, 7, 9)
DET = torch.ones(1, 7, 9)
BAD = {
    "two shapes": (lambda: dice(LABELS, torch.zeros(1, 1, 9, 7)), ("(1, 1, 7, 9)", "(1, 1, 9, 7)")),
    "one-hot": (lambda: dice(LABELS.repeat(1, 2, 1, 1), LABELS.repeat(1, 2, 1, 1)), ("(1, 2, 7, 9)",)),
    "no batch": (lambda: dice(LABELS[0, 0], LABELS[0, 0]), ("(7, 9)",)),
    "interpolated": (lambda: dice(LABELS + 0.3, LABELS), ("order=0",)),
    "nan label": (lambda: dice(LABELS * torch.nan, LABELS), ("whole",)),
    "other grid": (lambda: hausdorff95(LABELS + 1, LABELS + 1, Grid((9, 7))), ("(7, 9)", "(9, 7)")),
    "lone landmark": (
        lambda: target_registration_error(Identity(2), torch.zeros(1, 3, 2), torch.zeros(1, 2, 2)),
        ("(1, 3, 2)", "(1, 2, 2)"),
    ),
    "two fields": (lambda: end_point_error(torch.zeros(1, 7, 9, 2), torch.zeros(1, 7, 2)), ("(1, 7, 2)",)),
    "mask shape": (lambda: folding_percent(DET, torch.ones(1, 7, 9)), ("(1, 7, 9)",)),
    "nan determinant": (lambda: sdlogj(DET * torch.nan), ("finite",)),
    "infinite determinant": (lambda: folding_percent(DET * torch.inf), ("finite",)),
    "nothing left": (lambda: sdlogj_learn2reg(torch.ones(1, 4, 9)), ("(4, 9)",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(case):
    call, said = BAD[case]
    with pytest.raises(ValueError) as caught:
        call()
    assert one_sentence(caught.value, *said)
