"""What ``istn_stress`` does to test images: structures that are not as in training, and images unlike the training.

Trees are repainted. An image of a tree is, up to its noise, a sum of background, square and tree, so its three grey
values follow by least squares; the same greys with another tree, and the old noise on top, give the changed image.
Real images are changed around their labels, which the networks never see: filled from around, shrunk, or covered with
another person's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from scipy import ndimage
from torch import Tensor

from regteach.affine import Affine
from regteach.data.cohort import Cohort
from regteach.data.intensity import normalised
from regteach.data.trees import BLUR, ROOT, SQUARE_HALF, TREE_RADIUS, Trees
from regteach.grid import Grid
from regteach.sampling import flat_points, grid_points, sample, smooth, warp

POINTS = 150  # of each tree, to measure with
NONE = "as in training"
SIDES: dict[str, tuple[int, ...]] = {"moving": (0,), "both": (0, 1)}
Image = Float[Tensor, "b 1 *grid"]


@dataclass(frozen=True, eq=False)
class Scene:
    """Test pairs in a batch, and what is true of them.

    Args:
        images: moving and fixed, ``b 1 *grid``.
        soi: their true maps, ``b 1 *grid``.
        points: ``b n d`` on the fixed structure, mm.
        partners: ``b n d``, where these are in the moving image, mm.
    """

    images: tuple[Tensor, Tensor]
    soi: tuple[Tensor, Tensor]
    points: Float[Tensor, "b n d"]
    partners: Float[Tensor, "b n d"]

    def __len__(self) -> int:
        return len(self.points)

    def part(self, first: int, end: int) -> "Scene":
        """Some of the pairs."""
        k = slice(first, end)
        cut = [(maps[0][k], maps[1][k]) for maps in (self.images, self.soi)]
        return Scene(cut[0], cut[1], self.points[k], self.partners[k])

    def to(self, device: torch.device) -> "Scene":
        """The same on a device."""
        pairs = [(maps[0].to(device), maps[1].to(device)) for maps in (self.images, self.soi)]
        return Scene(pairs[0], pairs[1], self.points.to(device), self.partners.to(device))


def scene_of(trees: Trees, pairs: Sequence[tuple[int, int]]) -> Scene:
    """Pairs of trees with evenly chosen points of each fixed tree."""
    moving, fixed = ([pair[k] for pair in pairs] for k in (0, 1))
    every = [trees.points(index) for index in fixed]
    points = torch.stack([p[torch.linspace(0, len(p) - 1, POINTS).long()] for p in every])
    images, soi = trees.images, trees.soi
    return Scene((images[moving], images[fixed]), (soi[moving], soi[fixed]), points, trees.truth(moving, fixed)(points))


# ---- trees: another structure in the same image ----


def tree_scenes(trees: Trees, drawn: Trees, other: Trees, pairs: Sequence[tuple[int, int]]) -> dict[str, Scene]:
    """Scenes by the name of the change: missing, shrunk, added, swapped; in the moving image, and in both.

    What is true stays what it was: how the tree moved between the images is not changed by what is visible of it.

    Args:
        trees: with soft maps.
        drawn: the same images, with the trees as drawn.
        other: the same motions and greys, with another tree as drawn.
        pairs: (moving, fixed).
    """
    before = scene_of(trees, pairs)
    indices = [[pair[k] for pair in pairs] for k in (0, 1)]
    scenes = {NONE: before}
    for name, bodies in _bodies(trees, drawn, other).items():
        for where, sides in SIDES.items():
            images = list(before.images)
            for side in sides:
                k = indices[side]
                cover = square_cover(trees, k)
                images[side] = repainted(trees.images[k], drawn.soi[k], bodies[k], cover)
            scenes[f"{name}, {where}"] = replace(before, images=(images[0], images[1]))
    return scenes


def _bodies(trees: Trees, drawn: Trees, other: Trees) -> dict[str, Tensor]:
    """How much of each pixel the changed tree covers, ``n 1 *grid``, for all images."""
    size, body = trees.grid.shape[0], drawn.soi
    distance = BLUR * size * (-2 * trees.soi.clamp_min(1e-30).log()).clamp_min(0).sqrt()  # to the middle of a branch
    reference = trees.placed.inverse()(flat_points(trees.grid)).unflatten(1, trees.grid.shape)[:, None]
    root = torch.tensor(ROOT) * (size - 1)

    def of_radius(factor: float) -> Tensor:
        return (0.5 + factor * TREE_RADIUS * size - distance).clamp(0, 1)

    return {
        "missing": torch.zeros_like(body),
        "shrunk: one half only": body * (reference[..., 0] >= reference[..., 1]),
        "shrunk: tips cut off": body * ((reference - root).norm(dim=-1) < 0.5 * size),
        "shrunk: half as thick": of_radius(0.5),
        "added: twice as thick": of_radius(2.0),
        "added: a second tree": torch.maximum(body, body.flip((2, 3))),
        "swapped: another tree": other.soi,
    }


def square_cover(trees: Trees, indices: Sequence[int]) -> Image:
    """How much of each pixel the square covers."""
    grid = trees.grid
    square = Affine(trees.square.matrix[list(indices)], trees.square.translation[list(indices)], trees.square.centre)
    from_centre = square.inverse()(flat_points(grid)) - torch.tensor(grid.centre)
    outside = from_centre.abs().amax(-1) - SQUARE_HALF * grid.shape[0]
    return (0.5 - outside).clamp(0, 1).reshape(-1, 1, *grid.shape)


def repainted(images: Image, before: Image, after: Image, square: Image) -> Image:
    """The images with another tree: their own greys, found by least squares, and their own noise.

    Args:
        images: as they are.
        before: how much of each pixel the tree covers.
        after: how much the new one is to cover.
        square: how much the square covers.
    """
    old, new = _parts(before, square), _parts(after, square)
    greys = torch.linalg.lstsq(old, images.flatten(1)[..., None]).solution
    return (images + ((new - old) @ greys).reshape(images.shape)).clamp(0, 1)


def _parts(tree: Image, square: Image) -> Float[Tensor, "b g 3"]:
    return torch.stack([(1 - square) * (1 - tree), square * (1 - tree), tree], -1).flatten(1, -2)


# ---- images unlike the training ----

Change = Callable[[Tensor, Grid], Tensor]


def _inverted(images: Tensor, grid: Grid) -> Tensor:
    """Black for white; a margin of exact zeros, where nothing was measured, stays."""
    margin = (images == 0) if grid.dim == 3 else torch.zeros_like(images, dtype=torch.bool)
    return torch.where(margin, images, 1 - images)


def _noisy(sigma: float) -> Change:
    generator = torch.Generator().manual_seed(0)
    return lambda images, grid: images + sigma * torch.randn(images.shape, generator=generator)


def _darker_to_one_side(images: Tensor, grid: Grid) -> Tensor:
    along = (grid_points(grid)[..., 0] - grid.origin[0]) / grid.extent[0]
    return images * (1 - 0.7 * along)


UNLIKE: dict[str, Change] = {
    "inverted": _inverted,
    "power 0.5 (brighter)": lambda images, grid: images**0.5,
    "power 2 (darker)": lambda images, grid: images**2,
    "darker to one side, down to 0.3": _darker_to_one_side,
    "noise 0.1": _noisy(0.1),
    "noise 0.3": _noisy(0.3),
    "blur 1 voxel": lambda images, grid: smooth(images, grid.spacing, grid),
    "blur 2 voxels": lambda images, grid: smooth(images, tuple(2 * h for h in grid.spacing), grid),
}
SIZES = {"smaller, 3/4": 4 / 3, "larger, 4/3": 3 / 4}


def unlike_scenes(before: Scene, grid: Grid) -> dict[str, Scene]:
    """Scenes by the name of the change, the same in both images, scaled to [0, 1] again as ``register`` does."""
    scenes = {NONE: before}
    for name, change in UNLIKE.items():
        images = [normalised(change(maps, grid).clamp(0, 1)) for maps in before.images]
        scenes[name] = replace(before, images=(images[0], images[1]))
    inverted = scenes["inverted"].images
    scenes["inverted, moving only"] = replace(before, images=(inverted[0], before.images[1]))
    return scenes | {name: zoomed(before, grid, factor) for name, factor in SIZES.items()}


def zoomed(before: Scene, grid: Grid, factor: float) -> Scene:
    """Everything shown at another size about the centre: points of the new image times ``factor`` are the old ones.

    Lengths are measured in the new image.
    """
    centre = torch.tensor(grid.centre)
    zoom = Affine(factor * torch.eye(grid.dim)[None], torch.zeros(1, grid.dim), centre)
    images = [warp(maps, zoom, grid) for maps in before.images]
    soi = [warp(maps, zoom, grid, padding="zeros") for maps in before.soi]
    back = [(points - centre) / factor + centre for points in (before.points, before.partners)]
    return Scene((images[0], images[1]), (soi[0], soi[1]), back[0], back[1])


# ---- real images: around their labels ----

REAL = ("missing", "half missing", "shrunk", "added: a dark ball", "swapped: another person's")
SHRINK, REACH_MM, BALL_MM = 0.75, 4.0, 4.0


def changed(cohort: Cohort, index: int, name: str, other: int) -> tuple[Image, Int[Tensor, "*grid"]]:
    """A changed image of a cohort, ``1 1 *grid``, and the labels to judge it by, ``*grid``.

    - missing: all structures, and a voxel around, are filled from their surroundings; judged by where they were;
    - half missing: the first structure alone;
    - shrunk: drawn together to 0.75 of every length about their common middle; what is around follows, less and less;
    - added: a dark ball of 4 mm radius, 10 mm from the middle along axis 0;
    - swapped: another person's structures with 2 voxels around them, shifted by whole voxels so that the middles meet.

    Raises:
        ValueError: for an unknown change.
    """
    if name not in REAL:
        raise ValueError(f"The changes of real images are {', '.join(REAL)}, not {name!r}.")
    image, labels, grid = cohort.images[[index]], cohort.labels[index], cohort.grid
    middle = _middle(labels, grid)
    away = (grid_points(grid) - middle).norm(dim=-1)
    if name in ("missing", "half missing"):
        gone = labels > 0 if name == "missing" else labels == min(cohort.structures)
        return filled(image, _grown(gone, 1), grid), labels
    if name == "shrunk":
        outside = torch.from_numpy(ndimage.distance_transform_edt((labels == 0).numpy(), grid.spacing)).float()
        near = (-(outside / REACH_MM).square()).exp()[..., None]
        points = grid_points(grid)
        source = (points + near * (1 / SHRINK - 1) * (points - middle))[None]
        small = sample(labels[None, None].float(), source, grid, order=0, padding="zeros")
        return sample(image, source, grid), small[0, 0].long()
    if name.startswith("added"):
        beside = torch.eye(grid.dim)[0] * 10.0
        ball = ((grid_points(grid) - middle - beside).norm(dim=-1) < BALL_MM) & (labels == 0)
        return torch.where(smooth(ball[None, None].float(), 0.5, grid) > 0.5, 0.05, image), labels
    step = [round(float(v)) for v in (middle - _middle(cohort.labels[other], grid)) / torch.tensor(grid.spacing)]
    axes = tuple(range(-grid.dim, 0))
    theirs, their_labels = cohort.images[[other]].roll(step, axes), cohort.labels[other].roll(step, axes)
    blank = filled(image, _grown(labels > 0, 1), grid)
    weight = smooth(_grown(their_labels > 0, 2)[None, None].float(), 1.0, grid) * (away < 40)
    return blank.lerp(theirs, weight), their_labels


def filled(image: Image, mask: Tensor, grid: Grid, sigma_mm: float = 3.0) -> Image:
    """A masked region filled with a weighted mean of what is around it."""
    known = (~mask)[None, None].float()
    around = smooth(image * known, sigma_mm, grid) / smooth(known, sigma_mm, grid).clamp_min(1e-6)
    return torch.where(mask, around, image)


def _grown(mask: Tensor, voxels: int) -> Tensor:
    return torch.from_numpy(ndimage.binary_dilation(mask.numpy(), iterations=voxels))


def _middle(labels: Tensor, grid: Grid) -> Tensor:
    return grid_points(grid)[labels > 0].mean(0)
