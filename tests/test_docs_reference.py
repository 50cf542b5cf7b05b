"""The documentation names everything that exists, and nothing else."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="the reference includes gRPC's statuses, which need the extra [grpc]")

import rednet
from docs_tools import command_line, errors, http, metrics
from docs_tools.pages import REFERENCE, ROOT, SECTIONS, section_names, updated
from rednet.model.images import opening, preprocess
from rednet.model.nn import rednet as rednet_module
from rednet.service import api_keys
from rednet.service.decoding import limits, overlay
from rednet.service.http import app, connections, image_requests, request_head, server, slow_readers
from rednet.service.http.routes import pieces, v2
from rednet.service.parsing import memory_budget, multipart, parser
from rednet.service.settings import OTHER_VARIABLES, Settings

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
REFERENCE_TEXT = "\n".join(path.read_text(encoding="utf-8") for path in sorted(REFERENCE.glob("*.md")))
each_page = pytest.mark.parametrize("page", PAGES, ids=IDS)

OPTIONS_OF_OTHERS = {"--wait", "--namespace"}  # docker compose, kubectl
OTHER_PROGRAMS = (
    "buildah|curl|docker|ghz|git|grpcurl|helm|journalctl|kubectl|make|mkdocs|nginx|node|npm|openssl|pip|podman|promtool|pytest|"
    "ray|rsync|serve run|systemctl|torchserve|tritonserver|uv|wrk|python -m (?!rednet)"
)
LINE_OF_OTHERS = re.compile(rf"\b(?:{OTHER_PROGRAMS})\b")
COMMAND = re.compile(r"\brednet (?:serve|predict|info|convert|quantize|train|evaluate)\b.*")
VERSIONED = "/v2/models/{name}/versions/{version}"
OTHER_PATHS = ("/", "/docs", "/openapi.json", "/v1", "/v2/systemsharedmemory", "/v2/cudasharedmemory", "/v2/models")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted(REFERENCE.glob("*.md")), ids=lambda page: page.name)
def test_generated_sections_are_up_to_date(page: Path) -> None:
    """Otherwise run `make reference`."""
    assert updated(text_of(page)) == text_of(page)


def test_every_generated_section_is_in_one_page() -> None:
    """None is forgotten or misspelt."""
    assert sorted(section_names(REFERENCE_TEXT)) == sorted(SECTIONS)
    assert REFERENCE_TEXT.count("<!-- begin ") == len(SECTIONS)


@each_page
def test_options_in_page_exist(page: Path) -> None:
    """Those of `rednet`. A line about another program may have that one's, in front of a command of `rednet`."""
    known = command_line.option_names() | OPTIONS_OF_OTHERS
    named = {
        option
        for line in joined_lines(text_of(page))
        for part in (COMMAND.findall(line) if LINE_OF_OTHERS.search(line) else [line])
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*(?!\w)", part)
    }
    assert named <= known


@each_page
def test_environment_variables_in_page_exist(page: Path) -> None:
    """`REDNET_<OPTION>` stands for all of them."""
    named = set(re.findall(r"\bREDNET_[A-Z0-9_]+\b", text_of(page)))
    assert named <= command_line.variable_names() | OTHER_VARIABLES


@each_page
def test_metrics_in_page_exist(page: Path) -> None:
    """With the endings of a histogram's series."""
    named = set(re.findall(r"(?<![\w/.])rednet_[a-z_]+\b(?![/.]\w)", text_of(page)))
    assert named <= metrics.metric_names()


@each_page
def test_endpoints_in_page_exist(page: Path) -> None:
    """A model's name and version may be given."""
    known = [re.sub(r"\\{\w+\\}", r"[\\w.{}-]+", re.escape(path)) for path in (*http.paths(), *OTHER_PATHS)]
    named = re.findall(
        r"(?<![\w.])(?:/v[12](?:/[\w.{}-]+)*|/(?:livez|readyz|metrics|docs|openapi\.json))\b", text_of(page)
    )
    assert not [path for path in named if not any(re.fullmatch(pattern, path) for pattern in known)]


@each_page
def test_query_parameters_in_page_exist(page: Path) -> None:
    """In addresses of the server."""
    queries = re.findall(r"/v[12]/\w+\?([\w=&%.-]+)", text_of(page))
    assert {part.split("=")[0] for query in queries for part in query.split("&")} <= http.parameter_names()


@each_page
def test_error_codes_in_page_exist(page: Path) -> None:
    """Where a code stands behind its status, or in an error's JSON."""
    text = text_of(page)
    named = {*re.findall(r"\b[45]\d\d `([a-z_]+)`", text), *re.findall(r'"code": ?"([a-z_]+)"', text)}
    assert named <= errors.error_codes()


def test_reference_lists_all_options_and_variables() -> None:
    """Of all commands."""
    wanted = command_line.option_names() - {"-h"} | command_line.variable_names() | OTHER_VARIABLES
    assert not [name for name in wanted if not re.search(rf"`(?:rednet |rednet COMMAND )?{name}\b", REFERENCE_TEXT)]


def test_reference_lists_all_endpoints() -> None:
    """Those with a version in their path have one line together."""
    missing = [path for path in http.paths() if not re.search(rf"^### \w+ {re.escape(path)}$", REFERENCE_TEXT, re.M)]
    assert all(path.startswith(VERSIONED) for path in missing)
    assert VERSIONED.replace("{version}", "1") in REFERENCE_TEXT


@pytest.mark.parametrize("kind", ["metrics", "errors", "python"])
def test_reference_lists_all_names(kind: str) -> None:
    """Each in code or in a heading of its own."""
    everything = {
        "metrics": {re.sub("_(bucket|count|sum)$", "", name) for name in metrics.metric_names()},
        "errors": errors.error_codes(),
        "python": set(rednet.__all__) - {"model", "service"},
    }
    assert not [
        name for name in everything[kind] if f"`{name}`" not in REFERENCE_TEXT and f"## {name}\n" not in REFERENCE_TEXT
    ]


def test_reference_lists_all_response_headers() -> None:
    """Those that pages of other origins may read."""
    assert not [name for name in app.EXPOSED_HEADERS if f"`{name}`".lower() not in REFERENCE_TEXT.lower()]


def test_reference_lists_all_fields_of_the_access_log() -> None:
    """What `note` and `note_ms` add to the line of a request."""
    fields = set(noted_fields())
    assert {"images", "status", "duration_ms"} <= fields
    assert not [name for name in fields if f"`{name}`" not in text_of(REFERENCE / "metrics.md")]


def noted_fields() -> Iterator[str]:
    for path in (ROOT / "service").rglob("*.py"):
        for node in ast.walk(ast.parse(text_of(path))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func.value) == "log"
            ):
                ending = {"note": "", "note_ms": "_ms"}.get(node.func.attr)
                if ending is not None:
                    yield from (f"{keyword.arg}{ending}" for keyword in node.keywords if keyword.arg)


def joined_lines(text: str) -> Iterator[str]:
    """Lines, those of a command that is continued with a backslash as one."""
    yield from text.replace("\\\n", " ").splitlines()


def test_citation_has_the_version() -> None:
    """The one that `rednet --version` prints."""
    assert f"\nversion: {rednet.__version__}\n" in text_of(ROOT / "CITATION.cff")


@pytest.mark.skipif(not shutil.which("mkdocs", path=str(Path(sys.executable).parent)), reason="MkDocs is not installed")
def test_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Strictly: a link to nowhere and a page that is not in the menu are errors."""
    command = [str(Path(sys.executable).with_name("mkdocs")), "build", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    loaded = [
        tag
        for page in tmp_path.rglob("*.html")
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?https?:[^>]*>", text_of(page))
    ]
    assert not [tag for tag in loaded if 'rel="canonical"' not in tag]


@pytest.mark.parametrize(
    ("value", "row"),
    [
        (request_head.MAX_HEAD_BYTES, "| request line and headers together | {:,} bytes |"),
        (request_head.MAX_HEADER_BYTES, "| one header | {:,} bytes |"),
        (request_head.MAX_HEADERS, "| headers | {:,} |"),
        (request_head.MAX_TARGET_BYTES, "| path and query | {:,} bytes |"),
        (request_head.MAX_PARAMETERS, "| query parameters | {:,} |"),
        (connections.HEAD_TIMEOUT_S, "first byte of a connection | {:g} s |"),
        (Settings().max_body_mb, "`--max-body-mb` ({:g} MB)"),
        (image_requests.MAX_ARRIVAL_S, "the deadline, and at most {:g} s, or"),
        (image_requests.MAX_TIMEOUT_MS, "| `X-Request-Timeout-Ms` | 1 to {:,} |"),
        (Settings().max_queue, "`--max-queue` ({:g})"),
        (multipart.MAX_FIELDS, "| parts of a form that are not images | {} |"),
        (v2.MAX_SMALL_BYTES, "repository's index | {:,} bytes |"),
        (slow_readers.MIN_SENT_BYTES, "the client reads at least {:,} bytes in 30 s"),
        (slow_readers.SEND_TIMEOUT_S, "the client reads at least 100,000 bytes in {:g} s"),
        (server.KEEP_ALIVE_S, "| an idle connection | {} s |"),
        (Settings().max_pixels / 1e6, "`--max-pixels` ({:g} million)"),
        (limits.MIN_SCANNED_PIXELS, "| {:,}, or 20 times"),
        (limits.MAX_SCANS, "or {} times `--max-pixels`"),
        (opening.MAX_READS, "| {:,} reads |"),
        (limits.MIN_CPU_LIMIT_S, "| processor time for decoding | {:g} s"),
        (limits.MAX_S_PER_PIXEL * 1e6, "or {:g} us for each pixel"),
        (limits.WORST_BYTES_PER_PIXEL, "at {} bytes a pixel"),
        (limits.PROCESS_BYTES / 1e6, "about {:g} MB"),
        (overlay.MAX_SIDE, "at most {:,} pixels on its longer side"),
        (pieces.PIECE_BYTES // 1024, "responses above {} KiB"),
        (app.MAX_LARGE_BODIES, "share {} times `--max-body-mb`"),
        (memory_budget.UPLOAD_GRACE_S, "still arriving after {:g} s"),
        (parser.MAX_HEAP_BODY_BYTES // 1000, "above\n{} kB are parsed"),
        (rednet_module.MAX_SIZE, "every other size of the architecture | {:,} |"),
        (preprocess.MAX_CROP, "| `crop` of the preprocessing | {:,} pixels |"),
        (preprocess.MAX_RESIZE, "| `resize` of the preprocessing | {:,} pixels |"),
        (api_keys.MIN_KEY_CHARS, "A key has at least {} characters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_limits_are_those_of_the_code(value: float, row: str) -> None:
    """Each row of the page that the code has a constant for."""
    assert row.format(value) in text_of(REFERENCE / "limits.md")
