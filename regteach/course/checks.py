"""What must be true of the course's notebooks as files. Each check returns its complaints, a sentence each.

`notebook_complaints` runs those that look at one notebook, `course_complaints` those that look across the course,
`executed_complaints` those that need outputs. tests/notebooks holds the course to them and each of them to a notebook
that is wrong on purpose.
"""

import ast
import html
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import nbformat

from regteach.course import symbols
from regteach.course.layout import Course, NotebookFile
from regteach.course.page import MATHEMATICS, mathematics
from regteach.lessons import LessonError, LessonText, load
from regteach.lessons.exercises import Exercise, load_exercises
from regteach.records import records

LONGEST_CELL, SHORTEST_ALT = 25, 20
PARAMETERS = {"FAST": True, "SEED": 0, "DEVICE": "auto"}
PYPLOT = ("plt", "pyplot")
DRAWS = {"figure", "subplots", "imshow", "plot", "scatter", "hist", "contour", "quiver", "axes", "image_row"}
_SHOWS_ITSELF = re.compile(r"\b(plt|pyplot)\.show\(|^\s*%matplotlib|\bOutput\(|\binteract", re.MULTILINE)
_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*\s*$", re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(<?([^)\s>]+)>?[^)]*\)")


@dataclass(frozen=True)
class Notebook:
    """A notebook to check, with its lesson's text.

    Args:
        path: where it lies; links are looked for beside it.
        course: the course it belongs to.
    """

    path: Path
    course: Course

    @cached_property
    def cells(self) -> list[Any]:
        """Its cells, as they are in the file: `nbformat.read` would give new ids in place of doubled ones."""
        return nbformat.v4.reads_json(self.path.read_text(encoding="utf-8"))["cells"]

    @property
    def markdown(self) -> list[Any]:
        """Its Markdown cells."""
        return [cell for cell in self.cells if cell["cell_type"] == "markdown"]

    @property
    def code(self) -> list[Any]:
        """Its code cells."""
        return [cell for cell in self.cells if cell["cell_type"] == "code"]

    @property
    def number(self) -> str:
        """Two digits."""
        return self.path.name[:2]

    @cached_property
    def text(self) -> LessonText:
        """Its lesson's text."""
        return load(self.number, self.course.lesson_texts)

    @cached_property
    def exercises(self) -> dict[str, Exercise]:
        """Its lesson's exercises by id."""
        return {exercise.id: exercise for exercise in load_exercises(self.number, self.course.lesson_texts)}

    def trees(self) -> Iterator[tuple[Any, ast.Module]]:
        """Its code cells that parse, with their syntax trees; lines of magic are left out."""
        for cell in self.code:
            source = re.sub(r"^\s*[%!].*$", "", cell["source"], flags=re.MULTILINE)
            try:
                yield cell, ast.parse(source)
            except SyntaxError:
                continue

    def calls(self, *names: str) -> Iterator[tuple[Any, ast.Call]]:
        """Its calls of functions or methods with one of these names."""
        for cell, tree in self.trees():
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and _called(node) in names:
                    yield cell, node


def no_outputs(notebook: Notebook) -> list[str]:
    """No outputs and no execution counts are kept."""
    kept = [cell for cell in notebook.code if cell["outputs"] or cell["execution_count"] is not None]
    return [f"cell {cell['id']} keeps an output or an execution count" for cell in kept]


def code_parses(notebook: Notebook) -> list[str]:
    """Every code cell is Python."""
    good = {cell["id"] for cell, _ in notebook.trees()}
    return [f"cell {cell['id']} is not Python" for cell in notebook.code if cell["id"] not in good]


def cell_ids(notebook: Notebook) -> list[str]:
    """Cell ids are unique, and words that a person chose."""
    ids, complaints = [cell.get("id", "") for cell in notebook.cells], []
    for id in ids:
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", id) or re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]+)?", id):
            complaints.append(f"the cell id {id!r} is not made of lower-case words joined by hyphens")
    complaints += [f"the cell id {id!r} is used twice" for id in sorted({id for id in ids if ids.count(id) > 1})]
    return complaints


def parameters(notebook: Notebook) -> list[str]:
    """One cell tagged `parameters` sets FAST, SEED and DEVICE to their defaults, and each is used."""
    tagged = [cell for cell in notebook.cells if "parameters" in cell["metadata"].get("tags", ())]
    if len(tagged) != 1:
        return [f"{len(tagged)} cells are tagged `parameters`; it must be one"]
    found, used = {}, set()
    for cell, tree in notebook.trees():
        if cell is tagged[0]:
            for node in tree.body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    value = node.value.value if isinstance(node.value, ast.Constant) else ...
                    found[node.targets[0].id] = value
        else:
            used |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    complaints = []
    if found != PARAMETERS:
        wanted = ", ".join(f"{name} = {value!r}" for name, value in PARAMETERS.items())
        complaints.append(f"the parameters cell must set {wanted} and nothing else")
    return complaints + [f"the parameter {name} is never used" for name in PARAMETERS if name not in used]


def starts_lesson(notebook: Notebook) -> list[str]:
    """`Lesson("NN", ...)` is made once, with the notebook's number and all parameters."""
    made = list(notebook.calls("Lesson"))
    if len(made) != 1:
        return [f"Lesson(...) is made {len(made)} times; it must be once"]
    call = made[0][1]
    complaints = []
    if not (call.args and isinstance(call.args[0], ast.Constant) and call.args[0].value == notebook.number):
        complaints.append(f'Lesson must be made with "{notebook.number}", the notebook\'s number')
    passed = {k.arg for k in call.keywords if isinstance(k.value, ast.Name) and k.arg == k.value.id}
    return complaints + [f"Lesson must get {name}={name}" for name in PARAMETERS if name not in passed]


def headings(notebook: Notebook) -> list[str]:
    """One heading of level 1, in the first cell, and no level jumped on the way down."""
    complaints, before, seen = [], 0, set()
    for cell, level, text in _headings(notebook.markdown):
        if before == 0 and (level != 1 or cell is not notebook.cells[0]):
            complaints.append("the first cell must begin with the heading of level 1")
        elif before and level == 1:
            complaints.append(f"there is a second heading of level 1: {text!r}")
        elif before and level > before + 1:
            complaints.append(f"the heading {text!r} jumps from level {before} to {level}")
        if text in seen:
            complaints.append(f"two headings say {text!r}, so that a link finds only one")
        seen.add(text)
        before = level
    return complaints if before else ["there is no heading"]


def cell_length(notebook: Notebook) -> list[str]:
    """Code cells are at most 25 lines long."""
    lengths = [(cell["id"], len(cell["source"].splitlines())) for cell in notebook.code]
    return [f"cell {id} has {n} lines; {LONGEST_CELL} is the most" for id, n in lengths if n > LONGEST_CELL]


def objectives(notebook: Notebook) -> list[str]:
    """Every objective is met by a claim or an exercise of the notebook, and no other is named."""
    met, known = set(), [objective.id for objective in notebook.text.objectives]
    for _, call in notebook.calls("claim", "parity"):
        met |= {k.value.value for k in call.keywords if k.arg == "objective" and isinstance(k.value, ast.Constant)}
    met |= {notebook.exercises[id].objective for id in _checked(notebook) if id in notebook.exercises}
    complaints = [f"objective {id} is met by no claim and no exercise" for id in known if id not in met]
    return complaints + [f"there is no objective {id}" for id in sorted(map(str, met - {*known, None}))]


def picture(notebook: Notebook) -> list[str]:
    """The cell that gives the lesson's picture on the site is there, and shows a figure."""
    chosen, shown = notebook.text.picture, {cell["id"] for cell, _ in notebook.calls("show", "film")}
    return [] if chosen in shown else [f"the lesson's picture is that of cell {chosen!r}, which shows no figure"]


def exercises(notebook: Notebook) -> list[str]:
    """Every exercise of the lesson is checked in the notebook, and no other."""
    checked = _checked(notebook)
    complaints = [f"exercise {id} is never checked" for id in notebook.exercises if id not in checked]
    return complaints + [f"there is no exercise {id}" for id in checked if id not in notebook.exercises]


def figures(notebook: Notebook) -> list[str]:
    """What is drawn is shown by `show` or `film`, with an alt text; pyplot shows nothing by itself."""
    complaints = []
    for cell in notebook.code:
        if _SHOWS_ITSELF.search(cell["source"]):
            complaints.append(f"cell {cell['id']} shows a figure or a widget without show(...) or film(...)")
    shown = [(cell, call) for cell, call in notebook.calls("show", "film") if _root(call.func) not in PYPLOT]
    shows = {cell["id"] for cell, _ in shown}
    defined = {cell["id"] for cell, tree in notebook.trees() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    for cell, call in notebook.calls(*DRAWS):
        if _root(call.func) in PYPLOT and cell["id"] not in shows | defined:
            complaints.append(f"cell {cell['id']} draws with pyplot and has no show(figure, alt=...)")
    for cell, call in shown:
        alts = [k.value for k in call.keywords if k.arg == "alt"] or (call.args[1:2] if _called(call) == "show" else [])
        if not alts:
            complaints.append(f"cell {cell['id']} shows a figure without alt text")
        elif isinstance(alts[0], ast.Constant) and len(str(alts[0].value)) < SHORTEST_ALT:
            complaints.append(f"cell {cell['id']} has an alt text shorter than {SHORTEST_ALT} characters")
    for cell in notebook.markdown:
        for mark, alt, target in _LINK.findall(_FENCE.sub("", cell["source"])):
            if mark and len(alt) < SHORTEST_ALT:
                complaints.append(f"the picture {target} has an alt text shorter than {SHORTEST_ALT} characters")
    return list(dict.fromkeys(complaints))


def links(notebook: Notebook) -> list[str]:
    """Every link inside the course leads somewhere."""
    return _dead_links(notebook.path, [cell["source"] for cell in notebook.markdown])


def formulas(notebook: Notebook) -> list[str]:
    """The site can show all mathematics; `aligned` and its kin are beyond it."""
    texts = [(cell["id"], cell["source"]) for cell in notebook.markdown]
    return [f"cell {id}: {trouble}" for id, text in texts for trouble in _formula_troubles(text)]


def companions(file: NotebookFile) -> list[str]:
    """A lesson has a text, an instructor's page without dead links, and a solution that does every exercise."""
    complaints = []
    try:
        load(file.number, file.course.lesson_texts)
    except LessonError as error:
        complaints.append(str(error))
    if not file.instructor.exists():
        complaints.append(f"the instructor's page {file.instructor.name} is missing")
    else:
        page = file.instructor.read_text(encoding="utf-8")
        complaints += [f"instructor's page: {words}" for words in _dead_links(file.instructor, [page])]
        complaints += [f"instructor's page: {words}" for words in _formula_troubles(page)]
        if not re.match(r"# \S", page):
            complaints.append("the instructor's page must begin with a heading of level 1")
    if not file.solution.exists():
        complaints.append(f"the solutions {file.solution.name} are missing")
    return complaints


ALL: tuple[Callable[[Notebook], list[str]], ...] = (
    no_outputs,
    code_parses,
    cell_ids,
    parameters,
    starts_lesson,
    headings,
    cell_length,
    exercises,
    figures,
    links,
    formulas,
)


def notebook_complaints(file: NotebookFile) -> list[str]:
    """All complaints about one notebook by itself; objectives are a lesson's matter, not its solutions'."""
    notebook = Notebook(file.path, file.course)
    checks = (*ALL, objectives, picture) if file.kind == "lesson" else ALL
    found = [complaint for check in checks for complaint in check(notebook)]
    return found + (companions(file) if file.kind == "lesson" else [])


def course_complaints(course: Course) -> list[str]:
    """All complaints that take more than one notebook to see."""
    trees = {file.name: [tree for _, tree in Notebook(file.path, course).trees()] for file in course.files()}
    lessons = {file.path.name for file in course.files()}
    strays = [file.name for file in course.files("solution") if file.path.name not in lessons]
    return symbols.complaints(course, trees) + [f"the solutions {name} belong to no lesson" for name in strays]


def executed_complaints(output: Path) -> list[str]:
    """Every image of an executed notebook says in words what it shows, and no two claims share an id."""
    notebook = nbformat.read(output, as_version=4)
    claims = [record["id"] for record in records(notebook) if record["kind"] == "claim"]
    complaints = [f"the claim {id} is made twice" for id in sorted({id for id in claims if claims.count(id) > 1})]
    for cell in notebook["cells"]:
        for result in cell.get("outputs", ()):
            data, metadata = result.get("data", {}), result.get("metadata", {})
            images = [mime for mime in data if mime.startswith("image/")]
            alts = [metadata.get(mime, {}).get("alt", metadata.get("alt", "")) for mime in images]
            for tag in re.findall(r"<img\b[^>]*>", data.get("text/html", "")):
                found = re.search(r'\balt="([^"]*)"', tag)
                alts.append(found[1] if found else "")
            complaints += [
                f"cell {cell['id']} shows an image whose alt text is shorter than {SHORTEST_ALT} characters: {alt!r}"
                for alt in alts
                if len(html.unescape(alt)) < SHORTEST_ALT
            ]
    return complaints


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _checked(notebook: Notebook) -> list[str]:
    """The ids given to `lesson.check`."""
    first = [call.args[0] for _, call in notebook.calls("check") if call.args]
    return [str(node.value) for node in first if isinstance(node, ast.Constant)]


def _headings(cells: list[Any]) -> Iterator[tuple[Any, int, str]]:
    for cell in cells:
        for marks, text in _HEADING.findall(_FENCE.sub("", cell["source"])):
            yield cell, len(marks), text


def _dead_links(path: Path, texts: list[str]) -> list[str]:
    complaints = []
    for text in texts:
        for _, _, target in _LINK.findall(_FENCE.sub("", text)):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            place = path.parent / unquote(name) if name else path
            if not place.exists():
                complaints.append(f"the link to {target} leads nowhere")
            elif anchor and unquote(anchor) not in _anchors(place):
                complaints.append(f"the link to {target} names a heading that is not there")
    return complaints


def _anchors(path: Path) -> set[str]:
    """Headings of a page as JupyterLab and nbconvert name them: spaces become hyphens."""
    if path.suffix == ".ipynb":
        cells = [cell for cell in nbformat.read(path, as_version=4)["cells"] if cell["cell_type"] == "markdown"]
    else:
        cells = [{"source": path.read_text(encoding="utf-8")}]
    return {re.sub(r"[`*]", "", text).replace(" ", "-") for _, _, text in _headings(cells)}


def _formula_troubles(text: str) -> list[str]:
    prose = re.sub(r"`[^`\n]+`", "", _FENCE.sub("", text))
    complaints = [f"{name} cannot be shown" for name in re.findall(r"\\begin\{(aligned|align\*?|cases|split)\}", prose)]
    for match in MATHEMATICS.finditer(prose):
        try:
            mathematics(match["block"] or match["inline"], block=match["block"] is not None)
        except ValueError as error:
            complaints.append(str(error))
    return complaints
