"""What every registration network returns, and the parts that test-time refinement may turn.

A network finds its transform in steps, from coarse to fine. Each step is a tensor of parameters, the function that
makes a transform of it, and the way in which it joins what was found before. As a rule that is composition, in which
the **last** (finest) step moves the fixed points first:

    T = step_1 o step_2 o ... o step_n,   T(x) = step_1(step_2(... step_n(x)))

so that each step sees the moving image already warped by the steps before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor

from regteach.grid import Grid
from regteach.transforms import Compose, Dense, Transform


def composed(before: Transform, step: Transform) -> Transform:
    """``before`` o ``step``: the step moves the fixed points first."""
    return Compose((step, *(before.transforms if isinstance(before, Compose) else (before,))))


@dataclass(frozen=True)
class Step:
    """One step of a network.

    Args:
        parameters: ``b ...``, unbounded numbers; all zeros is the identity.
        build: makes a transform (fixed to moving, mm) of such a tensor.
        join: makes the transform after this step of the one before it and of its own.
        own_pairs: ``build`` knows the pairs of this batch, and serves no other.
    """

    parameters: Tensor
    build: Callable[[Tensor], Transform]
    join: Callable[[Transform, Transform], Transform] = composed
    own_pairs: bool = False

    @property
    def transform(self) -> Transform:
        """What this step does by itself, fixed to moving, mm: ``build(parameters)``, made once and then remembered.

        So the parameters are replaced (``dataclasses.replace``), and not changed in place.
        """
        if self.parameters.requires_grad and not torch.is_grad_enabled():
            return self.build(self.parameters)  # without the slopes that somebody may want later
        return self._remembered

    @cached_property
    def _remembered(self) -> Transform:
        return self.build(self.parameters)


def dense_step(displacement: Float[Tensor, "b *grid d"], grid: Grid) -> Step:
    """A step that is a displacement, mm, on a grid."""
    return Step(displacement, partial(Dense, grid=grid))


@dataclass(frozen=True)
class Result:
    """What a network found.

    Args:
        transform: fixed points to moving points, mm.
        features: what the test-time loss compares, moving and fixed, ``b k *grid`` each.
        steps: what the transform is made of, coarse to fine.
        images: moving and fixed images; those of an ISTN always, of others where the features are something else.
        pyramids: of the moving and of the fixed image, each level's ``b c *level``, finest first, in the training of a
            network that encodes each image for itself; afterwards they would only take memory.
    """

    transform: Transform
    features: tuple[Tensor, Tensor]
    steps: tuple[Step, ...]
    images: tuple[Tensor, Tensor] | None = None
    pyramids: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def up_to(self, count: int) -> Transform:
        """The transform after the first ``count`` steps."""
        return assemble(self.steps[:count])


def assemble(steps: Sequence[Step], parameters: Sequence[Tensor] | None = None) -> Transform:
    """The transform of these steps, with their own parameters or with others in their place; of none, the identity."""
    return after_each(steps, parameters)[-1] if steps else Compose(())


def after_each(steps: Sequence[Step], parameters: Sequence[Tensor] | None = None) -> tuple[Transform, ...]:
    """The transforms after the first step, after the first two, and so on."""
    if parameters is not None:
        steps = [replace(step, parameters=z) for step, z in zip(steps, parameters, strict=True)]
    found: list[Transform] = []
    for step in steps:
        found.append(step.join(found[-1], step.transform) if found else step.transform)
    return tuple(found)
