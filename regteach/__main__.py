"""`python -m regteach COMMAND`: sets the environment up where it is missing, then runs the command inside it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from regteach.bootstrap import (
    ROOT,
    SUPPORTED,
    SetupError,
    become,
    find_python,
    is_inside,
    is_ready,
    is_stamped,
    set_up,
    venv_python,
)

HANDED_OVER, DATA = "REGTEACH_HANDED_OVER", "REGTEACH_DATA"
USAGE = """usage: python -m regteach COMMAND [--help]

  course    execute every lesson, check its claims and build the site (build/site/index.html)
  lab       open JupyterLab on this machine
  start     make your own copy of a lesson: python -m regteach start 01
  register  register two NIfTI files: python -m regteach register MOVING FIXED --model NAME
  train     train a recipe
  evaluate  list the models, or measure one
  doctor    what is installed, what is missing, and what to do about it
  test      everything that must hold before a change is published

The first command sets up .venv beside pyproject.toml (Python 3.11 to 3.13 and a package index are all it needs)."""


def main(argv: list[str] | None = None) -> int:
    """Run a command, in this interpreter where it has the packages and in `.venv` where it has not.

    Args:
        argv: the command and its options; those of the process by default.

    Returns:
        The exit status.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path may hold letters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        return _main(argv)
    except SetupError as error:
        print(f"regteach: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nregteach: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `regteach doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"regteach: {what}. The course writes into {ROOT}; it must be yours to write to.", file=sys.stderr)
        return 1


def _main(argv: list[str]) -> int:
    if os.environ.get(DATA):  # the notebooks run in another folder: a relative path would lead elsewhere there
        os.environ[DATA] = str(Path(os.environ[DATA]).expanduser().absolute())
    test, venv = argv[:1] == ["test"], ROOT / ".venv"
    if is_ready(ROOT, test):
        os.environ.pop(HANDED_OVER, None)
        return _run_here(argv)
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    if argv[0] not in re.findall(r"^  ([a-z]+) ", USAGE, re.MULTILINE):
        print(f"regteach: there is no command {argv[0]!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    if sys.version_info[:2] not in SUPPORTED:
        python = find_python(venv)
        if python is not None:
            print("Python {}.{} is too old or too new; going on with {}".format(*sys.version_info[:2], python))
            return become(python, argv)
        if argv[0] != "doctor":
            version = "{}.{}".format(*sys.version_info[:2])
            raise SetupError(f"the course needs Python 3.11, 3.12 or 3.13; this is {version}, and PATH has no other")
    elif is_stamped(ROOT, test) and not is_inside(venv):
        return _hand_over(venv, argv)
    if argv[0] == "doctor":
        from regteach.course.doctor import main as doctor

        return doctor(argv[1:])
    if os.environ.get(HANDED_OVER):
        raise SetupError(f"{venv} was set up and is still not as the lock says; delete it and run this again")
    set_up(ROOT, test)
    return _run_here(argv) if is_inside(venv) else _hand_over(venv, argv)


def _run_here(argv: list[str]) -> int:
    from regteach.cli import main as command_line

    return command_line(argv)


def _hand_over(venv: Path, argv: list[str]) -> int:
    os.environ[HANDED_OVER] = "1"
    return become(str(venv_python(venv)), argv)


if __name__ == "__main__":
    sys.exit(main())
