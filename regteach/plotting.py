"""Figures of the course: images, overlays, deformed grids, arrows and curves, each shown with its alt text.

Convention: arrays are 2D, in tensor order. A digit is drawn with axis 0 down and axis 1 to the right. With
`anatomical=True` a slice of a RAS volume is drawn with axis 0 to the right and axis 1 up. Everything is drawn in
millimetres when a Grid is given, in voxels (1 mm, origin 0) when not. A transform maps fixed points to moving points.

Colours: grey for intensities, viridis for sizes, PuOr for signed values, and orange against blue for two images,
which the colour-blind tell apart (Okabe and Ito 2008; Crameri et al. 2020, Nature Communications 11:5444).
Tensors and arrays are both taken. matplotlib's Figure is used without pyplot, so nothing is drawn twice.
"""

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from regteach.grid import Grid
from regteach.records import check_alt, picture, publish

ORANGE, BLUE, GREEN = "#e69f00", "#0072b2", "#009e73"
VERMILLION, PURPLE, BLACK = "#d55e00", "#cc79a7", "#000000"
INTENSITY, MAGNITUDE, SIGNED = "gray", "viridis", "PuOr"
DPI = 144  # one and a half pixels for each of the page's, so that text is sharp

_LINES = ("-", "--", "-.", ":")
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=[BLUE, VERMILLION, GREEN, PURPLE, ORANGE, BLACK]),
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def style() -> AbstractContextManager[None]:
    """Return a context in which matplotlib draws in the course's style."""
    return matplotlib.rc_context(_STYLE)


def axes(rows: int = 1, columns: int = 1, width: float = 2.6, height: float = 2.6) -> tuple[Figure, np.ndarray]:
    """Make a figure and its axes.

    Args:
        rows, columns: how many axes.
        width, height: of one of them, inches.

    Returns:
        The figure, and the axes as an array of shape (rows * columns,), row by row.
    """
    with style():
        figure = Figure(figsize=(columns * width, rows * height), layout="compressed")
        return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def png(figure: Figure, tight: bool = True) -> bytes:
    """Draw a figure to PNG bytes.

    Args:
        figure: what to draw.
        tight: cut the empty margin; False keeps the figure's size, as the frames of a film need.
    """
    buffer = io.BytesIO()
    margin: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.06} if tight else {}
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", **margin)
    return buffer.getvalue()


def show(figure: Figure, alt: str) -> None:
    """Show a figure with its alt text, and close it.

    Args:
        figure: a matplotlib figure, made here or with pyplot.
        alt: what a reader who does not see the figure needs to know, at least 20 characters.

    Raises:
        ValueError: the alt text is too short.
    """
    check_alt(alt)
    data = png(figure)
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(figure)
    publish(picture(data, alt, DPI), f"Figure: {alt}", {"kind": "figure", "alt": alt})


def image(
    ax: Axes,
    values: Any,
    *,
    grid: Grid | None = None,
    anatomical: bool = False,
    title: str = "",
    cmap: str = INTENSITY,
    limits: tuple[float, float] | None = None,
) -> Any:
    """Draw one image.

    Args:
        ax: where.
        values: (n0, n1), or (n0, n1, 3) colours in [0, 1].
        grid: the image's grid, for millimetres.
        anatomical: axis 0 to the right and axis 1 up, instead of axis 0 down and axis 1 to the right.
        title: above the image.
        cmap: matplotlib colour map.
        limits: values drawn as the first and the last colour; by default the smallest and largest.

    Returns:
        The matplotlib image, for a colour bar.
    """
    pixels = _numpy(values)
    if pixels.ndim != 2 and not (pixels.ndim == 3 and pixels.shape[2] == 3):
        raise ValueError(f"an image to draw has shape (n0, n1) or (n0, n1, 3), not {pixels.shape}")
    at = _grid(grid, pixels.shape[:2])
    first = np.array(at.origin) - 0.5 * np.array(at.spacing)
    last = first + np.array(at.extent)
    low, high = limits if limits is not None else (None, None)
    if anatomical:  # imshow puts its axis 1 across; with the first row at the bottom, its axis 0 points up
        pixels, extent = pixels.swapaxes(0, 1)[::-1], (first[0], last[0], first[1], last[1])
    else:
        extent = (first[1], last[1], last[0], first[0])
    drawn = ax.imshow(pixels, cmap, vmin=low, vmax=high, origin="upper", extent=extent, interpolation="nearest")
    _bare(ax)
    if title:
        ax.set_title(title)
    return drawn


def image_row(
    images: Sequence[Any],
    titles: Sequence[str],
    *,
    grid: Grid | None = None,
    anatomical: bool = False,
    cmap: str = INTENSITY,
    limits: tuple[float, float] | None = None,
    bar: str = "",
    size: float = 2.2,
) -> Figure:
    """Draw images side by side on one intensity scale.

    Args:
        images: each (n0, n1), or (n0, n1, 3) colours.
        titles: one an image.
        grid, anatomical, cmap: as in `image`.
        limits: the scale; by default the smallest and largest value of all images.
        bar: label of a colour bar; without it there is none.
        size: of one image, inches.
    """
    if len(images) != len(titles) or not images:
        raise ValueError(f"image_row needs one title an image, not {len(titles)} titles for {len(images)} images")
    arrays = [_numpy(values) for values in images]
    if limits is None:
        flat = [a for a in arrays if a.ndim == 2]
        limits = (min(a.min() for a in flat), max(a.max() for a in flat)) if flat else (0.0, 1.0)
    figure, panels = axes(1, len(arrays), size, size * 1.12)
    with style():
        for ax, values, title in zip(panels, arrays, titles, strict=True):
            drawn = image(ax, values, grid=grid, anatomical=anatomical, title=title, cmap=cmap, limits=limits)
        if bar:
            figure.colorbar(drawn, ax=list(panels), label=bar, shrink=0.85)
    return figure


def composite(fixed: Any, moved: Any) -> np.ndarray:
    """Blend two images: fixed in orange, moved in blue, grey to white where they agree.

    Args:
        fixed, moved: (n0, n1); each is scaled by its own smallest and largest value.

    Returns:
        Colours (n0, n1, 3) in [0, 1].
    """
    a, b = _unit(_numpy(fixed)), _unit(_numpy(moved))
    _same_shape(a, b)
    return a[..., None] * np.array([1.0, 0.5, 0.0]) + b[..., None] * np.array([0.0, 0.5, 1.0])


def overlay(ax: Axes, fixed: Any, moved: Any, *, title: str = "", **options: Any) -> None:
    """Draw the orange and blue blend of a fixed and a moved image (`composite`); options as in `image`."""
    image(ax, composite(fixed, moved), title=title, **options)


def checkerboard(fixed: Any, moved: Any, tiles: int = 4) -> np.ndarray:
    """Lay two images out as the squares of a checkerboard; edges that continue across squares agree.

    Args:
        fixed, moved: (n0, n1); each is scaled by its own smallest and largest value.
        tiles: squares along each axis; the fixed image has the first.

    Returns:
        Intensities (n0, n1) in [0, 1].
    """
    a, b = _unit(_numpy(fixed)), _unit(_numpy(moved))
    _same_shape(a, b)
    rows, columns = (np.arange(n) * tiles // n for n in a.shape)
    return np.where((rows[:, None] + columns[None, :]) % 2 == 0, a, b)


def grid_lines(
    ax: Axes,
    transform: Callable[[Any], Any],
    grid: Grid,
    *,
    every: int = 2,
    anatomical: bool = False,
    colour: str = BLUE,
    width: float = 0.8,
) -> None:
    """Draw where a transform takes the lines of the fixed grid, in moving millimetres.

    A line that crosses another of its kind is folding.

    Args:
        ax: where; usually over the moving image.
        transform: maps fixed points, a tensor (1, n, 2) in mm, to moving points of the same shape.
        grid: the fixed image's grid, 2D.
        every: a line every so many voxels.
        anatomical: as in `image`.
        colour, width: of the lines.
    """
    import torch

    if grid.dim != 2:
        raise ValueError(f"grid_lines draws 2D grids, not one of shape {grid.shape}")
    mesh = _points(grid)
    points = torch.as_tensor(mesh.reshape(1, -1, 2), dtype=torch.float32)
    moved = _numpy(transform(points)).reshape(mesh.shape)
    x, y = _drawn(moved, anatomical)
    for k in range(0, grid.shape[0], every):
        ax.plot(x[k], y[k], color=colour, linewidth=width)
    for k in range(0, grid.shape[1], every):
        ax.plot(x[:, k], y[:, k], color=colour, linewidth=width)
    _shape_axes(ax, anatomical)


def arrows(
    ax: Axes,
    displacement: Any,
    *,
    grid: Grid | None = None,
    every: int = 2,
    anatomical: bool = False,
    colour: str = VERMILLION,
) -> None:
    """Draw a displacement as arrows from fixed points to moving points, to scale.

    Args:
        ax: where; usually over the fixed image.
        displacement: (n0, n1, 2) in mm, axis 0 first.
        grid: the fixed image's grid.
        every: an arrow every so many voxels.
        anatomical: as in `image`.
        colour: of the arrows.
    """
    field = _numpy(displacement)
    if field.ndim != 3 or field.shape[2] != 2:
        raise ValueError(f"a displacement to draw has shape (n0, n1, 2), not {field.shape}")
    chosen = (slice(every // 2, None, every),) * 2
    x, y = _drawn(_points(_grid(grid, field.shape[:2]))[chosen], anatomical)
    along_x, along_y = _drawn(field[chosen], anatomical)
    to_scale: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1}
    ax.quiver(x, y, along_x, along_y, color=colour, width=0.006, headwidth=4, **to_scale)
    _shape_axes(ax, anatomical)


def field_magnitude(
    ax: Axes, displacement: Any, *, grid: Grid | None = None, anatomical: bool = False, title: str = ""
) -> None:
    """Draw how far a displacement moves each point, in mm, with a colour bar.

    Args:
        ax: where.
        displacement: (n0, n1, d) in mm.
        grid, anatomical, title: as in `image`.
    """
    length = np.linalg.norm(_numpy(displacement), axis=-1)
    drawn = image(
        ax, length, grid=grid, anatomical=anatomical, title=title, cmap=MAGNITUDE, limits=(0.0, max(length.max(), 1e-6))
    )
    ax.figure.colorbar(drawn, ax=ax, label="displacement, mm", shrink=0.85)


def curve(ax: Axes, lines: Mapping[str, Any], *, x: Any = None, xlabel: str, ylabel: str, log: bool = False) -> None:
    """Draw one or more curves, told apart by colour, line style and legend.

    Args:
        ax: where.
        lines: name to values (n,).
        x: (n,); by default 0, 1, 2, ...
        xlabel, ylabel: what and unit.
        log: logarithmic y axis.
    """
    with style():
        for number, (name, values) in enumerate(lines.items()):
            heights = _numpy(values)
            where = np.arange(len(heights)) if x is None else _numpy(x)
            ax.plot(where, heights, _LINES[number % len(_LINES)], label=name)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        if log:
            ax.set_yscale("log")
        ax.grid(color="#8884", linewidth=0.6)
        if len(lines) > 1:
            ax.legend()


def _numpy(values: Any) -> np.ndarray:
    """Take a tensor, on any device and with any history, or an array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    return array.astype(np.float64) if array.dtype == bool else array


def _grid(grid: Grid | None, shape: Sequence[int]) -> Grid:
    """Return the grid of what is drawn; without one, its voxels are 1 mm."""
    if grid is None:
        return Grid(tuple(shape))
    if grid.shape != tuple(shape):
        raise ValueError(f"the grid has shape {grid.shape} and what is drawn {tuple(shape)}")
    return grid


def _points(grid: Grid) -> np.ndarray:
    """Return the voxel centres of a 2D grid in mm, (n0, n1, 2)."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    return index * np.array(grid.spacing) + np.array(grid.origin)


def _drawn(points: np.ndarray, anatomical: bool) -> tuple[np.ndarray, np.ndarray]:
    """Split points (..., 2) into matplotlib's x and y."""
    return (points[..., 0], points[..., 1]) if anatomical else (points[..., 1], points[..., 0])


def _shape_axes(ax: Axes, anatomical: bool) -> None:
    """Equal millimetres on both axes; where no image was drawn first, a digit's axis 0 still points down."""
    ax.set_aspect("equal")
    if not anatomical:
        ax.yaxis.set_inverted(True)
    _bare(ax)


def _bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _unit(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values, dtype=np.float64)


def _same_shape(a: np.ndarray, b: np.ndarray) -> None:
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"two images of one shape (n0, n1) are expected, not {a.shape} and {b.shape}")
