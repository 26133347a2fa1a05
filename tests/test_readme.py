"""What the README shows must run as it stands."""

import json
import re
from pathlib import Path

import pytest
import torch
from truths import pairs
from truths.pairs import FIXED, MOVING, Motion, untrained, write

from regteach import checkpoints
from regteach.__main__ import USAGE
from regteach.checkpoints import save_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


REGISTER, PACKAGE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files and the model that the README names, small and untrained."""
    moving, fixed = pairs.pair(3, Motion.of(3))
    write(tmp_path / "moving.nii.gz", moving, MOVING[3])
    write(tmp_path / "moving_labels.nii.gz", (moving > 0.3).astype("uint8"), MOVING[3])
    write(tmp_path / "fixed.nii.gz", fixed, FIXED[3])
    save_model(tmp_path / "istn-hippocampus.safetensors", untrained(3))
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_registration_example_runs(files):
    exec(REGISTER, {"points_mm": pairs.seen(FIXED[3])})
    assert len(json.loads((files / "out" / "report.json").read_text())["curve"]) == 51


def test_the_register_command_runs(files):
    from regteach import cli

    (line,) = re.findall(r"^python -m regteach (register .*)$", README, re.MULTILINE)
    assert cli.main(line.split()) == 0
    assert (files / "out" / "warped_labels.nii.gz").exists()


def test_the_package_example_runs():
    names = {"moving": torch.rand(1, 1, 160, 192, 160)}
    exec(PACKAGE, names)
    torch.testing.assert_close(names["warped"], names["moving"], rtol=0, atol=1e-4)  # an identity, through a spline


def test_every_command_is_one():
    commands = set(re.findall(r"(?:^|`|/)(?:make|python -m regteach) ([a-z]+)\b", README, re.MULTILINE))
    assert {"course", "lab", "test", "doctor", "start"} <= commands
    for command in commands:
        assert re.search(rf"^  {command} ", USAGE, re.MULTILINE), command


def test_every_link_leads_to_a_file():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
