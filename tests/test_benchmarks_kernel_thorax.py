"""The benchmark on thoraces: errors that are known, regularity by another way, what is missing, a whole quick run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from truths.fields import one_sentence

from benchmarks import kernel_thorax as bench
from benchmarks import thorax_forms as forms
from benchmarks import thorax_pairs as pairs
from regteach.checkpoints import Model, network
from regteach.data.thorax import thorax_grid
from regteach.grid import Grid
from regteach.nets.keypoint_kernel import MIND, KeypointKernelConfig
from regteach.training import Settings
from regteach.transforms import Dense, displacement

CPU = torch.device("cpu")
TINY = KeypointKernelConfig.of(thorax_grid(24.0), features=2, widths=(2, 4), width=8, neighbours=8)


@pytest.fixture(scope="module")
def pair() -> pairs.Pair:
    return pairs.drawn(24.0, 10, pairs.SMALL_TREES)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model("tiny", network(TINY).eval())


class Exact:
    """The exact motion, as a field of keypoints is asked for it."""

    def __init__(self, pair: pairs.Pair) -> None:
        self.transform = pair.transform

    def at(self, points: Tensor) -> Tensor:
        return self.transform(points[None])[0] - points

    def on(self, grid: Grid) -> Tensor:
        return displacement(self.transform, grid)[0].float()


def test_nothing_has_the_known_motion_and_the_exact_field_no_error(pair: pairs.Pair) -> None:
    still, exact = bench.known_rows(pair)
    motion = np.linalg.norm((pair.marks_moving - pair.marks_fixed).numpy(), axis=1)
    assert motion.mean() > 10
    assert still["tre_mm"] == pytest.approx(motion.mean(), rel=1e-5)
    assert still["tre95_mm"] == pytest.approx(np.percentile(motion, 95), rel=1e-4)
    assert [still[name] for name in ("sdlogj", "sdlogj_learn2reg", "folding")] == pytest.approx([0, 0, 0], abs=1e-6)
    assert exact["tre_mm"] < 1e-3
    assert exact["tre95_mm"] < 2e-3
    # A shift that is planted is found in full; it folds nothing.
    shift = torch.tensor([3.0, -4.0, 12.0])
    planted = Dense(shift.expand(1, *pair.grid.shape, 3).contiguous(), pair.grid)
    wrong = np.linalg.norm((pair.marks_fixed + shift - pair.marks_moving).numpy(), axis=1)
    assert bench.row(pair, "shift", planted)["tre_mm"] == pytest.approx(wrong.mean(), rel=1e-5)


def test_regularity_is_that_of_numpy_in_the_fixed_lungs(pair: pairs.Pair) -> None:
    field = displacement(pair.transform, pair.grid)[0].double().numpy()
    slopes = np.stack([np.stack(np.gradient(field[..., k], *pair.grid.spacing), -1) for k in range(3)], -2)
    det = np.linalg.det(slopes + np.eye(3))
    inside = (slice(2, -2),) * 3
    lungs = pair.mask[0, 0].numpy()
    row = bench.known_rows(pair)[1]
    assert row["sdlogj"] == pytest.approx(np.log(det[lungs & (det > 0)]).std(), rel=0.02)
    assert row["sdlogj_learn2reg"] == pytest.approx(np.log(det[inside] + 3)[lungs[inside]].std(), rel=0.02)
    assert row["folding"] == pytest.approx(100 * (det <= 0).mean(), abs=0.2)
    folded = field - 2 * np.arange(pair.grid.shape[0])[:, None, None, None] * [pair.grid.spacing[0], 0, 0]
    mirror = Dense(torch.tensor(folded[None]).float(), pair.grid)
    assert bench.row(pair, "mirrored", mirror)["folding"] > 95


def test_a_prepared_pair_measures_as_a_pair_does(pair: pairs.Pair, model: Model) -> None:
    prepared = pairs.Prepared.of(model, pair, CPU)
    exact: Any = Exact(pair)
    assert prepared.tre(exact) < 1e-3
    row = prepared.row("exact", exact)
    assert row["tre_mm"] < 1e-3
    assert row["sdlogj"] > 0.01  # of a grid of half the resolution
    with torch.no_grad():
        whole = model.network(pair.moving, pair.fixed, pair.grid)
        last = prepared.fields(model.network)[-1]
        moved = (pair.marks_fixed + last.at(pair.marks_fixed) - pair.marks_moving).norm(dim=1).mean()
    assert prepared.tre(last) == pytest.approx(float(moved))
    torch.testing.assert_close(last.on(pair.grid)[None], whole.transform.displacement, atol=1e-3, rtol=1e-4)


def test_forms_differ_in_what_they_name() -> None:
    assert forms.changed(TINY) == TINY
    made = {form: forms.changed(TINY, **changes) for form, (changes, _) in forms.FORMS.items()}
    assert made[forms.FULL] == TINY
    assert len(set(map(repr, made.values()))) == len(made)
    plain = made[forms.NO_FEATURES]
    assert (plain.features, plain.kernel.semantics) == (0, MIND[3])
    assert made["only geometry"].kernel == replace(TINY.kernel, heads=("geometry",), semantics=0)
    assert made["no bias"] == replace(TINY, kernel=replace(TINY.kernel, bias=False))
    assert made["one scale"] == replace(TINY, scales=forms.ONE)
    paper = {form: said for form, (_, said) in forms.FORMS.items() if said}
    assert paper == {"full": 1.72, "only semantics": 1.79, "only geometry": 2.0, "thin-plate spline": 2.23}


@pytest.mark.parametrize("form", [forms.FULL, "thin-plate spline"])
def test_what_makes_the_field_is_trained_and_the_features_are_not(pair: pairs.Pair, model: Model, form: str) -> None:
    prepared = pairs.Prepared.of(model, pair, CPU)
    config = forms.changed(TINY, **forms.FORMS[form][0])
    task = forms.FieldTask(config, forms.find_recipe(forms.RECIPE), Settings(steps=1), {"train": [prepared]})
    built = task.build()
    terms = task.loss(built, [0, 1], CPU)
    assert all(term.shape == (2,) for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    moved = {name for name, p in built.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert moved
    assert not any(name.startswith("unet") for name in moved)
    assert not any(m.requires_grad for m in prepared.maps)


def run(folder: Path, *more: str) -> tuple[dict[str, Any], str]:
    file = folder / "result.json"
    bench.main(["--quick", "--json", str(file), "--runs", str(folder / "runs"), "--device", "cpu", *more])
    return json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".md").read_text(encoding="utf-8")


def test_a_quick_run_and_its_trainings_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, text = run(tmp_path)
    assert record["command"].startswith("python -m benchmarks.kernel_thorax --quick")
    assert text.startswith("Quick mode")
    assert "not for clinical use" in text
    for table in record["tables"]:
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
        assert not any(" aim" in note for note in table["notes"])  # a stand-in is held to nothing
    every, few, ct, resolutions, switches, ablation = record["tables"]
    assert [r[0] for r in every["rows"]] == [bench.NOTHING, bench.EXACT, "stand-in, one pass"]
    methods = [bench.NOTHING, bench.EXACT, "stand-in, one pass", "stand-in, refined", bench.AFFINE, bench.SPLINES]
    assert [r[0] for r in few["rows"]] == [r[0] for r in ct["rows"]] == methods
    assert len(resolutions["rows"]) == 2
    asked = [f"after scale {k} of 5" for k in range(1, 6)] + ["one scale", "K = 4", "K = 8"]
    assert [r[0] for r in switches["rows"]] == asked
    # With the K that the model has, asking it again is asking it.
    assert switches["rows"][-1][1:] == switches["rows"][4][1:]
    assert [r[0] for r in ablation["rows"]] == list(forms.FORMS)
    assert len(list((tmp_path / "runs").iterdir())) == len(forms.FORMS)
    assert "step 2" in capsys.readouterr().out
    again, _ = run(tmp_path, "--parts", "ablation")
    assert "step 2" not in capsys.readouterr().out  # nothing is trained twice
    assert again["tables"][0]["rows"] == ablation["rows"]


def test_without_weights_or_ct_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    monkeypatch.setattr(bench, "available", lambda: [])
    setting = bench.Setting.of(bench.Options(device="cpu"))
    assert setting.notes == (bench.MISSING,)
    assert setting.model.name == bench.UNTRAINED
    assert setting.refinement.coarsen == 2
    (table,) = bench.main(["--parts", "ct", "--device", "cpu"])["tables"]
    assert "left out" in table["title"]
    assert not table["rows"]
    assert len(table["notes"]) == 1
    assert "thorax-ct" in table["notes"][0]


def test_what_is_said_about_the_aims() -> None:
    found = {"method": f"x, {bench.ONE_PASS}", "seconds": 41.0, "peak_mb": 2100.0}
    seconds, memory = bench.aims([found])
    assert seconds.endswith("reached.")
    assert memory.endswith("missed by 100.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--patients", "0"], "1 to"),
        (["--patients", "99"], "1 to"),
        (["--few", "99"], "1 to"),
        (["--neighbours", "0"], "K"),
        (["--resolutions", "0"], "above 0"),
        (["--weights", "kernel-torax"], "kernel-torax"),
    ],
)
def test_what_can_not_be_measured_is_said(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError) as error:
        bench.main([*arguments, "--device", "cpu"])
    assert one_sentence(error.value, said)
