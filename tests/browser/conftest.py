"""A real browser: the Chromium of the system, driven by Playwright. `make browser` installs the driver."""

import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; `make browser` does it")


@pytest.fixture(scope="session")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on this machine: install it with the system's packages")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


class Opened:
    """A page, and whatever it said or asked for."""

    def __init__(self, page, said, asked):
        self.page, self.said, self.asked = page, said, asked

    def drawn(self):
        """Wait until what was asked for is drawn."""
        self.page.wait_for_function("() => document.body.dataset.drawn === String(turn)")

    def press(self, key):
        self.page.keyboard.press(key)
        self.drawn()

    def text(self, selector):
        return self.page.inner_text(selector)


@pytest.fixture
def open_page(browser):
    contexts = []

    def opener(path, place="", width=1500, height=1000, **options):
        # the page forbids eval, which the driver's waiting needs; that it forbids it has a test of its own
        context = browser.new_context(viewport={"width": width, "height": height}, **{"bypass_csp": True, **options})
        contexts.append(context)
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{path.as_uri()}{place}")
        page.wait_for_selector("body[data-drawn]")
        return Opened(page, said, asked)

    yield opener
    for context in contexts:
        context.close()
