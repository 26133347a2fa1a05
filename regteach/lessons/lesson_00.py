"""Exercises of lesson 00: distances in mm, bilinear by hand, pooled grids, affines, and which side is left."""

import math

import numpy as np

from regteach.lessons.exercises import Exercise, Mistake

Numbers = tuple[float, ...]


def distance_mm(a_vox: Numbers, b_vox: Numbers, spacing: Numbers) -> float:
    """Distance between two voxels, mm."""
    return math.sqrt(sum(((b - a) * h) ** 2 for a, b, h in zip(a_vox, b_vox, spacing, strict=True)))


def _distance_in_voxels(a_vox: Numbers, b_vox: Numbers, spacing: Numbers) -> float:
    return distance_mm(a_vox, b_vox, (1.0,) * len(spacing))


def _spacing_outside_the_square(a_vox: Numbers, b_vox: Numbers, spacing: Numbers) -> float:
    return math.sqrt(sum((b - a) ** 2 * h for a, b, h in zip(a_vox, b_vox, spacing, strict=True)))


def _along_the_axes(a_vox: Numbers, b_vox: Numbers, spacing: Numbers) -> float:
    return sum(abs(b - a) * h for a, b, h in zip(a_vox, b_vox, spacing, strict=True))


def _mean_spacing(a_vox: Numbers, b_vox: Numbers, spacing: Numbers) -> float:
    return _distance_in_voxels(a_vox, b_vox, spacing) * sum(spacing) / len(spacing)


def _distance_cases() -> list[tuple[Numbers, Numbers, Numbers]]:
    return [
        ((3, 4, 2), (6, 8, 5), (1.0, 1.5, 4.0)),
        ((10, 0, 7), (2, 5, 7), (0.7, 0.7, 2.5)),
        ((1, 1), (4, 9), (0.5, 2.0)),
    ]


def _bilinear(a: float, b: float) -> float:
    """The exercise's four pixels, weighted by the fractions along axis 0 (a) and axis 1 (b)."""
    return (1 - a) * (1 - b) * 10 + (1 - a) * b * 20 + a * (1 - b) * 30 + a * b * 80


def pooled_origin(origin: Numbers, spacing: Numbers, factor: int) -> Numbers:
    """Centre of the first voxel after averaging blocks of ``factor`` voxels along each axis, mm."""
    return tuple(o + 0.5 * (factor - 1) * h for o, h in zip(origin, spacing, strict=True))


def _origin_kept(origin: Numbers, spacing: Numbers, factor: int) -> Numbers:
    return tuple(origin)


def _half_the_block(origin: Numbers, spacing: Numbers, factor: int) -> Numbers:
    return tuple(o + 0.5 * factor * h for o, h in zip(origin, spacing, strict=True))


def _always_half_a_voxel(origin: Numbers, spacing: Numbers, factor: int) -> Numbers:
    return tuple(o + 0.5 * h for o, h in zip(origin, spacing, strict=True))


def _pooled_in_voxels(origin: Numbers, spacing: Numbers, factor: int) -> Numbers:
    return tuple(o + 0.5 * (factor - 1) for o in origin)


def _pooled_cases() -> list[tuple[Numbers, Numbers, int]]:
    return [((0.0, 0.0), (1.0, 1.0), 2), ((-3.0, 5.0, 10.0), (1.0, 1.5, 4.0), 3), ((2.0, -7.0), (0.5, 2.0), 4)]


def same_point(index_a: Numbers, affine_a: np.ndarray, affine_b: np.ndarray) -> np.ndarray:
    """Index in image b of the point that image a has at ``index_a``."""
    return (np.linalg.inv(affine_b) @ affine_a @ [*index_a, 1.0])[:3]


def _world_point(index_a: Numbers, affine_a: np.ndarray, affine_b: np.ndarray) -> np.ndarray:
    return (affine_a @ [*index_a, 1.0])[:3]


def _wrong_inverse(index_a: Numbers, affine_a: np.ndarray, affine_b: np.ndarray) -> np.ndarray:
    return same_point(index_a, affine_b, affine_a)


def _no_origins(index_a: Numbers, affine_a: np.ndarray, affine_b: np.ndarray) -> np.ndarray:
    return np.linalg.inv(affine_b[:3, :3]) @ affine_a[:3, :3] @ np.asarray(index_a, dtype=float)


def _not_inverted(index_a: Numbers, affine_a: np.ndarray, affine_b: np.ndarray) -> np.ndarray:
    return (affine_b @ affine_a @ [*index_a, 1.0])[:3]


def _affine(columns: list[Numbers], origin: Numbers) -> np.ndarray:
    """The 4 x 4 matrix with the steps of the three array axes and the position of voxel (0, 0, 0), mm."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(columns).T
    affine[:3, 3] = origin
    return affine


def _two_affines() -> list[tuple[Numbers, np.ndarray, np.ndarray]]:
    ras = _affine([(1, 0, 0), (0, 1.5, 0), (0, 0, 4)], (-90, -120, -70))
    las = _affine([(-2, 0, 0), (0, 2, 0), (0, 0, 2)], (88, -110, -60))
    lia = _affine([(-1, 0, 0), (0, 0, -1.5), (0, 1, 0)], (128, 90, -100))
    return [((10, 20, 5), ras, las), ((40, 7, 30), lia, ras), ((3, 60, 11), las, lia)]


def left_side(affine: np.ndarray) -> tuple[int, str]:
    """The array axis that runs most nearly between left and right, and its end ("start" or "end") that is left."""
    towards_right = affine[0, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    axis = int(np.abs(towards_right).argmax())
    return axis, "start" if towards_right[axis] > 0 else "end"


def _longest_step(affine: np.ndarray) -> tuple[int, str]:
    axis = int(np.abs(affine[0, :3]).argmax())
    return axis, "start" if affine[0, axis] > 0 else "end"


def _always_axis_0(affine: np.ndarray) -> tuple[int, str]:
    return 0, left_side(affine)[1]


def _sign_ignored(affine: np.ndarray) -> tuple[int, str]:
    return left_side(affine)[0], "start"


def _right_for_left(affine: np.ndarray) -> tuple[int, str]:
    axis, end = left_side(affine)
    return axis, "end" if end == "start" else "start"


def _column_for_row(affine: np.ndarray) -> tuple[int, str]:
    axis = int(np.abs(affine[:3, 0]).argmax())
    return axis, "start" if affine[axis, 0] > 0 else "end"


def _orientations() -> list[tuple[np.ndarray]]:
    ras = _affine([(1, 0, 0), (0, 1, 0), (0, 0, 3)], (-90, -120, -70))
    las = _affine([(-1, 0, 0), (0, 1, 0), (0, 0, 3)], (90, -120, -70))
    psr = _affine([(0, -1, 0), (0, 0, 1), (0.8, 0, 0)], (-70, 110, -70))
    asl = _affine([(0.1, 1.2, 0), (0, 0, 1), (-2, 0.05, 0)], (80, -100, -70))
    thick = _affine([(0.966, 0, -0.259), (0, 1, 0), (1.294, 0, 4.83)], (-90, -120, -70))  # 5 mm, tilted by 15 degrees
    return [(ras,), (las,), (psr,), (asl,), (thick,)]


EXERCISES = [
    Exercise(
        id="e1",
        title="distance in mm",
        objective="o3",
        reference=distance_mm,
        cases=_distance_cases,
        hint="Bring each difference of indices to mm first, axis by axis. Then use Pythagoras.",
        mistakes=[
            Mistake(
                "in voxels",
                _distance_in_voxels,
                "That is a distance in voxels. A step along axis $k$ is `spacing[k]` mm long.",
            ),
            Mistake(
                "spacing not squared",
                _spacing_outside_the_square,
                "The spacing must be inside the square: a leg of the triangle is index difference *times* spacing.",
            ),
            Mistake(
                "along the axes",
                _along_the_axes,
                "That is the way along the axes, as a taxi drives. A straight line is the root of the sum of squares.",
            ),
            Mistake(
                "mean spacing",
                _mean_spacing,
                "One mean spacing for all axes makes every direction equal. Each axis has its own.",
            ),
        ],
    ),
    Exercise(
        id="e2",
        title="bilinear by hand",
        objective="o2",
        reference=_bilinear(0.25, 0.6),
        hint="Four products of two weights each. The weights along one axis add up to 1, and so do all four products.",
        mistakes=[
            Mistake(
                "fractions swapped",
                _bilinear(0.6, 0.25),
                "The fraction of axis 0 goes with the step from row 4 to row 5, that of axis 1 with the columns.",
            ),
            Mistake(
                "weights reversed",
                _bilinear(0.75, 0.4),
                "The closer pixel gets the *larger* weight. At fraction 0 the lower pixel must have all of it.",
            ),
            Mistake("plain mean", _bilinear(0.5, 0.5), "That is the mean of the four: right in the very middle only."),
            Mistake("nearest", 20.0, "That is the nearest pixel's value. All four pixels have a say."),
        ],
    ),
    Exercise(
        id="e3",
        title="origin of a pooled grid",
        objective="o3",
        reference=pooled_origin,
        cases=_pooled_cases,
        hint="Where is the middle of the old voxel centres 0, 1, ..., factor - 1? Count in voxels, then go to mm.",
        mistakes=[
            Mistake(
                "origin kept",
                _origin_kept,
                "The first new voxel is the mean of a block, so its centre is the middle of the block, "
                "not its first voxel.",
            ),
            Mistake(
                "half the block",
                _half_the_block,
                "You measured from the outer face. The origin is the *centre* of the first voxel: "
                "the middle of the centres 0 and 1 is 0.5, not 1.",
            ),
            Mistake(
                "always half a voxel",
                _always_half_a_voxel,
                "Half a voxel is right for a factor of 2. Where is the middle of the centres 0, 1 and 2?",
            ),
            Mistake("in voxels", _pooled_in_voxels, "The shift is still in voxels; the origin is in mm."),
        ],
    ),
    Exercise(
        id="e4",
        title="the same point in another image",
        objective="o5",
        reference=same_point,
        cases=_two_affines,
        hint="Two steps: from the index in a to mm, and from these mm to the index in b.",
        mistakes=[
            Mistake(
                "stopped at mm",
                _world_point,
                "That is the point in mm: half of the way. Now go from mm to the indices of image b.",
            ),
            Mistake(
                "wrong one inverted",
                _wrong_inverse,
                "An affine takes indices to mm. You need image a in that direction and image b in the other.",
            ),
            Mistake(
                "origins left out",
                _no_origins,
                "The first three columns only know steps. The fourth column says where voxel (0, 0, 0) is.",
            ),
            Mistake(
                "not inverted",
                _not_inverted,
                "Both affines take indices to mm. The second step goes from mm to indices: it needs the inverse.",
            ),
        ],
    ),
    Exercise(
        id="e5",
        title="which side is left",
        objective="o5",
        reference=left_side,
        cases=_orientations,
        hint="x is row 0 of the affine. Which column points most nearly along x, whatever its length? "
        "Then look at the sign.",
        mistakes=[
            Mistake(
                "always axis 0",
                _always_axis_0,
                "Some files store left-right along axis 1 or 2. Which array axis changes x the most?",
            ),
            Mistake(
                "sign ignored",
                _sign_ignored,
                "You found the axis. When the step in x is negative, the index grows towards the left.",
            ),
            Mistake(
                "right for left",
                _right_for_left,
                "That end is the patient's right. x grows to the *right*, so left is where x is smallest.",
            ),
            Mistake(
                "column for row",
                _column_for_row,
                "Column 0 says where a step along array axis 0 goes. To find the axis that changes x, read row 0.",
            ),
            Mistake(
                "length of the step kept",
                _longest_step,
                "A thick slice takes a long step, so even a small tilt changes x a lot. "
                "Divide each column by its length first.",
            ),
        ],
    ),
]
