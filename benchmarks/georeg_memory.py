"""What does a whole training step of GeoReg keep in memory, form by form?

    python -m benchmarks.georeg_memory [--quick] [--json FILE] [--memory-gb 10]

A step of the recipe georeg-brains on one pair: two images through the encoder and the four levels with the weights that
ship, the loss of every level, and the gradient of every weight, in the recipe's own precision. Four forms of it, which
give the same loss (the benchmark stops where they do not):

- plain: attention by the formulas, which keeps every neighbour of every point;
- refactored: the package's attention, which keeps nothing of a neighbour but its weight;
- slabs: the same, for some of the points at a time, computed again for the gradient: as large a share of them as the
  configuration's default is at 160 x 192 x 160;
- slabs, checkpointed: the encoder's features are computed again as well.

Plain is the plain version beside the fast one in ``regteach.ops.neighbourhood``. It projects once a point, as all forms
do here; projected once a neighbour, as published, its attention would keep about twice as much (see
``benchmarks.neighbourhood_attention``, where plain is the published form, and this one is called absorbed).

Kept is what the forward pass leaves behind for the backward pass, above weights and images: the storages of tensors
that autograd has saved, and of those that a checkpoint holds on to for computing again, each counted once. Peak memory
is the most that forward and backward take above weights and images. Each case runs in a process of its own; the images
are stand-ins, since memory does not depend on what they show. The optimiser is left out: it takes the same for all.

A form goes on to the next larger size as long as its peak is expected to fit in memory. Where it is not run, what it
keeps is extrapolated, by a straight line in the number of voxels through the two largest sizes that were, and marked as
such. Peaks and times follow no line so closely, and are measured or not given.
"""

import gc
import math
import multiprocessing
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from torch import Tensor

from benchmarks import networks
from benchmarks.harness import Form, hardware, measure
from benchmarks.tables import NOT_MEASURED, Table, command, number, report
from regteach import objectives
from regteach.checkpoints import load, network
from regteach.data.named import BRAINS
from regteach.grid import Grid
from regteach.nets import georeg
from regteach.nets.blocks import fast_layout
from regteach.nets.georeg import GeoRegConfig
from regteach.ops.neighbourhood import neighbourhood_attention_plain, parent_attention_plain

MODEL = "georeg-brains"
Shape = tuple[int, ...]
SIZES: tuple[Shape, ...] = ((32, 32, 32), (48, 48, 48), (64, 64, 64))
WHOLE = (160, 192, 160)  # as many voxels as a whole brain has at 1 mm
QUICK_SIZES: tuple[Shape, ...] = ((24, 24, 24), (32, 32, 32))
SMALL = QUICK_SIZES[0]
PLAIN, REFACTORED, IN_SLABS, CHECKPOINTED = FORMS = ("plain", "refactored", "slabs", "slabs, checkpointed")
ALL_AT_ONCE = 2**62  # a slab of more points than any grid has
SAME = 1e-4  # the most by which the losses of two forms may differ, relative


@dataclass(frozen=True)
class Options:
    """Command line.

    Args:
        quick: two small sizes, one round, in this process.
        json: also write the numbers to this file, and the table beside it as markdown.
        memory_gb: forms that are expected to take more than this at their peak are not run.
        device: where to measure.
        threads: of torch on the CPU; one is the steadiest where other programs run.
        rounds: how often a step is timed.
        seconds: no new round is begun after this long; a step that takes more than twice as long is run once.
    """

    quick: bool = False
    json: Path | None = None
    memory_gb: float = 10.0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 1
    rounds: int = 3
    seconds: float = 30.0


@dataclass(frozen=True)
class Case:
    """One form at one size.

    Args:
        form: one of :data:`FORMS`.
        shape: of the images, voxels of 2 mm.
        exact: in float32 throughout, in the place of the recipe's precision.
    """

    form: str
    shape: Shape
    exact: bool = False


# ---- the forms ----


def prepared(case: Case, device: torch.device) -> tuple[Form, list[Tensor]]:
    """The loss of a step as a function of nothing, and the weights that it has gradients for."""
    recipe, grid = networks.find_recipe(MODEL), Grid(case.shape, BRAINS.spacing)
    config = configured(recipe.config, case)
    model: Any = fast_layout(network(config), grid.dim)
    model.load_state_dict(load(MODEL).network.state_dict())  # untrained, no point would move, whatever it hears
    model = model.to(device).train()
    moving, fixed = (image.clone().to(device) for image in networks.stand_in(grid, people=4).images[:2].split(1))
    mixed = recipe.settings.precision == "bf16" and not case.exact

    def loss() -> Tensor:
        with attention(case.form), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            terms = objectives.multiscale(
                model(moving, fixed, grid),
                grid,
                config.similarity,
                bending=recipe.bending,
                weights=recipe.weights,
                window_vox=recipe.window_vox,
            )
        return objectives.total(terms).mean()

    return loss, list(model.parameters())


def configured(config: GeoRegConfig, case: Case) -> GeoRegConfig:
    """A configuration with what a form changes in it."""
    slab = ALL_AT_ONCE
    if case.form in (IN_SLABS, CHECKPOINTED):
        slab = math.ceil(config.slab * math.prod(case.shape) / math.prod(WHOLE))
    return replace(config, slab=slab, checkpointed=case.form == CHECKPOINTED)


def attention(form: str) -> AbstractContextManager[Any]:
    """Within it, the network attends by the plain version or by its own. Plain needs it in the forward pass alone."""
    if form != PLAIN:
        return nullcontext()
    return mock.patch.multiple(
        georeg, neighbourhood_attention=neighbourhood_attention_plain, parent_attention=parent_attention_plain
    )


# ---- what is measured ----


def kept_by(form: Form) -> tuple[Tensor, int]:
    """The value of a form, and the bytes of the storages that have come with it and stay until its gradient is taken.

    Saved tensors are reported by autograd. They are counted at the end, so that those do not count which went with a
    part of the graph that nothing depends on. What a checkpoint will compute from is held by Python alone, so Python's
    own list of tensors is counted, too. What was there before, as weights and inputs, is not.
    """
    saved: list[weakref.ref[_Saved]] = []

    def pack(tensor: Tensor) -> _Saved:
        held = _Saved(tensor.detach())  # a result that holds its own history would never be let go
        saved.append(weakref.ref(held))
        return held

    before = _storages(_tensors())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        value = form()
    after = _storages(_tensors()) | _storages(held.tensor for there in saved if (held := there()) is not None)
    return value, sum(size for address, size in after.items() if address not in before)


class _Saved:
    """What the graph holds in the place of a tensor: as long as it is there, the gradient needs the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _tensors() -> list[Tensor]:
    """All tensors that Python holds."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address and bytes."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def measured(case: Case, device_name: str, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Loss, bytes kept, peak and times of one case; the counting of the bytes warms up."""
    torch.set_num_threads(threads)
    form, leaves = prepared(case, torch.device(device_name))
    value, kept = kept_by(form)
    loss = float(value.detach())
    del value  # and all that it keeps
    row = measure("", "", {case.form: form}, leaves, rounds, seconds)[0]
    return {
        "loss": loss,
        "kept_mb": kept / 1e6,
        "peak_mb": row.peak_mb,
        "forward_s": row.forward_s,
        "backward_s": row.backward_s,
        "rounds": row.rounds,
    }


def in_a_process_of_its_own(case: Case, options: Options) -> dict[str, Any]:
    """What :func:`measured` returns, measured in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        how = (options.device, options.threads, options.rounds, options.seconds)
        return pool.submit(measured, case, *how).result()


def records_of(form: str, options: Options) -> list[dict[str, Any]]:
    """One form at all sizes, from small to large: measured where it fits in memory, extrapolated where it does not."""
    records: list[dict[str, Any]] = []
    for shape in (*(QUICK_SIZES if options.quick else SIZES), WHOLE):
        case = Case(form, shape)
        ran = [record for record in records if record["measured"]]
        line = extrapolated(ran, shape) if len(ran) > 1 else None
        # Only to decide: in proportion, which is on the safe side.
        peak_mb = ran[-1]["peak_mb"] * math.prod(shape) / math.prod(ran[-1]["shape"]) if line else 0.0
        run = peak_mb < 1e3 * options.memory_gb and not (options.quick and shape == WHOLE)
        if not run:
            found: dict[str, Any] = {"kept_mb": line}
        elif options.quick:
            found = measured(case, options.device, options.threads, 1, 0.01)
        else:
            found = in_a_process_of_its_own(case, options)
        records.append(asdict(case) | {"measured": run, "line_mb": line} | found)
        print(f"{form}, {_by(shape)}: {'measured' if run else 'extrapolated'}", flush=True)
    return records


def extrapolated(ran: Sequence[dict[str, Any]], shape: Shape) -> float:
    """MB kept at another size, by a straight line in the voxels through the two largest sizes that were measured."""
    (x0, y0), (x1, y1) = [(math.prod(record["shape"]), record["kept_mb"]) for record in ran[-2:]]
    return float(y1 + (y1 - y0) * (math.prod(shape) - x1) / (x1 - x0))


def check_same(records: Sequence[dict[str, Any]]) -> float:
    """Largest difference between the losses of the forms at one size, relative.

    Raises:
        RuntimeError: if they do not compute the same.
    """
    worst = 0.0
    for shape in dict.fromkeys(record["shape"] for record in records):
        ran = [record for record in records if record["shape"] == shape and record["measured"]]
        for other in ran[1:]:
            differs = abs(other["loss"] - ran[0]["loss"]) / abs(ran[0]["loss"])
            if not differs <= SAME:  # not ">": a loss that is no number is not the same either
                raise RuntimeError(
                    f"{other['form']} is not the same computation as {ran[0]['form']}: at {_by(shape)} voxels their "
                    f"losses are {other['loss']:.6g} and {ran[0]['loss']:.6g}."
                )
            worst = max(worst, differs)
    return worst


def differences() -> tuple[float, float]:
    """Largest difference of any form from plain on a small grid in float32: of the loss, and of all gradients' norm."""

    def run(form: str) -> tuple[Tensor, Tensor]:
        computed, leaves = prepared(Case(form, SMALL, exact=True), torch.device("cpu"))
        value = computed()
        return value.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(value, leaves)])

    loss, gradient = run(PLAIN)
    others = [run(form) for form in FORMS[1:]]
    return (
        max(float((other - loss).abs() / loss.abs()) for other, _ in others),
        max(float((other - gradient).norm() / gradient.norm()) for _, other in others),
    )


# ---- the table ----


def table_of(records: Sequence[dict[str, Any]], options: Options) -> Table:
    """Rows by size and form, and what the numbers say."""
    mixed = networks.find_recipe(MODEL).settings.precision == "bf16"
    precision = "encoder in bfloat16, points in float32" if mixed else "float32"
    table = Table(
        f"A training step of {MODEL}, one pair, voxels of 2 mm, {precision}",
        ("size", "form", "kept, MB", "kept, bytes a voxel", "peak, MB", "s a step", "rounds", "kept, fewer",
         "time, ratio", "loss"),
    )  # fmt: skip
    for record in sorted(records, key=lambda r: math.prod(r["shape"])):  # stable: the forms stay in order
        ran, plain = record["measured"], _beside(record, PLAIN, records)
        said = "" if ran else " (extrapolated)"
        table.add(
            _by(record["shape"]), record["form"], f"{record['kept_mb']:,.1f}{said}",
            f"{1e6 * record['kept_mb'] / math.prod(record['shape']):,.0f}",
            f"{record['peak_mb']:,.0f}" if ran else NOT_MEASURED,
            number(_seconds(record), 2) if ran else NOT_MEASURED, str(record["rounds"]) if ran else "-",
            number(plain["kept_mb"] / record["kept_mb"], 1),
            number(_seconds(record) / _seconds(plain), 2) if ran and plain["measured"] else NOT_MEASURED,
            f"{record['loss']:.6f}" if ran else NOT_MEASURED,
        )  # fmt: skip
    table.notes += statements(records)
    if torch.device(options.device).type != "cuda":
        table.notes.append(f"{_by(WHOLE)} on a GPU: {NOT_MEASURED}.")
    return table


def statements(records: Sequence[dict[str, Any]]) -> list[str]:
    """What the forms save, and how far the straight line can be trusted."""
    left_out = {record["shape"] for record in records if not record["measured"]}
    shape = max({record["shape"] for record in records} - left_out, key=math.prod)
    largest = [record for record in records if record["shape"] == shape]  # at which every form was run
    kept = {record["form"]: record["kept_mb"] for record in largest}
    notes = [
        f"Of what plain keeps at {_by(shape)}, refactored keeps {kept[REFACTORED] / kept[PLAIN]:.0%}, in "
        f"slabs {kept[IN_SLABS] / kept[PLAIN]:.0%}, checkpointed as well {kept[CHECKPOINTED] / kept[PLAIN]:.0%}."
    ]
    checked = [record for record in largest if record["line_mb"]]
    if checked:
        notes.append(_line_checked(checked, records))
    whole = [record for record in records if record["shape"] == WHOLE]
    ran = [record for record in whole if record["measured"]]
    if ran:
        notes.append(f"{_line_checked(ran, records)} Run at that size: {' / '.join(r['form'] for r in ran)}.")
    if len(ran) < len(whole):
        left = " / ".join(r["form"] for r in whole if not r["measured"])
        notes.append(f"Extrapolated by such a line to {_by(WHOLE)}, not measured there: {left}.")
    notes.append(f"Losses of the forms at one size differ by {check_same(records):.0e} at most, relative.")
    return notes


def _line_checked(checked: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> str:
    """How far the line is from what was measured after all, at one size; the worst of the forms."""
    shape = checked[0]["shape"]
    smaller = [r for r in records if r["form"] == checked[0]["form"] and math.prod(r["shape"]) < math.prod(shape)][-2:]
    off = max(abs(record["line_mb"] / record["kept_mb"] - 1) for record in checked)
    return (
        f"A straight line in the number of voxels through {' and '.join(_by(r['shape']) for r in smaller)} predicts "
        f"what is kept at {_by(shape)} to within {off:.1%}, the worst of the forms."
    )


def _beside(record: dict[str, Any], form: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return next(r for r in records if r["form"] == form and r["shape"] == record["shape"])


def _seconds(record: dict[str, Any]) -> float:
    return float(record["forward_s"] + record["backward_s"])


def _by(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, check, show, write.

    Raises:
        ValueError: if the memory, the rounds or the seconds are not positive.
        RuntimeError: if the forms do not compute the same.
    """
    options = tyro.cli(Options, args=arguments)
    if not options.memory_gb > 0 or options.rounds < 1 or not options.seconds > 0:
        raise ValueError(
            f"Memory of {options.memory_gb} GB, {options.rounds} rounds and {options.seconds} s must all be positive."
        )
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    facts = {"seeds": [0], "quick": options.quick, "hardware": hardware(device), "memory_gb": options.memory_gb}
    records = [record for form in FORMS for record in records_of(form, options)]
    table = table_of(records, options)
    loss, gradients = differences()
    table.notes.append(
        f"All forms against plain on {_by(SMALL)} in float32: losses differ by {loss:.0e}, relative, gradients by "
        f"{gradients:.0e} of their norm."
    )
    return report("benchmarks.georeg_memory", arguments, options.json, [table], records, facts)


if __name__ == "__main__":
    command(main)
