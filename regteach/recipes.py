"""Named trainings: what is trained, on what, and how; ``regteach train NAME`` runs one.

A recipe is a dataclass, so that a change of it is one ``dataclasses.replace``. The choices in it were made on
validation people only.
"""

import difflib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regteach import objectives, plotting
from regteach.affine import AffineBounds
from regteach.checkpoints import Model, load, save_model
from regteach.data.augment import Augmentation, augmented
from regteach.data.cohort import Cohort, joined
from regteach.evaluation import figures_of, measure, pairs_to_test
from regteach.grid import Grid
from regteach.nets.blocks import fast_layout
from regteach.nets.istn import ISTN, AffineStage, ISTNConfig, SplineStage, count_parameters
from regteach.refinement import Refinement
from regteach.sampling import warp
from regteach.training import Progress, Settings, Trained, train
from regteach.transforms import Identity


@dataclass(frozen=True)
class Recipe:
    """One training.

    Args:
        name: also of the weights.
        data: name of the cohort, see :data:`COHORTS`.
        variant: loss of ISTN: "unsupervised", "supervised", "explicit", "implicit".
        config: of the network.
        settings: of the loop.
        augmentation: of the images.
        bending: weight of the splines' bending energy in training, mm^2.
        coarsen: in training, alignment is judged on maps averaged over cubes of this many voxels.
        refinement: what is recommended at test time.
    """

    name: str
    data: str
    variant: str
    config: ISTNConfig
    settings: Settings
    augmentation: Augmentation = Augmentation()
    bending: float = 0.0
    coarsen: int = 1
    refinement: Refinement = Refinement()


class CohortTask:
    """Training of an ISTN on pairs of a cohort: what ``training.train`` needs to know.

    Args:
        recipe: what to do.
        cohort: on what; the recipe's own data where left out.
        validation_pairs: how many pairs of validation people judge the weights.
        seed: of every item.
    """

    def __init__(self, recipe: Recipe, cohort: Cohort | None = None, validation_pairs: int = 20) -> None:
        self.recipe = recipe
        self.cohort = load_cohort(recipe.data) if cohort is None else cohort
        self.pairs = self.cohort.pairs("train")
        available = self.cohort.pairs("validation")
        self.judged = self.cohort.pairs("validation", min(validation_pairs, len(available)), seed=0)

    def build(self) -> nn.Module:
        """An untrained network, laid out for fast convolutions."""
        return fast_layout(ISTN(self.recipe.config), self.cohort.grid.dim)

    def loss(self, model: nn.Module, items: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """The variant's terms on random training pairs."""
        drawn = [self._item(number) for number in items]
        (moving, fixed), (soi_moving, soi_fixed) = (
            [torch.cat([item[kind][side] for item in drawn]).to(device) for side in (0, 1)] for kind in (0, 1)
        )
        grid = self.cohort.grid
        result = model(moving, fixed, grid)
        recipe, images, soi = self.recipe, (moving, fixed), (soi_moving, soi_fixed)
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


def _trees(kind: str) -> Cohort:
    from regteach.data.trees import generate_trees

    return generate_trees(kind=kind)


def _synth2d() -> Cohort:
    from regteach.data.trees import read_synth2d

    return read_synth2d()


def _hippocampus() -> Cohort:
    from regteach.data.hippocampus import load_hippocampus

    return load_hippocampus()


def _slices() -> Cohort:
    from regteach.data.slices import load_slices

    return load_slices()


def _donors(spacing_mm: float, shape: tuple[int, int, int], sides: str = "both") -> Cohort:
    from regteach.data.brains import load_donors

    return load_donors(spacing_mm, shape, sides=sides)


def _brains() -> Cohort:
    from regteach.data.brains import load_donors, load_synthseg
    from regteach.data.contrast import Contrast, synthesise

    at = {"spacing_mm": 2.0, "shape": BRAINS.shape, "sides": "merged"}
    both = joined("brains", [load_donors(**at), load_synthseg(**at)])  # type: ignore[arg-type]
    # Any scanner, but T1 in most draws: it is what most people have.
    return replace(both, synthesis=partial(synthesise, config=Contrast(t1_like=0.7)))


COHORTS: dict[str, Callable[[], Cohort]] = {
    "trees": lambda: _trees("segmentation"),
    "tree-landmarks": lambda: _trees("landmarks"),
    "synth2d": _synth2d,
    "hippocampus": _hippocampus,
    "slices": _slices,
    "donors": lambda: _donors(3.0, (64, 64, 64)),
    "brains": _brains,
    "donors-2mm": lambda: _donors(2.0, (96, 112, 96)),
}


@cache
def load_cohort(name: str) -> Cohort:
    """A cohort by name, read once.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    return known(name, COHORTS, "data set")()


def known(name: str, table: dict, what: str):  # type: ignore[no-untyped-def]
    """The entry of a table, or a ValueError that names the nearest one."""
    if name not in table:
        near = difflib.get_close_matches(name, table, 1, 0.0)
        raise ValueError(f"There is no {what} {name!r}; the nearest is {near[0]!r} (of {', '.join(table)}).")
    return table[name]


TREES = Grid((128, 128))
HIPPOCAMPUS = Grid((48, 64, 48))
BRAINS = Grid((64, 72, 64), (2.0,))
WIDE = AffineBounds(translation_mm=16.0, rotation_deg=60.0, scale_ratio=1.6, stretch_axes_deg=45.0, shear_ratio=0.3)


def _tree_recipes() -> list[Recipe]:
    stages = {
        "affine": (AffineStage(WIDE, (16, 32, 64)),),
        "bspline": (AffineStage(WIDE, (16, 32, 64)), SplineStage(16.0, widths=(16, 32, 32))),
    }
    return [
        Recipe(
            f"istn-trees-{kind}-{variant}",
            "trees",
            variant,
            ISTNConfig(TREES, stages[kind], itn=(8, 16, 32), shrink=2),
            Settings(steps=1500, batch=10, rate=2e-3, warmup=20, decay=True, validate_every=100),
            Augmentation(shift_mm=6.0, rotation_deg=20.0, scale_ratio=1.15, shear=0.1),
            bending=10.0,
        )
        for kind in stages
        for variant in objectives.ISTN
    ]


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _tree_recipes()}


def find_recipe(name: str, **changes: object) -> Recipe:
    """A recipe by name, with changes of its loop's settings.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    recipe: Recipe = known(name, RECIPES, "recipe")
    return replace(recipe, settings=replace(recipe.settings, **changes)) if changes else recipe  # type: ignore[arg-type]


def run(recipe: Recipe, folder: Path, progress: Progress | None = None) -> Model:
    """Train a recipe, measure it on test people, and save the checkpoint with its card.

    Args:
        recipe: what to do.
        folder: of the run; ``NAME.safetensors`` appears in it when the run is complete.
        progress: called after every validation.
    """
    task = CohortTask(recipe)
    trained = train(task, recipe.settings, folder, progress)
    model = Model(recipe.name, trained.model, recipe.refinement)
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
