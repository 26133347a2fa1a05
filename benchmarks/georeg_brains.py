"""GeoReg on real anatomy: hippocampus, brains in one contrast and in two, and retinas, as the models ship.

    python -m benchmarks.georeg_brains [--quick] [--json FILE] [--parts hippocampus brains] [--pairs 20]

Parts, each with the shipped model of its name, on pairs of people that it was not trained on:

- hippocampus: real scans.
- brains: six donors and the SynthSeg people at 2 mm, each with others of their source: real label maps, synthetic T1.
- brains-t1t2: the same people, T1 to T2, both synthetic.
- mni-t1t2: the model of brains-t1t2 on the real T1 and T2 of the MNI template: as they are, where nothing should move,
  and the T2 deformed, with a known answer.
- oasis: the model of brains on real T1 scans of whole brains (neurite-OASIS), where they have been fetched.
- retina: drawn B-scans of drawn eyes, two visits each, with a known answer.

Beside it on the same pairs: nothing, and what needs no training, an affine and an affine with B-splines, optimised on
the pair by the model's own similarity, and a greedy search by it that starts from nothing. Labels are warped by nearest
voxel; Dice and HD95 are means over structures and pairs (one that the warp loses counts as far off as the image is
long, its diagonal). The end-point error, where the answer is known, is the mean over the structures where their partner
lies inside the moving image.

Seconds are those of the whole registration of a pair. Peak memory is what it takes above images and weights; that of a
training step is that of the model's own training, for one pair, with all that this training does to it: gradients,
optimiser, and what is drawn.
"""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from benchmarks import networks, tables
from benchmarks.harness import PeakMemory, hardware, timed
from benchmarks.pairwise import Optimisation, optimised
from benchmarks.tables import Table, number
from regteach import metrics, objectives
from regteach.affine import AffineBounds
from regteach.checkpoints import SUFFIX, Model, load
from regteach.checkpoints import WEIGHTS as SHIPPED
from regteach.cohort_task import CohortTask
from regteach.data.brains import load_oasis
from regteach.data.cohort import Cohort
from regteach.data.large import deformed, visible
from regteach.data.modalities import load_mni_contrasts, same_anatomy
from regteach.data.named import BRAINS
from regteach.grid import Grid
from regteach.nets.georeg import GeoRegConfig
from regteach.nets.istn import count_parameters, parameters_by_part
from regteach.recipes import Recipe
from regteach.refinement import Refinement, refine, search
from regteach.sampling import warp
from regteach.transforms import Identity, Transform, displacement, jacobian_determinant

NOTHING, AFFINE, SPLINES = "nothing", "affine, optimised", "affine and B-splines, optimised"
GREEDY = "greedy search from nothing"
ONE, REFINED = "GeoReg, one pass", "GeoReg, refined"
OASIS_SCANS = 6  # the first by name: 30 pairs
COPIES = 5  # deformed copies of the template

Part = Literal["hippocampus", "brains", "brains-t1t2", "mni-t1t2", "oasis", "retina"]
PARTS: tuple[Part, ...] = ("hippocampus", "brains", "brains-t1t2", "mni-t1t2", "oasis", "retina")
MODELS = {part: f"georeg-{part}" for part in PARTS} | {"mni-t1t2": "georeg-brains-t1t2", "oasis": "georeg-brains"}
# Control points of the B-splines, mm; an eighth of the shortest side, for brains about a tenth.
CONTROL_MM = {"hippocampus": 6.0, "retina": 0.15}
BRAIN_CONTROL_MM = 12.0
# Weight of the bending energy of those, mm^2.
BENDING = {"retina": 1e-4}
OTHER_BENDING = 3.0
# The search beside a model that refines in another way, or near its own answer: that of the hippocampus, with the
# coarse steps that it needs from nothing.
NEAR = "georeg-hippocampus"
SEARCH = replace(networks.find_recipe(NEAR).refinement, coarser=(50, 50))

# What other tools reach, measured elsewhere, on pairs of other people: Dice, and SDlogJ where it is known.
ELSEWHERE: dict[str, dict[str, tuple[float, float | None]]] = {
    "hippocampus": {
        "nothing": (0.526, None), "ANTs SyN": (0.716, 0.17), "ConvexAdam": (0.748, 0.63),
        "diffeomorphic demons": (0.751, 0.18), "greedy (0.8 s a pair)": (0.773, 0.30),
    },
    "oasis": {"nothing": (0.487, None), "ANTs SyN": (0.691, None), "greedy": (0.717, None)},
}  # fmt: skip
# What is meant to be reached: by which method, in which figure, and whether at least so much, or at most.
AIMS: dict[str, tuple[tuple[str, str, float, bool], ...]] = {
    "hippocampus": ((ONE, "dice", 0.72, True), (REFINED, "dice", 0.78, True), (REFINED, "folding", 0.5, False)),
    "oasis": ((REFINED, "dice", 0.70, True),),
}

Figures = networks.Figures
Method = Callable[[Tensor, Tensor], Transform]  # moving and fixed image of a pair to fixed points -> moving points


@dataclass(frozen=True)
class Options:
    """Command line.

    Args:
        quick: tiny stand-in data and networks, two steps each: shows that it runs, and nothing else.
        json: also write the numbers to this file, and the tables beside it as markdown.
        parts: of the benchmark.
        pairs: test pairs at most, of each part.
        weights: folder of the models.
        device: where to measure.
        threads: of torch on the CPU; one is the steadiest where other programs run.
    """

    quick: bool = False
    json: Path | None = None
    parts: tuple[Part, ...] = PARTS
    pairs: int = 20
    weights: Path = SHIPPED
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 1


@dataclass(frozen=True)
class Trial:
    """Pairs to register, and what is known about them.

    Args:
        part: of a benchmark.
        what: is registered, for the title.
        cohort: of the images and labels; the labels are for measuring alone.
        pairs: (moving, fixed).
        truth: the exact transform of a pair, where there is one.
    """

    part: str
    what: str
    cohort: Cohort
    pairs: networks.Pairs
    truth: Callable[[int, int], Transform] | None = None


# ---- what is registered ----


def trials(part: Part, options: Options) -> list[Trial]:
    """The pairs of one part.

    Raises:
        FileNotFoundError: if the data have not been fetched; the message has the command.
    """
    if options.quick:
        cohort = networks.stand_in(Grid((48, 48)) if part == "retina" else Grid((24, 24, 24), (3.0,)), people=6)
        return [
            Trial(part, "stand-ins", cohort, networks.pairs_to_test(cohort, 2), lambda m, f: Identity(cohort.grid.dim))
        ]
    if part == "mni-t1t2":
        still = load_mni_contrasts(BRAINS.spacing[0], BRAINS.shape)
        moved = deformed(still, "all", "small", copies=min(COPIES, options.pairs), partners=same_anatomy(still))
        return [
            Trial(part, "the template as it is", still, still.pairs("test"), lambda m, f: Identity(still.grid.dim)),
            Trial(part, "the template and deformed copies of it", moved, moved.pairs("test"), moved.truth),
        ]
    if part == "oasis":
        scans = load_oasis(BRAINS.spacing[0], BRAINS.shape, sides="merged", limit=OASIS_SCANS)
        cohort = replace(scans, splits={"train": (), "validation": (), "test": tuple(range(len(scans)))})
    else:
        cohort = networks.load_cohort(networks.find_recipe(MODELS[part]).data)
    people = len({cohort.people[i] for i in cohort.splits["test"]})
    what = f"{people} {'eyes' if part == 'retina' else 'people'} of {cohort.name} that are kept for testing"
    return [Trial(part, what, cohort, networks.pairs_to_test(cohort, options.pairs), getattr(cohort, "truth", None))]


def recipe_of(part: Part, cohort: Cohort, quick: bool) -> Recipe:
    """The training behind the model of a part; narrow, and with two steps, for a stand-in."""
    recipe = networks.find_recipe(MODELS[part])
    if not quick:
        return recipe
    config: Any = recipe.config
    small = replace(config, grid=cohort.grid, widths=(4,) * len(config.widths))
    short = replace(recipe.refinement, steps=2, coarser=())
    return replace(recipe, config=small, refinement=short, middle=(), imitate=recipe.imitate and bool(cohort.twins))


def optimisation(part: Part, recipe: Recipe, quick: bool) -> Optimisation:
    """The optimisation that stands beside a model, by its similarity."""
    config: Any = recipe.config
    shortest = min(config.grid.extent)
    how = Optimisation(
        similarity=config.similarity,
        bounds=AffineBounds(shortest / 6, 30.0, 1.4, 45.0, 0.2),
        control_mm=CONTROL_MM.get(part, BRAIN_CONTROL_MM),
        bending=BENDING.get(part, OTHER_BENDING),
    )
    return replace(how, control_mm=shortest / 4, affine=(2,), splines=(1,), steps=2) if quick else how


# ---- how ----


def methods(trial: Trial, recipe: Recipe, model: Model | None, how: Optimisation) -> dict[str, Method]:
    """Every way of registering a pair, by name; those of GeoReg where there is a model."""
    grid = trial.cohort.grid
    found: dict[str, Method] = {
        NOTHING: lambda moving, fixed: Identity(grid.dim),
        AFFINE: partial(optimised, grid=grid, how=how, splines=False),
        SPLINES: partial(optimised, grid=grid, how=how, splines=True),
        GREEDY: partial(_searched, grid=grid, recipe=recipe),
    }
    if model is None:
        return found

    return found | {ONE: partial(one_pass, model=model, grid=grid), REFINED: partial(refined, model=model, grid=grid)}


@torch.no_grad()
def one_pass(moving: Tensor, fixed: Tensor, model: Model, grid: Grid) -> Transform:
    """What the network of a model says at once."""
    transform: Transform = model.network(moving, fixed, grid).transform
    return transform


def refined(moving: Tensor, fixed: Tensor, model: Model, grid: Grid) -> Transform:
    """The same, refined as the model recommends."""
    with torch.no_grad():
        result = model.network(moving, fixed, grid)
    return refine(model.network, result, grid, model.refinement).result.transform


def without_network(recipe: Recipe) -> Refinement:
    """How a model's refinement searches without the model; as :data:`SEARCH` where its own mode needs one."""
    own = recipe.refinement.mode == "greedy" and recipe.name != NEAR
    given = recipe.refinement if own else replace(SEARCH, steps=min(SEARCH.steps, recipe.refinement.steps))
    return replace(given, restart=False)


def _searched(moving: Tensor, fixed: Tensor, grid: Grid, recipe: Recipe) -> Transform:
    config: Any = recipe.config
    return search(moving, fixed, grid, without_network(recipe), config.similarity).result.transform


class Mixed(nn.Module):
    """A network in the precision of its training: that of a call as a whole, as the training loop has it."""

    def __init__(self, network: nn.Module, precision: str) -> None:
        super().__init__()
        self.module, self.mixed = network, precision == "bf16"

    def forward(self, moving: Tensor, fixed: Tensor, *more: Any) -> Any:
        """The network's answer."""
        with torch.autocast(moving.device.type, torch.bfloat16, enabled=self.mixed):
            return self.module(moving, fixed, *more)


def training_step(network: Any, task: CohortTask, device: torch.device) -> None:
    """One update of the weights on the first pair of a training, on a copy of the network that is thrown away."""
    network = copy.deepcopy(network).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(network.parameters(), lr=task.recipe.settings.rate)
    terms = task.loss(Mixed(network, task.recipe.settings.precision), range(1), device)
    objectives.total(terms).mean().backward()
    optimiser.step()


# ---- what is measured ----


@torch.no_grad()
def figures(trial: Trial, moving: int, fixed: int, transform: Transform, device: torch.device) -> dict[str, float]:
    """Dice, HD95 (mm), folding (%), SDlogJ and, where the answer is known, the end-point error (mm) of one pair."""
    cohort, grid = trial.cohort, trial.cohort.grid
    labels = cohort.labels[[moving]][:, None].float().to(device)
    warped = warp(labels, transform, grid, order=0, padding="zeros").round().long().cpu()
    there = cohort.labels[[fixed]][:, None]
    distances = torch.stack(list(metrics.hausdorff95(warped, there, grid, cohort.structures).values()))
    det = jacobian_determinant(transform, grid)
    found = {
        "dice": float(metrics.mean_over_labels(metrics.dice(warped, there, cohort.structures))[0]),
        "hd95": float(torch.where(distances.isinf(), math.hypot(*grid.extent), distances).nanmean()),
        "folding": float(metrics.folding_percent(det)[0]),
        "sdlogj": float(metrics.sdlogj(det)[0]),
    }
    if trial.truth is not None:
        truth = trial.truth(moving, fixed)
        mask = visible(truth, grid) & (there > 0)
        error = metrics.end_point_error(displacement(transform, grid).cpu(), displacement(truth, grid), mask)
        found["error"] = float(error[0])
    return found


def measured(
    trial: Trial, ways: Mapping[str, Method], device: torch.device
) -> tuple[dict[str, Figures], dict[str, float]]:
    """Register every pair in every way.

    Returns:
        For each way its figures, one number a pair, "seconds" among them; and its peak memory, MB, on the first pair,
        which also warms up.
    """
    optimiser = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    optimiser.zero_grad()  # the first one in a process loads modules, for which no method shall be charged
    found: dict[str, Figures] = {name: {} for name in ways}
    peaks: dict[str, float] = {}
    for pair in trial.pairs:
        images = trial.cohort.images[list(pair)].to(device)
        for name, way in ways.items():
            if name not in peaks:
                with PeakMemory(device) as memory:
                    way(images[:1], images[1:])
                peaks[name] = memory.peak_mb
            transform, spent = timed(partial(way, images[:1], images[1:]), device)
            row = figures(trial, *pair, transform, device) | {"seconds": spent["seconds"]}
            for key, value in row.items():
                found[name].setdefault(key, []).append(value)
    return found, peaks


def measure(trial: Trial, options: Options) -> tuple[Table, list[dict[str, Any]]]:
    """One table and the numbers behind it."""
    device = torch.device(options.device)
    recipe = recipe_of(trial.part, trial.cohort, options.quick)
    model = model_of(recipe, options)
    model = None if model is None else model.to(device)
    how = optimisation(trial.part, recipe, options.quick)
    found, peaks = measured(trial, methods(trial, recipe, model, how), device)
    records = [
        {"part": trial.part, "what": trial.what, "method": name, "peak_mb": peaks[name]} | networks.summary(values)
        for name, values in found.items()
    ]
    if model is not None:
        ours = {"parameters": count_parameters(model.network), "parameters_by_part": parameters_by_part(model.network)}
        if trial.cohort.splits["train"]:  # the real scans of a check are nobody's training
            task = CohortTask(recipe, trial.cohort)
            with PeakMemory(device) as memory:
                training_step(model.network, task, device)
            ours["training_peak_mb"] = memory.peak_mb
        records = [r | ours if r["method"] in (ONE, REFINED) else r for r in records]
    return shown(trial, records, found, how, options), records


def model_of(recipe: Recipe, options: Options) -> Model | None:
    """The model of a recipe from its file, nothing where there is none; an untrained one for a stand-in."""
    if options.quick:
        if not isinstance(recipe.config, GeoRegConfig):
            raise TypeError("The models of this benchmark are GeoRegs.")
        return Model(recipe.name, networks.untrained(recipe.config), recipe.refinement)
    path = options.weights / f"{recipe.name}{SUFFIX}"
    return load(path) if path.exists() else None


# ---- what is shown ----


def shown(
    trial: Trial,
    records: Sequence[Mapping[str, Any]],
    found: Mapping[str, Figures],
    how: Optimisation,
    options: Options,
) -> Table:
    """A row a method, and what the numbers say."""
    known, name = trial.truth is not None, MODELS[trial.part]
    table = Table(
        f"{name} on {len(trial.pairs)} pair(s): {trial.what}",
        ("method", "Dice", "HD95, mm", *["end-point error, mm"] * known, "folding, %", "SDlogJ", "s a pair", "peak, MB",
         "training step, MB", "parameters"),
    )  # fmt: skip
    for r in records:
        still = r["method"] == NOTHING
        cells = [number(r["dice"]), number(r["hd95"], 2), *[number(r.get("error"))] * known, number(r["folding"], 3)]
        cells += [number(r["sdlogj"]), "-" if still else number(r["seconds"], 2)]
        cells += ["-" if still else f"{r['peak_mb']:,.0f}"]
        cells += [f"{r[key]:,.0f}" if key in r else "-" for key in ("training_peak_mb", "parameters")]
        table.add(r["method"], *cells)
    if not options.quick:
        table.notes += statements(trial.part, records, found)
        table.notes += [tables.in_parts(r["parameters_by_part"]) for r in records if r["method"] == ONE]
        if ONE not in found:
            table.notes.append(f"There are no weights {name}{SUFFIX} in {options.weights.name}/: GeoReg is left out.")
    affine, splines = (", ".join(map(str, factors)) for factors in (how.affine, how.splines))
    clock = "seconds of the clock" if torch.device(options.device).type == "cuda" else "processor seconds"
    table.notes += [
        trial.cohort.origin,
        f"Optimised: by {how.similarity}, {how.steps} steps of Adam on averages over {affine} voxels for "
        f"the affine, and again over {splines} with B-splines, control points {how.control_mm:g} mm apart. "
        f"s a pair: {clock}, median.",
    ]
    return table


def statements(part: Part, records: Sequence[Mapping[str, Any]], found: Mapping[str, Figures]) -> list[str]:
    """What the numbers say: aims, pair by pair against what needs no training, and what was measured elsewhere."""
    rows, notes = {r["method"]: r for r in records}, []
    for method, key, target, at_least in AIMS.get(part, ()):
        if method in rows:
            what = f"{method}: {'folding, %' if key == 'folding' else 'Dice'}"
            notes.append(tables.aim(what, rows[method][key], target, at_least))
    for method, other in itertools.product((ONE, REFINED), (SPLINES, GREEDY)):
        if method in found and other in found:
            ours, theirs = found[method]["dice"], found[other]["dice"]
            ahead = sum(a > b for a, b in zip(ours, theirs, strict=True))
            lead = tables.mean(ours) - tables.mean(theirs)
            notes.append(f"{method}, Dice against {other}: {lead:+.3f}, ahead in {ahead} of {len(ours)} pairs.")
    if part in ELSEWHERE:
        parts = [
            f"{tool} {dice:.3f}" + ("" if spread is None else f" (SDlogJ {spread:.2f})")
            for tool, (dice, spread) in ELSEWHERE[part].items()
        ]
        notes.append(
            f"Dice measured elsewhere, on other people: {', '.join(parts)}. How far the two sets of pairs compare, the "
            "rows of nothing tell."
        )
    return notes


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; see the module."""
    options = tyro.cli(Options, args=arguments)
    if options.pairs < 1:
        raise ValueError(f"Pairs are 1 or more, but they are {options.pairs}.")
    torch.set_num_threads(options.threads)
    before = hardware(torch.device(options.device))
    found: list[Table] = []
    records: list[dict[str, Any]] = []
    for part in options.parts:
        try:
            chosen = trials(part, options)
        except FileNotFoundError as error:
            found.append(Table(f"{part}: left out", (), notes=[str(error)]))
            continue
        for trial in chosen:
            table, rows = measure(trial, options)
            found.append(table)
            records += rows
            print(f"{part}: {trial.what}, done", flush=True)
    facts = {"seeds": (0,), "quick": options.quick, "hardware": before}
    return tables.report("benchmarks.georeg_brains", arguments, options.json, found, records, facts)


if __name__ == "__main__":
    tables.command(main)
