"""GeoReg on digits: how much of the motion each level takes, and what it is worth.

    python -m benchmarks.georeg_digits [--quick] [--json FILE] [--steps 200] [--seeds 0 1 2] [--pairs 500]

The paper's MNIST set-up: pairs of different images of the same digit, levels of 28 x 28, 14 x 14 and 7 x 7 points,
16, 32 and 64 channels, windows of 3 x 3. The shipped ``georeg-digits`` on test pairs, one pass and refined; beside it
the same network, its form with linear interpolation between levels, and one whose levels are supervised each for
itself ("within"), all three trained with the same small budget.

What a level adds is the sum of its own steps (the correction of what it inherits, and its deformation), displacements
in mm on its own grid. Its motion is the mean length of that; its share is its motion over the sum of all levels'. The
share of squares does the same with squared lengths, which large motions rule. Dice is that of the foreground (grey
value above one half), labels warped by nearest pixel, as everywhere.

Source: Sideri-Lampretsa et al., arXiv 2412.13294, section 4.1, which shows pictures and gives no numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks import networks, tables
from benchmarks.networks import Figures, Recipe
from benchmarks.tables import Table, mean, number
from regteach import metrics
from regteach.checkpoints import load
from regteach.data.cohort import Cohort
from regteach.grid import Grid
from regteach.nets.georeg import GeoRegConfig
from regteach.nets.istn import count_parameters, parameters_by_part
from regteach.refinement import Refinement, refine
from regteach.result import Result, after_each
from regteach.sampling import warp
from regteach.transforms import Identity, Transform, jacobian_determinant

RECIPE = "georeg-digits"
ONE, REFINED = "one pass", "refined"
SAME = "same network"
FORMS: dict[str, dict[str, str]] = {  # what is trained with the small budget, and how its configuration differs
    SAME: {},
    "linear interpolation": {"interpolation": "linear"},
    "supervised within levels": {"supervision": "within"},
}
BATCH, TOGETHER = 8, 50  # pairs a training step; pairs registered at a time


@dataclass(frozen=True)
class Options(networks.Options):
    """Command line.

    Args:
        steps: of the trainings with the small budget.
        seeds: of those trainings.
        pairs: test pairs, at most.
        refined_pairs: of these, so many are refined, too.
        weights: the shipped model, or the file of another.
    """

    steps: int | None = 200
    seeds: tuple[int, ...] = (0, 1, 2)
    pairs: int = 500
    refined_pairs: int = 100
    weights: str = RECIPE


# ---- what is measured ----


def added(result: Result) -> dict[int, Tensor]:
    """What each level adds: the sum of its own steps, ``b *grid d``, mm, by the side of its grid, coarse to fine."""
    levels: dict[int, Tensor] = {}
    for step in result.steps:
        side = step.parameters.shape[1]
        levels[side] = levels.get(side, 0) + step.parameters.detach()
    return levels


def after_levels(result: Result) -> dict[int, Transform]:
    """The transform after the last step of each level, by the side of its grid, coarse to fine."""
    sides = [step.parameters.shape[1] for step in result.steps]
    return dict(zip(sides, after_each(result.steps), strict=True))


def shares(motion: Mapping[int, float]) -> dict[int, float]:
    """Each level's part of the sum, in percent; nan where nothing moves."""
    whole = sum(motion.values())
    return {side: 100 * value / whole if whole else float("nan") for side, value in motion.items()}


@torch.no_grad()
def overlap_and_folding(
    cohort: Cohort, pairs: networks.Pairs, transform: Transform, device: torch.device
) -> dict[str, list[float]]:
    """Dice, mean over the structures, and folding of each pair of a batch."""
    moving, fixed = (list(side) for side in zip(*pairs, strict=True))
    labels = cohort.labels[moving][:, None].float().to(device)
    warped = warp(labels, transform, cohort.grid, order=0, padding="zeros").round().long().cpu()
    overlap = metrics.dice(warped, cohort.labels[fixed][:, None], labels=cohort.structures)
    det = jacobian_determinant(transform, cohort.grid).expand(len(pairs), *cohort.grid.shape)
    return {
        "dice": metrics.mean_over_labels(overlap).tolist(),
        "folding": metrics.folding_percent(det).tolist(),
    }


def figures_by_level(
    network: Any, cohort: Cohort, pairs: networks.Pairs, device: torch.device, refinement: Refinement | None = None
) -> dict[int, Figures]:
    """One number a pair, for each level: "motion" (mm) and "square" (mm^2) that it adds, "dice" and "folding" after it.

    Level 0 is before the first: no motion, and the overlap as it was.

    Args:
        network: takes moving, fixed, grid.
        cohort: of the images and labels.
        pairs: (moving, fixed).
        device: where to compute.
        refinement: after the one pass; none for the one pass alone. It works on the whole, not on levels: there is then
            one level only, the finest, without a motion of its own.
    """
    network, found = network.to(device), dict[int, Figures]()
    for first in range(0, len(pairs), TOGETHER):
        batch = pairs[first : first + TOGETHER]
        moving, fixed = (list(side) for side in zip(*batch, strict=True))
        with torch.no_grad():
            result = network(cohort.images[moving].to(device), cohort.images[fixed].to(device), cohort.grid)
        if refinement is not None:
            result = refine(network, result, cohort.grid, refinement).result
        still = {"motion": [0.0] * len(batch), "square": [0.0] * len(batch)}
        rows = {0: still | overlap_and_folding(cohort, batch, Identity(cohort.grid.dim), device)}
        if refinement is None:
            own, there = added(result), after_levels(result)
        else:
            own, there = {}, {cohort.grid.shape[0]: result.transform}
        for side, transform in there.items():
            rows[side] = _motion(own.get(side), len(batch)) | overlap_and_folding(cohort, batch, transform, device)
        for side, row in rows.items():
            for key, values in row.items():
                found.setdefault(side, {}).setdefault(key, []).extend(values)
    return found


def _motion(own: Tensor | None, pairs: int) -> dict[str, list[float]]:
    """Mean length of displacements ``b *grid d``, and mean square; not a number where there are none."""
    if own is None:
        return {"motion": [math.nan] * pairs, "square": [math.nan] * pairs}
    lengths = own.norm(dim=-1).flatten(1)
    return {"motion": lengths.mean(1).tolist(), "square": lengths.square().mean(1).tolist()}


def record(levels: Mapping[int, Figures]) -> dict[str, Any]:
    """Means over the pairs; "level" has those of each level, coarse to fine, with its shares, %."""
    means = {side: {key: mean(values) for key, values in figures.items()} for side, figures in levels.items()}
    sides = [side for side in means if side]
    by_length = shares({side: means[side]["motion"] for side in sides})
    by_square = shares({side: means[side]["square"] for side in sides})
    last = sides[-1]
    return {
        "pairs": len(levels[last]["dice"]),
        "dice_before": means[0]["dice"],
        "dice": means[last]["dice"],
        "dice_sd": tables.spread(levels[last]["dice"]),
        "folding": means[last]["folding"],
        "level": {
            side: means[side] | {"share": by_length[side], "share_of_squares": by_square[side]} for side in sides
        },
    }


# ---- what is trained ----


def small_budget(form: str, seed: int, cohort: Cohort, options: Options) -> Recipe:
    """The recipe in one of its forms, with fewer and smaller steps."""
    changes = FORMS[form]
    recipe = networks.find_recipe(RECIPE, batch=BATCH, seed=seed, validate_every=100)
    if options.steps is not None:
        recipe = replace(recipe, settings=replace(recipe.settings, steps=options.steps))
    config: Any = recipe.config
    recipe = replace(recipe, config=replace(config, **changes))
    return _small(recipe, cohort) if options.quick else recipe


def trained_rows(cohort: Cohort, pairs: networks.Pairs, options: Options) -> list[dict[str, Any]]:
    """Train or read every form and seed, and measure it in one pass."""
    device, rows = torch.device(options.device), []
    for form in FORMS:
        for seed in options.seeds:
            recipe = small_budget(form, seed, cohort, options)
            done = networks.trained(recipe, cohort, options.runs)
            row = {"model": form, "way": ONE, "seed": seed, "steps": recipe.settings.steps}
            row |= {"parameters": count_parameters(done.model), "training_seconds_wall": done.seconds}
            rows.append(row | record(figures_by_level(done.model, cohort, pairs, device)))
    return rows


def shipped_rows(cohort: Cohort, pairs: networks.Pairs, options: Options) -> list[dict[str, Any]]:
    """The shipped model in one pass on all pairs; in one pass and refined on the first of them."""
    device = torch.device(options.device)
    if options.quick:  # nothing that ships fits the stand-in
        recipe = small_budget(SAME, 0, cohort, options)
        network, refinement = networks.trained(recipe, cohort, options.runs).model, recipe.refinement
    else:
        model = load(options.weights)
        network, refinement = model.network, model.refinement
    head = {"model": RECIPE, "parameters": count_parameters(network)}
    head |= {"parameters_by_part": parameters_by_part(network)}
    few = pairs[: options.refined_pairs]
    ways = ((ONE, pairs, None), (f"{ONE}, fewer pairs", few, None), (REFINED, few, refinement))
    return [
        head | {"way": way} | record(figures_by_level(network, cohort, chosen, device, settings))
        for way, chosen, settings in ways
    ]


# ---- what is shown ----


def level_table(row: Mapping[str, Any], cohort: Cohort) -> Table:
    """The shipped model, level by level."""
    table = Table(
        f"{RECIPE}, level by level: {row['pairs']} pairs of test images, one pass",
        ("after level", "Dice", "folding, %", "motion it adds, mm", "share of motion, %", "share of squares, %"),
    )
    table.add("before", number(row["dice_before"]), *["-"] * 4)
    for side, level in row["level"].items():
        cells = (number(level["dice"]), number(level["folding"], 2), number(level["motion"]))
        table.add(f"{side} x {side}", *cells, number(level["share"], 1), number(level["share_of_squares"], 1))
    table.notes += [cohort.origin, _gained(row)]
    return table


def model_table(rows: Sequence[Mapping[str, Any]], options: Options) -> Table:
    """All models beside each other: means over the seeds, and their spread where there are several."""
    sides = list(rows[0]["level"])
    table = Table(
        f"The small budget: {rows[-1]['steps']} steps of {2 if options.quick else BATCH} pairs",
        ("model", "way", "parameters", "pairs", "Dice", "folding, %", *(f"share at {s}, %" for s in sides)),
    )
    for model, way in dict.fromkeys((r["model"], r["way"]) for r in rows):
        same = [r for r in rows if (r["model"], r["way"]) == (model, way)]
        cells = [
            tables.over_seeds([r["dice"] for r in same], 3),
            tables.over_seeds([r["folding"] for r in same], 2),
            *(tables.over_seeds([r["level"].get(side, {}).get("share", math.nan) for r in same], 1) for side in sides),
        ]
        table.add(model, way, f"{same[0]['parameters']:,}", str(same[0]["pairs"]), *cells)
    means = {form: mean([r["dice"] for r in rows if r["model"] == form]) for form in FORMS}
    seeds = f"mean ± standard deviation over {len(options.seeds)} seeds" if len(options.seeds) > 1 else "one seed"
    table.notes += [
        f"{RECIPE}. {tables.in_parts(rows[0]['parameters_by_part'])}",
        f"Dice with the small budget, {seeds}: {tables.ranked(means)}.",
        "Refinement turns the whole, so no level has a share of it.",
        f"{RECIPE} was trained for longer and with larger batches: compare the last {len(FORMS)} rows with each other.",
    ]
    return table


def _gained(row: Mapping[str, Any]) -> str:
    """Which level brings how much of the Dice."""
    before, parts = row["dice_before"], []
    for side, level in row["level"].items():
        parts.append(f"{level['dice'] - before:+.3f} at {side} x {side}")
        before = level["dice"]
    return f"Dice gained: {', '.join(parts)}."


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; see the module."""
    options = tyro.cli(Options, args=arguments)
    if min(options.pairs, options.refined_pairs, len(options.seeds), options.steps or 1) < 1:
        raise ValueError("The numbers of pairs, seeds and steps are 1 or more.")
    networks.chosen([RECIPE], options.recipes)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    facts = {"seeds": options.seeds, "quick": options.quick, "hardware": networks.hardware(device)}
    rows: list[dict[str, Any]] = []
    try:
        cohort = networks.stand_in(Grid((28, 28))) if options.quick else networks.load_cohort("digits")
        pairs = networks.pairs_to_test(cohort, options.pairs)
        rows = shipped_rows(cohort, pairs, options) + trained_rows(cohort, pairs, options)
        shown = [level_table(rows[0], cohort), model_table(rows, options)]
    except FileNotFoundError as error:
        shown = [Table("Digits: left out", (), notes=[str(error)])]
    return tables.report("benchmarks.georeg_digits", arguments, options.json, shown, rows, facts)


def _small(recipe: Recipe, cohort: Cohort) -> Recipe:
    """The same recipe on a stand-in: a narrow network, two steps."""
    config: Any = recipe.config
    if not isinstance(config, GeoRegConfig):
        raise TypeError("The recipe of this benchmark is that of a GeoReg.")
    return replace(
        recipe,
        data=cohort.name,
        config=replace(config, grid=cohort.grid, widths=(4, 4, 8)),
        settings=replace(recipe.settings, steps=2, batch=2, validate_every=1),
        refinement=replace(recipe.refinement, steps=3),
    )


if __name__ == "__main__":
    tables.command(main)
