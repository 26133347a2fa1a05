"""Notebooks are executed apart from each other, watched, recorded, and executed again only when something changed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import nbformat
import psutil
import pytest
from course.minicourse import (
    FIGURE,
    FILM,
    LIGHT,
    PARAMETERS,
    TEXT,
    make_course,
    make_light_course,
    write_notebook,
)
from rich.console import Console

import data_download
from regteach.bootstrap import ROOT
from regteach.course import commands, run
from regteach.course.execute import SWEEP_TAG, _parameter_problems
from regteach.course.layout import Outcome


def execute(course, kind="lesson", **settings):
    """Run the course of a test; what became of its one notebook, and what was printed."""
    out = io.StringIO()
    results = run.run(course.files(kind), run.Settings(**settings), Console(file=out, width=160))
    run.explain(results, Console(file=out, width=160))
    return results[0], out.getvalue()


def test_a_lesson_leaves_an_executed_notebook_and_its_record(tmp_path):
    course = make_course(tmp_path, FIGURE, FILM)
    result, said = execute(course)
    assert result.passed, result.troubles
    outcome = Outcome.read(result.file.output)
    assert (outcome.held, len(outcome.claims), outcome.to_do, len(outcome.exercises)) == (1, 1, 1, 1)
    assert outcome.data["parameters"] == {"FAST": True, "SEED": 0, "DEVICE": "auto"}
    assert 0.5 < outcome.seconds < 120
    assert 50 < outcome.peak_memory_mb < 4000
    assert "90: started" in said
    cells = nbformat.read(result.file.output, as_version=4)["cells"]
    assert cells[-1]["metadata"]["tags"] == [SWEEP_TAG]
    assert [(r["films"], r["cell"]) for r in outcome.data["records"] if r["kind"] == "sweep"] == [(1, "sweep-widgets")]
    source = nbformat.read(result.file.path, as_version=4)["cells"]
    assert all(not cell.get("outputs") for cell in source)


def test_only_what_changed_is_executed_again(tmp_path):
    course = make_light_course(tmp_path)
    package = course.root / "regteach" / "grid.py"
    package.write_text("first = 1\n")
    assert execute(course)[0].executed
    again, said = execute(course)
    assert not again.executed
    assert again.passed
    assert "unchanged" in said
    (file,) = course.files()
    parameters = run.Settings().parameters
    before = run.fingerprint(file, parameters)
    assert run.fingerprint(file, run.Settings(full=True).parameters) != before
    text = course.lesson_texts / "90.toml"
    for path, change in ((package, "second = 2\n"), (text, text.read_text() + "\n"), (file.path, "{}")):
        was = path.read_text()
        path.write_text(change)
        assert run.fingerprint(file, parameters) != before, path
        path.write_text(was)
    for path in ("regteach/cli.py", "regteach/course/site.py", "regteach/lessons/91.toml", "README.md"):
        (course.root / path).parent.mkdir(exist_ok=True)
        (course.root / path).write_text("what a lesson never sees")
    assert run.fingerprint(file, parameters) == before
    assert run.unchanged(file, before)
    with file.output.open("a") as output:
        output.write(" ")  # a copy that is not the one its record tells of
    assert not run.unchanged(file, before)
    assert execute(course, force=True)[0].executed


def test_data_that_have_come_are_a_reason_to_execute_again(tmp_path, monkeypatch):
    (file,) = make_light_course(tmp_path).files()
    parameters = run.Settings().parameters
    entry, other = (data_download.entries()[name] for name in ("mni152", "mnist-5k"))
    known = {"mine": replace(entry, lessons=("90",)), "not-mine": replace(other, lessons=("91",))}
    monkeypatch.setattr(data_download, "entries", lambda: known)
    roots = [tmp_path / "here", tmp_path / "there"]
    monkeypatch.setenv("REGTEACH_DATA", str(roots[0]))
    before = run.fingerprint(file, parameters)
    monkeypatch.setenv("REGTEACH_DATA", str(roots[1]))
    assert run.fingerprint(file, parameters) == before  # another folder, and as empty
    for own, changes in ((other, False), (entry, True)):
        scan = roots[1] / own.folder / own.expect[0].files
        scan.parent.mkdir(parents=True)
        scan.touch()
        assert (run.fingerprint(file, parameters) != before) == changes
    monkeypatch.setenv("REGTEACH_DATA", str(roots[0]))
    assert run.fingerprint(file, parameters) == before


def test_a_claim_that_falls_fails_the_lesson_and_is_never_taken_for_done(tmp_path):
    fallen = ("claim-more", 'claim("c2", 9.0, high=1.0, held=False, why="The value is outside the band.")')
    result, said = execute(make_light_course(tmp_path, fallen))
    assert result.troubles == ["claim c2 fell: It is 9.0 mm, not at most 1.0. The value is outside the band."]
    assert "90: FAILED" in said
    assert not run.unchanged(result.file, run.fingerprint(result.file, run.Settings().parameters))


def test_a_lesson_that_leaves_before_its_end_fails(tmp_path):
    result, said = execute(make_light_course(tmp_path, ("leave", "import sys; sys.exit()"), ("after", "1 + 1")))
    assert result.troubles == ["cell leave failed: it ended without an error before its end: 2 cells did not run"]
    assert "90: FAILED" in said


def test_an_older_result_does_not_stand_for_a_run_that_crashed(tmp_path):
    course = make_light_course(tmp_path)
    assert execute(course)[0].passed
    course.files()[0].path.write_text("<<<<<<< HEAD")
    assert not execute(course)[0].passed
    assert not course.files()[0].output.with_suffix(".json").exists()


def test_a_cell_that_takes_too_long_fails(tmp_path):
    result, _ = execute(make_light_course(tmp_path, ("sleep", "import time; time.sleep(60)")), cell_timeout=6)
    assert result.troubles[0] == "cell sleep failed: the cell took longer than 6 s"


def test_a_kernel_that_dies_fails(tmp_path):
    result, _ = execute(make_light_course(tmp_path, ("death", "import os; os._exit(3)")))
    assert result.troubles[0].startswith("cell death failed: the kernel died")


def test_a_lesson_that_tries_the_network_fails_even_where_it_swallows_the_error(tmp_path):
    attempts = """
    import socket, subprocess, sys, urllib.request

    def attempt(function, *arguments, **options):
        try:
            function(*arguments, **options)
        except OSError as error:
            return str(error)

    said = attempt(socket.create_connection, ("192.0.2.1", 80), timeout=1)
    assert said == "lessons run without a network, and this one asked for 192.0.2.1", said
    attempt(socket.socket().connect, ("192.0.2.2", 80))
    attempt(urllib.request.urlopen, "http://look-up.invalid/")
    attempt(socket.getaddrinfo, "swallowed.invalid", 80)
    child = "import socket; socket.gethostbyname('child.invalid')"
    subprocess.run([sys.executable, "-c", child], stderr=subprocess.DEVNULL)
    server = socket.create_server(("127.0.0.1", 0))
    socket.create_connection(server.getsockname()).close()
    socket.create_connection(("localhost", server.getsockname()[1])).close()
    """
    result, _ = execute(make_light_course(tmp_path, ("network", attempts)))
    asked = ["192.0.2.1", "192.0.2.2", "child.invalid", "look-up.invalid", "swallowed.invalid"]
    assert result.troubles == [f"lessons run without a network, and this one asked for {host}" for host in asked]


def test_an_exception_in_a_slider_fails_the_lesson(tmp_path):
    broken = """
    from regteach.widgets import film

    def draw(ax, x):
        ax.plot([0, 1 / x])

    film(draw, [1, 2, 3], label="x", alt="A line that falls as the value rises.", strip=2)
    values = ["what the slider draws later on"]
    draw.__code__ = (lambda ax, x: values[x]).__code__
    """
    result, _ = execute(make_light_course(tmp_path, ("film-broken", broken)))
    assert "cell sweep-widgets failed" in result.troubles[0]
    assert "IndexError" in result.troubles[0]


def test_a_notebook_without_parameters_cell_fails(tmp_path):
    untagged = ("parameters", 'FAST = True\nSEED = 0\nDEVICE = "auto"')
    result, _ = execute(make_light_course(tmp_path, parameters=untagged))
    assert "papermill says: Input notebook does not contain a cell with tag 'parameters'" in result.troubles
    assert "papermill says: Passed unknown parameter: SEED" in result.troubles


def test_a_parameter_that_is_overwritten_later_fails(tmp_path):
    course = make_light_course(tmp_path)
    cells = [("text-title", "# A"), PARAMETERS, ("again", "FAST = True"), LIGHT]
    write_notebook(course.notebooks / "90_tiny.ipynb", cells)
    result, _ = execute(course, full=True)
    assert result.troubles == ["FAST=False was sent and True arrived"]


def test_the_parameters_that_were_recorded_are_compared_with_those_sent():
    sent = {"FAST": True, "SEED": 0}
    lesson = {"kind": "lesson", "parameters": {"FAST": True, "SEED": 0, "MORE": 1}}
    assert _parameter_problems([lesson], sent) == []
    assert _parameter_problems([], sent)[0].startswith("the notebook makes no Lesson")
    lesson["parameters"] = {"FAST": True}
    assert _parameter_problems([lesson], sent) == ["SEED=0 was sent and None arrived"]


def test_solutions_must_do_every_exercise(tmp_path):
    result, _ = execute(make_light_course(tmp_path), "solution")
    assert result.passed
    facts = result.outcome.data
    (done,) = [record for record in facts["records"] if record["kind"] == "exercise"]
    others = [record for record in facts["records"] if record is not done]
    assert list(Outcome({**facts, "records": others}).troubles()) == ["exercise e1 is never checked"]
    wrong = {**done, "status": "wrong", "message": "That is the square."}
    troubles = list(Outcome({**facts, "records": [*others, wrong]}).troubles())
    assert troubles == ["exercise e1 is wrong: That is the square."]
    assert list(Outcome({**facts, "kind": "lesson", "records": [*others, wrong]}).troubles()) == []


def test_the_command_shows_failing_cells_builds_the_site_and_answers_for_all_lessons(tmp_path):
    course = make_light_course(tmp_path)
    (course.lesson_texts / "91.toml").write_text(TEXT.format(id="91"))
    cells = [("text-title", "# B"), PARAMETERS, LIGHT, ("division-by-zero", "below = 0\n1 / below"), ("never", "1")]
    write_notebook(course.notebooks / "91_bad.ipynb", cells)
    out = io.StringIO()
    status = commands.execute_and_build(course, Console(file=out, width=160), (), run.Settings())
    said = out.getvalue()
    assert status == 1
    assert "91_bad: cell division-by-zero failed: ZeroDivisionError: division by zero" in said
    assert "| below = 0" in said
    assert "----> 2 1 / below" in said
    assert "\x1b" not in said
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in said.splitlines() if "│" in line]
    good, bad = (row[:2] + row[4:] for row in rows)
    assert good == ["90", "ok", "1 of 1", "1 of 1"]
    assert bad == ["91", "FAILED", "0 of 0", "0 of 0"]
    assert "This run failed" in (course.build / "site" / "91_bad.html").read_text()
    assert commands.execute_and_build(course, Console(file=out), ("90",), run.Settings()) == 0
    with pytest.raises(ValueError, match="there is no lesson '92'; there are 90, 91"):
        course.files(only=("92",))


def test_an_interrupted_run_leaves_the_old_record_or_none_and_no_kernel(tmp_path):
    course = make_light_course(tmp_path, ("sleep", "import time; time.sleep(600)"))
    code = (
        "import sys; sys.path.insert(0, {tests!r})\n"
        "from pathlib import Path; from rich.console import Console\n"
        "from regteach.course import run; from regteach.course.layout import Course\n"
        "run.run(Course(Path({root!r})).files(), run.Settings(), Console())"
    ).format(tests=str(ROOT / "tests"), root=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    family, deadline = [], time.time() + 60
    while len(family) < 2 and time.time() < deadline:  # the process that executes, and its kernel
        time.sleep(0.2)
        family = psutil.Process(process.pid).children(recursive=True)
    time.sleep(1)
    if os.name == "posix":
        os.kill(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    (file,) = course.files()
    assert Outcome.read(file.output) is None
    assert not list(course.build.rglob("*.ipynb"))


def test_a_record_is_read_only_beside_its_notebook(tmp_path):
    course = make_light_course(tmp_path)
    (file,) = course.files()
    file.output.parent.mkdir(parents=True)
    file.output.with_suffix(".json").write_text(json.dumps({"records": []}))
    assert Outcome.read(file.output) is None
