"""The doctor says what is missing and what to do, and its exit status says whether the course can run."""

import pytest

from regteach import bootstrap
from regteach.course import doctor


def test_this_machine_is_examined_whole(capsys):
    status = doctor.main()
    said = capsys.readouterr().out
    looked_at = "Python, packages, test tools, torch, torchvision, device, memory, disk, data, Chromium"
    for what in looked_at.split(", "):
        assert f" {what} " in said, what
    assert said.rstrip().endswith("The course can run.") == (status == 0)


@pytest.fixture
def fast(monkeypatch):
    """Leave the look at torch out: it starts another Python."""
    monkeypatch.setattr(doctor, "_torch", list)


def states():
    return {finding.what: finding for finding in doctor.examine()}


@pytest.mark.usefixtures("fast")
def test_a_missing_package_stops_the_course(monkeypatch, capsys):
    monkeypatch.setattr(bootstrap, "lacking", lambda root, test: ["einops 0.8.2 is not installed"])
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert "MISSING packages" in said
    assert "einops 0.8.2 is not installed" in said
    assert "python -m regteach course sets up .venv" in said
    assert "The course cannot run yet: packages." in said


@pytest.mark.usefixtures("fast")
def test_an_unsupported_python_stops_the_course(monkeypatch):
    monkeypatch.setattr(bootstrap, "SUPPORTED", ((3, 99),))
    found = states()
    assert found["Python"].state == doctor.MISSING
    assert "packages" not in found


@pytest.mark.usefixtures("fast")
def test_absent_data_are_named_with_the_command_that_fetches_them(monkeypatch, tmp_path):
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    found = states()["data"]
    assert found.state == doctor.MISSING
    assert str(tmp_path) in found.found
    assert "mnist-5k" in found.to_do


@pytest.mark.usefixtures("fast")
def test_a_full_disk_stops_the_course_and_little_memory_does_not(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2e8}))
    monkeypatch.setattr(doctor, "_total_memory_gb", lambda: 2.0)
    found = states()
    assert found["disk"].state == doctor.MISSING
    assert (found["memory"].state, found["memory"].to_do[-8:]) == (doctor.NOTE, "--jobs 1")


def test_a_torch_that_does_not_load_and_a_pair_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE", "import sys; sys.exit('ImportError: libtorch.so is broken')")
    (torch,) = doctor._torch()
    assert (torch.state, torch.found) == (doctor.MISSING, "does not load: ImportError: libtorch.so is broken")
    facts = {"torch": "2.13.0", "threads": 2, "cuda": "13", "devices": [["H", 141.2]]}
    facts["torchvision"] = ["0.1", "no nms\nx"]
    monkeypatch.setattr(doctor, "_PROBE", f"import json; print(json.dumps({facts!r}))")
    found = {finding.what: finding for finding in doctor._torch()}
    assert found["torchvision"].state == doctor.NOTE
    assert found["torchvision"].found == "0.1 does not load with torch 2.13.0 (no nms)"
    assert found["device"].found == "CUDA 13: H with 141 GB"
