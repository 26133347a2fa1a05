"""Training on points: what is drawn, from whom, what is measured, and a run from recipe to card."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn
from truths.fields import one_sentence

import regteach
from regteach import checkpoints, cli, points_task, recipes, runs
from regteach.checkpoints import Model, load, save_model
from regteach.data.lungs import KEYPOINT_GRID, KeypointPair
from regteach.data.matches import Faults, random_field
from regteach.nets.kernel import KernelConfig, LearnedKernel
from regteach.points_task import LEVELS, SPLIT, Drawn, PointsRecipe, PointsTask, augmented, case, errors
from regteach.training import Settings

CPU = torch.device("cpu")
COUNT = sum(SPLIT.values())
TINY = PointsRecipe(
    "points-tiny",
    "tiny",
    KernelConfig(width=4, neighbours=8, rounds=0, degree=0, spline=True),
    Settings(steps=2, batch=2, rate=1e-2, validate_every=1),
)


def made(points: int = 80) -> list[KeypointPair]:
    """Pairs whose points are all different, so that each can be told."""
    generator, pairs = torch.Generator().manual_seed(0), []
    for number in range(COUNT):
        fixed = 200 * torch.rand(points, 3, generator=generator)
        motion = 6 * random_field(fixed, 3, 60.0, generator)
        pairs.append(KeypointPair(f"case {number}", fixed[None], (fixed + motion)[None], KEYPOINT_GRID))
    return pairs


PAIRS = made()


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(points_task.POINTS, "tiny", lambda: PAIRS)
    monkeypatch.setitem(recipes.RECIPES, TINY.name, TINY)


class Still(nn.Module):
    """Says 0 everywhere."""

    def reconstruct(self, keypoints: torch.Tensor, displacements: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(query)


def test_what_is_asked_for_was_not_given() -> None:
    pair = PAIRS[0]
    drawn = case(pair, Faults(), 3)
    given, asked = ({tuple(row) for row in side.tolist()} for side in (drawn.keypoints, drawn.query))
    assert not given & asked
    assert given | asked == {tuple(row) for row in pair.fixed[0].tolist()}
    assert len(asked) == len(PAIRS[0].fixed[0]) // 5
    for points, motion in ((drawn.keypoints, drawn.displacements), (drawn.query, drawn.truth)):
        moved = {tuple(row) for row in pair.moving[0].round(decimals=2).tolist()}
        assert {tuple(row) for row in (points + motion).round(decimals=2).tolist()} <= moved
    # Faults change what is given, and not what is asked for.
    bad = case(pair, LEVELS["bad"], 3)
    assert torch.equal(bad.query, drawn.query)
    assert torch.equal(bad.truth, drawn.truth)
    assert (bad.displacements - drawn.displacements).norm(dim=1).mean() > 2


def test_no_more_points_are_given_than_a_method_may_have() -> None:
    (many,) = made(1500)[:1]
    assert len(case(many, Faults(), 0).keypoints) == points_task.MOST_POINTS == 1024


def test_an_augmented_item_is_the_same_motion_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    points, slope = torch.rand(50, 3, generator=generator), torch.randn(3, 3, generator=generator)
    given = Drawn(points[:40], points[:40] @ slope, points[40:], points[40:] @ slope)
    found = augmented(given, generator)
    # An affine motion stays one, the same for what is given and for what is asked.
    design = torch.cat([found.keypoints, torch.ones(40, 1)], 1)
    plane = torch.linalg.lstsq(design, found.displacements).solution
    assert torch.allclose(torch.cat([found.query, torch.ones(10, 1)], 1) @ plane, found.truth, atol=1e-3)
    # Turned, mirrored and scaled, but not sheared.
    ratio = torch.pdist(found.keypoints) / torch.pdist(given.keypoints)
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-3)
    assert 0.7 <= float(ratio[0]) <= 1.3


def test_only_training_pairs_are_trained_on() -> None:
    task = PointsTask(TINY, PAIRS)
    assert [len(task.splits[name]) for name in ("train", "validation", "test")] == [9, 2, 3]
    assert sorted(i for members in task.splits.values() for i in members) == list(range(COUNT))
    seen: list[str] = []
    draw = points_task.drawn

    def watched(pair: KeypointPair, *more: Any) -> Drawn:
        seen.append(pair.name)
        return draw(pair, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(points_task, "drawn", watched)
        for number in range(200):
            task.item(number)
        assert set(seen) == {PAIRS[i].name for i in range(9)}
        seen.clear()
        task.validate(Still(), CPU)
        assert set(seen) == {PAIRS[i].name for i in (9, 10)}


def test_the_loss_is_the_logarithm_of_the_mean_error() -> None:
    task = PointsTask(TINY, PAIRS)
    model = task.build()
    terms = task.loss(model, [3, 8], CPU)
    assert set(terms) == {"log_error"}
    for k, number in enumerate((3, 8)):
        item = task.item(number)
        found = model.reconstruction(item.keypoints, item.displacements).at(item.query)  # type: ignore[operator]
        expected = (found - item.truth).norm(dim=1).clamp_max(TINY.clamp_mm).mean().log()
        assert terms["log_error"][k].item() == pytest.approx(expected.item(), abs=1e-5)


def test_errors_are_distances_from_what_was_held_out() -> None:
    found = errors(lambda y, d, x: torch.zeros_like(x), PAIRS[:2], draws=1)
    truth = [float(case(pair, Faults(), 0).truth.norm(dim=1).mean()) for pair in PAIRS[:2]]
    assert set(found) == set(LEVELS)
    assert all(values == pytest.approx(truth) for values in found.values())
    assert PointsTask(TINY, PAIRS).validate(Still(), CPU)["minus_error_mm"] < 0


def test_a_run_ends_in_a_checkpoint_whose_card_is_true(listed: None, tmp_path: Path) -> None:
    model = runs.run(TINY, tmp_path)
    stored = load(tmp_path / "points-tiny.safetensors")
    card = stored.card
    assert card == json.loads(json.dumps(model.card))
    assert card["people"] == SPLIT
    assert card["test_pairs"] == 3
    assert card["recipe"]["name"] == "points-tiny"
    again = runs.task_of(stored.network.config).first_pairs(stored)
    assert [pair["pair"] for pair in again] == ["case 11", "case 12", "case 13"]
    for now, then in zip(again, card["first_pairs"], strict=True):
        assert now == pytest.approx(then)
    figures = runs.evaluate(stored)
    assert figures == {name: pytest.approx(row) for name, row in card["error_mm"].items()}
    assert {"start", "linear radial basis", "learned kernel"} <= set(figures)
    assert len(runs.evaluate(stored, pairs=1)) == len(figures)
    assert (tmp_path / "validation.png").read_bytes().startswith(b"\x89PNG")


def test_what_bypasses_forward_says_so_and_takes_no_mixed_precision(listed: None, tmp_path: Path) -> None:
    task = PointsTask(TINY, PAIRS)
    with pytest.raises(AttributeError):
        task.loss(nn.Sequential(task.build()), [3], CPU)
    with pytest.raises(ValueError, match="PointsTask does not call the network as a whole") as caught:
        runs.run(replace(TINY, settings=replace(TINY.settings, precision="bf16")), tmp_path / "run")
    assert one_sentence(caught.value, "'bf16'")
    assert not (tmp_path / "run").exists()


def test_train_and_evaluate_on_the_command_line(
    listed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "points-tiny", "--steps", "1"]) == 0
    written = capsys.readouterr().out.splitlines()[-1]
    assert cli.main(["evaluate", written, "--pairs", "1"]) == 0
    assert "learned kernel" in capsys.readouterr().out
    for line, said in (("--pairs 0", "were asked for"), ("--refine 5", "no images to refine on")):
        assert cli.main(["evaluate", written, *line.split()]) == 2
        assert said in capsys.readouterr().err


def test_images_can_not_be_registered_with_a_model_of_points(tmp_path: Path) -> None:
    path = save_model(tmp_path / "k.safetensors", Model("kernel-of-points", LearnedKernel(KernelConfig(width=4))))
    image = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((16, 16, 16)), np.eye(4)), image)
    with pytest.raises(ValueError, match="kernel-of-points works on keypoints") as caught:
        regteach.register(image, image, model=str(path))
    assert one_sentence(caught.value)


def test_what_is_absent_or_does_not_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="python -m data_download") as missing:
        PointsTask(points_task.RECIPES[0])
    assert one_sentence(missing.value)
    for recipe, pairs, said in (
        (TINY, PAIRS[:5], "are 14 pairs, but 5"),
        (replace(TINY, config=KernelConfig(dim=2)), PAIRS, "dim is 3"),
        (replace(TINY, data="lungs"), None, "no points 'lungs'"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            PointsTask(recipe, pairs)
        assert one_sentence(caught.value)


@pytest.mark.skipif("kernel-points" not in checkpoints.available(), reason="kernel-points is not here")
def test_the_shipped_kernel_lets_go_of_planted_outliers() -> None:
    """On a motion that it has never seen, with one match in ten wrong."""
    model = load("kernel-points").network
    fixed = 200 * torch.rand(500, 3, generator=torch.Generator().manual_seed(5))
    motion = 10 * random_field(fixed, 3, 80.0, torch.Generator().manual_seed(6))
    pair = KeypointPair("new", fixed[None], (fixed + motion)[None], KEYPOINT_GRID)
    drawn = case(pair, Faults(noise_mm=1.0, outliers=0.1), 0)
    found = {
        name: method(drawn.keypoints, drawn.displacements, drawn.query)
        for name, method in points_task.CLASSICAL.items()
    }
    ours = (model.reconstruct(drawn.keypoints, drawn.displacements, drawn.query) - drawn.truth).norm(dim=1).mean()
    assert ours < 0.7 * min((value - drawn.truth).norm(dim=1).mean() for value in found.values())
