"""A student's copy is never overwritten, and its links still lead somewhere."""

import json
import subprocess

import pytest
from course.minicourse import make_course

from regteach.bootstrap import ROOT
from regteach.course import student


def test_a_copy_is_made_once_and_never_overwritten(tmp_path):
    course = make_course(tmp_path)
    copy = tmp_path / "my" / "90_tiny.ipynb"
    assert str(copy) in student.start("90", course=course)
    assert json.loads(copy.read_text())["cells"][1]["source"].startswith("FAST")
    copy.write_text("my work")
    said = student.start("90", course=course)
    assert said.startswith("Your copy is there already, as you left it")
    assert copy.read_text() == "my work"
    student.start("90", again="second-try", course=course)
    assert (tmp_path / "my" / "90_tiny_second-try.ipynb").exists()
    student.start("90", to=tmp_path / "else where", course=course)
    assert (tmp_path / "else where" / "90_tiny.ipynb").exists()


def test_links_in_the_copy_lead_to_the_same_files(tmp_path):
    links = "# T\n\n[t](instructor/90_tiny.md#x) ![A picture with words](figures/a.png) [w](https://x.invalid) [h](#T)"
    course = make_course(tmp_path, ("text-links", links))
    (course.notebooks / "figures").mkdir()
    (course.notebooks / "figures" / "a.png").write_bytes(b"x")
    student.start("90", course=course)
    source = json.loads((tmp_path / "my" / "90_tiny.ipynb").read_text())["cells"][-1]["source"]
    assert "[t](../notebooks/instructor/90_tiny.md#x)" in source
    assert "(../notebooks/figures/a.png)" in source
    assert "[w](https://x.invalid) [h](#T)" in source


def test_wrong_names_are_one_sentence(tmp_path):
    course = make_course(tmp_path)
    with pytest.raises(ValueError, match="there is no lesson '07'; there are 90"):
        student.start("7", course=course)
    with pytest.raises(ValueError, match=r"letters, digits, - and _, not '\.\./x'"):
        student.start("90", again="../x", course=course)


def test_git_ignores_copies_and_builds():
    command = ["git", "check-ignore", "my/x", "build/x", ".venv/x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip(f"git cannot say: {done.stderr.strip()}")
    assert done.stdout.split() == ["my/x", "build/x", ".venv/x"]


def test_jupyterlab_is_for_this_machine_alone_and_keeps_its_token(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    command = student.lab_command()
    assert "--ServerApp.ip=127.0.0.1" in command
    assert not any("token" in word or "password" in word for word in command)
    assert "--no-browser" not in command
    assert "--no-browser" in student.lab_command(browser=False)
    monkeypatch.setenv("CI", "true")
    assert "--no-browser" in student.lab_command()
