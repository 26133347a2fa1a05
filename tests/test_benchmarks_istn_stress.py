"""ISTN under stress: changed images with a known answer, nested training sets, what is said, and whole quick runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from truths.fields import one_sentence

from benchmarks import changes, istn_stress, networks
from benchmarks.changes import NONE, Scene
from regteach import objectives
from regteach.affine import Affine
from regteach.data.cohort import Cohort
from regteach.data.trees import Trees, generate_trees
from regteach.grid import Grid
from regteach.refinement import Refinement, refine
from regteach.result import Result, assemble, dense_step
from regteach.sampling import grid_points
from regteach.transforms import Identity, Transform

CPU = torch.device("cpu")
NUMBERS: dict[str, Any] = {"train": 6, "validation": 2, "test": 3, "size": 64}


@pytest.fixture(scope="module")
def trees() -> Trees:
    return generate_trees(**NUMBERS)


@pytest.fixture(scope="module")
def scenes(trees: Trees) -> dict[str, Scene]:
    drawn, other = generate_trees(**NUMBERS, blurred=False), generate_trees(**NUMBERS, blurred=False, tree_seed=1)
    return changes.tree_scenes(trees, drawn, other, trees.pairs("test"))


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    return networks.stand_in(Grid((24, 28, 24)), people=6)


# ---- what is changed ----


def test_a_repainted_image_is_the_one_that_the_generator_draws(trees: Trees, scenes: dict[str, Scene]) -> None:
    other = generate_trees(**NUMBERS, tree_seed=1)
    moving, fixed = zip(*trees.pairs("test"), strict=True)
    swapped = scenes["swapped: another tree, both"].images
    for mine, indices in zip(swapped, (moving, fixed), strict=True):
        right = other.images[list(indices)]
        assert (mine - right).square().mean().sqrt() < 0.005
        assert (trees.images[list(indices)] - right).square().mean().sqrt() > 0.05


def test_a_change_is_where_it_should_be_and_nowhere_else(trees: Trees, scenes: dict[str, Scene]) -> None:
    before = scenes[NONE]
    near = [maps > 0.05 for maps in before.soi]
    for name, scene in scenes.items():
        same = torch.equal(scene.images[1], before.images[1])
        assert same == (name == NONE or name.endswith("moving"))
        if "shrunk" in name or "missing" in name:
            changed = (scene.images[0] - before.images[0]).abs() > 1e-4
            assert changed.any()
            assert not (changed & ~near[0]).any()
        assert torch.equal(scene.partners, before.partners)  # the truth is not touched
        assert all(float(i.min()) >= 0 and float(i.max()) <= 1 for i in scene.images)


def test_a_missing_tree_leaves_the_square(trees: Trees, scenes: dict[str, Scene]) -> None:
    moving = [m for m, _ in trees.pairs("test")]
    inside = (changes.square_cover(trees, moving) == 1) & (scenes[NONE].soi[0] > 0.9)
    away = (changes.square_cover(trees, moving) == 1) & (scenes[NONE].soi[0] < 0.01)
    gone, there = scenes["missing, moving"].images[0], scenes[NONE].images[0]
    assert gone[inside].mean() == pytest.approx(float(there[away].mean()), abs=0.02)
    assert there[inside].mean() < there[away].mean() - 0.3


def test_another_size_keeps_what_is_true(trees: Trees, scenes: dict[str, Scene]) -> None:
    before = scenes[NONE]
    truth = trees.truth(*map(list, zip(*trees.pairs("test"), strict=True)))
    centre = torch.tensor(trees.grid.centre)
    for factor in changes.SIZES.values():
        scene = changes.zoomed(before, trees.grid, factor)
        # To the old image, along the old motion, and back.
        partners = (truth((scene.points - centre) * factor + centre) - centre) / factor + centre
        assert torch.allclose(partners, scene.partners, atol=1e-3)
        assert scene.soi[0].sum() == pytest.approx(float(before.soi[0].sum()) / factor**2, rel=0.25)  # some is cut off


def test_unlike_images_are_scaled_and_only_sizes_move(trees: Trees, scenes: dict[str, Scene]) -> None:
    unlike = changes.unlike_scenes(scenes[NONE], trees.grid)
    assert {*changes.UNLIKE, *changes.SIZES, NONE, "inverted, moving only"} == set(unlike)
    for name, scene in unlike.items():
        assert all(float(i.min()) == 0 and float(i.max()) == 1 for i in scene.images) or name in (NONE, *changes.SIZES)
        assert torch.equal(scene.points, scenes[NONE].points) == (name not in changes.SIZES)
    twice = changes.UNLIKE["inverted"](unlike["inverted"].images[0], trees.grid)
    assert (twice - scenes[NONE].images[0]).abs().mean() < 0.02


def test_real_images_are_changed_around_their_labels(cohort: Cohort) -> None:
    image, labels = cohort.images[[4]], cohort.labels[4]
    for name in changes.REAL:
        new, judged = changes.changed(cohort, 4, name, other=5)
        assert new.shape == image.shape
        assert judged.shape == labels.shape
        assert not torch.equal(new, image)
        assert torch.equal(judged, labels) == (name not in ("shrunk", "swapped: another person's"))
    gone, _ = changes.changed(cohort, 4, "missing", other=5)
    assert gone[0, 0][labels > 0].mean() < 0.5 * image[0, 0][labels > 0].mean()
    half, _ = changes.changed(cohort, 4, "half missing", other=5)
    assert (half[0, 0][labels == 2] == image[0, 0][labels == 2]).float().mean() > 0.9  # but where they touch
    assert half[0, 0][labels == 1].mean() < image[0, 0][labels == 1].mean()
    _, small = changes.changed(cohort, 4, "shrunk", other=5)
    assert (small > 0).sum() == pytest.approx(changes.SHRINK**3 * float((labels > 0).sum()), rel=0.15)
    _, theirs = changes.changed(cohort, 4, "swapped: another person's", other=5)
    middles = [grid_points(cohort.grid)[maps > 0].mean(0) for maps in (theirs, labels)]
    assert (middles[0] - middles[1]).norm() < 1
    with pytest.raises(ValueError, match="changes of real images are missing"):
        changes.changed(cohort, 4, "gone", other=5)


# ---- what is trained and measured ----


def test_more_pairs_include_fewer_and_seeds_differ(trees: Trees) -> None:
    sets = {n: set(istn_stress.fewer(trees, n, 0).pairs("train")) for n in (2, 4, 6)}
    assert [len(s) for s in sets.values()] == [2, 4, 6]
    assert sets[2] < sets[4] < sets[6] == set(trees.pairs("train"))
    assert set(istn_stress.fewer(trees, 2, 1).pairs("train")) != sets[2]
    for kept in ("validation", "test"):
        assert istn_stress.fewer(trees, 2, 0).pairs(kept) == trees.pairs(kept)


def test_every_training_takes_the_same_steps_and_has_its_own_folder(trees: Trees, tmp_path: Path) -> None:
    options = istn_stress.Options()
    folders = set()
    for name in istn_stress.TRAININGS:
        for count in (2, 6):
            chosen = istn_stress.fewer(trees, count, 0)
            recipe = istn_stress.recipe(name, chosen, 0, options)
            assert recipe.settings.steps == recipe.settings.validate_every == istn_stress.SETTINGS.steps
            assert recipe.config.grid == trees.grid
            folders.add(networks.run_folder(recipe, chosen, tmp_path))
    assert len(folders) == 2 * len(istn_stress.TRAININGS)
    shift = istn_stress.recipe("ISTN-e", trees, 0, options).config.stages[0].bounds.translation_mm  # type: ignore[union-attr]
    assert shift == 0.5 * networks.find_recipe("istn-trees-affine-explicit").config.stages[0].bounds.translation_mm  # type: ignore[union-attr]


def test_figures_of_a_known_error(trees: Trees, scenes: dict[str, Scene]) -> None:
    scene = scenes[NONE]
    truth = trees.truth(*map(list, zip(*trees.pairs("test"), strict=True)))
    exact = istn_stress.figures(truth, scene, trees.grid)
    assert exact["tre"].abs().max() < 1e-3
    assert exact["dice"].min() > 0.95
    wrong = Affine(truth.matrix, truth.translation + torch.tensor([3.0, 4.0]), truth.centre)
    assert istn_stress.figures(wrong, scene, trees.grid)["tre"].tolist() == pytest.approx([5.0] * 3, abs=1e-3)
    still = istn_stress.figures(Identity(2), scene, trees.grid)
    assert still["dice"].shape == still["folding"].shape == (3,)


def test_drift_counts_pairs_that_fall() -> None:
    steps = len(istn_stress.LOOK)
    at_50 = istn_stress.LOOK.index(50)
    rises = [0.5 + 0.01 * k for k in range(steps)]
    falls = [0.8 - (0.02 * (k - at_50) if k > at_50 else 0.0) for k in range(steps)]
    early = [0.9, *[0.8] * (steps - 1)]  # falls, but before step 50
    curves = {"dice": [list(row) for row in zip(rises, falls, early, strict=True)], "loss": [[1.0] * 3] * steps}
    found = istn_stress.drift(curves, istn_stress.LOOK)
    assert (found["pairs"], found["fell_from_best"], found["fell_after_50"]) == (3, 2, 1)
    later = istn_stress.drift(curves, istn_stress.LOOK, usual=istn_stress.LOOK[at_50 + 1])
    assert later["fell_after_75"] == 1
    assert istn_stress.drift(curves, istn_stress.LOOK, usual=istn_stress.LOOK[-1])["fell_after_500"] == 0
    assert istn_stress.drift(curves, istn_stress.LOOK, usual=0)["fell_after_0"] == 2
    assert found["curves"]["dice"][0] == pytest.approx((0.5 + 0.8 + 0.9) / 3)
    assert found["steps"] == list(istn_stress.LOOK)


# ---- a refinement that is followed ----

GRID = Grid((16, 20, 12), (1.0, 1.0, 1.5))
NOBODY: Any = None  # a greedy search asks no network
LEVELS = Refinement(6, "greedy", 0.4, coarser=(2, 3), smoothing_vox=(1.0, 0.0))


@pytest.fixture(scope="module")
def one_pass() -> Result:
    """A ball, and the same elsewhere, after a one pass that bends from voxel to voxel."""
    points = grid_points(GRID)
    balls = [
        torch.sigmoid(4.5 - (points - torch.tensor(GRID.centre) - torch.tensor(shift)).norm(dim=-1))[None, None]
        for shift in ((1.5, 0.0, 0.0), (-1.0, 1.0, 0.0))
    ]
    bent = 0.5 * torch.randn(1, *GRID.shape, 3, generator=torch.Generator().manual_seed(0))
    step = dense_step(bent, GRID)
    return Result(assemble((step,)), (balls[0], balls[1]), (step,))


def loss_and_place(result: Result) -> istn_stress.Watched:
    """The loss of the maps as they are, and where the middle of the grid goes, mm along the first axis."""

    @torch.no_grad()
    def measure(transform: Transform) -> dict[str, torch.Tensor]:
        middle = transform(torch.tensor([[GRID.centre]]))[:, 0, 0]
        return {"loss": objectives.refinement(result.features, transform, GRID), "place": middle}

    return measure


def follow(result: Result, settings: Refinement) -> tuple[list[int], istn_stress.Rows]:
    return istn_stress.followed(NOBODY, result, GRID, settings, loss_and_place(result), curve="descended")


def test_steps_are_counted_through_the_levels() -> None:
    assert istn_stress.level_starts(LEVELS) == [0, 2, 5]
    assert istn_stress.steps_to_look_at(LEVELS) == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]
    flat = Refinement(500)
    assert istn_stress.level_starts(flat) == [0]
    assert istn_stress.steps_to_look_at(flat) == list(istn_stress.LOOK)
    assert istn_stress.steps_to_look_at(replace(flat, steps=4)) == [0, 1, 2, 4]


def test_the_losses_of_a_followed_search_are_those_of_its_steps(one_pass: Result) -> None:
    steps, rows = follow(one_pass, LEVELS)
    assert steps == istn_stress.steps_to_look_at(LEVELS)
    assert {len(values) for values in rows.values()} == {len(steps)}
    both = torch.tensor([rows["loss"], rows["descended"]])[..., 0]
    # On the finest level, and there alone, the search descends the loss of the maps as they are.
    finest = torch.tensor(steps) >= 5
    assert torch.allclose(both[0, finest], both[1, finest], atol=1e-6)
    assert (both[0] - both[1])[~finest].abs().min() > 1e-3
    assert both[0, -1] < 0.1 * both[0, 0]


def test_a_followed_search_begins_at_the_one_pass_and_goes_on_from_the_best_of_a_level(one_pass: Result) -> None:
    wild = replace(LEVELS, rate=3.0)  # so far that the last step of a level is not its best
    calls: list[tuple[int, Transform]] = []
    refine(NOBODY, one_pass, GRID, wild, watch=lambda step, transform: calls.append((step, transform)))
    measure = loss_and_place(one_pass)
    seen = [(step, measure(transform)["place"].item()) for step, transform in calls]
    steps, rows = follow(one_pass, wild)
    place = dict(zip(steps, (value for (value,) in rows["place"]), strict=True))
    for start in (2, 5):
        ended, goes_on = (value for step, value in seen if step == start)
        assert place[start] == pytest.approx(goes_on)
        assert abs(ended - goes_on) > 0.1
    assert place[0] == pytest.approx(measure(one_pass.transform)["place"].item())
    assert abs(place[0] - seen[0][1]) > 0.01  # on the coarsest grid it is averaged
    assert place[11] == pytest.approx(seen[-1][1])


def test_a_followed_search_neither_stops_nor_begins_again(one_pass: Result) -> None:
    once = follow(one_pass, LEVELS)
    assert follow(one_pass, replace(LEVELS, restart=True)) == once
    hasty = replace(LEVELS, patience=1, tolerance=0.5)
    assert len(refine(NOBODY, one_pass, GRID, hasty).curve) < 2 + 3 + 6 + 3
    assert follow(one_pass, hasty) == once


def test_the_shipped_search_is_followed_as_it_ships() -> None:
    short = Refinement(10, "greedy", 0.5, sharpen=16.0, coarser=(5, 8), smoothing_vox=(0.7, 0.0))
    (greedy, usual), (points, fifty), (weights, _) = istn_stress.long_ways(short, 300)
    assert replace(greedy, steps=short.steps) == short
    assert (greedy.steps, usual) == (300, 23)
    assert usual in istn_stress.steps_to_look_at(greedy)  # where it would end
    assert (points.mode, points.steps, points.rate, fifty) == ("parameters", 300, Refinement().rate, 50)
    assert (weights.mode, weights.steps) == ("weights", 100)


def test_in_the_circle_everybody_is_fixed_once(cohort: Cohort) -> None:
    many = replace(cohort, splits={"train": (0,), "test": (1, 2, 3, 4, 5)})
    pairs = istn_stress.circle(many, 9)
    for side in (0, 1):
        assert sorted(pair[side] for pair in pairs) == [1, 2, 3, 4, 5]
    assert all(moving != fixed for moving, fixed in pairs)
    assert istn_stress.circle(many, 3) == pairs[:3]


def test_the_table_of_pairs_counts_who_fell_and_who_rose() -> None:
    dice = [[0.5, 0.8, 0.795], [0.5, 0.8, 0.78], [0.5, 0.8, 0.85], [0.5, 0.8, 0.83]]  # a pair each
    each = {
        key: dice if key == "dice" else [[0.1] * 3] * 4 for key in ("dice", "loss", "descended", "folding", "sdlogj")
    }
    curves = {key: [list(row) for row in zip(*lines, strict=True)] for key, lines in each.items()}
    record = {"mode": "greedy", "each": each} | istn_stress.drift(curves, [0, 23, 513], 23)
    table = istn_stress.long_pairs_table([record, {"change": "x"}])
    assert [row[1:4] for row in table.rows] == [
        ("one pass", "0", "0.500"), ("usual", "23", "0.800"), ("end", "513", "0.814"),
    ]  # fmt: skip
    assert "Dice fell by 0.01 or more in 1 of 4 pairs and rose so in 2: by -0.020 to +0.050" in table.notes[0]
    assert record["fell_after_23"] == 1


def test_the_alarm_is_set_by_validation_pairs_and_counts_test_pairs() -> None:
    usual = [{"seed": 0, "each_loss": [0.01 * k for k in range(21)]}, {"seed": 1, "each_loss": [1.0] * 21}]
    head = {"model": "ISTN-e", "way": "refined", "seed": 0}
    rows = [
        head | {"change": NONE, "each_tre": [0.5] * 4, "each_loss": [0.1, 0.1, 0.1, 0.3]},
        head | {"change": "x", "each_tre": [9.0, 9.0, 0.1, 0.1, 0.1], "each_loss": [0.5, 0.01, 0.5, 0.01, 0.18]},
        head | {"change": "x", "seed": 1, "each_tre": [9.0, 0.1], "each_loss": [0.5, 0.5]},  # below this one's level
        head | {"change": "x", "model": "STN-u", "each_tre": [9.0], "each_loss": [0.0]},
    ]
    said = istn_stress.alarm(rows, usual)
    assert "(0.190 to 1.000, by seed)" in said
    assert "found in 33 % of 3 registrations that fail" in said
    assert "in 25 % of 4 of changed pairs that do not" in said
    assert "in 25 % of 4 of test pairs as in training that do not" in said


# ---- whole runs, on stand-ins ----


def run(folder: Path, *more: str) -> tuple[dict[str, Any], str]:
    file = folder / "result.json"
    istn_stress.main(["--quick", "--json", str(file), "--runs", str(folder / "runs"), "--device", "cpu", *more])
    return json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".md").read_text(encoding="utf-8")


def test_all_parts_but_the_real_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--sizes", "2", "3", "--seeds", "0", "1", "--long", "2")
    record, text = run(tmp_path, *few, "--parts", "long", "pairs")
    assert text.startswith("Quick mode")
    assert record["seeds"] == [0, 1]
    by_pairs, long = record["tables"]  # in the order of the report
    assert [row[:2] for row in by_pairs["rows"]] == [
        ["nothing", "-"], ["STN-u", "2"], ["STN-u", "3"], ["ISTN-e", "2"], ["ISTN-e", "3"],
    ]  # fmt: skip
    assert all("±" in cell for row in by_pairs["rows"][1:] for cell in row[2:6])
    assert {row[1] for row in long["rows"]} == {"parameters", "weights"}
    assert all(len(row) == len(table["columns"]) for table in record["tables"] for row in table["rows"])
    assert len(list((tmp_path / "runs").iterdir())) == 2 * 2 * 2 + 2  # B-spline only with the most pairs
    capsys.readouterr()
    again, _ = run(tmp_path, *few, "--parts", "long", "pairs")
    assert "step 2" not in capsys.readouterr().out  # nothing is trained twice
    assert again["records"] == record["records"]


def test_changes_and_the_shipped_model(tmp_path: Path) -> None:
    few = ("--sizes", "2", "--seeds", "0", "--long", "2", "--pairs", "1", "--followed", "1", "2")
    record, _ = run(tmp_path, *few, "--parts", "structures", "unlike", "hippocampus")
    titles = [table["title"] for table in record["tables"]]
    assert [t.split(":")[0] for t in titles[:2]] == ["Trees", "Trees"]
    assert titles[2].startswith("istn-hippocampus, as it ships, on changed crops: 1 test pairs")
    rows = {(r["part"], r.get("change"), r.get("way"), r.get("model")): r for r in record["records"]}
    before = rows["structures", NONE, "refined", "ISTN-e"]
    assert before == rows["unlike", NONE, "refined", "ISTN-e"] | {"part": "structures"}
    assert len(before["each_loss"]) == before["pairs"] == 2
    changed = [r["change"] for r in record["records"] if r["part"] == "hippocampus" and r.get("way") == "refined"]
    assert changed == [NONE, *(f"{name}, moving" for name in changes.REAL), *changes.UNLIKE]
    assert titles[3].startswith("istn-hippocampus: long refinements, 2 test pairs")
    followed = [r for r in record["records"] if "each" in r]
    assert [(r["mode"], r["finest"], r["steps"][-1]) for r in followed] == [
        ("greedy", 13, 15), ("parameters", 0, 2), ("weights", 0, 2),
    ]  # fmt: skip
    quick, _ = istn_stress.shipped(istn_stress.Options(quick=True))
    strangers = {quick.people[i] for i in quick.splits["test"]}
    for r in followed:
        assert {fixed for _, fixed in r["people"]} == strangers
        for key, lines in r["each"].items():
            assert [len(line) for line in lines] == [len(r["steps"])] * 2
            means = [sum(values) / 2 for values in zip(*lines, strict=True)]
            assert means == pytest.approx(r["curves"][key], rel=1e-3, abs=1e-6)


def test_without_data_the_trees_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGTEACH_DATA", str(tmp_path))
    monkeypatch.setattr(networks, "load_cohort", networks.load_cohort.__wrapped__)
    record = istn_stress.main(["--parts", "hippocampus", "--device", "cpu", "--runs", str(tmp_path / "runs")])
    (table,) = record["tables"]
    assert "left out" in table["title"]
    assert one_sentence(FileNotFoundError(table["notes"][0]))
    with pytest.raises(ValueError, match="1 or more"):
        istn_stress.main(["--sizes", "0", "--parts", "hippocampus"])


def test_a_scene_in_parts_is_the_scene(scenes: dict[str, Scene]) -> None:
    scene = scenes[NONE]
    parts = [scene.part(k, k + 1) for k in range(len(scene))]
    assert torch.equal(torch.cat([p.images[0] for p in parts]), scene.images[0])
    assert torch.equal(torch.cat([p.partners for p in parts]), scene.to(CPU).partners)
