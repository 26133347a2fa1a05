"""NIfTI files as tensors on a grid in millimetres, and back.

Convention: :attr:`Volume.data` is ``*grid``, without batch and channel axes (:attr:`Volume.batch` has them), in the
order of nibabel's canonical RAS axes, never transposed: axis 0 to the right, axis 1 to the front, axis 2 up. World
coordinates are the file's RAS millimetres, whatever unit its header names. Axes that a file stores in another order or
direction are brought into it by flips and swaps, which change no value. A grid is parallel to the axes, so a volume
that is not (oblique or sheared) is resampled onto one that covers it; ``notes`` and a warning say so. Two axes, or a
third of length one, are a 2D image.

Displacement fields are saved as ITK and ANTs read them: five axes ``x y z 1 d``, intent code 1007 (vector), LPS
components in millimetres: the first two components change their sign, as LPS runs to the left and to the back.

Sources: nibabel's documentation, "Neuroimaging in Python: coordinate systems and affines"; ITK, itkNiftiImageIO.
"""

import os
import uuid
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from jaxtyping import Float
from nibabel.filebasedimages import FileBasedImage, ImageFileError
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from torch import Tensor

import data_download
from regteach.grid import Grid
from regteach.names import first_line
from regteach.sampling import sample

ALIGNED_VOX = 0.01  # a grid that strays less than this from the axes, anywhere, counts as parallel to them
SINGULAR = 1e-6  # |det| of the axis directions below this is no basis of space
VECTOR_INTENT = 1007
MM = {"meter": 1000.0, "micron": 0.001}  # in one of the header's units; where it names none, millimetres are meant
SUFFIXES = (".nii", ".nii.gz")
RAS_TO_LPS = (-1.0, -1.0, 1.0)


@dataclass(frozen=True, eq=False)
class Volume:
    """An image or a label map on a grid.

    Args:
        source: the voxels, ``*grid``, or a function that reads them when they are first asked for.
        grid: where they are, RAS mm.
        notes: what was done to the file's own voxels, and what it did not say, in sentences.
        across: of a slice of a body: the axis that it lies across (2 for an axial one), and where along it, mm.
    """

    source: Tensor | Callable[[], Tensor] = field(repr=False)
    grid: Grid
    notes: tuple[str, ...] = ()
    across: tuple[int, float] | None = None

    @cached_property
    def data(self) -> Float[Tensor, "*grid"]:
        """The voxels: float32 for an image, int64 for labels. Read, and checked, at the first use.

        Raises:
            ValueError: if the file is truncated, or its content can not be used.
        """
        data = self.source if isinstance(self.source, Tensor) else self.source()
        if tuple(data.shape) != self.grid.shape:
            raise ValueError(f"The voxels have the shape {tuple(data.shape)}, but the grid has {self.grid.shape}.")
        return data

    @property
    def batch(self) -> Float[Tensor, "1 1 *grid"]:
        """The voxels with a batch and a channel axis in front."""
        return self.data[None, None]


def read_volume(source: str | os.PathLike[str] | nib.Nifti1Image, labels: bool = False) -> Volume:
    """Read a NIfTI image.

    The header is checked now, the voxels when they are first used.

    Args:
        source: path of a ``.nii`` or ``.nii.gz``, or an image of nibabel.
        labels: a label map: whole numbers, of which one value alone is allowed, and nearest-voxel resampling.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no NIfTI, empty, 4D, in colour or has a singular affine; and, when the voxels are read, if
            they are truncated, constant, not finite or (labels) not whole.
    """
    image, name = _open(source)
    stored_shape, affine = _spatial_shape(image, name), _affine(image, name)
    orientation = io_orientation(affine)
    affine = affine @ inv_ornt_aff(orientation, stored_shape)
    shape = tuple(stored_shape[axis] for axis in np.argsort(orientation[:, 0]))
    notes = []
    if "sform_code" in image.header and not (image.header["sform_code"] or image.header["qform_code"]):
        notes.append(f"{name}: the header gives no position (sform and qform codes are 0); nibabel's default is used.")
    keep, across = _axes(shape, name), None
    if len(keep) == 2:
        affine, notes, across = _flatten(affine, shape, keep, notes, name)

    def load() -> Tensor:
        try:
            stored = np.asarray(image.dataobj).reshape(stored_shape)
        except (EOFError, OSError, ValueError, zlib.error) as error:
            raise ValueError(f"{name} is truncated or damaged ({first_line(error)}).") from None
        array = apply_orientation(stored, orientation)
        return _checked(np.squeeze(array, axis=tuple(set(range(3)) - set(keep))), name, labels)

    inner = tuple(shape[axis] for axis in keep)
    if _is_aligned(affine, inner):
        return Volume(
            load, Grid(inner, _rounded(np.diag(affine)[:-1]), _rounded(affine[:-1, -1])), tuple(notes), across
        )
    grid = _covering_grid(affine, inner)
    note = f"{name}: the image is oblique or sheared; it was resampled onto {grid.shape} voxels along the RAS axes."
    warnings.warn(note, stacklevel=2)
    return Volume(lambda: _resampled(load(), affine, grid, labels), grid, (*notes, note), across)


def load_mni(kind: str = "t1") -> Volume:
    """The MNI152 template: an average brain, 1 mm, 197 x 233 x 189.

    Args:
        kind: ``"t1"``, or the maps ``"grey_matter"`` and ``"white_matter"``.

    Raises:
        FileNotFoundError: if it has not been fetched; the message has the command.
        ValueError: if there is no such kind.
    """
    kinds = ("t1", "grey_matter", "white_matter")
    if kind not in kinds:
        raise ValueError(f"The MNI152 template has {', '.join(kinds)}, not {kind!r}.")
    return read_volume(data_download.locate("mni152", f"{kind}.nii.gz"))


def save_volume(path: str | os.PathLike[str], volume: Volume) -> Path:
    """Write a volume as NIfTI; the file appears whole or not at all.

    A 2D volume becomes one slice: where it lay in a body, if that is known, else at z = 0. Images are float32, labels
    the smallest integers that hold them.

    Args:
        path: ends in ``.nii`` or ``.nii.gz``; its folder exists.
        volume: what to write, on any device.

    Returns:
        The path.

    Raises:
        ValueError: if the path does not end so, or the voxels do not fit the grid.
    """
    array = volume.data.detach().cpu().numpy()
    smallest = np.result_type(np.uint8, *map(np.min_scalar_type, (array.min(), array.max())))
    array = array.astype(smallest if array.dtype.kind in "biu" else np.float32)
    across = volume.across if volume.grid.dim == 2 and volume.across else (2, 0.0)
    array = array if array.ndim == 3 else np.expand_dims(array, across[0])
    return _write(path, nib.Nifti1Image(array, None, dtype=array.dtype), volume.grid, across)


def save_displacement(path: str | os.PathLike[str], displacement: Float[Tensor, "*grid d"], grid: Grid) -> Path:
    """Write a displacement field for ITK and ANTs; the file appears whole or not at all.

    A field in a plane has two components and, as ITK's have, no place along the third axis.

    Args:
        path: ends in ``.nii`` or ``.nii.gz``; its folder exists.
        displacement: fixed to moving, RAS mm, at each voxel of the fixed grid.
        grid: the fixed grid.

    Returns:
        The path.

    Raises:
        ValueError: if the path does not end so, or the field does not fit the grid or is not finite.
    """
    if tuple(displacement.shape) != (*grid.shape, grid.dim):
        raise ValueError(
            f"A displacement on this grid has the shape {(*grid.shape, grid.dim)}, not {tuple(displacement.shape)}."
        )
    field_ras = displacement.detach().cpu().numpy().astype(np.float32)
    if not np.isfinite(field_ras).all():
        raise ValueError("The displacement holds values that are not finite (NaN or infinity).")
    field_lps = field_ras * np.asarray(RAS_TO_LPS[: grid.dim], dtype=np.float32)
    image = nib.Nifti1Image(field_lps.reshape(*(*grid.shape, 1)[:3], 1, grid.dim), None)
    image.header.set_intent(VECTOR_INTENT)
    return _write(path, image, grid)


def _open(source: Any) -> tuple[nib.Nifti1Pair, str]:
    """The image and the name to call it by; nothing but the header is read."""
    if isinstance(source, FileBasedImage):
        image, name = source, str(source.get_filename() or "the image")
    else:
        path, name = Path(source), str(source)
        if not path.exists():
            raise FileNotFoundError(f"There is no file {path}.")
        if path.is_dir():
            raise ValueError(f"{name} is a folder, not a NIfTI file.")
        if path.stat().st_size == 0:
            raise ValueError(f"{name} is empty (0 bytes).")
        try:
            image = nib.load(path)
        except EOFError:
            raise ValueError(f"{name} is truncated: it ends inside its header.") from None
        except (ImageFileError, nib.spatialimages.HeaderDataError, OSError, ValueError, zlib.error) as error:
            raise ValueError(f"{name} is not a NIfTI file ({first_line(error)}).") from None
    if not isinstance(image, nib.Nifti1Pair):  # Nifti1Image and Nifti2Image are kinds of it
        raise ValueError(f"{name} is not a NIfTI file (nibabel reads it as {type(image).__name__}).")
    return image, name


def _spatial_shape(image: nib.Nifti1Pair, name: str) -> tuple[int, ...]:
    """Three lengths; a missing third axis has length one, and so have axes after it."""
    shape = tuple(int(n) for n in image.shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"{name} is empty: its shape is {shape}.")
    if max(shape[3:], default=1) > 1:
        raise ValueError(f"{name} is {len(shape)}D {shape}, but an image has 2 or 3 axes: pick one of its volumes.")
    if len(shape) < 2:
        raise ValueError(f"{name} has one axis, but an image has 2 or 3 axes.")
    if image.get_data_dtype().kind not in "iufb":
        raise ValueError(f"{name} holds {image.get_data_dtype()}, but an image holds one real number a voxel.")
    return (*shape, 1)[:3]


def _affine(image: nib.Nifti1Pair, name: str) -> np.ndarray:
    """Voxel to RAS mm, 4 x 4."""
    given = image.header.get_best_affine() if image.affine is None else image.affine
    affine = np.array(given, dtype=np.float64)
    affine[:3] *= MM.get(image.header.get_xyzt_units()[0], 1.0)
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if len(image.shape) == 2 and lengths[2] == 0 and lengths[:2].all():
        axes[:, 2] = np.cross(axes[:, 0], axes[:, 1]) / (lengths[0] * lengths[1])  # a slice needs no third axis
        lengths[2] = np.linalg.norm(axes[:, 2])
    if not np.isfinite(affine).all() or (lengths == 0).any() or abs(np.linalg.det(axes / lengths)) < SINGULAR:
        raise ValueError(f"{name} has a singular affine: its voxels do not span space.")
    return affine


def _axes(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """The axes that stay: all three, or the two that are longer than one voxel."""
    thin = [axis for axis in range(3) if shape[axis] == 1]
    if len(thin) > 1:
        raise ValueError(f"{name} is one voxel wide along {len(thin)} axes {shape}: it is a line, not an image.")
    return tuple(axis for axis in range(3) if axis not in thin)


def _flatten(
    affine: np.ndarray, shape: tuple[int, ...], keep: tuple[int, ...], notes: list[str], name: str
) -> tuple[np.ndarray, list[str], tuple[int, float] | None]:
    """The 3 x 3 affine of a slice in its plane, and where that lies. A slice that is tilted keeps its own two axes."""
    out = ({0, 1, 2} - set(keep)).pop()
    last = np.array([shape[axis] - 1 for axis in keep])
    lengths = np.linalg.norm(affine[:3, list(keep)], axis=0)
    tilt = np.abs(affine[out, list(keep)]) * last
    flat = np.eye(3)
    flat[:2, :2] = affine[np.ix_(keep, keep)]
    flat[:2, 2] = affine[list(keep), 3]
    across = (out, _rounded(affine[out : out + 1, 3])[0])
    if keep != (0, 1):
        notes = [
            *notes,
            f"{name}: a slice across the {'xyz'[out]} axis; its 2D axes are {' and '.join('xyz'[a] for a in keep)}.",
        ]
    if tilt.max() > ALIGNED_VOX * lengths.min():
        flat[:2, :2] = np.diag(lengths)
        notes = [*notes, f"{name}: the slice is tilted in space; its own two axes are used, and the tilt is dropped."]
        warnings.warn(notes[-1], stacklevel=3)
        return flat, notes, None
    return flat, notes, across


def _is_aligned(affine: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether no voxel strays by more than ALIGNED_VOX voxels from a grid parallel to the axes."""
    axes = affine[:-1, :-1]
    stray = np.abs(axes - np.diag(np.diag(axes))) @ (np.asarray(shape) - 1.0)
    return bool((stray <= ALIGNED_VOX * np.diag(axes)).all())


def _covering_grid(affine: np.ndarray, shape: tuple[int, ...]) -> Grid:
    """The grid along the axes that holds every voxel centre, with the spacing of the image's own axes."""
    spacing = np.linalg.norm(affine[:-1, :-1], axis=0)
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij"), -1).reshape(-1, len(shape))
    corners_mm = corners @ affine[:-1, :-1].T + affine[:-1, -1]
    low, high = corners_mm.min(0), corners_mm.max(0)
    count = np.ceil((high - low) / spacing - 1e-6).astype(int) + 1
    return Grid(tuple(count.tolist()), _rounded(spacing), _rounded(low))


def _resampled(data: Tensor, affine: np.ndarray, grid: Grid, labels: bool) -> Tensor:
    """Read an image, whose voxels sit at ``affine``, on a grid along the axes; outside is its smallest value.

    It is sampled in its own voxel indices (a grid of unit spacing), slab by slab to save memory.
    """
    indices = Grid(tuple(data.shape))
    outside = 0 if labels else data.min()
    image = (data - outside).float()[None, None]
    inverse = torch.from_numpy(np.linalg.inv(affine))
    axes = [
        o + h * torch.arange(n, dtype=torch.float64)
        for n, h, o in zip(grid.shape, grid.spacing, grid.origin, strict=True)
    ]
    slabs = []
    for first in axes[0]:
        points_mm = torch.stack(torch.meshgrid(first[None], *axes[1:], indexing="ij"), -1)
        points_vox = points_mm @ inverse[:-1, :-1].T + inverse[:-1, -1]
        slabs.append(sample(image, points_vox.float()[None], indices, order=0 if labels else 1, padding="zeros")[0, 0])
    return torch.cat(slabs).to(data.dtype) + outside


def _checked(array: np.ndarray, name: str, labels: bool) -> Tensor:
    """The voxels as a tensor, if they can be used."""
    if labels:
        whole = np.round(array)
        if not np.isfinite(array).all() or (whole != array).any():
            raise ValueError(f"{name} is no label map: its values are not whole numbers.")
        return torch.from_numpy(np.ascontiguousarray(whole, dtype=np.int64))
    values = np.ascontiguousarray(array, dtype=np.float32)
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise ValueError(f"{name} has {wrong:,} voxels that are not finite (NaN or infinity).")
    if values.min() == values.max():
        raise ValueError(f"{name} is constant: every voxel is {values.flat[0]:g}.")
    return torch.from_numpy(values)


def _write(
    path: str | os.PathLike[str], image: nib.Nifti1Image, grid: Grid, across: tuple[int, float] = (2, 0.0)
) -> Path:
    """Give the image the grid's affine, write it beside its place, and move it there when it is on the disk."""
    target = Path(path)
    suffix = next((s for s in reversed(SUFFIXES) if target.name.endswith(s)), None)
    if suffix is None:
        raise ValueError(f"A NIfTI file ends in .nii or .nii.gz, not as {target.name!r}.")
    if not target.parent.is_dir():
        raise ValueError(f"The folder {target.parent} does not exist.")
    affine = np.eye(4)
    affine[across[0], 3] = across[1]
    axes = [axis for axis in range(3) if grid.dim == 3 or axis != across[0]]
    affine[axes, axes] = grid.spacing
    affine[axes, 3] = grid.origin
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units(xyz="mm")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}{suffix}")
    try:
        nib.save(image, temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    """Lengths to a millionth of a mm: headers are float32, and 0.7 should not read 0.699999988."""
    return tuple(float(round(value, 6)) for value in values)
