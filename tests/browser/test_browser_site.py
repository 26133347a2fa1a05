"""The site in a real browser: from disk, without a network, wide and narrow, light and dark.

It is looked at twice: a site of one tiny lesson, and the course's own where it has been built.
"""

import io

import pytest
from course.minicourse import FIGURE, FILM, MATHS, make_course
from rich.console import Console

from regteach.course import run, site
from regteach.course.layout import Course

LOCAL = r"file:|data:"
WIDE_CELL = ("wide", "print('wide ' * 200)\nx = " + " + ".join(["1"] * 100))
WIDE_TABLE = "| a | b |\n|---|---|\n| " + "x" * 200 + " | 1 |"
WIDE_TEXT = ("text-wide", f"## Wide\n\n{WIDE_TABLE}\n\n$${' + '.join(['x^2'] * 60)}$$")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    course = make_course(tmp_path_factory.mktemp("course"), MATHS, FIGURE, FILM, WIDE_CELL, WIDE_TEXT)
    run.run(course.files(), run.Settings(), Console(file=io.StringIO()))
    return site.build(course).parent


@pytest.fixture(params=["tiny", "course"])
def folder(request):
    if request.param == "tiny":
        return request.getfixturevalue("tiny")
    own = Course().build / "site"
    if not (own / "index.html").exists():
        pytest.skip("the course's own site is not built; python -m regteach course builds it")
    return own


@pytest.mark.parametrize("width", [390, 1100, 1500])
def test_every_page_opens_from_disk_and_fits_the_window(visit, folder, width):
    seen = visit(LOCAL, viewport={"width": width, "height": 900}, offline=True)
    for path in sorted(folder.glob("*.html")):
        seen.page.goto(path.as_uri())
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width, path.name
        bare = "all => all.filter(image => image.alt.length < 20 || !image.naturalWidth).length"
        assert seen.page.eval_on_selector_all("img", bare) == 0, path.name
        assert "$$" not in seen.page.inner_text("main"), path.name
    assert seen.asked == []
    assert seen.errors == []


def test_the_index_leads_to_lessons_and_back(visit, folder):
    page = visit(LOCAL).page
    page.goto((folder / "index.html").as_uri())
    titles = page.locator(".card h2 a").all_inner_texts()
    assert titles
    for title in titles:
        page.get_by_role("link", name=title, exact=True).click()
        assert page.locator("h1").count() == 1
        page.get_by_role("link", name="regteach", exact=True).click()
        assert page.url.endswith("/index.html")


def test_a_claim_leads_to_the_cell_that_made_it(visit, tiny):
    page = visit(LOCAL, viewport={"width": 1100, "height": 300}).page
    page.goto((tiny / "90_tiny.html").as_uri())
    page.locator(".summary summary").click()
    page.get_by_role("link", name="Two squared").click()
    assert page.url.endswith("#cell-claim-square")
    assert 0 <= page.locator("#cell-claim-square").bounding_box()["y"] < 300


def test_mathematics_is_laid_out(visit, tiny):
    page = visit(LOCAL).page
    page.goto((tiny / "90_tiny.html").as_uri())
    power = "document.querySelector('math[display=block] msup')"
    low, high = (page.evaluate(f"{power}.children[{i}].getBoundingClientRect().top") for i in (0, 1))
    assert high < low


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_paper(visit, tiny, scheme):
    page = visit(LOCAL, color_scheme=scheme).page
    page.goto((tiny / "90_tiny.html").as_uri())
    colours = page.evaluate(
        "['body', '.c1, .k, .kn', '.links', 'a'].map(s => document.querySelector(s))"
        ".map(e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor])"
    )
    for ink, paper in colours:
        assert contrast(ink, paper) >= 4.5, (ink, paper)


def contrast(first, second):
    """The contrast ratio of WCAG 2.2 between two colours written `rgb(r, g, b)`."""

    def luminance(colour):
        parts = [int(part) / 255 for part in colour[4:-1].split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_keyboard_reaches_the_content_first(visit, tiny):
    page = visit(LOCAL).page
    page.goto((tiny / "90_tiny.html").as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.url.endswith("#main")
