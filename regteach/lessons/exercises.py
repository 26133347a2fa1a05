"""Exercises that recognise mistakes: a wrong answer is compared with wrong answers that were planted beforehand.

An answer is a function, run on the exercise's cases, or a plain value. What it gives is compared with what the
reference gives. Where it differs, it is compared with what each named mistake gives on the same cases, and the hint
of the mistake that it reproduces is shown. Sources: the planted answers are the lesson authors'; the idea is that of
buggy rules in Brown and Burton (1978), Diagnostic models for procedural bugs in basic mathematical skills.
"""

import importlib.util
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from regteach.lessons import FOLDER, LessonError

Status = Literal["todo", "correct", "wrong"]


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that students give, and what to tell them.

    Args:
        name: short and unique within the exercise, for example "wrong direction".
        answer: a function or a value that makes this very mistake.
        hint: what to look at; it does not give the answer away.
    """

    name: str
    answer: Any
    hint: str


@dataclass(frozen=True)
class Exercise:
    """One exercise: a reference, the cases it is compared on, and the mistakes it recognises.

    Args:
        id: "e1", "e2", ... in the order of the notebook.
        title: a few words.
        objective: the id of the objective that it meets.
        reference: the correct function, or the correct value.
        hint: shown for a wrong answer that no mistake reproduces.
        cases: for functions, returns the argument tuples. Called afresh, from the same seed, for every answer, so
            that an answer which changes its arguments spoils nothing. None when the answer is a plain value.
        mistakes: the planted wrong answers.
        tolerance: numbers agree within this, absolute and relative.
        observe: maps an output to what is compared, for example a transform to its values at a few points, or a
            number to "too small", "good" or "too large".
    """

    id: str
    title: str
    objective: str
    reference: Any
    hint: str
    cases: Callable[[], Sequence[tuple[Any, ...]]] | None = None
    mistakes: tuple[Mistake, ...] | list[Mistake] = ()
    tolerance: float = 1e-5
    observe: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Verdict:
    """What an answer is: its status, one message for the student, and the mistake it reproduces."""

    status: Status
    message: str
    mistake: str | None = None


def load_exercises(id: str, folder: Path = FOLDER) -> tuple[Exercise, ...]:
    """Read `EXERCISES` from `lesson_NN.py`; a lesson without that file has none.

    Raises:
        LessonError: the module has no list EXERCISES of Exercise, or ids are not e1, e2, ... in order.
    """
    path = folder / f"lesson_{id}.py"
    if not path.is_file():
        return ()
    spec = importlib.util.spec_from_file_location(f"regteach_lesson_{id}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    exercises = getattr(module, "EXERCISES", None)
    if not isinstance(exercises, list | tuple) or not all(isinstance(e, Exercise) for e in exercises):
        raise LessonError(f"{path.name} must define EXERCISES, a list of Exercise")
    ids = [e.id for e in exercises]
    if ids != [f"e{i}" for i in range(1, len(ids) + 1)]:
        raise LessonError(f"{path.name}: the exercises' ids must be e1, e2, ... in order, not {', '.join(ids)}")
    return tuple(exercises)


def judge(exercise: Exercise, answer: Any) -> Verdict:
    """Compare a student's answer with the reference and with the planted mistakes.

    Args:
        exercise: which one.
        answer: a function where the exercise has cases, otherwise a value.

    Returns:
        "todo" for an answer not attempted (None, Ellipsis, a function that returns one of them or raises
        NotImplementedError), "correct", or "wrong" with the hint that fits best.
    """
    if answer is None or answer is ...:
        return Verdict("todo", "To do.")
    if exercise.cases is not None and not callable(answer):
        return Verdict("wrong", f"A function is expected here, and you gave {_kind(answer)}.")
    if exercise.cases is None and callable(answer):
        return Verdict("wrong", "A value is expected here, and you gave a function: did you mean to call it?")
    given = _outcomes(exercise, answer)
    if any(isinstance(o, _Failure) and isinstance(o.error, NotImplementedError) for o in given):
        return Verdict("todo", "To do.")
    expected = _outcomes(exercise, exercise.reference)
    for outcome in expected:
        if isinstance(outcome, _Failure):
            raise LessonError(f"exercise {exercise.id}: the reference itself raises {outcome.sentence}")
    if exercise.cases is not None and all(o is None or o is ... for o in given):
        return Verdict(
            "todo", "To do: the function returns nothing yet. If you have written it, does it `return` its result?"
        )
    if _all_same(given, expected, exercise.tolerance):
        return Verdict("correct", "Correct.")
    for mistake in exercise.mistakes:
        if _all_same(given, _outcomes(exercise, mistake.answer), exercise.tolerance):
            return Verdict("wrong", mistake.hint, mistake.name)
    return Verdict("wrong", _explain(exercise, given, expected))


def problems(exercise: Exercise) -> list[str]:
    """Say what is wrong with an exercise itself: a reference that fails, mistakes that are not told apart.

    Returns:
        One sentence a problem; an empty list when the reference is correct and each planted mistake gets its hint.
    """
    found = []
    names = [m.name for m in exercise.mistakes]
    if len(set(names)) < len(names):
        found.append(f"{exercise.id}: two mistakes have the same name")
    if not exercise.mistakes:
        found.append(f"{exercise.id}: no mistake is planted")
    verdict = judge(exercise, exercise.reference)
    if verdict.status != "correct":
        found.append(f"{exercise.id}: the reference is {verdict.status}: {verdict.message}")
    for mistake in exercise.mistakes:
        verdict = judge(exercise, mistake.answer)
        if verdict.mistake != mistake.name:
            taken = verdict.mistake or verdict.status
            found.append(f"{exercise.id}: the planted mistake {mistake.name!r} is taken for {taken!r}")
    return found


@dataclass(frozen=True)
class _Failure:
    """An answer that raised, on one case."""

    error: Exception

    @property
    def sentence(self) -> str:
        text = " ".join(str(self.error).split())
        return f"{type(self.error).__name__}: {text}" if text else type(self.error).__name__


def _outcomes(exercise: Exercise, answer: Any) -> list[Any]:
    with _same_seed():
        if exercise.cases is None:
            return [_observed(exercise, answer)]
        outcomes: list[Any] = []
        for arguments in exercise.cases():
            try:
                output = answer(*arguments)
            except Exception as error:  # whatever a student's code raises is shown to the student
                outcomes.append(_Failure(error))
            else:
                outcomes.append(_observed(exercise, output))
        return outcomes


def _observed(exercise: Exercise, output: Any) -> Any:
    try:
        if exercise.observe is None or output is None or output is ...:
            return _plain(output)
        return _plain(exercise.observe(output))
    except Exception as error:  # an output of another kind, which `observe` or NumPy cannot read
        return _Failure(error)


@contextmanager
def _same_seed() -> Iterator[None]:
    """Run every answer from the same random state, and give the notebook its own back."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def _plain(value: Any) -> Any:
    """Bring tensors, arrays and numbers to arrays, and sequences of them to tuples, so that they compare."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype is torch.bfloat16 else value).numpy()  # NumPy has no bfloat16
    if isinstance(value, bool | int | float | complex | np.generic):
        return np.asarray(value)
    if isinstance(value, list | tuple):
        items = tuple(_plain(item) for item in value)
        if items and all(isinstance(item, np.ndarray) and item.ndim == 0 for item in items):
            return np.asarray(items)
        return items
    if isinstance(value, dict):
        return tuple((key, _plain(value[key])) for key in sorted(value, key=str))
    return value.strip() if isinstance(value, str) else value


def _all_same(given: list[Any], expected: list[Any], tolerance: float) -> bool:
    return len(given) == len(expected) and all(_same(a, b, tolerance) for a, b in zip(given, expected, strict=True))


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, _Failure) and isinstance(b, _Failure):
        return type(a.error) is type(b.error)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if a.shape != b.shape:
            return False
        try:
            return bool(np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True))
        except TypeError:  # arrays of text or objects
            return bool(np.array_equal(a, b))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return _all_same(list(a), list(b), tolerance)
    if isinstance(a, str) and isinstance(b, str):
        return a.casefold() == b.casefold()
    return type(a) is type(b) and bool(a == b)


def _explain(exercise: Exercise, given: list[Any], expected: list[Any]) -> str:
    """Say how the first wrong outcome differs, then the general hint."""
    for number, (a, b) in enumerate(zip(given, expected, strict=True), 1):
        if _same(a, b, exercise.tolerance):
            continue
        where = f" on case {number} of {len(given)}" if len(given) > 1 else ""
        if isinstance(a, _Failure):
            return f"Your answer stops{where} with {a.sentence.rstrip('.')}. {exercise.hint}"
        return f"{_difference(a, b, where, exercise.cases is not None)}{exercise.hint}"
    raise AssertionError("called for a correct answer")


def _difference(a: Any, b: Any, where: str, tell: bool) -> str:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if a.shape != b.shape:
            return f"Your answer has shape {_shape(a)}{where}, and shape {_shape(b)} is expected. "
        if tell and a.size and np.issubdtype(a.dtype, np.number) and np.issubdtype(b.dtype, np.number):
            if not np.isfinite(a).all():
                return f"Your answer holds values that are not finite{where}. "
            largest = np.abs(a.astype(complex) - b.astype(complex)).max()
            return f"Your answer is off by up to {largest:.3g}{where}. "
    elif isinstance(a, tuple) and isinstance(b, tuple):
        if len(a) != len(b):
            return f"Your answer has {len(a)} parts{where}, and {len(b)} are expected. "
    elif _kind(a) != _kind(b):
        return f"Your answer is {_kind(a)}{where}, and {_kind(b)} is expected. "
    return f"Not yet{where}. "


def _shape(array: np.ndarray) -> str:
    return "() (a single number)" if array.ndim == 0 else str(array.shape)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray | bool | int | float | np.generic):
        return "a number" if np.ndim(value) == 0 else "an array of numbers"
    if value is None or value is ...:
        return "nothing"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, tuple | list):
        return "a tuple"
    name = type(value).__name__
    return f"{'an' if re.match('[AEIOUaeiou]', name) else 'a'} {name}"
