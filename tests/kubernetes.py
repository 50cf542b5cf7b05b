"""Builds the Kubernetes manifests as `kubectl kustomize` does, and looks for mistakes in them, without a cluster."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from rednet.service.settings import Settings, SettingsError, read_settings

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "kubernetes"
VERSION = kubernetes_validate.latest_version()
# The published models of kinds that are not Kubernetes' own: see the comment in each file.
SCHEMAS = {
    "InferenceService": ("kserve", "V1beta1InferenceService"),
    "ClusterServingRuntime": ("kserve", "V1alpha1ClusterServingRuntime"),
    "ScaledObject": ("keda", "ScaledObject"),
    "PodMonitor": ("podmonitor", "PodMonitor"),
    "PrometheusRule": ("prometheusrule", "PrometheusRule"),
}
PROBES = {
    "startupProbe": ("/livez", "/v2/health/live"),
    "readinessProbe": ("/readyz", "/v2/health/ready"),
    "livenessProbe": ("/livez", "/v2/health/live"),
}
Manifest = dict[str, Any]


def combine(components: Sequence[str], folder: Path) -> Path:
    """A folder that is applied: a kustomization with the base and some components, such as `gpu`."""
    relative = os.path.relpath(FOLDER, folder)  # kustomize allows no other paths
    kustomization = {
        "resources": [f"{relative}/base"],
        "components": [f"{relative}/{name}" for name in components],
        "images": [{"name": "rednet", "newName": "registry.example/rednet"}],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


def build(folder: Path, manifests: Sequence[Manifest] = ()) -> list[Manifest]:
    """The manifests of a kustomization: of its resources and components, with JSON patches and images replaced.

    Args:
        folder: of the kustomization or component.
        manifests: that a component changes and adds to.
    """
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    supported = {"apiVersion", "kind", "resources", "components", "patches", "images"}
    assert kustomization.keys() <= supported, "not supported here"
    manifests = list(manifests)
    for name in kustomization.get("resources", ()):
        path = folder / name
        manifests += build(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    for name in kustomization.get("components") or ():
        manifests = build(folder / name, manifests)
    for patch in kustomization.get("patches", ()):
        target = patch["target"]
        (found,) = [
            each for each in manifests if (each["kind"], each["metadata"]["name"]) == (target["kind"], target["name"])
        ]
        for operation in yaml.safe_load(patch["patch"]):
            _apply(found, operation)
    images = {each["name"]: each for each in kustomization.get("images", ())}
    for manifest in manifests:
        for container in containers(manifest):
            name, _, tag = container["image"].partition(":")
            image = images.get(name, {})
            container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
    return manifests


def _apply(manifest: Manifest, operation: Mapping[str, Any]) -> None:
    """One operation of a JSON patch."""
    *parents, last = operation["path"].split("/")[1:]
    parent: Any = manifest
    for name in parents:
        parent = parent[int(name) if isinstance(parent, list) else name]
    if last == "-":
        parent.append(operation["value"])
    else:
        assert operation["op"] == "add" or last in parent
        parent[last] = operation["value"]


def containers(manifest: Manifest) -> Sequence[Manifest]:
    found: Sequence[Manifest] = pod_spec(manifest).get("containers", [])
    return found


def pod_spec(manifest: Manifest) -> Manifest:
    spec: Manifest = manifest.get("spec", {})
    spec = spec.get("template", {}).get("spec", spec) if manifest["kind"] == "Deployment" else spec
    predictor: Manifest = spec.get("predictor", spec)
    return predictor


def problems(manifests: Sequence[Manifest], answers: Callable[[str], bool]) -> list[str]:
    """What is wrong with manifests, one line each.

    Args:
        manifests: that are applied together.
        answers: whether the server that they start answers a path with success.
    """
    found = [line for each in manifests for line in _schema_errors(each)]
    if found:
        return found  # what follows takes the structure for granted
    for manifest in manifests:
        where = f"{manifest['kind']} {manifest['metadata']['name']}"
        for container in containers(manifest):
            found += [f"{where}: {line}" for line in _container_errors(container, answers)]
        found += [f"{where}: {line}" for line in _grace_errors(manifest)]
        found += [f"{where}: {line}" for line in _reference_errors(manifest, manifests)]
    return found


def _schema_errors(manifest: Manifest) -> Iterator[str]:
    """Keys and types that the schema does not allow."""
    kind = manifest["kind"]
    if kind not in SCHEMAS:
        try:
            kubernetes_validate.validate(manifest, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{kind}: {'.'.join(map(str, error.path))}: {error.message}"
        return
    file, name = SCHEMAS[kind]
    schema = json.loads((ROOT / "tests" / "schemas" / f"{file}.json").read_text()) | {"$ref": f"#/$defs/{name}"}
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{VERSION}-local-strict"
    core = Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    for mistake in Draft202012Validator(schema, registry=core @ Registry()).iter_errors(manifest):
        yield f"{kind}: {'.'.join(map(str, mistake.path))}: {mistake.message}"


def _container_errors(container: Manifest, answers: Callable[[str], bool]) -> Iterator[str]:
    ports = container["ports"]
    if ports[0]["containerPort"] != image_port():
        yield f"port {ports[0]['containerPort']} is not the image's {image_port()}"
    for probe, paths in PROBES.items():
        get = container.get(probe, {}).get("httpGet")
        if get is None:
            yield f"{probe} is missing"
            continue
        if get["path"] not in paths or not answers(get["path"]):
            yield f"{probe} asks for {get['path']}"
        if get["port"] not in (ports[0]["containerPort"], ports[0]["name"]):
            yield f"{probe} asks at port {get['port']}"
    command, *arguments = container["args"]
    flags = dict(
        zip((flag.removeprefix("--").replace("-", "_") for flag in arguments[::2]), arguments[1::2], strict=True)
    )
    if command != "serve" or "port" in flags or not flags.keys() <= Settings.model_fields.keys():
        yield f"arguments {container['args']}"
        return
    try:
        name = flags.get("model_name")
        read_settings(flags | ({"model_name": "x"} if name == "{{.Name}}" else {}), {})
    except SettingsError as error:
        yield str(error)


def _grace_errors(manifest: Manifest) -> Iterator[str]:
    if manifest["kind"] in ("Deployment", "InferenceService"):
        grace_s = pod_spec(manifest).get("terminationGracePeriodSeconds", 30)
        if grace_s < Settings().drain_timeout_s + 5:
            yield f"{grace_s} s of grace are too short to drain"


def _reference_errors(manifest: Manifest, manifests: Sequence[Manifest]) -> Iterator[str]:
    """Selectors, ports and targets that name nothing."""
    spec, kind = manifest["spec"], manifest["kind"]
    named = {(each["kind"], each["metadata"]["name"]) for each in manifests}
    if (
        kind in ("HorizontalPodAutoscaler", "ScaledObject")
        and ("Deployment", spec["scaleTargetRef"]["name"]) not in named
    ):
        yield f"there is no Deployment {spec['scaleTargetRef']['name']}"
    if kind == "InferenceService":
        runtime = spec["predictor"]["model"]["runtime"]
        if ("ClusterServingRuntime", runtime) not in named:
            yield f"there is no runtime {runtime}"
    if kind not in SELECTED:
        return
    selector, ports = SELECTED[kind](spec)
    pods = [each["spec"]["template"] for each in manifests if each["kind"] == "Deployment"]
    if not selector or not any(selector.items() <= pod["metadata"]["labels"].items() for pod in pods):
        yield f"the selector {selector} selects no pod"
    known = {port["name"] for pod in pods for port in pod["spec"]["containers"][0]["ports"]} | {image_port()}
    yield from (f"port {port} is none of a pod" for port in ports if port not in known)


# By kind: the labels that it selects pods by, and the pods' ports that it names.
SELECTED: Mapping[str, Callable[[Manifest], tuple[Mapping[str, str] | None, Sequence[str | int]]]] = {
    "Deployment": lambda spec: (spec["selector"].get("matchLabels"), []),
    "PodDisruptionBudget": lambda spec: (spec["selector"].get("matchLabels"), []),
    "Service": lambda spec: (spec.get("selector"), [port["targetPort"] for port in spec["ports"]]),
    "NetworkPolicy": lambda spec: (
        spec["podSelector"].get("matchLabels"),
        [port["port"] for rule in spec["ingress"] for port in rule["ports"]],
    ),
    "PodMonitor": lambda spec: (
        spec["selector"].get("matchLabels"),
        [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]],
    ),
}


def image_port() -> int:
    """The port on which the image listens."""
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    (exposed,) = re.findall(r"^EXPOSE (\d+)$", dockerfile, re.MULTILINE)
    assert f"REDNET_PORT={exposed}" in dockerfile
    return int(exposed)
