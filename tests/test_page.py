"""The demo page: its files, and its use in a real browser."""

import base64
import csv
import fnmatch
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Locator, Page, Route, expect, sync_playwright

from rednet import Checkpoint, Familiarity, Preprocess, create_rednet, load_checkpoint, save_checkpoint
from rednet.model.io.labels import Label
from tests.conftest import encoded, lively, photo
from tests.http_helpers import CUT, TEXT, assert_error
from tests.reloads import LOADED, server_with_checkpoints
from tests.servers import FakeRunner, ServerProcess, ServerThread, wait_until

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "service" / "http" / "page"
CHROMIUM = shutil.which("chromium")
KEY = "correct-horse-battery"

EXAMPLES = {"n01440764": "tench", "n02102040": "English springer", "n03028079": "church", "n03445777": "golf ball"}
HOSTILE = "<img src=x onerror=alert(1)>"
ARABIC = "قطة منزلية"
LONG = "a-label-without-spaces-" * 20

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is absent: it comes from Debian")


def test_page_files_have_a_type_and_an_etag(server: ServerProcess) -> None:
    """A browser can revalidate its cached copy."""
    for path, media_type in (
        ("/", "text/html"),
        ("/page/heat_map.js", "text/javascript"),
        ("/page/style.css", "text/css"),
    ):
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
    assert len(files) >= 16
    for path in files:
        assert any(fnmatch.fnmatch(str(path.relative_to(ROOT / "service" / "http")), pattern) for pattern in patterns)
        assert path.stat().st_size < 25_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose network knows 1000 classes, those of the examples among them, and labels that are hard to show."""
    labels = [Label(*example) for example in EXAMPLES.items()]
    labels += [Label("hostile", HOSTILE), Label("arabic", ARABIC), Label("long", LONG)]
    labels += [Label(f"n{index}", f"thing {index}") for index in range(len(labels), 1000)]
    net = lively(create_rednet("rednet26", num_classes=1000, base_channels=16, stem_channels=32))
    path = tmp_path_factory.mktemp("many") / "many.safetensors"
    save_checkpoint(path, Checkpoint(net=net, labels=labels, preprocess=Preprocess(resize=72, crop=64), name="many"))
    with ServerProcess("--checkpoint", path) as running:
        yield running


def opened(browser: Browser, url: str, troubles: list[str], **options: Any) -> Page:
    """The page in a new browser context, which records errors and requests to other hosts."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(20_000)
    origin = "/".join(url.split("/")[:3])

    def asked(address: str) -> None:
        if not address.startswith((f"{url}/", f"blob:{origin}/")):
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
    """The answer is complete: classes, a photo that has loaded, and a map."""
    expect(page.locator("#answer[aria-busy=false]")).to_be_visible()
    expect(page.locator("#scores button[aria-pressed=true]")).to_contain_text(label)
    photo = page.locator("#answer figure img")
    expect(photo).to_have_js_property("complete", True)
    assert photo.evaluate("image => image.naturalWidth") > 0
    assert page.locator("#map").evaluate("map => map.width") > 0
    expect(page.locator("#error")).to_be_hidden()


def sent(page: Page) -> list[str]:
    """The paths of the requests with photos, as they are made from now on."""
    paths: list[str] = []
    page.on("request", lambda request: paths.append(request.url.split("/v1/")[1]) if request.method == "POST" else None)
    return paths


def pixels(canvas: Locator) -> NDArray[np.uint8]:
    """The colours of a canvas, [height, width, 4]."""
    url: str = canvas.evaluate("canvas => canvas.toDataURL('image/png')")
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


def saved_table(page: Page) -> list[dict[str, str]]:
    """The rows of the CSV file."""
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download CSV").click()
    assert saved.value.suggested_filename == "rednet.csv"
    return list(csv.DictReader(io.StringIO(Path(saved.value.path()).read_text("utf-8-sig"))))


@needs_chromium
def test_page_shows_classes_and_evidence_after_one_request(page: Page) -> None:
    """Classes as bars, the words that fit them, and the map over the photo."""
    paths = sent(page)
    page.set_input_files("#file", file_of(encoded(photo())))
    assert_answered(page)
    assert paths == ["explain.json"]
    shares = [float(text.rstrip("%")) for text in page.locator(".share").all_inner_texts()]
    widths = [
        bar.evaluate("bar => bar.offsetWidth / bar.parentNode.offsetWidth") for bar in page.locator(".bar span").all()
    ]
    assert len(widths) == 5
    assert widths == pytest.approx([share / 100 for share in shares], abs=0.01)
    assert shares == sorted(shares, reverse=True)
    likeliest = page.locator("#scores button bdi").first.inner_text()
    expect(page.locator("#known")).to_have_text(
        "Every photo is given one of the 5 classes, even a photo of something else."
    )
    expect(page.locator("[role=status]").first).to_contain_text(re.compile(f"^my photo.png: .*{likeliest}, "))
    expect(page.locator("#map")).to_have_attribute("aria-label", re.compile(f"evidence for and against {likeliest}"))
    expect(page.locator("#list")).to_be_visible()


@needs_chromium
@pytest.mark.parametrize(
    ("red", "title", "says"),
    [
        (100, "Perhaps red", "The model is unsure: only 33%. It may also be green (33%)."),
        (101, "Probably red", "The model is not certain: 58%. It may also be green (21%)."),
        (102, "red", "The model is fairly sure: 79%."),
        (104, "red", "The model is sure: 96%."),
    ],
)
def test_page_says_in_words_how_sure_the_model_is(browser: Browser, red: int, title: str, says: str) -> None:
    """The logits are the means of the colours."""
    with ServerThread(FakeRunner(), classes=["red", "green", "blue"]) as running:
        page = opened(browser, running.url, [])
        page.set_input_files("#file", file_of(encoded(Image.new("RGB", (32, 32), (red, 100, 100)))))
        expect(page.locator("#answer-title")).to_have_text(title)
        expect(page.locator("#confidence")).to_have_text(says)
        expect(page.locator("#photos .state")).to_contain_text(title.lower())
        page.context.close()


@needs_chromium
def test_map_has_the_colours_of_its_legend(page: Page, server: ServerProcess) -> None:
    """Orange where the values are above zero, blue where they are below, strongest at the largest of them."""
    data = encoded(photo(width=90, height=70))
    page.set_input_files("#file", file_of(data))
    assert_answered(page)
    colours = {
        tuple(colour): step / 255 * 2 - 1 for step, colour in enumerate(pixels(page.locator("#evidence-legend"))[0])
    }
    drawn = pixels(page.locator("#map"))
    assert {tuple(colour) for colour in drawn.reshape(-1, 4)} <= colours.keys()
    grid = np.array(server.client.post("/v1/explain.json", content=data).json()["explanations"][0]["grid"])
    assert grid.shape == (2, 2)
    expected = grid / np.abs(grid).max()
    for row, column in np.ndindex(2, 2):
        shown = colours[tuple(drawn[56 + 112 * row, 56 + 112 * column])]
        assert shown == pytest.approx(expected[row, column], abs=0.05)
    blue, orange = pixels(page.locator("#evidence-legend"))[0][[0, -1]]
    assert blue[2] > blue[0]
    assert orange[0] > orange[2]
    expect(page.locator("figure .legend")).to_have_text("againstfor")


@needs_chromium
def test_map_lies_on_the_part_that_the_network_sees(page: Page) -> None:
    """At 60% by default: the square in the middle, 64/72 of the shorter side, also of a photo that is rotated."""
    rotated = Image.Exif()
    rotated[274] = 6
    page.set_input_files("#file", file_of(encoded(photo(width=90, height=70), "JPEG", exif=rotated.tobytes())))
    assert_answered(page)
    outer, inner = (page.locator(f"figure {part}").bounding_box() for part in (".picture", "#map"))
    assert outer
    assert inner
    assert outer["width"] / outer["height"] == pytest.approx(70 / 90, rel=0.01)
    width, height = page.locator("#photos canvas").evaluate("canvas => [canvas.width, canvas.height]")
    assert width / height == pytest.approx(70 / 90, rel=0.02)
    assert inner["width"] == pytest.approx(outer["width"] * 64 / 72, rel=0.01)
    assert inner["height"] == pytest.approx(inner["width"], rel=0.01)
    assert inner["x"] + inner["width"] / 2 == pytest.approx(outer["x"] + outer["width"] / 2, abs=1)
    assert inner["y"] + inner["height"] / 2 == pytest.approx(outer["y"] + outer["height"] / 2, abs=1)
    expect(page.locator("#map")).to_have_css("opacity", "0.6")
    page.locator("#opacity").fill("25")
    expect(page.locator("#map")).to_have_css("opacity", "0.25")
    expect(page.locator("#opacity-value")).to_have_text("25%")
    expect(page.get_by_role("slider", name="Map")).to_have_attribute("aria-valuetext", "25%")


@needs_chromium
def test_other_maps_are_requested_once_when_they_are_wanted(page: Page) -> None:
    """Of other classes, and of kernels behind their disclosure."""
    paths = sent(page)
    page.set_input_files("#file", file_of(encoded(photo())))
    assert_answered(page)
    first = pixels(page.locator("#map"))
    buttons = page.locator("#scores button")
    for _ in range(2):
        buttons.nth(1).click()
        expect(buttons.nth(1)).to_have_attribute("aria-pressed", "true")
        assert not np.array_equal(pixels(page.locator("#map")), first)
        buttons.nth(0).click()
        expect(buttons.nth(0)).to_have_attribute("aria-pressed", "true")
        assert np.array_equal(pixels(page.locator("#map")), first)
    assert len(paths) == 2
    page.get_by_text("How the network looks").click()
    expect(page.locator("#kernels")).to_have_attribute("aria-label", re.compile("stage 3"))
    third = pixels(page.locator("#kernels"))
    page.locator("#stages label").nth(0).click()
    expect(page.locator("#kernels")).to_have_attribute("aria-label", re.compile("stage 1"))
    assert not np.array_equal(pixels(page.locator("#kernels")), third)
    page.locator("#stages label").nth(2).click()
    expect(page.locator("#kernels")).to_have_attribute("aria-label", re.compile("stage 3"))
    assert paths[2:] == ["explain.json?layer=stage3", "explain.json?layer=stage1"]
    legend = {tuple(colour) for colour in pixels(page.locator("#kernels-legend"))[0]}
    assert {tuple(colour) for colour in third.reshape(-1, 4)} <= legend


@needs_chromium
@pytest.mark.skipif(not shutil.which("curl"), reason="curl is absent")
def test_commands_of_the_page_send_the_same_requests(page: Page, tmp_path: Path) -> None:
    """They run, whatever the name of the file."""
    data = encoded(photo())
    (tmp_path / "it's mine.png").write_bytes(data)
    page.set_input_files("#file", file_of(data, "it's mine.png"))
    assert_answered(page)
    page.locator("#scores button").nth(2).click()
    expect(page.locator("#scores button").nth(2)).to_have_attribute("aria-pressed", "true")
    label = page.locator("#scores button bdi").nth(2).inner_text()
    page.get_by_text("How the network looks").click()
    expect(page.locator("#curl")).to_contain_text("stage3")
    page.get_by_text("The same from a program").click()
    done = subprocess.run(
        ["bash", "-ec", page.inner_text("#curl").replace("\n", "; echo; ")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    of_class, of_stage = map(json.loads, done.stdout.split("\n"))
    assert of_class["explanations"][0]["class"]["label"] == label
    assert of_stage["layer"] == "stage3"
    assert "the network" in page.inner_text("#times")


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
    expect(page.locator("#file-name")).to_have_text("given.png")


@needs_chromium
def test_page_lists_several_photos_and_saves_them_as_csv(browser: Browser, server: ServerProcess) -> None:
    """With thumbnails and classes. Errors are beside the name of the file, and the last answer stays."""
    troubles: list[str] = []
    page = opened(browser, server.url, troubles)
    paths = sent(page)
    page.set_input_files("#file", file_of(encoded(photo()), "first.png"))
    assert_answered(page)
    page.set_input_files("#file", [file_of(CUT, "cut.png"), file_of(TEXT, "notes.json")])
    rows = page.locator("#photos li")
    expect(rows.nth(0)).to_contain_text("This photo is damaged.")
    expect(rows.nth(1)).to_contain_text("This kind of file cannot be read here.")
    expect(page.locator("#file-name")).to_have_text("first.png")
    assert_answered(page)
    page.set_input_files(
        "#file", [file_of(CUT, "cut.png"), *(file_of(encoded(photo(n)), f"{n}, =1.png") for n in range(1, 5))]
    )
    expect(page.locator("#photos li.done")).to_have_count(5)
    expect(page.locator("#file-name")).to_have_text("1, =1.png")
    expect(page.locator("#photos [aria-current=true]")).to_contain_text("1, =1.png")
    for row in page.locator("#photos li.done").all():
        assert len(np.unique(pixels(row.locator("canvas")))) > 2
        assert "thing" in row.inner_text()
    rows.filter(has_text="3, =1.png").locator("button").first.click()
    expect(page.locator("#file-name")).to_have_text("3, =1.png")
    assert paths == ["explain.json"] * 8
    table = saved_table(page)
    assert "familiarity" not in table[0]
    assert [row["file"] for row in table] == [
        "first.png",
        "cut.png",
        "notes.json",
        "cut.png",
        *(f"{n}, =1.png" for n in range(1, 5)),
    ]
    assert [row["error_code"] for row in table[:4]] == [
        "",
        "unreadable_image",
        "unsupported_media_type",
        "unreadable_image",
    ]
    predicted = server.client.post("/v1/predict", content=encoded(photo(4))).json()["predictions"][0]["classes"]
    for rank, score in enumerate(predicted, 1):
        assert table[-1][f"id_{rank}"] == score["id"]
        assert float(table[-1][f"probability_{rank}"]) == pytest.approx(score["probability"], rel=1e-4)
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#answer")).to_be_hidden()
    expect(page.locator("#list")).to_be_hidden()
    expect(page.get_by_role("heading", name="What is in your photo?")).to_be_visible()
    assert all(trouble.startswith("Failed to load resource") for trouble in troubles)
    page.context.close()


@needs_chromium
def test_names_and_labels_are_text_whatever_they_hold(browser: Browser, many: ServerProcess) -> None:
    """No markup, no formula, and nothing wider than the screen."""
    troubles: list[str] = []
    page = opened(browser, many.url, troubles, viewport={"width": 360, "height": 740})
    names = [HOSTILE, "=cmd()", f"{ARABIC}.png", f"{LONG}.png"]
    page.set_input_files("#file", [file_of(encoded(photo(n)), name) for n, name in enumerate(names)])
    expect(page.locator("#photos li.done")).to_have_count(4)
    assert page.locator("#photos .name").all_inner_texts() == names
    assert page.locator("#photos img, #file-name img").count() == 0
    expect(page.locator("#file-name")).to_have_text(HOSTILE)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    table = saved_table(page)
    assert table[1]["file"] == "'=cmd()"
    for text in (HOSTILE, ARABIC, LONG):
        page.get_by_label("Search the classes").fill(text[:30])
        expect(page.locator("#chips li")).to_have_count(1)
        expect(page.locator("#chips bdi")).to_have_text(text)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert troubles == []
    page.context.close()


@needs_chromium
def test_page_searches_many_classes_and_shows_all_of_few(browser: Browser, page: Page, many: ServerProcess) -> None:
    """By a part of the label, or by the id."""
    expect(page.locator("#chips li")).to_have_count(5)
    expect(page.locator("#classes-title")).to_have_text("The 5 classes it knows")
    expect(page.get_by_label("Search the classes")).to_be_hidden()
    expect(page.locator("#examples")).to_be_hidden()  # none of its classes
    other = opened(browser, many.url, [])
    expect(other.locator("#classes-title")).to_have_text("The 1,000 classes it knows")
    expect(other.locator("#chips li").last).to_have_text("and 970 more")
    other.get_by_label("Search the classes").fill("THING 99")
    expect(other.locator("#chips li")).to_have_count(11)
    expect(other.locator("#found")).to_have_text("11 of 1,000")
    other.get_by_label("Search the classes").fill("n02102040")
    expect(other.locator("#chips li")).to_have_text("English springer")
    assert other.locator("#examples button span").all_inner_texts() == list(EXAMPLES.values())
    other.context.close()


@needs_chromium
def test_examples_show_which_one_is_selected(browser: Browser, many: ServerProcess) -> None:
    """Each is sent once."""
    page = opened(browser, many.url, [])
    paths = sent(page)
    church, tench = (page.get_by_role("button", name=name, exact=True) for name in ("church", "tench"))
    for _ in range(2):
        for button, name in ((church, "church.jpg"), (tench, "tench.jpg")):
            button.click()
            expect(page.locator("#file-name")).to_have_text(name)
            expect(button).to_have_attribute("aria-pressed", "true")
            expect(page.locator("#examples [aria-pressed=true]")).to_have_count(1)
    assert len(paths) == 2
    page.context.close()


@needs_chromium
def test_page_is_busy_until_the_answer_and_shows_the_latest_choice(browser: Browser) -> None:
    """The last answer stays meanwhile. At most two photos are on their way."""
    runner = FakeRunner()
    with ServerThread(runner) as running:
        page = opened(browser, running.url, [])
        paths = sent(page)
        page.set_input_files("#file", file_of(encoded(photo()), "before.png"))
        expect(page.locator("#answer[aria-busy=false]")).to_be_visible()
        runner.go_on.clear()
        page.set_input_files("#file", [file_of(encoded(photo(n)), f"{n}.png") for n in range(1, 5)])
        expect(page.locator("#answer")).to_have_attribute("aria-busy", "true")
        expect(page.locator("#photos li.busy")).to_have_count(2)
        expect(page.locator("#photos li").nth(0)).to_contain_text("Looking…")
        expect(page.locator("#photos li").nth(3)).to_contain_text("Waiting")
        expect(page.locator("#progress")).to_have_js_property("value", 1)
        expect(page.locator("#count")).to_have_text("1 of 5")
        expect(page.locator("#file-name")).to_have_text("before.png")
        page.locator("#photos li button").filter(has_text="4.png").click()
        assert len(paths) == 3
        runner.go_on.set()
        expect(page.locator("#file-name")).to_have_text("4.png")
        expect(page.locator("#progress")).to_be_hidden()
        expect(page.locator("#photos li.done")).to_have_count(5)
        expect(page.locator("#file-name")).to_have_text("4.png")
        assert len(paths) == 5
        page.context.close()


@needs_chromium
def test_page_waits_for_a_server_that_starts_or_is_gone(browser: Browser) -> None:
    """Photos that are chosen during warm-up are answered after it. Others can be sent again."""
    runner = FakeRunner()
    runner.warm.clear()
    with ServerThread(runner) as running:
        page = opened(browser, running.url, [])
        with page.expect_response(lambda response: response.status == 503):
            page.set_input_files("#file", file_of(encoded(photo()), "early.png"))
        expect(page.locator("#photos li.busy")).to_have_count(1)
        runner.warm.set()
        expect(page.locator("#file-name")).to_have_text("early.png")
        page.context.set_offline(True)
        page.set_input_files("#file", file_of(encoded(photo(1)), "late.png"))
        expect(page.locator("#photos li").first).to_contain_text("The server cannot be reached.")
        expect(page.locator("#file-name")).to_have_text("early.png")
        page.context.set_offline(False)
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("#file-name")).to_have_text("late.png")
        page.context.close()


@needs_chromium
def test_page_shows_the_map_of_a_photo_that_only_the_server_can_read(page: Page) -> None:
    """Chromium has no TIFF."""
    page.set_input_files("#file", file_of(encoded(photo(), "TIFF"), "scan.tiff"))
    expect(page.locator("figure .sorry")).to_be_visible()
    expect(page.locator("#answer-title")).to_contain_text("thing")
    box = page.locator("#map").bounding_box()
    assert box
    assert box["width"] > 100


UNLIKE = "This photo does not look like those the model was trained on."


@needs_chromium
@pytest.mark.parametrize(("energies", "unlike"), [((100.0, 200.0), True), ((-200.0, -100.0), False)])
def test_page_says_when_a_photo_is_unlike_the_training_photos(
    browser: Browser, tiny_path: Path, tmp_path: Path, energies: Sequence[float], unlike: bool
) -> None:
    """Those look either far more or far less familiar than any photo."""
    path = tmp_path / "measured.safetensors"
    save_checkpoint(path, replace(load_checkpoint(tiny_path), familiarity=Familiarity(energies)))
    with ServerProcess("--checkpoint", path) as running:
        page = opened(browser, running.url, [])
        page.set_input_files("#file", file_of(encoded(photo())))
        assert_answered(page)
        expect(page.get_by_text(UNLIKE)).to_be_visible(visible=unlike)
        (row,) = saved_table(page)
        assert float(row["familiarity"]) == (0 if unlike else 1)
        page.context.close()


@needs_chromium
def test_page_says_nothing_of_familiarity_where_it_is_unknown(page: Page) -> None:
    """The checkpoint has not measured it."""
    page.set_input_files("#file", file_of(encoded(photo())))
    assert_answered(page)
    expect(page.get_by_text(UNLIKE)).to_be_hidden()


@needs_chromium
def test_page_is_usable_with_the_keyboard(browser: Browser, many: ServerProcess) -> None:
    """An example, another class, another stage, and the opacity of the map are chosen."""
    page = opened(browser, many.url, [])
    for name in ("Model", "API documentation", "Metrics"):
        link = page.get_by_role("link", name=name, exact=True)
        expect(link).to_be_visible()
        page.keyboard.press("Tab")
        expect(link).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#file")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="tench", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    assert_answered(page, "")
    for _ in range(3):  # past the other examples
        page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("slider", name="Map")).to_be_focused()
    page.keyboard.press("Home")
    expect(page.locator("#map")).to_have_css("opacity", "0")
    for _ in range(2):
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    second = page.locator("#scores button").nth(1)
    expect(second).to_have_attribute("aria-pressed", "true")
    expect(second).to_be_focused()
    assert page.inner_text("#explained") in second.inner_text()
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#kernels")).to_have_attribute("aria-label", re.compile("stage 3"))
    page.keyboard.press("Tab")
    expect(page.get_by_role("radio", name="3")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#kernels")).to_have_attribute("aria-label", re.compile("stage 4"))
    page.context.close()


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_accessible(browser: Browser, many: ServerProcess, scheme: str, width: int) -> None:
    """axe finds no violations, in light and dark, on desktop and phone, and nothing is wider than the screen."""
    troubles: list[str] = []
    page = opened(browser, many.url, troubles, color_scheme=scheme, viewport={"width": width, "height": 740})
    page.evaluate((resources.files("axe_playwright_python") / "axe.min.js").read_text())

    def assert_sound() -> None:
        found = page.evaluate("axe.run()")
        assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []
        assert len(found["passes"]) > 20
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    expect(page.locator("#chips li").last).to_have_text("and 970 more")
    assert_sound()
    page.get_by_role("button", name="church", exact=True).click()
    assert_answered(page, "")
    assert_sound()
    page.set_input_files("#file", [file_of(TEXT, "notes.txt"), *(file_of(encoded(photo(n))) for n in range(4))])
    expect(page.locator("#photos li.done")).to_have_count(5)
    for summary in page.locator("summary").all():
        summary.click()
    expect(page.locator("#kernels")).to_have_attribute("aria-label", re.compile("stage 3"))
    page.wait_for_timeout(300)  # until everything has faded in
    assert_sound()
    assert all(trouble.startswith("Failed to load resource") for trouble in troubles)
    page.context.close()


@needs_chromium
def test_page_takes_photos_with_the_camera_of_a_phone(browser: Browser) -> None:
    """The camera on its back. Where there is a mouse, dropping is offered instead."""
    with ServerThread(FakeRunner()) as running:
        for phone in (True, False):
            own = browser.browser_type.launch(executable_path=CHROMIUM)  # touch is a property of the whole browser
            page = opened(own, running.url, [], is_mobile=phone, has_touch=phone)
            expect(page.get_by_text("Take a photo")).to_be_visible(visible=phone)
            expect(page.get_by_text("or drop them anywhere")).to_be_visible(visible=not phone)
            if phone:
                expect(page.locator("#camera")).to_have_attribute("capture", "environment")
                page.set_input_files("#camera", file_of(encoded(photo()), "snap.png"))
                expect(page.locator("#file-name")).to_have_text("snap.png")
            own.close()


@needs_chromium
def test_page_links_to_what_the_server_serves(browser: Browser, page: Page, server: ServerProcess) -> None:
    """Documentation and metrics only where they can be reached."""
    for name, path in (
        ("API documentation", "/docs"),
        ("Metrics", "/metrics"),
        ("Full description as JSON", "/v1/model"),
    ):
        link = page.get_by_role("link", name=name)
        expect(link).to_be_visible()
        assert link.evaluate("link => link.href") == server.url + path
        assert server.client.get(path).status_code == 200
    version = server.client.get("/v2").json()["version"]
    expect(page.locator("#facts")).to_contain_text(f"RedNet Serve {version}")
    expect(page.locator("#facts")).to_contain_text("rednet26")
    with ServerThread(FakeRunner(), docs="off") as running:
        other = opened(browser, running.url, [])
        expect(other.get_by_role("link", name="Metrics")).to_be_visible()
        expect(other.get_by_role("link", name="API documentation")).to_be_hidden()
        other.context.close()


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
def test_page_asks_for_a_key_when_required(browser: Browser, tiny_path: Path, tmp_path: Path) -> None:
    """A wrong key is reported. The right one is kept in the page only, and gone after a reload."""
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    with ServerProcess("--checkpoint", tiny_path, "--api-key-file", keys) as running:
        page = opened(browser, running.url, [])
        page.get_by_label("This server requires an API key").fill("not-one-of-them-at-all")
        expect(page.locator("#classes")).to_be_hidden()
        page.set_input_files("#file", file_of(encoded(photo())))
        expect(page.locator("#photos li")).to_contain_text("Waiting")
        page.get_by_role("button", name="Continue").click()
        page.get_by_label("The server does not accept this API key").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#lead")).to_contain_text("tiny")
        assert_answered(page)
        assert KEY not in page.content()
        expect(page.locator("#curl")).to_contain_text("$KEY")
        expect(page.locator("#description")).to_be_hidden()  # a link sends no key
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        page.reload()
        expect(page.get_by_label("This server requires an API key")).to_have_value("")
        page.context.close()


@needs_chromium
def test_photo_that_is_refused_after_the_right_key_was_entered_is_sent_again(
    browser: Browser, tiny_path: Path, tmp_path: Path
) -> None:
    """Its request was sent before, and is answered late."""
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    with ServerProcess("--checkpoint", tiny_path, "--api-key-file", keys) as running:
        page = opened(browser, running.url, [])
        held: list[Route] = []

        def hold(route: Route) -> None:
            held.append(route)

        page.route("**/v1/explain.json*", hold, times=1)
        key = page.get_by_label("This server requires an API key")
        page.set_input_files("#file", file_of(encoded(photo())))
        key.fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#lead")).to_contain_text("tiny")
        held[0].continue_()
        assert_answered(page)
        expect(page.locator("#key-form")).to_be_hidden()
        page.context.close()


@needs_chromium
def test_page_describes_the_network_that_answers(browser: Browser) -> None:
    """Also after a reload. Older photos are sent again before another of their maps is shown."""
    with server_with_checkpoints() as (running, checkpoints):
        page = opened(browser, running.url, [])
        expect(page.locator("#lead")).to_contain_text("first decides which of 5 classes")
        page.set_input_files("#file", file_of(encoded(photo()), "old.png"))
        assert_answered(page, "first")
        checkpoints.change("other")
        running.process.send_signal(signal.SIGHUP)
        wait_until(lambda: LOADED in running.log, "the reload")
        page.locator("#scores button").nth(1).click()
        assert_answered(page, "second")
        expect(page.locator("#lead")).to_contain_text("second decides which of 7 classes")
        expect(page.locator("#classes-title")).to_have_text("The 7 classes it knows")
        page.context.close()


@contextmanager
def behind_nginx(server: ServerProcess, folder: Path) -> Iterator[str]:
    """The URL of a server behind the prefix /rednet/ of an nginx."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stores = " ".join(f"{name}_temp_path {folder};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    location = f"location /rednet/ {{ proxy_pass {server.url}/; client_max_body_size 1m; }}"
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/log; events {{}} "
        f"http {{ access_log off; {stores} server {{ listen 127.0.0.1:{port}; {location} }} }}"
    )
    process = subprocess.Popen(["nginx", "-p", folder, "-c", folder / "nginx.conf"], stderr=subprocess.DEVNULL)

    def listens() -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listens, "nginx")
        yield f"http://127.0.0.1:{port}/rednet"
    finally:
        process.terminate()
        process.wait()


@needs_chromium
@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is absent")
def test_page_works_behind_a_prefix(browser: Browser, many: ServerProcess, tmp_path: Path) -> None:
    """All its addresses are relative. A photo above the proxy's limit, 1 MB by default, is called too large."""
    with behind_nginx(many, tmp_path) as url:
        troubles: list[str] = []
        page = opened(browser, url, troubles)
        page.get_by_role("button", name="tench", exact=True).click()
        assert_answered(page, "")
        expect(page.locator("#curl")).to_contain_text(f"{url}/v1/explain.json")
        assert page.get_by_role("link", name="Metrics").evaluate("link => link.href") == f"{url}/metrics"
        assert troubles == []
        noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)
        page.set_input_files("#file", file_of(encoded(Image.fromarray(noise)), "large.png"))
        expect(page.locator("#photos li").first).to_contain_text("This photo is too large for the server.")
        expect(page.locator("#file-name")).to_have_text("tench.jpg")
        page.context.close()


@needs_chromium
@pytest.mark.slow
def test_page_works_with_front_ends(browser: Browser, tiny_path: Path) -> None:
    """It is served by processes without the network."""
    with ServerProcess("--checkpoint", tiny_path, "--frontends", 2) as running:
        troubles: list[str] = []
        page = opened(browser, running.url, troubles)
        page.set_input_files("#file", [file_of(encoded(photo(n)), f"{n}.png") for n in range(6)])
        expect(page.locator("#photos li.done")).to_have_count(6)
        assert_answered(page)
        page.get_by_text("How the network looks").click()
        expect(page.locator("#kernels")).to_have_attribute("aria-label", re.compile("stage 3"))
        assert troubles == []
        page.context.close()
