"""ISTN on the authors' toy data: how well, and how fast, beside their own code?

    python -m benchmarks.istn_trees [--quick] [--json FILE] [--seeds 0 1 2] [--recipes affine-explicit ...]

The 110 pairs of synth2d: 80 to train, 20 of the authors' 100 training pairs to validate, their 10 to test. Each of the
four variants, with an affine and with an affine followed by a B-spline, over several seeds; one pass, refined by
turning the transform's parameters (the recipe's setting), and refined as in the paper by turning the network's weights.

Measured on the test pairs, all of them against the exact transforms that ship with the images:

- Dice at half maximum: the tree's soft map, warped linearly, is above half its maximum (strictly), against the fixed
  tree's;
- ASD as the authors define it: from every pixel of one tree to the other tree, 0 where they overlap, mean of both ways;
- TRE over the pixels of the fixed tree; folding over all pixels; processor seconds, median over the pairs.

The reference's figures are those of the authors' code, affine, one seed, default settings, on the same ten pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import tyro
from scipy import ndimage

from benchmarks import networks, tables
from benchmarks.networks import KINDS, MODELS, CohortTask, Recipe
from benchmarks.tables import NOT_MEASURED, Table
from regteach import metrics, objectives
from regteach.data.trees import Trees, generate_trees
from regteach.nets.istn import public
from regteach.refinement import Refinement, refine
from regteach.sampling import warp
from regteach.transforms import Transform, jacobian_determinant

WEIGHTS = Refinement(50, "weights", 3e-4)  # as the paper does it
ONE, PARAMETERS, BY_WEIGHTS = "one pass", "refined, parameters", "refined, weights"
# Authors' code, affine: Dice, ASD and TRE in pixels; one pass, and refined.
REFERENCE = {
    "identity": {ONE: (0.662, 1.435, 9.84)},
    "true affine": {ONE: (0.994, 0.015, 0.0)},
    "STN-u": {ONE: (0.783, 0.642, 5.38), "refined": (0.822, 0.459, 4.75)},
    "STN-s": {ONE: (0.865, 0.272, 3.42), "refined": (0.824, 0.444, 4.83)},
    "ISTN-e": {ONE: (0.882, 0.203, 2.52), "refined": (0.960, 0.053, 1.03)},
    "ISTN-i": {ONE: (0.886, 0.189, 2.46), "refined": (0.952, 0.064, 1.27)},
}
# Seconds on one thread of a quiet machine, authors' code: a training step (a tenth of an epoch), a pair, one pass.
REFERENCE_STEP = (0.30, 0.36)
REFERENCE_REFINED = "0.33 to 0.39 (1.2 to 1.8 as written)"
REFERENCE_PASS = "0.002 to 0.008"
BATCH = 10
TRE_AIM = 0.7  # px
REFINED_AIM = 0.3  # s a pair
STEP_AIM = 1.5  # times as fast


@dataclass(frozen=True)
class Options(networks.Options):
    """Command line.

    Args:
        seeds: of the trainings.
        parts: accuracy trains and measures; times needs no training.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    parts: tuple[Literal["accuracy", "times"], ...] = ("accuracy", "times")


def tree_figures(trees: Trees, device: torch.device) -> networks.PairFigures:
    """Dice at half maximum, the authors' ASD (pixels), TRE (mm, which are pixels), folding."""

    @torch.no_grad()
    def measure(moving: int, fixed: int, transform: Transform) -> dict[str, float]:
        warped = warp(trees.soi[[moving]].to(device), transform, trees.grid, padding="zeros").cpu() > 0.5
        there = trees.tree[[fixed]][:, None]
        points = trees.points(fixed)[None]
        exact = trees.truth(moving, fixed)(points)
        error = metrics.target_registration_error(transform, points.to(device), exact.to(device))
        return {
            "dice": float(metrics.dice(warped.long(), there.long(), [1])[1]),
            "asd": authors_asd(warped[0, 0].numpy(), there[0, 0].numpy()),
            "tre": float(error.mean()),
            "folding": float(metrics.folding_percent(jacobian_determinant(transform, trees.grid))),
        }

    return measure


def authors_asd(a: Any, b: Any) -> float:
    """Mean distance of the pixels of each mask to the other mask, mean of both ways; inf if one is empty."""
    if not (a.any() and b.any()):
        return float("inf")
    to_a, to_b = ndimage.distance_transform_edt(~a), ndimage.distance_transform_edt(~b)
    return float(0.5 * (to_b[a].mean() + to_a[b].mean()))


def accuracy(trees: Trees, options: Options) -> tuple[list[Table], list[dict[str, Any]]]:
    """Train or read each recipe at each seed, and register the test pairs."""
    device = torch.device(options.device)
    pairs, figures = trees.pairs("test"), tree_figures(trees, device)
    records: list[dict[str, Any]] = []
    for name, given in (("identity", None), ("true affine", trees.truth)):
        found = networks.known(trees, pairs, tree_figures(trees, torch.device("cpu")), given)
        records.append({"model": name, "kind": "", "way": ONE, "seed": None} | networks.summary(found))
    for recipe in recipes(trees, options):
        done = networks.trained(recipe, trees, options.runs)
        ways = {ONE: None, PARAMETERS: recipe.refinement, BY_WEIGHTS: WEIGHTS}
        if options.quick:
            ways[BY_WEIGHTS] = replace(WEIGHTS, steps=2)
        kind = next(kind for kind in KINDS if f"-{kind}-" in recipe.name)
        for way, found in networks.registered(done.model, trees, pairs, ways, figures, device).items():
            records.append(
                {"recipe": recipe.name, "model": MODELS[recipe.variant], "kind": kind, "way": way}
                | {"seed": recipe.settings.seed, "training_seconds_wall": done.seconds, "best_step": done.best["step"]}
                | networks.summary(found)
            )
    return [accuracy_table(trees, records, compare=not options.quick)], records


def recipes(trees: Trees, options: Options) -> list[Recipe]:
    """What is to be trained: every recipe of the trees, with the authors' data, at every seed."""
    names = [f"istn-trees-{kind}-{variant}" for kind in KINDS for variant in MODELS]
    found = []
    for name in networks.chosen(names, options.recipes):
        for seed in options.seeds:
            changes = {"seed": seed} | ({} if options.steps is None else {"steps": options.steps})
            recipe = replace(networks.find_recipe(name, **changes), data=trees.name)
            found.append(networks.small(recipe, trees) if options.quick else recipe)
    return found


def accuracy_table(trees: Trees, records: Sequence[dict[str, Any]], compare: bool) -> Table:
    """A row for each kind, model and way: mean and spread over the seeds, beside the reference if that compares."""
    seeds = sorted({r["seed"] for r in records if r["seed"] is not None})
    count = len(trees.pairs("test"))
    table = Table(
        f"Trees of {trees.name}: {count} test pairs, mean ± standard deviation over {len(seeds)} seeds",
        ("transform", "model", "way", "Dice", "ASD, px", "TRE, px", "folding, %", "s a pair",
         "reference Dice", "reference ASD", "reference TRE"),
    )  # fmt: skip
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in records:
        groups.setdefault((r["kind"], r["model"], r["way"]), []).append(r)
    for (kind, model, way), rows in groups.items():
        known = REFERENCE.get(model, {}) if compare and kind in ("", "affine") else {}
        theirs = known.get(way if way == ONE else "refined", (None,) * 3)
        table.add(
            KINDS.get(kind, ""), model, way if kind else "",
            *(
                tables.over_seeds([r[key] for r in rows if key in r], digits)
                for key, digits in (("dice", 3), ("asd", 3), ("tre", 2), ("folding", 2), ("seconds", 3))
            ),
            *(tables.number(value, digits) for value, digits in zip(theirs, (3, 3, 2), strict=True)),
        )  # fmt: skip
    table.notes += statements(records, compare)
    table.notes.append(
        "s a pair: processor seconds of the one pass, or of the refinement alone, metrics outside. Parameters: the "
        f"recipe's refinement; weights: {WEIGHTS.steps} steps at rate {WEIGHTS.rate:g}. B-spline: an affine and then a "
        "B-spline; the reference has affine figures only, from one seed, refined by weights."
    )
    return table


def statements(records: Sequence[dict[str, Any]], compare: bool = True) -> list[str]:
    """What the numbers say, worked out from them: ranks, seeds that agree, what refinement changes, aims."""
    notes = []
    for kind in KINDS:
        for way in (ONE, PARAMETERS, BY_WEIGHTS):
            rows = [r for r in records if r["kind"] == kind and r["way"] == way]
            by_model = {m: {r["seed"]: r for r in rows if r["model"] == m} for m in MODELS.values()}
            by_model = {model: found for model, found in by_model.items() if found}
            if len(by_model) < 2:
                continue
            scores = {m: {seed: r["dice"] for seed, r in found.items()} for m, found in by_model.items()}
            seeds = sorted(set.intersection(*(set(found) for found in by_model.values())))
            note = f"Rank by Dice, {KINDS[kind]}, {way}: {tables.ranked_over_seeds(scores)}."
            if len(by_model) == len(MODELS):
                above = sum(
                    min(by_model[m][s]["dice"] for m in ("ISTN-e", "ISTN-i"))
                    > max(by_model[m][s]["dice"] for m in ("STN-u", "STN-s"))
                    for s in seeds
                )
                note += f" Both ISTN above both STN in {above} of {len(seeds)}."
            notes.append(note)
        notes += _changes(records, kind)
    return notes + against_reference(records) if compare else notes


def against_reference(records: Sequence[dict[str, Any]]) -> list[str]:
    """Each refined ISTN beside the authors' refined ISTN-e, and the aim for TRE."""
    best = REFERENCE["ISTN-e"]["refined"]
    notes: list[str] = []
    for kind, model, way in [(k, m, w) for k in KINDS for m in ("ISTN-e", "ISTN-i") for w in (PARAMETERS, BY_WEIGHTS)]:
        rows = [r for r in records if (r["kind"], r["model"], r["way"]) == (kind, model, way)]
        if rows:
            dice, asd, tre = (_mean(rows, key) for key in ("dice", "asd", "tre"))
            beaten = (dice > best[0], asd < best[1], tre < best[2])
            parts = [
                f"{name} {value:.{digits}f} {'beats it' if better else 'does not'}"
                for name, value, digits, better in zip(("Dice", "ASD", "TRE"), (dice, asd, tre), (3, 3, 2), beaten,
                                                       strict=True)
            ]  # fmt: skip
            reached = "reached" if tre <= TRE_AIM else "missed"
            notes.append(
                f"{model}, {KINDS[kind]}, {way}: {', '.join(parts)}; the aim for TRE, {TRE_AIM} px, is {reached}."
            )
    goal = f"To beat: the authors' refined ISTN-e, Dice {best[0]:.3f}, ASD {best[1]:.3f}, TRE {best[2]:.2f} px."
    return [goal, *notes] if notes else []


def _changes(records: Sequence[dict[str, Any]], kind: str) -> list[str]:
    parts = []
    for model in MODELS.values():
        rows = {w: [r for r in records if (r["kind"], r["model"], r["way"]) == (kind, model, w)]
                for w in (ONE, PARAMETERS, BY_WEIGHTS)}  # fmt: skip
        if rows[ONE]:
            steps = [_mean(rows[w], "dice") - _mean(rows[ONE], "dice") for w in (PARAMETERS, BY_WEIGHTS) if rows[w]]
            parts.append(f"{model} {' / '.join(f'{step:+.3f}' for step in steps)}")
    if not parts:
        return []
    return [f"What refinement adds to Dice, {KINDS[kind]}, parameters / weights: {', '.join(parts)}."]


def times(trees: Trees, options: Options) -> tuple[list[Table], list[dict[str, Any]]]:
    """A training step and a refinement: the public architecture at its own size, and our recipes."""
    device = torch.device(options.device)
    variant = networks.find_recipe("istn-trees-affine-implicit")
    bare = replace(variant, data=trees.name, bending=0.0, augmentation=type(variant.augmentation)())
    spline = networks.find_recipe("istn-trees-bspline-implicit")
    cases: list[tuple[str, Recipe]] = [
        ("public affine ISTN-i", replace(bare, name="public", config=public(trees.grid, "affine"))),
        ("our affine ISTN-i", networks.small(variant, trees) if options.quick else variant),
        ("our B-spline ISTN-i", networks.small(spline, trees) if options.quick else spline),
    ]
    rounds, count = (2, 2) if options.quick else (12, BATCH)
    size = " x ".join(map(str, trees.grid.shape))
    on_gpu, compared = device.type == "cuda", trees.grid.shape == (128, 128)
    table = Table(
        f"Times at {size} pixels, median of {rounds}",
        ("what", "network", f"seconds, CPU ({torch.get_num_threads()} threads)", "seconds, GPU", "authors' code"),
    )
    records: list[dict[str, Any]] = []

    def add(what: str, network: str, seconds: float, theirs: str) -> None:
        shown = tables.number(seconds, 4)
        table.add(what, network, *((NOT_MEASURED, shown) if on_gpu else (shown, NOT_MEASURED)), theirs)
        records.append({"what": what, "network": network, "seconds": seconds, "device": device.type})

    for name, recipe in cases:
        step = f"{REFERENCE_STEP[0]:.2f} to {REFERENCE_STEP[1]:.2f}" if compared and recipe.name == "public" else "-"
        add(f"training step, batch {count}", name, step_seconds(recipe, trees, count, rounds, device), step)
    for name, recipe in cases:
        model = networks.untrained(recipe.config).to(device)
        images = trees.images[[trees.pairs("test")[0][k] for k in (0, 1)]].to(device)

        def once(model: Any = model, images: torch.Tensor = images) -> Any:
            with torch.no_grad():
                return model(images[:1], images[1:], trees.grid)

        theirs = compared and recipe.name == "public"
        add("one pass, a pair", name, median_seconds(once, rounds, device), REFERENCE_PASS if theirs else "-")
        for mode in ("parameters", "weights"):
            settings = replace(recipe.refinement, mode=mode, steps=2 if options.quick else 50, patience=0)
            result = once()
            turn = partial(refine, model, result, trees.grid, settings)
            seconds = median_seconds(turn, max(2, rounds // 3), device)
            add(f"refinement, {settings.steps} steps, {mode}", name, seconds, REFERENCE_REFINED if theirs else "-")
    if compared:
        table.notes += speed(records)
    return [table], records


def speed(records: Sequence[dict[str, Any]]) -> list[str]:
    """The public architecture's times beside the authors'."""
    rows = {r["what"]: r["seconds"] for r in records if r["network"].startswith("public")}
    step = next(seconds for what, seconds in rows.items() if what.startswith("training"))
    low, high = (theirs / step for theirs in REFERENCE_STEP)
    return [
        f"A training step of the public architecture takes {step:.3f} s here and {REFERENCE_STEP[0]:.2f} to "
        f"{REFERENCE_STEP[1]:.2f} s in the authors' code: {low:.2f} to {high:.2f} times as fast; the aim, "
        f"{STEP_AIM} times, is {'reached' if low >= STEP_AIM else 'missed' if high < STEP_AIM else 'in between'}.",
        *(
            tables.aim(f"Seconds of a {what} (public architecture)", seconds, REFINED_AIM, at_least=False)
            for what, seconds in rows.items()
            if what.startswith("refinement")
        ),
        "A step is forward, loss, backward and Adam in float32, the batch drawn beforehand. The authors' times are "
        f"those of an epoch of ten steps of batch {BATCH}, on one thread of a quiet machine, maybe of another kind.",
    ]


def step_seconds(recipe: Recipe, trees: Trees, count: int, rounds: int, device: torch.device) -> float:
    """Median seconds of a training step: forward, loss, backward, Adam; drawing the batch is left out."""
    torch.manual_seed(0)
    model = CohortTask(recipe, trees).build().to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    pairs = [trees.pairs("train")[k % len(trees.pairs("train"))] for k in range(count)]
    sides = [[pair[k] for pair in pairs] for k in (0, 1)]
    images = (trees.images[sides[0]].to(device), trees.images[sides[1]].to(device))
    soi = (trees.soi[sides[0]].to(device), trees.soi[sides[1]].to(device))

    def step() -> None:
        optimiser.zero_grad()
        found = model(*images, trees.grid)
        terms = objectives.istn(recipe.variant, found, images, soi, trees.grid, recipe.bending, recipe.coarsen)
        objectives.total(terms).mean().backward()
        optimiser.step()

    return median_seconds(step, rounds, device)


def median_seconds(compute: Any, rounds: int, device: torch.device) -> float:
    """Median time of a computation, after one that warms up."""
    compute()
    taken = sorted(networks.timed(compute, device)[1]["seconds"] for _ in range(rounds))
    return 0.5 * (taken[(rounds - 1) // 2] + taken[rounds // 2])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; see the module."""
    options = tyro.cli(Options, args=arguments)
    torch.set_num_threads(options.threads)
    before = networks.hardware(torch.device(options.device))
    shown: list[Table] = []
    records: list[dict[str, Any]] = []
    sets: dict[str, Trees] = {}
    if options.quick:
        sets["accuracy"] = sets["times"] = generate_trees(train=4, validation=2, test=2, size=64)
    else:
        try:
            sets["accuracy"] = sets["times"] = networks.load_cohort("synth2d")  # type: ignore[assignment]
        except FileNotFoundError as error:
            shown.append(Table("Trees of synth2d: left out", (), notes=[str(error)]))
            sets["times"] = generate_trees(train=BATCH, validation=1, test=1)  # for times, any image will do
    for part, measure in (("accuracy", accuracy), ("times", times)):
        if part in options.parts and part in sets:
            found, rows = measure(sets[part], options)
            shown += found
            records += rows
    facts = {"seeds": options.seeds, "quick": options.quick, "hardware": before}
    return tables.report("benchmarks.istn_trees", arguments, options.json, shown, records, facts)


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return tables.mean([r[key] for r in rows])


if __name__ == "__main__":
    tables.command(main)
