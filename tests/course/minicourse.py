"""A course of one or two tiny lessons in a temporary folder, good or broken on purpose."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import nbformat

from regteach.course.layout import Course

Cell = tuple[str, str] | tuple[str, str, list[str]]  # id, source, tags; an id that starts with "text-" is Markdown

TEXT = """
id = "{id}"
title = "A tiny lesson"
summary = "It squares a number."
next = "Nothing."
picture = "figure-line"
prerequisites = []
teaches = []

[minutes]
fast = 1
full = 2

[[objectives]]
id = "o1"
text = "square $x$"

[[objectives]]
id = "o2"
text = "double"

[[self_check]]
question = "What is $2^2$?"
answer = "4"

[[quiz]]
id = "q1"
objective = "o1"
question = "Is 4 a square?"
choices = [
  {{ text = "yes", because = "2 times 2.", correct = true }},
  {{ text = "no", because = "Look again." }},
]
"""

EXERCISES = """
from regteach.lessons.exercises import Exercise, Mistake

EXERCISES = [
    Exercise(
        id="e1",
        title="double it",
        objective="o2",
        reference=lambda x: 2 * x,
        hint="Add it to itself.",
        cases=lambda: [(1.0,), (3.0,)],
        mistakes=[Mistake("squared", lambda x: x * x, "That is the square.")],
    )
]
"""

PARAMETERS: Cell = ("parameters", 'FAST = True\nSEED = 0\nDEVICE = "auto"', ["parameters"])
EXERCISE: Cell = ("exercise-double", 'def double(x):\n    ...\n\n\nlesson.check("e1", double)')
SOLVED: Cell = ("exercise-double", 'def double(x):\n    return x + x\n\n\nlesson.check("e1", double)')
CLAIM: Cell = (
    "claim-square",
    'lesson.claim("c1", 4.0, low=3.9, high=4.1, says="Two squared", control=("two", 2.0), objective="o1")',
)
FIGURE: Cell = (
    "figure-line",
    """
from regteach.plotting import axes, show

figure, panels = axes(1, 1)
panels[0].plot([0, 1], [0, 1 if FAST else 2])
show(figure, alt="A line that rises from the lower left to the upper right.")
""",
)
FILM: Cell = (
    "film-line",
    """
from regteach.widgets import film

film(lambda ax, x: ax.plot([0, x]), [1, 2, 3], label="height, mm", alt="A line that grows with the slider.", strip=2)
""",
)
MATHS: Cell = (
    "text-mathematics",
    "## The square\n\nThe square of $x$ is\n\n$$x^2 = x \\cdot x, \\qquad x < \\infty$$\n\nand `$x` is code.",
)


def start(folder: Path, id: str) -> Cell:
    """The cell that makes the Lesson, which reads its text from a folder of the test."""
    return (
        "start",
        f"""
from pathlib import Path

from regteach.lesson import Lesson

Lesson.folder = Path({str(folder)!r})
lesson = Lesson("{id}", FAST=FAST, SEED=SEED, DEVICE=DEVICE)
""",
    )


LIGHT: Cell = (
    "start",
    """
from regteach.records import publish

def record(kind, id, **facts):
    publish(f"<p>{kind} {id}</p>", f"{kind} {id}", {"kind": kind, "id": id, **facts})

def claim(id, value, high, held=True, why=""):
    band = {"low": None, "high": high, "unit": "mm", "control": {"name": "none", "value": 99.0}}
    record("claim", id, says="It", objective="o1", value=value, held=held, why=why, **band)

def exercise(status, message):
    record("exercise", "e1", title="double it", objective="o2", status=status, mistake=None, message=message)

record("lesson", "90", parameters={"FAST": FAST, "SEED": SEED, "DEVICE": DEVICE}, exercises=["e1"])
""",
)
LIGHT_CLAIM: Cell = ("claim-light", 'claim("c1", 1.0, high=2.0)')


def make_light_course(root: Path, *extra: Cell, parameters: Cell | None = PARAMETERS) -> Course:
    """Write a course whose notebooks record what a Lesson would, without torch: for tests of what runs them."""
    course = make_course(root)
    head = [("text-title", "# A tiny lesson"), *([parameters] if parameters else []), LIGHT, LIGHT_CLAIM]
    lesson = [*head, ("exercise-light", 'exercise("todo", "To do.")'), *extra]
    write_notebook(course.notebooks / "90_tiny.ipynb", lesson)
    solution = [*head, ("exercise-light", 'exercise("correct", "Correct.")')]
    write_notebook(course.notebooks / "solutions" / "90_tiny.ipynb", solution)
    return course


def write_notebook(path: Path, cells: Sequence[Cell]) -> Path:
    """Write a notebook without outputs."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for id, source, *tags in cells:
        new = nbformat.v4.new_markdown_cell if id.startswith("text-") else nbformat.v4.new_code_cell
        cell = new(textwrap.dedent(source).strip(), id=id)
        if tags:
            cell.metadata["tags"] = tags[0]
        notebook.cells.append(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def make_course(root: Path, *extra: Cell, id: str = "90", parameters: Cell | None = PARAMETERS) -> Course:
    """Write a course with one lesson: title, parameters, Lesson, a claim, an exercise, and the extra cells."""
    course = Course(root)
    course.lesson_texts.mkdir(parents=True, exist_ok=True)
    (course.lesson_texts / f"{id}.toml").write_text(TEXT.format(id=id), encoding="utf-8")
    (course.lesson_texts / f"lesson_{id}.py").write_text(EXERCISES, encoding="utf-8")
    cells = [
        ("text-title", "# A tiny lesson"),
        *([parameters] if parameters else []),
        start(course.lesson_texts, id),
        CLAIM,
    ]
    write_notebook(course.notebooks / f"{id}_tiny.ipynb", [*cells, EXERCISE, *extra])
    write_notebook(course.notebooks / "solutions" / f"{id}_tiny.ipynb", [*cells[:-1], SOLVED])
    page = course.notebooks / "instructor" / f"{id}_tiny.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"# For the teacher\n\nOne minute. See [the lesson](../{id}_tiny.ipynb).\n", encoding="utf-8")
    return course
