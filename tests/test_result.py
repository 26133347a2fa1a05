"""Results of a network: the order in which its steps are composed, and parameters put in their place."""

import dataclasses

import pytest
import torch
from torch import Tensor

from regteach.affine import Affine
from regteach.result import Result, Step, assemble
from regteach.transforms import Compose, displacement


def turn(z: Tensor) -> Affine:
    """A turn by z about 0."""
    z = z.reshape(-1)
    rows = torch.stack([torch.stack([z.cos(), -z.sin()], -1), torch.stack([z.sin(), z.cos()], -1)], 1)
    return Affine(rows, torch.zeros(len(z), 2), torch.zeros(2))


def shift(z: Tensor) -> Affine:
    """A shift along axis 0."""
    matrix = torch.eye(2).expand(len(z), 2, 2)
    return Affine(matrix, torch.stack([z.reshape(-1), torch.zeros(len(z))], 1), torch.zeros(2))


QUARTER = Step(torch.full((1, 1), torch.pi / 2), turn)
ONE_MM = Step(torch.ones(1, 1), shift)
ORIGIN = torch.zeros(1, 1, 2)


def test_the_last_step_moves_the_fixed_points_first():
    # 0 is shifted to (1, 0), and that is turned to (0, 1)
    torch.testing.assert_close(assemble((QUARTER, ONE_MM))(ORIGIN)[0, 0], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(assemble((ONE_MM, QUARTER))(ORIGIN)[0, 0], torch.tensor([1.0, 0.0]))


def test_three_steps_by_hand():
    points = some_points()
    steps = (QUARTER, ONE_MM, Step(torch.full((1, 1), 0.3), turn))
    by_hand = QUARTER.build(QUARTER.parameters)(
        ONE_MM.build(ONE_MM.parameters)(steps[2].build(steps[2].parameters)(points))
    )
    torch.testing.assert_close(assemble(steps)(points), by_hand)


def test_up_to_leaves_the_fine_steps_out(grid):
    result = Result(assemble((QUARTER, ONE_MM)), (torch.zeros(1), torch.zeros(1)), (QUARTER, ONE_MM))
    points = some_points()
    torch.testing.assert_close(result.up_to(2)(points), result.transform(points))
    torch.testing.assert_close(result.up_to(1)(points), turn(QUARTER.parameters)(points))
    assert torch.equal(result.up_to(0)(points), points)


def test_no_step_at_all_is_the_identity_on_a_grid_too(grid):
    nothing = assemble(())
    assert torch.equal(displacement(nothing, grid), torch.zeros(1, *grid.shape, grid.dim))


def test_one_step_is_not_wrapped():
    assert isinstance(assemble((QUARTER,)), Affine)
    assert isinstance(assemble((QUARTER, ONE_MM)), Compose)


def test_other_parameters_in_the_place_of_the_steps_own():
    points = some_points()
    steps = (QUARTER, ONE_MM)
    moved = assemble(steps, [torch.zeros(1, 1), torch.full((1, 1), 5.0)])(points)
    torch.testing.assert_close(moved, points + torch.tensor([5.0, 0.0]))
    assert ONE_MM.parameters.item() == 1  # untouched
    own = assemble(steps, [step.parameters for step in steps])
    assert torch.equal(own(points), assemble(steps)(points))


def test_what_a_step_does_is_made_once():
    made = []

    def counted(z: Tensor) -> Affine:
        made.append(z)
        return shift(z)

    step = Step(torch.ones(1, 1), counted)
    result = Result(assemble((step, ONE_MM)), (torch.zeros(1), torch.zeros(1)), (step, ONE_MM))
    assert result.up_to(1) is step.transform
    assert len(made) == 1
    other = dataclasses.replace(step, parameters=torch.full((1, 1), 2.0))  # another step, another transform
    torch.testing.assert_close(other.transform(ORIGIN)[0, 0], torch.tensor([2.0, 0.0]))
    assert len(made) == 2


def test_what_was_made_without_slopes_is_not_remembered():
    z = torch.ones(1, 1, requires_grad=True)
    step = Step(z, shift)
    with torch.no_grad():
        assemble((step,))
    assemble((step,))(ORIGIN)[..., 0].sum().backward()
    assert z.grad is not None
    assert z.grad.item() == 1


def test_a_parameter_too_few_is_an_error():
    with pytest.raises(ValueError):
        assemble((QUARTER, ONE_MM), [torch.zeros(1, 1)])


def test_gradients_reach_every_step():
    points = some_points()
    z = [torch.full((1, 1), 0.2, requires_grad=True), torch.full((1, 1), 0.5, requires_grad=True)]
    assemble((QUARTER, ONE_MM), z)(points)[..., 0].sum().backward()
    # the sum over the points of (x + 0.5) cos 0.2 - y sin 0.2
    x, y, angle = (points[..., 0] + 0.5).sum(), points[..., 1].sum(), torch.tensor(0.2)
    torch.testing.assert_close(z[0].grad.squeeze(), -x * angle.sin() - y * angle.cos())
    torch.testing.assert_close(z[1].grad.squeeze(), 12 * angle.cos())


def test_steps_and_results_are_frozen():
    for frozen, name in ((ONE_MM, "parameters"), (Result(shift(ORIGIN[0, :, :1]), (ORIGIN, ORIGIN), ()), "transform")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, None)


def some_points() -> Tensor:
    return 4 * torch.rand(1, 12, 2) - 2
