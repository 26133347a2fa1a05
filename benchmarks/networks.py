"""What the benchmarks of networks share: trainings that are kept, and pairs registered one by one.

A training is kept in a folder of ``--runs`` whose name holds the recipe, the data, the seed and a fingerprint of all
that the training depends on: started again, a benchmark goes on where it was killed, and a recipe or a split that has
changed since is trained anew. (A change of the package's code is not noticed: delete the folder then.) Measuring is
cheap beside training, and always done again.

Times are processor seconds on a CPU (of all threads together; other programs hardly change them) and seconds of the
clock on a GPU; "wall" is always the clock.
"""

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import hardware, timed
from benchmarks.tables import mean, spread
from regteach import metrics
from regteach.checkpoints import Config, network
from regteach.data.cohort import Cohort, one_hot
from regteach.data.named import load_cohort
from regteach.evaluation import figures_of, pairs_to_test
from regteach.grid import Grid
from regteach.nets.blocks import fast_layout
from regteach.nets.istn import ISTNConfig
from regteach.recipes import RECIPES, Recipe, find_recipe
from regteach.refinement import Refinement, refine
from regteach.result import Result
from regteach.runs import CohortTask, line
from regteach.sampling import grid_points, warp
from regteach.training import Trained, train, write_whole
from regteach.transforms import Identity, Transform

MODELS = {"unsupervised": "STN-u", "supervised": "STN-s", "explicit": "ISTN-e", "implicit": "ISTN-i"}
KINDS = {"affine": "affine", "bspline": "B-spline"}
CEILING_STEPS = 200  # the ceiling has no network to start it near its end

Pairs = Sequence[tuple[int, int]]
PairFigures = Callable[[int, int, Transform], dict[str, float]]  # moving, fixed, transform -> numbers by name
Figures = dict[str, list[float]]  # by name, one number a pair


@dataclass(frozen=True)
class Options:
    """Command line.

    Args:
        quick: tiny stand-in data and networks, two steps each: shows that it runs, and nothing else.
        json: also write the numbers to this file, and the tables beside it as markdown.
        runs: folder of the trainings, finished or not.
        recipes: only those whose name contains one of these.
        steps: train for so many steps, in the place of each recipe's own.
        device: where to measure; trainings take a GPU where there is one.
        threads: of torch on the CPU; one is the steadiest where other programs run.
    """

    quick: bool = False
    json: Path | None = None
    runs: Path = Path("build/runs")
    recipes: tuple[str, ...] = ()
    steps: int | None = None
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 1


# ---- what is trained ----


def chosen(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The names that contain one of the wanted parts; all where nothing is wanted.

    Raises:
        ValueError: if a wanted part is in none of all recipes' names.
    """
    for part in wanted:
        if not any(part in name for name in RECIPES):
            raise ValueError(f"No recipe has {part!r} in its name.")
    return [name for name in names if not wanted or any(part in name for part in wanted)]


def trained(recipe: Recipe, cohort: Cohort, runs: Path) -> Trained:
    """Train, go on with a training that was killed, or read one that is finished."""
    folder = run_folder(recipe, cohort, runs)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_depends_on(recipe, cohort), indent=1) + "\n"
    write_whole(folder / "recipe.json", lambda path: path.write_text(text, encoding="utf-8"))

    def progress(record: dict[str, float]) -> None:
        print(f"{folder.name}: {line(record)}", flush=True)

    return train(CohortTask(recipe, cohort), recipe.settings, folder, progress, of=_depends_on(recipe, cohort))


def run_folder(recipe: Recipe, cohort: Cohort, runs: Path) -> Path:
    """Where a training is kept: another folder for anything that makes another training."""
    text = json.dumps(_depends_on(recipe, cohort), sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:8]
    return runs / f"{recipe.name}-{recipe.data}-seed{recipe.settings.seed}-{fingerprint}"


def _depends_on(recipe: Recipe, cohort: Cohort) -> dict[str, Any]:
    told = {key: value for key, value in asdict(recipe).items() if key not in ("name", "refinement")}
    people = {split: [cohort.people[i] for i in members] for split, members in cohort.splits.items()}
    told_as_json: dict[str, Any] = json.loads(json.dumps({"recipe": told, "cohort": cohort.name, "people": people}))
    return told_as_json


def ceiling(quick: bool, steps: int = CEILING_STEPS) -> Refinement:
    """The refinement for the SoI themselves: longer than any, since it starts at the identity, and of every voxel."""
    return Refinement(3 if quick else steps)


def untrained(config: Config) -> Any:
    """A network that predicts the identity: what the ceiling starts from, and what times are measured on."""
    torch.manual_seed(0)
    return fast_layout(network(config), config.grid.dim).eval()


# ---- what is measured ----


def registered(
    model: Any,
    cohort: Cohort,
    pairs: Pairs,
    ways: Mapping[str, Refinement | None],
    figures: PairFigures,
    device: torch.device,
    soi: bool = False,
) -> dict[str, Figures]:
    """Register pairs one by one, in several ways, after a short first one that warms up.

    Args:
        model: takes moving, fixed, grid.
        cohort: of the images.
        pairs: (moving, fixed).
        ways: by name; None is the one pass alone.
        figures: measures a transform of a pair.
        device: where to compute.
        soi: register the SoI themselves, as if an ITN had drawn them without a fault: the ceiling.

    Returns:
        For each way its figures, "seconds" (processor time on a CPU) and "wall" among them: those of the one pass, or
        of the refinement alone.
    """
    model = model.to(device)
    maps = cohort.soi if soi else cohort.images
    found: dict[str, Figures] = {way: {} for way in ways}

    def once(moving: int, fixed: int) -> Result:
        both = maps[[moving, fixed]].to(device)
        with torch.no_grad():
            return (model.align if soi else model)(both[:1], both[1:], cohort.grid)

    for way in ways.values():
        if way is not None:
            refine(model, once(*pairs[0]), cohort.grid, replace(way, steps=min(2, way.steps)))
    for pair in pairs:
        result, spent = timed(partial(once, *pair), device)
        for name, way in ways.items():
            outcome, cost = result, spent
            if way is not None:
                refined, cost = timed(partial(refine, model, result, cohort.grid, way), device)
                outcome = refined.result
            for key, value in (figures(*pair, outcome.transform) | cost).items():
                found[name].setdefault(key, []).append(value)
    return found


def known(
    cohort: Cohort, pairs: Pairs, figures: PairFigures, given: Callable[[int, int], Transform] | None = None
) -> Figures:
    """Figures of a transform that is given for each pair; of doing nothing where none is."""
    still = Identity(cohort.grid.dim)
    rows = [figures(m, f, still if given is None else given(m, f)) for m, f in pairs]
    return {key: [row[key] for row in rows] for key in rows[0]}


def label_figures(cohort: Cohort, device: torch.device) -> PairFigures:
    """Dice and surface distance, mean over the structures, labels warped by nearest voxel; folding."""

    def measure(moving: int, fixed: int, transform: Transform) -> dict[str, float]:
        figures = figures_of(cohort, moving, fixed, transform, device)
        labels = cohort.labels[[moving]][:, None].float().to(device)
        with torch.no_grad():
            warped = warp(labels, transform, cohort.grid, order=0, padding="zeros").round().long().cpu()
        there = cohort.labels[[fixed]][:, None]
        distance = metrics.average_surface_distance(warped, there, cohort.grid, cohort.structures)
        return {
            "dice": figures.dice,
            "asd": float(metrics.mean_over_labels(distance)[0]),
            "folding": figures.folding_percent,
        }

    return measure


def pooled(parts: Sequence[Mapping[str, Figures]]) -> dict[str, Figures]:
    """Figures of several folds as those of one."""
    return {
        way: {key: [v for part in parts for v in part[way][key]] for key in parts[0][way]} for way in parts[0]
    }  # fmt: skip


def summary(figures: Figures) -> dict[str, float]:
    """Mean of each figure over the pairs, standard deviation of Dice, median of the times, and the number of pairs."""
    middle = {key: statistics.median(v) if key in ("seconds", "wall") else mean(v) for key, v in figures.items()}
    return middle | {"dice_sd": spread(figures["dice"]), "pairs": len(figures["dice"])}


# ---- stand-ins for --quick ----


def stand_in(grid: Grid, people: int = 8) -> Cohort:
    """Two balls side by side, a little elsewhere in everybody: two people to validate, two to test."""
    generator = torch.Generator().manual_seed(0)
    points, half = grid_points(grid), torch.tensor(grid.extent) / 2
    beside = 0.35 * half * torch.eye(grid.dim)[0]
    labels = torch.zeros(people, *grid.shape, dtype=torch.long)
    for person in labels:
        centre = torch.tensor(grid.centre) + 0.15 * half * (2 * torch.rand(grid.dim, generator=generator) - 1)
        for label, side in ((1, -1.0), (2, 1.0)):
            person[((points - centre - side * beside) / half).norm(dim=-1) < 0.33] = label
    noise = 0.1 * torch.rand(labels.shape, generator=generator)
    structures = {1: "left", 2: "right"}
    splits = {
        "train": tuple(range(people - 4)),
        "validation": (people - 4, people - 3),
        "test": (people - 2, people - 1),
    }
    return Cohort(
        "stand-in", (0.4 * labels + noise)[:, None], one_hot(labels, structures), labels, grid,
        tuple(f"nobody {i}" for i in range(people)), structures, splits, "Everything is synthetic.",
    )  # fmt: skip


def small(recipe: Recipe, cohort: Cohort) -> Recipe:
    """The same recipe on a stand-in: a narrow network, two steps."""
    widths, given = (4, 8), recipe.config
    if not isinstance(given, ISTNConfig):
        raise TypeError("Stand-ins are made for recipes of an ISTN.")
    config = replace(
        given,
        grid=cohort.grid,
        stages=tuple(replace(stage, widths=widths) for stage in given.stages),
        structures=len(cohort.structures),
        itn=widths if given.itn else (),
    )
    return replace(
        recipe,
        data=cohort.name,
        config=config,
        settings=replace(recipe.settings, steps=2, batch=2, precision="no", validate_every=1),
        augmentation=replace(recipe.augmentation, synthetic=0.0),
        refinement=replace(recipe.refinement, steps=3),
    )


__all__ = [
    "CEILING_STEPS", "KINDS", "MODELS", "CohortTask", "Options", "Recipe", "ceiling", "chosen", "find_recipe",
    "hardware", "known", "label_figures", "load_cohort", "pairs_to_test", "pooled", "registered", "run_folder",
    "small", "stand_in", "summary", "timed", "trained", "untrained",
]  # fmt: skip
