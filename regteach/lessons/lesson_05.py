"""Exercises of lesson 05: the share of a gain, carrying labels, a mirrored scan, and memory."""

import torch
from torch import Tensor

from regteach.lessons.exercises import Exercise, Mistake


def share_of_gain(nothing: float, method: float, best: float) -> float:
    """The part of the way; signs cancel, so a metric that falls needs no other formula."""
    return (method - nothing) / (best - nothing)


def _of_the_best(nothing: float, method: float, best: float) -> float:
    return method / best


def _without_sign(nothing: float, method: float, best: float) -> float:
    return abs(method - nothing) / abs(best - nothing)


def _from_the_top(nothing: float, method: float, best: float) -> float:
    return (best - method) / (best - nothing)


def _metrics() -> list[tuple[float, float, float]]:
    return [(0.53, 0.83, 0.84), (2.41, 0.53, 0.50), (0.70, 0.65, 0.91)]


def carry(labels: Tensor, displacement_vox: Tensor) -> Tensor:
    """Each fixed voxel reads the moving voxel that it is sent to; outside is 0."""
    index = torch.stack(torch.meshgrid(*map(torch.arange, labels.shape), indexing="ij"), -1)
    target = index + displacement_vox.long()
    size = torch.tensor(labels.shape)
    inside = ((target >= 0) & (target < size)).all(-1)
    read = labels[target.clamp(min=torch.zeros_like(size), max=size - 1).unbind(-1)]
    return torch.where(inside, read, 0)


def _other_way(labels: Tensor, displacement_vox: Tensor) -> Tensor:
    return carry(labels, -displacement_vox)


def _border_repeated(labels: Tensor, displacement_vox: Tensor) -> Tensor:
    index = torch.stack(torch.meshgrid(*map(torch.arange, labels.shape), indexing="ij"), -1)
    size = torch.tensor(labels.shape)
    target = (index + displacement_vox.long()).clamp(min=torch.zeros_like(size), max=size - 1)
    return labels[target.unbind(-1)]


def _wrapped(labels: Tensor, displacement_vox: Tensor) -> Tensor:
    index = torch.stack(torch.meshgrid(*map(torch.arange, labels.shape), indexing="ij"), -1)
    return labels[((index + displacement_vox.long()) % torch.tensor(labels.shape)).unbind(-1)]


def _maps() -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 4, (4, 5, 6), generator=rng)
    return [(labels, torch.randint(-2, 3, (4, 5, 6, 3), generator=rng))]


def with_and_without_sides(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean Dice of the labels as they are, and of those with the sides merged."""
    return _mean_dice(a, b), _mean_dice(_merged(a), _merged(b))


def _merged(labels: Tensor) -> Tensor:
    return torch.where(labels > 7, labels - 7, labels)


def _mean_dice(a: Tensor, b: Tensor, background: bool = False) -> float:
    labels = [k for k in torch.cat([a.flatten(), b.flatten()]).unique().tolist() if k > 0 or background]
    scores = [2 * ((a == k) & (b == k)).sum() / ((a == k).sum() + (b == k).sum()) for k in labels]
    return float(torch.stack(scores).mean())


def _remainder(a: Tensor, b: Tensor) -> tuple[float, float]:
    return _mean_dice(a, b), _mean_dice(a % 7, b % 7)


def _with_background(a: Tensor, b: Tensor) -> tuple[float, float]:
    return _mean_dice(a, b, True), _mean_dice(_merged(a), _merged(b), True)


def _exchanged(a: Tensor, b: Tensor) -> tuple[float, float]:
    return with_and_without_sides(a, b)[::-1]


def _heads() -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(6)
    left = torch.randint(0, 8, (5, 6, 7), generator=rng)
    head = torch.cat([left, torch.where(left > 0, left + 7, 0).flip(0)])
    head[0, 0] = 0
    return [(head.flip(0), head), (head, torch.roll(head, 1, 1))]


def pyramid_mib(shape: tuple[int, int, int], channels: int, levels: int) -> float:
    """Voxels fall by eight and channels double, so each level takes a quarter of the one before."""
    voxels = shape[0] * shape[1] * shape[2]
    return sum(voxels / 8**level * channels * 2**level * 4 for level in range(levels)) / 2**20


def _as_in_2d(shape: tuple[int, int, int], channels: int, levels: int) -> float:
    voxels = shape[0] * shape[1] * shape[2]
    return sum(voxels / 4**level * channels * 2**level * 4 for level in range(levels)) / 2**20


def _same_channels(shape: tuple[int, int, int], channels: int, levels: int) -> float:
    voxels = shape[0] * shape[1] * shape[2]
    return sum(voxels / 8**level * channels * 4 for level in range(levels)) / 2**20


def _numbers(shape: tuple[int, int, int], channels: int, levels: int) -> float:
    return pyramid_mib(shape, channels, levels) / 4


EXERCISES = [
    Exercise(
        "e1",
        "how far to the ceiling",
        "o3",
        reference=share_of_gain,
        cases=_metrics,
        hint="Two differences, both counted from nothing. What should come out when the method equals the best?",
        mistakes=[
            Mistake("of the best alone", _of_the_best, "Doing nothing has a Dice too. Count from there, not from 0."),
            Mistake(
                "no sign",
                _without_sign,
                "A method can be worse than nothing, and then its share is negative. Two signs cancel of themselves "
                "for ASD: no absolute value is needed.",
            ),
            Mistake("what is missing", _from_the_top, "That is the share that is still missing."),
        ],
    ),
    Exercise(
        "e2",
        "carry a label map",
        "o2",
        reference=carry,
        cases=_maps,
        hint="Index of the fixed voxel plus its displacement is the index of the moving voxel that is read.",
        mistakes=[
            Mistake(
                "the other way", _other_way, "A transform maps fixed points to moving points: add the displacement."
            ),
            Mistake("border repeated", _border_repeated, "What comes from outside is background, not the last voxel."),
            Mistake("wrapped round", _wrapped, "Negative indices count from the far end. Test for them first."),
        ],
    ),
    Exercise(
        "e3",
        "a mirrored scan",
        "o5",
        reference=with_and_without_sides,
        cases=_heads,
        hint="Merge by taking 7 off the labels above 7. Then the mean of the Dice of each label but 0.",
        mistakes=[
            Mistake("remainder", _remainder, "The remainder of 7 by 7 is 0, and label 7 becomes background."),
            Mistake("background counted", _with_background, "Label 0 is background, and no structure."),
            Mistake("order", _exchanged, "With sides first, merged second."),
        ],
    ),
    Exercise(
        "e4",
        "memory",
        "o1",
        reference=pyramid_mib,
        cases=lambda: [((64, 64, 64), 16, 4), ((48, 64, 32), 8, 3)],
        hint="Bytes of a level: voxels times channels times 4. One MiB is 2 to the power of 20 bytes.",
        mistakes=[
            Mistake("as in 2D", _as_in_2d, "Half as many along each of three axes: an eighth of the voxels."),
            Mistake("the same channels", _same_channels, "The channels double from level to level."),
            Mistake("numbers for bytes", _numbers, "You counted numbers. Each takes 4 bytes."),
        ],
    ),
]
