"""The texts of the lessons as data: `NN.toml` beside this file is read into frozen dataclasses.

Exercises live in `lesson_NN.py` (see `regteach.lessons.exercises`). Every error names the file and the place in
it, because the person who reads it is writing a lesson.
"""

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

FOLDER = Path(__file__).parent


class LessonError(ValueError):
    """A lesson's text or exercises break the schema; the message says where and how."""


@dataclass(frozen=True)
class Minutes:
    """How long a lesson takes a student, in minutes, with FAST=True and with FAST=False."""

    fast: float
    full: float


@dataclass(frozen=True)
class Objective:
    """What a student can do afterwards; a claim or an exercise must meet it."""

    id: str
    text: str


@dataclass(frozen=True)
class SelfCheck:
    """A question that shows a student whether the lesson before has stuck, and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Choice:
    """One choice of a quiz question, and why it is right or wrong."""

    text: str
    because: str
    correct: bool = False


@dataclass(frozen=True)
class Question:
    """A quiz question with exactly one correct choice."""

    id: str
    objective: str
    question: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class LessonText:
    """Everything that `NN.toml` says about a lesson; `picture` is the id of the cell whose figure stands for it."""

    id: str
    title: str
    summary: str
    minutes: Minutes
    prerequisites: tuple[str, ...]
    objectives: tuple[Objective, ...]
    self_check: tuple[SelfCheck, ...]
    quiz: tuple[Question, ...]
    next: str
    picture: str
    teaches: tuple[str, ...] = ()

    def objective(self, id: str) -> Objective:
        """Return the objective of that id.

        Raises:
            LessonError: the lesson has no such objective.
        """
        for objective in self.objectives:
            if objective.id == id:
                return objective
        raise LessonError(f"lesson {self.id} has no objective {id!r}; it has {_listed(o.id for o in self.objectives)}")


def available(folder: Path = FOLDER) -> list[str]:
    """List the ids of the lessons whose text is present, in order."""
    return sorted(path.stem for path in folder.glob("[0-9][0-9].toml"))


def load(id: str, folder: Path = FOLDER) -> LessonText:
    """Read and check the text of one lesson.

    Args:
        id: two digits, for example "01".
        folder: where `NN.toml` lies.

    Raises:
        LessonError: no such lesson, not TOML, or the text breaks the schema; the message names the place.
    """
    path = folder / f"{id}.toml"
    if not path.is_file():
        raise LessonError(f"there is no lesson {id!r}; the lessons present are {_listed(available(folder)) or 'none'}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise LessonError(f"{path.name} is not valid TOML: {error}") from error
    text = _lesson(table, path.name)
    if text.id != id:
        raise LessonError(f"{path.name}: id is {text.id!r} but the file's name says {id!r}")
    return text


def _lesson(table: Any, where: str) -> LessonText:
    row = _fields(LessonText, table, where)
    minutes = Minutes(**_fields(Minutes, row["minutes"], f"{where}: minutes"))
    for name, value in (("fast", minutes.fast), ("full", minutes.full)):
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise LessonError(f"{where}: minutes.{name} must be a number above 0, not {value!r}")
    if minutes.full < minutes.fast:
        raise LessonError(f"{where}: minutes.full ({minutes.full}) is less than minutes.fast ({minutes.fast})")
    objectives = _rows(row, "objectives", where, lambda item, at: Objective(**_texts(Objective, item, at)))
    _check_ids((o.id for o in objectives), "o", f"{where}: objectives")
    self_check = _rows(row, "self_check", where, lambda item, at: SelfCheck(**_texts(SelfCheck, item, at)))
    quiz = _rows(row, "quiz", where, _question)
    _check_ids((q.id for q in quiz), "q", f"{where}: quiz")
    known = {o.id for o in objectives}
    for question in quiz:
        if question.objective not in known:
            raise LessonError(
                f"{where}: quiz {question.id} names objective {question.objective!r}; "
                f"the objectives are {_listed(known)}"
            )
    return LessonText(
        **{name: _text(row[name], f"{where}: {name}") for name in ("id", "title", "summary", "next", "picture")},
        minutes=minutes,
        prerequisites=_strings(row["prerequisites"], f"{where}: prerequisites"),
        objectives=objectives,
        self_check=self_check,
        quiz=quiz,
        teaches=_strings(row.get("teaches", []), f"{where}: teaches"),
    )


def _question(item: Any, where: str) -> Question:
    row = _fields(Question, item, where)
    choices = _rows(row, "choices", where, _choice)
    correct = sum(choice.correct for choice in choices)
    if len(choices) < 2 or correct != 1:
        raise LessonError(
            f"{where}: a question needs at least two choices and exactly one correct one; "
            f"this has {len(choices)} choices, {correct} of them correct"
        )
    texts = {name: _text(row[name], f"{where}: {name}") for name in ("id", "objective", "question")}
    return Question(**texts, choices=choices)


def _choice(item: Any, where: str) -> Choice:
    row = _fields(Choice, item, where)
    correct = row.get("correct", False)
    if not isinstance(correct, bool):
        raise LessonError(f"{where}: correct must be true or false, not {correct!r}")
    return Choice(_text(row["text"], f"{where}: text"), _text(row["because"], f"{where}: because"), correct)


def _fields(kind: Any, item: Any, where: str) -> dict[str, Any]:
    """Check a table's keys against a dataclass: none missing, none unknown."""
    if not isinstance(item, dict):
        raise LessonError(f"{where} must be a table, not {item!r}")
    names = [field.name for field in fields(kind)]
    for key in item:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the keys are {_listed(names)}"
            raise LessonError(f"{where}: unknown key {key!r}{hint}")
    for field in fields(kind):
        if field.default is MISSING and field.name not in item:
            raise LessonError(f"{where}: {field.name!r} is missing")
    return item


def _texts(kind: Any, item: Any, where: str) -> dict[str, str]:
    return {name: _text(value, f"{where}: {name}") for name, value in _fields(kind, item, where).items()}


def _rows(row: dict[str, Any], name: str, where: str, read: Callable[[Any, str], T]) -> tuple[T, ...]:
    items = row[name]
    if not isinstance(items, list) or not items:
        raise LessonError(f"{where}: {name!r} must be a list of one table or more, not {items!r}")
    return tuple(read(item, f"{where}: {name} {i}") for i, item in enumerate(items, 1))


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise LessonError(f"{where} must be a text that is not empty, not {value!r}")
    return value.strip()


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise LessonError(f"{where} must be a list of texts, not {value!r}")
    return tuple(_text(item, where) for item in value)


def _check_ids(ids: Iterable[str], letter: str, where: str) -> None:
    seen: set[str] = set()
    for id in ids:
        if not re.fullmatch(rf"{letter}[1-9]\d*", id):
            raise LessonError(f"{where}: the id {id!r} must be {letter!r} and a number, such as {letter + '1'!r}")
        if id in seen:
            raise LessonError(f"{where}: the id {id!r} is used twice")
        seen.add(id)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
