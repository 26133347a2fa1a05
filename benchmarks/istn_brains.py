"""ISTN on brain MRI in 3D: the paper's Table 1 again, and the shipped models beside other tools.

    python -m benchmarks.istn_brains [--quick] [--json FILE] [--parts hippocampus donors ...] [--recipes affine ...]

Five parts, each for itself:

- hippocampus: Table 1 on real T1 crops; pairs of the people kept for testing (seed 0).
- donors: Table 1 on six real brains at 3 mm with synthetic contrast; leave two out, everybody is tested on once.
- shipped: ``istn-hippocampus`` beside what other tools reach on such crops.
- gap: what of the distance to the ceiling is the ITN's, and what the search's: the maps that the ITN of
  ``istn-hippocampus`` draws, registered in the very way in which the ceiling registers the SoI.
- brains: ``istn-brains`` on the test people of its own data, whole brains at 2 mm: real label maps, synthetic contrast.

Table 1 has the four variants of ISTN, with an affine and with an affine followed by B-splines, one pass and refined,
between doing nothing (Id) and the SoI itself: the label maps registered as if an ITN had drawn them without a fault, by
200 steps of Adam on the parameters of the transform, from the identity and of every voxel, without any training: the
ceiling.

Dice and ASD (mean distance of the surface voxels, both ways, pooled) are means over structures and pairs, labels warped
by nearest voxel. Table 1 may be trained from several seeds: mean and standard deviation over them. The paper's figures
are of another data set (UK Biobank, 100 test pairs).
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks import networks, tables
from benchmarks.networks import KINDS, MODELS, Recipe
from benchmarks.tables import NOT_MEASURED, Table
from regteach import objectives
from regteach.checkpoints import SUFFIX, Model, load
from regteach.checkpoints import WEIGHTS as SHIPPED
from regteach.data.brains import donor_folds
from regteach.data.cohort import Cohort
from regteach.grid import Grid
from regteach.nets.istn import ISTN

ONE, REFINED = "one pass", "refined"
IDENTITY, NOTHING, CEILING = "Id", "nothing", "SoI itself"
DRAWN = "as the ITN draws it"
# The paper's Table 1: Dice and ASD (mm), one pass and refined.
PAPER = {
    "affine": {
        "Id": (0.53, None, 2.41, None), "STN-u": (0.71, 0.79, 1.11, 0.69), "STN-s": (0.70, 0.79, 1.10, 0.69),
        "ISTN-e": (0.75, 0.83, 0.93, 0.53), "ISTN-i": (0.75, 0.82, 0.89, 0.58), "SoI itself": (None, 0.84, None, 0.50),
    },
    "bspline": {
        "Id": (0.70, None, 1.05, None), "STN-u": (0.74, 0.84, 0.88, 0.51), "STN-s": (0.77, 0.83, 0.74, 0.52),
        "ISTN-e": (0.80, 0.86, 0.63, 0.45), "ISTN-i": (0.81, 0.85, 0.59, 0.46), "SoI itself": (None, 0.91, None, 0.27),
    },
}  # fmt: skip
# Mean Dice of both labels on 50 pairs of hippocampus crops of people that are not in ours: other tools.
OTHERS = {
    "nothing": 0.526, "affine": 0.589, "ANTs SyN": 0.716, "elastix": 0.72, "ConvexAdam": 0.748,
    "diffeomorphic demons": 0.751, "greedy": 0.773, "label maps themselves, SyN": 0.844,
    "label maps themselves, mean squares": 0.873,
}  # fmt: skip
GAP_AIM, LEAD_AIM = 0.03, 0.03
CORES = min(2, os.cpu_count() or 1)


@dataclass(frozen=True)
class Options(networks.Options):
    """Command line.

    Args:
        parts: of the benchmark.
        pairs: test pairs at most, of each split.
        folds: of the donors; fewer than three test on fewer people.
        seeds: of the trainings of Table 1.
        weights: folder of the models that are tested as they are.
    """

    parts: tuple[Literal["hippocampus", "donors", "shipped", "gap", "brains"], ...] = (
        "hippocampus", "donors", "shipped", "gap", "brains",
    )  # fmt: skip
    pairs: int = 50
    folds: int = 3
    seeds: tuple[int, ...] = (0,)
    weights: Path = SHIPPED


# ---- Table 1 ----


def table_one(data: str, folds: Sequence[Cohort], options: Options) -> tuple[Table, list[dict[str, Any]]]:
    """Train or read each variant on each fold, and register the test pairs of all folds.

    Args:
        data: "hippocampus" or "donors", as in the recipes' names.
        folds: one cohort for each split.
        options: of the command line.
    """
    device = torch.device(options.device)
    names = networks.chosen([f"istn-{data}-{kind}-{variant}" for kind in KINDS for variant in MODELS], options.recipes)
    records: list[dict[str, Any]] = []

    def note(kind: str, model: str, found: dict[str, networks.Figures], **more: Any) -> None:
        for way, figures in found.items():
            records.append({"data": data, "kind": kind, "model": model, "way": way} | more | networks.summary(figures))

    for kind in [kind for kind in KINDS if any(f"-{kind}-" in name for name in names)]:
        first = _recipe(f"istn-{data}-{kind}-explicit", folds[0], options, options.seeds[0])
        still, best, best_way = [], [], networks.ceiling(options.quick)
        for fold in folds:
            pairs, measure = networks.pairs_to_test(fold, options.pairs), networks.label_figures(fold, device)
            still.append({ONE: networks.known(fold, pairs, measure)})
            best.append(
                networks.registered(
                    networks.untrained(first.config), fold, pairs, {REFINED: best_way}, measure,
                    device, soi=True,
                )
            )  # fmt: skip
        note(kind, IDENTITY, networks.pooled(still))
        for name, seed in itertools.product([name for name in names if f"-{kind}-" in name], options.seeds):
            parts, apart, seconds = [], [], 0.0
            for fold in folds:
                recipe = _recipe(name, fold, options, seed)
                done = networks.trained(recipe, fold, options.runs)
                pairs, ways = networks.pairs_to_test(fold, options.pairs), {ONE: None, REFINED: recipe.refinement}
                measure = networks.label_figures(fold, device)
                parts.append(networks.registered(done.model, fold, pairs, ways, measure, device))
                apart += maps_apart(done.model, fold, pairs, device)
                seconds += done.seconds
            found = networks.pooled(parts)
            drawn = {"maps_apart": tables.mean(apart)} if apart else {}
            note(kind, MODELS[recipe.variant], found, recipe=name, seed=seed, training_seconds_wall=seconds, **drawn)
        note(kind, CEILING, networks.pooled(best))
    return show_table_one(data, folds, records, options), records


@torch.no_grad()
def maps_apart(model: ISTN, cohort: Cohort, pairs: networks.Pairs, device: torch.device) -> list[float]:
    """Squared difference of two people's maps over that of their structures: a number a pair, none without an ITN.

    Near 1 an ITN shows whose head it is; near 0 it draws everybody alike, and a refinement that brings two such maps
    together ends where it is told that nothing has to move.
    """
    if model.itn is None:
        return []
    found = []
    for pair in pairs:
        drawn = model.itn(cohort.images[list(pair)].to(device)).float().split(1)
        whole = cohort.soi[list(pair)].split(1)
        found.append(float(objectives.relative_mse(*drawn) / objectives.relative_mse(*whole).to(device)))
    return found


def show_table_one(data: str, folds: Sequence[Cohort], records: Sequence[dict[str, Any]], options: Options) -> Table:
    """A row a method, ours beside the paper's."""
    people = sum(len(fold.splits["test"]) for fold in folds)
    pairs = max((r["pairs"] for r in records), default=0)
    several = f", mean ± standard deviation over {len(options.seeds)} seeds" if len(options.seeds) > 1 else ""
    table = Table(
        f"Table 1 on {data}: {pairs} test pairs, {people} test people, {len(folds)} split(s), "
        f"train on {len(folds[0].splits['train'])}{several}",
        ("transform", "method", "Dice, one pass", "refined", "ASD mm, one pass", "refined", "folding %, one pass",
         "refined", "s a pair, one pass", "refinement", "paper's Dice", "paper's ASD, mm"),
    )  # fmt: skip
    order = [IDENTITY, *MODELS.values(), CEILING]
    for kind in KINDS:
        for model in order:
            rows = [r for r in records if (r["kind"], r["model"]) == (kind, model)]
            if not rows:
                continue
            cells = [
                tables.over_seeds([r[key] for r in rows if r["way"] == way and key in r], 3)
                for key in ("dice", "asd", "folding", "seconds")
                for way in (ONE, REFINED)
            ]
            theirs = (None,) * 4 if options.quick else PAPER[kind][model]
            paper = [" -> ".join(tables.number(v, 2) for v in both if v is not None) or "-"
                     for both in (theirs[:2], theirs[2:])]  # fmt: skip
            table.add(KINDS[kind], model, *cells, *paper)
    if not options.quick:
        table.notes += [note for kind in KINDS for note in statements(kind, records)]
    table.notes += [
        folds[0].origin,
        "B-spline: an affine and then B-splines, from where the images lie; the paper's starts from images that are "
        "aligned already, so its Id is higher.",
        f"s a pair: processor seconds on {torch.get_num_threads()} thread(s), median; refinement: of that alone. "
        f"{CEILING}: the label maps, {3 if options.quick else networks.CEILING_STEPS} steps from the identity, "
        "no network.",
    ]
    return table


def statements(kind: str, records: Sequence[dict[str, Any]]) -> list[str]:
    """How far the ISTN are from the ceiling, and how far ahead of STN-u, worked out from the means over the seeds."""
    scores: dict[str, dict[str, dict[int, float]]] = {ONE: {}, REFINED: {}}
    for r in records:
        if r["kind"] == kind:
            scores[r["way"]].setdefault(r["model"], {})[r.get("seed", 0)] = r["dice"]
    dice = {model: tables.mean(list(found.values())) for model, found in scores[REFINED].items()}
    ours = {model: value for model, value in dice.items() if model.startswith("ISTN")}
    notes = []
    for way, found in scores.items():
        compared = {model: by_seed for model, by_seed in found.items() if model not in (IDENTITY, CEILING)}
        if len(compared) > 1:
            notes.append(f"Rank by Dice, {KINDS[kind]}, {way}: {tables.ranked_over_seeds(compared)}.")
    for model, value in ours.items():
        apart = [r["maps_apart"] for r in records if (r["kind"], r["model"]) == (kind, model) and "maps_apart" in r]
        if apart:
            notes.append(
                f"{model}, {KINDS[kind]}: squared difference of two people's maps, over that of their structures: "
                f"{tables.mean(apart):.2f} (0: everybody is drawn alike, and refinement has nothing to bring together)."
            )
        if CEILING in dice:
            gap = dice[CEILING] - value
            notes.append(tables.aim(f"Refined {model}, {KINDS[kind]}, below the ceiling", gap, GAP_AIM, at_least=False))
        if "STN-u" in dice:
            theirs = PAPER[kind]
            lead = (theirs[model][1] or 0.0) - (theirs["STN-u"][1] or 0.0)
            said = tables.aim(f"Refined {model}, {KINDS[kind]}, above refined STN-u", value - dice["STN-u"], LEAD_AIM)
            notes.append(f"{said} The paper's lead here is {lead:.2f}.")
    return notes


# ---- models as they ship ----


def as_shipped(name: str, cohort: Cohort, options: Options) -> tuple[list[Table], list[dict[str, Any]]]:
    """One model as its file has it, on the test people of its data, at the number of cores of a laptop."""
    model = _shipped(name, cohort, options)
    if model is None:
        return [_no_weights(name, options)], []
    device, threads = torch.device(options.device), torch.get_num_threads()
    pairs, measure = networks.pairs_to_test(cohort, options.pairs), networks.label_figures(cohort, device)
    twice = replace(model.refinement, steps=2 * model.refinement.steps)
    ways = {ONE: None, REFINED: model.refinement, f"refined, {twice.steps} steps": twice}
    torch.set_num_threads(options.threads if options.quick else CORES)
    try:
        found = {NOTHING: networks.known(cohort, pairs, measure)}
        found |= networks.registered(model.network, cohort, pairs, ways, measure, device)
        best = {CEILING: networks.ceiling(options.quick)}
        network = networks.untrained(model.network.config)
        found |= networks.registered(network, cohort, pairs, best, measure, device, soi=True)
    finally:
        torch.set_num_threads(threads)
    records = [{"model": name, "way": way} | networks.summary(figures) for way, figures in found.items()]
    return [show_shipped(name, cohort, records, options)], records


def show_shipped(name: str, cohort: Cohort, records: Sequence[dict[str, Any]], options: Options) -> Table:
    """A row a way; other tools first where there are figures."""
    on_gpu = torch.device(options.device).type == "cuda"
    people = len(cohort.splits["test"])
    table = Table(
        f"{name}, as it ships, on {records[0]['pairs']} pairs of {people} test people of {cohort.name}",
        ("method", "Dice", "ASD, mm", "folding, %", "processor s a pair", f"wall s, {CORES} cores", "wall s, GPU"),
    )
    others = OTHERS if name == "istn-hippocampus" and not options.quick else {}
    for method, dice in others.items():
        table.add(method, tables.number(dice), *["-"] * 5)
    one = next(r for r in records if r["way"] == ONE)
    for r in records:
        # A pair costs the one pass and, where there is one, the refinement.
        times = ("-", "-", "-")
        if "wall" in r:
            first = one if str(r["way"]).startswith(REFINED) else {"seconds": 0.0, "wall": 0.0}
            processor, wall = (tables.number(r[key] + first[key]) for key in ("seconds", "wall"))
            times = (NOT_MEASURED, NOT_MEASURED, wall) if on_gpu else (processor, wall, NOT_MEASURED)
        whose = "ours" if r["way"] in (NOTHING, CEILING) else name
        figures = [tables.number(r[key]) for key in ("dice", "asd", "folding")]
        table.add(f"{whose}: {r['way']}", *figures, *times)
    refined = next(r for r in records if r["way"] == REFINED)
    if others:
        table.notes += [
            tables.aim("Refined Dice", refined["dice"], 0.84),
            tables.aim("One-pass Dice", one["dice"], 0.80),
            tables.aim("Refined folding, %", refined["folding"], 0.5, at_least=False),
            tables.aim("Wall seconds a pair, refined", refined["wall"] + one["wall"], 0.5, at_least=False),
            "The first rows are other tools' Dice on 50 other pairs of this data set, of people that are not in ours: "
            "the starting points (nothing) tell how far the two sets of pairs compare.",
        ]
    elif not options.quick:
        table.notes.append(
            "No figures of other tools stand beside these: those that we know were measured on real scans of two other "
            "people, and these people's contrast is synthetic."
        )
    table.notes += [cohort.origin, "Wall seconds depend on what else the machine does: see its load."]
    return table


# ---- what the distance to the ceiling is made of ----


def gap(name: str, cohort: Cohort, options: Options) -> tuple[list[Table], list[dict[str, Any]]]:
    """The SoI, and the same as the ITN of a model that ships draws them, registered alike: by each kind of transform.

    Both begin at the identity, with an STN that has learned nothing, so that only the maps differ.
    """
    model = _shipped(name, cohort, options)
    if model is None:
        return [_no_weights(name, options)], []
    device, best_way = torch.device(options.device), {REFINED: networks.ceiling(options.quick)}
    pairs, measure = networks.pairs_to_test(cohort, options.pairs), networks.label_figures(cohort, device)
    records: list[dict[str, Any]] = []
    table = Table(
        f"The ceiling, and the maps of {name}'s ITN in its place: {len(pairs)} test pairs of {cohort.name}",
        ("transform", "maps", "Dice", "ASD, mm"),
    )
    for kind in KINDS:
        stages = _recipe(f"{name}-{kind}-explicit", cohort, options, 0).config.stages
        network = networks.untrained(replace(model.network.config, stages=stages))
        network.itn.load_state_dict(model.network.itn.state_dict())
        for maps in (CEILING, DRAWN):
            found = networks.registered(network, cohort, pairs, best_way, measure, device, soi=maps == CEILING)
            records.append({"kind": kind, "maps": maps} | networks.summary(found[REFINED]))
            table.add(KINDS[kind], maps, *(tables.number(records[-1][key]) for key in ("dice", "asd")))
        best, drawn = (r["dice"] for r in records[-2:])
        said = tables.aim(f"{KINDS[kind]}: drawn maps, below the ceiling", best - drawn, GAP_AIM, at_least=False)
        table.notes += [] if options.quick else [said]
    table.notes += [
        f"Both: {networks.ceiling(options.quick).steps} steps on the parameters from the identity, of every voxel; "
        "only the maps differ. What is missing here, no search makes up for.",
        cohort.origin,
    ]
    return [table], records


# ---- parts ----


def part(name: str, options: Options) -> tuple[list[Table], list[dict[str, Any]]]:
    """One part; a sentence in its place where the data are not there."""
    data = {"shipped": "hippocampus", "gap": "hippocampus"}.get(name, name)
    try:
        tiny = Grid((16, 20, 16), (3.0,))
        cohort = networks.stand_in(tiny, people=6) if options.quick else networks.load_cohort(data)
    except FileNotFoundError as error:
        return [_left_out(name, str(error))], []
    if name == "gap":
        return gap(f"istn-{data}", cohort, options)
    if name in ("shipped", "brains"):
        return as_shipped(f"istn-{data}", cohort, options)
    folds = donor_folds(cohort)[: options.folds] if name == "donors" else (cohort,)
    table, records = table_one(name, folds, options)
    return [table], records


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; see the module."""
    options = tyro.cli(Options, args=arguments)
    if min(options.folds, options.pairs, len(options.seeds)) < 1:
        raise ValueError(
            f"Folds, pairs and seeds are 1 or more, but they are {options.folds}, {options.pairs} and "
            f"{len(options.seeds)}."
        )
    torch.set_num_threads(options.threads)
    before = networks.hardware(torch.device(options.device))
    shown: list[Table] = []
    records: list[dict[str, Any]] = []
    for name in options.parts:
        found, rows = part(name, options)
        shown += found
        records += rows
    facts = {"seeds": options.seeds, "quick": options.quick, "hardware": before}
    return tables.report("benchmarks.istn_brains", arguments, options.json, shown, records, facts)


def _recipe(name: str, cohort: Cohort, options: Options, seed: int) -> Recipe:
    changes = {"seed": seed} | ({} if options.steps is None else {"steps": options.steps})
    recipe = networks.find_recipe(name, **changes)
    return networks.small(recipe, cohort) if options.quick else recipe


def _shipped(name: str, cohort: Cohort, options: Options) -> Model | None:
    """A model as its file has it, or None without a file; where it is to be quick, one that has learned nothing."""
    if options.quick:
        recipe = _recipe(name, cohort, options, 0)
        return Model(name, networks.untrained(recipe.config), recipe.refinement)
    path = options.weights / f"{name}{SUFFIX}"
    return load(path) if path.exists() else None


def _no_weights(name: str, options: Options) -> Table:
    return _left_out(name, f"There are no weights {name}{SUFFIX} in {options.weights.name}/.")


def _left_out(name: str, sentence: str) -> Table:
    return Table(f"{name}: left out", (), notes=[sentence])


if __name__ == "__main__":
    tables.command(main)
