"""One notebook executed with papermill, and the record of it: `python -m regteach.course.execute ORDER`.

ORDER is a JSON object (see `Order`). It runs in a process of its own, which `regteach.course.run` starts with the
network blocked. Progress goes to standard output, one JSON object a line. The executed copy is placed first and its
record last, each atomically, and the record holds the copy's hash: a record that agrees with its notebook is whole.
"""

import hashlib
import json
import logging
import os
import platform
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.execute import remove_error_markers

from regteach.records import records

SWEEP_TAG = "regteach-sweep"
SWEEP = "from regteach.widgets import sweep\n\nsweep()"


@dataclass(frozen=True)
class Order:
    """What to execute and where to put it.

    Args:
        notebook: the notebook's path.
        output: where the executed copy goes; the record lies beside it, ending in .json.
        kind: "lesson" or "solution".
        parameters: what papermill sets.
        fingerprint: of everything that the result depends on; kept in the record.
        cell_timeout: seconds that one cell may take.
    """

    notebook: str
    output: str
    kind: str
    parameters: dict[str, Any]
    fingerprint: str
    cell_timeout: float


class _Engine(NBClientEngine):
    """Papermill's own engine, which also says which cell has begun and keeps the notebook when a cell fails."""

    notebook: Any = None
    begun: Any = None

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
        cls.notebook, start = nb_man.nb, nb_man.cell_start

        def cell_start(cell: Any, cell_index: int | None = None, **rest: Any) -> None:
            cls.begun = cell
            _say(cell=cell_index, of=len(nb_man.nb.cells))
            start(cell, cell_index, **rest)

        nb_man.cell_start = cell_start
        super().execute_managed_notebook(nb_man, kernel_name, **options)


class _Warnings(logging.Handler):
    """Papermill only warns when parameters cannot arrive; here that is a problem."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.sentences: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.sentences.append(f"papermill says: {record.getMessage()}")


class _Watch(threading.Thread):
    """Measures the memory of the kernel and its children; ends them when the process that gave the order is gone."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes, self._stop_asked = 0, threading.Event()
        self._parent = psutil.Process(os.getppid())

    def run(self) -> None:
        me = psutil.Process()
        while not self._stop_asked.wait(0.1):
            children = me.children(recursive=True)
            self.peak_bytes = max(self.peak_bytes, sum(map(_resident_bytes, children)))
            if not self._parent.is_running():
                for child in children:
                    child.kill()
                os._exit(1)

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:  # it ended since it was listed
        return 0


def execute(order: Order) -> dict[str, Any]:
    """Execute a notebook and write the executed copy and its record.

    A cell that fails ends the notebook and stands in the record; nothing is raised for it.

    Returns:
        The record, as written.
    """
    output = Path(order.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(order.notebook, as_version=4)
    sweep = nbformat.v4.new_code_cell(SWEEP, id="sweep-widgets", metadata={"tags": [SWEEP_TAG]})
    notebook.cells.append(sweep)
    papermill_engines.register("regteach", _Engine)
    warnings, watch = _Warnings(), _Watch()
    logging.getLogger("papermill").addHandler(warnings)
    _Engine.notebook = _Engine.begun = None
    failure: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory(prefix="regteach-", ignore_cleanup_errors=True) as folder:
        os.environ["IPYTHONDIR"] = folder  # a person's own start-up files and history stay out
        os.environ["REGTEACH_NETWORK_LOG"] = str(Path(folder) / "network.log")
        watch.start()
        begin = time.perf_counter()
        try:
            papermill.execute_notebook(
                notebook,
                None,
                parameters=order.parameters,
                engine_name="regteach",
                kernel_name="python3",
                progress_bar=False,
                cwd=str(Path(order.notebook).parent),
                start_timeout=120,
                execution_timeout=order.cell_timeout,
            )
        except PapermillExecutionError as error:
            failure = _failure(f"{error.ename}: {error.evalue}", error.traceback)
        except CellTimeoutError:
            failure = _failure(f"the cell took longer than {order.cell_timeout:g} s", [])
        except DeadKernelError as error:
            failure = _failure(f"the kernel died: {error}", [])
        seconds = time.perf_counter() - begin
        watch.stop()
        network = Path(os.environ["REGTEACH_NETWORK_LOG"])
        asked = sorted(set(network.read_text(encoding="utf-8").splitlines())) if network.exists() else []
    executed = remove_error_markers(_Engine.notebook or notebook)
    failure = failure or _ended_early(executed)
    found = records(executed)
    text = nbformat.writes(executed) + "\n"
    record = {
        **{name: value for name, value in asdict(order).items() if name not in ("output", "cell_timeout")},
        "notebook": Path(order.notebook).name,
        "output_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "python": platform.python_version(),
        "seconds": round(seconds, 2),
        "peak_memory_mb": round(watch.peak_bytes / 1e6, 1),
        "failure": failure,
        "problems": warnings.sentences + asked + ([] if failure else _parameter_problems(found, order.parameters)),
        "records": [record for record in found if record["kind"] != "figure"],
    }
    place(output, text)
    place(output.with_suffix(".json"), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return record


def place(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)


def _ended_early(executed: Any) -> dict[str, Any] | None:
    """Papermill takes `sys.exit()` for an end as good as any; a lesson is not done before its last cell has run."""
    code = [cell for cell in executed["cells"] if cell["cell_type"] == "code" and cell["source"].strip()]
    unrun = [cell for cell in code if cell.get("execution_count") is None]
    if not unrun:
        return None
    return _failure(f"it ended without an error before its end: {len(unrun)} cells did not run", [])


def _failure(what: str, traceback: list[str]) -> dict[str, Any]:
    cell = _Engine.begun or {}
    lines = _plain("\n".join(traceback)).rstrip().splitlines()
    return {"what": what, "cell": cell.get("id"), "source": cell.get("source", ""), "traceback": lines[-12:]}


def _plain(text: str) -> str:
    """Text without terminal colours."""
    from nbconvert.filters import strip_ansi

    return strip_ansi(text)


def _parameter_problems(found: list[dict[str, Any]], sent: dict[str, Any]) -> list[str]:
    arrived = [record["parameters"] for record in found if record["kind"] == "lesson"]
    if not arrived:
        return ["the notebook makes no Lesson, so nothing shows that its parameters arrived"]
    return [
        f"{name}={value!r} was sent and {arrived[-1].get(name)!r} arrived"
        for name, value in sent.items()
        if name not in arrived[-1] or arrived[-1][name] != value
    ]


def _say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    execute(Order(**json.loads(sys.argv[1])))
    _say(done=True)
