"""The image, the Compose files and the proxy, checked against the server that they run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from rednet.service.settings import Settings, read_settings
from tests.conftest import encoded, photo
from tests.http_helpers import connected, predict, sample
from tests.servers import PATIENCE_S, ServerProcess, wait_until
from tests.test_requirements import EXTRAS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
BIN = Path(sys.executable).parent
OVERRIDES = {
    "cpu": [],
    "gpu": ["docker/gpu.yml"],
    "grpc": ["docker/grpc.yml"],
    "replicas": ["docker/replicas.yml"],
}
COMPOSE_FILES = ["docker-compose.yml", *(file for files in OVERRIDES.values() for file in files)]

compose_is_there = bool(shutil.which("docker")) and not subprocess.call(
    ["docker", "compose", "version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
)
needs_compose = pytest.mark.skipif(not compose_is_there, reason="Docker Compose is absent")
needs_nginx = pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is absent: it comes from Debian")


class Replaced(list[Any]):
    """A list that replaces a list of the overridden file, where other lists are appended."""


class Loader(yaml.SafeLoader):
    """Supports the tags of override files."""


def replaced(loader: Loader, node: yaml.SequenceNode) -> Replaced:
    return Replaced(loader.construct_sequence(node))


Loader.add_constructor("!reset", replaced)
Loader.add_constructor("!override", replaced)


def merged(base: Any, override: Any) -> Any:
    """The result of Compose for a file and an override, as far as these files need it."""
    if isinstance(base, dict) and isinstance(override, dict):
        both = {name: merged(value, override[name]) for name, value in base.items() if name in override}
        return base | override | both
    if isinstance(base, list) and isinstance(override, list) and not isinstance(override, Replaced):
        return base + override
    return override


@pytest.fixture(params=OVERRIDES)
def compose(request: pytest.FixtureRequest) -> Any:
    """A Compose file as shipped, without `.env`: defaults are filled in, overrides applied."""
    return overridden(request.param)


def overridden(override: str) -> Any:
    whole: Any = {}
    for file in ["docker-compose.yml", *OVERRIDES[override]]:
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / file).read_text())
        whole = merged(whole, yaml.load(text, Loader))
    return whole


def test_compose_files_conform_to_the_specification(compose: Any, tmp_path: Path) -> None:
    """The published schema allows every key and value."""
    file = tmp_path / "compose.json"
    file.write_text(json.dumps(compose))
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_compose
@pytest.mark.parametrize("override", OVERRIDES)
def test_docker_compose_accepts_the_files(override: str) -> None:
    """`docker compose config` succeeds."""
    options = [part for file in ["docker-compose.yml", *OVERRIDES[override]] for part in ("--file", file)]
    subprocess.run(["docker", "compose", *options, "config", "--quiet"], cwd=ROOT, check=True)


def test_compose_publishes_one_service_port_on_localhost(compose: Any) -> None:
    """All ports are published on localhost until `.env` changes that. The service has one, and one for gRPC."""
    services = compose["services"]
    published = {name: service.get("ports", []) for name, service in services.items()}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    ports = published["rednet"] + published.get("proxy", [])
    grpc_port = services["rednet"]["environment"].get("REDNET_GRPC_PORT")
    assert [port.endswith(f":{grpc_port}") for port in ports] == ([False, True] if grpc_port else [False])
    assert not set(services["grafana"]["networks"]) & set(services["rednet"]["networks"])


def test_containers_are_limited_and_restarted(compose: Any) -> None:
    """Each container has resource limits, restarts after a crash, has a read-only root and cannot gain privileges."""
    for name, service in compose["services"].items():
        assert service["restart"] == "unless-stopped", name
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}, name
        assert re.search(r":v?\d", service["image"]) or "build" in service, name


def test_compose_files_name_files_that_exist(compose: Any) -> None:
    """Mounted and built files are in the repository."""
    for service in compose["services"].values():
        mounted = [volume.split(":")[0] for volume in service.get("volumes", [])]
        assert all((ROOT / path).exists() for path in mounted if path.startswith("./docker"))
    build = compose["services"]["rednet"]["build"]
    dockerfile = (ROOT / build["dockerfile"]).read_text()
    assert f" AS {build.get('target', 'cpu')}\n" in dockerfile
    assert build["args"].keys() <= set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE))


def test_stop_grace_period_covers_the_drain(compose: Any) -> None:
    """The container is not killed while accepted requests are still answered."""
    grace_s = float(compose["services"]["rednet"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > Settings().drain_timeout_s + 5


def test_variables_of_image_and_compose_files_are_options() -> None:
    """The server accepts the variables of image, Compose file and example. All other variables of the example are used
    in the Compose files."""
    example = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    image = dict(re.findall(r"(REDNET_\w+)=(\S+)", DOCKERFILE.read_text()))
    for variables in (example, image, *(overridden(each)["services"]["rednet"]["environment"] for each in OVERRIDES)):
        read_settings({}, variables)
    interpolated = {name for file in COMPOSE_FILES for name in re.findall(r"\$\{(\w+)", (ROOT / file).read_text())}
    assert {name for name in example if not name.startswith("REDNET_")} == interpolated


def test_image_installs_locked_extras() -> None:
    """Those that the build argument may name, and `.env.example` and docker/grpc.yml name some of them."""
    dockerfile = DOCKERFILE.read_text()
    (copied,) = re.findall(r"^COPY (requirements-grpc.*) /source/$", dockerfile, re.MULTILINE)
    assert copied.split() == [f"requirements-{extra}.txt" for extra in EXTRAS]
    assert "/source/requirements-$extra.txt" in dockerfile
    example = re.findall(r"^#EXTRAS=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    wanted = [overridden("grpc")["services"]["rednet"]["build"]["args"]["EXTRAS"], *example]
    assert {name for names in wanted for name in names.split()} <= set(EXTRAS)


def test_triton_cache_is_on_a_volume() -> None:
    """It is outside of /tmp, which the Compose file mounts without permission to execute, and survives a restart."""
    cache = re.findall(r"^ENV TRITON_CACHE_DIR=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    rednet = yaml.load((ROOT / "docker" / "gpu.yml").read_text(), Loader)["services"]["rednet"]
    (folder,) = [volume.partition(":")[2] for volume in rednet["volumes"]]
    assert cache[0].startswith(f"{folder}/")


def test_hadolint_accepts_the_dockerfile() -> None:
    """hadolint finds no problems."""
    done = subprocess.run([BIN / "hadolint", DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dockerignore_lets_only_build_inputs_pass() -> None:
    """All files that the build reads pass `.dockerignore`, and no others."""
    allowed = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert all((ROOT / name).exists() for name in allowed)
    files = {"LICENSE", "README.md", "pyproject.toml", "requirements.txt", "setup.py"}
    requirements = {f"requirements-{name}.txt" for name in ("torch", *EXTRAS)}
    assert allowed == files | requirements | {"src", "model", "service"}  # the latter two through links in src/rednet


def test_health_check_of_the_image_follows_readiness(server: ServerProcess) -> None:
    """It passes for a ready server, and fails if no server listens."""
    commands = re.findall(r"^HEALTHCHECK .* CMD (\[.*?\])$", DOCKERFILE.read_text().replace("\\\n", ""), re.MULTILINE)
    command, *others = commands
    assert others == [command]  # the image for CUDA has another period
    python, *arguments = json.loads(command)
    assert python == "python"

    def healthy(port: str) -> bool:
        variables = os.environ | {"REDNET_PORT": port, "http_proxy": "http://127.0.0.1:9"}
        run = [sys.executable, *arguments]
        return subprocess.run(run, env=variables, stderr=subprocess.DEVNULL, check=False).returncode == 0

    assert healthy(server.url.rpartition(":")[2])
    assert not healthy("1")


class Proxy:
    """nginx with the shipped configuration, except for its own address, its servers' addresses and its folder for
    files."""

    def __init__(self, folder: Path, *servers: ServerProcess) -> None:
        text = (ROOT / "docker/nginx/nginx.conf").read_text()
        addresses = " ".join(f"server {server.url.removeprefix('http://')} max_fails=0;" for server in servers)
        socket = folder / "socket"
        for old, new in {
            "/tmp/": f"{folder}/",
            "server rednet:8000 resolve max_fails=0;": addresses,
            "listen 8080;": f"listen unix:{socket};",
        }.items():
            assert old in text
            text = text.replace(old, new)
        if os.geteuid() == 0:
            text = "user root;\n" + text  # pytest's folders are accessible only by their owner
        (folder / "nginx.conf").write_text(text)
        self._command = ["nginx", "-e", "stderr", "-c", str(folder / "nginx.conf")]
        self._socket = socket

    def __enter__(self) -> httpx.Client:
        self._process = subprocess.Popen(self._command)
        wait_until(lambda: self._socket.exists() or self._process.poll() is not None, "the proxy")
        assert self._process.poll() is None
        transport = httpx.HTTPTransport(uds=str(self._socket))
        self._client = httpx.Client(transport=transport, base_url="http://rednet", timeout=PATIENCE_S)
        return self._client

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(PATIENCE_S)


@needs_nginx
def test_rolling_update_behind_the_proxy_loses_no_request(tiny_path: Path, tmp_path: Path) -> None:
    """While one of two replicas drains and ends, every request is answered with 200."""
    options = ("--checkpoint", tiny_path, "--threads", 1)
    with ServerProcess(*options) as old, ServerProcess(*options) as new, Proxy(tmp_path, old, new) as client:
        statuses: list[int] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                statuses.append(predict(client, encoded(photo(width=300, height=300))).status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(statuses) > 20, "traffic")
        assert old.terminate() == 0
        before = len(statuses)
        wait_until(lambda: len(statuses) > before + 20, "traffic on the other one")
        stop.set()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200}
        assert client.get("/metrics").status_code == 404


LARGE = encoded(photo(width=900, height=700), "BMP")  # 1.9 MB


@needs_nginx
def test_proxy_streams_large_bodies(tiny_path: Path, tmp_path: Path) -> None:
    """The server receives bodies while they are being sent, and the proxy does not buffer them."""
    with ServerProcess("--checkpoint", tiny_path) as server, Proxy(tmp_path, server) as client:
        seen = threading.Event()

        def slowly() -> Iterator[bytes]:
            yield LARGE[:1_000_000]
            wait_until(lambda: sample(server.client, "rednet_inflight_requests") == 2, "the first half at the server")
            assert not [path for path in (tmp_path / "body").rglob("*") if path.is_file()]
            seen.set()
            yield LARGE[1_000_000:]

        for headers in ({"Content-Length": str(len(LARGE))}, {}):  # the second body is chunked
            seen.clear()
            response = client.post("/v1/predict", content=slowly(), headers=headers)
            assert response.status_code == 200, response.text
            assert seen.is_set()


@needs_nginx
def test_proxy_retries_bodies_of_any_size_on_another_replica(tiny_path: Path, tmp_path: Path) -> None:
    """A replica that has ended refuses the connection before any of the body is sent."""
    options = ("--checkpoint", tiny_path)
    with ServerProcess(*options) as gone, ServerProcess(*options) as left, Proxy(tmp_path, gone, left) as client:
        assert gone.terminate() == 0
        for data in (encoded(photo()), LARGE) * 6:
            assert predict(client, data).status_code == 200


@needs_nginx
def test_proxy_retries_small_bodies_of_a_draining_replica_only(tiny_path: Path, tmp_path: Path) -> None:
    """The proxy sends buffered bodies again. Larger ones are answered with the replica's 503 with Retry-After."""
    upload = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc"
    options = ("--checkpoint", tiny_path)
    with ServerProcess(*options) as draining, ServerProcess(*options) as ready, connected(draining.url, upload):
        wait_until(lambda: sample(draining.client, "rednet_inflight_requests") == 2, "the upload")
        draining.process.send_signal(signal.SIGTERM)
        wait_until(lambda: draining.client.get("/readyz").status_code == 503, "the drain")
        with Proxy(tmp_path, draining, ready) as client:
            for _ in range(6):
                assert predict(client, encoded(photo())).status_code == 200
            responses = [predict(client, LARGE) for _ in range(6)]
    assert {response.status_code for response in responses} == {200, 503}
    for response in responses:
        if response.status_code == 503:
            assert response.json()["error"]["code"] == "draining"
            assert int(response.headers["retry-after"]) >= 1
