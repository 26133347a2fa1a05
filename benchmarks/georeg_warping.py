"""Why points that move hardly lead features that are warped: what one warp costs features that were trained.

    python -m benchmarks.georeg_warping [--quick] [--json FILE] [--sets digits slices brains] [--seeds 0 1 2]

The argument for points is that to read features between their pixels is to average them, and that averages forget
(lesson 07 measures it, on codes made by hand). :mod:`benchmarks.georeg_large` finds no lead of GeoReg over the same
network with warped features. Here both, trained as there, are taken apart:

- share left: of the variance of their features, how much an average of neighbours keeps (2^d voxels, as far from all
  pixels as can be), for each level that takes steps, over the test images; beside it the same encoder before training;
- exchanged: each trained network on the test pairs of the largest range, in its own way, and in that of the other
  (points for features, features for points, no weight changed). What its features hold that averages lose, a network
  that was trained on points has to miss when they are warped.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks import georeg_large as large
from benchmarks import networks, tables
from benchmarks.tables import Table, mean, over_seeds
from regteach.data.cohort import Cohort
from regteach.data.large import FAMILIES, RANGES
from regteach.nets.georeg import MOVES, GeoReg
from regteach.transforms import Dense

TRAINED = {large.GEOREG: "points", large.ABLATION: "features"}  # method -> what it moves in training
LARGEST = list(RANGES)[-1]


@dataclass(frozen=True)
class Options(networks.Options):
    """Command line.

    Args:
        sets: as in ``georeg_large``.
        seeds: of the trainings.
    """

    sets: tuple[str, ...] = ("digits", "slices")
    seeds: tuple[int, ...] = (0, 1, 2)


def chosen(options: Options) -> dict[str, str]:
    """Which of the two networks the command line asks for.

    Raises:
        ValueError: if it is neither.
    """
    asked = large.wanted(options)
    found = {method: moves for method, moves in TRAINED.items() if method in asked}
    if not found:
        raise ValueError(f"The networks that are taken apart are {' and '.join(TRAINED)}, not {', '.join(asked)}.")
    return found


def share_left(features: Tensor) -> float:
    """Variance of features half-way between all pixels over that at the pixels, over images and channels."""
    pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[features.ndim - 2]
    varying = features - features.mean(tuple(range(2, features.ndim)), keepdim=True)
    return float(pool(varying, 2, stride=1).square().mean() / varying.square().mean())


def exchanged(network: GeoReg, moves: str) -> GeoReg:
    """The same network, with the same weights, that moves points, or warps features."""
    other = copy.copy(network)
    other.config = replace(network.config, moves=moves)
    return other


@torch.no_grad()
def shares(network: GeoReg, images: Tensor) -> dict[str, float]:
    """:func:`share_left` of every level that takes steps, by its name: finest first."""
    pyramid = network.encoders[0](images)
    return {f"level {level}": share_left(pyramid[level]) for level, steps in enumerate(network.config.steps) if steps}


def errors(network: GeoReg, setup: large.Setup, cohort: Cohort, device: torch.device) -> float:
    """Mean end-point error over the test pairs of all families at the largest range, mm."""
    found = []
    for family in FAMILIES:
        test = large.to_test(cohort, family, LARGEST, setup.test)
        pairs = test.pairs("test")
        moving, fixed = (test.images[[pair[k] for pair in pairs]].to(device) for k in (0, 1))

        find = partial(large.one_pass, network=network, grid=cohort.grid)
        field = large.fields(find, moving, fixed, cohort.grid, setup.at_once)
        found.append(mean(large.figures(test, pairs, Dense(field, cohort.grid))["error"]))
    return mean(found)


def rows_of(name: str, setup: large.Setup, options: Options) -> tuple[list[dict[str, Any]], Cohort]:
    """A row for each network, trained or not yet: its shares, and its errors in both ways."""
    cohort, device = setup.load(), torch.device(options.device)
    pool = large.mixture(cohort, setup.train, setup.copies)
    images = cohort.images[list(cohort.splits["test"])].to(device)
    rows: list[dict[str, Any]] = []
    for method, own in chosen(options).items():
        for seed in options.seeds:
            recipe = large.recipe_of(method, setup, pool, seed, options.steps)
            done = networks.trained(recipe, pool, options.runs)
            network = done.model.to(device)
            torch.manual_seed(seed)
            before = GeoReg(recipe.config).to(device)
            row: dict[str, Any] = {"set": name, "method": method, "moves": own, "seed": seed}
            row |= {"best_step": done.best["step"], "training_seconds_wall": done.seconds}
            row |= {f"left, {level}": value for level, value in shares(network, images).items()}
            row |= {f"left untrained, {level}": value for level, value in shares(before, images).items()}
            row |= {f"error, {moves}": errors(exchanged(network, moves), setup, cohort, device) for moves in MOVES}
            rows.append(row)
    return rows, cohort


def show(name: str, rows: Sequence[Mapping[str, Any]], cohort: Cohort) -> Table:
    """A row a way of training: what averages keep of the features, and what becomes of the error when it changes."""
    levels = [key.removeprefix("left, ") for key in rows[0] if key.startswith("left, ")]
    table = Table(
        f"{name}: networks of {len({row['seed'] for row in rows})} seed(s), range {LARGEST}",
        ("trained with", *(f"% left, {level}" for level in levels), "error with points, mm",
         "error with warped features, mm"),
    )  # fmt: skip

    def cells(some: Sequence[Mapping[str, Any]], key: str) -> list[str]:
        return [over_seeds([100 * row[f"{key}, {level}"] for row in some], 1) for level in levels]

    table.add("nothing yet", *cells(rows, "left untrained"), "-", "-")
    for own in dict.fromkeys(row["moves"] for row in rows):
        trained = [row for row in rows if row["moves"] == own]
        error = [over_seeds([row[f"error, {moves}"] for row in trained], 2) for moves in MOVES]
        table.add("points" if own == "points" else "warped features", *cells(trained, "left"), *error)
    table.notes += [*statements(rows), cohort.origin]
    return table


def statements(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a network loses by the way it was not trained in, in percent of its own error, over the seeds."""
    said = []
    for own, other in (("points", "features"), ("features", "points")):
        lost = [100 * (row[f"error, {other}"] / row[f"error, {own}"] - 1) for row in rows if row["moves"] == own]
        if not lost:
            continue
        worse = sum(value > 0 for value in lost)
        said.append(
            f"Trained with {own}, tested with {other}: the error changes by {over_seeds(lost, 1)} %, and is larger "
            f"with {worse} of {len(lost)} seeds."
        )
    return said


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; see the module."""
    options = tyro.cli(Options, args=arguments)
    large.check(options.sets, options.seeds, options.steps)
    chosen(options)
    torch.set_num_threads(options.threads)
    facts = {
        "seeds": options.seeds,
        "quick": options.quick,
        "hardware": networks.hardware(torch.device(options.device)),
    }
    shown: list[Table] = []
    every: list[dict[str, Any]] = []
    for name, setup in (large.small() if options.quick else {n: large.SETUPS[n] for n in options.sets}).items():
        try:
            rows, cohort = rows_of(name, setup, options)
        except FileNotFoundError as error:
            shown.append(Table(f"{name}: left out", (), notes=[str(error)]))
            continue
        shown.append(show(name, rows, cohort))
        every += rows
    return tables.report("benchmarks.georeg_warping", arguments, options.json, shown, every, facts)


if __name__ == "__main__":
    tables.command(main)
