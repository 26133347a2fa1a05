"""Other people's tools behind our interface: a known motion comes back with its sign, axes and millimetres."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from truths.fields import one_sentence

from benchmarks import networks
from benchmarks import other_tools as bench
from benchmarks.classical import TOOLS, Tool
from regteach.affine import Affine
from regteach.data.cohort import Cohort
from regteach.grid import Grid
from regteach.sampling import grid_points, warp
from regteach.transforms import displacement

GRIDS = {2: Grid((44, 60), (1.5, 1.0)), 3: Grid((28, 36, 44), (1.5, 1.2, 1.0))}
SMALL = 0.01  # of a length: a pixel of the retina
SHIFT_MM = (3.0, -4.0, 2.0)


def blobs(grid: Grid) -> torch.Tensor:
    """A few smooth bumps of different widths and heights, so that no axis looks like another."""
    points = grid_points(grid)
    image = torch.zeros(grid.shape)
    for k, (at, height) in enumerate([((0.4, 0.45, 0.5), 1.0), ((0.6, 0.4, 0.55), 0.7), ((0.5, 0.65, 0.4), 0.5)]):
        middle = torch.tensor([a * side for a, side in zip(at, grid.extent, strict=False)])
        widths = torch.tensor([3.0 + k, 5.0 - k, 4.0])[: grid.dim]
        image = image + height * torch.exp(-(((points - middle) / widths) ** 2).sum(-1) / 2)
    return image[None, None]


@pytest.mark.parametrize("name", TOOLS)
def test_the_size_of_a_pixel_changes_nothing(name: str) -> None:
    tool, grid = TOOLS[name], GRIDS[2]
    if not tool.here or 2 not in tool.dims:
        pytest.skip(f"{name} is not installed, or takes no images of 2 axes")
    small = Grid(grid.shape, tuple(SMALL * h for h in grid.spacing))
    moving = blobs(grid)
    fixed = warp(moving, Affine(torch.eye(2)[None], torch.tensor([SHIFT_MM[:2]]), torch.zeros(2)), grid)
    large_field, small_field = (tool(moving, fixed, g).displacement for g in (grid, small))
    # Two runs of a tool with random samples differ a little, too.
    assert float((small_field / SMALL - large_field)[0][fixed[0, 0] > 0.2].norm(dim=-1).mean()) < 0.5  # mm


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("name", TOOLS)
def test_a_known_shift_is_found(name: str, dim: int) -> None:
    tool, grid = TOOLS[name], GRIDS[dim]
    if not tool.here:
        pytest.skip(f"{tool.module} is not installed: it has an environment of its own (requirements-classical.lock)")
    if dim not in tool.dims:
        pytest.skip(f"{name} takes images of {tool.dims} axes")
    moving = blobs(grid)
    truth = Affine(torch.eye(dim)[None], torch.tensor([SHIFT_MM[:dim]]), torch.zeros(dim))
    fixed = warp(moving, truth, grid)
    found = tool(moving, fixed, grid)
    inside = fixed[0, 0] > 0.2
    shift = displacement(found, grid)[0][inside].mean(0)
    assert shift.tolist() == pytest.approx(SHIFT_MM[:dim], abs=0.5)  # mm: sign, axes and spacing are right
    before, after = ((image - fixed)[0, 0].norm() for image in (moving, warp(moving, found, grid)))
    assert after < 0.5 * before  # bumps on nothing are no brain: not every tool gets all of it


def test_what_a_tool_does_not_take_is_said() -> None:
    tool = Tool("numpy", lambda moving, fixed, spacing: np.zeros((*moving.shape, 2)), "none", dims=(3,))
    with pytest.raises(ValueError) as caught:
        tool(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), Grid((8, 8)))
    assert one_sentence(caught.value, "numpy", "one channel")


def test_a_tool_that_is_not_here_is_named_and_has_no_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    still = Tool("numpy", lambda moving, fixed, spacing: np.zeros((*moving.shape, moving.ndim)), "stays")
    tools = {
        "here": still,
        "gone": Tool("no_such_module", still.field, "none"),
        "deep": Tool("numpy", still.field, "", (3,)),
    }
    monkeypatch.setattr(bench, "TOOLS", tools)
    out = bench.main(["--quick", "--parts", "slices", "--json", str(tmp_path / "o.json")])
    rows = {row["method"]: row for row in out["records"]}
    assert set(rows) == {"nothing", "here"}
    assert rows["here"]["dice"] == rows["nothing"]["dice"]
    text = (tmp_path / "o.md").read_text(encoding="utf-8")
    assert "here: stays." in text
    assert "gone is not installed here, and not measured." in text
    assert "deep" not in text
    assert json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))["quick"] is True


def test_every_part_names_models_that_ship() -> None:
    for names in bench.MODELS.values():
        assert all((bench.WEIGHTS / f"{name}.safetensors").exists() for name in names)


@pytest.mark.parametrize("part", ["template", "colin"])
def test_every_test_person_meets_the_real_image_both_ways(
    part: bench.Part, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    brains = networks.stand_in(Grid((16, 16, 16), (2.0,)), people=6)
    assert list(brains.structures) == [1, 2]
    # The real image has no second structure, and is one person on the grid of the others.
    person = networks.stand_in(brains.grid, people=6)
    real = replace(
        person,
        images=person.images[:1],
        soi=person.soi[:1, :1],
        labels=torch.where(person.labels[:1] == 1, 1, 0),
        people=("real",),
        structures={1: person.structures[1]},
        splits={"train": (), "validation": (), "test": (0,)},
        origin="One real T1.",
        given_pairs={},
    )
    asked = []

    def read(*where: object, sides: str) -> Cohort:
        asked.append((*where, sides))
        return real

    assert set(bench.REAL) == {"template", "colin"}
    monkeypatch.setitem(bench.REAL, part, (read, "a real T1"))
    monkeypatch.setattr(networks, "load_cohort", lambda name: brains)
    trial = bench.trial(part, bench.Options())
    assert asked == [(2.0, (16, 16, 16), "merged")]
    assert trial.what.startswith("a real T1 with each test person")
    both = trial.cohort
    tested = [brains.people[i] for i in brains.splits["test"]]
    assert list(both.people) == [*tested, "real"]
    assert {tuple(both.people[i] for i in pair) for pair in trial.pairs} == {
        pair for name in tested for pair in ((name, "real"), ("real", name))
    }
    assert both.labels.unique().tolist() == [0, 1]
    for k, i in enumerate(brains.splits["test"]):
        assert torch.equal(both.labels[k] == 1, brains.labels[i] == 1)
        assert torch.equal(both.soi[k, 0], brains.soi[i, 0])
        assert torch.equal(both.images[k], brains.images[i])
    assert both.origin == f"One real T1. {brains.origin}"
