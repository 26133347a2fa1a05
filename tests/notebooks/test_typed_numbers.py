"""Results that are typed in the lessons' prose: each is what its source says, and no other stands there.

A number that a cell prints is computed anew in every run. One that is typed in a text goes stale without a sign, so
each is listed here with the place that it comes from. The scan takes a decimal number, and a whole one in percent or
micrometres, for a result until a line here says otherwise. It does not see code in backticks, numbers in words, and
whole millimetres, which are settings nearly everywhere: pixels, windows, shifts.
"""

import ast
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LESSONS = ("04", "05", "06", "07", "08", "09", "10", "11")
WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 10: "ten", 20: "twenty"}
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
FIGURE = re.compile(
    r"(?<![\w.])\d+\.\d+(?!\.?\d)(?: ?%)?"  # a decimal number, but no version such as 1.2.3
    r"|(?<![\w.,])\d[\d,]*(?= ?(?:%|percent|per cent|micrometres))"
)


@cache
def cells(lesson: str) -> dict[str, str]:
    """The texts of a lesson's markdown cells, by cell id."""
    (path,) = (ROOT / "notebooks").glob(f"{lesson}_*.ipynb")
    told = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in told if cell["cell_type"] == "markdown"}


def word(number: int) -> str:
    """A number as the lessons write it: the small ones in words."""
    return WORDS.get(number, str(number))


# Sources: the committed benchmarks, and the paper's table as lesson 05 prints it.


@cache
def benchmark(name: str) -> dict[str, Any]:
    """What benchmarks/results/NAME.json holds."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def average(name: str, value: str, **wanted: Any) -> float:
    """A value's mean over those records of a benchmark that have these entries."""
    rows = [row for row in benchmark(name)["records"] if wanted.items() <= row.items()]
    assert rows, f"{name}.json has no record with {wanted}"
    return mean(row[value] for row in rows)


def refined(kind: str, model: str, name: str = "istn_brains", **wanted: Any) -> float:
    """Dice of a refined model in our Table 1."""
    return average(name, "dice", kind=kind, model=model, way="refined", **wanted)


def drawn_gap(kind: str) -> float:
    """How far drawn maps stay below the SoI, in Dice, when both are registered alike."""
    best, drawn = (
        average("istn_brains_gap", "dice", kind=kind, maps=maps) for maps in ("SoI itself", "as the ITN draws it")
    )
    return best - drawn


def training(name: str) -> tuple[int, int]:
    """How many people our Table 1 trained on, and for how many steps."""
    told = benchmark(name)
    people = re.search(r"train on (\d+)", told["tables"][0]["title"])
    steps = re.search(r"--steps (\d+)", told["command"])
    assert people, f"{name}.json does not say how many people were trained on"
    assert steps, f"{name}.json does not say for how many steps"
    return int(people[1]), int(steps[1])


@cache
def paper() -> dict[str, dict[str, tuple[float | None, ...]]]:
    """Table 1 of the ISTN paper: Dice in one pass and refined, then ASD."""
    (path,) = (ROOT / "notebooks").glob("05_*.ipynb")
    told = json.loads(path.read_text(encoding="utf-8"))["cells"]
    (source,) = ("".join(cell["source"]) for cell in told if cell["id"] == "paper")
    return ast.literal_eval(source[source.index("{") : source.rindex("}") + 1])


def paper_gap(kind: str) -> float:
    """How far the paper's refined ISTN-e stays below its ceiling, in Dice."""
    best, reached = paper()[kind]["SoI itself"][1], paper()[kind]["ISTN-e"][1]
    assert best is not None
    assert reached is not None
    return best - reached


def seeds_apart() -> float:
    """How far apart the two seeds of the refined affine ISTN-i ended, in Dice."""
    first, second = (refined("affine", "ISTN-i", seed=seed) for seed in benchmark("istn_brains")["seeds"])
    return abs(first - second)


def of_trees(size: int, model: str = "ISTN-e", way: str = "one pass", **wanted: Any) -> float:
    """TRE on the test trees after training on so many pairs, mm."""
    return average("istn_stress", "tre", part="pairs", model=model, way=way, training_pairs=size, **wanted)


def five_against_80() -> float:
    """The most that 80 pairs instead of 5 are worth after refinement, over the seeds, mm."""
    ways = {"way": "refined"}
    seeds = benchmark("istn_stress")["seeds"]
    return max(abs(of_trees(5, seed=seed, **ways) - of_trees(80, seed=seed, **ways)) for seed in seeds)


def as_one_moved() -> tuple[str, str]:
    """Between which numbers of pairs one pair lies that was moved at random, by TRE in one pass."""
    moved = of_trees(1, "ISTN-e, moved")
    sizes = {row["training_pairs"] for row in benchmark("istn_stress")["records"] if row.get("part") == "pairs"} - {0}
    return (
        word(max(size for size in sizes if of_trees(size) >= moved)),
        word(min(size for size in sizes if of_trees(size) <= moved)),
    )


def digits(model: str) -> float:
    """Dice on test digits of a network with the small budget."""
    return average("georeg_digits", "dice", model=model)


def slices(method: str) -> float:
    """End-point error on slices of brains in the large range, mm."""
    return average("georeg_large", "error", set="slices", range="large", method=method)


def warped(measure: str, name: str = "digits", **wanted: Any) -> float:
    """Percent of a figure of the networks that were taken apart."""
    return 100 * average("georeg_warping", measure, set=name, **wanted)


def lost(name: str, trained: str = "points", tested: str = "features") -> float:
    """By how many percent of its error a network gets worse in the way that it was not trained in."""
    rows = [r for r in benchmark("georeg_warping")["records"] if (r["set"], r["moves"]) == (name, trained)]
    return 100 * mean(r[f"error, {tested}"] / r[f"error, {trained}"] - 1 for r in rows)


def two_contrasts(method: str) -> float:
    """Dice of two people, one in T1 and one in T2."""
    return average("georeg_brains_t1t2", "dice", part="brains-t1t2", method=method)


@dataclass(frozen=True)
class Typed:
    """A text of a lesson with a place for each figure, and the function that computes these figures."""

    lesson: str
    cell: str
    text: str
    values: Callable[[], tuple[Any, ...]]

    def expected(self) -> str:
        """The text as it has to stand in the cell."""
        return self.text.format(*self.values())


NOTHING = "it ends where doing nothing does ({:.2f})"
TYPED = [
    Typed("04", "table-after", "(Dice from {:.2f} to {:.2f}, affine)", lambda: paper()["affine"]["STN-s"][:2]),
    Typed(
        "05",
        "shipped-after",
        "(On {} test pairs, in `benchmarks/results/istn_brains_shipped.md`, `istn-hippocampus` ends at {:.2f}; the "
        "maps themselves, registered with the transform of the table below for 200 steps, at {:.2f}.)",
        lambda: (
            benchmark("istn_brains_shipped")["records"][0]["pairs"],
            average("istn_brains_shipped", "dice", way="refined"),
            average("istn_brains_shipped", "dice", way="SoI itself"),
        ),
    ),
    Typed(
        "05",
        "committed-after",
        "with {} people to learn from and {} steps",
        lambda: (word(training("istn_brains_donors")[0]), training("istn_brains_donors")[1]),
    ),
    Typed("05", "committed-after", NOTHING, lambda: (average("istn_brains_donors", "dice", model="Id"),)),
    Typed("05", "committed-after", NOTHING, lambda: (refined("affine", "ISTN-i", "istn_brains_donors"),)),
    Typed("05", "committed-after", NOTHING, lambda: (refined("bspline", "ISTN-i", "istn_brains_donors"),)),
    Typed(
        "05",
        "committed-after",
        "maps is {:.0f} % of that of their structures; with ISTN-e it is {:.0f} %",
        lambda: tuple(
            100 * average("istn_brains_donors", "maps_apart", kind="affine", model=model, way="refined")
            for model in ("ISTN-i", "ISTN-e")
        ),
    ),
    Typed("05", "committed-after", "with {} people and {:,} steps", lambda: training("istn_brains")),
    Typed(
        "05",
        "committed-after",
        "ISTN-e stays {:.2f} (affine) and {:.2f} (B-spline) below the ceiling",
        lambda: tuple(refined(kind, "SoI itself") - refined(kind, "ISTN-e") for kind in ("affine", "bspline")),
    ),
    Typed(
        "05",
        "committed-after",
        "where the paper's stays {:.2f} and {:.2f}",
        lambda: (paper_gap("affine"), paper_gap("B-spline")),
    ),
    Typed(
        "05",
        "committed-after",
        "its lead over STN-u is larger, {:.2f} and {:.2f}.",
        lambda: tuple(refined(kind, "ISTN-e") - refined(kind, "STN-u") for kind in ("affine", "bspline")),
    ),
    Typed(
        "05",
        "committed-after",
        "It stays {:.2f} (affine) and {:.2f} (B-spline) below the maps themselves",
        lambda: tuple(drawn_gap(kind) for kind in ("affine", "bspline")),
    ),
    Typed("05", "committed-after", "the two seeds of ISTN-i end {:.2f} apart", lambda: (seeds_apart(),)),
    Typed(
        "06",
        "pairs-after",
        "all speak of less than {:.1f} mm",
        lambda: (math.ceil(10 * five_against_80()) / 10,),
    ),
    Typed("06", "pairs-after", "about as well in one pass as {} to {} pairs as they are", as_one_moved),
    Typed(
        "08",
        "without-after",
        "what it helps is the Dice, {:.2f} with it and {:.2f} without",
        lambda: (digits("same network"), digits("supervised within levels")),
    ),
    Typed("09", "trained-after", "over {} seeds;", lambda: (word(len(benchmark("georeg_large")["seeds"])),)),
    Typed(
        "09",
        "trained-after",
        "(large range: {:.1f} mm before, GeoReg {:.1f}, an affine {:.1f}, free-form {:.1f})",
        lambda: tuple(map(slices, ("nothing", "GeoReg", "affine", "free-form"))),
    ),
    Typed(
        "09",
        "trained-after",
        "it is {:.0f} % before training, and after it {:.0f} % in the networks that moved points and {:.0f} %",
        lambda: (
            warped("left untrained, level 1"),
            warped("left, level 1", moves="points"),
            warped("left, level 1", moves="features"),
        ),
    ),
    Typed(
        "09",
        "trained-after",
        "by {:.0f} % on digits, by {:.0f} % on slices, and not at all on whole brains",
        lambda: (lost("digits"), lost("slices")),
    ),
    Typed("09", "trained-after", "tested with points, {:.0f} %", lambda: (lost("digits", "features", "points"),)),
    Typed(
        "09",
        "imitate-after",
        "the mean Dice of the test pairs differs by {:.3f}.",
        lambda: (abs(two_contrasts("GeoReg, refined") - two_contrasts("greedy search from nothing")),),
    ),
]

# What the scan finds and nobody measured: lesson, cell, text, and why it may stand.
ALLOWED = [
    ("05", "balls-text", "a Dice of 0.8 says nothing", "an example"),
    ("06", "pairs-after", "its limits (2 and 1.25 times)", "limits of the prediction's answers"),
    ("06", "amount-text", "above 0.7", "a threshold"),
    ("06", "long-text", "a standard deviation of 0.3", "a setting"),
    ("06", "long-big-text", "by 0.01 or more", "the definition of a fall"),
    ("07", "continuous-text", "A point at 7.3 mm has neighbours at offsets of 0.3, 1.3, -0.7 mm", "an example"),
    ("07", "parity-text", "1 by 1.5 mm", "the size of a pixel"),
    ("08", "objective-text", "its weight, 0.3 here", "a setting"),
    ("08", "stiff-after", "half a window, 1.5 pixels", "half of 3, by definition"),
    ("08", "stiff-after", "at 28 x 28 it is 1.5 mm", "the same in mm"),
    ("09", "retina-text", "by up to 250 micrometres", "a setting of the training"),
    ("09", "shift-why", "at 600 micrometres", "a shift that the lesson sets"),
    ("09", "shift-why", "up to 250 micrometres", "a setting of the training"),
    ("10", "slope-text", "$d(y) = 0.2\\,y$", "an example"),
    ("11", "plausible-text", "0.5 to half", "a definition"),
    ("11", "e4-text", "A spacing of 1.5 mm", "an example of the exercise"),
    ("11", "ct-text", "CC BY 3.0", "a licence"),
]


def untold(text: str, explained: list[str]) -> list[str]:
    """The figures of a text that lie in none of the explained parts of it, with what stands about them."""
    spans = [found.span() for part in explained for found in re.finditer(re.escape(part), text)]
    prose = CODE.sub(lambda code: "_" * len(code[0]), text)
    return [
        text[max(0, found.start() - 40) : found.end() + 20]
        for found in FIGURE.finditer(prose)
        if not any(start <= found.start() and found.end() <= end for start, end in spans)
    ]


@pytest.mark.parametrize("typed", TYPED, ids=lambda typed: f"{typed.lesson}-{typed.cell}")
def test_a_typed_result_is_what_its_source_says(typed: Typed):
    expected = typed.expected()
    assert expected in cells(typed.lesson)[typed.cell], f"by its source the text has to be {expected!r}"


@pytest.mark.parametrize("lesson", LESSONS)
def test_no_other_result_is_typed(lesson: str):
    complaints = []
    for cell, text in cells(lesson).items():
        explained = [typed.expected() for typed in TYPED if (typed.lesson, typed.cell) == (lesson, cell)]
        explained += [part for where, at, part, _ in ALLOWED if (where, at) == (lesson, cell)]
        complaints += [f"{lesson}, cell {cell}: where is this from? ...{part}..." for part in untold(text, explained)]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(("lesson", "cell", "part", "reason"), ALLOWED)
def test_what_is_allowed_still_stands(lesson: str, cell: str, part: str, reason: str):
    assert untold(part, []), f"no figure in {part!r}"
    assert part in cells(lesson)[cell], f"{part!r} ({reason}) stands there no more: take it off the list"


def test_the_scan_sees_a_result():
    text = "At 3 mm and `rate=0.5`, on 20 pairs, Dice rose by 12 % to 0.83, off by 90 micrometres; torch 2.13.0."
    assert [part.count("Dice") for part in untold(text, [])] == [1, 1, 1]
    assert len(untold(text, ["to 0.83"])) == 2
    assert not untold(text, ["Dice rose by 12 % to 0.83, off by 90 micrometres"])
