"""The Kubernetes manifests and the systemd units, checked without a cluster against schemas and the real server."""

import copy
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.servers import ServerProcess

pytest.importorskip("kubernetes_validate")

from tests.kubernetes import FOLDER, ROOT, Manifest, build, combine, containers, problems

FILES = {path.parent.name: yaml.safe_load(path.read_text()) for path in FOLDER.glob("*/kustomization.yaml")}
COMPONENTS = sorted(name for name, file in FILES.items() if file["kind"] == "Component")
# With the base: each by itself, and all of them with one of the two that scale.
COMBINATIONS = [
    *([name] for name in COMPONENTS),
    *([name for name in COMPONENTS if name != other] for other in ("hpa", "keda")),
]
OFFERED = "sum(rate(rednet_offered_seconds_total"


@pytest.fixture
def answers(server: ServerProcess) -> Callable[[str], bool]:
    """Whether a real server answers a path with success."""
    return lambda path: server.client.get(path).status_code == 200


@pytest.fixture(params=[["."], ["kserve"], *COMBINATIONS], ids=",".join)
def applied(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that can be applied: one of ours, or one that combines components."""
    (first, *_) = names = request.param
    return combine(names, tmp_path) if first in COMPONENTS else FOLDER / first


@pytest.fixture
def whole(tmp_path: Path) -> Callable[[str], list[Manifest]]:
    """The manifests of a kustomization; of a component with those of the base."""
    return lambda name: build(combine([name], tmp_path) if name in COMPONENTS else FOLDER / name)


def test_manifests_have_no_problems(applied: Path, answers: Callable[[str], bool]) -> None:
    """Schemas are strict; ports, probes, selectors, arguments and the grace period fit the image and each other."""
    assert problems(build(applied), answers) == []


@pytest.mark.parametrize("name", FILES)
def test_every_manifest_belongs_to_a_kustomization(name: str) -> None:
    """Files that nothing names would not be checked; adapter-rule.yaml is for another program."""
    files = {path.name for path in (FOLDER / name).glob("*.yaml")} - {"kustomization.yaml", "adapter-rule.yaml"}
    assert files == set(FILES[name].get("resources", ()))


def test_applied_kustomization_lists_every_component() -> None:
    """Commented out: what is applied as it is, is the base."""
    text = (FOLDER / "kustomization.yaml").read_text()
    assert sorted(re.findall(r"^# - (\S+) ", text, re.MULTILINE)) == COMPONENTS
    assert yaml.safe_load(text)["components"] is None


def change(manifests: Sequence[Manifest], kind: str, path: str, value: Any) -> list[Manifest]:
    """The manifests with one value set; None removes it."""
    changed = copy.deepcopy(list(manifests))
    at: Any = next(each for each in changed if each["kind"] == kind)
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split("/")]
    for part in parents:
        at = at[part]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return changed


POD, RUNTIME = "spec/template/spec/containers/0", "spec/containers/0"
PLANTED = [
    # an unknown key
    ("base", "Deployment", f"{POD}/readynessProbe", {}),
    ("keda", "ScaledObject", "spec/cooldown", 1),
    ("kserve", "InferenceService", "spec/predictor/model/storageURI", "x"),
    ("kserve", "ClusterServingRuntime", f"{RUNTIME}/port", 1),
    ("monitoring", "PodMonitor", "spec/endpoints", []),
    ("monitoring", "PrometheusRule", "spec/groups/0/rules/0/severity", "page"),
    # a wrong type
    ("base", "Deployment", f"{POD}/ports/0/containerPort", "8000"),
    ("hpa", "HorizontalPodAutoscaler", "spec/maxReplicas", "8"),
    ("keda", "ScaledObject", "spec/triggers/0/metadata/threshold", 0.7),
    ("kserve", "InferenceService", "spec/predictor/minReplicas", "1"),
    ("kserve", "ClusterServingRuntime", "spec/multiModel", "no"),
    # a wrong path of a probe
    ("base", "Deployment", f"{POD}/readinessProbe/httpGet/path", "/healthz"),
    ("base", "Deployment", f"{POD}/readinessProbe/httpGet/path", "/livez"),
    ("kserve", "ClusterServingRuntime", f"{RUNTIME}/livenessProbe/httpGet/path", "/v2/live"),
    # a missing selector, or one that selects nothing
    ("base", "Deployment", "spec/selector", None),
    ("base", "Service", "spec/selector", None),
    ("base", "PodDisruptionBudget", "spec/selector/matchLabels", {"app": "rednet"}),
    ("monitoring", "PodMonitor", "spec/selector", None),
    # ports that differ
    ("base", "Deployment", f"{POD}/ports/0/containerPort", 8080),
    ("base", "Service", "spec/ports/0/targetPort", 8080),
    ("base", "NetworkPolicy", "spec/ingress/0/ports/0/port", "web"),
    ("kserve", "ClusterServingRuntime", f"{RUNTIME}/ports/0/containerPort", 8080),
    ("kserve", "ClusterServingRuntime", f"{RUNTIME}/readinessProbe/httpGet/port", 8080),
    # names of other resources, options, and time to drain
    ("hpa", "HorizontalPodAutoscaler", "spec/scaleTargetRef/name", "server"),
    ("kserve", "InferenceService", "spec/predictor/model/runtime", "rednet"),
    ("base", "Deployment", f"{POD}/args/1", "--log-formt"),
    ("base", "Deployment", "spec/template/spec/terminationGracePeriodSeconds", 30),
]


@pytest.mark.parametrize(("name", "kind", "path", "value"), PLANTED)
def test_a_planted_mistake_is_found(
    name: str,
    kind: str,
    path: str,
    value: Any,
    whole: Callable[[str], list[Manifest]],
    answers: Callable[[str], bool],
) -> None:
    """Each is one change to manifests that have no problems."""
    assert problems(change(whole(name), kind, path, value), answers)


def test_autoscalers_follow_offered_seconds() -> None:
    """Backlog cannot exceed the deadline, so it is no signal under overload; 0.7 is the share of time to be busy."""
    (scaled,) = [each for each in build(FOLDER / "keda") if each["kind"] == "ScaledObject"]
    metadata = scaled["spec"]["triggers"][0]["metadata"]
    assert metadata["query"].startswith(OFFERED)
    assert metadata["threshold"] == "0.7"
    (service,) = [each for each in build(FOLDER / "kserve") if each["kind"] == "InferenceService"]
    external = service["spec"]["predictor"]["autoScaling"]["metrics"][0]["external"]
    assert external["metric"]["query"].startswith(OFFERED)
    assert external["target"]["averageValue"] == "0.7"
    (autoscaler,) = [each for each in build(FOLDER / "hpa") if each["kind"] == "HorizontalPodAutoscaler"]
    pods = autoscaler["spec"]["metrics"][0]["pods"]
    (rule,) = yaml.safe_load((FOLDER / "hpa" / "adapter-rule.yaml").read_text())["rules"]
    assert (pods["metric"]["name"], pods["target"]["averageValue"]) == (rule["name"]["as"], "700m")
    assert rule["seriesQuery"].startswith("rednet_offered_seconds_total{")


def test_prometheus_rule_has_the_alerts_of_compose() -> None:
    """Otherwise run `make alerts`."""
    (rule,) = [each for each in build(FOLDER / "monitoring") if each["kind"] == "PrometheusRule"]
    alerts = ROOT / "docker" / "prometheus" / "alerts.yml"
    assert rule["spec"] == yaml.safe_load(alerts.read_text())
    text = (FOLDER / "monitoring" / "prometheusrule.yaml").read_text()
    assert text.endswith("\n" + re.sub("^(?=.)", "  ", alerts.read_text(), flags=re.MULTILINE))  # with the comments


def test_containers_are_confined(applied: Path) -> None:
    """No root, no writing outside volumes, no capabilities."""
    for manifest in build(applied):
        for container in containers(manifest):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            pod = manifest["spec"].get("template", {}).get("spec", {}).get("securityContext", {})
            assert (context | pod)["runAsNonRoot"] is True


def deployed(manifests: Sequence[Manifest]) -> tuple[Manifest, Manifest]:
    """The pod of the Deployment, and its container."""
    (pod,) = [each["spec"]["template"]["spec"] for each in manifests if each["kind"] == "Deployment"]
    (container,) = pod["containers"]
    return pod, container


def test_gpu_component_asks_for_a_gpu(whole: Callable[[str], list[Manifest]]) -> None:
    """With the image that holds CUDA, from the registry of the kustomization that is applied."""
    _, container = deployed(whole("gpu"))
    assert container["image"].startswith("registry.example/rednet:")
    assert container["image"].endswith("-cuda")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["args"][-2:] == ["--device", "cuda"]
    assert "/var/cache/rednet" in [mount["mountPath"] for mount in container["volumeMounts"]]  # the root is read-only


def test_api_keys_component_mounts_the_secret(whole: Callable[[str], list[Manifest]]) -> None:
    """The option names a file in its folder. The folder as a whole is mounted, otherwise it would never be updated."""
    pod, container = deployed(whole("api-keys"))
    (volume,) = [each for each in pod["volumes"] if each.get("secret", {}).get("secretName") == "rednet-api-keys"]
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == volume["name"]]
    assert container["args"][-2:] == ["--api-key-file", f"{mount['mountPath']}/keys"]
    assert "subPath" not in mount
    assert volume["secret"]["defaultMode"] == 0o440


def test_grpc_component_opens_the_port_of_the_option(whole: Callable[[str], list[Manifest]]) -> None:
    """In the pod, the Service and the NetworkPolicy."""
    manifests = whole("grpc")
    _, container = deployed(manifests)
    assert container["args"][-2:] == ["--grpc-port", "9000"]
    assert container["ports"][1] == {"name": "grpc", "containerPort": 9000, "protocol": "TCP"}
    specs = {each["kind"]: each["spec"] for each in manifests}
    assert [port["targetPort"] for port in specs["Service"]["ports"]] == ["http", "grpc"]
    assert [port["port"] for port in specs["NetworkPolicy"]["ingress"][0]["ports"]] == ["http", "grpc"]


def kubectl_minor_version() -> int:
    """21 for 1.21; 0: kubectl is absent."""
    if not shutil.which("kubectl"):
        return 0
    done = subprocess.run(
        ["kubectl", "version", "--client", "--output=json"], capture_output=True, text=True, check=True
    )
    return int(re.findall(r'"minor": "(\d+)', done.stdout)[0])


@pytest.mark.skipif(
    kubectl_minor_version() < 21, reason="kubectl is absent, or older than 1.21 and knows no components"
)
def test_kubectl_builds_the_same_manifests(applied: Path) -> None:
    """The checks above see what would be applied."""
    done = subprocess.run(["kubectl", "kustomize", str(applied)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def key(manifest: Manifest) -> str:
        return f"{manifest['kind']} {manifest['metadata']['name']}"

    assert sorted(yaml.safe_load_all(done.stdout), key=key) == sorted(build(applied), key=key)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is absent")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """`systemd-analyze verify` knows every directive; the program's path is set to one that exists."""
    for path in (ROOT / "deploy" / "systemd").iterdir():
        text = path.read_text().replace("/opt/rednet/bin/rednet", "/bin/true")
        for name in (path.name, f"{path.stem}@{path.suffix}"):  # by itself, and as a template
            (tmp_path / name).write_text(text)
    units = [
        tmp_path / f"{stem}{suffix}" for stem in ("rednet", "rednet@flowers") for suffix in (".service", ".socket")
    ]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
