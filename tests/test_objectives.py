"""Losses by hand: closed forms, plain formulas of the four variants, gradients, and what they are blind to."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from truths.fields import GRIDS, one_sentence

from regteach import bspline, objectives
from regteach.affine import Affine
from regteach.focus import Focus, focus_on
from regteach.grid import Grid
from regteach.objectives import istn, pyramid_mse, refinement, regulariser, relative_mse, total
from regteach.regularity import bending_energy, bending_energy_spline_plain
from regteach.result import Result, Step, assemble
from regteach.sampling import grid_points
from regteach.transforms import Dense, FreeForm, Identity

F64 = torch.float64
BIG = {2: Grid((16, 24), (1.0, 1.5), (-3.0, 5.0)), 3: Grid((16, 9, 20), (1.0, 1.5, 2.0), (-3.0, 5.0, 10.5))}


def maps(grid: Grid, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, *grid.shape, dtype=F64)


def plain_relative(a: Tensor, b: Tensor) -> np.ndarray:
    """The definition, by loops over pairs and channels."""
    out = []
    for one, other in zip(a.numpy(), b.numpy(), strict=True):
        each = []
        for x, y in zip(one, other, strict=True):
            scale = ((x**2).mean() + (y**2).mean()) / 2
            each.append(((x - y) ** 2).mean() / max(scale, 1e-4))
        out.append(np.mean(each))
    return np.array(out)


def block_means(image: np.ndarray, size: int) -> np.ndarray:
    """Averages over cubes along the last axes, by reshaping; a remainder is dropped."""
    dim = image.ndim - 2
    for axis in range(2, 2 + dim):
        n = image.shape[axis] // size
        image = np.take(image, range(n * size), axis)
        image = image.reshape(*image.shape[:axis], n, size, *image.shape[axis + 1 :]).mean(axis + 1)
    return image


# One map against another


def test_equal_maps_cost_nothing(grid):
    a = maps(grid)
    assert torch.equal(relative_mse(a, a), torch.zeros(2, dtype=F64))
    assert torch.equal(pyramid_mse(a, a), torch.zeros(2, dtype=F64))


def test_maps_that_do_not_overlap_cost_two(grid):
    a = maps(grid) + 0.1
    where = torch.rand(grid.shape) < 0.3
    torch.testing.assert_close(relative_mse(a * where, 5 * a * ~where), torch.full((2,), 2.0, dtype=F64))
    nothing = torch.zeros_like(a)
    torch.testing.assert_close(relative_mse(a, nothing), torch.full((2,), 2.0, dtype=F64))
    torch.testing.assert_close(relative_mse(a, -a), torch.full((2,), 4.0, dtype=F64))


@pytest.mark.parametrize("distance", [relative_mse, pyramid_mse])
def test_brightness_and_size_of_a_structure_do_not_matter(distance):
    grid = BIG[3]
    a, b = maps(grid), maps(grid)
    for factor in (0.2, 7.0):
        torch.testing.assert_close(distance(factor * a, factor * b), distance(a, b))
    torch.testing.assert_close(distance(a, b), distance(b, a))
    # twice the background beside the same structures
    wider = [torch.cat([x, torch.zeros_like(x)], 2) for x in (a, b)]
    torch.testing.assert_close(distance(*wider), distance(a, b))


def test_relative_error_is_its_definition(grid):
    a, b = maps(grid), maps(grid) ** 2
    a[0, 1], b[0, 1] = 0, 0  # an empty channel
    a[1, 2], b[1, 2] = 1e-3, 3e-3  # almost empty: below the floor
    np.testing.assert_allclose(relative_mse(a, b), plain_relative(a, b), rtol=1e-12)
    assert relative_mse(a[1:, 2:], b[1:, 2:]).item() == pytest.approx(4e-6 / objectives.EMPTY)


def test_the_scale_is_a_constant_to_the_gradient(grid):
    a, b = maps(grid, 1).requires_grad_(), maps(grid, 1)
    relative_mse(a, b).sum().backward()
    scale = (a.detach().square() + b.square()).flatten(2).mean(2) / 2
    expected = 2 * (a.detach() - b) / (3 * grid.size) / scale.reshape(1, 3, *[1] * grid.dim)
    torch.testing.assert_close(a.grad, expected)


@pytest.mark.parametrize("distance", [relative_mse, pyramid_mse])
def test_gradients_below_the_floor_are_those_of_the_value(distance):
    """There the scale is a constant, and finite differences see what backward sees."""
    grid = Grid((5, 8))
    a, b = (1e-3 * maps(grid, 2, 2)).requires_grad_(), (1e-3 * maps(grid, 2, 2)).requires_grad_()
    assert gradcheck(lambda x, y: distance(x, y), (a, b), eps=1e-7)


# The pyramid


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_pyramid_is_the_mean_over_block_averages(dim, levels):
    a, b = maps(BIG[dim]), maps(BIG[dim]) ** 2
    # of 9 voxels 4, 2 remain: a third halving would leave one, the pyramid ends before it
    sizes = [2**level for level in range(min(levels, {2: 4, 3: 3}[dim]))]
    each = [plain_relative(*(torch.from_numpy(block_means(x.numpy(), size)) for x in (a, b))) for size in sizes]
    np.testing.assert_allclose(pyramid_mse(a, b, levels), np.mean(each, 0), rtol=1e-12)
    if levels == 1:
        assert torch.equal(pyramid_mse(a, b, 1), relative_mse(a, b))


def test_thin_structures_that_do_not_touch_pull_at_each_other_in_the_pyramid():
    """A line walks up to another: the plain error sees it arrive, the pyramid sees it come, cube by cube."""

    def line(column: int) -> Tensor:
        image = torch.zeros(1, 1, 32, 32, dtype=F64)
        image[..., column] = 1
        return image

    way = [line(column) for column in range(20, 8, -1)]
    plain, pyramid = ([distance(moving, line(8)).item() for moving in way] for distance in (relative_mse, pyramid_mse))
    assert plain == [2] * len(way)
    assert pyramid == sorted(pyramid, reverse=True)
    assert pyramid[0] == 2
    assert pyramid[-1] == 0.5  # one of four levels still tells them apart
    # drawn half over the edge of a cube, it feels the pull itself
    moved = line(16) * 0.5 + line(15) * 0.5
    moved.requires_grad_()
    for distance, pulled in ((relative_mse, False), (pyramid_mse, True)):
        (gradient,) = torch.autograd.grad(distance(moved, line(8)).sum(), moved)
        assert bool(gradient[..., 15].sum() < gradient[..., 16].sum() - 0.05) == pulled


# The four variants


def shift(grid: Grid, voxels: int, axis: int = 0) -> Step:
    """A step of whole voxels along one axis."""
    z = torch.zeros(2, grid.dim, dtype=F64)
    z[:, axis] = voxels * grid.spacing[axis]
    eye = torch.eye(grid.dim, dtype=F64).expand(2, -1, -1)
    return Step(z, lambda p: Affine(eye, p, torch.zeros(grid.dim, dtype=F64)))


def shifted(image: Tensor, voxels: int, axis: int = 0) -> Tensor:
    """The image read ``voxels`` further on, the border repeated."""
    n = image.shape[axis + 2]
    return image.index_select(axis + 2, (torch.arange(n) + voxels).clamp(0, n - 1))


def stranger(grid: Grid, *steps: Step) -> tuple[Result, dict[str, Tensor]]:
    """A result with random features, and random images and structures."""
    names = ("M", "F", "S_M", "S_F", "M'", "F'")
    made = {name: maps(grid, channels=1 if name in "MF" else 3) for name in names}
    return Result(assemble(steps), (made["M'"], made["F'"]), steps), made


def by_hand(variant: str, m: dict[str, Tensor], warped) -> dict[str, Tensor]:
    """The table of the paper, d for every pair of maps that is compared."""
    d = pyramid_mse
    structure = d(warped(m["S_M"]), m["S_F"])
    return {
        "unsupervised": lambda: {"image": d(warped(m["M"]), m["F"])},
        "supervised": lambda: {"structure": structure},
        # what is not moved is compared where it is, at full resolution
        "explicit": lambda: {
            "structure": structure,
            "itn": relative_mse(m["M'"], m["S_M"]) + relative_mse(m["F'"], m["S_F"]),
        },
        "implicit": lambda: {
            "structure": structure,
            "itn": d(warped(m["M'"]), m["S_F"]) + d(warped(m["S_M"]), m["F'"]),
        },
    }[variant]()


def compare(terms: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(terms) == set(expected)
    for name, value in expected.items():
        assert terms[name].shape == (2,)
        torch.testing.assert_close(terms[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", objectives.ISTN)
@pytest.mark.parametrize("dim", [2, 3])
def test_each_variant_is_its_formula(dim, variant):
    grid = BIG[dim]
    for voxels in (0, 2):
        result, m = stranger(grid, shift(grid, voxels, axis=1))
        terms = istn(variant, result, (m["M"], m["F"]), (m["S_M"], m["S_F"]), grid)
        compare(terms, by_hand(variant, m, lambda image, v=voxels: shifted(image, v, axis=1)))


@pytest.mark.parametrize("variant", objectives.ISTN)
def test_the_loss_after_each_stage_is_averaged(variant):
    grid = BIG[2]
    result, m = stranger(grid, shift(grid, 1, axis=0), shift(grid, 2, axis=1))
    terms = istn(variant, result, (m["M"], m["F"]), (m["S_M"], m["S_F"]), grid)
    first = by_hand(variant, m, lambda image: shifted(image, 1, axis=0))
    second = by_hand(variant, m, lambda image: shifted(shifted(image, 1, axis=0), 2, axis=1))
    compare(terms, {name: (first[name] + second[name]) / 2 for name in first})


@pytest.mark.parametrize("variant", objectives.ISTN)
@pytest.mark.parametrize("dim", [2, 3])
def test_a_coarsened_loss_is_the_formula_on_averages(dim, variant):
    grid = BIG[dim]
    result, m = stranger(grid, shift(grid, 0))
    terms = istn(variant, result, (m["M"], m["F"]), (m["S_M"], m["S_F"]), grid, coarsen=2)
    small = {name: torch.from_numpy(block_means(image.numpy(), 2)) for name, image in m.items()}
    expected = by_hand(variant, small, lambda image: image)
    if variant == "explicit":
        expected["itn"] = by_hand(variant, m, lambda image: image)["itn"]  # always at full resolution
    compare(terms, expected)


def test_nothing_is_left_to_improve_when_all_maps_agree(grid):
    result, m = stranger(grid, shift(grid, 0))
    same = Result(result.transform, (m["S_M"], m["S_M"]), result.steps)
    for variant in objectives.ISTN:
        terms = istn(variant, same, (m["M"], m["M"]), (m["S_M"], m["S_M"]), grid)
        assert total(terms).abs().max() < 1e-12


@pytest.mark.parametrize("variant", objectives.ISTN)
def test_each_variant_reads_what_it_may_and_no_more(grid, variant):
    """Planted: what a variant must not look at holds no numbers."""
    result, m = stranger(grid, shift(grid, 1))
    unseen = {
        "unsupervised": {"S_M", "S_F", "M'", "F'"},
        "supervised": {"M", "F", "M'", "F'"},
        "explicit": {"M", "F"},
        "implicit": {"M", "F"},
    }[variant]
    for name in m:
        n = {k: image * torch.nan if k == name else image for k, image in m.items()}
        other = Result(result.transform, (n["M'"], n["F'"]), result.steps)
        loss = total(istn(variant, other, (n["M"], n["F"]), (n["S_M"], n["S_F"]), grid))
        assert bool(loss.isfinite().all()) == (name in unseen)


def test_the_loss_at_test_time_is_that_of_the_maps_alone(grid):
    result, m = stranger(grid, shift(grid, 1))
    ours = refinement(result.features, result.transform, grid)
    errors, warped, fixed, moving = [], shifted(m["M'"], 1), m["F'"], m["M'"]
    for size in (1, 2, 4, 8):
        if min(grid.shape) // size < 2 and size > 1:
            break
        a, b, c = (block_means(x.numpy(), size) for x in (warped, fixed, moving))
        axes = tuple(range(2, a.ndim))
        # The unit is that of the maps as they are; only the error is that of the warped one.
        errors.append((((a - b) ** 2).mean(axes) / ((b**2 + c**2).mean(axes) / 2)).mean(1))
    np.testing.assert_allclose(ours, np.mean(errors, 0), rtol=1e-6)


def test_the_gradient_at_test_time_is_that_of_the_loss(grid):
    """Even of noise: the unit does not change with the transform, so what is reported is what is descended."""
    torch.manual_seed(1)
    features = (maps(grid, 1), maps(grid, 1))

    def loss(shift: Tensor) -> Tensor:
        transform = Affine(torch.eye(grid.dim, dtype=F64)[None], shift[None], torch.zeros(grid.dim, dtype=F64))
        return refinement(features, transform, grid)

    shift = torch.full((grid.dim,), 0.3, dtype=F64, requires_grad=True)
    assert gradcheck(loss, shift, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("dim", [2, 3])
def test_what_is_remembered_of_the_maps_changes_no_number(dim):
    """Several transforms of the same maps, of others, and of a part of them, against the plain form; slopes too."""
    grid = Grid((24, 16, 32)[:dim], (1.0, 1.5, 2.0)[:dim])
    torch.manual_seed(dim)
    ours = objectives.MapLoss(3)
    nothing = Affine(torch.eye(dim, dtype=F64)[None], torch.zeros(1, dim, dtype=F64), torch.zeros(dim, dtype=F64))
    for batch in (1, 3):
        pair = (maps(grid, batch), maps(grid, batch))
        part = tuple(slice(0, 8) for _ in range(dim))
        inside = Grid((8,) * dim, grid.spacing, grid.origin)
        focus = Focus(part, inside, (torch.rand(len(pair[0]), 1, *inside.shape) > 0.3).to(F64))
        for where in (None, focus, focus, None):
            for _ in range(2):
                by = torch.rand(1, dim, dtype=F64).requires_grad_()
                transform = replace(nothing, translation=by)
                found, plain = ours(pair, transform, grid, where), refinement(pair, transform, grid, where, 3)
                torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)
                slopes = [torch.autograd.grad(loss.sum(), by)[0] for loss in (found, plain)]
                torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-10, atol=1e-14)


# Looking at a part only


@pytest.mark.parametrize("dim", [2, 3])
def test_a_focus_sees_the_same_where_the_rest_is_empty(dim):
    grid = Grid((40, 48, 24)[:dim], (1.0, 1.5, 2.0)[:dim])
    features = []
    for start in (10, 13):
        image = torch.zeros(1, 2, *grid.shape, dtype=F64)
        image[(slice(None), slice(None), *[slice(start, start + 5)] * dim)] = torch.rand(1, 2, *[5] * dim, dtype=F64)
        features.append(image)
    pair = (features[0], features[1])
    start = Affine(torch.eye(dim, dtype=F64)[None], torch.zeros(1, dim, dtype=F64), torch.zeros(dim, dtype=F64))
    focus = focus_on(pair, start, grid, 4.0, objectives.LEVELS)
    assert focus.grid.size < grid.size
    moved = Affine(start.matrix, torch.full((1, dim), -1.4, dtype=F64), start.centre)
    torch.testing.assert_close(refinement(pair, moved, grid, focus), refinement(pair, moved, grid))
    fixed = pair[1].clone().requires_grad_()
    refinement((pair[0], fixed), moved, grid, focus).backward()
    inside = focus_boxes(focus, grid).bool()[:, None].expand_as(fixed)
    assert bool((fixed.grad[~inside] == 0).all())
    assert bool((fixed.grad[inside] != 0).any())


def test_pairs_of_a_batch_have_boxes_of_their_own():
    grid = Grid((64, 64))
    image = torch.zeros(2, 1, 64, 64)
    image[0, 0, 2:6, 2:6] = 1
    image[1, 0, 55:60, 40:44] = 1
    focus = focus_on((image, image), assemble((_nothing(grid),)), grid, 3.0, objectives.LEVELS)
    every = focus_boxes(focus, grid)
    assert torch.equal(every[0], _box(slice(0, 16), slice(0, 16)))
    assert torch.equal(every[1], _box(slice(48, 64), slice(32, 48)))


def _box(*where: slice) -> Tensor:
    box = torch.zeros(64, 64)
    box[where] = 1
    return box


def focus_boxes(focus: Focus, grid: Grid) -> Tensor:
    whole = torch.zeros(len(focus.mask), *grid.shape)
    whole[(slice(None), *focus.voxels)] = focus.mask[:, 0]
    return whole


def _nothing(grid: Grid) -> Step:
    return Step(torch.zeros(1, *grid.shape, grid.dim), lambda z: Dense(z, grid))


def test_an_unknown_variant_gets_one_sentence():
    result, m = stranger(GRIDS[2], shift(GRIDS[2], 0))
    with pytest.raises(ValueError) as caught:
        istn("implicite", result, (m["M"], m["F"]), (m["S_M"], m["S_F"]), GRIDS[2])
    assert one_sentence(caught.value, "implicit,", "'implicite'") or one_sentence(caught.value, "implicit", "implicite")


@pytest.mark.parametrize("dim", [2, 3])
def test_gradients_of_every_variant_to_the_spline_are_right(dim):
    """Faint maps keep the scale at its floor; there backward and finite differences see the same function."""
    grid = Grid((5, 8, 6)[:dim], (1.0, 1.5, 2.0)[:dim])
    ctrl = bspline.control_grid(grid, 8.0)
    _, m = stranger(grid, shift(grid, 0))
    m = {name: 1e-3 * image for name, image in m.items()}
    z = 0.11 * torch.randn(2, *ctrl.shape, dim, dtype=F64) + 0.21  # off the voxels, where linear reading has a kink

    def loss(parameters: Tensor, mapped: Tensor, variant: str) -> Tensor:
        steps = (Step(parameters, lambda p: FreeForm(p, ctrl)),)
        result = Result(assemble(steps), (mapped, m["F'"]), steps)
        return total(istn(variant, result, (m["M"], m["F"]), (m["S_M"], m["S_F"]), grid, bending=0.5))

    directions = torch.randn(3, *z.shape, dtype=F64)
    for variant in objectives.ISTN:
        moved, mapped = z.clone().requires_grad_(), m["M'"].clone().requires_grad_()
        loss(moved, mapped, variant).sum().backward()
        for direction in directions:
            step = 1e-7
            up, down = (loss(z + s * step * direction, m["M'"], variant).sum() for s in (1, -1))
            assert ((up - down) / (2 * step)).item() == pytest.approx((moved.grad * direction).sum().item(), rel=1e-4)
        reaches = mapped.grad is not None and mapped.grad.abs().max() > 0
        assert reaches == (variant in ("explicit", "implicit"))


# The regulariser


def splines(grid: Grid, amplitude: float = 2.0) -> list[Step]:
    """Two free forms, the first tabulated."""
    ctrl = bspline.control_grid(grid, (4.0, 6.0, 5.0)[: grid.dim])
    z = [amplitude * torch.randn(2, *ctrl.shape, grid.dim, dtype=F64) for _ in range(2)]
    return [
        Step(z[0], lambda p: Dense(FreeForm(p, ctrl).displacement_on(grid), grid)),
        Step(z[1], lambda p: FreeForm(p, ctrl)),
    ]


def test_the_regulariser_adds_the_bending_energies(grid):
    table, free = splines(grid)
    spline = free.build(free.parameters)
    exact = bending_energy_spline_plain(free.parameters, spline.grid, grid)
    tabulated = bending_energy(table.build(table.parameters).displacement, grid)
    for steps, energy in (((free,), exact), ((table,), tabulated), ((shift(grid, 2), table, free), exact + tabulated)):
        torch.testing.assert_close(regulariser(steps, grid, 0.7)["bending"], 0.7 * energy, rtol=1e-8, atol=0)


def test_what_does_not_bend_or_weighs_nothing_has_no_term(grid):
    table, free = splines(grid)
    assert regulariser((shift(grid, 3),), grid, 1.0) == {}
    assert regulariser((table, free), grid, 0.0) == {}
    assert set(regulariser((free,), grid, 1e-9)) == {"bending"}


def test_the_bending_term_is_part_of_every_variant(grid):
    steps = tuple(splines(grid, 0.3))
    result, m = stranger(grid, *steps)
    for variant, bending in itertools.product(objectives.ISTN, (0.0, 2.0)):
        terms = istn(variant, result, (m["M"], m["F"]), (m["S_M"], m["S_F"]), grid, bending)
        assert ("bending" in terms) == (bending > 0)
        torch.testing.assert_close(total(terms), sum(terms.values()))


def test_gradient_of_the_regulariser_is_right():
    grid = Grid((5, 6), (1.0, 1.5))
    steps = splines(grid)
    for step in steps:
        z = step.parameters.clone().requires_grad_()
        assert gradcheck(lambda p, s=step: regulariser((Step(p, s.build),), grid, 0.3)["bending"], (z,))


def test_items_of_a_batch_do_not_mix(grid):
    result, m = stranger(grid, *splines(grid, 0.3))
    arguments = (m["M"], m["F"]), (m["S_M"], m["S_F"])
    both = total(istn("implicit", result, *arguments, grid, 1.0))
    for i in range(2):
        steps = tuple(Step(s.parameters[[i]], s.build) for s in result.steps)
        one = Result(assemble(steps), (m["M'"][[i]], m["F'"][[i]]), steps)
        alone = total(istn("implicit", one, *[(a[[i]], b[[i]]) for a, b in arguments], grid, 1.0))
        torch.testing.assert_close(alone[0], both[i])


def test_positions_are_untouched():
    """Losses take grids, not positions: an image that lies elsewhere costs the same."""
    here, there = (Grid((16, 12), (1.0, 1.5), origin) for origin in ((0.0, 0.0), (50.0, -70.0)))
    assert not torch.equal(grid_points(here), grid_points(there))
    _, m = stranger(here, shift(here, 1))
    values = []
    for grid in (here, there):
        step = shift(grid, 1)
        result = Result(assemble((step,)), (m["M'"], m["F'"]), (step,))
        values.append(total(istn("implicit", result, (m["M"], m["F"]), (m["S_M"], m["S_F"]), grid)))
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("n", [20, 27, 28, 30, 32])
def test_a_focus_holds_what_is_shown_wherever_it_lies(n: int) -> None:
    for first in range(n - 1):
        image = torch.zeros(1, 1, n, 32)
        image[..., first : first + 2, 10:12] = 1
        focus = focus_on((image, image), Identity(2), Grid((n, 32)), 1.0, objectives.LEVELS)
        assert image[(slice(None), slice(None), *focus.voxels)].sum() == 4
