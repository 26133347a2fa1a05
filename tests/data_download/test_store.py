"""Where data is, what counts as present, what a check finds, and how folders change places."""

import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest
from serving import sha256, urls_entry, write_manifest

import data_download
from data_download import placing, store
from data_download.manifest import find
from data_download.placing import locked, recover, swap, work_folder
from data_download.store import Check, check, locate, presence, present, write_receipt


def put(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    files = [{"path": "a.txt", "size": 1, "sha256": sha256(b"alpha")}, {"path": "b.txt", "size": 1}]
    return write_manifest(tmp_path / "m.toml", urls_entry("toy-set", ["http://none.test/"], files, {"*.txt": 2}))


# ---- the root ----


def test_the_root_is_the_variable_or_the_users_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_download.root() == Path(platformdirs.user_cache_dir("regteach", appauthor=False))
    monkeypatch.setenv("REGTEACH_DATA", str(root))
    assert data_download.root() == root
    monkeypatch.setenv("REGTEACH_DATA", "~/somewhere")
    assert data_download.root() == Path.home() / "somewhere"
    monkeypatch.setenv("REGTEACH_DATA", "")
    assert data_download.root() == Path(platformdirs.user_cache_dir("regteach", appauthor=False))


def test_importing_is_cheap() -> None:
    code = (
        "import sys, data_download; heavy = {'requests', 'pooch', 'tqdm', 'torch', 'numpy', 'regteach'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- presence ----


def test_presence_counts_the_expected_files_whoever_put_them_there(root: Path, manifest: Path) -> None:
    entry = find("toy-set", manifest)
    assert str(presence(entry, root)) == "absent"
    put(root / "toy_set", a="alpha")
    assert str(presence(entry, root)) == "partly (1 of 2)"
    assert present("toy_set", root, manifest)
    put(root / "toy_set", b="beta", c="gamma")
    assert str(presence(entry, root)) == "present"
    (root / "toy_set" / "a.txt").unlink()
    (root / "toy_set" / "c.txt").unlink()
    (root / "toy_set" / "d.txt").mkdir()  # a folder is not a file
    assert str(presence(entry, root)) == "partly (1 of 2)"


def test_locate_gives_a_path_or_the_command(root: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGTEACH_DATA", str(root))
    with pytest.raises(FileNotFoundError, match=r"'toy-set' is not in .*: run `python -m data_download toy-set`\.$"):
        locate("toy-set", manifest=manifest)
    with pytest.raises(FileNotFoundError, match=rf"`python -m data_download toy-set --root {root}`"):
        locate("toy-set", base=root, manifest=manifest)
    put(root / "toy_set", a="alpha", b="beta")
    assert locate("toy-set", manifest=manifest) == root / "toy_set"
    assert locate("toy-set", "a.txt", manifest=manifest) == root / "toy_set" / "a.txt"
    with pytest.raises(FileNotFoundError, match=r"holds no 'z.txt': run `python -m data_download toy-set --force`"):
        locate("toy-set", "z.txt", manifest=manifest)
    with pytest.raises(ValueError, match="the nearest name is 'toy-set'"):
        locate("toyset", manifest=manifest)


def test_a_read_only_root_can_be_read(root: Path, manifest: Path) -> None:
    put(root / "toy_set", a="alpha", b="beta")
    before = sorted(root.rglob("*"))
    assert present("toy-set", root, manifest)
    assert sorted(root.rglob("*")) == before  # reading makes no file


# ---- check ----


def test_check_hashes_again(root: Path, manifest: Path) -> None:
    entry = find("toy-set", manifest)
    folder = put(root / "toy_set", a="alpha", b="beta")
    assert check(entry, root) == Check(1, (), 1)  # the manifest knows a, nobody knows b
    write_receipt(folder, entry, {}, {"a.txt": sha256(b"alpha"), "b.txt": sha256(b"beta")})
    assert check(entry, root) == Check(2, (), 0)
    put(folder, b="changed")
    assert check(entry, root) == Check(1, ("b.txt",), 0)
    (folder / "b.txt").unlink()
    assert check(entry, root) == Check(1, ("b.txt",), 0)
    put(folder, a="changed")
    write_receipt(folder, entry, {}, {"a.txt": sha256(b"changed")})
    assert check(entry, root).differing == ("a.txt",)  # the manifest has the last word
    (folder / store.RECEIPT).write_text("{")
    with pytest.raises(data_download.DataError, match="can not be read"):
        check(entry, root)


# ---- placing ----


def test_swap_replaces_a_folder_and_leaves_nothing_behind(tmp_path: Path) -> None:
    new, folder, old = put(tmp_path / "new", a="2"), put(tmp_path / "data", a="1"), tmp_path / "old"
    swap(new, folder, old)
    assert (folder / "a.txt").read_text() == "2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_swap_does_not_touch_files_that_it_does_not_know(tmp_path: Path) -> None:
    new, folder = put(tmp_path / "new", a="2"), put(tmp_path / "data", a="1", mine="work of a week")
    with pytest.raises(data_download.DataError, match=r"holds 1 file\(s\) .* such as mine.txt: move them away"):
        swap(new, folder, tmp_path / "old")
    assert (folder / "a.txt").read_text() == "1"


def test_recover_after_each_step_of_a_swap(tmp_path: Path, root: Path) -> None:
    work, folder = tmp_path / "work", tmp_path / "data"
    put(work / "old", a="1")  # killed between the two renames
    put(work / "new", a="2")
    recover(folder, work)
    assert (folder / "a.txt").read_text() == "1"
    put(work / "old", a="0")  # killed before the old folder was removed
    recover(folder, work)
    assert (folder / "a.txt").read_text() == "1"
    assert list(work.iterdir()) == []


def test_a_reader_recovers_what_a_crash_left(root: Path, manifest: Path) -> None:
    entry = find("toy-set", manifest)
    put(work_folder(entry, root) / "old", a="1", b="2")
    assert present("toy-set", root, manifest)
    assert (root / "toy_set" / "a.txt").read_text() == "1"


def test_a_reader_leaves_a_live_swap_alone(root: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = find("toy-set", manifest)
    work = work_folder(entry, root)
    put(work / "old", a="1", b="2")
    original = placing.locked
    monkeypatch.setattr(placing, "locked", lambda folder, wait: original(folder, 0.0))
    with locked(work):
        assert not present("toy-set", root, manifest)
        assert (work / "old").exists()
    assert present("toy-set", root, manifest)


# ---- the lock ----


def test_the_lock_keeps_others_out_and_is_given_back(tmp_path: Path) -> None:
    waited: list[str] = []
    with (
        locked(tmp_path / "work"),
        pytest.raises(TimeoutError),
        locked(tmp_path / "work", wait=0.15, waiting=lambda: waited.append("once")),
    ):
        raise AssertionError("two hold the lock")
    assert waited == ["once"]
    with locked(tmp_path / "work", wait=0.0):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from data_download.placing import locked\n"
        f"with locked(Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError), locked(tmp_path, wait=0.0):
            pass
        process.kill()
        process.wait()
    with locked(tmp_path, wait=1.0):
        pass


def test_a_root_that_is_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(data_download.DataError, match=r"can not be written \(.*\): name another --root"),
        locked(tmp_path / "file" / "work"),
    ):
        pass
