"""Every option of `rednet serve`, once: as a flag, as a `REDNET_*` variable and as a field of one frozen value."""

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

PREFIX = "REDNET_"
NO_OPTIONS = {"REDNET_NATIVE"}  # variables with the prefix that are read elsewhere
# Kubernetes tells every pod where Services like "rednet" and "rednet-canary" are: REDNET_PORT=tcp://10.0.0.1:8000.
KUBERNETES = re.compile(r"REDNET_(\w+_)?(SERVICE_HOST=|SERVICE_PORT\w*=|PORT_\d+_\w+=|PORT=\w+://).*")

Count = Annotated[int, Field(ge=1)]
MAX_THREADS = 1024  # torch ends with a segmentation fault at a hundred times that; those above the cores are not used
MAX_SHOWN = 60  # characters of a wrong value that the message repeats
DEVICE = r"\s*(auto|cpu(:\d{1,3})?|cuda(:\d{1,3})?)\s*"
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$"  # one segment of a URL, and what Kubernetes allows as a name
ADDRESS = r"\s*[^\s,]+\s*"
ORIGIN = r"\s*(\*|[a-z][a-z0-9+.-]*://[^\s,/*A-Z]+)\s*"  # as browsers send it: in lower case, without a path
HOST_NAME = r"\s*(\*\.)?([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])\s*"


class SettingsError(ValueError):
    """An option cannot be used; the message names it."""


class Settings(BaseModel):
    """Options of the server. A field `max_queue` is the flag `--max-queue` and the variable `REDNET_MAX_QUEUE`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: Path | None = Field(
        None,
        description="checkpoint: .safetensors, official .pth or PaddleClas .pdparams, or a folder that holds one; "
        "default: the embedded one",
    )
    model_name: str | None = Field(
        None,
        pattern=MODEL_NAME,
        description="name of the model in URLs, answers and metrics; default: the checkpoint's",
    )
    device: str = Field(
        "auto",
        pattern=f"^{DEVICE}(,{DEVICE})*$",
        description="auto, cpu, cuda or cuda:N; several, separated by commas, share the work",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field("auto", description="arithmetic of the network")
    host: str = Field(
        "127.0.0.1",
        pattern=f"^{ADDRESS}(,{ADDRESS})*$",
        description="addresses to listen on, separated by commas; 0.0.0.0: all of IPv4, ::: of IPv6 and IPv4",
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    uds: Path | None = Field(None, description="path of a Unix socket to listen on, instead of host and port")
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_THREADS)] = Field(
        "auto", description="cores that one batch may use on the CPU; auto: all that this process may use"
    )
    decoders: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_THREADS)] = Field(
        "auto", description="processes that decode images of everyday sizes; auto: one for each core that may be used"
    )
    max_batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = Field(
        "auto", description="images in one batch; auto: what warm-up finds best"
    )
    max_wait_ms: float = Field(
        0.0, ge=0, le=10_000, description="how long a batch may wait to fill; 0: no longer than the device is busy"
    )
    max_queue: Count = Field(
        256, le=65_536, description="images accepted and not yet answered; more are refused with 429"
    )
    api_key_file: Path | None = Field(
        None, description="file of API keys, one a line, of which requests must carry one; default: anyone may ask"
    )
    metrics_access: Literal["open", "key"] = Field("open", description="whether /metrics, too, wants an API key")
    allow_origins: str | None = Field(
        None,
        pattern=f"^{ORIGIN}(,{ORIGIN})*$",
        description="origins like https://app.example, separated by commas, whose pages may use the API in browsers; "
        "*: all; default: none",
    )
    allowed_hosts: str | None = Field(
        None,
        pattern=f"^{HOST_NAME}(,{HOST_NAME})*$",
        description="names like api.example or *.example, separated by commas, that the Host header may have, "
        "except on health endpoints and /metrics; default: any",
    )
    page: Literal["on", "off"] = Field("on", description="whether there is a page for people at /")
    docs: Literal["on", "off"] = Field("on", description="whether there are /docs and /openapi.json")
    request_timeout_s: float = Field(30.0, ge=0.001, le=3600, description="deadline of a request that names none")
    drain_timeout_s: float = Field(
        30.0, ge=0, le=3600, description="after SIGTERM, how long accepted requests may still take"
    )
    max_body_mb: float = Field(
        32.0, ge=0.001, le=10_000, description="size of a request body, in MB of 1,000,000 bytes"
    )
    max_pixels: Count = Field(
        50_000_000, le=2_000_000_000, description="pixels of one image, width times height, known from its header"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what the log tells")
    log_format: Literal["text", "json"] = Field("text", description="lines for people, or a JSON object each")

    @field_validator("checkpoint", "api_key_file", "uds", mode="before")
    @classmethod
    def _names_a_file(cls, path: object) -> object:
        if path == "":
            raise ValueError("an empty string names no file")
        return path

    @field_validator("metrics_access")
    @classmethod
    def _has_keys(cls, access: str, others: ValidationInfo) -> str:
        if access == "key" and others.data.get("api_key_file") is None:
            raise ValueError("there are no keys without an API key file")
        return access

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
    """Add flags for settings. Flags that are not given leave no trace, so that the environment can speak."""
    for name in names:
        field = Settings.model_fields[name]
        default = "" if field.default is None else f" (default: {field.default})"
        help_text = f"{field.description}{default}".replace("%", "%%")
        parser.add_argument(_flag(name), dest=name, default=argparse.SUPPRESS, metavar=_metavar(name), help=help_text)


def read_settings(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """The settings: flags before environment before defaults.

    Raises:
        SettingsError: a value is out of range, or a `REDNET_*` variable names no option (it is probably misspelt).
    """
    variables = {
        key: value
        for key, value in environment.items()
        if key.startswith(PREFIX) and key not in NO_OPTIONS and not KUBERNETES.fullmatch(f"{key}={value}")
    }
    known = {PREFIX + name.upper(): name for name in Settings.model_fields}
    if unknown := sorted(variables.keys() - known.keys()):
        raise SettingsError(f"{unknown[0]} is no option; there are {', '.join(known)}")
    values: dict[str, Any] = {known[key]: value for key, value in variables.items()} | dict(flags)
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        source = _flag(name) if name in flags else PREFIX + name.upper()
        shown = repr(values[name])
        shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
        raise SettingsError(f"{source} cannot be {shown}: {first['msg']}") from None


def check_files(settings: Settings) -> None:
    """Open the files that options name, which is quick, so that a wrong name is reported before anything slow.

    Raises:
        SettingsError: a file is missing, a folder, or not readable. The checkpoint may be a folder.
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


def _metavar(name: str) -> str:
    return name.rsplit("_", 1)[-1].upper()
