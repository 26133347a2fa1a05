"""From nothing to a running command, on a project whose one package is made here: no index, no network."""

import ast
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

from regteach import bootstrap

STAGE = ("__init__.py", "__main__.py", "bootstrap.py")
BASE = getattr(sys, "_base_executable", sys.executable)

PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "regteach"
version = "0.1.0"
requires-python = ">=3.11,<3.14"
dependencies = ["tiny>=1"]
optional-dependencies.test = ["tool"]
"""

# The smallest backend that can make an editable install.
BACKEND = """
import os
import zipfile

INFO = "regteach-0.1.0.dist-info"

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "regteach-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as wheel:
        wheel.writestr("regteach.pth", os.getcwd())
        wheel.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\\nName: regteach\\nVersion: 0.1.0\\n")
        wheel.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{INFO}/RECORD", "")
    return name
"""

CLI = """
import sys, tiny

def main(argv):
    print("ran", *argv, "with tiny", tiny.VERSION, "in", sys.prefix)
    return 7 if "fail" in argv else 0
"""


def wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}/__init__.py", f"from {name}.inner import VERSION")
        file.writestr(f"{name}/inner.py", f"VERSION = {version!r}")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "a project"
    (root / "regteach").mkdir(parents=True)
    for name in STAGE:
        shutil.copy(bootstrap.ROOT / "regteach" / name, root / "regteach")
    (root / "regteach" / "cli.py").write_text(CLI)
    (root / "pyproject.toml").write_text(PROJECT)
    (root / "backend.py").write_text(BACKEND)
    (root / "requirements.lock").write_text("tiny==1.0\n")
    (root / "requirements-test.lock").write_text("-r requirements.lock\ntool==1.0\n")
    for name, version in (("tiny", "1.0"), ("tiny", "2.0"), ("tool", "1.0")):
        wheel(tmp_path / "wheels", name, version)
    return root


def environment(project: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON", "VIRTUAL_ENV"))}
    wheels = project.parent / "wheels"
    return {**kept, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels.as_uri(), "PIP_CONFIG_FILE": os.devnull, **more}


def regteach(project: Path, *argv: str, python: str = BASE, **more: str) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "regteach", *argv]
    return subprocess.run(
        command, cwd=project, env=environment(project, **more), capture_output=True, text=True, timeout=120
    )


def test_a_fresh_checkout_is_set_up_once(project: Path):
    first = regteach(project, "course", "--all")
    assert first.returncode == 0, first.stderr
    assert f"ran course --all with tiny 1.0 in {project / '.venv'}" in first.stdout
    begin = time.perf_counter()
    second = regteach(project, "course", "fail")
    assert second.returncode == 7
    assert second.stdout == f"ran course fail with tiny 1.0 in {project / '.venv'}\n"
    assert time.perf_counter() - begin < 30  # no installing again
    with_tools = regteach(project, "test")
    assert "Installing requirements-test.lock" in with_tools.stdout
    assert "Installing" not in regteach(project, "course").stdout
    (project / "requirements.lock").write_text("tiny==2.0\n")
    inside = str(bootstrap.venv_python(project / ".venv"))
    assert "ran course with tiny 2.0" in regteach(project, "course", python=inside).stdout


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL and process groups are POSIX")
def test_a_set_up_that_is_killed_at_any_moment_is_repaired_by_the_next_run(project: Path):
    command = [BASE, "-m", "regteach", "course"]
    for delay in (0.2, 1.2, 2.4):
        process = subprocess.Popen(
            command, cwd=project, env=environment(project), start_new_session=True, stdout=subprocess.DEVNULL
        )
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = regteach(project, "course")
    assert done.returncode == 0, done.stderr
    assert "ran course with tiny 1.0" in done.stdout


def test_a_half_unpacked_package_does_not_survive(project: Path):
    """pip takes a package whose metadata are there for installed, whatever is missing of it."""
    regteach(project, "course")
    venv = project / ".venv"
    next(venv.rglob("tiny/inner.py")).unlink()
    (venv / bootstrap.MARK).touch()
    (project / "requirements.lock").write_text("tiny==1.0 # as before\n")
    for python in (BASE, str(bootstrap.venv_python(venv))):
        done = regteach(project, "course", python=python)
        assert "ran course with tiny 1.0" in done.stdout, done.stderr


def test_two_set_ups_at_once_do_the_work_once(project: Path):
    command = [BASE, "-m", "regteach", "course"]
    options = {"cwd": project, "env": environment(project), "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **options) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert all("ran course with tiny 1.0" in words for words in said)
    assert sum("Installing" in words for words in said) == 1


def test_a_folder_that_is_no_environment_is_left_alone(project: Path):
    (project / ".venv").mkdir()
    (project / ".venv" / "thesis.txt").write_text("years of work")
    done = regteach(project, "course")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "move it away" in done.stderr
    assert [path.name for path in (project / ".venv").iterdir()] == ["thesis.txt"]


def test_a_package_that_cannot_be_had_is_one_sentence(project: Path):
    (project / "requirements.lock").write_text("tiny==3.0\n")
    done = regteach(project, "course")
    assert done.returncode == 1
    assert "regteach: pip could not install requirements.lock (exit status 1" in done.stderr
    assert (project / ".venv" / bootstrap.MARK).exists()


def test_help_and_no_command_install_nothing(project: Path):
    for argv in ([], ["--help"], ["course", "-h"]):
        done = regteach(project, *argv)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: python -m regteach COMMAND")
    assert not (project / ".venv").exists()


PRETEND = "import sys; sys.version_info = (3, 9, 1); from regteach.__main__ import main; sys.exit(main(['course']))"


def pretend_old(project: Path, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BASE, "-c", PRETEND], cwd=project, env=environment(project, PATH=path), capture_output=True, text=True
    )


def test_an_old_python_alone_gets_one_sentence(project: Path):
    done = pretend_old(project, path="")
    assert done.returncode == 1
    assert done.stderr == ("regteach: the course needs Python 3.11, 3.12 or 3.13; this is 3.9, and PATH has no other\n")


@pytest.mark.skipif(os.name == "nt", reason="the shims are shell scripts")
def test_an_old_python_goes_on_with_a_supported_one_on_path_and_passes_over_broken_shims(project: Path):
    shims = project.parent / "shims"
    shims.mkdir()
    for name, script in (("python3.13", "#!/bin/sh\nexit 127\n"), ("python3.12", f'#!/bin/sh\nexec "{BASE}" "$@"\n')):
        (shims / name).write_text(script)
        (shims / name).chmod(0o755)
    done = pretend_old(project, path=f"{shims}{os.pathsep}/bin{os.pathsep}/usr/bin")
    assert f"too old or too new; going on with {shims / 'python3.12'}" in done.stdout
    assert "ran course with tiny 1.0" in done.stdout, done.stderr


@pytest.mark.parametrize("name", STAGE)
def test_what_runs_first_parses_on_an_old_python(name: str):
    source = (bootstrap.ROOT / "regteach" / name).read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 7))


def test_importing_the_package_needs_the_standard_library_only():
    """-S leaves site-packages out, so that anything else would fail to import."""
    code = "import regteach, regteach.__main__, regteach.bootstrap, regteach.course.doctor"
    done = subprocess.run([BASE, "-S", "-c", code], cwd=bootstrap.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_interpreter_with_the_direct_packages_is_ready_though_others_differ(project: Path, monkeypatch):
    """A conda environment has the packages that pyproject names at the lock's versions; what they need may differ."""
    installed = {"tiny": "1.0+cpu", "deep": "9"}
    monkeypatch.setattr("importlib.metadata.version", installed.__getitem__)
    (project / "requirements.lock").write_text("tiny==1.0\ndeep==1\n")
    assert bootstrap.is_ready(project, test=False)
    installed["tiny"] = "1.1"
    assert bootstrap.lacking(project, test=False) == ["tiny is 1.1, not 1.0"]


def test_pins_read_markers_and_includes(tmp_path: Path):
    lock = """
    # a comment
    Some_Thing.x==1.0
    here==1 ; sys_platform == "{here}"   # said why
    elsewhere==1 ; sys_platform != "{here}"
    this==2 ; python_version == "{version}"
    """.format(here=sys.platform, version="{}.{}".format(*sys.version_info[:2]))
    (tmp_path / "a.lock").write_text(textwrap.dedent(lock))
    (tmp_path / "b.lock").write_text("-r a.lock\nlast==3.0.post1\n")
    found = bootstrap.pins(tmp_path / "b.lock")
    assert found == {"some-thing-x": "1.0", "here": "1", "this": "2", "last": "3.0.post1"}
    (tmp_path / "a.lock").write_text("torch>=2\n")
    with pytest.raises(bootstrap.SetupError, match=r"a\.lock has a line that is not name==version.*: torch>=2"):
        bootstrap.pins(tmp_path / "a.lock")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_make_calls_the_same_commands():
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARGS", "PYTHON")  # `make test` runs this test
    clean = {name: value for name, value in os.environ.items() if name not in outer}
    for command in ("course", "test", "lab", "doctor"):
        line = ["make", "-n", command, "ARGS=--all"]
        done = subprocess.run(line, cwd=bootstrap.ROOT, env=clean, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"python3 -m regteach {command} --all"


def test_a_command_that_does_not_exist_installs_nothing(project: Path):
    done = regteach(project, "cuorse")
    assert done.returncode == 2
    assert "there is no command 'cuorse'" in done.stderr
    assert not (project / ".venv").exists()
