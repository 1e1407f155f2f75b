"""
The Space in a real browser, with the model of `make demo`: desktop and phone. Debian's chromium by Playwright:

apt-get install chromium && python -m pytest -m browser    # SPACE_SCREENSHOTS=docs keeps the screenshots there
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.support import ROOT


sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

MODEL = ROOT / "outputs/demo"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENS = {"desktop": (1280, 860), "phone": (390, 844)}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium"),
    pytest.mark.skipif(not MODEL.exists(), reason="no trained model: make demo"),
]


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """Builds the Space, starts it as the Hub does, and gives its address and the folder of its uploads."""
    folder, uploads = tmp_path_factory.mktemp("space") / "space", tmp_path_factory.mktemp("uploads")
    build = [sys.executable, "-m", "modeling_nrccr", "space", MODEL, folder]
    subprocess.run([*map(str, build)], check=True, cwd=ROOT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False"}
    start, url = time.monotonic(), f"http://127.0.0.1:{port}/"
    server = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env={**os.environ, **settings})
    try:
        while time.monotonic() - start < 120 and server.poll() is None:
            try:
                urllib.request.urlopen(url, timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        print(f"the Space answers after {time.monotonic() - start:.1f} s")
        yield url, uploads
    finally:
        server.terminate()
        server.wait(20)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def browser():
    sync_api.expect.set_options(timeout=60_000)  # machines may be busy
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(params=SCREENS)
def page(request, space, browser):
    width, height = SCREENS[request.param]
    phone = {"is_mobile": True, "has_touch": True} if request.param == "phone" else {}
    page = browser.new_page(viewport={"width": width, "height": height}, **phone)
    page.name, page.errors, page.requests = request.param, [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda sent: page.requests.append(sent.url))
    page.set_default_timeout(60_000)
    page.goto(space[0])
    page.wait_for_selector("#results .cards li")
    yield page
    page.close()


def ask(page, text, expected=None):
    """Asks, waits for the answer, and gives the names of what was found."""
    page.get_by_test_id("textbox").fill(text)
    page.get_by_test_id("submit-button").click()
    page.get_by_role("tab", name="Results").click()
    sync_api.expect(page.locator("#results h2")).to_have_text(text if expected is None else expected)
    return page.locator("#results .frame img").evaluate_all("images => images.map(image => image.alt)")


def look(page, name):
    """A screenshot, on which nothing is wider than the screen."""
    sync_api.expect(page.locator("[data-testid=status-tracker]:not(.hide)")).to_have_count(0)  # all has been answered
    page.wait_for_timeout(500)  # fades
    assert page.evaluate("document.documentElement.scrollWidth") <= SCREENS[page.name][0]
    folder, name = os.environ.get("SPACE_SCREENSHOTS"), f"{name}-{page.name}"
    if folder and name in ("search-desktop", "search-phone", "why-desktop", "translation-desktop"):
        page.mouse.move(0, 0)
        page.screenshot(path=Path(folder, f"space-{name}.png"), full_page=True)


def test_search(page):
    look(page, "search")
    assert "igrexa" in ask(page, "igrexa")[:5]  # never seen in training, as its dot says
    assert page.locator("#results li", has_text="church").first.locator(".frame.unseen").count() == 1
    assert "libro azul" in ask(page, "libro azul")[:5]  # the first, whatever the seed and the machine

    page.get_by_label("English").check()
    page.get_by_role("button", name="church").click()  # an example
    sync_api.expect(page.locator("#results h2")).to_have_text("church")
    assert "church" in ask(page, "church")  # fifth or sixth, by the machine that trained
    assert "blue book" in ask(page, "blue book")[:5]
    assert "grinning cat" in ask(page, "a smiling cat")[:5]

    page.get_by_label("Only what training never saw").check()
    sync_api.expect(page.locator("#results .note").first).to_contain_text("unseen ones only")
    assert page.locator("#results .frame.unseen").count() == page.locator("#results .frame").count() == 10
    assert not page.errors
    assert {url.split("/")[2].split(":")[0] for url in page.requests if url.startswith("http")} == {"127.0.0.1"}


def test_explanations(page):
    ask(page, "un gato que sorrí")
    page.get_by_role("tab", name="Why").click()
    sync_api.expect(page.locator("#why .word")).to_have_count(3 * 4)
    weights = [float(text) for text in page.locator("#why .words").first.locator("b").all_text_contents()]
    assert max(weights) == weights[1] > 0  # gato
    look(page, "why")
    page.get_by_role("tab", name="Translation").click()
    sync_api.expect(page.locator("#noise h3")).to_have_text(
        ["un gato que sorrí", "A cat that smiles", "un gato que sorrí"]
    )
    assert page.locator("#noise article").nth(1).locator(".frame").count() == 6
    look(page, "translation")


def test_clips_play(page):
    page.get_by_label("Clips").check()
    sync_api.expect(page.locator("#results .note").first).to_contain_text("clips")
    assert any("gato" in name for name in ask(page, "gato chorando")[:5])
    frame = page.locator("#results .frame").first
    with page.expect_response(lambda answer: answer.url.endswith(".webp")) as clip:
        frame.hover()
    assert clip.value.ok and len(clip.value.body()) > 10_000
    look(page, "clips")


def test_own_pictures(page, space, tmp_path):
    disc = Image.new("RGB", (640, 480), "white")
    ImageDraw.Draw(disc).ellipse([120, 40, 520, 440], fill="#d22")
    disc.save(tmp_path / "disc.png")
    Image.linear_gradient("L").resize((300, 300)).save(tmp_path / "<b>gray.jpg")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")

    page.get_by_role("tab", name="Your own").click()
    names = ("<b>gray.jpg", "disc.png", "broken.png")
    page.locator("#own input[type=file]").set_input_files([tmp_path / name for name in names])
    sync_api.expect(page.get_by_text("broken.png: cannot be read as a picture")).to_be_visible()
    sync_api.expect(page.get_by_label("Mine")).to_be_checked()
    assert ask(page, "círculo vermello")[0] == "disc" and page.locator("#results .frame").count() == 2
    look(page, "own")

    page.get_by_label("Pictures", exact=True).check()
    page.locator("#box input[type=file]").set_input_files(tmp_path / "disc.png")
    page.get_by_role("button", name="Remove").first.wait_for()
    assert "círculo vermello" in ask(page, "", "Like your picture")[:5]
    assert not [path for path in space[1].rglob("*") if path.is_file() and path.stat().st_size]  # nothing is kept

    page.get_by_role("tab", name="Your own").click()
    page.get_by_role("button", name="Delete my pictures").click()
    page.get_by_label("Mine").check()
    page.get_by_role("tab", name="Results").click()
    sync_api.expect(page.locator("#results")).to_contain_text("no pictures yet")


def test_what_is_typed_is_not_run(page):
    evil = "<img src=x onerror=\"document.title='run'\"> ${document.title='run'} {{value}} 'gato'"
    ask(page, evil)
    for tab in ("Why", "Translation"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(1500)
    assert page.title() == "Search pictures in your language" and not page.errors
    assert page.locator("#results img[src=x], #why img[src=x], #noise img[src=x]").count() == 0
