"""Data sets by name: what recipes, benchmarks and the command line ask for; each is read once.

A data set's own module is imported when it is asked for, not before.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

from regteach.data.cohort import Cohort, joined
from regteach.grid import Grid
from regteach.names import nearest

BRAINS = Grid((64, 72, 64), (2.0,))


def _tree_cohort(kind: str) -> Cohort:
    from regteach.data.trees import generate_trees

    return generate_trees(kind=kind)


def _synth2d() -> Cohort:
    from regteach.data.synth2d import read_synth2d

    return read_synth2d()


def _hippocampus() -> Cohort:
    from regteach.data.hippocampus import load_hippocampus

    return load_hippocampus()


def _slices() -> Cohort:
    from regteach.data.slices import load_slices

    return load_slices()


def _donors(spacing_mm: float, shape: tuple[int, int, int], sides: str = "both") -> Cohort:
    from regteach.data.brains import load_donors

    return load_donors(spacing_mm, shape, sides=sides)


def _brains() -> Cohort:
    from regteach.data.brains import load_donors, load_synthseg
    from regteach.data.contrast import Contrast, synthesise

    at = {"spacing_mm": 2.0, "shape": BRAINS.shape, "sides": "merged"}
    both = joined("brains", [load_donors(**at), load_synthseg(**at)])  # type: ignore[arg-type]
    # Any scanner, but T1 in most draws: it is what most people have.
    return replace(both, synthesis=partial(synthesise, config=Contrast(t1_like=0.7)))


def _brains_by_source() -> Cohort:
    """The same people, each paired with those whose map was made in the same way.

    A donor's fluid is invented, and there is little of it: to an image of another source the whole outline differs, and
    what is learned from images alone follows the outline. One person more is kept for validation, to have a pair.
    """
    from regteach.data.brains import load_donors, load_synthseg

    at = {"spacing_mm": 2.0, "shape": BRAINS.shape, "sides": "merged"}
    donors, maps = load_donors(**at), load_synthseg(**at)  # type: ignore[arg-type]
    first, *others = maps.splits["train"]
    splits = {**maps.splits, "train": tuple(others), "validation": (*maps.splits["validation"], first)}
    return joined("brains-by-source", [donors, replace(maps, splits=splits)], mixed=False)


def _oasis() -> Cohort:
    from regteach.data.brains import load_oasis

    return load_oasis(2.0, BRAINS.shape, sides="merged")


def _digits() -> Cohort:
    from regteach.data.digits import load_digit_pairs

    return load_digit_pairs()


def _unlabelled_slices() -> Cohort:
    from regteach.data.slices import load_unlabelled_slices

    return load_unlabelled_slices()


def _retina() -> Cohort:
    from regteach.data.retina import generate_retina

    return generate_retina(train=200)


def _brains_t1t2() -> Cohort:
    from regteach.data.modalities import two_contrasts

    return two_contrasts(_brains_by_source())


def _mni_t1t2() -> Cohort:
    from regteach.data.modalities import load_mni_contrasts

    return load_mni_contrasts()


COHORTS: dict[str, Callable[[], Cohort]] = {
    "trees": lambda: _tree_cohort("segmentation"),
    "tree-landmarks": lambda: _tree_cohort("landmarks"),
    "tree-landmark-distances": lambda: _tree_cohort("landmark distances"),
    "synth2d": _synth2d,
    "hippocampus": _hippocampus,
    "slices": _slices,
    "donors": lambda: _donors(3.0, (64, 64, 64)),
    "brains": _brains,
    "brains-by-source": _brains_by_source,
    "oasis": _oasis,
    "donors-2mm": lambda: _donors(2.0, (96, 112, 96)),
    "digits": _digits,
    "unlabelled-slices": _unlabelled_slices,
    "retina": _retina,
    "brains-t1t2": _brains_t1t2,
    "mni-t1t2": _mni_t1t2,
}


@cache
def load_cohort(name: str) -> Cohort:
    """A cohort by name, read once.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    return known(name, COHORTS, "data set")()


def known(name: str, table: dict, what: str):  # type: ignore[no-untyped-def]
    """The entry of a table, or a ValueError that names the nearest one."""
    if name not in table:
        near = nearest(name, table)
        raise ValueError(f"There is no {what} {name!r}; the nearest is {near!r} (of {', '.join(table)}).")
    return table[name]
