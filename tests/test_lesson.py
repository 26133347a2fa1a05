"""The lesson machine: claims that cannot pass by accident, predictions, and the record that a notebook carries."""

import json
import random
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from regteach.lesson import Lesson, choose_device, records
from regteach.lessons import LessonError
from regteach.records import KEY, WIDGET_VIEW, check_alt, figures

FIXTURES = Path(__file__).parent / "fixtures" / "lessons"


class FixtureLesson(Lesson):
    folder = FIXTURES


@pytest.fixture
def lesson(capsys):
    made = FixtureLesson("90", FAST=True, SEED=3, DEVICE="cpu")
    capsys.readouterr()
    return made


def claim(lesson, value, control=("identity", 9.0), **options):
    lesson.claim("c1", value, says="The error", control=control, **options)
    return lesson.records[-1]


def test_the_head_shows_the_lesson_and_records_the_parameters(capsys):
    made = FixtureLesson("90", FAST=False, SEED=7, DEVICE="cpu")
    text = capsys.readouterr().out
    for part in ("Move a square", "10 minutes (fast), 12.5 minutes (full length)", "o2", "Lesson 00", "6 mm: four"):
        assert part in text
    assert made.records == [
        {
            "kind": "lesson",
            "id": "90",
            "title": "Move a square",
            "parameters": {"FAST": False, "SEED": 7, "DEVICE": "cpu"},
            "device": "cpu",
            "objectives": ["o1", "o2"],
            "exercises": ["e1", "e2", "e3", "e4"],
        }
    ]


def test_the_seed_reaches_every_generator():
    def draw(seed):
        made = FixtureLesson("90", SEED=seed)
        return torch.rand(1).item(), np.random.rand(), random.random(), made.rng.random()

    first, again, other = draw(1), draw(1), draw(2)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(LessonError, match="is not a device of this machine"):
        choose_device(name)


def test_auto_is_cuda_where_there_is_one():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("value", "band", "held"),
    [
        (1.0, {"low": 0, "high": 2}, True),
        (2.0, {"high": 2}, True),
        (0.0, {"low": 0}, True),
        (2.0001, {"high": 2}, False),
        (-0.1, {"low": 0, "high": 2}, False),
        (float("nan"), {"high": 2}, False),
        (float("-inf"), {"high": 2}, False),
        (torch.tensor(1.5), {"low": 0, "high": 2}, True),
        (np.array([[1.5]]), {"low": 0, "high": 2}, True),
        (torch.tensor(1.5, requires_grad=True), {"low": 0, "high": 2}, True),
    ],
)
def test_a_claim_holds_inside_its_band_only(lesson, value, band, held):
    assert (
        claim(lesson, value, control=("identity", -9.0) if "high" not in band else ("identity", 9.0), **band)["held"]
        is held
    )


@pytest.mark.parametrize(("control", "held"), [(2.1, True), (1.9, False), (float("nan"), False), (float("inf"), True)])
def test_the_control_must_be_a_number_outside_the_band(lesson, control, held):
    assert claim(lesson, 1.0, control=("identity", control), low=0, high=2)["held"] is held


def test_a_claim_says_which_way_it_falls(lesson, capsys):
    assert claim(lesson, 3.0, high=2)["why"] == "The value is outside the band."
    assert claim(lesson, float("nan"), high=2)["why"] == "The value is not a finite number."
    assert "The control is inside the band too" in claim(lesson, 1.0, high=10)["why"]
    assert "nothing is shown" in claim(lesson, 1.0, high=2, control=("x", float("nan")))["why"]
    assert claim(lesson, 1.0, high=2)["why"] == ""
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "[FALLS] The error: 3. Band: at most 2. Control, identity: 9. The value is outside the band."
    assert out[-1] == "[held] The error: 1. Band: at most 2. Control, identity: 9."


def test_a_claim_is_recorded_in_full_and_as_json(lesson):
    record = claim(lesson, float("nan"), high=2, unit="mm", objective="o2", control=("diverged", float("inf")))
    assert json.loads(json.dumps(record, allow_nan=False)) == {
        "kind": "claim",
        "id": "c1",
        "says": "The error",
        "objective": "o2",
        "value": "nan",
        "low": None,
        "high": 2.0,
        "unit": "mm",
        "control": {"name": "diverged", "value": "inf"},
        "held": False,
        "why": "The value is not a finite number.",
    }


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "claim c1 has no band: give low, high or both"),
        ({"low": 2, "high": 1}, r"claim c1: low \(2\) is above high \(1\)"),
        ({"low": float("nan")}, "is not a number"),
        ({"high": 1, "control": 3.0}, "control must be a pair of a name and a number, not 3.0"),
        ({"high": 1, "control": ("identity", "far")}, "the control must be one number, not 'far'"),
        ({"high": 1, "objective": "o9"}, "has no objective 'o9'; it has o1, o2"),
        ({"high": 1, "value": torch.ones(2)}, r"the value must be one number, not an array of shape \(2,\)"),
        ({"high": 1, "value": [1.0, 2.0]}, r"the value must be one number, not \[1.0, 2.0\]"),
        ({"high": 1, "value": None}, "the value must be one number, not None"),
        ({"high": 1, "value": "0.5"}, "the value must be one number, not '0.5'"),
    ],
)
def test_a_claim_written_wrongly_raises(lesson, options, complaint):
    with pytest.raises(LessonError, match=complaint):
        claim(lesson, **{"value": 0.5, **options})


def test_a_claim_needs_a_control(lesson):
    with pytest.raises(TypeError, match="control"):
        lesson.claim("c1", 1.0, says="x", high=2)


def test_a_cell_run_again_replaces_its_record(lesson):
    claim(lesson, 3.0, high=2)
    claim(lesson, 1.0, high=2)
    assert [r["held"] for r in lesson.records if r["kind"] == "claim"] == [True]


def test_parity_holds_for_equal_results_and_falls_for_different_ones(lesson):
    naive = torch.rand(1, 1, 4, 5)
    lesson.parity("sampling.sample", naive, naive + 1e-8, objective="o1")
    assert lesson.records[-1]["held"]
    assert lesson.records[-1]["id"] == "parity-sampling.sample"
    expected = (naive.roll(1, 2) - naive).abs().max().item()  # axis 2 is the first with more than one element
    assert lesson.records[-1]["control"]["value"] == pytest.approx(expected, rel=1e-5)
    lesson.parity("sampling.sample", naive, naive + 1e-3)
    assert not lesson.records[-1]["held"]
    lesson.parity("sampling.sample", naive.numpy(), naive + float("nan"))
    assert not lesson.records[-1]["held"]


def test_parity_on_a_constant_shows_nothing_without_a_control_that_can_fail(lesson):
    lesson.parity("f", torch.ones(3), torch.ones(3))
    assert not lesson.records[-1]["held"]
    lesson.parity("f", torch.ones(3), torch.ones(3), control=("zeros", torch.zeros(3)))
    assert lesson.records[-1]["held"]


@pytest.mark.parametrize(
    ("naive", "package", "control", "complaint"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), None, r"the shapes differ, \(2, 3\) here and \(3, 2\)"),
        (torch.tensor(1.0), torch.tensor(1.0), None, "one number cannot be moved"),
        (torch.ones(2), torch.ones(2), ("short", torch.ones(1)), r"the control has shape \(1,\)"),
    ],
)
def test_parity_written_wrongly_raises(lesson, naive, package, control, complaint):
    with pytest.raises(LessonError, match=complaint):
        lesson.parity("f", naive, package, control=control)


CHOICES = ["it grows", "it shrinks", "it stays"]


@pytest.mark.parametrize(
    ("picked", "match", "words"),
    [(None, None, "no prediction made"), ("it grows", True, "as predicted"), ("it stays", False, "not as predicted")],
)
def test_a_prediction_is_compared_with_the_truth(lesson, capsys, picked, match, words):
    lesson.predict("p1", "What does the error do?", CHOICES)
    asked = capsys.readouterr().out
    assert all(choice in asked for choice in CHOICES)
    lesson._predictions["p1"][1].value = picked
    lesson.reveal("p1", truth="it grows", because="The step is too long.")
    assert f"[{words}] It is: it grows." in capsys.readouterr().out
    asked, revealed = (r for r in lesson.records if r["kind"] == "prediction")
    assert (asked["stage"], asked["choices"]) == ("asked", CHOICES)
    assert (revealed["stage"], revealed["picked"], revealed["truth"], revealed["match"]) == (
        "revealed",
        picked,
        "it grows",
        match,
    )


def test_predictions_written_wrongly_raise(lesson):
    with pytest.raises(LessonError, match="two or more different choices"):
        lesson.predict("p1", "?", ["one"])
    with pytest.raises(LessonError, match="two or more different choices"):
        lesson.predict("p1", "?", ["one", "one"])
    with pytest.raises(LessonError, match="no prediction 'p1' to reveal"):
        lesson.reveal("p1", truth="one", because="")
    lesson.predict("p1", "?", CHOICES)
    with pytest.raises(LessonError, match="the truth 'it explodes' is not one of the choices"):
        lesson.reveal("p1", truth="it explodes", because="")


def test_exercises_are_recorded_with_the_mistake(lesson, capsys):
    lesson.check("e3", 4)
    lesson.check("e1", None)
    lesson.check("e2", lesson.exercises["e2"].reference)
    found = {r["id"]: (r["status"], r["mistake"]) for r in lesson.records if r["kind"] == "exercise"}
    assert found == {"e3": ("wrong", "voxels"), "e1": ("todo", None), "e2": ("correct", None)}
    assert "[not yet] Exercise e3, distance of two voxels. That is the number of steps." in capsys.readouterr().out
    with pytest.raises(LessonError, match=r"has no exercise 'e9'; it has e1, e2, e3, e4"):
        lesson.check("e9", None)


def test_the_quiz_shows_every_choice_with_its_reason(lesson, capsys):
    lesson.quiz()
    out = capsys.readouterr().out
    for question in lesson.text.quiz:
        assert all(choice.because in out for choice in question.choices)
    assert lesson.records[-1]["questions"] == ["q1", "q2"]


def test_the_recap_counts_what_held_and_what_is_to_do(lesson, capsys):
    lesson.claim("c1", 1.0, high=2, says="a", control=("none", 3.0))
    lesson.claim("c2", 5.0, high=2, says="b", control=("none", 3.0))
    lesson.check("e3", 6)
    lesson.recap([f"The error fell to **{1.234:.2f}** mm."])
    record = lesson.records[-1]
    assert (record["claims_held"], record["claims_made"]) == (1, 2)
    assert (record["exercises_correct"], record["exercises_todo"]) == (["e3"], ["e1", "e2", "e4"])
    out = capsys.readouterr().out
    assert "Claims held: 1 of 2." in out
    assert "Exercises correct: 1 of 4. To do: e1, e2, e4." in out
    assert "Next: Lesson 91 turns the square as well." in out


def test_an_exercise_for_an_unknown_objective_is_refused(tmp_path):
    (tmp_path / "90.toml").write_text((FIXTURES / "90.toml").read_text())
    (tmp_path / "lesson_90.py").write_text(
        'from regteach.lessons.exercises import Exercise\nEXERCISES = [Exercise("e1", "t", "o9", 1, "h")]'
    )

    class Broken(Lesson):
        folder = tmp_path

    with pytest.raises(LessonError, match="no objective 'o9'"):
        Broken("90")


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The fixture lesson as a notebook, run in a kernel, written to disk and read back."""
    start = f"""
from pathlib import Path
import torch
from regteach.lesson import Lesson
from regteach.plotting import axes, image, show
from regteach.widgets import film
Lesson.folder = Path({str(FIXTURES)!r})
lesson = Lesson("90", FAST=True, SEED=0, DEVICE="cpu")
"""
    sources = [
        start,
        'lesson.predict("p1", "What does $T$ map?", ["fixed to moving", "moving to fixed"])',
        'lesson.reveal("p1", truth="fixed to moving", because="We ask where to look.")',
        'lesson.claim("c1", 1.0, high=2, says="The error <in mm>", unit="mm", control=("identity", 3.0))',
        'lesson.check("e1", None)',
        'fig, ax = axes()\nimage(ax[0], torch.eye(4))\nshow(fig, alt="A line on the diagonal, < 5 pixels.")',
        "def draw(ax, k):\n    image(ax, torch.eye(4) * k, limits=(0, 3))\n"
        'film(draw, [1, 2, 3], label="k", alt="A line gets brighter.")',
        "lesson.quiz()",
        'lesson.recap(["Done."])',
        "from regteach.widgets import sweep; sweep()",
    ]
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    folder = tmp_path_factory.mktemp("lesson")
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    nbformat.write(notebook, folder / "90.ipynb")
    return nbformat.read(folder / "90.ipynb", as_version=4)


def test_an_executed_notebook_carries_its_record(executed):
    found = records(executed)
    kinds = [r["kind"] for r in found]
    assert kinds == (
        ["lesson", "prediction", "prediction", "claim", "exercise", "figure", "figure", "quiz", "recap", "sweep"]
    )
    assert [r["cell"] for r in found] == [cell["id"] for cell in executed["cells"]]
    by_kind = {r["kind"]: r for r in found}
    assert by_kind["lesson"]["parameters"] == {"FAST": True, "SEED": 0, "DEVICE": "cpu"}
    assert (by_kind["claim"]["value"], by_kind["claim"]["held"]) == (1.0, True)
    assert (by_kind["sweep"]["films"], by_kind["sweep"]["frames"]) == (1, 3)
    assert by_kind["recap"]["exercises_todo"] == ["e1", "e2", "e3", "e4"]


def test_every_output_has_html_and_plain_text_and_widgets_come_first(executed):
    outputs = [output for cell in executed["cells"] for output in cell["outputs"]]
    assert all(output["output_type"] == "display_data" for output in outputs), "a call left a return value behind"
    for output in outputs:
        assert {"text/html", "text/plain"} <= set(output["data"])
        assert KEY in output["metadata"]
    with_widget = [o["metadata"][KEY]["kind"] for o in outputs if WIDGET_VIEW in o["data"]]
    assert with_widget == ["prediction", "figure"]
    page = executed["cells"][1]["outputs"][0]["data"]["text/html"]
    assert all(part in page for part in ("What does $T$ map?", "fixed to moving", "moving to fixed"))


def test_a_lesson_s_words_are_escaped_in_html(executed):
    page = executed["cells"][3]["outputs"][0]["data"]["text/html"]
    assert "The error &lt;in mm&gt;: <strong>1 mm</strong>" in page


def test_the_quiz_needs_no_script(executed):
    page = executed["cells"][7]["outputs"][0]["data"]["text/html"]
    assert page.count("<details>") == page.count("<summary>") == 5
    assert "script" not in page
    assert "http" not in page


def test_figures_are_read_back_with_their_alt_text(executed):
    found = figures(executed)
    assert [figure.alt for figure in found] == [
        "A line on the diagonal, < 5 pixels.",
        "A line gets brighter. Frames for k: 1, 2, 3.",
    ]
    assert all(figure.png.startswith(b"\x89PNG") for figure in found)
    assert all(figure.cell in {cell["id"] for cell in executed["cells"]} for figure in found)
    assert 'alt="A line on the diagonal, &lt; 5 pixels."' in executed["cells"][5]["outputs"][0]["data"]["text/html"]


def test_a_notebook_without_records_has_none():
    notebook = new_notebook(cells=[new_code_cell("1")])
    assert records(notebook) == figures(notebook) == []


def test_a_short_alt_text_is_refused():
    with pytest.raises(ValueError, match="20 characters or more"):
        check_alt("   a figure            ")


def test_importing_the_lesson_machine_costs_little():
    code = (
        "import time, torch, ipywidgets\nstart = time.process_time()\nimport regteach.lesson\n"
        "print(time.process_time() - start)\nimport sys\nprint('matplotlib' in sys.modules)"
    )
    seconds, drawing = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(seconds) < 1  # of this process alone; about 0.1 s
    assert drawing == "False"
