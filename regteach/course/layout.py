"""Where the course lies: its notebooks, its texts, and what is built from them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from regteach.bootstrap import ROOT

Kind = Literal["lesson", "solution"]


@dataclass(frozen=True)
class Course:
    """The folders of a course.

    Args:
        root: the repository.
        texts: where NN.toml and lesson_NN.py lie; `regteach/lessons` of the repository by default.
    """

    root: Path = ROOT
    texts: Path | None = None

    @property
    def notebooks(self) -> Path:
        """The lessons as their authors write them, without outputs."""
        return self.root / "notebooks"

    @property
    def build(self) -> Path:
        """Everything made, ignored by git."""
        return self.root / "build"

    @property
    def lesson_texts(self) -> Path:
        """NN.toml and lesson_NN.py."""
        return self.texts or self.root / "regteach" / "lessons"

    def files(self, kind: Kind = "lesson", only: tuple[str, ...] = ()) -> list["NotebookFile"]:
        """The notebooks of one kind, in order.

        Args:
            kind: "lesson" or "solution".
            only: the two-digit numbers wanted; all when empty.

        Raises:
            ValueError: there is no such lesson.
        """
        folder = self.notebooks if kind == "lesson" else self.notebooks / "solutions"
        found = [NotebookFile(self, path, kind) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))]
        numbers = [file.number for file in found]
        only = tuple(number.zfill(2) for number in only)
        for number in only:
            if number not in numbers:
                raise ValueError(f"there is no {kind} {number!r}; there are {', '.join(numbers) or 'none'}")
        return [file for file in found if not only or file.number in only]


@dataclass(frozen=True)
class NotebookFile:
    """One notebook of the course and what belongs to it."""

    course: Course
    path: Path
    kind: Kind

    @property
    def number(self) -> str:
        """Two digits."""
        return self.path.name[:2]

    @property
    def name(self) -> str:
        """The file's name without its ending: `01_digits`."""
        return self.path.stem

    @property
    def output(self) -> Path:
        """Where the executed copy goes; its record lies beside it, ending in .json."""
        folder = "notebooks" if self.kind == "lesson" else "solutions"
        return self.course.build / folder / self.path.name

    @property
    def instructor(self) -> Path:
        """The teacher's page."""
        return self.course.notebooks / "instructor" / f"{self.name}.md"

    @property
    def solution(self) -> Path:
        """The notebook with the exercises done."""
        return self.course.notebooks / "solutions" / self.path.name

    @property
    def title(self) -> str:
        """For tables: `01` or `01 solutions`."""
        return self.number if self.kind == "lesson" else f"{self.number} solutions"


@dataclass(frozen=True)
class Outcome:
    """The record of an executed notebook, as it is written beside the executed copy."""

    data: dict[str, Any]

    @classmethod
    def read(cls, output: Path) -> "Outcome | None":
        """The record beside an executed notebook, or None where there is none."""
        path = output.with_suffix(".json")
        return cls(json.loads(path.read_text(encoding="utf-8"))) if path.exists() and output.exists() else None

    def _of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.data["records"] if record["kind"] == kind]

    @cached_property
    def claims(self) -> list[dict[str, Any]]:
        """The claims, in order."""
        return self._of("claim")

    @cached_property
    def held(self) -> int:
        """How many claims held."""
        return sum(bool(claim["held"]) for claim in self.claims)

    @cached_property
    def exercises(self) -> list[dict[str, Any]]:
        """The last word on each exercise: a notebook may check one twice."""
        return list({record["id"]: record for record in self._of("exercise")}.values())

    @property
    def to_do(self) -> int:
        """How many exercises are not attempted."""
        return sum(exercise["status"] == "todo" for exercise in self.exercises)

    @property
    def seconds(self) -> float:
        """How long the notebook ran, the kernel's start included."""
        return self.data["seconds"]

    @property
    def peak_memory_mb(self) -> float:
        """The most memory that the kernel and its children held at one time, in MB (1e6 bytes) of resident pages."""
        return self.data["peak_memory_mb"]

    def troubles(self) -> Iterator[str]:
        """Why this notebook does not count as passed, a sentence each."""
        failure = self.data["failure"]
        if failure:
            yield f"cell {failure['cell']} failed: {failure['what']}"
        yield from self.data["problems"]
        for claim in self.claims:
            if not claim["held"]:
                ends = (("at least", claim["low"]), ("at most", claim["high"]))
                band = " and ".join(f"{word} {end}" for word, end in ends if end is not None)
                yield (
                    f"claim {claim['id']} fell: {claim['says']} is {claim['value']} {claim['unit']},"
                    f" not {band}. {claim['why']}"
                )
        for exercise in self.exercises if self.data["kind"] == "solution" else ():
            if exercise["status"] != "correct":
                yield f"exercise {exercise['id']} is {exercise['status']}: {exercise['message']}"
        if self.data["kind"] == "solution" and not failure:
            checked = {exercise["id"] for exercise in self.exercises}
            for lesson in self._of("lesson"):
                for id in lesson["exercises"]:
                    if id not in checked:
                        yield f"exercise {id} is never checked"
