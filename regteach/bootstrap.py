"""From nothing but Python to a running command: the environment is made where it is missing, then used.

Standard library only, because it runs before any package is installed; it also has to parse on a Python too old
for the course, to say so. The rules:

- An interpreter that has the packages of pyproject.toml at the versions of requirements.lock is used as it is
  (a conda environment made from environment.yml, for one).
- Otherwise `.venv` beside pyproject.toml is used. A stamp in it holds a digest of the lock; while the stamp agrees,
  nothing is installed, so the second run starts at once.
- A mark stands in `.venv` from before the first change until the stamp is written. Whoever finds the mark knows that
  a set-up was cut short, and builds the environment anew: pip cannot tell a half-unpacked package from a whole one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SUPPORTED = ((3, 11), (3, 12), (3, 13))
ROOT = Path(__file__).resolve().parent.parent
LOCK, TEST_LOCK = "requirements.lock", "requirements-test.lock"
STAMP, MARK = "regteach-stamp.json", "regteach-unfinished"


class SetupError(Exception):
    """The environment cannot be made; the message is one sentence for the person at the keyboard."""


# What is there ------------------------------------------------------------------------------------------------------


def pins(lock: Path) -> dict[str, str]:
    """The packages a lock wants on this platform.

    Args:
        lock: a requirements file of `name==version` lines, each with at most one marker, and `-r` lines.

    Returns:
        Version by normalised name.
    """
    here = {"sys_platform": sys.platform, "python_version": "{}.{}".format(*sys.version_info[:2])}
    found: dict[str, str] = {}
    for line in lock.read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            found.update(pins(lock.parent / line[3:].strip()))
        elif line:
            match = re.fullmatch(r'([\w.-]+)==([\w.!+]+)(?:\s*;\s*(\w+)\s*(==|!=)\s*"([^"]*)")?', line)
            if match is None:
                raise SetupError(f"{lock.name} has a line that is not name==version with at most one marker: {line}")
            name, version, variable, operator, value = match.groups()
            if variable is None or (here[variable] == value) == (operator == "=="):
                found[normalised(name)] = version
    return found


def normalised(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def direct(root: Path, test: bool) -> list[str]:
    """The packages that pyproject.toml names itself, normalised; with the test tools when `test`."""
    project = _project(root)
    wanted = project["dependencies"] + (project["optional-dependencies"]["test"] if test else [])
    return [normalised(re.match(r"[\w.-]+", line).group()) for line in wanted]  # type: ignore[union-attr]


def _project(root: Path) -> dict:
    import tomllib  # from 3.11 on; older versions never come here

    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lacking(root: Path, test: bool) -> list[str]:
    """What this interpreter lacks of the packages named in pyproject.toml, at the lock's versions, in words."""
    from importlib import metadata

    wanted, words = pins(root / (TEST_LOCK if test else LOCK)), []
    for name in direct(root, test):
        try:
            version = metadata.version(name).split("+")[0]  # 2.13.0+cpu is 2.13.0
        except metadata.PackageNotFoundError:
            words.append(f"{name} {wanted[name]} is not installed")
        else:
            if version != wanted[name]:
                words.append(f"{name} is {version}, not {wanted[name]}")
    return words


def digest(root: Path, test: bool) -> str:
    """What the stamp must hold: it changes with the locks, with pyproject's [project] table and with the folder."""
    parts = [str(root.resolve()), json.dumps(_project(root), sort_keys=True)]
    parts += [(root / name).read_text(encoding="utf-8") for name in ([LOCK, TEST_LOCK] if test else [LOCK])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def is_ready(root: Path, test: bool) -> bool:
    """Whether the running interpreter can run the course (with `test`, its tests)."""
    if not (root / LOCK).exists():  # installed as an ordinary package: there is no course here to set up
        return True
    if sys.version_info[:2] not in SUPPORTED:
        return False
    return is_stamped(root, test) if is_inside(root / ".venv") else not lacking(root, test)


def is_stamped(root: Path, test: bool) -> bool:
    """Whether `.venv` was set up for this lock, to the end."""
    venv = root / ".venv"
    if not venv_python(venv).exists() or (venv / MARK).exists() or not (venv / STAMP).exists():
        return False
    stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    return stamp.get("test" if test else "course") == digest(root, test)


def venv_python(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_inside(venv: Path) -> bool:
    """Whether the running interpreter is that of a virtual environment."""
    return Path(sys.prefix).resolve() == venv.resolve()


def find_python(venv: Path) -> str | None:
    """A supported Python other than this one: that of `.venv`, else the first on PATH that starts and says so."""
    names = ["python{}.{}".format(*version) for version in reversed(SUPPORTED)]
    for name in [str(venv_python(venv)), *names, "python3", "python"]:
        path = shutil.which(name)
        if path and _version(path) in SUPPORTED:
            return path
    return None


def _version(python: str) -> tuple[int, int] | None:
    ask = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", ask], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
        major, minor = done.stdout.split()
    except (OSError, ValueError, subprocess.TimeoutExpired):  # a shim without a Python behind it, for one
        return None
    return int(major), int(minor)


# Making it ----------------------------------------------------------------------------------------------------------


def set_up(root: Path, test: bool) -> Path:
    """Make or mend `.venv` and install the locked packages and this repository into it.

    Args:
        root: the repository's folder.
        test: install the test tools too.

    Returns:
        The environment's interpreter.
    """
    venv, lock = root / ".venv", TEST_LOCK if test else LOCK
    python = venv_python(venv)
    if is_inside(venv) and (venv / MARK).exists():  # the branch on which we sit is the one to be replaced
        base = getattr(sys, "_base_executable", sys.executable)
        if os.name == "posix" and base != sys.executable:
            become(base, sys.argv[1:])
        raise SetupError(f"an earlier set-up was cut short: delete {venv} and run this again with another Python")
    with alone(root / "build" / "setup.lock", "set-up"):
        if is_stamped(root, test):  # another set-up finished while this one waited
            return python
        _prepare(venv)
        (venv / MARK).touch()
        print(f"Installing {lock} into {venv}: some minutes, once.", flush=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
        pip += [] if sys.stdout.isatty() else ["--quiet"]
        _call([*pip, "-r", str(root / lock)], root, f"pip could not install {lock}")
        here = ["--no-deps", "--no-build-isolation", "--editable", str(root)]
        _call([*pip, *here], root, "pip could not install this repository", quiet=True)
        stamp = {"course": digest(root, False)}
        if test:
            stamp["test"] = digest(root, True)
        _replace(venv / STAMP, json.dumps(stamp))
        (venv / MARK).unlink()
    return python


def _prepare(venv: Path) -> None:
    """Leave an environment with a working pip; anything half-made is cleared first, the mark standing meanwhile."""
    mark, started = venv / MARK, venv_python(venv)
    if venv.exists() and not mark.exists() and any(venv.iterdir()):
        if _has_pip(started):
            return
        if not (venv / STAMP).exists():
            raise SetupError(f"{venv} is not a virtual environment with pip: move it away and run this again")
    venv.mkdir(exist_ok=True)
    mark.touch()
    for path in venv.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != mark:
            path.unlink()
    print(f"Making {venv} with {sys.executable}", flush=True)
    trouble = "Python could not make a virtual environment (on Debian install python3-venv)"
    _call([sys.executable, "-m", "venv", str(venv)], venv.parent, trouble)


def _has_pip(python: Path) -> bool:
    if not python.exists():
        return False
    ask = f"import sys, pip._internal; sys.exit(sys.version_info[:2] not in {SUPPORTED})"
    return subprocess.call([str(python), "-c", ask], stderr=subprocess.DEVNULL) == 0


def _call(command: list[str], folder: Path, trouble: str, quiet: bool = False) -> None:
    drop = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PYTHONHOME", "__PYVENV_LAUNCHER__")
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    stream = subprocess.PIPE if quiet else None
    options = {"stdout": stream, "stderr": subprocess.STDOUT if quiet else None, "close_fds": os.name == "nt"}
    done = subprocess.run(command, cwd=str(folder), env=environment, **options)  # type: ignore[call-overload]
    if done.returncode:
        if done.stdout:
            print(done.stdout.decode(errors="replace"), flush=True)
        raise SetupError(f"{trouble} (exit status {done.returncode}; its own words stand above)")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(str(partial), str(path))


@contextlib.contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file, waiting for it where need be.

    The system lets go of it when its last holder dies. The pip that is started inherits it, so that a pip that outlives
    a killed parent still keeps others out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        os.set_inheritable(file.fileno(), True)
        if not _lock(file.fileno()):
            print(f"Another {what} is under way; waiting for it.", flush=True)
            while not _lock(file.fileno()):
                time.sleep(0.5)
        yield


def _lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def become(python: str, argv: list[str]) -> int:
    """Go on as another interpreter; on POSIX this process becomes it, so that signals reach it."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from regteach.__main__ import main; sys.exit(main())"
    command = [python, "-c", start, *argv]
    sys.stdout.flush()
    if os.name == "posix":
        os.execv(python, command)
    return subprocess.call(command)
