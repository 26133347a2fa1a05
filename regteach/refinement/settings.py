"""How to refine, and what comes of it."""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from regteach import objectives
from regteach.focus import Focus
from regteach.grid import Grid
from regteach.result import Result
from regteach.transforms import Transform

MODES = ("parameters", "corrections", "greedy", "weights")
Loss = Callable[[tuple[Tensor, Tensor], Transform, Grid, Focus | None], Float[Tensor, "b"]]
Watch = Callable[[int, Transform], None]  # called with the number of steps taken, and the transform as it is


@dataclass(frozen=True)
class Refinement:
    """How to refine.

    Args:
        steps: of Adam, or greedy ones.
        mode: "parameters", "corrections", "greedy" or "weights".
        rate: step size of Adam, in the unit of the parameters (a bound's fraction, near 0; mm for displacements) or of
            the weights; of a greedy step, how far the point that moves furthest is moved, voxels.
        bending: weight of the bending energy, mm^2.
        images: weight of 1 - local NCC of the images themselves beside the maps, for a model whose features are maps:
            they say where a structure lies, the images how its border runs, and what lies between.
        sharpen: slope of a logistic curve through a half, put on maps in [0, 1] before they are compared; 0 leaves them
            as they are. What counts is on which side of a half a voxel lies, and so where the border runs: without it,
            the alignment also trades borders for places where the network was more or less sure of the inside.
        focus_mm: look only this far around what the maps show; 0 looks everywhere. Faster, and the same where the maps
            are empty elsewhere. Greedy steps move nothing outside of it.
        coarsen: compare the maps averaged over cubes of this many voxels: eight times as fast in 3D for 2, and blind to
            what is finer.
        pyramid: how many resolutions of the maps are compared at once, each half as fine as the one before. A greedy
            search that begins coarsely has seen the coarse ones: 1 is enough for it, and lets it look at what is fine.
            Images, which are compared by a similarity, are compared as they are.
        coarser: greedy steps before the others, on images averaged over cubes of 2 voxels (the last of these numbers),
            of 4 (the one before it), and so on: cheap, and far-sighted.
        restart: search a second time, greedily, from the identity, and keep of each pair what ends with the lower loss.
            A greedy search ends in the nearest valley, and of two the loss finds the better one.
        smoothing_vox: standard deviations of the Gaussians that smooth each greedy step, and all of the displacement.
        window_vox: width of the windows where images are compared by local NCC.
        patience: stop a pair when its loss has not fallen for so many steps; 0 never stops.
        tolerance: a fall counts when it is at least this part of the loss.
    """

    steps: int = 50
    mode: str = "parameters"
    rate: float = 0.03
    bending: float = 0.0
    images: float = 0.0
    sharpen: float = 0.0
    focus_mm: float = 0.0
    coarsen: int = 1
    pyramid: int = objectives.LEVELS
    coarser: tuple[int, ...] = ()
    restart: bool = False
    smoothing_vox: tuple[float, float] = (1.732, 0.7071)
    window_vox: int = objectives.WINDOW
    patience: int = 0
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        for name, length in (("coarser", None), ("smoothing_vox", 2)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or length not in (None, len(value)):
                raise ValueError(f"{name} is a tuple of {'two' if length else 'whole'} numbers, not {value!r}.")
        if self.mode not in MODES:
            raise ValueError(f"A mode of refinement is one of {', '.join(MODES)}, not {self.mode!r}.")
        whole = (self.steps, self.coarsen, self.pyramid, self.window_vox, self.patience, *self.coarser)
        if not all(isinstance(number, numbers.Integral) for number in whole):
            raise ValueError("Steps, cubes, resolutions, windows and patience are whole numbers.")
        if not 0 <= self.sharpen < math.inf:
            raise ValueError(f"Maps are sharpened by a slope of 0 or more, not {self.sharpen}.")
        if not 0 <= self.images < math.inf:
            raise ValueError(f"The images have a weight of 0 or more beside the maps, not {self.images}.")
        if (self.coarser or self.restart) and self.mode != "greedy":
            said = "Steps on coarser images" if self.coarser else "Second searches"
            raise ValueError(f"{said} are for greedy refinement, not for that of {self.mode}.")
        if min(self.coarser, default=1) < 1 or not all(0 <= width < math.inf for width in self.smoothing_vox):
            raise ValueError("Coarser levels take 1 step or more each, and a smoothing is 0 or more.")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"A rate is a finite number above 0, not {self.rate}.")
        if not (0 <= self.bending < math.inf and 0 <= self.focus_mm < math.inf):
            raise ValueError("A weight of the bending and the margin of a focus are finite numbers of 0 or more.")
        if self.coarsen < 1 or self.window_vox < 1 or self.window_vox % 2 == 0:
            raise ValueError("Maps are averaged over cubes of 1 voxel or more; a window is an odd number of voxels.")
        if self.patience < 0 or not 0 <= self.tolerance < math.inf:
            raise ValueError("A patience and a tolerance are 0 or more.")
        if self.pyramid < 1:
            raise ValueError(f"Maps are compared at 1 resolution or more, not {self.pyramid}.")
        if self.steps < 0:
            raise ValueError(f"A refinement has 0 steps or more, not {self.steps}.")


@dataclass(frozen=True)
class Refined:
    """A refined result.

    Args:
        result: the transform of each pair's lowest loss, and its steps.
        curve: ``s b``, loss before each step and after the last; once a pair has stopped, its loss stays. s is the
            number of steps and one, or less where every pair stopped sooner. Greedy levels follow each other, each with
            the loss of its own images; so do two searches.
        stopped: ``b``, number of steps that each pair took.
        loss: ``b``, of the result.
    """

    result: Result
    curve: Float[Tensor, "s b"]
    stopped: Int[Tensor, "b"]
    loss: Float[Tensor, "b"]
