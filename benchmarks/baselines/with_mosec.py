"""mosec: its server in Rust, a stage of processes that decode, and one that runs batches."""

import sys
from typing import Any

import mosec

from benchmarks.baselines.shared import MAX_BATCH, answer, decoded, network, options, set_role
from rednet.service.types import Pixels


class Decode(mosec.Worker):  # type: ignore[misc]  # it is not installed for type checks
    def __init__(self) -> None:
        super().__init__()
        set_role("decoder")

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> Pixels:
        return decoded(data)


class Predict(mosec.Worker):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        set_role("engine")
        self.network = network(chosen.model)

    def forward(self, data: list[Pixels]) -> list[dict[str, Any]]:
        return [answer(logits) for logits in self.network(data)]


chosen = options()
if __name__ == "__main__":
    sys.argv += ["--address", "127.0.0.1", "--timeout", "60000", "--log-level", "error"]  # mosec reads --port itself
    server = mosec.Server()
    server.append_worker(Decode, num=chosen.workers)
    server.append_worker(Predict, num=1, max_batch_size=MAX_BATCH, max_wait_time=1)
    server.run()
