"""GeoReg: the identity at the start, exact inheritance, millimetres, levels that are what they say, and learning."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from truths.fields import one_sentence

from regteach import contrasts, objectives, remarks
from regteach.checkpoints import Model, load, save_model
from regteach.grid import Grid
from regteach.nets.blocks import upsampled
from regteach.nets.georeg import GeoReg, GeoRegConfig, PyramidEncoder
from regteach.nets.istn import count_parameters, parameters_by_part
from regteach.refinement import Refinement, refine
from regteach.result import after_each
from regteach.sampling import grid_points
from regteach.transforms import Dense, displacement

FLAT = GeoRegConfig(Grid((16, 24), (1.0, 2.0)), (4, 8, 8), (0, 3, 3), (2, 3))
SOLID = GeoRegConfig(Grid((8, 12, 16), (1.0, 1.5, 2.0), (5.0, -3.0, 1.0)), (4, 8), (2, 3), (2,), (1, 2))
SMOOTH = replace(FLAT, smoothing_vox=0.8, iterations=(1, 2, 3))
EACH = pytest.mark.parametrize("config", [FLAT, SOLID, SMOOTH], ids=["2d", "3d", "smooth"])


def net_of(config: GeoRegConfig, moving: bool = False, seed: int = 0) -> GeoReg:
    """An untrained network; ``moving`` gives its last layers weights, so that points move."""
    torch.manual_seed(seed)
    net = GeoReg(config)
    if moving:
        for part in (*net.deform, *net.inherit):
            if hasattr(part, "head"):
                torch.nn.init.normal_(part.head[-1].weight, std=0.05)
    return net


def images(config: GeoRegConfig, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    both = torch.rand(2, batch, config.channels, *config.grid.shape, generator=generator)
    return both[0], both[1]


def blob(grid: Grid, shift_mm: float = 0.0) -> Tensor:
    points = grid_points(grid) - torch.tensor(grid.centre)
    points[..., 0] -= shift_mm
    return torch.exp(-points.square().sum(-1) / (2 * 3.0**2))[None, None]


# ---- what it is made of ----


def test_the_network_of_the_digits_is_as_large_as_the_papers() -> None:
    """16, 32, 64 channels, 3 x 3 neighbourhoods: the paper's experiment has about 0.24 million parameters."""
    net = GeoReg(GeoRegConfig(Grid((28, 28)), (16, 32, 64), (3, 3, 3), (3, 3)))
    assert parameters_by_part(net) == {"encoders": 171_472, "deform": 55_552, "inherit": 20_016}
    assert sum(parameters_by_part(net).values()) == count_parameters(net)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    "config",
    [FLAT, SOLID, SMOOTH, replace(FLAT, encoders=2), replace(FLAT, carry=True)],
    ids=["2d", "3d", "smooth", "encoders", "carry"],
)
def test_no_parameter_is_allocated_that_is_never_used(config: GeoRegConfig) -> None:
    net = net_of(config, moving=True)
    loss = objectives.total(objectives.multiscale(net(*images(config), config.grid), config.grid)).sum()
    loss.backward()
    unused = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unused == []


@EACH
def test_the_untrained_network_is_the_identity(config: GeoRegConfig) -> None:
    result = net_of(config)(*images(config), config.grid)
    assert all(bool((t.displacement == 0).all()) for t in after_each(result.steps) if isinstance(t, Dense))
    assert isinstance(result.transform, Dense)
    assert result.transform.grid == config.grid


@EACH
def test_there_is_a_step_for_every_update_coarse_to_fine(config: GeoRegConfig) -> None:
    levels = [step.build(step.parameters).grid for step in net_of(config)(*images(config), config.grid).steps]  # type: ignore[attr-defined]
    expected = []
    for level in reversed(range(len(config.widths))):
        inherited = int(level < len(config.widths) - 1)
        expected += [config.grid.coarsened(2**level)] * (inherited + config.steps[level])
    assert levels == expected


@EACH
def test_features_sit_where_the_pooled_voxels_are(config: GeoRegConfig) -> None:
    """A feature of a constant slope is that slope at its own grid's points."""
    encoder = PyramidEncoder(config.grid.dim, 1, config.widths)
    for level, blocks in enumerate(encoder.levels):
        encoder.levels[level] = torch.nn.Identity()
        assert blocks is not None
    ramp = grid_points(config.grid)[..., 0][None, None]
    for level, found in enumerate(encoder(ramp)):
        assert torch.allclose(found[0, 0], grid_points(config.grid.coarsened(2**level))[..., 0], atol=1e-5)


# ---- from level to level ----


@EACH
def test_an_affine_motion_is_inherited_exactly_also_at_the_border(config: GeoRegConfig) -> None:
    fine = config.grid
    coarse = fine.coarsened(2)
    matrix = torch.randn(fine.dim, fine.dim, generator=torch.Generator().manual_seed(3))

    def motion(grid: Grid) -> Tensor:
        return (grid_points(grid) @ matrix.T + 2.0)[None]

    assert torch.allclose(upsampled(motion(coarse), coarse, fine), motion(fine), atol=1e-4)


def test_an_axis_of_one_voxel_passes_its_motion_on() -> None:
    fine = Grid((2, 8))
    field = torch.randn(1, 1, 4, 2)
    found = upsampled(field, fine.coarsened(2), fine)
    assert torch.allclose(found[:, 0], found[:, 1])


@EACH
def test_displacements_add_up(config: GeoRegConfig) -> None:
    """A translation at the coarsest level arrives everywhere, in mm, and the steps below add to it."""
    steps = net_of(config)(*images(config), config.grid).steps
    shift = torch.arange(1.0, config.grid.dim + 1)
    parameters = [torch.zeros_like(step.parameters) for step in steps]
    parameters[0] += shift
    parameters[-1] += 0.25
    found = after_each(steps, parameters)[-1]
    assert torch.allclose(displacement(found, config.grid), (shift + 0.25).expand(2, *config.grid.shape, -1), atol=1e-5)


@EACH
def test_the_result_is_what_its_steps_say(config: GeoRegConfig) -> None:
    net = net_of(config, moving=True)
    result = net(*images(config), config.grid)
    assert max(step.parameters.abs().max() for step in result.steps) > 1e-3
    assert torch.equal(
        displacement(result.up_to(len(result.steps)), config.grid), displacement(result.transform, config.grid)
    )


# ---- what may not matter, and what must ----


@EACH
def test_a_smooth_step_is_scipys_gaussian_of_the_rough_one(config: GeoRegConfig) -> None:
    """Of the first step, which both networks take from rest; the state is each point's own, and stays so."""
    smoothing, levels = 1.2, len(config.widths)
    rough = net_of(replace(config, smoothing_vox=0.0), moving=True)
    smooth = GeoReg(replace(config, smoothing_vox=smoothing))
    smooth.load_state_dict(rough.state_dict())
    first, found = (net(*images(config), config.grid, levels - 1).steps[0].parameters for net in (rough, smooth))
    sigma = (0, *[smoothing] * config.grid.dim, 0)
    expected = gaussian_filter(first.detach().double().numpy(), sigma, mode="nearest")
    assert float(first.detach().abs().max()) > 0.01
    np.testing.assert_allclose(found.detach(), expected, atol=1e-6)


@EACH
def test_pairs_of_a_batch_do_not_mix(config: GeoRegConfig) -> None:
    net, (moving, fixed) = net_of(config, moving=True), images(config)
    both = displacement(net(moving, fixed, config.grid).transform, config.grid)
    alone = displacement(net(moving[1:], fixed[1:], config.grid).transform, config.grid)
    assert torch.allclose(both[1:], alone, atol=1e-5)


@EACH
def test_slabs_and_checkpoints_change_nothing(config: GeoRegConfig) -> None:
    def gradient(**changes: object) -> Tensor:
        net = net_of(replace(config, **changes), moving=True)  # type: ignore[arg-type]
        objectives.total(
            objectives.multiscale(net(*images(config), config.grid), config.grid, bending=1.0)
        ).sum().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    whole = gradient()
    for changed in (gradient(slab=7), gradient(checkpointed=True)):
        assert torch.allclose(changed, whole, atol=1e-5 * float(whole.abs().max()))


@EACH
def test_moving_the_world_moves_nothing(config: GeoRegConfig) -> None:
    net = net_of(config, moving=True)
    there = Grid(config.grid.shape, config.grid.spacing, tuple(o + 100.0 for o in config.grid.origin))
    a, b = (displacement(net(*images(config), grid).transform, grid) for grid in (config.grid, there))
    assert torch.allclose(a, b, atol=1e-3)


def test_spacing_means_something() -> None:
    """The same voxels, twice as far apart along one axis, are another neighbourhood."""
    net = net_of(FLAT, moving=True)
    square, stretched = Grid(FLAT.grid.shape, (1.0, 1.0)), Grid(FLAT.grid.shape, (1.0, 2.0))
    a, b = (displacement(net(*images(FLAT), grid).transform, grid) for grid in (square, stretched))
    assert (a - b).abs().max() > 0.01 * a.abs().max()


@pytest.mark.parametrize(
    "change",
    [{"moves": "features"}, {"interpolation": "linear"}, {"carry": True}, {"encoders": 2}, {"iterations": (0, 2, 3)}],
    ids=lambda change: next(iter(change)),
)
def test_every_ablation_is_another_network_with_the_same_weights(change: dict[str, object]) -> None:
    """Whatever both have in common is the same, so what differs is the switch."""
    plain, other = net_of(FLAT, moving=True), net_of(replace(FLAT, **change), moving=True, seed=1)  # type: ignore[arg-type]
    shared = {name: value for name, value in plain.state_dict().items() if name in other.state_dict()}
    other.load_state_dict(shared, strict=False)
    a, b = (displacement(net(*images(FLAT), FLAT.grid).transform, FLAT.grid) for net in (plain, other))
    assert bool(b.isfinite().all())
    assert (a - b).abs().max() > 1e-3


class Stretching(torch.nn.Module):
    """In the place of a Deformation: a step of a tenth of the way from the origin, whatever is heard."""

    def forward(self, attend: object, own: Tensor, rest: Tensor, points: Tensor) -> Tensor:
        return torch.cat([0.1 * rest, own], -1)


@pytest.mark.parametrize(("moves", "factor"), [("points", 0.2), ("features", 0.1 + 0.1 * 1.1)])
def test_steps_of_points_add_up_and_steps_seen_from_rest_are_composed(moves: str, factor: float) -> None:
    grid = Grid((16, 16), origin=(-7.5, -7.5))
    net = net_of(GeoRegConfig(grid, (4,), (3,), (), (2,), moves=moves))
    net.deform[0] = Stretching()
    both = torch.rand(2, 1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = displacement(net(both[0], both[1], grid).transform, grid)[0, 2:-2, 2:-2]
    torch.testing.assert_close(found, factor * grid_points(grid)[2:-2, 2:-2])


def test_each_of_two_encoders_reads_its_own_image() -> None:
    plain, two = net_of(FLAT, moving=True), net_of(replace(FLAT, encoders=2), moving=True, seed=1)
    for own in two.encoders:
        own.load_state_dict(plain.encoders[0].state_dict())
    two.deform.load_state_dict(plain.deform.state_dict())
    two.inherit.load_state_dict(plain.inherit.state_dict())
    moving, fixed = images(FLAT)
    a, b = (displacement(net(moving, fixed, FLAT.grid).transform, FLAT.grid) for net in (plain, two))
    torch.testing.assert_close(a, b)  # two equal encoders are one

    with torch.no_grad():  # the second one reads its image upside down: the fixed image may be handed over so
        first = two.encoders[1].levels[0][0]
        for convolution in (first.first, first.skip):
            convolution.weight.neg_()
    c = displacement(two(moving, -fixed, FLAT.grid).transform, FLAT.grid)
    torch.testing.assert_close(c, a)
    assert not torch.allclose(displacement(two(-moving, fixed, FLAT.grid).transform, FLAT.grid), a, atol=1e-3)


def test_contrasts_are_seen_whichever_way_they_come() -> None:
    """One encoder reads an image, the other its negative."""
    net = net_of(replace(FLAT, encoders=2))
    net.encoders[1].load_state_dict(net.encoders[0].state_dict())
    with torch.no_grad():
        first = net.encoders[1].levels[0][0]
        for convolution in (first.first, first.skip):
            convolution.weight.neg_()
    image = images(FLAT, batch=3)[0]
    elsewhere = image.roll(1, -1)  # not aligned yet
    assert contrasts.contrasts_seen(net.encoders, image, -elsewhere).tolist() == [[0, 1]] * 3
    assert contrasts.contrasts_seen(net.encoders, -elsewhere, image).tolist() == [[1, 0]] * 3
    assert contrasts.contrasts_seen(net.encoders, image, elsewhere).tolist() == [[0, 0]] * 3
    assert contrasts.contrasts_seen(net.encoders, -image, -elsewhere).tolist() == [[1, 1]] * 3


def test_where_encoders_can_not_tell_contrasts_nothing_is_told() -> None:
    """Two encoders that are the same agree on all."""
    net = net_of(replace(FLAT, encoders=2))
    net.encoders[1].load_state_dict(net.encoders[0].state_dict())
    image = images(FLAT, batch=2)[0]
    assert contrasts.contrasts_seen(net.encoders, image, -image).tolist() == [[-1, -1]] * 2
    model = Model("both", net.eval())
    (told,) = remarks.on_contrasts(model, image[:1], -image[:1])
    assert told.startswith("both takes ")


def test_one_level_is_a_network_too() -> None:
    config = GeoRegConfig(Grid((8, 8)), (4,), (3,), ())
    found = displacement(net_of(config, moving=True)(*images(config), config.grid).transform, config.grid)
    assert found.abs().max() > 1e-3


def test_linear_interpolation_has_nothing_to_learn() -> None:
    net = GeoReg(replace(FLAT, interpolation="linear"))
    assert count_parameters(net.inherit) == 0


@pytest.mark.parametrize(("supervision", "reaches"), [("across", True), ("within", False)])
def test_gradients_cross_levels_only_across(supervision: str, reaches: bool) -> None:
    net = net_of(replace(FLAT, supervision=supervision), moving=True)
    # Weight on the finest level alone: what reaches the coarsest has crossed.
    result = net(*images(FLAT), FLAT.grid)
    terms = objectives.multiscale(result, FLAT.grid, weights=(1, 0, 0), across=supervision == "across")
    terms["image"].sum().backward()
    coarsest = net.deform[-1].head[-1].weight.grad
    assert (coarsest is not None and bool(coarsest.abs().sum() > 0)) is reaches


def test_features_that_are_carried_down_hold_no_gradient_within_levels() -> None:
    net = net_of(replace(FLAT, supervision="within", carry=True), moving=True)
    terms = objectives.multiscale(net(*images(FLAT), FLAT.grid), FLAT.grid, weights=(1, 0, 0), across=False)
    terms["image"].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in net.deform[-1].parameters())
    assert any(p.grad is not None and p.grad.any() for p in net.hand_down[0].parameters())


def test_the_coarsest_level_takes_a_step() -> None:
    with pytest.raises(ValueError, match="has a window, and takes a step") as caught:
        replace(FLAT, iterations=(0, 2, 0))
    assert one_sentence(caught.value)


@EACH
def test_stopping_at_a_level_is_the_beginning_of_the_whole(config: GeoRegConfig) -> None:
    net = net_of(config, moving=True)
    whole = net(*images(config), config.grid).steps
    for finest in range(len(config.widths)):
        stopped = net(*images(config), config.grid, finest)
        assert isinstance(stopped.transform, Dense)
        assert stopped.transform.grid == config.grid.coarsened(2**finest)
        for step, same in zip(stopped.steps, whole, strict=False):
            assert torch.equal(step.parameters, same.parameters)
    with pytest.raises(ValueError, match="counted from 0"):
        net(*images(config), config.grid, len(config.widths))


def test_half_precision_convolutions_leave_coordinates_alone() -> None:
    net = net_of(FLAT, moving=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = net(*images(FLAT), FLAT.grid)
    assert {step.parameters.dtype for step in result.steps} == {torch.float32}
    exact = displacement(net(*images(FLAT), FLAT.grid).transform, FLAT.grid).detach()
    assert torch.allclose(displacement(result.transform, FLAT.grid), exact, atol=0.05 * float(exact.abs().max()))


# ---- learning ----


def test_it_learns_a_large_translation_at_its_coarsest_level_and_refinement_goes_on() -> None:
    grid = Grid((32, 32))
    net = net_of(GeoRegConfig(grid, (8, 8, 16), (0, 3, 3), (2, 3), (0, 1, 2)))
    moving, fixed = blob(grid, 6.0), blob(grid)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(80):
        loss = objectives.total(objectives.multiscale(net(moving, fixed, grid), grid, "ncc", 1.0)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    result = net(moving, fixed, grid)
    assert torch.allclose(displacement(result.transform, grid)[0, 16, 16], torch.tensor([6.0, 0.0]), atol=1.0)
    first = result.steps[0].parameters[0, 4, 4]
    assert first[0] > 2  # most of it at once, at the coarsest level
    fresh = net_of(net.config)
    for mode, rate in (("parameters", 0.1), ("weights", 3e-3)):
        refined = refine(fresh, fresh(moving, fixed, grid), grid, Refinement(10, mode, rate, bending=1.0))
        assert refined.curve[-1] < refined.curve[0]


def test_one_object_at_two_spacings_moves_by_the_same_millimetres() -> None:
    fine, coarse = Grid((32, 32)), Grid((16, 32), (2.0, 1.0), (0.5, 0.0))  # of one and the same place
    net = net_of(GeoRegConfig(fine, (8, 8, 16), (0, 3, 3), (2, 3), (0, 1, 2)))
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    draw = torch.Generator().manual_seed(0)
    for k in range(120):
        grid = (fine, coarse)[k % 2]
        moving = torch.cat([blob(grid, 8 * float(torch.rand((), generator=draw)) - 4) for _ in range(4)])
        result = net(moving, blob(grid).expand(4, -1, -1, -1), grid)
        loss = objectives.total(objectives.multiscale(result, grid, "ncc", 1.0)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def found(shift_mm: float, seen_on: Grid, said: Grid) -> float:
        """How far the middle goes along axis 0, mm, when the network is told that the voxels are those of ``said``."""
        middle = torch.tensor([[said.centre]])
        with torch.no_grad():
            transform = net(blob(seen_on, shift_mm), blob(seen_on), said).transform
        return float((transform(middle) - middle)[0, 0, 0])

    for shift_mm in (-3.0, 3.0):
        assert found(shift_mm, fine, fine) == pytest.approx(shift_mm, abs=0.6)
        assert found(shift_mm, coarse, coarse) == pytest.approx(shift_mm, abs=0.6)
        assert abs(found(shift_mm, coarse, Grid((16, 32)))) < 2.4  # spacing that is not heard gives another answer


def test_a_constant_image_agrees_with_nothing_and_breaks_nothing() -> None:
    """Correlation with a constant is defined as 0: no gradient of the image, no NaN. Points move as the weights say."""
    net = net_of(FLAT, moving=True)
    flat = torch.full((1, 1, *FLAT.grid.shape), 0.5)
    terms = objectives.multiscale(net(flat, flat, FLAT.grid), FLAT.grid, bending=1.0)
    objectives.total(terms).sum().backward()
    assert terms["image"].item() == pytest.approx(1.0)
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


def test_identical_images_cost_nothing_at_the_identity() -> None:
    moving, _ = images(FLAT)
    terms = objectives.multiscale(net_of(FLAT)(moving, moving, FLAT.grid), FLAT.grid, bending=1.0)
    assert torch.allclose(terms["image"], torch.zeros(2), atol=1e-5)
    assert torch.allclose(terms["bending"], torch.zeros(2))


# ---- files and bad input ----


def test_a_checkpoint_gives_the_same_network_back(tmp_path: Path) -> None:
    net = net_of(SOLID, moving=True).half().float().eval()
    stored = load(save_model(tmp_path / "mine.safetensors", Model("mine", net)))
    assert stored.network.config == SOLID
    a, b = (displacement(n(*images(SOLID), SOLID.grid).transform, SOLID.grid) for n in (net, stored.network))
    assert torch.allclose(a, b, atol=1e-5)


@EACH
def test_the_configuration_survives_json(config: GeoRegConfig) -> None:
    assert GeoRegConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"windows": (3, 3)}, "needs as many windows"),
        ({"parents": (3, 3, 3)}, "one parents' window less"),
        ({"windows": (3, 3, 0)}, "nothing to interpolate from"),
        ({"iterations": (1, 1)}, "one number for each of the 3 levels"),
        ({"widths": (4, 7, 8)}, "even numbers"),
        ({"windows": (-1, 3, 3)}, "whole numbers of 0 or more"),
        ({"windows": (0, 3.0, 3)}, "whole numbers of 0 or more"),
        ({"slab": -1}, "whole numbers of 0 or more"),
        ({"moves": "voxels"}, "moves is one of points, features"),
        ({"encoders": 3}, "1 encoder or 2"),
        ({"contrasts": ("T1", "T2")}, "Two contrasts are those of two encoders"),
        ({"encoders": 2, "contrasts": ("T1",)}, "Two contrasts are those of two encoders"),
        ({"similarity": "nonsense"}, "no dissimilarity 'nonsense'"),
        ({"smoothing_vox": -1.0}, "finite number of voxels of 0 or more, not -1.0"),
        ({"smoothing_vox": math.nan}, "finite number of voxels of 0 or more, not nan"),
        ({"grid": Grid((18, 24))}, r"\(20, 24\) would"),
    ],
)
def test_bad_configurations_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(FLAT, **change)  # type: ignore[arg-type]


def test_bad_images_are_refused() -> None:
    net, (moving, fixed) = net_of(FLAT), images(FLAT)
    with pytest.raises(ValueError, match="halves the grid 2 times"):
        net(moving[..., :-2], fixed[..., :-2], Grid((16, 22)))
    with pytest.raises(ValueError, match="The moving image has the shape"):
        net(moving[:, :, :8], fixed, FLAT.grid)
    with pytest.raises(ValueError, match="are not pairs"):
        net(moving[:1], fixed, FLAT.grid)
    with pytest.raises(ValueError, match="images of 2 axes"):
        net(torch.rand(1, 1, 8, 8, 8), torch.rand(1, 1, 8, 8, 8), Grid((8, 8, 8)))


def test_no_configuration_in_a_header_is_said() -> None:
    with pytest.raises(ValueError, match="no configuration of a GeoReg"):
        GeoRegConfig.from_dict({"grid": {"shape": [8, 8]}, "colour": 1})
