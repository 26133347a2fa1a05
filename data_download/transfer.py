"""Bringing one file here over HTTP, in as many attempts as it takes.

A download grows in ``FILE.part``. Beside it ``FILE.part.json`` names the address it came from and the server's
validator (its ETag, or the date of its last change). An interrupted download goes on from where it stopped: the
request says ``Range`` and ``If-Range``, so a server whose file has changed, or that does not know ranges, sends the
whole file, and the download starts from zero. A part without a validator is only continued where the manifest has a
hash that will tell whether the two halves belong together.

No data for ``timeout`` seconds, or less than ``MIN_BYTES`` in that time, is a stall.
"""

import errno
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from data_download.manifest import Archive, DataError
from data_download.store import matches

CHUNK = 1 << 16
MIN_BYTES = 1024  # slower than this many bytes in `timeout` seconds is a stall
ATTEMPTS = 4  # at one address
PAUSE_SECONDS = 0.2  # before the second attempt; doubles with each
SLACK = 16 << 20  # a file may be twice as long as the manifest says and this much more, bytes
# Some data hosts turn away clients that do not begin with "Mozilla".
AGENT = "Mozilla/5.0 (compatible; regteach-data-download/0.1)"


class AttemptError(Exception):
    """This attempt ended early; another may get further. The message completes "URL ..."."""


@dataclass(frozen=True)
class Part:
    """A file on its way: the bytes so far, and the note on where they came from."""

    path: Path

    @property
    def note(self) -> Path:
        """The file that names address and validator."""
        return self.path.with_name(self.path.name + ".json")

    def validator(self, url: str) -> str | None:
        """The server's validator of the bytes that are here; None where they are not from ``url``."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            return str(note["validator"]) if note["url"] == url else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def length(self) -> int:
        """Bytes that are here."""
        return self.path.stat().st_size if self.path.exists() else 0

    def begin(self, url: str, validator: str) -> None:
        """Start from zero. The bytes go first: a note never describes bytes of another origin."""
        self.path.write_bytes(b"")
        self.note.write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")

    def drop(self) -> None:
        """Forget everything."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def download(archive: Archive, urls: tuple[str, ...], target: Path, timeout: float, say: Callable[[str], None]) -> str:
    """Fetch a file from the first address that has it, whole and with the right hash.

    Args:
        archive: what the manifest says of the file.
        urls: addresses in the order in which they are tried.
        target: where it goes when it is complete and its hash, where one is known, is right.
        timeout: seconds without data after which an address is given up.
        say: prints one line: why an address failed, when there is another.

    Returns:
        The address that it came from.

    Raises:
        DataError: if no address served it.
    """
    part = Part(target.with_name(target.name + ".part"))
    problems = []
    for url in urls:
        problem = _from_one(archive, url, part, timeout)
        if problem is None:
            part.path.replace(target)
            part.drop()
            return url
        problems.append(problem)
        if len(problems) < len(urls):
            say(f"{problem}: trying the next address.")
    raise DataError(f"{archive.file} could not be fetched: {'; '.join(problems)}.")


def _from_one(archive: Archive, url: str, part: Part, timeout: float) -> str | None:
    """Try one address a few times; None if ``part`` is now whole and right, else a clause that says what happened."""
    problem = ""
    with requests.Session() as session:
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
            continued = part.length() > 0
            try:
                _attempt(session, archive, url, part, timeout)
            except AttemptError as error:
                problem = f"{url} {error}"
                continue
            except DataError as error:
                return str(error)
            if not archive.digest or matches(part.path, archive.digest):
                return None
            part.drop()
            problem = f"{url} {archive.mismatch}"
            if not continued:  # two halves of different files are worth another try, a wrong file is not
                return problem
    return problem


def _attempt(session: requests.Session, archive: Archive, url: str, part: Part, timeout: float) -> None:
    """One request: continue ``part`` or start it again, until the server has sent all.

    Raises:
        AttemptError: if it ended early; what arrived is kept.
        DataError: if another attempt at this address is pointless.
    """
    have = part.length()
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    validator = part.validator(url)
    if have and (validator or archive.digest):
        headers["Range"] = f"bytes={have}-"
        if validator:
            headers["If-Range"] = validator
    else:
        have = 0
    try:
        with session.get(url, headers=headers, stream=True, timeout=timeout) as response:
            have = _answer(response, url, part, have)
            _receive(response, archive, part, have, timeout)
    except requests.exceptions.Timeout:
        raise AttemptError(f"sent nothing for {timeout:g} s") from None
    except (requests.exceptions.RequestException, HTTPError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise AttemptError(_plainly(error, timeout)) from None


def _answer(response: requests.Response, url: str, part: Part, have: int) -> int:
    """Read the status line: from which byte on does the server send? Prepares ``part`` for it."""
    status = response.status_code
    if status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        return have
    if status in (206, 416):  # it begins elsewhere, or has fewer bytes than we do: the file has changed
        part.drop()
        raise AttemptError("no longer has the file that the download began with")
    if status != 200:
        problem = f"answered {status} {response.reason}"
        if status >= 500 or status == 429:
            raise AttemptError(problem)
        raise DataError(f"{url} {problem}")
    etag = response.headers.get("ETag", "")
    weak = etag.startswith("W/")  # a weak ETag does not promise the same bytes
    part.begin(url, etag if etag and not weak else response.headers.get("Last-Modified", ""))
    return 0


def _receive(response: requests.Response, archive: Archive, part: Part, have: int, timeout: float) -> None:
    """Append what the server sends to ``part``."""
    length = response.headers.get("Content-Length")
    total = have + int(length) if length and length.isdigit() else None
    limit = 2 * archive.size + SLACK
    if total is not None and total > limit:
        raise DataError(f"{response.url} was refused: it is {total:,} bytes long, the manifest says {archive.size:,}")
    start, got = time.monotonic(), 0
    with (
        part.path.open("ab") as out,
        tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=f"fetch {archive.file}", disable=None) as bar,
    ):
        while chunk := response.raw.read1(CHUNK):  # returns what is there: a trickle is seen as one
            out.write(chunk)
            out.flush()  # what has arrived survives a kill
            bar.update(len(chunk))
            have += len(chunk)
            got += len(chunk)
            if have > limit:
                raise DataError(f"{response.url} was refused: it sends far more than the {archive.size:,} bytes stated")
            if time.monotonic() - start > timeout:
                if got < MIN_BYTES:
                    raise AttemptError(f"sent only {got} bytes in {timeout:g} s")
                start, got = time.monotonic(), 0
    if total is not None and have < total:
        raise AttemptError(f"stopped after {have:,} of {total:,} bytes")


def _plainly(error: Exception, timeout: float) -> str:
    """An exception of the network layers in a few words."""
    text = str(error)
    if "timed out" in text.lower():
        return f"sent nothing for {timeout:g} s"
    if "IncompleteRead" in text:
        return "stopped in the middle of the file"
    names: dict[type[Any], str] = {
        requests.exceptions.SSLError: "has a certificate that can not be trusted",
        requests.exceptions.ConnectionError: "can not be reached",
        ConnectionError: "closed the connection",
    }
    return next((words for kind, words in names.items() if isinstance(error, kind)), f"failed ({text})")
