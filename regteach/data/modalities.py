"""Two contrasts of a brain, T1 and T2: pairs in which bright in one image is dark in the other.

What is real and what is not: :func:`two_contrasts` takes a cohort whose anatomy is real and draws a T2 of every person
from the map of tissues, as :func:`contrast.t1_like` draws a T1: synthetic, one value a tissue, mild bias, blur and
noise. :func:`load_mni_pair` is real: T1 and T2 of the MNI template, an average brain, on which a model trained on the
synthetic pairs can be checked.

Convention: the moving image is the T1 and the fixed one the T2, unless said otherwise.

Source of the template: Fonov et al., Unbiased nonlinear average age-appropriate brain templates, NeuroImage 47, 2009.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

import data_download
from regteach.data.brains import brain_grid
from regteach.data.cohort import SPLITS, Cohort, one_hot
from regteach.data.contrast import t1_like
from regteach.data.intensity import normalised
from regteach.data.volumes import Volume, load_mni, read_volume
from regteach.grid import Grid

# How bright a T2 shows each tissue, fluid being 1: the order of a T1, nearly upside down; the pallidum holds iron.
T2 = {
    "background": 0.0,
    "csf": 1.0,
    "cortex": 0.56,
    "white matter": 0.36,
    "ventricle": 1.0,
    "cerebellar cortex": 0.56,
    "cerebellar white matter": 0.39,
    "brainstem": 0.41,
    "ventral diencephalon": 0.39,
    "thalamus": 0.46,
    "caudate": 0.51,
    "putamen": 0.46,
    "pallidum": 0.31,
    "accumbens": 0.52,
    "hippocampus": 0.58,
    "amygdala": 0.57,
    "lesion": 0.75,
}
CONTRASTS = ("T1", "T2")
MATTER = {1: "grey matter", 2: "white matter"}


def t2_like(tissue: Int[Tensor, "b *grid"], grid: Grid, generator: torch.Generator) -> Float[Tensor, "b 1 *grid"]:
    """A plausible, skull-stripped T2 of each tissue map, in [0, 1]; arguments as in :func:`contrast.synthesise`."""
    return t1_like(tissue, grid, generator, T2)


def two_contrasts(cohort: Cohort, seed: int = 0, moving: str = "T1") -> Cohort:
    """Pairs of different people of a cohort, one seen in T1, the other in T2.

    Args:
        cohort: T1 images with a map of tissues, such as :func:`brains.load_donors` or :func:`brains.load_synthseg`.
        seed: of bias and noise of the synthetic T2; each person's depends on it and on their place in the cohort.
        moving: contrast of the moving images, "T1" or "T2"; the fixed ones have the other.

    Returns:
        A cohort of twice as many images: first everybody's T1, as it was, then everybody's T2. Person i is in images i
        and i + n, which share their anatomy voxel by voxel. Splits as before; its pairs are those of different people
        and different contrasts.

    Raises:
        ValueError: if the cohort has no map of tissues, or there is no such contrast.
    """
    if moving not in CONTRASTS:
        raise ValueError(f"The contrast of the moving images is {' or '.join(CONTRASTS)}, not {moving!r}.")
    if cohort.tissue is None:
        raise ValueError(f"{cohort.name} has no map of tissues, from which a T2 could be drawn.")
    n = len(cohort)
    drawn = [t2_like(cohort.tissue[[i]], cohort.grid, torch.Generator().manual_seed(seed + i)) for i in range(n)]
    first, second = (0, n) if moving == "T1" else (n, 0)
    return replace(
        cohort,
        name=f"{cohort.name}-t1t2",
        images=torch.cat([cohort.images, *drawn]),
        soi=cohort.soi.repeat(2, *[1] * (cohort.soi.ndim - 1)),
        labels=cohort.labels.repeat(2, *[1] * (cohort.labels.ndim - 1)),
        tissue=cohort.tissue.repeat(2, *[1] * (cohort.tissue.ndim - 1)),
        people=(*cohort.people, *cohort.people),
        splits={split: (*members, *(i + n for i in members)) for split, members in cohort.splits.items()},
        origin=f"{cohort.origin} The T2 is synthetic.",
        groups=(*cohort.groups, *cohort.groups),
        twins=tuple((i + n) % (2 * n) for i in range(2 * n)),
        given_pairs={split: tuple((m + first, f + second) for m, f in cohort.pairs(split)) for split in cohort.splits},
    )


def same_anatomy(cohort: Cohort, moving: str = "T1") -> Mapping[int, int]:
    """Moving image -> image of the same person in the other contrast: ``partners`` of :func:`large.deformed`.

    Args:
        cohort: from :func:`two_contrasts` or :func:`load_mni_contrasts`.
        moving: contrast of the moving images.
    """
    n = len(cohort) // 2
    return {i: i + n for i in range(n)} if moving == "T1" else {i + n: i for i in range(n)}


def load_mni_pair(stripped: bool = True) -> tuple[Volume, Volume]:
    """T1 and T2 of the MNI152 template (2009c, asymmetric), which match each other: 193 x 229 x 193 at 1 mm.

    Args:
        stripped: 0 outside the brain, which is where the T1 of :func:`volumes.load_mni` has signal. That is another
            edition of the template (2009a, symmetric), so its outline is off by a millimetre or two in places.

    Raises:
        FileNotFoundError: if a template has not been fetched; the message has the command.
        ValueError: if the two lie on different grids.
    """
    t1, t2 = (read_volume(data_download.locate("mni152-t1-t2", f"{name}.nii.gz")) for name in ("t1", "t2"))
    if t1.grid != t2.grid:
        raise ValueError(f"The T1 and the T2 of the template lie on different grids: {t1.grid} and {t2.grid}.")
    if not stripped:
        return t1, t2
    other = load_mni("t1")
    inside = _on(Volume((other.data > 0).float(), other.grid), t1.grid)[0, 0] > 0.5
    note = "The skull was taken off with the outline of another edition of the template."
    return tuple(Volume(torch.where(inside, v.data, 0), v.grid, (*v.notes, note)) for v in (t1, t2))  # type: ignore[return-value]


def load_mni_contrasts(spacing_mm: float = 3.0, shape: Sequence[int] = (64, 64, 64)) -> Cohort:
    """The MNI pair on the grid of :mod:`brains`, to check a model on real contrasts: one test pair, already aligned.

    With :func:`large.deformed` and ``partners=same_anatomy(cohort)`` it becomes pairs with a known answer that nobody
    aligned by hand. Grey and white matter (where their maps of the edition 2009a are above a half) are the structures.

    Args:
        spacing_mm: of the grid.
        shape: of the grid.

    Raises:
        FileNotFoundError: if a template has not been fetched; the message has the command.
    """
    grid = brain_grid(spacing_mm, shape)
    pair = [_on(volume, grid) for volume in load_mni_pair()]
    grey, white = (_on(load_mni(kind), grid)[0, 0] for kind in ("grey_matter", "white_matter"))
    labels = torch.where(torch.maximum(grey, white) > 0.5 * 255, torch.where(white > grey, 2, 1), 0)[None]
    return Cohort(
        name="mni-t1t2",
        images=torch.cat([normalised(image) for image in pair]),
        soi=one_hot(labels, MATTER).repeat(2, 1, 1, 1, 1),
        labels=labels.repeat(2, 1, 1, 1),
        grid=grid,
        people=("MNI152", "MNI152"),
        structures=MATTER,
        splits={split: (0, 1) if split == "test" else () for split in SPLITS},
        origin="Real T1 and T2 of an average brain (MNI152, 2009c asymmetric), skull taken off.",
        given_pairs={"test": ((0, 1),)},
    )


def _on(volume: Volume, grid: Grid) -> Float[Tensor, "1 1 *grid"]:
    """A volume on another grid, 0 outside: read linearly at parts of each new voxel, and averaged over the parts.

    A part is about as large as an old voxel. All of this separates into one small matrix per axis.
    """
    out, old = volume.data.float(), volume.grid
    for axis in range(grid.dim):
        parts = max(1, round(grid.spacing[axis] / old.spacing[axis]))
        inside = (torch.arange(parts) + 0.5) / parts - 0.5
        places = grid.origin[axis] + grid.spacing[axis] * (torch.arange(grid.shape[axis])[:, None] + inside)
        index = (places - old.origin[axis]) / old.spacing[axis]
        weights = (1 - (index[..., None] - torch.arange(old.shape[axis])).abs()).clamp(min=0).mean(1)
        out = torch.tensordot(out, weights, dims=([axis], [1])).movedim(-1, axis)
    return out[None, None]
