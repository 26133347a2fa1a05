"""Fetching a package's archive through pip, from whatever index the user's pip is set up for.

The archive is downloaded, not installed, and its hash is pinned: ``pip download --no-deps --require-hashes``. A wheel
is only copied. For an sdist pip asks the package's build backend for its metadata, in an environment of its own,
which takes half a minute. Nothing is imported here. The Python version that the package asks for does not matter,
because only data files are taken from it.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from data_download.manifest import Archive, DataError

POLL_SECONDS = 0.2


def pip_download(archive: Archive, target: Path, stalled: float) -> str:
    """Fetch a package's archive to ``target``.

    Args:
        archive: with ``requirement``, ``kind`` and a sha256.
        target: where it goes; its name is the archive's.
        stalled: seconds without progress after which pip is stopped.

    Returns:
        In words, where it came from.

    Raises:
        DataError: if pip is missing or fails; the message has the last thing that pip said.
    """
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            f"{archive.requirement} is fetched through pip, which this Python does not have: run"
            f" `{sys.executable} -m ensurepip`, or name a --mirror that holds {archive.file}."
        )
    folder = target.parent / "pip"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tmp").mkdir(parents=True)
    wish = folder / "requirements.txt"
    wish.write_text(f"{archive.requirement} --hash={archive.digest}\n", encoding="utf-8")
    form = "--only-binary" if archive.kind == "wheel" else "--no-binary"
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--ignore-requires-python"),
        *("--disable-pip-version-check", "--no-input", "--progress-bar", "off"),
        *(form, ":all:", "--dest", str(folder), "--requirement", str(wish)),
    ]
    try:
        code, said = _run(command, folder, archive, stalled)
        fetched = folder / archive.file
        if code or not fetched.exists():
            raise DataError(
                f"pip could not fetch {archive.requirement}: {_last_line(said)} (Is the package index reachable? With"
                " --mirror FOLDER, or REGTEACH_MIRROR, none is needed.)"
            )
        os.replace(fetched, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return f"pip download {archive.requirement}"


def _run(command: list[str], folder: Path, archive: Archive, stalled: float) -> tuple[int, str]:
    """Run pip with a progress bar: its temporary files are in ``folder``, so their growth shows how far it is."""
    environment = os.environ | {"TMPDIR": str(folder / "tmp"), "TEMP": str(folder / "tmp")}
    log = folder / "pip.log"
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment) as process,
        tqdm(total=archive.size, unit="B", unit_scale=True, desc=f"fetch {archive.file}", disable=None) as bar,
    ):
        last, when = -1, time.monotonic()
        try:
            while process.poll() is None:
                size = _bytes_under(folder)
                if size != last:
                    last, when = size, time.monotonic()
                    bar.update(min(size, archive.size) - bar.n)
                elif time.monotonic() - when > stalled:
                    raise DataError(f"pip made no progress on {archive.requirement} for {stalled:g} s.")
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
    return process.returncode, log.read_text(encoding="utf-8", errors="replace")


def _bytes_under(folder: Path) -> int:
    """Bytes in the files under a folder; os.walk passes over folders that pip removes in the meantime."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(parent, name))
    return total


def _last_line(said: str) -> str:
    """The line of pip's output that says most: the last that begins with ERROR, else the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("ERROR: ")
