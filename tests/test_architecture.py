"""Who may import whom. The picture of the structure that the code is held to; arrows not listed here do not exist."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SERVICE = {
    "errors": set(),
    "terminal": set(),
    "cost": set(),
    "cgroup": set(),
    "cores": {"cgroup"},
    "types": {"cost", "errors"},
    "settings": set(),
    "init_process": set(),
    "listen": set(),
    "cli": {"commands", "init_process", "settings", "terminal"},
    "batcher": {"types"},
    "executor": {"cost", "errors", "types"},
    "hang_watch": set(),
    "engine": {"batcher", "cost", "errors", "executor", "hang_watch", "types"},
    "retries": set(),
    "admission": {"errors", "retries"},
    "client": {"admission", "cost", "engine", "errors", "types"},
    "scores": {"types"},
    "statuses": {"errors"},
    "heads": {"errors"},
    "incoming": set(),
    "slow_readers": set(),
    "answer_transport": set(),
    "connections": {"answer_transport", "errors", "heads", "incoming", "log", "slow_readers", "statuses"},
    "overlay": {"types", "model.images.rgb", "model.preprocess"},
    "child": set(),
    "fair_queue": set(),
    "decode_limits": {"cgroup"},
    "decode_cost": {"decode_limits", "model.images.opening", "model.images.tiff"},
    "decoder_failures": {"errors"},
    "decode": {
        "decode_limits",
        "errors",
        "overlay",
        "types",
        "model.images.errors",
        "model.images.opening",
        "model.preprocess",
    },
    "decoder_process": {
        "model.images.opening",
        "decode",
        "decode_cost",
        "decode_limits",
        "errors",
        "overlay",
        "model.preprocess",
    },
    "decoder_link": {"child", "decode_limits", "decoder_failures", "decoder_process", "errors", "fair_queue", "types"},
    "decoder_pool": {"decode_limits", "decoder_failures", "decoder_link", "decoder_process", "errors", "fair_queue"},
    "decoder": {"decode_limits", "decoder_link", "decoder_pool", "errors", "fair_queue", "types", "model.preprocess"},
    "transfer": {"types", "model.inference.backend", "torch"},
    "runner": {
        "cost",
        "transfer",
        "types",
        "model.inference.cam",
        "model.inference.backend",
        "model.inference.preparation",
        "torch",
    },
    "gpus": set(),
    "metrics": {"schemas", "types"},
    "log_writer": set(),
    "log": {"log_writer"},
    "keys": set(),
    "schemas": set(),
    "memory": {"errors"},
    "body_file": {"errors"},
    "intake": {"body_file", "errors", "memory"},
    "bodies": {"errors", "types"},
    "base64_text": {"errors"},
    "json_text": {"errors"},
    "sniff": {"base64_text"},
    "forms": {"base64_text", "bodies", "errors", "sniff"},
    "uploads": {"base64_text", "bodies", "errors", "forms", "json_text", "sniff"},
    "tensors": {"base64_text", "bodies", "errors", "forms", "json_text", "schemas", "types"},
    "parsing": {"bodies", "errors", "tensors", "types", "uploads"},
    "parser_process": {"bodies", "errors", "parsing"},
    "parser": {"bodies", "body_file", "errors", "parser_process", "parsing", "sniff"},
    "journey": {
        "bodies",
        "body_file",
        "decoder",
        "errors",
        "fair_queue",
        "intake",
        "log",
        "memory",
        "metrics",
        "parser",
        "settings",
        "types",
    },
    "routes.accept": set(),
    "routes.pieces": {"memory"},
    "routes.context": {"decoder", "errors", "journey", "keys", "memory", "metrics", "schemas", "types"},
    "routes.health": {"routes.context", "schemas", "types"},
    "routes.page": {"errors"},
    "routes.docs": set(),
    "routes.parameters": {"errors", "routes.context"},
    "routes.direct": {"routes.context", "routes.parameters"},
    "routes.respond": {
        "journey",
        "log",
        "routes.context",
        "routes.pieces",
        "types",
    },
    "routes.v1": {
        "bodies",
        "errors",
        "journey",
        "metrics",
        "routes.accept",
        "routes.context",
        "routes.direct",
        "routes.parameters",
        "routes.pieces",
        "routes.respond",
        "schemas",
        "scores",
        "types",
    },
    "routes.explain": {
        "errors",
        "journey",
        "routes.accept",
        "routes.context",
        "routes.parameters",
        "routes.respond",
        "routes.v1",
        "schemas",
        "scores",
        "types",
    },
    "routes.v2": {
        "bodies",
        "errors",
        "journey",
        "routes.context",
        "routes.pieces",
        "routes.parameters",
        "routes.respond",
        "schemas",
        "scores",
        "tensors",
        "types",
    },
    "app": {
        "bodies",
        "decoder",
        "errors",
        "journey",
        "keys",
        "log",
        "memory",
        "metrics",
        "parser",
        "routes.context",
        "routes.docs",
        "routes.explain",
        "routes.health",
        "routes.page",
        "routes.v1",
        "routes.v2",
        "schemas",
        "settings",
        "statuses",
        "types",
    },
}
ANYTHING = {"main", "commands"}  # the only places that build things and wire them together

MODEL = {
    "native": set(),
    "ops.reference": set(),
    "ops.torch_ops": set(),
    "ops.native_ops": {"native", "ops"},
    "ops.batch_norm": {"native", "ops.native_ops"},
    "ops.triton_ops": {"ops"},
    "ops": {"native", "ops"},
    "pointwise": set(),
    "involution": {"ops", "ops.batch_norm", "pointwise"},
    "rednet": {"involution", "ops.batch_norm", "pointwise"},
    "images.errors": set(),
    "images.signatures": set(),
    "images.jpeg": set(),
    "images.png": {"images.errors"},
    "images.tiff": {"images.errors", "images.signatures"},
    "images.first_frame": set(),
    "images.opening": {"images", "images.errors", "images.first_frame", "images.signatures"},
    "images.rgb": {"images", "images.errors", "images.signatures"},
    "preprocess": {"images.rgb"},
    "text": set(),
    "labels": set(),
    "label_files": {"labels", "text"},
    "progress": set(),
    "paddle": {"untrusted"},
    "outputs": set(),
    "untrusted": set(),
    "state_dicts": {"rednet"},
    "torch_files": {"untrusted"},
    "checkpoint": {
        "inference.activation_ranges",
        "labels",
        "outputs",
        "paddle",
        "preprocess",
        "rednet",
        "state_dicts",
        "text",
        "torch_files",
        "untrusted",
    },
    "inference.backend": set(),
    "inference.cam": set(),
    "inference.tf32": set(),
    "inference.fold_batchnorm": {"involution", "rednet"},
    "inference.activation_ranges": {"inference.fold_batchnorm", "inference.tf32", "preprocess", "rednet"},
    "inference.torch_backend": {
        "inference.backend",
        "inference.fold_batchnorm",
        "inference.tf32",
        "ops",
        "preprocess",
        "rednet",
    },
    "inference.native_backend": {
        "inference.backend",
        "inference.fold_batchnorm",
        "involution",
        "native",
        "preprocess",
        "rednet",
    },
    "inference.int8_backend": {
        "inference.activation_ranges",
        "inference.fold_batchnorm",
        "inference.native_backend",
        "native",
        "preprocess",
        "rednet",
    },
    "inference.cuda.conv_fallback": set(),
    "inference.cuda.batch_buckets": set(),
    "inference.cuda.network": {
        "inference.backend",
        "inference.cuda.conv_fallback",
        "inference.fold_batchnorm",
        "involution",
        "ops",
        "preprocess",
        "rednet",
    },
    "inference.cuda.backend": {
        "inference.backend",
        "inference.cuda.batch_buckets",
        "inference.cuda.network",
        "inference.tf32",
        "preprocess",
        "rednet",
    },
    "inference.self_check": {"inference.backend", "inference.tf32", "ops", "preprocess", "rednet"},
    "inference.preparation": {
        "inference.activation_ranges",
        "inference.backend",
        "inference.cuda.backend",
        "inference.int8_backend",
        "inference.native_backend",
        "inference.self_check",
        "inference.torch_backend",
        "ops",
        "preprocess",
        "rednet",
    },
    "photos": {"images.opening", "preprocess", "progress"},
    "folders": {"images.signatures", "photos", "text"},
    "calibrate": set(),
    "confusion": set(),
    "evaluate": {"calibrate", "photos", "preprocess", "progress"},
    "quantize": {
        "checkpoint",
        "folders",
        "inference.activation_ranges",
        "inference.preparation",
        "photos",
        "preprocess",
        "progress",
        "text",
    },
    "recipe": {"preprocess", "rednet"},
    "resume": {"checkpoint", "outputs", "photos", "recipe", "rednet"},
    "steps": {"images.rgb", "photos", "preprocess", "progress", "recipe", "rednet", "resume"},
    "train": {
        "calibrate",
        "checkpoint",
        "evaluate",
        "folders",
        "inference.preparation",
        "labels",
        "outputs",
        "photos",
        "recipe",
        "rednet",
        "resume",
        "steps",
        "text",
    },
}


def modules(package: str) -> dict[str, Path]:
    """Every module of a package, by its dotted name without the package's; packages that only gather are left out."""
    folder = ROOT / package
    found = {".".join(path.relative_to(folder).with_suffix("").parts): path for path in folder.rglob("*.py")}
    for gathering in (
        "__init__",
        "routes.__init__",
        "images.__init__",
        "inference.__init__",
        "inference.cuda.__init__",
    ):
        found.pop(gathering, None)
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports from torch or from us, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                found = [name.name for name in names]
            case ast.ImportFrom(module="service" | "service.routes" as module, names=names):
                found = [f"{module}.{name.name}" for name in names]
            case ast.ImportFrom(module=str(module)):
                found = [module]
            case _:
                continue
        yield from (name for name in found if name.split(".")[0] in ("torch", "model", "service"))


@pytest.mark.parametrize("name", modules("service"))
def test_the_service_imports_what_it_may(name: str) -> None:
    """It depends on `model`, never the other way; within it arrows point one way; only the runner sees torch."""
    if name in ANYTHING:
        return
    found = {each.removeprefix("service.") for each in imports(modules("service")[name])}
    assert found <= SERVICE[name]


@pytest.mark.parametrize("name", modules("model"))
def test_the_model_knows_nothing_of_requests(name: str) -> None:
    """It works alone."""
    found = {each for each in imports(modules("model")[name]) if not each.startswith("torch")}
    assert found <= {f"model.{each}" for each in MODEL[name]}
