"""Lung CT pairs of others: the Learn2Reg NLST folder, keypoint tables, and Learn2Reg's way to measure.

Convention: fixed is exhale (NLST: the image _0000), moving is inhale (_0001). A keypoint table has no header and six
columns, fixed x y z and moving x y z, in voxels counted from 0 at the centre of the first one. Points become ``1 n 3``
in mm by a grid, or by a spacing alone (then voxel 0 is at 0 mm).

The voxels of an NLST table are those of the file, whichever way its axes run; :meth:`NlstPair.keypoints` brings them to
mm by the file's own affine, so they fit the volume, which is in RAS axes.

Learn2Reg's measures differ from ours in two ways, so both are given by name:

| | ours (``metrics``) | Learn2Reg's |
|---|---|---|
| TRE | the transform at the landmark | u on the fixed grid, read at the landmark by a cubic spline (order 3) |
| SDlogJ | log det J, folds left out | log(clip(det J + 3)), about four times smaller; 2 voxels cropped |

Sources: Hering et al., Learn2Reg, IEEE TMI 42 (2023), and the challenge's evaluation code; Heinrich and Hansen,
VoxelMorph++, WBIR 2022 (the keypoint tables).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import nibabel.affines
import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor

import data_download
from regteach.data.volumes import Volume, read_volume
from regteach.grid import Grid, per_axis
from regteach.metrics import folding_percent, sdlogj, sdlogj_learn2reg, target_registration_error
from regteach.transforms import Transform, determinant, jacobian_determinant

SPLITS = {"train": "training_paired_images", "validation": "registration_val"}
# The grid of the keypoint tables. The authors name two spacings, one for exhale, 1.75 x 1.25 x 1.75 mm, and one for
# inhale, 1.75 x 1.00 x 1.25 mm, and cut both to this size around the lungs; their code measures in one of them.
KEYPOINT_GRID = Grid((192, 192, 208), (1.75, 1.25, 1.75))
Points = Float[Tensor, "1 n 3"]
FileName = str | os.PathLike[str]


@dataclass(frozen=True)
class NlstPair:
    """Two images of one person; nothing is read until it is asked for.

    Args:
        name: such as NLST_0001.
        root: the folder that holds imagesTr.
        fixed_name: path of the fixed image from there.
        moving_name: of the moving one.
    """

    name: str
    root: Path
    fixed_name: str
    moving_name: str

    @cached_property
    def fixed(self) -> Volume:
        """The fixed image, HU."""
        return read_volume(self.root / self.fixed_name)

    @cached_property
    def moving(self) -> Volume:
        """The moving image, HU."""
        return read_volume(self.root / self.moving_name)

    @cached_property
    def fixed_mask(self) -> Volume:
        """1 in the lungs of the fixed image."""
        return read_volume(self.root / self._beside(self.fixed_name, "masks"), labels=True)

    @cached_property
    def moving_mask(self) -> Volume:
        """1 in the lungs of the moving image."""
        return read_volume(self.root / self._beside(self.moving_name, "masks"), labels=True)

    def keypoints(self) -> tuple[Points, Points]:
        """Corresponding points, fixed and moving, ``1 n 3`` each, mm of the two volumes.

        Raises:
            FileNotFoundError: if the pair has none.
            ValueError: as in :func:`read_keypoints`.
        """
        path = self.root / self._beside(self.fixed_name, "keypoints")
        path = path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".csv")
        table = _table(path)
        sides = []
        for name, columns in ((self.fixed_name, table[:, :3]), (self.moving_name, table[:, 3:])):
            read_volume(self.root / name)  # says what is wrong with the file, if anything
            image = nib.load(self.root / name)
            assert isinstance(image, nib.Nifti1Pair)  # read_volume has seen to that
            _inside(columns, Grid(image.shape[:3]), path)
            sides.append(torch.from_numpy(nib.affines.apply_affine(image.affine, columns)).float()[None])
        return sides[0], sides[1]

    @staticmethod
    def _beside(name: str, kind: str) -> str:
        """The path of the mask or the keypoints that belong to an image."""
        folder, file = os.path.split(name)
        return os.path.join(folder.replace("images", kind), file)


@dataclass(frozen=True)
class KeypointPair:
    """Corresponding points of one pair without images: fixed and moving, ``1 n 3``, mm, and the grid they lie on."""

    name: str
    fixed: Points
    moving: Points
    grid: Grid


def read_nlst(root: FileName | None = None, split: str = "train") -> list[NlstPair]:
    """The pairs of a folder in the layout of Learn2Reg NLST, as its NLST_dataset.json lists them.

    Args:
        root: the folder; where left out, that of the data set "nlst".
        split: "train", or "validation" (cases 0101 to 0110), which the file lists among the training pairs too:
            "train" leaves them out.

    Raises:
        FileNotFoundError: if there is no folder or list, or a listed image is missing.
        ValueError: for an unknown split, or a list that can not be read.
    """
    if split not in SPLITS:
        raise ValueError(f"NLST has the splits {' and '.join(SPLITS)}, not {split!r}.")
    folder = Path(root) if root is not None else data_download.locate("nlst")
    path = folder / "NLST_dataset.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no Learn2Reg NLST folder: it has no NLST_dataset.json.")
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        rows = {part: [(row["fixed"], row["moving"]) for row in listed.get(key, [])] for part, key in SPLITS.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not the list of pairs that Learn2Reg writes.") from None
    chosen = [row for row in rows[split] if split != "train" or row not in rows["validation"]]
    pairs = []
    for fixed, moving in chosen:
        fixed, moving = fixed.removeprefix("./"), moving.removeprefix("./")
        for name in (fixed, moving):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{path} lists {name}, but {folder} does not hold it.")
        pairs.append(NlstPair(Path(fixed).name.split(".")[0].rsplit("_", 1)[0], folder, fixed, moving))
    return pairs


def read_keypoints(
    path: FileName, where: Grid | float | Sequence[float], moving: Grid | None = None
) -> tuple[Points, Points]:
    """Read a table of corresponding points.

    Args:
        path: a text file of six comma-separated columns without a header: fixed x y z, moving x y z, in voxels.
        where: the grid of the fixed image, or a spacing in mm (voxel 0 is then at 0 mm, and nothing is known of where
            the image ends).
        moving: the grid of the moving image, if it is another.

    Returns:
        Fixed and moving points, ``1 n 3`` each, mm.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, no table of numbers, has a header or another number of columns, holds NaN, or has
            points outside the grid (such as points that are in mm already).
    """
    table = _table(Path(path))
    grid = where if isinstance(where, Grid) else None
    for columns, its in ((table[:, :3], grid), (table[:, 3:], moving or grid)):
        if its is not None:
            _inside(columns, its, Path(path))
    fixed_grid = grid or Grid((1, 1, 1), per_axis(where, 3, "spacing"))  # type: ignore[arg-type]
    return _to_mm(table[:, :3], fixed_grid), _to_mm(table[:, 3:], moving or fixed_grid)


def load_lung_keypoints(grid: Grid = KEYPOINT_GRID, moving: Grid | None = None) -> list[KeypointPair]:
    """The Learn2Reg lung keypoints: pairs of a few hundred to 2,400 points found by machine, without images.

    What is known: exhale (fixed) and inhale (moving) were resampled and cut to 192 x 192 x 208 voxels around the lungs,
    so where the two lay to each other is lost. What is assumed: one spacing for both, 1.75 x 1.25 x 1.75 mm. That is
    how their authors compare them; a motion in these mm is what a scaling to the lungs' box has left over.

    Args:
        grid: of the fixed points, and of the moving ones where ``moving`` is left out.
        moving: of the moving points.

    Raises:
        FileNotFoundError: if they have not been fetched; the message has the command.
        ValueError: as in :func:`read_keypoints`.
    """
    folder = data_download.locate("lung-keypoints")
    paths = sorted(folder.glob("case_*.csv"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no case: run `python -m data_download lung-keypoints --force`.")
    return [KeypointPair(path.stem, *read_keypoints(path, grid, moving), grid) for path in paths]


def learn2reg_tre(
    displacement: Float[Tensor, "b *grid d"] | Transform,
    grid: Grid,
    fixed_points: Float[Tensor, "b n d"],
    moving_points: Float[Tensor, "b n d"],
) -> Float[Tensor, "b n"]:
    """TRE as the Learn2Reg challenge computes it, mm: |(p_f + u(p_f) - p_m) * spacing|, all in voxels.

    u is read at the landmark by a cubic spline through the voxels (scipy's map_coordinates, order 3), as 0 outside.

    Args:
        displacement: fixed to moving, mm, on the fixed grid; or a transform, which is sampled there first.
        grid: the fixed grid.
        fixed_points: mm.
        moving_points: mm, as many.

    Raises:
        ValueError: if the field does not fit the grid, or the points do not come in pairs.
    """
    field = displacement.displacement_on(grid) if isinstance(displacement, Transform) else displacement
    if tuple(field.shape[1:]) != (*grid.shape, grid.dim):
        raise ValueError(f"A displacement on this grid is batch x {grid.shape} x {grid.dim}, not {tuple(field.shape)}.")
    if fixed_points.shape[1:] != moving_points.shape[1:]:
        raise ValueError(f"Points come in pairs, not {tuple(fixed_points.shape)} and {tuple(moving_points.shape)}.")
    spacing, origin = np.asarray(grid.spacing), np.asarray(grid.origin)
    errors = []
    for b in range(max(len(field), len(fixed_points))):
        u, fixed, moving = (
            part[min(b, len(part) - 1)].detach().cpu().double().numpy() for part in (field, fixed_points, moving_points)
        )
        fixed_vox, moving_vox = (fixed - origin) / spacing, (moving - origin) / spacing
        u_vox = np.stack(
            [
                ndimage.map_coordinates(u[..., k] / spacing[k], fixed_vox.T, order=3, mode="constant")
                for k in range(grid.dim)
            ],
            axis=1,
        )
        errors.append(np.linalg.norm((fixed_vox + u_vox - moving_vox) * spacing, axis=1))
    return torch.from_numpy(np.stack(errors)).float()


def evaluate_lungs(
    transform: Transform,
    grid: Grid,
    fixed_points: Float[Tensor, "1 n d"],
    moving_points: Float[Tensor, "1 n d"],
    fixed_mask: Tensor | None = None,
) -> dict[str, float]:
    """Ours and Learn2Reg's measures side by side, of one pair.

    Args:
        transform: fixed to moving.
        grid: the fixed grid.
        fixed_points: landmarks, mm.
        moving_points: their partners, mm.
        fixed_mask: lungs of the fixed image, ``1 1 *grid``; all voxels where left out.

    Returns:
        Means over the landmarks and numbers over the mask: ``tre_mm`` and ``tre_learn2reg_mm``, ``tre30_mm`` (the 30 %
        of largest error start there), ``sdlogj`` and ``folding_percent`` (of our Jacobian, analytic where the
        transform has one), ``sdlogj_learn2reg`` (of central differences of u).
    """
    ours = target_registration_error(transform, fixed_points, moving_points)
    field = transform.displacement_on(grid)
    det = jacobian_determinant(transform, grid)
    return {
        "tre_mm": float(ours.mean()),
        "tre_learn2reg_mm": float(learn2reg_tre(field, grid, fixed_points, moving_points).mean()),
        "tre30_mm": float(ours.quantile(0.7)),
        "sdlogj": float(sdlogj(det, fixed_mask)[0]),
        "folding_percent": float(folding_percent(det, fixed_mask)[0]),
        "sdlogj_learn2reg": float(learn2reg_sdlogj(field, grid, fixed_mask)[0]),
    }


def learn2reg_sdlogj(
    displacement: Float[Tensor, "b *grid d"], grid: Grid, fixed_mask: Tensor | None = None
) -> Float[Tensor, "b"]:
    """SDlogJ as the Learn2Reg challenge computes it: central differences of u on the voxels, 2 voxels cropped.

    Arguments as in :func:`evaluate_lungs`.
    """
    dim = grid.dim
    slopes = [
        torch.stack(torch.gradient(displacement[..., k], spacing=grid.spacing, dim=list(range(1, dim + 1))), -1)
        for k in range(dim)
    ]
    det = determinant(torch.stack(slopes, -2) + torch.eye(dim).to(displacement))
    return sdlogj_learn2reg(det, fixed_mask)


def _table(path: Path) -> Float[np.ndarray, "n 6"]:
    """The numbers of a keypoint table, checked as far as they go alone."""
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a table of keypoints.")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a table of keypoints: it is no text.") from None
    if not lines:
        raise ValueError(f"{path} is empty: it holds no keypoint.")
    rows = []
    for number, line in enumerate(lines, start=1):
        cells = line.split(",")
        try:
            values = [float(cell) for cell in cells]
        except ValueError:
            if number == 1 and len(cells) == 6 and len(lines) > 1:
                raise ValueError(f"{path} begins with a header ({line[:40]!r}): take that line out.") from None
            raise ValueError(f"{path} is not a table of keypoints: line {number} is {line[:40]!r}.") from None
        if len(values) != 6:
            raise ValueError(
                f"{path} has {len(values)} columns in line {number}, but keypoints have six: fixed x y z, moving x y z."
            )
        rows.append(values)
    table = np.array(rows)
    bad = np.flatnonzero(~np.isfinite(table).all(1))
    if len(bad):
        raise ValueError(f"{path} holds a number that is not finite (NaN or infinity) in keypoint {bad[0] + 1}.")
    return table


def _inside(voxels: Float[np.ndarray, "n 3"], grid: Grid, path: Path) -> None:
    """Raise unless every point lies on the grid, half a voxel of slack included."""
    if grid.dim != 3:
        raise ValueError(f"Keypoints are 3D, but the grid has {grid.dim} axes.")
    out = ((voxels < -0.5) | (voxels > np.asarray(grid.shape) - 0.5)).any(1)
    if out.any():
        k = int(np.flatnonzero(out)[0])
        place = ", ".join(f"{v:g}" for v in voxels[k])
        raise ValueError(
            f"{path} has {int(out.sum())} points outside the grid of {grid.shape} voxels, the first at ({place}):"
            " the columns have to be voxels, not mm, of this grid."
        )


def _to_mm(voxels: Float[np.ndarray, "n 3"], grid: Grid) -> Points:
    return torch.from_numpy(voxels * np.asarray(grid.spacing) + np.asarray(grid.origin)).float()[None]
