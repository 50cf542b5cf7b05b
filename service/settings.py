"""The options of `rednet serve`. Each is a flag, a `REDNET_*` variable and a field of `Settings`, defined once."""

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

PREFIX = "REDNET_"
OTHER_VARIABLES = {"REDNET_NATIVE"}  # variables with the prefix that are read elsewhere
# Kubernetes sets variables for Services such as "rednet" and "rednet-canary": REDNET_PORT=tcp://10.0.0.1:8000.
KUBERNETES = re.compile(r"REDNET_(\w+_)?(SERVICE_HOST=|SERVICE_PORT\w*=|PORT_\d+_\w+=|PORT=\w+://).*")

Count = Annotated[int, Field(ge=1)]
MAX_THREADS = 1024  # torch crashes at a hundred times that; threads beyond the number of cores are not used
DEFAULT = re.compile(r" \(default: .*\)$")  # at the end of a description
MAX_SHOWN_CHARS = 60  # of an invalid value, in the message
DEVICE = r"\s*(auto|cpu(:\d{1,3})?|cuda(:\d{1,3})?)\s*"
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$"  # one segment of a URL, and what Kubernetes allows as a name
ADDRESS = r"\s*[^\s,]+\s*"
ORIGIN = r"\s*(\*|[a-z][a-z0-9+.-]*://[^\s,/*A-Z]+)\s*"  # as browsers send it: in lower case, without a path
HOST_NAME = r"\s*(\*\.)?([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])\s*"


class SettingsError(ValueError):
    """An option is invalid. The message names it."""


class Settings(BaseModel):
    """Options of the server. The field `max_queue` is the flag `--max-queue` and the variable `REDNET_MAX_QUEUE`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: Path | None = Field(
        None,
        description="checkpoint file (.safetensors, official .pth or PaddleClas .pdparams), or a folder with one; "
        "loaded again on SIGHUP (default: the embedded one)",
    )
    model_name: str | None = Field(
        None,
        pattern=MODEL_NAME,
        description="name of the model in URLs, responses and metrics, of letters, digits, dots, dashes and "
        "underscores (default: that of the checkpoint)",
    )
    device: str = Field(
        "auto",
        pattern=f"^{DEVICE}(,{DEVICE})*$",
        description="device that runs the network: auto, cpu, cuda or cuda:N; several, separated by commas, "
        "share the work",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto", description="numeric precision of the network: auto, fp32, bf16, fp16 or int8"
    )
    host: str = Field(
        "127.0.0.1",
        pattern=f"^{ADDRESS}(,{ADDRESS})*$",
        description="addresses to listen on, separated by commas; 0.0.0.0: all IPv4, ::: all IPv6 and IPv4 addresses",
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    uds: Path | None = Field(None, description="path of a Unix socket to listen on, instead of host and port")
    grpc_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port for gRPC on the addresses of --host; 0: any free one (default: no gRPC)",
    )
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_THREADS)] = Field(
        "auto", description="CPU cores for one batch; auto: all cores that the process may use"
    )
    decoders: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_THREADS)] = Field(
        "auto", description="processes that decode small images; auto: one for each core that the server may use"
    )
    frontends: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_THREADS)] = Field(
        "auto",
        description="processes that speak HTTP, in front of one that runs the network; 1: a single process for both; "
        "auto: 1 on the CPU of a small machine, more on a GPU or with many cores",
    )
    max_batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = Field(
        "auto", description="maximum number of images in a batch; auto: chosen by measurements during warm-up"
    )
    max_wait_ms: float = Field(
        0.0,
        ge=0,
        le=10_000,
        description="how long a batch may wait for more images, in ms; 0: only while the device is busy",
    )
    max_queue: Count = Field(
        256, le=65_536, description="maximum number of images accepted and not yet answered; more get 429"
    )
    api_key_file: Path | None = Field(
        None,
        description="file with one API key per line, as KEY or NAME:KEY, one of which requests must send; read again "
        "on SIGHUP (default: no key required)",
    )
    metrics_access: Literal["open", "key"] = Field("open", description="whether /metrics requires a key: open or key")
    allow_origins: str | None = Field(
        None,
        pattern=f"^{ORIGIN}(,{ORIGIN})*$",
        description="origins such as https://app.example, separated by commas, whose pages may call the API; *: all "
        "(default: none)",
    )
    allowed_hosts: str | None = Field(
        None,
        pattern=f"^{HOST_NAME}(,{HOST_NAME})*$",
        description="names such as api.example or *.example, separated by commas, that the Host header may have, "
        "except on health endpoints and /metrics (default: any)",
    )
    forwarded_allow_ips: str | None = Field(
        None,
        description="addresses or networks of proxies, separated by commas, whose X-Forwarded-For names the client in "
        "the log; *: all, also on a Unix socket (default: none)",
    )
    page: Literal["on", "off"] = Field("on", description="the demo page at /: on or off")
    docs: Literal["on", "off"] = Field("on", description="the API documentation at /docs and /openapi.json: on or off")
    request_timeout_s: float = Field(
        30.0, ge=0.001, le=3600, description="timeout of requests without X-Request-Timeout-Ms, in seconds"
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, le=3600, description="time for accepted requests to finish after SIGTERM, in seconds"
    )
    max_body_mb: float = Field(
        32.0, ge=0.001, le=10_000, description="maximum size of a request body, in MB of 1,000,000 bytes"
    )
    max_pixels: Count = Field(
        50_000_000, le=2_000_000_000, description="maximum width times height of an image, checked in its header"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="minimum level of log lines: debug, info, warning or error"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="format of log lines: text, or json with one object per line"
    )

    @field_validator("checkpoint", "api_key_file", "uds", mode="before")
    @classmethod
    def _names_a_file(cls, path: object) -> object:
        if path == "":
            raise ValueError("the file name is empty")
        return path

    @field_validator("metrics_access")
    @classmethod
    def _has_keys(cls, access: str, others: ValidationInfo) -> str:
        if access == "key" and others.data.get("api_key_file") is None:
            raise ValueError("it requires --api-key-file")
        return access

    @field_validator("forwarded_allow_ips")
    @classmethod
    def _are_networks(cls, text: str | None) -> str | None:
        if text is not None and text.strip() != "*":
            for each in _elements(text) or [""]:
                ip_network(each)  # uvicorn would take anything else for a name that never matches
        return text

    @property
    def origins(self) -> list[str]:
        """The elements of `allow_origins`."""
        return _elements(self.allow_origins)

    @property
    def host_names(self) -> list[str]:
        """The elements of `allowed_hosts`."""
        return _elements(self.allowed_hosts)

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 1_000_000)


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str] = tuple(Settings.model_fields)) -> None:
    """Add flags for settings. They have no defaults here, so that environment variables take effect."""
    for name in names:
        field = Settings.model_fields[name]
        help_text = _description(name) + ("" if field.default is None else f" (default: {_shown(field.default)})")
        if limits := _limits(_schema(name)):
            help_text = help_text.replace("(default: ", f"({limits}; default: ")
        help_text = help_text.replace("%", "%%")
        parser.add_argument(_flag(name), dest=name, default=argparse.SUPPRESS, metavar=_metavar(name), help=help_text)


def read_settings(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """Read the settings. Flags take precedence over environment variables, and those over defaults.

    Raises:
        SettingsError: a value is out of range, or a `REDNET_*` variable is not an option, probably due to a typo.
    """
    variables = {
        key: value
        for key, value in environment.items()
        if key.startswith(PREFIX) and key not in OTHER_VARIABLES and not KUBERNETES.fullmatch(f"{key}={value}")
    }
    known = {PREFIX + name.upper(): name for name in Settings.model_fields}
    if unknown := sorted(variables.keys() - known.keys()):
        raise SettingsError(f"{unknown[0]} is not an option; the options are {', '.join(known)}")
    values: dict[str, Any] = {known[key]: value for key, value in variables.items()} | dict(flags)
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        source = _flag(name) if name in flags else PREFIX + name.upper()
        shown = repr(values[name])
        shown = shown if len(shown) <= MAX_SHOWN_CHARS else f"{shown[:MAX_SHOWN_CHARS]}..."
        reason = first["ctx"]["error"] if first["type"] == "value_error" else f"expected: {_expected(name)}"
        raise SettingsError(f"{source} cannot be {shown}; {reason}") from None


def check_files(settings: Settings) -> None:
    """Open the files named by options, so that a wrong name is reported before anything slow happens.

    Raises:
        SettingsError: a file is missing, is a folder (unless it is the checkpoint) or is not readable.
    """
    for name in ("checkpoint", "api_key_file"):
        path: Path | None = getattr(settings, name)
        if path is not None and not (name == "checkpoint" and path.is_dir()):
            try:
                path.open("rb").close()
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise SettingsError(f"{_flag(name)} {path} cannot be read: {reason}") from None


def _elements(text: str | None) -> list[str]:
    return [each.strip() for each in text.split(",")] if text else []


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


@cache
def _schemas() -> Mapping[str, Any]:
    schemas: Mapping[str, Any] = Settings.model_json_schema()["properties"]
    return schemas


def _schema(name: str) -> Sequence[Mapping[str, Any]]:
    """The JSON schemas of a setting, one for each type that it may have."""
    schema = _schemas()[name]
    alternatives: Sequence[Mapping[str, Any]] = schema.get("anyOf", [schema])
    return alternatives


def _limits(schema: Sequence[Mapping[str, Any]]) -> str:
    """The smallest and the largest value of a number; empty if it cannot be one."""
    return "".join(f"{_shown(each['minimum'])} to {_shown(each['maximum'])}" for each in schema if "minimum" in each)


def _expected(name: str) -> str:
    """The values that a setting may have; if there is no list of them, its description."""
    schema = _schema(name)
    values = [str(value) for each in schema for value in each.get("enum", [each["const"]] if "const" in each else [])]
    if limits := _limits(schema):
        whole = any(each.get("type") == "integer" for each in schema)
        values.append(f"a {'whole ' * whole}number from {limits}")
    return " or ".join(filter(None, [", ".join(values[:-1]), *values[-1:]])) or DEFAULT.sub("", _description(name))


def _description(name: str) -> str:
    return Settings.model_fields[name].description or ""


def _metavar(name: str) -> str:
    return name.rsplit("_", 1)[-1].upper()
