"""From an executed notebook to HTML that needs nothing else: no script, no kernel, no network.

Mathematics becomes MathML here, widgets give way to the HTML beside them (the film strip), and relative images move
into the page. nbconvert's filters do Markdown and code; the rest is a pass over the resulting tags.
"""

import base64
import html
import mimetypes
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from latex2mathml.converter import convert
from nbconvert.filters import Highlight2HTML, ansi2html
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from regteach.course.execute import SWEEP_TAG

HIDDEN_TAGS = {SWEEP_TAG, "injected-parameters"}
MATHEMATICS = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<!\\)\$(?P<inline>[^\s$](?:[^$]*[^\s$])?)\$(?!\d)", re.DOTALL)
_DROPPED = {"script", "link", "iframe", "object", "embed", "base"}
_VERBATIM = {"code", "pre", "style", "math", "svg", "textarea"}
_VOID = {"area", "br", "col", "hr", "img", "input", "source", "wbr"} | {"link", "embed", "base"}


@dataclass
class Page:
    """The body of a page as it grows.

    Args:
        folder: where relative images are looked for.
        link: maps the target of a relative link to its address on the site.
    """

    folder: Path
    link: Callable[[str], str] = lambda target: target
    parts: list[str] = field(default_factory=list)
    headings: list[tuple[str, str]] = field(default_factory=list)  # of level 2: id and text
    styles: set[str] = field(default_factory=set)

    def add(self, piece: str) -> None:
        """Add HTML: mathematics, links and images in it are made ready for the site."""
        rewriter = _Rewriter(self)
        rewriter.feed(piece)
        rewriter.close()
        self.parts.append("".join(rewriter.out))

    def add_markdown(self, text: str, attachments: dict[str, Any] | None = None) -> None:
        """Add Markdown with `$mathematics$`."""
        renderer = IPythonRenderer(escape=False, attachments=attachments or {}, anchor_link_text="")
        self.add(MarkdownWithMath(renderer=renderer).render(text))

    def add_cells(self, cells: Iterable[Any]) -> None:
        """Add the cells of an executed notebook, each in an element with the id `cell-` and its own id."""
        for cell in cells:
            if HIDDEN_TAGS & set(cell["metadata"].get("tags", ())):
                continue
            try:
                self._add_cell(cell)
            except ValueError as error:
                raise ValueError(f"cell {cell.get('id')}: {error}") from error

    def _add_cell(self, cell: Any) -> None:
        kind = "text" if cell["cell_type"] == "markdown" else "code"
        self.parts.append(f'<div class="cell {kind}" id="cell-{html.escape(cell.get("id", ""))}">\n')
        if kind == "text":
            self.add_markdown(cell["source"], cell.get("attachments"))
        else:
            self.add(Highlight2HTML(pygments_lexer="ipython3")(cell["source"]))
            for output in _joined(cell.get("outputs", ())):
                self.add_output(output)
        self.parts.append("</div>\n")

    def add_output(self, output: Any) -> None:
        """Add one output of a code cell in the richest form that needs no kernel."""
        if output["output_type"] == "stream":
            self.parts.append(f'<pre class="output" tabindex="0">{ansi2html(output["text"])}</pre>\n')
        elif output["output_type"] == "error":
            text = ansi2html("\n".join(output["traceback"]))
            self.parts.append(f'<pre class="output error" tabindex="0">{text}</pre>\n')
        else:
            self.parts.append('<div class="output">')
            self._add_data(output["data"], output["metadata"])
            self.parts.append("</div>\n")

    def _add_data(self, data: dict[str, Any], metadata: dict[str, Any]) -> None:
        for mime in ("text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex"):
            if mime not in data:
                continue
            if mime == "text/markdown":
                self.add_markdown(data[mime])
            elif mime in ("image/png", "image/jpeg"):
                alt = metadata.get(mime, {}).get("alt") or metadata.get("alt") or ""
                self.parts.append(f'<img alt="{html.escape(alt)}" src="data:{mime};base64,{data[mime].strip()}">')
            else:
                self.add(data[mime])
            return
        if "text/plain" in data and not any("widget" in mime for mime in data):
            self.parts.append(f'<pre tabindex="0">{html.escape(data["text/plain"])}</pre>')


def _joined(outputs: Iterable[Any]) -> list[Any]:
    """Outputs in their order; what was printed in several pieces, without anything in between, in one."""
    found: list[Any] = []
    for output in outputs:
        last = found[-1] if found else {}
        if output["output_type"] == last.get("output_type") == "stream" and output["name"] == last["name"]:
            found[-1] = {**last, "text": last["text"] + output["text"]}
        else:
            found.append(output)
    return found


def ready(piece: str) -> str:
    """Make a short piece of HTML ready for the site: its mathematics becomes MathML."""
    page = Page(Path())
    page.add(piece)
    return "".join(page.parts)


def mathematics(latex: str, block: bool) -> str:
    """Turn LaTeX into MathML.

    Args:
        latex: without its dollars.
        block: on a line of its own.

    Raises:
        ValueError: latex2mathml does not know it.
    """
    latex = latex.strip()
    try:
        made = convert(latex, display="block" if block else "inline")
    except Exception as error:
        raise ValueError(f"this mathematics cannot be shown ({type(error).__name__}): {latex}") from error
    unknown = re.search(r"\\[A-Za-z]+|\\\\|(?<=<mi>)&(?=</mi>)", made)
    if unknown:
        raise ValueError(f"{unknown.group()} is unknown to latex2mathml: {latex}")
    return _primes_in_line(made).replace("<math ", f'<math alttext="{html.escape(latex)}" ', 1)


_PRIME = r"(?:<mrow>)?<mi>(&#x0203[23];)</mi>(?:</mrow>)?"


def _primes_in_line(made: str) -> str:
    """A prime is drawn raised already; as an exponent it would fly far above its letter."""
    letter = r"(<mi[^<]*</mi>)"
    made = re.sub(rf"<msup>{letter}{_PRIME}</msup>", r"<mrow>\1<mo>\2</mo></mrow>", made)
    index = r"(<m[in]>[^<]*</m[in]>|<mrow>(?:<m[ino]>[^<]*</m[ino]>)*</mrow>)"
    return re.sub(rf"<msubsup>{letter}{index}{_PRIME}</msubsup>", r"<msub><mrow>\1<mo>\3</mo></mrow>\2</msub>", made)


class _Rewriter(HTMLParser):
    """Copies HTML, changing text nodes and some tags on the way."""

    def __init__(self, page: Page) -> None:
        super().__init__(convert_charrefs=False)
        self.page, self.out = page, []  # type: tuple[Page, list[str]]
        self._text: list[str] = []
        self._open: list[str] = []
        self._heading: tuple[str, list[str]] | None = None
        self._skipping = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._flush()
        given = {name: value or "" for name, value in attributes}
        if tag in _DROPPED or self._skipping or given.get("class") == "anchor-link":
            self._skipping += tag not in _VOID
            return
        raw = self.get_starttag_text() or ""
        if tag not in _VOID and not raw.endswith("/>"):
            self._open.append(tag)
        if tag == "h2":
            self._heading = given.get("id", ""), []
        if tag == "table":
            self.out.append('<div class="scroll" tabindex="0">')
        if tag == "a" and "href" in given:
            raw = _tag("a", {**given, "href": self._target(given["href"])})
        elif tag == "img":
            raw = _tag("img", {"alt": "", **given, "src": self._source(given.get("src", ""))})
        elif tag == "pre":
            raw = _tag("pre", {"tabindex": "0", **given})
        self.out.append(raw)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        before = self._skipping
        self.handle_starttag(tag, attributes)
        self._skipping = before

    def handle_endtag(self, tag: str) -> None:
        self._flush()
        if self._skipping:
            self._skipping -= tag not in _VOID
            return
        if tag in self._open:
            del self._open[len(self._open) - 1 - self._open[::-1].index(tag)]
        self.out.append(f"</{tag}>" + ("</div>" if tag == "table" else ""))
        if tag == "h2" and self._heading:
            self.page.headings.append((self._heading[0], "".join(self._heading[1]).strip()))
            self._heading = None

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    def handle_entityref(self, name: str) -> None:
        self._text.append(f"&{name};")

    def handle_charref(self, name: str) -> None:
        self._text.append(f"&#{name};")

    def close(self) -> None:
        super().close()
        self._flush()

    def _flush(self) -> None:
        text, self._text = "".join(self._text), []
        if not text or self._skipping:
            return
        if self._heading is not None:
            self._heading[1].append(html.unescape(text))
        if "style" in self._open:  # the same style sheet comes with every line of a lesson; one is enough
            text = "" if text in self.page.styles else text
            self.page.styles.add(text)
        elif not _VERBATIM & set(self._open):
            text = MATHEMATICS.sub(_as_mathml, text)
        self.out.append(text)

    def _target(self, target: str) -> str:
        return target if urlsplit(target).scheme or target.startswith("#") else self.page.link(target)

    def _source(self, source: str) -> str:
        if source.startswith("data:"):
            return source
        path = self.page.folder / unquote(source)
        if urlsplit(source).scheme or not path.is_file():
            raise ValueError(f"the image {source} is not a file beside the notebook")
        kind = mimetypes.guess_type(path.name)[0] or "image/png"
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _as_mathml(match: re.Match[str]) -> str:
    return mathematics(html.unescape(match["block"] or match["inline"]), block=match["block"] is not None)


def _tag(name: str, attributes: dict[str, str]) -> str:
    pairs = [f'{key}="{html.escape(value)}"' for key, value in attributes.items()]
    return f"<{' '.join([name, *pairs])}>"
