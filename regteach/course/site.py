"""The course as a web site that opens from disk: an index, a page a lesson, the teacher's pages, the downloads.

`build/site` is made anew beside the old one and takes its place when it is whole. Everything a page needs is in the
page: style, pictures, mathematics.
"""

import base64
import html
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import nbformat

from regteach.course.layout import Course, NotebookFile, Outcome
from regteach.course.page import Page, ready
from regteach.lessons import LessonText, load, render
from regteach.records import figures

CSS = (Path(__file__).parent / "site.css").read_text(encoding="utf-8")
TITLE = "Image registration, built step by step"
LEAD = (
    "A course on deep-learning image registration for JupyterLab. Each lesson builds one idea in a few lines, proves "
    "that the package gives the same numbers, and then uses it on real images. Every number that a lesson claims was "
    "computed in the run shown here, held to a band, and compared with a control that must fail."
)
FOOT = "For research and teaching, not for clinical use."


@dataclass(frozen=True)
class Lesson:
    """A lesson as the site shows it: its text, and what its last run gave."""

    file: NotebookFile

    @cached_property
    def text(self) -> LessonText:
        """Title, minutes, objectives."""
        return load(self.file.number, self.file.course.lesson_texts)

    @cached_property
    def outcome(self) -> Outcome | None:
        """What the last run gave, or None where the lesson was not executed."""
        return Outcome.read(self.file.output)

    @cached_property
    def executed(self) -> Any:
        """The executed notebook."""
        return nbformat.read(self.file.output, as_version=4)

    @property
    def address(self) -> str:
        """The lesson's page."""
        return f"{self.file.name}.html"

    @property
    def teacher_address(self) -> str:
        """The instructor's page."""
        return f"{self.file.name}-instructor.html"


def build(course: Course) -> Path:
    """Build the site from what was executed.

    Args:
        course: lessons that were never executed stand in the index without a page.

    Returns:
        The path of index.html.
    """
    site, fresh, old = (course.build / name for name in ("site", "site.new", "site.old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    lessons = [Lesson(file) for file in course.files()]
    for number, lesson in enumerate(lessons):
        _copy_downloads(lesson.file, fresh / "downloads")
        if lesson.outcome is not None:
            around = lessons[number - 1] if number else None, lessons[number + 1] if number + 1 < len(lessons) else None
            _write(fresh / lesson.address, lesson_page(lesson, *around))
        if lesson.file.instructor.exists():
            _write(fresh / lesson.teacher_address, teacher_page(lesson))
    _write(fresh / "index.html", index_page(lessons))
    if site.exists():
        os.replace(site, old)
    os.replace(fresh, site)
    shutil.rmtree(old, ignore_errors=True)
    return site / "index.html"


def index_page(lessons: list[Lesson]) -> str:
    """The front page: a card a lesson."""
    cards = "\n".join(_card(lesson) for lesson in lessons)
    ran = [lesson.outcome for lesson in lessons if lesson.outcome]
    made, held = sum(len(outcome.claims) for outcome in ran), sum(outcome.held for outcome in ran)
    total = f"{len(ran)} of {len(lessons)} lessons were executed; {held} of {made} claims held."
    body = f'<h1>{TITLE}</h1>\n<p class="lead">{LEAD}</p>\n<p>{total}</p>\n<ol class="cards">\n{cards}\n</ol>'
    return shell(TITLE, body, body_class="index")


def _card(lesson: Lesson) -> str:
    text, outcome = lesson.text, lesson.outcome
    title = f"{text.id} {_words(text.title)}"
    picture = ""
    if outcome is not None:
        title = f'<a href="{lesson.address}">{title}</a>'
        chosen = [figure for figure in figures(lesson.executed) if figure.cell == text.picture]
        if chosen:
            picture = _image(chosen[0].png, chosen[0].alt)
    objectives = "".join(f"<li>{_words(o.text)}{_met(o.id, outcome)}</li>" for o in text.objectives)
    links = f'<a href="{lesson.teacher_address}">Instructor’s page</a>' if lesson.file.instructor.exists() else ""
    return (
        f'<li class="card"><h2>{title}</h2><p>{_words(text.summary)}</p>{picture}{_facts(lesson)}'
        f'<details open><summary>Objectives</summary><ul class="objectives">{objectives}</ul></details>'
        f'<p class="links">{links}</p></li>'
    )


def _met(objective: str, outcome: Outcome | None) -> str:
    """How an objective was met in this run, in words."""
    if outcome is None:
        return ""
    claims = [claim for claim in outcome.claims if claim["objective"] == objective]
    exercises = [exercise for exercise in outcome.exercises if exercise["objective"] == objective]
    words = []
    if claims:
        words.append(f"{sum(claim['held'] for claim in claims)} of {_count(len(claims), 'claim')} held")
    if exercises:
        words.append(_count(len(exercises), "exercise"))
    return f' <span class="met">({", ".join(words)})</span>' if words else ""


def _facts(lesson: Lesson) -> str:
    minutes, outcome = lesson.text.minutes, lesson.outcome
    facts = [("Study time", f"{minutes.fast:g} min; full length {minutes.full:g} min")]
    if outcome is None:
        facts.append(("Run", "not executed yet"))
    else:
        troubles = list(outcome.troubles())
        facts += [
            ("Claims held", f"{outcome.held} of {len(outcome.claims)}"),
            ("Exercises", str(len(outcome.exercises))),
            ("Run", f"{outcome.seconds:.0f} s, {outcome.peak_memory_mb:.0f} MB" + ("; FAILED" if troubles else "")),
        ]
    return '<dl class="facts">' + "".join(f"<div><dt>{a}</dt><dd>{b}</dd></div>" for a, b in facts) + "</dl>"


def lesson_page(lesson: Lesson, before: Lesson | None, after: Lesson | None) -> str:
    """A lesson as it was executed, with the claims it made and links to the cells that made them."""
    outcome = lesson.outcome
    assert outcome is not None
    cells = lesson.executed["cells"]
    page = Page(lesson.file.path.parent, _links(lesson.file.course, lesson.file.path.parent))
    page.add_cells(cells[:1])
    page.parts += [_summary(lesson, outcome), "the contents"]
    place = len(page.parts) - 1
    page.add_cells(cells[1:])
    contents = "".join(f'<li><a href="#{html.escape(id)}">{html.escape(text)}</a></li>' for id, text in page.headings)
    page.parts[place] = f'<nav class="contents" aria-label="On this page"><p>On this page</p><ul>{contents}</ul></nav>'
    steps = []
    for other, word in ((before, "Before"), (after, "Next")):
        if other is not None and other.outcome is not None:
            steps.append(f'<a href="{other.address}">{word}: {other.text.id} {_words(other.text.title)}</a>')
    turn = f'<nav class="turn" aria-label="Neighbouring lessons">{" ".join(steps)}</nav>'
    article = f"<article>{''.join(page.parts)}{turn}</article>"
    return shell(f"{lesson.text.id} {lesson.text.title}", article, body_class="lesson")


def _summary(lesson: Lesson, outcome: Outcome) -> str:
    parameters = ", ".join(f"{name} = {value!r}" for name, value in outcome.data["parameters"].items())
    downloads = [f'<a href="downloads/{lesson.file.path.name}" download>notebook</a>']
    downloads.append(f'<a href="downloads/executed/{lesson.file.path.name}" download>executed notebook</a>')
    if lesson.file.instructor.exists():
        downloads.append(f'<a href="{lesson.teacher_address}">instructor’s page</a>')
    rows = "".join(_claim_row(claim) for claim in outcome.claims)
    head = "<thead><tr><th>Claim</th><th>Value</th><th>Band</th><th>Control</th><th>State</th></tr></thead>"
    table = f'<div class="scroll" tabindex="0"><table>{head}<tbody>{rows}</tbody></table></div>' if rows else ""
    troubles = "".join(f"<li>{html.escape(trouble)}</li>" for trouble in outcome.troubles())
    alarm = f'<div class="alarm" role="alert"><p>This run failed.</p><ul>{troubles}</ul></div>' if troubles else ""
    word = f"{outcome.held} of {_count(len(outcome.claims), 'claim')} held"
    return (
        f'<section class="summary" aria-label="About this run">{alarm}{_facts(lesson)}'
        f"<details><summary>{word}: see each, with its control</summary>{table}</details>"
        f'<p class="links">Run with <code>{html.escape(parameters)}</code>. '
        f"Download: {' · '.join(downloads)}</p></section>"
    )


def _claim_row(claim: dict[str, Any]) -> str:
    value, low, high = (None if claim[k] is None else float(claim[k]) for k in ("value", "low", "high"))
    assert value is not None
    written, band = render.numbers(value, low, high)
    control = claim["control"]
    compared, _ = render.numbers(float(control["value"]), low, high)
    unit = f"\N{NO-BREAK SPACE}{html.escape(claim['unit'])}" if claim["unit"] else ""
    state = "held" if claim["held"] else "<strong>fell</strong>"
    says = f'<a href="#cell-{html.escape(claim["cell"] or "")}">{_words(claim["says"])}</a>'
    shown, band, compared = (f'<span class="number">{text}{unit}</span>' for text in (written, band, compared))
    cells = [says, shown, band, f"{_words(control['name'])}: {compared}", state]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def teacher_page(lesson: Lesson) -> str:
    """The instructor's page of a lesson."""
    path = lesson.file.instructor
    page = Page(path.parent, _links(lesson.file.course, path.parent))
    page.add_markdown(path.read_text(encoding="utf-8"))
    links = [f'<a href="{lesson.address}">The lesson</a>'] if lesson.outcome else []
    if lesson.file.solution.exists():
        links.append(f'<a href="downloads/solutions/{lesson.file.path.name}" download>Solutions (notebook)</a>')
    body = f'<article><p class="links">{" · ".join(links)}</p>{"".join(page.parts)}</article>'
    return shell(f"Instructor’s page: {lesson.text.id} {lesson.text.title}", body, body_class="teacher")


def shell(title: str, body: str, body_class: str) -> str:
    """A whole page around a body."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{CSS}</style>
</head>
<body class="{body_class}">
<a class="skip" href="#main">Skip to the content</a>
<header><nav aria-label="Site"><a href="index.html">regteach</a></nav></header>
<main id="main">
{body}
</main>
<footer><p>{FOOT}</p></footer>
</body>
</html>
"""


def _links(course: Course, folder: Path) -> Any:
    """How a relative link between the course's files is called on the site."""
    pages: dict[Path, str] = {}
    for file in course.files():
        lesson = Lesson(file)
        pages[file.path.resolve()] = lesson.address
        pages[file.instructor.resolve()] = lesson.teacher_address
        pages[file.solution.resolve()] = f"downloads/solutions/{file.path.name}"

    def link(target: str) -> str:
        path, _, fragment = target.partition("#")
        address = pages.get((folder / unquote(path)).resolve())
        if address is None:
            raise ValueError(f"a link leads to {target}, which the site does not have")
        return address + (f"#{fragment}" if fragment else "")

    return link


def _copy_downloads(file: NotebookFile, folder: Path) -> None:
    for source, place in ((file.path, ""), (file.output, "executed"), (file.solution, "solutions")):
        if source.exists():
            (folder / place).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / place / source.name)


def _words(text: str) -> str:
    """A lesson's text as HTML, mathematics included."""
    return ready(render.inline(text))


def _image(png: bytes, alt: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
