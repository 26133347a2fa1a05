"""The command line: `regteach register | train | evaluate | course | test | lab | start | doctor`.

Each command is a dataclass read by tyro.
"""

import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

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


@dataclass(frozen=True)
class Register:
    """Register two images; what it finds maps points of the fixed image to points of the moving one."""

    moving: tyro.conf.Positional[Path]
    """NIfTI file of the image that is moved."""
    fixed: tyro.conf.Positional[Path]
    """NIfTI file of the image that stays."""
    model: str
    """Name of a model, or a .safetensors file; `regteach evaluate` lists the names."""
    out: Path = Path("registration")
    """Folder for warped.nii.gz, displacement.nii.gz (ITK and ANTs read it) and report.json."""
    refine: int | None = None
    """Steps of refinement on this pair instead of the recommended ones; 0 is one pass of the network."""
    labels: Path | None = None
    """Label map on the moving image's grid; it is warped by nearest voxel to warped_labels.nii.gz."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def __call__(self) -> int:
        """Run the command and return the exit status."""
        from regteach.registration import OUTPUTS, Registration, as_volume, register, writable
        from regteach.transforms import Identity

        # What can be refused is refused before the work: nothing is written then.
        writable(self.out)
        written = {(self.out / name).resolve() for name in OUTPUTS}
        for given in (self.moving, self.fixed, self.labels):
            if given is not None and given.resolve() in written:
                raise ValueError(f"{given} would be overwritten by its own result: choose another folder with --out.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # they come again as notes
            moving = as_volume(self.moving, "the moving image")
            labels = as_volume(self.labels, "the label map", labels=True) if self.labels else None
            if labels is not None and not bool(labels.data.any()):
                raise ValueError(f"The label map {self.labels} is empty: there is nothing to warp.")
            if labels is not None:  # a rehearsal, for one voxel, of what is done to them at the end
                first = moving.grid.cropped([0] * moving.grid.dim, [1] * moving.grid.dim)
                Registration(Identity(first.dim), replace(moving, grid=first), moving, {}).warp(labels, order=0)
            result = register(moving, self.fixed, self.model, self.refine, self.device)
            folder = result.save(self.out, labels)
        for note in result.report["notes"]:
            print(f"regteach: {note}", file=sys.stderr)
        similarity = result.report["similarity"]
        print(
            f"{folder}: correlation {similarity['before']:.3f} before, {similarity['after']:.3f} after; "
            f"{result.report['folding_percent']:.2f} % folded; {result.report['seconds']:.1f} s; start: "
            f"{result.report['start']}. {result.report['use']}"
        )
        return 0


@dataclass(frozen=True)
class Train:
    """Train a recipe; a run in the same folder that was interrupted goes on."""

    recipe: tyro.conf.Positional[str]
    """Its name: istn-trees-affine-implicit."""
    out: Path | None = None
    """Folder of the run; runs/RECIPE where left out."""
    steps: int | None = None
    """Steps instead of the recipe's."""
    seed: int | None = None
    """Seed instead of the recipe's."""
    batch: int | None = None
    """Pairs of one step instead of the recipe's, over all processes: at least one for each."""
    accumulate: int | None = None
    """Parts in which such a batch is computed, one after the other: less memory, the same gradient."""
    precision: Literal["no", "bf16"] | None = None
    """Instead of the recipe's: no for float32, bf16 for mixed precision."""

    def __call__(self) -> int:
        """Run the command and return the exit status."""
        from regteach import recipes, runs
        from regteach.registration import writable

        given = {name: getattr(self, name) for name in ("steps", "seed", "batch", "accumulate", "precision")}
        recipe = recipes.find_recipe(self.recipe, **{key: v for key, v in given.items() if v is not None})
        folder = writable(self.out or Path("runs") / recipe.name)
        runs.run(recipe, folder, lambda record: print(runs.line(record), flush=True))
        print(folder / f"{recipe.name}.safetensors")
        return 0


@dataclass(frozen=True)
class Evaluate:
    """Measure a model on the test people of the data it was trained for; without a name, list the models."""

    model: tyro.conf.Positional[str] = ""
    """Name of a model, or a .safetensors file."""
    pairs: int = 50
    """How many pairs, seed 0."""
    refine: int | None = None
    """Steps of refinement instead of the recommended ones; 0 is one pass alone."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def __call__(self) -> int:
        """Run the command and return the exit status."""
        from regteach import checkpoints, runs

        if not self.model:
            print("\n".join(checkpoints.available()) or "No weights ship with this version.")
            return 0
        model = checkpoints.load(self.model, self.device)
        for name, figures in runs.evaluate(model, self.pairs, self.refine).items():
            print(f"{name:10s} " + "  ".join(f"{key} {value:.3f}" for key, value in figures.items()))
        return 0


def _named(kind: Any, name: str) -> Any:
    return Annotated[kind, tyro.conf.subcommand(name)]


COMMANDS = (
    _named(Register, "register")
    | _named(Train, "train")
    | _named(Evaluate, "evaluate")
    | _named(Course, "course")
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
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"regteach: {error}", file=sys.stderr)
        return 2
