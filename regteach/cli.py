"""The command line: `regteach course | test | lab | start | doctor`, each command a dataclass read by tyro."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclass(frozen=True)
class Course:
    """Execute every lesson, check its claims and build the site."""

    all: bool = False
    """Execute what has not changed, too."""
    full: bool = False
    """The full-length course instead of the fast one."""
    jobs: int = 2
    """How many lessons at a time."""
    only: tuple[str, ...] = ()
    """Only these lessons, by number: --only 01 03."""

    def __call__(self) -> int:
        """Run the command and return the exit status."""
        from regteach.course import commands

        return commands.course(self.only, full=self.full, force=self.all, jobs=self.jobs)


@dataclass(frozen=True)
class Test:
    """Everything that must hold before a change is published; ends with a table of the stages."""

    all: bool = False
    """Execute notebooks that have not changed, too."""
    only: tuple[str, ...] = ()
    """Only these stages, by name."""
    jobs: int = 2
    """How many tests or notebooks at a time."""

    def __call__(self) -> int:
        """Run the command and return the exit status."""
        from regteach.course import commands, testing

        return commands.fetch_data() or testing.main(self.only, force=self.all, jobs=self.jobs)


@dataclass(frozen=True)
class Lab:
    """Open JupyterLab on this machine, for this machine only, behind a token."""

    browser: bool = True
    """Open a browser window."""
    port: int = 8888
    """The port; the next free one where it is taken."""

    def __call__(self) -> int:
        """Run the command and return the exit status."""
        from regteach.course import commands, student

        if commands.fetch_data():
            print("Lessons that need the missing data will say so.", file=sys.stderr)
        return student.lab(browser=self.browser, port=self.port)


@dataclass(frozen=True)
class Start:
    """Make your own copy of a lesson, in a folder that git ignores."""

    lesson: tyro.conf.Positional[str]
    """Its number: 01."""
    to: Path = Path("my")
    """The folder for the copy, counted from the repository."""
    again: str = ""
    """Make another copy under this name."""

    def __call__(self) -> int:
        """Run the command and return the exit status."""
        from regteach.course import student

        print(student.start(self.lesson, to=self.to, again=self.again))
        return 0


@dataclass(frozen=True)
class Doctor:
    """Say what is installed, which device, how much memory, what data is present, and what to do about the rest."""

    def __call__(self) -> int:
        """Run the command and return the exit status."""
        from regteach.course import doctor

        return doctor.main([])


def _named(kind: Any, name: str) -> Any:
    return Annotated[kind, tyro.conf.subcommand(name)]


COMMANDS = (
    _named(Course, "course")
    | _named(Test, "test")
    | _named(Lab, "lab")
    | _named(Start, "start")
    | _named(Doctor, "doctor")
)


def main(argv: list[str]) -> int:
    """Read a command line and run it.

    Args:
        argv: the command and its options.

    Returns:
        The exit status.
    """
    command = tyro.cli(COMMANDS, prog="regteach", args=argv, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    try:
        return command()
    except ValueError as error:
        print(f"regteach: {error}", file=sys.stderr)
        return 2
