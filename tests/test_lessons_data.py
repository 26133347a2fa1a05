"""The texts and exercises of lessons as data: what is read, what is refused, which mistake is recognised."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from regteach import lessons
from regteach.lessons import LessonError, load, render
from regteach.lessons.exercises import Exercise, Mistake, judge, load_exercises, problems

FIXTURES = Path(__file__).parent / "fixtures" / "lessons"
EXERCISES = {e.id: e for e in load_exercises("90", FIXTURES)}


def test_the_fixture_lesson_reads_as_written():
    text = load("90", FIXTURES)
    assert (text.id, text.title) == ("90", "Move a square")
    assert (text.minutes.fast, text.minutes.full) == (10, 12.5)
    assert [o.id for o in text.objectives] == ["o1", "o2"]
    assert text.objective("o2").text.startswith("measure a shift")
    assert [c.correct for c in text.quiz[0].choices] == [False, True, False]
    assert text.teaches == ("regteach.grid.Grid",)
    assert lessons.available(FIXTURES) == ["90"]


TOML = (FIXTURES / "90.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('title = "Move a square"', "", r"90\.toml: 'title' is missing"),
        ('title = "Move a square"', 'title = " "', r"90\.toml: title must be a text that is not empty, not ' '"),
        ('title = "Move a square"', "title = 3", r"title must be a text that is not empty, not 3"),
        ("title =", "tilte =", r"unknown key 'tilte'; did you mean 'title'\?"),
        ('id = "90"', 'id = "91"', r"id is '91' but the file's name says '90'"),
        ("fast = 10", "fast = 0", r"minutes\.fast must be a number above 0, not 0"),
        ("fast = 10", "fast = true", r"minutes\.fast must be a number above 0, not True"),
        ("fast = 10", "fast = 20", r"minutes\.full \(12\.5\) is less than minutes\.fast \(20\)"),
        ('id = "o2"', 'id = "o1"', r"objectives: the id 'o1' is used twice"),
        ('id = "o2"', 'id = "two"', r"objectives: the id 'two' must be 'o' and a number, such as 'o1'"),
        ('id = "q2"', 'id = "q1"', r"quiz: the id 'q1' is used twice"),
        ('id = "q2"\nobjective = "o2"', 'id = "q2"\nobjective = "o7"', r"quiz q2 names objective 'o7'.*o1, o2"),
        ("correct = true\n\n[[quiz.choices]]", "\n[[quiz.choices]]", r"quiz 1: .*exactly one correct.*3 choices, 0 of"),
        ('voxels."\n\n', 'voxels."\ncorrect = true\n\n', r"quiz 2: .*exactly one correct.*2 choices, 2 of them"),
        ('because = "That is the number of voxels."', "", r"quiz 2: choices 1: 'because' is missing"),
        ("correct = true", 'correct = "yes"', r"correct must be true or false, not 'yes'"),
        ('prerequisites = ["', 'prerequisites = "', r"not valid TOML"),
        ("teaches = [", "teaches = [3, ", r"teaches must be a text that is not empty, not 3"),
    ],
)
def test_a_broken_text_is_refused_with_its_place(tmp_path, old, new, complaint):
    assert old in TOML
    (tmp_path / "90.toml").write_text(TOML.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(LessonError, match=complaint):
        load("90", tmp_path)


def test_an_unknown_lesson_is_named_with_those_present():
    with pytest.raises(LessonError, match="there is no lesson '07'; the lessons present are 90"):
        load("07", FIXTURES)


@pytest.mark.parametrize("body", ["", "EXERCISES = [3]", "EXERCISES = None"])
def test_an_exercise_module_without_exercises_is_refused(tmp_path, body):
    (tmp_path / "lesson_90.py").write_text(body)
    with pytest.raises(LessonError, match=r"lesson_90\.py must define EXERCISES"):
        load_exercises("90", tmp_path)


def test_exercise_ids_are_in_order(tmp_path):
    (tmp_path / "lesson_90.py").write_text(
        'from regteach.lessons.exercises import Exercise\nEXERCISES = [Exercise("e2", "t", "o1", 1, "h")]'
    )
    with pytest.raises(LessonError, match=r"must be e1, e2, \.\.\. in order, not e2"):
        load_exercises("90", tmp_path)


def test_a_lesson_without_exercises_has_none(tmp_path):
    assert load_exercises("90", tmp_path) == ()


COURSE = [(id, e) for id in lessons.available() for e in load_exercises(id)]


@pytest.mark.parametrize("id", lessons.available())
def test_every_lesson_text_of_the_course_reads(id):
    text = load(id)
    known = {o.id for o in text.objectives}
    assert {e.objective for e in load_exercises(id)} <= known


@pytest.mark.parametrize("exercise", [e for _, e in COURSE], ids=[f"{id}-{e.id}" for id, e in COURSE])
def test_every_planted_mistake_of_the_course_gets_its_own_hint(exercise):
    assert problems(exercise) == []


@pytest.mark.parametrize("id", EXERCISES)
def test_planted_mistakes_get_their_own_hint(id):
    exercise = EXERCISES[id]
    assert problems(exercise) == []
    for mistake in exercise.mistakes:
        verdict = judge(exercise, mistake.answer)
        assert (verdict.status, verdict.mistake, verdict.message) == ("wrong", mistake.name, mistake.hint)


def test_problems_sees_a_mistake_that_is_none_and_two_that_are_one():
    same = Exercise("e1", "t", "o1", reference=2, hint="h", mistakes=[Mistake("a", 2, "x")])
    assert problems(same) == ["e1: the planted mistake 'a' is taken for 'correct'"]
    twins = Exercise("e1", "t", "o1", reference=2, hint="h", mistakes=[Mistake("a", 3, "x"), Mistake("b", 3, "y")])
    assert problems(twins) == ["e1: the planted mistake 'b' is taken for 'a'"]
    assert problems(Exercise("e1", "t", "o1", reference=2, hint="h")) == ["e1: no mistake is planted"]
    double = Exercise("e1", "t", "o1", reference=2, hint="h", mistakes=[Mistake("a", 3, "x"), Mistake("a", 4, "y")])
    assert "e1: two mistakes have the same name" in problems(double)
    random_reference = Exercise(
        "e1", "t", "o1", reference=lambda: object(), hint="h", cases=lambda: [()], mistakes=[Mistake("a", str, "x")]
    )
    assert problems(random_reference)[0].startswith("e1: the reference is wrong")


def _stub(image, spacing):
    """Centre of mass."""
    ...


def _to_do(image, spacing):
    raise NotImplementedError


@pytest.mark.parametrize("answer", [None, ..., _stub, _to_do, lambda image, spacing: ...])
def test_a_stub_is_to_do(answer):
    assert judge(EXERCISES["e1"], answer).status == "todo"


@pytest.mark.parametrize("answer", [None, ...])
def test_a_value_not_given_is_to_do(answer):
    assert judge(EXERCISES["e3"], answer).status == "todo"


@pytest.mark.parametrize("answer", [6, 6.0, np.float32(6), torch.tensor(6), 6.000001])
def test_a_number_may_come_in_any_kind(answer):
    assert judge(EXERCISES["e3"], answer).status == "correct"


def test_an_answer_may_use_another_library_and_another_precision():
    def centre(image, spacing):
        along = (np.arange(n) * s for n, s in zip(image.shape, spacing, strict=True))
        points = np.stack(np.meshgrid(*along, indexing="ij"), -1)
        return list((points * image.numpy().astype(np.float64)[..., None]).sum((0, 1)) / image.numpy().sum())

    assert judge(EXERCISES["e1"], centre).status == "correct"


def test_the_message_says_what_is_wrong():
    messages = {
        "raises": judge(EXERCISES["e1"], lambda image, spacing: image.nosuch).message,
        "shape": judge(EXERCISES["e1"], lambda image, spacing: image).message,
        "kind": judge(EXERCISES["e1"], lambda image, spacing: "left").message,
        "off": judge(EXERCISES["e1"], lambda image, spacing: torch.tensor([1000.0, 1000.0])).message,
        "nan": judge(EXERCISES["e1"], lambda image, spacing: torch.tensor([float("nan")] * 2)).message,
        "parts": judge(EXERCISES["e1"], lambda image: image).message,
        "called": judge(EXERCISES["e1"], 3.0).message,
        "not called": judge(EXERCISES["e3"], lambda: 6).message,
    }
    hint = " Weigh each point by its intensity, add up, and divide by the sum of the intensities."
    raised = "Your answer stops on case 1 of 2 with AttributeError: 'Tensor' object has no attribute 'nosuch'."
    assert messages["raises"] == raised + hint
    assert messages["shape"] == "Your answer has shape (7, 9) on case 1 of 2, and shape (2,) is expected." + hint
    assert messages["kind"] == "Your answer is a text on case 1 of 2, and an array of numbers is expected." + hint
    assert re.match(r"Your answer is off by up to 99\d on case 1 of 2\.", messages["off"])
    assert messages["nan"].startswith("Your answer holds values that are not finite on case 1 of 2.")
    assert "positional argument" in messages["parts"]
    assert messages["called"] == "A function is expected here, and you gave a number."
    assert messages["not called"] == "A value is expected here, and you gave a function: did you mean to call it?"


def test_a_wrong_value_is_not_told_the_answer():
    message = judge(EXERCISES["e3"], 5.5).message
    assert message == "Not yet. Count the steps, then multiply by the spacing."


def test_observe_turns_a_range_into_right_and_wrong():
    exercise = EXERCISES["e4"]
    assert judge(exercise, 0.05).status == judge(exercise, 0.2).status == "correct"
    assert judge(exercise, 0.004).mistake == "too small"
    assert judge(exercise, 3).mistake == "too large"
    assert judge(exercise, "fast").message.startswith("Your answer stops with TypeError")


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("moving", "Moving ", "fixed"),
        ((torch.ones(2), "x"), [np.ones(2), "X"], (torch.ones(2), "y")),
        ((1, "a", 3), (1, "a", 3), (1, "a")),
        ({"dice": 0.5, "tre": 1.0}, {"tre": 1.0, "dice": 0.5}, {"dice": 0.5, "tre": 2.0}),
        (True, True, False),
        (np.array(["a", "b"]), np.array(["a", "b"]), np.array(["b", "a"])),
    ],
)
def test_outputs_of_many_kinds_compare(reference, right, wrong):
    exercise = Exercise("e1", "t", "o1", reference=reference, hint="Look again.")
    assert judge(exercise, right).status == "correct"
    verdict = judge(exercise, wrong)
    assert verdict.status == "wrong"
    assert verdict.message.endswith("Look again.")


def test_the_tolerance_is_the_exercises_own():
    loose = Exercise("e1", "t", "o1", reference=1.0, hint="h", tolerance=0.1)
    assert judge(loose, 1.15).status == "correct"  # absolute and relative add up
    assert judge(loose, 1.25).status == "wrong"


def test_an_answer_that_spoils_its_arguments_spoils_nothing_else():
    exercise = EXERCISES["e1"]

    def spoiling(image, spacing):
        right = exercise.reference(image, spacing)
        image.zero_()
        return right

    assert judge(exercise, spoiling).status == "correct"
    assert judge(exercise, exercise.reference).status == "correct"


def test_every_answer_sees_the_same_random_numbers_and_the_notebook_keeps_its_own():
    noisy = Exercise(
        "e1",
        "t",
        "o1",
        reference=lambda n: torch.rand(n) + random.random() + np.random.rand(),
        hint="h",
        cases=lambda: [(3,)],
    )
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    assert judge(noisy, noisy.reference).status == "correct"
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def test_a_planted_answer_that_raises_is_matched_by_the_kind_of_exception():
    def broken(x):
        raise IndexError("planted")

    exercise = Exercise(
        "e1",
        "t",
        "o1",
        reference=abs,
        hint="h",
        cases=lambda: [(1,)],
        mistakes=[Mistake("index", broken, "Count from 0.")],
    )
    assert judge(exercise, lambda x: [][x]).message == "Count from 0."
    assert judge(exercise, lambda x: x.y).mistake is None


def test_a_reference_that_raises_is_the_authors_error():
    exercise = Exercise("e1", "t", "o1", reference=lambda x: x.nosuch, hint="h", cases=lambda: [(1,)])
    with pytest.raises(LessonError, match="the reference itself raises AttributeError"):
        judge(exercise, abs)


@pytest.mark.parametrize(
    ("text", "page"),
    [
        ("a < b & c", "a &lt; b &amp; c"),
        ("`x * y` and *x*", "<code>x * y</code> and <em>x</em>"),
        ("**bold** and *so*", "<strong>bold</strong> and <em>so</em>"),
        ("$a*b*c < d$ *e*", "$a*b*c &lt; d$ <em>e</em>"),
        ("2 * 3 * 4", "2 * 3 * 4"),
        ("`<script>`", "<code>&lt;script&gt;</code>"),
    ],
)
def test_inline_markup(text, page):
    assert render.inline(text) == page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.234, "1.23"),
        (12345.6, "12,300"),
        (5021, "5,021"),
        (0.05, "0.0500"),
        (1.2e-7, "1.2e-7"),
        (-3.14159, "-3.14"),
        (1.5e9, "1.5e9"),
        (float("nan"), "not a number"),
        (float("-inf"), "minus infinity"),
    ],
)
def test_numbers_have_three_significant_digits(value, text):
    assert render.number(value) == text


def test_a_value_beside_its_band_shows_on_which_side_it_lies():
    assert render.numbers(0.9996, 0.9999, None) == ("0.9996", "at least 0.9999")
    assert render.numbers(0.5, 0.4, 0.6) == ("0.500", "0.4 to 0.6")
    assert render.numbers(1e-7, None, 1e-6) == ("1e-7", "at most 1e-6")


@pytest.mark.parametrize("path", sorted(lessons.FOLDER.glob("lesson_*.py")), ids=lambda path: path.stem)
def test_every_planted_answer_is_used(path):
    source = path.read_text(encoding="utf-8")
    for name in re.findall(r"^def (\w+)", source, re.MULTILINE):
        assert len(re.findall(rf"\b{name}\b", source)) > 1, f"{name} is defined and never used"
