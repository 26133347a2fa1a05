"""One run of a recipe, of any kind: it is trained, measured, and saved as a checkpoint with a card.

What a network is trained and measured on follows from the class of its configuration: see :data:`TASKS`.
"""

import json
import os
import platform
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from regteach.checkpoints import SUFFIX, AnyConfig, Model, load, save_model
from regteach.cohort_task import CohortTask
from regteach.keypoint_task import KeypointTask
from regteach.nets.georeg import GeoRegConfig
from regteach.nets.istn import ISTNConfig, count_parameters, parameters_by_part
from regteach.nets.kernel import KernelConfig
from regteach.nets.keypoint_kernel import KeypointKernelConfig
from regteach.nets.voxelmorph import VoxelMorphConfig
from regteach.points_task import PointsTask
from regteach.recipes import AnyRecipe
from regteach.training import Progress, Task, Trained, is_main, train


class RunTask(Task, Protocol):
    """A task that is measured, too: what a run needs beside what the training loop needs."""

    def __init__(self, recipe: Any) -> None:
        """Read the data that the recipe names; FileNotFoundError if they have to be fetched first."""

    def figures(self, model: Model) -> dict[str, Any]:
        """What the card says of the measured model, as JSON has it.

        At least "data" (a sentence), "people" (a number for each split), "test_pairs" and "first_pairs".
        """

    @classmethod
    def evaluate(cls, model: Model, pairs: int = 50, steps: int | None = None) -> dict[str, dict[str, float]]:
        """Figures on test data, row by row; see :func:`evaluate`."""

    @classmethod
    def first_pairs(cls, model: Model) -> list[dict[str, Any]]:
        """The "first_pairs" of the card, measured anew: a test compares them."""


TASKS: dict[type, type[RunTask]] = {
    ISTNConfig: CohortTask,
    GeoRegConfig: CohortTask,
    VoxelMorphConfig: CohortTask,
    KernelConfig: PointsTask,
    KeypointKernelConfig: KeypointTask,
}


def task_of(config: AnyConfig) -> type[RunTask]:
    """The kind of task for a kind of network."""
    return TASKS[type(config)]


def run(recipe: AnyRecipe, folder: Path, progress: Progress | None = None) -> Model:
    """Train a recipe, measure it on test people, and save the checkpoint with its card.

    A run that was interrupted goes on in the same folder. One that was interrupted while it was measured is not trained
    again; until that next run its weights stay there as ``unmeasured.safetensors``.

    Args:
        recipe: what to do.
        folder: of the run; ``NAME.safetensors`` appears in it when the run is complete.
        progress: called after every validation.

    Raises:
        FileNotFoundError: if the data have to be fetched first.
        ValueError, FloatingPointError: as :func:`regteach.training.train`.
    """
    task = task_of(recipe.config)(recipe)
    trained = train(task, recipe.settings, folder, progress, of=json.loads(json.dumps(asdict(recipe))))
    model = Model(recipe.name, trained.model, recipe.refinement)
    if not is_main():  # of several processes one measures and writes
        return model
    # What is measured is what ships: half-precision weights, read back. Until then they have another name.
    unmeasured = save_model(folder / f"unmeasured{SUFFIX}", model)
    stored = load(unmeasured)
    finished = replace(stored, card=card(recipe, stored, task.figures(stored), trained))
    save_model(folder / f"{recipe.name}{SUFFIX}", finished)
    unmeasured.unlink()
    return finished


def evaluate(model: Model, pairs: int = 50, steps: int | None = None) -> dict[str, dict[str, float]]:
    """Figures of a model on the test people of its own data: before, one pass, refined, or what else its kind has.

    Args:
        model: its card names the data.
        pairs: how many at most, seed 0.
        steps: of refinement instead of the recommended ones; 0 leaves refinement out.

    Raises:
        ValueError: if the card does not say on what the model was trained.
    """
    if "data" not in model.card.get("recipe", {}):
        raise ValueError(f"The card of {model.name} does not say on what it was trained.")
    return task_of(model.network.config).evaluate(model, pairs, steps)


def line(record: dict[str, float]) -> str:
    """A validation's record in one line."""
    return "  ".join(f"{key} {value:.4g}" for key, value in record.items())


def earlier_runs(start: str) -> list[dict[str, Any]]:
    """The runs behind the weights that training starts from, first to last, as the card of these weights has them.

    Args:
        start: name of a model that ships; "" for a training from nothing, which has none.
    """
    if not start:
        return []
    before = load(start).card
    own = ("recipe", "validation", "training_seconds", "hardware", "versions", "date")
    return [*before.get("earlier_runs", []), {key: before[key] for key in own if key in before}]


def card(recipe: AnyRecipe, model: Model, figures: dict[str, Any], trained: Trained) -> dict[str, Any]:
    """What a checkpoint says about itself: a test recomputes ``first_pairs`` of the figures."""
    return {
        "recipe": json.loads(json.dumps(asdict(recipe))),
        "earlier_runs": earlier_runs(getattr(recipe, "start", "")),
        **figures,
        "validation": trained.best,
        "parameters": count_parameters(model.network),
        "parameters_by_part": parameters_by_part(model.network),
        "training_seconds": round(trained.seconds),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used; no GPU"
        if not torch.cuda.is_available()
        else torch.cuda.get_device_name(),
        "versions": {"regteach": version("regteach"), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
