"""The command: list, fetch and check data sets. Runs as ``python data_download`` and ``python -m data_download``."""

import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 (before any import that an older Python does not understand)
    sys.exit(f"data_download needs Python 3.11 or newer, this is Python {sys.version.split()[0]}.")
if not __package__:  # run as a folder: Python put the folder itself on the path, the package needs its parent
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_download.manifest import Entry

DEPENDENCIES = ("pooch", "requests", "tqdm", "urllib3", "platformdirs")
MIRROR_VARIABLE = "REGTEACH_MIRROR"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; those of this process where left out.

    Returns:
        The exit status: 0; 1 if something could not be fetched or differs from its hash; 2 for a wrong name.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path may hold letters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except ModuleNotFoundError as error:
        if error.name not in DEPENDENCIES:
            raise
        return _fail(
            f"data_download needs the package {error.name!r}, which {sys.executable} lacks: run it with the course's"
            " own Python, in .venv, which `python -m regteach course` makes."
        )
    except KeyboardInterrupt:
        return _fail("Interrupted: the same command goes on from here.", 130)
    except BrokenPipeError:  # `python data_download | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.filename or 'The disk'}: {error.strerror or error}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python data_download",
        description="Fetch the course's data sets. Without a name: list them, with what is present.",
        epilog="The data root is REGTEACH_DATA where that is set, else the user's cache folder.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets to fetch; 'embedded' as --embedded")
    parser.add_argument("--embedded", action="store_true", help="fetch the small ones that the current lessons need")
    parser.add_argument("--check", action="store_true", help="hash what is present again, of all or of the names")
    parser.add_argument("--root", type=Path, help="data root for this command")
    parser.add_argument(
        "--mirror",
        default=os.environ.get(MIRROR_VARIABLE) or None,
        help=f"folder or http address that holds the archives; asked alone (default: {MIRROR_VARIABLE})",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the archives in DIR, which then is a mirror")
    parser.add_argument("--force", action="store_true", help="fetch again what is present")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds without data before a source is given up")
    parser.add_argument("--manifest", type=Path, help="another manifest than the course's")
    return parser


def _run(options: argparse.Namespace) -> int:
    from data_download.manifest import MANIFEST, DataError, UnknownNameError, entries, find
    from data_download.store import root

    manifest = (options.manifest or MANIFEST).absolute()
    base = options.root.expanduser().absolute() if options.root else root()
    try:
        known = entries(manifest)
        names = [name for name in options.names if name != "embedded"]
        wanted = {entry.name: entry for entry in (find(name, manifest) for name in names)}
        if options.embedded or len(names) < len(options.names):
            wanted |= {name: entry for name, entry in known.items() if entry.embedded}
    except UnknownNameError as error:
        return _fail(f"{error} `python data_download` lists all.", 2)
    except DataError as error:
        return _fail(str(error))
    if options.check:
        return _check(wanted or known, base, named=bool(wanted))
    if not wanted:
        _list(known, base)
        return 0
    return _fetch(wanted, base, options, manifest)


def _fetch(wanted: Mapping[str, "Entry"], base: Path, options: argparse.Namespace, manifest: Path) -> int:
    """Fetch one after the other; one that fails does not stop the rest."""
    from data_download.fetch import Options, fetch
    from data_download.manifest import DataError

    how = Options(mirror=options.mirror, keep=options.keep, force=options.force, timeout=options.timeout, say=_say)
    failed = []
    for name in wanted:
        try:
            fetch(name, base, how, manifest)
        except DataError as error:
            _fail(str(error))
            failed.append(name)
    if failed:
        return _fail(f"Not fetched: {', '.join(failed)}. The same command goes on from here.")
    return 0


def _check(wanted: Mapping[str, "Entry"], base: Path, named: bool) -> int:
    """Hash what is present and print a line each; 1 if a file differs from its known hash, or a named set is absent."""
    from data_download.manifest import DataError
    from data_download.store import check, presence

    status = 0
    for name, entry in wanted.items():
        state = presence(entry, base)
        if state.state == "absent":
            _say(f"{name}: absent")
            status = max(status, int(named))
            continue
        try:
            result = check(entry, base)
        except DataError as error:
            status = _fail(str(error))
            continue
        parts = [f"{result.matched} file(s) match their hash"]
        if result.unknown:
            parts.append(f"{result.unknown} have no known hash")
        if result.differing:
            parts.append(f"{len(result.differing)} differ or are missing: {', '.join(result.differing[:3])}")
            status = 1
        _say(f"{name}: {state}, {'; '.join(parts)}")
    return status


def _list(known: Mapping[str, "Entry"], base: Path) -> None:
    """Print the table of all data sets."""
    from data_download.store import presence

    _say(f"Data root: {base}\n")
    _say(f"{'name':20}{'on disk':22}{'download':>10}{'unpacked':>10}  {'verified':10}lessons")
    for name, entry in known.items():
        state = presence(entry, base)
        _say(
            f"{name:20}{state!s:22}{_size(entry.size):>10}{_size(entry.unpacked):>10}"
            f"  {'yes' if entry.verified else 'no':10}{' '.join(entry.lessons)}"
        )
        counts = ", ".join(
            f"{n:,} {one if n == 1 else many}"
            for n, one, many in ((entry.people, "person", "people"), (entry.images, "image", "images"))
            if n
        )
        for line in (
            f"{entry.what} ({counts or 'how many is not known here'})",
            f"Licence: {entry.licence}",
            entry.note,
        ):
            if line:
                _say(textwrap.fill(line, 100, initial_indent="    ", subsequent_indent="    "))
    _say("\nverified: yes = archive and content were checked against the hashes of the manifest;")
    _say("          no  = address or hash was not checked, and the fetch says so.")
    _say("Fetch: python data_download NAME... [--root DIR] [--mirror URL-or-folder]")


def _size(size: int) -> str:
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u or n == "kB")
    return f"{size / unit:.1f} {name}"


def _say(line: str) -> None:
    print(line, flush=True)


def _fail(line: str, status: int = 1) -> int:
    print(line, file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
