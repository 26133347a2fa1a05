"""Training that starts from weights that ship, and levels that join late or count less."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from truths.fields import one_sentence

from regteach import objectives
from regteach.checkpoints import Model, network
from regteach.cohort_task import CohortTask, start_from
from regteach.data.cohort import Cohort
from regteach.grid import Grid
from regteach.nets.georeg import GeoReg, GeoRegConfig
from regteach.recipes import Recipe, find_recipe
from regteach.sampling import warp
from regteach.similarity import ncc
from regteach.training import Settings

SMALL = GeoRegConfig(Grid((16, 16)), (4, 8, 8), (0, 3, 3), (3, 3))


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


def test_weights_that_do_not_fit_get_one_sentence() -> None:
    for other in (replace(SMALL, widths=(8, 8, 8)), replace(SMALL, widths=(4, 8), windows=(0, 3), parents=(3,))):
        with pytest.raises(ValueError, match="weights of first do not fit") as error:
            start_from(network(SMALL), Model("first", shaken(other)))
        assert one_sentence(error.value)


def noise() -> Cohort:
    """Four people, each with one structure that is everywhere."""
    torch.manual_seed(0)
    labels = torch.ones(4, 16, 16, dtype=torch.long)
    splits = {"train": (0, 1), "validation": (2,), "test": (3,)}
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


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.3, 40, 80), (1.0, 200, 200)])
def test_so_many_pairs_are_people_with_themselves(share: float, least: int, most: int) -> None:
    cohort = noise()
    recipe = Recipe("mirror", "noise", "unsupervised", SMALL, Settings(steps=2, batch=2), themselves=share)
    task = CohortTask(recipe, cohort)
    pairs = [task._item(number)[0] for number in range(200)]
    assert least <= sum(torch.equal(*pair) for pair in pairs) <= most
    assert {float(moving[0, 0, 0, 0]) for moving, _ in pairs} == {float(cohort.images[i, 0, 0, 0]) for i in (0, 1)}


def test_people_meet_themselves_in_the_other_contrast() -> None:
    """Images 2 and 3 show the people of images 0 and 1 in another contrast."""
    plain = noise()
    cohort = replace(
        plain,
        people=("a", "b", "a", "b"),
        splits={"train": (0, 1, 2, 3), "validation": (), "test": ()},
        twins=(2, 3, 0, 1),
        given_pairs={"train": ((0, 3), (1, 2))},
    )
    recipe = Recipe("mirror", "noise", "unsupervised", SMALL, Settings(steps=2, batch=2), themselves=1.0)
    task = CohortTask(recipe, cohort)
    for number in range(20):
        moving, fixed = task._item(number)[0]
        person = next(i for i in (0, 1) if torch.equal(moving[0], plain.images[i]))
        assert torch.equal(fixed[0], plain.images[person + 2])


def test_the_weights_of_the_levels_count() -> None:
    """With all weight on the finest level the loss is that of the finest level."""
    torch.manual_seed(0)
    grid, net = Grid((16, 16)), shaken(SMALL)
    moving, fixed = torch.rand(2, 1, 1, 16, 16)
    result = net(moving, fixed, grid)
    finest = 1 - ncc(warp(moving, result.transform, grid), fixed)
    terms = objectives.multiscale(result, grid, weights=(1.0, 0.0, 0.0))
    torch.testing.assert_close(terms["image"], finest)
