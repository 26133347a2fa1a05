"""What the README shows must run as it stands."""

import re
from pathlib import Path

import torch

from regteach.__main__ import USAGE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_package_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {"moving": torch.rand(1, 1, 160, 192, 160)}
    exec(example, names)
    torch.testing.assert_close(names["warped"], names["moving"], rtol=0, atol=1e-4)  # an identity, through a spline


def test_every_command_is_one():
    commands = set(re.findall(r"(?:^|`|/)(?:make|python -m regteach) ([a-z]+)\b", README, re.MULTILINE))
    assert {"course", "lab", "test", "doctor", "start"} <= commands
    for command in commands:
        assert re.search(rf"^  {command} ", USAGE, re.MULTILINE), command


def test_every_link_leads_to_a_file():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
