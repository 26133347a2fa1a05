"""The lesson machine: what a notebook calls to predict, claim, check, quiz and recap.

    lesson = Lesson("01", FAST=FAST, SEED=SEED, DEVICE=DEVICE)

Each call shows one output and records what happened in that output's metadata, so the executed notebook carries
its own evidence (`regteach.records.records` reads it back). Nothing here stops a lesson: a claim that falls is
shown and recorded, and the course runner fails the lesson. Only a lesson that is written wrongly raises. The calls
return nothing, so that a cell may end with one.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import ipywidgets
import numpy as np
import torch

from regteach import lessons
from regteach.lessons import LessonError, render
from regteach.lessons.exercises import Exercise, judge, load_exercises
from regteach.records import Record, publish, records

__all__ = ["Lesson", "records"]


class Lesson:
    """One lesson while it runs.

    Args:
        id: two digits; the text is `regteach/lessons/NN.toml`, the exercises `lesson_NN.py` beside it.
        **parameters: the values of the cell tagged `parameters`; they are recorded, which proves that they arrived.
            SEED (0 if absent) seeds torch, NumPy and random; DEVICE ("auto" if absent) chooses the device.

    Attributes:
        text: the lesson's text as data.
        device: torch.device; "auto" is the GPU where CUDA has one, else the CPU.
        rng: a NumPy generator seeded with SEED.
        records: what was recorded so far, one dictionary a call; a call repeated with the same id replaces its own.
    """

    folder: ClassVar[Path] = lessons.FOLDER

    def __init__(self, id: str, **parameters: Any) -> None:
        self.text = lessons.load(id, self.folder)
        self.exercises: dict[str, Exercise] = {e.id: e for e in load_exercises(id, self.folder)}
        for exercise in self.exercises.values():
            self.text.objective(exercise.objective)
        seed = parameters.get("SEED", 0)
        self.device = choose_device(parameters.get("DEVICE", "auto"))
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.records: list[Record] = []
        self._predictions: dict[str, tuple[list[str], ipywidgets.RadioButtons, str]] = {}
        page, plain = render.header(self.text)
        self._publish(
            page,
            plain,
            {
                "kind": "lesson",
                "id": id,
                "title": self.text.title,
                "parameters": parameters,
                "device": str(self.device),
                "objectives": [o.id for o in self.text.objectives],
                "exercises": list(self.exercises),
            },
        )

    def predict(self, id: str, question: str, choices: Sequence[str]) -> None:
        """Ask the student to commit to an answer before the run.

        JupyterLab shows radio buttons; print and the site show the question and its choices.

        Args:
            id: "p1", "p2", ...
            question: one sentence, with the lesson texts' markup.
            choices: two or more different plain texts.

        Raises:
            LessonError: fewer than two choices, or two that are the same.
        """
        options = list(choices)
        if len(options) < 2 or len(set(options)) < len(options):
            raise LessonError(f"prediction {id} needs two or more different choices, not {options}")
        radio = ipywidgets.RadioButtons(options=options, value=None, layout={"width": "max-content"})
        self._predictions[id] = options, radio, question
        asked = ipywidgets.HTMLMath(f"<strong>Predict.</strong> {render.inline(question)}")
        page, plain = render.choices(question, options)
        record = {"kind": "prediction", "id": id, "stage": "asked", "question": question, "choices": options}
        self._publish(page, plain, record, widget=ipywidgets.VBox([asked, radio]))

    def reveal(self, id: str, truth: str, because: str) -> None:
        """Compare the prediction with what came out.

        Args:
            id: that of the prediction.
            truth: the choice that turned out right; it may be computed in the notebook.
            because: the reason, one or two sentences.

        Raises:
            LessonError: no such prediction, or a truth that is not one of its choices.
        """
        if id not in self._predictions:
            raise LessonError(f"there is no prediction {id!r} to reveal; run the cell that asks it first")
        options, radio, question = self._predictions[id]
        if truth not in options:
            raise LessonError(f"prediction {id}: the truth {truth!r} is not one of the choices {options}")
        picked = radio.value
        match = None if picked is None else picked == truth
        state = {None: "no prediction made", True: "as predicted", False: "not as predicted"}[match]
        yours = f" You chose: {render.inline(picked)}." if match is False else ""
        body = f"It is: <strong>{render.inline(truth)}</strong>.{yours} {render.inline(because)}"
        plain = f"[{state}] It is: {truth}.{f' You chose: {picked}.' if match is False else ''} {because}"
        record = {
            "kind": "prediction",
            "id": id,
            "stage": "revealed",
            "question": question,
            "picked": picked,
            "truth": truth,
            "match": match,
        }
        self._publish(render.line(state, body, match or None), plain, record)

    def claim(
        self,
        id: str,
        value: Any,
        *,
        says: str,
        control: tuple[str, Any],
        low: float | None = None,
        high: float | None = None,
        unit: str = "",
        objective: str | None = None,
    ) -> None:
        """Hold a number of the lesson to a band, with a negative control that must lie outside it.

        Args:
            id: "c1", "c2", ...
            value: a number, or a tensor or array of one element.
            says: what the number is, as the start of a sentence: "The mean error after registration".
            control: a name and the number that the same measurement gives where nothing was learned or done
                (identity, shuffled pairs, wrong structure). It is computed in the notebook, like the value.
            low: the smallest value that holds, or None.
            high: the largest value that holds, or None.
            unit: "mm", "ms", "%" or nothing.
            objective: id of the objective that this claim meets.

        It holds when the value is finite and inside, and the control is a number and outside.

        Raises:
            LessonError: no band, a band upside down, no control, a value that is not one number, or no such objective.
        """
        if low is None and high is None:
            raise LessonError(f"claim {id} has no band: give low, high or both")
        if any(bound is not None and math.isnan(bound) for bound in (low, high)):
            raise LessonError(f"claim {id}: low ({low}) or high ({high}) is not a number")
        if low is not None and high is not None and low > high:
            raise LessonError(f"claim {id}: low ({low}) is above high ({high})")
        if not (isinstance(control, tuple) and len(control) == 2 and isinstance(control[0], str)):
            raise LessonError(f"claim {id}: control must be a pair of a name and a number, not {control!r}")
        if objective is not None:
            self.text.objective(objective)
        name, compared = control[0], _number(control[1], f"claim {id}: the control")
        measured = _number(value, f"claim {id}: the value")
        why = ""
        if not math.isfinite(measured):
            why = "The value is not a finite number."
        elif not _inside(measured, low, high):
            why = "The value is outside the band."
        elif math.isnan(compared):
            why = "The control is not a number, so nothing is shown."
        elif _inside(compared, low, high):
            why = "The control is inside the band too, so the band shows nothing."
        record = {
            "kind": "claim",
            "id": id,
            "says": says,
            "objective": objective,
            "value": _json(measured),
            "low": low if low is None else float(low),
            "high": high if high is None else float(high),
            "unit": unit,
            "control": {"name": name, "value": _json(compared)},
            "held": not why,
            "why": why,
        }
        page, plain = render.claim(record)
        self._publish(page, plain, record)

    def parity(
        self,
        name: str,
        naive: Any,
        package: Any,
        *,
        tol: float = 1e-6,
        control: tuple[str, Any] | None = None,
        unit: str = "",
        objective: str | None = None,
    ) -> None:
        """Show that the notebook's own version and the package's give the same numbers.

        It is a claim with the id `parity-NAME`: the largest absolute difference is at most `tol`.

        Args:
            name: the package's function, for example "sampling.sample".
            naive: what the notebook's own version gives, a tensor or array.
            package: what the package gives for the same input, of the same shape.
            tol: the largest difference allowed, in the unit of the numbers.
            control: a name and a wrong result of the same shape. By default the notebook's result, moved by one
                element along its first axis longer than one.
            unit: the unit of the numbers.
            objective: id of the objective that this meets.

        Raises:
            LessonError: different shapes, or numbers that cannot be moved and no control.
        """
        ours, theirs = _array(naive), _array(package)
        if ours.shape != theirs.shape:
            raise LessonError(f"parity {name}: the shapes differ, {ours.shape} here and {theirs.shape} in the package")
        if control is None:
            long = [axis for axis, size in enumerate(ours.shape) if size > 1]
            if not long:
                raise LessonError(f"parity {name}: one number cannot be moved; give control=(name, wrong result)")
            control = "the same moved by one element", np.roll(ours, 1, axis=long[0])
        wrong = _array(control[1])
        if wrong.shape != ours.shape:
            raise LessonError(f"parity {name}: the control has shape {wrong.shape}, the results {ours.shape}")
        self.claim(
            f"parity-{name}",
            np.abs(ours - theirs).max(),
            high=tol,
            unit=unit,
            says=f"Parity: the largest difference between your version and `{name}`",
            control=(control[0], np.abs(wrong - theirs).max()),
            objective=objective,
        )

    def check(self, id: str, answer: Any) -> None:
        """Check a student's answer to an exercise: "to do", "correct", or the hint for that very mistake.

        Args:
            id: "e1", "e2", ...
            answer: the student's function itself, not a call of it, or the student's value.

        Raises:
            LessonError: no such exercise.
        """
        if id not in self.exercises:
            raise LessonError(f"lesson {self.text.id} has no exercise {id!r}; it has {', '.join(self.exercises)}")
        exercise = self.exercises[id]
        verdict = judge(exercise, answer)
        state = {"todo": "to do", "correct": "correct", "wrong": "not yet"}[verdict.status]
        record = {
            "kind": "exercise",
            "id": id,
            "title": exercise.title,
            "objective": exercise.objective,
            "status": verdict.status,
            "mistake": verdict.mistake,
            "message": verdict.message,
        }
        good = {"todo": None, "correct": True, "wrong": False}[verdict.status]
        said = "" if verdict.message in ("To do.", "Correct.") else f" {verdict.message}"
        body = f"Exercise {id}, {render.inline(exercise.title)}.{render.inline(said)}"
        self._publish(render.line(state, body, good), f"[{state}] Exercise {id}, {exercise.title}.{said}", record)

    def quiz(self) -> None:
        """Show the lesson's quiz; each choice opens to its verdict and the reason, without a kernel."""
        page, plain = render.quiz(self.text.quiz)
        self._publish(page, plain, {"kind": "quiz", "id": "quiz", "questions": [q.id for q in self.text.quiz]})

    def recap(self, lines: Sequence[str]) -> None:
        """Show what the lesson found, how many claims held, which exercises are to do, and what is next.

        Args:
            lines: one sentence each, with numbers that the notebook computed.
        """
        claims = [r["held"] for r in self.records if r["kind"] == "claim"]
        status = {r["id"]: r["status"] for r in self.records if r["kind"] == "exercise"}
        correct = [id for id in self.exercises if status.get(id) == "correct"]
        open_ = [id for id in self.exercises if status.get(id) != "correct"]
        held = f"Claims held: {sum(claims)} of {len(claims)}."
        done = f"Exercises correct: {len(correct)} of {len(self.exercises)}."
        if open_:
            done += f" To do: {', '.join(open_)}."
        page, plain = render.recap(lines, held, done, self.text.next)
        record = {
            "kind": "recap",
            "id": "recap",
            "lines": list(lines),
            "claims_held": sum(claims),
            "claims_made": len(claims),
            "exercises_correct": correct,
            "exercises_todo": open_,
        }
        self._publish(page, plain, record)

    def _publish(self, page: str, plain: str, record: Record, widget: Any = None) -> None:
        key = (record["kind"], record["id"], record.get("stage"))
        self.records = [r for r in self.records if (r["kind"], r["id"], r.get("stage")) != key] + [record]
        publish(page, plain, record, widget)


def choose_device(name: str) -> torch.device:
    """Choose the torch device from the parameter DEVICE.

    Args:
        name: "auto" (the GPU where CUDA has one, else the CPU) or a torch device such as "cpu" or "cuda:1".

    Raises:
        LessonError: not a device, or one that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:
        raise LessonError(f'DEVICE={name!r} is not a device of this machine; use "auto" or "cpu"') from error
    return device


def _inside(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _number(value: Any, what: str) -> float:
    try:
        array = _array(value)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.size != 1 or value is None or isinstance(value, str):
        given = f"an array of shape {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)
        raise LessonError(f"{what} must be one number, not {given}")
    return float(array.item())


def _json(value: float) -> float | str:
    """JSON has no infinity and no NaN; they are written as text."""
    return value if math.isfinite(value) else str(value)
