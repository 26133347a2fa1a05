"""The keypoint model on breathing thoraces: drawn patients that it has never seen, and a real CT that is moved.

    python -m benchmarks.kernel_thorax [--quick] [--json FILE] [--parts phantom ct] [--steps 20] [--patients 4]

Parts:

- phantom: unseen drawn patients on 112 x 96 x 112 voxels of 3 mm; ``kernel-thorax`` in one pass, and refined; beside it
  an affine with B-splines, optimised on the pair. Landmarks are the forks of the vessels, exact.
- ct: a real CT and itself moved by a drawn motion; landmarks are random points of the lungs, exact.
- resolutions: the first of these patients drawn at other spacings. Windows of the search are counted in voxels, so at
  2 mm they reach less far.
- switches: the shipped weights, asked with another K or one scale; and what each scale adds. Nothing is trained.
- ablation: the paper's table. Features are those of the shipped model, the same for every form and not trained; what
  makes a field of the matches is trained from its start, each form with the same few steps, and kept in ``--runs``.

What is measured: see ``thorax_pairs``; figures are means over the patients. Seconds and peak memory are those of the
one pass, or of the refinement alone; the dense field is part of both. Seconds are processor seconds on a CPU.

Source of the paper's numbers: Fogarollo et al., Implicit Deformable Medical Image Registration with Learnable Kernels,
MICCAI 2025, real CT pairs of NLST: the differences can be compared, the numbers can not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks import networks, tables
from benchmarks.harness import PeakMemory, hardware, timed
from benchmarks.pairwise import Optimisation, optimised
from benchmarks.tables import Table, mean, number
from benchmarks.thorax_forms import FORMS, FULL, NO_FEATURES, RECIPE, changed, trained
from benchmarks.thorax_pairs import SMALL_TREES, Pair, Prepared, Row, drawn, moved_ct, row, stand_in_scan
from regteach import keypoint_task
from regteach.affine import AffineBounds
from regteach.checkpoints import Model, available, load, network
from regteach.data.thorax import ADULT, ThoraxConfig, thorax_grid
from regteach.data.thorax_ct import load_thorax_ct
from regteach.nets.istn import count_parameters
from regteach.nets.keypoint_kernel import ONE, KeypointKernel, KeypointKernelConfig
from regteach.recipes import find_recipe
from regteach.refinement import Refinement, refine
from regteach.transforms import Dense, Identity, displacement

SHIPPED, UNTRAINED = RECIPE, "untrained network"
MISSING = f"The weights {SHIPPED} do not ship with this version, so the network is untrained, and named so."
MAIN_MM = 3.0  # 112 x 96 x 112 voxels
NOTHING, EXACT, ONE_PASS, REFINED = "nothing", "the exact motion", "one pass", "refined"
AFFINE, SPLINES = "affine, optimised", "affine and B-splines, optimised"
MOST_SECONDS, MOST_MB = 60.0, 2000.0
CLASSICAL = Optimisation("local_ncc", AffineBounds(30.0, 10.0, 1.4, 45.0, 0.1), 32.0, 1.0, (4,), (4, 2))
SPLITS = {"train": 4, "validation": 1, "test": 2}  # patients of the ablation, of keypoint_task's
Part = Literal["phantom", "ct", "resolutions", "switches", "ablation"]


@dataclass(frozen=True)
class Options:
    """Command line.

    Args:
        quick: small images and networks, two steps each: shows that it runs, and nothing else.
        json: also write the numbers to this file, and the tables beside it as markdown.
        parts: of the benchmark.
        patients: unseen ones, at most.
        few: so many of them are also refined, registered by B-splines, and asked otherwise.
        coarsen: refinement compares averages over cubes of this many voxels: 2 is eight times cheaper than 1.
        resolutions: other spacings, mm.
        neighbours: K.
        steps: of each training of the ablation, one item each.
        runs: folder of these trainings, finished or not.
        weights: the shipped model, or the file of another.
        device: where to measure; trainings take a GPU where there is one.
        threads: of torch on the CPU; one is the steadiest where other programs run.
    """

    quick: bool = False
    json: Path | None = None
    parts: tuple[Part, ...] = ("phantom", "ct", "resolutions", "switches", "ablation")
    patients: int = 4
    few: int = 2
    coarsen: int = 2
    resolutions: tuple[float, ...] = (4.0, 2.0)
    neighbours: tuple[int, ...] = (10, 20, 30, 50)
    steps: int = 20
    runs: Path = Path("build/runs")
    weights: str = SHIPPED
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 1


# ---- what is measured ----


def costed(compute: Callable[[], Any], device: torch.device) -> tuple[Any, dict[str, float]]:
    """What it computes; seconds and peak memory."""
    with PeakMemory(device) as memory:
        found, spent = timed(compute, device)
    return found, spent | {"peak_mb": memory.peak_mb}


def model_rows(model: Model, pair: Pair, refinement: Refinement | None, device: torch.device) -> list[Row]:
    """One pass; and refined, where it is said how."""

    def once() -> Any:
        with torch.no_grad():
            return model.network(pair.moving.to(device), pair.fixed.to(device), pair.grid)

    def again() -> Dense:
        transform = refine(model.network, result, pair.grid, refinement).result.transform
        with torch.no_grad():
            return Dense(displacement(transform, pair.grid), pair.grid)

    result, cost = costed(once, device)
    count = {"keypoints": result.steps[0].parameters.shape[1]}
    rows = [row(pair, f"{model.name}, {ONE_PASS}", result.transform, **cost, **count)]
    if refinement is not None:
        transform, cost = costed(again, device)
        rows.append(row(pair, f"{model.name}, {REFINED}", transform, **cost, **count))
    return rows


def classical_rows(pair: Pair, how: Optimisation, device: torch.device) -> list[Row]:
    """An affine, and an affine with B-splines, by the engine of refinement."""
    images = pair.moving.to(device), pair.fixed.to(device)
    rows = []
    for name, splines in ((AFFINE, False), (SPLINES, True)):
        found, cost = costed(partial(optimised, *images, pair.grid, how, splines), device)
        rows.append(row(pair, name, Dense(displacement(found, pair.grid).detach(), pair.grid), **cost))
    return rows


def known_rows(pair: Pair) -> list[Row]:
    """Nothing is done; and the exact motion."""
    return [row(pair, NOTHING, Identity(pair.grid.dim)), row(pair, EXACT, pair.transform)]


def switch_rows(model: Model, pairs: Sequence[Pair], neighbours: Sequence[int], device: torch.device) -> list[Row]:
    """The same weights after each scale, with one scale, with other K."""
    rows = []
    for prepared in (Prepared.of(model, pair, device) for pair in pairs):
        with torch.no_grad():
            every = prepared.fields(model.network)
        rows += [prepared.row(f"after scale {k} of {len(every)}", f) for k, f in enumerate(every, start=1)]
        switches: dict[str, dict[str, Any]] = {f"K = {k}": {"neighbours": k} for k in neighbours}
        for name, changes in ({"one scale": {"scales": ONE}} | switches).items():
            other = KeypointKernel(changed(model.network.config, **changes)).to(device).eval()
            other.load_state_dict(model.network.state_dict())
            with torch.no_grad():
                rows.append(prepared.row(name, prepared.fields(other)[-1]))
    return rows


def ablation_rows(
    model: Model, pairs: Mapping[str, list[Prepared]], options: Options, device: torch.device
) -> list[Row]:
    """Every form, trained with the same small budget, on test patients."""
    rows = []
    for form in FORMS:
        found, seconds = trained(form, model, pairs, options.steps, options.runs)
        found = found.to(device)
        spline = found.config.reconstruction == "thin_plate"  # which learns how smooth it is
        count = 1 if spline else count_parameters(found.kernel)
        more = {"steps": options.steps, "parameters": count, "training_seconds_wall": seconds}
        with torch.no_grad():
            rows += [one.row(form, one.fields(found)[-1], **more) for one in pairs["test"]]
    return rows


# ---- what is shown ----

COLUMNS = ("TRE, mm", "TRE 95 %, mm", "SDlogJ", "SDlogJ of Learn2Reg (+ 3)", "folding, %")
COSTS = ("seconds", "peak, MB", "keypoints")
SLIDES = "Where lungs slide along the wall the exact motion jumps: read at voxels it folds there."
HALF = "TRE by the field itself; regularity on a grid of half the resolution."


def means(rows: Sequence[Row]) -> dict[str, Row]:
    """By method: means over its pairs, and their number."""
    found = {}
    for name in dict.fromkeys(r["method"] for r in rows):
        same = [r for r in rows if r["method"] == name]
        keys = [key for key, value in same[0].items() if isinstance(value, int | float)]
        found[name] = {key: mean([r[key] for r in same]) for key in keys} | {"pairs": len(same)}
    return found


def cells(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the columns that all tables have."""
    names = (("tre_mm", 2), ("tre95_mm", 2), ("sdlogj", 3), ("sdlogj_learn2reg", 4), ("folding", 3))
    return tuple(number(found[name], digits) for name, digits in names)


def costs(found: Mapping[str, Any]) -> tuple[str, ...]:
    """What it took; "-" where that was not measured."""
    return tuple(number(found.get(name), digits) for name, digits in (("seconds", 1), ("peak_mb", 0), ("keypoints", 0)))


def method_table(title: str, rows: Sequence[Row], notes: Sequence[str]) -> Table:
    """Methods against all figures."""
    table = Table(f"{title}, {size(rows[0])}", ("method", "pairs", *COLUMNS, *COSTS))
    for name, found in means(rows).items():
        table.add(name, str(found["pairs"]), *cells(found), *costs(found))
    table.notes += notes
    return table


def size(r: Row) -> str:
    """Voxels and spacing."""
    return f"{' x '.join(map(str, r['shape']))} at {r['spacing_mm']:g} mm"


def aims(rows: Sequence[Row]) -> list[str]:
    """Whether the one pass is as fast and as small as it was meant to be."""
    found = next(f for name, f in means(rows).items() if name.endswith(ONE_PASS))
    return [
        tables.aim("Seconds of one pass", found["seconds"], MOST_SECONDS, at_least=False, digits=1),
        tables.aim("Peak memory of one pass, MB", found["peak_mb"], MOST_MB, at_least=False, digits=0),
    ]


def resolution_table(rows: Sequence[Row]) -> Table:
    """One patient, one pass, coarse to fine."""
    table = Table(
        f"Other resolutions, {rows[0]['pair']}, {rows[0]['method']}", ("voxels and spacing", *COLUMNS, *COSTS)
    )
    for r in sorted(rows, key=lambda r: -r["spacing_mm"]):
        table.add(size(r), *cells(r), *costs(r))
    table.notes.append("The same person on every grid, with other noise and blur.")
    return table


def switch_table(rows: Sequence[Row], model: Model) -> Table:
    """The same weights, asked otherwise."""
    table = Table(f"{model.name}: its scales, one scale, other K; nothing is trained", ("asked", "pairs", *COLUMNS))
    for name, found in means(rows).items():
        table.add(name, str(found["pairs"]), *cells(found))
    kept = model.network.config
    table.notes.append(
        f"The model has K = {kept.kernel.neighbours} and {len(kept.scales)} scales. One scale: {2 * ONE[0].reach + 1} "
        f"candidates along each axis, {ONE[0].pooled} voxels apart. {HALF}"
    )
    return table


def ablation_table(rows: Sequence[Row], notes: Sequence[str]) -> Table:
    """Ours beside the paper's."""
    found, steps = means(rows), rows[0]["steps"]
    table = Table(
        f"Ablation: each form trained for {steps} steps, on the same features",
        ("form", "parameters", "pairs", *COLUMNS, "against full, mm", "paper, mm", "paper, against full"),
    )
    for form, each in found.items():
        paper = FORMS[form][1]
        against = "-" if paper is None else f"{paper - FORMS[FULL][1]:+.2f}"  # type: ignore[operator]
        ours = f"{each['tre_mm'] - found[FULL]['tre_mm']:+.2f}"
        table.add(form, f"{each['parameters']:,.0f}", str(each["pairs"]), *cells(each), ours, number(paper, 2), against)
    order = sorted(found, key=lambda form: found[form]["tre_mm"])
    table.notes += [
        *notes,
        f"From the smallest TRE to the largest: {', '.join(order)}.",
        f"One seed and {steps} items: small differences are chance. {NO_FEATURES.capitalize()}: MIND alone, for "
        f"matches and kernel. The paper's numbers are of other data. {HALF}",
    ]
    return table


# ---- parts ----


@dataclass(frozen=True, eq=False)
class Setting:
    """What all parts share: on what, with which model, how."""

    options: Options
    model: Model
    notes: tuple[str, ...]
    device: torch.device
    main_mm: float = MAIN_MM
    config: ThoraxConfig = ADULT
    classical: Optimisation = CLASSICAL

    @staticmethod
    def of(options: Options) -> "Setting":
        """The shipped model, or an untrained one and a sentence; small things for the quick mode."""
        device = torch.device(options.device)
        if options.quick:
            torch.manual_seed(0)
            tiny = KeypointKernelConfig.of(thorax_grid(24.0), features=2, widths=(2, 4), width=8, neighbours=8)
            model = Model("stand-in", network(tiny).eval(), Refinement(2, rate=0.1))
            few = replace(options, patients=1, few=1, resolutions=(28.0,), neighbours=(4, 8), steps=2, coarsen=1)
            how = replace(CLASSICAL, control_mm=80.0, affine=(1,), splines=(1,), steps=2)
            return Setting(few, model.to(device), (), device, 24.0, SMALL_TREES, how)
        if options.weights != SHIPPED or SHIPPED in available():
            return Setting(options, load(options.weights).to(device), (), device)
        recipe = find_recipe(SHIPPED)
        model = Model(UNTRAINED, networks.untrained(recipe.config), recipe.refinement)
        return Setting(options, model.to(device), (MISSING,), device)

    def patient(self, place: int, spacing_mm: float | None = None, split: str = "test") -> Pair:
        """By its place in a split."""
        return drawn(spacing_mm or self.main_mm, keypoint_task.PATIENTS[split][place], self.config)

    @property
    def refinement(self) -> Refinement:
        """As the model recommends it, on averages."""
        return replace(self.model.refinement, coarsen=self.options.coarsen)

    @property
    def ways(self) -> tuple[str, str]:
        """How it is refined, and what the B-splines are."""
        how, refined = self.classical, self.refinement
        return (
            f"Refined: {refined.steps} steps, on averages over {refined.coarsen} voxels along each axis.",
            f"B-splines: {how.similarity}, control points {how.control_mm:g} mm apart, {how.steps} steps a level.",
        )


Outcome = tuple[list[Table], list[Row]]


def phantom(setting: Setting) -> Outcome:
    """Unseen patients; the first of them by all methods."""
    options, every, few = setting.options, [], []
    for place in range(options.patients):
        pair, chosen = setting.patient(place), place < options.few
        known = known_rows(pair)
        found = model_rows(setting.model, pair, setting.refinement if chosen else None, setting.device)
        every += [*known, found[0]]
        few += [*known, *found, *classical_rows(pair, setting.classical, setting.device)] if chosen else []
    held = [] if options.quick else aims(every)
    shown = [
        method_table("Unseen drawn patients", every, [*setting.notes, SLIDES, *held]),
        method_table("The first of them, by all methods", few, setting.ways),
    ]
    return shown, [*every, *(r for r in few if r not in every)]


def ct(setting: Setting) -> Outcome:
    """The real CT, where it has been fetched."""
    quick = setting.options.quick
    try:
        pair = moved_ct(stand_in_scan() if quick else load_thorax_ct(setting.main_mm))
    except FileNotFoundError as error:
        return [Table("CT moved by a drawn motion: left out", (), notes=[str(error)])], []
    rows = [*known_rows(pair), *model_rows(setting.model, pair, setting.refinement, setting.device)]
    rows += classical_rows(pair, setting.classical, setting.device)
    origin = "A drawn stand-in." if quick else "The anatomy is real; the motion is drawn, so it is known exactly."
    return [method_table("CT moved by a drawn motion", rows, [origin, *setting.notes, *setting.ways])], rows


def resolutions(setting: Setting) -> Outcome:
    """The first patient at every spacing."""
    spacings = dict.fromkeys((setting.main_mm, *setting.options.resolutions))
    rows = [model_rows(setting.model, setting.patient(0, mm), None, setting.device)[0] for mm in spacings]
    return [resolution_table(rows)], rows


def switches(setting: Setting) -> Outcome:
    """The first patients, asked otherwise."""
    pairs = [setting.patient(place) for place in range(setting.options.few)]
    rows = switch_rows(setting.model, pairs, setting.options.neighbours, setting.device)
    return [switch_table(rows, setting.model)], rows


def ablation(setting: Setting) -> Outcome:
    """Every form on the grid of the model."""
    spacing = setting.model.grid.spacing[0]
    pairs = {
        split: [
            Prepared.of(setting.model, setting.patient(place, spacing, split), setting.device)
            for place in range(1 if setting.options.quick else count)
        ]
        for split, count in SPLITS.items()
    }
    rows = ablation_rows(setting.model, pairs, setting.options, setting.device)
    return [ablation_table(rows, setting.notes)], rows


PARTS: dict[Part, Callable[[Setting], Outcome]] = {
    "phantom": phantom, "ct": ct, "resolutions": resolutions, "switches": switches, "ablation": ablation,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; see the module."""
    options = tyro.cli(Options, args=arguments)
    numbers = (options.patients, options.few, options.coarsen, options.steps, *options.neighbours)
    most = len(keypoint_task.PATIENTS["test"])
    if min(numbers) < 1 or max(options.patients, options.few) > most or min(options.resolutions, default=1.0) <= 0:
        raise ValueError(f"Patients are 1 to {most}, steps, K and averages 1 or more, and spacings above 0 mm.")
    torch.set_num_threads(options.threads)
    setting = Setting.of(options)
    seeds = [keypoint_task.SEED]
    facts = {"seeds": seeds, "quick": options.quick, "model": setting.model.name, "hardware": hardware(setting.device)}
    shown: list[Table] = []
    rows: list[Row] = []
    for part in options.parts:
        said, found = PARTS[part](setting)
        shown, rows = shown + said, rows + [r | {"part": part} for r in found]
    return tables.report("benchmarks.kernel_thorax", arguments, options.json, shown, rows, facts)


if __name__ == "__main__":
    tables.command(main)
