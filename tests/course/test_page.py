"""Outputs and Markdown made into HTML that needs nothing else."""

import base64
from pathlib import Path

import nbformat
import pytest

from regteach.course.page import Page, mathematics

PNG = base64.b64encode(b"\x89PNG").decode()


def shown(*outputs, source="1", folder="."):
    page = Page(Path(folder))
    page.add_cells([nbformat.v4.new_code_cell(source, id="a", outputs=list(outputs))])
    return "".join(page.parts)


def data(bundle, **metadata):
    return nbformat.v4.new_output("display_data", bundle, metadata=metadata)


def test_the_richest_form_without_a_kernel_is_shown():
    view = "application/vnd.jupyter.widget-view+json"
    both = shown(data({view: {"model_id": "x"}, "text/html": "<p>strip</p>", "text/plain": "VBox()"}))
    assert "<p>strip</p>" in both
    assert "VBox" not in both
    assert "VBox" not in shown(data({view: {"model_id": "x"}, "text/plain": "VBox()"}))
    assert "a &lt; b" in shown(data({"text/plain": "a < b"}))
    assert '<img alt="A &lt;b&gt; seen"' in shown(data({"image/png": PNG}, **{"image/png": {"alt": "A <b> seen"}}))
    assert "<math" in shown(data({"text/latex": "$$x$$", "text/plain": "x"}))


def test_what_was_printed_in_pieces_is_one_block():
    def said(text, name="stdout"):
        return nbformat.v4.new_output("stream", text=text, name=name)

    page = shown(said("one, "), said("two"), said("oh", "stderr"), said("three"))
    assert page.count('<pre class="output"') == 3
    assert "one, two</pre>" in page


def test_streams_and_errors_lose_their_terminal_colours():
    stream = nbformat.v4.new_output("stream", text="\x1b[31mred\x1b[0m & <b>")
    error = nbformat.v4.new_output("error", ename="E", evalue="x", traceback=["\x1b[1mE\x1b[0m: <x>"])
    page = shown(stream, error)
    assert "\x1b" not in page
    assert "&amp; &lt;b&gt;" in page
    assert "&lt;x&gt;" in page


def test_scripts_and_what_other_hosts_hold_are_dropped():
    page = Page(Path("."))
    page.add(
        '<p>a<script src="https://x.invalid/a.js">alert(1)</script><link rel="x" href="https://x.invalid">b</p><br>c'
    )
    assert "".join(page.parts) == "<p>ab</p><br>c"
    with pytest.raises(ValueError, match=r"the image https://x\.invalid/a\.png is not a file beside the notebook"):
        page.add('<img src="https://x.invalid/a.png">')


def test_pictures_beside_the_notebook_move_into_the_page(tmp_path):
    (tmp_path / "a b.png").write_bytes(b"\x89PNG")
    page = Page(tmp_path)
    page.add_markdown("![What it shows](a%20b.png)")
    assert f'alt="What it shows" src="data:image/png;base64,{PNG}"' in "".join(page.parts).replace(" title=", "")


def test_mathematics_in_text_only():
    page = Page(Path("."))
    page.add_markdown("A $x_1 < y$ and `$code$`, \\$5 or $6 here.\n\n```\n$no$\n```\n\n$$\\frac{a}{b}$$\n")
    made = "".join(page.parts)
    assert made.count("<math") == 2
    assert 'alttext="x_1 &lt; y"' in made
    assert 'display="block"' in made
    assert "<code>$code$</code>" in made
    assert "$no$" in made
    assert "$5 or $6 here" in made


def test_a_prime_stays_beside_its_letter():
    for latex in ("M'", "f'_i", "M'_{ij}", "x''", r"x^{\prime}", "u'(x)"):
        made = mathematics(latex, block=False)
        assert "sup>" not in made, latex
        assert "<mo>&#x0203" in made, latex
    assert "msubsup" in mathematics("A_k^2", block=False)  # what is no prime stays as it is


@pytest.mark.parametrize("latex", [r"\begin{aligned} a &= b \\ c &= d \end{aligned}", r"\unheardof{x}", r"\left( x"])
def test_mathematics_that_is_not_known_is_an_error(latex):
    with pytest.raises(ValueError, match=r"latex2mathml|cannot be shown"):
        mathematics(latex, block=True)


@pytest.mark.parametrize(
    "latex",
    [
        r"\hat{u}(x) = \sum_{i=1}^{n} w_i\, \beta^3\!\left(\frac{x - c_i}{h}\right)",
        r"\nabla u = \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}, \quad \|u\|_2^2 \leq \varepsilon",
        r"\phi \circ \psi : \mathbb{R}^d \to \mathbb{R}^d, \quad x \mapsto \mathcal{L}(\phi(x))",
        r"\text{MSE} = \frac{1}{|\Omega|} \int_\Omega (f - m \circ \phi)^2 \, \mathrm{d}x, \quad \det J > 0",
        r"\mathbf{A}^{\top} \mathbf{b}, \; \mathrm{arg\,min}_\theta \; \operatorname{tr}(M)",
        r"\sqrt[3]{x} \; \bar{x} \pm \sigma",
    ],
)
def test_the_mathematics_of_registration_is_known(latex):
    assert "\\" not in mathematics(latex, block=True).split(">", 1)[1]


def test_headings_keep_their_anchors_and_lose_their_pilcrows():
    page = Page(Path("."))
    page.add_markdown("# One\n\n## Two words and $x$\n\ntext\n\n## `code`")
    assert page.headings == [("Two-words-and-$x$", "Two words and $x$"), ("code", "code")]
    assert "anchor-link" not in "".join(page.parts)


def test_wide_things_scroll_by_keyboard_too():
    page = Page(Path("."))
    page.add_markdown("| a | b |\n|---|---|\n| 1 | 2 |")
    assert '<div class="scroll" tabindex="0"><table>' in "".join(page.parts)
    assert '<pre tabindex="0">' in shown(source="x = 1")
