"""What a student starts from: an own copy of a lesson, and JupyterLab on this machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from regteach.bootstrap import ROOT
from regteach.course.layout import Course

LAB_CONFIG = Path(__file__).parent / "lab"
_LINK = re.compile(r"(\]\(|src=\")([^)\s\"#]+)")


def start(lesson: str, to: Path = Path("my"), again: str = "", course: Course | None = None) -> str:
    """Copy a lesson for a student to work in; a copy that exists is never touched.

    Relative links and pictures in the copy lead to the same files as in the original.

    Args:
        lesson: its number, "01"; "1" will do.
        to: the folder, counted from the repository. `my` is ignored by git, so pulling never conflicts.
        again: makes another copy, with this name added.
        course: where the lessons are; this repository by default.

    Returns:
        A sentence with the copy's path.

    Raises:
        ValueError: no such lesson, or a name that cannot be part of a file's name.
    """
    course = course or Course()
    if again and not re.fullmatch(r"[\w-]+", again):
        raise ValueError(f"a copy's name is made of letters, digits, - and _, not {again!r}")
    if not re.fullmatch(r"\d{1,2}", lesson):
        raise ValueError(f"a lesson is named by its number, such as 01, not {lesson!r}")
    (file,) = course.files(only=(lesson.zfill(2),))
    folder = course.root / to
    copy = folder / f"{file.name}{'_' + again if again else ''}.ipynb"
    folder.mkdir(parents=True, exist_ok=True)
    notebook = json.loads(file.path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            source = "".join(cell["source"])
            cell["source"] = _LINK.sub(lambda m: m[1] + _moved(m[2], file.path.parent, folder), source)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    try:
        with copy.open("x", encoding="utf-8", newline="\n") as out:
            out.write(text)
    except FileExistsError:
        return f"Your copy is there already, as you left it: {copy}\n--again NAME makes another."
    return f"Your copy: {copy}\nOpen it with: python -m regteach lab"


def _moved(target: str, source: Path, folder: Path) -> str:
    path = source / target
    if re.match(r"[a-z]+:", target) or not path.exists():
        return target
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def lab_command(browser: bool = True, port: int = 8888, root: Path = ROOT) -> list[str]:
    """The command that serves JupyterLab to this machine alone.

    Jupyter makes a token for each start. It is run with `lab_environment`.

    Args:
        browser: open a browser window.
        port: the port; the next free one where it is taken.
        root: the folder it shows.
    """
    command = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    command += [f"--ServerApp.root_dir={root}", "--ServerApp.allow_remote_access=False"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # in a container, for one; the token still stands
        command.append("--allow-root")
    return command if browser and not os.environ.get("CI") else [*command, "--no-browser"]


def lab_environment() -> dict[str, str]:
    """The environment of JupyterLab: as here, and nobody asks for news or updates from other hosts."""
    before = os.environ.get("JUPYTER_CONFIG_PATH")
    return {**os.environ, "JUPYTER_CONFIG_PATH": os.pathsep.join([str(LAB_CONFIG), *([before] if before else [])])}


def lab(browser: bool = True, port: int = 8888) -> int:
    """Serve JupyterLab until it is stopped with Ctrl-C.

    Returns:
        The exit status of JupyterLab.
    """
    command = lab_command(browser, port)
    if os.name == "posix":
        os.execve(command[0], command, lab_environment())
    return subprocess.call(command, env=lab_environment())
