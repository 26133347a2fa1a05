"""Exercises of lesson 10: weights of inverse distances, an affine field, a Gaussian as attention, what the others say.

Convention: positions and displacements are rows ``n 2`` in mm; a displacement leads from a fixed to a moving point.
"""

import torch
from torch import Tensor

from regteach.lessons.exercises import Exercise, Mistake


# e1: weights of inverse distances
def inverse_weights(distance_mm: Tensor, power: float) -> Tensor:
    """1 / distance^power, with sum 1 for each point."""
    raw = distance_mm**-power
    return raw / raw.sum(dim=1, keepdim=True)


def _not_divided(distance_mm: Tensor, power: float) -> Tensor:
    return distance_mm**-power


def _over_the_points(distance_mm: Tensor, power: float) -> Tensor:
    raw = distance_mm**-power
    return raw / raw.sum(dim=0, keepdim=True)


def _far_ones_count(distance_mm: Tensor, power: float) -> Tensor:
    raw = distance_mm**power
    return raw / raw.sum(dim=1, keepdim=True)


def _softmax_of_weights(distance_mm: Tensor, power: float) -> Tensor:
    return (distance_mm**-power).softmax(dim=1)


def _distances() -> list[tuple[Tensor, float]]:
    generator = torch.Generator().manual_seed(0)
    return [(1 + 9 * torch.rand(4, 6, generator=generator), power) for power in (1.0, 2.0, 3.5)]


# e2: an affine field
def affine_at(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
    """A x + t, fitted to the displacements."""
    return _with_one(x) @ torch.linalg.lstsq(_with_one(y), d).solution


def _linear_only(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
    return x @ torch.linalg.lstsq(y, d).solution


def _positions(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
    return _with_one(x) @ torch.linalg.lstsq(_with_one(y), y + d).solution


def _at_the_keypoints(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
    return _with_one(y) @ torch.linalg.lstsq(_with_one(y), d).solution


def _with_one(points: Tensor) -> Tensor:
    return torch.cat([points, torch.ones_like(points[:, :1])], dim=1)


def _matches() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    cases = []
    for points, keypoints in ((5, 9), (11, 8)):
        x = 40 * torch.rand(points, 2, generator=generator) - 5
        y = 40 * torch.rand(keypoints, 2, generator=generator) - 5
        slope = torch.tensor([[0.3, -0.1], [0.2, 0.05]])
        noise = torch.randn(keypoints, 2, generator=generator)
        cases.append((x.double(), y.double(), (y @ slope + 4 + noise).double()))
    return cases


# e3: a Gaussian as query and key
def gaussian_vectors(x: Tensor, y: Tensor, sigma_mm: float) -> tuple[Tensor, Tensor]:
    """Queries (x, 1), keys (y, -|y|^2 / 2) / sigma^2."""
    return _with_one(x), torch.cat([y, -(y**2).sum(dim=1, keepdim=True) / 2], dim=1) / sigma_mm**2


def _product_alone(x: Tensor, y: Tensor, sigma_mm: float) -> tuple[Tensor, Tensor]:
    return x, y / sigma_mm**2


def _sigma_once(x: Tensor, y: Tensor, sigma_mm: float) -> tuple[Tensor, Tensor]:
    return _with_one(x), torch.cat([y, -(y**2).sum(dim=1, keepdim=True) / 2], dim=1) / sigma_mm


def _twice(x: Tensor, y: Tensor, sigma_mm: float) -> tuple[Tensor, Tensor]:
    return _with_one(x), torch.cat([y, -(y**2).sum(dim=1, keepdim=True)], dim=1) / sigma_mm**2


def _plus(x: Tensor, y: Tensor, sigma_mm: float) -> tuple[Tensor, Tensor]:
    return _with_one(x), torch.cat([y, (y**2).sum(dim=1, keepdim=True) / 2], dim=1) / sigma_mm**2


def _weights(vectors: tuple[Tensor, Tensor]) -> Tensor:
    """What matters of queries and keys: the weights. There are many right ones."""
    queries, keys = vectors
    return (queries @ keys.T).softmax(dim=1)


def _places() -> list[tuple[Tensor, Tensor, float]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (20 * torch.rand(4, 2, generator=generator).double(), 20 * torch.rand(7, 2, generator=generator).double(), s)
        for s in (5.0, 9.0)
    ]


# e4: what the others say
def neighbours_say(y: Tensor, d: Tensor, k: int) -> Tensor:
    """Median over the k nearest other keypoints."""
    return d[_nearest_others(y, k)].median(dim=1).values


def _itself_too(y: Tensor, d: Tensor, k: int) -> Tensor:
    return d[torch.cdist(y, y).argsort(dim=1)[:, :k]].median(dim=1).values


def _their_mean(y: Tensor, d: Tensor, k: int) -> Tensor:
    return d[_nearest_others(y, k)].mean(dim=1)


def _median_of_all(y: Tensor, d: Tensor, k: int) -> Tensor:
    return d.median(dim=0).values.expand_as(d)


def _nearest_by_displacement(y: Tensor, d: Tensor, k: int) -> Tensor:
    return d[_nearest_others(d, k)].median(dim=1).values


def _nearest_others(y: Tensor, k: int) -> Tensor:
    distance = torch.cdist(y, y)
    distance.fill_diagonal_(torch.inf)
    return distance.argsort(dim=1)[:, :k]


def _scattered() -> list[tuple[Tensor, Tensor, int]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (50 * torch.rand(12, 2, generator=generator), 8 * torch.randn(12, 2, generator=generator), k) for k in (3, 5)
    ]


EXERCISES = [
    Exercise(
        "e1",
        "weights of inverse distances",
        "o1",
        reference=inverse_weights,
        cases=_distances,
        hint="First one number for each distance, which is larger the smaller the distance is. Then make the sum of "
        "each row 1.",
        mistakes=[
            Mistake("not divided", _not_divided, "They have the right proportions. But what is the sum of each row?"),
            Mistake(
                "over the points",
                _over_the_points,
                "You made the sum over the *points* 1. It is the keypoints of one point that share. Which axis?",
            ),
            Mistake(
                "far ones count",
                _far_ones_count,
                "In your version the farthest keypoint counts most. Which sign has the power?",
            ),
            Mistake(
                "softmax of the weights",
                _softmax_of_weights,
                "The softmax takes logits, and its exponential comes on top. Here it is enough to divide by the sum.",
            ),
        ],
    ),
    Exercise(
        "e2",
        "an affine field, fitted",
        "o2",
        reference=affine_at,
        cases=_matches,
        tolerance=1e-4,
        hint="Three columns: the two coordinates, and a column of ones for $t$. Solve with those of $y$, then multiply "
        "those of $x$ with the solution.",
        mistakes=[
            Mistake(
                "no shift",
                _linear_only,
                "Your field is 0 at the origin, whatever the matches say. What stands for $t$?",
            ),
            Mistake(
                "positions",
                _positions,
                "You fitted where the points end up, $y + d$. Asked for is the displacement.",
            ),
            Mistake(
                "read at the keypoints",
                _at_the_keypoints,
                "The fit is right, but you read it at $y$. Where is it wanted?",
            ),
        ],
    ),
    Exercise(
        "e3",
        "a Gaussian as query and key",
        "o3",
        reference=gaussian_vectors,
        cases=_places,
        observe=_weights,
        hint="Write out $-|x - y|^2 / 2 \\sigma^2$. Which terms hold $y$? The product with $x$, and one more: give it "
        "a channel of its own.",
        mistakes=[
            Mistake(
                "product alone",
                _product_alone,
                "Then keypoints far from the origin count most. The term $-|y|^2 / 2 \\sigma^2$ differs from neighbour "
                "to neighbour, so it may not be left out.",
            ),
            Mistake("sigma once", _sigma_once, "Look at the units: mm² in the logit must be divided by mm²."),
            Mistake("half forgotten", _twice, "Write the square out once more: which of the terms keeps the 2 below?"),
            Mistake(
                "wrong sign",
                _plus,
                "Your keypoints count the more the farther they are from the origin. Check the sign of $|y|^2$.",
            ),
        ],
    ),
    Exercise(
        "e4",
        "what the others say",
        "o4",
        reference=neighbours_say,
        cases=_scattered,
        hint="Distances between all keypoints, the nearest $k$ of each row without itself, then the median over them.",
        mistakes=[
            Mistake(
                "itself too",
                _itself_too,
                "The nearest keypoint of a keypoint is itself, at distance 0. Nobody is their own witness.",
            ),
            Mistake(
                "their mean",
                _their_mean,
                "One wild neighbour moves a mean as far as it likes. Asked for is the median.",
            ),
            Mistake(
                "median of all",
                _median_of_all,
                "You asked everybody. The lungs move and the spine does not: who can say something about a keypoint?",
            ),
            Mistake(
                "near in displacement",
                _nearest_by_displacement,
                "Your neighbours are those that *moved* alike, so they always agree. Whose places are near?",
            ),
        ],
    ),
]
