"""Benchmark of kernel fields: that it runs, that its forms compute one field, and what it says about its aims."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from truths.fields import one_sentence

from benchmarks import kernel_field as benchmark
from regteach.sampling import flat_points

CPU = torch.device("cpu")
OPTIONS = benchmark.Options(device="cpu", channels=8, plain_voxels=100)


def test_a_quick_run_writes_its_tables(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    returned = benchmark.main(["--quick", "--json", str(file), "--neighbours", "5", "90", "--channels", "8"])
    record, text = json.loads(file.read_text()), file.with_suffix(".md").read_text()
    assert record["command"].startswith("python -m benchmarks.kernel_field --quick")
    assert record["quick"]
    assert text.startswith("Quick mode")
    assert "not for clinical use" in text
    assert len(record["records"]) == len(returned["records"]) == 2 + 2 + 1
    for table in record["tables"]:
        assert f"## {table['title']}\n" in text
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
        assert not any(" aim" in note for note in table["notes"])  # a stand-in is held to nothing
    for r in record["records"][:2]:
        assert r["differs"] < 1e-5
        assert min(r["seconds"], r["plain_seconds"], r["ratio"]) > 0


def test_the_plain_form_is_scaled_up_from_the_voxels_it_was_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    case = benchmark.Case.of(benchmark.TINY, 40, 8, CPU)
    monkeypatch.setattr(benchmark, "timed", lambda compute, device: (compute(), {"seconds": 2.0, "wall": 3.0}))
    record = benchmark.dense(case, 5, OPTIONS)
    assert record["plain_voxels"] == 100
    assert record["plain_seconds"] == pytest.approx(2.0 * benchmark.TINY.size / 100)
    assert record["ratio"] == pytest.approx(benchmark.TINY.size / 100)
    assert record["gathered_gb"] == pytest.approx(benchmark.TINY.size * 5 * 8 * 4 / 1e9)


def test_a_form_that_computes_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = benchmark.Case.of(benchmark.TINY, 40, 8, CPU)
    assert benchmark.dense(case, 5, OPTIONS)["differs"] < 1e-5
    field = case.blocked(5, OPTIONS)
    monkeypatch.setattr(benchmark.Case, "blocked", lambda self, k, options: field.flip(0))
    assert benchmark.dense(case, 5, OPTIONS)["differs"] > 0.1


def test_keypoints_lie_in_two_lungs_at_the_same_places_at_any_resolution() -> None:
    half, full = (benchmark.Case.of(grid, 1024, 8, CPU) for grid in (benchmark.HALF, benchmark.FULL))
    assert torch.equal(half.values, full.values)
    assert torch.allclose(half.keypoints_mm, full.keypoints_mm)
    assert len(half.keypoints_mm) == 1024
    unit = half.keypoints_mm / torch.tensor(benchmark.HALF.extent)
    assert ((unit > 0) & (unit < 1)).all()
    middle = (unit[:, 0] - 0.5).abs()
    assert middle.min() > 0.05
    assert 0.4 < (unit[:, 0] > 0.5).float().mean() < 0.6
    queries = half.queries(flat_points(benchmark.TINY)[0])
    assert queries.shape == (benchmark.TINY.size, 8)
    assert queries.std() > 0.5


def test_what_is_said_about_the_aims() -> None:
    r: dict[str, Any] = {
        "shape": benchmark.FULL.shape, "keypoints": 1024, "k": 30, "seconds": 20.0, "peak_mb": 500.0, "ratio": 14.0,
        "plain_seconds": 280.0, "plain_voxels": 100, "gathered_gb": 74.0, "differs": 1e-6,
    }  # fmt: skip
    notes = benchmark.neighbours_table([r], OPTIONS).notes
    assert sum("reached" in note for note in notes) == 3
    worse = r | {"seconds": 41.0, "peak_mb": 1400.0, "ratio": 7.5}
    notes = benchmark.neighbours_table([worse], OPTIONS).notes
    assert [note.split("missed by ")[1] for note in notes[:3]] == ["1.0.", "100.", "0.5."]
    for other in (r | {"k": 20}, r | {"shape": benchmark.HALF.shape}):
        assert not any(" aim" in note for note in benchmark.neighbours_table([other], OPTIONS).notes)
    assert not any(" aim" in note for note in benchmark.neighbours_table([r], replace(OPTIONS, quick=True)).notes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sizes", "quarter"], "quarter"),
        (["--neighbours", "0"], "1 or more"),
        (["--keypoints", "-3"], "1 or more"),
        (["--plain-voxels", "0"], "1 or more"),
    ],
)
def test_what_can_not_be_measured_is_said(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError) as error:
        benchmark.main(["--quick", *arguments])
    assert one_sentence(error.value, said)
