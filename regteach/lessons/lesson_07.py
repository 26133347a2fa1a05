"""Exercises of lesson 07: a split convolution, the last pixel of a window, a masked softmax, the logits of a spline.

Positions and spacings in mm. The cases have as many channels in all images, so that exchanging them raises nothing,
spacings that differ from 1, odd and even windows, and positions that are no tie between two windows.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regteach.bspline import basis
from regteach.lessons.exercises import Exercise, Mistake


def in_three(images: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """The kernel is cut along its input channels, one part an image; the bias is added once."""
    parts = zip(images, weight.split([image.shape[1] for image in images], dim=1), strict=True)
    return sum(F.conv2d(image, part, padding=1) for image, part in parts) + bias[:, None, None]


def _bias_each_time(images: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    return in_three(images, weight, 3 * bias)


def _no_bias(images: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    return in_three(images, weight, torch.zeros_like(bias))


def _wrong_order(images: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    return in_three(images[::-1], weight, bias)


def _two_of_three(images: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    return in_three(images[:2], weight[:, : 2 * images[0].shape[1]], bias)


def _no_padding(images: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    return in_three(images, weight, bias)[..., 1:-1, 1:-1]


def _images() -> list[tuple[list[Tensor], Tensor, Tensor]]:
    return [([torch.randn(1, c, 6, 9) for _ in range(3)], torch.randn(4, 3 * c, 3, 3), torch.randn(4)) for c in (1, 3)]


def last_of_window(position_mm: float, origin_mm: float, spacing_mm: float, k: int, count: int) -> int:
    """The window begins at the first whole number that is not below v - k / 2; its last pixel, or the grid's."""
    return min(math.ceil((position_mm - origin_mm) / spacing_mm - k / 2) + k - 1, count - 1)


def _rounded(position_mm: float, origin_mm: float, spacing_mm: float, k: int, count: int) -> int:
    return min(round((position_mm - origin_mm) / spacing_mm) - k // 2 + k - 1, count - 1)


def _no_origin(position_mm: float, origin_mm: float, spacing_mm: float, k: int, count: int) -> int:
    return last_of_window(position_mm, 0.0, spacing_mm, k, count)


def _no_spacing(position_mm: float, origin_mm: float, spacing_mm: float, k: int, count: int) -> int:
    return last_of_window(position_mm, origin_mm, 1.0, k, count)


def _sticks_out(position_mm: float, origin_mm: float, spacing_mm: float, k: int, count: int) -> int:
    return math.ceil((position_mm - origin_mm) / spacing_mm - k / 2) + k - 1


def _one_too_many(position_mm: float, origin_mm: float, spacing_mm: float, k: int, count: int) -> int:
    return min(math.ceil((position_mm - origin_mm) / spacing_mm - k / 2) + k, count - 1)


def _windows() -> list[tuple[float, float, float, int, int]]:
    return [
        (12.3, 2.0, 1.5, 3, 20),
        (12.3, 2.0, 1.5, 4, 20),
        (13.2, 2.0, 1.5, 4, 20),
        (2.4, 1.0, 2.0, 5, 3),
        (-7.1, -9.0, 0.5, 2, 30),
    ]


def softmax_inside(logits: Tensor, inside: Tensor) -> Tensor:
    """Those outside get minus infinity, so their weight is 0 and the others add up to 1."""
    return logits.masked_fill(~inside, -math.inf).softmax(-1)


def _plus_one(logits: Tensor, inside: Tensor) -> Tensor:
    return (logits + inside.float()).softmax(-1)


def _cut_after(logits: Tensor, inside: Tensor) -> Tensor:
    return logits.softmax(-1) * inside


def _zeroed(logits: Tensor, inside: Tensor) -> Tensor:
    return (logits * inside).softmax(-1)


def _upside_down(logits: Tensor, inside: Tensor) -> Tensor:
    return logits.masked_fill(inside, -math.inf).softmax(-1)


def _logits() -> list[tuple[Tensor, Tensor]]:
    inside = torch.tensor([[True, True, False, True], [False, True, True, False], [True, False, True, True]])
    return [(torch.randn(3, 4), inside), (2 * torch.randn(3, 4) - 1, inside.flip(1))]


def logits_of_spline(offsets_mm: Tensor, spacing_mm: Tensor) -> Tensor:
    """log of the product of the bells over the axes."""
    return basis(offsets_mm / spacing_mm).prod(dim=-1).log()


def _in_mm(offsets_mm: Tensor, spacing_mm: Tensor) -> Tensor:
    return basis(offsets_mm).prod(dim=-1).log()


def _no_log(offsets_mm: Tensor, spacing_mm: Tensor) -> Tensor:
    return basis(offsets_mm / spacing_mm).prod(dim=-1)


def _bells_added(offsets_mm: Tensor, spacing_mm: Tensor) -> Tensor:
    return basis(offsets_mm / spacing_mm).sum(dim=-1).log()


def _round_bell(offsets_mm: Tensor, spacing_mm: Tensor) -> Tensor:
    return basis((offsets_mm / spacing_mm).norm(dim=-1)).log()


def _offsets() -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.rand(5, 7, 2) * torch.tensor([5.0, 7.0]) - torch.tensor([2.5, 3.5]), torch.tensor([4.0, 5.5])),
        (torch.rand(4, 6, 3) * 1.2 - 0.6, torch.tensor([0.5, 0.7, 0.6])),
    ]


EXERCISES = [
    Exercise(
        id="e1",
        title="the split with three images and a bias",
        objective="o1",
        reference=in_three,
        cases=_images,
        tolerance=1e-4,
        hint="Cut `weight` along its input channels (its second axis) where the channels of one image end, convolve "
        "each image with its own part and padding=1, and add. Think about where the bias belongs.",
        mistakes=[
            Mistake(
                "the bias each time",
                _bias_each_time,
                "Each of your three convolutions adds the bias. It belongs in once.",
            ),
            Mistake("no bias", _no_bias, "The three sums are right, but the bias is missing."),
            Mistake(
                "wrong order",
                _wrong_order,
                "The parts of the kernel went to the wrong images: `cat(images, 1)` puts the first image's channels "
                "first.",
            ),
            Mistake("two of three", _two_of_three, "The third image does not speak. The kernel has three parts."),
            Mistake(
                "no padding", _no_padding, "The inside is right. Without padding=1 you lose a pixel at each border."
            ),
        ],
    ),
    Exercise(
        id="e2",
        title="where a window ends",
        objective="o3",
        reference=last_of_window,
        cases=_windows,
        hint="Turn the position into a (fractional) pixel number $v$: minus origin, over spacing. The window begins at "
        "the first whole number that is not below $v - k/2$, and has $k$ pixels. Which of them does the grid have?",
        mistakes=[
            Mistake(
                "rounded first",
                _rounded,
                "This rounds to the nearest pixel and counts from there. For odd k that is right. For even k the "
                "window then lies to one side of the point: on which side of the pixel is it?",
            ),
            Mistake(
                "origin forgotten", _no_origin, "Your pixel numbers begin at 0 mm, but the grid begins at `origin`."
            ),
            Mistake(
                "spacing forgotten",
                _no_spacing,
                "You count in mm. How many pixels are that, with this spacing?",
            ),
            Mistake(
                "sticks out",
                _sticks_out,
                "That is where the window ends, also where the grid has no such pixel. Which is the last one it has?",
            ),
            Mistake(
                "one too many",
                _one_too_many,
                "That is the first pixel *after* the window: the first one and the k - 1 that follow are k pixels.",
            ),
        ],
    ),
    Exercise(
        id="e3",
        title="a softmax with a border",
        objective="o3",
        reference=softmax_inside,
        cases=_logits,
        hint="Which logit gives a weight of exactly 0? `masked_fill` can write it where `inside` is False.",
        mistakes=[
            Mistake(
                "one more inside",
                _plus_one,
                "Adding 1 inside makes those outside weaker, by a factor of e, but not silent. Their weight must be 0.",
            ),
            Mistake(
                "cut after the softmax",
                _cut_after,
                "Those outside are silent now, but the other weights no longer add up to 1.",
            ),
            Mistake(
                "logits of zero",
                _zeroed,
                "A logit of 0 is not silence: exp(0) is 1. What has an exponential of 0?",
            ),
            Mistake(
                "the wrong ones", _upside_down, "You silence those inside. `inside` is True for those who may speak."
            ),
        ],
    ),
    Exercise(
        id="e4",
        title="the logits of a spline",
        objective="o5",
        reference=logits_of_spline,
        cases=_offsets,
        tolerance=1e-4,
        hint="Offsets in control spacings, one bell `basis` for each axis, their product, and the logarithm of that.",
        mistakes=[
            Mistake("offsets in mm", _in_mm, "The bell B wants its argument in control spacings, not in mm."),
            Mistake(
                "no logarithm",
                _no_log,
                "These are the weights themselves. The softmax will take the exponential of what you return.",
            ),
            Mistake(
                "bells added",
                _bells_added,
                "You add the bells of the axes. A spline in 2D is a product of one bell along each axis; only the "
                "*logarithms* are added.",
            ),
            Mistake(
                "one round bell",
                _round_bell,
                "You put the distance into one bell. The spline's weight is not round: it is one bell along each axis, "
                "multiplied.",
            ),
        ],
    ),
]
