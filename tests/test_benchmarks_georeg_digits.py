"""GeoReg on digits as a benchmark: shares with a known answer, figures by another way, and a whole quick run."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from truths.fields import one_sentence

from benchmarks import georeg_digits as bench
from benchmarks import networks
from regteach.data.cohort import Cohort
from regteach.evaluation import figures_of
from regteach.grid import Grid
from regteach.nets.georeg import _added, _dense
from regteach.result import Result, Step, after_each
from regteach.transforms import Dense

CPU = torch.device("cpu")
GRID = Grid((28, 28))


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    return networks.stand_in(GRID)


class Known(torch.nn.Module):
    """A network whose answer is known: one constant step at 7 x 7, two at 14 x 14, one at 28 x 28."""

    STEPS = ((4, (3.0, 4.0)), (2, (1.0, 0.0)), (2, (-1.0, 2.0)), (1, (0.0, 0.5)))

    def forward(self, moving: Tensor, fixed: Tensor, grid: Grid) -> Result:
        steps = []
        for factor, shift in self.STEPS:
            level = grid.coarsened(factor)
            field = torch.tensor(shift).expand(len(moving), *level.shape, 2)
            steps.append(Step(field, partial(_dense, grid=level), _added))
        return Result(after_each(steps)[-1], (moving, fixed), tuple(steps))


def test_a_level_adds_the_sum_of_its_steps(cohort: Cohort) -> None:
    pairs = cohort.pairs("test")
    levels = bench.figures_by_level(Known(), cohort, pairs, CPU)
    assert list(levels) == [0, 7, 14, 28]
    assert levels[7]["motion"] == pytest.approx([5.0] * len(pairs))
    assert levels[14]["motion"] == pytest.approx([2.0] * len(pairs))  # (1, 0) + (-1, 2)
    assert levels[28]["square"] == pytest.approx([0.25] * len(pairs))
    row = bench.record(levels)
    assert [row["level"][s]["share"] for s in (7, 14, 28)] == pytest.approx([100 * m / 7.5 for m in (5, 2, 0.5)])
    squares = [row["level"][s]["share_of_squares"] for s in (7, 14, 28)]
    assert squares == pytest.approx([100 * m / 29.25 for m in (25, 4, 0.25)])
    assert row["folding"] == 0
    assert all(math.isnan(v) for v in bench.shares({7: 0.0, 14: 0.0}).values())


def test_figures_are_those_of_the_package(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = cohort.pairs("test")
    whole = Dense(torch.tensor([3.0, 6.5]).expand(1, *GRID.shape, 2), GRID)
    each = [figures_of(cohort, *pair, whole) for pair in pairs]
    monkeypatch.setattr(bench, "TOGETHER", 1)
    levels = bench.figures_by_level(Known(), cohort, pairs, CPU)
    assert levels[28]["dice"] == pytest.approx([one.dice for one in each])
    assert levels[28]["folding"] == pytest.approx([one.folding_percent for one in each])
    apart = [figures_of(cohort, *pair, bench.Identity(2)).dice for pair in pairs]
    assert levels[0]["dice"] == pytest.approx(apart)


def test_forms_differ_in_what_they_name(cohort: Cohort, tmp_path: Path) -> None:
    options = bench.Options()
    recipes = {form: bench.small_budget(form, 0, cohort, options) for form in bench.FORMS}
    same: Any = recipes[bench.SAME]
    assert same.config == networks.find_recipe(bench.RECIPE).config
    assert (same.config.widths, same.config.windows) == ((16, 32, 64), (3, 3, 3))  # the paper's
    for form, changes in bench.FORMS.items():
        assert recipes[form].config == replace(same.config, **changes)
        assert recipes[form].settings == same.settings
    folders = {networks.run_folder(recipe, cohort, tmp_path) for recipe in recipes.values()}
    assert len(folders) == len(bench.FORMS)


def run(folder: Path) -> tuple[dict[str, Any], str]:
    file = folder / "result.json"
    more = ("--runs", str(folder / "runs"), "--device", "cpu", "--seeds", "0", "1", "--refined-pairs", "1")
    bench.main(["--quick", "--json", str(file), *more])
    return json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".md").read_text(encoding="utf-8")


def test_a_quick_run_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, text = run(tmp_path)
    assert text.startswith("Quick mode")
    by_level, by_model = record["tables"]
    assert [row[0] for row in by_level["rows"]] == ["before", "7 x 7", "14 x 14", "28 x 28"]
    assert [row[:2] for row in by_model["rows"][:3]] == [
        [bench.RECIPE, "one pass"], [bench.RECIPE, "one pass, fewer pairs"], [bench.RECIPE, "refined"],
    ]  # fmt: skip
    assert [row[0] for row in by_model["rows"][3:]] == list(bench.FORMS)
    assert all("±" in row[4] for row in by_model["rows"][3:])
    assert all(len(row) == len(table["columns"]) for table in record["tables"] for row in table["rows"])
    assert len(list((tmp_path / "runs").iterdir())) == 2 * len(bench.FORMS)
    counts = {row["model"]: row["parameters"] for row in record["records"]}
    assert counts["linear interpolation"] < counts[bench.SAME] == counts["supervised within levels"]
    capsys.readouterr()
    again, _ = run(tmp_path)
    assert "step 2" not in capsys.readouterr().out  # nothing is trained twice
    assert again["records"] == record["records"]


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "load_cohort", lambda name: networks.stand_in(GRID))
    with pytest.raises(FileNotFoundError) as missing:
        bench.load(tmp_path / "none.safetensors")
    assert one_sentence(missing.value)
    more = ["--device", "cpu", "--runs", str(tmp_path / "runs"), "--weights", str(tmp_path / "none.safetensors")]
    (table,) = bench.main(more)["tables"]
    assert "left out" in table["title"]
    with pytest.raises(ValueError, match="1 or more"):
        bench.main(["--pairs", "0"])
