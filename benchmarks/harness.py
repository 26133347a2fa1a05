"""Paired timing, peak memory and tables for all benchmarks.

Several forms of one computation are measured on the same inputs in one process. A first call of each warms up and gives
the peak memory; then the forms take turns, round by round, so that what disturbs one disturbs all; the median over the
rounds is reported, and so are the number of rounds and the load of the machine. A form that is very slow is not run
again: its first call counts.

Times are processor seconds on a CPU (of all threads together; other programs hardly change them), and seconds of the
clock on a GPU.
"""

import ctypes
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

Form = Callable[[], Tensor]  # computes its result from inputs that it holds


@dataclass(frozen=True)
class Row:
    """One form of one computation at one size: medians in seconds, memory in MB above what the inputs take.

    A difference is the largest one from the first form, relative to the largest value of that.
    """

    case: str
    size: str
    form: str
    forward_s: float
    backward_s: float
    peak_mb: float
    rounds: int
    value_differs: float
    gradient_differs: float


def measure(
    case: str, size: str, forms: dict[str, Form], leaves: Sequence[Tensor], rounds: int = 5, seconds: float = 6.0
) -> list[Row]:
    """Measure several forms of one computation, forward and backward, in turn.

    Args:
        case: what is computed, for the table.
        size: size of the inputs, for the table.
        forms: by name; the first is what the others are compared with.
        leaves: tensors that gradients are taken for.
        rounds: how often each form is run after the warm-up.
        seconds: no new round is begun after this long, and a form whose first call takes twice as long is not run
            again.
    """
    first: Result | None = None
    peaks: dict[str, float] = {}
    differences: dict[str, tuple[float, float]] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    quick: dict[str, Form] = {}
    for name, form in forms.items():
        with PeakMemory(leaves[0].device) as memory:
            result, seconds_taken = _run(form, leaves)
        peaks[name] = memory.peak_mb
        first = first or result
        differences[name] = _differences(result, first)
        if sum(seconds_taken) > 2 * seconds:
            times[name] = [seconds_taken]
        else:
            times[name], quick[name] = [], form

    start = _now(leaves[0].device)
    for _ in range(rounds):
        for name, form in quick.items():
            times[name].append(_run(form, leaves)[1])
        if _now(leaves[0].device) - start > seconds:
            break
    rows = []
    for name, taken in times.items():
        forward, backward = (statistics.median(pair[k] for pair in taken) for k in (0, 1))
        rows.append(Row(case, size, name, forward, backward, peaks[name], len(taken), *differences[name]))
    return rows


class PeakMemory:
    """Largest memory in use within a ``with`` block, above what was in use at its start, in MB.

    On a GPU torch counts the allocations. On a CPU the resident memory is read every 2 ms, after free memory has been
    handed back to the system, so that what was freed earlier can not hide what is taken now.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak_mb = device, 0.0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        if platform.system() == "Linux":
            ctypes.CDLL(None).malloc_trim(0)
        self._process, self._done = psutil.Process(), threading.Event()
        self._start = self._top = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.peak_mb = (torch.cuda.max_memory_allocated(self.device) - self._start) / 1e6
            return
        self._done.set()
        self._thread.join()
        self.peak_mb = (self._top - self._start) / 1e6

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._top = max(self._top, self._process.memory_info().rss)


def hardware(device: torch.device) -> dict[str, object]:
    """What the numbers were measured on, and how busy it was."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "load_average": [round(load, 2) for load in psutil.getloadavg()],
    }


def as_records(rows: Iterable[Row]) -> list[dict[str, object]]:
    """The rows as JSON wants them, numbers rounded to four digits."""
    return [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows]


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a markdown table; times are followed by how many times as long as the first form of the case."""
    lines = [
        "| computation | size | form | forward, s | backward, s | peak, MB | both, ratio | value differs | rounds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        base = first.setdefault((row.case, row.size), row)
        ratio = (row.forward_s + row.backward_s) / (base.forward_s + base.backward_s)
        differs = "-" if row is base else f"{row.value_differs:.0e}"
        lines.append(
            f"| {row.case} | {row.size} | {row.form} | {row.forward_s:.3g} | {row.backward_s:.3g} | {row.peak_mb:,.0f} "
            f"| {ratio:.2f} | {differs} | {row.rounds} |"
        )
    return "\n".join(lines)


def show(rows: Sequence[Row], title: str) -> None:
    """The same table on the screen."""
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown(rows).splitlines()]
    table = Table(title=title)
    for k, name in enumerate(header):
        table.add_column(name, justify="left" if k < 3 else "right")
    for cells in body:
        table.add_row(*cells)
    Console(width=150).print(table)


Result = tuple[Tensor, tuple[Tensor, ...]]


def _run(form: Form, leaves: Sequence[Tensor]) -> tuple[Result, tuple[float, float]]:
    """Value and gradients of its sum, and the seconds that each took."""
    device = leaves[0].device
    start = _now(device)
    value = form()
    middle = _now(device)
    gradients = torch.autograd.grad(value.sum(), leaves)
    return (value.detach(), gradients), (middle - start, _now(device) - middle)


def timed(compute: Callable[[], Any], device: torch.device) -> tuple[Any, dict[str, float]]:
    """What it computes, and the time that it takes: "seconds" of the processor or of a GPU, and "wall" of the clock."""
    start, wall = _now(device), time.perf_counter()
    value = compute()
    return value, {"seconds": _now(device) - start, "wall": time.perf_counter() - wall}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def _differences(ours: Result, first: Result) -> tuple[float, float]:
    pairs = [(ours[0], first[0]), *zip(ours[1], first[1], strict=True)]
    relative = [float((a.reshape(b.shape) - b).abs().max() / b.abs().max()) for a, b in pairs]
    return relative[0], max(relative[1:])
