"""Where an image is and what its background is: boxes known in closed form, whatever a scanner puts around them."""

import numpy as np
import pytest
import torch
from truths.fields import GRIDS, positions

from regteach import framing
from regteach.data.intensity import normalised
from regteach.data.volumes import Volume
from regteach.framing import Framed, Reader, framed, start, working_grid
from regteach.grid import Grid
from regteach.sampling import grid_points
from regteach.transforms import Identity

# A huge field of view: the head fills a hundredth of it, away from its middle.
WIDE = Grid((130, 94, 40), (2.0, 3.0, 6.0), (-100.0, 20.0, -50.0))
LOW, HIGH = np.array([20.0, 110.0, 0.0]), np.array([90.0, 190.0, 60.0])
CPU = torch.device("cpu")


def head(grid: Grid = WIDE) -> np.ndarray:
    """An ellipsoid from LOW to HIGH, darker towards its border: 0.3 to 1."""
    distance = (((positions(grid) - (LOW + HIGH) / 2) / ((HIGH - LOW) / 2)) ** 2).sum(-1)
    return np.where(distance < 1, 1 - 0.7 * distance, 0.0)


def noisy(image: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 0.05, (2, *image.shape))
    return np.hypot(image + noise[0], noise[1])


def with_specks(image: np.ndarray) -> np.ndarray:
    image = image.copy()
    image[2:4, 3, 5], image[-4, -9, -3] = 2.0, 3.0
    return image


BACKGROUNDS = {
    "zero": lambda image: image,
    "Hounsfield": lambda image: np.where(image > 0, 1000 * image - 600, -1024),
    "noise": noisy,
    "noise of a few counts": lambda image: np.round(noisy(image) * 200),
    "above zero": lambda image: 5 + 20 * image,
    "scores": lambda image: np.where(image > 0, (image - 0.7) / 0.2, 0),
    "white": lambda image: np.where(image > 0, 0.8 * image, 1.0),
    "specks": with_specks,
    "a bright spot": lambda image: image + 20 * (np.abs(positions(WIDE) - (LOW + HIGH) / 2) < 3).all(-1),
    "a bias of the coil": lambda image: image * np.linspace(0.6, 1.4, image.shape[1])[:, None],
}


def volume(array: np.ndarray, grid: Grid = WIDE) -> Volume:
    return Volume(torch.from_numpy(array.astype(np.float32)), grid)


@pytest.mark.parametrize("kind", list(BACKGROUNDS))
def test_the_box_is_found_on_any_background(kind: str) -> None:
    found = framed(volume(BACKGROUNDS[kind](head())))
    # An ellipsoid is thin at its ends, and a hundredth of it is left out there; then, blocks of voxels are averaged.
    tolerance = 0.12 * (HIGH - LOW) + np.array(WIDE.spacing)
    assert (np.abs(np.array(found.box[0]) - LOW) < tolerance).all(), found.box
    assert (np.abs(np.array(found.box[1]) - HIGH) < tolerance).all(), found.box
    assert np.abs(np.array(found.middle) - (LOW + HIGH) / 2).max() < 4.0
    assert np.abs(np.array(WIDE.centre) - (LOW + HIGH) / 2).max() > 10  # the middle of the field of view is elsewhere


@pytest.mark.parametrize("kind", [k for k in BACKGROUNDS if k != "white"])
def test_the_background_is_the_darkest_and_near_0_on_the_networks_scale(kind: str) -> None:
    image = BACKGROUNDS[kind](head())
    found = framed(volume(image))
    assert found.image.min() >= 0
    scaled = Reader(found, working_grid(Grid((48, 48, 32), 2.0), found), Identity(3), CPU)(Identity(3))
    inside = framed(volume(head()))
    truth = Reader(inside, working_grid(Grid((48, 48, 32), 2.0), found), Identity(3), CPU)(Identity(3))
    if kind == "above zero":
        torch.testing.assert_close(scaled, truth, rtol=0, atol=1e-4)
    background = scaled[truth == 0]
    assert background.median() < 0.12
    assert scaled[truth > 0.5].median() > 0.4 or kind == "a bright spot"


def test_a_crop_without_background_is_taken_whole() -> None:
    """Tissue up to every border, as in a crop of the hippocampus: its middle is the middle, its values stay."""
    grid = Grid((35, 51, 34), 1.0, (4.0, -7.0, 0.5))
    texture = np.random.default_rng(0).normal(100, 30, grid.shape).clip(1)
    texture = (texture + np.roll(texture, 1, 0) + np.roll(texture, 1, 1)) / 3
    found = framed(volume(texture, grid))
    assert found.middle == pytest.approx(grid.centre)
    torch.testing.assert_close(found.image[0, 0], torch.from_numpy(texture - texture.min()).float(), rtol=0, atol=1e-4)


def test_at_the_networks_own_spacing_nothing_is_interpolated() -> None:
    """A crop comes to the grid by whole voxels, scaled as in training, with zeros around it."""
    grid = Grid((35, 52, 34), 1.0, (4.25, -7.5, 0.5))
    texture = np.random.default_rng(0).normal(100, 30, grid.shape).clip(1)
    found = framed(volume(texture, grid))
    working = working_grid(Grid((48, 64, 48)), found)
    read = Reader(found, working, Identity(3), CPU)(Identity(3))
    expected = torch.nn.functional.pad(normalised(volume(texture, grid).batch), (7, 7, 6, 6, 6, 7))
    torch.testing.assert_close(read, expected, rtol=0, atol=5e-3)
    offsets = [(a - b) / h for a, b, h in zip(working.origin, grid.origin, grid.spacing, strict=True)]
    assert offsets == pytest.approx([round(o) for o in offsets], abs=1e-6)


def test_the_working_grid_is_the_networks_on_the_middle() -> None:
    found = framed(volume(head()))
    working = working_grid(Grid((40, 44, 15), (2.5, 2.5, 6.0)), found)
    assert working.shape == (40, 44, 15)
    assert working.spacing == (2.5, 2.5, 6.0)
    # Along the last axis the spacings agree: there it moves by up to half a voxel, onto the image's own.
    assert np.abs(np.array(working.centre) - found.middle)[:2].max() < 1e-6
    assert abs(working.centre[2] - found.middle[2]) <= 3
    steps = (working.origin[2] - WIDE.origin[2]) / 6.0
    assert steps == pytest.approx(round(steps), abs=1e-6)


def shifted(by: tuple[float, float, float]) -> Framed:
    origin = tuple(o + b for o, b in zip(WIDE.origin, by, strict=True))
    return framed(volume(head(), Grid(WIDE.shape, WIDE.spacing, origin)))


@pytest.mark.parametrize(("by", "far"), [((5.0, -4.0, 3.0), False), ((300.0, 0.0, 0.0), True), ((30.0, 30, 30), True)])
def test_images_far_apart_start_from_their_middles(by, far: bool) -> None:
    fixed = framed(volume(head()))
    moving, grid = shifted(by), working_grid(Grid((48, 48, 32), 2.0), fixed)
    begin, distance = start(moving, fixed, grid)
    point = torch.tensor([[[50.0, 150.0, 30.0]]])
    wanted = np.array(by) if far else np.zeros(3)
    np.testing.assert_allclose((begin(point) - point)[0, 0], wanted, atol=1e-3)
    assert distance == pytest.approx(np.linalg.norm(wanted), abs=1e-3)


def test_less_of_the_same_space_is_not_far_apart() -> None:
    """The upper half of the head has its middle elsewhere, but lies where it should."""
    upper = np.where(positions(WIDE)[..., 2] > 35, head(), 0)
    moving, fixed = framed(volume(upper)), framed(volume(head()))
    grid = working_grid(Grid((48, 48, 32), 2.0), fixed)
    assert abs(moving.middle[2] - fixed.middle[2]) > framing.FAR * grid.extent[2]
    assert isinstance(start(moving, fixed, grid)[0], Identity)
    assert isinstance(start(fixed, moving, grid)[0], Identity)


def test_reading_is_what_a_scanner_with_larger_voxels_would_see() -> None:
    """Stripes finer than the working grid can show come out grey, and not as other stripes."""
    grid = Grid((180, 180), 0.5)
    x = positions(grid)[..., 0]
    inside = (np.abs(positions(grid) - 45) < 40).all(-1)
    working = Grid((45, 45), 2.0, 1.0)
    for period, most in ((2.2, 0.03), (3.0, 0.12)):
        stripes = Framed(
            torch.from_numpy(inside * (1 + 0.5 * np.cos(2 * np.pi * x / period))).float()[None, None],
            grid,
            (grid.origin, grid.last),
        )
        reader = Reader(stripes, working, Identity(2), CPU)
        seen = framing.warp(reader.part, Identity(2), reader.grid, working)[0, 0, 8:-8, 8:-8]
        naive = framing.warp(stripes.image, Identity(2), grid, working)[0, 0, 8:-8, 8:-8]
        assert seen.std() < most
        assert naive.std() > 0.25
        assert seen.mean() == pytest.approx(1, abs=0.02)


def test_only_what_is_near_is_kept_and_that_changes_nothing() -> None:
    found = framed(volume(noisy(head())))
    working = working_grid(Grid((24, 26, 22), 2.0), found)
    reader = Reader(found, working, Identity(3), CPU)
    assert reader.part.numel() < 0.05 * found.image.numel()
    whole = framing.warp(found.image, Identity(3), WIDE, working, padding="zeros")
    whole = ((whole - reader.low) / (reader.high - reader.low)).clamp(0, 1)
    torch.testing.assert_close(reader(Identity(3)), whole, rtol=0, atol=1e-4)


def test_nothing_to_see_is_an_error() -> None:
    grid = GRIDS[3]
    image = Framed(torch.zeros(1, 1, *grid.shape), grid, (grid.origin, grid.last))
    with pytest.raises(ValueError, match="nothing but background"):
        Reader(image, Grid((8, 8, 8)), Identity(3), CPU)


def test_a_working_grid_beside_the_image_reads_zeros() -> None:
    grid = Grid((40, 40))
    image = Framed(torch.rand(1, 1, 40, 40) + 1, grid, (grid.origin, grid.last))
    working = Grid((16, 16), 1.0, (34.0, 10.0))
    read = Reader(image, working, Identity(2), CPU)(Identity(2))[0, 0]
    outside = grid_points(working)[..., 0] >= 40
    assert (read[outside] == 0).all()
    assert (read[~outside] > 0).float().mean() > 0.9
