"""A slider and a film strip from one plain function, and the sweep that proves every slider position draws.

`film(draw, values, ...)` shows in JupyterLab a slider whose image is drawn again at each move, and everywhere else
(print, the site, no kernel) a strip of frames. `form` does the same for numbers that a student may type. There is no
Output widget and no `interact`, so that the same function can be called by a test. An exception in the slider's
callback would vanish in the kernel's log: it is kept, shown in place of the image, and raised by `sweep`.
"""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
from matplotlib.axes import Axes

from regteach.plotting import DPI, axes, png, style
from regteach.records import check_alt, picture, publish

Draw = Callable[[Axes, Any], None]


class Film:
    """One live film: the slider, the image it redraws, and the last exception of the drawing, if any.

    Args:
        draw: draws one frame for a value on the given axes.
        values: what the slider takes, in order.
        label: what the value is, with its unit: "rotation, degrees".
        alt: what the film shows.
        figsize: of one frame, inches.
    """

    def __init__(self, draw: Draw, values: Sequence[Any], label: str, alt: str, figsize: tuple[float, float]) -> None:
        self.draw, self.values, self.label, self.alt, self.figsize = draw, list(values), label, alt, figsize
        self.error: Exception | None = None
        self.slider = ipywidgets.SelectionSlider(
            options=[(written(value), number) for number, value in enumerate(self.values)],
            value=len(self.values) // 2,
            description=label,
            style={"description_width": "initial"},
            layout={"width": "28em", "max_width": "100%"},
        )
        self.image = ipywidgets.HTML()  # not ipywidgets.Image, which takes no alt text
        self.box = ipywidgets.VBox([self.slider, self.image])
        self.slider.observe(self._redraw, names="value")
        self._redraw()

    def frame(self, value: Any) -> str:
        """Draw the frame of one value as an HTML image."""
        figure, panels = axes(1, 1, *self.figsize)
        with style():
            self.draw(panels[0], value)
        return picture(png(figure, tight=False), f"{self.alt} {self.label}: {written(value)}.", DPI)

    def sweep(self) -> int:
        """Move the slider over all its values.

        Returns:
            How many frames were drawn.

        Raises:
            RuntimeError: a frame could not be drawn; its cause is the exception of the drawing function.
        """
        start = self.slider.value
        order = [n for n in range(len(self.values)) if n != start] + [start]
        for number in order:
            self.slider.value = number
            if self.error is not None:
                raise RuntimeError(
                    f"the film {self.label!r} cannot draw the value {written(self.values[number])}: {_said(self.error)}"
                ) from self.error
        return len(order)

    def _redraw(self, change: Any = None) -> None:
        try:
            self.image.value = self.frame(self.values[self.slider.value])
        except Exception as error:  # kept for sweep and shown to the student
            self.error = error
            self.image.value = f"<p><strong>This frame failed.</strong> {html.escape(_said(error))}</p>"
        else:
            self.error = None


Numbers = tuple[float, ...]


class Form(Film):
    """A film of numbers that a student may change: its slider sets them to an example, and typing draws anew.

    Args:
        draw: draws the picture of some numbers on the given axes.
        examples: what the slider takes, by name.
        fields: for each number what it is, with its unit, and its range, for a slider of its own; None for a text box.
        label: what the slider chooses.
        alt: what the picture shows.
        figsize: inches.
    """

    def __init__(
        self,
        draw: Callable[[Axes, Numbers], None],
        examples: Mapping[str, Numbers],
        fields: Mapping[str, tuple[float, float] | None],
        label: str,
        alt: str,
        figsize: tuple[float, float],
    ) -> None:
        self.examples, self.fields, self.setting = dict(examples), [], False
        layout = {"style": {"description_width": "initial"}, "layout": {"width": "28em", "max_width": "100%"}}
        for name, span in fields.items():
            if span is None:
                field = ipywidgets.FloatText(description=name, continuous_update=False, **layout)
            else:
                low, high = span
                field = ipywidgets.FloatSlider(
                    min=low, max=high, value=low, step=1, description=name, continuous_update=False, **layout
                )
            self.fields.append(field)
        super().__init__(lambda ax, name: draw(ax, self.examples[name]), list(examples), label, alt, figsize)
        self.draw_numbers = draw
        self.box.children = (self.slider, *self.fields, self.image)
        for field in self.fields:
            field.observe(self._typed, names="value")

    @property
    def numbers(self) -> Numbers:
        """What stands in the fields."""
        return tuple(float(field.value) for field in self.fields)

    def _redraw(self, change: Any = None) -> None:
        self.setting = True  # else every field would draw, one after the other
        for field, number in zip(self.fields, self.examples[self.values[self.slider.value]], strict=True):
            field.value = number
        self.setting = False
        super()._redraw(change)

    def _typed(self, change: Any) -> None:
        if self.setting:
            return
        try:
            figure, panels = axes(1, 1, *self.figsize)
            with style():
                self.draw_numbers(panels[0], self.numbers)
            typed = ", ".join(
                f"{field.description}: {written(number)}"
                for field, number in zip(self.fields, self.numbers, strict=True)
            )
            self.image.value = picture(png(figure, tight=False), f"{self.alt} {typed}.", DPI)
        except Exception as error:  # numbers that no picture can be drawn of: said in its place, and the next may do
            self.image.value = f"<p><strong>This can not be drawn.</strong> {html.escape(_said(error))}</p>"


_live: dict[tuple[str, str], Film] = {}


def film(
    draw: Draw,
    values: Sequence[Any],
    *,
    label: str,
    alt: str,
    strip: int = 5,
    figsize: tuple[float, float] = (2.4, 2.4),
) -> None:
    """Show a film: a slider in JupyterLab, a strip of frames in print, on the site and without a kernel.

    Args:
        draw: `draw(ax, value)` draws one frame; it is plain, quick, and changes nothing else.
        values: what the slider takes, in order: numbers or names.
        label: what the value is, with its unit: "rotation, degrees".
        alt: what the film shows, at least 20 characters.
        strip: how many frames the strip has, spread evenly over the values.
        figsize: of one frame, inches.

    Raises:
        ValueError: no values, a strip shorter than two frames, or too short an alt text.
        Exception: whatever `draw` raises on a frame of the strip.
    """
    values = list(values)
    if len(values) < 2 or strip < 2:
        raise ValueError(f"a film needs two values and two frames at least, not {len(values)} and {strip}")
    alt = _sentence(alt)
    _publish(draw, values, label, alt, strip, figsize, lambda: Film(draw, values, label, alt, figsize))


def form(
    draw: Callable[[Axes, Numbers], None],
    examples: Mapping[str, Numbers],
    fields: Mapping[str, tuple[float, float] | None],
    *,
    label: str,
    alt: str,
    figsize: tuple[float, float] = (2.4, 2.4),
) -> None:
    """Show numbers that a student may type, and what they make: live in JupyterLab, elsewhere a strip of the examples.

    Args:
        draw: `draw(ax, numbers)` draws the picture of some numbers; it is plain and changes nothing else.
        examples: the frames of the strip, each a name and its numbers. Their slider fills the fields.
        fields: what each number is, with its unit, and its smallest and largest value, for a slider; None for a box.
        label: what the examples are.
        alt: what the picture shows, at least 20 characters.
        figsize: of one frame, inches.

    Raises:
        ValueError: fewer than two examples, one with too many or too few numbers, or too short an alt text.
        Exception: whatever `draw` raises on an example.
    """
    wrong = [name for name, numbers in examples.items() if len(numbers) != len(fields)]
    if len(examples) < 2 or wrong:
        raise ValueError(f"a form needs two examples, with a number for each of its {len(fields)} fields")
    names, alt = list(examples), _sentence(alt)

    def frame(ax: Axes, name: str) -> None:
        draw(ax, examples[name])

    _publish(frame, names, label, alt, len(names), figsize, lambda: Form(draw, examples, fields, label, alt, figsize))


def _sentence(alt: str) -> str:
    check_alt(alt)
    return alt.strip().removesuffix(".") + "."


def _publish(
    draw: Draw,
    values: Sequence[Any],
    label: str,
    alt: str,
    strip: int,
    figsize: tuple[float, float],
    make: Callable[[], Film],
) -> None:
    """Show the strip of a film, with the live one for JupyterLab."""
    chosen = np.unique(np.linspace(0, len(values) - 1, min(strip, len(values))).round().astype(int))
    figure, panels = axes(1, len(chosen), *figsize)
    with style():
        for ax, number in zip(panels, chosen, strict=True):
            draw(ax, values[number])
            ax.set_title("\n".join(filter(None, [written(values[number]), ax.get_title()])))
        figure.suptitle(label)
    live = _live[label, alt] = make()
    frames = ", ".join(written(values[number]) for number in chosen)
    described = f"{alt} Frames for {label}: {frames}."
    publish(
        picture(png(figure), described, DPI),
        f"Film: {described}",
        {"kind": "figure", "alt": described, "film": {"label": label, "values": len(values)}},
        widget=live.box,
    )


def sweep() -> None:
    """Move the slider of every film shown so far over all its values, and record how many frames were drawn.

    Raises:
        RuntimeError: a frame could not be drawn.
    """
    counts = {"films": len(_live), "frames": sum(live.sweep() for live in _live.values())}
    text = f"Sweep: films {counts['films']}, frames drawn {counts['frames']}."
    publish(f"<p>{text}</p>", text, {"kind": "sweep", **counts})


def written(value: Any) -> str:
    """Write a film's value: a number with three significant digits at most, anything else as its text."""
    return f"{value:.3g}" if isinstance(value, int | float | np.number) and not isinstance(value, bool) else str(value)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
