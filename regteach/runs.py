"""One run of a recipe: the task that is trained, the checkpoint that comes of it, and the card that goes with it."""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regteach import objectives, plotting
from regteach.checkpoints import Model, load, network, save_model
from regteach.data.augment import augmented
from regteach.data.cohort import Cohort
from regteach.evaluation import figures_of, measure, pairs_to_test
from regteach.nets.blocks import fast_layout
from regteach.nets.georeg import GeoRegConfig
from regteach.nets.istn import ISTNConfig, count_parameters
from regteach.recipes import Recipe, load_cohort
from regteach.sampling import warp
from regteach.training import Progress, Trained, is_main, train
from regteach.transforms import Identity


class CohortTask:
    """Training of a network on pairs of a cohort: what ``training.train`` needs to know.

    Args:
        recipe: what to do.
        cohort: on what; the recipe's own data where left out.
        validation_pairs: how many pairs of validation people judge the weights.
    """

    def __init__(self, recipe: Recipe, cohort: Cohort | None = None, validation_pairs: int = 20) -> None:
        self.recipe = recipe
        self.cohort = load_cohort(recipe.data) if cohort is None else cohort
        self._check()
        self.pairs = self.cohort.pairs("train")
        available = self.cohort.pairs("validation")
        self.judged = self.cohort.pairs("validation", min(validation_pairs, len(available)), seed=0)

    def _check(self) -> None:
        config, cohort, variant = self.recipe.config, self.cohort, self.recipe.variant
        if variant not in objectives.ISTN:
            raise ValueError(f"A variant of ISTN is one of {', '.join(objectives.ISTN)}, not {variant!r}.")
        if not isinstance(config, ISTNConfig) and (variant != "unsupervised" or self.recipe.coarsen != 1):
            raise ValueError(f"{self.recipe.name} learns from the images alone: unsupervised, and coarsen is 1.")
        if isinstance(config, ISTNConfig) and config.itn and config.structures != cohort.soi.shape[1]:
            raise ValueError(
                f"{self.recipe.name} draws {config.structures} structures, but {cohort.name} has {cohort.soi.shape[1]}."
            )
        if config.channels != cohort.images.shape[1]:
            raise ValueError(
                f"{self.recipe.name} reads {config.channels} channels, but {cohort.name} has {cohort.images.shape[1]}."
            )
        if not cohort.pairs("train"):
            raise ValueError(f"{cohort.name} has no pair of two people to train on.")

    def build(self) -> nn.Module:
        """An untrained network, laid out for fast convolutions."""
        return fast_layout(network(self.recipe.config), self.cohort.grid.dim)

    def loss(self, model: nn.Module, items: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """The variant's terms on random training pairs."""
        drawn = [self._item(number) for number in items]
        (moving, fixed), (soi_moving, soi_fixed) = (
            [torch.cat([item[kind][side] for item in drawn]).to(device) for side in (0, 1)] for kind in (0, 1)
        )
        grid = self.cohort.grid
        result = model(moving, fixed, grid)
        recipe, images, soi = self.recipe, (moving, fixed), (soi_moving, soi_fixed)
        if not isinstance(recipe.config, ISTNConfig):
            across = not (isinstance(recipe.config, GeoRegConfig) and recipe.config.supervision == "within")
            return objectives.multiscale(result, grid, recipe.config.similarity, recipe.bending, across=across)
        return objectives.istn(recipe.variant, result, images, soi, grid, recipe.bending, recipe.coarsen)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Dice, one pass, on validation people."""
        return measure(model, self.cohort, self.judged, device)[0]

    def picture(self, model: nn.Module, device: torch.device) -> bytes | None:
        """The first validation pair: fixed, moving, warped, and the map of the fixed image."""
        moving, fixed = self.judged[0]
        images, grid = self.cohort.images, self.cohort.grid
        result = model(images[[moving]].to(device), images[[fixed]].to(device), grid)
        warped = warp(images[[moving]].to(device), result.transform, grid)
        shown = [images[fixed, 0], images[moving, 0], warped[0, 0], result.features[1][0].amax(0)]
        middle = (slice(None), slice(None), *[n // 2 for n in grid.shape[2:]])
        figure, axes = plotting.axes(1, 4)
        for ax, image, title in zip(axes.flat, shown, ("fixed", "moving", "warped", "map of fixed"), strict=True):
            plotting.image(ax, image.detach().cpu()[middle], title=title)
        return plotting.png(figure)

    def _item(self, number: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.recipe.settings.seed * 1_000_000_007 + number)
        pair = self.pairs[int(torch.randint(len(self.pairs), (), generator=generator))]
        sides = [self._side(index, generator) for index in pair]
        return (sides[0][0], sides[1][0]), (sides[0][1], sides[1][1])

    def _side(self, index: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        cohort = self.cohort
        tissue = None if cohort.tissue is None else cohort.tissue[[index]]
        image, soi = cohort.images[[index]], cohort.soi[[index]]
        return augmented(image, soi, cohort.grid, self.recipe.augmentation, generator, tissue, cohort.synthesis)


def run(recipe: Recipe, folder: Path, progress: Progress | None = None) -> Model:
    """Train a recipe, measure it on test people, and save the checkpoint with its card.

    Args:
        recipe: what to do.
        folder: of the run; ``NAME.safetensors`` appears in it when the run is complete.
        progress: called after every validation.
    """
    task = CohortTask(recipe)
    trained = train(task, recipe.settings, folder, progress, of=json.loads(json.dumps(asdict(recipe))))
    model = Model(recipe.name, trained.model, recipe.refinement)
    if not is_main():  # of several processes one measures and writes
        return model
    save_model(folder / f"{recipe.name}.safetensors", model)
    # What is measured is what was saved: half-precision weights, read back.
    stored = load(folder / f"{recipe.name}.safetensors")
    finished = replace(stored, card=card(recipe, stored, task.cohort, trained))
    save_model(folder / f"{recipe.name}.safetensors", finished)
    return finished


def evaluate(model: Model, pairs: int = 50, steps: int | None = None) -> dict[str, dict[str, float]]:
    """Figures of a model on the test people of its own data: before, one pass, refined.

    Args:
        model: its card names the data.
        pairs: how many at most, seed 0.
        steps: of refinement instead of the recommended ones; 0 leaves refinement out.

    Raises:
        ValueError: if the card does not say on what the model was trained.
    """
    if "recipe" not in model.card:
        raise ValueError(f"The card of {model.name} does not say on what it was trained.")
    cohort = load_cohort(model.card["recipe"]["data"])
    chosen = pairs_to_test(cohort, pairs)
    settings = model.refinement if steps is None else replace(model.refinement, steps=steps)
    before = [figures_of(cohort, *pair, Identity(cohort.grid.dim)).dice for pair in chosen]
    figures = {"before": {"dice": _mean(before)}, "one pass": measure(model.network, cohort, chosen)[0]}
    if settings.steps:
        figures["refined"] = measure(model.network, cohort, chosen, refinement=settings)[0]
    return figures


def line(record: dict[str, float]) -> str:
    """A validation's record in one line."""
    return "  ".join(f"{key} {value:.4g}" for key, value in record.items())


def card(recipe: Recipe, model: Model, cohort: Cohort, trained: Trained) -> dict[str, Any]:
    """What a checkpoint says about itself: a test recomputes ``first_pairs``."""
    pairs = pairs_to_test(cohort)
    before = [figures_of(cohort, *pair, Identity(cohort.grid.dim)).dice for pair in pairs]
    once, first_once = measure(model.network, cohort, pairs)
    begun = time.perf_counter()
    refined, first_refined = measure(model.network, cohort, pairs, refinement=recipe.refinement)
    seconds = (time.perf_counter() - begun) / len(pairs)
    return {
        "recipe": json.loads(json.dumps(asdict(recipe))),
        "data": cohort.origin,
        "people": {split: len({cohort.people[i] for i in members}) for split, members in cohort.splits.items()},
        "validation": trained.best,
        "test_pairs": len(pairs),
        "dice": {"before": _mean(before), "one_pass": once["dice"], "refined": refined["dice"]},
        "folding_percent": {"one_pass": once["folding_percent"], "refined": refined["folding_percent"]},
        "first_pairs": [
            {"moving": cohort.people[m], "fixed": cohort.people[f], "one_pass": a.dice, "refined": b.dice}
            for (m, f), a, b in list(zip(pairs, first_once, first_refined, strict=True))[:3]
        ],
        "refined_seconds_per_pair": round(seconds, 3),
        "parameters": count_parameters(model.network),
        "training_seconds": round(trained.seconds),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used; no GPU"
        if not torch.cuda.is_available()
        else torch.cuda.get_device_name(),
        "versions": {"regteach": version("regteach"), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
