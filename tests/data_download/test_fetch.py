"""A whole fetch: trust, mirrors, refusals that place nothing; and what a kill at any moment leaves."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from serving import Served, Server, sha256, tar_of, tar_special, urls_entry, write_manifest, zip_of

from data_download import fetch as module
from data_download.fetch import Options, fetch
from data_download.manifest import DataError, find
from data_download.placing import RECEIPT, work_folder
from data_download.store import check, present

ONE = {f"top/part{k}/file{k}.txt": random.Random(k).randbytes(2000 + k) for k in range(5)}
TWO = {name: content[::-1] for name, content in ONE.items()}
ARCHIVE = zip_of(ONE)
EXPECT = {"part*/file*.txt": 5}


def entry(server: Server, content: bytes, hashed: bool = True, **keys) -> str:
    row = {"path": "toy.zip", "size": len(content), "unpack": "zip", "strip": 1}
    if hashed:
        row["sha256"] = sha256(content)
    return urls_entry("toy", [server.url("one/"), server.url("two/")], [row], EXPECT, **keys)


@pytest.fixture
def manifest(tmp_path: Path, server: Server) -> Path:
    server.files["one/toy.zip"] = Served(ARCHIVE)
    return write_manifest(tmp_path / "m.toml", entry(server, ARCHIVE))


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECEIPT)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def stripped(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name.removeprefix("top/"): content for name, content in files.items()}


def leftovers(root: Path) -> list[str]:
    return sorted(path.name for path in (root / ".downloads" / "toy").iterdir())


# ---- the plain course of things ----


def test_a_fetch_places_the_files_a_receipt_and_nothing_else(root: Path, server: Server, manifest: Path) -> None:
    folder = fetch("toy", root, Options(say=lambda line: None), manifest)
    assert folder == root / "toy"
    assert tree(folder) == stripped(ONE)
    receipt = json.loads((folder / RECEIPT).read_text())
    assert receipt["sources"] == {"toy.zip": server.url("one/toy.zip")}
    assert receipt["files"] == {name: sha256(content) for name, content in stripped(ONE).items()}
    assert leftovers(root) == ["lock"]
    assert check(find("toy", manifest), root).matched == 5


def test_what_is_present_is_not_fetched_again_unless_forced(root: Path, server: Server, manifest: Path) -> None:
    said: list[str] = []
    again = Options(say=said.append)
    for options in (Options(say=said.append), again, Options(say=said.append, force=True)):
        said.clear()
        fetch("toy", root, options, manifest)
        assert (said == [f"toy: present in {root / 'toy'}"]) == (options is again)
    assert len(server.requests) == 2


def test_several_archives_make_one_entry(root: Path, server: Server, tmp_path: Path) -> None:
    parts = {f"seg_{k}.txt": bytes([48 + k]) * 100 for k in range(3)}
    server.files |= {f"one/{name}": Served(content) for name, content in parts.items()}
    rows = [{"path": name, "size": 100, "sha256": sha256(content)} for name, content in parts.items()]
    text = urls_entry("toy", [server.url("one/")], rows, {"seg_*.txt": 3})
    fetch("toy", root, Options(say=lambda line: None), write_manifest(tmp_path / "m.toml", text))
    assert tree(root / "toy") == parts


# ---- trust ----


def test_an_unverified_entry_says_so_and_is_held_to_its_first_download(
    root: Path, server: Server, tmp_path: Path
) -> None:
    server.files["one/toy.zip"] = Served(ARCHIVE)
    manifest = write_manifest(tmp_path / "m.toml", entry(server, ARCHIVE, hashed=False, note="Mind the gap."))
    said: list[str] = []
    fetch("toy", root, Options(say=said.append), manifest)
    text = "\n".join(said)
    assert "its source was not checked" in text
    assert "its content can not be verified: the first download is taken on trust" in text
    assert "Mind the gap." in text
    assert f"toy.zip: sha256 {sha256(ARCHIVE)} recorded in" in text
    assert leftovers(root) == ["first-use.json", "lock"]
    # The same content is accepted again, other content is not.
    fetch("toy", root, Options(say=said.append, force=True), manifest)
    server.files["one/toy.zip"] = Served(zip_of(TWO), etag='"two"')
    with pytest.raises(DataError, match=r"its hash differs from the one in .*first-use\.json: delete that to take"):
        fetch("toy", root, Options(say=said.append, force=True), manifest)
    assert tree(root / "toy") == stripped(ONE)


def test_a_login_page_is_not_trusted(root: Path, server: Server, tmp_path: Path) -> None:
    server.files["one/toy.zip"] = Served(b"<html>please log in</html>" * 20)
    manifest = write_manifest(tmp_path / "m.toml", entry(server, ARCHIVE, hashed=False))
    with pytest.raises(DataError, match=r"toy\.zip is not a whole zip archive"):
        fetch("toy", root, Options(say=lambda line: None), manifest)
    assert leftovers(root) == ["lock"]  # neither recorded nor kept
    server.files["one/toy.zip"] = Served(ARCHIVE)
    fetch("toy", root, Options(say=lambda line: None), manifest)
    assert tree(root / "toy") == stripped(ONE)


def test_a_verified_entry_says_nothing_of_trust(root: Path, server: Server, tmp_path: Path) -> None:
    server.files["one/toy.zip"] = Served(ARCHIVE)
    said: list[str] = []
    fetch("toy", root, Options(say=said.append), write_manifest(tmp_path / "m", entry(server, ARCHIVE, verified=True)))
    assert said == [f"toy: in {root / 'toy'}"]


# ---- refusals place nothing ----


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (zip_of({"top/part0/file0.txt": b"a", "../../evil.txt": b"e"}), "zip", "climb out"),
        (tar_of({"top/part0/file0.txt": b"a", "/evil.txt": b"e"}), "tar", "climb out"),
        (tar_special(b"2", "top/part0/file1.txt", "/etc/passwd"), "tar", "a link or a device"),
        (zip_of({"top/part0/file0.txt": bytes(9 << 20)}), "zip", "far more"),
        (zip_of({"other.txt": b"a"}), "zip", r"has 0 of the files 'part\*/file\*.txt'"),
    ],
    ids=["climbs", "absolute", "link", "bomb", "nothing-expected"],
)
@pytest.mark.parametrize("old", [False, True], ids=["fresh", "replacing"])
def test_a_bad_archive_places_nothing(
    root: Path, server: Server, tmp_path: Path, manifest: Path, content: bytes, kind: str, words: str, old: bool
) -> None:
    if old:
        fetch("toy", root, Options(say=lambda line: None), manifest)
    server.files["bad/toy.bin"] = Served(content)
    row = {"path": "toy.bin", "size": len(content), "sha256": sha256(content), "unpack": kind, "strip": 1}
    bad = write_manifest(tmp_path / "bad.toml", urls_entry("toy", [server.url("bad/")], [row], EXPECT))
    with pytest.raises(DataError, match=words):
        fetch("toy", root, Options(force=True, say=lambda line: None), bad)
    assert tree(root / "toy") == (stripped(ONE) if old else {})
    assert leftovers(root) == ["lock"]
    assert not list(tmp_path.rglob("evil*"))


def test_the_hash_is_checked_before_anything_is_opened(
    root: Path, server: Server, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["one/toy.zip"] = server.files["two/toy.zip"] = Served(zip_of(TWO))

    def never(*arguments: object) -> None:
        raise AssertionError("opened before its hash was checked")

    monkeypatch.setattr(module, "unpack", never)
    with pytest.raises(DataError, match="its hash differs"):
        fetch("toy", root, Options(say=lambda line: None), manifest)


def test_a_folder_with_strangers_is_left_and_the_download_is_kept_for_later(
    root: Path, server: Server, manifest: Path
) -> None:
    (root / "toy").mkdir()
    (root / "toy" / "notes.md").write_text("mine")
    with pytest.raises(DataError, match=r"such as notes\.md: move them away first"):
        fetch("toy", root, Options(say=lambda line: None), manifest)
    assert tree(root / "toy") == {"notes.md": b"mine"}
    (root / "toy" / "notes.md").unlink()
    fetch("toy", root, Options(say=lambda line: None), manifest)
    assert tree(root / "toy") == stripped(ONE)
    assert len(server.requests) == 1


def test_a_full_disk_is_noticed_before_the_download(root: Path, server: Server, tmp_path: Path) -> None:
    text = entry(server, ARCHIVE, unpacked=10**18)
    with pytest.raises(DataError, match=r"toy needs 1000000000\.00 GB under .* name another --root"):
        fetch("toy", root, Options(say=lambda line: None), write_manifest(tmp_path / "m.toml", text))
    assert server.requests == []


# ---- mirrors ----


def test_a_mirror_folder_is_asked_alone(root: Path, server: Server, manifest: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    options = Options(mirror=str(mirror), say=lambda line: None)
    with pytest.raises(DataError, match=r"does not hold toy\.zip"):
        fetch("toy", root, options, manifest)
    (mirror / "toy.zip").write_bytes(zip_of(TWO))
    with pytest.raises(DataError, match="is not the file that the manifest describes"):
        fetch("toy", root, options, manifest)
    assert not present("toy", root, manifest)
    (mirror / "toy.zip").write_bytes(ARCHIVE)
    fetch("toy", root, options, manifest)
    assert tree(root / "toy") == stripped(ONE)
    assert server.requests == []
    assert (mirror / "toy.zip").read_bytes() == ARCHIVE


def test_a_mirror_server_is_asked_alone(root: Path, server: Server, manifest: Path) -> None:
    server.files["class/toy.zip"] = Served(ARCHIVE, cuts=[500])
    fetch("toy", root, Options(mirror=server.url("class"), say=lambda line: None), manifest)
    assert tree(root / "toy") == stripped(ONE)
    assert [path for path, _ in server.requests] == ["class/toy.zip"] * 2


def test_a_mirror_that_is_neither_is_explained(root: Path, manifest: Path) -> None:
    with pytest.raises(DataError, match="The mirror 'nowhere/at/all' is neither a folder nor an http address"):
        fetch("toy", root, Options(mirror="nowhere/at/all", say=lambda line: None), manifest)


def test_archives_can_be_kept_as_a_mirror_for_others(
    root: Path, server: Server, manifest: Path, tmp_path: Path
) -> None:
    fetch("toy", root, Options(keep=tmp_path / "mirror", say=lambda line: None), manifest)
    assert [path.name for path in (tmp_path / "mirror").iterdir()] == ["toy.zip"]
    fetch("toy", tmp_path / "other", Options(mirror=str(tmp_path / "mirror"), say=lambda line: None), manifest)
    assert tree(tmp_path / "other" / "toy") == stripped(ONE)


# ---- kills ----

KILLER = """
import os, shutil, signal, sys
from pathlib import Path
from data_download import fetch, placing, unpack

point, number, root, manifest = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
modules = {"replace": os, "rmtree": shutil, "_create": unpack, "write_receipt": fetch, "swap": fetch}
original = getattr(modules[point], point)
calls = 0

def deadly(*arguments, **keys):
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **keys)

setattr(modules[point], point, deadly)
fetch.fetch("toy", root, fetch.Options(force=True), manifest)
print("survived", calls)
"""
POINTS = [
    *(("_create", k) for k in (1, 3, 5)),  # before the first, in the middle, before the last file
    ("write_receipt", 1),
    ("swap", 1),
    *(("replace", k) for k in (1, 2, 3)),  # download complete; the old folder aside; the new one in its place
    *(("rmtree", k) for k in (1, 2)),  # the old folder goes; the temporary one goes
]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(("point", "number"), POINTS)
@pytest.mark.parametrize("old", [False, True], ids=["fresh", "replacing"])
def test_a_kill_leaves_the_old_state_or_the_new(
    root: Path, server: Server, manifest: Path, tmp_path: Path, point: str, number: int, old: bool
) -> None:
    if old:
        fetch("toy", root, Options(say=lambda line: None), manifest)
    server.files["new/toy.zip"] = Served(zip_of(TWO))
    row = {"path": "toy.zip", "size": 1000, "sha256": sha256(zip_of(TWO)), "unpack": "zip", "strip": 1}
    newer = write_manifest(tmp_path / "new.toml", urls_entry("toy", [server.url("new/")], [row], EXPECT))
    command = [sys.executable, "-c", KILLER, point, str(number), str(root), str(newer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode == 0:  # a fresh folder takes one rename less
        assert not old
        assert "survived" in done.stdout
    else:
        assert done.returncode == -signal.SIGKILL, done.stderr
    before = stripped(ONE) if old else {}
    present("toy", root, newer)  # a reader looks first, as a lesson would
    assert tree(root / "toy") in (before, stripped(TWO))
    fetch("toy", root, Options(force=True, say=lambda line: None), newer)
    assert tree(root / "toy") == stripped(TWO)
    assert leftovers(root) == ["lock"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("sent", [0, 1, 4000, 99_999])
def test_a_kill_while_bytes_arrive_is_resumed(root: Path, server: Server, tmp_path: Path, sent: int) -> None:
    content = zip_of(ONE) + bytes(100_000)  # a comment-free tail: only the hash knows
    server.files["one/toy.bin"] = Served(content, stalls=[sent, None])
    row = {"path": "toy.bin", "size": len(content), "sha256": sha256(content)}
    manifest = write_manifest(tmp_path / "m.toml", urls_entry("toy", [server.url("one/")], [row], {"toy.bin": 1}))
    command = [sys.executable, "-m", "data_download", "toy", "--root", str(root), "--manifest", str(manifest)]
    part = work_folder(find("toy", manifest), root) / "toy.bin.part"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size >= sent) or not server.requests:
            assert time.monotonic() < deadline, "the bytes did not arrive"
            time.sleep(0.02)
        process.kill()
    assert not (root / "toy").exists()
    fetch("toy", root, Options(say=lambda line: None), manifest)
    assert tree(root / "toy") == {"toy.bin": content}
    have = server.requests[-1][1]
    assert have == (f"bytes={sent}-" if sent else None)


# ---- two at once ----


def test_two_downloads_at_once_do_no_harm(root: Path, server: Server, manifest: Path) -> None:
    server.files["one/toy.zip"] = Served(ARCHIVE, stalls=[2000])  # until the second process waits
    command = [sys.executable, "-m", "data_download", "toy", "--root", str(root), "--manifest", str(manifest)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        deadline = time.monotonic() + 60
        while not server.requests:
            assert time.monotonic() < deadline, "the first process asked for nothing"
            time.sleep(0.02)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == "toy: another process is fetching it, waiting.\n"
            server.release.set()
            assert second.stdout.read() == f"toy: present in {root / 'toy'}\n"
        assert first.communicate(timeout=30)[0].endswith(f"toy: in {root / 'toy'}\n")
    assert (first.returncode, second.returncode) == (0, 0)
    assert tree(root / "toy") == stripped(ONE)
    assert [wanted for _, wanted in server.requests] == [None, "bytes=2000-"]  # the second process asked for nothing
    assert leftovers(root) == ["lock"]
