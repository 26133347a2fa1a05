"""Similarities against plain loops, closed forms, SimpleITK, MONAI and gradcheck, in 2D and 3D."""

import itertools
import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.losses import LocalNormalizedCrossCorrelationLoss
from scipy import ndimage, stats
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from truths.fields import one_sentence
from truths.phantoms import noise

from regteach import bspline
from regteach import similarity as sim
from regteach.grid import Grid

F64 = torch.float64
SMALL = {2: (4, 5), 3: (3, 4, 5)}  # for gradcheck, which evaluates once per voxel
NAMES = ("mse", "ncc", "local_ncc", "mutual_information", "mind_ssc")


def image_pair(grid: Grid, batch: int = 2, channels: int = 2, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Two textured images that are alike but not the same."""
    a = noise(grid, batch, channels, seed=1)
    b = 0.7 * a + 0.3 * noise(grid, batch, channels, seed=2)
    return torch.from_numpy(a).to(dtype), torch.from_numpy(b).to(dtype)


def random_mask(grid: Grid, batch: int = 2) -> Tensor:
    return torch.from_numpy(noise(grid, batch, seed=5) < 0.6)


def smooth_image(shape: tuple[int, ...], sigma_vox: float = 1.5, seed: int = 0) -> Tensor:
    """Smooth noise stretched to [0, 1], ``1 1 *grid``."""
    values = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma_vox, mode="wrap")
    values = (values - values.min()) / (values.max() - values.min())
    return torch.from_numpy(values)[None, None]


# The simple ones


@pytest.mark.parametrize("masked", [False, True])
def test_mse_is_the_mean_squared_difference(grid, masked):
    a, b = image_pair(grid)
    mask = random_mask(grid) if masked else None
    for item in range(2):
        keep = mask[item, 0].numpy() if masked else np.ones(grid.shape, bool)
        expected = np.mean([(a[item, c].numpy()[keep] - b[item, c].numpy()[keep]) ** 2 for c in range(2)])
        assert sim.mse(a, b, mask)[item] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_ncc_is_pearsons_coefficient(grid, masked):
    a, b = image_pair(grid)
    mask = random_mask(grid) if masked else None
    for item in range(2):
        keep = mask[item, 0].numpy() if masked else np.ones(grid.shape, bool)
        expected = np.mean([stats.pearsonr(a[item, c].numpy()[keep], b[item, c].numpy()[keep])[0] for c in range(2)])
        assert sim.ncc(a, b, mask)[item] == pytest.approx(expected, rel=1e-10)


def test_ncc_is_one_for_a_brighter_copy_and_minus_one_for_a_negative(grid):
    a, _ = image_pair(grid)
    torch.testing.assert_close(sim.ncc(a, 3 * a + 7), torch.ones(2, dtype=F64))
    torch.testing.assert_close(sim.ncc(a, -0.1 * a), -torch.ones(2, dtype=F64))


@pytest.mark.parametrize(
    ("metric", "ours"),
    [
        ("SetMetricAsMeanSquares", sim.mse),
        ("SetMetricAsCorrelation", lambda a, b: -(sim.ncc(a, b) ** 2)),
        ("SetMetricAsANTSNeighborhoodCorrelation", lambda a, b: -sim.local_ncc(a, b, window_vox=5)),
    ],
    ids=["mse", "ncc", "local_ncc"],
)
def test_simpleitk_agrees_at_every_voxel(grid, metric, ours):
    a, b = image_pair(grid, 1, 1)
    images = []
    for tensor in (a, b):
        image = sitk.GetImageFromArray(np.ascontiguousarray(tensor[0, 0].numpy().astype(np.float32).T))
        image.SetSpacing(grid.spacing)
        images.append(image)
    method = sitk.ImageRegistrationMethod()
    method.SetInitialTransform(sitk.Transform(grid.dim, sitk.sitkIdentity))
    method.SetInterpolator(sitk.sitkLinear)
    getattr(method, metric)(*([2] if "Neighborhood" in metric else []))  # ITK counts the radius of the window
    assert ours(a, b).item() == pytest.approx(method.MetricEvaluate(*images), abs=2e-5)


# Box sums and local NCC


@given(
    shape=st.lists(st.integers(1, 8), min_size=2, max_size=3),
    widths=st.lists(st.sampled_from([1, 3, 5, 7, 9, 11, 13]), min_size=3, max_size=3),
)
def test_box_sum_adds_up_each_window(shape, widths):
    window = widths[: len(shape)]
    values = np.random.default_rng(0).random(shape)
    expected = ndimage.convolve(values, np.ones(window), mode="constant")
    torch.testing.assert_close(sim.box_sum(torch.from_numpy(values)[None, None], window)[0, 0].numpy(), expected)


def test_box_sum_has_first_and_second_derivatives(grid):
    image = torch.rand(1, 2, *SMALL[grid.dim], dtype=F64, requires_grad=True)
    window = (3, 5, 3)[: grid.dim]
    assert gradcheck(lambda x: sim.box_sum(x, window) ** 2, image)
    assert gradgradcheck(lambda x: sim.box_sum(x, window) ** 2, image)


def local_ncc_map(a: np.ndarray, b: np.ndarray, window: tuple[int, ...], mask: np.ndarray) -> np.ndarray:
    """Squared correlation in the window about each voxel, window by window."""
    out = np.zeros(a.shape)
    for centre in np.ndindex(a.shape):
        box = tuple(slice(max(0, c - w // 2), c + w // 2 + 1) for c, w in zip(centre, window, strict=True))
        x, y = a[box][mask[box]], b[box][mask[box]]
        if x.size > 1:
            out[centre] = np.corrcoef(x, y)[0, 1] ** 2
    return out


@pytest.mark.parametrize("masked", [False, True])
def test_local_ncc_is_the_mean_over_all_windows(grid, masked):
    a, b = image_pair(grid)
    window = (3, 5, 7)[: grid.dim]
    mask = random_mask(grid)
    expected = []
    for item, channel in itertools.product(range(2), repeat=2):
        keep = mask[item, 0].numpy() if masked else np.ones(grid.shape, bool)
        expected.append(local_ncc_map(a[item, channel].numpy(), b[item, channel].numpy(), window, keep)[keep].mean())
    ours = sim.local_ncc(a, b, window, mask if masked else None)
    np.testing.assert_allclose(ours, np.reshape(expected, (2, 2)).mean(1), rtol=1e-9)


def test_local_ncc_is_monais_away_from_the_border(grid):
    a, b = image_pair(grid, 1, 1)
    everywhere = np.ones(grid.shape, bool)
    plain = local_ncc_map(a[0, 0].numpy(), b[0, 0].numpy(), (5,) * grid.dim, everywhere)
    monai = -LocalNormalizedCrossCorrelationLoss(grid.dim, 5, "rectangular", "none")(a, b)[0, 0].numpy()
    inside = (slice(2, -2),) * grid.dim
    np.testing.assert_allclose(plain[inside], monai[inside], rtol=1e-9)
    # At the border MONAI fills the window with zeros, as if the image ended in black.
    assert np.abs(plain - monai).max() > 0.05
    assert sim.local_ncc(a, b, 5).item() == pytest.approx(plain.mean(), rel=1e-9)


def test_local_ncc_is_one_for_any_contrast(grid):
    a, _ = image_pair(grid)
    torch.testing.assert_close(sim.local_ncc(a, 5 - 2 * a), torch.ones(2, dtype=F64))
    torch.testing.assert_close(sim.local_ncc(1e-6 * a, 1e6 * a + 1e4), torch.ones(2, dtype=F64))


def test_local_ncc_is_safe_in_float32_where_an_image_is_flat():
    texture = smooth_image((64, 64))
    a = 1000 + 20 * texture
    a[..., 40:60, 40:60] = 3000  # a bright, flat insert far from the mean, where E[x^2] - E[x]^2 is all rounding
    b = a + smooth_image((64, 64), seed=1)
    b[..., 40:60, 40:60] = 2000
    exact = sim.local_ncc(a, b, 5)
    assert sim.local_ncc(a.float(), b.float(), 5).item() == pytest.approx(exact.item(), abs=1e-3)

    # Negative control: the textbook formula on the intensities as they are.
    def naive(x: Tensor, y: Tensor) -> float:
        def local(z: Tensor) -> Tensor:
            return sim.box_sum(z, (5, 5)) / sim.box_sum(torch.ones_like(z), (5, 5))

        covariance = local(x * y) - local(x) * local(y)
        return (covariance**2 / ((local(x * x) - local(x) ** 2) * (local(y * y) - local(y) ** 2))).mean().item()

    assert not abs(naive(a.float(), b.float()) - exact.item()) < 1e-2


# Mutual information


def images_with_joint(counts: np.ndarray) -> tuple[Tensor, Tensor]:
    """Two shuffled 2D images in which the pair of intensities (i, k) occurs counts[i, k] times."""
    rows, columns = np.indices(counts.shape).reshape(2, -1).repeat(counts.ravel(), axis=1)
    order = np.random.default_rng(0).permutation(rows.size)
    shape = (1, 1, 8, -1)
    return tuple(torch.from_numpy(v[order].astype(float)).reshape(shape) for v in (rows, columns))


def discrete_information(counts: np.ndarray) -> float:
    p = counts / counts.sum()
    independent = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    return float((p[p > 0] * np.log(p[p > 0] / independent[p > 0])).sum())


JOINT = np.array([[30, 4, 0, 6], [2, 25, 9, 4], [5, 0, 33, 2], [0, 8, 8, 24]])


def test_mutual_information_of_a_known_joint_distribution_is_exact():
    # Four intensities on 32 bins lie more than four bins apart: their windows do not overlap, and blur nothing.
    a, b = images_with_joint(JOINT)
    assert sim.mutual_information(a, b).item() == pytest.approx(discrete_information(JOINT), rel=1e-12)
    assert sim.mutual_information(b, a).item() == pytest.approx(discrete_information(JOINT), rel=1e-12)


def test_mutual_information_of_independent_images_is_zero():
    counts = np.outer([8, 2, 6], [1, 3, 4])
    a, b = images_with_joint(counts)
    assert sim.mutual_information(a, b).item() == pytest.approx(0, abs=1e-12)


def test_mutual_information_of_an_image_with_itself_is_its_entropy():
    a, _ = images_with_joint(JOINT)
    p = JOINT.sum(1) / JOINT.sum()
    assert sim.mutual_information(a, a).item() == pytest.approx(-(p * np.log(p)).sum(), rel=1e-12)


def test_mutual_information_does_not_see_a_relabelling():
    a, b = images_with_joint(JOINT)
    relabelled = torch.tensor([7.0, 0.0, 40.0, 20.0], dtype=F64)[b.long()]
    same = sim.mutual_information(a, b).item()
    assert sim.mutual_information(a, relabelled).item() == pytest.approx(same, rel=1e-12)
    merged = torch.tensor([0.0, 0.0, 1.0, 2.0], dtype=F64)[b.long()]  # not one-to-one: something is lost
    assert sim.mutual_information(a, merged).item() < 0.95 * same


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
def test_mutual_information_of_correlated_gaussians(rho):
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 1, 1, 400, 500))
    a, b = torch.from_numpy(x), torch.from_numpy(rho * x + math.sqrt(1 - rho**2) * z)
    bins, span = 48, 5.0
    ours = sim.mutual_information(a, b, bins, ranges=((-span, span), (-span, span))).item()
    exact = -0.5 * math.log(1 - rho**2)
    assert 0.92 * exact < ours < exact
    # Told of the windows' blur (a variance of a third of a bin squared), the band is far narrower.
    blur = (2 * span / (bins - 3)) ** 2 / 3
    assert ours == pytest.approx(-0.5 * math.log(1 - (rho / (1 + blur)) ** 2), rel=0.01, abs=0.003)


def test_mutual_information_is_at_least_zero_and_at_most_either_entropy(grid):
    a, b = image_pair(grid)
    joint = sim.joint_histogram(a, b, bins=16)
    information = sim.mutual_information(a, b, bins=16)
    for axis in (-1, -2):
        p = joint.sum(axis)
        entropy = -torch.special.xlogy(p, p).sum(-1).mean(1)
        assert bool((information <= entropy).all())
        assert bool((entropy <= math.log(16)).all())
    assert bool((information > 0).all())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ranges", [None, ((0.1, 0.9), (-1.0, 2.0))])
def test_joint_histogram_is_the_product_of_all_windows(grid, masked, ranges):
    a, b = image_pair(grid)
    weight = random_mask(grid).to(F64) if masked else torch.ones(2, 1, *grid.shape, dtype=F64)
    bins = 12
    ours = sim.joint_histogram(a, b, bins, ranges, weight if masked else None)
    for item, channel in itertools.product(range(2), repeat=2):
        keep = weight[item, 0] > 0
        windows = []
        for k, image in enumerate((a, b)):
            values = image[item, channel][keep]
            low, high = ranges[k] if ranges else (values.min(), values.max())
            position = 1 + (bins - 3) * (values.clamp(low, high) - low) / (high - low)
            windows.append(bspline.basis(position[:, None] - torch.arange(bins)))
        expected = windows[0].T @ windows[1] / keep.sum()
        torch.testing.assert_close(ours[item, channel], expected, rtol=1e-10, atol=1e-14)


def test_joint_histogram_keeps_float32_digits_over_a_million_voxels():
    # Mostly one intensity, as the background of a scan: one bin then takes a million equal weights.
    a = torch.zeros(1, 1, 1000, 1000)
    a[..., :3, :] = torch.linspace(0.13, 1, 3000).reshape(3, 1000)
    exact = sim.joint_histogram(a.double(), a.double())
    assert (sim.joint_histogram(a, a) - exact).abs().max() < 1e-4
    weights = torch.full((1_000_000,), 1e-6 / 6)
    one_by_one = torch.zeros(1).scatter_add(0, torch.zeros(1_000_000, dtype=torch.long), weights)
    assert (one_by_one - 1 / 6).abs() > 1e-4  # the control: added up one by one


# MIND


def plain_descriptor(image: np.ndarray, radius: int, dilation: int) -> np.ndarray:
    """The descriptor of one channel, voxel by voxel and patch by patch."""
    dim = image.ndim
    steps = dilation * np.eye(dim, dtype=int)
    offsets = [sign * steps[axis] for axis in range(dim) for sign in (-1, 1)]
    pairs = [(p, q) for p, q in itertools.combinations(offsets, 2) if ((p - q) ** 2).sum() == 2 * dilation**2]
    pairs.sort(key=lambda pair: [int(np.flatnonzero(end)[0]) for end in pair])  # by their two axes

    def read(voxel: np.ndarray) -> float:
        return image[tuple(np.clip(voxel, 0, np.array(image.shape) - 1))]

    distances = np.zeros((len(pairs), *image.shape))
    for centre in np.ndindex(image.shape):
        patch = [range(max(0, c - radius), min(n, c + radius + 1)) for c, n in zip(centre, image.shape, strict=True)]
        for k, (p, q) in enumerate(pairs):
            squares = [(read(np.array(v) + p) - read(np.array(v) + q)) ** 2 for v in itertools.product(*patch)]
            distances[(k, *centre)] = np.mean(squares)
    distances -= distances.min(0)
    scale = distances.mean(0)
    return np.exp(-distances / np.clip(scale, scale.mean() / 1000, scale.mean() * 1000))


@pytest.mark.parametrize(("radius", "dilation"), [(0, 1), (1, 2), (2, 1)])
def test_mind_descriptor_compares_patches_one_by_one(grid, radius, dilation):
    shape = {2: grid.shape, 3: (4, 5, 6)}[grid.dim]
    a = noise(Grid(shape), batch=1, channels=2, seed=3)
    ours = sim.mind_descriptor(torch.from_numpy(a), radius, dilation)
    pairs = {2: 4, 3: 12}[grid.dim]
    assert ours.shape == (1, 2 * pairs, *shape)
    expected = np.concatenate([plain_descriptor(channel, radius, dilation) for channel in a[0]])
    np.testing.assert_allclose(ours[0], expected, rtol=1e-9)


def test_mind_descriptor_has_the_same_largest_entry_everywhere(grid):
    descriptor = sim.mind_descriptor(image_pair(grid, 1, 1)[0])
    torch.testing.assert_close(descriptor.amax(1), torch.ones(1, *grid.shape, dtype=F64))
    assert bool((descriptor > 0).all())


@pytest.mark.parametrize(("scale", "offset"), [(-1, 0), (1, 50), (-0.02, 3), (1000, -1000)])
def test_mind_does_not_see_inversion_contrast_or_brightness(grid, scale, offset):
    a, b = image_pair(grid)
    torch.testing.assert_close(sim.mind_descriptor(scale * a + offset), sim.mind_descriptor(a), rtol=1e-8, atol=1e-10)
    assert sim.mind_ssc(a, scale * a + offset).max() < 1e-15
    assert sim.mind_ssc(a, b).min() > 1e-3  # the control


# What all have in common


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_right_in_both_images(grid, name):
    options = {"mutual_information": {"bins": 6}, "local_ncc": {"window_vox": 3}, "mind_ssc": {"radius_vox": 1}}
    function = sim.dissimilarity(name, **options.get(name, {}))
    a, b = (torch.rand(1, 1, *SMALL[grid.dim], dtype=F64, requires_grad=True) for _ in range(2))
    assert gradcheck(function, (a, b))
    mask = torch.rand(1, 1, *SMALL[grid.dim]) < 0.7
    assert gradcheck(lambda x, y: function(x, y, mask), (a, b))


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_image_has_a_value_and_no_gradient(grid, name):
    flat = torch.full((1, 1, *grid.shape), 3.7, requires_grad=True)
    other = torch.rand(1, 1, *grid.shape, requires_grad=True)
    function = sim.dissimilarity(name)
    truth = {"mse": (other - 3.7).square().mean().item(), "ncc": 1, "local_ncc": 1, "mutual_information": 0}
    for a, b in ((flat, other), (other, flat)):
        value = function(a, b)
        assert value.item() == pytest.approx(truth.get(name, value.item()), abs=1e-5)
        slope_flat, slope_other = torch.autograd.grad(value.sum(), (flat, other))
        assert bool((slope_flat.isfinite() & slope_other.isfinite()).all())
        if name != "mse":
            assert slope_flat.abs().max() == 0
    assert bool(function(flat, flat).isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_an_image_that_is_constant_up_to_rounding_has_a_finite_gradient(grid, name):
    """As one that was constant, and then read between its voxels."""
    for grey in (0.5, 1e-3, 1e-6):
        flat = torch.full((1, 1, *grid.shape), grey)
        flat.flatten()[7] *= 1 + 2e-7  # one voxel, by its last digit
        flat.requires_grad_()
        value = sim.dissimilarity(name)(flat, torch.rand(1, 1, *grid.shape))
        (slope,) = torch.autograd.grad(value.sum(), flat)
        assert bool(value.isfinite().all())
        assert bool(slope.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_items_of_a_batch_do_not_mix(grid, name):
    a, b = image_pair(grid)
    b[1] *= 100
    function = sim.dissimilarity(name)
    one_by_one = torch.cat([function(a[i : i + 1], b[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(function(a, b), one_by_one)
    assert function(a, b).shape == (2,)


@pytest.mark.parametrize("name", NAMES)
def test_channels_are_averaged(grid, name):
    a, b = image_pair(grid)
    function = sim.dissimilarity(name)
    per_channel = torch.stack([function(a[:, c : c + 1], b[:, c : c + 1]) for c in range(2)])
    torch.testing.assert_close(function(a, b), per_channel.mean(0))


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_float64_far_from_zero(grid, name):
    a, b = image_pair(grid)
    a, b = 100 * a + 1000, 100 * b + 1000
    function = sim.dissimilarity(name)
    torch.testing.assert_close(function(a.float(), b.float()).double(), function(a, b), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(grid, name):
    a, b = image_pair(grid, dtype=torch.bfloat16)
    value = sim.dissimilarity(name)(a, b)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, sim.dissimilarity(name)(a.float(), b.float()))


@pytest.mark.parametrize("name", ["mse", "ncc", "local_ncc", "mutual_information"])
def test_a_mask_that_is_a_box_is_a_crop(grid, name):
    a, b = image_pair(grid)
    box = (..., *(slice(1, n - 2) for n in grid.shape))
    mask = torch.zeros(1, 1, *grid.shape)
    mask[box] = 2.5  # only the proportions of weights count
    function = sim.dissimilarity(name)
    torch.testing.assert_close(function(a, b, mask), function(a[box], b[box]))
    torch.testing.assert_close(function(a, b, mask.bool()), function(a[box], b[box]))
    assert (function(a, b) - function(a[box], b[box])).abs().max() > 1e-4  # the control: without the mask


def test_the_mask_of_mind_selects_what_is_compared(grid):
    a, b = image_pair(grid, 1, 1)
    mask = random_mask(grid, 1)
    squares = (sim.mind_descriptor(a) - sim.mind_descriptor(b)).square().mean(1)
    assert sim.mind_ssc(a, b, mask=mask).item() == pytest.approx(squares[mask[:, 0]].mean().item())


CHANGES = {  # of an image in [0, 1]
    "brightness": lambda x: x + 0.5,
    "contrast": lambda x: 0.5 * x,
    "inversion": lambda x: 1 - x,
    "relabelling": lambda x: (x + 0.5) % 1,
    "bias field": lambda x: x * torch.linspace(0.4, 1.6, x.shape[-1], dtype=x.dtype),
}
UNSEEN = {
    "mse": (),
    "ncc": ("brightness", "contrast"),
    "local_ncc": ("brightness", "contrast", "inversion", "bias field"),
    "mutual_information": ("brightness", "contrast", "inversion", "relabelling"),
    "mind_ssc": ("brightness", "contrast", "inversion", "bias field"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_what_each_similarity_does_not_see(name, change):
    """A changed copy of the image, as a part of what an unrelated image would score: nothing, or something."""
    image, unrelated = smooth_image((96, 96), 2.0), smooth_image((96, 96), 2.0, seed=9)
    function = sim.dissimilarity(name)
    best, worst = function(image, image), function(image, unrelated)
    part = ((function(image, CHANGES[change](image)) - best) / (worst - best)).item()
    assert part < 0.06 if change in UNSEEN[name] else part > 0.2


@pytest.mark.parametrize("name", NAMES)
def test_dissimilarity_is_lowest_where_images_are_aligned(name):
    image = smooth_image((48, 40), 2.0)
    function = sim.dissimilarity(name)
    scores = [function(image, image.roll(shift, 2)).item() for shift in range(-3, 4)]
    assert int(np.argmin(scores)) == 3
    assert scores[3] < scores[4] < scores[5] < scores[6]


def test_dissimilarity_is_one_minus_or_minus_the_similarity(grid):
    a, b = image_pair(grid)
    torch.testing.assert_close(sim.dissimilarity("ncc")(a, b), 1 - sim.ncc(a, b))
    torch.testing.assert_close(sim.dissimilarity("local_ncc", window_vox=3)(a, b), 1 - sim.local_ncc(a, b, 3))
    torch.testing.assert_close(sim.dissimilarity("mutual_information")(a, b), -sim.mutual_information(a, b))
    torch.testing.assert_close(sim.dissimilarity("mse")(a, b), sim.mse(a, b))
    torch.testing.assert_close(sim.dissimilarity("mind_ssc", radius_vox=1)(a, b), sim.mind_ssc(a, b, 1))


# Bad input

ONE = torch.rand(1, 1, 7, 9)
BAD = {
    "two shapes": (lambda: sim.mse(ONE, torch.rand(1, 1, 9, 7)), ("1 x 1 x 7 x 9", "1 x 1 x 9 x 7")),
    "no batch": (lambda: sim.ncc(ONE[0], ONE[0]), ("1 x 7 x 9",)),
    "integers": (lambda: sim.mind_descriptor(ONE.long()), ("int64",)),
    "mask shape": (lambda: sim.mse(ONE, ONE, torch.ones(7, 9)), ("1 x 1 x 7 x 9", "7 x 9")),
    "empty mask": (
        lambda: sim.ncc(
            ONE.repeat(2, 1, 1, 1), ONE.repeat(2, 1, 1, 1), torch.tensor([1, 0])[:, None, None, None] + 0 * ONE
        ),
        ("item 1",),
    ),
    "negative mask": (lambda: sim.ncc(ONE, ONE, -torch.ones(1, 1, 7, 9)), ("negative",)),
    "even window": (lambda: sim.local_ncc(ONE, ONE, 4), ("odd", "4")),
    "window of three": (lambda: sim.local_ncc(ONE, ONE, (3, 3, 3)), ("window_vox", "3")),
    "few bins": (lambda: sim.mutual_information(ONE, ONE, 3), ("4", "3")),
    "empty range": (lambda: sim.mutual_information(ONE, ONE, ranges=((0, 1), (2, 2))), ("2",)),
    "dilation": (lambda: sim.mind_ssc(ONE, ONE, 1, 0), ("dilation", "0")),
    "name": (lambda: sim.dissimilarity("mutual_informatoin"), ("'mutual_informatoin'", "'mutual_information'")),
    "no such name": (lambda: sim.dissimilarity("ssd"), ("'ssd'", "mse", "mind_ssc")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(case):
    call, said = BAD[case]
    with pytest.raises(ValueError) as caught:
        call()
    assert one_sentence(caught.value, *said)


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_hidden(name):
    broken = ONE.clone()
    broken[0, 0, 3, 3] = torch.nan
    assert bool(sim.dissimilarity(name)(broken, ONE).isnan().all())
