"""Exercises of lesson 09: the end-point error, first look and reach, errors by direction, a comb that locks.

Convention: displacements ``b n0 n1 2`` in mm, fixed to moving; axis 0 first.
"""

import torch
from torch import Tensor

from regteach.lessons.exercises import Exercise, Mistake


# e1: the end-point error
def end_point(found: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Mean distance over the mask, a number a pair."""
    distance, inside = (found - truth).norm(dim=-1), mask[:, 0]
    return torch.stack([mm[here].mean() for mm, here in zip(distance, inside, strict=True)])


def _everywhere(found: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    return (found - truth).norm(dim=-1).mean(dim=(1, 2))


def _over_all_pixels(found: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    return ((found - truth).norm(dim=-1) * mask[:, 0]).mean(dim=(1, 2))


def _an_axis_at_a_time(found: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    return end_point((found - truth).abs().mean(dim=-1, keepdim=True), 0 * truth[..., :1], mask)


def _difference_of_lengths(found: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    lengths = (found.norm(dim=-1) - truth.norm(dim=-1)).abs()[..., None]
    return end_point(lengths, 0 * lengths, mask)


def _one_number(found: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    return (found - truth).norm(dim=-1)[mask[:, 0]].mean()


def _answers() -> list[tuple[Tensor, Tensor, Tensor]]:
    cases = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        found, truth = (3 * torch.randn(3, 5, 7, 2, generator=generator) for _ in range(2))
        cases.append((found, truth, torch.rand(3, 1, 5, 7, generator=generator) > 0.4))
    return cases


# e2: first look and reach
def first_look_and_reach(window: int, spacing_mm: float, steps: tuple[int, ...]) -> tuple[float, float]:
    """Half a window at the coarsest level, and the sum of all half windows; steps finest first."""
    halves = [window / 2 * spacing_mm * 2**level for level in range(len(steps))]
    return halves[-1], sum(n * half for n, half in zip(steps, halves, strict=True))


def _whole_window(window: int, spacing_mm: float, steps: tuple[int, ...]) -> tuple[float, float]:
    look, reach = first_look_and_reach(window, spacing_mm, steps)
    return 2 * look, 2 * reach


def _to_the_centres(window: int, spacing_mm: float, steps: tuple[int, ...]) -> tuple[float, float]:
    return first_look_and_reach(window - 1, spacing_mm, steps)


def _finest_looks(window: int, spacing_mm: float, steps: tuple[int, ...]) -> tuple[float, float]:
    return window / 2 * spacing_mm, first_look_and_reach(window, spacing_mm, steps)[1]


def _spacing_never_grows(window: int, spacing_mm: float, steps: tuple[int, ...]) -> tuple[float, float]:
    return window / 2 * spacing_mm, sum(steps) * window / 2 * spacing_mm


def _coarsest_first(window: int, spacing_mm: float, steps: tuple[int, ...]) -> tuple[float, float]:
    return first_look_and_reach(window, spacing_mm, steps)[0], first_look_and_reach(window, spacing_mm, steps[::-1])[1]


def _one_step_each(window: int, spacing_mm: float, steps: tuple[int, ...]) -> tuple[float, float]:
    return first_look_and_reach(window, spacing_mm, (1,) * len(steps))


def _thirds(window: int, spacing_mm: float, steps: tuple[int, ...]) -> tuple[float, float]:
    halves = [window / 2 * spacing_mm * (level + 1) for level in range(len(steps))]
    return halves[-1], sum(n * half for n, half in zip(steps, halves, strict=True))


# e3: the error in each direction
def by_direction_um(found: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error along each axis over the mask, micrometres."""
    return 1000 * (found - truth)[mask].abs().mean(dim=0)


def _millimetres(found: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    return by_direction_um(found, truth, mask) / 1000


def _signed(found: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    return 1000 * (found - truth)[mask].mean(dim=0)


def _no_mask(found: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    return 1000 * (found - truth).abs().mean(dim=(0, 1, 2))


def _swapped(found: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    return by_direction_um(found, truth, mask).flip(0)


def _both_at_once(found: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    return 1000 * (found - truth)[mask].norm(dim=-1).mean()


def _scans() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([0.03, 0.15])
    found, truth = (size * torch.randn(2, 6, 9, 2, generator=generator) for _ in range(2))
    return [(found, truth, torch.rand(2, 6, 9, generator=generator) > 0.5)]


# e4: to whom a comb locks
def locked_shift(shift_mm: float, period_mm: float) -> float:
    """The shift to the nearest stripe."""
    return shift_mm - period_mm * round(shift_mm / period_mm)


def _true_shift(shift_mm: float, period_mm: float) -> float:
    return shift_mm


def _remainder(shift_mm: float, period_mm: float) -> float:
    return shift_mm % period_mm


def _at_most_half(shift_mm: float, period_mm: float) -> float:
    return max(-period_mm / 2, min(period_mm / 2, shift_mm))


def _one_period_only(shift_mm: float, period_mm: float) -> float:
    return shift_mm - period_mm if shift_mm > period_mm / 2 else shift_mm


def _periods(shift_mm: float, period_mm: float) -> float:
    return round(shift_mm / period_mm)


EXERCISES = [
    Exercise(
        "e1",
        "the end-point error",
        "o1",
        reference=end_point,
        cases=_answers,
        hint="The distance of two arrows' heads at each point, then the mean over the points of the mask, for each "
        "pair by itself.",
        mistakes=[
            Mistake("no mask", _everywhere, "You averaged over all pixels. What lies outside can not be found."),
            Mistake(
                "divided by all pixels",
                _over_all_pixels,
                "You set the others to zero, and still divided by all of them: a small mask would make any error "
                "small. By how many points do you have to divide?",
            ),
            Mistake(
                "an axis at a time",
                _an_axis_at_a_time,
                "You averaged the two components. The distance in the plane takes both together (Pythagoras).",
            ),
            Mistake(
                "difference of lengths",
                _difference_of_lengths,
                "You compared how *long* the arrows are. Two arrows of one length may point anywhere.",
            ),
            Mistake("one number", _one_number, "That is one number for all. Asked for is one for each pair."),
        ],
    ),
    Exercise(
        "e2",
        "first look and reach",
        "o2",
        reference=first_look_and_reach,
        cases=lambda: [(3, 4.0, (4, 2, 1)), (5, 1.5, (1, 2)), (2, 6.0, (0, 1, 2, 4))],
        hint="Write down half a window for each level in mm. The last one is the first look; their sum, each as often "
        "as there are steps, is the reach.",
        mistakes=[
            Mistake("whole windows", _whole_window, "A window lies round its point: to each side goes half of it."),
            Mistake(
                "to the outermost centre",
                _to_the_centres,
                "That is the way to the *centre* of the outermost pixel, (k - 1) / 2. It stands for its own area, half "
                "a pixel more.",
            ),
            Mistake(
                "the finest level looks first",
                _finest_looks,
                "That is half a window at the *finest* level. Which level goes first?",
            ),
            Mistake(
                "spacing never grows",
                _spacing_never_grows,
                "You used the finest spacing everywhere. What happens to the pixels from level to level?",
            ),
            Mistake(
                "steps upside down",
                _coarsest_first,
                "The steps went to the wrong levels: they are listed finest first.",
            ),
            Mistake("one step a level", _one_step_each, "A level may take several steps, or none. Count them."),
            Mistake(
                "spacing added, not doubled",
                _thirds,
                "You let the spacing grow by the same amount from level to level. Averaging two pixels into one "
                "*doubles* it.",
            ),
        ],
    ),
    Exercise(
        "e3",
        "errors by direction",
        "o5",
        reference=by_direction_um,
        cases=_scans,
        hint="Take the differences at the points of the mask, their absolute values, and the mean over the points: two "
        "numbers are left. A millimetre has 1000 micrometres.",
        mistakes=[
            Mistake("millimetres", _millimetres, "That is in millimetres. Asked for is micrometres."),
            Mistake(
                "signs kept",
                _signed,
                "Errors to both sides cancel in your mean. How large is an error that points up, and one down?",
            ),
            Mistake("no mask", _no_mask, "You averaged over the whole scan. The mask says where the retina is."),
            Mistake("axes swapped", _swapped, "Depth comes first: it is axis 0."),
            Mistake(
                "one distance",
                _both_at_once,
                "You took the distance, which mixes the two directions. That is what this exercise is against.",
            ),
        ],
    ),
    Exercise(
        "e4",
        "to whom a comb locks",
        "o6",
        reference=locked_shift,
        cases=lambda: [(24.0, 32.0), (-24.0, 32.0), (10.0, 32.0), (70.0, 16.0), (-5.0, 8.0)],
        hint="By how many whole periods is the nearest stripe away from the right one? Take those off.",
        mistakes=[
            Mistake("the true shift", _true_shift, "That would be right if the stripes could be told apart."),
            Mistake(
                "the remainder",
                _remainder,
                "You always go on to the next stripe in one direction. The nearest one may stand behind you.",
            ),
            Mistake(
                "cut off",
                _at_most_half,
                "You cut the shift off at half a period. There is no stripe at half a period, so nobody stops there.",
            ),
            Mistake(
                "one period, one side",
                _one_period_only,
                "That works for one period to one side. Try a shift of several periods, and a negative one.",
            ),
            Mistake("periods", _periods, "You counted the periods. Asked for is what is left without them, in mm."),
        ],
    ),
]
