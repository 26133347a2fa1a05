"""What is on disk: where the data root is, which entries are present, whether their content is what it should be.

An entry is present when the files that the manifest expects lie in its folder, whoever put them there. A fetch also
leaves ``.receipt.json`` beside them, with the sha256 of each file, which :func:`check` reads again later.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_download.manifest import MANIFEST, DataError, Entry, find
from data_download.placing import RECEIPT, recover_if_free, work_folder

ROOT_VARIABLE = "REGTEACH_DATA"


@dataclass(frozen=True)
class Presence:
    """How many of an entry's expected files are there; ``expected`` counts at least one a pattern."""

    found: int
    expected: int

    @property
    def state(self) -> str:
        """``"present"``, ``"partly"`` or ``"absent"``."""
        if self.found >= self.expected:
            return "present"
        return "partly" if self.found else "absent"

    def __str__(self) -> str:
        return f"partly ({self.found} of {self.expected})" if self.state == "partly" else self.state


@dataclass(frozen=True)
class Check:
    """Result of hashing an entry's files: how many match, which differ, how many have no known hash."""

    matched: int
    differing: tuple[str, ...]
    unknown: int


def root() -> Path:
    """The data root: ``REGTEACH_DATA`` where it is set, else the user's cache folder."""
    chosen = os.environ.get(ROOT_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    import pooch

    return Path(pooch.os_cache("regteach"))


def presence(entry: Entry, base: Path) -> Presence:
    """Which of the entry's expected files lie under the root ``base``."""
    folder = base / entry.folder
    recover_if_free(folder, work_folder(entry, base))
    found = expected = 0
    for pattern in entry.expect:
        want = pattern.count or 1
        have = sum(1 for path in folder.glob(pattern.files) if path.is_file()) if folder.is_dir() else 0
        found += min(have, want)
        expected += want
    return Presence(found, expected)


def present(name: str, base: Path | None = None, manifest: Path = MANIFEST) -> bool:
    """Whether a data set is there, all of it or a part that can be used.

    Raises:
        UnknownNameError: if no data set has that name.
    """
    return presence(find(name, manifest), base or root()).state != "absent"


def locate(name: str, member: str | None = None, base: Path | None = None, manifest: Path = MANIFEST) -> Path:
    """Path of a data set's folder, or of one file in it.

    Args:
        name: of the data set.
        member: path of a file inside its folder.
        base: data root; :func:`root` where left out.
        manifest: the manifest that describes it.

    Raises:
        FileNotFoundError: if it is not there; the message has the command that fetches it.
        UnknownNameError: if no data set has that name.
    """
    entry = find(name, manifest)
    place = base or root()
    command = f"python -m data_download {entry.name}" + (f" --root {place}" if base else "")
    state = presence(entry, place)
    if state.state == "absent":
        raise FileNotFoundError(f"The data set {entry.name!r} is not in {place}: run `{command}`.")
    folder = place / entry.folder
    if member is None:
        return folder
    if not (folder / member).exists():
        raise FileNotFoundError(f"{folder} holds no {member!r}: run `{command} --force` to fetch it again.")
    return folder / member


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Hash of a file as hexadecimal digits; ``algorithm`` is sha256 or md5."""
    import pooch

    return str(pooch.file_hash(str(path), algorithm))


def matches(path: Path, digest: str) -> bool:
    """Whether a file has the digest ``"sha256:..."`` or ``"md5:..."``."""
    algorithm, _, wanted = digest.partition(":")
    return file_hash(path, algorithm) == wanted.lower()


def check(entry: Entry, base: Path) -> Check:
    """Hash every file of an entry again and compare it with the manifest, or with the receipt of its download."""
    folder = base / entry.folder
    known = dict(_receipt(folder)) | dict(_manifest_digests(entry))  # the manifest has the last word
    files = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECEIPT
    ]
    missing = [name for name in known if name not in files] if (folder / RECEIPT).exists() else []
    hashed = [name for name in files if name in known]
    differing = [name for name in hashed if not matches(folder / name, known[name])]
    return Check(
        matched=len(hashed) - len(differing),
        differing=tuple(differing + missing),
        unknown=len(files) - len(hashed),
    )


def write_receipt(folder: Path, entry: Entry, sources: dict[str, str], files: dict[str, str]) -> None:
    """Record in ``folder`` where its files came from and their sha256."""
    record = {"name": entry.name, "sources": sources, "files": dict(sorted(files.items()))}
    (folder / RECEIPT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _receipt(folder: Path) -> Iterator[tuple[str, str]]:
    path = folder / RECEIPT
    if not path.exists():
        return
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        raise DataError(f"{path} can not be read: delete it, or fetch the data set again.") from None
    for name, digest in files.items():
        yield name, f"sha256:{digest}"


def _manifest_digests(entry: Entry) -> Iterator[tuple[str, str]]:
    for archive in entry.archives:
        for member in archive.members:
            yield member.to, f"sha256:{member.sha256}"
        if not archive.unpack and archive.digest:
            yield archive.to, archive.digest
