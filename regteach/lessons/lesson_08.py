"""Exercises of lesson 08: the sum of the levels, shares of motion, the spread of copies, a loss with levels.

Convention: displacements ``b n0 n1 2`` in mm, one tensor a level, coarse to fine; the grid of a finer level has twice
as many points an axis.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from regteach.lessons.exercises import Exercise, Mistake


# e1: the sum of the levels
def put_together(v_7: Tensor, v_14: Tensor, v_28: Tensor, up: Callable[[Tensor], Tensor]) -> Tensor:
    """u_28 = up(up(v_7) + v_14) + v_28."""
    return up(up(v_7) + v_14) + v_28


def _doubled(v_7: Tensor, v_14: Tensor, v_28: Tensor, up: Callable[[Tensor], Tensor]) -> Tensor:
    return 2 * up(2 * up(v_7) + v_14) + v_28


def _last_alone(v_7: Tensor, v_14: Tensor, v_28: Tensor, up: Callable[[Tensor], Tensor]) -> Tensor:
    return v_28


def _coarsest_forgotten(v_7: Tensor, v_14: Tensor, v_28: Tensor, up: Callable[[Tensor], Tensor]) -> Tensor:
    return up(v_14) + v_28


def _mean_of_levels(v_7: Tensor, v_14: Tensor, v_28: Tensor, up: Callable[[Tensor], Tensor]) -> Tensor:
    return put_together(v_7, v_14, v_28, up) / 3


def _linear_up(u: Tensor) -> Tensor:
    """Twice as many points an axis, ``b 2n 2m 2``; linear between them, and straight on beyond the outermost ones."""
    for axis in (1, 2):
        n = u.shape[axis]
        place = (torch.arange(2 * n) - 0.5) / 2
        lower = place.floor().clamp(0, n - 2).long()
        far = (place - lower).reshape([-1 if k == axis else 1 for k in range(4)])
        u = (1 - far) * u.index_select(axis, lower) + far * u.index_select(axis, lower + 1)
    return u


def _three_levels() -> list[tuple]:
    generator = torch.Generator().manual_seed(0)
    return [(*(torch.randn(2, 3 * k, 4 * k, 2, generator=generator) for k in (1, 2, 4)), _linear_up)]


# e2: shares of motion
def shares(added: list[Tensor]) -> list[float]:
    """Mean length of what each level adds, over the sum of all levels', in percent."""
    return _percent([v.norm(dim=-1).mean().item() for v in added])


def _summed_points(added: list[Tensor]) -> list[float]:
    return _percent([v.norm(dim=-1).sum().item() for v in added])


def _mean_then_length(added: list[Tensor]) -> list[float]:
    return _percent([v.mean(dim=(0, 1, 2)).norm().item() for v in added])


def _mean_component(added: list[Tensor]) -> list[float]:
    return _percent([v.abs().amax(dim=-1).mean().item() for v in added])


def _squares(added: list[Tensor]) -> list[float]:
    return _percent([v.square().sum(dim=-1).mean().item() for v in added])


def _fractions(added: list[Tensor]) -> list[float]:
    return [share / 100 for share in shares(added)]


def _percent(motion: list[float]) -> list[float]:
    return [100 * value / sum(motion) for value in motion]


def _levels() -> list[tuple[list[Tensor]]]:
    cases = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        sizes = ((3, 4, 2.0), (6, 8, 1.0), (12, 16, 0.3))
        cases.append(([0.4 + mm * torch.randn(2, m, n, 2, generator=generator) for m, n, mm in sizes],))
    return cases


# e3: do the copies agree
def spread(places: Tensor) -> Tensor:
    """Mean distance of each copy's place from the mean place of all copies: ``k n 2`` to one number, mm."""
    return (places - places.mean(dim=0)).norm(dim=-1).mean()


def _round_the_copy(places: Tensor) -> Tensor:
    return (places - places.mean(dim=1, keepdim=True)).norm(dim=-1).mean()


def _round_everything(places: Tensor) -> Tensor:
    return (places - places.mean(dim=(0, 1))).norm(dim=-1).mean()


def _from_the_first(places: Tensor) -> Tensor:
    return (places[1:] - places[0]).norm(dim=-1).mean()


def _an_axis_at_a_time(places: Tensor) -> Tensor:
    return places.std(dim=0).mean()


def _without_length(places: Tensor) -> Tensor:
    return (places - places.mean(dim=0)).mean()


def _places() -> list[tuple[Tensor]]:
    cases = []
    for seed, copies, points in ((0, 5, 7), (1, 4, 9)):
        generator = torch.Generator().manual_seed(seed)
        middle = torch.tensor([20.0, 5.0]) + 6 * torch.randn(points, 2, generator=generator)
        cases.append((middle + torch.randn(copies, points, 2, generator=generator),))
    return cases


# e4: a loss with a weight of the regulariser for each level
def level_loss(errors: dict[int, Tensor], bending: dict[int, Tensor], lam: dict[int, float]) -> Tensor:
    """Mean over the levels of D_l + lambda_l R_l."""
    return torch.stack([errors[side] + lam[side] * bending[side] for side in errors]).mean(0)


def _one_weight(errors: dict[int, Tensor], bending: dict[int, Tensor], lam: dict[int, float]) -> Tensor:
    same = sum(lam.values()) / len(lam)
    return level_loss(errors, bending, dict.fromkeys(lam, same))


def _upside_down(errors: dict[int, Tensor], bending: dict[int, Tensor], lam: dict[int, float]) -> Tensor:
    return level_loss(errors, bending, dict(zip(lam, reversed(lam.values()), strict=True)))


def _weighs_the_error(errors: dict[int, Tensor], bending: dict[int, Tensor], lam: dict[int, float]) -> Tensor:
    return torch.stack([lam[side] * (errors[side] + bending[side]) for side in errors]).mean(0)


def _added_up(errors: dict[int, Tensor], bending: dict[int, Tensor], lam: dict[int, float]) -> Tensor:
    return level_loss(errors, bending, lam) * len(errors)


def _finest_alone(errors: dict[int, Tensor], bending: dict[int, Tensor], lam: dict[int, float]) -> Tensor:
    return torch.stack([*errors.values()]).mean(0) + lam[28] * bending[28]


def _terms() -> list[tuple]:
    generator = torch.Generator().manual_seed(0)
    errors, bending = ({side: torch.rand(3, generator=generator) for side in (7, 14, 28)} for _ in range(2))
    return [(errors, bending, {7: 0.1, 14: 1.0, 28: 7.0}), (errors, bending, {7: 5.0, 14: 0.5, 28: 0.0})]


EXERCISES = [
    Exercise(
        "e1",
        "the levels put together",
        "o1",
        reference=put_together,
        cases=_three_levels,
        hint="Follow the three equations from left to right. At each finer level: bring to its grid what there is, and "
        "add what is new.",
        mistakes=[
            Mistake(
                "doubled",
                _doubled,
                "You multiplied by 2 at each level. That is right for displacements in *pixels*, since a pixel gets "
                "half as wide. In which unit are ours?",
            ),
            Mistake(
                "the last level alone",
                _last_alone,
                "That is only what the finest level *adds*. Where did its points stand when it began?",
            ),
            Mistake(
                "coarsest forgotten",
                _coarsest_forgotten,
                "One level is missing, and it is the one that moves most.",
            ),
            Mistake(
                "mean of the levels",
                _mean_of_levels,
                "The levels are not three opinions to be averaged. Each goes on from where the one before it stopped.",
            ),
        ],
    ),
    Exercise(
        "e2",
        "each level's share of the motion",
        "o1",
        reference=shares,
        cases=_levels,
        hint="First one number a level: how far it moves a point, in the mean. Then each over the sum of all, in "
        "percent, coarse to fine.",
        mistakes=[
            Mistake(
                "points counted",
                _summed_points,
                "You added up the lengths of all points. A fine grid has more points, and wins by their number alone. "
                "What would you do so that a grid twice as dense gives the same number?",
            ),
            Mistake(
                "mean of the arrows",
                _mean_then_length,
                "You averaged the arrows, then took the length. Two arrows that point against each other cancel so, "
                "although both move their points. Which comes first?",
            ),
            Mistake(
                "largest component",
                _mean_component,
                "You took one of the two components of each arrow. The distance that a point moves needs both "
                "(Pythagoras).",
            ),
            Mistake(
                "squares",
                _squares,
                "These are shares of the squared lengths. They, too, say something, but large motions count twice over "
                "in them. Asked for is the length.",
            ),
            Mistake("fractions", _fractions, "The numbers are right, as parts of one. Asked for is percent."),
        ],
    ),
    Exercise(
        "e3",
        "the spread of the copies",
        "o2",
        reference=spread,
        cases=_places,
        hint="For each fixed point there are k places, one a copy. How far are they from their own mean? Then the mean "
        "over copies and points.",
        mistakes=[
            Mistake(
                "middle of each copy",
                _round_the_copy,
                "You measured from the middle of each copy's points: the size of the digit, not the disagreement of "
                "the copies. Over which axis do you have to average?",
            ),
            Mistake(
                "one middle for all",
                _round_everything,
                "One middle for all points mixes the size of the digit in. Every fixed point has a middle of its own.",
            ),
            Mistake(
                "from the first copy",
                _from_the_first,
                "You measured from the first copy, so an odd first copy would count against all others. Use their mean "
                "place.",
            ),
            Mistake(
                "an axis at a time",
                _an_axis_at_a_time,
                "Rows and columns were averaged as if they were two experiments. A distance in the plane needs both "
                "components together.",
            ),
            Mistake(
                "no length",
                _without_length,
                "Differences from a mean are zero in the mean, whatever they are. What makes a distance of them?",
            ),
        ],
    ),
    Exercise(
        "e4",
        "a weight for each level",
        "o4",
        reference=level_loss,
        cases=_terms,
        hint="At each level: the error, plus the bending energy times that level's own weight. Then the mean over the "
        "levels.",
        mistakes=[
            Mistake(
                "one weight for all",
                _one_weight,
                "Every level got the same weight. Look it up by the level's number.",
            ),
            Mistake(
                "upside down",
                _upside_down,
                "The weights went to the wrong end: the finest level got that of the coarsest. Use the keys, not the "
                "order.",
            ),
            Mistake(
                "weighs the error, too",
                _weighs_the_error,
                "You weighed error and bending together. Then a level with the weight 0 learns nothing at all. Only "
                "the bending energy is weighed.",
            ),
            Mistake(
                "sum, not mean",
                _added_up,
                "A sum grows with the number of levels, and the learning rate with it. Take the mean.",
            ),
            Mistake(
                "finest alone",
                _finest_alone,
                "Only the finest level is kept smooth here. Each level has a bending energy, and a weight for it.",
            ),
        ],
    ),
]
