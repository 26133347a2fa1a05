"""The keypoint model: known motions of textured images come back, and what it is made of does what it says."""

import copy
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from truths.fields import one_sentence, positions

from regteach import objectives
from regteach.checkpoints import Model, load, save_model
from regteach.grid import Grid
from regteach.nets.kernel import HEADS, KernelConfig
from regteach.nets.keypoint_field import KeypointTransform, affine_part
from regteach.nets.keypoint_kernel import (
    FIVE,
    ONE,
    KeypointKernel,
    KeypointKernelConfig,
    Scale,
)
from regteach.refinement import Refinement, refine
from regteach.regularity import bending_energy
from regteach.sampling import flat_points, warp
from regteach.transforms import Dense, displacement

GRIDS = {2: Grid((48, 44), (1.5, 2.0), (-30.0, 12.0)), 3: Grid((28, 24, 26), (2.0, 2.4, 2.2), (-30.0, 12.0, 5.0))}
TWO = (Scale(2, 2), Scale(1, 2))
SMALL: dict[str, Any] = {"scales": TWO, "features": 2, "widths": (2, 4), "width": 8, "neighbours": 8}


def texture(points: np.ndarray, seed: int = 3) -> np.ndarray:
    """Spots at random places, everywhere, at points ``... d``."""
    dim, rng = points.shape[-1], np.random.default_rng(seed)
    low, high = np.array([-60.0] * dim), np.array([90.0] * dim)
    spots = {2: 900, 3: 6000}[dim]
    centres, heights = rng.uniform(low, high, (spots, dim)), rng.uniform(0.3, 1, spots)
    flat = points.reshape(-1, dim)
    near = (centres > flat.min(0) - 12).all(1) & (centres < flat.max(0) + 12).all(1)
    value = np.zeros(len(flat))
    for centre, height in zip(centres[near], heights[near], strict=True):
        value += height * np.exp(-((flat - centre) ** 2).sum(-1) / (2 * 3.0**2))
    return value.reshape(points.shape[:-1]).astype(np.float32)


class Truth:
    """Fixed to moving points: affine, or two blocks that slide along a wall."""

    def __init__(self, kind: str, grid: Grid) -> None:
        self.kind, self.centre = kind, np.array(grid.centre)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        dim = x.shape[-1]
        if self.kind == "affine":
            matrix = np.array([[1.05, 0.06, -0.03], [-0.07, 0.96, 0.04], [0.02, -0.05, 1.04]])[:dim, :dim]
            return (x - self.centre) @ matrix.T + self.centre + np.array([2.0, -3.0, 1.5])[:dim]
        sign = np.where(x[..., :1] > self.centre[0], 1.0, -1.0)
        return x + sign * 3.5 * np.eye(dim)[-1]


def pair(dim: int, kind: str = "affine") -> tuple[Tensor, Tensor, Truth]:
    """The moving image is the texture; the fixed one is read at the moved points, so that the truth is exact."""
    grid = GRIDS[dim]
    truth = Truth(kind, grid)
    at = positions(grid)
    return torch.tensor(texture(at))[None, None], torch.tensor(texture(truth(at)))[None, None], truth


def model(dim: int, shaken: float = 0.0, **settings: Any) -> KeypointKernel:
    torch.manual_seed(0)
    network = KeypointKernel(KeypointKernelConfig.of(GRIDS[dim], **SMALL | settings)).eval()
    for weight in network.parameters():
        weight.data += shaken * torch.randn_like(weight)
    return network


def error_mm(transform: Any, truth: Truth, grid: Grid, margin: float = 8.0) -> np.ndarray:
    """Distance from the truth at voxels away from the border, where both images show the same."""
    at = positions(grid).reshape(-1, grid.dim)
    inside = ((at > np.array(grid.origin) + margin) & (at < np.array(grid.last) - margin)).all(1)
    moved = transform(torch.tensor(at[inside]).float()[None])[0].detach().numpy()
    return np.linalg.norm(moved - truth(at[inside]), axis=1)


# ---- known motions ----


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", ["affine", "sliding"])
def test_the_untrained_model_already_finds_a_known_motion(dim: int, kind: str) -> None:
    moving, fixed, truth = pair(dim, kind)
    grid = GRIDS[dim]
    with torch.no_grad():
        result = model(dim)(moving, fixed, grid)
    before = error_mm(lambda x: x, truth, grid)
    after = error_mm(result.transform, truth, grid)
    assert before.mean() > 3
    assert np.median(after) < 0.35 * np.median(before)
    assert after.mean() < 0.5 * before.mean()
    assert (warp(moving, result.transform, grid) - fixed).abs().mean() < 0.7 * (moving - fixed).abs().mean()


def test_the_finer_scale_corrects_the_coarse_one() -> None:
    moving, fixed, truth = pair(2)
    with torch.no_grad():
        fields = model(2).scales(moving, fixed, GRIDS[2])
    errors = [error_mm(lambda x, f=f: x + f.at(x[0])[None], truth, GRIDS[2]).mean() for f in fields]
    assert len(errors) == len(TWO)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"affine": True}, {"reconstruction": "thin_plate"}, {"spline": True}, {"heads": ("geometry",)}]
)
def test_coordinates_keep_float32_under_autocast(dim: int, settings: dict[str, Any]) -> None:
    """Without a U-Net there is nothing that mixed precision may round."""
    moving, fixed, _ = pair(dim)
    grid, network = GRIDS[dim], model(dim, 0.05, features=0, **settings)
    points = flat_points(grid)[:, ::7]

    def found() -> tuple[Tensor, ...]:
        """Each field at points, the dense one there, and that of the step on the grid."""
        fields = [field.at(points[0]) for field in network.scales(moving, fixed, grid)]
        result = network(moving, fixed, grid)
        step = result.steps[0]
        rebuilt = step.build(step.parameters).displacement_on(grid)
        return *fields, result.transform(points) - points, rebuilt

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = found()
    for ours, theirs in zip(mixed, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    losses = [sum(field.square().mean() for field in fields) for fields in (mixed, expected)]
    gradients = [torch.autograd.grad(loss, list(network.parameters())) for loss in losses]
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dim", [2, 3])
def test_what_is_said_at_points_is_what_is_said_on_the_grid_under_autocast(dim: int) -> None:
    """Also with a U-Net: its features may be rounded, what is made of them is not."""
    moving, fixed, _ = pair(dim)
    grid, network = GRIDS[dim], model(dim, 0.3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        field = network.scales(moving, fixed, grid)[-1]
        found = field.at(flat_points(grid)[0]).unflatten(0, grid.shape)
        on = field.on(grid)
        centre = torch.tensor(grid.centre)[None]
        _, added = field.added((centre, centre + 2), on, grid)
    assert found.dtype == on.dtype == added.dtype == torch.float32
    torch.testing.assert_close(found, on, atol=1e-3, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(added, field.added((centre, centre + 2), on, grid)[1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("dim", [2, 3])
def test_moving_both_images_together_moves_the_answer(dim: int) -> None:
    """Positions count from nowhere: the same pair elsewhere in space has the same displacements."""
    moving, fixed, _ = pair(dim)
    grid = GRIDS[dim]
    there = replace(grid, origin=tuple(o + 64.0 for o in grid.origin))
    with torch.no_grad():
        network = model(dim, 0.05)
        here, away = (displacement(network(moving, fixed, g).transform, g) for g in (grid, there))
    torch.testing.assert_close(away, here, atol=2e-2, rtol=0)


def test_a_batch_is_its_pairs_one_by_one() -> None:
    moving, fixed, _ = pair(2)
    other = torch.tensor(texture(positions(GRIDS[2]), 5))[None, None]
    pairs = torch.cat([moving, fixed]), torch.cat([fixed, other])
    network = model(2, 0.05)
    with torch.no_grad():
        whole = network(*pairs, GRIDS[2])
        for i in range(2):
            one = network(pairs[0][i : i + 1], pairs[1][i : i + 1], GRIDS[2])
            torch.testing.assert_close(
                displacement(whole.transform, GRIDS[2])[i], displacement(one.transform, GRIDS[2])[0], atol=1e-4, rtol=0
            )
            count = one.steps[0].parameters.shape[1]
            torch.testing.assert_close(whole.steps[0].parameters[i, :count], one.steps[0].parameters[0])
            assert not whole.steps[0].parameters[i, count:].any()


# ---- the result ----


@pytest.mark.parametrize("dim", [2, 3])
def test_the_step_is_the_transform_and_zero_is_the_identity(dim: int) -> None:
    moving, fixed, _ = pair(dim)
    grid = GRIDS[dim]
    with torch.no_grad():
        result = model(dim, 0.05)(moving, fixed, grid)
    assert isinstance(result.transform, Dense)
    (step,) = result.steps
    built = step.build(step.parameters)
    assert isinstance(built, KeypointTransform)
    torch.testing.assert_close(displacement(built, grid), displacement(result.transform, grid), atol=1e-4, rtol=0)
    at = flat_points(grid)
    torch.testing.assert_close(built(at), result.transform(at), atol=2e-3, rtol=0)
    torch.testing.assert_close(built.jacobian(at[:, :9]), result.transform.jacobian(at[:, :9]), atol=1e-3, rtol=0)
    nothing = step.build(torch.zeros_like(step.parameters))
    torch.testing.assert_close(nothing(at), at, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings", [{}, {"affine": True}, {"reconstruction": "thin_plate"}, {"spline": True}], ids=str
)
def test_other_displacements_give_the_field_of_those(settings: dict[str, Any]) -> None:
    """What refinement turns is linear, and the remembered weights are those of the field itself."""
    moving, fixed, _ = pair(2)
    with torch.no_grad():
        step = model(2, 0.05, **settings)(moving, fixed, GRIDS[2]).steps[0]
    other = step.parameters + torch.randn_like(step.parameters)
    built = step.build(other.requires_grad_())
    field = displacement(built, GRIDS[2])
    direct = built.pairs()[0].at(flat_points(GRIDS[2])[0]).unflatten(0, GRIDS[2].shape)
    torch.testing.assert_close(field[0], direct, atol=1e-4, rtol=0)
    field.square().sum().backward()
    assert other.grad is not None
    assert other.grad.any()


@pytest.mark.parametrize("mode", ["parameters", "weights"])
def test_refinement_lowers_the_loss(mode: str) -> None:
    moving, fixed, truth = pair(2)
    network = model(2).requires_grad_(False)
    with torch.no_grad():
        result = network(moving, fixed, GRIDS[2])
    settings = Refinement(12, mode, rate=0.05) if mode == "parameters" else Refinement(4, mode, rate=1e-3)
    refined = refine(network, result, GRIDS[2], settings)
    assert float(refined.curve.min()) < float(refined.curve[0])
    once, again = (error_mm(r.transform, truth, GRIDS[2]).mean() for r in (result, refined.result))
    assert again < 1.1 * once


def test_a_call_that_was_recorded_is_refined_as_one_that_was_not_and_the_network_learns_nothing() -> None:
    network, settings = model(2, 0.3), Refinement(4, rate=0.05)
    moving, fixed, _ = pair(2)
    recorded = network(moving, fixed, GRIDS[2])
    assert recorded.transform(flat_points(GRIDS[2])).requires_grad
    with torch.no_grad():
        plain = network(moving, fixed, GRIDS[2])
    refined = [refine(network, result, GRIDS[2], settings) for result in (recorded, plain)]
    assert torch.equal(refined[0].curve, refined[1].curve)
    assert all(weight.grad is None for weight in network.parameters())


def test_the_loss_of_turned_weights_is_that_of_the_result() -> None:
    """A rate so high that the last step is not the best one; weights also decide where the field is stiff."""
    moving, fixed, _ = pair(2)
    network = model(2, shaken=0.02)
    with torch.no_grad():
        result = network(moving, fixed, GRIDS[2])
    refined = refine(network, result, GRIDS[2], Refinement(6, "weights", rate=0.1))
    assert float(refined.curve[-1]) > float(refined.loss)
    reached = objectives.at_test_time(network)((moving, fixed), refined.result.transform, GRIDS[2])
    torch.testing.assert_close(refined.loss, reached.detach(), rtol=1e-3, atol=1e-5)


def test_weights_of_keypoints_are_turned_for_one_pair_at_a_time() -> None:
    moving, fixed, _ = pair(2)
    network = model(2)
    twice = (moving.repeat(2, 1, 1, 1), fixed.repeat(2, 1, 1, 1))
    with torch.no_grad():
        result = network(*twice, GRIDS[2])
    with pytest.raises(ValueError, match="one pair at a time") as caught:
        refine(network, result, GRIDS[2], Refinement(1, "weights", rate=1e-3))
    assert one_sentence(caught.value)


def test_the_bending_of_a_field_of_keypoints_has_its_price() -> None:
    moving, fixed, _ = pair(2)
    network = model(2)
    with torch.no_grad():
        result = network(moving, fixed, GRIDS[2])
    free, dear = (refine(network, result, GRIDS[2], Refinement(1, rate=0.05, bending=b)) for b in (0.0, 100.0))
    field = displacement(result.up_to(1), GRIDS[2])
    torch.testing.assert_close(
        dear.curve[0] - free.curve[0], 100 * bending_energy(field, GRIDS[2]), rtol=1e-3, atol=1e-5
    )


def test_points_alone_need_no_images() -> None:
    torch.manual_seed(1)
    keypoints, query = 40 * torch.rand(60, 3), 10 + 20 * torch.rand(50, 3)
    slopes = 0.1 * torch.randn(3, 3)
    found = model(3).reconstruct(keypoints, keypoints @ slopes, query)
    torch.testing.assert_close(found, query @ slopes, atol=0.05, rtol=0)


# ---- size and learning ----


@pytest.mark.parametrize("dim", [2, 3])
def test_the_full_kernel_has_about_150_thousand_parameters(dim: int) -> None:
    config = KeypointKernelConfig.of(GRIDS[dim])
    assert config.kernel.heads == HEADS
    assert config.kernel.neighbours == 30
    assert config.keypoints == 1024
    assert config.scales == FIVE
    kernel = KeypointKernel(config).kernel
    assert 140_000 <= sum(weights.numel() for weights in kernel.parameters()) <= 160_000


def terms_of(network: KeypointKernel, dim: int) -> dict[str, Tensor]:
    moving, fixed, truth = pair(dim)
    grid = GRIDS[dim]
    keypoints = network.keypoints(fixed, grid)[:40]
    fields = network.scales(moving, fixed, grid, keypoints_mm=keypoints)
    at = flat_points(grid)[0][::37]
    marks = (at, torch.tensor(truth(at.double().numpy())).float())
    maps = network.features(moving).detach(), network.features(fixed).detach()
    return objectives.keypoints([f.at for f in fields], marks, maps, grid, at[::3], 1.0, 1.0)


@pytest.mark.parametrize("settings", [{"trust": True}, {"reconstruction": "thin_plate"}], ids=str)
def test_every_parameter_is_reached_by_the_loss(settings: dict[str, Any]) -> None:
    network = model(2, 0.05, **settings)
    terms = terms_of(network, 2)
    assert set(terms) == {"landmarks", "bending", "image"}
    torch.stack(list(terms.values())).sum().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias before an instance normalisation is subtracted again.
    assert not [name for name in silent if not (name.startswith("unet") and name.endswith("bias"))]


def test_training_lowers_the_error() -> None:
    network = model(2).train()
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    errors = []
    for _ in range(8):
        terms = terms_of(network, 2)
        optimiser.zero_grad()
        terms["landmarks"].backward()
        optimiser.step()
        errors.append(float(terms["landmarks"].detach()))
    assert min(errors[-2:]) < 0.97 * errors[0]


def test_the_loss_has_a_closed_form() -> None:
    grid = GRIDS[2]
    marks = torch.tensor([[0.0, 20.0], [3.0, 30.0]]), torch.tensor([[3.0, 24.0], [3.0, 30.0]])

    def still(x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def square(x: Tensor) -> Tensor:
        return 0.01 * x.square()

    ramp = torch.tensor(positions(grid)[..., 0]).float()[None, None]
    terms = objectives.keypoints([still, still], marks, (ramp, ramp + 2), grid, marks[0], 1.0, 3.0)
    assert float(terms["landmarks"]) == pytest.approx(2.5, abs=1e-5)
    assert float(terms["bending"]) == pytest.approx(0.0, abs=1e-8)
    assert float(terms["image"]) == pytest.approx(3 * 4.0, rel=1e-4)
    # u_k = x_k^2 / 100 has the second derivative 1 / 50 along its own axis, and there are two axes.
    curved = objectives.keypoints([square], marks, (ramp, ramp), grid, marks[0], 1.0, 0.0)
    assert set(curved) == {"landmarks", "bending"}
    assert float(curved["bending"]) == pytest.approx(2 * 0.02**2, rel=0.05)


# ---- ablations ----

ABLATIONS: dict[str, dict[str, Any]] = {
    "only geometry": {"heads": ("geometry",)},
    "only semantics": {"heads": ("semantics",)},
    "no bias": {"bias": False},
    "one scale": {"scales": ONE},
    "spline": {"reconstruction": "thin_plate"},
    "affine first": {"affine": True, "degree": 0},
    "mean": {"degree": 0},
    "no learned features": {"features": 0},
}


def test_every_ablation_works_and_is_another_model() -> None:
    moving, fixed, truth = pair(2)
    found = {}
    with torch.no_grad():
        for name, settings in {"full": {}, **ABLATIONS}.items():
            network = model(2, 0.1, **settings)
            found[name] = displacement(network(moving, fixed, GRIDS[2]).transform, GRIDS[2])
            assert error_mm(Dense(found[name], GRIDS[2]), truth, GRIDS[2]).mean() < 3, name
    for name, field in found.items():
        others = [float((field - other).abs().max()) for key, other in found.items() if key != name]
        assert min(others) > 1e-3, name


def test_an_affine_part_first_continues_a_slope() -> None:
    """A weighted mean alone falls behind it."""
    torch.manual_seed(1)
    keypoints, slopes = 40 * torch.rand(80, 2), 0.2 * torch.randn(2, 2)
    query = 40 * torch.rand(50, 2)
    errors = {}
    for affine in (False, True):
        field = model(2, degree=0, affine=affine).field(keypoints, keypoints @ slopes)
        errors[affine] = float((field.at(query) - query @ slopes).norm(dim=1).mean().detach())
    assert errors[True] < 1e-3 < 0.1 < errors[False]
    linear = affine_part(keypoints, keypoints @ slopes + 3)
    torch.testing.assert_close(linear, torch.cat([slopes, torch.full((1, 2), 3.0)]), atol=1e-3, rtol=0)


# ---- given correspondences ----


@pytest.mark.parametrize("dim", [2, 3])
def test_a_given_correspondence_is_met(dim: int) -> None:
    moving, fixed, truth = pair(dim)
    grid, network = GRIDS[dim], model(dim)
    point = torch.tensor(grid.centre)[None] + 1.3
    wanted = torch.tensor(truth(point.double().numpy())).float() + 4.0
    with torch.no_grad():
        once = network(moving, fixed, grid)
        given = network(moving, fixed, grid, points=(point, wanted))
        assert float((once.transform(point[None])[0] - wanted).norm()) > 4
        assert float((given.steps[0].build(given.steps[0].parameters)(point[None])[0] - wanted).norm()) < 1.0
        assert given.steps[0].parameters.shape == once.steps[0].parameters.shape
        far = flat_points(grid)[0][:1]
        field, dense = once.steps[0].build(once.steps[0].parameters).pairs()[0], displacement(once.transform, grid)[0]
        joined, after = field.added((point, wanted), dense, grid)
        torch.testing.assert_close(after, joined.on(grid), atol=1e-4, rtol=0)
        assert float((joined.at(point) + point - wanted).norm()) < 1.0
        torch.testing.assert_close(joined.at(far), field.at(far), atol=1e-4, rtol=0)


# ---- files, few keypoints, bad input ----


@pytest.mark.parametrize("settings", [{}, {"reconstruction": "thin_plate", "heads": ("geometry",)}], ids=str)
def test_a_checkpoint_comes_back(settings: dict[str, Any], tmp_path: Path) -> None:
    network = model(2, 0.05, **settings)
    again = load(save_model(tmp_path / "tiny.safetensors", Model("tiny", network)))
    assert again.network.config == network.config
    moving, fixed, _ = pair(2)
    half = copy.deepcopy(network).half().float()
    with torch.no_grad():
        first, second = (n(moving, fixed, GRIDS[2]).transform for n in (half, again.network))
    torch.testing.assert_close(displacement(first, GRIDS[2]), displacement(second, GRIDS[2]), atol=1e-2, rtol=0)


def test_a_configuration_comes_back_from_json() -> None:
    config = KeypointKernelConfig.of(GRIDS[3], scales=TWO, bias=False, affine=True)
    assert KeypointKernelConfig.from_dict(asdict(config)) == config
    with pytest.raises(ValueError) as caught:
        KeypointKernelConfig.from_dict(asdict(config) | {"colour": 1})
    assert one_sentence(caught.value)


def test_fewer_keypoints_than_neighbours_are_enough() -> None:
    at = positions(GRIDS[2])
    image = torch.tensor(np.exp(-((at - np.array(GRIDS[2].centre)) ** 2).sum(-1) / 50)).float()[None, None]
    with torch.no_grad():
        network = model(2, degree=0)
        assert 0 < len(network.keypoints(image, GRIDS[2])) < 8
        found = network(image, image, GRIDS[2])
    # Far from them their plane goes on, and so do their errors.
    centre = torch.tensor(GRIDS[2].centre)[None, None]
    assert (found.transform(centre) - centre).abs().max() < 1


def test_an_image_without_keypoints_is_refused_unless_points_are_given() -> None:
    moving, _, _ = pair(2)
    blank = torch.zeros_like(moving)
    with pytest.raises(ValueError) as caught:
        model(2)(moving, blank, GRIDS[2])
    assert one_sentence(caught.value)
    centre = torch.tensor(GRIDS[2].centre)[None]
    with torch.no_grad():
        found = model(2)(moving, blank, GRIDS[2], points=(centre, centre + 2))
    torch.testing.assert_close(displacement(found.transform, GRIDS[2]), torch.full((1, 48, 44, 2), 2.0))


@pytest.mark.parametrize(
    "change",
    [
        {"scales": ()},
        {"keypoints": 0},
        {"features": -1},
        {"temperature": 0.0},
        {"smoothness": -1.0},
        {"reconstruction": "guess"},
        {"kernel": KernelConfig(dim=3)},
        {"scales": (Scale(64),)},
        {"similarity": "nonsense"},
    ],
    ids=str,
)
def test_bad_configurations_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        replace(KeypointKernelConfig.of(GRIDS[2]), **change)
    assert one_sentence(caught.value)


def test_an_unknown_similarity_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="There is no dissimilarity 'local_nc'; the nearest is 'local_ncc'") as caught:
        KeypointKernelConfig.of(GRIDS[2], similarity="local_nc")
    assert one_sentence(caught.value)


def test_bad_scales_and_images_are_refused() -> None:
    moving, fixed, _ = pair(2)
    centre = torch.tensor(GRIDS[2].centre)[None]
    calls = [
        lambda: Scale(0),
        lambda: model(2)(moving[..., :-1], fixed, GRIDS[2]),
        lambda: model(2)(moving.repeat(2, 1, 1, 1), fixed, GRIDS[2]),
        lambda: model(2)(*[x.repeat(2, 1, 1, 1) for x in (moving, fixed)], GRIDS[2], points=(centre, centre)),
        lambda: model(2).reconstruct(centre[:0], centre[:0], centre),
        lambda: model(2).reconstruct(centre, centre * math.nan, centre),
    ]
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        assert one_sentence(caught.value)
