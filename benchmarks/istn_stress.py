"""ISTN under stress: few training pairs, wrong structures, long refinements, images unlike the training.

    python -m benchmarks.istn_stress [--quick] [--json FILE] [--parts pairs structures ...] [--sizes 1 2 5 10 20 40 80]

How far a result can be trusted. Five parts on trees of our own generator (64 x 64 pixels, the network of
lesson 04), which need no data, and one on the hippocampus model that ships, which is not trained here:

- ``pairs``: the number of training pairs, one pass and refined. Nested random choices of 80 pairs, by seed; the same
  number of steps whatever the number of pairs; the weights after the last step, so that nothing is chosen by looking;
- ``moved``: the same for every second size, with each training image also shifted, turned, scaled, sheared at random;
- ``structures``: the tree is missing, shrunk, added to or swapped in test images, in the moving one or in both.
- ``long``: ten times the steps, on test pairs: loss, Dice and folding on the way, turning parameters or weights.
- ``unlike``: inverted or bent contrast, noise, blur, another size: how far the ITN's maps are from the truth.
- ``hippocampus``: the last three for the shipped model, on real crops (see ``changes`` for what is done to them). Its
  long refinement is the greedy search that it ships with, beside Adam on control points and on weights, for a circle of
  test people: each is registered to the next. The curve of every pair is kept.

The test pairs of the trees are the same for all: 20 of the generator's test set, measured against the exact transforms.
Dice is at half maximum, TRE in pixels (mm) over 150 points of each fixed tree. "Map error" is the squared error of the
ITN's maps from the true SoI maps relative to what is in both, mean of both images: 0 is perfect, 2 is an empty map, or
one that draws elsewhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from benchmarks import changes, networks, tables
from benchmarks.changes import NONE, Scene
from benchmarks.istn_trees import WEIGHTS as BY_WEIGHTS
from benchmarks.networks import Recipe
from benchmarks.tables import Table
from regteach import metrics, objectives
from regteach.checkpoints import WEIGHTS, Model, load
from regteach.data.augment import Augmentation
from regteach.data.cohort import Cohort
from regteach.data.trees import SIDE, Trees, generate_trees
from regteach.evaluation import figures_of, pairs_to_test
from regteach.grid import Grid
from regteach.nets.istn import AffineStage
from regteach.refinement import Refinement, refine
from regteach.result import Result
from regteach.sampling import warp
from regteach.training import Settings
from regteach.transforms import Identity, Transform, jacobian_determinant

Record = dict[str, Any]
Part = Literal["pairs", "structures", "long", "unlike", "hippocampus", "moved"]
PARTS: tuple[Part, ...] = ("pairs", "structures", "long", "unlike", "hippocampus", "moved")
SETTINGS = Settings(steps=250, batch=8, rate=3e-3, warmup=30, decay=True)
MOVED = Augmentation(shift_mm=3.0, rotation_deg=20.0, scale_ratio=1.15, shear=0.1)
VARIED = Augmentation(gamma=0.7, bias=0.5, noise=0.2, blur_mm=1.5)
# Name of a training: variant of ISTN, kind of transform, augmentation.
TRAININGS = {
    "STN-u": ("unsupervised", "affine", Augmentation()),
    "ISTN-e": ("explicit", "affine", Augmentation()),
    "ISTN-e, moved": ("explicit", "affine", MOVED),
    "ISTN-e, varied": ("explicit", "affine", VARIED),
    "ISTN-e, B-spline": ("explicit", "bspline", Augmentation()),
}
BY_PAIRS = {"pairs": ("STN-u", "ISTN-e"), "moved": ("ISTN-e, moved",)}
LOOK = (0, 1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 400, 500)  # steps of a long refinement at which we measure
FAILED_MM = 2.0  # a tree that is further off than this is not registered
WATCHED = "ISTN-e"  # whose refined loss is to tell failures
FELL = 0.01  # a Dice that is lower by this much has fallen
SHIPPED = "istn-hippocampus"


@dataclass(frozen=True)
class Options(networks.Options):
    """Command line.

    Args:
        seeds: of the trainings, and of the choice of their pairs.
        sizes: numbers of training pairs; the largest serves the other parts.
        parts: what to measure, in this order; the report has them in its own.
        long: steps of the long refinements; of a greedy search, on its finest level.
        followed: test pairs that are followed through a long refinement, for the trees and for the hippocampus.
        pairs: of the hippocampus, for the changed images.
        weights: folder of the weights that ship.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[int, ...] = (1, 2, 5, 10, 20, 40, 80)
    parts: tuple[Part, ...] = PARTS
    long: int = 500
    followed: tuple[int, int] = (8, 14)
    pairs: int = 8
    weights: Path = WEIGHTS


@dataclass(frozen=True)
class Field:
    """The trees that everything is measured on, and what is to be done."""

    options: Options
    trees: Trees
    scene: Scene
    validation: Scene
    scenes: Mapping[str, Scene]

    @property
    def device(self) -> torch.device:
        """Where to measure."""
        return torch.device(self.options.device)

    def model(self, name: str, count: int, seed: int) -> Any:
        """A training, done now or before."""
        chosen = fewer(self.trees, count, seed)
        wanted = recipe(name, chosen, seed, self.options)
        return networks.trained(wanted, chosen, self.options.runs).model.to(self.device)


def field(options: Options) -> Field:
    """Trees to train and test on, and the test pairs with other structures."""
    quick: dict[str, Any] = {"train": max(options.sizes), "validation": 2, "test": 2, "size": 32}
    numbers = quick if options.quick else {"train": max(options.sizes), "validation": 20, "test": 20, "size": 64}
    trees = generate_trees(**numbers)
    drawn, other = generate_trees(**numbers, blurred=False), generate_trees(**numbers, blurred=False, tree_seed=1)
    pairs = trees.pairs("test")
    known, validation = (changes.scene_of(trees, trees.pairs(split)) for split in ("test", "validation"))
    return Field(options, trees, known, validation, changes.tree_scenes(trees, drawn, other, pairs))


def fewer(trees: Trees, count: int, seed: int) -> Trees:
    """The same trees with some of the training pairs: the first of a random order, so that more include fewer."""
    every = trees.pairs("train")
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    chosen = tuple(every[k] for k in order)
    members = tuple(sorted(i for pair in chosen for i in pair))
    return replace(
        trees, splits={**trees.splits, "train": members}, given_pairs={**trees.given_pairs, "train": chosen}
    )  # fmt: skip


def recipe(name: str, trees: Trees, seed: int, options: Options) -> Recipe:
    """The recipe of the trees, brought from 128 pixels to these: lengths shrink with the image, and one level less."""
    variant, kind, augmentation = TRAININGS[name]
    base = networks.find_recipe(f"istn-trees-{kind}-{variant}")
    config: Any = base.config  # of an ISTN
    factor = trees.grid.shape[0] / SIDE
    stages = tuple(
        replace(s, bounds=replace(s.bounds, translation_mm=s.bounds.translation_mm * factor))
        if isinstance(s, AffineStage)
        else replace(s, control_mm=s.control_mm * factor)
        for s in config.stages
    )
    steps = SETTINGS.steps if options.steps is None else options.steps
    adapted = replace(
        base,
        data=trees.name,
        config=replace(config, grid=trees.grid, stages=stages, itn=(8, 16) if config.itn else ()),
        settings=replace(SETTINGS, seed=seed, steps=steps, validate_every=steps),
        augmentation=augmentation,
        bending=base.bending * factor**2,
        refinement=replace(base.refinement, rate=0.03, bending=base.refinement.bending * factor**2),
    )
    return networks.small(adapted, trees) if options.quick else adapted


# ---- what is measured ----


@torch.no_grad()
def figures(transform: Transform, scene: Scene, grid: Grid) -> dict[str, Tensor]:
    """Dice at half maximum, TRE (pixels) and folding (%), one number a pair."""
    warped = warp(scene.soi[0], transform, grid, padding="zeros") > 0.5
    error = metrics.target_registration_error(transform, scene.points, scene.partners)
    return {
        "dice": metrics.dice(warped.long().cpu(), (scene.soi[1] > 0.5).long().cpu(), [1])[1],
        "tre": error.mean(1).cpu(),
        "folding": metrics.folding_percent(jacobian_determinant(transform, grid)).cpu().expand(len(scene)),
    }


@torch.no_grad()
def map_error(result: Result, scene: Scene) -> Tensor:
    """How far the maps are from the true ones, mean of moving and fixed, one number a pair."""
    both = [objectives.relative_mse(found, true) for found, true in zip(result.features, scene.soi, strict=True)]
    return (0.5 * (both[0] + both[1])).cpu()


def registered(model: Any, scene: Scene, grid: Grid, settings: Refinement, each: bool = False) -> dict[str, Record]:
    """One pass and refined, all pairs in a batch: means, and for the refined each pair's TRE and loss if wanted."""
    with torch.no_grad():
        result = model(*scene.images, grid)
    refined = refine(model, result, grid, settings)
    loss = {"one pass": refined.curve[0].cpu(), "refined": refined.curve.amin(0).cpu()}
    found: dict[str, Record] = {}
    for way, transform in (("one pass", result.transform), ("refined", refined.result.transform)):
        values = figures(transform, scene, grid) | {"loss": loss[way]}
        if model.itn is not None:
            values["map_error"] = map_error(result, scene)
        found[way] = {key: float(value.mean()) for key, value in values.items()} | {"pairs": len(scene)}
        if each:
            found[way] |= {f"each_{key}": values[key].tolist() for key in ("tre", "loss")}
    return found


def pairs(place: Field, names: Sequence[str] = BY_PAIRS["pairs"]) -> list[Record]:
    """One pass and refined, for each training, number of training pairs and seed; doing nothing first."""
    grid, still = place.trees.grid, Identity(2)
    nothing = {key: float(v.mean()) for key, v in figures(still, place.scene, grid).items()}
    records: list[Record] = []
    if names == BY_PAIRS["pairs"]:
        head = {"part": "pairs", "model": "nothing", "way": "one pass", "training_pairs": 0, "seed": None}
        records.append(head | nothing)
    for name in names:
        for count in sorted(place.options.sizes, reverse=True):
            for seed in place.options.seeds:
                model = place.model(name, count, seed)
                prepared = recipe(name, place.trees, seed, place.options)
                scene = place.scene.to(place.device)
                for way, values in registered(model, scene, grid, prepared.refinement).items():
                    head = {"part": "pairs", "model": name, "way": way, "training_pairs": count, "seed": seed}
                    head |= {"steps": prepared.settings.steps}
                    records.append(head | values)
    return records


def under_changes(part: str, scenes: Mapping[str, Scene], names: Sequence[str], place: Field) -> list[Record]:
    """Every changed scene, registered by each training; validation pairs first, which say what loss is usual."""
    records = []
    for name in names:
        for seed in place.options.seeds:
            model = place.model(name, max(place.options.sizes), seed)
            settings = recipe(name, place.trees, seed, place.options).refinement
            if name == WATCHED:
                usual = registered(model, place.validation.to(place.device), place.trees.grid, settings, each=True)
                losses = usual["refined"]["each_loss"]
                records.append({"part": "alarm", "of": part, "model": name, "seed": seed, "each_loss": losses})
            for change, scene in scenes.items():
                found = registered(model, scene.to(place.device), place.trees.grid, settings, each=name != "STN-u")
                for way, values in found.items():
                    head = {"part": part, "model": name, "change": change, "way": way, "seed": seed}
                    records.append(head | values)
    return records


def moved(place: Field) -> list[Record]:
    """As :func:`pairs`, with images moved at random in training."""
    half = tuple(sorted(place.options.sizes)[::2])
    return pairs(replace(place, options=replace(place.options, sizes=half)), BY_PAIRS["moved"])


def structures(place: Field) -> list[Record]:
    """Test images with other structures."""
    return under_changes("structures", place.scenes, ("ISTN-e", "STN-u"), place)


def unlike(place: Field) -> list[Record]:
    """Test images unlike the training."""
    scenes = changes.unlike_scenes(place.scene, place.trees.grid)
    return under_changes("unlike", scenes, ("ISTN-e", "ISTN-e, varied", "STN-u"), place)


Watched = Callable[[Transform], dict[str, Tensor]]
Rows = dict[str, list[list[float]]]  # by name, steps by pairs


def level_starts(settings: Refinement) -> list[int]:
    """How many steps were taken before each level of a greedy search; 0 alone for a refinement without levels."""
    return [sum(settings.coarser[:level]) for level in range(len(settings.coarser) + 1)]


def steps_to_look_at(settings: Refinement) -> list[int]:
    """Those of :data:`LOOK` on every level, and the last of each; counted from the first step of all."""
    levels = zip(level_starts(settings), (*settings.coarser, settings.steps), strict=True)
    return sorted({start + k for start, steps in levels for k in (*LOOK, steps) if k <= steps})


def followed(
    model: Any, result: Result, grid: Grid, settings: Refinement, measure: Watched, curve: str = "loss"
) -> tuple[list[int], Rows]:
    """A refinement of a batch (of one pair, for weights and for a greedy search), and how it does on the way.

    It never stops by itself, and of two greedy searches the first is followed. Where a level of a greedy search ends
    and the next one begins, what is measured is what goes on: the transform of the lowest loss.

    Args:
        model: a network.
        result: its one pass. This, and not what a greedy search makes of it on its coarsest grid, is step 0.
        grid: of the images.
        settings: how to refine.
        measure: figures of a transform, one number a pair.
        curve: name for the loss that is descended. On another level of a greedy search it is one of other images.

    Returns:
        The steps of :func:`steps_to_look_at`, and the figures there.
    """
    settings = replace(settings, patience=0, restart=False)
    steps, starts = steps_to_look_at(settings), level_starts(settings)
    seen: dict[int, dict[str, list[float]]] = {}

    def watch(step: int, transform: Transform) -> None:
        if step in steps:  # a later level writes over the last step of the one before
            seen[step] = {key: value.tolist() for key, value in measure(transform).items()}

    refined = refine(model, result, grid, settings, watch=watch)
    seen[0] = {key: value.tolist() for key, value in measure(result.transform).items()}
    # Every level's curve begins with the loss before its first step: one number more than it has steps.
    places = [step + sum(start <= step for start in starts) - 1 for step in steps]
    rows = {key: [seen[step][key] for step in steps] for key in seen[0]}
    return steps, rows | {curve: refined.curve[places].cpu().tolist()}


def long(place: Field) -> list[Record]:
    """Ten times the steps: parameters in one batch, weights pair by pair."""
    grid, scene = place.trees.grid, place.scene.to(place.device)
    records = []
    for name in ("ISTN-e", "ISTN-e, B-spline", "STN-u"):
        for seed in place.options.seeds:
            model = place.model(name, max(place.options.sizes), seed)
            base = recipe(name, place.trees, seed, place.options).refinement
            by_weights = replace(BY_WEIGHTS, bending=base.bending)
            for settings in (base, by_weights):
                settings = replace(settings, steps=place.options.long)
                count = min(place.options.followed[0], len(scene))
                # Parameters of all pairs turn in one batch; weights only pair by pair.
                cuts = [(0, count)] if settings.mode == "parameters" else [(k, k + 1) for k in range(count)]
                parts: list[Rows] = []
                for one in (scene.part(*cut) for cut in cuts):
                    with torch.no_grad():
                        result = model(*one.images, grid)
                    steps, rows = followed(model, result, grid, settings, partial(figures, scene=one, grid=grid))
                    parts.append(rows)
                head = {"part": "long", "model": name, "mode": settings.mode, "seed": seed}
                records.append(head | drift(side_by_side(parts), steps))
    return records


def side_by_side(parts: Sequence[Rows]) -> Rows:
    """Curves of several refinements, steps by pairs, as those of one."""
    return {
        key: [[value for row in rows for value in row] for rows in zip(*(p[key] for p in parts), strict=True)]
        for key in parts[0]
    }


def drift(curves: Mapping[str, Sequence[Sequence[float]]], steps: Sequence[int], usual: int = 50) -> Record:
    """Mean curves, and how many pairs fell: Dice at the end 0.01 or more below its best, or below that at a usual end.

    Args:
        curves: by name, steps by pairs.
        steps: at which these were measured.
        usual: number of steps that are commonly taken.
    """
    dice = torch.tensor(curves["dice"])
    early = list(steps).index(usual) if usual in steps else 0
    return {
        "steps": list(steps),
        "curves": {key: [tables.mean(row) for row in rows] for key, rows in curves.items()},
        "pairs": dice.shape[1],
        "usual": usual,
        "fell_from_best": int((dice.amax(0) - dice[-1] >= FELL).sum()),
        f"fell_after_{usual}": int((dice[early] - dice[-1] >= FELL).sum()),
        "best_step": steps[int(dice.mean(1).argmax())],
    }


# ---- the shipped model, on real crops ----


def hippocampus(options: Options) -> list[Record]:
    """Changed and unlike test images, and a long refinement, of the model that ships.

    Raises:
        FileNotFoundError: if the data or the weights are not there.
    """
    cohort, model = shipped(options)
    device, grid = torch.device(options.device), cohort.grid
    network, short = model.network.to(device), model.refinement
    chosen = pairs_to_test(cohort, min(options.pairs, len(cohort.pairs("test"))))
    others = {m: chosen[(k + 1) % len(chosen)][0] for k, (m, _) in enumerate(chosen)}
    records: list[Record] = []

    def measured(change: str, edit: Callable[[int, bool], tuple[Tensor, Tensor]]) -> None:
        rows: dict[str, list[dict[str, float]]] = {"nothing": [], "one pass": [], "refined": []}
        for m, f in chosen:
            (moving, labels), (fixed, _) = edit(m, True), edit(f, False)
            images = moving.to(device), fixed.to(device)
            judged = _with(cohort, m, labels)
            with torch.no_grad():
                result = network(*images, grid)
            refined = refine(network, result, grid, short).result
            error = _label_map_error(result, cohort, m, f)
            every = {"nothing": Identity(3), "one pass": result.transform, "refined": refined.transform}
            # Of the maps as they are drawn, at every resolution: the curve of a refinement may be of others.
            losses = {
                way: float(objectives.refinement(result.features, every[way], grid)) for way in ("one pass", "refined")
            }
            for way, transform in every.items():
                found = figures_of(judged, m, f, transform, device)
                rows[way].append({"dice": found.dice, "folding": found.folding_percent, "map_error": error})
                rows[way][-1] |= {"loss": losses[way]} if way in losses else {}
        for way, values in rows.items():
            means = {key: tables.mean([v[key] for v in values]) for key in values[0]}
            records.append({"part": "hippocampus", "change": change, "way": way, "pairs": len(chosen)} | means)

    measured(NONE, lambda i, moving: (cohort.images[[i]], cohort.labels[i]))
    for name in changes.REAL:
        measured(
            f"{name}, moving",
            lambda i, moving, name=name: (  # type: ignore[misc]
                changes.changed(cohort, i, name, others[i]) if moving else (cohort.images[[i]], cohort.labels[i])
            ),
        )
    for name, change in changes.UNLIKE.items():
        edited = partial(_unlike, cohort, change)
        measured(name, lambda i, moving, edited=edited: (edited(i), cohort.labels[i]))  # type: ignore[misc]
    return records + long_hippocampus(options, cohort, model)


def long_hippocampus(options: Options, cohort: Cohort, model: Model) -> list[Record]:
    """A long refinement of a circle of test people, by the shipped search and by Adam; the curve of every pair."""
    device, grid = torch.device(options.device), cohort.grid
    network = model.network.to(device)
    chosen = circle(cohort, options.followed[1])
    records: list[Record] = []
    for settings, usual in long_ways(model.refinement, options.long):
        parts: list[Rows] = []
        for m, f in chosen:
            with torch.no_grad():
                result = network(cohort.images[[m]].to(device), cohort.images[[f]].to(device), grid)

            @torch.no_grad()
            def measure(
                transform: Transform, m: int = m, f: int = f, features: tuple[Tensor, Tensor] = result.features
            ) -> dict[str, Tensor]:
                found = figures_of(cohort, m, f, transform, device)
                # Of the maps as they are drawn, at every resolution: the same question whoever searches, and wherever.
                loss = objectives.refinement(features, transform, grid)
                return {
                    "dice": torch.tensor([found.dice]),
                    "folding": torch.tensor([found.folding_percent]),
                    "sdlogj": metrics.sdlogj(jacobian_determinant(transform, grid)).cpu(),
                    "loss": loss.cpu(),
                }

            steps, rows = followed(network, result, grid, settings, measure, curve="descended")
            parts.append(rows)
        curves = side_by_side(parts)
        head = {"part": "hippocampus", "model": SHIPPED, "mode": settings.mode, "seed": None}
        each = {key: [list(line) for line in zip(*rows, strict=True)] for key, rows in curves.items()}
        people = [[cohort.people[i] for i in pair] for pair in chosen]
        finest = level_starts(settings)[-1]
        records.append(head | drift(curves, steps, usual) | {"finest": finest, "people": people, "each": each})
    return records


def long_ways(short: Refinement, long: int) -> list[tuple[Refinement, int]]:
    """What is followed for how long, and how many steps of it are usual, those on coarse levels among them.

    The search that ships, with more steps on its finest level. Then Adam, as on the toy data: control points at the
    package's rate (at five times that, their first step nearly halves the Dice of validation pairs), and weights.
    """
    by_parameters = Refinement(sharpen=16.0, focus_mm=2.0, coarsen=2)
    by_weights = replace(BY_WEIGHTS, focus_mm=2.0, coarsen=2)
    return [
        (replace(short, steps=long), sum(short.coarser) + short.steps),
        (replace(by_parameters, steps=long), by_parameters.steps),
        (replace(by_weights, steps=min(long, 100)), by_weights.steps),
    ]


def circle(cohort: Cohort, count: int) -> list[tuple[int, int]]:
    """Pairs of test people in a random order (seed 0), each registered to the next, so that each is fixed only once."""
    people = cohort.splits["test"]
    order = [people[k] for k in torch.randperm(len(people), generator=torch.Generator().manual_seed(0)).tolist()]
    return list(zip(order, order[1:] + order[:1], strict=True))[:count]


def shipped(options: Options) -> tuple[Cohort, Model]:
    """The crops and the model; stand-ins in quick mode."""
    if options.quick:
        cohort = networks.stand_in(Grid((16, 20, 16)), people=6)
        small: Any = networks.small(networks.find_recipe(SHIPPED), cohort)
        return cohort, Model(SHIPPED, networks.untrained(small.config), small.refinement)
    path = options.weights / f"{SHIPPED}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"There are no weights {path.name} in {path.parent}.")
    return networks.load_cohort("hippocampus"), load(path)


def _unlike(cohort: Cohort, change: changes.Change, index: int) -> Tensor:
    """A changed crop, scaled to [0, 1] again; the zeros around it stay zeros."""
    image = cohort.images[[index]]
    altered = torch.where(image > 0, change(image, cohort.grid).clamp(1e-3, 1), 0.0)
    return changes.normalised(altered)


def _with(cohort: Cohort, index: int, labels: Tensor) -> Cohort:
    """The cohort with other labels of one image."""
    every = cohort.labels.clone()
    every[index] = labels
    return replace(cohort, labels=every)


def _label_map_error(result: Result, cohort: Cohort, moving: int, fixed: int) -> float:
    soi = cohort.soi[[moving]], cohort.soi[[fixed]]
    both = [objectives.relative_mse(m.detach().cpu(), s) for m, s in zip(result.features, soi, strict=True)]
    return float(0.5 * (both[0] + both[1]))


# ---- what is shown ----


def over_seeds(rows: Sequence[Record], key: str, digits: int) -> str:
    """Mean and standard deviation over the seeds."""
    return tables.over_seeds([r[key] for r in rows if r.get(key) is not None], digits)


def of(records: Sequence[Record], **wanted: Any) -> list[Record]:
    """Records with these values."""
    return [r for r in records if all(r.get(key) == value for key, value in wanted.items())]


def _mean(rows: Sequence[Record], key: str) -> float:
    return tables.mean([r[key] for r in rows])


def pairs_table(records: Sequence[Record]) -> Table:
    """A row for each training and number of pairs."""
    steps = next(r["steps"] for r in records if "steps" in r)
    seeds = sorted({r["seed"] for r in records if r["seed"] is not None})
    table = Table(
        f"Trees: training pairs, mean ± standard deviation over {len(seeds)} seeds",
        (
            "model",
            "training pairs",
            "Dice, one pass",
            "Dice, refined",
            "TRE px, one pass",
            "TRE px, refined",
            "map error",
        ),
    )
    for row in of(records, model="nothing"):
        table.add("nothing", "-", tables.number(row["dice"]), "-", tables.number(row["tre"], 2), "-", "-")
    for name in [name for name in sum(BY_PAIRS.values(), ()) if of(records, model=name)]:
        sizes = sorted({r["training_pairs"] for r in of(records, model=name)})
        for count in sizes:
            one, two = (of(records, model=name, training_pairs=count, way=w) for w in ("one pass", "refined"))
            error = over_seeds(two, "map_error", 2) if "map_error" in two[0] else "-"
            table.add(name, str(count), *(over_seeds(rows, "dice", 3) for rows in (one, two)),
                      *(over_seeds(rows, "tre", 2) for rows in (one, two)), error)  # fmt: skip
        gains = []
        for count in sizes:
            before, after = (
                _mean(of(records, model=name, training_pairs=count, way=w), "tre") for w in ("one pass", "refined")
            )
            gains.append(f"{count}: {after - before:+.2f}")
        table.notes.append(f"{name}: what refinement does to TRE, px, by the number of pairs: {', '.join(gains)}.")
    sizes = sorted({r["training_pairs"] for r in of(records, model="ISTN-e")})
    if sizes:
        best = _mean(of(records, model="ISTN-e", training_pairs=sizes[-1], way="one pass"), "tre")
        refined = {n: _mean(of(records, model="ISTN-e", training_pairs=n, way="refined"), "tre") for n in sizes}
        enough = [n for n in sizes if refined[n] <= best]
        verdict = f"as good from {enough[0]} pairs on" if enough else "never as good"
        table.notes.append(
            f"Beside one pass of ISTN-e with {sizes[-1]} pairs, TRE {best:.2f} px, the refined is {verdict}."
        )
    table.notes.append(
        f"Every training has {steps} steps of batch {SETTINGS.batch}, whatever the number of pairs, and no "
        "augmentation, but 'moved': each image also shifted, turned, scaled and sheared at random."
    )
    return table


def changes_table(title: str, records: Sequence[Record], usual: Sequence[Record]) -> Table:
    """A row for each change: ISTN-e, and beside it the others' TRE; under it the alarm that ``usual`` sets."""
    others = [name for name in dict.fromkeys(r["model"] for r in records) if name != "ISTN-e"]
    table = Table(
        title,
        ("test images", "map error", "Dice, one pass", "Dice, refined", "TRE px, one pass", "TRE px, refined",
         "loss, refined", *(f"TRE px, refined {name}" for name in others)),
    )  # fmt: skip
    for change in dict.fromkeys(r["change"] for r in records):
        one, two = (of(records, model="ISTN-e", change=change, way=w) for w in ("one pass", "refined"))
        rows = of(records, change=change, way="refined")
        table.add(change, over_seeds(one, "map_error", 2), *(over_seeds(r, "dice", 3) for r in (one, two)),
                  *(over_seeds(r, "tre", 2) for r in (one, two)), over_seeds(two, "loss", 3),
                  *(over_seeds(of(rows, model=n), "tre", 2) for n in others))  # fmt: skip
    return replace(table, notes=[alarm(records, usual)])


def alarm(records: Sequence[Record], usual: Sequence[Record]) -> str:
    """Whether the refined loss tells failures.

    Args:
        records: of changed and unchanged test pairs.
        usual: the losses of validation pairs, a record for each seed. The level above which a seed's network gives
            alarm is the one that one in twenty of them exceeds.
    """
    levels = {r["seed"]: float(torch.tensor(r["each_loss"]).quantile(0.95)) for r in usual}
    rings: dict[str, list[bool]] = {"unchanged": [], "failed": [], "did not": []}
    for r in of(records, model=WATCHED, way="refined"):
        for tre, loss in zip(r["each_tre"], r["each_loss"], strict=True):
            group = "failed" if tre > FAILED_MM else "unchanged" if r["change"] == NONE else "did not"
            rings[group].append(loss > levels[r["seed"]])
    said = {name: f"{100 * sum(x) / len(x):.0f} % of {len(x)}" if x else "none of 0" for name, x in rings.items()}
    heights = " to ".join(dict.fromkeys(f"{level:.3f}" for level in (min(levels.values()), max(levels.values()))))
    return (
        f"A refined loss above what one in twenty validation pairs exceeds ({heights}, by seed) is found in "
        f"{said['failed']} registrations that fail (TRE above {FAILED_MM:g} px), in {said['did not']} of changed pairs "
        f"that do not, and in {said['unchanged']} of test pairs as in training that do not."
    )


def long_table(title: str, records: Sequence[Record]) -> Table:
    """A row for each model and way of refining."""
    rows = [r for r in records if "curves" in r]
    last = rows[0]["steps"][-1]
    early = 50 if 50 in rows[0]["steps"] else 0
    table = Table(
        title,
        ("model", "turned", "steps", "loss, start", f"loss, {early}", "loss, end", "Dice, start", f"Dice, {early}",
         "Dice, end", "best step", "folding %, end", f"Dice fell after {early}"),
    )  # fmt: skip
    for name, mode in dict.fromkeys((r["model"], r["mode"]) for r in rows):
        group = of(rows, model=name, mode=mode)
        at = {"start": 0, "early": group[0]["steps"].index(early), "end": -1}
        flat = [r["curves"] | {"at": r} for r in group]
        cells = [
            over_seeds([{"v": curves[key][k]} for curves in flat], "v", 3)
            for key in ("loss", "dice")
            for k in at.values()
        ]
        folding = over_seeds([{"v": curves["folding"][-1]} for curves in flat], "v", 2)
        fell, count = (sum(r[key] for r in group) for key in ("fell_after_50", "pairs"))
        best = ", ".join(str(r["best_step"]) for r in group)
        table.add(name, mode, str(group[0]["steps"][-1]), *cells, best, folding, f"{fell} of {count}")
    table.notes.append(
        f"'Dice fell': pairs whose Dice at the end is 0.01 or more below that at step {early}, over all seeds. "
        f"Best step: of the mean Dice, one for each seed. Up to {last} steps; the usual number is {early or 50}."
    )
    return table


def hippocampus_tables(records: Sequence[Record]) -> list[Table]:
    """Changes and the long refinement of the shipped model."""
    changed = [r for r in records if "change" in r]
    table = Table(
        f"{SHIPPED}, as it ships, on changed crops: {changed[0]['pairs']} test pairs",
        ("test images", "Dice, nothing", "Dice, one pass", "Dice, refined", "folding %", "map error", "loss, refined"),
    )
    for change in dict.fromkeys(r["change"] for r in changed):
        rows = {r["way"]: r for r in of(changed, change=change)}
        two = rows["refined"]
        table.add(change, *(tables.number(rows[w]["dice"]) for w in ("nothing", "one pass", "refined")),
                  tables.number(two["folding"], 2), tables.number(two["map_error"], 2),
                  tables.number(two["loss"]))  # fmt: skip
    table.notes.append(
        "Structures are changed in the moving image only, contrast, noise and blur in both. Map error: from the labels "
        "before the change. " + " ".join((changes.changed.__doc__ or "").split("\n\n")[1].split())
    )
    return [table, long_pairs_table(records)]


def long_pairs_table(records: Sequence[Record]) -> Table:
    """Rows for each way to refine the shipped model: means over the pairs; and under them how many pairs changed."""
    rows = [r for r in records if "each" in r]
    table = Table(
        f"{SHIPPED}: long refinements, {rows[0]['pairs']} test pairs, each person fixed once",
        ("refined by", "when", "steps", "Dice", "loss", "loss descended", "folding %", "SDlogJ"),
    )
    digits = {"dice": 3, "loss": 4, "descended": 4, "folding": 3, "sdlogj": 3}
    for r in rows:
        usual = r["steps"].index(r["usual"]) if r["usual"] in r["steps"] else 0
        for when, k in (("one pass", 0), ("usual", usual), ("end", -1)):
            cells = [tables.number(r["curves"][key][k], n) for key, n in digits.items()]
            table.add(r["mode"], when, str(r["steps"][k]), *cells)
        late = [values[-1] - values[usual] for values in r["each"]["dice"]]
        fell, rose = (sum(sign * change >= FELL for change in late) for sign in (-1, 1))
        table.notes.append(
            f"{r['mode']}: from step {r['steps'][usual]} to {r['steps'][-1]}, Dice fell by {FELL:g} or more in {fell} "
            f"of {r['pairs']} pairs and rose so in {rose}: by {min(late):+.3f} to {max(late):+.3f}. The mean is best "
            f"at step {r['best_step']}."
        )
    table.notes += [
        "Greedy: as it ships, coarse levels and all, but with more steps on the finest one. Parameters, weights: Adam, "
        "on maps averaged over cubes of 2 voxels.",
        "Loss: of the maps as they are drawn, at every resolution, whoever searches. Loss descended: of what the "
        "search itself looks at, sharpened maps or averaged ones. It is not to be compared from one way to another, "
        "nor, for a greedy search, from one level to the next.",
        "Measured is the transform after so many steps. A refinement returns that of the lowest loss that it "
        "descended. Every pair's curves are in the JSON.",
    ]
    return table


def shown(records: Sequence[Record]) -> list[Table]:
    """The tables of all parts that were measured."""
    by_part = {part: of(records, part=part) for part in PARTS}
    usual = {part: of(records, part="alarm", of=part) for part in PARTS}
    found: list[Table] = []
    if by_part["pairs"]:
        found.append(pairs_table(by_part["pairs"]))
    if by_part["structures"]:
        found.append(
            changes_table("Trees: other structures in the test images", by_part["structures"], usual["structures"])
        )
    if by_part["long"]:
        found.append(long_table("Trees: long refinements", by_part["long"]))
    if by_part["unlike"]:
        found.append(changes_table("Trees: test images unlike the training", by_part["unlike"], usual["unlike"]))
    if by_part["hippocampus"]:
        found += hippocampus_tables(by_part["hippocampus"])
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; see the module. With ``--json`` the files are written after every part."""
    options = tyro.cli(Options, args=arguments)
    if min(options.sizes) < 1 or options.long < 1:
        raise ValueError("Numbers of training pairs and of steps are 1 or more.")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    facts = {"seeds": options.seeds, "quick": options.quick, "hardware": networks.hardware(device)}
    place = field(options) if set(options.parts) - {"hippocampus"} else None
    records: list[Record] = []
    left_out: list[Table] = []
    outcome: dict[str, Any] = {}
    measures = {"pairs": pairs, "structures": structures, "long": long, "unlike": unlike, "moved": moved}
    for part in options.parts:
        if part == "hippocampus":
            try:
                records += hippocampus(options)
            except FileNotFoundError as error:
                left_out.append(Table(f"{SHIPPED}: left out", (), notes=[str(error)]))
        elif place is not None:
            records += measures[part](place)
        found = shown(records) + left_out
        outcome = tables.report("benchmarks.istn_stress", arguments, options.json, found, records, facts)
    return outcome


if __name__ == "__main__":
    tables.command(main)
