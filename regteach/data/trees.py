"""The toy problem of ISTN: a tree on a square that moves otherwise, so that aligning the square misses the tree.

Convention: axis 0 of an image is the row (downwards), axis 1 the column; a pixel is 1 mm; voxel (0, 0) is at 0 mm. All
images show one reference tree, each through its own affine ``placed[i]`` (reference to image), so the true transform
of a pair is known at every point: fixed image, back to the reference, on to the moving image.

:func:`generate_trees` draws the images; tree and square move independently. The authors' own are in :mod:`synth2d`.

Source: Lee, Oktay, Schuh, Schaap, Glocker, ISTN, MICCAI 2019, and its public data set synth2d.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regteach.affine import Affine, AffineBounds
from regteach.data.cohort import SPLITS, Cohort
from regteach.data.deformations import random_affine
from regteach.data.intensity import normalised
from regteach.data.landmarks import shown
from regteach.grid import Grid
from regteach.sampling import flat_points, grid_points, warp

KINDS = ("segmentation", "landmarks", "each landmark", "landmark distances")
SIDE = 128
MOTION = AffineBounds(translation_mm=5.0, rotation_deg=20.0, scale_ratio=1.1, stretch_axes_deg=45.0)  # as in synth2d
# Lengths of the drawing, as fractions of the image's side.
SQUARE_HALF = 0.38
TREE_RADIUS = 2.5 / SIDE
BLUR = 5.0 / SIDE  # standard deviation of the soft maps
REACH = 24.0 / SIDE  # how far from its landmark a map of distances says something
ROOT, HEADING_DEG = (0.11, 0.11), 45.0  # towards the opposite corner, axis 0 to axis 1
LENGTHS = (0.15, 0.32, 0.30)  # of the branches at each depth
FORKS_DEG = ((-40.0, 0.0, 40.0), (-17.0, 17.0))  # directions of the new branches against the old one, at each depth


@dataclass(frozen=True, eq=False, kw_only=True)
class Trees(Cohort):
    """A cohort of one tree in many places, with the true transforms.

    ``labels`` and ``structures`` belong to the SoI, whichever it is; ``tree`` is the tree in any case. The other
    arguments are those of :class:`~regteach.data.cohort.Cohort`.

    Args:
        placed: batch of n, reference tree to image i, mm.
        square: batch of n, reference square to image i, mm.
        tree: ``n *grid``, where the map of the tree (soft, or as drawn if not ``blurred``) is above half its maximum.
        landmarks: ``n k 2``, fork points and tips in each image, mm (also where they lie outside the image); none for
            the authors' images, which come without them.
    """

    placed: Affine
    square: Affine
    tree: Bool[Tensor, "n *grid"]
    landmarks: Float[Tensor, "n k 2"] | None = None

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {len(members) // 2}" for name, members in self.splits.items())
        return f"Trees({self.name}: {len(self)} images of {self.grid.shape} pixels; pairs: {parts})"

    def truth(self, moving: int | Sequence[int], fixed: int | Sequence[int]) -> Affine:
        """The exact transform from points of the fixed images to points of the moving images, mm.

        Args:
            moving: index of an image, or a list of them.
            fixed: as many.

        Returns:
            A batch of one transform a pair; ``trees.truth(*zip(*trees.pairs("test")))`` is that of all test pairs.

        Raises:
            ValueError: if the lists differ in length, or an index is not that of an image.
        """
        return self._between(self.placed, moving, fixed)

    def square_transform(self, moving: int | Sequence[int], fixed: int | Sequence[int]) -> Affine:
        """As :meth:`truth`, but what aligns the squares: where a registration ends that looks at nothing else."""
        return self._between(self.square, moving, fixed)

    def points(self, index: int) -> Float[Tensor, "n 2"]:
        """Centres of the tree's pixels in one image, mm: where the target registration error is measured."""
        return grid_points(self.grid)[self.tree[self._indices(index)[0]]]

    def _between(self, placed: Affine, moving: int | Sequence[int], fixed: int | Sequence[int]) -> Affine:
        """Fixed image to the reference and on to the moving image; worked out in double precision."""
        m, f = self._indices(moving), self._indices(fixed)
        if len(m) != len(f):
            raise ValueError(f"A pair has two images, but there are {len(m)} moving and {len(f)} fixed ones.")
        matrix, shift = placed.matrix.double(), placed.translation.double()
        total = matrix[m] @ torch.linalg.inv(matrix[f])
        translation = shift[m] - (total @ shift[f][..., None])[..., 0]
        return Affine(total.float(), translation.float(), placed.centre)

    def _indices(self, chosen: int | Sequence[int]) -> list[int]:
        indices = [int(i) for i in np.atleast_1d(np.asarray(chosen))]
        wrong = [i for i in indices if not 0 <= i < len(self)]
        if wrong:
            raise ValueError(f"{self.name} has the images 0 to {len(self) - 1}, but not {wrong[0]}.")
        return indices


def generate_trees(
    train: int = 80,
    validation: int = 20,
    test: int = 10,
    size: int = SIDE,
    seed: int = 0,
    kind: str = "segmentation",
    blurred: bool = True,
    noise: float = 0.02,
    tree_motion: AffineBounds | None = None,
    square_motion: AffineBounds | None = None,
    tree_seed: int = 0,
) -> Trees:
    """Draw pairs of images of a tree on a square; both move at random, each for itself.

    An image depends on the seeds, its split and its number alone: asking for more training pairs changes no other.

    Args:
        train: number of training pairs; every image is in one pair only.
        validation: number of validation pairs.
        test: number of test pairs.
        size: pixels along each axis; all lengths of the drawing go with it.
        seed: of motion, grey values and noise.
        kind: of SoI: "segmentation" (the tree), "landmarks" (its forks, tips and root as blobs in one channel),
            "each landmark" (a channel for each), or "landmark distances" (one channel that falls in a straight line
            from 1 at a landmark to 0 at :data:`REACH` from the nearest, as a distance map does, cut off).
        blurred: whether the segmentation falls off smoothly from the middle of the branches (1), which gives a gradient
            from afar, or is the tree as drawn.
        noise: standard deviation of the noise, where background and square differ by about 0.8.
        tree_motion: how far the tree moves; :data:`MOTION`, scaled to the size, where left out.
        square_motion: how far the square moves, likewise.
        tree_seed: of the tree's shape.

    Raises:
        ValueError: for an unknown kind, fewer than 32 pixels, a negative number of pairs or seed, or no pair at all.
    """
    numbers = {"train": train, "validation": validation, "test": test}
    check_kind(kind, KINDS)
    if min(numbers.values()) < 0 or not any(numbers.values()):
        raise ValueError(f"The numbers of pairs are 0 or more, and not all 0, but they are {train, validation, test}.")
    if size < 32:
        raise ValueError(f"A tree needs an image of at least 32 pixels a side, not {size}.")
    if min(seed, tree_seed) < 0 or noise < 0:
        raise ValueError(f"Seeds and noise are 0 or more, but they are {seed}, {tree_seed} and {noise}.")
    grid = Grid((size, size))
    scaled = replace(MOTION, translation_mm=MOTION.translation_mm * size / SIDE)
    bounds = (tree_motion or scaled, square_motion or scaled)
    draws = [
        _Draw.random(grid, bounds, (seed, split, number))
        for split, name in enumerate(SPLITS)
        for number in range(2 * numbers[name])
    ]
    placed, square = _batched([d.placed for d in draws]), _batched([d.square for d in draws])

    # The tree is drawn once, as a distance on a finer grid, and every image reads that: so the truth is exact. Beyond
    # the margin the distance stays as large as it is there, which is background.
    branches, landmarks = grow_tree(size, tree_seed)
    margin = size // 4
    fine = grid.padded(margin, margin).with_spacing(0.5)
    distance = warp(_distance(branches, fine)[None, None], placed.inverse(), fine, grid)
    body = (0.5 + TREE_RADIUS * size - distance).clamp(0, 1)
    soft = shown(distance, BLUR * size, "blobs")
    soi = soft if blurred else body
    if kind != "segmentation":
        nearest = _distances_to(landmarks, placed, grid, merged=kind != "each landmark")
        straight = kind == "landmark distances"
        soi = shown(nearest, (REACH if straight else BLUR) * size, "distances" if straight else "blobs")
    images = _paint(body, _square_cover(square, grid), draws, noise)
    names = {1: {"segmentation": "tree"}.get(kind, "landmarks")}
    if kind == "each landmark":
        names = {k + 1: f"landmark {k + 1}" for k in range(len(landmarks))}
    splits, pairs, people = laid_out(numbers)
    return Trees(
        name="trees",
        images=normalised(images),
        soi=soi,
        labels=labels_of(soi),
        grid=grid,
        people=people,
        structures=names,
        splits=splits,
        origin="Everything is synthetic: one drawn tree on a square, each moved by its own random affine transform.",
        given_pairs=pairs,
        placed=placed,
        square=square,
        tree=(soft if blurred else body)[:, 0] > 0.5,
        landmarks=placed(landmarks[None].expand(len(draws), -1, -1)),
    )


def grow_tree(size: int = SIDE, seed: int = 0) -> tuple[Float[Tensor, "s 2 2"], Float[Tensor, "k 2"]]:
    """The reference tree: it forks into three, each of these into two, with slightly bent branches.

    Args:
        size: side of the image, mm.
        seed: of the irregularities.

    Returns:
        Straight pieces (from, to) and the landmarks (root, 4 forks, 6 tips), mm.
    """
    rng = np.random.default_rng(seed)
    pieces: list[np.ndarray] = []
    landmarks = [np.asarray(ROOT)]

    def branch(start: np.ndarray, heading: float, depth: int) -> None:
        bend = rng.uniform(-14, 14)
        length = LENGTHS[depth] * rng.uniform(0.92, 1.08)
        for turn in np.linspace(-bend, bend, 6):  # an arc of six straight pieces
            angle = math.radians(heading + turn)
            end = start + length / 6 * np.array([math.cos(angle), math.sin(angle)])
            pieces.append(np.stack([start, end]))
            start = end
        landmarks.append(start)
        if depth < len(FORKS_DEG):
            for turn in FORKS_DEG[depth]:
                branch(start, heading + turn + rng.uniform(-5, 5), depth + 1)

    branch(np.asarray(ROOT), HEADING_DEG, 0)
    scale = float(size - 1)
    return torch.from_numpy(np.stack(pieces) * scale).float(), torch.from_numpy(np.stack(landmarks) * scale).float()


@dataclass(frozen=True)
class _Draw:
    """What is random in one image: two motions, the grey values of background, square and tree, and the noise."""

    placed: Affine
    square: Affine
    greys: Float[Tensor, "3"]
    noise: Float[Tensor, "*grid"]

    @staticmethod
    def random(grid: Grid, bounds: tuple[AffineBounds, AffineBounds], key: tuple[int, int, int]) -> "_Draw":
        state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        placed, square = (random_affine(grid, bound, generator) for bound in bounds)
        greys = torch.tensor([0.1, 0.9, 0.42]) + 0.05 * (2 * torch.rand(3, generator=generator) - 1)
        return _Draw(placed, square, greys, torch.randn(grid.shape, generator=generator))


def _paint(
    tree: Float[Tensor, "n 1 *grid"], square: Float[Tensor, "n 1 *grid"], draws: list[_Draw], noise: float
) -> Float[Tensor, "n 1 *grid"]:
    """Background, the square on it, the tree on both, and noise."""
    background, bright, grey = (torch.stack([d.greys[k] for d in draws]).reshape(-1, 1, 1, 1) for k in range(3))
    images = background.lerp(bright, square).lerp(grey, tree)
    return (images + noise * torch.stack([d.noise for d in draws])[:, None]).clamp(1e-3, 1)  # 0 would be "no signal"


def _square_cover(square: Affine, grid: Grid) -> Float[Tensor, "n 1 *grid"]:
    """How much of each pixel the square covers, to a good approximation."""
    from_centre = square.inverse()(flat_points(grid)) - torch.tensor(grid.centre)
    outside = from_centre.abs().amax(-1) - SQUARE_HALF * grid.shape[0]
    return (0.5 - outside).clamp(0, 1).reshape(-1, 1, *grid.shape)


def _distance(pieces: Float[Tensor, "s 2 2"], grid: Grid) -> Float[Tensor, "*grid"]:
    """Distance of every voxel to the nearest of the straight pieces, mm."""
    points = grid_points(grid)
    nearest = torch.full(grid.shape, math.inf)
    for start, end in pieces:
        along, offset = end - start, points - start
        share = ((offset @ along) / (along @ along)).clamp(0, 1)
        nearest = torch.minimum(nearest, (offset - share[..., None] * along).square().sum(-1))
    return nearest.sqrt()


def _distances_to(
    landmarks: Float[Tensor, "k 2"], placed: Affine, grid: Grid, merged: bool
) -> Float[Tensor, "n k *grid"]:
    """Distance of every voxel to each landmark in the reference, mm; merged: to the nearest, in one channel."""
    points = placed.inverse()(flat_points(grid))
    channels = [(points - landmark).norm(dim=-1) for landmark in landmarks]
    if merged:
        channels = [reduce(torch.minimum, channels)]
    return torch.stack(channels, dim=1).unflatten(-1, grid.shape)


def labels_of(soi: Float[Tensor, "n k *grid"]) -> Tensor:
    """The strongest channel where it is above half the maximum, counted from 1; else 0."""
    if soi.shape[1] == 1:
        return (soi[:, 0] > 0.5).long()
    strongest, channel = soi.max(dim=1)
    return torch.where(strongest > 0.5, channel + 1, 0)


def laid_out(
    numbers: Mapping[str, int],
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[tuple[int, int], ...]], tuple[str, ...]]:
    """Splits, pairs (moving, fixed) and names of images that lie moving, fixed, moving, fixed, split by split."""
    splits, pairs, people, start = {}, {}, [], 0
    for name, n in numbers.items():
        splits[name] = tuple(range(start, start + 2 * n))
        pairs[name] = tuple((start + 2 * k, start + 2 * k + 1) for k in range(n))
        people += [f"{name} {k + 1} {side}" for k in range(n) for side in ("moving", "fixed")]
        start += 2 * n
    return splits, pairs, tuple(people)


def _batched(transforms: list[Affine]) -> Affine:
    """One batch of affine transforms that share their centre."""
    return Affine(
        torch.cat([t.matrix for t in transforms]), torch.cat([t.translation for t in transforms]), transforms[0].centre
    )


def check_kind(kind: str, known: tuple[str, ...]) -> None:
    """Raise a ValueError unless the kind of SoI is known."""
    if kind not in known:
        raise ValueError(f"The SoI of the trees is one of {', '.join(known)}, not {kind!r}.")
