"""Exercises of lesson 02: affine transforms about a centre, composing fields, determinants, folds.

Points and displacements in mm, transforms from fixed to moving points. The cases use grids that are not square, with
different spacings along the axes, where a forgotten spacing or an exchanged axis changes the numbers.
"""

import math

import torch
from torch import Tensor

from regteach.grid import Grid
from regteach.lessons.exercises import Exercise, Mistake
from regteach.sampling import grid_points, sample


def _turn(degrees: float) -> Tensor:
    a = math.radians(degrees)
    return torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])


def rotation_about(degrees: float, centre: Tensor) -> Tensor:
    """[A | b] of y = R (x - c) + c: b = c - R c."""
    matrix = _turn(degrees)
    return torch.cat([matrix, (centre - matrix @ centre)[:, None]], dim=1)


def _about_origin(degrees: float, centre: Tensor) -> Tensor:
    return torch.cat([_turn(degrees), torch.zeros(2, 1)], dim=1)


def _only_back(degrees: float, centre: Tensor) -> Tensor:
    return torch.cat([_turn(degrees), centre[:, None]], dim=1)


def _not_turned(degrees: float, centre: Tensor) -> Tensor:
    return torch.cat([_turn(degrees), -(_turn(degrees) @ centre)[:, None]], dim=1)


def _other_way(degrees: float, centre: Tensor) -> Tensor:
    return rotation_about(-degrees, centre)


def inverse_affine(matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """About the same centre: N = M^-1 and s = -M^-1 t."""
    inverse = torch.linalg.inv(matrix)
    return inverse, -inverse @ shift


def _negative_shift(matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.inv(matrix), -shift


def _transposed(matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return matrix.T, -matrix.T @ shift


def _sign_lost(matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.inv(matrix), torch.linalg.inv(matrix) @ shift


def _affine_cases() -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.tensor([[1.2, 0.3], [-0.2, 0.9]]), torch.tensor([4.0, -3.0])),
        (_turn(30) @ torch.tensor([[1.5, 0.0], [0.0, 0.8]]), torch.tensor([-2.0, 7.0])),
    ]


def _read(field: Tensor, points: Tensor, grid: Grid) -> Tensor:
    return sample(field.movedim(-1, 1), points, grid).movedim(1, -1)


def compose_fields(u: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """First u, then v: w(x) = u(x) + v(x + u(x))."""
    return u + _read(v, grid_points(grid) + u, grid)


def _added(u: Tensor, v: Tensor, grid: Grid) -> Tensor:
    return u + v


def _wrong_order(u: Tensor, v: Tensor, grid: Grid) -> Tensor:
    return compose_fields(v, u, grid)


def _second_only(u: Tensor, v: Tensor, grid: Grid) -> Tensor:
    return _read(v, grid_points(grid) + u, grid)


def _read_at_u(u: Tensor, v: Tensor, grid: Grid) -> Tensor:
    return u + _read(v, u, grid)


def _field_cases() -> list[tuple[Tensor, Tensor, Grid]]:
    cases = []
    for shape, spacing, batch in (((7, 9), (1.0, 1.5), 1), ((8, 5), (2.0, 0.5), 2)):
        grid = Grid(shape, spacing, origin=(3.0, -2.0))
        cases.append((torch.randn(batch, *shape, 2), torch.randn(batch, *shape, 2), grid))
    return cases


def _slopes(field: Tensor, spacing: tuple[float, float]) -> tuple[Tensor, Tensor]:
    along_0 = (field[2:, 1:-1] - field[:-2, 1:-1]) / (2 * spacing[0])
    along_1 = (field[1:-1, 2:] - field[1:-1, :-2]) / (2 * spacing[1])
    return along_0, along_1


def inner_determinant(field: Tensor, spacing: tuple[float, float]) -> Tensor:
    """det(I + du/dx) by central differences, inner pixels only."""
    d0, d1 = _slopes(field, spacing)
    return (1 + d0[..., 0]) * (1 + d1[..., 1]) - d0[..., 1] * d1[..., 0]


def _no_spacing(field: Tensor, spacing: tuple[float, float]) -> Tensor:
    return inner_determinant(field, (1.0, 1.0))


def _no_identity(field: Tensor, spacing: tuple[float, float]) -> Tensor:
    d0, d1 = _slopes(field, spacing)
    return d0[..., 0] * d1[..., 1] - d0[..., 1] * d1[..., 0]


def _half_step(field: Tensor, spacing: tuple[float, float]) -> Tensor:
    return inner_determinant(field, (spacing[0] / 2, spacing[1] / 2))


def _diagonal_only(field: Tensor, spacing: tuple[float, float]) -> Tensor:
    d0, d1 = _slopes(field, spacing)
    return (1 + d0[..., 0]) * (1 + d1[..., 1])


def _swapped_spacing(field: Tensor, spacing: tuple[float, float]) -> Tensor:
    return inner_determinant(field, (spacing[1], spacing[0]))


def folding_inside(det: Tensor, mask: Tensor) -> Tensor:
    """100 times the folded pixels of the mask over the pixels of the mask."""
    return 100 * (det[mask] <= 0).float().mean()


def _whole_image(det: Tensor, mask: Tensor) -> Tensor:
    return 100 * ((det <= 0) & mask).float().mean()


def _no_mask(det: Tensor, mask: Tensor) -> Tensor:
    return 100 * (det <= 0).float().mean()


def _shrinking(det: Tensor, mask: Tensor) -> Tensor:
    return 100 * (det[mask] < 1).float().mean()


def _zero_spared(det: Tensor, mask: Tensor) -> Tensor:
    return 100 * (det[mask] < 0).float().mean()


def _fraction(det: Tensor, mask: Tensor) -> Tensor:
    return (det[mask] <= 0).float().mean()


def _det_cases() -> list[tuple[Tensor, Tensor]]:
    cases = []
    for shape in ((7, 9), (5, 6)):
        det = 1 + torch.randn(shape)
        det[2, :3] = 0.0
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[1:-1, 1:-2] = True
        cases.append((det, mask))
    return cases


EXERCISES = [
    Exercise(
        id="e1",
        title="a rotation about a centre as one matrix",
        objective="o1",
        reference=rotation_about,
        cases=lambda: [(30.0, torch.tensor([13.5, 13.5])), (-75.0, torch.tensor([2.0, -5.0]))],
        tolerance=0.0001,
        hint="Multiply out $R (x - c) + c$ and collect what does not depend on $x$: that is $b$. Stack [R, b] to 2 x "
        "3.",
        mistakes=[
            Mistake(
                "about the corner",
                _about_origin,
                "Your $b$ is 0, so this turns about the point (0, 0) mm. Put $x = c$ into $A x + b$: the centre "
                "must come out again.",
            ),
            Mistake(
                "centre added back only",
                _only_back,
                "You add $c$ after turning, but you have not taken it away before. What does $R$ do to the $-c$ "
                "in $R (x - c) + c$?",
            ),
            Mistake(
                "centre taken away only",
                _not_turned,
                "You take $c$ away before turning, but do not add it back after. With your matrix the centre is "
                "mapped to (0, 0) mm.",
            ),
            Mistake(
                "the other way round",
                _other_way,
                "The centre is right, but the turn goes the other way: a positive angle turns axis 0 towards axis"
                " 1, as `turn` does.",
            ),
        ],
    ),
    Exercise(
        id="e2",
        title="undo an affine",
        objective="o1",
        reference=inverse_affine,
        cases=_affine_cases,
        hint="From $y - c = M (x - c) + t$ get $x - c$ alone on one side. What stands before $(y - c)$ is $N$, the "
        "rest is $s$.",
        mistakes=[
            Mistake(
                "just the negative shift",
                _negative_shift,
                "Your matrix is right. But the shift was added *after* $M$, so on the way back it is taken away "
                "first, and $N$ then acts on it too.",
            ),
            Mistake(
                "transposed",
                _transposed,
                "A transpose undoes a rotation or a mirror, but no stretch. This matrix also stretches.",
            ),
            Mistake(
                "sign of the shift",
                _sign_lost,
                "Nearly: look at the sign of your shift. Where does $y = c + t$ have to go?",
            ),
        ],
    ),
    Exercise(
        id="e3",
        title="compose two fields",
        objective="o3",
        reference=compose_fields,
        cases=_field_cases,
        hint="$w(x) = u(x) + v(x + u(x))$. The positions $x + u(x)$ are in mm, and `sample` wants the components of "
        "$v$ as channels.",
        mistakes=[
            Mistake(
                "added",
                _added,
                "This adds the fields. The second one must be read where the first one ends, not at $x$.",
            ),
            Mistake(
                "wrong order",
                _wrong_order,
                "This is first $v$, then $u$. The first listed is applied first: it is $v$ that is read at "
                "displaced points.",
            ),
            Mistake(
                "the second only",
                _second_only,
                "You read $v$ at the right places, but $w$ must lead all the way from $x$: the first part of the "
                "way is missing.",
            ),
            Mistake(
                "read at u",
                _read_at_u,
                "You read $v$ at $u(x)$, but $u$ is a displacement, not a place. Where does it start?",
            ),
        ],
    ),
    Exercise(
        id="e4",
        title="the determinant of a stored field",
        objective="o4",
        reference=inner_determinant,
        cases=lambda: [(torch.randn(7, 9, 2), (1.0, 1.5)), (torch.randn(6, 5, 2), (0.5, 2.0))],
        tolerance=0.0001,
        hint="Differences along each axis over twice the spacing give $du_i/dx_k$. Add the unit matrix, then the "
        "determinant is the main diagonal's product minus the other one's.",
        mistakes=[
            Mistake(
                "spacing forgotten",
                _no_spacing,
                "These differences are per pixel. The derivative is per mm: divide by the spacing of the axis "
                "along which you step.",
            ),
            Mistake(
                "unit matrix forgotten",
                _no_identity,
                "For a field of zeros your determinant is 0, but the identity keeps every area. You used the "
                "displacement $u$; what is $T$?",
            ),
            Mistake(
                "half the distance",
                _half_step,
                "A central difference reaches from one neighbour to the other. How far apart are they?",
            ),
            Mistake(
                "spacings exchanged",
                _swapped_spacing,
                "Each difference is divided by the spacing of the other axis. `spacing[0]` belongs to steps along"
                " axis 0.",
            ),
            Mistake(
                "diagonal only",
                _diagonal_only,
                "You multiplied the diagonal and left the off-diagonal out: a shear or a turn changes these.",
            ),
        ],
    ),
    Exercise(
        id="e5",
        title="folding inside a mask",
        objective="o4",
        reference=folding_inside,
        cases=_det_cases,
        hint="Of the pixels that the mask selects, count those with $\\det J \\le 0$, divide by their number, and give "
        "percent.",
        mistakes=[
            Mistake(
                "divided by the whole image",
                _whole_image,
                "You count folds in the mask but divide by all pixels of the image. A larger background would "
                "make any method look better.",
            ),
            Mistake(
                "mask ignored",
                _no_mask,
                "This is the percentage in the whole image. Only the pixels of the mask count.",
            ),
            Mistake(
                "shrinking counted",
                _shrinking,
                "$\\det J$ between 0 and 1 is a patch that gets smaller, which is no fold.",
            ),
            Mistake(
                "zero spared",
                _zero_spared,
                "What about $\\det J = 0$ exactly? The patch is flattened to a line, and cannot be undone.",
            ),
            Mistake(
                "a fraction",
                _fraction,
                "This is a fraction between 0 and 1. Percent is asked for.",
            ),
        ],
    ),
]
