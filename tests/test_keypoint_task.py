"""Training of the keypoint model on the thorax: a whole run of a tiny recipe, its card, and what is drawn."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from truths.fields import one_sentence

from regteach import keypoint_task, runs
from regteach.data.thorax import thorax_grid
from regteach.keypoint_task import RECIPES, KeypointRecipe, KeypointTask, load_thorax, mirrored, tre
from regteach.nets.keypoint_kernel import KeypointKernelConfig, Scale
from regteach.refinement import Refinement
from regteach.training import Settings
from regteach.transforms import Identity

GRID = thorax_grid(8.0, dim=2)
TINY = KeypointRecipe(
    "tiny",
    "thorax",
    KeypointKernelConfig.of(GRID, scales=(Scale(1, 4), Scale(1, 2)), features=2, widths=(2, 4), width=8, neighbours=8),
    Settings(steps=2, batch=2, rate=1e-3, validate_every=1),
    keypoints=30,
    asked=20,
    refinement=Refinement(2, rate=0.05),
)


@pytest.fixture(autouse=True)
def few_patients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keypoint_task, "PATIENTS", {"train": range(1), "validation": range(1, 2), "test": range(2, 4)})


def test_a_whole_run_has_a_card_whose_figures_come_out_again(tmp_path: Path) -> None:
    model = runs.run(TINY, tmp_path)
    card = model.card
    assert card["people"] == {"train": 1, "validation": 1, "test": 2}
    assert set(card["tre_mm"]) == {"before", "one_pass", "refined"}
    assert card["tre_mm"]["before"] > 5
    assert runs.task_of(model.network.config).first_pairs(model) == card["first_pairs"]
    figures = runs.evaluate(model)
    assert figures["one pass"]["tre_mm"] == pytest.approx(card["tre_mm"]["one_pass"])
    assert figures["refined"]["tre_mm"] == pytest.approx(card["tre_mm"]["refined"])
    assert set(runs.evaluate(model, 1, 0)) == {"before", "one pass"}
    with pytest.raises(ValueError) as caught:
        runs.evaluate(model, 0)
    assert one_sentence(caught.value)


def test_what_bypasses_forward_says_so_and_takes_no_mixed_precision(tmp_path: Path) -> None:
    task = KeypointTask(TINY)
    with pytest.raises(AttributeError):
        task.loss(nn.Sequential(task.build()), [3], torch.device("cpu"))
    with pytest.raises(ValueError, match="KeypointTask does not call the network as a whole") as caught:
        runs.run(replace(TINY, settings=replace(TINY.settings, precision="bf16")), tmp_path / "run")
    assert one_sentence(caught.value, "'bf16'")
    assert not (tmp_path / "run").exists()


def test_an_item_is_the_same_whenever_it_is_drawn() -> None:
    task = KeypointTask(TINY)
    torch.manual_seed(0)
    network = task.build()
    first, again, other = (task.loss(network, [n], torch.device("cpu")) for n in (3, 3, 4))
    assert set(first) == {"landmarks", "bending", "image"}
    assert all(value.shape == (1,) for value in first.values())
    assert torch.equal(first["landmarks"], again["landmarks"])
    assert not torch.equal(first["landmarks"], other["landmarks"])


def test_a_mirrored_patient_is_as_far_from_registered_and_its_landmarks_are_exact() -> None:
    (patient,) = load_thorax(GRID, "train")
    torch.testing.assert_close(patient.transform(patient.marks_fixed[None])[0], patient.marks_moving, atol=0.1, rtol=0)
    other = mirrored(patient)
    assert tre(other, Identity(2)) == pytest.approx(tre(patient, Identity(2)), rel=1e-5)
    assert tre(patient, patient.transform) < 0.1 < 5 < tre(patient, Identity(2))
    assert tre(other, other.transform) == pytest.approx(tre(patient, patient.transform), abs=1e-3)
    twice = mirrored(other)
    assert torch.equal(twice.moving, patient.moving)
    torch.testing.assert_close(twice.marks_fixed, patient.marks_fixed, rtol=0, atol=1e-4)


def test_the_recipe_that_ships() -> None:
    (recipe,) = RECIPES
    assert recipe.name == "kernel-thorax"
    assert recipe.config.kernel.heads == ("geometry", "semantics")
    assert 100 <= recipe.settings.steps <= 200
    with pytest.raises(ValueError) as caught:
        KeypointTask(replace(recipe, data="abdomen"))
    assert one_sentence(caught.value)
    with pytest.raises(ValueError) as caught:
        load_thorax(GRID, "holdout")
    assert one_sentence(caught.value)
