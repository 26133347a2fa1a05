"""A slider and a film strip from one plain function, and the sweep that proves every slider position draws.

`film(draw, values, ...)` shows in JupyterLab a slider whose image is drawn again at each move, and everywhere else
(print, the site, no kernel) a strip of frames. There is no Output widget and no `interact`, so that the same
function can be called by a test. An exception in the slider's callback would vanish in the kernel's log: it is
kept, shown in place of the image, and raised by `sweep`.
"""

import html
from collections.abc import Callable, Sequence
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
    check_alt(alt)
    alt = alt.strip().removesuffix(".") + "."
    values = list(values)
    if len(values) < 2 or strip < 2:
        raise ValueError(f"a film needs two values and two frames at least, not {len(values)} and {strip}")
    chosen = np.unique(np.linspace(0, len(values) - 1, min(strip, len(values))).round().astype(int))
    figure, panels = axes(1, len(chosen), *figsize)
    with style():
        for ax, number in zip(panels, chosen, strict=True):
            draw(ax, values[number])
            ax.set_title("\n".join(filter(None, [written(values[number]), ax.get_title()])))
        figure.suptitle(label)
    live = _live[label, alt] = Film(draw, values, label, alt, figsize)
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
