"""ISTN on brain slices of people never seen: trained on a dozen, beside other tools.

    python -m benchmarks.istn_slices [--quick] [--json FILE] [--folds N] [--refinements 20 40 80]

Real axial T1 slices, brain-extracted (OASIS-TRT-20), with the cortex of each half as the structures. Leave two out:
each fold trains ``istn-slices`` on all people but four, chooses the best weights on two, and tests on two; over all
folds everybody is tested on once. The recipe and its refinement were chosen on the validation people of the data set's
own split, so folds that test on one of those are told apart. Mean Dice of left and right cortex, labels warped by
nearest voxel; one pass, and refined with the recipe's setting for several numbers of steps.

The ceiling is the SoI itself: the label maps registered by Adam on the parameters of the transform, 800 steps from the
identity, without any training.
Figures of other tools are for people that are not among these, on such slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro

from benchmarks import networks, tables
from benchmarks.networks import Recipe
from benchmarks.tables import NOT_MEASURED, Table
from regteach.data.cohort import Cohort
from regteach.data.slices import slice_folds
from regteach.grid import Grid
from regteach.refinement import Refinement

RECIPE = "istn-slices"
ONE, NOTHING, CEILING = "one pass", "nothing", "SoI itself"
OTHERS = {"nothing": 0.463, "affine": 0.501, "ANTs SyN": 0.628, "greedy": 0.713}  # mean Dice of both
AIM = 0.75
CEILING_STEPS = 800  # with control points 4 mm apart the maps go on approaching each other for long


@dataclass(frozen=True)
class Options(networks.Options):
    """Command line.

    Args:
        folds: so many of them; all where left out.
        refinements: numbers of steps, of which the coarse ones are no part.
        seed: of the trainings.
    """

    folds: int | None = None
    refinements: tuple[int, ...] = (20, 40, 80)
    seed: int = 0


def measured(folds: Sequence[Cohort], options: Options) -> list[dict[str, Any]]:
    """Train or read each fold, register its test pairs; figures over the pairs of all folds, and of each."""
    device = torch.device(options.device)
    parts: list[dict[str, networks.Figures]] = []
    records: list[dict[str, Any]] = []
    for index, fold in enumerate(folds):
        recipe = _recipe(fold, options)
        done = networks.trained(recipe, fold, options.runs)
        pairs, figures = fold.pairs("test"), networks.label_figures(fold, device)
        found = {NOTHING: networks.known(fold, pairs, figures)}
        found |= networks.registered(done.model, fold, pairs, ways(recipe, options), figures, device)
        best = {CEILING: networks.ceiling(options.quick, CEILING_STEPS)}
        found |= networks.registered(networks.untrained(recipe.config), fold, pairs, best, figures, device, soi=True)
        parts.append(found)
        people = [fold.people[i] for i in fold.splits["test"]]
        more = {"fold": index, "people": people, "training_seconds_wall": done.seconds}
        records += [{"way": way} | more | networks.summary(values) for way, values in found.items()]
    return records + [{"way": way, "fold": "all"} | networks.summary(v) for way, v in networks.pooled(parts).items()]


def ways(recipe: Recipe, options: Options) -> dict[str, Refinement | None]:
    """One pass, and refined for each number of steps."""
    steps = (2, 3) if options.quick else options.refinements
    return {ONE: None} | {refined(n): replace(recipe.refinement, steps=n) for n in steps}


def refined(steps: int) -> str:
    """Name of a way."""
    return f"refined, {steps} steps"


def table_of(
    folds: Sequence[Cohort], records: Sequence[dict[str, Any]], options: Options, tuned: Sequence[str]
) -> Table:
    """Other tools, then ours over all folds; ``tuned`` are the people on whom the recipe was chosen."""
    rows = {r["way"]: r for r in records if r["fold"] == "all"}
    on_gpu = torch.device(options.device).type == "cuda"
    split = folds[0].splits
    table = Table(
        f"Brain slices: {rows[ONE]['pairs']} pairs of people never seen, {len(folds)} folds, {len(split['train'])} "
        f"people to train and {len(split['validation'])} to validate in each",
        ("method", "Dice", "between pairs", "lowest fold", "ASD, mm", "folding, %", "s a pair, CPU", "s a pair, GPU"),
    )
    for method, dice in ({} if options.quick else OTHERS).items():
        table.add(method, tables.number(dice), *["-"] * 6)
    for way, r in rows.items():
        lowest = min(each["dice"] for each in records if each["way"] == way and each["fold"] != "all")
        shown = tables.number(r.get("seconds"), 3)
        times = ("-", "-") if "seconds" not in r else (NOT_MEASURED, shown) if on_gpu else (shown, NOT_MEASURED)
        name = f"ours: {way}" if way in (NOTHING, CEILING) else f"{RECIPE}: {way}"
        between = f"± {tables.number(r['dice_sd'])}"
        distance, folding = tables.number(r["asd"], 2), tables.number(r["folding"])
        table.add(name, tables.number(r["dice"]), between, tables.number(lowest), distance, folding, *times)
    if not options.quick:
        table.notes += [*statements(rows), unseen(records, tuned)]
    steps = 3 if options.quick else CEILING_STEPS
    table.notes += [
        folds[0].origin,
        f"s a pair: processor seconds on {torch.get_num_threads()} thread(s), median, of the one pass or of the "
        f"refinement alone. {CEILING}: the label maps, {steps} steps from the "
        "identity, no network. The first rows are other tools' figures on slices of other people.",
    ]
    return table


def statements(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The aim, other tools, the ceiling: worked out from the numbers."""
    notes = []
    for way, r in rows.items():
        if way in (NOTHING, CEILING):
            continue
        above = [name for name, dice in OTHERS.items() if r["dice"] > dice]
        notes.append(
            f"{tables.aim(f'Dice, {way}', r['dice'], AIM)} Above {', '.join(above) or 'none of the other tools'}; "
            f"{rows[CEILING]['dice'] - r['dice']:.3f} below the ceiling."
        )
    return notes


def unseen(records: Sequence[dict[str, Any]], tuned: Sequence[str]) -> str:
    """The figures of the folds that test on nobody on whom the recipe was chosen."""
    folds = [r for r in records if r["fold"] != "all" and not set(tuned) & set(r["people"])]
    dice = {r["way"]: tables.mean([each["dice"] for each in folds if each["way"] == r["way"]]) for r in folds}
    count = len({r["fold"] for r in folds})
    told = ", ".join(f"{way} {tables.number(value)}" for way, value in dice.items())
    return (
        f"The recipe and its refinement were chosen on {' and '.join(tuned)}. Dice over the {count} fold(s) that test "
        f"on neither: {told or 'none'}."
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; see the module."""
    options = tyro.cli(Options, args=arguments)
    if (options.folds is not None and options.folds < 1) or min(options.refinements, default=0) < 1:
        raise ValueError("The number of folds and the numbers of refinement steps are 1 or more.")
    networks.chosen([RECIPE], options.recipes)
    torch.set_num_threads(options.threads)
    before = networks.hardware(torch.device(options.device))
    records: list[dict[str, Any]] = []
    try:
        cohort = networks.stand_in(Grid((32, 40)), people=6) if options.quick else networks.load_cohort("slices")
        # A last fold of one person has no pair.
        every = [replace(cohort, splits=split) for split in slice_folds(cohort)]
        folds = [fold for fold in every if fold.pairs("test")][: options.folds]
        records = measured(folds, options)
        tuned = sorted({cohort.people[i] for i in cohort.splits["validation"]})
        shown = [table_of(folds, records, options, tuned)]
    except FileNotFoundError as error:
        shown = [Table("Brain slices: left out", (), notes=[str(error)])]
    facts = {"seeds": (options.seed,), "quick": options.quick, "hardware": before}
    return tables.report("benchmarks.istn_slices", arguments, options.json, shown, records, facts)


def _recipe(cohort: Cohort, options: Options) -> Recipe:
    changes = {"seed": options.seed} | ({} if options.steps is None else {"steps": options.steps})
    recipe = networks.find_recipe(RECIPE, **changes)
    return networks.small(recipe, cohort) if options.quick else recipe


if __name__ == "__main__":
    tables.command(main)
