"""Tables of a benchmark, on the screen, as markdown and as JSON, with sentences that are worked out from the numbers.

What one run can not measure (a GPU on a CPU, and the other way round) is "not measured". Files are written whole or not
at all.
"""

import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as ScreenTable

from benchmarks.harness import hardware
from regteach.training import write_whole

NOT_MEASURED = "not measured"
QUICK = "Quick mode: stand-in data and networks, two steps each; the numbers mean nothing.\n\n"


@dataclass
class Table:
    """A table as it is shown, with sentences under it."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """A row.

        Raises:
            ValueError: if it has not one cell a column.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"A row of {len(cells)} cells does not fit the {len(self.columns)} columns: {cells}.")
        self.rows.append(cells)

    def markdown(self) -> str:
        """Title, table and sentences."""
        lines = [f"## {self.title}", ""]
        if self.rows:
            lines += [_line(self.columns), "|" + "---|" * len(self.columns), *map(_line, self.rows), ""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)]).rstrip() + "\n"

    def show(self) -> None:
        """The same on the screen."""
        screen = ScreenTable(title=self.title)
        for k, name in enumerate(self.columns):
            screen.add_column(name, justify="left" if k < 2 else "right", no_wrap=True)
        for cells in self.rows:
            screen.add_row(*cells)
        console = Console(width=200, soft_wrap=True)
        if self.rows:
            console.print(screen)
        else:
            console.print(self.title, style="italic")
        for note in self.notes:
            console.print(f"- {note}", highlight=False, markup=False)


def number(value: float | None, digits: int = 3) -> str:
    """A cell."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def aim(what: str, value: float, target: float, at_least: bool = True, digits: int = 3) -> str:
    """Whether a number is where it was meant to be, and by how much."""
    reached = value >= target if at_least else value <= target
    side = "at least" if at_least else "at most"
    verdict = "reached" if reached else f"missed by {abs(value - target):.{digits}f}"
    return f"{what}: {value:.{digits}f}; the aim is {side} {target:g}: {verdict}."


def ranked(scores: Mapping[str, float], digits: int = 3) -> str:
    """Names from the highest score to the lowest, with the scores."""
    order = sorted(scores, key=lambda name: scores[name], reverse=True)
    return " > ".join(f"{name} {scores[name]:.{digits}f}" for name in order)


def ranked_over_seeds(scores: Mapping[str, Mapping[int, float]]) -> str:
    """Names from the highest mean score to the lowest, and in how many of the seeds common to all the order holds.

    Args:
        scores: of each name, by seed.
    """
    means = {name: mean(list(found.values())) for name, found in scores.items()}
    seeds = sorted(set.intersection(*(set(found) for found in scores.values())))

    def order(values: Mapping[str, float]) -> list[str]:
        return sorted(values, key=lambda name: values[name], reverse=True)

    same = sum(order({name: scores[name][seed] for name in means}) == order(means) for seed in seeds)
    return ranked(means) + (f"; the same order in {same} of {len(seeds)} seeds" if len(seeds) > 1 else "")


def in_parts(counts: Mapping[str, int]) -> str:
    """How many parameters each part of a network has."""
    return "Parameters: " + ", ".join(f"{part} {count:,}" for part, count in counts.items()) + "."


def over_seeds(values: Sequence[float], digits: int) -> str:
    """A cell: the mean, and the standard deviation where there are several."""
    sd = spread(values)
    return number(mean(values), digits) + ("" if math.isnan(sd) else f" ± {number(sd, digits)}")


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; nan of nothing."""
    return sum(values) / len(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """Standard deviation (n - 1); nan of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def report(
    module: str,
    arguments: Sequence[str] | None,
    json_file: Path | None,
    tables: Sequence[Table],
    records: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Show the tables, write the files that were asked for, and return what the JSON holds.

    Args:
        module: of the benchmark, as Python runs it.
        arguments: of its command line; those of this process where left out.
        json_file: where to, with the markdown beside it.
        tables: what is shown.
        records: the numbers behind them.
        facts: "seeds", "quick", and "hardware" as it was at the start.
    """
    before = facts["hardware"]
    record = {
        "command": shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)]),
        "date": time.strftime("%Y-%m-%d"),
        **facts,
        "load_average_after": hardware(torch.device("cpu"))["load_average"],
        "gpu": before["gpu"] or NOT_MEASURED,
        "tables": [asdict(table) for table in tables],
        "records": [dict(r) for r in records],
    }
    for table in tables:
        table.show()
    if json_file is None:
        return record
    on = ", ".join(f"{key} {value}" for key, value in before.items() if value is not None)
    seeds = ", ".join(map(str, facts["seeds"]))
    text = QUICK * bool(facts["quick"]) + (
        f"`{record['command']}`, {record['date']}, seeds {seeds}. Measured on: {on}. GPU: {record['gpu']}. "
        "Research and teaching, not for clinical use.\n\n"
    )
    text += "\n".join(table.markdown() for table in tables)
    data = json.dumps(_plain(record), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    json_file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(json_file, lambda path: path.write_text(data, encoding="utf-8"))
    write_whole(json_file.with_suffix(".md"), lambda path: path.write_text(text, encoding="utf-8"))
    return record


def command(main: Callable[[], object]) -> None:
    """Run a benchmark from the shell: what is wrong is one sentence."""
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _plain(value: Any) -> Any:
    """As JSON wants it: numbers rounded to five digits, null for one that could not be measured."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
