"""Real B-scans of the retina: a picture, and the layers' boundaries as a table.

The layout, which most segmentation tools can export to:

- the picture: a grey PNG or TIFF of 8 or 16 bits, or a 2D array in a ``.npy`` file; rows run down (depth), columns
  across;
- the table: ``.csv`` without a header, values separated by commas; one row a boundary, from the top down; one column a
  column of the picture; a value is the depth of the boundary in rows of the picture, where 0 is the middle of the
  first row; an empty field or ``nan`` where the boundary is not known. Between known boundaries lie the layers 1, 2 ...

For a cohort the two lie in one folder and share their name, ``EYE_VISIT.png`` and ``EYE_VISIT.csv``: what stands before
the last underscore is the eye. No file says how large a pixel is: whoever reads it has to.

Convention: axis 0 is depth, downwards, axis 1 lateral, mm; the first pixel is at (0, 0).
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from regteach.data.cohort import Cohort, one_hot, split_by_person
from regteach.data.intensity import normalised
from regteach.data.layers import layer_labels
from regteach.grid import Grid
from regteach.names import first_line

PICTURES = (".png", ".tif", ".tiff", ".npy")


@dataclass(frozen=True, eq=False)
class BScan:
    """One B-scan.

    Args:
        image: ``1 1 *grid``, in [0, 1].
        grid: of its pixels.
        boundaries: depth of each boundary in each column, mm, nan where not known; none where there is no table.
    """

    image: Float[Tensor, "1 1 *grid"]
    grid: Grid
    boundaries: Float[Tensor, "k w"] | None = None

    @property
    def labels(self) -> Int[Tensor, "*grid"]:
        """The layer of each pixel, counted from 1; 0 elsewhere.

        Raises:
            ValueError: if the boundaries are not known.
        """
        if self.boundaries is None:
            raise ValueError("This B-scan was read without a table of boundaries, so its layers are not known.")
        return layer_labels(self.boundaries, self.grid)


def read_bscan(picture: str | Path, spacing_mm: Sequence[float], table: str | Path | None = None) -> BScan:
    """Read a B-scan, and the boundaries of its layers.

    Args:
        picture: ``.png``, ``.tif``, ``.tiff`` or ``.npy``.
        spacing_mm: distance of rows (depth) and of columns, for example (0.0039, 0.0117).
        table: ``.csv`` of the boundaries, see the module.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file is not what it should be, or the two do not fit each other.
    """
    path = Path(picture)
    values = _picture(path)
    if len(spacing_mm) != 2:
        raise ValueError(f"A B-scan has two distances, of its rows and of its columns, mm, not {tuple(spacing_mm)}.")
    grid = Grid(values.shape, tuple(spacing_mm))
    try:
        image = normalised(torch.from_numpy(values)[None, None])
    except ValueError as error:
        raise ValueError(f"{path.name} can not be used: {str(error)[0].lower()}{str(error)[1:]}") from None
    return BScan(image, grid, None if table is None else _table(Path(table), grid))


def load_bscans(
    folder: str | Path,
    spacing_mm: Sequence[float],
    structures: Mapping[int, str] | None = None,
    split_seed: int = 0,
    parts: Mapping[str, int] | None = None,
) -> Cohort:
    """All B-scans of a folder that have a table of boundaries: pairs are two visits of one eye, both ways round.

    Args:
        folder: with ``EYE_VISIT.png`` (or another picture) and ``EYE_VISIT.csv``.
        spacing_mm: of all of them.
        structures: layer -> name, from 1; "layer 1" and so on where left out.
        split_seed: of the split, which is by eye.
        parts: eyes a split, as in :func:`cohort.split_by_person`; a fifth each to validate and to test where left out.

    Raises:
        FileNotFoundError: if there is no such folder, nothing in it, or a picture or a table alone.
        ValueError: if a file is not what it should be, or the B-scans differ in size or in their number of boundaries.
    """
    files = _pairs(Path(folder))
    scans = {name: read_bscan(picture, spacing_mm, table) for name, (picture, table) in files.items()}
    first_name, first = next(iter(scans.items()))
    assert first.boundaries is not None
    for name, scan in scans.items():
        assert scan.boundaries is not None
        if scan.grid != first.grid or len(scan.boundaries) != len(first.boundaries):
            raise ValueError(
                f"{name} has {scan.grid.shape} pixels and {len(scan.boundaries)} boundaries, but {first_name} has"
                f" {first.grid.shape} and {len(first.boundaries)}."
            )
    names = structures or {k: f"layer {k}" for k in range(1, len(first.boundaries))}
    if list(names) != list(range(1, len(first.boundaries))):
        raise ValueError(
            f"{len(first.boundaries)} boundaries make {len(first.boundaries) - 1} layers, not {dict(names)}."
        )
    eyes = tuple(name.rsplit("_", 1)[0] for name in scans)
    count = len(set(eyes))
    held = max(1, count // 5) if count > 2 else 0
    splits = split_by_person(eyes, parts or {"train": -1, "validation": held, "test": held}, split_seed)
    labels = torch.stack([scan.labels for scan in scans.values()])
    return Cohort(
        name="bscans",
        images=torch.cat([scan.image for scan in scans.values()]),
        soi=one_hot(labels, names),
        labels=labels,
        grid=first.grid,
        people=eyes,
        structures=names,
        splits=splits,
        origin=f"Real B-scans of {count} eyes, read from the folder {Path(folder).name}.",
        given_pairs={
            split: tuple((m, f) for m, f in permutations(members, 2) if eyes[m] == eyes[f])
            for split, members in splits.items()
        },
    )


def _picture(path: Path) -> np.ndarray:
    """The picture as float32, rows and columns."""
    from matplotlib.image import imread  # slow to import, and needed for these files only

    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"{path.name} is no picture that can be read: it has to end in {', '.join(PICTURES)}.")
    try:
        pixels = np.load(path, allow_pickle=False) if path.suffix.lower() == ".npy" else np.asarray(imread(path))
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"{path.name} is not a whole picture ({first_line(error)}).") from None
    if pixels.ndim == 3 and pixels.shape[2] in (3, 4) and (pixels[..., :3] == pixels[..., :1]).all():
        pixels = pixels[..., 0]  # grey, saved as colour
    if pixels.ndim != 2 or min(pixels.shape) < 2 or pixels.dtype.kind not in "uif":
        raise ValueError(f"{path.name} is not a grey picture: it holds {pixels.dtype} of the shape {pixels.shape}.")
    return pixels.astype(np.float32)


def _table(path: Path, grid: Grid) -> Float[Tensor, "k w"]:
    """The boundaries, from rows of the picture to mm."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark before it
            rows = [[float(field) if field.strip() else np.nan for field in row] for row in csv.reader(file) if row]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path.name} is no table of numbers ({first_line(error)}).") from None
    if len(rows) < 2 or {len(row) for row in rows} != {grid.shape[1]}:
        widths = " or ".join(map(str, sorted({len(row) for row in rows}))) or "no"
        raise ValueError(
            f"{path.name} has {len(rows)} rows of {widths} values, but at least two boundaries of"
            f" {grid.shape[1]} columns are wanted."
        )
    depths = np.array(rows)
    crossed = np.argwhere(depths < np.fmax.accumulate(depths, axis=0))
    if len(crossed):
        k, column = crossed[0]
        raise ValueError(f"{path.name}: boundary {k + 1} lies above an earlier one in column {column}.")
    known = depths[~np.isnan(depths)]
    if known.size == 0 or known.min() < -0.5 or known.max() > grid.shape[0] - 0.5:
        raise ValueError(f"{path.name} has no boundary, or one outside of the {grid.shape[0]} rows of the picture.")
    return torch.from_numpy(depths * grid.spacing[0] + grid.origin[0]).float()


def _by_name(paths: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise ValueError(f"{path.parent} holds {path.stem} twice: {found[path.stem].name} and {path.name}.")
        found[path.stem] = path
    return found


def _pairs(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Picture and table of each B-scan, by name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    pictures = _by_name([path for path in paths if path.suffix.lower() in PICTURES])
    tables = _by_name([path for path in paths if path.suffix.lower() == ".csv"])
    if not pictures:
        raise FileNotFoundError(
            f"{folder} holds no B-scan: a picture is called EYE_VISIT.png, its table EYE_VISIT.csv."
        )
    for name in sorted(pictures.keys() ^ tables.keys()):
        has, lacks = ("picture", "table of boundaries") if name in pictures else ("table of boundaries", "picture")
        raise FileNotFoundError(f"{folder} holds the {has} of {name}, but not its {lacks}.")
    nameless = [name for name in pictures if "_" not in name.strip("_")]
    if nameless:
        raise ValueError(f"{nameless[0]} does not say whose eye it is: a B-scan is called EYE_VISIT.")
    return {name: (path, tables[name]) for name, path in pictures.items()}
