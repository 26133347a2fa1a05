"""Augmentation: what moves, how far, and together; what an intensity change may do; the same item for the same seed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from truths.fields import one_sentence, positions
from truths.phantoms import ball

from regteach.data.augment import Augmentation, augmented, intensities
from regteach.grid import Grid

GRIDS = [Grid((40, 34), (1.0, 1.5), (-3.0, 5.0)), Grid((20, 18, 16), (1.0, 1.5, 2.0), (-3.0, 5.0, 10.5))]
MOTION = Augmentation(shift_mm=2.0, rotation_deg=15.0, scale_ratio=1.1, shear=0.1, warp_mm=1.5, warp_spacing_mm=10.0)
SCANNER = Augmentation(gamma=0.4, bias=0.3, noise=0.05, blur_mm=1.0)
ALL = replace(MOTION, **{name: getattr(SCANNER, name) for name in ("gamma", "bias", "noise", "blur_mm")})


@pytest.fixture(params=GRIDS, ids=["2d", "3d"])
def grid(request: pytest.FixtureRequest) -> Grid:
    return request.param


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head(grid: Grid) -> Tensor:
    """A smooth, round object in a background of exact zeros."""
    points = positions(grid)
    centre = points.reshape(-1, grid.dim).mean(0)
    distance = np.linalg.norm((points - centre) / np.array(grid.extent), axis=-1)
    values = np.where(distance < 0.33, 0.25 + 0.5 * np.cos(2 * distance) * np.cos(0.3 * points[..., 0]) ** 2, 0)
    return torch.from_numpy(values).float()[None, None]


def coordinates(grid: Grid) -> Tensor:
    """Each voxel's own position as its channels: after a motion they say where each voxel was read."""
    return torch.from_numpy(positions(grid)).float().movedim(-1, 0)[None]


def read_at(grid: Grid, settings: Augmentation, seed: int) -> tuple[Tensor, Tensor]:
    """Voxel positions and where they were read, ``n d``, mm, for voxels read well inside the grid."""
    _, read = augmented(head(grid), coordinates(grid), grid, settings, seeded(seed))
    here, there = (c[0].movedim(0, -1).reshape(-1, grid.dim).double() for c in (coordinates(grid), read))
    low, high = here.amin(0), here.amax(0)
    inside = ((there > low + 1e-3) & (there < high - 1e-3)).all(1)
    assert inside.sum() > 50
    return here[inside], there[inside]


# ---- nothing asked, nothing done ----


def test_nothing_changes_unless_asked(grid: Grid) -> None:
    generator = seeded(1)
    before = generator.get_state()
    image, soi = head(grid), coordinates(grid)
    tissue = torch.ones(1, *grid.shape, dtype=torch.long)
    result = augmented(image, soi, grid, Augmentation(), generator, tissue, never)
    assert torch.equal(result[0], image)
    assert torch.equal(result[1], soi)
    assert torch.equal(generator.get_state(), before)  # not a number was drawn
    assert not Augmentation().moves


def never(*_: object) -> Tensor:
    raise AssertionError("a contrast was drawn")


@pytest.mark.parametrize("name", ["shift_mm", "rotation_deg", "shear", "warp_mm"])
def test_every_motion_moves(grid: Grid, name: str) -> None:
    settings = Augmentation(**{name: 1.0})
    assert settings.moves
    assert replace(Augmentation(), scale_ratio=1.2).moves
    here, there = read_at(grid, settings, 0)
    assert (here - there).abs().max() > 0.05


def test_what_is_given_is_left_alone(grid: Grid) -> None:
    image, soi = head(grid), head(grid)
    augmented(image, soi, grid, ALL, seeded(0))
    assert torch.equal(image, head(grid))
    assert torch.equal(soi, head(grid))


# ---- drawn from the generator, and from nothing else ----


def test_the_generator_fixes_everything(grid: Grid) -> None:
    first = augmented(head(grid), head(grid), grid, ALL, seeded(5))
    torch.manual_seed(99)
    again = augmented(head(grid), head(grid), grid, ALL, seeded(5))
    other = augmented(head(grid), head(grid), grid, ALL, seeded(6))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert (a - c).abs().max() > 0.05


def test_torchs_own_generator_is_not_touched(grid: Grid) -> None:
    before = torch.get_rng_state()
    augmented(head(grid), head(grid), grid, ALL, seeded(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_second_draw_is_another(grid: Grid) -> None:
    generator = seeded(0)
    first, second = (augmented(head(grid), head(grid), grid, ALL, generator)[0] for _ in range(2))
    assert (first - second).abs().max() > 0.05


# ---- image and structures move together ----


@pytest.mark.parametrize("seed", range(4))
def test_structures_stay_on_the_image(grid: Grid, seed: int) -> None:
    """A structure that is a multiple of the image stays one; one that is a threshold of it, but for its border."""
    image = head(grid)
    soi = torch.cat([0.25 * image, (image > 0.4).float()], 1)
    moved, parts = augmented(image, soi, grid, MOTION, seeded(seed))
    torch.testing.assert_close(parts[:, :1], 0.25 * moved, atol=1e-6, rtol=0)
    # Read between voxels that are all inside, or all outside, the image is on the same side of the threshold.
    within, without = parts[:, 1:] > 1 - 1e-5, parts[:, 1:] < 1e-5
    assert moved[within].min() > 0.4 - 1e-4
    assert moved[without].max() < 0.4 + 1e-4
    assert (within | without).float().mean() > 0.5
    assert (moved - image).abs().max() > 0.1


def test_structures_are_not_spoilt_by_the_scanner(grid: Grid) -> None:
    _, soi = augmented(head(grid), coordinates(grid), grid, SCANNER, seeded(0))
    assert torch.equal(soi, coordinates(grid))


def test_a_batch_of_channels_moves_as_one(grid: Grid) -> None:
    image = torch.cat([head(grid), 0.5 * head(grid)], 1)
    moved, _ = augmented(image, head(grid), grid, MOTION, seeded(2))
    torch.testing.assert_close(moved[:, 1], 0.5 * moved[:, 0], atol=1e-6, rtol=0)


# ---- how far ----


@pytest.mark.parametrize("seed", range(6))
def test_a_shift_is_a_shift_and_no_more_than_asked(grid: Grid, seed: int) -> None:
    here, there = read_at(grid, Augmentation(shift_mm=3.0), seed)
    shift = there - here
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), atol=1e-4, rtol=0)
    assert shift.abs().max() <= 3.0 + 1e-4


def fitted(here: Tensor, there: Tensor, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The affine motion about the grid's centre, by least squares, which must fit."""
    centre = np.array(grid.centre)
    design = np.concatenate([here.numpy() - centre, np.ones((len(here), 1))], 1)
    solution, *_ = np.linalg.lstsq(design, there.numpy() - centre, rcond=None)
    np.testing.assert_allclose(design @ solution, there.numpy() - centre, atol=1e-4)
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("seed", range(4))
def test_a_turn_is_about_the_middle_and_no_more_than_asked(grid: Grid, seed: int) -> None:
    matrix, shift = fitted(*read_at(grid, Augmentation(rotation_deg=10.0), seed), grid)
    np.testing.assert_allclose(shift, 0, atol=1e-4)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(grid.dim), atol=1e-5)
    cosine = (np.trace(matrix) - (grid.dim - 2)) / 2
    largest = 10.0 if grid.dim == 2 else 10.0 * 3**0.5 * 1.02  # about three axes, one after the other
    assert np.rad2deg(np.arccos(min(1, cosine))) <= largest
    assert np.linalg.det(matrix) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_a_stretch_is_symmetric_and_no_more_than_asked(grid: Grid, seed: int) -> None:
    matrix, _ = fitted(*read_at(grid, Augmentation(scale_ratio=1.25), seed), grid)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-5)
    stretch = np.linalg.eigvalsh(matrix)
    assert (stretch >= 1 / 1.25 - 1e-5).all()
    assert (stretch <= 1.25 + 1e-5).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_shear_is_a_unit_upper_triangle(grid: Grid, seed: int) -> None:
    matrix, _ = fitted(*read_at(grid, Augmentation(shear=0.2), seed), grid)
    np.testing.assert_allclose(np.tril(matrix), np.eye(grid.dim), atol=1e-5)
    assert np.abs(np.triu(matrix, 1)).max() <= 0.2 + 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_a_warp_stays_in_bounds_and_never_folds(grid: Grid, seed: int) -> None:
    settings = Augmentation(warp_mm=6.0, warp_spacing_mm=8.0)  # 6 mm of 8 would fold, were it let
    here, there = read_at(grid, settings, seed)
    assert (there - here).abs().max() <= 6.0 + 1e-4
    _, read = augmented(head(grid), coordinates(grid), grid, settings, seeded(seed))
    slopes = np.stack([np.stack(np.gradient(read[0, k].double().numpy(), *grid.spacing)) for k in range(grid.dim)])
    middle = (..., *[slice(8, -8) if grid.dim == 2 else slice(5, -5)] * grid.dim)  # away from the border
    assert np.linalg.det(np.moveaxis(slopes[middle], (0, 1), (-2, -1))).min() > 0


def test_what_moves_in_from_outside_is_the_border(grid: Grid) -> None:
    image = torch.full((1, 1, *grid.shape), 0.5)
    moved, _ = augmented(image, image, grid, MOTION, seeded(0))
    torch.testing.assert_close(moved, image, atol=1e-6, rtol=0)


# ---- the scanner ----


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("settings", [SCANNER, ALL, Augmentation(noise=1.0), Augmentation(bias=3.0)])
def test_intensities_stay_in_their_range_and_the_background_stays_0(
    grid: Grid, settings: Augmentation, seed: int
) -> None:
    image, soi = augmented(head(grid), (head(grid) > 0).float(), grid, settings, seeded(seed))
    assert image.min() >= 0
    assert image.max() <= 1
    assert (image[soi == 0] == 0).all()
    assert (soi == 0).sum() > 20
    assert (image > 0).sum() > 20


def test_a_blur_is_a_gaussian_of_the_drawn_width(grid: Grid) -> None:
    image = 0.2 + 0.6 * torch.rand(1, 1, *grid.shape)
    for seed in range(3):
        result = intensities(image, grid, Augmentation(blur_mm=2.0), seeded(seed))
        sigma_vox = 2.0 * float(torch.rand((), generator=seeded(seed))) / np.array(grid.spacing)
        expected = ndimage.gaussian_filter(image[0, 0].double().numpy(), sigma_vox, mode="nearest")
        np.testing.assert_allclose(result[0, 0], expected, atol=2e-3)


def test_gamma_is_a_power_within_bounds(grid: Grid) -> None:
    image = 0.1 + 0.8 * torch.rand(1, 1, *grid.shape)
    powers = []
    for seed in range(40):
        result = intensities(image, grid, Augmentation(gamma=0.5), seeded(seed))
        power = (result.log() / image.log()).double()
        torch.testing.assert_close(power, power.mean().expand_as(power), atol=1e-4, rtol=0)
        powers.append(float(power.mean().log()))
    assert -0.5 <= min(powers) < -0.35
    assert 0.35 < max(powers) <= 0.5


def test_a_lift_leaves_white_where_it_is_and_the_background_black(grid: Grid) -> None:
    image = 0.1 + 0.9 * torch.rand(1, 1, *grid.shape)
    image[..., 0] = 0.0
    lows = []
    for seed in range(40):
        result = intensities(image, grid, Augmentation(lift=0.5), seeded(seed))
        assert not result[..., 0].any()
        shown = (result > 0) & (image < 0.95)
        low = ((result - image) / (1 - image))[shown].double()
        torch.testing.assert_close(low, low.median().expand_as(low), atol=1e-3, rtol=0)
        lows.append(float(low.median()))
    assert -0.125 <= min(lows) < -0.08
    assert 0.45 < max(lows) <= 0.5


def test_a_bias_field_is_smooth_and_within_bounds(grid: Grid) -> None:
    image = torch.full((1, 1, *grid.shape), 0.4)
    largest = 0.0
    for seed in range(10):
        field = (intensities(image, grid, Augmentation(bias=0.5), seeded(seed)) / image).log()[0, 0].double()
        assert field.abs().max() <= 0.5 + 1e-6
        # Linear between 4 nodes an axis, which differ by 2 * 0.5 at most.
        steps = [field.diff(dim=axis).abs().max() for axis in range(grid.dim)]
        assert all(step <= 1.0 / (n / 4) + 1e-6 for step, n in zip(steps, grid.shape, strict=True))
        largest = max(largest, float(field.abs().max()))
    assert largest > 0.15


def test_noise_is_gaussian_up_to_the_size_asked(grid: Grid) -> None:
    image = torch.full((1, 1, *grid.shape), 0.5)
    sizes = []
    for seed in range(40):
        result = intensities(image, grid, Augmentation(noise=0.1), seeded(seed)) - image
        sizes.append(float(result.std()))
        assert abs(float(result.mean())) < 5 * sizes[-1] / grid.size**0.5 + 1e-6
        drawn = 0.1 * float(torch.rand((), generator=seeded(seed)))
        assert sizes[-1] == pytest.approx(drawn, rel=0.1)
    assert max(sizes) > 0.08


# ---- synthetic contrasts ----


def paint(tissue: Tensor, grid: Grid, generator: torch.Generator) -> Tensor:
    """One grey value a tissue, drawn at random; background is 0."""
    greys = 0.2 + 0.8 * torch.rand(4, generator=generator)
    greys[0] = 0
    return greys[tissue][:, None]


def nested(grid: Grid) -> Tensor:
    """Three balls, one in the other, ``1 *grid``."""
    points = positions(grid)
    centre = points.reshape(-1, grid.dim).mean(0)
    radius = 0.45 * min(grid.extent)
    return torch.from_numpy(sum(ball(points, centre, radius * part) for part in (1, 0.7, 0.4))).long()[None]


def test_a_synthetic_contrast_moves_with_the_structures(grid: Grid) -> None:
    tissue = nested(grid)
    soi = torch.stack([tissue == k for k in range(4)], 1).float()
    settings = replace(MOTION, synthetic=1.0)
    for seed in range(4):
        image, moved = augmented(head(grid), soi, grid, settings, seeded(seed), tissue, paint)
        greys = []
        for k in range(4):
            here = image[0, 0][moved[0, k] > 0.999]
            assert here.numel() > 10
            assert here.max() - here.min() == 0  # one tissue, one grey
            greys.append(float(here[0]))
        assert greys[0] == 0
        assert len(set(greys)) == 4
        assert (moved - soi).abs().max() > 0.5


def test_the_image_itself_plays_no_part_in_a_synthetic_one(grid: Grid) -> None:
    settings = replace(ALL, synthetic=1.0)
    soi = head(grid)
    one, _ = augmented(head(grid), soi, grid, settings, seeded(3), nested(grid), paint)
    other, _ = augmented(torch.rand_like(soi), soi, grid, settings, seeded(3), nested(grid), paint)
    assert torch.equal(one, other)


def test_synthetic_contrasts_are_as_frequent_as_asked() -> None:
    small = Grid((4, 4))
    image = torch.full((1, 1, *small.shape), 0.1)
    tissue = torch.ones(1, *small.shape, dtype=torch.long)
    settings = Augmentation(synthetic=0.3)
    drawn = [augmented(image, image, small, settings, seeded(seed), tissue, paint)[0].max() for seed in range(500)]
    assert abs(sum(float(most) > 0.15 for most in drawn) - 150) < 5 * (500 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize("left_out", ["tissue", "synthesis"])
def test_synthetic_contrasts_need_something_to_be_drawn_from(grid: Grid, left_out: str) -> None:
    given: dict[str, Any] = {"tissue": nested(grid), "synthesis": paint, left_out: None}
    with pytest.raises(ValueError, match="tissue map") as caught:
        augmented(head(grid), head(grid), grid, Augmentation(synthetic=0.1), seeded(0), **given)
    assert one_sentence(caught.value)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("shift_mm", -1.0, "shift_mm of an augmentation is from 0 to inf, not -1.0"),
        ("scale_ratio", 0.9, "scale_ratio of an augmentation is from 1 to inf, not 0.9"),
        ("synthetic", 1.5, "synthetic of an augmentation is from 0 to 1, not 1.5"),
        ("noise", float("nan"), "not nan"),
        ("gamma", float("inf"), "not inf"),
        ("warp_spacing_mm", 0.0, "warp_spacing_mm is a length scale and can not be 0"),
    ],
)
def test_changes_that_make_no_sense_are_refused(name: str, value: float, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        Augmentation(**{name: value})
    assert one_sentence(caught.value, said)
