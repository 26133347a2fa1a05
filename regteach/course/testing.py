"""Everything that must hold before a change is published: `regteach test`.

The stages run one after the other, all of them even where one fails. A stage is a command; those that are pytest
report how many tests passed. The last line, `N passed, N failed, N skipped`, counts over all stages: a stage that is
not pytest counts one, except the notebooks, which count one each.
"""

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from regteach.bootstrap import alone
from regteach.course import checks, run, site
from regteach.course.layout import Course

CELL_TIMEOUT = 300


@dataclass(frozen=True)
class Count:
    """How a stage ended."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)


@dataclass(frozen=True)
class Bench:
    """What the stages share."""

    course: Course
    console: Console
    force: bool
    jobs: int

    def command(self, *arguments: str) -> Count:
        """A Python module as a stage: passed or failed."""
        status = subprocess.call([sys.executable, *arguments], cwd=self.course.root, env=_environment())
        return Count(failed=1) if status else Count(passed=1)

    def pytest(self, name: str, *arguments: str, environment: dict[str, str] | None = None) -> Count:
        """A run of pytest as a stage, counted from its report."""
        report = self.course.build / "reports" / f"{name}.xml"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
        status = subprocess.call(command, cwd=self.course.root, env=environment or _environment())
        return read_report(report, status)

    def notebooks(self) -> Count:
        """Papermill on every lesson and every solution, the site, and what can be said of outputs only."""
        with alone(self.course.build / "run.lock", "run of the course"):
            return self._notebooks()

    def _notebooks(self) -> Count:
        files = self.course.files("lesson") + self.course.files("solution")
        results = run.run(files, run.Settings(force=self.force, jobs=self.jobs), self.console)
        run.explain(results, self.console)
        self.console.print(run.table(results))
        failed = {result.file.output for result in results if not result.passed}
        for result in results:
            for complaint in checks.executed_complaints(result.file.output) if result.outcome else ():
                self.console.print(f"{result.file.title}: {complaint}", markup=False)
                failed.add(result.file.output)
        site.build(self.course)
        return Count(len(results) - len(failed), len(failed))


def read_report(report: Path, status: int) -> Count:
    """Count the tests of a pytest report.

    Args:
        report: a JUnit XML file; a run that did not come to write it counts as one failure.
        status: pytest's exit status; 5, no tests, counts as nothing.
    """
    if not report.exists():
        return Count() if status == 5 else Count(failed=1)
    total = Count()
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        number, bad, skipped = (int(suite.get(name, 0)) for name in ("tests", "failures", "skipped"))
        bad += int(suite.get("errors", 0))
        total += Count(number - bad - skipped, bad, skipped)
    return total + Count(failed=int(status not in (0, 5) and not total.failed))


def _nbval(bench: Bench) -> Count:
    folders = [str(bench.course.build / name) for name in ("notebooks", "solutions")]
    options = ["--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={CELL_TIMEOUT}", "--dist", "loadscope"]
    return bench.pytest("nbval", *options, "-n", str(bench.jobs), *folders, environment=run.lesson_environment())


STAGES: dict[str, Callable[[Bench], Count]] = {
    "ruff": lambda bench: bench.command("-m", "ruff", "check"),
    "mypy": lambda bench: bench.command("-m", "mypy"),
    "imports": lambda bench: bench.command(
        "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"
    ),
    "unit": lambda bench: bench.pytest(
        "unit", "-n", str(bench.jobs), "tests", "--ignore=tests/notebooks", "--ignore=tests/browser"
    ),
    "static": lambda bench: bench.pytest("static", "tests/notebooks"),
    "notebooks": Bench.notebooks,
    "nbval": _nbval,
    "browser": lambda bench: bench.pytest("browser", "-rs", "tests/browser"),
}


def main(only: tuple[str, ...] = (), *, force: bool = False, jobs: int = 2) -> int:
    """Run the stages and print their table.

    Args:
        only: names of stages; all when empty.
        force: execute notebooks that have not changed, too.
        jobs: how many tests or notebooks at a time.

    Returns:
        0 where nothing failed, 1 otherwise.

    Raises:
        ValueError: a stage of that name does not exist.
    """
    for name in only:
        if name not in STAGES:
            raise ValueError(f"there is no stage {name!r}; the stages are {', '.join(STAGES)}")
    bench = Bench(Course(), Console(), force, jobs)
    table, total = Table("stage", "result"), Count()
    for heading in ("passed", "failed", "skipped", "seconds"):
        table.add_column(heading, justify="right")
    for name in only or STAGES:
        bench.console.rule(name, align="left")
        begin = time.perf_counter()
        count = STAGES[name](bench)
        seconds = time.perf_counter() - begin
        word = "[bold red]FAILED[/]" if count.failed else "[green]ok[/]" if count.passed else "nothing to do"
        table.add_row(name, word, str(count.passed), str(count.failed), str(count.skipped), f"{seconds:.0f}")
        total += count
    bench.console.print(table)
    sys.stdout.flush()
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped", flush=True)
    return int(total.failed > 0)


def _environment() -> dict[str, str]:
    return {**os.environ, **run.THREADS}
