"""Cohorts: what must fit, pairs of different people within one split, and splits by person."""

import dataclasses
import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from regteach.data.cohort import SPLITS, Cohort, joined, one_hot, split_by_person
from regteach.data.large import deformed
from regteach.grid import Grid

STRUCTURES = {2: "b", 7: "c"}


def made(people: tuple[str, ...], splits: dict[str, tuple[int, ...]], grid: Grid, **more: Any) -> Cohort:
    labels = torch.randint(0, 8, (len(people), *grid.shape))
    parts = {
        "name": "made up",
        "images": torch.rand(len(people), 1, *grid.shape),
        "soi": one_hot(labels, STRUCTURES),
        "labels": labels,
        "grid": grid,
        "people": people,
        "structures": STRUCTURES,
        "splits": splits,
        "origin": "Synthetic.",
    }
    return Cohort(**{**parts, **more})


@pytest.fixture
def ten(grid: Grid) -> Cohort:
    """Ten images of eight people: a and b have two each."""
    return made(tuple("aabbcdefgh"), {"train": (0, 1, 2, 3, 4), "validation": (5, 6), "test": (7, 8, 9)}, grid)


def test_a_cohort_counts_its_images_and_says_so_in_a_line(ten: Cohort) -> None:
    assert len(ten) == 10
    size = " x ".join(map(str, ten.grid.shape))
    assert repr(ten) == f"Cohort(made up: 10 images of {size} voxels: train 5, validation 2, test 3)"
    assert repr(deformed(ten, "rotation", 1)).startswith("Deformed(made up, ")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"soi": 208.0}, "go from 0 to 208: they lie between 0 and 1"),
        ({"soi": -1.0}, "go from -1 to"),
        ({"soi": float("nan")}, "The SoI of made up hold numbers that are not finite"),
        ({"images": float("inf")}, "The images of made up hold numbers that are not finite"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(ten: Cohort, change: dict[str, float], says: str) -> None:
    ((name, number),) = change.items()
    values = torch.zeros_like(getattr(ten, name))
    values[0, 0, ...] = number
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(ten, **{name: values})


def test_one_hot_has_a_channel_a_structure_in_the_order_given(grid: Grid) -> None:
    labels = torch.randint(0, 8, (3, *grid.shape))
    soi = one_hot(labels, {7: "c", 2: "b"})
    assert soi.shape == (3, 2, *grid.shape)
    assert soi.dtype == torch.float32
    full = torch.nn.functional.one_hot(labels, 8).movedim(-1, 1).float()
    assert torch.equal(soi, full[:, [7, 2]])


# ---- pairs ----


def test_all_pairs_are_all_ordered_pairs_of_two_people(ten: Cohort) -> None:
    for split in SPLITS:
        members = ten.splits[split]
        expected = {(m, f) for m, f in itertools.permutations(members, 2) if ten.people[m] != ten.people[f]}
        assert set(ten.pairs(split)) == expected
        assert len(ten.pairs(split)) == len(expected)
    assert (0, 1) not in ten.pairs("train")  # one person twice
    assert (0, 2) in ten.pairs("train")
    assert (2, 0) in ten.pairs("train")


@pytest.mark.parametrize("count", [0, 1, 5, 16])
def test_some_pairs_are_a_choice_of_all(ten: Cohort, count: int) -> None:
    chosen = ten.pairs("train", count, seed=3)
    assert len(chosen) == len(set(chosen)) == count
    assert set(chosen) <= set(ten.pairs("train"))


def test_pairs_depend_on_the_seed_and_on_nothing_else(ten: Cohort) -> None:
    first = ten.pairs("train", 6, seed=1)
    torch.rand(5)
    assert ten.pairs("train", 6, seed=1) == first
    assert any(ten.pairs("train", 6, seed=seed) != first for seed in range(2, 5))


def test_every_pair_is_equally_likely(ten: Cohort) -> None:
    drawn = Counter(pair for seed in range(600) for pair in ten.pairs("test", 2, seed))
    # 600 draws of 2 of 6: 200 each, standard deviation 11.5.
    assert set(drawn) == set(ten.pairs("test"))
    assert max(abs(n - 200) for n in drawn.values()) < 5 * 11.5


def test_more_pairs_than_there_are_can_not_be_had(ten: Cohort) -> None:
    assert len(ten.pairs("test", 6)) == 6
    with pytest.raises(ValueError, match="made up has 6 pairs in its test set, and 7 were asked for"):
        ten.pairs("test", 7)


def test_an_unknown_split_is_named(ten: Cohort) -> None:
    with pytest.raises(ValueError, match="made up is split into train, validation, test, not 'val'"):
        ten.pairs("val")


def test_given_pairs_come_first_and_in_their_order(ten: Cohort) -> None:
    given = ((9, 8), (7, 9), (8, 7))
    cohort = dataclasses.replace(ten, given_pairs={"test": given})
    assert cohort.pairs("test") == cohort.pairs("test", 3, seed=5) == given
    assert set(cohort.pairs("test", 2)) < set(given)
    assert len(cohort.pairs("train")) == 16  # where none are given, pairs are made
    with pytest.raises(ValueError, match="has 3 pairs in its test set, and 4 were asked for"):
        cohort.pairs("test", 4)


# ---- what must fit ----


@pytest.mark.parametrize("part", ["images", "soi", "labels"])
@pytest.mark.parametrize("axis", [0, -1])
def test_parts_that_do_not_fit_are_named(ten: Cohort, part: str, axis: int) -> None:
    tensor = getattr(ten, part)
    with pytest.raises(ValueError, match=f"The {part} of made up do not fit 10 images on a grid"):
        dataclasses.replace(ten, **{part: tensor.narrow(axis, 0, tensor.shape[axis] - 1)})


def test_a_channel_too_many_is_refused(ten: Cohort) -> None:
    with pytest.raises(ValueError, match="made up names 2 structures, but its SoI has 3 channels"):
        dataclasses.replace(ten, soi=torch.cat([ten.soi, ten.soi[:, :1]], 1))


def test_a_person_in_two_splits_is_refused(ten: Cohort) -> None:
    with pytest.raises(ValueError, match="Person a of made up is both in train and in test"):
        dataclasses.replace(ten, splits={"train": (0, 2, 3), "validation": (), "test": (1,)})


def test_the_grid_is_compared_and_not_only_counted(ten: Cohort) -> None:
    turned = Grid(tuple(reversed(ten.grid.shape)), ten.grid.spacing, ten.grid.origin)
    with pytest.raises(ValueError, match="do not fit 10 images on a grid"):
        dataclasses.replace(ten, grid=turned)


# ---- splits by person ----


@pytest.mark.parametrize("seed", range(3))
def test_people_are_dealt_whole(seed: int) -> None:
    people = tuple(f"p{i % 23}" for i in range(60))
    splits = split_by_person(people, {"train": -1, "validation": 4, "test": 5}, seed)
    assert tuple(splits) == SPLITS
    assert sorted(itertools.chain(*splits.values())) == list(range(60))
    groups = [{people[i] for i in splits[split]} for split in SPLITS]
    assert [len(group) for group in groups] == [14, 4, 5]
    for one, other in itertools.combinations(groups, 2):
        assert not one & other


def test_the_deal_depends_on_the_seed_and_not_on_the_order_of_images() -> None:
    people = tuple(f"p{i}" for i in range(30))
    parts = {"train": -1, "validation": 5, "test": 5}

    def who(order: tuple[str, ...], seed: int) -> dict[str, set[str]]:
        return {k: {order[i] for i in v} for k, v in split_by_person(order, parts, seed).items()}

    assert who(people, 0) == who(people[::-1], 0)
    assert who(people, 0) != who(people, 1)


def test_more_people_than_there_are_can_not_be_asked_for() -> None:
    with pytest.raises(ValueError, match="The splits ask for 4 people, but there are 3"):
        split_by_person(("a", "b", "c"), {"train": -1, "validation": 2, "test": 2}, 0)
    assert split_by_person(("a", "b", "c"), {"train": -1, "test": 3}, 0) == {"train": (), "test": (0, 1, 2)}


# ---- several cohorts as one ----


def paint(tissue: torch.Tensor, grid: Grid, generator: torch.Generator) -> torch.Tensor:
    return tissue[:, None].float() / 8


def drawn(name: str, people: str, splits: dict[str, tuple[int, ...]], grid: Grid, **more: Any) -> Cohort:
    tissue = torch.randint(0, 8, (len(people), *grid.shape))
    return made(tuple(people), splits, grid, **{"name": name, "tissue": tissue, "synthesis": paint} | more)


@pytest.fixture
def three(grid: Grid) -> list[Cohort]:
    """Some people are called the same, but they are others."""
    return [
        drawn("one", "aabc", {"train": (0, 1), "validation": (2,), "test": (3,)}, grid),
        drawn("two", "xab", {"train": (2,), "validation": (0,), "test": (1,)}, grid, origin="Another sentence."),
        drawn("three", "pqr", {"train": (), "test": (2, 0, 1)}, grid),  # no validation set at all
    ]


def test_joined_cohorts_keep_every_image_with_its_own_parts(three: list[Cohort]) -> None:
    both = joined("all", three)
    assert (both.name, len(both), both.grid) == ("all", 10, three[0].grid)
    assert both.structures == STRUCTURES
    index = 0
    for cohort in three:
        for i, person in enumerate(cohort.people):
            for part in ("images", "soi", "labels", "tissue"):
                assert torch.equal(getattr(both, part)[index], getattr(cohort, part)[i])
            assert both.people[index] == f"{cohort.name} {person}"
            index += 1


def test_joined_cohorts_keep_their_splits(three: list[Cohort]) -> None:
    both = joined("all", three)
    assert both.splits == {"train": (0, 1, 6), "validation": (2, 4), "test": (3, 5, 9, 7, 8)}
    for split in SPLITS:
        expected = {f"{c.name} {c.people[i]}" for c in three for i in c.splits.get(split, ())}
        assert {both.people[i] for i in both.splits[split]} == expected


def test_pairs_of_joined_cohorts_cross_them_and_not_the_splits(three: list[Cohort]) -> None:
    both = joined("all", three)
    assert set(both.pairs("train")) == {(0, 6), (1, 6), (6, 0), (6, 1)}  # 0 and 1 are one person
    assert set(both.pairs("validation")) == {(2, 4), (4, 2)}
    assert len(both.pairs("test")) == 5 * 4


def test_pairs_of_cohorts_that_are_not_mixed_stay_within_each(three: list[Cohort]) -> None:
    apart = joined("all", three, mixed=False)
    for split in SPLITS:
        pairs = apart.pairs(split)
        assert set(pairs) == {
            (m, f) for m, f in joined("all", three).pairs(split) if apart.groups[m] == apart.groups[f]
        }
    assert apart.pairs("test")
    assert not apart.pairs("train")  # one person of each


def test_groups_are_those_of_every_image(ten: Cohort) -> None:
    with pytest.raises(ValueError, match="10 images, but names the groups of 3"):
        dataclasses.replace(ten, groups=("x", "y", "z"))


def test_a_twin_is_the_same_person(ten: Cohort) -> None:
    assert [ten.twin(i) for i in range(10)] == list(range(10))
    with pytest.raises(ValueError, match="shows another person, or is left out"):
        dataclasses.replace(ten, twins=tuple(reversed(range(10))))
    with pytest.raises(ValueError, match="shows another person, or is left out"):
        dataclasses.replace(ten, twins=(0, 1))
    with pytest.raises(ValueError, match="shows another person, or is left out"):
        dataclasses.replace(ten, twins=(*range(9), 10))


def test_a_cohort_joined_with_nothing_is_itself(three: list[Cohort]) -> None:
    alone = joined("one", three[:1])
    assert torch.equal(alone.images, three[0].images)
    assert alone.splits == three[0].splits
    assert len({i for members in alone.splits.values() for i in members}) == 4


def test_joined_cohorts_say_where_they_are_from_once(three: list[Cohort]) -> None:
    assert joined("all", three).origin == "Synthetic. Another sentence."


def test_a_contrast_is_drawn_only_where_all_have_tissue(three: list[Cohort]) -> None:
    both = joined("all", three)
    assert both.synthesis is paint
    assert both.tissue is not None
    without = dataclasses.replace(three[1], tissue=None)
    assert joined("all", [three[0], without]).tissue is None


@pytest.mark.parametrize(
    "grid_change", [lambda g: {"spacing": tuple(2 * h for h in g.spacing)}, lambda g: {"origin": (0.0,) * g.dim}]
)
def test_cohorts_on_other_grids_are_not_joined(three: list[Cohort], grid_change: Any) -> None:
    moved = dataclasses.replace(three[1], grid=dataclasses.replace(three[1].grid, **grid_change(three[1].grid)))
    with pytest.raises(ValueError, match="two and one differ in grid or structures"):
        joined("all", [three[0], moved])


def test_cohorts_with_other_structures_are_not_joined(three: list[Cohort]) -> None:
    for structures in ({2: "b", 7: "d"}, {2: "b", 6: "c"}):
        other = dataclasses.replace(three[1], structures=structures)
        with pytest.raises(ValueError, match="two and one differ in grid or structures"):
            joined("all", [three[0], other])
