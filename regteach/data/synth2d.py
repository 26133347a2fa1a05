"""The authors' archive of tree images, ``synth2d``: 100 training and 10 test pairs with exact transforms.

Its text files, 4 x 4, take pixels (column, row) of an image to the reference, which is the inverse of ``placed``. The
square is not independent of the tree: in every source image it moves with the tree, in every target image it is turned
against the tree, always by the same 10 degrees (measured, to 0.2 degrees). A network may learn that number instead of
looking at the tree.

Source: Lee, Oktay, Schuh, Schaap, Glocker, ISTN, MICCAI 2019, and its public data set synth2d.
"""

import io
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import data_download
from regteach.affine import Affine, rotation_matrix
from regteach.data.intensity import normalised
from regteach.data.trees import Trees, check_kind, labels_of, laid_out
from regteach.grid import Grid

FULL = {"segmentation": 208, "landmarks": 204}  # the largest value of every soft map in synth2d


SIDES = ("source", "target")  # moving, fixed


SQUARE_TURN_DEG = {"source": 0.0, "target": -10.0}  # of the square against the tree, axis 0 to axis 1


REFETCH = "fetch istn-synth2d again"


def read_synth2d(kind: str = "segmentation", validation: int = 20) -> Trees:
    """The authors' toy data: 110 pairs of 128 x 128 pixels, read from the archive as it is.

    Args:
        kind: of SoI: "segmentation" or "landmarks".
        validation: how many of their 100 training pairs are kept for validation, the last by number; the test pairs
            are theirs.

    Raises:
        FileNotFoundError: if it has not been fetched; the message has the command.
        ValueError: for an unknown kind or too many validation pairs, or if the archive is cut short or lacks a member.
    """
    check_kind(kind, tuple(FULL))
    path = data_download.locate("istn-synth2d", "synth2d.zip")
    try:
        with zipfile.ZipFile(path) as archive:
            pairs = {part: _numbers(archive, part, path) for part in ("train", "test")}
            if not 0 <= validation < len(pairs["train"]):
                raise ValueError(
                    f"Between 0 and {len(pairs['train']) - 1} of the {len(pairs['train'])} training pairs can be kept "
                    f"for validation, not {validation}."
                )
            stems = [f"{part}/V_square_{s}{n}" for part in ("train", "test") for n in pairs[part] for s in SIDES]
            images = _maps(archive, path, stems, "")
            segmentation = _soft(_maps(archive, path, stems, "_seg"), "segmentation", path)
            soi = segmentation
            if kind == "landmarks":
                soi = _soft(_maps(archive, path, stems, "_points"), kind, path)
            matrices = np.stack([_matrix(archive, path, f"{stem}_transform.txt") for stem in stems])
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): {REFETCH}.") from None
    if len({m.shape for m in (images, segmentation, soi)}) != 1:
        raise ValueError(f"{path} holds maps that differ in size from their images: {REFETCH}.")
    grid = Grid(tuple(images.shape[2:]))
    placed = _as_placed(matrices, grid)
    turns = torch.tensor([SQUARE_TURN_DEG[s] for _ in range(len(stems) // 2) for s in SIDES])
    turned = placed.matrix @ rotation_matrix(turns.deg2rad()[:, None])
    n_test = len(pairs["test"])
    splits, given, _ = laid_out({"train": len(pairs["train"]) - validation, "validation": validation, "test": n_test})
    return Trees(
        name="synth2d",
        images=normalised(images / 255),
        soi=soi,
        labels=labels_of(soi),
        grid=grid,
        people=tuple(stem.replace("V_square_", "") for stem in stems),
        structures={1: "tree" if kind == "segmentation" else "landmarks"},
        splits=splits,
        origin="Everything is synthetic: the toy data that the authors of ISTN published (synth2d, Apache-2.0).",
        given_pairs=given,
        placed=placed,
        square=Affine(turned, placed.translation, placed.centre),
        tree=segmentation[:, 0] > 0.5,
    )


def _as_placed(matrices: Float[np.ndarray, "n 4 4"], grid: Grid) -> Affine:
    """Reference to image, tensor order, about the grid's centre, from image to reference in (column, row)."""
    back = torch.from_numpy(np.linalg.inv(matrices))
    matrix, shift = back[:, :2, :2].flip(1, 2), back[:, :2, 3].flip(1)
    centre = torch.tensor(grid.centre, dtype=torch.float64)
    about_centre = shift + matrix @ centre - centre
    return Affine(matrix.float(), about_centre.float(), centre.float())


def _numbers(archive: zipfile.ZipFile, part: str, path: Path) -> list[int]:
    """Numbers of the pairs of which the archive has any member, in rising order."""
    found = (re.match(rf"{part}/V_square_(?:source|target)(\d+)[._]", name) for name in archive.namelist())
    numbers = sorted({int(match[1]) for match in found if match})
    if not numbers:
        raise ValueError(f"{path} holds no image V_square_* in its folder {part}: {REFETCH}.")
    return numbers


def _member(archive: zipfile.ZipFile, path: Path, name: str) -> bytes:
    try:
        return archive.read(name)
    except KeyError:
        raise ValueError(f"{path} lacks {name}: {REFETCH}.") from None


def _maps(archive: zipfile.ZipFile, path: Path, stems: list[str], suffix: str) -> Float[Tensor, "n 1 *grid"]:
    """Grey values 0 to 255 of the images ``stem + suffix + .png``."""
    from matplotlib.image import imread  # slow to import, and needed for this archive only

    maps: list[np.ndarray] = []
    for name in (f"{stem}{suffix}.png" for stem in stems):
        content = io.BytesIO(_member(archive, path, name))
        try:
            pixels = imread(content, format="png")
        except (OSError, SyntaxError, ValueError):
            raise ValueError(f"{name} in {path} is not a whole PNG image: {REFETCH}.") from None
        if pixels.ndim != 2 or (maps and pixels.shape != maps[0].shape):
            raise ValueError(f"{name} in {path} is not a grey image of the size of the others: {REFETCH}.")
        maps.append(np.rint(pixels * 255))  # imread divides by 255
    return torch.from_numpy(np.stack(maps)[:, None]).float()


def _soft(maps: Float[Tensor, "n 1 *grid"], kind: str, path: Path) -> Float[Tensor, "n 1 *grid"]:
    """A soft map to [0, 1]."""
    if maps.max() > FULL[kind]:
        raise ValueError(f"The {kind} maps in {path} reach {maps.max():g}, but those of synth2d end at {FULL[kind]}.")
    return maps / FULL[kind]


def _matrix(archive: zipfile.ZipFile, path: Path, name: str) -> Float[np.ndarray, "4 4"]:
    """An affine matrix in the plane, of a text file."""
    content = _member(archive, path, name)
    try:
        matrix = np.loadtxt(io.BytesIO(content))
    except ValueError as error:
        raise ValueError(f"{name} in {path} is no matrix ({error}): {REFETCH}.") from None
    in_plane = matrix.shape == (4, 4) and bool((matrix[2:] == np.eye(4)[2:]).all())
    if not in_plane or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-6:
        raise ValueError(f"{name} in {path} is no 4 x 4 matrix of an affine transform in the plane: {REFETCH}.")
    return matrix
