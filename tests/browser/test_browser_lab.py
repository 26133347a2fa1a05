"""A student's session in JupyterLab: open the copy of a lesson, run it, move the slider, see the picture change."""

import re
import socket
import subprocess
import time
import urllib.error
import urllib.request

import nbformat
import pytest
from course.minicourse import FIGURE, FILM, make_course

from regteach.course import student
from regteach.course.layout import Course

TOKEN = "for-this-test-alone"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A course of one lesson with a figure and a film."""
    return make_course(tmp_path_factory.mktemp("lab"), FIGURE, FILM)


@pytest.fixture(scope="module")
def server(tiny):
    """JupyterLab as `regteach lab` starts it, with copies of the tiny lesson and of the course's first; its address."""
    root = tiny.root
    student.start("90", course=tiny)
    if own := Course().files():
        student.start(own[0].number, to=root / "my", course=own[0].course)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**student.lab_environment(), "JUPYTER_TOKEN": TOKEN, "JUPYTER_CONFIG_DIR": str(root / "config")}
    command = student.lab_command(browser=False, port=port, root=root)
    with (root / "lab.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(lambda: urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=2), 60, root / "lab.log")
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _wait(attempt, seconds, log):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return attempt()
        except OSError:
            if time.monotonic() > deadline:
                pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.3)


def test_nobody_gets_in_without_the_token(server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server}/api/contents", timeout=10)
    assert refused.value.code == 403


def open_and_run(visit, server, file, seconds):
    """Open the copy of a lesson, run all of it and wait until every cell has run and the kernel is idle again."""
    cells = nbformat.read(file.path, as_version=4)["cells"]
    number = sum(cell["cell_type"] == "code" for cell in cells)
    seen = visit(re.escape(server) + r"|ws:|data:|blob:", viewport={"width": 1300, "height": 900})
    page = seen.page
    page.goto(f"{server}/lab/tree/my/{file.name}.ipynb?reset&token={TOKEN}")
    idle = page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle$"))
    idle.wait_for(timeout=90_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.wait_for_function(
        "n => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
        ".filter(prompt => /\\[\\d+\\]:/.test(prompt.textContent)).length === n",
        arg=number,
        timeout=seconds * 1000,
    )
    idle.wait_for(timeout=30_000)
    return seen


def test_a_student_runs_the_copy_and_moves_the_slider(visit, server, tiny):
    seen = open_and_run(visit, server, tiny.files()[0], 90)
    page = seen.page
    output = page.locator(".jp-OutputArea-output")
    assert output.get_by_alt_text("A line that rises from the lower left to the upper right.").count() == 1
    assert output.get_by_text("to do", exact=True).count() == 1
    frame = output.get_by_alt_text("A line that grows with the slider. height, mm: 2.")
    frame.wait_for(timeout=20_000)
    before = frame.get_attribute("src")
    slider = output.get_by_role("slider")
    slider.focus()
    slider.press("ArrowRight")
    after = output.get_by_alt_text("A line that grows with the slider. height, mm: 3.")
    after.wait_for(timeout=20_000)
    assert after.get_attribute("src") != before
    assert page.get_by_text("Jupyter news").count() == 0
    assert seen.asked == []


def test_the_first_lesson_runs_in_jupyterlab(visit, server):
    lessons = Course().files()
    if not lessons:
        pytest.skip("notebooks/ holds no lesson yet")
    seen = open_and_run(visit, server, lessons[0], 240)
    assert seen.page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert seen.asked == []
