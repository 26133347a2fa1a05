"""pyproject.toml, the locks and environment.yml name the same packages at the same versions."""

import importlib.metadata as metadata
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from regteach import bootstrap
from regteach.bootstrap import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = [Requirement(line) for line in PROJECT["dependencies"]]
TOOLS = [Requirement(line) for line in PROJECT["optional-dependencies"]["test"]]
CLASSICAL = [Requirement(line) for line in PROJECT["optional-dependencies"]["classical"]]


def lines(name: str) -> list[Requirement]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith(("#", "-r"))]


def versions(requirements: list[Requirement]) -> dict[str, str]:
    """Version by name; each must be pinned with == alone."""
    found = {}
    for requirement in requirements:
        (pin,) = requirement.specifier
        assert pin.operator == "==", requirement
        assert "+" not in pin.version, f"{requirement} is bound to one build"
        found[canonicalize_name(requirement.name)] = pin.version
    assert len(found) == len(requirements)
    return found


COURSE, TEST = versions(lines("requirements.lock")), versions(lines("requirements-test.lock"))
LOCKED = COURSE | TEST


@pytest.mark.parametrize("requirement", DIRECT + TOOLS, ids=str)
def test_what_pyproject_names_is_locked_within_its_range(requirement):
    lock = COURSE if requirement in DIRECT else LOCKED
    assert requirement.specifier.contains(lock[canonicalize_name(requirement.name)])


def test_the_locks_do_not_overlap():
    assert not set(COURSE) & set(TEST)
    assert "-r requirements.lock" in (ROOT / "requirements-test.lock").read_text(encoding="utf-8")


@pytest.mark.parametrize("requirement", CLASSICAL, ids=str)
def test_the_tools_of_others_are_locked_within_their_range(requirement):
    lock = versions(lines("requirements-classical.lock"))
    assert requirement.specifier.contains(lock[canonicalize_name(requirement.name)])
    assert "torch" not in lock  # comes with requirements.lock, which is installed first


def test_conda_gets_the_same_packages_at_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    assert pip[-1] == "--editable ."
    named = {canonicalize_name(requirement.name) for requirement in DIRECT + TOOLS}
    assert versions([Requirement(line) for line in pip[:-1]]) == {name: LOCKED[name] for name in named}


def test_everything_that_a_package_needs_is_locked():
    """The lock is closed: the needs of each installed package, on this platform, are in it."""
    todo, seen = DIRECT + TOOLS, set()
    while todo:
        requirement = todo.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        assert key[0] in LOCKED or _is_accelerator(key[0]), f"{requirement} is not locked"
        if key[0] not in LOCKED:
            continue
        for line in metadata.requires(requirement.name) or []:
            need = Requirement(line)
            extras = ("", *requirement.extras)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(need)
    extra = set(LOCKED) - {name for name, _ in seen} - {"setuptools"}  # it builds the editable install
    foreign = [r for r in lines("requirements.lock") if r.marker and not r.marker.evaluate()]
    assert extra <= {canonicalize_name(requirement.name) for requirement in foreign}


def _is_accelerator(name: str) -> bool:
    """Packages that only the CUDA build of torch needs; pip adds them where that build is chosen."""
    return re.match(r"nvidia-|cuda-|triton", name) is not None


def test_the_running_interpreter_has_what_is_locked():
    assert bootstrap.lacking(ROOT, test=True) == []


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0", "3.13.0"])
def test_every_locked_package_runs_on_every_supported_python(python):
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    for name in bootstrap.pins(ROOT / "requirements-test.lock"):
        needs = metadata.metadata(name)["Requires-Python"]
        assert not needs or SpecifierSet(needs).contains(python), f"{name} needs Python {needs}"


def test_the_supported_pythons_are_those_of_pyproject():
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [(3, minor) for minor in range(30) if supported.contains(f"3.{minor}")] == list(bootstrap.SUPPORTED)


def test_torch_is_pinned_to_one_release():
    assert [str(r.specifier) for r in DIRECT if r.name in ("torch", "torchvision")] == ["==2.13.0", "==0.28.0"]
