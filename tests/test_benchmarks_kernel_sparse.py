"""The benchmark of sparse matches: methods with known answers, scenes, who is chosen on, and a whole quick run."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from truths.fields import one_sentence

from benchmarks import kernel_sparse as bench
from benchmarks import sparse_scenes as scenes
from regteach.data.matches import Faults
from regteach.points_task import Drawn

SLOPE = torch.tensor([[0.1, 0.0, 0.05], [0.0, -0.1, 0.0], [0.02, 0.0, 0.2]])


def linear(faults: Faults, seed: int) -> scenes.Problem:
    """A linear motion."""
    points = 100 * torch.rand(100, 3, generator=torch.Generator().manual_seed(seed))
    given, asked = points[:80], 30 + 0.4 * points[80:]
    return scenes.Problem(Drawn(given, given @ SLOPE, asked, asked @ SLOPE))


def test_methods_that_continue_a_slope_are_exact_on_one() -> None:
    problem = linear(Faults(), 0)
    for name, method in bench.METHODS.items():
        best = min(bench.error(bench.solved(method, 20, p), problem) for p in method.choices)
        assert (best < 1e-2) == name.startswith(("local affine", "thin plate", "linear")), name
    still = bench.error(bench.solved(bench.METHODS["nothing"], 0, 0.0), problem)
    assert still == pytest.approx(float(problem.drawn.truth.norm(dim=1).mean()))


def test_every_method_has_a_name_of_its_own_answer() -> None:
    problem = scenes.lungs(scenes.stand_in()).pairs["test"][0](Faults(), 0)
    answers = {
        name: bench.solved(method, 20, method.choices[0])(problem).sum().item()
        for name, method in bench.METHODS.items()
    }
    assert len(set(answers.values())) == len(answers)


def test_a_parameter_is_chosen_on_validation_pairs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def draw(split: str, faults: Faults, seed: int) -> scenes.Problem:
        seen.append((split, seed))
        given = linear(faults, seed).drawn
        offset = {"validation": 3.0, "test": 1.0}[split]
        return scenes.Problem(Drawn(given.keypoints, given.displacements, given.query, given.truth + offset))

    pairs: Any = {split: [partial(draw, split)] for split in ("validation", "test")}
    scene = scenes.Scene("linear", "made up", pairs, lambda number: linear(Faults(), number))
    method = bench.Method(lambda x, y, d, k, p: x @ SLOPE + p, (1.0, 2.0, 3.0), False)
    monkeypatch.setattr(bench, "METHODS", {"made up": method})
    (row,) = bench.classical_rows(scene, {"perfect": Faults()}, (5,), (0,))
    assert row["chosen"] == 3.0
    assert row["error"] == pytest.approx(2 * 3**0.5, abs=1e-4)
    assert set(seen) == {("validation", bench.CHOOSING_SEED), ("test", 0)}


def test_the_phantom_is_exact_and_its_patients_differ() -> None:
    scene = scenes.phantom((1, 1, 1), 24.0, 60)
    (test,), (validation,) = scene.pairs["test"], scene.pairs["validation"]
    clean, bad = test(Faults(), 0).drawn, test(Faults(noise_mm=2.0), 0).drawn
    assert torch.equal(clean.keypoints, bad.keypoints)
    assert torch.equal(clean.truth, bad.truth)
    assert float((bad.displacements - clean.displacements).std()) == pytest.approx(2.0, rel=0.2)
    assert not torch.equal(clean.query, validation(Faults(), 0).drawn.query)
    # Inside a lung the motion is smooth: a spline through all points comes near the exact forks.
    spline = bench.error(bench.solved(bench.METHODS["thin plate"], 0, 0.0), scenes.Problem(clean))
    assert spline < 0.3 * float(clean.truth.norm(dim=1).mean())
    features = test(Faults(), 0).features
    assert features is not None
    assert features(clean.query).shape == (len(clean.query), scenes.FEATURES)
    assert scene.item(3).drawn.truth.isfinite().all()


def test_ranks_are_places(capsys: pytest.CaptureFixture[str]) -> None:
    scene = scenes.Scene("made up", "made up", {}, lambda number: linear(Faults(), number))
    values = {("a", 0): 1.0, ("b", 0): 2.0, ("a", 1): 5.0, ("b", 1): 2.0}
    rows = [{"method": m, "k": 0, "level": "perfect", "seed": s, "error": e} for (m, s), e in values.items()]
    table = bench.rank_table(scene, rows, 30, ["perfect"], (0, 1))
    assert sorted(table.rows) == [("a", "1.0", "2.0"), ("b", "2.0", "1.0")]
    assert table.notes == ["First by seed: 0 a, 1 b."]


def run(folder: Path) -> tuple[dict[str, Any], str]:
    file = folder / "result.json"
    bench.main(["--quick", "--json", str(file), "--steps", "1", "--seeds", "0"])
    return json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".md").read_text(encoding="utf-8")


def test_a_quick_run(tmp_path: Path) -> None:
    record, text = run(tmp_path)
    assert text.startswith("Quick mode")
    titles = [table["title"] for table in record["tables"]]
    assert [title.split(",")[0].split(":")[0] for title in titles] == ["lungs"] * 3 + ["phantom"] * 3
    by_level = {table["title"].split(":")[0]: table for table in (record["tables"][0], record["tables"][3])}
    names = {scene: [row[0] for row in table["rows"]] for scene, table in by_level.items()}
    assert names["lungs"] == [*bench.METHODS, *bench.FORMS]
    assert names["phantom"] == [*bench.METHODS, *bench.HEADS]
    assert all(len(row) == len(table["columns"]) for table in record["tables"] for row in table["rows"])
    assert {row["k"] for row in record["records"]} == {0, 4, 8, 12}
    assert all(row["error"] > 0 for row in record["records"])
    assert any("the aim is at most 0.771" in note for note in by_level["lungs"]["notes"])


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as missing:
        scenes.lungs()
    assert one_sentence(missing.value)
    for wrong in (["--steps", "0"], ["--seeds"]):
        with pytest.raises((ValueError, SystemExit)):
            bench.main(["--quick", *wrong])
