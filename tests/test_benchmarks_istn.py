"""Benchmarks of ISTN: what is measured, what is said about it, and that a killed run goes on to the same numbers."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from truths.fields import one_sentence

from benchmarks import istn_brains, istn_slices, istn_trees, networks, tables
from regteach.affine import Affine
from regteach.checkpoints import Model, save_model
from regteach.data.cohort import Cohort
from regteach.data.trees import Trees, generate_trees
from regteach.grid import Grid
from regteach.refinement import Refinement
from regteach.transforms import Compose, Identity

CPU = torch.device("cpu")
SOLID = Grid((16, 20, 16), (3.0,))
TIMES = ("seconds", "wall", "training_seconds_wall")


@pytest.fixture(scope="module")
def trees() -> Trees:
    return generate_trees(train=2, validation=2, test=2, size=64)


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    return networks.stand_in(SOLID, people=6)


def shift(*mm: float) -> Affine:
    dim = len(mm)
    return Affine(torch.eye(dim)[None], torch.tensor([mm]), torch.zeros(dim))


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def run(
    main: Callable[[list[str]], dict[str, Any]], folder: Path, *more: str, runs: str = "runs"
) -> tuple[dict[str, Any], str]:
    """A quick run; what its JSON holds, and its markdown, after a look at the form of both."""
    file = folder / "result.json"
    returned = main(["--quick", "--json", str(file), "--runs", str(folder / runs), *more])
    record = json.loads(file.read_text(encoding="utf-8"))
    text = file.with_suffix(".md").read_text(encoding="utf-8")
    assert {"command", "date", "seeds", "hardware", "gpu", "quick", "tables", "records"} <= set(record)
    assert record["command"].startswith("python -m benchmarks.istn_")
    assert "--quick" in record["command"]
    assert record["hardware"]["cpu"]
    assert record["gpu"] == "not measured" or torch.cuda.is_available()
    assert record["quick"]
    assert text.startswith("Quick mode")
    assert "not for clinical use" in text
    for table in record["tables"]:
        assert table["rows"]
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
        assert f"## {table['title']}\n" in text
        assert all(note in text for note in table["notes"])
        assert not any(" aim" in note for note in table["notes"])  # a stand-in is held to nothing
    bars = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert bars == {len(table["columns"]) + 1 for table in record["tables"]}
    assert len(returned["records"]) == len(record["records"])
    return record, text


# ---- what is measured ----


def test_the_trees_figures_of_a_known_error(trees: Trees) -> None:
    figures = istn_trees.tree_figures(trees, CPU)
    (moving, fixed), _ = trees.pairs("test")
    truth = trees.truth(moving, fixed)
    exact = figures(moving, fixed, truth)
    assert exact["dice"] > 0.95
    assert exact["tre"] == pytest.approx(0, abs=1e-4)
    assert exact["folding"] == 0
    # What is found 3 and 4 pixels from where it is, is 5 pixels away.
    wrong = figures(moving, fixed, Compose((truth, shift(3.0, 4.0))))
    assert wrong["tre"] == pytest.approx(5, abs=1e-4)
    assert wrong["dice"] < 0.75
    assert wrong["asd"] > exact["asd"] + 0.3
    mirrored = Affine(torch.diag(torch.tensor([1.0, -1.0]))[None], torch.zeros(1, 2), torch.tensor([31.5, 31.5]))
    assert figures(moving, fixed, mirrored)["folding"] == 100


def test_half_the_maximum_itself_is_not_the_tree(trees: Trees) -> None:
    flat = replace(trees, soi=torch.full_like(trees.soi, 0.5))
    moving, fixed = trees.pairs("test")[0]
    found = istn_trees.tree_figures(flat, CPU)(moving, fixed, Identity(2))
    assert found["dice"] == 0
    assert found["asd"] == math.inf
    more = replace(trees, soi=torch.full_like(trees.soi, 0.501))
    assert istn_trees.tree_figures(more, CPU)(moving, fixed, Identity(2))["dice"] > 0


def test_the_authors_distance_counts_all_pixels_both_ways() -> None:
    a, b, empty = np.zeros((3, 9, 9), dtype=bool)
    a[4, 4] = True
    b[4, 3:6] = True
    # From the pixel to the line 0; from the line to the pixel 1, 0, 1.
    assert istn_trees.authors_asd(a, b) == pytest.approx(0.5 * 2 / 3)
    assert istn_trees.authors_asd(b, a) == pytest.approx(0.5 * 2 / 3)
    far = np.zeros((9, 9), dtype=bool)
    far[1, 0] = True
    assert istn_trees.authors_asd(a, far) == pytest.approx(5)
    assert istn_trees.authors_asd(a, empty) == istn_trees.authors_asd(empty, a) == math.inf


def test_label_figures_of_a_shifted_box() -> None:
    base = networks.stand_in(SOLID, people=6)
    labels = torch.zeros_like(base.labels)
    labels[4, 4:8, 4:8, 4:8] = 1
    labels[5, 5:9, 4:8, 4:8] = 1
    boxes = replace(base, labels=labels)
    figures = networks.label_figures(boxes, CPU)
    still = figures(4, 5, Identity(3))
    assert still["dice"] == pytest.approx(0.75)  # 3 of 4 slices in common; the other label is nowhere
    assert 0 < still["asd"] < 3
    aligned = figures(4, 5, shift(-3.0, 0.0, 0.0))
    assert aligned["dice"] == 1
    assert aligned["asd"] == 0
    assert figures(4, 5, shift(3.0, 0.0, 0.0))["dice"] == pytest.approx(0.5)


def test_each_way_is_measured_on_its_own_transform_and_time(cohort: Cohort) -> None:
    model = networks.untrained(networks.small(networks.find_recipe("istn-donors-bspline-supervised"), cohort).config)
    pairs = cohort.pairs("test")
    ways = {"one pass": None, "none": Refinement(0), "refined": Refinement(6, rate=0.05)}
    found = networks.registered(model, cohort, pairs, ways, networks.label_figures(cohort, CPU), CPU)
    still = networks.known(cohort, pairs, networks.label_figures(cohort, CPU))
    assert {key: found["one pass"][key] for key in still} == still  # untrained is the identity
    assert {key: found["none"][key] for key in still} == still
    assert networks.mean(found["refined"]["dice"]) > networks.mean(still["dice"]) + 0.02
    for figures in found.values():
        assert all(len(values) == len(pairs) for values in figures.values())
        assert all(value > 0 for key in ("seconds", "wall") for value in figures[key])
    assert min(found["refined"]["seconds"]) > max(found["none"]["seconds"])


def test_the_ceiling_sees_the_maps_and_nothing_else(cohort: Cohort) -> None:
    recipe = networks.small(networks.find_recipe("istn-donors-bspline-explicit"), cohort)
    best = {"refined": Refinement(30, rate=0.05)}
    measure = networks.label_figures(cohort, CPU)
    blank = replace(cohort, images=torch.zeros_like(cohort.images))
    seen, unseen = (
        networks.registered(networks.untrained(recipe.config), one, one.pairs("test"), best, measure, CPU, soi=True)[
            "refined"
        ]
        for one in (cohort, blank)
    )
    still = networks.known(cohort, cohort.pairs("test"), measure)
    assert seen["dice"] == unseen["dice"]
    assert min(seen["dice"]) > 0.8 > max(still["dice"])
    assert networks.ceiling(quick=False) == Refinement(networks.CEILING_STEPS)


def test_pooling_and_summing_up() -> None:
    folds = [{"a": {"dice": [0.5, 0.7], "seconds": [9.0, 1.0]}}, {"a": {"dice": [0.9], "seconds": [2.0]}}]
    total = networks.summary(networks.pooled(folds)["a"])
    assert total == {"dice": pytest.approx(0.7), "seconds": 2.0, "dice_sd": pytest.approx(0.2), "pairs": 3}


# ---- what is kept ----


def test_another_training_has_another_folder(cohort: Cohort, tmp_path: Path) -> None:
    recipe = networks.small(networks.find_recipe("istn-donors-affine-explicit"), cohort)
    other = replace(cohort, splits={**cohort.splits, "train": (0,)})
    changed = [
        (replace(recipe, bending=recipe.bending + 1), cohort),
        (replace(recipe, augmentation=replace(recipe.augmentation, noise=0.7)), cohort),
        (replace(recipe, settings=replace(recipe.settings, steps=3)), cohort),
        (replace(recipe, settings=replace(recipe.settings, seed=1)), cohort),
        (recipe, other),
    ]
    folders = [networks.run_folder(*each, tmp_path) for each in [(recipe, cohort), *changed]]
    assert len(set(folders)) == len(folders)
    refined = replace(recipe, refinement=Refinement(99))  # takes no part in training
    assert networks.run_folder(refined, cohort, tmp_path) == folders[0]


def test_a_killed_benchmark_goes_on_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--parts", "accuracy", "--recipes", "affine-explicit", "--seeds", "0")
    whole, _ = run(istn_trees.main, tmp_path, *chosen)
    said = capsys.readouterr().out
    assert "step 1 " in said
    assert "step 2 " in said

    def killed(record: dict[str, float]) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(networks, "line", killed)
        with pytest.raises(KeyboardInterrupt):
            run(istn_trees.main, tmp_path, *chosen, runs="killed")
    capsys.readouterr()
    resumed, _ = run(istn_trees.main, tmp_path, *chosen, runs="killed")
    said = capsys.readouterr().out
    assert "step 1 " not in said
    assert "step 2 " in said
    assert untimed(resumed["records"]) == untimed(whole["records"])
    again, _ = run(istn_trees.main, tmp_path, *chosen, runs="killed")
    assert "step 2 " not in capsys.readouterr().out  # nothing is trained twice
    assert untimed(again["records"]) == untimed(whole["records"])


# ---- whole runs, on stand-ins ----


def test_trees(tmp_path: Path) -> None:
    record, _ = run(istn_trees.main, tmp_path, "--recipes", "affine-explicit", "affine-unsup", "--seeds", "0", "1")
    accuracy, times = record["tables"]
    assert record["seeds"] == [0, 1]
    assert [row[:2] for row in accuracy["rows"][:2]] == [["", "identity"], ["", "true affine"]]
    assert [tuple(row[1:3]) for row in accuracy["rows"][2:]] == [
        (model, way) for model in ("STN-u", "ISTN-e") for way in ("one pass", "refined, parameters", "refined, weights")
    ]
    assert all("±" in cell for row in accuracy["rows"][2:] for cell in row[3:8])
    truth = next(r for r in record["records"] if r.get("model") == "true affine")
    assert truth["dice"] > 0.95
    assert truth["tre"] < 1e-3
    assert any("the same order in" in note for note in accuracy["notes"])
    assert all("not measured" in row for row in times["rows"])
    assert {row[1] for row in times["rows"]} == {"public affine ISTN-i", "our affine ISTN-i", "our B-spline ISTN-i"}


def test_brains(tmp_path: Path) -> None:
    parts = ("--parts", "donors", "shipped", "--recipes", "affine-explicit", "bspline-unsup")
    record, _ = run(istn_brains.main, tmp_path, *parts)
    donors, shipped = record["tables"]
    assert [row[:2] for row in donors["rows"]] == [
        ["affine", "Id"], ["affine", "ISTN-e"], ["affine", "SoI itself"],
        ["B-spline", "Id"], ["B-spline", "STN-u"], ["B-spline", "SoI itself"],
    ]  # fmt: skip
    assert "6 test pairs, 6 test people, 3 split(s)" in donors["title"]
    rows = {(r["kind"], r["model"], r["way"]): r for r in record["records"] if "kind" in r}
    assert rows["affine", "SoI itself", "refined"]["dice"] > rows["affine", "Id", "one pass"]["dice"]
    assert len(list((tmp_path / "runs").iterdir())) == 2 * 3
    methods = [row[0] for row in shipped["rows"]]
    assert methods[0] == "ours: nothing"
    assert methods[-1] == "ours: SoI itself"
    fewer, _ = run(istn_brains.main, tmp_path, "--parts", "donors", "--recipes", "affine-explicit", "--folds", "1")
    assert "2 test pairs, 2 test people, 1 split(s)" in fewer["tables"][0]["title"]


def test_what_the_distance_to_the_ceiling_is_made_of(tmp_path: Path) -> None:
    """The first row of each transform is the ceiling of Table 1; the second differs by its maps alone."""
    record, _ = run(istn_brains.main, tmp_path, "--parts", "gap")
    (table,) = record["tables"]
    assert [row[:2] for row in table["rows"]] == [
        [kind, maps] for kind in ("affine", "B-spline") for maps in ("SoI itself", "as the ITN draws it")
    ]
    found = {(r["kind"], r["maps"]): r["dice"] for r in record["records"]}
    first, _ = run(istn_brains.main, tmp_path, "--parts", "hippocampus", "--recipes", "explicit")
    for row in first["records"]:
        if row["model"] == "SoI itself":
            assert found[row["kind"], "SoI itself"] == row["dice"]
    # An ITN that has learned nothing draws nothing, and nothing moves.
    still = next(row["dice"] for row in first["records"] if row["model"] == "Id")
    assert found["affine", "as the ITN draws it"] == pytest.approx(still, abs=1e-6)


def test_maps_that_are_the_structures_are_as_far_apart_as_these_and_equal_maps_are_not(cohort: Cohort) -> None:
    """An ITN that draws the structures without a fault, one that draws everybody alike, and none."""
    pairs, images = ((0, 1), (2, 3)), cohort.soi[:, :1]  # the "image" is the one structure that is drawn
    one = replace(cohort, images=images, soi=images, structures={1: "one"})

    def apart(itn: Callable[[torch.Tensor], torch.Tensor] | None) -> list[float]:
        return istn_brains.maps_apart(SimpleNamespace(itn=itn), one, pairs, CPU)

    assert apart(lambda image: image) == pytest.approx([1.0, 1.0])
    assert apart(lambda image: images[:1].expand_as(image)) == [0.0, 0.0]
    assert apart(None) == []
    records = [{"kind": "affine", "model": "ISTN-i", "way": "refined", "dice": 0.6, "maps_apart": 0.04}]
    (note,) = [note for note in istn_brains.statements("affine", records) if "maps" in note]
    assert note.startswith(
        "ISTN-i, affine: squared difference of two people's maps, over that of their structures: 0.04"
    )


def test_table_one_over_seeds(tmp_path: Path) -> None:
    chosen = ("--parts", "donors", "--recipes", "affine-explicit", "--folds", "1", "--seeds", "0", "1")
    record, _ = run(istn_brains.main, tmp_path, *chosen)
    (table,) = record["tables"]
    assert record["seeds"] == [0, 1]
    assert table["title"].endswith("mean ± standard deviation over 2 seeds")
    assert [[("±" in row[k]) for k in (2, 3)] for row in table["rows"]] == [[False] * 2, [True] * 2, [False] * 2]
    scores = [r["dice"] for r in record["records"] if (r["model"], r["way"]) == ("ISTN-e", "refined")]
    assert len(scores) == len({r["seed"] for r in record["records"] if r["model"] == "ISTN-e"}) == 2
    assert float(table["rows"][1][3].split(" ± ")[0]) == pytest.approx(sum(scores) / 2, abs=1e-3)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_slices(tmp_path: Path) -> None:
    record, _ = run(istn_slices.main, tmp_path, "--folds", "2")
    (table,) = record["tables"]
    assert "4 pairs of people never seen, 2 folds" in table["title"]
    rows = {row[0]: row for row in table["rows"]}
    tested = [person for r in record["records"] if r["way"] == "one pass" for person in r.get("people", [])]
    assert len(tested) == len(set(tested)) == 4
    for way, name in (("one pass", "istn-slices: one pass"), ("SoI itself", "ours: SoI itself")):
        folds = [r["dice"] for r in record["records"] if r["way"] == way and r["fold"] != "all"]
        assert float(rows[name][1]) == pytest.approx(sum(folds) / 2, abs=1e-3)
        assert float(rows[name][3]) == pytest.approx(min(folds), abs=1e-3)


def test_a_model_from_a_file_beside_other_tools(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "ceiling", lambda quick: Refinement(3))
    monkeypatch.setattr(istn_brains, "CORES", 1)  # two threads wait for each other where the machine is busy
    recipe = networks.small(networks.find_recipe("istn-hippocampus"), cohort)
    save_model(
        tmp_path / "istn-hippocampus.safetensors",
        Model("istn-hippocampus", networks.untrained(recipe.config), Refinement(3)),
    )
    options = istn_brains.Options(weights=tmp_path, pairs=1, device="cpu")
    (table,), records = istn_brains.as_shipped("istn-hippocampus", cohort, options)
    assert [row[0] for row in table.rows[: len(istn_brains.OTHERS)]] == list(istn_brains.OTHERS)
    assert {r["way"] for r in records} == {"nothing", "one pass", "refined", "refined, 6 steps", "SoI itself"}
    one = next(r for r in records if r["way"] == "one pass")
    assert one["pairs"] == 1
    assert table.notes[1] == tables.aim("One-pass Dice", one["dice"], 0.80)
    assert "missed" in table.notes[1]  # untrained


# ---- what is said ----


def tree_records(dice: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"kind": "affine", "model": model, "way": way, "seed": seed, "dice": value + (0.1 if way != "one pass" else 0)}
        | {"asd": 0.1, "tre": 0.5, "folding": 0.0, "seconds": 1.0}
        for model, values in dice.items()
        for seed, value in enumerate(values)
        for way in ("one pass", istn_trees.PARAMETERS, istn_trees.BY_WEIGHTS)
    ]


def test_ranks_follow_the_numbers() -> None:
    planted = {"STN-u": [0.5, 0.5], "STN-s": [0.6, 0.6], "ISTN-e": [0.8, 0.7], "ISTN-i": [0.7, 0.75]}
    first = istn_trees.statements(tree_records(planted))[0]
    assert "ISTN-e 0.750 > ISTN-i 0.725 > STN-s 0.600 > STN-u 0.500; the same order in 1 of 2 seeds" in first
    assert first.endswith("Both ISTN above both STN in 2 of 2.")
    planted["STN-s"] = [0.9, 0.2]
    first = istn_trees.statements(tree_records(planted))[0]
    assert "ISTN-e 0.750 > ISTN-i 0.725 > STN-s 0.550 > STN-u 0.500; the same order in 0 of 2 seeds" in first
    assert first.endswith("Both ISTN above both STN in 1 of 2.")


def test_the_reference_is_beaten_by_better_numbers_only() -> None:
    planted = tree_records({"ISTN-e": [0.87, 0.87]})
    said = "\n".join(istn_trees.statements(planted))
    assert "ISTN-e, affine, refined, parameters: Dice 0.970 beats it, ASD 0.100 does not, TRE 0.50 beats it" in said
    assert "the aim for TRE, 0.7 px, is reached" in said
    worse = "\n".join(istn_trees.statements([r | {"dice": 0.9, "tre": 0.9} for r in planted]))
    assert "Dice 0.900 does not, ASD 0.100 does not, TRE 0.90 beats it; the aim for TRE, 0.7 px, is missed" in worse
    assert "What refinement adds to Dice, affine, parameters / weights: ISTN-e +0.100 / +0.100." in said


def test_speed_is_a_quotient_of_times() -> None:
    rows = [
        {"what": "training step, batch 10", "network": "public affine ISTN-i", "seconds": 0.1},
        {"what": "refinement, 50 steps, parameters", "network": "public affine ISTN-i", "seconds": 0.4},
    ]
    step, refinement, _ = istn_trees.speed(rows)
    assert "3.00 to 3.60 times as fast" in step
    assert "is reached" in step
    assert refinement.endswith("the aim is at most 0.3: missed by 0.100.")
    assert "is missed" in istn_trees.speed([{**rows[0], "seconds": 0.4}])[0]
    assert "is in between" in istn_trees.speed([{**rows[0], "seconds": 0.22}])[0]


def test_gap_and_lead_of_table_one_are_differences() -> None:
    dice = {"STN-u": 0.79, "ISTN-e": 0.83, "ISTN-i": 0.80, "SoI itself": 0.85}
    records = [{"kind": "affine", "model": model, "way": "refined", "dice": value} for model, value in dice.items()]
    rank, *notes = istn_brains.statements("affine", records)
    assert rank.endswith("refined: ISTN-e 0.830 > ISTN-i 0.800 > STN-u 0.790.")
    assert notes[0].endswith("below the ceiling: 0.020; the aim is at most 0.03: reached.")
    assert "above refined STN-u: 0.040; the aim is at least 0.03: reached. The paper's lead here is 0.04." in notes[1]
    assert notes[2].endswith("below the ceiling: 0.050; the aim is at most 0.03: missed by 0.020.")
    assert "0.010; the aim is at least 0.03: missed by 0.020. The paper's lead here is 0.03." in notes[3]
    twice = [r | {"seed": 0} for r in records] + [r | {"seed": 1, "dice": r["dice"] + 0.02} for r in records[:3]]
    rank, *notes = istn_brains.statements("affine", twice)
    assert rank.endswith("ISTN-e 0.840 > ISTN-i 0.810 > STN-u 0.800; the same order in 2 of 2 seeds.")
    assert "below the ceiling: 0.010;" in notes[0]
    assert "above refined STN-u: 0.040;" in notes[1]


def test_ranks_over_seeds_are_those_of_the_means() -> None:
    scores = {"a": {0: 0.5, 1: 0.7, 2: 0.9}, "b": {0: 0.6, 1: 0.6}}
    assert tables.ranked_over_seeds(scores) == "a 0.700 > b 0.600; the same order in 1 of 2 seeds"
    assert tables.ranked_over_seeds({"a": {0: 0.5}, "b": {0: 0.6}}) == "b 0.600 > a 0.500"
    assert tables.over_seeds([0.5, 0.7], 3) == "0.600 ± 0.141"
    assert [tables.over_seeds(values, 2) for values in ([0.5], [])] == ["0.50", "-"]


def test_slices_are_compared_with_tools_and_ceiling() -> None:
    rows = {way: {"dice": value} for way, value in (("nothing", 0.4), ("refined", 0.7), ("SoI itself", 0.9))}
    (note,) = istn_slices.statements(rows)
    assert "missed by 0.050" in note
    assert "Above nothing, affine, ANTs SyN;" in note
    assert note.endswith("0.200 below the ceiling.")


def test_folds_with_people_on_whom_the_recipe_was_chosen_are_told_apart() -> None:
    people = (["a", "b"], ["c", "d"], ["e", "f"])
    records = [
        {"way": way, "fold": fold, "people": who, "dice": dice + fold / 10}
        for fold, who in enumerate(people)
        for way, dice in (("nothing", 0.4), ("refined", 0.6))
    ]
    records += [{"way": "refined", "fold": "all", "dice": 0.0}]
    said = istn_slices.unseen(records, ("c", "x"))
    assert "chosen on c and x. Dice over the 2 fold(s)" in said
    assert said.endswith("nothing 0.500, refined 0.700.")


def test_tables_are_whole_or_refused(tmp_path: Path) -> None:
    table = tables.Table("T", ("a", "b"))
    with pytest.raises(ValueError, match="1 cells does not fit the 2 columns"):
        table.add("x")
    table.add("x|y", "1")
    assert "| x/y | 1 |" in table.markdown()
    facts = {"seeds": [0], "quick": False, "hardware": {"gpu": None, "cpu": "c"}}
    rows = [{"asd": math.inf, "dice": math.nan, "tre": 1.23456789}]
    tables.report("benchmarks.x", ["--json", "a b"], tmp_path / "new" / "r.json", [table], rows, facts)
    record = json.loads((tmp_path / "new" / "r.json").read_text())
    assert record["records"] == [{"asd": None, "dice": None, "tre": 1.2346}]
    assert record["command"] == "python -m benchmarks.x --json 'a b'"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["r.json", "r.md"]
    assert not (tmp_path / "new" / "r.md").read_text().startswith("Quick")
    assert [tables.number(v) for v in (None, math.nan, 0.12345, math.inf)] == ["-", "-", "0.123", "inf"]


# ---- what is not there, or not known ----


@pytest.mark.parametrize(
    ("main", "arguments", "command"),
    [
        (istn_brains.main, ["--parts", "hippocampus", "shipped"], "data_download hippocampus"),
        (istn_brains.main, ["--parts", "donors"], "data_download allen-donors"),
        (istn_slices.main, [], "data_download oasis-trt-slices"),
        (istn_trees.main, ["--parts", "accuracy"], "data_download istn-synth2d"),
    ],
)
def test_a_table_without_data_is_a_sentence(
    main: Callable[[list[str]], dict[str, Any]],
    arguments: list[str],
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    monkeypatch.setattr(
        networks, "load_cohort", networks.load_cohort.__wrapped__
    )  # what was read before does not count
    file = tmp_path / "result.json"
    record = main([*arguments, "--json", str(file), "--runs", str(tmp_path / "runs")])
    assert not record["records"]
    for table in record["tables"]:
        assert "left out" in table["title"]
        assert not table["rows"]
        (note,) = table["notes"]
        assert command in note
        assert one_sentence(FileNotFoundError(note))
    assert command in file.with_suffix(".md").read_text()
    assert not (tmp_path / "runs").exists()


def test_weights_that_do_not_ship_are_a_sentence(cohort: Cohort, tmp_path: Path) -> None:
    options = istn_brains.Options(weights=tmp_path, device="cpu")
    for part in (istn_brains.as_shipped, istn_brains.gap):
        (table,), records = part("istn-hippocampus", cohort, options)
        assert not records
        assert not table.rows
        assert "no weights istn-hippocampus.safetensors" in table.notes[0]


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (istn_trees.main, ["--recipes", "no-such"], "No recipe has 'no-such' in its name"),
        (istn_brains.main, ["--recipes", "no-such"], "No recipe has 'no-such' in its name"),
        (istn_slices.main, ["--recipes", "no-such"], "No recipe has 'no-such' in its name"),
        (istn_brains.main, ["--folds", "0"], "Folds, pairs and seeds are 1 or more"),
        (istn_slices.main, ["--refinements", "0"], "are 1 or more"),
    ],
)
def test_bad_options_get_a_sentence(
    main: Callable[[list[str]], dict[str, Any]], arguments: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        main(["--quick", "--runs", str(tmp_path / "runs"), *arguments])
    assert one_sentence(caught.value)
    with pytest.raises(SystemExit, match=message):
        tables.command(lambda: main(["--quick", "--runs", str(tmp_path / "runs"), *arguments]))
