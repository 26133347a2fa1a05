"""The training loop: one for every model, on one CPU or on many GPUs and machines.

A :class:`Task` knows the model, the loss and the data; the loop knows devices, precision, accumulation, checkpoints.
Every random number of an item comes from the run's seed and the item's own number, never from what was drawn before,
and what a model draws itself (dropout) from the first item of its batch: so a run that was killed and started again
gives the same weights as one that was not, and two processes that share a batch compute one process's gradients.

How exactly: on the CPUs of one machine, with as many threads and processes, a run that was started again gives the same
weights to the last bit. On CUDA it does not, as no two runs there do: some sums are added up in no fixed order
(``index_add``, ``scatter_add``, the gradients of ``grid_sample`` and of pooling in 3D), and what begins as rounding
grows with the steps. The gradients of one process and of two are the same but for rounding.

On several GPUs or machines: ``accelerate launch -m regteach train RECIPE``, for a loss that calls the model as a whole
(:attr:`Task.calls_forward`): this call is where gradients get shared, and where bf16 applies. Only the main process
reads and writes the folder, so machines need not share a disk. This is the only module that imports accelerate.
"""

import json
import math
import os
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from regteach.names import first_line

STATE = "state.pt"  # everything that a run needs to go on
HISTORY = "history.json"  # the same numbers, for people
PICTURE = "validation.png"
PRECISIONS = ("no", "bf16")
PARTS = ("settings", "step", "seconds", "history", "best", "best_weights", "weights", "optimiser")  # of a state


@dataclass(frozen=True)
class Settings:
    """How long and how to train.

    Args:
        steps: updates of the weights.
        batch: items of one update, over all processes and accumulated parts.
        rate: largest step size of Adam.
        warmup: steps over which the rate rises to it.
        decay: let the rate fall along a cosine, from all of it at the first step to nothing after the last.
        weight_decay: of AdamW.
        clip: largest norm of the gradient; 0 for any.
        accumulate: parts in which a batch is computed, one after the other: less memory, the same gradient.
        precision: "no" for float32, "bf16" for mixed precision; see :attr:`Task.calls_forward`.
        validate_every: steps between validations; the best weights so far are kept.
        seed: of the weights' start and of every item.
    """

    steps: int = 1000
    batch: int = 10
    rate: float = 1e-3
    warmup: int = 0
    decay: bool = False
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "no"
    validate_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"Precision is one of {', '.join(PRECISIONS)}, not {self.precision!r}.")
        for name in ("steps", "batch", "accumulate", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a number of at least 1, not {getattr(self, name)}.")
        for name in ("rate", "warmup", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is a finite number of at least 0, not {getattr(self, name)}.")
        if self.batch % self.accumulate:
            raise ValueError(f"A batch of {self.batch} does not divide into {self.accumulate} equal parts.")

    def rate_at(self, step: int) -> float:
        """Step size of update number ``step``, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.decay else 1.0
        return self.rate * rise * fall


class Task(Protocol):
    """What is trained on what."""

    calls_forward: bool
    """Whether the loss computes the network by calling it as a whole, ``model(...)``; no, where a task does not say.

    Accelerate wraps that call alone: in it processes arrange to share gradients, and mixed precision applies. A loss
    that calls other methods of the model would miss both, so it is trained in one process and with precision "no".
    """

    def build(self) -> nn.Module:
        """The untrained model, on the CPU; the loop has set torch's seed."""

    def loss(self, model: nn.Module, items: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Named terms, one value an item; items are numbers that never repeat in a run."""

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Named figures on people that are not trained on; the first one is the score, higher is better."""

    def picture(self, model: nn.Module, device: torch.device) -> bytes | None:
        """A PNG of a validation case, or nothing."""


@dataclass(frozen=True)
class Trained:
    """Outcome of a run.

    Args:
        model: with the best weights by validation, on the CPU.
        best: figures of that validation, with its "step".
        history: one record a validation: step, mean loss terms since the last one, figures.
        seconds: of training in all, over every start.
    """

    model: nn.Module
    best: dict[str, float]
    history: list[dict[str, float]]
    seconds: float


Progress = Callable[[dict[str, float]], None]


def is_main() -> bool:
    """Whether this process is the one that measures and writes: the only one, or the first of several."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def train(
    task: Task,
    settings: Settings,
    folder: Path | None = None,
    progress: Progress | None = None,
    of: dict[str, Any] | None = None,
) -> Trained:
    """Train, or go on where a run in the same folder was interrupted.

    Args:
        task: what.
        settings: how. A run can only be resumed with the settings that it was started with.
        folder: where the state is kept; without one nothing is saved.
        progress: called after every validation with its record.
        of: whatever else the run is made of, as JSON has it (a recipe): kept in the state, and compared when resumed.

    Raises:
        ValueError: if the folder holds a run with other settings or of another model, or a state that can not be read;
            if a batch can not be shared out among the processes; if there are several of them, or mixed precision, and
            the task does not call the model as a whole.
        FloatingPointError: if the loss, its gradient or the weights are no longer finite; what was saved stays.
    """
    from accelerate import Accelerator  # 2 s to import, and only needed here
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list

    # accelerate remembers the precision of the first run in a process, and a step count that the environment may set.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=settings.precision, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1)
    )
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    share = settings.batch // settings.accumulate
    if world != int(os.environ.get("WORLD_SIZE", world)):
        raise ValueError("Several processes were started, but each trains alone: on CPUs, set ACCELERATE_USE_CPU=1.")
    if not getattr(task, "calls_forward", False) and (world > 1 or settings.precision != "no"):
        raise ValueError(
            f"The loss of {type(task).__name__} does not call the network as a whole, so it trains in one process and "
            f"with precision 'no', not in {world} with precision {settings.precision!r}."
        )
    if share % world:
        raise ValueError(f"{share} items at a time can not be shared out equally among {world} processes.")
    torch.manual_seed(settings.seed)
    bare = task.build()
    optimiser = torch.optim.AdamW(bare.parameters(), lr=settings.rate, weight_decay=settings.weight_decay)
    run = _Run(settings, folder, of or {})
    run.resume(_told_by_main(accelerator, run.read), bare, optimiser)
    model, optimiser = accelerator.prepare(bare, optimiser)
    bare = accelerator.unwrap_model(model)

    model.train()
    started, kept = time.monotonic(), run.seconds
    while run.step < settings.steps:
        for group in optimiser.param_groups:
            group["lr"] = settings.rate_at(run.step)
        optimiser.zero_grad()
        means: dict[str, Tensor] = {}
        for part in range(settings.accumulate):
            first = run.step * settings.batch + part * share
            items = range(first + rank, first + share, world)
            torch.manual_seed(settings.seed * 1_000_000_007 + items[0])
            last = part == settings.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(model):
                terms = task.loss(model, items, device)
                loss = torch.stack(list(terms.values())).sum(0).mean() / settings.accumulate
                accelerator.backward(loss)
            for name, value in terms.items():
                means[name] = means.get(name, 0) + value.detach().mean() / settings.accumulate
        run.note(accelerator.reduce(means, "mean"))
        norm = accelerator.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
        run.check({"gradient": float(norm)})
        optimiser.step()
        run.step += 1
        if run.step % settings.validate_every == 0 or run.step == settings.steps:
            finite = all(bool(value.isfinite().all()) for value in bare.state_dict().values())
            run.check({"weights": 0.0 if finite else math.nan})
            run.seconds = kept + time.monotonic() - started
            bare.eval()
            with torch.no_grad():
                figures = task.validate(bare, device)
                picture = task.picture(bare, device) if accelerator.is_main_process else None
            bare.train()
            # Two machines may differ in the last digit of a figure: all judge by the main process's.
            record = run.judge(broadcast_object_list([figures])[0], bare)
            if accelerator.is_main_process:
                run.save(bare, optimiser, picture)
                if progress is not None:
                    progress(record)
            accelerator.wait_for_everyone()
    model = task.build()
    model.load_state_dict(run.best_weights)
    return Trained(model.eval(), run.best, run.history, run.seconds)


def _told_by_main(accelerator: Any, ask: Callable[[], Any]) -> Any:
    """The answer of the main process, or its ValueError, on every process."""
    from accelerate.utils import broadcast_object_list

    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = ask()
        except ValueError as error:
            answer[1] = error
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


class _Run:
    """What changes while a run goes on, and how it is kept."""

    def __init__(self, settings: Settings, folder: Path | None, of: dict[str, Any]) -> None:
        self.settings, self.folder = settings, folder
        self.made_of = asdict(settings) | of
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.best_weights: dict[str, Tensor] = {}
        self.sums: dict[str, float] = {}
        self.count = 0

    def note(self, terms: dict[str, Tensor]) -> None:
        """Add up the terms of each step until the next validation."""
        values = {name: float(value) for name, value in terms.items()}
        self.check(values)
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        self.count += 1

    def check(self, values: dict[str, float]) -> None:
        """Stop a run that has gone astray, before it is saved."""
        astray = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        if astray:
            raise FloatingPointError(f"Not finite any more after {self.step} steps: {astray}; lower the rate.")

    def judge(self, figures: dict[str, float], model: nn.Module) -> dict[str, float]:
        """Record a validation; keep the weights if it is the best so far."""
        figures = {name: float(value) for name, value in figures.items()}
        losses = {f"loss_{name}": value / self.count for name, value in self.sums.items()}
        record = {"step": self.step, "seconds": round(self.seconds, 1)} | losses | figures
        self.sums, self.count = {}, 0
        self.history.append(record)
        score = next(iter(figures))
        # A score that could not be measured (nan) is worse than any that could.
        if not self.best or math.isnan(self.best[score]) or figures[score] > self.best[score]:
            self.best = {"step": self.step} | figures
            self.best_weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        return record

    def save(self, model: nn.Module, optimiser: Any, picture: bytes | None) -> None:
        """Write everything, the state last; a kill at any moment leaves the old state or the new one."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": self.made_of,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "best": self.best,
            "best_weights": self.best_weights,
            "weights": model.state_dict(),
            "optimiser": optimiser.state_dict(),
        }
        text = json.dumps(self.history, indent=1) + "\n"
        try:
            write_whole(self.folder / HISTORY, lambda path: path.write_text(text, encoding="utf-8"))
            if picture is not None:
                write_whole(self.folder / PICTURE, lambda path: path.write_bytes(picture))
            write_whole(self.folder / STATE, lambda path: torch.save(state, path))
        except (OSError, RuntimeError) as error:  # of a full disk torch's writer makes a RuntimeError of its own
            raise ValueError(
                f"The state of step {self.step} can not be written to {self.folder} ({first_line(error)}); the one "
                "before it, if there is one, is whole."
            ) from error

    def read(self) -> dict[str, Any] | None:
        """The state in the folder, if there is one; what a kill left half-written is removed."""
        if self.folder is None:
            return None
        for name in (STATE, HISTORY, PICTURE):
            for left in self.folder.glob(f".{name}.*"):
                left.unlink(missing_ok=True)
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            state = {part: found[part] for part in PARTS}
            settings = dict(state["settings"])
        except Exception as error:
            raise ValueError(f"{path} is no state of a training ({type(error).__name__}): move it away.") from None
        now = self.made_of
        changed = [key for key in now | settings if (key, settings.get(key)) not in now.items()]
        if changed:
            raise ValueError(f"The run in {self.folder} was started with other settings ({', '.join(changed)}).")
        return state

    def resume(self, state: dict[str, Any] | None, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Take up a state."""
        if state is None:
            return
        try:
            model.load_state_dict(state["weights"])
            optimiser.load_state_dict(state["optimiser"])
        except (RuntimeError, ValueError, KeyError):
            raise ValueError(f"The run in {self.folder} is that of another model.") from None
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.best, self.best_weights = state["best"], state["best_weights"]


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place and move it there when it is complete and on the disk."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
