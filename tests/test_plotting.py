"""Figures put things where they are: the right way up, in millimetres, with their alt text."""

import io

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from regteach import plotting
from regteach.grid import Grid
from regteach.plotting import (
    arrows,
    axes,
    checkerboard,
    composite,
    curve,
    field_magnitude,
    grid_lines,
    image,
    image_row,
    overlay,
    show,
)

GRID = Grid((7, 9), (1.0, 1.5), (10.0, 20.0))


def drawn(ax):
    """The one image on the axes as pixel rows from the top of the page, and its extent."""
    (shown,) = ax.get_images()
    return np.asarray(shown.get_array()), shown.get_extent()


def on_page(ax, x, y):
    """Where a data point lies on the page: from the left and from the top, both in [0, 1] of the axes."""
    across, up = ax.transAxes.inverted().transform(ax.transData.transform((x, y)))
    return across, 1 - up


def test_a_digit_is_drawn_with_axis_0_down_and_axis_1_to_the_right():
    pixels = np.zeros((7, 9))
    pixels[1, 7] = 1
    figure, panels = axes()
    image(panels[0], pixels)
    figure.canvas.draw()
    across, down = on_page(panels[0], 7, 1)  # x is axis 1, y is axis 0
    assert (round(across * 9 - 0.5, 6), round(down * 7 - 0.5, 6)) == (7, 1)
    assert np.argwhere(drawn(panels[0])[0]).tolist() == [[1, 7]]


def test_an_anatomical_slice_is_drawn_with_axis_0_to_the_right_and_axis_1_up():
    pixels = np.zeros((7, 9))
    pixels[1, 7] = 1
    figure, panels = axes()
    image(panels[0], pixels, anatomical=True)
    figure.canvas.draw()
    across, down = on_page(panels[0], 1, 7)  # x is axis 0, y is axis 1
    assert (round(across * 7 - 0.5, 6), round(down * 9 - 0.5, 6)) == (1, 9 - 1 - 7)
    rows, _ = drawn(panels[0])
    assert rows.shape == (9, 7)
    assert np.argwhere(rows).tolist() == [[9 - 1 - 7, 1]]


@pytest.mark.parametrize("anatomical", [False, True])
def test_an_arrow_begins_on_the_voxel_it_belongs_to(anatomical):
    """A bright voxel and an arrow at the same index, rendered: the arrow's start covers the voxel."""
    pixels = torch.zeros(7, 9)
    pixels[2, 6] = 1
    field = torch.zeros(7, 9, 2)
    field[2, 6] = torch.tensor([2.0, -3.0])
    _, panels = axes()
    ax = panels[0]
    image(ax, pixels, grid=GRID, anatomical=anatomical)
    arrows(ax, field, grid=GRID, every=1, anatomical=anatomical)
    quiver = ax.collections[0]
    number = int(np.argmax(np.hypot(quiver.U, quiver.V)))
    at_mm = np.array([10 + 2 * 1.0, 20 + 6 * 1.5])
    moves_mm = np.array([2.0, -3.0])
    order = [0, 1] if anatomical else [1, 0]
    assert quiver.XY[number] == pytest.approx(at_mm[order])
    assert (quiver.U[number], quiver.V[number]) == pytest.approx(tuple(moves_mm[order]))
    assert (quiver.angles, quiver.scale_units, quiver.scale) == ("xy", "xy", 1)
    rows, (left, right, bottom, top) = drawn(ax)
    row, column = np.argwhere(rows)[0]
    centre = (
        left + (column + 0.5) * (right - left) / rows.shape[1],
        top + (row + 0.5) * (bottom - top) / rows.shape[0],
    )
    assert centre == pytest.approx(tuple(at_mm[order]))


def test_arrows_are_thinned():
    _, panels = axes()
    arrows(panels[0], np.ones((8, 6, 2)), every=4)
    assert panels[0].collections[0].XY.tolist() == [[2, 2], [2, 6]]  # x is axis 1


@pytest.mark.parametrize("anatomical", [False, True])
def test_grid_lines_are_drawn_where_the_transform_takes_them(anatomical):
    offset = torch.tensor([3.0, -2.0])
    _, panels = axes()
    grid_lines(panels[0], lambda points: points * 2 + offset, GRID, every=3, anatomical=anatomical)
    lines = [np.stack(line.get_data(), -1) for line in panels[0].lines]
    assert len(lines) == 3 + 3  # rows 0, 3, 6 and columns 0, 3, 6
    x = 2 * (10 + 3 * 1.0) + 3  # the line of axis 0, index 3
    y = 2 * (20 + np.arange(9) * 1.5) - 2
    expected = np.stack([np.full(9, x), y], -1)
    assert lines[1] == pytest.approx(expected if anatomical else expected[:, ::-1])


def test_bare_grid_lines_still_have_axis_0_down():
    _, panels = axes(1, 2)
    for ax, anatomical in zip(panels, (False, True), strict=True):
        grid_lines(ax, lambda points: points, GRID, anatomical=anatomical)
        grid_lines(ax, lambda points: points + 1, GRID, anatomical=anatomical)
        assert ax.yaxis_inverted() is not anatomical


def test_field_magnitude_is_the_length_in_mm():
    field = torch.zeros(7, 9, 2)
    field[2, 3] = torch.tensor([3.0, 4.0])
    figure, panels = axes()
    field_magnitude(panels[0], field, grid=GRID)
    values, extent = drawn(panels[0])
    assert values[2, 3] == 5
    assert values.sum() == 5
    assert extent == pytest.approx((19.25, 32.75, 16.5, 9.5))
    assert [ax.get_ylabel() for ax in figure.axes[1:]] == ["displacement, mm"]


def test_composite_is_grey_where_images_agree_and_orange_or_blue_where_not():
    fixed, moved = np.array([[0.0, 4.0], [4.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    colours = composite(fixed, moved)
    assert colours[0, 0].tolist() == [0, 0, 0]
    assert colours[0, 1].tolist() == [1, 1, 1]
    assert colours[1, 0].tolist() == [1, 0.5, 0]
    assert colours[1, 1].tolist() == [0, 0.5, 1]
    assert composite(np.ones((2, 2)), np.ones((2, 2))).max() == 0  # a constant image has no contrast to show


def test_checkerboard_alternates():
    board = checkerboard(np.eye(4) * 0 + [[0, 0, 0, 1]] * 4, torch.tensor([[1.0, 1, 1, 0]] * 4), tiles=2)
    assert board.tolist() == [[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 0, 1], [1, 1, 0, 1]]


def test_image_row_has_one_scale_for_all_images():
    figure = image_row(
        [torch.zeros(3, 4), np.full((3, 4), 5.0), composite(np.eye(3), np.eye(3))], ["a", "b", "c"], bar="mm"
    )
    panels = figure.axes
    assert [ax.get_title() for ax in panels[:3]] == ["a", "b", "c"]
    assert [ax.get_images()[0].get_clim() for ax in panels[:2]] == [(0, 5), (0, 5)]
    assert panels[3].get_ylabel() == "mm"


def test_curves_differ_in_style_as_well_as_in_colour():
    _, panels = axes()
    curve(panels[0], {"a": torch.arange(3), "b": [1, 2, 3]}, x=[0, 10, 20], xlabel="step", ylabel="MSE", log=True)
    a, b = panels[0].lines
    assert a.get_linestyle() != b.get_linestyle()
    assert a.get_color() != b.get_color()
    assert a.get_xdata().tolist() == [0, 10, 20]
    assert panels[0].get_yscale() == "log"
    assert [t.get_text() for t in panels[0].get_legend().get_texts()] == ["a", "b"]


@pytest.mark.parametrize(
    ("draw", "complaint"),
    [
        (lambda ax: image(ax, np.zeros((1, 1, 4, 4))), r"has shape \(n0, n1\) or \(n0, n1, 3\), not \(1, 1, 4, 4\)"),
        (lambda ax: image(ax, np.zeros((9, 7)), grid=GRID), r"the grid has shape \(7, 9\) and what is drawn \(9, 7\)"),
        (lambda ax: arrows(ax, np.zeros((7, 9))), r"has shape \(n0, n1, 2\), not \(7, 9\)"),
        (lambda ax: overlay(ax, np.zeros((2, 3)), np.zeros((3, 2))), r"not \(2, 3\) and \(3, 2\)"),
        (lambda ax: grid_lines(ax, lambda p: p, Grid((3, 3, 3))), "draws 2D grids"),
        (lambda ax: image_row([np.eye(2)], []), "one title an image, not 0 titles for 1 images"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_sentence(draw, complaint):
    with pytest.raises(ValueError, match=complaint):
        draw(axes()[1][0])


def test_tensors_with_history_and_masks_are_drawn():
    _, panels = axes(1, 2)
    image(panels[0], torch.rand(3, 4, requires_grad=True))
    image(panels[1], torch.rand(3, 4) > 0.5)


def test_show_refuses_a_short_alt_text_and_says_the_long_one(capsys):
    figure, _ = axes()
    with pytest.raises(ValueError, match="20 characters or more what the figure shows, not 'curve'"):
        show(figure, alt="curve")
    show(figure, alt="The loss falls by half in ten steps.")
    assert capsys.readouterr().out == "Figure: The loss falls by half in ten steps.\n"


def test_show_closes_a_pyplot_figure():
    import matplotlib.pyplot as plt

    figure, _ = plt.subplots()
    show(figure, alt="An empty figure for the test.")
    assert figure.number not in plt.get_fignums()


def test_a_film_s_frames_keep_their_size_and_other_figures_lose_their_margin():
    figure = Figure(figsize=(4, 3))
    figure.subplots().imshow(np.eye(3))
    kept, cut = (matplotlib.image.imread(io.BytesIO(plotting.png(figure, tight))) for tight in (False, True))
    assert kept.shape[:2] == (3 * plotting.DPI, 4 * plotting.DPI)
    assert cut.shape[1] < kept.shape[1]


def test_the_style_stays_inside_the_course():
    before = dict(matplotlib.rcParams)
    with plotting.style():
        assert matplotlib.rcParams["axes.spines.top"] is False
    assert dict(matplotlib.rcParams) == before


def test_colours_are_told_apart_in_grey_too():
    """Neighbours in the colour cycle differ in luminance, so that they differ in print (ITU-R BT.709)."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    orange, blue = (np.array(matplotlib.colors.to_rgb(c)) @ weights for c in (plotting.ORANGE, plotting.BLUE))
    assert abs(orange - blue) > 0.2
