"""Fetching one data set: lock, bring the archives here, check, unpack into a temporary folder, put it in place.

Order of trust: an archive's hash is checked before anything is unpacked; a package's members are hashed again one by
one. Where the manifest knows no hash, the first download is taken on trust once it has unpacked into the files that
the manifest expects; its sha256 is then recorded in ``first-use.json`` in the entry's work folder, and every later
download has to match it.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_download.manifest import MANIFEST, Archive, DataError, Entry, find
from data_download.package import pip_download
from data_download.placing import locked, recover, swap, work_folder
from data_download.store import Presence, file_hash, matches, presence, root, write_receipt
from data_download.transfer import Part, download
from data_download.unpack import place_as_is, unpack

FIRST_USE = "first-use.json"
TIMEOUT = 30.0
PIP_PATIENCE = 20  # pip unpacks and asks build backends in silence: it may be quiet this many times longer


@dataclass(frozen=True)
class Options:
    """How to fetch.

    Args:
        mirror: folder, or http address of one, that holds the archives by name; then it alone is asked.
        keep: folder that gets a copy of each archive, to serve as a mirror for others.
        force: fetch although it is present.
        timeout: seconds without data after which a source is given up.
        say: prints a line.
    """

    mirror: str | None = None
    keep: Path | None = None
    force: bool = False
    timeout: float = TIMEOUT
    say: Callable[[str], None] = print


def fetch(name: str, base: Path | None = None, options: Options | None = None, manifest: Path = MANIFEST) -> Path:
    """Fetch a data set, unless it is there.

    Args:
        name: of the data set.
        base: data root; :func:`data_download.root` where left out.
        options: mirror, patience, and where to print.
        manifest: the manifest that describes it.

    Returns:
        Its folder.

    Raises:
        DataError: if it could not be fetched; what was there before is still there.
    """
    entry, options, base = find(name, manifest), options or Options(), base or root()
    folder, work = base / entry.folder, work_folder(entry, base)
    if _done(presence(entry, base), entry, folder, options):
        return folder
    with locked(work, waiting=lambda: options.say(f"{entry.name}: another process is fetching it, waiting.")):
        recover(folder, work)
        # Another process may have fetched it while this one waited; who forces it has been asked already.
        if _done(presence(entry, base), entry, folder, options):
            return folder
        _check_space(entry, base)
        for line in _warnings(entry):
            options.say(line)
        _fetch(entry, folder, work, options)
        for path in work.iterdir():
            if path.name not in ("lock", FIRST_USE):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    options.say(f"{entry.name}: in {folder}")
    return folder


def _done(state: Presence, entry: Entry, folder: Path, options: Options) -> bool:
    if state.state != "present" or options.force:
        return False
    options.say(f"{entry.name}: present in {folder}")
    return True


def _fetch(entry: Entry, folder: Path, work: Path, options: Options) -> None:
    """Everything between taking the lock and letting it go."""
    new = work / "new"
    new.mkdir()
    trusted = _first_use(work)
    sources: dict[str, str] = {}
    files: dict[str, str] = {}
    hashes: dict[str, str] = {}
    unpacked = 0
    try:
        for archive in entry.archives:
            path = work / archive.file
            pinned = archive if archive.digest else _pinned(archive, trusted, work / FIRST_USE)
            sources[archive.file] = _obtain(pinned, path, options)
            if not archive.digest:
                hashes[archive.file] = file_hash(path)
            files |= _open(entry, archive, path, new, unpacked)
            unpacked = sum(item.stat().st_size for item in new.rglob("*") if item.is_file())
        try:
            _check_expected(entry, new, files)
        except DataError:
            for archive in entry.archives:  # not worth keeping for a next try
                (work / archive.file).unlink()
            raise
        write_receipt(new, entry, sources, files)
        if hashes and hashes != trusted:
            _record_first_use(work, hashes, options)
        swap(new, folder, work / "old")
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if options.keep is not None:
        _keep(entry, work, options.keep)


def _obtain(archive: Archive, path: Path, options: Options) -> str:
    """Have the archive at ``path``, whole and with its hash; returns where it came from."""
    if path.exists():  # complete, from a fetch that was interrupted later
        if archive.digest and matches(path, archive.digest):
            return "an earlier download"
        path.unlink()
    if options.mirror is not None:
        return _from_mirror(archive, path, options)
    if archive.requirement:
        return pip_download(archive, path, PIP_PATIENCE * options.timeout)
    return download(archive, archive.urls, path, options.timeout, options.say)


def _from_mirror(archive: Archive, path: Path, options: Options) -> str:
    mirror = str(options.mirror)
    if mirror.startswith(("http://", "https://")):
        url = f"{mirror.rstrip('/')}/{archive.file}"
        return download(archive, (url,), path, options.timeout, options.say)
    source = Path(mirror).expanduser() / archive.file
    if not source.parent.is_dir():
        raise DataError(f"The mirror {mirror!r} is neither a folder nor an http address.")
    if not source.is_file():
        raise DataError(f"The mirror {mirror} does not hold {archive.file}.")
    part = Part(path.with_name(path.name + ".part"))
    shutil.copyfile(source, part.path)
    if archive.digest and not matches(part.path, archive.digest):
        part.drop()
        raise DataError(f"{source} {archive.mismatch}.")
    os.replace(part.path, path)
    return str(source)


def _open(entry: Entry, archive: Archive, path: Path, new: Path, unpacked: int) -> dict[str, str]:
    """Put an archive's content into the temporary folder; a file that will not open is not kept for a next try."""
    try:
        if archive.unpack:
            return unpack(path, archive, new, max(0, entry.unpacked - unpacked))
        return place_as_is(path, archive, new)
    except DataError:
        path.unlink(missing_ok=True)
        raise


def _check_expected(entry: Entry, new: Path, files: dict[str, str]) -> None:
    """Refuse a download that holds nothing of what is expected; a verified one has to hold all of it."""
    for pattern in entry.expect:
        found = sum(1 for path in new.glob(pattern.files) if path.is_file())
        if found == 0 or (entry.verified and found < pattern.count):
            seen = ", ".join(sorted(files)[:3]) or "nothing"
            raise DataError(
                f"{entry.name}: the download has {found} of the files {pattern.files!r} that the manifest expects;"
                f" it has {len(files)} file(s): {seen}."
            )


def _warnings(entry: Entry) -> list[str]:
    if entry.verified:
        return []
    lines = [f"{entry.name}: its source was not checked when this manifest was written."]
    if not entry.hashed:
        lines.append(
            f"{entry.name}: not every hash is known, so its content can not be verified: the first download is taken"
            " on trust, and later ones have to match it."
        )
    return [*lines, *([f"{entry.name}: {entry.note}"] if entry.note else [])]


def _check_space(entry: Entry, base: Path) -> None:
    needed, free = entry.size + entry.unpacked, shutil.disk_usage(base).free
    if needed > free:
        raise DataError(
            f"{entry.name} needs {needed / 1e9:.2f} GB under {base}, where {free / 1e9:.2f} GB are free:"
            " name another --root."
        )


def _first_use(work: Path) -> dict[str, str]:
    try:
        return dict(json.loads((work / FIRST_USE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise DataError(f"{work / FIRST_USE} can not be read: delete it to take the next download on trust.") from None


def _pinned(archive: Archive, trusted: dict[str, str], record: Path) -> Archive:
    """The archive with the hash of its first download as its hash, where there is one."""
    digest = trusted.get(archive.file)
    return dataclasses.replace(archive, digest=f"sha256:{digest}", record=str(record)) if digest else archive


def _record_first_use(work: Path, hashes: dict[str, str], options: Options) -> None:
    path = work / FIRST_USE
    part = path.with_name(FIRST_USE + ".part")
    part.write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
    for name, digest in hashes.items():
        options.say(f"{name}: sha256 {digest} recorded in {path}")


def _keep(entry: Entry, work: Path, keep: Path) -> None:
    """Copy the archives into a folder that can serve as a mirror."""
    keep.mkdir(parents=True, exist_ok=True)
    for archive in entry.archives:
        part = keep / f".{archive.file}.{os.getpid()}.part"
        shutil.copyfile(work / archive.file, part)
        os.replace(part, keep / archive.file)
