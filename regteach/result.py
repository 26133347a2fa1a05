"""What every registration network returns, and the parts that test-time refinement may turn.

A network finds its transform in steps, from coarse to fine. Each step is a tensor of parameters and the function that
makes a transform of it; the whole transform is their composition, in which the **last** (finest) step moves the fixed
points first:

    T = step_1 o step_2 o ... o step_n,   T(x) = step_1(step_2(... step_n(x)))

so that each step sees the moving image already warped by the steps before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from regteach.transforms import Compose, Transform


@dataclass(frozen=True)
class Step:
    """One step of a network.

    Args:
        parameters: ``b ...``, unbounded numbers; all zeros is the identity.
        build: makes a transform (fixed to moving, mm) of such a tensor.
    """

    parameters: Tensor
    build: Callable[[Tensor], Transform]


@dataclass(frozen=True)
class Result:
    """What a network found.

    Args:
        transform: fixed points to moving points, mm.
        features: what the test-time loss compares, moving and fixed, ``b k *grid`` each.
        steps: what the transform is made of, coarse to fine.
    """

    transform: Transform
    features: tuple[Tensor, Tensor]
    steps: tuple[Step, ...]

    def up_to(self, count: int) -> Transform:
        """The transform after the first ``count`` steps."""
        return assemble(self.steps[:count])


def assemble(steps: Sequence[Step], parameters: Sequence[Tensor] | None = None) -> Transform:
    """The transform of these steps, with their own parameters or with others in their place."""
    given = [step.parameters for step in steps] if parameters is None else parameters
    parts = [step.build(z) for step, z in zip(steps, given, strict=True)]
    return parts[0] if len(parts) == 1 else Compose(tuple(reversed(parts)))
