"""What is minimised: for each model one function that returns named terms, one value a pair each.

Convention: images, features and SoI maps ``b k *grid``; the sum of the terms is the loss.

Every data term d is a *relative* squared error (:func:`relative_mse`): 0 where two maps agree, about 2 where they do
not overlap at all, the same for a large structure and a small one, so one weight of the regulariser serves a
hippocampus and a brain. Terms that move an image look at several scales at once (:func:`pyramid_mse`).

Networks that learn from the images alone compare them after every step, at that step's own resolution
(:func:`multiscale`). The keypoint model is told where landmarks go (:func:`keypoints`).

Sources: the four losses of ISTN are Lee et al., MICCAI 2019, section 2 (u: on the images; s: on the SoI; e, i: explicit
and implicit); GeoReg: Sideri-Lampretsa et al., arXiv 2412.13294, eqs 8 to 10; bending energy: Rueckert et al., IEEE TMI
18 (1999), eq. 2.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from regteach import regularity
from regteach.affine import Affine
from regteach.focus import Focus
from regteach.grid import Grid
from regteach.result import Result, Step, after_each, assemble, composed
from regteach.sampling import sample, warp
from regteach.similarity import Dissimilarity, dissimilarity
from regteach.transforms import Dense, FreeForm, Transform, Velocity, displacement

Terms = dict[str, Float[Tensor, "b"]]
LEVELS = 4  # of the pyramid
WINDOW = 9  # voxels an axis, of local NCC
EMPTY = 1e-4  # mean square below which a map counts as empty: its error is not blown up any further


def relative_mse(
    a: Float[Tensor, "b k *grid"], b: Float[Tensor, "b k *grid"], scale: Float[Tensor, "b k"] | None = None
) -> Float[Tensor, "b"]:
    """Squared error of each channel over the square of what is in it, averaged over the channels.

        (1/k) sum_k  sum_x (a - b)^2 / scale_k,    scale_k = (sum_x a^2 + sum_x b^2) / 2

    Args:
        a, b: two sets of maps.
        scale: given by whoever compares many warps of one map (:func:`refinement`); else that of ``a`` and ``b``. It is
            a constant to the gradient either way: a unit, not a thing to be improved.
    """
    error = (a - b).square().flatten(2).sum(2)
    return (error / (scale_of(a, b) if scale is None else scale)).mean(1)


def scale_of(a: Float[Tensor, "b k *grid"], b: Float[Tensor, "b k *grid"]) -> Float[Tensor, "b k"]:
    """How much there is in two sets of maps, without a gradient; maps that are nearly empty count as EMPTY."""
    content = (a.detach().square() + b.detach().square()).flatten(2)
    return (content.sum(2) / 2).clamp_min(EMPTY * content.shape[2])


def pyramid_mse(
    a: Float[Tensor, "b k *grid"],
    b: Float[Tensor, "b k *grid"],
    levels: int = LEVELS,
    scales: Sequence[Tensor] | None = None,
) -> Float[Tensor, "b"]:
    """:func:`relative_mse` of both images, and of both averaged over cubes of 2, 4, 8 voxels, in the mean.

    Two thin structures that do not touch have no gradient towards each other at full resolution; once they reach into a
    common cube, they do. An axis that is too short for a cube ends the pyramid.

    Args:
        a, b: two sets of maps.
        levels: how many resolutions at most.
        scales: one for each level, see :func:`relative_mse`.
    """
    pairs = list(zip(_pyramid(a, levels), _pyramid(b, levels), strict=True))
    units: Sequence[Tensor | None] = [None] * len(pairs) if scales is None else scales
    return torch.stack([relative_mse(x, y, unit) for (x, y), unit in zip(pairs, units, strict=True)]).mean(0)


def _pyramid(maps: Tensor, levels: int) -> list[Tensor]:
    """The maps, and their means over cubes of 2, 4, ... voxels."""
    every = [maps]
    while len(every) < levels and min(every[-1].shape[2:]) >= 4:
        every.append(averaged(every[-1], 2))
    return every


def unsupervised(result: Result, moving: Tensor, fixed: Tensor, grid: Grid) -> Terms:
    """STN-u: L_u = d(M o T, F), mean over the T after each step of the network. The structures play no part."""
    return {"image": _stages(result, lambda t: pyramid_mse(warp(moving, t, grid), fixed))}


def supervised(result: Result, soi_moving: Tensor, soi_fixed: Tensor, grid: Grid) -> Terms:
    """STN-s: L_s = d(S_M o T, S_F), mean over the T after each step. The network sees images, and is told the SoI."""
    return {"structure": _stages(result, lambda t: pyramid_mse(warp(soi_moving, t, grid), soi_fixed))}


def explicit(result: Result, soi_moving: Tensor, soi_fixed: Tensor, grid: Grid) -> Terms:
    """ISTN-e: L_s + d(M', S_M) + d(F', S_F). The ITN is told to draw the structures."""
    return supervised(result, soi_moving, soi_fixed, grid) | {"itn": drawn(result, soi_moving, soi_fixed)}


def drawn(result: Result, soi_moving: Tensor, soi_fixed: Tensor) -> Float[Tensor, "b"]:
    """d(M', S_M) + d(F', S_F), where they are: nothing is moved."""
    return relative_mse(result.features[0], soi_moving) + relative_mse(result.features[1], soi_fixed)


def implicit(result: Result, soi_moving: Tensor, soi_fixed: Tensor, grid: Grid) -> Terms:
    """ISTN-i: L_s + d(M' o T, S_F) + d(S_M o T, F'). Each image's map must match the *other's* structures, aligned.

    All three are means over the T after each step of the network.
    """
    mapped_moving, mapped_fixed = result.features
    channels = soi_moving.shape[1]

    def crossed(transform: Transform) -> tuple[Tensor, Tensor]:
        both = warp(torch.cat([soi_moving, mapped_moving], 1), transform, grid)
        soi, mapped = both[:, :channels], both[:, channels:]
        return pyramid_mse(soi, soi_fixed), pyramid_mse(mapped, soi_fixed) + pyramid_mse(soi, mapped_fixed)

    pairs = [crossed(result.up_to(count)) for count in range(1, len(result.steps) + 1)]
    structure, itn = (torch.stack(column).mean(0) for column in zip(*pairs, strict=True))
    return {"structure": structure, "itn": itn}


ISTN: dict[str, Callable[[Result, Tensor, Tensor, Grid], Terms]] = {
    "unsupervised": unsupervised,
    "supervised": supervised,
    "explicit": explicit,
    "implicit": implicit,
}


def istn(
    variant: str,
    result: Result,
    images: tuple[Tensor, Tensor],
    soi: tuple[Tensor, Tensor],
    grid: Grid,
    bending: float = 0.0,
    coarsen: int = 1,
) -> Terms:
    """The loss of one variant of ISTN, with the bending energy of its splines.

    Args:
        variant: "unsupervised", "supervised", "explicit" or "implicit".
        result: what the network found.
        images: moving and fixed, ``b c *grid``.
        soi: their structures of interest, ``b k *grid``.
        grid: where all sit.
        bending: weight of the bending energy, mm^2.
        coarsen: compare what was aligned on maps averaged over cubes of this many voxels: cheaper, and blind to what
            is finer. What the explicit variant compares without moving it is always at full resolution.

    Raises:
        ValueError: for an unknown variant.
    """
    if variant not in ISTN:
        raise ValueError(f"A variant of ISTN is one of {', '.join(ISTN)}, not {variant!r}.")
    targets = images if variant == "unsupervised" else soi
    small = [averaged(maps, coarsen) for maps in (*result.features, *targets)]
    coarse = replace(result, features=(small[0], small[1]))
    terms = ISTN[variant](coarse, small[2], small[3], grid.coarsened(coarsen))
    if variant == "explicit" and coarsen > 1:
        terms["itn"] = drawn(result, *soi)
    return terms | regulariser(result.steps, grid, bending)


def multiscale(
    result: Result,
    grid: Grid,
    similarity: str = "ncc",
    bending: float | Sequence[float] = 0.0,
    weights: Sequence[float] = (),
    across: bool = True,
    window_vox: int = WINDOW,
) -> Terms:
    """L = sum_k w_l(k) (D_k + lambda_l(k) R_k) / sum_k w_l(k), over all outputs k: interpolations and steps.

    So it is an average, in which a level l counts as often as it has outputs. Both images are averaged down to the grid
    of an output before D compares them there. R is the bending energy of the whole displacement so far, in 1/mm^2, on
    the same grid.

    Source: Sideri-Lampretsa et al., arXiv 2412.13294, eqs 8 to 10, which add the levels up, and weight an interpolation
    by the level of its parents; ours has the weight of its own grid. An average keeps the learning rate and lambda what
    they are when levels or steps are added.

    Args:
        result: of a network whose features are the images. A step's output lies on a grid of its own (a Dense on
            ``grid.coarsened(2**l)``), or on that of the images.
        grid: of the images.
        similarity: D, a name of :func:`regteach.similarity.dissimilarity`.
        bending: lambda, mm^2: one for all levels, or one for each, finest first.
        weights: w of each level, finest first; 1 each where left out.
        across: False lets no gradient pass from an output to the levels above its own (an ablation).
        window_vox: width of the windows of local NCC, voxels of each output's own grid.

    Raises:
        ValueError: if a level has no weight, or the weights make no sense.
    """
    compare = _similarity(similarity, window_vox)
    stiffness = bending if isinstance(bending, Sequence) else (bending,) * grid.shape[0].bit_length()
    errors, energies, given = [], [], []
    outputs = after_each(result.steps) if across else _each_by_itself(result.steps)
    for found in outputs:
        own = found.grid if isinstance(found, Dense) else grid
        level = (grid.shape[0] // own.shape[0]).bit_length() - 1
        if level >= min(len(stiffness), len(weights) if weights else level + 1):
            raise ValueError(f"Level {level} has no weight: {weights} of the images, {bending} of the bending energy.")
        moving, fixed = (averaged(image, 2**level) for image in result.features)
        errors.append(compare(warp(moving, found, own), fixed))
        if stiffness[level]:
            energies.append(stiffness[level] * regularity.bending_energy(displacement(found, own), own))
        else:
            energies.append(torch.zeros_like(errors[-1]))
        given.append(float(weights[level]) if weights else 1.0)
    if not all(0 <= number < math.inf for number in (*given, *stiffness)) or not sum(given) > 0:
        raise ValueError(f"Weights are numbers of 0 or more, and one of an output is above 0: {weights}, {bending}.")
    shares = torch.tensor(given).to(errors[0]) / sum(given)
    # Not as a product of matrices, which mixed precision would round.
    terms = {"image": (torch.stack(errors, -1) * shares).sum(-1)}
    return terms | ({"bending": (torch.stack(energies, -1) * shares).sum(-1)} if any(stiffness) else {})


def _each_by_itself(steps: Sequence[Step]) -> tuple[Transform, ...]:
    """The transform after each step, in which the steps on other grids than its own are constants."""
    shapes = [step.parameters.shape for step in steps]
    return tuple(
        assemble(
            steps[: k + 1],
            [s.parameters if s.parameters.shape == own else s.parameters.detach() for s in steps[: k + 1]],
        )
        for k, own in enumerate(shapes)
    )


def keypoints(
    fields: Sequence[Callable[[Tensor], Tensor]],
    marks: tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]],
    maps: tuple[Float[Tensor, "1 k *grid"], Float[Tensor, "1 k *grid"]],
    grid: Grid,
    points: Float[Tensor, "m d"],
    smooth: float = 0.0,
    image: float = 0.0,
) -> dict[str, Float[Tensor, ""]]:
    """L = mean over the scales of the landmarks' distances + bending + what the images say, of one pair, mm.

    Args:
        fields: displacement at points ``n d``, mm, after each scale; bending and images judge the last one.
        marks: landmarks in the fixed and in the moving image, mm.
        maps: of the moving and of the fixed image, the same for the same tissue.
        grid: of the maps.
        points: where the field and the maps are read, mm.
        smooth: weight of the mean squared second difference over one voxel along each axis, per mm^2.
        image: weight of the mean squared difference of the maps.
    """
    distances = [(marks[0] + field(marks[0]) - marks[1]).square().sum(1).clamp_min(1e-12).sqrt() for field in fields]
    terms = {"landmarks": torch.stack(distances).mean()}
    last = fields[-1]
    here = last(points) if smooth or image else points
    if smooth:
        steps = torch.diag(points.new_tensor(grid.spacing))
        around = [(last(points + h) - 2 * here + last(points - h)) / h.square().sum() for h in steps]
        terms["bending"] = smooth * torch.stack(around).square().sum((0, 2)).mean()
    if image:
        moving, fixed = maps
        seen = sample(moving, (points + here)[None], grid) - sample(fixed, points[None], grid)
        terms["image"] = image * seen.square().mean()
    return terms


def refinement(
    features: tuple[Tensor, Tensor],
    transform: Transform,
    grid: Grid,
    focus: Focus | None = None,
    levels: int = LEVELS,
) -> Float[Tensor, "b"]:
    """L_r = d(M' o T, F'), the loss at test time: no labels, no structures, the network's own maps alone.

    Its scale is that of M' and F' as they are, the same for every T: what falls is the error.

    Args:
        features: moving and fixed maps, ``b k *grid``.
        transform: fixed to moving.
        grid: of the maps.
        focus: look at this part of the fixed grid only.
        levels: of the pyramid, at most.
    """
    moving, fixed = features
    warped, seen = _looked_at(features, transform, grid, focus)
    levels = len(_pyramid(seen, levels))
    whole = zip(_pyramid(moving, levels), _pyramid(fixed, levels), strict=True)
    return pyramid_mse(warped, seen, levels, [scale_of(m, f) for m, f in whole])


class MapLoss:
    """:func:`refinement` of one transform after the other: what does not move is averaged and measured once.

    It knows again the maps that it was given last, and takes them for constants: whoever changes their numbers in
    place makes a new one.
    """

    def __init__(self, levels: int = LEVELS) -> None:
        self.levels = levels
        self._given: tuple[object, ...] = ()

    def __call__(
        self, features: tuple[Tensor, Tensor], transform: Transform, grid: Grid, focus: Focus | None = None
    ) -> Float[Tensor, "b"]:
        """As :func:`refinement`, with the levels of this loss."""
        given = (*features, focus)
        warped, seen = _looked_at(features, transform, grid, focus)
        if not self._given or any(new is not old for new, old in zip(given, self._given, strict=True)):
            self._fixed = _pyramid(seen.detach(), self.levels)
            both = (_pyramid(maps, len(self._fixed)) for maps in features)
            self._scales = [scale_of(m, f) for m, f in zip(*both, strict=True)]
            self._given = given
        levels = zip(_pyramid(warped, len(self._fixed)), self._fixed, self._scales, strict=True)
        return torch.stack([relative_mse(*level) for level in levels]).mean(0)


def _looked_at(
    features: tuple[Tensor, Tensor], transform: Transform, grid: Grid, focus: Focus | None
) -> tuple[Tensor, Tensor]:
    """M' o T and F', of the whole grid or of the part in focus, where it is looked at."""
    moving, fixed = features
    if focus is None:
        return warp(moving, transform, grid), fixed
    part = fixed[(slice(None), slice(None), *focus.voxels)]
    return warp(moving, transform, grid, focus.grid) * focus.mask, part * focus.mask


def image_refinement(
    features: tuple[Tensor, Tensor],
    transform: Transform,
    grid: Grid,
    focus: Focus | None = None,
    similarity: str = "ncc",
    window_vox: int = WINDOW,
) -> Float[Tensor, "b"]:
    """D(M o T, F): two images compared by a similarity, at test time as in training; local NCC has a window."""
    moving, fixed = features
    mask = None
    if focus:
        mask, fixed = focus.mask, fixed[(slice(None), slice(None), *focus.voxels)]
    compare = _similarity(similarity, window_vox)
    return compare(warp(moving, transform, grid, focus.grid if focus else grid), fixed, mask=mask)


def _similarity(name: str, window_vox: int) -> Dissimilarity:
    """What images are compared by; of all similarities, local NCC alone has windows."""
    return dissimilarity(name, **({"window_vox": window_vox} if name == "local_ncc" else {}))


def at_test_time(model: Any, window_vox: int = WINDOW, levels: int = LEVELS) -> Callable[..., Float[Tensor, "b"]]:
    """The loss that refinement descends for a model: its images by their similarity, or its maps by their pyramid."""
    similarity = getattr(getattr(model, "config", None), "similarity", None)
    if similarity:
        return partial(image_refinement, similarity=similarity, window_vox=window_vox)
    return MapLoss(levels)


def regulariser(steps: tuple[Step, ...], grid: Grid, bending: float) -> Terms:
    """Bending energy of every step that bends, times its weight; nothing where the weight is 0.

    Steps that are added up are one displacement in the end, and it is the bending of that which counts.
    """
    if bending == 0:
        return {}
    if any(step.join is not composed for step in steps):
        built = [assemble(steps)]
    else:
        built = [step.transform for step in steps]
    energies = [e for transform in built if (e := _bending(transform, grid)) is not None]
    return {"bending": bending * torch.stack(energies).sum(0)} if energies else {}


def total(terms: Terms) -> Float[Tensor, "b"]:
    """The sum of all terms."""
    return torch.stack(list(terms.values())).sum(0)


def _stages(result: Result, loss: Callable[[Transform], Tensor]) -> Float[Tensor, "b"]:
    """The loss after each step, averaged: a coarse step that is judged by the finest alone learns slowly."""
    return torch.stack([loss(result.up_to(count)) for count in range(1, len(result.steps) + 1)]).mean(0)


def averaged(maps: Tensor, factor: int) -> Tensor:
    """Means over cubes of ``factor`` voxels: the maps on ``grid.coarsened(factor)``."""
    return maps if factor == 1 else {2: F.avg_pool2d, 3: F.avg_pool3d}[maps.ndim - 2](maps, factor)


def _bending(transform: Transform, grid: Grid) -> Float[Tensor, "b"] | None:
    if isinstance(transform, Affine):
        return None
    if isinstance(transform, FreeForm):
        return regularity.bending_energy_spline(transform.coefficients, transform.grid, grid)
    own = transform.grid if isinstance(transform, Dense | Velocity) else grid
    return regularity.bending_energy(displacement(transform, own), own)
