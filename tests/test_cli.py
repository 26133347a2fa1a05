"""The command line: what it accepts, and what it says."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

import regteach
from regteach import cli
from regteach.bootstrap import ROOT
from regteach.course import commands, doctor, student, testing


@pytest.fixture
def called(monkeypatch):
    """Record the calls that the command line makes, instead of making them."""
    calls = []

    def recorder(name, value=0):
        def record(*arguments, **options):
            calls.append((name, arguments, options))
            return value

        return record

    monkeypatch.setattr(commands, "course", recorder("course", 1))
    monkeypatch.setattr(commands, "fetch_data", recorder("data"))
    monkeypatch.setattr(testing, "main", recorder("test"))
    monkeypatch.setattr(student, "lab", recorder("lab"))
    monkeypatch.setattr(student, "start", recorder("start", "Your copy"))
    monkeypatch.setattr(doctor, "main", recorder("doctor"))
    return calls


def test_course(called):
    assert cli.main(["course"]) == 1
    assert cli.main(["course", "--all", "--full", "--jobs", "3", "--only", "01", "03"]) == 1
    assert called == [
        ("course", ((),), {"full": False, "force": False, "jobs": 2}),
        ("course", (("01", "03"),), {"full": True, "force": True, "jobs": 3}),
    ]


def test_the_other_commands(called, capsys):
    for line in ("test --only static unit", "lab --no-browser --port 9999", "start 01 --again b", "doctor"):
        assert cli.main(line.split()) == 0
    assert [name for name, _, _ in called] == ["data", "test", "data", "lab", "start", "doctor"]
    assert called[1][1] == (("static", "unit"),)
    assert called[3][2] == {"browser": False, "port": 9999}
    assert called[4][1:] == (("01",), {"to": cli.Path("my"), "again": "b"})
    assert capsys.readouterr().out == "Your copy\n"


@pytest.mark.parametrize("line", ["", "corse", "course --jobs many", "start", "lab --port"])
def test_wrong_lines_end_with_usage(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(line.split())
    assert stopped.value.code == 2
    assert capsys.readouterr().err


def test_a_wrong_value_is_one_sentence(capsys):
    assert cli.main(["start", "77"]) == 2
    assert capsys.readouterr().err.startswith("regteach: there is no lesson '77'; there are ")


def test_data_that_cannot_be_had_stop_the_course_but_not_the_lab(called, monkeypatch, capsys):
    monkeypatch.setattr(commands, "fetch_data", lambda: 4)
    assert cli.main(["test"]) == 4
    assert called == []
    cli.main(["lab"])
    assert len(called) == 1
    assert capsys.readouterr().err == "Lessons that need the missing data will say so.\n"


def test_embedded_data_are_fetched_only_where_some_are_absent(monkeypatch):
    commands_run, there = [], {"mnist-5k": "present", "mni152": "partly"}
    monkeypatch.setattr(commands.subprocess, "call", lambda command, cwd: commands_run.append(command[1:]) or 3)
    entries = {name: SimpleNamespace(embedded=True, name=name) for name in there}
    monkeypatch.setattr("data_download.entries", lambda: entries)
    monkeypatch.setattr("data_download.store.presence", lambda entry, base: SimpleNamespace(state=there[entry.name]))
    assert commands.fetch_data() == 3
    assert commands_run == [["-m", "data_download", "--embedded"]]
    there["mni152"] = "present"
    assert commands.fetch_data() == 0
    assert len(commands_run) == 1


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "regteach", "start", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "--again" in done.stdout


def test_the_package_looks_names_up_when_they_are_used():
    code = "import sys, regteach; print('torch' in sys.modules, regteach.Grid.__module__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "regteach.grid", "False"]


def test_every_exported_name_is_there():
    for name in regteach.__all__:
        assert getattr(regteach, name).__name__ == name
    assert set(regteach.__all__) <= set(dir(regteach))
    with pytest.raises(AttributeError, match="regteach has no 'registr'"):
        _ = regteach.registr
