"""Images of several people on one grid, with the structures that matter, and who is kept for what.

Every data set of the course that registers one person to another is a :class:`Cohort`: the same training loop, the
same benchmarks and the same lessons read them all. A cohort is in memory, on the CPU, and never changes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regteach.grid import Grid

ROUNDING = 1e-3  # how far an SoI that was interpolated or averaged may be outside of [0, 1]
SPLITS = ("train", "validation", "test")
Synthesis = Callable[[Int[Tensor, "b *grid"], Grid, torch.Generator], Float[Tensor, "b 1 *grid"]]


@dataclass(frozen=True, eq=False)
class Cohort:
    """Images with structures of interest (SoI), and a split of the people.

    Args:
        name: of the data set.
        images: ``n c *grid``, scaled to [0, 1] by :func:`regteach.data.intensity.normalised`.
        soi: ``n k *grid``, one channel a structure, in [0, 1].
        labels: ``n *grid``, for measuring: 0 is background.
        grid: where all of them sit.
        people: whose image each is; no person is in two splits.
        structures: name of each label, in the order of the SoI channels.
        splits: indices of "train", "validation" and "test".
        origin: one sentence: what is real, what is synthetic.
        tissue: ``n *grid``, a finer label map from which a contrast can be drawn, where there is one.
        synthesis: draws images from tissue maps, for training on contrasts that nobody has measured.
        given_pairs: (moving, fixed) where the data set itself says which images belong together.
        groups: of each image; people of two groups are never paired. One group where left out.
        twins: of each image, the one that shows the same person as the other side of a pair does, in another contrast;
            every image is its own where left out.

    Raises:
        ValueError: if the shapes do not fit, a number is not finite or an SoI outside of [0, 1], or a person is in two
            splits.
    """

    name: str
    images: Float[Tensor, "n c *grid"]
    soi: Float[Tensor, "n k *grid"]
    labels: Int[Tensor, "n *grid"]
    grid: Grid
    people: tuple[str, ...]
    structures: Mapping[int, str]
    splits: Mapping[str, tuple[int, ...]]
    origin: str
    tissue: Int[Tensor, "n *grid"] | None = None
    synthesis: Synthesis | None = None
    given_pairs: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    twins: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n, shape = len(self.people), self.grid.shape
        within = set(self.twins) <= set(range(n))
        if self.twins and not (within and tuple(self.people[i] for i in self.twins) == self.people):
            raise ValueError(f"A twin of {self.name} shows another person, or is left out.")
        if len(self.groups) not in (0, n):
            raise ValueError(f"{self.name} has {n} images, but names the groups of {len(self.groups)}.")
        sizes = {"images": self.images.shape[2:], "soi": self.soi.shape[2:], "labels": self.labels.shape[1:]}
        if self.tissue is not None:
            sizes["tissue"] = self.tissue.shape[1:]
        for name, size in sizes.items():
            if tuple(size) != shape or len(getattr(self, name)) != n:
                raise ValueError(f"The {name} of {self.name} do not fit {n} images on a grid of {shape} voxels.")
        for name, values in (("images", self.images), ("SoI", self.soi)):
            low, high = (float(end) for end in values.aminmax()) if values.numel() else (0.0, 0.0)
            if not (math.isfinite(low) and math.isfinite(high)):  # aminmax passes a nan on
                raise ValueError(f"The {name} of {self.name} hold numbers that are not finite.")
            if name == "SoI" and not -ROUNDING <= low <= high <= 1 + ROUNDING:
                raise ValueError(f"The SoI of {self.name} go from {low:g} to {high:g}: they lie between 0 and 1.")
        if self.soi.shape[1] != len(self.structures):
            raise ValueError(
                f"{self.name} names {len(self.structures)} structures, but its SoI has {self.soi.shape[1]} channels."
            )
        seen: dict[str, str] = {}
        for split, members in self.splits.items():
            if len(set(members)) < len(members) or not set(members) <= set(range(n)):
                raise ValueError(f"The {split} set of {self.name} names an image twice, or one that is not there.")
            for person in {self.people[i] for i in members}:
                if seen.setdefault(person, split) != split:
                    raise ValueError(f"Person {person} of {self.name} is both in {seen[person]} and in {split}.")
        for split, pairs in self.given_pairs.items():
            if not {i for pair in pairs for i in pair} <= set(self.splits.get(split, ())):
                raise ValueError(f"A given pair of the {split} set of {self.name} has an image of another set.")

    def __len__(self) -> int:
        return len(self.people)

    def __repr__(self) -> str:
        parts = ", ".join(f"{split} {len(members)}" for split, members in self.splits.items())
        size = " x ".join(map(str, self.grid.shape))
        return f"{type(self).__name__}({self.name}: {len(self)} images of {size} voxels: {parts})"

    def pairs(self, split: str, count: int | None = None, seed: int = 0) -> tuple[tuple[int, int], ...]:
        """(moving, fixed) indices of one split: the data set's own pairs, or random ones of two different people.

        Args:
            split: "train", "validation" or "test".
            count: how many; all there are where left out. No pair comes twice.
            seed: of the random choice; the same seed gives the same pairs anywhere.

        Raises:
            ValueError: for an unknown split, or one with fewer pairs than asked for.
        """
        if split not in self.splits:
            raise ValueError(f"{self.name} is split into {', '.join(self.splits)}, not {split!r}.")
        members = self.splits[split]
        every = self.given_pairs.get(split) or tuple(
            (m, f) for m in members for f in members if self.people[m] != self.people[f] and self._akin(m, f)
        )
        if count is None or (self.given_pairs.get(split) and count == len(every)):
            return every
        if not 0 <= count <= len(every):
            raise ValueError(f"{self.name} has {len(every)} pairs in its {split} set, and {count} were asked for.")
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
        return tuple(every[i] for i in order[:count].tolist())

    def twin(self, index: int) -> int:
        """The image that shows the same person as the other side of a pair does."""
        return self.twins[index] if self.twins else index

    def _akin(self, first: int, second: int) -> bool:
        return not self.groups or self.groups[first] == self.groups[second]


def split_by_person(people: tuple[str, ...], parts: Mapping[str, int], seed: int) -> dict[str, tuple[int, ...]]:
    """Deal the people out at random, all images of a person together.

    Args:
        people: whose image each is.
        parts: number of people per split, in order; -1 once, for all that are left.
        seed: of the shuffle.

    Raises:
        ValueError: if there are fewer people than asked for.
    """
    names = sorted(set(people))
    if min(parts.values()) < -1 or list(parts.values()).count(-1) > 1:
        raise ValueError(f"The splits ask for {dict(parts)}, but only one of them can be -1, for all that are left.")
    taken = sum(n for n in parts.values() if n >= 0)
    if taken > len(names):
        raise ValueError(f"The splits ask for {taken} people, but there are {len(names)}.")
    shuffled = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()]
    splits = {}
    for split, n in parts.items():
        n = len(names) - taken if n < 0 else n
        chosen, shuffled = set(shuffled[:n]), shuffled[n:]
        splits[split] = tuple(i for i, person in enumerate(people) if person in chosen)
    return splits


def one_hot(labels: Int[Tensor, "n *grid"], structures: Mapping[int, str]) -> Float[Tensor, "n k *grid"]:
    """A channel of 0 and 1 for each structure, in the order given."""
    return torch.stack([labels == label for label in structures], dim=1).float()


def joined(name: str, cohorts: Sequence[Cohort], mixed: bool = True) -> Cohort:
    """Several cohorts on one grid, with the same structures, as one; each keeps its people in their splits.

    Args:
        name: of the whole.
        cohorts: parts.
        mixed: also pair people of different cohorts.

    Raises:
        ValueError: if the grids or the structures differ.
    """
    first = cohorts[0]
    for other in cohorts[1:]:
        if other.grid != first.grid or list(other.structures.items()) != list(first.structures.items()):
            raise ValueError(f"{other.name} and {first.name} differ in grid or structures, and can not be joined.")
    starts = [sum(len(c) for c in cohorts[:k]) for k in range(len(cohorts))]
    tissues = [cohort.tissue for cohort in cohorts if cohort.tissue is not None]
    return Cohort(
        name,
        torch.cat([cohort.images for cohort in cohorts]),
        torch.cat([cohort.soi for cohort in cohorts]),
        torch.cat([cohort.labels for cohort in cohorts]),
        first.grid,
        tuple(f"{cohort.name} {person}" for cohort in cohorts for person in cohort.people),
        first.structures,
        {
            split: tuple(start + i for start, c in zip(starts, cohorts, strict=True) for i in c.splits.get(split, ()))
            for split in SPLITS
        },
        " ".join(dict.fromkeys(cohort.origin for cohort in cohorts)),
        torch.cat(tissues) if len(tissues) == len(cohorts) else None,
        first.synthesis,
        groups=() if mixed else tuple(cohort.name for cohort in cohorts for _ in cohort.people),
    )
