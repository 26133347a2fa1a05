"""From sparse matches to a displacement anywhere: classical weightings against learned kernels.

    python -m benchmarks.kernel_sparse [--quick] [--json FILE] [--seeds 0 1 2] [--steps 80]

Two scenes (see ``sparse_scenes``): real lungs, where a fifth of the points is held out, and a breathing phantom with
exact truth. Matches are perfect, noisy (Gaussian, on each axis), partly wrong by far (Gaussian, 15 mm on each axis), or
all of it, unevenly, with errors that neighbours share ("realistic"). A figure is the mean distance, mm, at points that
the method was not given.

Every number of a classical method (width, power, smoothing) is chosen on validation pairs, for each level of faults and
each K alone: it is told how bad the matches are. A learned kernel is the same one at all levels, and has to see that.
The kernels are trained here for a few steps on training pairs, one for each seed. Beside them stands the shipped
``kernel-points``, trained for longer on the lungs' training pairs, never on the phantom. The seed of a test also draws
what is held out and the faults, the same for all methods.

``--quick`` runs everything on tiny stand-ins; its numbers mean nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks import tables
from benchmarks.harness import hardware
from benchmarks.sparse_scenes import Problem, Scene, SceneTask, field, lungs, phantom, stand_in
from benchmarks.tables import Table, mean, number
from regteach import points_task
from regteach.checkpoints import available, load
from regteach.data.matches import Faults
from regteach.nets.kernel import KernelConfig, LearnedKernel
from regteach.ops import classical
from regteach.training import Settings, train

LEVELS: dict[str, Faults] = {
    "perfect": Faults(),
    "noise 1 mm": Faults(noise_mm=1.0),
    "noise 2 mm": Faults(noise_mm=2.0),
    "noise 4 mm": Faults(noise_mm=4.0),
    "5 % wrong": Faults(outliers=0.05),
    "15 % wrong": Faults(outliers=0.15),
    "30 % wrong": Faults(outliers=0.3),
    "realistic": points_task.LEVELS["usual"],
}
REAL = "realistic"
PAPER = 1.72 / 2.23  # error of the paper's kernel over that of a thin-plate spline in its place
KS: tuple[int, ...] = (10, 20, 30, 50)  # tables over levels show the third
CHOOSING_SEED = 1000  # of the draws on validation pairs
Answer = Callable[[Problem], Tensor]


@dataclass(frozen=True)
class Method:
    """A classical method.

    Args:
        solve: query, keypoints, values, K, parameter to values at the query.
        choices: of the parameter; one where there is none.
        local: whether it has a K.
    """

    solve: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    choices: tuple[float, ...] = (0.0,)
    local: bool = True


POWERS, WIDTHS, PLANES = (1.0, 2.0, 4.0), (4.0, 7.0, 12.0, 20.0, 35.0), (8.0, 14.0, 25.0, 50.0)
METHODS: dict[str, Method] = {
    "nothing": Method(lambda x, y, d, k, p: torch.zeros_like(x), local=False),
    "nearest": Method(lambda x, y, d, k, p: classical.nearest(x, y, d), local=False),
    "inverse distance": Method(lambda x, y, d, k, p: classical.inverse_distance(x, y, d, k, p), POWERS),
    "inverse distance, taper": Method(lambda x, y, d, k, p: classical.inverse_distance(x, y, d, k, p, True), POWERS),
    "Gaussian": Method(lambda x, y, d, k, p: classical.gaussian(x, y, d, k, p), WIDTHS),
    "Gaussian, taper": Method(lambda x, y, d, k, p: classical.gaussian(x, y, d, k, p, True), WIDTHS),
    "local affine": Method(lambda x, y, d, k, p: classical.local_affine(x, y, d, k, p), PLANES),
    "local affine, taper": Method(lambda x, y, d, k, p: classical.local_affine(x, y, d, k, p, True), PLANES),
    "thin plate": Method(lambda x, y, d, k, p: classical.thin_plate_spline(x, y, d, p), (0.0,), False),
    "thin plate, smoothed": Method(
        lambda x, y, d, k, p: classical.thin_plate_spline(x, y, d, p), (30.0, 300.0, 3e3, 3e4), False
    ),
    "linear": Method(lambda x, y, d, k, p: classical.thin_plate_spline(x, y, d, p, "linear"), (0.0,), False),
    "linear, smoothed": Method(
        lambda x, y, d, k, p: classical.thin_plate_spline(x, y, d, p, "linear"), (3.0, 10.0, 30.0, 100.0), False
    ),
}
# Learned kernels of a scene without images, and, with them, one head or both.
MEAN = KernelConfig(trust=False, rounds=0, degree=0)
FORMS: dict[str, KernelConfig] = {
    "learned mean, no trust": MEAN,
    "learned plane, trust": KernelConfig(),
    "learned spline, then mean": KernelConfig(width=32, rounds=0, degree=0, spline=True),
}
HEADS: dict[str, tuple[str, ...]] = {
    "geometry head": ("geometry",),
    "semantics head": ("semantics",),
    "both heads": ("geometry", "semantics"),
}
SHIPPED = "kernel-points"


@dataclass(frozen=True)
class Options:
    """Command line.

    Args:
        quick: tiny stand-ins: shows that it runs, and nothing else.
        json: also write the numbers to this file, and the tables beside it as markdown.
        seeds: of the tests, and of the trainings.
        steps: of a training, one item each.
        threads: of torch; one is the steadiest where other programs run.
    """

    quick: bool = False
    json: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 80
    threads: int = 1


Row = dict[str, Any]  # scene, method, k, level, seed, error; "chosen" where there was a choice


# ---- what is measured ----


def error(answer: Answer, problem: Problem) -> float:
    """Mean distance from the truth at the queries, mm."""
    with torch.no_grad():
        return float((answer(problem) - problem.drawn.truth).norm(dim=1).mean())


def solved(method: Method, k: int, parameter: float) -> Answer:
    """A classical method as a function of a problem."""
    return lambda p: method.solve(p.drawn.query, p.drawn.keypoints, p.drawn.displacements, k, parameter)


def learned(kernel: Any) -> Answer:
    """A learned kernel as a function of a problem."""
    return lambda p: field(kernel, p)(p.drawn.query)


def classical_rows(scene: Scene, levels: Mapping[str, Faults], ks: Sequence[int], seeds: Sequence[int]) -> list[Row]:
    """Every classical method, its parameter chosen on validation pairs for each level and K alone."""
    rows: list[Row] = []
    for level, faults in levels.items():
        validation = [draw(faults, CHOOSING_SEED) for draw in scene.pairs["validation"]]
        test = {seed: [draw(faults, seed) for draw in scene.pairs["test"]] for seed in seeds}
        for name, method in METHODS.items():
            for k in ks if method.local else (0,):
                best, chosen = 0.0, method.choices[0]
                if len(method.choices) > 1:
                    best, chosen = min(
                        (mean([error(solved(method, k, p), problem) for problem in validation]), p)
                        for p in method.choices
                    )
                for seed, problems in test.items():
                    value = mean([error(solved(method, k, chosen), problem) for problem in problems])
                    row = {"scene": scene.name, "method": name, "k": k, "level": level, "seed": seed, "error": value}
                    rows.append(row | ({"chosen": chosen, "validation": best} if len(method.choices) > 1 else {}))
    return rows


def kernel_rows(
    scene: Scene, name: str, kernel: Any, levels: Mapping[str, Faults], seeds: Sequence[int], **more: Any
) -> list[Row]:
    """One learned kernel at all levels."""
    return [
        {"scene": scene.name, "method": name, "k": kernel.config.neighbours, "level": level, "seed": seed}
        | {"error": mean([error(learned(kernel), draw(faults, seed)) for draw in scene.pairs["test"]])}
        | more
        for level, faults in levels.items()
        for seed in seeds
    ]


def trained(scene: Scene, config: KernelConfig, seed: int, steps: int) -> Any:
    """A kernel after a small budget: the last weights, none are chosen."""
    warmup = min(20, steps)
    settings = Settings(
        steps=steps, batch=1, rate=3e-3, warmup=warmup, decay=True, weight_decay=1e-2, validate_every=steps, seed=seed
    )
    return train(SceneTask(scene, partial(LearnedKernel, config), settings), settings).model


def learned_rows(scene: Scene, levels: Mapping[str, Faults], ks: Sequence[int], options: Options) -> list[Row]:
    """Learned kernels of a scene: forms or heads, one training a seed; other K with the first seed, at one level."""
    rows: list[Row] = []
    forms = dict(FORMS)
    if scene.features:
        forms = {
            name: KernelConfig(heads=heads, semantics=scene.features * ("semantics" in heads))
            for name, heads in HEADS.items()
        }
    k = ks[2]
    for name, config in forms.items():
        for seed in options.seeds:
            kernel = trained(scene, replace(config, neighbours=k), seed, options.steps)
            rows += kernel_rows(scene, name, kernel, levels, [seed], steps=options.steps)
    last = list(forms)[-1]
    for other in (other for other in ks if other != k):
        kernel = trained(scene, replace(forms[last], neighbours=other), options.seeds[0], options.steps)
        rows += kernel_rows(scene, last, kernel, {REAL: levels[REAL]}, [options.seeds[0]], steps=options.steps)
    if not options.quick and SHIPPED in available():
        model = load(SHIPPED)
        rows += kernel_rows(scene, SHIPPED, model.network, levels, options.seeds)
        for other in (other for other in ks if other != model.network.config.neighbours):
            again = LearnedKernel(replace(model.network.config, neighbours=other)).eval()
            again.load_state_dict(model.network.state_dict())
            rows += kernel_rows(scene, SHIPPED, again, {REAL: levels[REAL]}, options.seeds)
    return rows


# ---- what is shown ----


def at_k(rows: Sequence[Row], k: int) -> list[Row]:
    """Those with this K, and those that have none."""
    return [row for row in rows if row["k"] in (0, k)]


def level_table(scene: Scene, rows: Sequence[Row], k: int, levels: Sequence[str]) -> Table:
    """Methods against levels: means over the seeds; then who wins where, and by how much."""
    table = Table(f"{scene.name}: mean error, mm, K = {k}", ("method", *levels))
    chosen = at_k(rows, k)
    means: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["method"] for row in chosen):
        means[name] = {
            level: mean([r["error"] for r in chosen if r["method"] == name and r["level"] == level]) for level in levels
        }
        table.add(name, *(number(means[name][level], 2) for level in levels))
    table.notes.append(scene.origin)
    ours = [name for name in means if name not in METHODS]
    for level in levels:
        best = min((n for n in METHODS if n in means), key=lambda name: means[name][level])
        kernel = min(ours, key=lambda name: means[name][level])
        a, b = means[kernel][level], means[best][level]
        verdict = "the learned one is better" if a < b else "the classical one is better"
        table.notes.append(f"{level}: {kernel} {a:.2f} mm, {best} {b:.2f} mm: {verdict}, by {abs(1 - a / b):.0%}.")
    for level in levels:
        kernel = SHIPPED if SHIPPED in means else min(ours, key=lambda name: means[name][level])
        ratio = means[kernel][level] / means["thin plate"][level]
        table.notes.append(tables.aim(f"{level}: {kernel} over the thin-plate spline", ratio, round(PAPER, 3), False))
    return table


def k_table(scene: Scene, rows: Sequence[Row], ks: Sequence[int]) -> Table:
    """Methods against K, at the realistic level."""
    table = Table(f"{scene.name}, {REAL}: mean error, mm, over K", ("method", *(f"K = {k}" for k in ks)))
    here = [row for row in rows if row["level"] == REAL and row["k"]]
    for name in dict.fromkeys(row["method"] for row in here):
        values = [[r["error"] for r in here if (r["method"], r["k"]) == (name, k)] for k in ks]
        if sum(map(bool, values)) > 1:
            table.add(name, *(number(mean(v), 2) for v in values))
    table.notes.append(
        f"A learned kernel was trained anew for each K (one seed but for the usual K); {SHIPPED} was not, only asked "
        "with another K."
    )
    return table


def rank_table(scene: Scene, rows: Sequence[Row], k: int, levels: Sequence[str], seeds: Sequence[int]) -> Table:
    """Mean rank over the levels, seed by seed: whether the order is one of chance."""
    table = Table(f"{scene.name}: mean rank over the levels, 1 is best", ("method", *(f"seed {s}" for s in seeds)))
    chosen = at_k(rows, k)
    names = list(dict.fromkeys(row["method"] for row in chosen))
    ranks: dict[int, dict[str, float]] = {}
    for seed in seeds:
        places: dict[str, list[float]] = {name: [] for name in names}
        for level in levels:
            errors = {r["method"]: r["error"] for r in chosen if r["level"] == level and r["seed"] == seed}
            for place, name in enumerate(sorted(names, key=lambda name: errors[name]), start=1):
                places[name].append(place)
        ranks[seed] = {name: mean(values) for name, values in places.items()}
    for name in sorted(names, key=lambda name: sum(ranks[seed][name] for seed in seeds)):
        table.add(name, *(number(ranks[seed][name], 1) for seed in seeds))
    firsts = {seed: min(names, key=lambda name: ranks[seed][name]) for seed in seeds}
    table.notes.append(
        f"First in every seed: {firsts[seeds[0]]}."
        if len(set(firsts.values())) == 1
        else "First by seed: " + ", ".join(f"{seed} {name}" for seed, name in firsts.items()) + "."
    )
    return table


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; see the module."""
    options = tyro.cli(Options, args=arguments)
    if min(len(options.seeds), options.steps) < 1:
        raise ValueError("The numbers of seeds and steps are 1 or more.")
    torch.set_num_threads(options.threads)
    facts = {"seeds": options.seeds, "quick": options.quick, "hardware": hardware(torch.device("cpu"))}
    levels, ks = LEVELS, KS
    if options.quick:
        levels, ks = {name: LEVELS[name] for name in ("perfect", REAL)}, (4, 8, 12)
    k = ks[2]
    makers: dict[str, Callable[[], Scene]] = {
        "lungs": (lambda: lungs(stand_in())) if options.quick else lungs,
        "phantom": (lambda: phantom((1, 1, 1), 24.0, 60)) if options.quick else phantom,
    }
    rows: list[Row] = []
    shown: list[Table] = []
    for name, make in makers.items():
        try:
            scene = make()
        except FileNotFoundError as missing:
            shown.append(Table(f"{name}: left out", (), notes=[str(missing)]))
            continue
        found = classical_rows(scene, levels, ks, options.seeds) + learned_rows(scene, levels, ks, options)
        shown += [
            level_table(scene, found, k, list(levels)),
            k_table(scene, found, ks),
            rank_table(scene, found, k, list(levels), options.seeds),
        ]
        rows += found
    return tables.report("benchmarks.kernel_sparse", arguments, options.json, shown, rows, facts)


if __name__ == "__main__":
    tables.command(main)
