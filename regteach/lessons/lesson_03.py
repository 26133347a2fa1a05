"""Exercises of lesson 03: correlation, mutual information, bending energy, HD95 and TRE."""

from collections.abc import Callable

import torch
from torch import Tensor

from regteach.lessons.exercises import Exercise, Mistake

Mapping = Callable[[Tensor], Tensor]


def correlation(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Covariance divided by both standard deviations, of the masked pixels."""
    a, b = a[mask], b[mask]
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / ((a**2).sum() * (b**2).sum()).sqrt()


def _no_mask(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return correlation(a, b, torch.ones_like(mask))


def _means_of_all(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    a, b = (a - a.mean())[mask], (b - b.mean())[mask]
    return (a * b).sum() / ((a**2).sum() * (b**2).sum()).sqrt()


def _zeros_outside(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return correlation(a * mask, b * mask, torch.ones_like(mask))


def _no_root(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    a, b = a[mask], b[mask]
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / ((a**2).sum() * (b**2).sum())


def _two_images() -> list[tuple[Tensor, Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(3)
    a, mask = torch.rand(5, 7, generator=rng), torch.rand(5, 7, generator=rng) > 0.4
    b = torch.where(mask, 2 - a, torch.zeros(())) + 0.2 * torch.rand(5, 7, generator=rng)
    return [(a, b, mask), (b, 0.3 * a + 1, mask)]


def information(counts: Tensor) -> Tensor:
    """Sum of p log(p / (p_i p_k)) over the cells that are not empty."""
    p = counts / counts.sum()
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    full = p > 0
    return (p[full] * (p[full] / independent[full]).log()).sum()


def _counts_for_shares(counts: Tensor) -> Tensor:
    independent = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True)
    full = counts > 0
    return (counts[full] * (counts[full] / independent[full]).log()).sum()


def _bits(counts: Tensor) -> Tensor:
    return information(counts) / torch.log(torch.tensor(2.0))


def _joint_entropy(counts: Tensor) -> Tensor:
    p = counts / counts.sum()
    return -(p[p > 0] * p[p > 0].log()).sum()


def _empty_cells(counts: Tensor) -> Tensor:
    p = counts / counts.sum()
    return (p * (p / (p.sum(1, keepdim=True) * p.sum(0, keepdim=True))).log()).sum()


def _counts() -> list[tuple[Tensor]]:
    return [
        (torch.tensor([[30.0, 2.0, 0.0], [3.0, 40.0, 5.0]]),),
        (torch.tensor([[10.0, 0.0], [0.0, 30.0]]),),
    ]


def bending_1d(u: Tensor, spacing_mm: float) -> Tensor:
    """Mean of the squared second differences over spacing squared."""
    return (u.diff().diff() / spacing_mm**2).square().mean()


def _no_spacing(u: Tensor, spacing_mm: float) -> Tensor:
    return u.diff().diff().square().mean()


def _spacing_once(u: Tensor, spacing_mm: float) -> Tensor:
    return (u.diff().diff() / spacing_mm).square().mean()


def _first_derivative(u: Tensor, spacing_mm: float) -> Tensor:
    return (u.diff() / spacing_mm).square().mean()


def _displacements() -> list[tuple[Tensor, float]]:
    x = torch.arange(12.0)
    return [(torch.sin(x) * 3, 1.5), (x**2 / 10 + x, 0.5)]


def hd95(there: Tensor, back: Tensor) -> Tensor:
    """The larger of the two directions' 95th percentiles."""
    return torch.maximum(there.quantile(0.95), back.quantile(0.95))


def _pooled(there: Tensor, back: Tensor) -> Tensor:
    return torch.cat([there, back]).quantile(0.95)


def _largest(there: Tensor, back: Tensor) -> Tensor:
    return torch.maximum(there.max(), back.max())


def _mean_of_both(there: Tensor, back: Tensor) -> Tensor:
    return (there.quantile(0.95) + back.quantile(0.95)) / 2


def _one_way(there: Tensor, back: Tensor) -> Tensor:
    return there.quantile(0.95)


def _distances() -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(5)
    return [(torch.rand(40, generator=rng) * 3, torch.rand(25, generator=rng) * 7)]


def tre_mm(transform: Mapping, fixed_vox: Tensor, moving_vox: Tensor, spacing: Tensor) -> Tensor:
    """Both landmarks in mm, the fixed ones through the transform, the mean distance."""
    return (transform(fixed_vox * spacing) - moving_vox * spacing).norm(dim=-1).mean()


def _in_voxels(transform: Mapping, fixed_vox: Tensor, moving_vox: Tensor, spacing: Tensor) -> Tensor:
    return (transform(fixed_vox) - moving_vox).norm(dim=-1).mean()


def _back_to_voxels(transform: Mapping, fixed_vox: Tensor, moving_vox: Tensor, spacing: Tensor) -> Tensor:
    return (transform(fixed_vox * spacing) / spacing - moving_vox).norm(dim=-1).mean()


def _wrong_way(transform: Mapping, fixed_vox: Tensor, moving_vox: Tensor, spacing: Tensor) -> Tensor:
    return (transform(moving_vox * spacing) - fixed_vox * spacing).norm(dim=-1).mean()


def _not_moved(transform: Mapping, fixed_vox: Tensor, moving_vox: Tensor, spacing: Tensor) -> Tensor:
    return (fixed_vox * spacing - moving_vox * spacing).norm(dim=-1).mean()


def _landmarks() -> list[tuple[Mapping, Tensor, Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(7)
    fixed = torch.rand(6, 3, generator=rng) * 20
    moving = fixed + torch.rand(6, 3, generator=rng) * 4
    return [
        (lambda points: 1.1 * points + points.new_tensor([1.0, -2.0, 3.0]), fixed, moving, torch.tensor([1, 1.5, 2]))
    ]


EXERCISES = [
    Exercise(
        id="e1",
        title="correlation inside a mask",
        objective="o1",
        reference=correlation,
        cases=_two_images,
        hint="Take the masked pixels, `a[mask]`, and then do as for a whole image.",
        mistakes=[
            Mistake(
                "mask ignored", _no_mask, "Every pixel has voted, the background too. Where does the mask come in?"
            ),
            Mistake(
                "means of the whole image",
                _means_of_all,
                "Close. The means that you took away are those of the whole image; the mask comes first.",
            ),
            Mistake(
                "zeros outside",
                _zeros_outside,
                "Multiplying by the mask makes the background 0, and zeros still vote. Select pixels with `a[mask]`.",
            ),
            Mistake(
                "no root",
                _no_root,
                "The numerator has the unit grey times grey, your denominator has it squared. What makes them equal?",
            ),
        ],
    ),
    Exercise(
        id="e2",
        title="mutual information of a joint histogram",
        objective="o2",
        reference=information,
        cases=_counts,
        hint="Make shares of the counts, then the row sums and the column sums, and add p log(p / (row * column)).",
        mistakes=[
            Mistake(
                "counts for shares",
                _counts_for_shares,
                "These are counts. Divide by their sum first: shares add up to 1.",
            ),
            Mistake("bits", _bits, "The number is right in bits. A nat uses the natural logarithm."),
            Mistake(
                "joint entropy",
                _joint_entropy,
                "That is the entropy of the pairs. Mutual information compares p with what independence would give.",
            ),
            Mistake(
                "empty cells",
                _empty_cells,
                "The result is not a number: an empty cell gives 0 times log 0. Leave empty cells out.",
            ),
        ],
    ),
    Exercise(
        id="e3",
        title="bending energy along a line",
        objective="o3",
        reference=bending_1d,
        cases=_displacements,
        hint="Second differences, divided by the spacing squared, then squared, then the mean.",
        mistakes=[
            Mistake(
                "no spacing",
                _no_spacing,
                "Right per pixel. On another grid the same field would cost something else: where do the mm come in?",
            ),
            Mistake("spacing once", _spacing_once, "There are two derivatives, and each of them is per mm."),
            Mistake(
                "first derivative",
                _first_derivative,
                "That is diffusion. A bend is a change of the slope: one more `diff`.",
            ),
        ],
    ),
    Exercise(
        id="e4",
        title="HD95 from distances",
        objective="o4",
        reference=hd95,
        cases=_distances,
        hint="One 95th percentile a direction, then the larger of the two.",
        mistakes=[
            Mistake(
                "pooled",
                _pooled,
                "Some tools pool both directions first, which gives a smaller number. Here each has its own.",
            ),
            Mistake("mean of both", _mean_of_both, "Some tools average the two directions. Here the worse one counts."),
            Mistake("largest", _largest, "That is the full Hausdorff distance: one stray pixel decides it."),
            Mistake("one way", _one_way, "A small mask inside a large one is near it; the way back is far. Use both."),
        ],
    ),
    Exercise(
        id="e5",
        title="TRE from voxel landmarks",
        objective="o4",
        reference=tre_mm,
        cases=_landmarks,
        hint="Bring both landmarks to mm, send the fixed ones through the transform, and average the distances.",
        mistakes=[
            Mistake("back to voxels", _back_to_voxels, "That distance is in voxels. The answer is wanted in mm."),
            Mistake(
                "voxels", _in_voxels, "The transform expects millimetres, and the result is wanted in millimetres."
            ),
            Mistake(
                "wrong way", _wrong_way, "The transform maps *fixed* to *moving* points. Which landmarks go through it?"
            ),
            Mistake("not moved", _not_moved, "That is the error before registration: nobody used the transform."),
        ],
    ),
]
