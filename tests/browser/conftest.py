"""A headless Chromium for the browser tests; they are skipped, with the reason, where none is found."""

import re

import pytest

from regteach.course.doctor import find_chromium

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="session")
def browser():
    """Chromium, for the whole session."""
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium or Chrome was found on PATH; install one to run the browser tests")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


class Visit:
    """A page that may reach only the addresses allowed, and what went wrong on it.

    Args:
        page: of Playwright.
        allowed: a pattern; a request for anything else is stopped and noted.
    """

    def __init__(self, page, allowed):
        self.page, self.asked, self.errors = page, [], []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.route(re.compile("."), lambda route: self._let(route, allowed))

    def _let(self, route, allowed):
        if re.match(allowed, route.request.url):
            route.continue_()
        else:
            self.asked.append(route.request.url)
            route.abort()


@pytest.fixture
def visit(browser):
    """Make a `Visit`: visit(allowed, width=..., ...)."""
    contexts = []

    def make(allowed, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        return Visit(context.new_page(), allowed)

    yield make
    for context in contexts:
        context.close()
