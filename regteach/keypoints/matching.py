"""From costs to matches: neighbours agree, the way back is checked, and every match says how far it can be trusted.

Convention: fixed keypoints ``n d`` in mm, each with its match ``n d`` in moving mm; moving = fixed + displacement.
Costs are divided by their contrast, the mean over the keypoints of mean minus least cost, so that no setting depends on
the features' unit. A method of matching is plain (each keypoint alone), mean_field or tree (see `agreement`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regteach.grid import Grid
from regteach.keypoints.agreement import mean_field, tree_marginals
from regteach.keypoints.costs import check_points, cost_volume, search_window, soft_argmin
from regteach.sampling import Mapping, check_image
from regteach.similarity import mind_descriptor

# Smoothness of each method, in contrasts per mm. Chosen on textured 3D phantoms with known smooth and sliding motion.
METHODS = {"plain": 0.0, "mean_field": 0.03, "tree": 0.1}
Features = Callable[[Tensor], Tensor]  # image "1 c *grid" -> features "1 k *grid"


@dataclass(frozen=True)
class Matches:
    """Points of the fixed image and where they are found in the moving image.

    Args:
        fixed_mm: ``n d``.
        moving_mm: ``n d``; moving = fixed + displacement.
        confidence: ``n`` numbers in [0, 1]: exp(-(e^2 + s^2) / (2 t^2)) with e the forward-backward error, s the spread
            of the keypoint's own costs and t the tolerance, all in mm. 1 says that one candidate was far cheaper than
            all others and that the search back from it ended where it had begun; at e^2 + s^2 = t^2 it is 0.61, at
            three times the tolerance 0.01. It ranks matches and is not the probability that one is right.

    Raises:
        ValueError: if the shapes do not agree, a number is not finite, or a confidence is not in [0, 1].
    """

    fixed_mm: Float[Tensor, "n d"]
    moving_mm: Float[Tensor, "n d"]
    confidence: Float[Tensor, "n"]

    def __post_init__(self) -> None:
        shape = self.fixed_mm.shape
        if self.fixed_mm.ndim != 2 or self.moving_mm.shape != shape or self.confidence.shape != shape[:1]:
            raise ValueError(
                f"Matches are number x axes, twice, and a confidence each, not {tuple(shape)}, "
                f"{tuple(self.moving_mm.shape)} and {tuple(self.confidence.shape)}."
            )
        if not all(bool(x.isfinite().all()) for x in (self.fixed_mm, self.moving_mm, self.confidence)):
            raise ValueError("The matches hold numbers that are not finite.")
        if bool(((self.confidence < 0) | (self.confidence > 1)).any()):
            raise ValueError("A confidence lies between 0 and 1, but one of these does not.")

    def __len__(self) -> int:
        return len(self.fixed_mm)

    @property
    def displacement_mm(self) -> Float[Tensor, "n d"]:
        """Moving minus fixed."""
        return self.moving_mm - self.fixed_mm

    def where(self, keep: Bool[Tensor, "n"]) -> "Matches":
        """The matches that are kept, in their order, such as ``matches.where(matches.confidence > 0.5)``."""
        return Matches(self.fixed_mm[keep], self.moving_mm[keep], self.confidence[keep])


@dataclass(frozen=True)
class Search:
    """How matches are searched.

    Args:
        radius_mm, step_mm: the window of :func:`~regteach.keypoints.search_window`.
        patch_radius_vox: of :func:`~regteach.keypoints.cost_volume`.
        method: "plain", "mean_field" or "tree".
        smoothness: weight of the neighbours, in contrasts per mm; where left out 0.03 for "mean_field", whose keypoints
            have more neighbours, and 0.1 for "tree"; not used by "plain".
        temperature: of the soft-argmin, in contrasts.
        truncation: most that a disagreement of two neighbours costs in the tree, in contrasts: lets motion slide.
        neighbours, iterations: of :func:`mean_field`.
        chunk: of :func:`~regteach.keypoints.cost_volume`.
    """

    radius_mm: float | tuple[float, ...]
    step_mm: float | tuple[float, ...] | None = None
    patch_radius_vox: int = 1
    method: str = "mean_field"
    smoothness: float | None = None
    temperature: float = 0.05
    truncation: float | None = None
    neighbours: int = 8
    iterations: int = 10
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"A method of matching is one of {', '.join(METHODS)}, not {self.method!r}.")


def match(
    fixed: Float[Tensor, "1 c *fixed"],
    moving: Float[Tensor, "1 c *moving"],
    grid_fixed: Grid,
    grid_moving: Grid,
    points_mm: Float[Tensor, "n d"],
    search: Search,
    transform: Mapping | None = None,
    features: Features | None = mind_descriptor,
    tolerance_mm: float | None = None,
) -> Matches:
    """Find keypoints of the fixed image in the moving image.

    Args:
        fixed: one image, or its features.
        moving: the other.
        grid_fixed: where the fixed voxels sit.
        grid_moving: where the moving voxels sit.
        points_mm: keypoints in the fixed image; (0, d) gives no matches.
        search: window, patch and method.
        transform: fixed to moving points, found earlier: the search starts where it leads, and what is found is the
            residual to it.
        features: from an image to what is compared; None if ``fixed`` and ``moving`` hold features already.
        tolerance_mm: distance at which the confidence begins to fall; where left out, the diagonal of a fixed voxel.

    Raises:
        ValueError: if a keypoint lies outside of the image, shapes do not fit, or a number is not finite. A constant
            image is no error: every candidate costs the same, the displacement is 0 and the confidence near 0.
    """
    check_image(fixed, grid_fixed)
    check_image(moving, grid_moving)
    for name, image in (("fixed", fixed), ("moving", moving)):
        if not bool(image.isfinite().all()):
            raise ValueError(f"The {name} image holds numbers that are not finite, so nothing can be found in it.")
    check_points(points_mm, grid_fixed)
    tolerance_mm = float(np.linalg.norm(grid_fixed.spacing)) if tolerance_mm is None else tolerance_mm
    if not tolerance_mm > 0:
        raise ValueError(f"The tolerance is a distance in mm and must be positive, but it is {tolerance_mm}.")
    if features is not None:
        fixed, moving = features(fixed), features(moving)
    start = points_mm if transform is None else transform(points_mm[None])[0]
    found, spread = find(fixed, moving, grid_fixed, grid_moving, points_mm, start, search)
    error = forward_backward(fixed, moving, grid_fixed, grid_moving, points_mm, found, start, search)
    confidence = torch.exp(-(error.square() + spread.square()) / (2 * tolerance_mm**2))
    return Matches(points_mm, found, confidence)


def find(
    fixed_features: Tensor,
    moving_features: Tensor,
    grid_fixed: Grid,
    grid_moving: Grid,
    points_mm: Float[Tensor, "n d"],
    start_mm: Float[Tensor, "n d"],
    search: Search,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n"]]:
    """One way of :func:`match`: costs about the starts, regularised, and their soft-argmin.

    Returns:
        Moving points, and the spread of each keypoint's own costs, before neighbours are heard, mm.
    """
    candidates = search_window(grid_fixed, search.radius_mm, search.step_mm).to(points_mm)
    cost = cost_volume(
        fixed_features,
        moving_features,
        grid_fixed,
        points_mm,
        candidates,
        search.patch_radius_vox,
        lambda _: start_mm[None],
        grid_moving,
        search.chunk,
    )
    cost = cost / _contrast(cost, fixed_features)
    # The spread is that of the keypoint's own costs: neighbours sharpen the choice also where there is nothing to see.
    _, spread = soft_argmin(cost, candidates, search.temperature)
    smoothness = METHODS[search.method] if search.smoothness is None else search.smoothness
    if search.method == "mean_field":
        options = (smoothness, search.temperature, search.neighbours, search.iterations)
        cost = mean_field(cost, candidates, points_mm, *options)
    elif search.method == "tree":
        cost = tree_marginals(cost, candidates, points_mm, smoothness, search.truncation)
    shift, _ = soft_argmin(cost, candidates, search.temperature)
    return start_mm + shift.to(start_mm), spread


def forward_backward(
    fixed_features: Tensor,
    moving_features: Tensor,
    grid_fixed: Grid,
    grid_moving: Grid,
    points_mm: Float[Tensor, "n d"],
    moving_mm: Float[Tensor, "n d"],
    start_mm: Float[Tensor, "n d"],
    search: Search,
) -> Float[Tensor, "n"]:
    """How far from its keypoint the search back from a match ends, mm.

    The way back is the same search with the images exchanged. It starts at the match minus the displacement with which
    the way there had started, so it needs no inverse of a transform, and both ways search as far.

    Args:
        fixed_features, moving_features, grid_fixed, grid_moving: as in :func:`match`.
        points_mm: keypoints.
        moving_mm: their matches.
        start_mm: where the search for the matches started.
        search: as in :func:`match`.
    """
    back = moving_mm - (start_mm - points_mm)
    step = grid_fixed.spacing if search.step_mm is None else search.step_mm  # the same window on both ways
    search = replace(search, step_mm=step)
    found, _ = find(moving_features, fixed_features, grid_moving, grid_fixed, moving_mm, back, search)
    return (found - points_mm).norm(dim=-1)


def _contrast(cost: Tensor, features: Tensor) -> Tensor:
    """Mean over the keypoints of mean minus least cost; 1 where the costs differ by no more than rounding."""
    if len(cost) == 0:
        return cost.new_ones(())
    contrast = (cost.mean(1) - cost.amin(1)).mean().detach()
    rounding = (16 * torch.finfo(cost.dtype).eps) ** 2 * features.detach().square().mean()
    return torch.where(contrast > rounding, contrast, 1)
