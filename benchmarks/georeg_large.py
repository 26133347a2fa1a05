"""Large deformations of known truth: who finds them, and who loses the way.

    python -m benchmarks.georeg_large [--quick] [--json FILE] [--sets digits slices brains] [--seeds 0 1 2] [--steps N]

Images of test people are read at deformations of five families (:mod:`regteach.data.large`) in three ranges each; every
method gets the image and its deformed copy, and is measured against the exact truth:

- nothing;
- affine: found on the pair itself, from coarse to fine;
- free-form: cubic B-splines after that affine, found on the pair itself, from coarse to fine;
- U-Net: both images into one network (VoxelMorph-style), one pass;
- feature warping: GeoReg whose moving features are resampled at the points, where GeoReg moves the points, and whose
  steps are composed, where those of points add up; one pass;
- GeoReg, one pass.

The three networks learn from the same synthetic pairs of training people, all families and ranges in equal parts,
from the images alone, by the same similarity and with as many steps and pairs a step. Choices were made on validation
people.

Measured are HD95 of the structures, labels warped by nearest voxel (one that the warp loses counts as far off as the
image is long, its diagonal); the end-point error, mean over the object (grey value above 0.1) where its partner lies
inside the moving image; folding, of the whole image; seconds a pair: in 2D all test pairs are one batch, in 3D a few
are, for memory.

Source: the families follow Sideri-Lampretsa et al., arXiv 2412.13294, Table 3; its numbers are lost.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks import networks, tables
from benchmarks.harness import timed
from benchmarks.networks import Figures, Recipe
from benchmarks.pairwise import affine_step, descended
from benchmarks.tables import Table, mean, number, over_seeds
from regteach import bspline, metrics, objectives
from regteach.affine import AffineBounds
from regteach.checkpoints import Config
from regteach.data.cohort import SPLITS, Cohort
from regteach.data.large import FAMILIES, RANGES, Deformed, deformed, visible
from regteach.grid import Grid, per_axis
from regteach.nets.georeg import GeoRegConfig
from regteach.nets.istn import count_parameters
from regteach.nets.voxelmorph import VoxelMorphConfig
from regteach.refinement import Refinement
from regteach.result import Step, assemble
from regteach.sampling import warp
from regteach.training import Settings
from regteach.transforms import Dense, FreeForm, Identity, Transform, displacement, jacobian_determinant

NOTHING, AFFINE, SPLINE, UNET, ABLATION, GEOREG = (
    "nothing", "affine", "free-form", "U-Net", "feature warping", "GeoReg",
)  # fmt: skip
METHODS = (NOTHING, AFFINE, SPLINE, UNET, ABLATION, GEOREG)
LEARNED = (UNET, ABLATION, GEOREG)
CASES = tuple((family, level) for level in RANGES for family in FAMILIES)
OBJECT = 0.1  # grey value above which a voxel is part of the object
TEST_SEED = 1000  # of the test deformations; those for training count from 0

Finder = Callable[[Tensor, Tensor], Transform]  # moving and fixed images to a transform


@dataclass(frozen=True)
class Setup:
    """What is registered, and how the networks for it are made.

    Args:
        load: the undeformed images.
        georeg: GeoReg's configuration; the grid is set when the images are there.
        unet: channels of the U-Net, chosen to give about as many parameters.
        settings: of all three trainings.
        train: deformed copies of training and of validation people, for each family and range.
        copies: of each image among them.
        test: pairs for each family and range.
        bending: weight of the bending energy in all trainings, mm^2.
        spacings: control spacings of the free-form deformation, as parts of the shortest side, coarse to fine.
        spline_bending: weight of its bending energy, mm^2.
        coarsen: averages over so many voxels that the optimisations look at, one after the other.
        optimisation: steps at each of these.
        at_once: test pairs that are registered in one batch.
    """

    load: Callable[[], Cohort]
    georeg: GeoRegConfig
    unet: tuple[int, ...]
    settings: Settings
    train: int
    copies: int
    test: int
    bending: float
    spacings: tuple[float, ...] = (1 / 4, 1 / 8)
    spline_bending: float = 0.1
    coarsen: tuple[int, ...] = (4, 2, 1)
    optimisation: int = 80
    at_once: int = 10_000


@dataclass(frozen=True)
class Options(networks.Options):
    """Command line.

    Args:
        recipes: only the methods whose names contain one of these.
        sets: what is registered: "digits", "slices"; in 3D, slow on a CPU, "brains" (whole, 4 mm) and "hippocampus".
        seeds: of the trainings.
    """

    sets: tuple[str, ...] = ("digits", "slices")
    seeds: tuple[int, ...] = (0, 1, 2)


# ---- images ----


def padded(cohort: Cohort, by: int | Sequence[int]) -> Cohort:
    """The cohort with ``by`` voxels of background on both sides (of each axis), and no pairs of its own."""
    sides = [int(n) for n in per_axis(by, cohort.grid.dim, "by")]

    def wider(maps: Tensor) -> Tensor:
        return F.pad(maps, [n for n in reversed(sides) for _ in range(2)])

    return replace(
        cohort, images=wider(cohort.images), soi=wider(cohort.soi), labels=wider(cohort.labels),
        grid=cohort.grid.padded(sides, sides), tissue=None, given_pairs={},
    )  # fmt: skip


def coarser(cohort: Cohort, factor: int) -> Cohort:
    """The cohort averaged over cubes of ``factor`` voxels; a voxel has the label that fills half of it."""
    soi = objectives.averaged(cohort.soi, factor)
    names = torch.tensor(list(cohort.structures))
    labels = torch.where(soi.amax(1) >= 0.5, names[soi.argmax(1)], 0)
    images, grid = objectives.averaged(cohort.images, factor), cohort.grid.coarsened(factor)
    return replace(cohort, images=images, soi=soi, labels=labels, grid=grid, tissue=None, given_pairs={})


def mixture(cohort: Cohort, count: int, copies: int) -> Cohort:
    """Pairs to train and to validate on: all families and ranges in equal parts.

    Args:
        cohort: undeformed.
        count: pairs for each family and range to train on; a fifth as many validate.
        copies: deformed copies of each image.
    """
    images = -(-count // copies)
    limits = {"train": images, "validation": -(-images // 5), "test": 0}
    parts = [
        deformed(cohort, family, level, seed, copies, limits=_at_most(cohort, limits))
        for seed, (family, level) in enumerate(CASES)
    ]
    return together(f"{cohort.name}, deformed {count} x {copies}", parts)


def together(name: str, parts: Sequence[Cohort]) -> Cohort:
    """Several cohorts of the same people as one, with the pairs of all."""
    starts = [sum(len(part.people) for part in parts[:k]) for k in range(len(parts))]
    first = parts[0]

    def every(split: str) -> tuple[tuple[int, int], ...]:
        return tuple(
            (m + start, f + start)
            for part, start in zip(parts, starts, strict=True)
            for m, f in part.given_pairs.get(split, ())
        )

    pairs = {split: every(split) for split in SPLITS}
    return replace(
        first,
        name=name,
        images=torch.cat([part.images for part in parts]),
        soi=torch.cat([part.soi for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        people=tuple(person for part in parts for person in part.people),
        splits={split: tuple(sorted({i for pair in chosen for i in pair})) for split, chosen in pairs.items()},
        given_pairs=pairs,
    )  # fmt: skip


def to_test(cohort: Cohort, family: str, level: str, count: int, split: str = "test") -> Deformed:
    """``count`` pairs of one family and range, as many of each person as it takes."""
    images = min(count, len(cohort.splits[split]))
    seed = TEST_SEED + CASES.index((family, level))
    limits = {name: images if name == split else 0 for name in cohort.splits}
    return deformed(cohort, family, level, seed, -(-count // images), limits=limits)


def _at_most(cohort: Cohort, limits: Mapping[str, int]) -> dict[str, int]:
    return {split: min(count, len(cohort.splits[split])) for split, count in limits.items()}


# ---- what is measured ----


@torch.no_grad()
def figures(cohort: Deformed, pairs: networks.Pairs, transform: Transform) -> Figures:
    """HD95 (mm), end-point error over the object (mm), folding (%), and structures lost, one number a pair.

    Args:
        cohort: with the truths.
        pairs: (moving, fixed).
        transform: of all pairs, a batch of one or of as many, on the CPU.
    """
    grid, (moving, fixed) = cohort.grid, (list(side) for side in zip(*pairs, strict=True))
    truths = [cohort.truth(*pair) for pair in pairs]
    field = displacement(transform, grid).expand(len(pairs), *grid.shape, grid.dim)
    exact = torch.cat([displacement(truth, grid) for truth in truths])
    seen = torch.cat([visible(truth, grid) for truth in truths])
    error = metrics.end_point_error(field, exact, seen & (cohort.images[fixed].amax(1, keepdim=True) > OBJECT))

    labels = cohort.labels[moving][:, None].float()
    warped = warp(labels, transform, grid, order=0, padding="zeros").round().long()
    distances = torch.stack(
        list(metrics.hausdorff95(warped, cohort.labels[fixed][:, None], grid, cohort.structures).values())
    )
    lost, diagonal = distances.isinf(), math.hypot(*grid.extent)
    det = jacobian_determinant(transform, grid).expand(len(pairs), *grid.shape)
    return {
        "hd95": torch.where(lost, diagonal, distances).nanmean(0).tolist(),
        "error": error.tolist(),
        "folding": metrics.folding_percent(det).tolist(),
        "lost": lost.sum(0).double().tolist(),
    }


# ---- what is optimised on the pair ----


def optimised(moving: Tensor, fixed: Tensor, grid: Grid, setup: Setup, splines: bool) -> Transform:
    """Affine, and splines after it: each pair for itself, by Adam, from coarse to fine.

    Args:
        moving, fixed: ``b 1 *grid``.
        grid: of both.
        setup: says how.
        splines: False stops after the affine.
    """
    side = min(grid.extent)
    bounds = AffineBounds(side / 3, 60.0, 2.0, 45.0)  # well beyond what the families do
    steps: tuple[Step, ...] = (affine_step(moving, grid, bounds),)

    def descend(steps: tuple[Step, ...], settings: Refinement) -> tuple[Step, ...]:
        return descended(steps, (moving, fixed), grid, settings, setup.georeg.similarity)

    for factor in setup.coarsen:
        steps = descend(steps, Refinement(setup.optimisation, rate=0.03, coarsen=factor))
    if splines:
        for part, factor in zip(setup.spacings, setup.coarsen[-len(setup.spacings) :], strict=True):
            ctrl = bspline.control_grid(grid, part * side)
            own = Step(moving.new_zeros(len(moving), *ctrl.shape, grid.dim), partial(_spline, grid=ctrl))
            steps = descend(
                (*steps, own), Refinement(setup.optimisation, rate=0.03, bending=setup.spline_bending, coarsen=factor)
            )
    return assemble(steps)


def _spline(coefficients: Tensor, grid: Grid) -> Transform:
    return FreeForm(coefficients * min(grid.spacing), grid)


# ---- what is trained ----


def recipe_of(method: str, setup: Setup, cohort: Cohort, seed: int, steps: int | None = None) -> Recipe:
    """The training of one network: the same for all but the network itself."""
    georeg = replace(setup.georeg, grid=cohort.grid)
    config: dict[str, Config] = {
        UNET: VoxelMorphConfig(cohort.grid, setup.unet, finest=0, similarity=georeg.similarity),
        ABLATION: replace(georeg, moves="features"),
        GEOREG: georeg,
    }
    settings = replace(setup.settings, seed=seed)
    if steps is not None:
        settings = replace(settings, steps=steps)
    name = f"large-{method.lower().replace(' ', '-')}"
    data = cohort.name.split(",")[0]
    return Recipe(name, data, "unsupervised", config[method], settings, bending=setup.bending)


def finders(
    setup: Setup, cohort: Cohort, seeds: Sequence[int], options: Options
) -> list[tuple[dict[str, Any], Finder]]:
    """Every method, and every seed of those that are trained: what it is, and how it registers a batch of images."""
    grid, device = cohort.grid, torch.device(options.device)
    found: list[tuple[dict[str, Any], Finder]] = []
    methods = wanted(options)
    pool = mixture(cohort, setup.train, setup.copies) if set(methods) & set(LEARNED) else cohort
    for method in methods:
        if method == NOTHING:
            found.append(({"method": method}, _still))
        elif method not in LEARNED:
            find = partial(optimised, grid=grid, setup=setup, splines=method == SPLINE)
            found.append(({"method": method}, find))
        else:
            for seed in seeds:
                done = networks.trained(recipe_of(method, setup, pool, seed, options.steps), pool, options.runs)
                network = done.model.to(device)
                told = {"method": method, "seed": seed, "parameters": count_parameters(network)}
                told |= {"training_seconds_wall": done.seconds, "best_step": done.best["step"]}
                found.append((told, partial(one_pass, network=network, grid=grid)))
    return found


def _still(moving: Tensor, fixed: Tensor) -> Transform:
    return Identity(moving.ndim - 2)


@torch.no_grad()
def one_pass(moving: Tensor, fixed: Tensor, network: Any, grid: Grid) -> Transform:
    """What a network answers to a batch of pairs."""
    transform: Transform = network(moving, fixed, grid).transform
    return transform


def wanted(options: networks.Options) -> list[str]:
    """The methods that the command line asks for.

    Raises:
        ValueError: if a part is in no method's name.
    """
    for part in options.recipes:
        if not any(part.lower() in method.lower() for method in METHODS):
            raise ValueError(f"No method has {part!r} in its name; they are {', '.join(METHODS)}.")
    return [m for m in METHODS if not options.recipes or any(p.lower() in m.lower() for p in options.recipes)]


def rows_of(name: str, setup: Setup, options: Options, split: str = "test") -> tuple[list[dict[str, Any]], Cohort]:
    """Means over the pairs of each method, seed, family and range."""
    cohort = setup.load()
    device, rows = torch.device(options.device), []
    methods = finders(setup, cohort, options.seeds, options)
    tests = [to_test(cohort, *case, setup.test, split) for case in CASES]
    sides = [list(zip(*test.pairs(split), strict=True)) for test in tests]
    moving, fixed = (
        torch.cat([t.images[list(side[k])] for t, side in zip(tests, sides, strict=True)]).to(device) for k in (0, 1)
    )
    for told, find in methods:
        if told["method"] in LEARNED:
            find(moving[:1], fixed[:1])  # warms up
        field, spent = timed(partial(fields, find, moving, fixed, cohort.grid, setup.at_once), device)
        cost = {key: value / len(moving) for key, value in spent.items()}
        begin = 0
        for (family, level), test in zip(CASES, tests, strict=True):
            pairs = test.pairs(split)
            own = field[begin : begin + len(pairs)]
            begin += len(pairs)
            row = {"set": name, "family": family, "range": level, **told, "pairs": len(pairs)}
            row |= {key: mean(values) for key, values in figures(test, pairs, Dense(own, cohort.grid)).items()}
            rows.append(row | cost)
    return rows, cohort


def fields(find: Finder, moving: Tensor, fixed: Tensor, grid: Grid, at_once: int) -> Tensor:
    """``b *grid d``, mm, on the CPU: what a method finds for each pair, ``at_once`` of them together."""
    found = []
    for some, others in zip(moving.split(at_once), fixed.split(at_once), strict=True):
        field = displacement(find(some, others), grid, some).detach().cpu()  # all are read the same way
        found.append(field.expand(len(some), *field.shape[1:]))
    return torch.cat(found)


# ---- what is shown ----


def by_range(name: str, rows: Sequence[Mapping[str, Any]], cohort: Cohort, setup: Setup, options: Options) -> Table:
    """Every method in every range, means over the families (and over the seeds, with their spread)."""
    table = Table(
        f"{name}: {len(FAMILIES)} families in one, {setup.test} pairs each",
        ("range", "method", "parameters", "HD95, mm", "end-point error, mm", "folding, %", "seconds a pair"),
    )
    for level in RANGES:
        for method in dict.fromkeys(row["method"] for row in rows):
            chosen = [row for row in rows if (row["range"], row["method"]) == (level, method)]
            count = f"{chosen[0]['parameters']:,}" if method in LEARNED else "-"
            cells = [
                over_seeds(_by_seed(chosen, key), digits) for key, digits in (("hd95", 2), ("error", 2), ("folding", 2))
            ]
            seconds = "-" if method == NOTHING else number(mean([row["seconds"] for row in chosen]), 4)
            table.add(level, method, count, *cells, seconds)
    lost = {method: mean([row["lost"] for row in rows if row["method"] == method]) for method in METHODS}
    some = ", ".join(f"{method} {value:.3f}" for method, value in lost.items() if value > 0)
    steps = setup.settings.steps if options.steps is None else options.steps
    table.notes += [
        f"{cohort.origin} Deformations are synthetic and known. The grid: {cohort.grid.shape}, "
        f"{max(cohort.grid.spacing):g} mm.",
        f"The networks: {steps} steps of {setup.settings.batch} pairs, all families and ranges in equal parts; "
        f"{_seeds_said(rows)}.",
        *learned_out(rows, steps),
        f"Structures lost a pair, mean: {some or 'none'}.",
        *verdicts(rows),
    ]
    return table


def learned_out(rows: Sequence[Mapping[str, Any]], steps: int) -> list[str]:
    """Which networks were best at their last step: these were still learning."""
    kept = {(row["method"], row["seed"]): row["best_step"] for row in rows if row["method"] in LEARNED}
    last = [method for (method, _), step in kept.items() if step >= steps]
    if not last:
        return ["Every network was best on validation before its last step."] if kept else []
    who = ", ".join(f"{method} {last.count(method)}" for method in LEARNED if method in last)
    return [
        f"Best on validation at the very last step: {len(last)} of {len(kept)} networks ({who}). These had not "
        "finished learning, and are compared by how much they learn in so many steps."
    ]


def by_family(name: str, rows: Sequence[Mapping[str, Any]], key: str, title: str) -> Table:
    """One figure of every method in every family and range."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    table = Table(f"{name}: {title}", ("range", "family", *methods))
    for family, level in CASES:
        here = [row for row in rows if (row["family"], row["range"]) == (family, level)]
        cells = [over_seeds(_by_seed([row for row in here if row["method"] == method], key), 2) for method in methods]
        table.add(level, family, *cells)
    return table


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether GeoReg leads its ablation and the U-Net at the largest range, in each figure.

    A lead is one that is larger than what it differs by from seed to seed; of one seed nobody knows.
    """
    largest = list(RANGES)[-1]
    there = {method for method in LEARNED if any(row["method"] == method for row in rows)}
    said = []
    for other in (ABLATION, UNET):
        if not {GEOREG, other} <= there:
            continue
        for key, what in (("error", "end-point error"), ("hd95", "HD95")):
            ours, theirs = (
                _by_seed([r for r in rows if (r["method"], r["range"]) == (method, largest)], key)
                for method in (GEOREG, other)
            )
            leads = [b - a for a, b in zip(ours, theirs, strict=False)]
            apart, ahead = tables.spread(leads), sum(lead > 0 for lead in leads)
            if len(leads) < 2:
                verdict = "one seed, which ranks nothing"
            elif abs(mean(leads)) <= apart:
                verdict = "no difference beyond that between seeds"
            else:
                verdict = "GeoReg leads" if mean(leads) > 0 else "GeoReg does not lead"
            said.append(
                f"Range {largest}, {what}: GeoReg {over_seeds(ours, 2)} mm, {other} {over_seeds(theirs, 2)} mm, lead "
                f"{over_seeds(leads, 2)}: {verdict}; ahead with {ahead} of {len(leads)} seeds."
            )
    return said


def _by_seed(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The mean over families, for each seed."""
    seeds = dict.fromkeys(row.get("seed") for row in rows)
    return [mean([row[key] for row in rows if row.get("seed") == seed]) for seed in seeds]


def _seeds_said(rows: Sequence[Mapping[str, Any]]) -> str:
    seeds = len({row["seed"] for row in rows if "seed" in row})
    return f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"


# ---- the sets ----


def _digits() -> Cohort:
    cohort = padded(networks.load_cohort("digits"), 2)
    return replace(cohort, origin="Real handwritten digits (MNIST), each registered to deformed copies of itself.")


def _slices() -> Cohort:
    return coarser(networks.load_cohort("slices"), 2)


def _hippocampus() -> Cohort:
    return coarser(networks.load_cohort("hippocampus"), 2)


def _brains() -> Cohort:
    return padded(coarser(networks.load_cohort("brains-by-source"), 2), (0, 2, 0))  # four levels halve it three times


_ANY = Grid((8, 8))  # replaced by the grid of the images
_LEVELS = GeoRegConfig(_ANY, (8, 16, 32, 64), (0, 3, 3, 3), (0, 3, 3), (0, 1, 2, 4))
_BUDGET = Settings(steps=300, batch=8, rate=2e-3, warmup=30, decay=True, validate_every=100)
SETUPS = {
    "digits": Setup(_digits, _LEVELS, (16, 32, 64, 96), _BUDGET, train=80, copies=1, test=20, bending=0.3),
    "slices": Setup(
        _slices, _LEVELS, (16, 32, 64, 96), replace(_BUDGET, batch=2),
        train=48, copies=6, test=4, bending=5.0,
    ),
    "hippocampus": Setup(
        _hippocampus, replace(_LEVELS, grid=Grid((8, 8, 8))), (16, 32, 64, 80), replace(_BUDGET, batch=1),
        train=50, copies=1, test=6, bending=1.0, at_once=4,
    ),
    "brains": Setup(
        _brains, replace(_LEVELS, grid=Grid((8, 8, 8))), (16, 32, 64, 80), replace(_BUDGET, batch=2),
        train=20, copies=2, test=4, bending=5.0, at_once=4,
    ),
}  # fmt: skip


def small() -> dict[str, Setup]:
    """What ``--quick`` registers: two balls, with networks that have seen next to nothing."""
    georeg = GeoRegConfig(_ANY, (4, 4, 8), (0, 3, 3), (3, 3))
    budget = Settings(steps=2, batch=2, validate_every=1)
    load = partial(networks.stand_in, Grid((16, 16)))
    return {"stand-in": Setup(load, georeg, (4, 8), budget, 1, 1, 2, 0.1, (1 / 4,), 0.1, (2,), 2)}


def check(sets: Sequence[str], seeds: Sequence[int], steps: int | None) -> None:
    """Raise a ValueError for an unknown set, no seed, or no step."""
    if any(name not in SETUPS for name in sets) or not seeds or (steps is not None and steps < 1):
        raise ValueError(f"The sets are {', '.join(SETUPS)}; the numbers of seeds and steps are 1 or more.")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; see the module."""
    options = tyro.cli(Options, args=arguments)
    check(options.sets, options.seeds, options.steps)
    wanted(options)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    facts = {"seeds": options.seeds, "quick": options.quick, "hardware": networks.hardware(device)}
    every: list[dict[str, Any]] = []
    shown: list[Table] = []
    for name, setup in (small() if options.quick else {name: SETUPS[name] for name in options.sets}).items():
        try:
            rows, cohort = rows_of(name, setup, options)
        except FileNotFoundError as error:
            shown.append(Table(f"{name}: left out", (), notes=[str(error)]))
            continue
        every += rows
        shown.append(by_range(name, rows, cohort, setup, options))
        shown.append(by_family(name, rows, "error", "end-point error, mm, by family"))
        shown.append(by_family(name, rows, "hd95", "HD95, mm, by family"))
    return tables.report("benchmarks.georeg_large", arguments, options.json, shown, every, facts)


if __name__ == "__main__":
    tables.command(main)
