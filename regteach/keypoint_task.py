"""Training the keypoint model on breathing thoraces, whose motion is known exactly at every point.

Each patient is one pair: exhaled (fixed) and inhaled (moving). Train, validation and test patients are different ones.
The forks of the vessels are the landmarks. They are exact, and so is every error in mm given here.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regteach import metrics, objectives, plotting
from regteach.affine import Affine
from regteach.checkpoints import Model, network
from regteach.data.intensity import normalised
from regteach.data.thorax import NOTE, generate_patient, thorax_grid
from regteach.grid import Grid
from regteach.nets.blocks import fast_layout
from regteach.nets.keypoint_kernel import KeypointKernelConfig
from regteach.refinement import Refinement, refine
from regteach.sampling import warp
from regteach.training import Settings
from regteach.transforms import Compose, Dense, Identity, Transform, jacobian_determinant

SEED = 20260
PATIENTS = {"train": range(8), "validation": range(8, 10), "test": range(10, 14)}
FIRST = 1  # test patients that a card names one by one: each takes a minute


@dataclass(frozen=True, eq=False)
class Patient:
    """One pair, as the network sees it.

    Args:
        name: which patient.
        moving, fixed: ``1 1 *grid``, in [0, 1].
        grid: of both.
        transform: fixed to moving points, exact.
        marks_fixed, marks_moving: landmarks, ``n d``, mm.
    """

    name: str
    moving: Float[Tensor, "1 1 *grid"]
    fixed: Float[Tensor, "1 1 *grid"]
    grid: Grid
    transform: Transform
    marks_fixed: Float[Tensor, "n d"]
    marks_moving: Float[Tensor, "n d"]


@dataclass(frozen=True)
class KeypointRecipe:
    """One training of the keypoint model.

    Args:
        name: also of the weights.
        data: "thorax".
        config: of the network; its grid is where the patients are drawn.
        settings: of the loop.
        keypoints: of each training item, drawn at random from those that are found: faster, and never the same.
        asked: landmarks of each item.
        smooth: weight of the bending of the field, mm^2 times mm.
        image: weight of what the images say, mm.
        refinement: what is recommended at test time.
    """

    name: str
    data: str
    config: KeypointKernelConfig
    settings: Settings
    keypoints: int = 256
    asked: int = 256
    smooth: float = 100.0
    image: float = 2.0
    refinement: Refinement = Refinement()


RECIPES = (
    KeypointRecipe(
        "kernel-thorax",
        "thorax",
        KeypointKernelConfig.of(thorax_grid(4.0)),
        Settings(steps=150, batch=1, rate=1e-3, warmup=10, decay=True, validate_every=25),
        refinement=Refinement(30, rate=0.1),
    ),
)


class KeypointTask:
    """Training of the keypoint model: what ``training.train`` and ``runs.run`` need to know.

    Args:
        recipe: what to do.
        patients: for each split, in the place of the recipe's own data.
    """

    calls_forward = False  # the loss looks at the keypoints, the features and the field of every scale

    def __init__(self, recipe: KeypointRecipe, patients: dict[str, list[Patient]] | None = None) -> None:
        if recipe.data != "thorax":
            raise ValueError(f"{recipe.name} learns from the thorax, not from {recipe.data!r}.")
        self.recipe, self.given = recipe, patients

    def patients(self, split: str) -> list[Patient]:
        """Of "train", "validation" or "test"; drawn when they are first asked for."""
        if self.given is not None:
            return self.given[split]
        return load_thorax(self.recipe.config.grid, split)

    def build(self) -> nn.Module:
        """An untrained network, laid out for fast convolutions."""
        return fast_layout(network(self.recipe.config), self.recipe.config.grid.dim)

    def loss(self, model: Any, items: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Landmarks at every scale, bending, and what the images say: see ``objectives.keypoints``."""
        each = [self._terms(model, number, device) for number in items]
        return {name: torch.stack([terms[name] for terms in each]) for name in each[0]}

    def validate(self, model: Any, device: torch.device) -> dict[str, float]:
        """Minus the mean error at the landmarks after one pass, mm, and the error after the first scale."""
        last: list[float] = []
        first: list[float] = []
        for patient in self.patients("validation"):
            fields = model.scales(patient.moving.to(device), patient.fixed.to(device), patient.grid)
            for found, field in ((first, fields[0]), (last, fields[-1])):
                moved = field.at(patient.marks_fixed.to(device)).cpu() + patient.marks_fixed
                found.append(float((moved - patient.marks_moving).norm(dim=1).mean()))
        return {"minus_tre_mm": -_mean(last), "tre_first_scale_mm": _mean(first)}

    def picture(self, model: Any, device: torch.device) -> bytes | None:
        """The first validation patient, a coronal slice: exhaled, inhaled, and inhaled warped."""
        patient = self.patients("validation")[0]
        dense = model(patient.moving.to(device), patient.fixed.to(device), patient.grid).transform
        warped = warp(patient.moving.to(device), dense, patient.grid).cpu()
        figure, axes = plotting.axes(1, 3)
        for ax, (title, image) in zip(
            axes.flat, {"fixed": patient.fixed, "moving": patient.moving, "warped": warped}.items(), strict=True
        ):
            plotting.image(ax, image[0, 0] if image.ndim == 4 else image[0, 0, :, image.shape[3] // 2], title=title)
        return plotting.png(figure)

    def figures(self, model: Model) -> dict[str, Any]:
        """The card's part: errors at the landmarks of test patients, before, in one pass and refined."""
        patients = self.patients("test")
        once = [measure(model, patient, 0) for patient in patients]
        begun = time.perf_counter()
        refined = [measure(model, patient, model.refinement.steps) for patient in patients]
        return {
            "data": NOTE,
            "people": {split: len(self.patients(split)) for split in PATIENTS},
            "test_pairs": len(patients),
            "tre_mm": {
                "before": _mean([tre(patient, Identity(patient.grid.dim)) for patient in patients]),
                "one_pass": _mean([row["tre_mm"] for row in once]),
                "refined": _mean([row["tre_mm"] for row in refined]),
            },
            "folding_percent": {
                "one_pass": _mean([row["folding_percent"] for row in once]),
                "refined": _mean([row["folding_percent"] for row in refined]),
            },
            "sdlogj": {
                "one_pass": _mean([row["sdlogj"] for row in once]),
                "refined": _mean([row["sdlogj"] for row in refined]),
            },
            "first_pairs": [
                {"patient": patient.name, "one_pass": a["tre_mm"], "refined": b["tre_mm"]}
                for patient, a, b in list(zip(patients, once, refined, strict=True))[:FIRST]
            ],
            "refined_seconds_per_pair": round((time.perf_counter() - begun) / len(patients), 3),
        }

    @classmethod
    def evaluate(cls, model: Model, pairs: int = 50, steps: int | None = None) -> dict[str, dict[str, float]]:
        """Mean figures of test patients: before, one pass, refined; see ``runs.evaluate``.

        Raises:
            ValueError: if no pair is asked for.
        """
        patients = load_thorax(model.grid, "test")[: max(0, pairs)]
        if not patients:
            raise ValueError(f"{pairs} of the {len(PATIENTS['test'])} test pairs were asked for.")
        steps = model.refinement.steps if steps is None else steps
        before = {"tre_mm": _mean([tre(patient, Identity(patient.grid.dim)) for patient in patients])}
        figures = {"before": before, "one pass": _means([measure(model, patient, 0) for patient in patients])}
        if steps:
            figures["refined"] = _means([measure(model, patient, steps) for patient in patients])
        return figures

    @classmethod
    def first_pairs(cls, model: Model) -> list[dict[str, Any]]:
        """Errors of the first test patients, one by one, mm."""
        return [
            {
                "patient": patient.name,
                "one_pass": measure(model, patient, 0)["tre_mm"],
                "refined": measure(model, patient, model.refinement.steps)["tre_mm"],
            }
            for patient in load_thorax(model.grid, "test", FIRST)
        ]

    def _terms(self, model: Any, number: int, device: torch.device) -> dict[str, Tensor]:
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.settings.seed * 1_000_000_007 + number)
        every = self.patients("train")
        patient = every[int(torch.randint(len(every), (), generator=generator))]
        if bool(torch.rand((), generator=generator) < 0.5):
            patient = mirrored(patient)
        moving, fixed = patient.moving.to(device), patient.fixed.to(device)
        keypoints = model.keypoints(fixed, patient.grid)
        keypoints = keypoints[_some(len(keypoints), recipe.keypoints, generator).to(device)]
        maps = (model.features(moving), model.features(fixed))
        fields = model.scales(moving, fixed, patient.grid, keypoints_mm=keypoints, features=maps)
        chosen = _some(len(patient.marks_fixed), recipe.asked, generator)
        marks = (patient.marks_fixed[chosen].to(device), patient.marks_moving[chosen].to(device))
        low, high = torch.tensor(patient.grid.origin), torch.tensor(patient.grid.last)
        sampled = low + (high - low) * torch.rand(recipe.asked, patient.grid.dim, generator=generator)
        # What the images say is said by the part of the features that is not learned, which can not be made flat.
        described = tuple(m[:, : m.shape[1] - recipe.config.features].detach() for m in maps)
        return objectives.keypoints(
            [field.at for field in fields], marks, (described[0], described[1]), patient.grid, sampled.to(device),
            recipe.smooth, recipe.image,
        )  # fmt: skip


def load_thorax(grid: Grid, split: str, count: int | None = None) -> list[Patient]:
    """The patients of a split on a grid, drawn once.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in PATIENTS:
        raise ValueError(f"The patients are split into {', '.join(PATIENTS)}, not {split!r}.")
    return [_patient(grid, index) for index in list(PATIENTS[split])[:count]]


@cache
def _patient(grid: Grid, index: int) -> Patient:
    case = generate_patient(grid, SEED, index=index)
    moving, fixed = normalised(case.moving), normalised(case.fixed)
    marks = case.fixed_landmarks_mm[0], case.moving_landmarks_mm[0]
    return Patient(f"patient {index} of seed {SEED}", moving, fixed, grid, case.transform, *marks)


def mirrored(patient: Patient) -> Patient:
    """Left and right exchanged, about the middle of the grid."""
    dim = patient.grid.dim
    turn = torch.eye(dim)
    turn[0, 0] = -1.0
    flip = Affine(turn[None], torch.zeros(1, dim), torch.tensor(patient.grid.centre))

    def flipped(points: Tensor) -> Tensor:
        return flip(points[None])[0]

    return replace(
        patient,
        moving=patient.moving.flip(2),
        fixed=patient.fixed.flip(2),
        transform=Compose((flip, patient.transform, flip)),
        marks_fixed=flipped(patient.marks_fixed),
        marks_moving=flipped(patient.marks_moving),
    )


def measure(model: Model, patient: Patient, steps: int) -> dict[str, float]:
    """Error at the landmarks, mm, and regularity, after one pass or refined by so many steps."""
    device = next(model.network.parameters()).device
    moving, fixed, grid = patient.moving.to(device), patient.fixed.to(device), patient.grid
    with torch.no_grad():
        result = model.network(moving, fixed, grid)
    if steps:
        result = refine(model.network, result, grid, replace(model.refinement, steps=steps)).result
    with torch.no_grad():
        dense = Dense(result.transform.displacement_on(grid).cpu(), grid)
    det = jacobian_determinant(dense, grid)
    return {
        "tre_mm": tre(patient, dense),
        "folding_percent": float(metrics.folding_percent(det)),
        "sdlogj": float(metrics.sdlogj(det)),
    }


def tre(patient: Patient, transform: Transform) -> float:
    """Mean distance of the landmarks from where they belong, mm."""
    moved = transform(patient.marks_fixed[None])[0]
    return float((moved - patient.marks_moving).norm(dim=1).mean())


def _some(count: int, most: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[:most]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: _mean([row[name] for row in rows]) for name in rows[0]}
