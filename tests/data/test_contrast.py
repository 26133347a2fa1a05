"""Contrast: each stage against SciPy, NumPy or a closed form; the whole by its properties, on a nested phantom."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from regteach.data import contrast
from regteach.data.contrast import OUTSIDE, T1, TISSUES, Contrast, synthesise, t1_like
from regteach.data.intensity import normalised
from regteach.grid import Grid

GRID = Grid((32, 36, 30), (2.0, 2.0, 2.5), (-30.0, 5.0, 1.0))
# Nothing but the tissues' values: what remains is their order.
PLAIN = Contrast(
    t1_like=1.0, spread=0.0, texture=0.0, soft=0.0, thick_slices=0.0, bias=0.0, noise=0.0, log_gamma=0.0,
    stripped=1.0, rim=1.0, leaky=0.0, hindbrain_left_out=0.0, cropped=0.0,
)  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dice(seed: int = 0) -> contrast._Dice:
    return contrast._Dice(generator(seed), torch.device("cpu"))


def phantom(grid: Grid = GRID) -> Tensor:
    """Boxes in a box: skull, fluid, cortex, white matter, and blocks of every other tissue inside."""
    tissue = torch.zeros(grid.shape, dtype=torch.int64)
    for margin, value in ((1, OUTSIDE), (2, TISSUES["csf"]), (4, TISSUES["cortex"]), (7, TISSUES["white matter"])):
        tissue[(slice(margin, -margin),) * grid.dim] = value
    inner = [TISSUES[name] for name in TISSUES if TISSUES[name] > TISSUES["white matter"]]
    for value, corner in zip(inner, itertools.product(range(8, 22, 5), repeat=grid.dim), strict=False):
        tissue[tuple(slice(c, c + 4) for c in corner)] = value
    return tissue[None]


def middle(image: Tensor, tissue: Tensor, name: str) -> float:
    """Median of a tissue, away from its borders."""
    where = ndimage.binary_erosion((tissue == TISSUES[name]).numpy())
    return float(image[torch.from_numpy(where)].median())


def test_every_image_is_finite_in_the_unit_range_and_not_empty() -> None:
    drawn = torch.cat([synthesise(phantom(), GRID, generator(seed)) for seed in range(40)])
    assert drawn.shape == (40, 1, *GRID.shape)
    assert drawn.isfinite().all()
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert drawn.flatten(1).std(1).min() > 0.02


def test_one_seed_one_image_whatever_the_batch_and_the_integer_type() -> None:
    twice = phantom().repeat(2, 1, 1, 1)
    both = synthesise(twice, GRID, generator(3))
    assert torch.equal(both, synthesise(twice, GRID, generator(3)))
    assert torch.equal(both[:1], synthesise(phantom(), GRID, generator(3)))
    assert torch.equal(both, synthesise(twice.to(torch.uint8), GRID, generator(3)))
    assert not torch.equal(both[0], both[1])


def test_two_dimensions_too() -> None:
    grid = Grid((36, 40), 2.0)
    images = torch.cat([synthesise(phantom(grid), grid, generator(seed)) for seed in range(20)])
    assert images.shape == (20, 1, 36, 40)
    assert images.isfinite().all()


@pytest.mark.parametrize("draw", [t1_like, partial(synthesise, config=PLAIN)])
def test_t1_order(draw: Callable[[Tensor, Grid, torch.Generator], Tensor]) -> None:
    tissue = phantom()
    for seed in range(4):
        image = draw(tissue, GRID, generator(seed))[0, 0]
        value = {name: middle(image, tissue[0], name) for name in TISSUES if name != "background"}
        assert value["ventricle"] < value["cortex"] < value["white matter"]
        for name in ("thalamus", "pallidum", "putamen"):
            assert value["cortex"] < value[name] < value["white matter"]
        assert value["thalamus"] < value["pallidum"]


def test_plain_values_are_those_of_the_table_up_to_scale() -> None:
    tissue = phantom()
    image = synthesise(tissue, GRID, generator(), PLAIN)[0, 0]
    names = ["ventricle", "cortex", "thalamus", "putamen", "white matter"]
    found = np.array([middle(image, tissue[0], name) for name in names])
    assert np.corrcoef(found, [T1[name] for name in names])[0, 1] > 0.98


def test_reversed_t1_is_upside_down_and_random_is_neither() -> None:
    tissue = phantom()
    upside_down = replace(PLAIN, t1_like=0.0, reversed_t1=1.0)
    image = synthesise(tissue, GRID, generator(), upside_down)[0, 0]
    assert middle(image, tissue[0], "ventricle") > middle(image, tissue[0], "cortex")
    assert middle(image, tissue[0], "cortex") > middle(image, tissue[0], "white matter")
    at_random = replace(PLAIN, t1_like=0.0, reversed_t1=0.0)
    darker = 0
    for seed in range(40):
        image = synthesise(tissue, GRID, generator(seed), at_random)[0, 0]
        darker += middle(image, tissue[0], "cortex") < middle(image, tissue[0], "white matter")
    assert 10 <= darker <= 30


def test_probabilities_are_kept() -> None:
    kinds = [
        float(contrast._means(Contrast(t1_like=0.5, spread=0.0), dice(seed))[1:17].argmax()) for seed in range(300)
    ]
    # Index 2 is white matter, the brightest of a T1; at random it is so once in sixteen.
    share = np.mean(np.array(kinds) == 2)
    assert abs(share - (0.5 + 0.5 * 0.7 / 16)) < 0.08


def test_stripping_leaves_the_skull_out_and_keeps_a_rim_or_not() -> None:
    tissue = phantom()
    fluid: dict[float, list[int]] = {0.0: [], 1.0: []}
    for rim, seed in itertools.product(fluid, range(8)):
        config = replace(PLAIN, rim=rim)
        image = synthesise(tissue, GRID, generator(seed), config)[0, 0]
        assert (image[(tissue[0] >= OUTSIDE) | (tissue[0] == 0)] == 0).all()
        kept = contrast._stripped(tissue[0], GRID, config, dice(seed))
        assert torch.equal(kept > TISSUES["csf"], contrast.brain(tissue)[0])
        fluid[rim].append(int((kept == TISSUES["csf"]).sum()))
    assert set(fluid[0.0]) == {0}
    assert min(fluid[1.0]) > 0
    assert len(set(fluid[1.0])) > 4
    image = synthesise(tissue, GRID, generator(5), replace(PLAIN, stripped=0.0, t1_like=0.0))[0, 0]
    assert image[tissue[0] >= OUTSIDE].mean() > 0


def test_a_leaky_stripping_leaves_some_of_the_skull() -> None:
    tissue = phantom()[0]
    left = [
        int((contrast._stripped(tissue, GRID, replace(PLAIN, leaky=1.0), dice(seed)) >= OUTSIDE).sum())
        for seed in range(8)
    ]
    assert 0 < max(left) < int((tissue >= OUTSIDE).sum())


def test_hindbrain_left_out() -> None:
    out = contrast._stripped(phantom()[0], GRID, replace(PLAIN, hindbrain_left_out=1.0), dice())
    assert not ((out >= TISSUES["cerebellar cortex"]) & (out <= TISSUES["brainstem"])).any()
    assert (out == TISSUES["ventral diencephalon"]).any()


def test_blur_is_scipys_gaussian_of_radius_two_over_the_voxels_that_are_there() -> None:
    image = torch.rand(14, 11, 9, generator=generator())
    of, there = (
        ndimage.gaussian_filter(x, 0.7, radius=2, mode="constant")
        for x in (image.double().numpy(), np.ones((14, 11, 9)))
    )
    assert np.abs(contrast._blurred(image, 0.7).numpy() - of / there).max() < 1e-6
    inside = ndimage.gaussian_filter(image.double().numpy(), 0.7, radius=2)[2:-2, 2:-2, 2:-2]
    assert np.abs(contrast._blurred(image, 0.7).numpy()[2:-2, 2:-2, 2:-2] - inside).max() < 1e-6


def test_an_even_tissue_is_as_bright_at_the_border_as_inside() -> None:
    even = torch.full((12, 10, 8), 0.8)
    assert torch.allclose(contrast._blurred(even, 0.9), even, atol=1e-6)
    assert torch.allclose(contrast._widely_blurred(even, Grid((12, 10, 8), 2.0), 3.0), even, atol=1e-6)


def test_thick_slices_average_and_interpolate() -> None:
    grid = Grid((24, 6, 5), 2.0)
    ramp = torch.arange(24.0)[:, None, None].expand(grid.shape)
    assert torch.allclose(contrast._sliced(ramp, grid, 0, 6.0)[3:-3], ramp[3:-3], atol=1e-4)
    assert torch.allclose(contrast._sliced(torch.ones(grid.shape), grid, 0, 5.0), torch.ones(grid.shape), atol=1e-6)
    spike = torch.zeros(grid.shape)
    spike[9] = 1.0
    # Slices of three voxels, centred on voxels 0, 3, 6, ...: the spike is a third of one of them, a tent around it.
    tent = np.clip(1 - np.abs(np.arange(24) - 9) / 3, 0, None) / 3
    assert np.allclose(contrast._sliced(spike, grid, 0, 6.0)[:, 0, 0].numpy(), tent, atol=1e-6)
    assert contrast._sliced(spike, grid, 0, 1.5) is spike
    assert (
        contrast._sliced(ramp.movedim(0, 1), Grid((6, 24, 5), 2.0), 1, 6.0)[0, 4:-4, 0] - ramp[4:-4, 0, 0]
    ).abs().max() < 1e-4


def test_wide_blur_has_the_width_it_says() -> None:
    grid = Grid((48, 48, 48), 2.0)
    spike = torch.zeros(grid.shape)
    spike[24:26, 24:26, 24:26] = 1.0  # one voxel at half the resolution
    blurred = contrast._widely_blurred(spike, grid, 5.0)
    at = torch.arange(48) * 2.0 - 49.0
    weights = blurred.sum((1, 2)) / blurred.sum()
    # Linear interpolation to voxels 1 and 3 mm away, weighted 3 to 1, adds a variance of 3.
    assert float((weights * at**2).sum().sqrt()) == pytest.approx((5.0**2 + 3) ** 0.5, rel=1e-3)


def test_bias_field_has_its_size_and_is_smooth() -> None:
    field = contrast._bias_field(Grid((48, 56, 48), 4.0), 0.3, (60.0, 60.0), dice()).log()
    assert float(field.std()) == pytest.approx(0.3, rel=0.1)
    assert abs(float(field.mean())) < 0.02
    # A wave of the control spacing has at most this slope: 2 pi / 60 per mm, 4 mm a voxel, three standard deviations.
    assert float(field.diff(dim=0).abs().max()) < 3 * 0.3 * 4 * 2 * np.pi / 60
    assert torch.equal(contrast._bias_field(GRID, 0.0, (60.0, 60.0), dice()), torch.ones(GRID.shape))


def test_grain_has_unit_variance_and_lumps() -> None:
    grain = contrast._grain(Grid((64, 64, 64), 2.0), dice())
    assert float(grain.std()) == pytest.approx(1.0, rel=0.2)
    neighbours = float((grain[1:] * grain[:-1]).mean() / grain.square().mean())
    assert 0.2 < neighbours < 0.6


def test_scale_agrees_with_the_normalisation_of_real_images() -> None:
    image = torch.rand(24, 24, 24, generator=generator()) ** 2 * 700
    image[:6] = 0
    assert (contrast._scaled(image) - normalised(image[None, None])[0, 0]).abs().max() < 0.03
    assert (contrast._scaled(torch.zeros(4, 4, 4)) == 0).all()


def test_a_stripped_image_has_the_scale_of_a_real_one_in_spite_of_noise_and_blur() -> None:
    """What surrounds the brain is no signal, whatever noise and blur put there before it was taken away."""
    config = Contrast(stripped=1.0, rim=0.0, leaky=0.0, log_gamma=0.0, cropped=0.0, hindbrain_left_out=0.0)
    apart = []
    for seed in range(8):
        image = synthesise(phantom(), GRID, generator(seed), config)
        apart.append(float((image - normalised(image))[image > 0].abs().mean()))
    assert max(apart) < 0.05


def test_cropping_empties_one_side() -> None:
    image = torch.ones(GRID.shape)
    assert (contrast._cropped(image, 1, 0.25, True)[:, 27:] == 0).all()
    assert (contrast._cropped(image, 1, 0.25, True)[:, :27] == 1).all()
    assert (contrast._cropped(image, 1, 0.25, False)[:, :9] == 0).all()
    assert torch.equal(contrast._cropped(image, 1, 0.0, True), image)


def test_gradual_structures_lose_their_border_and_the_others_do_not() -> None:
    tissue = phantom()[0]
    values = torch.zeros(contrast.MOST)
    values[TISSUES["white matter"]] = 1.0
    out = contrast._blended(values[tissue], tissue, GRID, 0.5)
    assert (out[tissue == TISSUES["thalamus"]] > 0.05).all()
    assert (out[tissue == TISSUES["putamen"]] == 0).all()


@pytest.mark.parametrize(
    ("tissue", "message"),
    [
        (torch.zeros(1, 4, 4, 4, dtype=torch.int64), "32 x 36 x 30"),
        (torch.zeros(1, *GRID.shape), "float32"),
        (torch.full((1, *GRID.shape), 64), "from 0 to 63"),
        (torch.full((1, *GRID.shape), -1), "from 0 to 63"),
    ],
)
def test_bad_maps(tissue: Tensor, message: str) -> None:
    for draw in (synthesise, t1_like):
        with pytest.raises(ValueError, match=message):
            draw(tissue, GRID, generator())


def test_tissue_numbers() -> None:
    assert list(TISSUES.values()) == list(range(len(TISSUES)))
    assert set(T1) == set(TISSUES)
    assert len(TISSUES) == OUTSIDE


def test_other_values_give_another_contrast() -> None:
    upside_down = {name: 0.0 if name == "background" else 1.2 - value for name, value in T1.items()}
    first = t1_like(phantom(), GRID, generator())[0, 0]
    other = t1_like(phantom(), GRID, generator(), upside_down)[0, 0]
    inside = phantom()[0] == TISSUES["white matter"]
    fluid = phantom()[0] == TISSUES["csf"]
    assert first[inside].mean() > first[fluid].mean() + 0.3
    assert other[fluid].mean() > other[inside].mean() + 0.3
    assert torch.equal(t1_like(phantom(), GRID, generator(), T1)[0, 0], first)
