"""Exercises of lesson 01: directions, gradients, overlap, the first answer of a network, refinement.

Convention: digits, so axis 0 is the row (down) and axis 1 the column (right); everything in mm; a transform maps fixed
points to moving points.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from regteach.lessons.exercises import Exercise, Mistake

Error = Callable[[Tensor], Tensor]


# e1: the picture moves against the points
def picture_moves(points: Tensor, right_mm: float, down_mm: float) -> Tensor:
    """Fixed to moving points, such that the warped picture goes right and down: the points go left and up."""
    return points - points.new_tensor([down_mm, right_mm])


def _moves_points(points: Tensor, right_mm: float, down_mm: float) -> Tensor:
    return points + points.new_tensor([down_mm, right_mm])


def _axes_swapped(points: Tensor, right_mm: float, down_mm: float) -> Tensor:
    return points - points.new_tensor([right_mm, down_mm])


def _both_wrong(points: Tensor, right_mm: float, down_mm: float) -> Tensor:
    return points + points.new_tensor([right_mm, down_mm])


# e2: central differences
def gradient_by_differences(error_of: Error, shift: Tensor, h: float) -> Tensor:
    """Central differences, one axis at a time, per mm."""
    slopes = []
    for axis in (0, 1):
        step = torch.zeros_like(shift)
        step[axis] = h
        slopes.append((error_of(shift + step) - error_of(shift - step)) / (2 * h))
    return torch.stack(slopes)


def _one_sided(error_of: Error, shift: Tensor, h: float) -> Tensor:
    steps = h * torch.eye(2, dtype=shift.dtype)
    return torch.stack([(error_of(shift + step) - error_of(shift)) / h for step in steps])


def _not_halved(error_of: Error, shift: Tensor, h: float) -> Tensor:
    return 2 * gradient_by_differences(error_of, shift, h)


def _not_divided(error_of: Error, shift: Tensor, h: float) -> Tensor:
    return 2 * h * gradient_by_differences(error_of, shift, h)


def _both_axes_at_once(error_of: Error, shift: Tensor, h: float) -> Tensor:
    slope = (error_of(shift + h) - error_of(shift - h)) / (2 * h)
    return torch.stack([slope, slope])


def _errors() -> list[tuple[Error, Tensor, float]]:
    def bowl(t: Tensor) -> Tensor:
        return (t[0] - 1.0) ** 2 + 3 * (t[1] + 2.0) ** 2 + 0.5 * t[0] * t[1]

    def waves(t: Tensor) -> Tensor:
        return torch.sin(t[0]) + torch.cos(2 * t[1]) * t[0]

    # float64: differences of nearly equal numbers, in which rounding should play no part
    places = torch.tensor([[0.3, -0.7], [1.2, 0.4]], dtype=torch.float64)
    return [(bowl, places[0], 0.1), (waves, places[1], 0.25)]


# e3: Dice
def dice_of(mask_a: Tensor, mask_b: Tensor) -> Tensor:
    """2 |A and B| / (|A| + |B|)."""
    return 2 * (mask_a & mask_b).sum() / (mask_a.sum() + mask_b.sum())


def _no_factor_two(mask_a: Tensor, mask_b: Tensor) -> Tensor:
    return dice_of(mask_a, mask_b) / 2


def _intersection_over_union(mask_a: Tensor, mask_b: Tensor) -> Tensor:
    return (mask_a & mask_b).sum() / (mask_a | mask_b).sum()


def _over_one_mask(mask_a: Tensor, mask_b: Tensor) -> Tensor:
    return (mask_a & mask_b).sum() / mask_a.sum()


def _background_counts(mask_a: Tensor, mask_b: Tensor) -> Tensor:
    return (mask_a == mask_b).float().mean()


def _masks() -> list[tuple[Tensor, Tensor]]:
    a, b = torch.zeros(7, 9, dtype=torch.bool), torch.zeros(7, 9, dtype=torch.bool)
    a[1:5, 2:6], b[2:7, 3:8] = True, True
    apart = torch.zeros(7, 9, dtype=torch.bool)
    apart[6, :2] = True
    return [(a, b), (b, a), (a, a), (a, apart)]


# e4: the first answer of a network is no displacement
def start_as_identity(net: nn.Sequential) -> nn.Sequential:
    """Zero weight and bias of the last layer: the answer is 0, and its gradient is not."""
    nn.init.zeros_(net[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(net[-1].bias)  # type: ignore[arg-type]
    return net


def _weight_only(net: nn.Sequential) -> nn.Sequential:
    nn.init.zeros_(net[-1].weight)  # type: ignore[arg-type]
    return net


def _every_layer(net: nn.Sequential) -> nn.Sequential:
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    return net


def _first_layer(net: nn.Sequential) -> nn.Sequential:
    for parameter in net[0].parameters():
        nn.init.zeros_(parameter)
    return net


def _frozen(net: nn.Sequential) -> nn.Sequential:
    return start_as_identity(net).requires_grad_(False)


def _networks() -> list[tuple[nn.Sequential]]:
    return [
        (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)),),
        (nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)),),
    ]


def _first_answer(net: nn.Sequential) -> str:
    """What the network answers, and whether a step of training would change its last layer."""
    first, last = net[0], net[-1]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    inputs = torch.linspace(-1, 2, 4 * first.in_features).reshape(4, -1)
    outputs = net(inputs)
    if not outputs.requires_grad:
        return "cannot be trained"
    net.zero_grad()
    outputs.sum().backward()
    gradient = last.weight.grad
    if gradient is None or not gradient.any():
        return "stuck: the last layer's weights have no gradient"
    if not outputs.any():
        return "identity"
    return "the same for every input" if torch.allclose(outputs, outputs[:1].expand_as(outputs)) else "not zero"


# e5: refinement. Three numbers a pair stand for control displacements, and their energy is a bowl that is steep in one
# direction; the network answers well, not perfectly.
TRUTH = torch.tensor([[3.0, -2.0, 1.5], [-1.0, 2.5, 4.0]])
STEEPNESS = torch.tensor([0.01, 0.02, 0.005])
Net = Callable[[Tensor, Tensor], Tensor]


def register(net: Net, energy: Error, moving: Tensor, fixed: Tensor, steps: int, step_mm: float) -> Tensor:
    """The network's answer, then Adam from there."""
    return _adam(net(moving, fixed).detach().clone(), energy, steps, step_mm)


def _adam(start: Tensor, energy: Error, steps: int, step_mm: float, sign: int = 1) -> Tensor:
    numbers = start.requires_grad_()
    adam = torch.optim.Adam([numbers], lr=step_mm)
    for _ in range(steps):
        adam.zero_grad()
        (sign * energy(numbers).sum()).backward()
        adam.step()
    return numbers.detach()


def _from_scratch(net: Net, energy: Error, moving: Tensor, fixed: Tensor, steps: int, step_mm: float) -> Tensor:
    return _adam(torch.zeros_like(net(moving, fixed)).detach(), energy, steps, step_mm)


def _one_pass(net: Net, energy: Error, moving: Tensor, fixed: Tensor, steps: int, step_mm: float) -> Tensor:
    return net(moving, fixed).detach()


def _uphill(net: Net, energy: Error, moving: Tensor, fixed: Tensor, steps: int, step_mm: float) -> Tensor:
    return _adam(net(moving, fixed).detach().clone(), energy, steps, step_mm, sign=-1)


def _not_detached(net: Net, energy: Error, moving: Tensor, fixed: Tensor, steps: int, step_mm: float) -> Tensor:
    return _adam(net(moving, fixed), energy, steps, step_mm)


def _plain_descent(net: Net, energy: Error, moving: Tensor, fixed: Tensor, steps: int, step_mm: float) -> Tensor:
    numbers = net(moving, fixed).detach().clone()
    for _ in range(steps):
        numbers.requires_grad_()
        (gradient,) = torch.autograd.grad(energy(numbers).sum(), numbers)
        numbers = (numbers - step_mm * gradient).detach()
    return numbers


def _energy(numbers: Tensor) -> Tensor:
    return (STEEPNESS * (numbers - TRUTH) ** 2).sum(-1)


def _pairs() -> list[tuple[Net, Error, Tensor, Tensor, int, float]]:
    weight = nn.Parameter(torch.ones(()))  # so that the answer hangs on a network, as a real one does

    def net(moving: Tensor, fixed: Tensor) -> Tensor:
        return weight * (TRUTH + torch.tensor([[0.6, -0.5, 0.7], [-0.7, 0.6, -0.5]]))

    images = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    return [(net, _energy, *images, 15, 0.1)]


def _how_good(numbers: Tensor) -> str:
    """The mean energy in words; the network's answer has 0.012, no displacement 0.24."""
    energy = float(_energy(numbers.detach()).mean())
    bars = [(0.003, "refined"), (0.0115, "hardly refined"), (0.0135, "as the network left it"), (0.06, "worse")]
    return next((words for bar, words in bars if energy < bar), "far from it")


EXERCISES = [
    Exercise(
        "e1",
        "move the picture, not the points",
        "o1",
        reference=picture_moves,
        cases=lambda: [(5 * torch.rand(1, 6, 2), 3.0, 0.0), (5 * torch.rand(2, 4, 2), 2.0, -1.5)],
        hint="Take one bright pixel of the moving image, at row 10 and column 10. At which fixed point must it show? "
        "And what must $T$ give at that point?",
        mistakes=[
            Mistake(
                "wrong sign",
                _moves_points,
                "This moves the *reading place* to the right. See prediction p1 again: which way does the picture go?",
            ),
            Mistake(
                "axes swapped",
                _axes_swapped,
                "The sign is right, but the picture moves down where it should move right. Which of the two "
                "coordinates is the column?",
            ),
            Mistake(
                "wrong sign and axes swapped",
                _both_wrong,
                "Two things at once: which coordinate is the column, and which way does the picture go when the "
                "reading place goes right?",
            ),
        ],
    ),
    Exercise(
        "e2",
        "check the gradient without autograd",
        "o2",
        reference=gradient_by_differences,
        cases=_errors,
        hint="For each axis: a step that is $h$ there and 0 elsewhere; the error at plus and at minus the step; the "
        "difference, per mm between the two places.",
        mistakes=[
            Mistake(
                "one-sided",
                _one_sided,
                "That is the slope between $t$ and $t + h$. It leans to one side: compare $t + h$ with $t - h$.",
            ),
            Mistake("not halved", _not_halved, "Twice too large. How far apart are $t + h$ and $t - h$?"),
            Mistake("not divided", _not_divided, "That is the change of the error. A gradient is the change *per mm*."),
            Mistake(
                "both axes at once",
                _both_axes_at_once,
                "Both numbers are the same: you moved along both axes at once. Move along one, and hold the other.",
            ),
        ],
    ),
    Exercise(
        "e3",
        "how well do two shapes overlap",
        "o4",
        reference=dice_of,
        cases=_masks,
        hint="Count the shared pixels with `(mask_a & mask_b).sum()`, then put the three counts into the formula.",
        mistakes=[
            Mistake(
                "factor 2 missing",
                _no_factor_two,
                "Two equal masks give 1/2 here, and they should give 1. What is missing from the formula?",
            ),
            Mistake(
                "intersection over union",
                _intersection_over_union,
                "That is the Jaccard index, the intersection over the union. Dice divides by the *sum* of the sizes.",
            ),
            Mistake(
                "over one mask",
                _over_one_mask,
                "You divide by the first mask only. Then a huge second mask would always score 1. Swap the masks: does "
                "your number change?",
            ),
            Mistake(
                "background counts",
                _background_counts,
                "You count the pixels where the masks agree, the empty paper included. Two masks that do not touch "
                "should give 0.",
            ),
        ],
    ),
    Exercise(
        "e4",
        "start as the identity",
        "o5",
        reference=start_as_identity,
        cases=_networks,
        observe=_first_answer,
        hint="The last layer computes `weight @ input + bias`. Both must be 0; `net[-1]` is that layer.",
        mistakes=[
            Mistake(
                "weights only",
                _weight_only,
                "Every input now gets the same answer, and it is not zero. What else does a linear layer add?",
            ),
            Mistake(
                "every layer",
                _every_layer,
                "The answer is zero, and it stays zero: with every layer at 0 no signal reaches the last one, and its "
                "weights get no gradient. Only the last layer should start at 0.",
            ),
            Mistake(
                "first layer",
                _first_layer,
                "Wrong end: the layers after the first add their own biases. Which layer makes the answer?",
            ),
            Mistake("frozen", _frozen, "The answer is zero, but the network can not be trained any more."),
        ],
    ),
    Exercise(
        "e5",
        "refine",
        "o6",
        reference=register,
        cases=_pairs,
        observe=_how_good,
        hint="Start from a detached copy of the network's answer, tell torch with `requires_grad_()` that you want its "
        "gradient, and take Adam steps on `energy(numbers).sum()`, as `optimise` does.",
        mistakes=[
            Mistake(
                "from scratch",
                _from_scratch,
                "You start from zero displacement. Is that where the network's answer is?",
            ),
            Mistake("one pass", _one_pass, "That is the network's answer as it came. Where are the steps?"),
            Mistake("uphill", _uphill, "The energy has grown. Which way do the steps go?"),
            Mistake(
                "not detached",
                _not_detached,
                "Torch refuses: the network's answer hangs on the network's weights. Take a copy that does not: "
                "`.detach().clone()`.",
            ),
            Mistake(
                "plain gradient descent",
                _plain_descent,
                "Right direction, and hardly any way. In plain descent a step is as short as the gradient is small; "
                "Adam takes steps of about `step_mm`.",
            ),
        ],
    ),
]
