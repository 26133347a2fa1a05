"""What does the refactored neighbourhood attention save, in memory and in time?

    python -m benchmarks.neighbourhood_attention [--quick] [--json FILE]

One head of attention, with its projections, forward and backward, over 3 x 3 x 3 neighbours, in four forms that give
the same numbers:

- plain: as published, with a key and a value projected for every neighbour of every point;
- absorbed: the package's plain form; projections are done once a point, and every neighbour is still kept;
- refactored: the package's form; nothing is kept of a neighbour but its weight;
- slabs: the same for an eighth of the points at a time, computed again for the gradient.

"points" attend to the grid round where they are now, "parents" is attention of a grid's points to a grid with half as
many an axis that has moved. Each form runs in a process of its own. Bytes kept are those of the storages that autograd
holds between forward and backward, the inputs' among them; peak memory is what the process takes above its inputs.
What would not fit in memory is not run: what it keeps is computed from a small grid, where it is so many bytes a point.
"""

import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro
from torch import Tensor

from benchmarks.harness import Form, hardware, measure
from benchmarks.tables import NOT_MEASURED, Table, aim, command, number, report
from regteach.grid import Grid
from regteach.ops.neighbourhood import (
    fourier_features,
    in_slabs,
    neighbourhood_attention,
    neighbourhood_attention_plain,
    parent_attention,
    parent_attention_plain,
    windows,
)
from regteach.sampling import grid_points

SIZES = ((64, 64, 64), (128, 128, 128))
ON_A_GPU = (160, 192, 160)
SMALL = (10, 10, 10)
CHANNELS = (16, 32)
WINDOW = 3
LENGTH_MM = 10.0
FORMS = ("plain", "absorbed", "refactored", "slabs")
OPERATIONS = ("points", "parents")
FEWER, FEWER_IN_SLABS, TIME = 9.0, 40.0, 0.6  # what is meant to be reached, against plain
PEAK_OVER_KEPT = 4  # the most that any form takes at its peak over what it keeps, for the decision whether to run it
SLABS = 8


@dataclass(frozen=True)
class Options:
    """Command line.

    Args:
        quick: one small grid, in this process.
        json: also write the numbers to this file, and the tables beside it as markdown.
        memory_gb: forms that need more than this are not run.
        device: where to measure.
        threads: of torch on the CPU; one is the steadiest where other programs run.
        seconds: a form that takes more than twice as long is run once, others several times for about as long.
    """

    quick: bool = False
    json: Path | None = None
    memory_gb: float = 16.0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 1
    seconds: float = 2.0


@dataclass(frozen=True)
class Case:
    """One form of one operation at one size."""

    operation: str
    shape: tuple[int, ...]
    channels: int
    form: str


# ---- the forms ----


def prepared(case: Case, device: torch.device) -> tuple[Form, list[Tensor]]:
    """The form with inputs that it holds, and the leaves of its gradients, which are all inputs and projections."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    fine, c = Grid(case.shape), case.channels
    parents = case.operation == "parents"
    grid = fine.coarsened(2) if parents else fine
    rest = grid_points(fine, device).reshape(1, -1, 3)
    points = (rest + 1.5 * noise(*rest.shape)).requires_grad_()
    source = noise(1, fine.size, c).requires_grad_()
    features = noise(1, c, *grid.shape).requires_grad_()
    moved = (grid_points(grid, device) + 1.5 * noise(1, *grid.shape, 3)).requires_grad_()
    to_query, to_key, to_value = (leaf.requires_grad_() for leaf in (noise(3, c, c) / math.sqrt(c)).unbind())
    who = rest if parents else points  # decides who the neighbours are
    frequencies = noise(3, c // 2)
    known = {"grid": grid, "window": WINDOW, "frequencies": frequencies, "length_mm": LENGTH_MM}
    attend = _attend(parents, case.form == "absorbed")

    def as_published() -> Tensor:
        neighbours, inside = windows(who, grid, WINDOW)
        where = moved if parents else grid_points(grid, device)
        offsets = points.unsqueeze(-2) - where.reshape(-1, 3)[neighbours]
        said = features[0].flatten(1).T[neighbours] + fourier_features(offsets, frequencies, LENGTH_MM)
        keys, values = said @ to_key.T, said @ to_value.T
        logits = ((source @ to_query.T).unsqueeze(-2) * keys).sum(-1) / math.sqrt(c)
        weights = logits.masked_fill(~inside, -math.inf).softmax(-1)
        return (weights.unsqueeze(-1) * values).sum(-2)

    def absorbed(source: Tensor, who: Tensor, points: Tensor, **shared: Any) -> Tensor:
        query = source @ (to_query.T @ to_key) / math.sqrt(c)
        return attend(query, who, points, **shared) @ to_value.T

    def computed() -> Tensor:
        if case.form == "plain":
            return as_published()
        size = math.ceil(fine.size / SLABS) if case.form == "slabs" else 0
        return in_slabs(absorbed, size, source, who, points, features=features, moved=moved, **known)

    leaves = [source, features, points, to_query, to_key, to_value]
    return computed, [*leaves, moved] if parents else leaves


def _attend(parents: bool, plain: bool) -> Callable[..., Tensor]:
    """The package's operation, with the same arguments for both."""

    def near(query: Tensor, who: Tensor, points: Tensor, moved: Tensor, **shared: Any) -> Tensor:
        function = neighbourhood_attention_plain if plain else neighbourhood_attention
        return function(query=query, points=points, **shared)

    def parental(query: Tensor, who: Tensor, points: Tensor, **shared: Any) -> Tensor:
        function = parent_attention_plain if plain else parent_attention
        return function(query=query, rest=who, points=points, **shared)

    return parental if parents else near


# ---- what is measured ----


class Counted:
    """A form that counts what autograd holds after forward, in bytes: every storage once, and those of the leaves."""

    def __init__(self, form: Form, leaves: Sequence[Tensor]) -> None:
        self.form, self.leaves, self.kept_bytes = form, leaves, 0

    def __call__(self) -> Tensor:
        """The form, counted anew."""
        held = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in self.leaves}

        def pack(tensor: Tensor) -> Tensor:
            # What is held lives until backward, so that no address is used twice.
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = self.form()
        self.kept_bytes = sum(held.values())
        return value


def expected_bytes(case: Case) -> float:
    """What a case keeps, from a small grid: the same number of bytes for each of its points."""
    small = Case(case.operation, SMALL, case.channels, case.form)
    form = Counted(*prepared(small, torch.device("cpu")))
    form()
    return form.kept_bytes * math.prod(case.shape) / math.prod(SMALL)


def measured(case: Case, device_name: str, threads: int, seconds: float) -> dict[str, Any]:
    """Bytes kept, peak and times of one case; on a CPU in a process that has done nothing else.

    The peak on a CPU is that of the process, which the system counts, where it is higher than all before.
    """
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    warm, warm_leaves = prepared(Case(case.operation, SMALL, case.channels, case.form), device)
    torch.autograd.grad(warm().sum(), warm_leaves)
    form = Counted(*prepared(case, device))
    start, before = psutil.Process().memory_info().rss, _highest_memory()
    row = measure("", "", {case.form: form}, form.leaves, rounds=3, seconds=seconds)[0]
    highest = _highest_memory()
    counted = device.type == "cpu" and highest > before
    return {
        "kept_mb": form.kept_bytes / 1e6,
        "peak_mb": (highest - start) / 1e6 if counted else row.peak_mb,
        "forward_s": row.forward_s,
        "backward_s": row.backward_s,
        "rounds": row.rounds,
    }


def _highest_memory() -> int:
    """Most bytes that this process has ever had in memory; 0 where the system does not count them."""
    if platform.system() == "Windows":
        return 0
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def in_a_process_of_its_own(case: Case, options: Options) -> dict[str, Any]:
    """What :func:`measured` returns, measured in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, case, options.device, options.threads, options.seconds).result()


def differences() -> tuple[float, float]:
    """Largest difference of any form from plain on a small grid, relative: value, gradients."""
    worst = (0.0, 0.0)
    for operation in OPERATIONS:
        both = {form: prepared(Case(operation, SMALL, CHANNELS[0], form), torch.device("cpu")) for form in FORMS}
        first, leaves = both["plain"]
        expected = first(), torch.autograd.grad(first().sum(), leaves)
        for form, inputs in both.values():
            pairs = [(form(), expected[0]), *zip(torch.autograd.grad(form().sum(), inputs), expected[1], strict=True)]
            relative = [float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs]
            worst = max(worst[0], relative[0]), max(worst[1], *relative[1:])
    return worst


# ---- the tables ----


def table_of(operation: str, records: Sequence[dict[str, Any]], options: Options) -> Table:
    """Rows of one operation, and what is said of them."""
    what = {"points": "the grid points near moving points", "parents": "parents that have moved"}[operation]
    table = Table(
        f"Attention to {what}, {WINDOW} x {WINDOW} x {WINDOW}, float32",
        ("size", "channels", "form", "kept, MB", "peak, MB", "forward, s", "backward, s", "kept, fewer", "time, ratio"),
    )
    of_operation = [record for record in records if record["operation"] == operation]
    for record in of_operation:
        plain = _beside(record, "plain", of_operation)
        ratio = _seconds(record) / _seconds(plain) if record["fits"] and plain["fits"] else None
        table.add(
            " x ".join(map(str, record["shape"])), str(record["channels"]), record["form"],
            f"{record['kept_mb']:,.1f}" + ("" if record["fits"] else " (computed)"),
            f"{record['peak_mb']:,.0f}" if record["fits"] else "does not fit",
            *(number(record[key]) if record["fits"] else NOT_MEASURED for key in ("forward_s", "backward_s")),
            number(plain["kept_mb"] / record["kept_mb"], 1), number(ratio, 2) if ratio else NOT_MEASURED,
        )  # fmt: skip
    if options.quick:
        return table
    refactored = _against(of_operation, "plain", "refactored")
    slabs = _against(of_operation, "plain", "slabs")
    table.notes += [
        aim("Bytes kept, plain over refactored, smallest of all cases", min(refactored[0]), FEWER, digits=1),
        aim("Bytes kept, plain over slabs, smallest of all cases", min(slabs[0]), FEWER_IN_SLABS, digits=1),
    ]
    for form, (_, times) in (("refactored", refactored), ("slabs", slabs)):
        what = f"Time, {form} over plain, largest of the cases where plain fits"
        table.notes.append(aim(what, max(times), TIME, False, 2) if times else f"{what}: {NOT_MEASURED}.")
    for form in ("refactored", "slabs"):
        kept, times = _against(of_operation, "absorbed", form)
        time_ = f"{statistics.median(times):.2f} of the time (median)" if times else f"time {NOT_MEASURED}"
        table.notes.append(
            f"Against the absorbed form alone, {form}: {min(kept):.1f} to {max(kept):.1f} times fewer bytes, {time_}."
        )
    return table


def _against(records: Sequence[dict[str, Any]], base: str, form: str) -> tuple[list[float], list[float]]:
    """Of every case: times fewer bytes; and time over time, where both were run."""
    pairs = [(_beside(record, base, records), record) for record in records if record["form"] == form]
    times = [_seconds(b) / _seconds(a) for a, b in pairs if a["fits"] and b["fits"]]
    return [a["kept_mb"] / b["kept_mb"] for a, b in pairs], times


def _beside(record: dict[str, Any], form: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    same = ("operation", "shape", "channels")
    return next(r for r in records if r["form"] == form and all(r[key] == record[key] for key in same))


def _seconds(record: dict[str, Any]) -> float:
    return float(record["forward_s"] + record["backward_s"])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, show, write.

    Raises:
        ValueError: if the memory or the seconds are not positive.
    """
    options = tyro.cli(Options, args=arguments)
    if not options.memory_gb > 0 or not options.seconds > 0:
        raise ValueError(f"Memory of {options.memory_gb} GB and {options.seconds} s must both be positive.")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    facts = {"seeds": [0], "quick": options.quick, "hardware": hardware(device), "memory_gb": options.memory_gb}
    on_gpu = device.type == "cuda"
    sizes = (SMALL,) if options.quick else (*SIZES, ON_A_GPU) if on_gpu else SIZES
    records = []
    for operation in OPERATIONS:
        for shape in sizes:
            for channels in CHANNELS[:1] if options.quick else CHANNELS:
                for form in FORMS:
                    case, started = Case(operation, shape, channels, form), time.perf_counter()
                    kept = expected_bytes(case)
                    record = asdict(case) | {"kept_mb": kept / 1e6, "fits": True}
                    if PEAK_OVER_KEPT * kept > options.memory_gb * 1e9:
                        record["fits"] = False
                    elif options.quick:
                        record |= measured(case, options.device, options.threads, 0.01)
                    else:
                        record |= in_a_process_of_its_own(case, options)
                    records.append(record)
                    print(f"{case}: {time.perf_counter() - started:.0f} s", flush=True)
    tables = [table_of(operation, records, options) for operation in OPERATIONS]
    value, gradients = differences()
    tables[-1].notes.append(
        f"All forms against plain on {SMALL[0]} x {SMALL[1]} x {SMALL[2]}, both operations: values differ by "
        f"{value:.0e}, gradients by {gradients:.0e} of the largest."
    )
    if not on_gpu:
        tables[-1].notes.append(f"{' x '.join(map(str, ON_A_GPU))} on a GPU: {NOT_MEASURED}.")
    return report("benchmarks.neighbourhood_attention", arguments, options.json, tables, records, facts)


if __name__ == "__main__":
    command(main)
