"""The page in a real browser, without a network."""

import shutil

import pytest

from normlab.report import write

from .sample import sample

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return write(sample(), tmp_path_factory.mktemp("page") / "report.html").as_uri()


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, address):
    """Open the page as wanted; afterwards, nothing was logged and nothing fetched."""
    pages, troubles = [], []

    def open_page(width, scheme):
        page = chromium.new_page(
            viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
        )
        page.on("console", lambda m: troubles.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "request",
            lambda r: None if r.url in (address,) or r.url.startswith("data:")
            else troubles.append(f"fetched {r.url}"),
        )  # fmt: skip
        page.goto(address)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert troubles == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_renders_on_phones_and_screens_light_and_dark(opened, width, scheme):
    page = opened(width, scheme)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width
    drawings = page.locator("figure svg")
    assert drawings.count() >= 6
    for i in range(drawings.count()):
        box = drawings.nth(i).bounding_box()
        assert box["width"] > 150
        assert box["height"] > 100
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, background[background.index("(") + 1 : -1].split(",")[:3])) > 384
    assert light == (scheme == "light")


def test_the_keyboard_reaches_every_control(opened):
    page = opened(1280, "light")
    wanted = page.locator("summary:visible, button:visible, a[href]:visible").count()
    seen = set()
    for _ in range(wanted + 40):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                "(e => e === document.body ? null : [...document.querySelectorAll('*')]"
                ".indexOf(e))(document.activeElement)"
            )
        )
    assert len(seen - {None}) >= wanted


def test_charts_have_names_and_numbers_for_those_who_cannot_see_them(opened):
    page = opened(1280, "light")
    figures = page.locator("figure")
    for i in range(figures.count()):
        figure = figures.nth(i)
        assert figure.locator("svg[aria-label], [role=img][aria-label]").count() >= 1
        assert figure.locator("details table").count() == 1


def test_it_prints(opened):
    page = opened(1280, "dark")
    assert page.pdf().startswith(b"%PDF")
