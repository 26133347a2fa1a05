"""Training a network on pairs of a cohort: people on one grid, with structures that some losses and all figures use."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regteach import contrasts, objectives, plotting, regularity
from regteach.checkpoints import Model, load, network
from regteach.data.augment import augmented
from regteach.data.cohort import Cohort
from regteach.data.named import load_cohort
from regteach.evaluation import PairFigures, figures_of, mean_dice, measure, pairs_to_test
from regteach.grid import Grid
from regteach.nets.blocks import fast_layout
from regteach.nets.georeg import GeoRegConfig
from regteach.nets.istn import ISTNConfig
from regteach.recipes import Recipe
from regteach.refinement import Refinement
from regteach.sampling import warp
from regteach.transforms import Identity

FIRST = 3  # test pairs that a card names one by one
MOST_NAMED = 300  # people: a card names no more than these


class CohortTask:
    """Training of a network on pairs of a cohort: what ``training.train`` needs to know.

    Args:
        recipe: what to do.
        cohort: on what; the recipe's own data where left out.
        validation_pairs: how many pairs of validation people judge the weights; where one person alone is kept for
            that, the pairs are all those of that person with people who are trained on.

    Raises:
        ValueError: if the recipe does not fit the cohort, or there is no pair to train on or to judge by.
    """

    calls_forward = True

    def __init__(self, recipe: Recipe, cohort: Cohort | None = None, validation_pairs: int = 20) -> None:
        self.recipe = recipe
        self.cohort = load_cohort(recipe.data) if cohort is None else cohort
        self._check()
        self.seen, self.grid = _middle(self.cohort.grid, recipe.middle)
        self.pairs = self.cohort.pairs("train")
        available = self.cohort.pairs("validation")
        self.judged = self.cohort.pairs("validation", min(validation_pairs, len(available)), seed=0)
        self.judged = self.judged or with_trained_people(self.cohort)
        if not self.judged:
            raise ValueError(f"{self.cohort.name} has nobody to judge the weights by: no validation people.")
        if not bool(self.cohort.labels[sorted({i for pair in self.judged for i in pair})].any()):
            raise ValueError(
                f"No validation image of {self.cohort.name} shows a structure, so none can judge the weights."
            )

    def _check(self) -> None:
        config, cohort, variant = self.recipe.config, self.cohort, self.recipe.variant
        if variant not in objectives.ISTN:
            raise ValueError(f"A variant of ISTN is one of {', '.join(objectives.ISTN)}, not {variant!r}.")
        if not isinstance(config, ISTNConfig) and (variant != "unsupervised" or self.recipe.coarsen != 1):
            raise ValueError(f"{self.recipe.name} learns from the images alone: unsupervised, and coarsen is 1.")
        if self.recipe.imitate and not (isinstance(config, GeoRegConfig) and config.encoders == 2 and cohort.twins):
            raise ValueError(f"{self.recipe.name} has no second encoder, or {cohort.name} no twins, to imitate by.")
        if self.recipe.coarse_first and not isinstance(config, GeoRegConfig):
            raise ValueError(f"{self.recipe.name} has no levels that could join late: only those of a GeoReg can.")
        if self.recipe.middle and not isinstance(config, GeoRegConfig):
            raise ValueError(f"{self.recipe.name} trains on images of one size; only a GeoReg looks at their middle.")
        if self.recipe.weights and isinstance(config, ISTNConfig):
            raise ValueError(f"{self.recipe.name} is not judged level by level, so its levels have no weights.")
        if isinstance(config, ISTNConfig) and config.itn and config.structures != cohort.soi.shape[1]:
            raise ValueError(
                f"{self.recipe.name} draws {config.structures} structures, but {cohort.name} has {cohort.soi.shape[1]}."
            )
        if config.channels != cohort.images.shape[1]:
            raise ValueError(
                f"{self.recipe.name} reads {config.channels} channels, but {cohort.name} has {cohort.images.shape[1]}."
            )
        if self.recipe.imitate and self.recipe.augmentation.synthetic:
            raise ValueError(f"{self.recipe.name} imitates what it sees in a twin: no contrasts are drawn anew.")
        if self.recipe.weights and isinstance(config, GeoRegConfig):
            levels, begin = len(config.widths), len(self.recipe.coarse_first)
            if len(self.recipe.weights) != levels or not sum(self.recipe.weights[begin:]) > 0:
                raise ValueError(
                    f"{self.recipe.name} has {levels} levels and needs a weight for each, and one above 0 among those "
                    "that are trained from the start."
                )
        if isinstance(self.recipe.bending, tuple):
            levels = len(config.widths) if isinstance(config, GeoRegConfig) else 0
            if len(self.recipe.bending) != levels:
                raise ValueError(
                    f"{self.recipe.name} has {len(self.recipe.bending)} weights of the bending energy: it takes "
                    + (f"one, or one for each of its {levels} levels." if levels else "one.")
                )
        if self.recipe.bending and isinstance(config, GeoRegConfig):
            coarsest = config.grid.coarsened(2 ** (len(config.widths) - 1))
            if min(coarsest.shape) < regularity.LEAST_TO_BEND:
                raise ValueError(
                    f"The coarsest of {self.recipe.name}'s {len(config.widths)} levels has {coarsest.shape} voxels: its"
                    f" bending needs {regularity.LEAST_TO_BEND} along each axis, so take fewer levels, or no bending."
                )
        if not cohort.pairs("train"):
            raise ValueError(f"{cohort.name} has no pair of two people to train on.")
        shown = cohort.soi[list(cohort.splits["train"])].flatten(2).amax((0, 2)) > 0
        missing = [name for name, there in zip(cohort.structures.values(), shown.tolist(), strict=True) if not there]
        if missing:
            raise ValueError(f"No training image of {cohort.name} shows {' or '.join(missing)}.")

    def build(self) -> nn.Module:
        """The network as training begins, laid out for fast convolutions: untrained, or with a shipped model's weights.

        What rests has parameters without gradients.

        Raises:
            ValueError: if the model that the recipe starts from is unknown, or has other weights, or a part that is to
                rest is not there.
        """
        built = network(self.recipe.config)
        if self.recipe.start:
            start_from(built, load(self.recipe.start))
        parts = dict(built.named_children())
        for name in self.recipe.resting:
            if name not in parts:
                raise ValueError(f"{name!r} can not rest: the parts of {self.recipe.name} are {', '.join(parts)}.")
            parts[name].requires_grad_(False)
        return fast_layout(built, self.cohort.grid.dim)

    def loss(self, model: nn.Module, items: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """The variant's terms on random training pairs."""
        drawn = [self._item(number) for number in items]
        (moving, fixed), (soi_moving, soi_fixed) = (
            [torch.cat([item[kind][side] for item in drawn]).to(device) for side in (0, 1)] for kind in (0, 1)
        )
        grid = self.grid
        recipe, images, soi = self.recipe, (moving, fixed), (soi_moving, soi_fixed)
        finest = sum(items[0] // recipe.settings.batch < step for step in recipe.coarse_first)
        if recipe.imitate and isinstance(recipe.config, GeoRegConfig):  # no point has to move
            finest = len(recipe.config.widths) - 1
        result = model(moving, fixed, grid, finest) if finest else model(moving, fixed, grid)
        if not isinstance(recipe.config, ISTNConfig):
            across = not (isinstance(recipe.config, GeoRegConfig) and recipe.config.supervision == "within")
            if recipe.imitate:
                assert result.pyramids is not None  # a GeoReg in training
                shown, seen = result.pyramids
                terms = contrasts.alike(seen, shown)
            else:
                terms = objectives.multiscale(
                    result,
                    grid,
                    recipe.config.similarity,
                    recipe.bending,
                    recipe.weights,
                    across,
                    recipe.window_vox,
                )
            if finest:
                # Several processes wait for the gradient of every parameter: the parts that rest have one of zero.
                first = next(iter(terms))
                terms[first] = terms[first] + 0.0 * torch.stack([p.sum() for p in model.parameters()]).sum()
            return terms
        assert not isinstance(recipe.bending, tuple)  # see the checks
        return objectives.istn(recipe.variant, result, images, soi, grid, recipe.bending, recipe.coarsen)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Dice, one pass, on validation people; first of all how alike two encoders are there, where one imitates."""
        found = measure(model, self.cohort, self.judged, device)[0]
        return ({"alike": self._alike(model, device)} if self.recipe.imitate else {}) | found

    def _alike(self, model: Any, device: torch.device) -> float:
        """1 - :func:`contrasts.alike`, in the mean over the fixed images of validation people and their twins."""
        pyramids = [
            [model.encoders[which](self.cohort.images[[index]].to(device)) for which, index in ((1, f), (0, twin))]
            for f, twin in ((f, self.cohort.twin(f)) for f in sorted({fixed for _, fixed in self.judged}))
        ]
        errors = [float(contrasts.alike(seen, shown)["features"]) for seen, shown in pyramids]
        return 1 - sum(errors) / len(errors)

    def picture(self, model: nn.Module, device: torch.device) -> bytes | None:
        """The first validation pair: fixed, moving, warped, and the map of the fixed image."""
        moving, fixed = self.judged[0]
        images, grid = self.cohort.images, self.cohort.grid
        result = model(images[[moving]].to(device), images[[fixed]].to(device), grid)
        warped = warp(images[[moving]].to(device), result.transform, grid)
        shown = [images[fixed, 0], images[moving, 0], warped[0, 0], result.features[1][0].amax(0)]
        middle = (slice(None), slice(None), *[n // 2 for n in grid.shape[2:]])
        figure, axes = plotting.axes(1, 4)
        for ax, image, title in zip(axes.flat, shown, ("fixed", "moving", "warped", "map of fixed"), strict=True):
            plotting.image(ax, image.detach().cpu()[middle], title=title)
        return plotting.png(figure)

    def figures(self, model: Model) -> dict[str, Any]:
        """The card's part: Dice and folding of test people, before, in one pass and refined."""
        cohort = self.cohort
        pairs = pairs_to_test(cohort)
        once, first_once = _measured(model, cohort, pairs)
        begun = time.perf_counter()
        refined, first_refined = _measured(model, cohort, pairs, model.refinement)
        seconds = (time.perf_counter() - begun) / len(pairs)
        return {
            "data": cohort.origin,
            "people": {split: len({cohort.people[i] for i in members}) for split, members in cohort.splits.items()},
            "named": _names(cohort),
            "chosen_by": "validation images alone" if self.recipe.imitate else "labels of validation people (Dice)",
            "test_pairs": len(pairs),
            "dice": {"before": _before(cohort, pairs), "one_pass": once["dice"], "refined": refined["dice"]},
            "folding_percent": {"one_pass": once["folding_percent"], "refined": refined["folding_percent"]},
            "first_pairs": _named(cohort, pairs, first_once, first_refined),
            "refined_seconds_per_pair": round(seconds, 3),
        }

    @classmethod
    def evaluate(cls, model: Model, pairs: int = 50, steps: int | None = None) -> dict[str, dict[str, float]]:
        """Figures on test people: before, one pass, refined; see ``runs.evaluate``."""
        cohort = load_cohort(model.card["recipe"]["data"])
        chosen = pairs_to_test(cohort, pairs)
        settings = model.refinement if steps is None else replace(model.refinement, steps=steps)
        figures = {
            "before": {"dice": _before(cohort, chosen)},
            "one pass": _measured(model, cohort, chosen)[0],
        }
        if settings.steps:
            figures["refined"] = _measured(model, cohort, chosen, settings)[0]
        return figures

    @classmethod
    def first_pairs(cls, model: Model) -> list[dict[str, Any]]:
        """The card's first pairs, measured anew."""
        cohort = load_cohort(model.card["recipe"]["data"])
        pairs = pairs_to_test(cohort)[:FIRST]
        once, refined = (_measured(model, cohort, pairs, how)[1] for how in (None, model.refinement))
        return _named(cohort, pairs, once, refined)

    def _item(self, number: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """A pair's images and their structures, moving and fixed of each; a twin and its image where one imitates."""
        generator = torch.Generator().manual_seed(self.recipe.settings.seed * 1_000_000_007 + number)
        pair = self.pairs[int(torch.randint(len(self.pairs), (), generator=generator))]
        if self.recipe.imitate:
            moving, fixed = self._twins(pair[1], generator)
        else:
            moving, fixed = (self._side(index, generator) for index in pair)
        return tuple((a[self.seen], b[self.seen]) for a, b in zip(moving, fixed, strict=True))

    def _side(self, index: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """An image and its structures, changed at random."""
        cohort = self.cohort
        tissue = None if cohort.tissue is None else cohort.tissue[[index]]
        image, soi = cohort.images[[index]], cohort.soi[[index]]
        return augmented(image, soi, cohort.grid, self.recipe.augmentation, generator, tissue, cohort.synthesis)

    def _twins(self, index: int, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """An image's twin, moved at random, and the image, moved in the same way and its greys changed at random."""
        before = generator.get_state()
        seen = self._side(index, generator)
        again = torch.Generator()
        again.set_state(before)
        moves = replace(self.recipe.augmentation, gamma=0.0, lift=0.0, bias=0.0, noise=0.0, blur_mm=0.0)
        twin, soi = self.cohort.images[[self.cohort.twin(index)]], self.cohort.soi[[index]]
        return augmented(twin, soi, self.cohort.grid, moves, again), seen


def with_trained_people(cohort: Cohort) -> tuple[tuple[int, int], ...]:
    """Pairs of each validation person with everybody who is trained on, both ways: for who is alone in validation."""
    known_ones = cohort.splits["train"]
    return tuple(pair for v in cohort.splits["validation"] for t in known_ones for pair in ((v, t), (t, v)))


def _middle(grid: Grid, size: Sequence[int]) -> tuple[tuple[slice, ...], Grid]:
    """What of a batch on a grid lies in its middle, and the grid of that; everything where no size is given."""
    size = size or grid.shape
    if len(size) != grid.dim or any(not 0 < small <= n for small, n in zip(size, grid.shape, strict=True)):
        raise ValueError(f"A middle of {tuple(size)} voxels does not lie in a grid of {grid.shape}.")
    low = [(n - small) // 2 for small, n in zip(size, grid.shape, strict=True)]
    high = [a + small for a, small in zip(low, size, strict=True)]
    voxels = (slice(a, b) for a, b in zip(low, high, strict=True))
    return (slice(None), slice(None), *voxels), grid.cropped(low, high)


def _measured(
    model: Model, cohort: Cohort, pairs: Sequence[tuple[int, int]], refinement: Refinement | None = None
) -> tuple[dict[str, float], list[PairFigures]]:
    """As :func:`regteach.evaluation.measure`, on the device where the model is."""
    return measure(model.network, cohort, pairs, next(model.network.parameters()).device, refinement)


def _names(cohort: Cohort) -> dict[str, list[str]]:
    """Who is in which split; nothing of thousands of digits, which are split by their number in the file."""
    if len(set(cohort.people)) > MOST_NAMED:
        return {}
    return {split: sorted({cohort.people[i] for i in members}) for split, members in cohort.splits.items()}


def _before(cohort: Cohort, pairs: Sequence[tuple[int, int]]) -> float:
    """Mean Dice of pairs as they are."""
    return mean_dice([figures_of(cohort, *pair, Identity(cohort.grid.dim)) for pair in pairs])


def _named(
    cohort: Cohort, pairs: Sequence[tuple[int, int]], once: Sequence[PairFigures], refined: Sequence[PairFigures]
) -> list[dict[str, Any]]:
    rows = list(zip(pairs, once, refined, strict=True))[:FIRST]
    return [
        {"moving": cohort.people[m], "fixed": cohort.people[f], "one_pass": a.dice, "refined": b.dice}
        for (m, f), a, b in rows
    ]


def start_from(built: nn.Module, model: Model) -> None:
    """Give a network the weights of another of its kind.

    A second encoder that only it has begins as the first. Steps at a level where only it takes any stay as they are:
    untrained, so nothing moves there. Steps at a level where only the other took any are left behind.

    Raises:
        ValueError: if the weights do not fit.
    """
    weights, own = model.network.state_dict(), built.state_dict()
    both = {key.replace("encoders.0.", "encoders.1.", 1): value for key, value in weights.items()} | weights
    begun, left = tuple(_steps(own) - _steps(weights)), tuple(_steps(weights) - _steps(own))
    try:
        if spare := [key for key in weights if key not in own and not key.startswith(left)]:
            raise KeyError(spare)
        built.load_state_dict({key: own[key] if key.startswith(begun) else both[key] for key in own})
    except (KeyError, RuntimeError):
        raise ValueError(f"The weights of {model.name} do not fit the network that was to start from them.") from None


def _steps(names: Iterable[str]) -> set[str]:
    """Beginnings of the names of the weights of a GeoReg's steps, one a level that takes any."""
    return {f"deform.{name.split('.')[1]}." for name in names if name.startswith("deform.")}
