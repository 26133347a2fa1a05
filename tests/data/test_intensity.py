"""Intensities: percentiles as NumPy has them, what the scale must not depend on, and images without contrast."""

import numpy as np
import pytest
import torch
from truths.fields import one_sentence

from regteach.data.intensity import PERCENTILES, normalised
from regteach.grid import Grid


def image(grid: Grid, seed: int = 0, batch: int = 2, channels: int = 3) -> torch.Tensor:
    """Skewed positive values, as of MR images."""
    values = np.random.default_rng(seed).gamma(2.0, 100.0, (batch, channels, *grid.shape)) + 1
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize("percentiles", [PERCENTILES, (5.0, 90.0), (0.0, 100.0)])
def test_the_scale_is_that_of_numpys_percentiles(grid: Grid, percentiles: tuple[float, float]) -> None:
    images = image(grid)
    result = normalised(images, percentiles)
    for b in range(2):
        for c in range(3):
            values = images[b, c].numpy()
            low, high = np.percentile(values, percentiles, method="nearest")
            np.testing.assert_allclose(result[b, c], np.clip((values - low) / (high - low), 0, 1), atol=1e-6)


def test_everything_lies_between_0_and_1_and_a_little_at_the_ends(grid: Grid) -> None:
    result = normalised(image(grid))
    assert result.min() == 0
    assert result.max() == 1
    for end in (0, 1):
        share = (result == end).float().flatten(2).mean(2)
        assert ((share > 0) & (share < 0.04)).all()


def test_zeros_are_not_counted_and_stay_zeros(grid: Grid) -> None:
    images = image(grid)
    mask = torch.rand(images.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    masked = images * ~mask  # most of the image is background
    result = normalised(masked)
    assert (result[mask] == 0).all()
    for b in range(2):
        for c in range(3):
            values = masked[b, c].numpy()
            low, high = np.percentile(values[values != 0], PERCENTILES, method="nearest")
            np.testing.assert_allclose(result[b, c], np.clip((values - low) / (high - low), 0, 1), atol=1e-6)


def test_zeros_around_an_image_change_nothing_in_it(grid: Grid) -> None:
    images = image(grid)
    around = [5, 3] * grid.dim
    padded = torch.nn.functional.pad(images, around)
    inside = (..., *[slice(5, -3)] * grid.dim)
    result = normalised(padded)
    assert torch.equal(result[inside], normalised(images))
    assert result.sum() == pytest.approx(result[inside].sum())


def test_gain_changes_nothing_and_nor_does_offset(grid: Grid) -> None:
    images = image(grid)
    expected = normalised(images)
    torch.testing.assert_close(normalised(5000 * images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(normalised(0.01 * images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(normalised(images + 300), expected, rtol=1e-3, atol=1e-4)


def test_images_and_channels_are_scaled_each_by_itself(grid: Grid) -> None:
    images = image(grid)
    result = normalised(images)
    alone = normalised(images[1:, 2:])
    assert torch.equal(result[1:, 2:], alone)
    images[0, 0] *= 1e6
    assert torch.equal(normalised(images)[1:, 2:], alone)


def test_one_bright_voxel_does_not_darken_the_rest(grid: Grid) -> None:
    images = image(grid, batch=1, channels=1)
    expected = normalised(images)
    images.view(-1)[7] = 1e7
    result = normalised(images)
    assert result.view(-1)[7] == 1
    assert (result - expected).abs().flatten().sort().values[-2] < 0.1
    assert normalised(images, (0, 100)).median() < 1e-3  # extremes would have darkened it


def test_the_order_of_brightness_stays(grid: Grid) -> None:
    images = image(grid, batch=1, channels=1)
    order = images.flatten().argsort()
    assert (normalised(images).flatten()[order].diff() >= 0).all()


def test_a_binary_image_becomes_0_and_1(grid: Grid) -> None:
    mask = torch.zeros(1, 1, *grid.shape)
    mask[..., 2:4] = 200
    assert torch.equal(normalised(mask), (mask > 0).float())


def test_a_nearly_binary_image_is_scaled_by_its_extremes(grid: Grid) -> None:
    mask = torch.zeros(1, 1, *grid.shape)
    mask[..., 2:4] = 200
    mask.view(-1)[0] = 100
    mask.view(-1)[1] = 400
    result = normalised(mask, (10, 90))
    assert torch.equal(result, mask / 400)


def test_whole_numbers_are_images_too() -> None:
    values = torch.arange(200).reshape(1, 1, 10, 20)
    torch.testing.assert_close(normalised(values), normalised(values.float()))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_no_number_type_overflows(kind: torch.dtype) -> None:
    """In unsigned whole numbers, background minus the lower percentile would be a large number."""
    limits = torch.iinfo(kind)
    values = torch.linspace(max(limits.min, -30000), min(limits.max, 30000), 200).round().to(kind).reshape(1, 1, 10, 20)
    torch.testing.assert_close(normalised(values), normalised(values.double()).float())


def test_zeros_among_negative_values_are_signal(grid: Grid) -> None:
    """In a CT air is -1000 and water is 0: where an image goes below 0, its zeros count."""
    hounsfield = np.random.default_rng(0).choice([-1000.0, -80.0, 0.0, 40.0, 900.0], (1, 1, *grid.shape))
    result = normalised(torch.from_numpy(hounsfield), (0, 45))
    low, high = np.percentile(hounsfield, (0, 45), method="nearest")
    assert (low, high) == (-1000, 0)
    np.testing.assert_allclose(result, np.clip((hounsfield - low) / (high - low), 0, 1), atol=1e-12)


def test_zeros_above_all_else_are_signal(grid: Grid) -> None:
    values = -np.random.default_rng(0).integers(0, 5, (1, 1, *grid.shape)).astype(float)
    low, high = np.percentile(values, (10, 90), method="nearest")
    result = normalised(torch.from_numpy(values), (10, 90))
    np.testing.assert_allclose(result, np.clip((values - low) / (high - low), 0, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_image_that_is_not_finite_is_named(grid: Grid, value: float) -> None:
    images = image(grid)
    images[1, 2].view(-1)[5] = value
    with pytest.raises(ValueError, match="Image 1 holds numbers that are not finite") as caught:
        normalised(images)
    assert one_sentence(caught.value)
    normalised(images[:1])


@pytest.mark.parametrize("percentiles", [(99, 1), (50, 50), (-1, 99), (1, 101), (float("nan"), 99)])
def test_percentiles_that_make_no_sense_are_refused(grid: Grid, percentiles: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="between 0 and 100, the lower one first") as caught:
        normalised(image(grid), percentiles)
    assert one_sentence(caught.value, str(percentiles))


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_constant_image_is_named(grid: Grid, value: float) -> None:
    images = image(grid)
    images[1, 2] = value
    with pytest.raises(ValueError, match=rf"Image 1 is constant \({value:g}\): there is nothing to register\."):
        normalised(images)


def test_the_given_image_is_left_alone(grid: Grid) -> None:
    images = image(grid)
    before = images.clone()
    normalised(images)
    assert torch.equal(images, before)
