"""Correspondences that a user gives: into a registration, and added to one, in the world coordinates of the files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from truths.fields import one_sentence, positions
from truths.pairs import NETS, Motion, untrained, write

from regteach.checkpoints import Model
from regteach.grid import Grid
from regteach.nets.keypoint_kernel import KeypointKernel, KeypointKernelConfig, Scale
from regteach.refinement import Refinement
from regteach.registration import Registration, register
from regteach.transforms import Dense, displacement

# Other voxels and another field of view in each of the two.
FIXED = {2: Grid((70, 76), (1.5,), (-50.0, -54.0)), 3: Grid((36, 34, 40), (2.5, 2.8, 2.4), (-44.0, -46.0, -48.0))}
MOVING = {2: Grid((60, 48), (1.8, 2.4), (-52.0, -56.0)), 3: Grid((40, 34, 42), (2.4, 2.9, 2.3), (-48.0, -50.0, -46.0))}
AWAY = {2: np.array([310.0, -250.0]), 3: np.array([310.0, -250.0, 180.0])}
SHIFT = Motion(np.eye(3), np.array([4.0, -3.0, 2.0]))
SCALES = (Scale(2, 2), Scale(1, 2))


def texture(points: np.ndarray) -> np.ndarray:
    """Many smooth spots within 45 mm of the origin on nothing, at points ``... d``."""
    dim, rng = points.shape[-1], np.random.default_rng(3)
    spots = {2: 110, 3: 160}[dim]
    centres, heights = rng.uniform(-34, 34, (spots, dim)), rng.uniform(0.3, 1, spots)
    value = np.zeros(points.shape[:-1])
    for centre, height in zip(centres, heights, strict=True):
        value += height * np.exp(-((points - centre) ** 2).sum(-1) / (2 * 3.5**2))
    return np.where(value > 0.03, value, 0).astype(np.float32)


def motion_of(dim: int, away: bool = False) -> Motion:
    return Motion(np.eye(dim), SHIFT.shift[:dim] + (AWAY[dim] if away else 0))


def moving_grid(dim: int, away: bool = False) -> Grid:
    return replace(MOVING[dim], origin=tuple(np.array(MOVING[dim].origin) + AWAY[dim])) if away else MOVING[dim]


def images(dim: int, away: bool = False) -> tuple[tuple[Any, Grid], tuple[Any, Grid]]:
    grid, motion = moving_grid(dim, away), motion_of(dim, away)
    return (texture(motion.back(positions(grid))), grid), (texture(positions(FIXED[dim])), FIXED[dim])


def model(dim: int, **settings: Any) -> Model:
    torch.manual_seed(0)
    config = KeypointKernelConfig.of(
        NETS[dim], **{"scales": SCALES, "features": 2, "widths": (2, 4), "width": 8, "neighbours": 10} | settings
    )
    network = KeypointKernel(config).eval().requires_grad_(False)
    return Model(f"keypoints-{dim}d", network, Refinement(3, rate=0.05))


MODELS = {dim: model(dim) for dim in (2, 3)}


@pytest.fixture(scope="module", params=[(2, False), (2, True), (3, True)], ids=["2d", "2d far", "3d far"])
def found(request: pytest.FixtureRequest) -> tuple[Registration, int, bool]:
    dim, away = request.param
    return register(*images(dim, away), MODELS[dim]), dim, away


def wrong_pair(dim: int, away: bool) -> tuple[np.ndarray, np.ndarray]:
    """A correspondence that the images contradict: it can only come from the user."""
    fixed = np.array([[6.3, -5.1, 4.2]])[:, :dim]
    return fixed, motion_of(dim, away)(fixed) + np.array([5.0, 4.0, -5.0])[:dim]


def miss(result: Registration, points: tuple[np.ndarray, np.ndarray]) -> float:
    return float(np.linalg.norm(result.transform(points[0]) - points[1], axis=1).max())


def test_the_truth_is_found_without_points(found) -> None:
    result, dim, away = found
    points = positions(FIXED[dim])[texture(positions(FIXED[dim])) > 0.3][::7]
    error = np.linalg.norm(result.transform(points) - motion_of(dim, away)(points), axis=1)
    assert error.mean() < 0.5 * max(NETS[dim].spacing)
    assert result.report["start"].startswith("middles aligned" if away else "world")
    assert "given_points" not in result.report


def test_given_points_are_met_and_what_is_far_stays(found) -> None:
    result, dim, away = found
    points = wrong_pair(dim, away)
    assert miss(result, points) > 5
    given = register(*images(dim, away), MODELS[dim], points=points)
    added = result.add_points(*points)
    for other in (given, added):
        assert miss(other, points) < 1.5
        assert other.report["given_points"] == 1
        assert other.keypoints is not None
        assert other.displacement().shape == (*FIXED[dim].shape, dim)
    # Added later the other matches stay as they were, so the field changes nowhere else.
    change = np.abs(added.displacement() - result.displacement()).max(-1)
    assert change.max() > 3
    assert (change == 0).mean() > 0.1
    assert miss(result, points) > 5  # this one stays as it is


def test_adding_is_computing_it_again(found) -> None:
    result, dim, away = found
    fixed, moving = wrong_pair(dim, away)
    added = result.add_points(fixed, moving).add_points(fixed + 3.3, moving + 3.0)
    known = added.keypoints
    assert known is not None
    assert known.count == 2
    torch.testing.assert_close(known.dense[0], known.field.on(known.grid), atol=1e-4, rtol=0)
    together = result.add_points(np.concatenate([fixed, fixed + 3.3]), np.concatenate([moving, moving + 3.0]))
    np.testing.assert_allclose(together.displacement(), added.displacement(), atol=1e-3)
    # Its figures are those of the new field.
    det = torch.linalg.det(Dense(known.dense, known.grid).jacobian_on(known.grid))
    torch.testing.assert_close(known.det, det, atol=1e-4, rtol=0)
    assert added.report["folding_percent"] == pytest.approx(100 * float((det <= 0).float().mean()), abs=1e-4)
    assert added.report["similarity"]["after"] < result.report["similarity"]["after"]
    assert added.report["similarity"]["before"] == result.report["similarity"]["before"]


def test_a_point_has_one_place_whenever_it_is_told() -> None:
    result, (fixed, moving) = register(*images(2), MODELS[2]), wrong_pair(2, False)
    added, again = result.add_points(fixed, moving), register(*images(2), MODELS[2], points=(fixed, moving))
    for told in (added, again):
        with pytest.raises(ValueError, match="is given two places in moving_mm") as error:
            told.add_points(fixed, moving + 8)
        assert one_sentence(error.value)
        assert told.add_points(fixed, moving).report["given_points"] == 2  # once more the same is no contradiction
    corrected = result.add_points(fixed, moving + 2)
    assert miss(corrected, (fixed, moving + 2)) < 1.5


def test_the_loss_of_the_network_is_not_said_of_what_people_added() -> None:
    result = register(*images(2), MODELS[2])
    added = result.add_points(*wrong_pair(2, False))
    assert "feature_loss" in result.report
    assert "feature_loss" not in added.report


@pytest.mark.parametrize("away", [False, True])
def test_points_and_refinement_together(away: bool) -> None:
    points = wrong_pair(2, away)
    refined = register(*images(2, away), MODELS[2], refine=5, points=points)
    assert miss(refined, points) < 1.5
    assert len(refined.report["curve"]) == 6
    later = register(*images(2, away), MODELS[2], refine=5)
    assert min(later.report["curve"]) < later.report["curve"][0]
    once = register(*images(2, away), MODELS[2])
    assert np.abs(later.displacement() - once.displacement()).max() > 0.01
    again = later.add_points(*points)
    assert miss(again, points) < 1.5
    change = np.abs(again.displacement() - later.displacement()).max(-1)
    assert (change == 0).mean() > 0.1  # what the refinement found stays where the new point is not heard


def test_what_a_registration_keeps_is_its_own() -> None:
    """The model may be changed or trained on; a registration goes on with what it was made by."""
    own = model(2)
    result = register(*images(2), own)
    expected = result.add_points(*wrong_pair(2, False)).displacement()
    for weight in own.network.parameters():
        weight.data += 1
    np.testing.assert_array_equal(result.add_points(*wrong_pair(2, False)).displacement(), expected)


def test_files_tensors_and_lists_are_taken(tmp_path: Path) -> None:
    (moving, moving_at), (fixed, fixed_at) = images(2)
    files = write(tmp_path / "m.nii.gz", moving, moving_at), write(tmp_path / "f.nii.gz", fixed, fixed_at)
    points = wrong_pair(2, False)
    expected = register(*files, MODELS[2], points=points).displacement()
    for same in ([p.tolist() for p in points], tuple(torch.tensor(p) for p in points)):
        np.testing.assert_allclose(register(*files, MODELS[2], points=same).displacement(), expected, atol=1e-4)
    saved = register(*files, MODELS[2]).add_points(*points)
    assert (saved.save(tmp_path / "out") / "report.json").exists()


@pytest.mark.parametrize("reconstruction", ["kernel", "thin_plate"])
@pytest.mark.parametrize("affine", [False, True])
def test_points_are_added_to_every_kind_of_field(reconstruction: str, affine: bool) -> None:
    own = model(2, reconstruction=reconstruction, affine=affine, degree=0)
    result = register(*images(2), own)
    added = result.add_points(*wrong_pair(2, False))
    assert miss(added, wrong_pair(2, False)) < 0.8 * miss(result, wrong_pair(2, False))
    known = added.keypoints
    assert known is not None
    torch.testing.assert_close(known.dense[0], known.field.on(known.grid), atol=1e-4, rtol=0)


BAD: dict[str, Any] = {
    "not a pair": np.zeros((2, 2)).tolist()[:1],
    "three axes": (np.zeros((2, 3)), np.zeros((2, 3))),
    "one row": (np.zeros(2), np.zeros(2)),
    "unequal": (np.zeros((2, 2)), np.zeros((3, 2))),
    "none": (np.zeros((0, 2)), np.zeros((0, 2))),
    "nan": (np.full((1, 2), np.nan), np.zeros((1, 2))),
    "infinite": (np.zeros((1, 2)), np.full((1, 2), np.inf)),
    "outside fixed": (np.full((1, 2), 400.0), np.zeros((1, 2))),
    "outside moving": (np.zeros((1, 2)), np.full((1, 2), 400.0)),
    "words": (["here"], ["there"]),
    "ragged": ([[1.0, 2.0], [1.0]], [[1.0, 2.0], [1.0]]),
    "contradiction": (np.zeros((2, 2)), np.array([[0.0, 1.0], [2.0, 3.0]])),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_points_are_refused_in_one_sentence(bad: str) -> None:
    with pytest.raises(ValueError) as caught:
        register(*images(2), MODELS[2], points=BAD[bad])
    assert one_sentence(caught.value)
    if bad == "not a pair":
        return
    result = _once()
    with pytest.raises(ValueError) as caught:
        result.add_points(*BAD[bad])
    assert one_sentence(caught.value)


_KEPT: list[Registration] = []


def _once() -> Registration:
    if not _KEPT:
        _KEPT.append(register(*images(2), MODELS[2]))
    return _KEPT[0]


def test_points_beyond_what_the_network_looks_at_are_refused() -> None:
    """Inside of a large image, but outside of the working grid."""
    large = Grid((150, 150), (1.5,), (-112.0, -112.0))
    image = texture(positions(large))
    with pytest.raises(ValueError) as caught:
        register((image, large), (image, large), MODELS[2], points=(np.full((1, 2), 100.0), np.full((1, 2), 99.0)))
    assert one_sentence(caught.value, "looks at")


def test_other_models_take_no_points() -> None:
    other = untrained(2)
    with pytest.raises(ValueError) as caught:
        register(*images(2), other, points=wrong_pair(2, False))
    assert one_sentence(caught.value, "takes no points")
    with pytest.raises(ValueError) as caught:
        register(*images(2), other).add_points(*wrong_pair(2, False))
    assert one_sentence(caught.value, "takes no points")


@pytest.mark.parametrize("mode", ["corrections", "weights"])
def test_refinements_that_would_forget_the_points_are_refused(mode: str) -> None:
    with pytest.raises(ValueError) as caught:
        register(*images(2), MODELS[2], refine=Refinement(1, mode=mode), points=wrong_pair(2, False))
    assert one_sentence(caught.value, "forget")


def test_the_dense_field_is_that_of_the_refined_keypoints() -> None:
    result = register(*images(2), MODELS[2], refine=2)
    known = result.keypoints
    assert known is not None
    torch.testing.assert_close(known.dense[0], known.field.on(known.grid), atol=1e-4, rtol=0)
    torch.testing.assert_close(displacement(known.transform, known.grid), known.dense)
