"""Register a user's own images: what happens around a network.

``register`` reads both images, brings them to the scale and the grid that the network was trained on, lets the network
find a transform, refines it on the pair if asked, and returns it as a function of world coordinates.

Convention: a transform maps fixed points to moving points, both in the world coordinates of the files (RAS mm). The
working grid has the network's shape and spacing and sits on the middle of what the fixed image shows; the moving image
is read on the same grid, shifted first where the two images lie far apart (see :mod:`regteach.framing`).
"""

import copy
import json
import math
import numbers
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from regteach import framing, metrics, objectives, remarks, similarity
from regteach.affine import Affine
from regteach.checkpoints import Model, find_device, load
from regteach.correspondences import Keypoints, Table, correspondences, in_working_frame, inside, takes_no_points
from regteach.data.volumes import Volume, save_displacement, save_volume
from regteach.framing import Source, as_volume, span
from regteach.grid import Grid
from regteach.nets.keypoint_field import KeypointTransform
from regteach.nets.keypoint_kernel import KeypointKernel
from regteach.refinement import Refinement, refine
from regteach.sampling import warp
from regteach.training import write_whole
from regteach.transforms import Compose, Dense, Identity, Transform, displacement, jacobian_determinant

Points = TypeVar("Points", np.ndarray, Tensor)

SMALLEST = 8  # voxels along each axis
SLAB = 2**21  # voxels that are warped at a time: a whole head at 1 mm would need GB
EXACT = 2**24  # whole numbers up to here are exact in float32
REPORT, WARPED, FIELD, LABELS = "report.json", "warped.nii.gz", "displacement.nii.gz", "warped_labels.nii.gz"
OUTPUTS = (REPORT, WARPED, FIELD, LABELS)
WARNING = "For research and teaching, not for clinical use."


@dataclass(frozen=True, eq=False)
class Registration:
    """A registered pair.

    Args:
        mapping: fixed points to moving points, ``b n d``, world mm; a function of all of space.
        fixed, moving: the images as they were read.
        report: similarity before and after, folding, SDlogJ, seconds, the curve of the refinement, and more.
        keypoints: of a model with a kernel: what :meth:`add_points` needs.
    """

    mapping: Transform
    fixed: Volume
    moving: Volume
    report: dict[str, Any]
    keypoints: Keypoints | None = None

    def __repr__(self) -> str:
        similar = self.report.get("similarity", {})
        told = [
            f"fixed {span(self.fixed.grid.shape)}, moving {span(self.moving.grid.shape)} voxels",
            f"correlation {similar.get('before')} -> {similar.get('after')}",
            f"{self.report.get('folding_percent')} % folded",
            *(["see report['notes']"] if self.report.get("notes") else []),
        ]
        return f"<Registration by {self.report.get('model')}: {'; '.join(told)}>"

    def transform(self, points: Points) -> Points:
        """Fixed points to moving points.

        Args:
            points: ``n d``, world mm, inside the fixed image; a NumPy array or a tensor.

        Returns:
            The same kind, ``n d``, world mm, float32.

        Raises:
            ValueError: if the points have another dimension, are not finite, or lie outside of the fixed image.
        """
        given = inside(points, self.fixed.grid, "points", "the fixed image")
        moved = self.mapping(given.float()[None])[0] if len(given) else given.float()
        return moved.to(points.device) if isinstance(points, Tensor) else moved.numpy()

    def warp(self, source: Source | None = None, order: int = 1) -> Volume:
        """The moving image, or anything on its grid, on the fixed grid.

        Outside of the moving image nothing was measured: there an image has its smallest value, and labels are 0.

        Args:
            source: what to warp, the moving image where left out.
            order: 1 linear, 0 nearest voxel, for labels.

        Raises:
            ValueError: if it is not on the moving image's grid.
        """
        return self._warped(((slab, self.mapping) for slab in _slabs(self.fixed.grid)), source, order)

    def displacement(self) -> Float[np.ndarray, "*grid d"]:
        """Moving minus fixed position at every voxel of the fixed grid, world mm."""
        return torch.cat([displacement(self.mapping, slab)[0] for slab in _slabs(self.fixed.grid)]).numpy()

    def add_points(self, fixed_mm: Table, moving_mm: Table) -> "Registration":
        """The same with more correspondences: the field is computed again only where they are heard.

        Args:
            fixed_mm: ``n d``, in the fixed image, world mm.
            moving_mm: ``n d``, the same places in the moving image.

        Returns:
            A new registration; this one stays as it is: to correct a point, add it anew to the registration before. Its
            report has no feature loss, which is of the network's answer.

        Raises:
            ValueError: if the model takes no points, the points do not fit the images, or one of them was given another
                place before.
        """
        begun = time.perf_counter()
        known = self.keypoints
        if known is None:
            raise ValueError(takes_no_points(f"What {self.report.get('model', 'this model')} found"))
        known = known.added(self.fixed, self.moving, (fixed_mm, moving_mm))
        mapping = Compose((known.transform, known.start))
        similar = self.report["similarity"] | {"after": _number(similarity.ncc(known.read(mapping), known.fixed))}
        report = {key: value for key, value in self.report.items() if key != "feature_loss"}
        report |= {"similarity": similar} | _regularity(known.det)
        report |= {"given_points": known.count, "points_added_in_seconds": round(time.perf_counter() - begun, 3)}
        return replace(self, mapping=_moved(mapping, torch.device("cpu")), report=report, keypoints=known)

    def save(self, folder: str | PathLike[str], labels: Source | None = None) -> Path:
        """Write ``warped.nii.gz``, ``displacement.nii.gz`` (ITK and ANTs read it) and ``report.json``, each whole.

        The report comes last: where it is, the others are complete.

        Args:
            folder: made where it is not there.
            labels: a label map on the moving image's grid, warped to ``warped_labels.nii.gz`` as well.

        Raises:
            ValueError: if the labels do not fit, or the folder can not be written.
        """
        folder, grid = writable(folder), self.fixed.grid
        field = torch.from_numpy(self.displacement())
        # Worked out once for all files; on its own voxels a field needs no interpolation.
        slabs = list(_slabs(grid))
        parts = field.split([slab.shape[0] for slab in slabs])
        known = [(slab, Dense(part[None], slab)) for slab, part in zip(slabs, parts, strict=True)]
        volumes = {WARPED: self._warped(known, None, 1)}
        if labels is not None:
            volumes[LABELS] = self._warped(known, labels, 0)
        text = json.dumps(self.report, indent=1, allow_nan=False) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in (REPORT, LABELS):
                (folder / old).unlink(missing_ok=True)
            for name, volume in volumes.items():
                save_volume(folder / name, volume)
            save_displacement(folder / FIELD, field, grid)
            write_whole(folder / REPORT, lambda path: path.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"The folder {folder} can not be written ({error.strerror or error}).") from None
        return folder

    def _warped(self, parts: Iterable[tuple[Grid, Transform]], source: Source | None, order: int) -> Volume:
        """Slab by slab: the grid of a part of the fixed image, and the transform there."""
        volume = self.moving if source is None else as_volume(source, "the image to warp", labels=order == 0)
        grid = self.moving.grid
        if not _same(volume.grid, grid):
            raise ValueError(
                f"What is warped must be on the moving image's grid: {_described(grid)}, not {_described(volume.grid)}."
            )

        def read(image: Tensor) -> Tensor:
            return torch.cat([warp(image, there, grid, slab, order, "zeros")[0, 0] for slab, there in parts])

        on_fixed = partial(Volume, grid=self.fixed.grid, across=self.fixed.across)
        if order == 0 and not volume.data.is_floating_point():
            data = volume.batch
            if int(data.abs().max()) <= EXACT:
                return on_fixed(read(data.float()).round().to(data.dtype))
            # float32 would round them: their places in a table are warped instead, from 1 on, and 0 is outside.
            values, places = data.unique(return_inverse=True)
            table = torch.cat([values.new_zeros(1), values])
            return on_fixed(table[read(places.float() + 1).round().long()])
        low = volume.data.min()
        return on_fixed(read(volume.batch.float() - low) + low)


@torch.inference_mode(False)  # a refinement needs slopes, wherever it is called from
def register(
    moving: Source,
    fixed: Source,
    model: Model | str | PathLike[str],
    refine: int | Refinement | None = 0,
    device: torch.device | str = "auto",
    points: tuple[Table, Table] | None = None,
) -> Registration:
    """Register two images; labels are never needed.

    Args:
        moving, fixed: paths of NIfTI files, images of nibabel, volumes, or pairs (array, Grid); they may differ in size
            and spacing. Their world coordinates hold, unless they lie far apart: then the middles are aligned first,
            and the report says so. A model for two contrasts takes the first as moving and the second as fixed image:
            the report's notes name them, and say so if the images look exchanged.
        model: a loaded model, its name, or the path of its file.
        refine: test-time refinement: None as the model recommends it; a number of steps, else as recommended (of a
            greedy search, of the last and finest steps; 0 is none at all); or settings of your own.
        device: "auto" takes a GPU where there is one.
        points: correspondences that you know, for models of keypoints: positions in the fixed and in the moving image,
            ``n d`` each, world mm. The result goes through them, or nearly so.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if an image can not be used, the images or the model are of different dimensions, the model is
            unknown, the points do not fit the images, the model or the refinement, there is no such device, or a number
            of steps is negative.
    """
    begun = time.perf_counter()
    on = find_device(device)
    model = model if isinstance(model, Model) else load(model)
    if {weight.device for weight in model.network.parameters()} - {on} or isinstance(model.network, KeypointKernel):
        # A copy: the caller's stays where it is, and what goes on using a kernel has one that nobody else changes.
        model = replace(model, network=copy.deepcopy(model.network).to(on))
    own = model.refinement
    settings = own if refine is None else refine if isinstance(refine, Refinement) else _so_many(own, refine)
    pair = {"moving": as_volume(moving, "the moving image"), "fixed": as_volume(fixed, "the fixed image")}
    _check(pair, model)
    if points is not None and not isinstance(model.network, KeypointKernel):
        raise ValueError(takes_no_points(model.name))
    given = None if points is None else correspondences(points, pair["fixed"], pair["moving"])

    frames = {name: framing.framed(volume) for name, volume in pair.items()}
    grid = framing.working_grid(model.grid, frames["fixed"])
    start, far_mm = framing.start(frames["moving"], frames["fixed"], grid)
    readers = {
        "moving": _reader("moving", frames["moving"], grid, start, on),
        "fixed": _reader("fixed", frames["fixed"], grid, Identity(grid.dim), on),
    }
    here = Identity(grid.dim)
    outside = {name: framing.outside(frames[name], grid, start if name == "moving" else here) for name in frames}
    start = _moved(start, on)
    images = {"moving": readers["moving"](start), "fixed": readers["fixed"](Identity(grid.dim))}
    where = None if given is None else in_working_frame(given, grid, start, on)
    result, curve, taken = _found(model, [images["moving"], images["fixed"]], grid, settings, where)

    mapping = Compose((result.transform, start))
    compare = objectives.at_test_time(model.network, settings.window_vox, settings.pyramid)
    still, moved = (_number(compare(result.features, t, grid)) for t in (Identity(grid.dim), result.transform))
    after = readers["moving"](mapping)
    det = jacobian_determinant(result.transform, grid).detach()
    report = {
        "model": model.name,
        "similarity": {
            "measure": "normalised cross-correlation of the images on the working grid, before: at the start",
            "before": _number(similarity.ncc(images["moving"], images["fixed"])),
            "after": _number(similarity.ncc(after, images["fixed"])),
        },
        "feature_loss": {
            "measure": "what refinement makes small, of the features as they are, everywhere; before: at the start",
            "before": still,
            "after": moved,
        },
        **_regularity(det),
        "refinement_steps": taken,
        "refinement_mode": settings.mode if settings.steps else None,
        "curve": curve,
        "start": f"middles aligned ({far_mm:.1f} mm apart)" if isinstance(start, Affine) else "world coordinates",
        "working_grid": {"shape": grid.shape, "spacing_mm": grid.spacing, "origin_mm": grid.origin},
        "notes": [note for volume in pair.values() for note in volume.notes]
        + remarks.on_the_rest(outside, grid.extent)
        + remarks.on_contrasts(model, images["moving"], images["fixed"])
        + remarks.on_doubts(images["moving"], images["fixed"], still, moved),
        "device": str(on),
        "seconds": round(time.perf_counter() - begun, 3),
        "use": WARNING,
    }
    keypoints = None
    last = result.up_to(1)
    if isinstance(last, KeypointTransform):
        none = torch.zeros(0, grid.dim, dtype=torch.float64)
        told = (none, none) if given is None else given
        report |= {"given_points": len(told[0])} if given is not None else {}
        dense = displacement(result.transform, grid).detach()
        keypoints = Keypoints(last.pairs()[0], dense, det, grid, start, images["fixed"], readers["moving"], told)
    return Registration(_moved(mapping, torch.device("cpu")), pair["fixed"], pair["moving"], report, keypoints)


def writable(folder: str | PathLike[str]) -> Path:
    """The folder as a path, if files can be written into it, or if it can be made.

    Raises:
        ValueError: if not.
    """
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"The folder {folder} can not be written: {there} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"The folder {folder} can not be written: {there} is not yours to write to.")
    return folder


def _so_many(recommended: Refinement, steps: Any) -> Refinement:
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral):
        raise ValueError(f"refine is None, a whole number of steps, or a Refinement, not {steps!r}.")
    return replace(recommended, steps=int(steps))


def _check(pair: dict[str, Volume], model: Model) -> None:
    planes = [volume.across[0] for volume in pair.values() if volume.across]
    if len(set(planes)) > 1:
        raise ValueError(
            f"The moving image is a slice across the {'xyz'[planes[0]]} axis, and the fixed image one across the "
            f"{'xyz'[planes[1]]} axis: they show different planes."
        )
    for name, volume in pair.items():
        if volume.grid.dim != model.grid.dim:
            raise ValueError(
                f"The {name} image is {volume.grid.dim}D, but {model.name} registers {model.grid.dim}D images."
            )
        if min(volume.grid.shape) < SMALLEST:
            raise ValueError(
                f"The {name} image has {volume.grid.shape} voxels; {SMALLEST} along each axis are the least."
            )
        if volume.data.min() == volume.data.max():
            raise ValueError(f"The {name} image is constant: every voxel is {float(volume.data.min()):g}.")


def _reader(name: str, image: framing.Framed, grid: Grid, begin: Transform, device: torch.device) -> framing.Reader:
    try:
        return framing.Reader(image, grid, begin, device)
    except ValueError:
        raise ValueError(
            f"The {name} image shows nothing within the {span(grid.extent)} mm that the network looks at."
        ) from None


def _regularity(det: Float[Tensor, "1 *grid"]) -> dict[str, Any]:
    """How smooth a transform is, for the report."""
    return {
        "folding_percent": _number(metrics.folding_percent(det)),
        "sdlogj": _number(metrics.sdlogj(det)),
        "folding_measured_on": "the working grid",
    }


def _slabs(grid: Grid) -> Iterator[Grid]:
    """The grid in parts along its first axis, each of about SLAB voxels."""
    thick = max(1, SLAB * grid.shape[0] // grid.size)
    for first in range(0, grid.shape[0], thick):
        stop = (min(first + thick, grid.shape[0]), *grid.shape[1:])
        yield grid.cropped((first, *[0] * (grid.dim - 1)), stop)


def _same(a: Grid, b: Grid) -> bool:
    """Whether no voxel of one lies more than a hundredth of a voxel from that of the other."""
    ends = zip((*a.origin, *a.last), (*b.origin, *b.last), b.spacing * 2, strict=True) if a.shape == b.shape else ()
    return a.shape == b.shape and all(abs(x - y) <= 0.01 * h for x, y, h in ends)


def _described(grid: Grid) -> str:
    return f"{span(grid.shape)} voxels of {span(grid.spacing)} mm from {span(grid.origin)} mm"


def _found(
    model: Model, images: list[Tensor], grid: Grid, settings: Refinement, points: tuple[Tensor, Tensor] | None
) -> tuple[Any, list[float | None], int]:
    """The result, the curve of its refinement, and how many steps that took."""
    with torch.no_grad():
        result = model.network(*images, grid, **({} if points is None else {"points": points}))
    if settings.steps == 0:
        return result, [], 0
    if points is not None and settings.mode != "parameters":
        raise ValueError(
            f"Refinement in mode {settings.mode!r} would forget the points that are given: use 'parameters'."
        )
    refined = refine(model.network, result, grid, settings)
    found = refined.result
    if isinstance(found.transform, KeypointTransform):  # dense once, not whenever it is asked
        with torch.no_grad():
            found = replace(found, transform=Dense(displacement(found.transform, grid), grid))
    return found, [_number(value) for value in refined.curve[:, 0]], int(refined.stopped[0])


def _moved(transform: Any, device: torch.device) -> Any:
    """The same transform with all its tensors on a device, and without a gradient."""
    if isinstance(transform, Tensor):
        return transform.detach().to(device)
    if isinstance(transform, tuple):
        return tuple(_moved(part, device) for part in transform)
    if isinstance(transform, Transform):
        return type(transform)(**{name: _moved(value, device) for name, value in vars(transform).items()})
    return transform


def _number(value: Tensor) -> float | None:
    """A number that JSON has, too; None for one that could not be measured."""
    number = float(value.detach().reshape(-1)[0])
    return round(number, 6) if math.isfinite(number) else None
