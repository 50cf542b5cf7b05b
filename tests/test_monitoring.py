"""The shipped alerts and dashboard, held against a real Prometheus that watches a real server."""

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import encoded, photo
from tests.servers import PATIENCE_S, ServerProcess, wait_until

DOCKER = Path(__file__).resolve().parents[1] / "docker"
PROMETHEUS = DOCKER / "prometheus"
DASHBOARD: Any = json.loads((DOCKER / "grafana" / "dashboards" / "rednet.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
RULES: Any = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]
SELECTORS = sorted({found for rule in RULES for found in re.findall(r"\w+\{[^}]*\}|rednet_\w+", rule["expr"])})

GPU_ONLY = {"rednet_device_memory_bytes", "rednet_device_utilization_ratio"}

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="Prometheus is absent: it comes from Debian"
)


class Watched:
    """A server and the Prometheus that watches it, with the shipped configuration but for target and pace."""

    def __init__(self, server: ServerProcess, folder: Path) -> None:
        self._server = server
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        (job,) = config["scrape_configs"]
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(PROMETHEUS / "alerts.yml", folder)
        self._log = folder / "log"
        options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", "--web.listen-address=127.0.0.1:0"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(["prometheus", *options], cwd=folder, stderr=log)

    def __enter__(self) -> "Watched":
        wait_until(lambda: self._port() is not None or self._process.poll() is not None, "Prometheus' port")
        port = self._port()
        assert port is not None, self._log.read_text()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S)
        wait_until(lambda: self.client.get("/-/ready").status_code == 200, "Prometheus")
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._process.kill()
        self._process.wait()

    def _port(self) -> str | None:
        found = re.search(r'"Listening on".* address=127\.0\.0\.1:(\d+)', self._log.read_text())
        return found[1] if found else None

    def ask(self, expression: str) -> list[float]:
        """The values that an expression has now; none of a target that was too slow the last time it was asked."""
        body = self.client.get("/api/v1/query", params={"query": expression}).json()
        assert body["status"] == "success", body
        return [float(sample["value"][1]) for sample in body["data"]["result"]]

    def load(self) -> set[int]:
        """More photos than its queue holds, one of them with no time to be answered; the statuses that came back."""
        body = encoded(photo())

        def predict(timeout_ms: str) -> int:
            headers = {"X-Request-Timeout-Ms": timeout_ms}
            return self._server.client.post("/v1/predict", content=body, headers=headers).status_code

        with ThreadPoolExecutor(4) as pool:
            return set(pool.map(predict, ["1", *["30000"] * 8]))


@pytest.fixture(scope="module")
def watched(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Under a load that leaves a trace in every metric, for long enough to take rates of it."""
    with (
        ServerProcess("--checkpoint", tiny_path, "--max-queue", "2", "--threads", 1) as server,
        Watched(server, tmp_path_factory.mktemp("prometheus")) as watched,
    ):
        statuses: set[int] = set()
        deadline = time.monotonic() + PATIENCE_S
        while not (statuses >= {200, 429, 504} and watched.ask("count_over_time(rednet_cancelled_total[1m]) > 5")):
            statuses |= watched.load()
            assert time.monotonic() < deadline, statuses
        yield watched


@needs_prometheus
@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts.test.yml"]
)
def test_prometheus_accepts_what_is_shipped(command: str) -> None:
    """Its own tool reads configuration and rules, and every alert fires and stays silent as its examples say."""
    done = subprocess.run(["promtool", *command.split()], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_says_what_to_do() -> None:
    """How urgent it is, what is wrong, and what a person does about it."""
    for rule in RULES:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"].keys() == {"summary", "action"}


@needs_prometheus
@pytest.mark.parametrize("selector", SELECTORS)
def test_alerts_are_about_series_that_exist(watched: Watched, selector: str) -> None:
    """A misspelt metric or label, or a bucket that the server has not, would make an alert that never fires."""
    wait_until(lambda: bool(watched.ask(selector)), selector)


@needs_prometheus
def test_prometheus_evaluates_every_alert(watched: Watched) -> None:
    """None ends in an error, such as a label that stands on one side of an operator only."""

    def health() -> list[str]:
        groups = watched.client.get("/api/v1/rules").json()["data"]["groups"]
        return [rule["health"] for group in groups for rule in group["rules"]]

    wait_until(lambda: health() == ["ok"] * len(RULES), "every alert")


@needs_prometheus
@pytest.mark.parametrize(("title", "expression"), QUERIES)
def test_every_panel_shows_something(watched: Watched, title: str, expression: str) -> None:
    """Each query of the dashboard has values; what only a GPU reports needs one."""
    if expression in GPU_ONLY:
        pytest.skip("only a GPU reports it")
    query = expression.replace("$__rate_interval", "1m")
    wait_until(lambda: not all(map(math.isnan, watched.ask(query))), f"{title}: {query}")


def test_the_dashboard_reads_the_provisioned_source() -> None:
    """By the name that the data source has; panels have numbers of their own and do not overlap."""
    (source,) = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    panels = DASHBOARD["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
