"""Recipes: what is drawn for training, from whom, what is measured, and names."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from truths.fields import one_sentence, positions
from truths.phantoms import ball

from regteach import objectives, runs
from regteach.affine import AffineBounds
from regteach.checkpoints import network
from regteach.data import named
from regteach.data.augment import Augmentation
from regteach.data.cohort import Cohort, one_hot
from regteach.data.deformations import random_smooth
from regteach.data.named import load_cohort
from regteach.evaluation import figures_of, measure, pairs_to_test
from regteach.grid import Grid
from regteach.nets.istn import ISTN, AffineStage, ISTNConfig, SplineStage
from regteach.recipes import RECIPES, Recipe, find_recipe
from regteach.refinement import Refinement, refine
from regteach.result import Result, Step
from regteach.runs import CohortTask
from regteach.training import PICTURE, Settings, train
from regteach.transforms import Dense, Identity, Transform, displacement

FLAT = Grid((16, 20), (1.5, 1.0), (-4.0, 10.0))
SOLID = Grid((10, 12, 8), (1.5, 1.0, 2.0), (-4.0, 10.0, 0.0))
CPU = torch.device("cpu")


def disks(grid: Grid, people: int = 14) -> Cohort:
    """A disk beside another, a little elsewhere in every person; the last two train people have two images each."""
    chance = np.random.default_rng(7)
    points, middle = positions(grid), np.array(grid.centre)
    labels = []
    for _ in range(people):
        shift = chance.uniform(-2.5, 2.5, grid.dim)
        beside = np.eye(grid.dim)[1] * 3.5
        first, second = (ball(points, middle + shift + side * beside, 3.2) for side in (-1, 1))
        labels.append(np.where(first > 0, 3, np.where(second > 0, 5, 0)))
    maps = torch.from_numpy(np.stack(labels)).long()
    names = [f"p{i}" for i in range(people)]
    names[5], names[7] = names[4], names[6]
    noise = torch.from_numpy(chance.uniform(0, 0.1, maps.shape)).float()
    images = ((maps > 0) * (0.4 + 0.1 * (maps == 5)) + noise)[:, None].clamp(0, 1)
    structures = {5: "right", 3: "left"}
    splits = {"train": tuple(range(8)), "validation": (8, 9, 10), "test": (11, 12, 13)}
    return Cohort(
        "disks", images, one_hot(maps, structures), maps, grid, tuple(names), structures, splits, "Synthetic."
    )


def recipe_for(grid: Grid, variant: str = "supervised", **changes: Any) -> Recipe:
    stages = (AffineStage(AffineBounds(4.0, 20.0, 1.2), (4, 8), 8), SplineStage(6.0, widths=(4, 8)))
    itn = (4, 8) if variant in ("explicit", "implicit") else ()
    config = ISTNConfig(grid, stages, structures=2, itn=itn)
    settings = Settings(steps=2, batch=3, rate=5e-3, validate_every=1, seed=1)
    return replace(Recipe("tiny", "disks", variant, config, settings, bending=0.5), **changes)


@pytest.fixture(scope="module")
def flat() -> Cohort:
    return disks(FLAT)


@pytest.fixture(params=["2d", "3d"])
def cohort(request: pytest.FixtureRequest, flat: Cohort) -> Cohort:
    return flat if request.param == "2d" else disks(SOLID)


class Fixed(nn.Module):
    """Finds one transform, whatever it is shown; it remembers what it was shown."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform
        self.shown: list[tuple[Tensor, Tensor]] = []

    def forward(self, moving: Tensor, fixed: Tensor, grid: Grid) -> Result:
        self.shown.append((moving, fixed))
        step = Step(torch.zeros(len(moving), 1), lambda _: self.transform)
        return Result(self.transform, (moving, fixed), (step,))


def shaken(task: CohortTask) -> Any:
    """A network that is not at its start, where it does nothing."""
    model = task.build().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


# ---- training ----


@pytest.mark.parametrize("variant", objectives.ISTN)
def test_every_variant_trains(cohort: Cohort, variant: str) -> None:
    recipe = recipe_for(cohort.grid, variant)
    task = CohortTask(recipe, cohort, validation_pairs=2)
    trained = train(task, recipe.settings)
    start = task.build()
    assert [record["step"] for record in trained.history] == [1, 2]
    assert all(np.isfinite(list(record.values())).all() for record in trained.history)
    assert 0 < trained.best["dice"] <= 1
    assert {"dice", "folding_percent"} < set(trained.best)
    assert isinstance(trained.model, ISTN)
    assert trained.model.config == recipe.config
    moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), trained.model.parameters(), strict=True)]
    assert any(moved)


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("unsupervised", {"image"}),
        ("supervised", {"structure"}),
        ("explicit", {"structure", "itn"}),
        ("implicit", {"structure", "itn"}),
    ],
)
def test_the_loss_is_that_of_the_variant(flat: Cohort, variant: str, names: set[str]) -> None:
    recipe = recipe_for(FLAT, variant, augmentation=Augmentation(shift_mm=1.0, noise=0.05))
    task = CohortTask(recipe, flat)
    model = shaken(task)
    terms = task.loss(model, [3, 8, 4], CPU)
    assert set(terms) == names | {"bending"}
    assert all(value.shape == (3,) for value in terms.values())
    # Item by item, from what was drawn.
    for k, number in enumerate([3, 8, 4]):
        images, soi = task._item(number)
        result = model(*images, FLAT)
        expected = objectives.istn(variant, result, images, soi, FLAT, recipe.bending, recipe.coarsen)
        for name, value in terms.items():
            torch.testing.assert_close(value[k : k + 1], expected[name], atol=1e-5, rtol=1e-4)


def test_training_brings_the_disks_together(flat: Cohort) -> None:
    recipe = recipe_for(FLAT, settings=Settings(steps=50, batch=6, rate=1e-2, validate_every=25, clip=1.0))
    task = CohortTask(recipe, flat)
    before, _ = measure(Fixed(Identity(2)), flat, task.judged)
    trained = train(task, recipe.settings)
    assert trained.best["dice"] > before["dice"] + 0.15
    after, _ = measure(trained.model, flat, task.judged)
    best = {name: trained.best[name] for name in after}
    assert after == pytest.approx(best, abs=1e-6)  # the best weights are those that were measured


def test_the_untrained_network_is_the_identity(cohort: Cohort) -> None:
    task = CohortTask(recipe_for(cohort.grid), cohort)
    assert task.validate(task.build(), CPU) == pytest.approx(
        measure(Fixed(Identity(cohort.grid.dim)), cohort, task.judged)[0]
    )


# ---- what is drawn, and from whom ----


def shown_by(task: CohortTask, items: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Moving and fixed images of some items, as the network sees them."""
    model = Fixed(Dense(torch.zeros(1, *task.cohort.grid.shape, task.cohort.grid.dim), task.cohort.grid))
    task.recipe = replace(task.recipe, bending=0.0)
    task.loss(model, items, CPU)
    moving, fixed = model.shown[0]
    return list(zip(moving.split(1), fixed.split(1), strict=True))


def whose(image: Tensor, cohort: Cohort) -> int:
    """Index of an image that was not changed."""
    found = [i for i in range(len(cohort)) if torch.equal(cohort.images[[i]], image)]
    assert len(found) == 1
    return found[0]


def test_training_pairs_are_of_two_training_people(flat: Cohort) -> None:
    task = CohortTask(recipe_for(FLAT), flat)
    pairs = Counter((whose(m, flat), whose(f, flat)) for m, f in shown_by(task, list(range(1500))))
    expected = set(flat.pairs("train"))
    assert len(expected) == 8 * 7 - 4  # two people have two images
    assert set(pairs) == expected
    mean, spread = 1500 / 52, (1500 / 52) ** 0.5
    assert max(abs(n - mean) for n in pairs.values()) < 5 * spread  # each is as likely as any other


def test_structures_are_those_of_the_images(flat: Cohort) -> None:
    task = CohortTask(recipe_for(FLAT), flat)
    for number in range(20):
        images, soi = task._item(number)
        for side in (0, 1):
            assert torch.equal(soi[side], flat.soi[[whose(images[side], flat)]])


def test_a_network_is_judged_on_validation_people_only(flat: Cohort) -> None:
    task = CohortTask(recipe_for(FLAT), flat)
    model = Fixed(Identity(2))
    task.validate(model, CPU)
    seen = {(whose(m, flat), whose(f, flat)) for m, f in model.shown}
    assert seen == set(flat.pairs("validation")) == set(task.judged)  # 6, fewer than 20
    assert len(CohortTask(recipe_for(FLAT), flat, validation_pairs=2).judged) == 2
    other = recipe_for(FLAT, settings=Settings(seed=9))
    assert CohortTask(other, flat).judged == task.judged  # the same for every seed of a run


def test_a_person_alone_in_validation_judges_with_people_who_are_trained_on_and_nobody_is_refused(flat: Cohort) -> None:
    first, *others = flat.splits["validation"]
    alone = CohortTask(recipe_for(FLAT), replace(flat, splits=flat.splits | {"validation": (first,)})).judged
    assert set(alone) == {pair for t in flat.splits["train"] for pair in ((first, t), (t, first))}
    assert not {i for pair in alone for i in pair} & set(others)
    with pytest.raises(ValueError, match="no validation people"):
        CohortTask(recipe_for(FLAT), replace(flat, splits=flat.splits | {"validation": ()}))


AUGMENTED = Augmentation(shift_mm=1.0, rotation_deg=10.0, warp_mm=1.0, warp_spacing_mm=6.0, gamma=0.2, noise=0.05)


def test_an_item_is_its_number_and_nothing_else(flat: Cohort) -> None:
    recipe = recipe_for(FLAT, augmentation=AUGMENTED)
    first = shown_by(CohortTask(recipe, flat), [0, 1, 2, 3])
    task = CohortTask(recipe, flat)
    torch.manual_seed(77)
    shown_by(task, [10, 11])
    again = shown_by(task, [3, 1, 0, 2])
    for number, place in enumerate([2, 1, 3, 0]):
        for side in (0, 1):
            assert torch.equal(first[number][side], again[place][side])
    drawn = [image for pair in shown_by(task, list(range(30))) for image in pair]
    assert len({image.numpy().tobytes() for image in drawn}) == 60  # every image draws its own change
    other = shown_by(CohortTask(replace(recipe, settings=Settings(seed=2)), flat), [0, 1, 2, 3])
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


def test_contrasts_are_drawn_from_the_cohorts_tissue(flat: Cohort) -> None:
    def paint(tissue: Tensor, grid: Grid, generator: torch.Generator) -> Tensor:
        return 0.5 * (tissue > 0)[:, None] + 0.001 * torch.rand((), generator=generator)

    drawn = replace(flat, tissue=flat.labels, synthesis=paint)
    recipe = recipe_for(FLAT, augmentation=Augmentation(synthetic=1.0))
    for moving, fixed in shown_by(CohortTask(recipe, drawn), [0, 1]):
        assert len(moving.unique()) == len(fixed.unique()) == 2
        assert moving.max() != fixed.max()
    with pytest.raises(ValueError, match="tissue map"):
        shown_by(CohortTask(recipe, flat), [0])


def test_the_picture_is_a_png(cohort: Cohort) -> None:
    task = CohortTask(recipe_for(cohort.grid, "implicit"), cohort)
    png = task.picture(task.build().eval(), CPU)
    assert png is not None
    assert png.startswith(b"\x89PNG\r\n")
    assert len(png) > 5000


# ---- what is measured ----


def by_hand(cohort: Cohort, moving: int, fixed: int, transform: Transform) -> tuple[float, float]:
    """Mean Dice and folding by NumPy: nearest voxel, background outside."""
    grid = cohort.grid
    shift = displacement(transform, grid)[0].double().numpy()
    where = positions(grid) + shift
    nearest = np.rint((where - np.array(grid.origin)) / np.array(grid.spacing)).astype(int)
    outside = ((nearest < 0) | (nearest >= grid.shape)).any(-1)
    read = cohort.labels[moving].numpy()[tuple(np.moveaxis(np.where(outside[..., None], 0, nearest), -1, 0))]
    warped = np.where(outside, 0, read)
    truth = cohort.labels[fixed].numpy()
    overlaps = []
    for label in cohort.structures:
        a, b = warped == label, truth == label
        overlaps.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    slopes = [np.stack(np.gradient(shift[..., k], *grid.spacing), -1) for k in range(grid.dim)]
    det = np.linalg.det(np.eye(grid.dim) + np.stack(slopes, -2))
    return float(np.mean(overlaps)), float(100 * (det <= 0).mean())


def wild(grid: Grid, seed: int) -> Dense:
    """A field that folds here and there."""
    smooth = random_smooth(grid, 3.0, 5.0, torch.Generator().manual_seed(seed))
    return Dense(displacement(smooth, grid), grid)


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_by_hand(cohort: Cohort, seed: int) -> None:
    transform = wild(cohort.grid, seed)
    for moving, fixed in cohort.pairs("test")[:3]:
        figures = figures_of(cohort, moving, fixed, transform)
        assert (figures.dice, figures.folding_percent) == pytest.approx(by_hand(cohort, moving, fixed, transform))
        assert 0 < figures.dice < 1
        assert 0 < figures.folding_percent < 100
        assert figures.transform is transform


def test_an_image_on_itself_has_a_dice_of_1(cohort: Cohort) -> None:
    figures = figures_of(cohort, 2, 2, Identity(cohort.grid.dim))
    assert (figures.dice, figures.folding_percent) == (1.0, 0.0)


def test_measure_is_the_mean_of_its_pairs(cohort: Cohort) -> None:
    model = Fixed(wild(cohort.grid, 1))
    pairs = cohort.pairs("test", 4, seed=3)
    means, rows = measure(model, cohort, pairs)
    hand = [by_hand(cohort, *pair, model.transform) for pair in pairs]
    assert [(row.dice, row.folding_percent) for row in rows] == [pytest.approx(one) for one in hand]
    assert means == pytest.approx(dict(zip(("dice", "folding_percent"), np.mean(hand, 0), strict=True)))
    for (moving, fixed), shown in zip(pairs, model.shown, strict=True):
        assert torch.equal(shown[0], cohort.images[[moving]])
        assert torch.equal(shown[1], cohort.images[[fixed]])


def test_labels_play_no_part_in_what_is_found(flat: Cohort) -> None:
    task = CohortTask(recipe_for(FLAT, "implicit"), flat)
    model = shaken(task)
    blank = replace(flat, labels=torch.zeros_like(flat.labels), soi=torch.zeros_like(flat.soi))
    settings = Refinement(steps=2)
    pairs = flat.pairs("test", 2)
    found = [measure(model, one, pairs, refinement=settings)[1] for one in (flat, blank)]
    for a, b in zip(*found, strict=True):
        assert torch.equal(displacement(a.transform, FLAT), displacement(b.transform, FLAT))
        assert np.isnan(b.dice)


def test_measure_refines_each_pair_by_itself(flat: Cohort) -> None:
    task = CohortTask(recipe_for(FLAT, "implicit"), flat)
    model = shaken(task)
    settings = Refinement(steps=5, rate=0.05)
    pairs = flat.pairs("test", 2)
    _, rows = measure(model, flat, pairs, refinement=settings)
    for (moving, fixed), row in zip(pairs, rows, strict=True):
        with torch.no_grad():
            result = model(flat.images[[moving]], flat.images[[fixed]], FLAT)
        transform = refine(model, result, FLAT, settings).result.transform
        torch.testing.assert_close(displacement(row.transform, FLAT), displacement(transform, FLAT))
        assert (row.dice, row.folding_percent) == pytest.approx(by_hand(flat, moving, fixed, transform), abs=1e-6)
        assert displacement(transform, FLAT).abs().max() > 0.05


def test_what_comes_from_outside_is_background(flat: Cohort) -> None:
    everywhere = replace(flat, labels=torch.full_like(flat.labels, 3))
    shift = torch.zeros(1, *FLAT.shape, 2)
    shift[..., 1] = 5.0  # five of the 20 columns are read beyond the last
    moved = figures_of(everywhere, 11, 12, Dense(shift, FLAT))
    assert moved.dice == pytest.approx(2 * 15 / 35)


def test_without_pairs_there_is_nothing_to_measure(flat: Cohort) -> None:
    with pytest.raises(ValueError, match="There is no pair of disks to measure"):
        measure(Fixed(Identity(2)), flat, ())
    with pytest.raises(ValueError, match="0 of the 6 test pairs of disks were asked for"):
        pairs_to_test(flat, 0)


def test_pairs_to_test_are_of_test_people(flat: Cohort) -> None:
    assert set(pairs_to_test(flat)) == set(flat.pairs("test"))
    assert pairs_to_test(flat, 2) == flat.pairs("test", 2, seed=0)


# ---- a recipe from its name to its checkpoint ----


@pytest.fixture
def listed(flat: Cohort, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(named.COHORTS, "disks", lambda: flat)
    yield
    load_cohort.cache_clear()


def test_a_run_ends_in_a_checkpoint_whose_card_is_true(listed: None, flat: Cohort, tmp_path: Path) -> None:
    recipe = recipe_for(FLAT, "implicit", refinement=Refinement(steps=3))
    told: list[dict[str, float]] = []
    model = runs.run(recipe, tmp_path, told.append)
    assert (tmp_path / PICTURE).exists()
    assert len(told) == 2
    stored = runs.load(tmp_path / "tiny.safetensors")
    assert stored.card == json.loads(json.dumps(model.card))
    card = stored.card
    assert card["people"] == {"train": 6, "validation": 3, "test": 3}
    assert card["recipe"]["variant"] == "implicit"
    assert card["data"] == "Synthetic."
    assert card["test_pairs"] == 6
    for refinement, key in ((None, "one_pass"), (stored.refinement, "refined")):
        means, rows = measure(stored.network, flat, pairs_to_test(flat), refinement=refinement)
        assert card["dice"][key] == pytest.approx(means["dice"], abs=1e-6)
        assert card["folding_percent"][key] == pytest.approx(means["folding_percent"], abs=1e-6)
        assert [one[key] for one in card["first_pairs"]] == pytest.approx([row.dice for row in rows[:3]], abs=1e-6)
    figures = runs.evaluate(stored)
    assert figures["before"]["dice"] == pytest.approx(card["dice"]["before"])
    assert figures["refined"]["dice"] == pytest.approx(card["dice"]["refined"])
    assert set(runs.evaluate(stored, steps=0)) == {"before", "one pass"}


def test_a_run_that_was_interrupted_while_it_was_measured_is_measured_again_and_not_trained_again(
    listed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = recipe_for(FLAT, "implicit", refinement=Refinement(steps=3)), tmp_path / "stopped"
    straight = runs.run(recipe, tmp_path / "straight")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CohortTask, "figures", stop)
        with pytest.raises(KeyboardInterrupt):
            runs.run(recipe, folder)
    assert [path.name for path in folder.glob("*.safetensors")] == ["unmeasured.safetensors"]
    monkeypatch.setattr(CohortTask, "loss", stop)
    runs.run(recipe, folder)
    assert [path.name for path in folder.glob("*.safetensors")] == ["tiny.safetensors"]
    stored = runs.load(folder / "tiny.safetensors")
    clock = {"refined_seconds_per_pair", "training_seconds", "date"}
    one, other = ({k: v for k, v in card.items() if k not in clock} for card in (stored.card, straight.card))
    assert one == json.loads(json.dumps(other))
    assert one["dice"]["refined"] > 0
    weights = straight.network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in stored.network.state_dict().items())


def test_every_recipe_can_be_built() -> None:
    assert RECIPES
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert find_recipe(name) is recipe
        if isinstance(recipe, Recipe):
            assert recipe.data in named.COHORTS
            assert recipe.variant in objectives.ISTN
        assert recipe.settings.precision == "no" or runs.TASKS[type(recipe.config)].calls_forward
        assert isinstance(network(recipe.config), nn.Module)


@pytest.mark.parametrize("variant", objectives.ISTN)
@pytest.mark.parametrize("kind", ["affine", "bspline"])
def test_the_trees_have_a_recipe_for_every_variant(kind: str, variant: str) -> None:
    recipe = find_recipe(f"istn-trees-{kind}-{variant}")
    assert recipe.variant == variant
    assert isinstance(recipe.config.stages[-1], SplineStage if kind == "bspline" else AffineStage)
    assert bool(recipe.config.itn) == (variant in ("explicit", "implicit"))  # the others have none to run


def test_a_recipe_can_be_changed_and_stays_as_it_was() -> None:
    name = next(iter(RECIPES))
    recipe = RECIPES[name]
    changed = find_recipe(name, steps=7, seed=5)
    assert (changed.settings.steps, changed.settings.seed) == (7, 5)
    assert changed == replace(recipe, settings=replace(recipe.settings, steps=7, seed=5))
    assert find_recipe(name) == recipe


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="There is no recipe 'istn-tree-afine-implicit'") as caught:
        find_recipe("istn-tree-afine-implicit")
    assert one_sentence(caught.value, "the nearest is 'istn-trees-affine-implicit'")
    with pytest.raises(ValueError, match="There is no data set 'hipocampus'") as caught:
        load_cohort("hipocampus")
    assert one_sentence(caught.value, "the nearest is 'hippocampus'")
    with pytest.raises(ValueError, match="There is no data set"):
        CohortTask(recipe_for(FLAT, data="disk"))


def test_a_cohort_is_read_once(listed: None, flat: Cohort) -> None:
    assert load_cohort("disks") is flat
    assert CohortTask(recipe_for(FLAT)).cohort is flat
