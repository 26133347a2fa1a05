"""Refinement: known motions come back, pairs do not feel each other, the best is kept, nothing else is touched."""

import copy
import dataclasses
import inspect
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from truths.fields import one_sentence

from regteach import objectives
from regteach.affine import Affine
from regteach.focus import focus_on
from regteach.grid import Grid
from regteach.nets.georeg import GeoReg, GeoRegConfig
from regteach.nets.istn import ISTN, AffineStage, ISTNConfig, SplineStage
from regteach.nets.voxelmorph import VoxelMorph, VoxelMorphConfig
from regteach.refinement import Refined, Refinement, corrections, refine, search, sharpened
from regteach.regularity import bending_energy_spline_plain
from regteach.result import Result, assemble
from regteach.sampling import grid_points, smooth, warp
from regteach.similarity import local_ncc
from regteach.transforms import Dense, Identity, Transform, displacement

GRIDS = {2: Grid((32, 28), (1.0, 1.5), (-10.0, 3.0)), 3: Grid((20, 18, 16), (1.0, 1.5, 2.0), (-10.0, 3.0, 5.5))}
MODES = ("parameters", "corrections", "greedy", "weights")
OWN = ("parameters", "weights")  # the steps stay those of the network
RATE = {"parameters": 0.03, "corrections": 0.1, "greedy": 0.5, "weights": 1e-3}
# Brightness, and centre and width in parts of half the image.
BLOBS = (
    (1.0, (0.0, 0.1, 0.0), (0.2, 0.3, 0.25)),
    (0.7, (0.3, 0.25, 0.25), (0.2, 0.15, 0.2)),
    (0.5, (-0.3, 0.25, -0.3), (0.15, 0.2, 0.15)),
)
AFFINE, SPLINE = AffineStage(widths=(4, 8), hidden=16), SplineStage(8.0, widths=(4, 8))


def network(grid: Grid, *stages, itn: tuple[int, ...] = ()) -> ISTN:
    """An untrained one: its transform is the identity. Its maps, if it draws any, are made to show something."""
    model = ISTN(ISTNConfig(grid, stages or (AFFINE, SPLINE), itn=itn)).eval()
    if model.itn is not None:
        nn.init.normal_(model.itn.head[-1].weight)
    return model


def phantom(points: Tensor, grid: Grid) -> Tensor:
    """Three soft blobs, at points ``... d``: no turn or stretch leaves them as they are."""
    local = points - torch.tensor(grid.centre)
    half = torch.tensor(grid.extent) / 2
    total = torch.zeros(points.shape[:-1])
    for weight, centre, size in BLOBS:
        total = total + weight * soft(local / half, centre, size)
    return total


def soft(unit: Tensor, centre: tuple[float, ...], size: tuple[float, ...]) -> Tensor:
    dim = unit.shape[-1]
    scaled = (unit - torch.tensor(centre[:dim])) / torch.tensor(size[:dim])
    return torch.exp(-scaled.square().sum(-1) / 2)


def known(grid: Grid, matrix: list[list[float]], shift: list[float]) -> Affine:
    dim = grid.dim
    full = torch.eye(3)
    full[: len(matrix), : len(matrix)] = torch.tensor(matrix)
    return Affine(full[None, :dim, :dim], torch.tensor([shift[:dim]]), torch.tensor(grid.centre))


def pairs_of(grid: Grid, *truths: Affine) -> tuple[Tensor, Tensor]:
    """Moving images, and each as its truth warps it: at the truth the loss is 0."""
    moving = phantom(grid_points(grid), grid).expand(1, 1, *grid.shape)
    fixed = torch.cat([warp(moving, truth, grid) for truth in truths])
    return moving.repeat(len(truths), 1, *[1] * grid.dim), fixed


def three_pairs(grid: Grid) -> tuple[Tensor, Tensor]:
    turn = [[0.98, -0.17], [0.17, 0.98]]
    return pairs_of(
        grid,
        known(grid, turn, [1.0, 0.5, 0.0]),
        known(grid, [[1.05, 0.0], [0.0, 0.95]], [-1.0, 2.0, 1.0]),
        known(grid, [[1.0, 0.0], [0.0, 1.0]], [2.0, -1.5, 1.0]),
    )


def both(result: Result, grid: Grid) -> Tensor:
    return displacement(result.transform, grid).detach()


# What comes back


TURNED = [[1.08, 0.1], [-0.12, 0.95]]


@pytest.mark.parametrize(("matrix", "shift"), [([[1.0]], [2.3, -1.7, 1.1]), (TURNED, [1.5, -1.2, 0.8])])
@pytest.mark.parametrize("dim", [2, 3])
def test_a_known_motion_comes_back_within_a_tenth_of_a_millimetre(dim, matrix, shift):
    grid = GRIDS[dim]
    truth = known(grid, matrix, shift)
    moving, fixed = pairs_of(grid, truth)
    model = network(grid, AFFINE)
    start = model(moving, fixed, grid)
    refined = refine(model, start, grid, Refinement(steps={2: 120, 3: 300}[dim]))
    seen = fixed[:, 0] > 0.1  # empty space says nothing about where it went
    error = (both(refined.result, grid) - displacement(truth, grid)).norm(dim=-1)[seen]
    assert error.max() < 0.1
    assert both(start, grid).abs().max() == 0
    assert displacement(truth, grid).norm(dim=-1)[seen].mean() > 1.8


def test_the_weights_find_the_way_too():
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid)
    refined = refine(model, model(moving, fixed, grid), grid, Refinement(steps=20, mode="weights", rate=1e-3))
    assert (refined.curve[-1] < 0.3 * refined.curve[0]).all()


# One by one or together


@pytest.mark.parametrize("images", [0.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", [2, 3])
def test_three_pairs_together_are_three_pairs_one_by_one(dim, mode, images):
    grid = GRIDS[dim]
    moving, fixed = three_pairs(grid)
    model = network(grid)
    # Adam's first steps turn every number by the rate: for a field of its own at every voxel that is rough.
    settings = Refinement(steps=5, mode=mode, rate=RATE[mode], bending=1e-3 if mode == "corrections" else 1.0)
    settings = replace(settings, images=images)
    together = refine(model, model(moving, fixed, grid), grid, settings)
    for i in range(3):
        start = model(moving[[i]], fixed[[i]], grid)
        alone = refine(model, start, grid, settings)
        torch.testing.assert_close(together.curve[:, i : i + 1], alone.curve, rtol=1e-3, atol=1e-6)
        moved = both(together.result, grid)[[i]]
        torch.testing.assert_close(moved, both(alone.result, grid), rtol=0, atol=1e-3)
        assert moved.abs().max() > 0.1


@pytest.mark.parametrize("images", [0.0, 1.0])
def test_corrections_as_they_are_recommended_agree_in_loss_and_to_a_tenth_of_a_millimetre(images):
    """Stiff, in a focus, on coarse maps: where nothing shows, Adam turns rounding into steps."""
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid)
    settings = Refinement(12, "corrections", 0.05, bending=1.0, focus_mm=6.0, coarsen=2, images=images)
    together = refine(model, model(moving, fixed, grid), grid, settings)
    for i in range(3):
        alone = refine(model, model(moving[[i]], fixed[[i]], grid), grid, settings)
        torch.testing.assert_close(together.curve[:, i : i + 1], alone.curve, rtol=5e-3, atol=1e-5)
        moved = both(together.result, grid)[[i]]
        torch.testing.assert_close(moved, both(alone.result, grid), rtol=0, atol=0.15)
        assert moved.abs().max() > 0.5


# The images beside the maps


def maps_and_images(grid: Grid) -> tuple[Result, Tensor, Tensor]:
    """A pair whose maps show nothing, so that only the images can tell how it moved."""
    moving, fixed = pairs_of(grid, known(grid, TURNED, [1.5, -1.2, 0.8]))
    start = network(grid, AFFINE)(moving, fixed, grid)
    empty = torch.zeros_like(moving)
    return replace(start, features=(empty, empty), images=(moving, fixed)), moving, fixed


def test_where_the_maps_are_empty_the_images_bring_the_motion_back():
    grid = GRIDS[2]
    given, _, fixed = maps_and_images(grid)
    truth = displacement(known(grid, TURNED, [1.5, -1.2, 0.8]), grid)
    seen = fixed[:, 0] > 0.1
    blind = refine(network(grid, AFFINE), given, grid, Refinement(steps=120))
    assert both(blind.result, grid).abs().max() == 0
    refined = refine(network(grid, AFFINE), given, grid, Refinement(steps=120, images=1.0))
    # Local NCC leaves the slope of a smooth blob's brightness free: a tenth of the motion is left.
    assert (both(refined.result, grid) - truth).norm(dim=-1)[seen].mean() < 0.1 * truth.norm(dim=-1)[seen].mean()


@pytest.mark.parametrize("coarsen", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_that_of_the_maps_and_so_many_times_one_minus_local_ncc(mode, coarsen):
    grid = Grid((32, 28), (1.0, 1.5), (-10.0, 3.0))
    moving, fixed = three_pairs(grid)
    model = network(grid, itn=(4, 8))
    start = model(moving, fixed, grid)
    settings = Refinement(steps=1, mode=mode, rate=RATE[mode], coarsen=coarsen)
    with_images = refine(model, start, grid, replace(settings, images=0.7))
    plain = refine(model, start, grid, settings)
    a, b = (objectives.averaged(image, coarsen) for image in (moving, fixed))
    at_start = 1 - local_ncc(a, b)  # an untrained model is the identity
    torch.testing.assert_close(with_images.curve[0] - plain.curve[0], 0.7 * at_start, rtol=1e-4, atol=1e-5)
    assert at_start.min() > 0.01


# Sharpened maps


def test_a_sharpened_map_keeps_nothing_all_and_the_border():
    x = torch.linspace(0, 1, 101)[None, None]
    assert torch.equal(sharpened(x, 0.0), x)
    for slope in (1e-2, 4.0, 30.0):
        s = sharpened(x, slope)
        torch.testing.assert_close(s[..., [0, 50, 100]], torch.tensor([[[0.0, 0.5, 1.0]]]), rtol=0, atol=2e-5)
        assert (s.diff() >= 0).all()
        torch.testing.assert_close(s, 1 - s.flip(-1), rtol=0, atol=1e-4)
    torch.testing.assert_close(sharpened(x, 1e-2), x, rtol=0, atol=1e-4)  # towards no slope: as it was
    torch.testing.assert_close(sharpened(x, 4.0)[0, 0, 25], torch.tensor((math.tanh(-0.5) / math.tanh(1) + 1) / 2))
    steep = sharpened(x, 1e4)
    assert torch.equal(steep, torch.where(x == 0.5, 0.5, (x > 0.5).float()))


@pytest.mark.parametrize("mode", MODES)
def test_refinement_compares_the_sharpened_maps_before_it_averages_them(mode):
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid)
    start = model(moving, fixed, grid)
    settings = Refinement(1, mode, rate=RATE[mode], coarsen=2, sharpen=8.0)
    maps = tuple(objectives.averaged(sharpened(image, 8.0), 2) for image in (moving, fixed))
    expected = objectives.refinement(maps, Identity(2), grid.coarsened(2))
    torch.testing.assert_close(refine(model, start, grid, settings).curve[0], expected)
    assert (expected - refine(model, start, grid, replace(settings, sharpen=0.0)).curve[0]).abs().min() > 1e-3


def test_maps_that_are_unsure_of_the_inside_align_by_their_borders_once_sharpened():
    """One map is sure of its square, the other of half of it only: the borders agree, the brightness does not."""
    grid = Grid((32, 32))
    x = torch.arange(32.0)
    inside = torch.sigmoid(8 * (6 - (x - 15.5).abs()))
    moving = (inside[:, None] * inside)[None, None]
    doubt = torch.where(x < 15.5, 1.0, 0.62)[:, None]
    fixed = moving * doubt
    start = network(grid, AFFINE)(moving, fixed, grid)
    settings = Refinement(steps=100)
    moved = {
        slope: both(refine(network(grid, AFFINE), start, grid, replace(settings, sharpen=slope)).result, grid)
        for slope in (0.0, 30.0)
    }
    square = moving[:, 0] > 0.5
    plain, sharp = (float(moved[slope].norm(dim=-1)[square].mean()) for slope in (0.0, 30.0))
    assert sharp < 0.5 * plain


@pytest.mark.parametrize("mode", MODES)
def test_what_was_refined_carries_the_images_on(mode):
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid, itn=(4, 8))
    refined = refine(model, model(moving, fixed, grid), grid, Refinement(1, mode, rate=RATE[mode])).result
    assert refined.images is not None
    assert torch.equal(refined.images[0], moving)
    assert torch.equal(refined.images[1], fixed)


@pytest.mark.parametrize("mode", MODES)
def test_a_result_without_images_gets_one_sentence(mode):
    grid = GRIDS[2]
    model = network(grid)
    start = replace(model(*three_pairs(grid), grid), images=None)
    with pytest.raises(ValueError, match="carries no images") as caught:
        refine(model, start, grid, Refinement(1, mode, images=1.0))
    assert one_sentence(caught.value)


# What is returned


@pytest.mark.parametrize("mode", MODES)
def test_the_best_is_kept_and_never_worse_than_the_start(mode):
    """A rate far too large: the loss jumps up and down, what is returned is the lowest point of each pair's curve."""
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid)
    start = model(moving, fixed, grid)
    refined = refine(model, start, grid, Refinement(steps=12, mode=mode, rate=30 * RATE[mode]))
    assert (refined.curve.diff(dim=0) > 0).any()
    assert refined.curve.shape == (13, 3)
    assert refined.stopped.tolist() == [12, 12, 12]
    torch.testing.assert_close(refined.curve[0], objectives.refinement(start.features, start.transform, grid))
    reached = objectives.refinement(refined.result.features, refined.result.transform, grid)
    torch.testing.assert_close(reached, refined.curve.amin(0), rtol=1e-4, atol=1e-6)
    assert (reached <= refined.curve[0]).all()


@pytest.mark.parametrize("mode", OWN)
def test_the_curve_and_the_best_hold_the_bending_energy_too(mode):
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid, SPLINE)
    start = model(moving, fixed, grid)
    weight = 1000.0
    loose, stiff = (
        refine(model, start, grid, Refinement(steps=15, mode=mode, rate=3 * RATE[mode], bending=bending))
        for bending in (0.0, weight)
    )
    energies = []
    for refined in (loose, stiff):
        spline = refined.result.transform
        energies.append(bending_energy_spline_plain(spline.coefficients, spline.grid, grid))
    assert (energies[1] < 0.5 * energies[0]).all()
    data = objectives.refinement(stiff.result.features, stiff.result.transform, grid)
    torch.testing.assert_close(stiff.curve.amin(0), data + weight * energies[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_no_steps_return_what_was_given(mode):
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid)
    nn.init.normal_(model.stages[0].out.bias, std=0.3)
    start = model(moving, fixed, grid)
    refined = refine(model, start, grid, Refinement(steps=0, mode=mode))
    torch.testing.assert_close(both(refined.result, grid), both(start, grid), rtol=0, atol=1e-5)
    assert both(start, grid).abs().max() > 0.5
    assert refined.curve.shape == (1, 3)
    assert refined.stopped.tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", OWN)
def test_the_result_has_the_same_form_as_the_models(mode):
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid)
    start = model(moving, fixed, grid)
    with torch.no_grad():  # whoever calls, refinement needs gradients and hands out none
        refined = refine(model, start, grid, Refinement(steps=2, mode=mode))
    assert isinstance(refined, Refined)
    assert len(refined.result.steps) == 2
    for before, after in zip(start.steps, refined.result.steps, strict=True):
        assert before.parameters.shape == after.parameters.shape
        assert not torch.equal(before.parameters, after.parameters)
        assert not after.parameters.requires_grad
    assert not refined.curve.requires_grad
    again = refine(model, refined.result, grid, Refinement(steps=2))  # and can be refined further
    torch.testing.assert_close(again.curve[0], refined.curve.amin(0), rtol=1e-4, atol=1e-6)


# What is left alone


@pytest.mark.parametrize("mode", MODES)
def test_the_model_and_the_result_are_left_as_they_were(mode):
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid, itn=(4, 6))
    for parameter in model.itn.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    start = model(moving, fixed, grid)
    kept = [start.features[0].detach().clone(), *(step.parameters.detach().clone() for step in start.steps)]
    refine(model, start, grid, Refinement(steps=3, mode=mode))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model.itn.parameters()] == [False] * len(list(model.itn.parameters()))
    assert not model.training
    now = [start.features[0], *(step.parameters for step in start.steps)]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_the_itn_plays_no_part(mode):
    """Planted: an ITN of nothing but NaN, after its maps were made."""
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid, itn=(4, 6))
    start = model(moving, fixed, grid)
    settings = Refinement(steps=5, mode=mode, rate=RATE[mode] / 5)
    expected = refine(model, start, grid, settings)
    for parameter in model.itn.parameters():
        nn.init.constant_(parameter, torch.nan)
    torch.testing.assert_close(refine(model, start, grid, settings).curve, expected.curve, rtol=0, atol=0)
    assert (expected.curve[-1] != expected.curve[0]).all()
    assert expected.result.features[0].grad_fn is None


def test_labels_have_no_way_in():
    assert set(inspect.signature(refine).parameters) == {"model", "result", "grid", "settings", "loss", "watch"}


# Patience


def scripted(values: list[list[float]]):
    """A loss that falls and rises by a script, whatever the transform, and still moves it at every step."""
    calls = iter(values)

    def loss(features: tuple[Tensor, Tensor], transform: Transform, grid: Grid, *_: object) -> Tensor:
        push = displacement(transform, grid).flatten(1).sum(1)
        return torch.tensor(next(calls))[: len(push)] + push - push.detach()

    return loss


def test_a_pair_that_stands_still_stops_and_the_others_go_on():
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid, AFFINE)
    # pair 0 plateaus at 4 from step 1 on, and would find 1 at step 6, too late; pair 1 falls; pair 2 never moves
    first, second, third = [5.0, 4, 4, 4, 4, 4, 1, 1, 1], [9.0, 8, 7, 6, 5, 4, 3, 2, 1], [2.0] * 9
    script = [list(column) for column in zip(first, second, third, strict=True)]
    seen: list[Tensor] = []
    refined = refine(
        model,
        model(moving, fixed, grid),
        grid,
        Refinement(steps=8, patience=3),
        scripted(script),
        watch=lambda count, transform: seen.append(displacement(transform, grid).detach()),
    )
    assert refined.stopped.tolist() == [4, 8, 3]
    assert refined.curve[:, 0].tolist() == [5, 4, 4, 4, 4, 4, 4, 4, 4]
    assert refined.curve[:, 1].tolist() == second
    assert refined.curve[:, 2].tolist() == third
    # each pair's transform is that of its lowest loss: after 1 step, after all, at the start
    torch.testing.assert_close(both(refined.result, grid), torch.stack([seen[1][0], seen[8][1], seen[0][2]]))
    assert (seen[2][0] - seen[1][0]).abs().max() > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_all_pairs_stop_and_so_does_the_loop(mode):
    grid = GRIDS[2]
    moving, fixed = (image[:1] for image in three_pairs(grid))
    model = network(grid, AFFINE)
    script = [[3.0], [2.0], [2.0], [2.0]]  # a fifth call would raise StopIteration
    settings = Refinement(steps=30, mode=mode, patience=2)
    refined = refine(model, model(moving, fixed, grid), grid, settings, scripted(script))
    assert refined.curve[:, 0].tolist() == [3, 2, 2, 2]
    assert refined.stopped.tolist() == [3]


@pytest.mark.parametrize("mode", MODES)
def test_pairs_may_stop_at_different_times(mode):
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid)
    settings = Refinement(steps=40, mode=mode, rate=RATE[mode], patience=3, tolerance=0.2)
    together = refine(model, model(moving, fixed, grid), grid, settings)
    assert len(set(together.stopped.tolist())) > 1
    assert together.curve.shape == (together.stopped.max() + 1, 3)
    for i, stopped in enumerate(together.stopped.tolist()):
        alone = refine(model, model(moving[[i]], fixed[[i]], grid), grid, settings)
        assert alone.stopped.item() == stopped
        torch.testing.assert_close(together.curve[: stopped + 1, i], alone.curve[:, 0], rtol=1e-2, atol=1e-5)
        assert (together.curve[stopped:, i] == together.curve[stopped, i]).all()


def test_a_fall_counts_from_the_tolerance_on_also_below_zero():
    grid = GRIDS[2]
    moving, fixed = (image[:1] for image in three_pairs(grid))
    model = network(grid, AFFINE)
    for script, stopped in (
        ([4.0, 3.9, 3.8, 3.7], 3),  # from 4 less than a tenth in each, and in all
        ([4.0, 3.9, 3.5, 3.4, 3.3, 3.2], 5),  # 3.5 is an eighth less than 4
        ([-4.0, -4.1, -4.2, -4.3], 3),
        ([-4.0, -4.1, -4.5, -4.6, -4.7, -4.8], 5),
    ):
        settings = Refinement(steps=len(script) - 1, patience=3, tolerance=0.1)
        refined = refine(model, model(moving, fixed, grid), grid, settings, scripted([[v] for v in script]))
        assert refined.stopped.item() == stopped
        assert refined.curve.min().item() == pytest.approx(min(script), abs=1e-3)
        # one step fewer of patience would have been too few
        impatient = dataclasses.replace(settings, patience=2)
        early = refine(model, model(moving, fixed, grid), grid, impatient, scripted([[v] for v in script]))
        assert early.stopped.item() < stopped


def test_a_first_loss_of_nan_is_no_reason_to_stop():
    """Whatever number follows is a fall; what never becomes a number stops."""
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid, AFFINE)
    columns = [math.nan, 5.0, 4, 3, 2, 1], [math.nan] * 6, [math.nan, math.nan, 5, 5, 5, 5]
    for tolerance in (0.0, 1e-3):
        script = [list(row) for row in zip(*columns, strict=True)]
        settings = Refinement(steps=5, patience=3, tolerance=tolerance)
        refined = refine(model, model(moving, fixed, grid), grid, settings, scripted(script))
        assert refined.stopped.tolist() == [5, 3, 5]
        assert refined.loss.tolist() == [1, math.inf, 5]
        assert refined.curve[:, 0].tolist() == [math.inf, 5, 4, 3, 2, 1]


def test_without_patience_nothing_stops():
    grid = GRIDS[2]
    moving, fixed = (image[:1] for image in three_pairs(grid))
    model = network(grid, AFFINE)
    refined = refine(model, model(moving, fixed, grid), grid, Refinement(steps=9), scripted([[1.0]] * 10))
    assert refined.stopped.item() == 9
    assert len(refined.curve) == 10


# Watching, precision, settings


@pytest.mark.parametrize("mode", MODES)
def test_a_watcher_sees_every_transform_on_the_way(mode):
    grid = GRIDS[2]
    moving, fixed = (image[:1] for image in three_pairs(grid))
    model = network(grid)
    start = model(moving, fixed, grid)
    seen: list[tuple[int, Tensor]] = []

    def watch(count: int, transform: Transform) -> None:
        with torch.no_grad():
            seen.append((count, objectives.refinement(start.features, transform, grid)))

    refined = refine(model, start, grid, Refinement(steps=5, mode=mode, rate=RATE[mode]), watch=watch)
    assert [count for count, _ in seen] == [0, 1, 2, 3, 4, 5]
    torch.testing.assert_close(torch.stack([loss for _, loss in seen]), refined.curve)
    unwatched = refine(model, start, grid, Refinement(steps=5, mode=mode, rate=RATE[mode]))
    assert torch.equal(unwatched.curve, refined.curve)


def test_weights_are_watched_one_pair_at_a_time():
    grid = GRIDS[2]
    model = network(grid)
    start = model(*three_pairs(grid), grid)
    with pytest.raises(ValueError) as caught:
        refine(model, start, grid, Refinement(mode="weights"), watch=lambda count, transform: None)
    assert one_sentence(caught.value, "one pair")


@pytest.mark.parametrize("mode", MODES)
def test_mixed_precision_around_it_changes_nothing(mode):
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid)
    start = model(moving, fixed, grid)
    settings = Refinement(steps=4, mode=mode, rate=RATE[mode], bending=1.0)
    expected = refine(model, start, grid, settings)
    with torch.autocast("cpu", torch.bfloat16):
        refined = refine(model, start, grid, settings)
    assert torch.equal(refined.curve, expected.curve)
    assert both(refined.result, grid).dtype == torch.float32
    assert torch.equal(both(refined.result, grid), both(expected.result, grid))


def test_settings_that_mean_nothing_get_one_sentence():
    with pytest.raises(ValueError) as caught:
        Refinement(mode="weight")
    assert one_sentence(caught.value, "parameters", "weights", "'weight'")
    with pytest.raises(ValueError) as caught:
        Refinement(steps=-1)
    assert one_sentence(caught.value, "-1")
    with pytest.raises(ValueError) as caught:
        Refinement(sharpen=-2.0)
    assert one_sentence(caught.value, "-2.0")
    with pytest.raises(ValueError) as caught:
        Refinement(images=-3.0)
    assert one_sentence(caught.value, "-3.0")
    with pytest.raises(ValueError) as caught:
        Refinement(coarser=(10,))
    assert one_sentence(caught.value, "greedy", "parameters")
    for wrong in ({"coarser": (10, 0)}, {"smoothing_vox": (-1.0, 0.5)}):
        with pytest.raises(ValueError) as caught:
            Refinement(mode="greedy", **wrong)
        assert one_sentence(caught.value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "model",
    [
        lambda grid: GeoReg(GeoRegConfig(grid, (4, 8, 8), (0, 3, 3), (3, 3))),
        lambda grid: VoxelMorph(VoxelMorphConfig(grid, widths=(4, 8))),
        lambda grid: VoxelMorph(VoxelMorphConfig(grid, widths=(4, 8), steps=4)),
    ],
    ids=["georeg", "voxelmorph", "velocity"],
)
def test_steps_are_joined_as_their_network_joins_them(model, mode):
    """Displacements of a GeoReg add up over its levels: composed, they would be another transform."""
    torch.manual_seed(0)
    grid = Grid((32, 24), (1.0, 1.5))
    network = model(grid).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    moving, fixed = torch.rand(2, 2, 1, *grid.shape)
    start = network(moving, fixed, grid)
    assert both(start, grid).abs().max() > 0.05
    settings = Refinement(steps=0, mode=mode)
    refined = refine(network, start, grid, settings).result
    torch.testing.assert_close(both(refined, grid), both(start, grid), rtol=0, atol=1e-5)
    if mode not in ("corrections", "greedy"):  # those are other steps, and composed
        assert [step.join for step in refined.steps] == [step.join for step in start.steps]
    one_step = refine(network, start, grid, replace(settings, steps=1, rate=1e-7, smoothing_vox=(1.0, 0.0))).result
    torch.testing.assert_close(both(one_step, grid), both(start, grid), rtol=0, atol=1e-2)


def test_corrections_are_composed_with_what_was_found():
    """They start at zero, coarse to fine, and move the fixed points first."""
    grid = GRIDS[2]
    truth = known(grid, TURNED, [1.5, -1.2])
    moving, fixed = pairs_of(grid, truth)
    model = network(grid, AFFINE)
    nn.init.normal_(model.stages[0].out.bias, std=0.02)
    start = model(moving, fixed, grid)
    steps = corrections(start.transform, grid)
    assert [step.build(step.parameters).grid for step in steps] == [grid, grid.coarsened(4), grid.coarsened(2), grid]
    torch.testing.assert_close(steps[0].parameters, both(start, grid))
    assert all(step.parameters.abs().max() == 0 for step in steps[1:])
    shifted = torch.ones_like(steps[1].parameters)
    moved = assemble(steps, [steps[0].parameters, shifted, *(step.parameters for step in steps[2:])])
    points = grid_points(grid)[None, 8:-8, 8:-8].flatten(1, 2)
    torch.testing.assert_close(moved(points), Dense(steps[0].parameters, grid)(points + 1), rtol=0, atol=1e-4)
    refined = refine(model, start, grid, Refinement(150, "corrections", rate=0.1, bending=0.1))
    assert (refined.curve[-1] < 0.01 * refined.curve[0]).all()
    seen = fixed[:, 0] > 0.1
    before, after = (
        (both(one, grid) - displacement(truth, grid)).norm(dim=-1)[seen].mean() for one in (start, refined.result)
    )
    assert after < 0.4 * before  # inside of a blob every place looks like the next: exact it can not be


def test_corrections_of_a_grid_that_can_not_be_halved_are_on_that_grid_alone():
    grid = Grid((7, 9), (1.0, 1.5))
    steps = corrections(Identity(2), grid)
    assert [step.build(step.parameters).grid for step in steps] == [grid, grid]


# Greedy: levels, and no network at all


GREEDY = Refinement(10, "greedy", rate=0.5, coarser=(20, 15), window_vox=5)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_search_without_a_network_finds_a_known_motion(dim):
    grid = {2: Grid((32, 28), (1.0, 1.5), (-10.0, 3.0)), 3: Grid((20, 24, 16), (1.0, 1.5, 2.0), (-10.0, 3.0, 5.5))}[dim]
    truth = known(grid, TURNED, [1.5, -1.2, 0.8])
    moving, fixed = pairs_of(grid, truth)
    found = search(moving, fixed, grid, replace(GREEDY, rate=0.25), "mse").result
    seen = fixed[:, 0] > 0.2
    away = displacement(truth, grid).norm(dim=-1)[seen].mean()
    left = (both(found, grid) - displacement(truth, grid)).norm(dim=-1)[seen].mean()
    assert left < 0.45 * away  # inside of a blob every place looks like the next
    assert (
        objectives.image_refinement((moving, fixed), found.transform, grid, similarity="mse")
        < 0.05 * (moving - fixed).square().mean()
    )


def test_coarse_levels_find_what_the_finest_alone_can_not():
    """A texture, moved by more than its own grain: at full resolution every place has a better neighbour nearby."""
    grid = Grid((64, 64))
    wide = Grid((80, 64))
    grain = sum(smooth(torch.randn(1, 1, *wide.shape), sigma, wide) * sigma for sigma in (1.0, 2.0, 4.0))
    moving, fixed = grain[:, :, :64], grain[:, :, 6:70]
    alone = search(moving, fixed, grid, replace(GREEDY, steps=45, coarser=()))
    levels = search(moving, fixed, grid, replace(GREEDY, steps=10, coarser=(20, 15)))
    middle = (0, slice(16, 48), slice(16, 48))
    error = [
        float((both(r.result, grid)[middle] - torch.tensor([6.0, 0.0])).norm(dim=-1).mean()) for r in (alone, levels)
    ]
    assert error[1] < 1
    assert error[0] > 3


def test_the_curve_holds_every_level_one_after_the_other():
    grid = Grid((32, 28), (1.0, 1.5), (-10.0, 3.0))
    moving, fixed = three_pairs(grid)
    counts: list[int] = []
    model = network(grid)
    start = model(moving, fixed, grid)
    settings = replace(GREEDY, steps=3, coarser=(5, 4))
    refined = refine(model, start, grid, settings, watch=lambda count, _: counts.append(count))
    assert refined.curve.shape == (6 + 5 + 4, 3)
    assert refined.stopped.tolist() == [12, 12, 12]
    assert counts == [*range(6), *range(5, 10), *range(9, 13)]
    maps = tuple(objectives.averaged(image, 4) for image in (moving, fixed))
    torch.testing.assert_close(refined.curve[0], objectives.refinement(maps, Identity(2), grid.coarsened(4)))
    last = objectives.refinement((moving, fixed), refined.result.transform, grid)
    torch.testing.assert_close(last, refined.curve[11:].amin(0), rtol=1e-4, atol=1e-6)


def test_no_steps_take_no_coarse_ones_either():
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid)
    refined = refine(model, model(moving, fixed, grid), grid, replace(GREEDY, steps=0))
    assert refined.curve.shape == (1, 3)
    assert both(refined.result, grid).abs().max() == 0


def test_the_window_of_local_ncc_is_the_one_that_was_asked_for():
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    for width in (3, 9):
        refined = search(moving, fixed, grid, replace(GREEDY, steps=1, coarser=(), window_vox=width))
        torch.testing.assert_close(refined.curve[0], 1 - local_ncc(moving, fixed, window_vox=width))


def test_only_a_greedy_search_needs_no_network():
    with pytest.raises(ValueError) as caught:
        search(*three_pairs(GRIDS[2]), GRIDS[2], Refinement(1))
    assert one_sentence(caught.value, "greedy", "parameters")


# Greedy, near what the maps show


def two_balls(grid: Grid) -> tuple[Tensor, Tensor]:
    """Pairs of soft balls on empty ground: the first in one corner of the grid, the second in the other."""

    def ball(centre: float, width: float) -> Tensor:
        unit = (grid_points(grid) - torch.tensor(grid.centre)) / (torch.tensor(grid.extent) / 2)
        return (1 - (unit - centre).square().sum(-1) / width**2).clamp(0, 1)[None, None]

    moving = torch.cat([ball(-0.35, 0.3), ball(0.4, 0.35)])
    return moving, torch.cat([ball(-0.4, 0.35), ball(0.37, 0.3)])


NEAR = Refinement(8, "greedy", 0.4, coarser=(6,), focus_mm=4.0, pyramid=1, smoothing_vox=(0.7, 0.0))
ROOMY = {2: Grid((48, 40), (1.0, 1.5), (-10.0, 3.0)), 3: Grid((32, 28, 24), (1.0, 1.5, 2.0), (-10.0, 3.0, 5.5))}


@pytest.mark.parametrize("dim", [2, 3])
def test_a_greedy_focus_finds_what_the_whole_grid_finds_and_moves_nothing_outside(dim):
    grid = ROOMY[dim]
    moving, fixed = two_balls(grid)
    model = network(grid)
    for side in (slice(0, 1), slice(1, 2)):
        start = model(moving[side], fixed[side], grid)
        near, whole = (refine(model, start, grid, s) for s in (NEAR, replace(NEAR, focus_mm=0.0)))
        # The loss of the whole grid is the mean over more voxels: both curves fall in the same steps.
        torch.testing.assert_close(near.curve / near.curve[0], whole.curve / whole.curve[0], rtol=0.02, atol=0.01)
        assert near.curve[-1] < 0.1 * near.curve[0]
        moved = both(near.result, grid)
        shown = fixed[side][:, 0] > 0
        torch.testing.assert_close(moved[shown], both(whole.result, grid)[shown], rtol=0, atol=0.04)
        # The box of the coarse level, whose voxels are larger, reaches further, and its border fades over one of them.
        box = focus_on((moving[side], fixed[side]), Identity(dim), grid, 4.0 + 3 * max(grid.spacing), 1)
        assert box.grid.size < 0.7 * grid.size
        inside = torch.zeros(grid.shape, dtype=torch.bool)
        inside[box.voxels] = True
        assert (moved[0][~inside] == 0).all()
        assert moved.norm(dim=-1).max() > 1


def test_a_greedy_focus_is_that_of_each_pair():
    grid = ROOMY[2]
    moving, fixed = two_balls(grid)
    model = network(grid)
    together = refine(model, model(moving, fixed, grid), grid, NEAR)
    for i in (0, 1):
        alone = refine(model, model(moving[[i]], fixed[[i]], grid), grid, NEAR)
        torch.testing.assert_close(together.curve[:, i], alone.curve[:, 0])
        torch.testing.assert_close(both(together.result, grid)[i], both(alone.result, grid)[0])
    assert together.stopped.tolist() == [14, 14]
    with pytest.raises(ValueError, match="one pair at a time") as caught:
        refine(model, model(moving, fixed, grid), grid, NEAR, watch=lambda count, transform: None)
    assert one_sentence(caught.value, "pair by pair")


def test_a_watched_greedy_focus_shows_the_whole_field():
    grid = ROOMY[2]
    moving, fixed = (image[:1] for image in two_balls(grid))
    model = network(grid)
    seen: list[Transform] = []
    refined = refine(model, model(moving, fixed, grid), grid, NEAR, watch=lambda count, t: seen.append(t))
    assert {t.grid for t in seen} == {grid.coarsened(2), grid}
    losses = [objectives.refinement((moving, fixed), t, grid, levels=1) for t in seen[-9:]]
    relative = torch.stack(losses) / losses[0]
    torch.testing.assert_close(relative, refined.curve[-9:] / refined.curve[-9], rtol=0.02, atol=0.01)


def test_a_focus_leaves_the_rest_of_the_start_as_it_was():
    grid = ROOMY[2]
    moving, fixed = (image[:1] for image in two_balls(grid))
    model = network(grid)
    start = model(moving, fixed, grid)
    field = 0.3 * torch.randn(1, *grid.shape, 2)
    moved = replace(start, transform=Dense(field, grid))
    refined = refine(model, moved, grid, replace(NEAR, coarser=())).result
    box = focus_on((moving, fixed), Dense(field, grid), grid, 4.0, levels=1)
    inside = torch.zeros(grid.shape, dtype=torch.bool)
    inside[box.voxels] = True
    assert torch.equal(both(refined, grid)[0][~inside], field[0][~inside])
    assert not torch.equal(both(refined, grid)[0][inside], field[0][inside])


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_the_pyramid_has_as_many_levels_as_were_asked_for(mode, levels):
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid)
    settings = Refinement(1, mode, rate=RATE[mode], pyramid=levels)
    found = refine(model, model(moving, fixed, grid), grid, settings).curve[0]
    scales = [(objectives.averaged(moving, 2**k), objectives.averaged(fixed, 2**k)) for k in range(levels)]
    expected = torch.stack([objectives.relative_mse(m, f, objectives.scale_of(m, f)) for m, f in scales]).mean(0)
    torch.testing.assert_close(found, expected)


def test_a_pyramid_without_a_level_gets_one_sentence():
    with pytest.raises(ValueError) as caught:
        Refinement(pyramid=0)
    assert one_sentence(caught.value, "1 resolution")


# Greedy, from two starts


def test_of_two_searches_each_pair_keeps_the_better():
    """One pair starts well, the other far out: a texture has a better neighbour in every direction."""
    grid = Grid((64, 64))
    wide = Grid((80, 64))
    torch.manual_seed(0)
    grain = sum(smooth(torch.randn(2, 1, *wide.shape), sigma, wide) * sigma for sigma in (1.0, 2.0, 4.0))
    moving, fixed = grain[:, :, :64], grain[:, :, 6:70]
    right, wrong = torch.zeros(2, *grid.shape, 2)
    right[..., 0], wrong[..., 1] = 6.0, 25.0
    model = network(grid)
    begun = replace(model(moving, fixed, grid), transform=Dense(torch.stack([right, wrong]), grid))
    settings = replace(GREEDY, steps=5, coarser=())
    counts: list[int] = []
    once = refine(model, begun, grid, settings)
    nothing = refine(model, model(moving, fixed, grid), grid, settings)
    twice = refine(model, begun, grid, replace(settings, restart=True), watch=lambda count, _: counts.append(count))
    assert once.loss[0] < nothing.loss[0]
    assert once.loss[1] > nothing.loss[1]
    torch.testing.assert_close(twice.loss, torch.minimum(once.loss, nothing.loss))
    found = both(twice.result, grid)
    assert torch.equal(found[0], both(once.result, grid)[0])
    assert torch.equal(found[1], both(nothing.result, grid)[1])
    assert torch.equal(twice.curve, torch.cat([once.curve, nothing.curve]))
    assert counts == list(range(12))
    assert twice.stopped.tolist() == [10, 10]


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_that_of_the_result(mode):
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid)
    refined = refine(model, model(moving, fixed, grid), grid, Refinement(5, mode, rate=RATE[mode]))
    torch.testing.assert_close(refined.loss, refined.curve.amin(0))
    reached = objectives.refinement((moving, fixed), refined.result.transform, grid)
    torch.testing.assert_close(refined.loss, reached, rtol=1e-4, atol=1e-6)


def test_a_second_search_of_no_steps_leaves_the_start():
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid)
    field = torch.full((3, *grid.shape, 2), 2.0)
    begun = replace(model(moving, fixed, grid), transform=Dense(field, grid))
    found = refine(model, begun, grid, replace(GREEDY, steps=0, restart=True)).result
    assert torch.equal(both(found, grid), field)


@pytest.mark.parametrize("mode", OWN)
def test_only_a_greedy_search_begins_twice(mode):
    with pytest.raises(ValueError, match="Second searches are for greedy") as caught:
        Refinement(mode=mode, restart=True)
    assert one_sentence(caught.value, mode)


# What would go wrong unseen


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": 0.0},
        {"rate": -0.5},
        {"rate": math.nan},
        {"rate": math.inf},
        {"bending": -1.0},
        {"bending": math.nan},
        {"focus_mm": -6.0},
        {"focus_mm": math.nan},
        {"coarsen": 0},
        {"window_vox": 4},
        {"window_vox": 0},
        {"patience": -1},
        {"tolerance": -1.0},
    ],
)
def test_settings_that_make_no_sense_get_one_sentence(wrong):
    with pytest.raises(ValueError) as caught:
        Refinement(**wrong)
    assert one_sentence(caught.value)


def test_a_search_that_began_nowhere_keeps_the_one_from_nothing():
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid)
    nowhere = replace(model(moving, fixed, grid), transform=Dense(torch.full((3, *grid.shape, 2), torch.nan), grid))
    found = refine(model, nowhere, grid, replace(GREEDY, restart=True))
    torch.testing.assert_close(found.loss, refine(model, model(moving, fixed, grid), grid, GREEDY).loss)
    assert both(found.result, grid).isfinite().all()


def test_corrections_have_grids_on_which_bending_can_be_measured():
    grid = Grid((8, 32))
    assert [step.parameters.shape[1:3] for step in corrections(Identity(2), grid)] == [(8, 32), (4, 16), (8, 32)]
    moving, fixed = pairs_of(grid, known(grid, [[1.0]], [0.5, 1.0]))
    model = network(grid)
    settings = Refinement(3, "corrections", rate=0.1, bending=1.0)
    assert refine(model, model(moving, fixed, grid), grid, settings).curve.isfinite().all()


def test_a_focus_does_not_change_the_price_of_bending():
    grid = ROOMY[2]
    moving, fixed = (image[:1] for image in two_balls(grid))
    model = network(grid)
    hill = torch.exp(-(grid_points(grid) - grid_points(grid)[16, 12]).square().sum(-1) / 8)
    begun = replace(model(moving, fixed, grid), transform=Dense(0.5 * hill[None, ..., None].expand(1, -1, -1, 2), grid))

    def price(settings: Refinement) -> Tensor:
        free, dear = (refine(model, begun, grid, replace(settings, bending=weight)).curve[0] for weight in (0.0, 10.0))
        return dear - free

    near = replace(NEAR, steps=1, coarser=(), focus_mm=12.0)
    assert focus_on((moving, fixed), begun.transform, grid, 12.0, levels=1).grid.size < 0.8 * grid.size
    torch.testing.assert_close(price(near), price(replace(near, focus_mm=0.0)), rtol=0.05, atol=1e-6)
    assert price(near) > 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_images_that_are_not_finite_are_refused(mode):
    grid = GRIDS[2]
    moving, fixed = three_pairs(grid)
    model = network(grid)
    begun = model(moving, fixed, grid)
    hurt = fixed.clone()
    hurt[1, 0, 5, 5] = torch.nan
    with pytest.raises(ValueError, match="not finite") as caught:
        refine(model, replace(begun, features=(moving, hurt)), grid, Refinement(1, mode, rate=RATE[mode]))
    assert one_sentence(caught.value)
    with pytest.raises(ValueError, match="not finite"):
        search(moving, hurt, grid, GREEDY)
