"""Benchmarks of GeoReg in quick mode: that they run, that forms agree, how bytes are counted, what is said."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from truths.fields import one_sentence

from benchmarks import neighbourhood_attention as benchmark
from benchmarks.neighbourhood_attention import FORMS, OPERATIONS, SMALL, Case, Options, main
from benchmarks.tables import NOT_MEASURED

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What a quick run writes."""
    file = tmp_path_factory.mktemp("quick") / "result.json"
    main(["--quick", "--device", "cpu", "--json", str(file)])
    return json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".md").read_text(encoding="utf-8")


def test_a_quick_run_says_what_it_is(written: tuple[dict[str, Any], str]) -> None:
    record, text = written
    assert {"command", "date", "seeds", "hardware", "gpu", "quick", "tables", "records"} <= set(record)
    assert text.startswith("Quick mode")
    assert "not for clinical use" in text
    assert f"160 x 192 x 160 on a GPU: {NOT_MEASURED}." in text
    assert [(r["operation"], r["form"]) for r in record["records"]] == [(o, f) for o in OPERATIONS for f in FORMS]
    for table in record["tables"]:
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
        assert not any("aim" in note for note in table["notes"])  # a stand-in is held to nothing


def test_bytes_are_counted(written: tuple[dict[str, Any], str]) -> None:
    """Slabs keep their inputs alone; plain keeps what is said by, asked of and taken from every neighbour."""
    n, c, k, weights = 1000, 16, 27, 4 * 3 * 16 * 16
    kept = {(r["operation"], r["form"]): 1e6 * r["kept_mb"] for r in written[0]["records"]}
    inputs = 4 * n * (c + c + 3) + weights
    assert kept["points", "slabs"] == pytest.approx(inputs, rel=0.01)
    from_parents = 4 * (n * (c + 3 + 3) + n // 8 * (c + 3)) + weights  # one 3 is where the children rest
    assert kept["parents", "slabs"] == pytest.approx(from_parents, rel=0.01)
    every_neighbour = 4 * n * k * (3 * c + c // 2)  # messages, keys and values; angles
    for operation in OPERATIONS:
        assert every_neighbour < kept[operation, "plain"] < 1.15 * every_neighbour


@pytest.mark.parametrize("operation", OPERATIONS)
def test_bytes_grow_with_the_points(operation: str) -> None:
    """What is computed where a form does not fit is what it keeps."""
    for form in FORMS:
        case = Case(operation, (16, 14, 12), 4, form)
        form = benchmark.Counted(*benchmark.prepared(case, CPU))
        form()
        assert benchmark.expected_bytes(case) == pytest.approx(form.kept_bytes, rel=0.05)


def test_all_forms_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    value, gradients = benchmark.differences()
    assert 0 < value < 1e-5
    assert 0 < gradients < 1e-5
    original = benchmark.neighbourhood_attention
    monkeypatch.setattr(benchmark, "neighbourhood_attention", lambda **given: 1.01 * original(**given))
    assert benchmark.differences()[0] == pytest.approx(0.01, rel=0.01)  # and it would be noticed


def test_a_process_of_its_own_measures_the_same() -> None:
    case = Case("points", SMALL, 16, "refactored")
    own = benchmark.in_a_process_of_its_own(case, Options(device="cpu", seconds=0.01))
    here = benchmark.measured(case, "cpu", 1, 0.01)
    assert own["kept_mb"] == here["kept_mb"]
    assert set(own) == set(here)
    assert 0 < own["peak_mb"] < 100


def test_what_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def measured(case: Case, *_: object) -> dict[str, Any]:
        ran.append(case.form)
        return {"peak_mb": 1.0, "forward_s": 1.0, "backward_s": 1.0, "rounds": 1}

    monkeypatch.setattr(benchmark, "measured", measured)
    record = main(["--quick", "--device", "cpu", "--memory-gb", "0.01"])
    assert ran == ["refactored", "slabs"] * 2
    rows = {row[2]: row for row in record["tables"][0]["rows"]}
    assert "does not fit" in rows["plain"]
    assert rows["plain"][3].endswith("(computed)")
    assert rows["refactored"][-1] == NOT_MEASURED
    assert float(rows["refactored"][-2]) > 5  # bytes can be compared all the same


def test_sentences_are_worked_out_from_the_records() -> None:
    def record(form: str, channels: int, kept_mb: float, seconds: float | None) -> dict[str, Any]:
        told = {"operation": "points", "shape": (8, 8, 8), "channels": channels, "form": form, "kept_mb": kept_mb}
        timed = {"peak_mb": 5.0, "forward_s": seconds, "backward_s": seconds} if seconds else {}
        return told | timed | {"fits": seconds is not None}

    records = [
        record("plain", 16, 1000, 10), record("absorbed", 16, 500, 5), record("refactored", 16, 100, 4),
        record("slabs", 16, 20, 7), record("plain", 32, 2000, None), record("absorbed", 32, 900, None),
        record("refactored", 32, 250, 9), record("slabs", 32, 40, 12),
    ]  # fmt: skip
    notes = benchmark.table_of("points", records, replace(Options(), quick=False)).notes
    assert "over refactored, smallest of all cases: 8.0; the aim is at least 9: missed by 1.0." in notes[0]
    assert "over slabs, smallest of all cases: 50.0; the aim is at least 40: reached." in notes[1]
    assert "refactored over plain, largest of the cases where plain fits: 0.40; the aim is at most 0.6" in notes[2]
    assert "slabs over plain, largest of the cases where plain fits: 0.70" in notes[3]
    assert "missed by 0.10" in notes[3]
    assert "refactored: 3.6 to 5.0 times fewer bytes, 0.80 of the time (median)" in notes[4]
    unfit = [r | {"fits": False} if r["form"] == "plain" else r for r in records]
    assert benchmark.table_of("points", unfit, Options()).notes[2].endswith(f"{NOT_MEASURED}.")


@pytest.mark.parametrize("wrong", [["--memory-gb", "0"], ["--memory-gb", "-1"], ["--seconds", "0"]])
def test_bad_options_get_a_sentence(wrong: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        main(["--quick", *wrong])
    assert one_sentence(caught.value, "positive")
