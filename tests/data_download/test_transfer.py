"""One file over HTTP, from servers that truncate, change, stall, refuse ranges or are not there."""

import errno
import json
import time
from pathlib import Path

import pytest
from serving import Served, Server, sha256

from data_download import transfer
from data_download.manifest import Archive, DataError
from data_download.transfer import Part, download

BODY = bytes(range(256)) * 2000  # 512 kB
FILE = "data.bin"
FAST = 1.0  # seconds without data: more than a busy machine holds either side up


def archive(hashed: bool = True, size: int = len(BODY)) -> Archive:
    return Archive(FILE, size, f"sha256:{sha256(BODY)}" if hashed else "")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def get(server: Server, tmp_path: Path, said: list[str]):
    """Download FILE from the server (or from the given addresses) and return its content."""

    def run(what: Archive | None = None, *urls: str, timeout: float = 5.0) -> bytes:
        target = tmp_path / FILE
        download(what or archive(), urls or (server.url(FILE),), target, timeout, said.append)
        assert not Part(tmp_path / (FILE + ".part")).length()
        return target.read_bytes()

    return run


@pytest.mark.parametrize("length", [True, False], ids=["with-length", "until-close"])
def test_a_whole_file(server: Server, get, length: bool) -> None:
    server.files[FILE] = Served(BODY, length=length)
    assert get() == BODY
    assert server.requests == [(FILE, None)]


def test_a_truncated_download_goes_on_where_it_stopped(server: Server, get) -> None:
    server.files[FILE] = Served(BODY, cuts=[100_000, 200_000])
    assert get() == BODY
    assert server.requests == [(FILE, None), (FILE, "bytes=100000-"), (FILE, "bytes=300000-")]


def test_without_a_hash_it_goes_on_only_if_the_server_confirms_the_file(server: Server, get) -> None:
    server.files[FILE] = Served(BODY, cuts=[100_000])
    assert get(archive(hashed=False)) == BODY
    assert [wanted for _, wanted in server.requests] == [None, "bytes=100000-"]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_hash_and_validator_it_starts_again(server: Server, get, etag: str | None) -> None:
    server.files[FILE] = Served(BODY, etag=etag, cuts=[100_000])
    assert get(archive(hashed=False)) == BODY
    assert [wanted for _, wanted in server.requests] == [None, None]


def test_a_server_that_refuses_ranges_starts_again(server: Server, get) -> None:
    server.files[FILE] = Served(BODY, ranges=False, cuts=[100_000])
    assert get() == BODY
    assert [wanted for _, wanted in server.requests] == [None, "bytes=100000-"]


def leave_part(folder: Path, url: str, content: bytes, etag: str = '"one"') -> None:
    part = Part(folder / (FILE + ".part"))
    part.begin(url, etag)
    part.path.write_bytes(content)


@pytest.mark.parametrize("hashed", [True, False])
def test_a_file_that_changed_in_between_starts_again(server: Server, get, tmp_path: Path, hashed: bool) -> None:
    leave_part(tmp_path, server.url(FILE), b"old" * 1000, etag='"before"')
    server.files[FILE] = Served(BODY, etag='"now"')
    assert get(archive(hashed)) == BODY
    assert server.requests == [(FILE, "bytes=3000-")]  # If-Range did not match: the whole file came


def test_a_file_that_became_shorter_starts_again(server: Server, get, tmp_path: Path) -> None:
    leave_part(tmp_path, server.url(FILE), bytes(len(BODY) + 10))
    server.files[FILE] = Served(BODY)
    assert get() == BODY
    assert [wanted for _, wanted in server.requests] == [f"bytes={len(BODY) + 10}-", None]


def test_a_wrong_part_is_noticed_by_the_hash_and_dropped(server: Server, get, tmp_path: Path) -> None:
    leave_part(tmp_path, server.url(FILE), b"wrong" * 1000)
    server.files[FILE] = Served(BODY)
    assert get() == BODY
    assert [wanted for _, wanted in server.requests] == ["bytes=5000-", None]


def test_a_part_of_another_address_is_continued_only_under_a_hash(server: Server, get, tmp_path: Path) -> None:
    server.files[FILE] = Served(BODY)
    leave_part(tmp_path, "http://elsewhere.test/data.bin", BODY[:4000])
    assert get(archive(hashed=False)) == BODY
    leave_part(tmp_path, "http://elsewhere.test/data.bin", BODY[:4000])
    assert get() == BODY
    assert [wanted for _, wanted in server.requests] == [None, "bytes=4000-"]


def test_a_damaged_note_is_as_good_as_none(server: Server, get, tmp_path: Path) -> None:
    leave_part(tmp_path, server.url(FILE), BODY[:4000])
    (tmp_path / (FILE + ".part.json")).write_text("{")
    server.files[FILE] = Served(BODY)
    assert get(archive(hashed=False)) == BODY
    assert server.requests == [(FILE, None)]


def test_a_stall_ends_with_one_sentence_and_the_next_mirror_is_tried(server: Server, get, said: list[str]) -> None:
    # More than MIN_BYTES before each stall: on a busy machine, too, this is silence and not a trickle.
    server.files["slow/" + FILE] = Served(BODY, stalls=[2 * transfer.MIN_BYTES] * transfer.ATTEMPTS)
    server.files[FILE] = Served(BODY)
    start = time.monotonic()
    assert get(None, server.url("slow/" + FILE), server.url(FILE), timeout=FAST) == BODY
    assert time.monotonic() - start < transfer.ATTEMPTS * 30  # the default patience of one attempt
    assert said == [f"{server.url('slow/' + FILE)} sent nothing for 1 s: trying the next address."]


def test_a_trickle_is_a_stall(server: Server, get) -> None:
    server.files[FILE] = Served(BODY, trickle=0.02)
    with pytest.raises(DataError, match=r"could not be fetched: .* sent only \d+ bytes in 1 s\."):
        get(timeout=FAST)


def test_a_stalled_download_that_goes_on_later_is_continued(server: Server, get) -> None:
    server.files[FILE] = Served(BODY, stalls=[50_000, None])
    assert get(timeout=FAST) == BODY
    assert [wanted for _, wanted in server.requests] == [None, "bytes=50000-"]


@pytest.mark.parametrize(("status", "times"), [(404, 1), (403, 1), (503, transfer.ATTEMPTS), (429, transfer.ATTEMPTS)])
def test_an_error_status_is_reported(server: Server, get, status: int, times: int) -> None:
    server.files[FILE] = Served(b"", status=status)
    with pytest.raises(
        DataError, match=rf"data\.bin could not be fetched: http://\S+ answered {status} .*\."
    ) as caught:
        get()
    assert len(server.requests) == times  # only what may pass is tried again
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there(get, said: list[str]) -> None:
    with pytest.raises(DataError, match="can not be reached"):
        get(None, "http://127.0.0.1:9/data.bin")
    assert said == []


def test_every_address_is_named_when_all_fail(server: Server, get) -> None:
    server.files["a/" + FILE] = Served(b"", status=404)
    server.files["b/" + FILE] = Served(BODY[:-1] + b"!")
    with pytest.raises(DataError, match=r"a/data\.bin answered 404 .*; .*b/data\.bin is not the file"):
        get(None, server.url("a/" + FILE), server.url("b/" + FILE))


def test_a_wrong_hash_is_never_kept(server: Server, get, tmp_path: Path) -> None:
    server.files[FILE] = Served(BODY[:-1] + b"!")
    with pytest.raises(DataError, match="its hash differs"):
        get()
    assert list(tmp_path.iterdir()) == []
    assert len(server.requests) == 1  # the same wrong file would come again


@pytest.mark.parametrize("length", [True, False])
def test_far_more_than_stated_is_refused(server: Server, get, length: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SLACK", 1000)
    server.files[FILE] = Served(BODY, length=length)
    with pytest.raises(DataError, match="was refused: it"):
        get(archive(size=1000))


def test_a_full_disk_is_not_blamed_on_the_server(server: Server, get, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files[FILE] = Served(BODY)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer, "_receive", full)
    with pytest.raises(OSError, match="No space left"):
        get()


def test_the_note_is_written_before_the_first_byte(tmp_path: Path) -> None:
    part = Part(tmp_path / "x.part")
    part.path.write_bytes(b"of an earlier file")
    part.begin("http://a/", '"e"')
    assert part.length() == 0
    assert json.loads(part.note.read_text()) == {"url": "http://a/", "validator": '"e"'}
    assert part.validator("http://a/") == '"e"'
    assert part.validator("http://b/") is None
