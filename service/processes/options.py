"""What the supervisor passes to the processes that it starts, as JSON in their only argument."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Self

from rednet.service.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessOptions:
    """The options of every process.

    Attributes:
        settings: those of the server that were given, as JSON.
        control: descriptor of the socket to the supervisor.
        started: when the process was started, by `time.monotonic()`.
    """

    settings: str
    control: int = -1
    started: float = 0.0

    def with_start(self, control: int, started: float) -> Self:
        """The same for a process that is about to start."""
        return replace(self, control=control, started=started)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))

    def read_settings(self) -> Settings:
        return Settings.model_validate_json(self.settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions(ProcessOptions):
    """The options of the engine's process.

    Attributes:
        listener: descriptor of the unix socket on which it accepts front ends.
    """

    listener: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontEndOptions(ProcessOptions):
    """The options of a front end.

    Attributes:
        engine: path of the unix socket of the engine's process.
        sockets: descriptors on which it accepts connections, as do all others.
        grpc: addresses at which it listens for gRPC, as do all others.
        board: descriptor of the numbers that front ends share.
        row: its own on the board.
    """

    engine: str
    sockets: Sequence[int]
    grpc: Sequence[str]
    board: int
    row: int
