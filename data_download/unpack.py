"""Unpacking an archive into a new folder, member by member, trusting nothing that it says about itself.

The standard library's ``extractall`` is not used. Every member is looked at before its bytes are: only plain files
and folders pass, with names that stay inside the folder on every system (no ``..``, no leading slash, no drive
letter, no backslash), no name twice, and together no more bytes than the manifest allows, counted while they are
written and not as the archive states them. The target is a temporary folder: when a member is refused, nothing has
been placed.
"""

import gzip
import hashlib
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, cast

from tqdm import tqdm

from data_download.manifest import Archive, DataError

CHUNK = 1 << 20
MAX_FILES = 100_000
SLACK = 1 << 20  # bytes
DRIVE = re.compile(r"[A-Za-z]:")
BROKEN = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)


@dataclass(frozen=True)
class Item:
    """A plain file inside an archive: where it goes under the folder, and a way to read it."""

    place: PurePosixPath
    stream: IO[bytes]


def unpack(path: Path, archive: Archive, target: Path, allowed: int) -> dict[str, str]:
    """Unpack ``path`` into the folder ``target``.

    Args:
        path: the file that was fetched; its own hash has been checked where one is known.
        archive: what the manifest says of it.
        target: a temporary folder, which exists.
        allowed: bytes that it may unpack to, as the manifest states them; twice as much and 1 MiB are let through.

    Returns:
        sha256 of each file by its path in ``target``.

    Raises:
        DataError: if the archive is broken, holds something it must not hold, or lacks a member.
    """
    written = 0
    files: dict[str, str] = {}
    try:
        with (
            tqdm(total=allowed, unit="B", unit_scale=True, desc=f"unpack {path.name}", disable=None) as bar,
            closing(_items(path, archive, allowed)) as items,
        ):
            for item in items:
                if len(files) >= MAX_FILES:
                    raise DataError(f"{path.name} was refused: it holds more than {MAX_FILES:,} files.")
                digest = hashlib.sha256()
                with _create(target, item.place, path.name) as out:
                    while chunk := item.stream.read(CHUNK):
                        written += len(chunk)
                        if written > _limit(allowed):
                            raise _too_large(path, allowed)
                        out.write(chunk)
                        digest.update(chunk)
                        bar.update(len(chunk))
                files[item.place.as_posix()] = digest.hexdigest()
    except DataError:
        raise
    except BROKEN as error:  # RuntimeError: encrypted, or packed in a way that this Python does not know
        raise DataError(f"{path.name} is not a whole {archive.unpack} archive ({error}).") from None
    _check_members(archive, files)
    return files


def place_as_is(path: Path, archive: Archive, target: Path) -> dict[str, str]:
    """Copy a file that is not an archive into ``target``, under the name that the manifest gives it."""
    with path.open("rb") as source, _create(target, PurePosixPath(archive.to), path.name) as out:
        digest = hashlib.sha256()
        while chunk := source.read(CHUNK):
            out.write(chunk)
            digest.update(chunk)
    return {archive.to: digest.hexdigest()}


def safe_name(name: str, archive_name: str) -> PurePosixPath:
    """A member's name, if it stays inside the folder on every system.

    Raises:
        DataError: if it does not.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or DRIVE.match(name):
        raise DataError(f"{archive_name} was refused: its member {name!r} would climb out of the folder.")
    return PurePosixPath(*parts)


def _items(path: Path, archive: Archive, allowed: int) -> Generator[Item]:
    """The chosen plain files of an archive, in its order; anything else but a folder is refused."""
    if archive.unpack == "zip":
        return _zip_items(path, archive, allowed)
    if archive.unpack == "tar":
        return _tar_items(path, archive, allowed)
    return _gz_items(path, archive)


def _zip_items(path: Path, archive: Archive, allowed: int) -> Generator[Item]:
    with zipfile.ZipFile(path) as file:
        chosen = []
        for info in file.infolist():
            if not _named(info.filename, archive):
                continue
            name = safe_name(info.filename, path.name)
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _not_plain(path, info.filename)
            place = None if info.is_dir() else _chosen(name, archive)
            if place is not None:
                chosen.append((info, place))
        if sum(info.file_size for info, _ in chosen) > _limit(allowed):
            raise _too_large(path, allowed)
        for info, place in chosen:
            with file.open(info) as stream:
                yield Item(place, stream)


def _tar_items(path: Path, archive: Archive, allowed: int) -> Generator[Item]:
    stated = 0
    with tarfile.open(path, "r:*") as file:
        for info in file:
            if not _named(info.name, archive):
                continue
            name = safe_name(info.name, path.name)
            if not (info.isreg() or info.isdir()):
                raise _not_plain(path, info.name)
            place = _chosen(name, archive) if info.isreg() else None
            stream = file.extractfile(info)
            if place is None or stream is None:
                continue
            stated += info.size
            if stated > _limit(allowed):
                raise _too_large(path, allowed)
            with stream:
                yield Item(place, stream)


def _gz_items(path: Path, archive: Archive) -> Generator[Item]:
    with gzip.open(path) as stream:
        yield Item(safe_name(archive.to, path.name), cast(IO[bytes], stream))


def _limit(allowed: int) -> int:
    """Bytes that are let through where the manifest states ``allowed``: it may be rounded, not off by a factor."""
    return 2 * allowed + SLACK


def _named(name: str, archive: Archive) -> bool:
    """Where only named members are taken, the rest of the (hashed) archive is not looked at."""
    return not archive.members or any(member.path == name for member in archive.members)


def _chosen(name: PurePosixPath, archive: Archive) -> PurePosixPath | None:
    """The name that a member gets in the folder, or None where it is left out."""
    if archive.members:
        return next(PurePosixPath(m.to) for m in archive.members if m.path == name.as_posix())
    parts = name.parts[archive.strip :]
    if not parts or parts[-1].startswith("._"):  # "._name" are notes that macOS puts into archives
        return None
    inner = PurePosixPath(*parts)
    if archive.keep and not any(fnmatchcase(inner.as_posix(), pattern) for pattern in archive.keep):
        return None
    return PurePosixPath(inner.name) if archive.flat else inner


def _create(target: Path, name: PurePosixPath, archive_name: str) -> IO[bytes]:
    """A new file under ``target``; a name that is taken already is refused."""
    place = target / name
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        return place.open("xb")
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{archive_name} was refused: it holds {name.as_posix()!r} twice.") from None


def _check_members(archive: Archive, files: dict[str, str]) -> None:
    for member in archive.members:
        if member.to not in files:
            raise DataError(f"{archive.file} does not hold {member.path}.")
        if files[member.to] != member.sha256:
            raise DataError(f"{member.path} in {archive.file} is not the file that the manifest describes.")


def _not_plain(path: Path, name: str) -> DataError:
    return DataError(f"{path.name} was refused: its member {name!r} is a link or a device, not a plain file.")


def _too_large(path: Path, allowed: int) -> DataError:
    stated = f"{allowed / 1e6:,.1f} MB"
    return DataError(f"{path.name} was refused: it unpacks to far more than the {stated} that are stated.")
