"""Each static check finds what was planted for it, and finds nothing in a good lesson."""

import json

import nbformat
import pytest
from course.minicourse import (
    CLAIM,
    EXERCISE,
    FIGURE,
    FILM,
    MATHS,
    PARAMETERS,
    SOLVED,
    make_course,
    start,
    write_notebook,
)

from regteach.course import checks


@pytest.fixture
def course(tmp_path):
    return make_course(tmp_path, MATHS, FIGURE, FILM)


def rewritten(course, change):
    """The lesson's notebook after `change` had its JSON."""
    (file,) = course.files()
    notebook = json.loads(file.path.read_text())
    change(notebook["cells"])
    file.path.write_text(json.dumps(notebook))
    return checks.Notebook(file.path, course)


def with_cells(course, *cells):
    """The lesson's notebook with cells of our choice after title, parameters and Lesson."""
    (file,) = course.files()
    head = [("text-title", "# A tiny lesson"), PARAMETERS, start(course.lesson_texts, "90")]
    return checks.Notebook(write_notebook(file.path, [*head, *cells]), course)


def test_a_good_lesson_and_its_solutions_have_no_complaints(course):
    for kind in ("lesson", "solution"):
        (file,) = course.files(kind)
        assert checks.notebook_complaints(file) == []
    assert checks.course_complaints(course) == []


def test_outputs(course):
    def change(cells):
        cells[1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "kept"}]
        cells[2]["execution_count"] = 3

    complaints = checks.no_outputs(rewritten(course, change))
    assert complaints == [f"cell {id} keeps an output or an execution count" for id in ("parameters", "start")]


@pytest.mark.parametrize("id", ["1f3a5b7c", "b1946ac9-2492-4d23", "Two Words", "under_score", "deadbeef", "-x"])
def test_cell_ids_that_nobody_chose(course, id):
    (complaint,) = checks.cell_ids(rewritten(course, lambda cells: cells[1].update(id=id)))
    assert complaint.startswith(f"the cell id {id!r} is not made of lower-case words")


def test_cell_ids_used_twice(course):
    assert checks.cell_ids(rewritten(course, lambda cells: cells[2].update(id="parameters"))) == [
        "the cell id 'parameters' is used twice"
    ]


def test_a_parameters_cell_without_its_tag(course):
    untagged = rewritten(course, lambda cells: cells[1]["metadata"].clear())
    assert checks.parameters(untagged) == ["0 cells are tagged `parameters`; it must be one"]


@pytest.mark.parametrize("text", ['FAST = True\nSEED = 1\nDEVICE = "auto"', "FAST = True", "FAST, SEED = True, 0"])
def test_parameters_that_are_not_the_three(course, text):
    notebook = rewritten(course, lambda cells: cells[1].update(source=text))
    complaint = "the parameters cell must set FAST = True, SEED = 0, DEVICE = 'auto' and nothing else"
    assert complaint in checks.parameters(notebook)


def test_parameters_that_are_never_used(course):
    source = 'from regteach.lesson import Lesson\nlesson = Lesson("90", FAST=FAST, SEED=3, DEVICE="auto")'
    (file,) = course.files()
    write_notebook(file.path, [("text-title", "# A"), PARAMETERS, ("start", source)])
    notebook = checks.Notebook(file.path, course)
    assert checks.parameters(notebook) == ["the parameter SEED is never used", "the parameter DEVICE is never used"]
    assert checks.starts_lesson(notebook) == ["Lesson must get SEED=SEED", "Lesson must get DEVICE=DEVICE"]


def test_a_lesson_made_with_another_number_or_not_at_all(course):
    other = rewritten(course, lambda cells: cells[2].update(source=cells[2]["source"].replace('"90"', '"91"')))
    assert checks.starts_lesson(other) == ['Lesson must be made with "90", the notebook\'s number']
    assert checks.starts_lesson(rewritten(course, lambda cells: cells.pop(2))) == [
        "Lesson(...) is made 0 times; it must be once"
    ]


def test_headings(course):
    jump = ("text-jump", "## Two\n\n```\n# a comment in code\n```\n\n#### Four")
    second = ("text-second", "# Another\n\n## Two")
    assert checks.headings(with_cells(course, jump, second)) == [
        "the heading 'Four' jumps from level 2 to 4",
        "there is a second heading of level 1: 'Another'",
        "two headings say 'Two', so that a link finds only one",
    ]
    late = rewritten(course, lambda cells: cells.insert(0, cells.pop(1)))
    assert checks.headings(late)[0] == "the first cell must begin with the heading of level 1"


def test_long_cells_and_cells_that_are_not_python(course):
    notebook = with_cells(course, ("long", "\n".join(["x = 1"] * 26)), ("magic", "%timeit 1\n!ls"), ("bad", "def"))
    assert checks.cell_length(notebook) == ["cell long has 26 lines; 25 is the most"]
    assert checks.code_parses(notebook) == ["cell bad is not Python"]


def test_objectives(course):
    assert checks.objectives(with_cells(course, EXERCISE)) == ["objective o1 is met by no claim and no exercise"]
    assert checks.objectives(with_cells(course, CLAIM)) == ["objective o2 is met by no claim and no exercise"]
    unknown = ("more", 'lesson.parity("a", 1, 1, objective="o7")')
    assert checks.objectives(with_cells(course, CLAIM, EXERCISE, unknown)) == ["there is no objective o7"]


def test_exercises(course):
    assert checks.exercises(with_cells(course, CLAIM)) == ["exercise e1 is never checked"]
    unknown = ("more", 'lesson.check("e9", 3)')
    assert checks.exercises(with_cells(course, SOLVED, unknown)) == ["there is no exercise e9"]


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("plt.show()", "cell planted shows a figure or a widget without show(...) or film(...)"),
        ("%matplotlib inline", "cell planted shows a figure or a widget without show(...) or film(...)"),
        ("interact(f, x=3)", "cell planted shows a figure or a widget without show(...) or film(...)"),
        ("plt.imshow(a)", "cell planted draws with pyplot and has no show(figure, alt=...)"),
        ("fig, ax = plt.subplots()\nax.plot(a)", "cell planted draws with pyplot and has no show(figure, alt=...)"),
        ("show(fig)", "cell planted shows a figure without alt text"),
        ("film(draw, [1, 2], label='x')", "cell planted shows a figure without alt text"),
        ("show(fig, alt='A figure.')", "cell planted has an alt text shorter than 20 characters"),
    ],
)
def test_figures(course, source, complaint):
    assert checks.figures(with_cells(course, ("planted", source))) == [complaint]


def test_figures_that_are_shown_well(course):
    good = "fig, ax = plt.subplots()\nshow(fig, alt=f'The error falls from {a} to {b}.')"
    function = "def draw(ax, x):\n    plt.imshow(x)"
    assert checks.figures(with_cells(course, ("good", good), ("function", function))) == []
    (complaint,) = checks.figures(with_cells(course, ("text-picture", "![short](a.png)")))
    assert complaint == "the picture a.png has an alt text shorter than 20 characters"


def test_links(course):
    text = "[a](91_no.ipynb) [b](90_tiny.ipynb#Two-words) [c](#Nothing) [d](https://x.invalid) `[e](f)`\n\n## Two words"
    assert checks.links(with_cells(course, ("text-links", text.replace("`[e](f)`", "")))) == [
        "the link to 91_no.ipynb leads nowhere",
        "the link to #Nothing names a heading that is not there",
    ]


def test_formulas(course):
    text = "$$\\begin{aligned} a &= b \\end{aligned}$$ and $\\unheardof{x}$, but `$\\code$` is code."
    complaints = checks.formulas(with_cells(course, ("text-formulas", text)))
    assert complaints[0] == "cell text-formulas: aligned cannot be shown"
    assert complaints[-1] == "cell text-formulas: \\unheardof is unknown to latex2mathml: \\unheardof{x}"
    assert not any("code" in complaint.split(":", 1)[1] for complaint in complaints)


def test_companions(course):
    (file,) = course.files()
    file.instructor.write_text("No heading. [gone](nowhere.md)")
    file.solution.unlink()
    (course.lesson_texts / "90.toml").write_text("id = 3")
    complaints = checks.companions(file)
    assert complaints[0].startswith("90.toml: ")
    assert complaints[1:] == [
        "instructor's page: the link to nowhere.md leads nowhere",
        "the instructor's page must begin with a heading of level 1",
        "the solutions 90_tiny.ipynb are missing",
    ]
    file.instructor.unlink()
    assert "the instructor's page 90_tiny.md is missing" in checks.companions(file)


def test_solutions_without_a_lesson(course):
    write_notebook(course.notebooks / "solutions" / "91_stray.ipynb", [("text-title", "# A")])
    assert checks.course_complaints(course) == ["the solutions 91_stray belong to no lesson"]


def teaches(course, number, *names):
    path = course.lesson_texts / f"{number}.toml"
    source = (course.lesson_texts / "90.toml").read_text()
    text = source.replace('id = "90"', f'id = "{number}"').replace("teaches = []", f"teaches = {json.dumps(names)}")
    path.write_text(text)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from regteach.sampling import warp", "regteach.sampling.warp"),
        ("from regteach import warp as w", "regteach.sampling.warp"),
        ("import regteach\nregteach.warp(1)", "regteach.sampling.warp"),
        ("import regteach.sampling as s\ns.warp(1)", "regteach.sampling.warp"),
        ("from regteach import sampling\nsampling.warp(1)", "regteach.sampling.warp"),
        ("from regteach.affine import Affine", "regteach.affine.Affine"),
        ("import regteach\nregteach.affine.Affine.identity(2)", "regteach.affine.Affine.identity"),
    ],
)
def test_names_used_before_they_are_taught(course, source, name):
    with_cells(course, CLAIM, EXERCISE, ("early", source))
    assert checks.course_complaints(course) == [f"90_tiny uses {name}, which no lesson teaches"]
    teaches(course, "91", "regteach.sampling.warp", "regteach.affine.*")
    assert checks.course_complaints(course) == [f"90_tiny uses {name}, which lesson 91 teaches"]
    teaches(course, "89", "regteach.sampling", "regteach.affine.Affine")
    assert checks.course_complaints(course) == []


def test_the_machinery_of_lessons_is_free(course):
    imports = "from regteach.data.digits import load\nfrom regteach.plotting import image\n"
    with_cells(course, CLAIM, EXERCISE, ("free", f"{imports}from regteach import plotting as p\np.show"))
    assert checks.course_complaints(course) == []


def test_executed_images_need_alt_texts(tmp_path):
    good = '<img alt="A line that rises to the right." src="data:,">'
    pages = '<img alt="short" src="data:,"> <img src="data:,">', good
    figure, good = (nbformat.v4.new_output("display_data", {"text/html": page}) for page in pages)
    bare = nbformat.v4.new_output("display_data", {"image/png": "AAAA"})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", id="a", outputs=[figure, bare, good])])
    nbformat.write(notebook, tmp_path / "a.ipynb")
    complaints = checks.executed_complaints(tmp_path / "a.ipynb")
    assert complaints == [
        f"cell a shows an image whose alt text is shorter than 20 characters: {alt!r}" for alt in ("short", "", "")
    ]


def test_the_picture_of_a_lesson_is_a_figure_of_its_notebook(course):
    assert checks.picture(with_cells(course, FIGURE)) == []
    (complaint,) = checks.picture(with_cells(course, CLAIM))
    assert complaint == "the lesson's picture is that of cell 'figure-line', which shows no figure"


def test_a_claim_is_made_once(tmp_path):
    record = {"regteach": {"kind": "claim", "id": "c1"}}
    outputs = [nbformat.v4.new_output("display_data", {"text/plain": "held"}, metadata=record) for _ in range(2)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", id="a", outputs=outputs)])
    nbformat.write(notebook, tmp_path / "a.ipynb")
    assert checks.executed_complaints(tmp_path / "a.ipynb") == ["the claim c1 is made twice"]
