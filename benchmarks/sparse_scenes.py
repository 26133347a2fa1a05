"""What the benchmark of sparse matches reconstructs: the real lungs' keypoints, and a breathing phantom.

A scene has pairs of three kinds, of different people: some to train a kernel on, some to choose the parameters of the
classical methods on, some to measure on. A problem is what one method is given and asked for, with the truth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regteach import points_task
from regteach.data.lungs import KeypointPair
from regteach.data.matches import Faults, corrupted, random_field
from regteach.data.thorax import ThoraxCase, generate_patient, thorax_grid
from regteach.grid import Grid
from regteach.points_task import Drawn, PointsRecipe, PointsTask
from regteach.sampling import gradient, grid_points, sample, smooth
from regteach.training import Settings

SPLITS = ("train", "validation", "test")
FEATURES = 4  # of the phantom's fixed image
STAND_IN_GRID = Grid((201, 201, 201))
IN_LUNGS = 0.7  # share of the phantom's keypoints that lie there; the others are in the body around
Features = Callable[[Tensor], Tensor]  # points "n 3" -> "n c"


@dataclass(frozen=True, eq=False)
class Problem:
    """Matches, queries and truth; and image features, where there are images."""

    drawn: Drawn
    features: Features | None = None


Draw = Callable[[Faults, int], Problem]  # the same seed holds out the same points and draws the same faults


@dataclass(frozen=True, eq=False)
class Scene:
    """A data set of the benchmark.

    Args:
        name: for the tables.
        origin: what is real, and what the truth is.
        pairs: for "validation" and "test", one function a pair that draws a problem.
        item: a training item by its number.
        features: channels of the image features; 0 where there are no images.
    """

    name: str
    origin: str
    pairs: dict[str, list[Draw]]
    item: Callable[[int], Problem]
    features: int = 0


# ---- lungs ----


def lungs(pairs: Sequence[KeypointPair] | None = None) -> Scene:
    """The keypoint tables: a fifth of each held out.

    Raises:
        FileNotFoundError: if they have not been fetched.
    """
    task = PointsTask(_recipe(), pairs)

    def draw(pair: KeypointPair, faults: Faults, seed: int) -> Problem:
        return Problem(points_task.case(pair, faults, seed))

    return Scene(
        "lungs",
        f"{len(task.pairs)} real pairs, {len(task.splits['test'])} of them measured, a fifth of the points held out; "
        "these were found by machine too, and are not without error.",
        {name: [partial(draw, task.pairs[i]) for i in task.splits[name]] for name in SPLITS[1:]},
        lambda number: Problem(task.item(number)),
    )


def _recipe() -> PointsRecipe:
    return next(recipe for recipe in points_task.RECIPES if recipe.name == "kernel-points")


def stand_in(count: int = 14, points: int = 120) -> list[KeypointPair]:
    """Pairs with a smooth random motion, for the quick mode."""
    generator, pairs = torch.Generator().manual_seed(0), []
    for number in range(count):
        fixed = 200 * torch.rand(points, 3, generator=generator)
        motion = 8 * random_field(fixed, 3, 80.0, generator)
        pairs.append(KeypointPair(f"nobody {number}", fixed[None], (fixed + motion)[None], STAND_IN_GRID))
    return pairs


# ---- phantom ----


def phantom(patients: Sequence[int] = (4, 2, 3), spacing_mm: float = 6.0, points: int = 1024) -> Scene:
    """A drawn thorax that breathes: keypoints in the lungs and around them, judged at forks of the vessels.

    Args:
        patients: how many to train, validate and test.
        spacing_mm: of the images that the features come from.
        points: keypoints.
    """
    grid = thorax_grid(spacing_mm)
    found: list[ThoraxCase] = [generate_patient(grid, seed=0, index=k) for k in range(sum(patients))]
    read = [fixed_features(case) for case in found]
    problems = [partial(_phantom_problem, case, reader, points) for case, reader in zip(found, read, strict=True)]
    starts = [sum(patients[:k]) for k in range(4)]
    parts = {name: problems[starts[k] : starts[k + 1]] for k, name in enumerate(SPLITS)}

    def item(number: int) -> Problem:
        generator = torch.Generator().manual_seed(number)
        size = torch.rand(4, generator=generator).square().tolist()
        worst = points_task.WORST
        faults = Faults(*(most * s for most, s in zip(
            (worst.noise_mm, worst.outliers, worst.drift_mm, worst.uneven), size, strict=True
        )))  # fmt: skip
        chosen = parts["train"][int(torch.randint(len(parts["train"]), (), generator=generator))]
        whole = chosen(faults, 10_000 + number)
        count = int(torch.randint(points_task.FEWEST_GIVEN, points_task.MOST_GIVEN, (), generator=generator))
        asked, given = points_task.ASKED, whole.drawn
        fewer = Drawn(given.keypoints[:count], given.displacements[:count], given.query[:asked], given.truth[:asked])
        return Problem(fewer, whole.features)

    origin = (
        f"{sum(patients)} synthetic patients, {patients[-1]} of them measured, {points} keypoints, 30 % of them "
        "outside of the lungs; exact truth."
    )
    return Scene("phantom", origin, {name: list(parts[name]) for name in SPLITS[1:]}, item, FEATURES)


def _phantom_problem(case: ThoraxCase, features: Features, points: int, faults: Faults, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    places, lung = grid_points(case.grid).flatten(0, -2), case.fixed_mask.flatten()
    body = (case.fixed_labels.flatten() > 0) & ~lung
    inside = round(IN_LUNGS * points)
    chosen = [_some(places[mask], n, generator) for mask, n in ((lung, inside), (body, points - inside))]
    # Between voxels, so that no two of one image are on a lattice; and in any order.
    keypoints = torch.cat(chosen)[torch.randperm(sum(map(len, chosen)), generator=generator)]
    keypoints = keypoints + torch.tensor(case.grid.spacing) * (torch.rand(keypoints.shape, generator=generator) - 0.5)
    exact = case.transform(keypoints[None])[0] - keypoints
    given, _ = corrupted(keypoints, exact.float(), faults, generator)
    order = torch.randperm(case.fixed_landmarks_mm.shape[1], generator=generator)[:400]
    query, moving = case.fixed_landmarks_mm[0, order], case.moving_landmarks_mm[0, order]
    return Problem(Drawn(keypoints, given, query, moving - query), features)


def fixed_features(case: ThoraxCase) -> Features:
    """What the semantics head sees: grey value sharp, smooth and smoother, and the size of its gradient."""
    image = case.fixed / 500
    maps = [image, *(smooth(image, k * case.grid.spacing[0], case.grid) for k in (1.5, 3.0))]
    steep = gradient(maps[1], case.grid).norm(dim=-1) * 10
    channels = torch.cat([*maps, steep], 1)
    return lambda points: sample(channels, points[None], case.grid)[0].mT


def _some(places: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return places[torch.randint(len(places), (count,), generator=generator)]


# ---- training on a scene ----


class SceneTask:
    """A kernel trained on a scene's items, for a fixed number of steps: nothing is chosen by validation.

    Args:
        scene: on what.
        build: makes the untrained kernel.
        settings: of the loop.
    """

    def __init__(self, scene: Scene, build: Callable[[], torch.nn.Module], settings: Settings) -> None:
        self.scene, self.build, self.settings = scene, build, settings

    def loss(self, model: torch.nn.Module, items: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Logarithm of the mean error at the queries."""
        errors = []
        for number in items:
            problem = self.scene.item(self.settings.seed * 1_000_003 + number)
            found = field(model, problem)(problem.drawn.query)
            off = (found - problem.drawn.truth).square().sum(1).clamp_min(1e-12).sqrt()
            errors.append(off.clamp_max(20.0).mean().log())
        return {"log_error": torch.stack(errors)}

    def validate(self, model: torch.nn.Module, device: torch.device) -> dict[str, float]:
        """The steps alone."""
        return {"trained": 1.0}

    def picture(self, model: torch.nn.Module, device: torch.device) -> bytes | None:
        """Nothing."""
        return None


def field(kernel: Any, problem: Problem) -> Callable[[Tensor], Tensor]:
    """A kernel's answer as a function of points; image features go in only where it has a head for them."""
    given = problem.drawn
    features = problem.features if kernel.config.semantics else None
    at: Callable[[Tensor], Tensor] = kernel.reconstruction(given.keypoints, given.displacements, features).at
    return at
