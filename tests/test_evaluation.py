"""Measuring: Dice by hand for shifts by whole voxels, labels never shown to the model, and which pairs are measured."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from truths.fields import GRIDS, one_sentence, positions
from truths.pairs import Motion, blobs

from regteach.affine import Affine
from regteach.data.cohort import Cohort, one_hot
from regteach.evaluation import figures_of, mean_dice, measure, pairs_to_test
from regteach.grid import Grid
from regteach.metrics import folding_percent
from regteach.nets.istn import ISTN, AffineStage, ISTNConfig
from regteach.refinement import Refinement
from regteach.result import Result
from regteach.transforms import Dense, Identity, Transform, jacobian_determinant

NAMES = {1: "one", 4: "four"}


def cohort(grid: Grid, people: int = 5, split: str = "test") -> Cohort:
    labels = torch.from_numpy(np.random.default_rng(2).choice([0, 1, 4, 9], (people, *grid.shape)))
    splits = {"train": (), "validation": (), "test": ()} | {split: tuple(range(people))}
    names = tuple(f"p{i}" for i in range(people))
    images = torch.rand(people, 1, *grid.shape)
    return Cohort("made up", images, one_hot(labels, NAMES), labels, grid, names, NAMES, splits, "Synthetic.")


def shift(grid: Grid, voxels: tuple[int, ...]) -> Affine:
    by = torch.tensor([[v * h for v, h in zip(voxels, grid.spacing, strict=True)]])
    return Affine(torch.eye(grid.dim)[None], by, torch.tensor(grid.centre))


def moved_by_hand(labels: np.ndarray, voxels: tuple[int, ...]) -> np.ndarray:
    """out[i] = labels[i + voxels], and 0 where that is outside."""
    out = np.zeros_like(labels)
    for index in np.ndindex(labels.shape):
        source = tuple(i + v for i, v in zip(index, voxels, strict=True))
        if all(0 <= s < n for s, n in zip(source, labels.shape, strict=True)):
            out[index] = labels[source]
    return out


class Fixed:
    """A model that always answers the same, and writes down what it was shown."""

    def __init__(self, transform: Transform) -> None:
        self.transform, self.shown = transform, []

    def __call__(self, moving: Tensor, fixed: Tensor, grid: Grid) -> Any:
        self.shown.append((moving, fixed, grid))
        return Result(self.transform, (moving, fixed), ())


def test_a_pair_that_shows_no_structure_has_no_dice_and_takes_it_from_nobody(grid: Grid) -> None:
    people = cohort(grid)
    labels = people.labels.clone()
    labels[[3, 4]] = 0
    some = replace(people, labels=labels)
    means, rows = measure(Fixed(Identity(grid.dim)), some, [(0, 1), (3, 4)])
    assert means["dice"] == rows[0].dice == figures_of(some, 0, 1, Identity(grid.dim)).dice
    assert math.isnan(rows[1].dice)
    assert math.isnan(mean_dice(rows[1:]))


@pytest.mark.parametrize("voxels", [(0, 0, 0), (1, 0, -2), (-2, 3, 1)])
def test_dice_is_that_of_labels_shifted_by_hand(grid: Grid, voxels: tuple[int, ...]) -> None:
    people, voxels = cohort(grid), voxels[: grid.dim]
    figures = figures_of(people, 1, 3, shift(grid, voxels))
    warped, target = moved_by_hand(people.labels[1].numpy(), voxels), people.labels[3].numpy()
    each = [2 * ((warped == k) & (target == k)).sum() / ((warped == k).sum() + (target == k).sum()) for k in NAMES]
    assert figures.dice == pytest.approx(np.mean(each), abs=1e-6)
    assert figures.folding_percent == 0


def test_what_comes_from_outside_is_background() -> None:
    grid = Grid((8, 8))
    people = cohort(grid, 2)
    people.labels[:] = 1  # a structure up to the border: half of it has moved in from nowhere
    assert figures_of(people, 0, 1, shift(grid, (4, 0))).dice == pytest.approx(2 * 32 / (32 + 64))


def test_a_structure_that_nobody_has_is_not_counted_and_one_that_is_missing_is() -> None:
    grid = Grid((8, 8))
    people = cohort(grid, 2)
    people.labels[:] = 0
    people.labels[:, 2:5] = 1
    assert figures_of(people, 0, 1, Identity(2)).dice == 1.0
    people.labels[1, 6:] = 4
    assert figures_of(people, 0, 1, Identity(2)).dice == 0.5


def test_folding_is_that_of_the_transform(grid: Grid) -> None:
    torch.manual_seed(3)
    field = Dense(2 * torch.randn(1, *grid.shape, grid.dim), grid)
    found = figures_of(cohort(grid), 0, 1, field).folding_percent
    assert found == pytest.approx(float(folding_percent(jacobian_determinant(field, grid))))
    assert 5 < found < 60


def test_measuring_shows_the_images_of_each_pair_and_averages(grid: Grid) -> None:
    people, transform = cohort(grid), shift(grid, (1, 0, 0)[: grid.dim])
    model, pairs = Fixed(transform), [(0, 1), (3, 2), (4, 0)]
    means, rows = measure(model, people, pairs)
    expected = [figures_of(people, *pair, transform) for pair in pairs]
    assert [row.dice for row in rows] == [row.dice for row in expected]
    assert means == pytest.approx({"dice": np.mean([row.dice for row in expected]), "folding_percent": 0.0}, abs=1e-7)
    for (moving, fixed, where), pair in zip(model.shown, pairs, strict=True):
        assert torch.equal(moving, people.images[[pair[0]]])
        assert torch.equal(fixed, people.images[[pair[1]]])
        assert where == people.grid


def test_refinement_is_applied_and_needs_no_labels() -> None:
    grid, motion = Grid((48, 56), 2.0, (-47.0, -55.0)), Motion.of(2)
    images = np.stack([blobs(motion.back(positions(grid))), blobs(positions(grid))])
    labels = torch.from_numpy(np.where(images > 0.6, 1, 0))
    people = Cohort(
        "blobs",
        torch.from_numpy(images)[:, None] / 2,
        one_hot(labels, {1: "core"}),
        labels,
        grid,
        ("a", "b"),
        {1: "core"},
        {"test": (0, 1)},
        "Synthetic.",
    )
    network = ISTN(ISTNConfig(grid, (AffineStage(widths=(4, 8), hidden=8),), itn=())).eval()
    settings = Refinement(40, rate=0.05)
    once = measure(network, people, [(0, 1)])[0]["dice"]
    refined, rows = measure(network, people, [(0, 1)], refinement=settings)
    assert once == figures_of(people, 0, 1, Identity(2)).dice
    assert refined["dice"] > 0.93 > once + 0.1
    people.labels[:] = 1 - people.labels  # other labels: another Dice of the same transform
    again = measure(network, people, [(0, 1)], refinement=settings)[1]
    points = torch.rand(1, 20, 2)
    assert torch.equal(rows[0].transform(points), again[0].transform(points))
    assert all(p.grad is None for p in network.parameters())


def test_the_pairs_to_test_are_always_the_same_and_at_most_all() -> None:
    people = cohort(GRIDS[2])
    assert pairs_to_test(people, 7) == people.pairs("test", 7, seed=0) == pairs_to_test(people, 7)
    assert set(pairs_to_test(people)) == set(people.pairs("test"))
    assert len(pairs_to_test(people)) == 20


@pytest.mark.parametrize("count", [0, -3])
def test_no_pair_at_all_is_an_error(count: int) -> None:
    with pytest.raises(ValueError) as caught:
        pairs_to_test(cohort(GRIDS[2]), count)
    assert one_sentence(caught.value, "were asked for")
    with pytest.raises(ValueError) as caught:
        pairs_to_test(cohort(GRIDS[2], split="train"))
    assert one_sentence(caught.value, "0 test pairs")
    with pytest.raises(ValueError) as caught:
        measure(Fixed(Identity(2)), cohort(GRIDS[2]), [])
    assert one_sentence(caught.value, "no pair of made up")
