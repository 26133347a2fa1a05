"""The training loop: against a loop by hand, killed and resumed, under two processes, and what it refuses.

Run as a script (by ``accelerate launch``) this file is one of the two processes.
"""

import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from truths.fields import one_sentence

from regteach import objectives, training
from regteach.affine import AffineBounds
from regteach.grid import Grid
from regteach.nets.istn import ISTN, AffineStage, ISTNConfig, SplineStage
from regteach.sampling import flat_points
from regteach.training import HISTORY, PICTURE, STATE, Settings, train

SHORT = Settings(steps=12, batch=10, rate=0.02, validate_every=3, seed=3)
FORKS = multiprocessing.get_context("forkserver")  # children that have imported everything, and run nothing yet
FORKS.set_forkserver_preload(["pytest", "scipy.linalg", "accelerate", "regteach.nets.istn", "regteach.training"])


class Toy:
    """Learns two functions of four random numbers; what it does is written down in lists."""

    calls_forward = True

    def __init__(self, dropout: float = 0.0, scores: Sequence[float] = ()) -> None:
        self.dropout, self.scores = dropout, list(scores)
        self.seen: list[list[int]] = []
        self.terms: list[dict[str, float]] = []
        self.judged: list[dict[str, Tensor]] = []

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(8, 2))

    def loss(self, model: nn.Module, items: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        self.seen.append(list(items))
        given, wanted = drawn(items)
        found = model(given)
        terms = {"fit": (found - wanted).square().mean(1), "size": 0.01 * found.square().mean(1)}
        self.terms.append({name: float(value.detach().mean()) for name, value in terms.items()})
        return terms

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        assert not model.training
        self.judged.append({name: value.clone() for name, value in model.state_dict().items()})
        given, wanted = drawn(range(10**6, 10**6 + 8))
        error = float((model(given) - wanted).square().mean())
        score = self.scores[len(self.judged) - 1] if self.scores else -error
        return {"score": score, "error": error}

    def picture(self, model: nn.Module, device: torch.device) -> bytes | None:
        return b"\x89PNG" + model[0].weight.detach().numpy().tobytes()


def drawn(items: Sequence[int]) -> tuple[Tensor, Tensor]:
    given = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(item)) for item in items])
    return given, torch.stack([given[:, 0].sin(), given[:, 1] * given[:, 2]], 1)


def by_hand(settings: Settings, rates: Sequence[float]) -> tuple[nn.Module, list[list[Tensor]]]:
    """The same training without the loop: its model, and the gradient of each step before it is clipped."""
    torch.manual_seed(settings.seed)
    task = Toy()
    model = task.build()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=settings.weight_decay)
    gradients = []
    for step, rate in enumerate(rates):
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        terms = task.loss(model, range(step * settings.batch, (step + 1) * settings.batch), torch.device("cpu"))
        (terms["fit"] + terms["size"]).mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        if settings.clip:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimiser.step()
    return model, gradients


def state_of(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / STATE, weights_only=True)
    return state


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 2e-6) -> bool:
    return list(a) == list(b) and all(torch.allclose(a[name], b[name], rtol=0, atol=tolerance) for name in a)


def timeless(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


def assert_same_end(folder: Path, expected: Path) -> None:
    """Weights, optimiser, best weights, history and picture, to the last bit."""
    one, other = state_of(folder), state_of(expected)
    assert one["step"] == other["step"]
    assert same(one["weights"], other["weights"])
    assert same(one["best_weights"], other["best_weights"])
    assert one["best"] == other["best"]
    assert timeless(one["history"]) == timeless(other["history"])
    for mine, yours in zip(one["optimiser"]["state"].values(), other["optimiser"]["state"].values(), strict=True):
        assert same(mine, yours)
    assert timeless(json.loads((folder / HISTORY).read_text())) == timeless(other["history"])
    assert (folder / PICTURE).read_bytes() == (expected / PICTURE).read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == sorted([STATE, HISTORY, PICTURE])


# ---- the loop ----


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, [0.02] * 12),
        ({"clip": 0.05, "weight_decay": 0.1}, [0.02] * 12),
        ({"clip": 0.0, "warmup": 4}, [0.005, 0.01, 0.015] + [0.02] * 9),
        ({"decay": True}, [0.01 * (1 + math.cos(math.pi * k / 12)) for k in range(12)]),
    ],
    ids=["plain", "clipped", "warmup", "decay"],
)
def test_the_loop_is_the_loop_by_hand(tmp_path: Path, changes: dict[str, Any], rates: list[float]) -> None:
    settings = replace(SHORT, **changes)
    train(Toy(), settings, tmp_path)
    model, _ = by_hand(settings, rates)
    assert same(state_of(tmp_path)["weights"], model.state_dict())
    assert not close(Toy().build().state_dict(), model.state_dict(), 0.05)  # it has moved


def test_it_learns() -> None:
    trained = train(Toy(), replace(SHORT, steps=150, validate_every=50, batch=20))
    assert trained.best["error"] < 0.5 * float(drawn(range(10**6, 10**6 + 8))[1].square().mean())
    assert not trained.model.training


@pytest.mark.parametrize("parts", [2, 5, 10])
def test_a_batch_in_parts_is_the_same_batch(tmp_path: Path, parts: int) -> None:
    whole = train(Toy(), SHORT, tmp_path / "whole")
    split = train(Toy(), replace(SHORT, accumulate=parts), tmp_path / "split")
    assert close(state_of(tmp_path / "split")["weights"], state_of(tmp_path / "whole")["weights"])
    for one, other in zip(timeless(split.history), timeless(whole.history), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_no_item_comes_twice_and_none_is_left_out() -> None:
    for parts in (1, 5):
        task = Toy()
        train(task, replace(SHORT, accumulate=parts))
        assert sorted(itertools.chain(*task.seen)) == list(range(120))
        assert len(task.seen) == 12 * parts


def test_a_step_count_in_the_environment_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SHORT, clip=0.0, steps=1)
    train(Toy(), settings, tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(Toy(), settings, tmp_path / "set")
    assert same(moments(tmp_path / "set"), moments(tmp_path / "plain"))


def moments(folder: Path) -> dict[str, Tensor]:
    """After one step from rest Adam's first moment is a tenth of the gradient."""
    return {str(key): value["exp_avg"] for key, value in state_of(folder)["optimiser"]["state"].items()}


def test_the_first_moment_is_a_tenth_of_the_gradient(tmp_path: Path) -> None:
    settings = replace(SHORT, clip=0.0, steps=1)
    train(Toy(), settings, tmp_path)
    _, gradients = by_hand(settings, [0.02])
    assert close(moments(tmp_path), {str(k): 0.1 * g for k, g in enumerate(gradients[0])}, 1e-8)


def test_the_rate_rises_to_the_largest_and_falls_to_nothing() -> None:
    settings = Settings(steps=200, warmup=20, decay=True, rate=0.4)
    rates = [settings.rate_at(step) for step in range(201)]
    assert rates[0] == pytest.approx(0.4 / 20)
    assert rates[9] == pytest.approx(0.2 * 0.5 * (1 + math.cos(math.pi * 9 / 200)))
    assert rates[100] == pytest.approx(0.2)
    assert rates[200] == 0
    assert all(a >= b for a, b in itertools.pairwise(rates[19:]))
    assert Settings(rate=0.3).rate_at(999) == 0.3


# ---- validation ----


def test_every_validation_is_a_record() -> None:
    task = Toy()
    told: list[dict[str, float]] = []
    trained = train(task, replace(SHORT, steps=11, validate_every=4), progress=told.append)
    assert told == trained.history
    assert [record["step"] for record in told] == [4, 8, 11]
    for record, (first, last) in zip(told, [(0, 4), (4, 8), (8, 11)], strict=True):
        assert list(record) == ["step", "seconds", "loss_fit", "loss_size", "score", "error"]
        for name in ("fit", "size"):
            mean = sum(terms[name] for terms in task.terms[first:last]) / (last - first)
            assert record[f"loss_{name}"] == pytest.approx(mean, abs=1e-6)
        assert record["score"] == -record["error"]
    assert 0 <= told[0]["seconds"] <= told[2]["seconds"] <= round(trained.seconds, 1)


@pytest.mark.parametrize(
    ("scores", "peak"),
    [
        ([0.1, 0.5, 0.9, 0.3], 2),
        ([0.1, 0.9, 0.9, 0.3], 1),  # the first of two
        ([0.9, 0.5, 0.4, 0.3], 0),
        ([math.nan, 0.2, math.nan, 0.1], 1),  # what could not be measured is no best
        ([-math.inf, -3.0, -2.0, math.nan], 2),
    ],
)
def test_the_weights_of_the_best_validation_are_kept(tmp_path: Path, scores: list[float], peak: int) -> None:
    task = Toy(scores=scores)
    trained = train(task, SHORT, tmp_path)
    assert trained.best["step"] == 3 * (peak + 1)
    assert trained.best["score"] == scores[peak]
    assert same(trained.model.state_dict(), task.judged[peak])
    state = state_of(tmp_path)
    assert same(state["best_weights"], task.judged[peak])
    assert same(state["weights"], task.judged[-1])


def test_a_best_before_the_interruption_stays_the_best(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(Stopping(60, scores=[0.9, 0.1]), SHORT, tmp_path)
    trained = train(Toy(scores=[0.5, 0.2]), SHORT, tmp_path)
    assert trained.best["step"] == 3
    assert [record["score"] for record in trained.history] == [0.9, 0.1, 0.5, 0.2]


def test_figures_of_any_number_type_can_be_kept(tmp_path: Path) -> None:
    class Tensors(Toy):
        def validate(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
            import numpy as np

            return {"score": np.float32(0.5), "other": torch.tensor(2.0), "third": np.float64(0.25)}

    train(Tensors(), SHORT, tmp_path)
    trained = train(Tensors(), SHORT, tmp_path)  # it can be read again
    assert trained.best == {"step": 3, "score": 0.5, "other": 2.0, "third": 0.25}
    assert json.loads((tmp_path / HISTORY).read_text())[0]["other"] == 2.0


def test_what_is_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "new" / "one"
    task = Toy()
    trained = train(task, SHORT, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([STATE, HISTORY, PICTURE])
    assert json.loads((folder / HISTORY).read_text()) == trained.history
    last = task.judged[-1]["0.weight"].numpy().tobytes()
    assert (folder / PICTURE).read_bytes() == b"\x89PNG" + last


def test_without_a_picture_there_is_none(tmp_path: Path) -> None:
    class Plain(Toy):
        def picture(self, model: nn.Module, device: torch.device) -> bytes | None:
            return None

    train(Plain(), SHORT, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([STATE, HISTORY])


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("something was written")

    monkeypatch.setattr(training, "write_whole", refuse)
    train(Toy(), SHORT)
    assert list(tmp_path.iterdir()) == []


# ---- killed and resumed ----


class Stopped(Exception):
    pass


class Stopping(Toy):
    """Stops, in every process alike, when it is asked for an item from this number on."""

    def __init__(self, at: int, **more: Any) -> None:
        super().__init__(**more)
        self.at = at

    def loss(self, model: nn.Module, items: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        if items[-1] >= self.at:
            raise Stopped
        return super().loss(model, items, device)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("item", [20, 30, 75, 119])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, item: int, dropout: float) -> None:
    settings = replace(SHORT, decay=True, weight_decay=0.01, accumulate=2)
    train(Toy(dropout), settings, tmp_path / "straight")
    with pytest.raises(Stopped):
        train(Stopping(item, dropout=dropout), settings, tmp_path / "stopped")
    torch.rand(7)  # the state of torch's own generator must not matter
    task = Toy(dropout)
    trained = train(task, settings, tmp_path / "stopped")
    assert_same_end(tmp_path / "stopped", tmp_path / "straight")
    assert task.seen[0][0] == item // 30 * 30  # from the last validation on, and not from the start
    assert same(trained.model.state_dict(), state_of(tmp_path / "straight")["best_weights"])


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(Toy(), SHORT, tmp_path)
    before = (tmp_path / STATE).read_bytes()
    task = Toy()
    again = train(task, SHORT, tmp_path)
    assert task.seen == task.judged == []
    assert same(again.model.state_dict(), first.model.state_dict())
    assert (again.best, again.history, again.seconds) == (first.best, first.history, first.seconds)
    assert (tmp_path / STATE).read_bytes() == before


LONG = replace(SHORT, steps=100, validate_every=2, decay=True)  # mostly validating and saving


def child(folder: Path, settings: Settings, moment: str, tell: Any) -> None:
    """Train in a process of its own, which kills itself at a named moment of its third validation."""
    torch.set_num_threads(1)
    saved, written, replaced = torch.save, Path.write_text, os.replace

    def now(name: str) -> bool:
        return name == moment and (folder / STATE).exists() and state_of(folder)["step"] == 2 * settings.validate_every

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save(state: object, path: Path) -> None:
        last = now("half of the state")
        saved(state, path)
        if last:
            os.truncate(path, path.stat().st_size // 2)
            die()

    def write_text(path: Path, text: str, **more: Any) -> int:
        if now("half of the history"):
            written(path, text[: len(text) // 2], **more)
            die()
        return written(path, text, **more)

    def move(old: Path, new: Path) -> None:
        if now(f"before {new.name} is moved"):
            die()
        last = now(f"after {new.name} is moved")
        replaced(old, new)
        if last:
            die()

    torch.save, Path.write_text, os.replace = save, write_text, move  # type: ignore[assignment]
    train(Toy(0.2), settings, folder, tell.send)


def start(folder: Path, settings: Settings, moment: str = "") -> tuple[Any, Any]:
    hear, tell = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=child, args=(folder, settings, moment, tell))
    process.start()
    tell.close()
    return process, hear


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    train(Toy(0.2), LONG, tmp_path / "straight")
    folder = tmp_path / "killed"
    chance = random.Random(0)
    kills = step = 0
    while True:
        process, hear = start(folder, LONG)
        try:
            records = [hear.recv() for _ in range(chance.randint(1, 8))]
            time.sleep(0.02 * chance.random())
            process.kill()
        except EOFError:  # it came to its end
            records = []
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        assert records[0]["step"] == step + 2  # it went on where the last state was
        step = state_of(folder)["step"]  # never half-written
        assert step >= records[-1]["step"]
        if kills == 6:
            train(Toy(0.2), LONG, folder)
            break
    assert kills >= 3
    assert_same_end(folder, tmp_path / "straight")


MOMENTS = [
    "half of the history",
    f"before {HISTORY} is moved",
    f"before {PICTURE} is moved",
    "half of the state",
    f"before {STATE} is moved",
    f"after {STATE} is moved",
]


def test_killed_in_the_midst_of_saving_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    train(Toy(0.2), SHORT, tmp_path / "straight")
    started = [(moment, tmp_path / str(k)) for k, moment in enumerate(MOMENTS)]
    for moment, folder in started:
        process, _ = start(folder, SHORT, moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
        assert state_of(folder)["step"] == (9 if moment.startswith("after") else 6)
        assert len(list(folder.glob(".*"))) == (0 if moment.startswith("after") else 1)  # what was being written
        train(Toy(0.2), SHORT, folder)
        assert_same_end(folder, tmp_path / "straight")


@pytest.mark.parametrize("where", ["torch.save", "os.replace", "os.fsync"])
def test_a_full_disk_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    with pytest.raises(Stopped):
        train(Stopping(30), SHORT, tmp_path)
    before = (tmp_path / STATE).read_bytes()

    def fail(*args: Any, **more: Any) -> None:
        if where == "torch.save":
            args[1].write_bytes(b"half a st")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(ValueError, match=r"The state of step \d+ can not be written .*No space left") as caught:
            train(Toy(), SHORT, tmp_path)
    assert one_sentence(caught.value)
    assert (tmp_path / STATE).read_bytes() == before
    assert list(tmp_path.glob(".*")) == []
    train(Toy(), SHORT, tmp_path)
    train(Toy(), SHORT, tmp_path / "straight")
    assert same(state_of(tmp_path)["weights"], state_of(tmp_path / "straight")["weights"])


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rate": 0.01}, "(rate)"),
        ({"seed": 4, "precision": "bf16"}, "(precision, seed)"),
        ({"steps": 24}, "(steps)"),
        ({"accumulate": 2}, "(accumulate)"),
    ],
)
def test_a_run_is_resumed_with_its_own_settings_only(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    train(Toy(), SHORT, tmp_path)
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(ValueError, match="was started with other settings") as caught:
        train(Toy(), replace(SHORT, **changes), tmp_path)
    assert one_sentence(caught.value, str(tmp_path), said)
    assert (tmp_path / STATE).read_bytes() == before


def test_a_setting_that_is_gone_is_named(tmp_path: Path) -> None:
    train(Toy(), SHORT, tmp_path)
    state = state_of(tmp_path)
    state["settings"]["momentum"] = 0.9
    torch.save(state, tmp_path / STATE)
    with pytest.raises(ValueError, match=r"\(momentum\)"):
        train(Toy(), SHORT, tmp_path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-500]),
    "the first half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path: path.write_text("steps = 12\n"),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(4000)),
    "a list": lambda path: torch.save([1, 2, 3], path),
    "a model": lambda path: torch.save(Toy().build().state_dict(), path),
    "code": lambda path: torch.save({"settings": Stopped}, path),
    "a part less": lambda path: torch.save({k: v for k, v in state_of(path.parent).items() if k != "best"}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_and_left_alone(tmp_path: Path, damage: str) -> None:
    train(Toy(), SHORT, tmp_path)
    DAMAGES[damage](tmp_path / STATE)
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(ValueError, match="is no state of a training") as caught:
        train(Toy(), SHORT, tmp_path)
    assert one_sentence(caught.value, str(tmp_path / STATE), "move it away")
    assert (tmp_path / STATE).read_bytes() == before


@pytest.mark.parametrize("width", [3, 4], ids=["other layers", "other sizes"])
def test_the_state_of_another_model_is_refused(tmp_path: Path, width: int) -> None:
    class Other(Toy):
        def build(self) -> nn.Module:
            return nn.Linear(4, 2) if width == 3 else nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2))

    train(Toy(), SHORT, tmp_path)
    with pytest.raises(ValueError, match="is that of another model") as caught:
        train(Other(), SHORT, tmp_path)
    assert one_sentence(caught.value, str(tmp_path))


class Astray(Toy):
    """Goes astray from an item on: in a term of the loss, or in its gradient alone."""

    def __init__(self, at: int, where: str, value: float = math.nan) -> None:
        super().__init__()
        self.at, self.where, self.value = at, where, value

    def loss(self, model: nn.Module, items: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        terms = super().loss(model, items, device)
        here = torch.tensor([item >= self.at for item in items])
        if self.where == "gradient":  # the square root has none at 0
            terms["root"] = torch.where(here, terms["size"] * 0, terms["size"]).sqrt()
        else:
            terms[self.where] = terms[self.where] * torch.where(here, self.value, 1.0)
        return terms


@pytest.mark.parametrize("item", [65, 89])  # 89: in the step whose result would be validated and saved
@pytest.mark.parametrize(
    ("where", "value"), [("size", math.nan), ("fit", math.inf), ("fit", -math.inf), ("gradient", 0.0)]
)
def test_a_run_that_goes_astray_says_where_and_keeps_its_state(
    tmp_path: Path, where: str, value: float, item: int
) -> None:
    settings = replace(SHORT, clip=0.0)
    with pytest.raises(FloatingPointError) as caught:
        train(Astray(item, where, value), settings, tmp_path)
    assert one_sentence(caught.value, f"after {item // 10} steps", where)
    state = state_of(tmp_path)
    assert state["step"] == 6
    assert all(value.isfinite().all() for value in state["weights"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Overflowing(Toy):
        def loss(self, model: nn.Module, items: Sequence[int], device: torch.device) -> dict[str, Tensor]:
            terms = super().loss(model, items, device)
            model[3].bias.data += math.inf
            return terms

    with pytest.raises(FloatingPointError, match="after 1 steps: weights; lower the rate"):
        train(Overflowing(), replace(SHORT, validate_every=1), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "fp16"}, "Precision is one of no, bf16, not 'fp16'"),
        ({"steps": 0}, "steps is a number of at least 1, not 0"),
        ({"validate_every": 0}, "validate_every is a number of at least 1"),
        ({"batch": -1}, "batch is a number of at least 1"),
        ({"batch": 10, "accumulate": 3}, "A batch of 10 does not divide into 3 equal parts"),
        ({"rate": -0.1}, "rate is a finite number of at least 0, not -0.1"),
        ({"rate": math.nan}, "rate is a finite number"),
        ({"warmup": -5}, "warmup is a finite number of at least 0, not -5"),
        ({"clip": math.inf}, "clip is a finite number"),
        ({"weight_decay": -1.0}, "weight_decay is a finite number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(Settings(), **changes)
    assert one_sentence(caught.value, said)


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="each trains alone") as caught:
        train(Toy(), SHORT, tmp_path)
    assert one_sentence(caught.value, "ACCELERATE_USE_CPU")
    assert list(tmp_path.iterdir()) == []


class Parts(Toy):
    """Computes the same network layer by layer: no call of the model that accelerate could wrap."""

    calls_forward = False

    def loss(self, model: nn.Module, items: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        def found(given: Tensor) -> Tensor:
            for k in range(4):
                given = model[k](given)  # type: ignore[index]
            return given

        return super().loss(found, items, device)  # type: ignore[arg-type]


def test_a_loss_that_does_not_call_the_model_trains_without_mixed_precision_or_not_at_all(tmp_path: Path) -> None:
    task = Parts()
    silent = SimpleNamespace(build=task.build, loss=task.loss, validate=task.validate, picture=task.picture)
    train(Toy(), SHORT, tmp_path / "whole")
    for tried in (task, silent):
        name = type(tried).__name__
        train(tried, SHORT, tmp_path / name)
        assert_same_end(tmp_path / name, tmp_path / "whole")
        with pytest.raises(ValueError, match="not in 1 with precision 'bf16'") as caught:
            train(tried, replace(SHORT, precision="bf16"), tmp_path / "none")
        assert one_sentence(caught.value, f"The loss of {name} does not call the network as a whole")
    assert not (tmp_path / "none").exists()


# ---- precision, and a network of the package ----

GRID = Grid((24, 20), (2.0, 1.5), (-100.0, 40.0))
STAGES = (AffineStage(AffineBounds(4.0, 20.0, 1.2), (4, 8), 8), SplineStage(12.0, widths=(4, 8)))


class Pairs:
    """An ISTN on blobs; it remembers what its last result looked like."""

    calls_forward = True

    def __init__(self, variant: str, itn: bool = True) -> None:
        self.variant = variant
        self.config = ISTNConfig(GRID, STAGES, itn=(4, 8) if itn else ())
        self.types: set[torch.dtype] = set()
        self.moved: list[float] = []

    def build(self) -> nn.Module:
        return ISTN(self.config)

    def loss(self, model: nn.Module, items: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        moving, fixed = (torch.cat([blob(2 * item + side) for item in items]) for side in (0, 1))
        result = model(moving, fixed, GRID)
        points = flat_points(GRID)
        moved = result.transform(points)
        self.types |= {moved.dtype, *(f.dtype for f in result.features), *(s.parameters.dtype for s in result.steps)}
        self.moved.append(float((moved - points).detach().abs().max()))
        pair = moving, fixed
        return objectives.istn(self.variant, result, pair, pair, GRID, bending=1.0)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        return {"score": -float(objectives.total(self.loss(model, range(90, 94), device)).mean())}

    def picture(self, model: nn.Module, device: torch.device) -> bytes | None:
        return None


def blob(number: int) -> Tensor:
    centre = GRID_CENTRE + 6 * torch.rand(2, generator=torch.Generator().manual_seed(number)) - 3
    squares = (flat_points(GRID)[0] - centre).square().sum(-1).reshape(1, 1, *GRID.shape)
    return (-squares / 60).exp()


GRID_CENTRE = torch.tensor(GRID.centre)


def test_mixed_precision_rounds_the_network_and_not_the_coordinates(tmp_path: Path) -> None:
    settings = Settings(steps=4, batch=4, rate=1e-3, validate_every=2)
    exact, mixed = Pairs("implicit"), Pairs("implicit")
    one = train(exact, settings, tmp_path / "no")
    other = train(mixed, replace(settings, precision="bf16"), tmp_path / "bf16")  # after "no", in one process
    assert mixed.types == {torch.float32}
    # The start is the identity: points at -100 mm stay where they are to float32, 8e-6 mm, and not to bf16, 0.5 mm.
    assert mixed.moved[0] < 2e-5
    assert other.history[0]["loss_itn"] == pytest.approx(one.history[0]["loss_itn"], rel=0.05)
    assert other.history[0]["loss_itn"] != pytest.approx(one.history[0]["loss_itn"], rel=1e-6)  # it was rounded
    assert {value.dtype for value in other.model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    result = other.model(blob(1), blob(2), GRID)
    assert result.features[0].dtype == torch.float32  # what is returned is an ordinary model


def test_mixed_precision_resumes_to_the_same_weights(tmp_path: Path) -> None:
    settings = replace(SHORT, precision="bf16")
    train(Toy(), settings, tmp_path / "straight")
    with pytest.raises(Stopped):
        train(Stopping(50), settings, tmp_path / "stopped")
    train(Toy(), settings, tmp_path / "stopped")
    assert_same_end(tmp_path / "stopped", tmp_path / "straight")
    train(Toy(), SHORT, tmp_path / "exact")
    assert not close(state_of(tmp_path / "exact")["weights"], state_of(tmp_path / "straight")["weights"], 1e-5)


# ---- two processes ----

HALVES = replace(SHORT, accumulate=5, decay=True)  # two items at a time, one for each process
ISTN_SETTINGS = Settings(steps=3, batch=2, rate=1e-3, validate_every=3)


def two_processes(out: Path) -> None:
    """What each of the two does; the tests read what they left."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    found: dict[str, Any] = {"loads": [], "errors": {}}

    def refused(name: str, task: Any, settings: Settings, folder: Path, kind: type[Exception]) -> None:
        try:
            train(task, settings, folder)
        except kind as error:
            found["errors"][name] = str(error)

    train(Toy(), replace(SHORT, clip=0.0, steps=1), out / "gradient")
    task = Toy(scores=[0.1, 0.5, 0.3, 0.2] if rank == 0 else [0.9, 0.5, 0.3, 0.2])
    trained = train(task, HALVES, out / "whole", lambda record: found["loads"].append(record))
    found |= {"weights": trained.model.state_dict(), "best": trained.best, "seen": task.seen}
    found["history"] = timeless(trained.history)

    train(Toy(), SHORT, out / "straight")
    refused("stopped", Stopping(70), SHORT, out / f"own-{rank}", Stopped)
    resumed = train(Toy(), SHORT, out / f"own-{rank}")  # the disks are not shared: process 1 has no state
    found["resumed"] = resumed.model.state_dict()

    for name, item in (("odd", 75), ("even", 74)):  # in the share of one process only
        refused(name, Astray(item, "size"), SHORT, out / name, FloatingPointError)
    refused("share", Toy(), replace(SHORT, batch=5), out / "share", ValueError)
    refused("parts", Parts(), SHORT, out / "parts", ValueError)
    refused("settings", Toy(), replace(SHORT, rate=0.5), out / "straight", ValueError)
    if rank == 0:
        (out / "damaged").mkdir()
        (out / "damaged" / STATE).write_bytes(b"nothing")
    refused("damaged", Toy(), SHORT, out / "damaged", ValueError)
    for variant in objectives.ISTN:
        itn = variant in ("explicit", "implicit")
        found[variant] = train(Pairs(variant, itn), ISTN_SETTINGS).model.state_dict()
    torch.save(found, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Two CPU processes by ``accelerate launch``: their folder, and what each of them found."""
    out = tmp_path_factory.mktemp("pair")
    command = (
        "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    )
    here = Path(__file__).parent
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]),
        "HF_HOME": str(out / "home"),  # no configuration of the machine's
    }
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *command.split(), __file__, str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


Pair = tuple[Path, list[dict[str, Any]]]


def test_two_processes_compute_the_gradient_of_one(pair: Pair, tmp_path: Path) -> None:
    train(Toy(), replace(SHORT, clip=0.0, steps=1), tmp_path)
    assert close(moments(pair[0] / "gradient"), moments(tmp_path), 1e-8)


def test_two_processes_train_what_one_trains(pair: Pair, tmp_path: Path) -> None:
    out, found = pair
    one = train(Toy(scores=[0.1, 0.5, 0.3, 0.2]), HALVES, tmp_path)
    assert close(state_of(out / "whole")["weights"], state_of(tmp_path)["weights"])
    assert close(state_of(out / "whole")["best_weights"], state_of(tmp_path)["best_weights"])
    for mine, yours in zip(found[0]["history"], timeless(one.history), strict=True):
        assert mine == pytest.approx(yours, abs=1e-6)  # the losses are those of both shares


def test_two_processes_share_the_items(pair: Pair) -> None:
    seen = [list(itertools.chain(*found["seen"])) for found in pair[1]]
    assert sorted(seen[0] + seen[1]) == list(range(120))
    assert seen[0] == list(range(0, 120, 2))


def test_both_processes_have_the_best_weights_of_the_main_one(pair: Pair) -> None:
    out, found = pair
    assert found[0]["best"] == found[1]["best"]
    assert found[0]["best"]["step"] == 6  # though the figures of process 1 say 3
    assert same(found[0]["weights"], found[1]["weights"])
    assert same(found[0]["weights"], state_of(out / "whole")["best_weights"])
    assert found[0]["history"] == found[1]["history"]


def test_only_the_main_process_tells_and_saves(pair: Pair) -> None:
    out, found = pair
    assert [len(one["loads"]) for one in found] == [4, 0]
    assert (out / "own-0" / STATE).exists()
    assert not (out / "own-1").exists()


def test_two_processes_resume_to_the_same_weights(pair: Pair) -> None:
    out, found = pair
    assert found[0]["errors"]["stopped"] == found[1]["errors"]["stopped"]
    assert_same_end(out / "own-0", out / "straight")
    assert same(found[0]["resumed"], found[1]["resumed"])


def test_what_one_process_refuses_both_refuse(pair: Pair) -> None:
    out, found = pair
    assert found[0]["errors"] == found[1]["errors"]
    errors = found[0]["errors"]
    assert errors["share"] == "5 items at a time can not be shared out equally among 2 processes."
    assert errors["parts"].endswith("in one process and with precision 'no', not in 2 with precision 'no'.")
    assert not (out / "parts").exists()
    assert errors["damaged"].startswith(f"{out / 'damaged' / STATE} is no state of a training")
    assert "other settings (rate)" in errors["settings"]
    for name in ("odd", "even"):
        assert errors[name] == "Not finite any more after 7 steps: size; lower the rate."
        assert state_of(out / name)["step"] == 6
        assert all(value.isfinite().all() for value in state_of(out / name)["weights"].values())


@pytest.mark.parametrize("variant", objectives.ISTN)
def test_two_processes_train_every_variant(pair: Pair, variant: str) -> None:
    one = train(Pairs(variant, variant in ("explicit", "implicit")), ISTN_SETTINGS)
    assert same(pair[1][0][variant], pair[1][1][variant])
    # Adam's first steps are a sign: a gradient of rounding size may turn a weight by twice the rate.
    apart = torch.cat([(pair[1][0][variant][k] - v).abs().flatten() for k, v in one.model.state_dict().items()])
    assert apart.quantile(0.98) < 1e-6


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
