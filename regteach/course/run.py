"""Every notebook executed, a few at a time, each in a process of its own with the network blocked.

A notebook is executed again only when its fingerprint has changed: that of the notebook, its parameters, its lesson's
texts, the package's sources, the lock, and which of its data sets are there: it may use more than it needs.
"""

import concurrent.futures
import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import data_download
from data_download.store import presence
from regteach.bootstrap import LOCK, ROOT
from regteach.course import offline
from regteach.course.execute import Order
from regteach.course.layout import NotebookFile, Outcome

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Settings:
    """How notebooks are executed.

    Args:
        full: the full-length course (FAST=False).
        force: execute what has not changed, too.
        jobs: how many at a time.
        cell_timeout: seconds that one cell may take; 300, or 7200 at full length, when None.
    """

    full: bool = False
    force: bool = False
    jobs: int = 2
    cell_timeout: float | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """What the cell tagged `parameters` gets."""
        return {"FAST": not self.full, "SEED": 0, "DEVICE": "auto"}


@dataclass(frozen=True)
class Finished:
    """What became of one notebook."""

    file: NotebookFile
    outcome: Outcome | None
    executed: bool = True
    crash: str = ""
    troubles: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether everything that it must show was shown."""
        return not self.troubles


def fingerprint(file: NotebookFile, parameters: dict[str, Any]) -> str:
    """Digest of everything that an executed notebook depends on."""
    course, number = file.course, file.number
    package, own = course.root / "regteach", {f"{number}.toml", f"lesson_{number}.py"}
    sources = [p for p in package.rglob("*.py") if p.relative_to(package).parts[0] not in ("course", "lessons")]
    sources = [p for p in sources if p.parent != package or p.name not in ("cli.py", "bootstrap.py", "__main__.py")]
    sources += [package / "course" / "execute.py", Path(offline.__path__[0]) / "sitecustomize.py"]
    machine = [p for p in (package / "lessons").glob("*.py") if not p.name.startswith("lesson_")]
    texts = [p for p in course.lesson_texts.glob("*") if p.name in own]
    data = list((course.root / "data_download").glob("*.toml"))
    state = [parameters, file.kind, platform.python_version(), _data_here(number)]
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for path in [file.path, *sorted({*sources, *machine, *texts, *data, course.root / LOCK})]:
        if path.exists():
            digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _data_here(number: str) -> dict[str, int]:
    """How many files of each of a lesson's data sets are there; where they lie makes no difference to it."""
    base, entries = data_download.root(), data_download.entries()
    return {name: presence(entry, base).found for name, entry in entries.items() if number in entry.lessons}


def unchanged(file: NotebookFile, mark: str) -> Outcome | None:
    """The outcome of an earlier run that still stands: same fingerprint, whole, and without a failure."""
    outcome = Outcome.read(file.output)
    if outcome is None or outcome.data.get("fingerprint") != mark or outcome.data["failure"]:
        return None
    whole = hashlib.sha256(file.output.read_bytes()).hexdigest() == outcome.data["output_sha256"]
    return outcome if whole and not list(outcome.troubles()) else None


def run(files: Iterable[NotebookFile], settings: Settings, console: Console) -> list[Finished]:
    """Execute notebooks, showing progress.

    Args:
        files: which.
        settings: how.
        console: where progress is shown: bars in a terminal, a line a notebook elsewhere.

    Returns:
        What became of each, in the order given.
    """
    files, running = list(files), _Running()
    columns = TextColumn("{task.description:<13}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        concurrent.futures.ThreadPoolExecutor(max(1, settings.jobs)) as pool,
    ):
        try:
            return list(pool.map(lambda file: _run_one(file, settings, running, progress, console), files))
        except BaseException:
            running.stop()
            raise


class _Running:
    """The processes under way, so that an interruption ends them with their kernels."""

    def __init__(self) -> None:
        self._lock, self._stopped = threading.Lock(), False
        self._processes: set[subprocess.Popen[str]] = set()

    def start(self, command: list[str], **options: Any) -> "subprocess.Popen[str] | None":
        with self._lock:
            if self._stopped:
                return None
            process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, encoding="utf-8", **options)
            self._processes.add(process)
            return process

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._processes:
                if process.poll() is None:
                    family = psutil.Process(process.pid)
                    for member in [*family.children(recursive=True), family]:
                        member.kill()


def _run_one(
    file: NotebookFile, settings: Settings, running: _Running, progress: Progress, console: Console
) -> Finished:
    parameters = settings.parameters
    mark = fingerprint(file, parameters)
    known = None if settings.force else unchanged(file, mark)
    if known is not None:
        console.print(f"{file.title}: unchanged")
        return Finished(file, known, executed=False)
    timeout = settings.cell_timeout or (7200 if settings.full else 300)
    order = Order(str(file.path), str(file.output), file.kind, parameters, mark, timeout)
    log = file.output.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    file.output.with_suffix(".json").unlink(missing_ok=True)  # an older result must not pass for that of this run
    bar = progress.add_task(file.title, total=None)
    if not console.is_terminal:
        console.print(f"{file.title}: started")
    done = False
    with log.open("w", encoding="utf-8") as errors:
        process = running.start(
            [sys.executable, "-m", "regteach.course.execute", json.dumps(asdict(order))],
            stderr=errors,
            cwd=ROOT,
            env=lesson_environment(),
        )
        if process is None or process.stdout is None:
            return Finished(file, None, crash="stopped", troubles=["it was stopped"])
        for line in process.stdout:
            event = _event(line)
            if "cell" in event:
                progress.update(bar, completed=event["cell"], total=event["of"])
            done = done or "done" in event
        status = process.wait()
    progress.remove_task(bar)
    outcome = Outcome.read(file.output) if done else None
    if outcome is None:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
        crash = f"the process that executes it ended with status {status}; its log is {log}"
        return Finished(file, None, crash="\n".join(last), troubles=[crash])
    finished = Finished(file, outcome, troubles=list(outcome.troubles()))
    console.print(f"{file.title}: {'done' if finished.passed else 'FAILED'} in {outcome.seconds:.0f} s")
    return finished


def _event(line: str) -> dict[str, Any]:
    """Progress that the child tells; anything else it prints is not for us."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def lesson_environment() -> dict[str, str]:
    """The environment of a process that runs lessons: one thread, and the network blocked in all its children."""
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([offline.__path__[0], *([before] if before else [])])
    return {**os.environ, **THREADS, "PYTHONPATH": path}


def table(results: list[Finished]) -> Table:
    """A row a notebook: seconds, peak memory, claims held of claims made, exercises to do."""
    made = Table("lesson", "result")
    for heading in ("seconds", "peak MB", "claims held", "to do"):
        made.add_column(heading, justify="right")
    for result in results:
        out = result.outcome
        word = "[green]ok[/]" if result.passed else "[bold red]FAILED[/]"
        word += "" if result.executed else " (unchanged)"
        numbers = ["-"] * 4
        if out is not None:
            claims, exercises = f"{out.held} of {len(out.claims)}", f"{out.to_do} of {len(out.exercises)}"
            numbers = [f"{out.seconds:.1f}", f"{out.peak_memory_mb:.0f}", claims, exercises]
        made.add_row(result.file.title, word, *numbers)
    return made


def explain(results: list[Finished], console: Console) -> None:
    """Say why notebooks failed: the sentence, the failing cell, and the end of the traceback."""
    for result in results:
        for trouble in result.troubles:
            console.print(f"[bold red]{result.file.name}[/]: {escape(trouble)}", highlight=False)
        failure = result.outcome.data["failure"] if result.outcome else None
        if failure:
            console.print(escape("\n".join(f"  | {line}" for line in failure["source"].splitlines())), highlight=False)
        shown = "\n".join(failure["traceback"]) if failure else result.crash
        if shown:
            console.print(escape(shown), highlight=False)
