"""Training that starts from weights that ship, and levels that join late or count less."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from truths.fields import one_sentence

from regteach import cohort_task, contrasts, objectives
from regteach.checkpoints import Model, network
from regteach.cohort_task import CohortTask, start_from
from regteach.data.augment import Augmentation
from regteach.data.cohort import Cohort
from regteach.evaluation import PairFigures
from regteach.grid import Grid
from regteach.nets.georeg import GeoReg, GeoRegConfig
from regteach.nets.istn import AffineStage, ISTNConfig
from regteach.nets.voxelmorph import VoxelMorphConfig
from regteach.recipes import Recipe, find_recipe
from regteach.refinement import Refinement
from regteach.regularity import bending_energy
from regteach.result import after_each
from regteach.sampling import warp
from regteach.similarity import dissimilarity, local_ncc, ncc
from regteach.training import Settings
from regteach.transforms import Dense, Identity

MAPS = ISTNConfig(Grid((16, 16)), (AffineStage(widths=(4, 8), hidden=8),), itn=(4, 8))
SMALL = GeoRegConfig(Grid((16, 16)), (4, 8, 8), (0, 3, 3), (3, 3))


class Shell(nn.Module):
    """What a network looks like to a task in several processes: it can be called, and has no methods of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any) -> Any:
        return self.module(*given)


def shaken(config: GeoRegConfig) -> GeoReg:
    built = network(config)
    assert isinstance(built, GeoReg)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return built.eval()


def test_weights_are_taken_over_and_count_in_voxels() -> None:
    """On voxels of twice the width the same weights move points twice as far."""
    torch.manual_seed(0)
    wide = Grid((16, 16), (2.0, 2.0))
    first, built = shaken(SMALL), network(replace(SMALL, grid=wide)).eval()
    start_from(built, Model("first", first))
    moving, fixed = torch.rand(2, 1, 1, 16, 16)
    here = first(moving, fixed, SMALL.grid).transform.displacement
    torch.testing.assert_close(built(moving, fixed, wide).transform.displacement, 2 * here, rtol=1e-4, atol=1e-4)
    assert here.abs().max() > 0.01


def test_a_second_encoder_begins_as_the_first_and_is_its_own() -> None:
    torch.manual_seed(0)
    first, built = shaken(SMALL), network(replace(SMALL, encoders=2))
    start_from(built, Model("first", first))
    pairs = list(zip(built.encoders[0].parameters(), built.encoders[1].parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(a.data_ptr() == b.data_ptr() for a, b in pairs)
    moving, fixed = torch.rand(2, 1, 1, 16, 16)
    found = [net(moving, fixed, SMALL.grid).transform.displacement for net in (first, built.eval())]
    torch.testing.assert_close(*found)


def test_a_level_that_steps_for_the_first_time_begins_by_standing_still() -> None:
    torch.manual_seed(0)
    first, built = shaken(SMALL), network(replace(SMALL, windows=(3, 3, 3))).eval()
    start_from(built, Model("first", first))
    moving, fixed = torch.rand(2, 1, 1, 16, 16)
    found = [net(moving, fixed, SMALL.grid).transform.displacement for net in (first, built)]
    torch.testing.assert_close(*found)
    with torch.no_grad():
        built.deform[0].head[-1].weight += 0.1
    assert (built(moving, fixed, SMALL.grid).transform.displacement - found[0]).abs().max() > 0.01


def test_weights_that_do_not_fit_get_one_sentence() -> None:
    for other in (replace(SMALL, widths=(8, 8, 8)), replace(SMALL, widths=(4, 8), windows=(0, 3), parents=(3,))):
        with pytest.raises(ValueError, match="weights of first do not fit") as error:
            start_from(network(SMALL), Model("first", shaken(other)))
        assert one_sentence(error.value)


def test_weights_that_would_be_left_over_do_not_fit() -> None:
    for more, less in (
        (replace(SMALL, encoders=2), SMALL),
        (replace(MAPS, itn=(4, 8)), replace(MAPS, itn=())),
    ):
        with pytest.raises(ValueError, match="weights of first do not fit"):
            start_from(network(less), Model("first", network(more)))


def test_steps_of_a_level_that_takes_none_any_more_are_left_behind() -> None:
    torch.manual_seed(0)
    first, built = shaken(replace(SMALL, windows=(3, 3, 3))), network(SMALL)
    start_from(built, Model("first", first))
    for key, value in built.state_dict().items():
        assert torch.equal(value, first.state_dict()[key])


def noise() -> Cohort:
    """Four people, each with one structure that is everywhere."""
    torch.manual_seed(0)
    labels = torch.ones(4, 16, 16, dtype=torch.long)
    splits = {"train": (0, 1), "validation": (2, 3), "test": ()}
    images, soi = torch.rand(4, 1, 16, 16), labels[:, None].float()
    return Cohort("noise", images, soi, labels, Grid((16, 16)), tuple("abcd"), {1: "all"}, splits, "")


def test_a_level_that_joins_late_rests_until_then() -> None:
    """While the finest level rests, its parameters have a gradient, of zero: several processes wait for one."""
    cohort = noise()
    recipe = Recipe("late", "noise", "unsupervised", SMALL, Settings(steps=2, batch=2), coarse_first=(1,))
    task = CohortTask(recipe, cohort)
    for step, rests in ((0, True), (1, False)):
        net = shaken(SMALL)
        terms = task.loss(net, (2 * step, 2 * step + 1), torch.device("cpu"))
        terms["image"].sum().backward()
        still = [bool((p.grad == 0).all()) for p in net.inherit[0].parameters() if p.grad is not None]
        assert len(still) == len(list(net.inherit[0].parameters()))
        assert all(still) is rests


@pytest.mark.parametrize(
    ("change", "says"), [({"coarse_first": (5,)}, "join late"), ({"weights": (1.0,)}, "level by level")]
)
def test_levels_are_those_of_a_network_that_has_them(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        CohortTask(replace(find_recipe("istn-trees-affine-explicit"), **change))
    assert one_sentence(error.value)


@pytest.mark.parametrize("finest", [0, 1])
def test_training_looks_at_the_middle_of_the_images_where_it_is_told_to(finest: int) -> None:
    """The loss is that of images which were cut before: what lies outside is nowhere in it."""
    cohort = noise()
    recipe = Recipe(
        "middle", "noise", "unsupervised", SMALL, Settings(steps=2, batch=2), middle=(8, 12), coarse_first=(finest,)
    )
    net, cut = shaken(SMALL), (..., slice(4, 12), slice(2, 14))
    small = replace(
        cohort, images=cohort.images[cut], soi=cohort.soi[cut], labels=cohort.labels[cut], grid=Grid((8, 12))
    )
    found = CohortTask(recipe, cohort).loss(net, (0, 1), torch.device("cpu"))
    expected = CohortTask(replace(recipe, middle=()), small).loss(net, (0, 1), torch.device("cpu"))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])
    whole = CohortTask(replace(recipe, middle=()), cohort).loss(net, (0, 1), torch.device("cpu"))
    assert not torch.equal(whole["image"], found["image"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"middle": (8,)}, r"A middle of \(8,\) voxels does not lie in a grid of \(16, 16\)"),
        ({"middle": (8, 20)}, "does not lie in a grid"),
        ({"middle": (0, 8)}, "does not lie in a grid"),
        ({"middle": (8, 8), "config": VoxelMorphConfig(Grid((16, 16)))}, "only a GeoReg looks at their middle"),
    ],
)
def test_what_is_no_middle_is_said(changes: dict[str, Any], says: str) -> None:
    recipe = Recipe("middle", "noise", "unsupervised", SMALL, Settings(steps=2, batch=2))
    with pytest.raises(ValueError, match=says) as error:
        CohortTask(replace(recipe, **changes), noise())
    assert one_sentence(error.value)


def test_the_weights_of_the_levels_count() -> None:
    """With all weight on the finest level the loss is that of the finest level."""
    torch.manual_seed(0)
    grid, net = Grid((16, 16)), shaken(SMALL)
    moving, fixed = torch.rand(2, 1, 1, 16, 16)
    result = net(moving, fixed, grid)
    finest = 1 - ncc(warp(moving, result.transform, grid), fixed)
    terms = objectives.multiscale(result, grid, weights=(1.0, 0.0, 0.0))
    torch.testing.assert_close(terms["image"], finest)


@pytest.mark.parametrize(("weights", "late"), [((1.0, 1.0), ()), ((1.0, 0.0, 0.0), (5,)), ((0.0, 0.0, 0.0), ())])
def test_levels_without_a_weight_are_said(weights: tuple[float, ...], late: tuple[int, ...]) -> None:
    recipe = Recipe("levels", "noise", "unsupervised", SMALL, Settings(steps=2, batch=2))
    with pytest.raises(ValueError, match="has 3 levels and needs a weight for each") as error:
        CohortTask(replace(recipe, weights=weights, coarse_first=late), noise())
    assert one_sentence(error.value)


def test_contrasts_drawn_anew_are_not_imitated() -> None:
    recipe = find_recipe("georeg-brains-t1t2")
    drawn = replace(
        recipe, config=replace(recipe.config, grid=Grid((16, 16))), augmentation=Augmentation(synthetic=1.0)
    )
    twins = replace(noise(), twins=(0, 1, 2, 3))
    with pytest.raises(ValueError, match="no contrasts are drawn anew"):
        CohortTask(drawn, twins)


@pytest.mark.parametrize("window_vox", [3, 9])
def test_a_recipe_says_in_what_windows_images_are_compared(window_vox: int) -> None:
    config = replace(SMALL, similarity="local_ncc")
    recipe = Recipe("windows", "noise", "unsupervised", config, Settings(steps=2, batch=1), window_vox=window_vox)
    task = CohortTask(replace(recipe, weights=(1.0, 0.0, 0.0)), noise())
    (moving, fixed), *_ = task._item(0)
    term = task.loss(task.build(), (0,), torch.device("cpu"))["image"]  # the untrained network is the identity
    torch.testing.assert_close(term, 1 - local_ncc(moving, fixed, window_vox))


def test_a_structure_that_nobody_shows_is_said_before_training() -> None:
    """Empty, or one of two: either would be trained to the end, on nothing."""
    recipe, cohort = Recipe("empty", "noise", "explicit", MAPS, Settings(steps=2, batch=2)), noise()
    CohortTask(recipe, cohort)
    two = replace(cohort, soi=torch.cat([cohort.soi, 0 * cohort.soi], 1), structures={1: "all", 2: "none"})
    given = [(recipe, replace(cohort, soi=0 * cohort.soi), "No training image of noise shows all.")]
    judges = cohort.labels.clone()
    judges[list(cohort.splits["validation"])] = 0
    said = "No validation image of noise shows a structure, so none can judge the weights."
    given.append((recipe, replace(cohort, labels=judges), said))
    given.append((replace(recipe, config=replace(MAPS, structures=2)), two, "No training image of noise shows none."))
    for asked, shown, says in given:
        with pytest.raises(ValueError) as error:
            CohortTask(asked, shown)
        assert str(error.value) == says


def test_nobody_to_train_on_is_said_as_that() -> None:
    cohort, recipe = noise(), Recipe("alone", "noise", "explicit", MAPS, Settings(steps=2, batch=2))
    for train in ((), (0,)):
        splits = {**cohort.splits, "train": train}
        with pytest.raises(ValueError, match="noise has no pair of two people to train on"):
            CohortTask(recipe, replace(cohort, splits=splits))


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (MAPS, {"variant": "explicit"}),
        (SMALL, {}),
        (SMALL, {"coarse_first": (1,)}),
        (replace(SMALL, encoders=2), {"imitate": True}),
        (VoxelMorphConfig(Grid((16, 16)), widths=(4, 8)), {}),
    ],
    ids=["istn", "georeg", "coarse first", "imitates", "voxelmorph"],
)
def test_the_loss_calls_the_network_as_a_whole_as_it_says(config: Any, changes: dict[str, Any]) -> None:
    recipe = Recipe("whole", "noise", "unsupervised", config, Settings(steps=2, batch=2))
    task = CohortTask(replace(recipe, **changes), in_two_contrasts() if "imitate" in changes else noise())
    assert task.calls_forward
    net = task.build().train()
    bare, wrapped = (task.loss(one, (0, 1), torch.device("cpu")) for one in (net, Shell(net)))
    assert bare.keys() == wrapped.keys()
    assert all(torch.equal(value, wrapped[name]) for name, value in bare.items())


def test_a_model_is_measured_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, five = noise(), [0, 1, 2, 3, 0]
    splits = {"train": (0, 1), "validation": (2,), "test": (3, 4)}
    of_five = {"images": plain.images[five], "soi": plain.soi[five], "labels": plain.labels[five]}
    cohort = replace(plain, **of_five, people=tuple("abcde"), splits=splits)
    seen: list[tuple[str, Refinement | None]] = []

    def measured(
        net: Any, cohort: Cohort, pairs: Any, device: Any = "cpu", refinement: Refinement | None = None
    ) -> tuple[dict[str, float], list[PairFigures]]:
        seen.append((str(device), refinement))
        return {"dice": 0.5, "folding_percent": 0.0}, [PairFigures(0.5, 0.0, Identity(2))] * len(pairs)

    monkeypatch.setattr(cohort_task, "measure", measured)
    monkeypatch.setattr(cohort_task, "load_cohort", lambda name: cohort)
    recipe = Recipe("there", "noise", "explicit", MAPS, Settings(steps=2, batch=2))
    card, refinement = {"recipe": {"data": "noise"}}, Refinement(3)
    for device in ("meta", "cpu"):
        model = Model("there", network(MAPS), refinement, card).to(device)
        for measure in (CohortTask(recipe, cohort).figures, CohortTask.evaluate, CohortTask.first_pairs):
            seen.clear()
            measure(model)
            assert seen == [(device, None), (device, refinement)]


def test_levels_too_small_to_bend_are_said_before_training() -> None:
    config = replace(SMALL, widths=(4, 8, 8, 8), windows=(0, 3, 3, 3), parents=(3, 3, 3))  # 16, 8, 4, 2 voxels
    recipe = Recipe("bent", "noise", "unsupervised", config, Settings(steps=2, batch=2), bending=1.0)
    with pytest.raises(ValueError, match=r"4 levels has \(2, 2\) voxels: its bending needs 3 along each") as error:
        CohortTask(recipe, noise())
    assert one_sentence(error.value)
    CohortTask(replace(recipe, bending=0.0), noise())


@pytest.mark.parametrize("similarity", ["ncc", "local_ncc", "mutual_information"])
def test_the_loss_over_levels_is_the_average_that_it_says(similarity: str) -> None:
    """Output by output, with weights and steps that differ from level to level."""
    torch.manual_seed(0)
    config = replace(SMALL, windows=(3, 3, 3), iterations=(1, 3, 2), similarity=similarity)
    grid, net, weights = config.grid, shaken(config), (1.0, 0.5, 0.2)
    moving, fixed = torch.rand(2, 2, 1, 16, 16)
    result = net(moving, fixed, grid)
    images, bendings, shares = [], [], []
    for found in after_each(result.steps):
        assert isinstance(found, Dense)
        factor = 16 // found.grid.shape[0]
        a, b = (torch.nn.functional.avg_pool2d(image, factor) for image in (moving, fixed))
        images.append(dissimilarity(similarity)(warp(a, found, found.grid), b))
        bendings.append(bending_energy(found.displacement, found.grid))
        shares.append(weights[[1, 2, 4].index(factor)])
    assert sorted(shares, reverse=True) == [1.0] * 2 + [0.5] * 4 + [0.2] * 2  # the coarsest inherits nothing
    stiff = [{1.0: 0.5, 0.5: 0.0, 0.2: 30.0}[share] for share in shares]
    for bending, factors in ((3.0, [3.0] * len(shares)), ((0.5, 0.0, 30.0), stiff)):
        terms = objectives.multiscale(result, grid, similarity, bending, weights)
        for key, values in (("image", images), ("bending", [k * r for k, r in zip(factors, bendings, strict=True)])):
            expected = sum(w * value for w, value in zip(shares, values, strict=True)) / sum(shares)
            torch.testing.assert_close(terms[key], expected)
    assert "bending" not in objectives.multiscale(result, grid, similarity, (0.0, 0.0, 0.0), weights)
    for wrong in ({"weights": (1.0,)}, {"bending": (1.0,)}):
        with pytest.raises(ValueError, match="has no weight"):
            objectives.multiscale(result, grid, similarity, **wrong)
    for wrong in ({"weights": (0.0,) * 3}, {"weights": (1.0, -1.0, 1.0)}, {"bending": math.nan}):
        with pytest.raises(ValueError, match="numbers of 0 or more, and one of an output is above 0"):
            objectives.multiscale(result, grid, similarity, **wrong)


@pytest.mark.parametrize(
    ("config", "bending", "says"),
    [(SMALL, (1.0, 2.0), "one, or one for each of its 3 levels"), (MAPS, (1.0, 2.0, 3.0), "it takes one.")],
)
def test_weights_of_the_bending_are_one_or_those_of_the_levels(config: Any, bending: Any, says: str) -> None:
    variant = "explicit" if config is MAPS else "unsupervised"
    recipe = Recipe("bent", "noise", variant, config, Settings(steps=2, batch=2))
    CohortTask(replace(recipe, bending=1.0), noise())
    with pytest.raises(ValueError, match="weights of the bending energy") as error:
        CohortTask(replace(recipe, bending=bending), noise())
    assert one_sentence(error.value, says)


# ---- parts that rest ----


@pytest.mark.parametrize("resting", [(), ("itn",), ("stages",)])
def test_what_rests_keeps_its_weights_and_the_rest_learns(resting: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    task = CohortTask(Recipe("rested", "noise", "explicit", MAPS, Settings(steps=3, batch=2), resting=resting), noise())
    net = task.build()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimiser = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.1)
    for step in range(3):
        optimiser.zero_grad()
        objectives.total(task.loss(net, (2 * step, 2 * step + 1), torch.device("cpu"))).sum().backward()
        optimiser.step()
    seen = {name.split(".")[0] for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert seen == {"itn", "stages"} - set(resting)


def test_what_is_not_there_can_not_rest() -> None:
    task = CohortTask(Recipe("rested", "noise", "explicit", MAPS, Settings(), resting=("encoders",)), noise())
    with pytest.raises(ValueError, match="can not rest") as error:
        task.build()
    assert one_sentence(error.value, "'encoders'", "itn", "stages")


# ---- an encoder that imitates another ----

TWO = replace(SMALL, encoders=2)


def in_two_contrasts() -> Cohort:
    """Two people; images 2 and 3 are images 0 and 1 with black for white; and one to judge by."""
    plain = noise()
    return replace(
        plain,
        images=torch.cat([plain.images[:2], 1 - plain.images[:2], plain.images[2:3]]),
        soi=plain.soi[[0, 1, 0, 1, 2]],
        labels=plain.labels[[0, 1, 0, 1, 2]],
        people=("a", "b", "a", "b", "c"),
        splits={"train": (0, 1, 2, 3), "validation": (4,), "test": ()},
        twins=(2, 3, 0, 1, 4),
        given_pairs={"train": ((0, 3), (1, 2))},
    )


def test_features_that_are_alike_cost_nothing_and_none_at_all_cost_one() -> None:
    torch.manual_seed(0)
    shown = [torch.rand(3, 4, 16, 16), torch.rand(3, 8, 8, 8)]
    torch.testing.assert_close(contrasts.alike(shown, shown)["features"], torch.zeros(3))
    torch.testing.assert_close(contrasts.alike([0 * f for f in shown], shown)["features"], torch.ones(3))
    # Of a batch whose second level alone is off by a tenth of itself, half of a hundredth.
    off = [shown[0], 1.1 * shown[1]]
    torch.testing.assert_close(contrasts.alike(off, shown)["features"], torch.full((3,), 0.005), rtol=1e-4, atol=0)


def test_what_is_imitated_is_the_person_in_the_contrast_of_the_moving_one_moved_alike_and_without_noise() -> None:
    plain = noise()
    cohort = replace(in_two_contrasts(), images=torch.cat([plain.images, plain.images[:1]]))
    changes = Augmentation(shift_mm=3.0, rotation_deg=20.0, gamma=0.5, noise=0.2)
    settings = Settings(steps=2, batch=2)
    recipe = Recipe("imitator", "noise", "unsupervised", TWO, settings, changes, imitate=True)
    noisy = CohortTask(recipe, cohort)
    quiet = CohortTask(replace(recipe, augmentation=replace(changes, gamma=0.0, noise=0.0)), cohort)
    # The same anatomy in both contrasts: the pattern of a quiet scanner is what the network sees.
    alike = replace(cohort, images=plain.images[[0, 1, 0, 1, 2]])
    same = CohortTask(quiet.recipe, alike)
    for number in range(6):
        (shown, seen), _ = noisy._item(number)
        (clean, _), _ = quiet._item(number)
        assert torch.equal(shown, clean)
        assert not torch.equal(seen, shown)
        (shown, seen), _ = same._item(number)
        assert torch.equal(seen, shown)
        assert torch.equal(shown, clean)


def test_only_the_second_encoder_is_trained_and_it_comes_to_see_what_the_first_sees() -> None:
    torch.manual_seed(0)
    recipe = Recipe("imitator", "noise", "unsupervised", TWO, Settings(steps=2, batch=2), imitate=True)
    task, net = CohortTask(recipe, in_two_contrasts()), shaken(TWO).train()
    before = {name: p.clone() for name, p in net.state_dict().items()}
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    values = []
    for step in range(60):
        terms = task.loss(net, (2 * step, 2 * step + 1), torch.device("cpu"))
        optimiser.zero_grad()
        terms["features"].mean().backward()
        assert all(p.grad is not None for p in net.parameters())
        optimiser.step()
        values.append(float(terms["features"].detach().mean()))
    changed = {name.split(".")[1] for name, p in net.state_dict().items() if not torch.equal(p, before[name])}
    assert {name for name in before if not torch.equal(before[name], net.state_dict()[name])} == {
        name for name in before if name.startswith("encoders.1.")
    }
    assert changed == {"1"}
    assert sum(values[-5:]) < 0.3 * sum(values[:5])


def test_an_imitator_is_judged_by_how_alike_it_sees() -> None:
    """An encoder is the like of itself; fed with the same images, the second one is the better the less it differs."""
    plain = in_two_contrasts()
    pairs = {"train": ((0, 3), (1, 2)), "validation": ((4, 7), (5, 6))}
    cohort = replace(
        plain,
        images=plain.images[[0, 1, 0, 1, 0, 1, 0, 1]],  # both contrasts alike
        soi=plain.soi[[0, 1] * 4],
        labels=plain.labels[[0, 1] * 4],
        people=("a", "b", "a", "b", "c", "d", "c", "d"),
        splits={"train": (0, 1, 2, 3), "validation": (4, 5, 6, 7), "test": ()},
        twins=(2, 3, 0, 1, 6, 7, 4, 5),
        given_pairs=pairs,
    )
    recipe = Recipe("imitator", "noise", "unsupervised", TWO, Settings(steps=2, batch=2), imitate=True)
    task, net = CohortTask(recipe, cohort), shaken(TWO)
    net.encoders[1].load_state_dict(net.encoders[0].state_dict())
    with torch.no_grad():
        assert next(iter(task.validate(net, torch.device("cpu")).items())) == ("alike", pytest.approx(1.0))
        worse = []
        for factor in (1.05, 1.2, 0.0):
            for own, other in zip(net.encoders[1].parameters(), net.encoders[0].parameters(), strict=True):
                own.copy_(factor * other)
            worse.append(task.validate(net, torch.device("cpu"))["alike"])
        assert 1 > worse[0] > max(worse[1:])


def test_pyramids_are_kept_in_training_alone() -> None:
    net, pair = shaken(SMALL), torch.rand(2, 1, 1, 16, 16)
    assert net(*pair, SMALL.grid).pyramids is None
    kept = net.train()(*pair, SMALL.grid).pyramids
    assert kept is not None
    for side, image in zip(kept, pair, strict=True):
        assert [tuple(level.shape[1:]) for level in side] == [(4, 16, 16), (8, 8, 8), (8, 4, 4)]
        torch.testing.assert_close(side[0], net.encoders[0](image)[0])


def test_nobody_imitates_without_a_second_encoder_and_twins() -> None:
    recipe = Recipe("imitator", "noise", "unsupervised", TWO, Settings(steps=2, batch=2), imitate=True)
    for wrong, cohort in ((recipe, noise()), (replace(recipe, config=SMALL), in_two_contrasts())):
        with pytest.raises(ValueError, match="to imitate by") as error:
            CohortTask(wrong, cohort)
        assert one_sentence(error.value)
