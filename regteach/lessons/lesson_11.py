"""Exercises of lesson 11: distinctiveness, soft-argmin, the jump along a wall, and an error that is kept in voxels.

Convention: points and displacements are rows, mm where nothing else is said; displacements lead from fixed to moving.
"""

import torch
from torch import Tensor

from regteach.lessons.exercises import Exercise, Mistake


# e1: distinctiveness
def distinct(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Determinant over trace; 0 where the trace is."""
    trace = a + c
    return torch.where(trace > 0, (a * c - b * b) / trace.clamp_min(1e-30), 0.0)


def _trace_of_s(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a + c


def _determinant_alone(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a * c - b * b


def _upside_down(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (a + c) / (a * c - b * b)


def _zero_by_zero(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (a * c - b * b) / (a + c)


def _no_product(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    trace = a + c
    return torch.where(trace > 0, a * c / trace.clamp_min(1e-30), 0.0)


def _tensors() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for shape in ((4, 3), (7,)):
        g = torch.randn(2, 5, *shape, generator=generator).double()
        a, b, c = (g[0] ** 2).mean(0), (g[0] * g[1]).mean(0), (g[1] ** 2).mean(0)
        a.flatten()[0], b.flatten()[0], c.flatten()[0] = 0.0, 0.0, 0.0  # a constant place
        cases.append((a, b, c))
    return cases


# e2: soft-argmin
def soft_minimum(cost: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """Mean of the candidates under softmax(-cost / temperature)."""
    return (-cost / temperature).softmax(dim=1) @ candidates


def _dear_ones_count(cost: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    return (cost / temperature).softmax(dim=1) @ candidates


def _times_temperature(cost: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    return (-cost * temperature).softmax(dim=1) @ candidates


def _hard(cost: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    return candidates[cost.argmin(dim=1)]


def _over_the_keypoints(cost: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    return (-cost / temperature).softmax(dim=0) @ candidates


def _costs() -> list[tuple[Tensor, Tensor, float]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(n, 9, generator=generator).double(),
            6 * torch.randn(9, 2, generator=generator).double(),
            temperature,
        )
        for n, temperature in ((3, 0.1), (5, 0.3))
    ]


# e3: the jump along the wall
def tangential_jump(u_in: Tensor, u_out: Tensor, normal: Tensor) -> Tensor:
    """The difference without its part along the normal."""
    jump = u_in - u_out
    return jump - (jump * normal).sum(dim=1, keepdim=True) * normal


def _whole_jump(u_in: Tensor, u_out: Tensor, normal: Tensor) -> Tensor:
    return u_in - u_out


def _normal_part(u_in: Tensor, u_out: Tensor, normal: Tensor) -> Tensor:
    return ((u_in - u_out) * normal).sum(dim=1, keepdim=True) * normal


def _element_by_element(u_in: Tensor, u_out: Tensor, normal: Tensor) -> Tensor:
    jump = u_in - u_out
    return jump - jump * normal * normal


def _inside_alone(u_in: Tensor, u_out: Tensor, normal: Tensor) -> Tensor:
    return u_in - (u_in * normal).sum(dim=1, keepdim=True) * normal


def _walls() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    cases = []
    for n in (4, 7):
        normal = torch.nn.functional.normalize(torch.randn(n, 2, generator=generator), dim=1)
        u_in, u_out = (10 * torch.randn(n, 2, generator=generator) for _ in range(2))
        cases.append((u_in.double(), u_out.double(), normal.double()))
    return cases


# e4: voxels are not millimetres
def tre_from_voxels(fixed_vox: Tensor, moving_vox: Tensor, u_vox: Tensor, spacing_mm: Tensor) -> Tensor:
    """Mean length of (fixed + u - moving) times the spacing."""
    return ((fixed_vox + u_vox - moving_vox) * spacing_mm).norm(dim=1).mean()


def _left_in_voxels(fixed_vox: Tensor, moving_vox: Tensor, u_vox: Tensor, spacing_mm: Tensor) -> Tensor:
    return (fixed_vox + u_vox - moving_vox).norm(dim=1).mean()


def _mean_spacing(fixed_vox: Tensor, moving_vox: Tensor, u_vox: Tensor, spacing_mm: Tensor) -> Tensor:
    return (fixed_vox + u_vox - moving_vox).norm(dim=1).mean() * spacing_mm.mean()


def _points_alone(fixed_vox: Tensor, moving_vox: Tensor, u_vox: Tensor, spacing_mm: Tensor) -> Tensor:
    return ((fixed_vox - moving_vox) * spacing_mm + u_vox).norm(dim=1).mean()


def _wrong_way(fixed_vox: Tensor, moving_vox: Tensor, u_vox: Tensor, spacing_mm: Tensor) -> Tensor:
    return ((moving_vox + u_vox - fixed_vox) * spacing_mm).norm(dim=1).mean()


def _mean_first(fixed_vox: Tensor, moving_vox: Tensor, u_vox: Tensor, spacing_mm: Tensor) -> Tensor:
    return ((fixed_vox + u_vox - moving_vox) * spacing_mm).mean(dim=0).norm()


def _voxel_pairs() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    cases = []
    for n, spacing in ((6, (1.5, 1.0, 2.5)), (9, (0.7, 0.7, 5.0))):
        fixed = 50 * torch.rand(n, 3, generator=generator)
        motion = 4 * torch.randn(n, 3, generator=generator)
        off = torch.randn(n, 3, generator=generator)
        cases.append(
            (fixed.double(), (fixed + motion).double(), (motion + off).double(), torch.tensor(spacing).double())
        )
    return cases


EXERCISES = [
    Exercise(
        "e1",
        "distinctiveness",
        "o1",
        reference=distinct,
        cases=_tensors,
        hint="The determinant of a symmetric 2 x 2 matrix, divided by its trace; and 0 where the trace is 0.",
        mistakes=[
            Mistake(
                "trace of S",
                _trace_of_s,
                "That is the strength of the gradient, whatever its direction. It is large on a straight edge, too.",
            ),
            Mistake(
                "not divided",
                _determinant_alone,
                "The determinant is right. Its unit is (grey value / mm) to the fourth. What brings it back?",
            ),
            Mistake(
                "upside down",
                _upside_down,
                "That is the trace of the inverse: how *uncertain* the position is. Wanted is one over that.",
            ),
            Mistake("0 / 0", _zero_by_zero, "Nearly. What does your version give where the image is constant?"),
            Mistake(
                "no mixed term",
                _no_product,
                "Turn a straight edge by 45 degrees: then $a = c$, and your value is large. Where is $b$?",
            ),
        ],
    ),
    Exercise(
        "e2",
        "soft-argmin",
        "o2",
        reference=soft_minimum,
        cases=_costs,
        hint="A softmax over the candidates of each keypoint gives the weights, and these a mean of the candidates.",
        mistakes=[
            Mistake("the dear ones", _dear_ones_count, "Your favourites are the *dearest* candidates. Which sign?"),
            Mistake(
                "times the temperature",
                _times_temperature,
                "With your version a low temperature makes all candidates alike. It should make the cheapest win.",
            ),
            Mistake(
                "the cheapest",
                _hard,
                "That is the argmin: it jumps from one candidate to the next and has no gradient. Take a mean.",
            ),
            Mistake(
                "over the keypoints",
                _over_the_keypoints,
                "Your weights have the sum 1 over the *keypoints*. Whose candidates compete with one another?",
            ),
        ],
    ),
    Exercise(
        "e3",
        "the jump along the wall",
        "o4",
        reference=tangential_jump,
        cases=_walls,
        hint="The part along $n$ is $(j \\cdot n) \\, n$, a vector for each point. Take it away from $j$.",
        mistakes=[
            Mistake("the whole jump", _whole_jump, "That is $j$. A gap between lung and wall would be counted, too."),
            Mistake("the normal part", _normal_part, "That is the part *across* the wall, the one to be taken out."),
            Mistake(
                "element by element",
                _element_by_element,
                "$j \\cdot n$ is one number for each point: multiply, and then add up over the axes.",
            ),
            Mistake("inside alone", _inside_alone, "A jump is a difference: what happens outside counts as well."),
        ],
    ),
    Exercise(
        "e4",
        "voxels are not millimetres",
        "o5",
        reference=tre_from_voxels,
        cases=_voxel_pairs,
        hint="Where does the field take the fixed point, in voxels? How far is that from the moving point? Each axis "
        "becomes mm before the length is taken.",
        mistakes=[
            Mistake("left in voxels", _left_in_voxels, "That number is in voxels. What is the spacing for?"),
            Mistake(
                "a mean spacing",
                _mean_spacing,
                "A voxel is not a cube here. Each axis has a spacing of its own, and it goes inside the length.",
            ),
            Mistake("u as mm", _points_alone, "You made the points mm, but the displacement is in voxels as well."),
            Mistake("wrong way", _wrong_way, "The field leads from fixed to moving points. To which do you add it?"),
            Mistake(
                "length of the mean",
                _mean_first,
                "Errors in opposite directions cancel in your version. First the length of each, then the mean.",
            ),
        ],
    ),
]
