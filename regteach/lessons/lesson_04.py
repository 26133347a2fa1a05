"""Exercises of lesson 04: the test-time loss, the implicit loss, landmark maps, and who may learn.

Convention: M, F are images and S_M, S_F their maps of the structures of interest; ``warped`` reads a map of the moving
image through the transform (fixed to moving points). Points are in mm, the row first.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from regteach.lessons.exercises import Exercise, Mistake

Map = Callable[[Tensor], Tensor]
Distance = Callable[[Tensor, Tensor], Tensor]


# e1: what the test-time loop may look at
def test_time_loss(itn: Map, M: Tensor, F: Tensor, S_M: Tensor, S_F: Tensor, warped: Map, d: Distance) -> Tensor:
    """d(M' o T, F')."""
    return d(warped(itn(M)), itn(F))


def _with_soi(itn: Map, M: Tensor, F: Tensor, S_M: Tensor, S_F: Tensor, warped: Map, d: Distance) -> Tensor:
    return d(warped(S_M), S_F)


def _of_images(itn: Map, M: Tensor, F: Tensor, S_M: Tensor, S_F: Tensor, warped: Map, d: Distance) -> Tensor:
    return d(warped(M), F)


def _drawn_after(itn: Map, M: Tensor, F: Tensor, S_M: Tensor, S_F: Tensor, warped: Map, d: Distance) -> Tensor:
    return d(itn(warped(M)), itn(F))


def _fixed_warped(itn: Map, M: Tensor, F: Tensor, S_M: Tensor, S_F: Tensor, warped: Map, d: Distance) -> Tensor:
    return d(itn(M), warped(itn(F)))


def _one_soi(itn: Map, M: Tensor, F: Tensor, S_M: Tensor, S_F: Tensor, warped: Map, d: Distance) -> Tensor:
    return d(warped(itn(M)), S_F)


# e2: the implicit loss
def implicit_loss(map_M: Tensor, map_F: Tensor, S_M: Tensor, S_F: Tensor, warped: Map, d: Distance) -> Tensor:
    """d(S_M o T, S_F) + d(M' o T, S_F) + d(S_M o T, F')."""
    return d(warped(S_M), S_F) + d(warped(map_M), S_F) + d(warped(S_M), map_F)


def _explicit(map_M: Tensor, map_F: Tensor, S_M: Tensor, S_F: Tensor, warped: Map, d: Distance) -> Tensor:
    return d(warped(S_M), S_F) + d(map_M, S_M) + d(map_F, S_F)


def _without_supervision(map_M: Tensor, map_F: Tensor, S_M: Tensor, S_F: Tensor, warped: Map, d: Distance) -> Tensor:
    return d(warped(map_M), S_F) + d(warped(S_M), map_F)


def _not_warped(map_M: Tensor, map_F: Tensor, S_M: Tensor, S_F: Tensor, warped: Map, d: Distance) -> Tensor:
    return d(warped(S_M), S_F) + d(map_M, S_F) + d(S_M, map_F)


def _maps_together(map_M: Tensor, map_F: Tensor, S_M: Tensor, S_F: Tensor, warped: Map, d: Distance) -> Tensor:
    return d(warped(S_M), S_F) + d(warped(map_M), map_F)


# Small stand-ins, in which nothing commutes by accident: an ITN that is not linear, a warp that is not symmetric.
def _itn(image: Tensor) -> Tensor:
    return (3 * image - 1).tanh() + image.roll(1, -1) ** 2


def _shift(maps: Tensor) -> Tensor:
    return 0.75 * maps.roll(2, -2) + 0.25 * maps.roll(1, -2)


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).mean()


def _four_maps(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(2, 1, 7, 9, generator=generator) for _ in range(4)]


# e3: from clicks to a map
def blobs(points: Tensor, shape: tuple[int, int], sigma_mm: float) -> Tensor:
    """exp(-r^2 / 2 sigma^2), r the distance to the nearest point."""
    return (-(_distance(points, shape).amin(0) ** 2) / (2 * sigma_mm**2)).exp()


def _added(points: Tensor, shape: tuple[int, int], sigma_mm: float) -> Tensor:
    return (-(_distance(points, shape) ** 2) / (2 * sigma_mm**2)).exp().sum(0)


def _sigma_not_squared(points: Tensor, shape: tuple[int, int], sigma_mm: float) -> Tensor:
    return (-(_distance(points, shape).amin(0) ** 2) / (2 * sigma_mm)).exp()


def _distance_not_squared(points: Tensor, shape: tuple[int, int], sigma_mm: float) -> Tensor:
    return (-_distance(points, shape).amin(0) / (2 * sigma_mm**2)).exp()


def _column_first(points: Tensor, shape: tuple[int, int], sigma_mm: float) -> Tensor:
    return blobs(points.flip(-1), shape, sigma_mm)


def _divided_to_one(points: Tensor, shape: tuple[int, int], sigma_mm: float) -> Tensor:
    return blobs(points, shape, sigma_mm) / (2 * torch.pi * sigma_mm**2)


def _distance(points: Tensor, shape: tuple[int, int]) -> Tensor:
    """``n n0 n1``, mm."""
    places = torch.cartesian_prod(torch.arange(shape[0]), torch.arange(shape[1])).float()
    return (places - points[:, None]).norm(dim=-1).reshape(len(points), *shape)


def _clicks() -> list[tuple[Tensor, tuple[int, int], float]]:
    near = torch.tensor([[2.0, 3.5], [4.0, 6.0], [4.5, 7.0]])  # close together, so that adding up shows
    return [(near, (7, 11), 1.5), (torch.tensor([[1.25, 8.0]]), (6, 10), 2.5)]


# e4: who may learn
def who_learns(net: nn.Module, training: bool) -> list[nn.Parameter]:
    """Both networks in training, the STN alone at test time."""
    return list(net.parameters()) if training else list(net.stages.parameters())  # type: ignore[union-attr]


def _always_all(net: nn.Module, training: bool) -> list[nn.Parameter]:
    return list(net.parameters())


def _never_the_itn(net: nn.Module, training: bool) -> list[nn.Parameter]:
    return list(net.stages.parameters())  # type: ignore[union-attr]


def _itn_at_test_time(net: nn.Module, training: bool) -> list[nn.Parameter]:
    return list(net.parameters()) if training else list(net.itn.parameters())  # type: ignore[union-attr]


def _nobody_at_test_time(net: nn.Module, training: bool) -> list[nn.Parameter]:
    return list(net.parameters()) if training else []


class _Both(nn.Module):
    """A network with the two parts, small enough to count."""

    def __init__(self) -> None:
        super().__init__()
        self.itn = nn.Conv2d(1, 1, 3)
        self.stages = nn.ModuleList([nn.Linear(5, 4)])


def _count(parameters: list[nn.Parameter]) -> str:
    """Who is in the list, told by the shapes of _Both: weights, since anything else may have any order."""
    shapes = {tuple(p.shape) for p in parameters}
    parts = {"ITN": (1, 1, 3, 3), "STN": (4, 5)}
    return " and ".join(name for name, shape in parts.items() if shape in shapes) or "nobody"


def _cases(functions: tuple[Callable, ...], first: tuple[Callable, ...] = ()) -> Callable[[], list[tuple]]:
    return lambda: [(*first, *_four_maps(seed), *functions) for seed in (0, 1)]


EXERCISES = [
    Exercise(
        "e1",
        "what may the test-time loop look at",
        "o3",
        reference=test_time_loss,
        cases=_cases((_shift, _mean_square), (_itn,)),
        hint="Two maps are compared. Both come out of the ITN, and one of them is then read through $T$.",
        mistakes=[
            Mistake(
                "SoI maps",
                _with_soi,
                "That is the loss of training. Who would give you the SoI maps of a new patient?",
            ),
            Mistake(
                "the images",
                _of_images,
                "That is what STN-s has to make do with, and you saw where it leads. What does the ITN offer instead?",
            ),
            Mistake(
                "drawn after warping",
                _drawn_after,
                "Close, but here the ITN draws the *warped* image, so it has to run again in every step, on images "
                "that were bent and blurred by the warp. Draw once, then warp the drawing.",
            ),
            Mistake(
                "the fixed map warped",
                _fixed_warped,
                "$T$ maps fixed points to moving points. Whose map is read at $T(x)$?",
            ),
            Mistake(
                "one SoI map",
                _one_soi,
                "$S_F$ is an SoI map, too. At test time neither image has one.",
            ),
        ],
    ),
    Exercise(
        "e2",
        "the implicit loss",
        "o4",
        reference=implicit_loss,
        cases=_cases((_shift, _mean_square)),
        hint="Three terms. In each, something that belongs to the moving image is warped, and compared with something "
        "that belongs to the fixed image.",
        mistakes=[
            Mistake(
                "explicit",
                _explicit,
                "That is the explicit loss: each map against the SoI map of its own image. The implicit one crosses "
                "over.",
            ),
            Mistake(
                "without the loss of STN-s",
                _without_supervision,
                "The crossed terms are right. But nothing tells the STN directly how the two SoI maps should lie: one "
                "term is missing.",
            ),
            Mistake(
                "not warped",
                _not_warped,
                "The partners are right, but before $T$ they lie in different places. What belongs to the moving image "
                "has to be warped.",
            ),
            Mistake(
                "both maps",
                _maps_together,
                "$d(M' \\circ T, F')$ is the test-time loss. In training it invites the ITN to draw nothing at all. "
                "Each map has to face an SoI map.",
            ),
        ],
    ),
    Exercise(
        "e3",
        "from clicks to a map",
        "o4",
        reference=blobs,
        cases=_clicks,
        hint="Distances of all pixels to all points, then the smallest over the points, then the formula. "
        "`torch.cartesian_prod` gives all pixels.",
        mistakes=[
            Mistake(
                "added up",
                _added,
                "Between two clicks your map rises above 1. It should depend on the *nearest* point only.",
            ),
            Mistake(
                "sigma not squared",
                _sigma_not_squared,
                "Look at the units: $r^2$ is in mm², and what it is divided by must be, too.",
            ),
            Mistake(
                "distance not squared",
                _distance_not_squared,
                "Your blobs have a sharp tip. In the formula the distance is squared.",
            ),
            Mistake("column first", _column_first, "The blobs sit in mirrored places. Which coordinate is the row?"),
            Mistake(
                "a density",
                _divided_to_one,
                "You scaled it to a probability density. A map of ours is 1 on the point itself.",
            ),
        ],
    ),
    Exercise(
        "e4",
        "who may learn",
        "o3",
        reference=who_learns,
        cases=lambda: [(_Both(), True), (_Both(), False)],
        observe=_count,
        hint="In training both networks learn. At test time, who chooses what is compared?",
        mistakes=[
            Mistake(
                "all, always",
                _always_all,
                "At test time the ITN learns along in your version. You saw what it draws then.",
            ),
            Mistake(
                "the ITN never",
                _never_the_itn,
                "Then the ITN stays as random as it started. In training somebody has to teach it to draw.",
            ),
            Mistake(
                "the ITN alone at test time",
                _itn_at_test_time,
                "The other way round: the ITN has to hold still, and the STN answers.",
            ),
            Mistake(
                "nobody at test time",
                _nobody_at_test_time,
                "Then nothing moves, and it is one pass. Which weights give the transform?",
            ),
        ],
    ),
]
