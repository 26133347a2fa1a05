"""From a label map in its own space to a person on a common grid: turned, read, counted.

Convention: RAS millimetres about a fixed template, whose axes are those of the MNI space: x = 0 between the
hemispheres, and the fourteen sub-cortical structures where :data:`anatomy.TEMPLATE` has them. ``align="rigid"`` turns
and shifts each person onto it by the centroids of these structures (Procrustes, without scale); ``align="none"`` only
shifts, and keeps the turn of the file. Structures have the labels 1 to 7 on the left and 8 to 14 on the right, in the
order of :data:`STRUCTURES`; with ``sides="merged"`` 1 to 7 for both. A map whose structures lie elsewhere than in a
brain (another numbering, sides swapped) is refused.

Each voxel of the grid is divided into parts of about 1 mm. The SoI are the fractions of these parts in a structure;
labels and tissue are what most of them are.

Source: rigid alignment: Kabsch, Acta Crystallographica A32 (1976).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from regteach.data.anatomy import Fine, axis_positions, centroids, template_points, turn_onto
from regteach.data.cohort import Cohort
from regteach.data.contrast import synthesise, t1_like
from regteach.data.intensity import normalised
from regteach.data.volumes import Volume
from regteach.grid import Grid
from regteach.sampling import warp

STRUCTURES = ("thalamus", "caudate", "putamen", "pallidum", "accumbens", "hippocampus", "amygdala")
# FreeSurfer's numbers of the structures, left then right, in the order of STRUCTURES.
FREESURFER_NUMBERS = (10, 11, 12, 13, 26, 17, 18, 49, 50, 51, 52, 58, 53, 54)
APART_MM = 8.0  # 1.4 to 3.7 mm in the donors and the SynthSeg maps; with swapped sides it is 13 or more


@dataclass(frozen=True)
class Person:
    """One person on the common grid."""

    name: str
    counts: Int[Tensor, "k *grid"]  # parts of each voxel in each structure
    labels: Int[Tensor, "*grid"]
    tissue: Int[Tensor, "*grid"] | None
    image: Float[Tensor, "1 *grid"]


@dataclass(frozen=True)
class Head:
    """A label map in its own space; ``numbers`` are its structures (0: not in it), ``t1`` the scan it belongs to."""

    labels: Volume
    numbers: Sequence[int]
    t1: Volume | None = None

    def on(self, grid: Grid, align: str) -> Fine:
        """Turned and shifted onto the template, and read at the parts of each voxel: labels nearest, T1 linear."""
        rotation, centroid, centre = self._pose(align)
        parts = tuple(max(1, round(h)) for h in grid.spacing)
        fine = grid.resized([n * p for n, p in zip(grid.shape, parts, strict=True)])
        labels = nearest(self.labels, fine, rotation, centroid, centre)
        scan = None
        if self.t1 is not None:

            def own_mm(points: Tensor) -> Tensor:
                return (points - centre.float()) @ rotation.float() + centroid.float()

            scan = warp(self.t1.batch, own_mm, self.t1.grid, fine, padding="zeros")[0, 0]
        return Fine(labels, numbered(labels, self.numbers), scan, fine, parts)

    def _pose(self, align: str) -> tuple[Tensor, Tensor, Tensor]:
        """Rotation R, centroid c of the person and m of the template: x is at R (x - c) + m on the template."""
        one_of("align", align, ("rigid", "none"))
        have = [i for i, number in enumerate(self.numbers) if number]
        own = centroids(numbered(self.labels.data, self.numbers), self.labels.grid)[have]
        for i, position in zip(have, own, strict=True):
            if not bool(position.isfinite().all()):
                raise ValueError(f"The label map has no {names_of('both')[i + 1]} (number {self.numbers[i]}).")
        template = template_points()[have]
        centroid, centre = own.mean(0), template.mean(0)
        rotation = turn_onto(own, template)
        apart_mm = float(((own - centroid) @ rotation.T - (template - centre)).norm(dim=1).mean())
        if apart_mm > APART_MM:
            raise ValueError(
                f"The structures lie {apart_mm:.0f} mm from where a brain has them: "
                "the numbering or the orientation of this label map is another one."
            )
        return rotation if align == "rigid" else torch.eye(3, dtype=torch.float64), centroid, centre


def nearest(volume: Volume, fine: Grid, rotation: Tensor, centroid: Tensor, centre: Tensor) -> Int[Tensor, "*fine"]:
    """The label nearest to each point of ``fine``; outside the volume is 0.

    A voxel index is the sum of one number for each coordinate of the point, so three tables serve for all points.
    """
    spacing, origin = torch.tensor(volume.grid.spacing), torch.tensor(volume.grid.origin)
    inverse = rotation.T.float() / spacing[:, None]
    first = (centroid.float() - origin) / spacing + 1  # a border of one voxel of 0 takes all that lies outside
    axes = [axis - float(c) for axis, c in zip(axis_positions(fine), centre, strict=True)]
    flat = torch.zeros(fine.shape, dtype=torch.int32)
    for k, n in enumerate(volume.grid.shape):
        index = inverse[k, 0] * axes[0] + first[k] + inverse[k, 1] * axes[1] + inverse[k, 2] * axes[2]
        flat.mul_(n + 2).add_(index.round_().clamp_(0, n + 1).to(torch.int32))
    padded = F.pad(volume.data.to(torch.int16), (1,) * 6)
    return padded.reshape(-1).index_select(0, flat.reshape(-1)).reshape(fine.shape)


def person_on(name: str, fine: Fine, tissue: Int[Tensor, "*fine"] | None, grid: Grid, sides: str, seed: int) -> Person:
    """From the parts to the voxels of the grid; a person without a scan gets a T1-like image."""
    structures = fine.structures
    if sides == "merged":
        structures = torch.where(structures > len(STRUCTURES), structures - len(STRUCTURES), structures)
    counts = counts_of(structures, fine.parts, len(names_of(sides)) + 1)
    coarse = None if tissue is None else most_of(counts_of(tissue, fine.parts, int(tissue.max()) + 1))
    if fine.t1 is not None:
        image = F.avg_pool3d(fine.t1[None, None], fine.parts)
    else:
        assert coarse is not None
        image = t1_like(coarse[None], grid, torch.Generator().manual_seed(seed))
    return Person(name, counts[1:], most_of(counts), coarse, normalised(image)[0])


def counts_of(fine: Int[Tensor, "*fine"], parts: tuple[int, ...], count: int) -> Int[Tensor, "c *grid"]:
    """How many of each voxel's parts have the labels 0 ... count-1."""
    coarse = tuple(n // p for n, p in zip(fine.shape, parts, strict=True))
    # A byte counts the parts of voxels of up to 6 mm. A grid of larger voxels has few of them.
    kind = torch.uint8 if math.prod(parts) < 256 else torch.int32
    counts = torch.zeros(count, math.prod(coarse), dtype=kind)
    one = torch.ones(1, counts.shape[1], dtype=kind)
    for offset in itertools.product(*map(range, parts)):
        part = fine[tuple(slice(o, None, p) for o, p in zip(offset, parts, strict=True))]
        counts.scatter_add_(0, part.reshape(1, -1).long(), one)
    return counts.unflatten(1, coarse)


def most_of(counts: Int[Tensor, "c *grid"]) -> Int[Tensor, "*grid"]:
    """The label with most parts, the last of equals: half a voxel of a structure is enough.

    Several times faster than ``argmax`` over a leading axis.
    """
    best, label = counts[0].clone(), torch.zeros(counts.shape[1:], dtype=torch.int64)
    for k, count in enumerate(counts[1:], start=1):
        label[count >= best] = k
        torch.maximum(best, count, out=best)
    return label


def cohort_of(
    name: str,
    people: list[Person],
    grid: Grid,
    sides: str,
    origin: str,
    splits: Mapping[str, tuple[int, ...]],
    without: str = "",
) -> Cohort:
    """People on one grid as a cohort; their contrast can be drawn anew where all tissue is known.

    Args:
        name: of the cohort.
        people: on ``grid``, with or without ``sides``.
        grid: where they sit.
        sides: "both" or "merged".
        origin: a sentence on where they come from.
        splits: people of each split.
        without: a structure that nobody has.
    """
    structures = {label: s for label, s in names_of(sides).items() if not without or without not in s}
    parts = math.prod(max(1, round(h)) for h in grid.spacing)
    soi = torch.empty(len(people), len(structures), *grid.shape)
    for i, person in enumerate(people):
        for channel, label in enumerate(structures):
            torch.div(person.counts[label - 1], parts, out=soi[i, channel])
    tissue = [p.tissue for p in people if p.tissue is not None]
    return Cohort(
        name=name,
        images=torch.stack([p.image for p in people]),
        soi=soi,
        labels=torch.stack([p.labels for p in people]),
        grid=grid,
        people=tuple(p.name for p in people),
        structures=structures,
        splits=splits,
        origin=origin,
        tissue=torch.stack(tissue) if tissue else None,
        synthesis=synthesise if tissue else None,
    )


def names_of(sides: str) -> dict[int, str]:
    """Label -> structure."""
    one_of("sides", sides, ("both", "merged"))
    names = STRUCTURES if sides == "merged" else [f"{side} {s}" for side in ("left", "right") for s in STRUCTURES]
    return dict(enumerate(names, start=1))


def numbered(fine: Int[Tensor, "*fine"], numbers: Sequence[int]) -> Int[Tensor, "*fine"]:
    """The labels 1 to 14 from a map's own numbers."""
    return looked_up(fine, {number: label for label, number in enumerate(numbers, start=1) if number})


def looked_up(fine: Int[Tensor, "*fine"], names: Mapping[int, int]) -> Int[Tensor, "*fine"]:
    """Each number's own label; what has no name is background."""
    fine = fine.clamp_min(0)  # some write their background as -1
    table = torch.zeros(max(int(fine.max()), *names) + 1, dtype=torch.uint8)
    table[list(names)] = torch.tensor(list(names.values()), dtype=torch.uint8)
    return table.index_select(0, fine.reshape(-1).int()).reshape(fine.shape)


def one_of(what: str, given: str, known: Sequence[str]) -> None:
    """Raise a ValueError unless the name is one of those that are known."""
    if given not in known:
        raise ValueError(f"{what} is {' or '.join(repr(k) for k in known)}, not {given!r}.")
