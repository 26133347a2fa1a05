"""GeoReg on real anatomy as a benchmark: exact answers score so, what is missing is said, and a whole quick run."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from truths.fields import one_sentence

from benchmarks import georeg_brains as bench
from benchmarks import networks, tables
from benchmarks.pairwise import Optimisation, optimised
from regteach.affine import Affine, AffineBounds
from regteach.checkpoints import Model, save_model
from regteach.cohort_task import CohortTask
from regteach.data.cohort import Cohort
from regteach.data.large import deformed
from regteach.grid import Grid
from regteach.nets.istn import count_parameters
from regteach.recipes import find_recipe
from regteach.sampling import grid_points, warp
from regteach.similarity import ncc
from regteach.transforms import Identity, Transform, displacement, jacobian_determinant

CPU = torch.device("cpu")
FLAT = Grid((48, 48))


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    return networks.stand_in(FLAT, people=6)


@pytest.fixture
def stand_ins(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins in the place of the hippocampus, and no time for an optimisation."""
    monkeypatch.setattr(networks, "load_cohort", lambda name: cohort)
    monkeypatch.setattr(bench, "optimised", lambda moving, fixed, grid, how, splines: Identity(grid.dim))


def shift(*mm: float) -> Affine:
    return Affine(torch.eye(len(mm))[None], torch.tensor([mm]), torch.zeros(len(mm)))


# ---- what is measured ----


def test_an_exact_transform_scores_as_such(cohort: Cohort) -> None:
    moved = deformed(cohort, "all", "small", copies=2)
    pairs = moved.pairs("test")
    trial = bench.Trial("retina", "deformed", moved, pairs, moved.truth)

    def answers(moving: Tensor, fixed: Tensor) -> Transform:
        (pair,) = [p for p in pairs if torch.equal(moved.images[[p[1]]], fixed)]
        return moved.truth(*pair)

    ways = {"nothing": lambda moving, fixed: Identity(2), "truth": answers}
    found, peaks = bench.measured(trial, ways, CPU)
    assert set(peaks) == set(found) == {"nothing", "truth"}
    exact = found["truth"]
    assert exact["dice"] == [1.0] * len(pairs)
    assert exact["hd95"] == [0.0] * len(pairs)
    assert exact["error"] == pytest.approx([0.0] * len(pairs), abs=1e-5)
    assert max(exact["folding"]) == 0 < min(exact["sdlogj"])
    assert max(found["nothing"]["dice"]) < 1
    assert min(found["nothing"]["error"]) > 0
    assert networks.summary(exact)["pairs"] == len(pairs)


def test_a_structure_that_is_lost_is_as_far_off_as_the_image_is_long(cohort: Cohort) -> None:
    (pair, *_) = cohort.pairs("test")
    away = bench.figures(bench.Trial("retina", "", cohort, (pair,)), *pair, shift(500.0, 0.0), CPU)
    assert away["dice"] == 0
    assert away["hd95"] == pytest.approx(math.hypot(*FLAT.extent))
    assert "error" not in away  # nobody knows the answer


def test_a_training_step_leaves_the_network_alone(cohort: Cohort) -> None:
    recipe = bench.recipe_of("retina", cohort, quick=True)
    network: Any = networks.untrained(recipe.config)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    bench.training_step(network, CohortTask(recipe, cohort), CPU)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


# ---- without learning ----


def test_optimisation_finds_a_known_motion() -> None:
    """An affine image motion by the affine; a bent one by the splines only. Both without a fold."""
    points = grid_points(FLAT)
    image = (torch.sin(points[..., 0] / 5) * torch.cos(points[..., 1] / 6) + 1)[None, None] / 2
    bounds = AffineBounds(8.0, 30.0, 1.4, 45.0, 0.2)
    how = Optimisation("ncc", bounds, control_mm=12.0, bending=0.01, affine=(2, 1), splines=(1,), steps=50)
    angle = torch.tensor(0.1)
    matrix = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])[None]
    truth = Affine(matrix, torch.tensor([[2.0, -1.5]]), torch.tensor(FLAT.centre))
    found = optimised(image, warp(image, truth, FLAT), FLAT, how, splines=False)
    inside = (slice(None), slice(8, -8), slice(8, -8))
    assert (displacement(found, FLAT) - displacement(truth, FLAT))[inside].norm(dim=-1).mean() < 0.1
    assert ncc(image, warp(image, truth, FLAT)) < 0.9

    def bent(x: Tensor) -> Tensor:
        return x + 3.0 * torch.sin(x.flip(-1) / 6)

    fixed = warp(image, bent, FLAT)
    alike = [
        float(ncc(warp(image, t, FLAT), fixed))
        for t in (optimised(image, fixed, FLAT, how, splines=splines) for splines in (False, True))
    ]
    assert alike[0] < 0.95 < 0.99 < alike[1]
    assert jacobian_determinant(optimised(image, fixed, FLAT, how, splines=True), FLAT).min() > 0


def test_the_search_beside_a_model_is_its_own_unless_that_starts_near_the_answer() -> None:
    given = {name: find_recipe(f"georeg-{name}") for name in ("retina", "hippocampus", "digits")}
    found = {name: bench.without_network(recipe) for name, recipe in given.items()}
    assert found["retina"] == replace(given["retina"].refinement, restart=False)
    assert found["hippocampus"] == replace(given["hippocampus"].refinement, restart=False, coarser=(50, 50))
    assert found["digits"].mode == "greedy" != given["digits"].refinement.mode


# ---- what is said ----


def test_statements_follow_the_numbers() -> None:
    dice = {bench.SPLINES: [0.7, 0.7], bench.ONE: [0.75, 0.65], bench.REFINED: [0.8, 0.78]}
    records = [{"method": name, "dice": tables.mean(v), "folding": 0.1} for name, v in dice.items()]
    found = {name: {"dice": values} for name, values in dice.items()}
    notes = bench.statements("hippocampus", records, found)
    assert notes[0].endswith("Dice: 0.700; the aim is at least 0.72: missed by 0.020.")
    assert notes[1].endswith("Dice: 0.790; the aim is at least 0.78: reached.")
    assert notes[2].endswith("folding, %: 0.100; the aim is at most 0.5: reached.")
    assert "-0.000, ahead in 1 of 2 pairs" in notes[3] or "+0.000, ahead in 1 of 2 pairs" in notes[3]
    assert "+0.090, ahead in 2 of 2 pairs" in notes[4]
    assert "ANTs SyN 0.716 (SDlogJ 0.17)" in notes[5]
    assert bench.statements("retina", [], {}) == []


def test_a_quick_run(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    bench.main(["--quick", "--device", "cpu", "--parts", "hippocampus", "retina", "--json", str(file)])
    record, text = json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".md").read_text(encoding="utf-8")
    assert text.startswith("Quick mode")
    assert record["command"].startswith("python -m benchmarks.georeg_brains")
    assert [table["title"].split()[0] for table in record["tables"]] == ["georeg-hippocampus", "georeg-retina"]
    for table in record["tables"]:
        names = [row[0] for row in table["rows"]]
        assert names == [bench.NOTHING, bench.AFFINE, bench.SPLINES, bench.GREEDY, bench.ONE, bench.REFINED]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
        assert not any("the aim is" in note for note in table["notes"])
    rows = {(r["part"], r["method"]): r for r in record["records"]}
    still, one = rows["retina", bench.NOTHING], rows["retina", bench.ONE]
    assert one["dice"] == still["dice"]  # untrained: the identity
    assert one["error"] == still["error"] == 0
    assert one["parameters"] > 0
    assert "parameters" not in still


# ---- what is not there ----


def test_without_weights_the_rest_is_measured_and_with_them_all(
    cohort: Cohort, stand_ins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(networks.find_recipe("georeg-hippocampus"), middle=())  # the stand-ins are small and flat
    monkeypatch.setattr(networks, "find_recipe", lambda name: whole)
    arguments = ["--device", "cpu", "--parts", "hippocampus", "--pairs", "2", "--weights", str(tmp_path)]
    (table,) = bench.main(arguments)["tables"]
    assert [row[0] for row in table["rows"]] == [bench.NOTHING, bench.AFFINE, bench.SPLINES, bench.GREEDY]
    (missing,) = [note for note in table["notes"] if "no weights" in note]
    assert "georeg-hippocampus.safetensors" in missing
    assert one_sentence(ValueError(missing))
    recipe = bench.recipe_of("hippocampus", cohort, quick=True)
    network: Any = networks.untrained(recipe.config)
    model = Model("georeg-hippocampus", network, replace(recipe.refinement, steps=2))
    save_model(tmp_path / "georeg-hippocampus.safetensors", model)
    record = bench.main(arguments)
    (table,) = record["tables"]
    assert [row[0] for row in table["rows"]][4:] == [bench.ONE, bench.REFINED]
    assert table["notes"][0].startswith(f"{bench.ONE}: Dice")
    assert not any("no weights" in note for note in table["notes"])
    assert {r.get("parameters") for r in record["records"]} == {None, count_parameters(network)}


@pytest.mark.parametrize(
    ("part", "command"),
    [
        ("hippocampus", "data_download hippocampus"),
        ("brains", "data_download allen-donors"),
        ("brains-t1t2", "data_download allen-donors"),
        ("mni-t1t2", "data_download mni152"),
        ("oasis", "data_download neurite-oasis-3d"),
    ],
)
def test_a_table_without_data_is_a_sentence(
    part: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    # What was read before does not count.
    monkeypatch.setattr(networks, "load_cohort", networks.load_cohort.__wrapped__)
    record = bench.main(["--device", "cpu", "--parts", part])
    (table,) = record["tables"]
    assert not record["records"]
    assert "left out" in table["title"]
    (note,) = table["notes"]
    assert command in note
    assert one_sentence(FileNotFoundError(note))


def test_bad_options_get_a_sentence() -> None:
    with pytest.raises(ValueError, match="1 or more") as caught:
        bench.main(["--pairs", "0"])
    assert one_sentence(caught.value)
