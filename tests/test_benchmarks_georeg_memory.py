"""The memory of a training step of GeoReg as a benchmark: what is counted, that forms agree, what is said."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from truths.fields import one_sentence

from benchmarks import georeg_memory as bench
from benchmarks.georeg_memory import CHECKPOINTED, FORMS, IN_SLABS, PLAIN, REFACTORED, SMALL, WHOLE, Case, Options
from benchmarks.tables import NOT_MEASURED
from regteach.recipes import find_recipe

CPU = torch.device("cpu")
VALUE = 4  # bytes: a loss is kept, too


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What a quick run writes."""
    file = tmp_path_factory.mktemp("quick") / "result.json"
    bench.main(["--quick", "--device", "cpu", "--json", str(file)])
    return json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".md").read_text(encoding="utf-8")


def small(form: str) -> dict[str, Any]:
    return bench.measured(Case(form, SMALL), "cpu", 1, 1, 0.01)


# ---- what is counted ----


def test_bytes_are_counted_once_and_without_what_was_there() -> None:
    """exp keeps its result, of 4 n bytes, which a square keeps again; a product keeps both factors."""
    n = 1000
    x, weight = torch.randn(n, requires_grad=True), torch.randn(n, requires_grad=True)

    forms: dict[str, tuple[Any, int]] = {
        "one, twice": (lambda: x.exp().square().sum(), 4 * n),
        "and another": (lambda: (x.exp() * x.sigmoid()).sum(), 2 * 4 * n),
        "a view": (lambda: (x.exp()[: n // 2] ** 3).sum(), 4 * n),  # keeps the whole alive
        "inputs alone": (lambda: (x * weight).sum(), 0),
        "nothing": (lambda: (x + weight).sum(), 0),
        "half precision": (lambda: x.bfloat16().exp().float().sum(), 2 * n),
    }
    for name, (form, expected) in forms.items():
        value, kept = bench.kept_by(form)
        assert kept == expected + VALUE, name
        assert torch.autograd.grad(value, x)[0].shape == (n,)


def test_what_nothing_depends_on_is_not_kept() -> None:
    x = torch.randn(1000, requires_grad=True)

    def form() -> Tensor:
        x.exp().sum()  # saved, and let go
        return x.sum()

    assert bench.kept_by(form)[1] == VALUE


def test_counting_leaves_nothing_behind() -> None:
    x = torch.randn(1000, requires_grad=True)
    value, kept = bench.kept_by(lambda: x.exp().sum())  # a result that is saved
    assert kept == 4000 + VALUE
    before = len(bench._tensors())
    del value
    assert len(bench._tensors()) == before - 2  # neither the value nor the result


def test_what_a_checkpoint_computes_from_is_kept() -> None:
    """Whether it is passed on or captured; what is computed from it is not kept."""
    n, generator = 100_000, 6_000  # bytes, at most, of the state of random numbers, which a checkpoint keeps
    x = torch.randn(n, requires_grad=True)

    def waves(y: Tensor) -> Tensor:
        return y.exp().sin().cos().sum()

    def passed() -> Tensor:
        return checkpoint(waves, x + 1, use_reentrant=False)

    def captured() -> Tensor:
        y = x + 1
        return checkpoint(lambda: waves(y), use_reentrant=False)

    assert bench.kept_by(lambda: waves(x + 1))[1] == 2 * 4 * n + VALUE  # exp and sin; exp needs its result alone
    for form in (passed, captured):
        assert 4 * n + VALUE <= bench.kept_by(form)[1] <= 4 * n + VALUE + generator


@pytest.mark.parametrize("form", FORMS)
def test_the_count_is_what_has_been_allocated(form: str) -> None:
    """Every byte that was handed out in the forward pass and has not been given back."""
    computed, _ = bench.prepared(Case(form, SMALL), CPU)
    kept = bench.kept_by(computed)[1]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        value = computed()
    allocated = sum(event.self_cpu_memory_usage for event in profiled.events())
    assert value.requires_grad
    assert kept == pytest.approx(allocated, rel=0.02)


# ---- the forms ----


def test_the_forms_are_what_they_are_called() -> None:
    config = find_recipe(bench.MODEL).config
    whole = {form: bench.configured(config, Case(form, WHOLE)) for form in FORMS}
    assert whole[IN_SLABS] == config  # as it ships
    assert whole[REFACTORED].slab > math.prod(WHOLE)
    assert [form for form in FORMS if whole[form].checkpointed] == [CHECKPOINTED]
    assert bench.configured(config, Case(IN_SLABS, (32, 32, 32))).slab == math.ceil(2**18 / 150)


def test_all_forms_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, gradients = bench.differences()
    assert loss < 1e-5
    assert 0 < gradients < 1e-4
    original = bench.georeg.neighbourhood_attention
    monkeypatch.setattr(bench.georeg, "neighbourhood_attention", lambda *a, **k: 1.05 * original(*a, **k))
    wrong, gradients = bench.differences()  # and it would be noticed
    assert wrong > bench.SAME
    assert gradients > 1e-3
    with pytest.raises(RuntimeError, match="refactored is not the same computation as plain") as caught:
        bench.check_same([{"form": f, "shape": SMALL, "measured": True} | small(f) for f in (PLAIN, REFACTORED)])
    assert one_sentence(caught.value)


def test_a_loss_that_is_no_number_is_not_the_same() -> None:
    told = [{"form": f, "shape": SMALL, "measured": True, "loss": v} for f, v in ((PLAIN, 1.0), (IN_SLABS, math.nan))]
    with pytest.raises(RuntimeError):
        bench.check_same(told)
    assert bench.check_same(told[:1]) == 0
    assert bench.check_same([told[0], told[1] | {"measured": False}]) == 0


def test_each_form_keeps_less_than_the_one_before(
    written: tuple[dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {r["form"]: r["kept_mb"] for r in written[0]["records"] if r["shape"] == list(SMALL)}
    assert kept[REFACTORED] < 0.6 * kept[PLAIN]
    assert kept[IN_SLABS] < 0.5 * kept[REFACTORED]
    assert kept[CHECKPOINTED] < 0.8 * kept[IN_SLABS]
    monkeypatch.setattr(bench.georeg, "in_slabs", lambda function, size, *points: function(*points))
    assert small(IN_SLABS)["kept_mb"] == pytest.approx(kept[REFACTORED], rel=0.01)  # slabs, without the slabs


def test_plain_attention_ends_with_the_step() -> None:
    original = bench.georeg.neighbourhood_attention
    with bench.attention(PLAIN):
        assert bench.georeg.neighbourhood_attention is not original
    assert bench.georeg.neighbourhood_attention is original


def test_a_process_of_its_own_measures_the_same() -> None:
    case = Case(CHECKPOINTED, SMALL)
    own, here = bench.in_a_process_of_its_own(case, Options(device="cpu", rounds=2, seconds=60.0)), small(CHECKPOINTED)
    assert own["kept_mb"] == pytest.approx(here["kept_mb"], rel=1e-3)
    assert own["loss"] == pytest.approx(here["loss"], rel=1e-6)
    assert (own["rounds"], here["rounds"]) == (2, 1)
    assert own["kept_mb"] < own["peak_mb"] < 200


# ---- what is said ----


def stands_in(monkeypatch: pytest.MonkeyPatch, per_voxel: float = 1e-3, curved: float = 1.0) -> list[Case]:
    """Cases that would be measured, which take no time: 10 MB and so much a voxel, the double at the peak."""
    ran: list[Case] = []

    def own(case: Case, options: Options) -> dict[str, Any]:
        ran.append(case)
        kept = (10 + per_voxel * math.prod(case.shape) ** curved) / (1 + FORMS.index(case.form))
        return {
            "loss": 0.5, "kept_mb": kept, "peak_mb": 2 * kept, "forward_s": 1.0, "backward_s": 3.0, "rounds": 3,
        }  # fmt: skip

    monkeypatch.setattr(bench, "in_a_process_of_its_own", own)
    return ran


def test_what_does_not_fit_is_extrapolated_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = stands_in(monkeypatch)
    options = Options(device="cpu", memory_gb=4.0)
    records = [record for form in FORMS for record in bench.records_of(form, options)]
    whole = {r["form"]: r for r in records if r["shape"] == WHOLE}
    fit = [form for form in FORMS if whole[form]["measured"]]
    assert fit == [IN_SLABS, CHECKPOINTED]  # which take a third and a quarter of plain
    assert len(ran) == 4 * 3 + 2
    assert whole[PLAIN]["kept_mb"] == pytest.approx(10 + 1e-3 * math.prod(WHOLE))
    table = bench.table_of(records, options)
    rows = {row[1]: row for row in table.rows if row[0] == "160 x 192 x 160"}
    assert [form for form, row in rows.items() if row[2].endswith("(extrapolated)")] == [PLAIN, REFACTORED]
    assert rows[PLAIN][4:7] == (NOT_MEASURED, NOT_MEASURED, "-")
    assert rows[IN_SLABS][5:9] == ("4.00", "3", "3.0", NOT_MEASURED)  # there is no time of plain to compare with
    first = {row[1]: row for row in table.rows if row[0] == "32 x 32 x 32"}
    assert first[CHECKPOINTED][5:9] == ("4.00", "3", "4.0", "1.00")
    assert "refactored keeps 50%, in slabs 33%, checkpointed as well 25%" in table.notes[0]
    assert (
        "through 32 x 32 x 32 and 48 x 48 x 48 predicts what is kept at 64 x 64 x 64 to within 0.0%" in table.notes[1]
    )
    assert "through 48 x 48 x 48 and 64 x 64 x 64 predicts what is kept at 160 x 192 x 160" in table.notes[2]
    assert table.notes[2].endswith("Run at that size: slabs / slabs, checkpointed.")
    assert table.notes[3] == "Extrapolated by such a line to 160 x 192 x 160, not measured there: plain / refactored."
    assert table.notes[-1] == f"160 x 192 x 160 on a GPU: {NOT_MEASURED}."


def test_a_line_that_does_not_hold_is_said_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    stands_in(monkeypatch, per_voxel=1e-6, curved=1.5)
    records = [record for form in FORMS for record in bench.records_of(form, Options(device="cpu", memory_gb=1.0))]
    shown = [10 + 1e-6 * math.prod(shape) ** 1.5 for shape in bench.SIZES]
    voxels = [math.prod(shape) for shape in bench.SIZES]
    line = shown[1] + (shown[1] - shown[0]) / (voxels[1] - voxels[0]) * (voxels[2] - voxels[1])
    off = 1 - line / shown[2]
    assert off > 0.1
    assert f"to within {off:.1%}, the worst" in bench.statements(records)[1]


def test_a_quick_run(written: tuple[dict[str, Any], str]) -> None:
    record, text = written
    assert {"command", "date", "seeds", "hardware", "gpu", "quick", "tables", "records"} <= set(record)
    assert text.startswith("Quick mode")
    assert "not for clinical use" in text
    assert f"160 x 192 x 160 on a GPU: {NOT_MEASURED}." in text
    (table,) = record["tables"]
    assert [row[1] for row in table["rows"]] == list(FORMS) * 3
    assert {len(row) for row in table["rows"]} == {len(table["columns"])}
    assert all(r["measured"] == (r["shape"] != list(WHOLE)) for r in record["records"])
    ran = [r for r in record["records"] if r["measured"]]
    for shape in {tuple(r["shape"]) for r in ran}:
        losses = [r["loss"] for r in ran if tuple(r["shape"]) == shape]
        assert losses == pytest.approx([losses[0]] * len(FORMS), rel=bench.SAME)
    assert all(r["peak_mb"] > 0 < r["forward_s"] for r in ran)


@pytest.mark.parametrize("wrong", [["--memory-gb", "0"], ["--rounds", "0"], ["--seconds", "-1"]])
def test_bad_options_get_a_sentence(wrong: list[str], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    with pytest.raises(ValueError) as caught:
        bench.main(["--quick", "--json", str(file), *wrong])
    assert one_sentence(caught.value, "positive")
    assert not file.exists()
