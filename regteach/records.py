"""What a lesson shows and what it records travel together: one display output with the record in its metadata.

An executed notebook therefore carries its own evidence. `publish` writes an output; `records` and `figures`
read them back from an nbformat notebook, so that the course runner and the site need no other file.
"""

import base64
import html
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

KEY = "regteach"
SHORTEST_ALT = 20
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

Record = dict[str, Any]


def publish(page: str, text: str, record: Record, widget: Any = None) -> None:
    """Show one output, with its record in the output's metadata.

    Outside IPython the plain text is printed, and nothing else happens.

    Args:
        page: HTML, for JupyterLab and the site.
        text: the same in plain text, for a terminal.
        record: JSON-ready facts; `record["kind"]` says which.
        widget: an ipywidget that JupyterLab shows in place of the HTML while a kernel runs.
    """
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is None:
        print(text)
        return
    bundle: dict[str, Any] = {"text/html": page, "text/plain": text}
    if widget is not None:
        bundle = {WIDGET_VIEW: widget._repr_mimebundle_()[WIDGET_VIEW], **bundle}
    display(bundle, raw=True, metadata={KEY: record})


def records(notebook: Mapping[str, Any]) -> list[Record]:
    """Collect the records of an executed notebook, in the order in which its cells made them.

    Args:
        notebook: an nbformat version 4 notebook, as read by `nbformat.read`.

    Returns:
        One plain dictionary a record, each with the id of its cell under "cell".
    """
    found = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            record = output.get("metadata", {}).get(KEY)
            if record is not None:
                found.append({**json.loads(json.dumps(record)), "cell": cell.get("id")})
    return found


def check_alt(alt: str) -> None:
    """Refuse an alt text that says too little.

    Raises:
        ValueError: fewer than 20 characters.
    """
    if len(alt.strip()) < SHORTEST_ALT:
        raise ValueError(f"alt text must say in {SHORTEST_ALT} characters or more what the figure shows, not {alt!r}")


def picture(png: bytes, alt: str, dpi: float) -> str:
    """Write a PNG as an HTML figure that holds its own data and its alt text.

    JupyterLab and nbconvert drop the alt text of an image/png output, so figures are shown as HTML.

    Args:
        png: the file's bytes.
        alt: what the figure shows.
        dpi: the picture's pixels an inch; the page shows it at 96.
    """
    width = round(int.from_bytes(png[16:20], "big") * 96 / dpi)  # a PNG's width stands in bytes 16 to 19
    data = base64.b64encode(png).decode()
    return (
        f'<figure style="margin: 0.4em 0"><img alt="{html.escape(alt)}" width="{width}"'
        ' style="max-width: 100%; height: auto"'
        f' src="data:image/png;base64,{data}"></figure>'
    )


class Figure(NamedTuple):
    """A figure of an executed notebook: the PNG's bytes, the alt text, and the id of the cell that drew it."""

    png: bytes
    alt: str
    cell: str


def figures(notebook: Mapping[str, Any]) -> list[Figure]:
    """Collect the figures of an executed notebook, in order."""
    found = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            record = output.get("metadata", {}).get(KEY, {})
            if record.get("kind") == "figure":
                match = re.search(r'src="data:image/png;base64,([^"]+)"', output["data"]["text/html"])
                if match is not None:
                    found.append(Figure(base64.b64decode(match[1]), record["alt"], cell.get("id", "")))
    return found
