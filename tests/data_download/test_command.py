"""The command as a person runs it: as a folder and as a module, listing, fetching, checking, failing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Served, Server, sha256, urls_entry, write_manifest

from data_download import __main__ as command
from data_download.__main__ import main

REPOSITORY = Path(command.__file__).parent.parent


@pytest.fixture
def manifest(tmp_path: Path, server: Server) -> Path:
    server.files["a.txt"] = Served(b"alpha")
    row = {"path": "a.txt", "size": 5, "sha256": sha256(b"alpha")}
    toy = urls_entry("toy", [server.url()], [row], {"a.txt": 1}, people=1, embedded=True, note="A note.")
    broken = urls_entry("broken", [server.url()], [{"path": "b.txt", "size": 5}], {"b.txt": 1})
    return write_manifest(tmp_path / "m.toml", toy, broken)


@pytest.fixture
def run(root: Path, manifest: Path, capsys: pytest.CaptureFixture[str]):
    """Run the command on the test manifest; returns status, what it printed, and its complaints."""

    def go(*arguments: str) -> tuple[int, str, str]:
        status = main([*arguments, "--root", str(root), "--manifest", str(manifest), "--timeout", "2"])
        out, err = capsys.readouterr()
        return status, out, err

    return go


@pytest.mark.parametrize("how", [["data_download"], ["-m", "data_download"]], ids=["folder", "module"])
def test_it_lists_every_entry_of_the_real_manifest(how: list[str], root: Path) -> None:
    environment = os.environ | {"REGTEACH_DATA": str(root)}
    done = subprocess.run(
        [sys.executable, *how], cwd=REPOSITORY, capture_output=True, text=True, env=environment, check=True
    )
    for words in ("mnist-5k", "hippocampus", "absent", "BSD-3-Clause", "CC BY-SA 4.0", "5,000 images", "260 images"):
        assert words in done.stdout
    assert f"Data root: {root}" in done.stdout
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_a_list_cut_short_by_head_is_no_error(root: Path) -> None:
    line = f"{sys.executable} data_download | head -n 1"
    done = subprocess.run(line, shell=True, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Data root:")
    assert done.stderr == ""


def test_list_fetch_check(run, root: Path) -> None:
    status, out, _ = run()
    assert status == 0
    assert "toy                 absent" in out
    assert "(1 person, 1 image)" in out
    assert "A note." in out
    status, out, _ = run("toy")
    assert status == 0
    assert f"toy: in {root / 'toy'}" in out
    assert "toy                 present" in run()[1]
    status, out, _ = run("--check")
    assert status == 0
    assert "toy: present, 1 file(s) match their hash" in out
    assert "broken: absent" in out
    (root / "toy" / "a.txt").write_bytes(b"ALPHA")
    status, out, _ = run("--check", "toy")
    assert status == 1
    assert "1 differ or are missing: a.txt" in out


@pytest.mark.parametrize("word", ["embedded", "--embedded"])
def test_embedded_fetches_what_set_up_needs(run, root: Path, word: str) -> None:
    assert run(word)[0] == 0
    assert sorted(path.name for path in root.iterdir()) == [".downloads", "toy"]


def test_a_wrong_name_gets_the_nearest_and_nothing_is_fetched(run, root: Path) -> None:
    status, out, err = run("toy", "brokn")
    assert status == 2
    assert err == "There is no data set 'brokn'; the nearest name is 'broken'. `python data_download` lists all.\n"
    assert out == ""
    assert list(root.iterdir()) == []


def test_one_failure_does_not_stop_the_others(run, root: Path) -> None:
    status, _, err = run("broken", "toy")
    assert status == 1
    assert (root / "toy" / "a.txt").read_bytes() == b"alpha"
    assert "b.txt could not be fetched: " in err
    assert "Not fetched: broken. The same command goes on from here." in err
    assert "Traceback" not in err


def test_the_mirror_can_come_from_the_environment(
    run, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "a.txt").write_bytes(b"alpha")
    monkeypatch.setenv("REGTEACH_MIRROR", str(tmp_path / "mirror"))
    assert run("toy")[0] == 0
    assert server.requests == []


@pytest.mark.parametrize("missing", ["requests", "tqdm", "pooch"])
def test_a_missing_dependency_is_one_sentence(missing: str, root: Path, manifest: Path) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from data_download.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["toy", "--manifest", str(manifest)] + ([] if missing == "pooch" else ["--root", str(root)])
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"data_download needs the package {missing!r}, which {sys.executable} lacks: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_an_interrupt_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run", interrupted)
    assert main([]) == 130
    assert capsys.readouterr().err == "Interrupted: the same command goes on from here.\n"


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(options: object) -> int:
        raise OSError(28, "No space left on device", "/data/toy.part")

    monkeypatch.setattr(command, "_run", full)
    assert main([]) == 1
    assert capsys.readouterr().err == "/data/toy.part: No space left on device.\n"


def test_a_wrong_manifest_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--manifest", str(tmp_path / "none.toml")]) == 1
    assert capsys.readouterr().err == f"There is no manifest at {tmp_path / 'none.toml'}.\n"
