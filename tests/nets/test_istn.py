"""ISTN: parameter counts of the public code, the identity at the start, bounds, folds, millimetres, gradients."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from truths.fields import one_sentence, points_inside

from regteach import bspline, objectives
from regteach.affine import Affine, AffineBounds
from regteach.grid import Grid
from regteach.nets import istn
from regteach.nets.istn import (
    ISTN,
    RIGID,
    AffineStage,
    ISTNConfig,
    SplineStage,
    count_parameters,
    public,
)
from regteach.result import assemble
from regteach.sampling import grid_points, warp
from regteach.transforms import Compose, FreeForm, displacement, jacobian_determinant

# Anisotropic, not cubic, away from 0, sizes that the levels do not divide.
GRIDS = {2: Grid((32, 29), (1.0, 1.5), (-10.0, 3.0)), 3: Grid((32, 28, 36), (1.0, 1.5, 2.0), (-10.0, 3.0, 5.5))}
SMALL = {2: GRIDS[2], 3: Grid((16, 12, 18), (1.0, 1.5, 2.0), (-10.0, 3.0, 5.5))}
AFFINE = AffineStage(widths=(4, 8), hidden=8)
TURN = AffineStage(RIGID, widths=(4, 8), hidden=8)
COARSE, FINE = SplineStage(12.0, widths=(4, 8)), SplineStage(6.0, widths=(4, 8))
STAGES = {
    "affine": (AFFINE,),
    "rigid": (TURN,),
    "spline": (FINE,),
    "affine, two splines": (AFFINE, COARSE, FINE),
    "rigid, spline of its own limit": (TURN, dataclasses.replace(FINE, limit_mm=9.0)),
}
LEVELS = (4, 6)


def config(grid: Grid, *stages, **options) -> ISTNConfig:
    return ISTNConfig(grid, stages or STAGES["affine, two splines"], **{"itn": LEVELS} | options)


def images(grid: Grid, batch: int = 2, channels: int = 1) -> tuple[Tensor, Tensor]:
    return torch.rand(batch, channels, *grid.shape), torch.rand(batch, channels, *grid.shape)


def shaken(model: ISTN, size: float = 0.3) -> ISTN:
    """The same model with last layers that are no longer zero."""
    for stage in model.stages:
        for parameter in stage.out.parameters():
            nn.init.normal_(parameter, std=size)
    if model.itn is not None:
        nn.init.normal_(model.itn.head[-1].weight, std=size)
    return model


# The public architecture


@pytest.mark.parametrize(
    ("dim", "kind", "itn", "stn"),
    [
        (2, "affine", 5_031, 164_142),
        (2, "bspline", 5_031, 2_090_506),
        (3, "affine", 13_655, 148_020),
        (3, "bspline", 13_655, 4_563_219),
    ],
)
def test_parameters_of_the_public_code(dim, kind, itn, stn):
    grid = Grid((128, 128)) if dim == 2 else Grid((64, 64, 64), 3.0)
    model = ISTN(public(grid, kind))
    assert count_parameters(model.itn) == itn
    assert count_parameters(model.stages) == stn
    assert count_parameters([model.itn, *model.stages]) == count_parameters(model) == itn + stn
    assert count_parameters(ISTN(public(grid, kind, itn=False))) == stn
    assert sum(p.numel() for p in model.state_dict().values()) == itn + stn  # no buffers


def test_control_points_and_bounds_of_the_public_code():
    flat, brain = public(Grid((128, 128)), "bspline"), public(Grid((64, 64, 64), 3.0), "bspline")
    assert bspline.control_grid(flat.grid, flat.stages[0].control_mm).shape == (15, 15)
    assert bspline.control_grid(brain.grid, brain.stages[0].control_mm).shape == (9, 9, 9)
    assert flat.stages[0].limit_mm == pytest.approx(0.2 * 64)
    assert brain.stages[0].limit_mm == pytest.approx(0.2 * 96)
    bounds = public(Grid((128, 128)), "affine").stages[0].bounds
    assert (bounds.translation_mm, bounds.rotation_deg, bounds.shear_ratio) == (pytest.approx(6.4), 45, 0)
    assert bounds.scale_ratio == pytest.approx(1.2214, abs=1e-4)


@pytest.mark.parametrize("kind", ["affine", "bspline"])
def test_the_public_network_runs_and_starts_at_the_identity(kind):
    grid = Grid((128, 128))
    model = ISTN(public(grid, kind, structures=2))
    result = model(*images(grid, 1), grid)
    assert displacement(result.transform, grid).abs().max() == 0
    assert result.features[0].shape == (1, 2, 128, 128)


def test_the_public_code_has_two_kinds():
    with pytest.raises(ValueError) as caught:
        public(Grid((128, 128)), "rigid")
    assert one_sentence(caught.value, "affine", "bspline", "rigid")


# The start


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("dim", [2, 3])
def test_the_untrained_network_is_the_identity(dim, name):
    grid = GRIDS[dim]
    for options in ({}, {"itn": (), "shrink": 2}):
        model = ISTN(config(grid, *STAGES[name], **options))
        moving, fixed = images(grid, 2 if dim == 2 else 1)
        result = model(moving, fixed, grid)
        assert len(result.steps) == len(STAGES[name])
        assert all(not step.parameters.any() for step in result.steps)
        assert displacement(result.transform, grid).abs().max() == 0
        assert (jacobian_determinant(result.transform, grid) == 1).all()
        torch.testing.assert_close(warp(moving, result.transform, grid), moving, rtol=0, atol=1e-5)
    # what the test could miss: a network that can not move anything
    moved = displacement(shaken(model)(moving, fixed, grid).transform, grid)
    assert moved.abs().max() > 0.05


def test_the_identity_on_a_grid_whose_numbers_are_not_binary():
    grid = Grid((20, 16, 18), (1.1, 1.3, 0.7), (-90.3, 13.7, 40.1))
    result = ISTN(config(grid, AFFINE, FINE))(*images(grid, 1), grid)
    assert displacement(result.transform, grid).abs().max() < 3e-5  # float32 at 90 mm


# Bounds


@pytest.mark.parametrize("dim", [2, 3])
def test_a_rigid_stage_turns_and_shifts_and_nothing_else(dim):
    grid = SMALL[dim]
    head = ISTN(config(grid, TURN)).stages[0]
    z = 3 * torch.randn(50, len(head.slots))
    assert z.shape[1] == {2: 3, 3: 6}[dim]
    rigid = head.build(z, grid)
    assert isinstance(rigid, Affine)
    unit = torch.eye(dim).expand(50, -1, -1)
    torch.testing.assert_close(rigid.matrix @ rigid.matrix.mT, unit, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(rigid.matrix), torch.ones(50), rtol=0, atol=1e-5)
    assert 19 < rigid.translation.abs().max() <= 20
    centre = torch.tensor(grid.centre).expand(50, 1, -1)
    torch.testing.assert_close(rigid(centre)[:, 0], centre[:, 0] + rigid.translation, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dim", [2, 3])
def test_an_affine_stage_stays_inside_its_bounds(dim):
    bounds = AffineBounds(translation_mm=7.0, rotation_deg=30.0, scale_ratio=1.3, shear_ratio=0.0)
    head = ISTN(config(SMALL[dim], AffineStage(bounds, (4, 8)))).stages[0]
    affine = head.build(100 * torch.randn(200, len(head.slots)), SMALL[dim])
    singular = torch.linalg.svdvals(affine.matrix)  # without shears these are the scales
    assert 1.29 < singular.max() <= 1.3001
    assert 1 / 1.3001 <= singular.min() < 1 / 1.29
    assert affine.translation.abs().max() <= 7
    assert torch.linalg.det(affine.matrix).min() > 0


@pytest.mark.parametrize("dim", [2, 3])
def test_each_number_moves_the_part_that_it_stands_for(dim):
    """A part that may not move has no number; the others keep the order of AffineBounds.parts."""
    counts = AffineBounds.counts(dim)
    free = {"translation_mm": 5.0, "rotation_deg": 20.0, "scale_ratio": 1.4, "stretch_axes_deg": 30.0}
    fixed = {"translation_mm": 0.0, "rotation_deg": 0.0, "scale_ratio": 1.0, "stretch_axes_deg": 0.0}
    for part, name in enumerate(free):
        bounds = AffineBounds(**{**free, name: fixed[name]}, shear_ratio=0.2)
        head = ISTN(config(SMALL[dim], AffineStage(bounds, (4, 8)))).stages[0]
        gone = {part, 3} if name == "scale_ratio" else {part}  # without stretch its axes mean nothing
        kept = [z for k, n in enumerate(counts) for z in [k not in gone] * n]
        assert len(head.slots) == sum(kept)
        z = torch.randn(3, sum(kept))
        every = torch.zeros(3, sum(counts))
        every[:, torch.tensor(kept)] = z
        expected = bounds.parts(every, dim).about(SMALL[dim].centre)
        torch.testing.assert_close(head.build(z, SMALL[dim]).matrix, expected.matrix)
        torch.testing.assert_close(head.build(z, SMALL[dim]).translation, expected.translation)


@pytest.mark.parametrize("dim", [2, 3])
def test_splines_stay_below_their_limit(dim):
    grid = SMALL[dim]
    for stage, limit in ((FINE, 6.0 * bspline.FOLD_FREE[dim]), (dataclasses.replace(FINE, limit_mm=2.5), 2.5)):
        head = ISTN(config(grid, stage)).stages[0]
        ctrl = bspline.control_grid(grid, 6.0)
        spline = head.build(100 * torch.randn(2, *ctrl.shape, dim), grid)
        assert isinstance(spline, FreeForm)
        assert spline.grid == ctrl
        assert spline.coefficients.abs().max().item() == pytest.approx(limit, rel=1e-6)
        assert displacement(spline, grid).abs().max() <= limit * 1.0001


@pytest.mark.parametrize("dim", [2, 3])
def test_default_splines_never_fold(dim):
    """The worst parameters are huge ones of any sign: every coefficient at its limit."""
    grid = SMALL[dim]
    model = ISTN(config(grid, AFFINE, COARSE, FINE, itn=()))
    steps = model(*images(grid, 1), grid).steps
    wild = ISTN(config(grid, dataclasses.replace(FINE, limit_mm=6.0), itn=())).stages[0]
    folded = 0
    for _ in range(12):
        z = [100 * torch.randn_like(step.parameters) for step in steps]
        whole = assemble(steps, z)
        assert isinstance(whole, Compose)
        assert jacobian_determinant(whole, grid).min() > 0
        for step, parameters in zip(steps, z, strict=True):
            assert jacobian_determinant(step.build(parameters), grid).min() > 0
        fine = steps[-1].build(z[-1])
        assert torch.linalg.det(fine.jacobian(points_inside(grid, 2000, dtype=torch.float32))).min() > 0
        folded += int(jacobian_determinant(wild.build(z[-1], grid), grid).min() <= 0)
    assert folded > 0  # twice the limit folds: the test can fail


# Stages


@pytest.mark.parametrize("shrink", [1, 2])
@pytest.mark.parametrize("dim", [2, 3])
def test_each_stage_sees_what_the_stages_before_it_have_aligned(dim, shrink):
    grid = GRIDS[dim]
    model = shaken(ISTN(config(grid, AFFINE, COARSE, FINE, shrink=shrink)))
    seen: list[tuple[Tensor, Tensor]] = []
    for stage in model.stages:
        stage.register_forward_pre_hook(lambda _, given: seen.append(given[:2]))
    result = model(*images(grid, 1), grid)
    assert displacement(result.up_to(1), grid).abs().max() > 0.05
    pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[dim]
    small = [pool(maps, shrink) for maps in result.features]
    for count, (moving, fixed) in enumerate(seen):
        expected = warp(small[0], result.up_to(count), grid.coarsened(shrink))
        torch.testing.assert_close(moving, expected, rtol=0, atol=1e-5)
        assert torch.equal(fixed, small[1])
    assert torch.equal(displacement(result.up_to(3), grid), displacement(result.transform, grid))


def test_a_spline_that_others_follow_is_tabulated_closely():
    grid = GRIDS[3]
    inner, last = (ISTN(config(grid, *stages)).stages[0] for stages in ((COARSE, FINE), (COARSE,)))
    z = torch.randn(1, *bspline.control_grid(grid, 12.0).shape, 3)
    points = points_inside(grid, 3000, dtype=torch.float32)
    table, exact = inner.build(z, grid), last.build(z, grid)
    torch.testing.assert_close(displacement(table, grid), displacement(exact, grid))
    assert (table(points) - exact(points)).norm(dim=-1).max() < 0.1 * min(grid.spacing) * 2


def test_without_an_itn_the_stn_sees_the_images():
    grid = GRIDS[2]
    model = ISTN(config(grid, itn=(), channels=3, structures=7))
    moving, fixed = images(grid, channels=3)
    assert model.itn is None
    features = model(moving, fixed, grid).features
    assert features[0] is moving
    assert features[1] is fixed


@pytest.mark.parametrize("structures", [1, 3, 6])
@pytest.mark.parametrize("dim", [2, 3])
def test_any_number_of_structures_and_channels(dim, structures):
    grid = SMALL[dim]
    model = shaken(ISTN(config(grid, AFFINE, FINE, structures=structures, channels=2)))
    moving, fixed = images(grid, channels=2)
    result = model(moving, fixed, grid)
    assert result.features[0].shape == result.features[1].shape == (2, structures, *grid.shape)
    # one ITN for both sides
    torch.testing.assert_close(result.features[0], model.itn(moving))
    torch.testing.assert_close(result.features[1], model.itn(fixed))
    again = model.align(*result.features, grid)
    torch.testing.assert_close(displacement(again.transform, grid), displacement(result.transform, grid))


@pytest.mark.parametrize("dim", [2, 3])
def test_pairs_do_not_feel_each_other_and_calls_leave_nothing_behind(dim):
    grid = SMALL[dim]
    model = shaken(ISTN(config(grid, AFFINE, FINE)))
    moving, fixed = images(grid, 3)
    with torch.no_grad():
        together = displacement(model(moving, fixed, grid).transform, grid)
        apart = [displacement(model(moving[[i]], fixed[[i]], grid).transform, grid) for i in range(3)]
        again = displacement(model(moving, fixed, grid).transform, grid)
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-4)
    assert torch.equal(together, again)
    fresh = ISTN(model.config)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(displacement(fresh(moving, fixed, grid).transform, grid), together)


def test_a_grid_elsewhere_moves_the_transform_along():
    """Only shape and spacing are the network's: an image that lies elsewhere in space gets the same displacement."""
    grid = SMALL[3]
    there = dataclasses.replace(grid, origin=(90.0, -40.0, 12.0))
    model = shaken(ISTN(config(grid, AFFINE, COARSE, FINE)))
    moving, fixed = images(grid, 1)
    here, moved = (displacement(model(moving, fixed, g).transform, g) for g in (grid, there))
    assert here.abs().max() > 0.05
    torch.testing.assert_close(here, moved, rtol=0, atol=1e-3)


# Where a control point reads


@pytest.mark.parametrize(("shrink", "control"), [(1, 4.0), (1, 10.0), (2, 6.0), (3, 20.0)])
@pytest.mark.parametrize("dim", [2, 3])
def test_control_points_read_the_coarse_map_where_they_are(dim, shrink, control, monkeypatch):
    """Planted: a map that holds its own position, averaged over the voxels as the U-Net's levels average it."""
    grid = Grid((61, 47, 43)[:dim], (1.0, 1.5, 2.0)[:dim], (200.0, 300.0, 400.0)[:dim])  # leaky ReLU keeps these
    stage = SplineStage(control, widths=(4, 4, 4))
    model = ISTN(config(grid, stage, itn=(), channels=dim, shrink=shrink))
    head = model.stages[0]
    factor = 2**head.level
    assert max(grid.spacing) * shrink * factor <= max(control, max(grid.spacing) * shrink)

    class Pooled(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            ends = [(0, -n % factor) for n in maps.shape[2:]]
            maps = F.pad(maps[:, :dim], [m for pair in reversed(ends) for m in pair])
            return {2: F.avg_pool2d, 3: F.avg_pool3d}[dim](maps, factor)

    monkeypatch.setattr(head, "unet", Pooled())
    monkeypatch.setattr(head, "out", nn.Identity())
    where = grid_points(grid).movedim(-1, 0)[None]
    read = model.align(where, torch.zeros_like(where), grid).steps[0].parameters[0]
    ctrl = bspline.control_grid(grid, control)
    points = grid_points(ctrl)
    # between the centres of the first and the last coarse voxel that has all its voxels; beyond, the border repeats
    step = shrink * factor
    inside = torch.ones(ctrl.shape, dtype=torch.bool)
    for axis, (n, h, o) in enumerate(zip(grid.shape, grid.spacing, grid.origin, strict=True)):
        first = o + (step - 1) / 2 * h
        last = first + (n // shrink // factor - 1) * step * h
        inside &= (points[..., axis] >= first) & (points[..., axis] <= last)
    assert inside.sum() >= 2**dim
    torch.testing.assert_close(read[inside], points[inside], rtol=0, atol=2e-3)
    assert not torch.allclose(read[inside], points[inside] + 0.1, rtol=0, atol=2e-3)


# Gradients


@pytest.mark.parametrize("variant", objectives.ISTN)
@pytest.mark.parametrize("dim", [2, 3])
def test_gradients_reach_every_weight_at_the_second_step(dim, variant):
    """At the first the zero layers block what lies before them; a convolution's bias before a norm never matters."""
    grid = SMALL[dim]
    options = {"itn": ()} if variant in ("unsupervised", "supervised") else {"structures": 2}
    model = ISTN(config(grid, AFFINE, COARSE, FINE, **options))
    idle = {
        f"{name}.0.bias"
        for name, block in model.named_modules()
        if isinstance(block, nn.Sequential) and len(block) > 1
        if isinstance(block[1], nn.InstanceNorm2d | nn.InstanceNorm3d)
    }
    blobs = torch.exp(-(grid_points(grid) - torch.tensor(grid.centre)).square().sum(-1) / 30)[None, None]
    moving, fixed = blobs + 0.1 * torch.rand(2, 1, *grid.shape), blobs.roll(3, 2) + 0.1 * torch.rand(2, 1, *grid.shape)
    soi = (moving.expand(-1, 2, *grid.shape) > 0.5).float(), (fixed.expand(-1, 2, *grid.shape) > 0.5).float()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        result = model(moving, fixed, grid)
        objectives.total(objectives.istn(variant, result, (moving, fixed), soi, grid, bending=1.0)).sum().backward()
        for stage in model.stages:
            assert stage.out.weight.grad.abs().max() > 0
        optimiser.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert name in idle or parameter.grad.abs().max() > 1e-9, name


@pytest.mark.parametrize("dim", [2, 3])
def test_a_fine_stage_teaches_the_coarse_ones(dim):
    """The finest step alone is judged: the first stage learns from it through the maps that it has warped."""
    grid = SMALL[dim]
    model = shaken(ISTN(config(grid, AFFINE, COARSE, FINE)))
    model(*images(grid), grid).steps[2].parameters.square().sum().backward()
    for stage in model.stages[:2]:
        assert stage.out.weight.grad.abs().max() > 1e-6


def test_the_maps_of_an_untrained_network_are_empty():
    grid = SMALL[2]
    moving, fixed = images(grid)
    assert not any(maps.any() for maps in ISTN(config(grid, AFFINE)).features(moving, fixed))


# Mixed precision and devices


@pytest.mark.parametrize("dim", [2, 3])
def test_coordinates_keep_float32_under_autocast(dim):
    grid = SMALL[dim]
    model = shaken(ISTN(config(grid, AFFINE, COARSE, FINE)))
    moving, fixed = images(grid, 1)
    seen: list[Tensor] = []
    model.stages[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.autocast("cpu", torch.bfloat16):
        result = model(moving, fixed, grid)
        assert model.itn(moving).dtype == torch.bfloat16  # the convolutions are in mixed precision
    assert all(map_.dtype == torch.float32 for map_ in result.features)
    assert all(step.parameters.dtype == torch.float32 for step in result.steps)
    points = points_inside(grid, 50, dtype=torch.float32)
    assert result.transform(points).dtype == torch.float32
    # neither the affine matrix nor the warp between the stages was made of bfloat16
    assert torch.equal(result.transform(points), assemble(result.steps)(points))
    assert torch.equal(seen[0], warp(result.features[0], result.up_to(1), grid))
    plain = displacement(model(moving, fixed, grid).transform, grid)
    assert (displacement(result.transform, grid) - plain).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize("dim", [2, 3])
def test_no_tensor_is_left_on_another_device(dim, monkeypatch):
    """The "meta" device stands for a GPU: a tensor left on the CPU is refused there."""
    grid = SMALL[dim]
    model = ISTN(config(grid, AFFINE, COARSE, FINE)).to("meta")
    moving, fixed = (image.to("meta") for image in images(grid))
    result = model(moving, fixed, grid)
    assert displacement(result.transform, grid).device.type == "meta"
    terms = objectives.istn("implicit", result, (moving, fixed), (moving, fixed), grid, bending=1.0)
    assert objectives.total(terms).device.type == "meta"


# Configurations


@pytest.mark.parametrize("name", STAGES)
def test_a_configuration_survives_json(grid, name):
    for made in (config(grid, *STAGES[name]), config(grid, itn=(), shrink=2, structures=4, normalise=False)):
        assert ISTNConfig.from_dict(dataclasses.asdict(made)) == made
        back = ISTNConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(made))))
        assert back == made
        assert hash(back) == hash(made)


def test_the_public_configuration_survives_json():
    for kind in ("affine", "bspline"):
        made = public(Grid((128, 128)), kind)
        assert ISTNConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(made)))) == made


def test_what_is_no_configuration_gets_one_sentence():
    good = dataclasses.asdict(config(SMALL[2], AFFINE, FINE))
    stage = good["stages"][0]
    for bad in (
        {key: value for key, value in good.items() if key != "grid"},
        {key: value for key, value in good.items() if key != "stages"},
        good | {"depth": 3},
        good | {"stages": [stage | {"wdiths": (3, 4)}]},
        good | {"stages": [{key: value for key, value in stage.items() if key != "bounds"}]},
        good | {"stages": [stage | {"bounds": {"shift": 1}}]},
    ):
        with pytest.raises(ValueError) as caught:
            ISTNConfig.from_dict(bad)
        assert one_sentence(caught.value, "configuration of an ISTN")


def test_no_stages_get_one_sentence():
    with pytest.raises(ValueError) as caught:
        ISTNConfig(SMALL[2], ())
    assert one_sentence(caught.value, "stage")


# Input that does not fit


def test_another_grid_gets_one_sentence():
    grid = SMALL[3]
    model = ISTN(config(grid, AFFINE))
    moving, fixed = images(grid, 1)
    for other in (
        dataclasses.replace(grid, spacing=(1.0, 1.5, 2.1)),
        dataclasses.replace(grid, shape=(16, 12, 20)),
        Grid((16, 12), (1.0, 1.5)),
    ):
        with pytest.raises(ValueError) as caught:
            model(moving, fixed, other)
        assert one_sentence(caught.value, "(16, 12, 18) voxels", str(other.shape), str(other.spacing))
    # rounding, as a file's header has it, is not another grid
    model(moving, fixed, dataclasses.replace(grid, spacing=(1.0, 1.5, 2.0000002)))


@pytest.mark.parametrize("itn", [(), LEVELS])
def test_images_that_do_not_fit_get_one_sentence(itn):
    grid = SMALL[2]
    model = ISTN(config(grid, AFFINE, itn=itn))
    good = torch.rand(2, 1, *grid.shape)
    for name, bad in (("moving", good[..., 1:]), ("fixed", good[..., 1:]), ("fixed", good.repeat(1, 2, 1, 1))):
        pair = (bad, good) if name == "moving" else (good, bad)
        with pytest.raises(ValueError) as caught:
            model(*pair, grid)
        assert one_sentence(caught.value, f"The {name} image", str(tuple(bad.shape)), "32 x 29")
    with pytest.raises(ValueError) as caught:  # else the ITN would hand out three images as one and two
        model(good.repeat(2, 1, 1, 1)[:3], good[:1], grid)
    assert one_sentence(caught.value, "3 moving", "1 fixed")


def test_a_grid_that_is_too_small_gets_one_sentence():
    with pytest.raises(ValueError) as caught:
        ISTN(ISTNConfig(Grid((6, 7))))
    assert one_sentence(caught.value, "(6, 7)", "too small")


def test_all_public_names_exist():
    assert all(hasattr(istn, name) for name in istn.__all__)
