"""Other people's registration tools and the models that ship, on the same test pairs, by the same measures.

    python -m benchmarks.other_tools [--quick] [--json FILE] [--parts hippocampus slices] [--pairs 50]

Parts, each on the people that the models were not trained on: hippocampus and slices (real scans), brains (real label
maps, synthetic T1), template and colin (the two real T1 of a whole brain that come with labels, with each of those
people, both ways) and retina (drawn). Every method gets two images and gives a displacement field; labels are warped
through it by nearest voxel, and folding is counted on it, here and not by the tool. ISTN learned from labels of its
training people; nothing else has ever seen one. Labels of the pair itself are for measuring alone.

The tools need an environment of their own (README, "Register your own files"). One that is not installed is named, and
has no row; their settings were not tuned on these data, but are their own defaults, or usual ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks import networks, tables
from benchmarks.classical import TOOLS
from benchmarks.georeg_brains import NOTHING, Method, Trial, measured, one_pass, refined
from benchmarks.harness import hardware
from benchmarks.tables import Table, number
from regteach.checkpoints import SUFFIX, WEIGHTS, load
from regteach.data.cohort import Cohort
from regteach.data.scans import load_colin, load_template
from regteach.grid import Grid
from regteach.recipes import find_recipe
from regteach.transforms import Identity

Part = Literal["hippocampus", "brains", "template", "colin", "slices", "retina"]
REAL: dict[Part, tuple[Callable[..., Cohort], str]] = {
    "template": (load_template, "the real T1 of the MNI152 template"),
    "colin": (load_colin, "the real T1 of Colin27"),
}
MODELS: dict[Part, tuple[str, ...]] = {
    "hippocampus": ("istn-hippocampus", "georeg-hippocampus"),
    "brains": ("istn-brains", "georeg-brains"),
    "template": ("istn-brains", "georeg-brains"),
    "colin": ("istn-brains", "georeg-brains"),
    "slices": ("istn-slices",),
    "retina": ("georeg-retina",),
}


@dataclass(frozen=True)
class Options:
    """Command line.

    Args:
        quick: tiny stand-in data and no models: shows that it runs, and nothing else.
        json: also write the numbers to this file, and the tables beside it as markdown.
        parts: of the benchmark.
        pairs: test pairs at most, of each part.
        tools: only those whose name contains one of these.
        weights: folder of the models.
        threads: of torch; the other tools are told to take one.
    """

    quick: bool = False
    json: Path | None = None
    parts: tuple[Part, ...] = tuple(MODELS)
    pairs: int = 50
    tools: tuple[str, ...] = ()
    weights: Path = WEIGHTS
    threads: int = 1


def trial(part: Part, options: Options) -> Trial:
    """The pairs of one part: those of the cards, as far as they go.

    Raises:
        FileNotFoundError: if the data have not been fetched; the message has the command.
    """
    if options.quick:
        flat = part in ("slices", "retina")
        cohort = networks.stand_in(Grid((48, 48)) if flat else Grid((32, 32, 32), (2.0,)), people=6)
        return Trial(part, "stand-ins", cohort, networks.pairs_to_test(cohort, 1))
    cohort = networks.load_cohort(find_recipe(MODELS[part][0]).data)
    if part in REAL:
        read, name = REAL[part]
        cohort = beside(cohort, read(cohort.grid.spacing[0], cohort.grid.shape, sides="merged"))
        what = f"{name} with each test person of brains, whose T1 is synthetic, both ways"
        return Trial(part, what, cohort, networks.pairs_to_test(cohort, options.pairs))
    people = len({cohort.people[i] for i in cohort.splits["test"]})
    what = f"{people} {'eyes' if part == 'retina' else 'people'} of {cohort.name} that are kept for testing"
    return Trial(part, what, cohort, networks.pairs_to_test(cohort, options.pairs))


def beside(brains: Cohort, real: Cohort) -> Cohort:
    """One real image, and the test people of ``brains``, of whom each makes two pairs with it.

    A structure that the real one lacks nobody has here: AAL, the atlas of Colin27, has no accumbens. Its other outlines
    are more generous than FreeSurfer's, for every method alike: compare the methods, and not these Dice with others.

    Args:
        brains: with people to test on.
        real: one image, on the same grid.
    """
    chosen = list(brains.splits["test"])
    channels = [list(brains.structures).index(label) for label in real.structures]
    labels = brains.labels[chosen]
    labels = torch.where(torch.isin(labels, torch.tensor(list(real.structures))), labels, 0)
    both_ways = [pair for k in range(len(chosen)) for pair in ((len(chosen), k), (k, len(chosen)))]
    return replace(
        real,
        images=torch.cat([brains.images[chosen], real.images]),
        soi=torch.cat([brains.soi[chosen][:, channels], real.soi]),
        labels=torch.cat([labels, real.labels]),
        people=(*(brains.people[i] for i in chosen), *real.people),
        splits={"train": (), "validation": (), "test": tuple(range(len(chosen) + 1))},
        origin=f"{real.origin} {brains.origin}",
        given_pairs={"test": tuple(both_ways)},
    )


def methods(part: Part, grid: Grid, options: Options) -> dict[str, Method]:
    """Every way of registering a pair, by name: nothing, the tools that are here, the models."""
    found: dict[str, Method] = {NOTHING: lambda moving, fixed: Identity(grid.dim)}
    for name, tool in TOOLS.items():
        if tool.here and grid.dim in tool.dims and _wanted(name, options):
            found[name] = partial(tool, grid=grid)
    if options.quick:
        return found
    for name in MODELS[part]:
        model = load(options.weights / f"{name}{SUFFIX}")
        found[f"{name}, one pass"] = partial(one_pass, model=model, grid=grid)
        found[f"{name}, refined"] = partial(refined, model=model, grid=grid)
    return found


def _wanted(name: str, options: Options) -> bool:
    return not options.tools or any(part.lower() in name.lower() for part in options.tools)


def show(trial: Trial, records: Sequence[Mapping[str, Any]], options: Options) -> Table:
    """A row a method, and what each was told."""
    table = Table(
        f"{len(trial.pairs)} pair(s) of {trial.part}: {trial.what}",
        ("method", "Dice", "HD95, mm", "folding, %", "SDlogJ", "s a pair", "peak, MB"),
    )
    for r in records:
        still = r["method"] == NOTHING
        cost = ("-", "-") if still else (number(r["seconds"], 2), f"{r['peak_mb']:,.0f}")
        table.add(
            r["method"], number(r["dice"]), number(r["hd95"], 2), number(r["folding"], 3), number(r["sdlogj"]), *cost
        )
    measured_here = {r["method"] for r in records}
    for name, tool in TOOLS.items():
        if name in measured_here:
            table.notes.append(f"{name}: {tool.settings}.")
        elif trial.cohort.grid.dim in tool.dims and _wanted(name, options):
            table.notes.append(f"{name} is not installed here, and not measured.")
    table.notes += [trial.cohort.origin, "s a pair: processor seconds of the whole registration, median."]
    return table


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; see the module."""
    options = tyro.cli(Options, args=arguments)
    if options.pairs < 1:
        raise ValueError(f"Pairs are 1 or more, but they are {options.pairs}.")
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    before = hardware(device)
    found: list[Table] = []
    records: list[dict[str, Any]] = []
    for part in options.parts:
        try:
            chosen = trial(part, options)
        except FileNotFoundError as error:
            found.append(Table(f"{part}: left out", (), notes=[str(error)]))
            continue
        figures, peaks = measured(chosen, methods(part, chosen.cohort.grid, options), device)
        rows = [
            {"part": part, "what": chosen.what, "method": name, "peak_mb": peaks[name]} | networks.summary(values)
            for name, values in figures.items()
        ]
        found.append(show(chosen, rows, options))
        records += rows
        print(f"{part}: {chosen.what}, done", flush=True)
    facts = {"seeds": (0,), "quick": options.quick, "hardware": before}
    return tables.report("benchmarks.other_tools", arguments, options.json, found, records, facts)


if __name__ == "__main__":
    tables.command(main)
