"""The shipped alerts and dashboard, checked with a real Prometheus that scrapes a real server."""

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


class MonitoredServer:
    """A server and a Prometheus with the shipped configuration, except for the target and the intervals."""

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

    def __enter__(self) -> "MonitoredServer":
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

    def query(self, expression: str) -> list[float]:
        """The current values of an expression, without those of a target whose last scrape timed out."""
        body = self.client.get("/api/v1/query", params={"query": expression}).json()
        assert body["status"] == "success", body
        return [float(sample["value"][1]) for sample in body["data"]["result"]]

    def load(self) -> set[int]:
        """Send more photos than the queue holds, one of them with a hopeless deadline. Returns the statuses."""
        body = encoded(photo())

        def predict(timeout_ms: str) -> int:
            headers = {"X-Request-Timeout-Ms": timeout_ms}
            return self._server.client.post("/v1/predict", content=body, headers=headers).status_code

        with ThreadPoolExecutor(4) as pool:
            return set(pool.map(predict, ["1", *["30000"] * 8]))


@pytest.fixture(scope="module")
def monitored(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredServer]:
    """Has been under a load that leaves values in every metric, for long enough to compute rates."""
    with (
        ServerProcess("--checkpoint", tiny_path, "--max-queue", "2", "--threads", 1) as server,
        MonitoredServer(server, tmp_path_factory.mktemp("prometheus")) as monitored,
    ):
        statuses: set[int] = set()
        deadline = time.monotonic() + PATIENCE_S
        while not (statuses >= {200, 429, 504} and monitored.query("count_over_time(rednet_cancelled_total[1m]) > 5")):
            statuses |= monitored.load()
            assert time.monotonic() < deadline, statuses
        yield monitored


@needs_prometheus
@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts.test.yml"]
)
def test_promtool_accepts_the_configuration_and_rules(command: str) -> None:
    """Every alert fires, or does not, as the examples of its unit tests say."""
    done = subprocess.run(["promtool", *command.split()], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_severity_and_instructions() -> None:
    """Its severity, the problem, and what a person should do."""
    for rule in RULES:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"].keys() == {"summary", "action"}


@needs_prometheus
@pytest.mark.parametrize("selector", SELECTORS)
def test_alerts_select_existing_series(monitored: MonitoredServer, selector: str) -> None:
    """A misspelt metric or label, or a bucket that does not exist, would make an alert that never fires."""
    wait_until(lambda: bool(monitored.query(selector)), selector)


@needs_prometheus
def test_prometheus_evaluates_every_alert(monitored: MonitoredServer) -> None:
    """None has an error, such as a label on one side of an operator only."""

    def health() -> list[str]:
        groups = monitored.client.get("/api/v1/rules").json()["data"]["groups"]
        return [rule["health"] for group in groups for rule in group["rules"]]

    wait_until(lambda: health() == ["ok"] * len(RULES), "every alert")


@needs_prometheus
@pytest.mark.parametrize(("title", "expression"), QUERIES)
def test_every_dashboard_panel_has_values(monitored: MonitoredServer, title: str, expression: str) -> None:
    """Each query has values; panels about GPUs need one."""
    if expression in GPU_ONLY:
        pytest.skip("only a GPU reports it")
    query = expression.replace("$__rate_interval", "1m")
    wait_until(lambda: not all(map(math.isnan, monitored.query(query))), f"{title}: {query}")


def test_dashboard_counts_failures_as_the_alert_does() -> None:
    """Its panel has the ratio of RedNetErrors, and 0 as long as there was no failure."""
    (alert,) = [rule["expr"] for rule in RULES if rule["alert"] == "RedNetErrors"]
    ratio = " ".join(alert.partition("\n>")[0].split())
    failures = 'sum(rate(rednet_request_duration_seconds_count{endpoint=~"/v.*|.*/ModelInfer", status=~"5.."}[1h]))'
    assert failures in ratio
    expected = ratio.replace(failures, f"({failures} or vector(0))").replace("[1h]", "[$__rate_interval]")
    assert dict(QUERIES)["Failed"] == expected


def test_dashboard_works_with_any_data_source() -> None:
    """Every panel takes the one that is selected, at first the provisioned one."""
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {f"${{{variable['name']}}}"}
    (source,) = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert variable["current"] == {"text": source["name"], "value": source["uid"]}


def test_dashboard_panels_do_not_overlap() -> None:
    """They have unique ids and are within the 24 columns."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
