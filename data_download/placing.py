"""Putting a finished folder in its place, so that an interruption at any moment leaves the old state or the new.

For each entry there is a work folder, ``ROOT/.downloads/<folder>/``, on the same disk as its destination:

- ``lock``: held through the operating system (flock, or msvcrt on Windows) while a fetch runs. The system drops it
  when the process ends, however it ends, so there is no stale lock to clean up.
- ``FILE.part``, ``FILE``: an archive on its way, an archive that is complete.
- ``new/``: the folder as it will be; ``old/``: the folder that it replaces, during the two renames of :func:`swap`.

A crash between those two renames leaves ``old/`` and no folder; :func:`recover` puts it back.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from data_download.manifest import DataError, Entry

if os.name == "nt":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]

else:
    import fcntl

    def _try_lock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


WORK = ".downloads"
RECEIPT = ".receipt.json"  # in the entry's folder: where its files came from, and their sha256
POLL_SECONDS = 0.1


def work_folder(entry: Entry, root: Path) -> Path:
    """Where the entry's downloads and half-finished folders live."""
    return root / WORK / entry.folder


@contextmanager
def locked(folder: Path, wait: float | None = None, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a work folder's lock.

    Args:
        folder: the work folder; it is made where it does not exist.
        wait: seconds to wait for another process; None waits until it is done.
        waiting: called once if another process holds the lock.

    Raises:
        TimeoutError: if another process still holds it after ``wait`` seconds.
        DataError: if the folder can not be written, or its disk can not lock files.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("ab")
    except OSError as error:
        raise DataError(f"{folder} can not be written ({error.strerror}): name another --root.") from None
    with file:
        start = time.monotonic()
        while not _acquired(file, folder):
            if wait is not None and time.monotonic() - start >= wait:
                raise TimeoutError(f"Another process holds {folder / 'lock'}.")
            if waiting is not None:
                waiting()
                waiting = None
            time.sleep(POLL_SECONDS)
        yield  # closing the file gives the lock back


def _acquired(file: IO[bytes], folder: Path) -> bool:
    try:
        _try_lock(file)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise DataError(
            f"The disk of {folder} can not lock files ({error.strerror}): name a --root on a local disk."
        ) from None
    return True


def swap(new: Path, folder: Path, old: Path) -> None:
    """Put ``new`` in the place of ``folder``, under the lock; what was there goes to ``old`` and then away.

    Where nothing was there before, this is one rename. A folder that is replaced takes two, and
    :func:`recover` undoes the first if the second never came.

    Raises:
        DataError: if ``folder`` holds files that ``new`` does not have: they are somebody's work.
    """
    if folder.exists():
        strangers = [path for path in _files(folder) if not (new / path).exists()]
        if strangers:
            raise DataError(
                f"{folder} holds {len(strangers)} file(s) that the download does not have, such as"
                f" {strangers[0].as_posix()}: move them away first."
            )
        os.replace(folder, old)
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path, work: Path) -> None:
    """Undo or finish what an interrupted fetch left, under the lock: afterwards there is no ``old`` and no ``new``."""
    old, new = work / "old", work / "new"
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    for leftover in (old, new):
        if leftover.exists():
            shutil.rmtree(leftover)


def recover_if_free(folder: Path, work: Path, wait: float = 2.0) -> None:
    """For readers: put a folder back that a crashed replacement took away, unless a live process is at work."""
    if folder.exists() or not (work / "old").exists():
        return
    try:
        with locked(work, wait):
            recover(folder, work)
    except (TimeoutError, DataError):
        return  # the process that holds the lock will finish, or the disk is read-only: the reader sees what is there


def _files(folder: Path) -> list[Path]:
    """Files under a folder, relative to it, our own receipt left out."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != RECEIPT)
