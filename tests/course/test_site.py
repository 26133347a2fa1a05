"""The site: what is in its pages, and what is not."""

import io
import itertools
import re
from html.parser import HTMLParser

import pytest
from course.minicourse import FIGURE, FILM, MATHS, make_course
from rich.console import Console

from regteach.course import run, site


class Outline(HTMLParser):
    """Tags with their attributes, and headings, of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br", "hr", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    course = make_course(tmp_path_factory.mktemp("site"), MATHS, FIGURE, FILM)
    run.run(course.files(), run.Settings(), Console(file=io.StringIO()))
    return site.build(course).parent


def outline(folder, name):
    return Outline((folder / name).read_text(encoding="utf-8"))


PAGES = ["index.html", "90_tiny.html", "90_tiny-instructor.html"]


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_whole_and_lean_on_nothing(built, name):
    page = outline(built, name)
    assert not page.open
    assert page.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in page.all("meta")
    assert "width=device-width, initial-scale=1" in str(page.all("meta"))
    assert not page.all("script")
    for landmark in ("header", "main", "footer", "nav"):
        assert page.all(landmark), landmark
    assert page.all("a")[0] == {"class": "skip", "href": "#main"}
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for target in (attributes.get("src"), attributes.get("href")):
            if target and target.startswith("#"):
                assert target[1:] in ids
            elif target and not target.startswith("data:"):
                assert (built / target).is_file(), target


@pytest.mark.parametrize("name", PAGES)
def test_headings_are_in_order(built, name):
    levels = [int(tag[1]) for tag, _ in outline(built, name).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_the_index_has_a_card_a_lesson(built):
    page = (built / "index.html").read_text(encoding="utf-8")
    assert "1 of 1 lessons were executed; 1 of 1 claims held." in page
    for words in ("A tiny lesson", "1 min; full length 2 min", "<dd>1 of 1</dd>", " MB</dd>", "It squares a number."):
        assert words in page
    assert re.search(r"square <math.*?</math> <span class=\"met\">\(1 of 1 claim held\)</span>", page)
    assert 'double <span class="met">(1 exercise)</span>' in page
    (picture,) = Outline(page).all("img")
    assert picture["alt"] == "A line that rises from the lower left to the upper right."


def test_a_lesson_page_shows_figures_film_and_mathematics_without_a_kernel(built):
    page = (built / "90_tiny.html").read_text(encoding="utf-8")
    alts = [image["alt"] for image in Outline(page).all("img")]
    assert alts[0] == "A line that rises from the lower left to the upper right."
    assert alts[1].startswith("A line that grows with the slider. Frames for height, mm: ")
    assert "widget" not in page.replace("regteach.widgets", "")
    assert "sweep" not in page
    assert "injected" not in page
    assert page.count("<math") >= 4
    assert "<code>$x</code> is code" in page
    assert page.count(".rt {") == 1


def test_claims_are_listed_and_lead_to_their_cells(built):
    page = (built / "90_tiny.html").read_text(encoding="utf-8")
    row = re.search(r"<tbody>(.*?)</tbody>", page, re.DOTALL)[1]
    assert '<a href="#cell-claim-square">Two squared</a>' in row
    cells = [re.sub("<.*?>", "", cell) for cell in re.findall("<td>(.*?)</td>", row)]
    assert cells == ["Two squared", "4", "3.9 to 4.1", "two: 2", "held"]
    assert '<a href="#The-square">The square</a>' in page


def test_links_between_files_become_links_between_pages(built):
    teacher = (built / "90_tiny-instructor.html").read_text(encoding="utf-8")
    assert '<a href="90_tiny.html">the lesson</a>' in teacher
    assert '<a href="downloads/solutions/90_tiny.ipynb" download>' in teacher


def test_lessons_that_were_not_executed_stand_in_the_index(tmp_path):
    course = make_course(tmp_path)
    index = site.build(course).read_text(encoding="utf-8")
    assert "not executed yet" in index
    assert "0 of 1 lessons were executed" in index
    assert not (course.build / "site" / "90_tiny.html").exists()
    assert not list(course.build.glob("site.*"))


def test_a_link_that_the_site_lacks_is_an_error_and_the_old_site_stays(tmp_path):
    course = make_course(tmp_path)
    before = site.build(course).read_text(encoding="utf-8")
    (course.notebooks / "instructor" / "90_tiny.md").write_text("# A\n\n[gone](../nowhere.ipynb)\n")
    with pytest.raises(ValueError, match=r"a link leads to \.\./nowhere\.ipynb, which the site does not have"):
        site.build(course)
    assert (course.build / "site" / "index.html").read_text(encoding="utf-8") == before
