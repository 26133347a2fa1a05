"""Training a learned kernel on points alone, without images: displacements at some points from those at others.

Of each pair a fifth of the points is held out; the others, up to 1,024, are given to the kernel with faults of random
size, and it is asked for the ones held out. These were found by machine as well and are not without error, so an error
here is a little larger than the true one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regteach import plotting
from regteach.checkpoints import Model, network
from regteach.data.lungs import KeypointPair, load_lung_keypoints
from regteach.data.matches import Faults, corrupted
from regteach.nets.kernel import KernelConfig
from regteach.ops.classical import thin_plate_spline
from regteach.refinement import Refinement
from regteach.training import Settings

POINTS: dict[str, Callable[[], list[KeypointPair]]] = {"lung-keypoints": load_lung_keypoints}
# Pairs in the order of the files: the first ones train, the next validate, the last test.
SPLIT = {"train": 9, "validation": 2, "test": 3}
HELD_OUT, MOST_POINTS = 0.2, 1024
# In training fewer are given and asked for: ten times as fast, and the kernel meets sparse and dense ones.
FEWEST_GIVEN, MOST_GIVEN, ASKED = 256, 640, 200
AS_GIVEN = 0.15  # share of training items without any fault added
# What the matches of a machine are like, from good to bad; the weights are judged by the mean over all of them.
LEVELS: dict[str, Faults] = {
    "as_given": Faults(),
    "good": Faults(noise_mm=0.5, outliers=0.02, drift_mm=0.5, uneven=0.5),
    "usual": Faults(noise_mm=1.0, outliers=0.1, drift_mm=1.0, uneven=0.7),
    "bad": Faults(noise_mm=2.0, outliers=0.2, drift_mm=2.0, uneven=0.7),
}
WORST = Faults(noise_mm=4.0, outliers=0.3, drift_mm=3.0, uneven=1.0)
FIRST = 3  # test cases that a card names one by one

Method = Callable[[Tensor, Tensor, Tensor], Tensor]  # keypoints, displacements, queries -> displacements there
CLASSICAL: dict[str, Method] = {
    "start": lambda y, d, x: torch.zeros_like(x),
    "thin plate": lambda y, d, x: thin_plate_spline(x, y, d),
    "linear radial basis": lambda y, d, x: thin_plate_spline(x, y, d, kernel="linear"),
}


@dataclass(frozen=True)
class PointsRecipe:
    """One training on points.

    Args:
        name: also of the weights.
        data: a key of :data:`POINTS`.
        config: of the kernel.
        settings: of the loop.
        worst: the largest faults that are drawn in training; small ones are drawn more often.
        clamp_mm: an error counts at most this much.
        refinement: none: there are no images to refine on.
    """

    name: str
    data: str
    config: KernelConfig
    settings: Settings
    worst: Faults = WORST
    clamp_mm: float = 20.0
    refinement: Refinement = Refinement(steps=0)


RECIPES = (
    PointsRecipe(
        "kernel-points",
        "lung-keypoints",
        # The spline bends for every match; what it leaves is small, and a plain mean of it is enough.
        KernelConfig(width=32, rounds=0, degree=0, spline=True),
        Settings(steps=1400, batch=1, rate=2e-3, warmup=30, decay=True, weight_decay=1e-2, validate_every=200),
    ),
)


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a kernel is given, and what it is asked for: positions and displacements ``n 3``, mm."""

    keypoints: Float[Tensor, "m 3"]
    displacements: Float[Tensor, "m 3"]
    query: Float[Tensor, "n 3"]
    truth: Float[Tensor, "n 3"]


class PointsTask:
    """Training of a learned kernel on pairs of point sets: what ``training.train`` and ``runs.run`` need to know.

    Args:
        recipe: what to do.
        pairs: on what; the recipe's own data where left out.
    """

    calls_forward = False  # a kernel has no forward: its field is computed once, and read at any points

    def __init__(self, recipe: PointsRecipe, pairs: Sequence[KeypointPair] | None = None) -> None:
        self.recipe = recipe
        if recipe.config.semantics or recipe.config.dim != 3:
            raise ValueError(f"{recipe.name} learns from points in 3D alone: no semantics, and dim is 3.")
        self.pairs = load_points(recipe.data) if pairs is None else list(pairs)
        self.splits = split(self.pairs)

    def build(self) -> nn.Module:
        """An untrained kernel."""
        return network(self.recipe.config)

    def loss(self, model: nn.Module, items: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Logarithm of the mean error at the points held out, mm: each per cent counts alike, easy or hard."""
        errors = []
        for number in items:
            drawn = self.item(number)
            found = _read(model, drawn, device)
            error = (found - drawn.truth.to(device)).square().sum(1).clamp_min(1e-12).sqrt()
            errors.append(error.clamp_max(self.recipe.clamp_mm).mean().log())
        return {"log_error": torch.stack(errors)}

    def item(self, number: int) -> Drawn:
        """Training item of this number: a random training pair, with faults of random size, augmented."""
        generator = torch.Generator().manual_seed(self.recipe.settings.seed * 1_000_000_007 + number)
        members = self.splits["train"]
        pair = self.pairs[members[int(torch.randint(len(members), (), generator=generator))]]
        size, worst = torch.rand(4, generator=generator).square(), self.recipe.worst
        sizes: list[float] = (size * (torch.rand((), generator=generator) >= AS_GIVEN)).tolist()
        faults = Faults(
            worst.noise_mm * sizes[0], worst.outliers * sizes[1], worst.drift_mm * sizes[2], worst.uneven * sizes[3],
            worst.outlier_mm, float(10 + 40 * torch.rand((), generator=generator)),
        )  # fmt: skip
        item = drawn(pair, faults, generator)
        count = int(torch.randint(FEWEST_GIVEN, MOST_GIVEN, (), generator=generator))
        fewer = Drawn(item.keypoints[:count], item.displacements[:count], item.query[:ASKED], item.truth[:ASKED])
        return augmented(fewer, generator)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Minus the mean over all levels, and the mean error of each, mm, on validation pairs."""
        with torch.no_grad():
            found = errors(partial(_reconstructed, model, device), [self.pairs[i] for i in self.splits["validation"]])
        levels = {level: _mean(values) for level, values in found.items()}
        return {"minus_error_mm": -_mean(list(levels.values()))} | levels

    def picture(self, model: nn.Module, device: torch.device) -> bytes | None:
        """Errors at the points held out of the first validation pair, seen from the front."""
        pair = self.pairs[self.splits["validation"][0]]
        drawn = case(pair, LEVELS["usual"], 0)
        spline = CLASSICAL["linear radial basis"](drawn.keypoints, drawn.displacements, drawn.query)
        found = {"start": torch.zeros_like(drawn.query), "linear radial basis": spline}
        found["learned kernel"] = _reconstructed(model, device, drawn.keypoints, drawn.displacements, drawn.query)
        figure, axes = plotting.axes(1, len(found))
        for ax, (name, value) in zip(axes, found.items(), strict=True):
            error = (value - drawn.truth).norm(dim=1)
            ax.scatter(drawn.query[:, 0], drawn.query[:, 2], 4, error, cmap=plotting.MAGNITUDE, vmin=0, vmax=10)
            ax.set_title(f"{name}: {float(error.mean()):.1f} mm")
            ax.set_aspect("equal")
            ax.set_axis_off()
        return plotting.png(figure)

    def figures(self, model: Model) -> dict[str, Any]:
        """The card's part: mean error at held-out points of test pairs, for all levels, beside two splines."""
        return {
            "data": f"Real: {len(self.pairs)} lung pairs, points found by machine ({self.recipe.data}); their faults "
            "are synthetic, and known, beside those that they had.",
            "people": {name: len(members) for name, members in self.splits.items()},
            "test_pairs": len(self.splits["test"]),
            "error_mm": _table(model, self._test_pairs()),
            "first_pairs": _one_by_one(model, self._test_pairs()),
        }

    @classmethod
    def evaluate(cls, model: Model, pairs: int = 50, steps: int | None = None) -> dict[str, dict[str, float]]:
        """Mean error, mm, at held-out points of test pairs: each method at each level of faults.

        Raises:
            ValueError: if no pair is asked for, or a refinement.
        """
        if steps:
            raise ValueError(f"{model.name} works on points alone: there are no images to refine on.")
        chosen = _test_pairs(model)[: max(0, pairs)]
        if not chosen:
            raise ValueError(f"{pairs} of the {SPLIT['test']} test pairs were asked for.")
        return _table(model, chosen)

    @classmethod
    def first_pairs(cls, model: Model) -> list[dict[str, Any]]:
        """Errors of the first test pairs, one by one, mm."""
        return _one_by_one(model, _test_pairs(model))

    def _test_pairs(self) -> list[KeypointPair]:
        return [self.pairs[i] for i in self.splits["test"]]


def load_points(name: str) -> list[KeypointPair]:
    """Pairs by the name of the data.

    Raises:
        FileNotFoundError: if they have not been fetched; the message has the command.
        ValueError: for an unknown name.
    """
    if name not in POINTS:
        raise ValueError(f"There are no points {name!r}; there are {', '.join(POINTS)}.")
    return POINTS[name]()


def split(pairs: Sequence[KeypointPair]) -> dict[str, tuple[int, ...]]:
    """Which pairs train, validate and test, in the order of the files.

    Raises:
        ValueError: if there are fewer than there should be.
    """
    if len(pairs) < sum(SPLIT.values()):
        raise ValueError(f"The lung keypoints are {sum(SPLIT.values())} pairs, but {len(pairs)} are here.")
    ends = [sum(list(SPLIT.values())[: k + 1]) for k in range(len(SPLIT))]
    return {name: tuple(range(end - n, end)) for (name, n), end in zip(SPLIT.items(), ends, strict=True)}


def drawn(pair: KeypointPair, faults: Faults, generator: torch.Generator) -> Drawn:
    """A fifth of the points held out at random; the others, up to 1,024, with faults."""
    points, moved = pair.fixed[0], (pair.moving - pair.fixed)[0]
    order = torch.randperm(len(points), generator=generator)
    held = max(1, math.floor(HELD_OUT * len(points)))
    asked, kept = order[:held], order[held:][:MOST_POINTS]
    found, _ = corrupted(points[kept], moved[kept], faults, generator)
    return Drawn(points[kept], found, points[asked], moved[asked])


def case(pair: KeypointPair, faults: Faults, seed: int) -> Drawn:
    """The same draw anywhere: which points are held out depends on the seed alone, not on the faults."""
    return drawn(pair, faults, torch.Generator().manual_seed(seed))


def augmented(given: Drawn, generator: torch.Generator) -> Drawn:
    """Turned any way, or mirrored, larger or smaller, with a larger or smaller motion and a small affine one more."""
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    size, motion = (float(torch.rand((), generator=generator)) for _ in range(2))
    turn, motion = turn * (0.7 + 0.6 * size), 0.5 + 1.5 * motion
    slope, middle = 0.05 * torch.randn(3, 3, generator=generator), given.keypoints.mean(0)

    def moved(points: Tensor, displacements: Tensor) -> Tensor:
        return (motion * displacements + (points - middle) @ slope) @ turn

    return Drawn(
        given.keypoints @ turn, moved(given.keypoints, given.displacements), given.query @ turn,
        moved(given.query, given.truth),
    )  # fmt: skip


def errors(
    method: Method, pairs: Sequence[KeypointPair], levels: Mapping[str, Faults] = LEVELS, draws: int = 2
) -> dict[str, list[float]]:
    """Mean error at held-out points, mm: for each level one number a pair, over several draws.

    Args:
        method: keypoints, displacements, queries to displacements.
        pairs: on which.
        levels: faults by name.
        draws: seeds 0, 1, ... of what is held out and of the faults.
    """
    found: dict[str, list[float]] = {}
    for level, faults in levels.items():
        for pair in pairs:
            each = [case(pair, faults, seed) for seed in range(draws)]
            means = [float((method(d.keypoints, d.displacements, d.query) - d.truth).norm(dim=1).mean()) for d in each]
            found.setdefault(level, []).append(_mean(means))
    return found


def _test_pairs(model: Model) -> list[KeypointPair]:
    pairs = load_points(model.card["recipe"]["data"])
    return [pairs[i] for i in split(pairs)["test"]]


def _table(model: Model, pairs: Sequence[KeypointPair]) -> dict[str, dict[str, float]]:
    methods = CLASSICAL | {"learned kernel": _method(model)}
    return {
        name: {level: _mean(values) for level, values in errors(method, pairs).items()}
        for name, method in methods.items()
    }


def _one_by_one(model: Model, pairs: Sequence[KeypointPair]) -> list[dict[str, Any]]:
    chosen = pairs[:FIRST]
    found = errors(_method(model), chosen)
    return [
        {"pair": pair.name} | {level: values[k] for level, values in found.items()} for k, pair in enumerate(chosen)
    ]


def _method(model: Model) -> Method:
    return partial(_reconstructed, model.network, next(model.network.parameters()).device)


def _read(model: Any, given: Drawn, device: torch.device) -> Tensor:
    field: Any = model.reconstruction(given.keypoints.to(device), given.displacements.to(device))
    at: Tensor = field.at(given.query.to(device))
    return at


def _reconstructed(model: Any, device: torch.device, keypoints: Tensor, displacements: Tensor, query: Tensor) -> Tensor:
    found: Tensor = model.reconstruct(keypoints.to(device), displacements.to(device), query.to(device)).cpu()
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
