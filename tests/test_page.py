"""The demo page: its files, and its use in a real browser."""

import fnmatch
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, expect, sync_playwright

from rednet.model.native import unavailable
from tests.conftest import encoded, photo
from tests.http_helpers import CUT, assert_error
from tests.reloads import LOADED, server_with_checkpoints
from tests.servers import FakeRunner, ServerProcess, ServerThread, wait_until

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "service" / "http" / "page"
CHROMIUM = shutil.which("chromium")
KEY = "correct-horse-battery"

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is absent: it comes from Debian")


def test_page_files_have_a_type_and_an_etag(server: ServerProcess) -> None:
    """A browser can revalidate its cached copy."""
    for path, media_type in (("/", "text/html"), ("/page/page.js", "text/javascript"), ("/page/style.css", "text/css")):
        first = server.client.get(path)
        assert first.status_code == 200
        assert first.headers["content-type"].startswith(media_type)
        assert first.headers["cache-control"] == "no-cache"
        again = server.client.get(path, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert_error(server.client.get("/page/nothing.js"), 404, "not_found")
    assert_error(server.client.get("/page/../routes/page.py"), 404, "not_found")


def test_page_policy_forbids_other_hosts_and_inline_code(server: ServerProcess) -> None:
    """The Content-Security-Policy allows neither other hosts nor inline scripts or styles."""
    policy = server.client.get("/").headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["img-src"] == "'self' blob:"


def test_page_can_be_disabled() -> None:
    """Its paths are 404 then."""
    with ServerThread(FakeRunner(), page="off") as running:
        assert_error(running.client.get("/"), 404, "not_found")
        assert_error(running.client.get("/page/page.js"), 404, "not_found")


def test_package_contains_the_page() -> None:
    """All files are in the package, and none is large."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["rednet.service.http"]
    files = [path for path in PAGE.rglob("*") if path.is_file()]
    assert len(files) >= 8
    for path in files:
        assert any(fnmatch.fnmatch(str(path.relative_to(ROOT / "service" / "http")), pattern) for pattern in patterns)
        assert path.stat().st_size < 25_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


def opened(browser: Browser, url: str, troubles: list[str], **options: Any) -> Page:
    """The page in a new browser context, which records errors and requests to other hosts."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(20_000)

    def asked(address: str) -> None:
        if not address.startswith((f"{url}/", f"blob:{url}/")):
            troubles.append(f"a request to {address}")

    page.on("request", lambda request: asked(request.url))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.goto(f"{url}/")
    return page


@pytest.fixture
def page(browser: Browser, server: ServerProcess) -> Iterator[Page]:
    """The page, which must log nothing to the browser's console."""
    troubles: list[str] = []
    page = opened(browser, server.url, troubles)
    yield page
    page.context.close()
    assert troubles == []


def file_of(data: bytes, name: str = "my photo.png") -> FilePayload:
    return {"name": name, "mimeType": "image/png", "buffer": data}


def assert_answered(page: Page, label: str = "thing") -> None:
    """Five classes and both heat maps are shown, and the images have loaded."""
    expect(page.locator("#answer:not(.busy)")).to_be_visible()
    expect(page.locator("#classes button")).to_have_count(5)
    expect(page.locator("#classes button[aria-pressed=true]")).to_contain_text(label)
    for image in page.locator("#answer img").all():
        expect(image).to_have_js_property("complete", True)
        assert image.evaluate("image => image.naturalWidth") > 0
    expect(page.locator("#error")).to_be_hidden()


def maps(page: Page) -> Sequence[str | None]:
    return [page.locator(f"#{figure} .map").get_attribute("src") for figure in ("class-map", "kernel-map")]


@needs_chromium
def test_page_shows_predictions_and_heat_maps_of_a_chosen_photo(page: Page) -> None:
    """Classes as bars, two heat maps, the duration of each stage, and the equivalent commands."""
    page.set_input_files("#file", file_of(encoded(photo())))
    assert_answered(page)
    shares = [float(text.rstrip("%")) for text in page.locator(".share").all_inner_texts()]
    widths = [
        bar.evaluate("bar => bar.offsetWidth / bar.parentNode.offsetWidth") for bar in page.locator(".bar span").all()
    ]
    assert widths == pytest.approx([share / 100 for share in shares], abs=0.01)
    assert shares == sorted(shares, reverse=True)
    for row in page.locator("#times tr").all():
        assert float(row.locator("td").last.inner_text()) > float(row.locator("td").first.inner_text()) > 0
    assert "'@my photo.png'" in page.inner_text("#curl")
    expect(page.locator("[role=status]")).to_contain_text("%. The heat maps are below.")


PIXELS = """async map => {
    await map.decode();
    const context = new OffscreenCanvas(map.naturalWidth, map.naturalHeight).getContext("2d");
    context.drawImage(map, 0, 0);
    return Array.from(context.getImageData(0, 0, map.naturalWidth, map.naturalHeight).data);
}"""


@needs_chromium
@pytest.mark.skipif(not shutil.which("curl"), reason="curl is absent")
def test_commands_of_the_page_give_the_same_results(page: Page, tmp_path: Path) -> None:
    """They run, and their pictures equal those of the page, except for PyTorch's rounding."""
    data = encoded(photo())
    (tmp_path / "it's mine.png").write_bytes(data)
    page.set_input_files("#file", file_of(data, "it's mine.png"))
    assert_answered(page)
    page.locator("#classes button").nth(2).click()
    expect(page.locator("#classes button").nth(2)).to_have_attribute("aria-pressed", "true")
    done = subprocess.run(
        ["bash", "-ec", page.inner_text("#curl")], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert '"classes":[{"index":' in done.stdout
    for name, figure in (("class.png", "class-map"), ("stage3.png", "kernel-map")):
        shown = np.array(page.locator(f"#{figure} .map").evaluate(PIXELS)).reshape(70, 90, 4)[..., :3]
        drawn = np.asarray(Image.open(tmp_path / name)).astype(int)
        assert shown.shape == drawn.shape
        assert np.abs(shown - drawn).max() <= (4 if unavailable() else 0)


TRANSFER = """([bytes, kind]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], "given.png", { type: "image/png" }));
    const options = { bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer };
    document.body.dispatchEvent(kind == "drop" ? new DragEvent(kind, options) : new ClipboardEvent(kind, options));
}"""


@needs_chromium
@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_page_accepts_dropped_and_pasted_photos(page: Page, kind: str) -> None:
    """Anywhere on the page."""
    page.evaluate(TRANSFER, [list(encoded(photo())), kind])
    assert_answered(page)
    assert "@given.png" in page.inner_text("#curl")


@needs_chromium
def test_page_shows_the_latest_choice_only(page: Page) -> None:
    """A new choice before the response of the previous one is shown without parts of the other."""
    page.evaluate("""() => {
        for (const name of ["church", "tench"]) document.querySelector(`[data-photo="${name}.jpg"]`).click();
    }""")
    assert_answered(page)
    assert page.inner_text("#curl").count("@tench.jpg") == 3
    page.evaluate("""() => {
        document.querySelector("[data-photo='springer.jpg']").click();
        document.querySelector("[value=stage1]").click();
        document.querySelector("#classes li:last-child button").click();
    }""")
    expect(page.locator("#curl")).to_contain_text("@springer.jpg")
    assert_answered(page)
    assert page.inner_text("#curl").count("@springer.jpg") == 3
    expect(page.get_by_alt_text("the kernels of stage 1")).to_be_visible()
    expect(page.locator("#classes button").first).to_have_attribute("aria-pressed", "true")


@needs_chromium
def test_page_is_usable_with_the_keyboard(page: Page) -> None:
    """A photo, another class, another stage, and the opacity of the maps are chosen."""
    page.keyboard.press("Tab")  # to the documentation
    expect(page.get_by_role("link", name="API documentation")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#file")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="A fish")).to_be_focused()
    page.keyboard.press("Enter")
    assert_answered(page)
    first = maps(page)
    for _ in range(3 + 2):  # past the other photos, to the second class
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.locator("#classes button").nth(1)).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#classes button").nth(1)).to_be_focused()
    assert page.inner_text("#explained") in page.locator("#classes button").nth(1).inner_text()
    for _ in range(4):
        page.keyboard.press("Tab")
    expect(page.get_by_role("slider")).to_be_focused()
    page.keyboard.press("Home")
    expect(page.locator("#class-map .map")).to_have_css("opacity", "0")
    page.keyboard.press("Tab")
    expect(page.get_by_role("radio", name="3")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#kernel-map .map")).to_have_attribute(
        "alt", "The photo with a heat map: the kernels of stage 4"
    )
    assert all(now != before for now, before in zip(maps(page), first, strict=True))


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_page_is_accessible(browser: Browser, server: ServerProcess, scheme: str, width: int) -> None:
    """axe finds no violations, in light and dark, on desktop and phone, and nothing is wider than the screen."""
    troubles: list[str] = []
    page = opened(browser, server.url, troubles, color_scheme=scheme, viewport={"width": width, "height": 740})
    page.evaluate((resources.files("axe_playwright_python") / "axe.min.js").read_text())

    def assert_sound() -> None:
        found = page.evaluate("axe.run()")
        assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []
        assert len(found["passes"]) > 20
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    assert_sound()
    page.get_by_role("button", name="A church").click()
    assert_answered(page)
    page.wait_for_timeout(400)  # until it has faded in
    assert_sound()
    assert troubles == []
    page.context.close()


@needs_chromium
def test_inline_scripts_do_not_run(browser: Browser, server: ServerProcess) -> None:
    """The browser blocks and reports an injected script."""
    troubles: list[str] = []
    page = opened(browser, server.url, troubles)
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), { text: 'document.title = 1' }))"
    )
    assert page.title() == "RedNet Serve"
    assert "Content Security Policy" in "".join(troubles)
    page.context.close()


@needs_chromium
def test_page_shows_the_error_of_a_damaged_photo(browser: Browser, server: ServerProcess) -> None:
    """The result of the previous photo is not shown, and the next photo is answered."""
    troubles: list[str] = []
    page = opened(browser, server.url, troubles)
    page.set_input_files("#file", file_of(encoded(photo())))
    assert_answered(page)
    page.set_input_files("#file", file_of(CUT))
    expect(page.get_by_role("alert")).to_contain_text("This photo is damaged")
    expect(page.locator("#answer")).to_be_hidden()
    page.set_input_files("#file", file_of(b"text", "notes.txt"))
    expect(page.get_by_role("alert")).to_contain_text("The server cannot read this file")
    page.get_by_role("button", name="A golf ball").click()
    assert_answered(page)
    assert all(trouble.startswith("Failed to load resource") for trouble in troubles)
    page.context.close()


@needs_chromium
def test_page_asks_for_a_key_when_required(browser: Browser, tiny_path: Path, tmp_path: Path) -> None:
    """A wrong key is reported. The right one is kept in the page only, and gone after a reload."""
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    with ServerProcess("--checkpoint", tiny_path, "--api-key-file", keys) as running:
        page = opened(browser, running.url, [])
        page.get_by_label("This server requires an API key").fill("not-one-of-them-at-all")
        page.keyboard.press("Enter")
        page.get_by_label("The server does not accept this API key").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_contain_text("tiny")
        page.get_by_role("button", name="A dog").click()
        assert_answered(page)
        assert KEY not in page.content()
        assert "$KEY" in page.inner_text("#curl")
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        page.reload()
        expect(page.get_by_label("This server requires an API key")).to_have_value("")
        page.context.close()


@needs_chromium
def test_page_describes_the_network_that_answers(browser: Browser) -> None:
    """Also if the server has loaded another one since the page was opened."""
    with server_with_checkpoints() as (running, checkpoints):
        page = opened(browser, running.url, [])
        expect(page.locator("#model")).to_contain_text("first: rednet26, 5 classes")
        checkpoints.change("other")
        running.process.send_signal(signal.SIGHUP)
        wait_until(lambda: LOADED in running.log, "the reload")
        page.get_by_role("button", name="A dog").click()
        assert_answered(page, "second")
        expect(page.locator("#model")).to_contain_text("second: rednet26, 7 classes")
        page.context.close()
