"""The film: one plain function feeds the strip and the slider, and no failing frame goes unseen."""

import re

import numpy as np
import pytest

from regteach import widgets
from regteach.plotting import image
from regteach.widgets import Film, film, form, sweep, written


@pytest.fixture(autouse=True)
def _no_films(monkeypatch):
    monkeypatch.setattr(widgets, "_live", {})


def draw(ax, value):
    image(ax, np.eye(3) * value, limits=(0, 10), title=f"sum {3 * value:g}")


def shown(live):
    return live.image.value


def test_the_strip_spreads_its_frames_over_the_values(capsys):
    seen = []
    film(
        lambda ax, value: seen.append(value),
        range(0, 101, 10),
        label="x, mm",
        alt="A point moves to the right",
        strip=3,
    )
    assert seen == [0, 50, 100, 50]  # three frames of the strip, and the slider's first
    out = capsys.readouterr().out
    assert out == "Film: A point moves to the right. Frames for x, mm: 0, 50, 100.\n"


def test_a_strip_is_no_longer_than_the_values():
    seen = []
    film(lambda ax, value: seen.append(value), ["affine", "dense"], label="model", alt="Two models side by side.")
    assert seen == ["affine", "dense", "dense"]


def test_every_frame_of_the_strip_has_its_value_above_the_drawing_s_own_title(monkeypatch):
    figures = []
    monkeypatch.setattr(widgets, "png", lambda figure, tight=True: (figures.append(figure), b"\x89PNG" + bytes(20))[1])
    film(draw, [1, 2.5], label="k", alt="A line gets brighter.")
    strip = figures[-1]
    assert [ax.get_title() for ax in strip.axes] == ["1\nsum 3", "2.5\nsum 7.5"]
    assert strip.get_suptitle() == "k"


def test_moving_the_slider_redraws_the_image():
    live = Film(draw, [1, 5, 9], "k", "A line gets brighter.", (1, 1))
    before = shown(live)
    live.slider.value = 2
    assert shown(live) != before
    assert 'alt="A line gets brighter. k: 9."' in shown(live)
    live.slider.value = 1
    assert shown(live) == before


def test_the_slider_draws_one_frame_only_until_it_is_moved():
    seen = []
    live = Film(lambda ax, value: seen.append(value), range(9), "k", "Nothing is drawn here.", (1, 1))
    assert seen == [4]
    assert live.sweep() == 9
    assert sorted(seen[1:]) == list(range(9))
    assert live.slider.value == 4


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_a_frame_that_fails_is_shown_and_raised_by_the_sweep(bad):
    def fails(ax, value):
        if value == bad:
            raise ZeroDivisionError(f"at <{value}>")

    live = Film(fails, range(5), "k", "Nothing is drawn here.", (1, 1))
    live.slider.value = bad
    assert isinstance(live.error, ZeroDivisionError)
    assert "This frame failed.</strong> ZeroDivisionError: at &lt;" in shown(live)
    live.slider.value = 4
    assert live.error is None
    with pytest.raises(
        RuntimeError, match=re.escape(f"the film 'k' cannot draw the value {bad}: ZeroDivision")
    ) as raised:
        live.sweep()
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_the_sweep_sees_a_failure_in_the_frame_the_slider_starts_on():
    def fails(ax, value):
        if value == 1:
            raise ValueError("middle")

    live = Film(fails, range(3), "k", "Nothing is drawn here.", (1, 1))
    assert live.error is not None
    with pytest.raises(RuntimeError, match="cannot draw the value 1: ValueError: middle"):
        live.sweep()


def test_sweep_visits_all_films_and_a_cell_run_again_replaces_its_own(capsys):
    for _ in range(2):
        film(draw, [1, 2, 3], label="k", alt="A line gets brighter.")
    film(draw, [1, 2], label="k", alt="Another line gets brighter.")
    capsys.readouterr()
    sweep()
    assert capsys.readouterr().out == "Sweep: films 2, frames drawn 5.\n"


def test_sweep_without_films_says_so(capsys):
    sweep()
    assert capsys.readouterr().out == "Sweep: films 0, frames drawn 0.\n"


def test_sweep_raises_what_a_film_raises():
    def fails(ax, value):
        if value == 3:  # not in the strip, so that only the sweep can find it
            raise ValueError("three")

    film(fails, range(9), label="k", alt="Nothing is drawn here.", strip=2)
    with pytest.raises(RuntimeError, match="cannot draw the value 3"):
        sweep()


def test_a_strip_that_fails_raises_at_once():
    with pytest.raises(ZeroDivisionError):
        film(lambda ax, value: 1 / value, [0, 1], label="k", alt="Nothing is drawn here.")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"values": [1]}, "two values and two frames at least, not 1 and 5"),
        ({"strip": 1}, "two values and two frames at least, not 3 and 1"),
        ({"alt": "film"}, "20 characters or more"),
    ],
)
def test_films_written_wrongly_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        film(draw, **{"values": [1, 2, 3], "label": "k", "alt": "A line gets brighter.", **options})


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1"), (0.5, "0.5"), (1 / 3, "0.333"), (np.float32(2.5), "2.5"), ("affine", "affine"), (True, "True")],
)
def test_values_are_written_shortly(value, text):
    assert written(value) == text


FIELDS = {"at, mm": (0, 10), "length, mm": None}
EXAMPLES = {"short": (2.0, 1.0), "long": (3.0, 8.0)}


def draw_length(ax, numbers):
    if numbers[1] > 100:
        raise ValueError("a length is at most 100 mm")
    ax.plot([0, numbers[0]], [0, numbers[1]])


def live_form():
    return widgets.Form(draw_length, EXAMPLES, FIELDS, "example", "A line of that length.", (1, 1))


def test_a_form_shows_its_examples_as_a_strip_and_is_swept(capsys):
    form(draw_length, EXAMPLES, FIELDS, label="example", alt="A line of that length")
    assert capsys.readouterr().out == "Film: A line of that length. Frames for example: short, long.\n"
    sweep()
    assert capsys.readouterr().out == "Sweep: films 1, frames drawn 2.\n"


def test_an_example_fills_the_fields_and_a_typed_number_draws_anew():
    live = live_form()
    live.slider.value = 0
    assert live.numbers == (2.0, 1.0)
    before = shown(live)
    live.fields[1].value = 5.0
    assert 'alt="A line of that length. at, mm: 2, length, mm: 5."' in shown(live)
    assert shown(live) != before
    live.slider.value = 1
    assert live.numbers == (3.0, 8.0)
    assert 'alt="A line of that length. example: long."' in shown(live)


def test_numbers_that_can_not_be_drawn_are_said_and_the_next_ones_draw():
    live = live_form()
    live.fields[1].value = 1000.0
    assert "This can not be drawn.</strong> ValueError: a length is at most 100 mm" in shown(live)
    live.fields[1].value = 4.0
    assert "length, mm: 4." in shown(live)


def test_a_form_needs_two_examples_with_a_number_for_each_field():
    with pytest.raises(ValueError, match="a number for each of its 2 fields"):
        form(draw_length, {"a": (1.0,), "b": (1.0, 2.0)}, FIELDS, label="example", alt="A line of that length.")
    with pytest.raises(ValueError, match="two examples"):
        form(draw_length, {"a": (1.0, 2.0)}, FIELDS, label="example", alt="A line of that length.")
