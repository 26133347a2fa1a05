"""Is the core of the package fast enough, and what do its faster forms save?

    python -m benchmarks.core [--quick] [--json FILE]

Warping, B-spline evaluation, local NCC and MIND-SSC, forward and backward, in the package's form, in the form that one
would write first in plain torch, and in MONAI's where it has one. Sizes are those of a brain at about 2 mm
(96 x 112 x 96) and at about 1.2 mm (160 x 192 x 160).
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from monai.losses import LocalNormalizedCrossCorrelationLoss
from monai.networks.blocks import Warp
from torch import Tensor

from benchmarks.harness import Form, Row, as_records, hardware, markdown, measure, show
from regteach import bspline
from regteach.grid import Grid
from regteach.sampling import flat_points, sample, smooth, warp
from regteach.similarity import local_ncc, mind_ssc
from regteach.transforms import Dense

SIZES = ((96, 112, 96), (160, 192, 160))
QUICK = ((48, 56, 48),)
WINDOW = 9
# Beyond this many voxels two plain forms are left out: 64 gathers per voxel keep about 9 GB for the backward pass, and
# dense 9 x 9 x 9 convolutions take over a minute.
MOST_VOXELS_FOR_THE_SLOWEST = 2_000_000


@dataclass(frozen=True)
class Options:
    """Command line.

    Args:
        quick: one small size, a few seconds.
        json: also write the numbers to this file, and the table beside it as markdown.
        device: where to measure.
        threads: threads of torch on the CPU; one is the steadiest where other programs run.
        seconds: time for the rounds of one computation at one size.
    """

    quick: bool = False
    json: Path | None = None
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 1
    seconds: float = 6.0


def images(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two smooth random images that have something in common, with gradients."""
    noise = torch.randn(3, 1, *grid.shape, generator=torch.Generator().manual_seed(0)).to(device)
    smoothed = smooth(noise, 2.0, grid)
    shared, a, b = (smoothed / smoothed.std()).split(1)
    return (shared + 0.5 * a).requires_grad_(), (shared + 0.5 * b).requires_grad_()


# Each function gives the forms of one computation, by name, the package's own first, and the leaves of its gradients.


def warping(grid: Grid, device: torch.device) -> tuple[dict[str, Form], list[Tensor]]:
    image, _ = images(grid, device)
    generator = torch.Generator().manual_seed(1)
    ctrl = bspline.control_grid(grid, 12.0)
    coefficients = 4 * torch.randn(1, *ctrl.shape, 3, generator=generator).to(device)
    u = bspline.evaluate_grid(coefficients, ctrl, grid).requires_grad_()
    points = flat_points(grid, device)
    n = torch.tensor(grid.shape, device=device)
    identity = ((2 * points + 1) / n - 1).reshape(1, *grid.shape, 3)
    monai = Warp(mode="bilinear", padding_mode="border")

    def plain() -> Tensor:
        where = identity + u * (2 / n)
        return F.grid_sample(image, where.flip(-1), padding_mode="border", align_corners=False)

    return {
        "sample(image, x + u)": lambda: sample(image, points.unflatten(1, grid.shape) + u, grid),
        "warp(image, Dense(u))": lambda: warp(image, Dense(u, grid), grid),
        "plain grid_sample": plain,
        "MONAI Warp": lambda: monai(image, u.movedim(-1, 1)),
    }, [image, u]


def splines(grid: Grid, device: torch.device) -> tuple[dict[str, Form], list[Tensor]]:
    ctrl = bspline.control_grid(grid, 8.0)
    generator = torch.Generator().manual_seed(1)
    coefficients = torch.randn(1, *ctrl.shape, 3, generator=generator).to(device).requires_grad_()
    points = flat_points(grid, device)
    forms: dict[str, Form] = {"evaluate_grid (separable)": lambda: bspline.evaluate_grid(coefficients, ctrl, grid)}
    if grid.size < MOST_VOXELS_FOR_THE_SLOWEST:
        forms["evaluate (64 gathers)"] = lambda: bspline.evaluate(coefficients, ctrl, points).unflatten(1, grid.shape)
    return forms, [coefficients]


def local_correlation(grid: Grid, device: torch.device) -> tuple[dict[str, Form], list[Tensor]]:
    a, b = images(grid, device)
    kernel = torch.ones(1, 1, *(WINDOW,) * 3, device=device)
    count = F.conv3d(torch.ones_like(a), kernel, padding=WINDOW // 2)
    monai = LocalNormalizedCrossCorrelationLoss(kernel_size=WINDOW)

    def plain() -> Tensor:
        def local(x: Tensor) -> Tensor:
            return F.conv3d(x, kernel, padding=WINDOW // 2) / count

        mean_a, mean_b = local(a), local(b)
        covariance = local(a * b) - mean_a * mean_b
        variance_a, variance_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
        return (covariance**2 / (variance_a * variance_b).clamp_min(1e-5)).mean()

    forms: dict[str, Form] = {"local_ncc": lambda: local_ncc(a, b, WINDOW), "MONAI LNCC loss": lambda: -monai(a, b)}
    if grid.size < MOST_VOXELS_FOR_THE_SLOWEST:
        forms["plain conv3d"] = plain
    return forms, [a, b]


def mind(grid: Grid, device: torch.device) -> tuple[dict[str, Form], list[Tensor]]:
    a, b = images(grid, device)
    six = [offset for offset in itertools.product((0, 1, 2), repeat=3) if sum(abs(k - 1) for k in offset) == 1]
    pairs = [(p, q) for p, q in itertools.combinations(six, 2) if sum((i - k) ** 2 for i, k in zip(p, q)) == 2]  # noqa: B905
    first, second = torch.zeros(2, len(pairs), 1, 3, 3, 3, device=device)
    for k, (p, q) in enumerate(pairs):
        first[(k, 0, *p)] = second[(k, 0, *q)] = 1

    def descriptor(image: Tensor) -> Tensor:
        padded = F.pad(image, (2,) * 6, mode="replicate")
        differences = F.conv3d(padded, first, dilation=2) - F.conv3d(padded, second, dilation=2)
        distances = F.avg_pool3d(differences**2, 5, stride=1, padding=2, count_include_pad=False)
        distances = distances - distances.min(dim=1, keepdim=True).values
        scale = distances.mean(dim=1, keepdim=True)
        typical = scale.mean().detach()
        return torch.exp(-distances / scale.clamp(0.001 * typical, 1000 * typical))

    return {
        "mind_ssc": lambda: mind_ssc(a, b),
        "plain shifts by conv3d": lambda: ((descriptor(a) - descriptor(b)) ** 2).mean(),
    }, [a, b]


CASES = {
    "warp": warping,
    "B-spline field, every 8 voxels": splines,
    f"local NCC, window {WINDOW}": local_correlation,
    "MIND-SSC": mind,
}


def main() -> None:
    options = tyro.cli(Options)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    before = hardware(device)
    rows: list[Row] = []
    for shape in QUICK if options.quick else SIZES:
        size = " x ".join(map(str, shape))
        for name, case in CASES.items():
            forms, leaves = case(Grid(shape), device)
            rows += measure(name, size, forms, leaves, seconds=2.0 if options.quick else options.seconds)
    after = hardware(device)
    line = ", ".join(f"{key} {value}" for key, value in after.items() if value is not None)
    show(rows, f"Core of regteach ({line})")
    if options.json:
        record = {"hardware": before, "load_average_after": after["load_average"], "rows": as_records(rows)}
        options.json.write_text(json.dumps(record, indent=2) + "\n")
        options.json.with_suffix(".md").write_text(f"Measured on: {line}.\n\n{markdown(rows)}\n")


if __name__ == "__main__":
    main()
