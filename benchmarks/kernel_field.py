"""What does a field from 1,024 keypoints cost on a whole grid, plain and in blocks?

    python -m benchmarks.kernel_field [--quick] [--json FILE]

Sizes are those of a thorax at 3 mm (112 x 96 x 112) and at 1.5 mm (224 x 192 x 224); keypoints lie in two ellipsoids,
as in lungs. A query has 64 channels and is made from its position, since 64 channels a voxel would be 2.5 GB. The plain
form gathers the keys of all K neighbours of a point; it is run on some of the voxels, a few at a time, its time is
scaled up to the whole grid, and its field is compared with the blocked one there. Times are processor seconds on a CPU
(of all threads together; other programs hardly change them) and seconds of the clock on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks import tables
from benchmarks.harness import PeakMemory, hardware, timed
from benchmarks.tables import Table, number
from regteach.grid import Grid
from regteach.ops.kernel_field import Attention, kernel_field, kernel_field_on
from regteach.sampling import flat_points

FULL = Grid((224, 192, 224), (1.5,))
HALF, TINY = FULL.coarsened(2), FULL.resized((20, 16, 20))
SEED = 0
BIAS_MM = 10.0
POINTS_AT_ONCE = 2**14  # of the plain form: 126 MB of keys for K = 30
MOST_MB, MOST_SECONDS, LEAST_RATIO = 1300.0, 40.0, 8.0
K_OF_AIMS = 30


@dataclass(frozen=True)
class Options:
    """Command line.

    Args:
        quick: a tiny grid and few keypoints: shows that it runs, and nothing else.
        json: also write the numbers to this file, and the tables beside it as markdown.
        sizes: of the grid, "half" and "full".
        neighbours: K.
        keypoints: numbers of keypoints; the first is that of the table over K.
        plain_voxels: the plain form is run on so many voxels.
        channels: of queries and keys.
        edge_vox: voxels along the edge of a block.
        pairs_at_once: of a voxel and a candidate; 2**20 where left out, and 2**25 on a GPU.
        device: where to measure.
        threads: of torch on the CPU; one is the steadiest where other programs run.
    """

    quick: bool = False
    json: Path | None = None
    sizes: tuple[str, ...] = ("half", "full")
    neighbours: tuple[int, ...] = (10, 20, 30, 50)
    keypoints: tuple[int, ...] = (1024, 256, 512, 2048, 4096)
    plain_voxels: int = 2**17
    channels: int = 64
    edge_vox: int = 4
    pairs_at_once: int | None = None
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 1


@dataclass(frozen=True)
class Case:
    """Keypoints with values and keys, and queries of any point."""

    grid: Grid
    keypoints_mm: Tensor
    values: Tensor
    keys: Tensor
    directions: Tensor  # 3 x channels, 1/mm

    @staticmethod
    def of(grid: Grid, keypoints: int, channels: int, device: torch.device) -> "Case":
        """The same for the same numbers, and the keypoints at the same places at any resolution."""
        generator = torch.Generator().manual_seed(SEED)
        extent = torch.tensor(grid.extent)
        low = torch.tensor(grid.origin) - torch.tensor(grid.spacing) / 2
        unit = torch.rand(16 * keypoints, 3, generator=generator)
        beside = torch.tensor([[0.28, 0.5, 0.5], [0.72, 0.5, 0.5]])
        radii = torch.tensor([0.17, 0.3, 0.4])
        inside = (((unit[:, None] - beside) / radii).square().sum(-1) < 1).any(dim=1)
        # A sixth of the box is inside; 16 times as many draws leave no doubt.
        points = (low + extent * unit[inside])[:keypoints]
        shapes = ((keypoints, 3), (keypoints, channels), (3, channels))
        values, keys, directions = (torch.randn(shape, generator=generator) for shape in shapes)
        return Case(grid, *(t.to(device) for t in (points, values, keys, directions / 30)))

    def queries(self, points_mm: Tensor) -> Tensor:
        """Waves of some 200 mm, ``n channels``."""
        return (points_mm @ self.directions).cos()

    def blocked(self, k: int, options: Options) -> Tensor:
        """The field on the grid."""
        pairs = options.pairs_at_once or (2**25 if self.values.is_cuda else 2**20)
        return kernel_field_on(
            self.grid, self.keypoints_mm, self.values, Attention(BIAS_MM), k, self.queries, self.keys,
            edge_vox=options.edge_vox, pairs_at_once=pairs,
        )  # fmt: skip

    def plain(self, voxels_mm: Tensor, k: int) -> Tensor:
        """The field at some voxels."""
        parts = [
            kernel_field(
                part, self.keypoints_mm, self.values, Attention(BIAS_MM), k, self.queries(part), self.keys
            )
            for part in voxels_mm.split(POINTS_AT_ONCE)
        ]  # fmt: skip
        return torch.cat(parts)


def dense(case: Case, k: int, options: Options, compare: bool = True) -> dict[str, Any]:
    """Seconds and peak memory of the blocked form, and of the plain one on some of the voxels; how much they differ."""
    device, size = case.values.device, case.grid.size
    record: dict[str, Any] = {"shape": case.grid.shape, "keypoints": len(case.values), "k": k}
    with torch.no_grad():
        with PeakMemory(device) as memory:
            field, taken = timed(lambda: case.blocked(k, options), device)
        record |= {**taken, "peak_mb": memory.peak_mb}
        if not compare:
            return record
        chosen = (
            torch.randperm(size, generator=torch.Generator().manual_seed(SEED))[: options.plain_voxels].sort().values
        )
        voxels = flat_points(case.grid)[0][chosen].to(device)
        with PeakMemory(device) as memory:
            there, taken = timed(lambda: case.plain(voxels, k), device)
    scale = size / len(chosen)
    record |= {"plain_seconds": taken["seconds"] * scale, "plain_voxels": len(chosen), "plain_part_mb": memory.peak_mb}
    record["gathered_gb"] = size * min(k, len(case.values)) * case.keys.shape[1] * 4 / 1e9
    record["ratio"] = record["plain_seconds"] / record["seconds"]
    record["differs"] = float((field.flatten(0, -2)[chosen.to(device)] - there).abs().max() / there.abs().max())
    return record


def training(case: Case, k: int, options: Options) -> dict[str, Any]:
    """Seconds and peak memory of the blocked form with the gradients to values, keys and positions."""
    leaves = points, values, keys = [t.clone().requires_grad_() for t in (case.keypoints_mm, case.values, case.keys)]
    learned = Case(case.grid, points, values, keys, case.directions)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(learned.blocked(k, options).square().mean(), leaves)

    with PeakMemory(case.values.device) as memory:
        _, taken = timed(step, case.values.device)
    found = {"shape": case.grid.shape, "keypoints": len(case.values), "k": k, "with": "gradients"}
    return found | {**taken, "peak_mb": memory.peak_mb}


def neighbours_table(records: Sequence[dict[str, Any]], options: Options) -> Table:
    """K against time."""
    table = Table(
        f"Dense fields from {records[0]['keypoints']:,} keypoints, {options.channels} channels",
        ("grid", "K", "blocked, s", "peak, MB", "plain, s", "keys of the plain form, GB", "times as fast", "differs"),
    )
    for r in records:
        cells = (number(r["seconds"], 2), f"{r['peak_mb']:,.0f}", number(r["plain_seconds"], 1))
        more = (number(r["gathered_gb"], 2), number(r["ratio"], 1), f"{r['differs']:.0e}")
        table.add(_size(r), str(r["k"]), *cells, *more)
    asked = [r for r in records if r["shape"] == FULL.shape and r["k"] == K_OF_AIMS]
    for r in asked if not options.quick else []:
        what = f"{_size(r)}, K = {K_OF_AIMS}"
        table.notes += [
            tables.aim(f"Seconds, {what}", r["seconds"], MOST_SECONDS, at_least=False, digits=1),
            tables.aim(f"Peak memory in MB, {what}", r["peak_mb"], MOST_MB, at_least=False, digits=0),
            tables.aim(f"Times as fast as the plain form, {what}", r["ratio"], LEAST_RATIO, digits=1),
        ]
    voxels = max(r["plain_voxels"] for r in records)
    table.notes.append(
        f"Plain: measured on at most {voxels:,} voxels, {POINTS_AT_ONCE:,} at a time, and scaled up to the whole grid; "
        "its keys are what it would gather for all voxels at once. Differs: largest difference on those voxels, "
        f"relative to the largest value. Threads: {torch.get_num_threads()}."
    )
    return table


def keypoints_table(records: Sequence[dict[str, Any]]) -> Table:
    """Number of keypoints against time, and a step of training."""
    table = Table(
        f"The blocked form, {_size(records[0])}, K = {records[0]['k']}", ("what", "keypoints", "seconds", "peak, MB")
    )
    for r in sorted(records, key=lambda r: ("with" in r, r["keypoints"])):
        what = "with gradients" if "with" in r else "field"
        table.add(what, f"{r['keypoints']:,}", number(r["seconds"], 2), f"{r['peak_mb']:,.0f}")
    return table


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; see the module."""
    options = tyro.cli(Options, args=arguments)
    sizes = {"half": HALF, "full": FULL}
    unknown = [name for name in options.sizes if name not in sizes]
    if unknown or not options.sizes:
        raise ValueError(f"sizes are half and full, not {', '.join(unknown) or 'none'}.")
    if min((*options.neighbours, *options.keypoints, options.plain_voxels, options.channels), default=0) < 1:
        raise ValueError("The numbers of neighbours, keypoints, voxels and channels are 1 or more.")
    if not options.neighbours or not options.keypoints:
        raise ValueError("At least one number of neighbours and one of keypoints is needed.")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    before = hardware(device)
    grids = [TINY] if options.quick else [sizes[name] for name in options.sizes]
    counts = (60, 30) if options.quick else options.keypoints
    over_k, over_keypoints = [], []
    for warm_up in (dense, training):
        warm_up(Case.of(TINY, counts[0], options.channels, device), options.neighbours[0], options)
    for grid in grids:
        case = Case.of(grid, counts[0], options.channels, device)
        for k in options.neighbours:
            over_k.append(dense(case, k, options))
            print(f"{_size(over_k[-1])}, K = {k}: {over_k[-1]['seconds']:.2f} s", flush=True)
    k = K_OF_AIMS if K_OF_AIMS in options.neighbours else options.neighbours[-1]
    for count in counts:
        case = Case.of(grids[0], count, options.channels, device)
        over_keypoints.append(dense(case, k, options, compare=False))
        print(f"{count} keypoints: {over_keypoints[-1]['seconds']:.2f} s", flush=True)
    over_keypoints.append(training(Case.of(grids[0], counts[0], options.channels, device), k, options))
    shown = [neighbours_table(over_k, options), keypoints_table(over_keypoints)]
    facts = {"seeds": (SEED,), "quick": options.quick, "hardware": before}
    records = over_k + over_keypoints
    return tables.report("benchmarks.kernel_field", arguments, options.json, shown, records, facts)


def _size(record: dict[str, Any]) -> str:
    return " x ".join(map(str, record["shape"]))


if __name__ == "__main__":
    tables.command(main)
