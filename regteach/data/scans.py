"""Two real T1 images of whole brains that come with labels: Colin27 with AAL's, the MNI template with FreeSurfer's.

They are for testing: no model has seen either. Convention: that of :mod:`regteach.data.heads`.

Sources: Holmes et al. (1998), Colin27; Tzourio-Mazoyer et al. (2002), AAL; Fonov et al., NeuroImage 47 (2009), the
template; Fischl et al., Neuron 33 (2002), the labels, and Postelnicu et al., IEEE TMI 28 (2009), how they came there.
"""

from collections.abc import Sequence

import data_download
from regteach.data.brains import brain_grid
from regteach.data.cohort import Cohort
from regteach.data.heads import FREESURFER_NUMBERS, Head, cohort_of, person_on
from regteach.data.modalities import load_mni_pair
from regteach.data.volumes import read_volume

AAL_NUMBERS = (77, 71, 73, 75, 0, 37, 41, 78, 72, 74, 76, 0, 38, 42)  # AAL has no accumbens
TO_TEST: dict[str, tuple[int, ...]] = {"train": (), "validation": (), "test": (0,)}


def load_colin(
    spacing_mm: float = 3.0, shape: Sequence[int] = (64, 64, 64), sides: str = "both", align: str = "rigid"
) -> Cohort:
    """Colin27, one real T1 with the labels of AAL: one person to try a network on real contrast.

    AAL has no accumbens: that structure, and its channel, are left out; the other labels keep their numbers. AAL's
    outlines are generous: its caudate takes in some of the ventricle. The person is in the test split.

    Raises:
        FileNotFoundError: if T1 or labels have not been fetched.
        ValueError: for an unknown ``sides`` or ``align``.
    """
    grid = brain_grid(spacing_mm, shape)
    labels = read_volume(data_download.locate("colin27-labels", "aal.nii"), labels=True)
    fine = Head(labels, AAL_NUMBERS, read_volume(data_download.locate("colin27", "t1.nii.gz"))).on(grid, align)
    origin = (
        "One real T1 (Colin27, the mean of 27 scans of one person), labels of the AAL atlas, which has no accumbens."
    )
    people = [person_on("colin", fine, None, grid, sides, 0)]
    return cohort_of("colin27", people, grid, sides, origin, TO_TEST, without="accumbens")


def load_template(
    spacing_mm: float = 3.0, shape: Sequence[int] = (64, 64, 64), sides: str = "both", align: str = "rigid"
) -> Cohort:
    """The T1 of the MNI152 template with FreeSurfer's labels: real contrast, labelled by the rules of the others.

    The T1 is the mean of many people (2009c, skull taken off): smoother than that of one, and nearly without noise. The
    labels are those of another mean, of 35 people, that was brought to an earlier edition of the template: near enough
    that each structure is of one grey, but nobody drew them on this image.

    Raises:
        FileNotFoundError: if template or labels have not been fetched.
        ValueError: for an unknown ``sides`` or ``align``.
    """
    grid = brain_grid(spacing_mm, shape)
    labels = read_volume(data_download.locate("mni152-labels", "aparc_aseg.nii.gz"), labels=True)
    fine = Head(labels, FREESURFER_NUMBERS, load_mni_pair()[0]).on(grid, align)
    origin = "The T1 of an average brain (MNI152, 2009c), labels by FreeSurfer, of another average in the same space."
    return cohort_of("mni152", [person_on("mni152", fine, None, grid, sides, 0)], grid, sides, origin, TO_TEST)
