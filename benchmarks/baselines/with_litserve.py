"""LitServe with batches. Photos are sent as base64 in JSON, as in its documentation of image inputs."""

import base64
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import litserve

from benchmarks.baselines.shared import MAX_BATCH, answer, decoded, network, options, set_role
from rednet.service.system.cores import usable_cores
from rednet.service.types import Floats, Pixels


class Api(litserve.LitAPI):  # type: ignore[misc]  # it has no types
    def setup(self, device: object) -> None:
        set_role("worker")
        self.network = network(chosen.model)
        self.pool = ThreadPoolExecutor(usable_cores())

    def decode_request(self, request: dict[str, str]) -> bytes:
        return base64.b64decode(request["image"])

    def batch(self, inputs: list[bytes]) -> list[Pixels]:
        return list(self.pool.map(decoded, inputs))

    def predict(self, x: list[Pixels]) -> Floats:
        return self.network(x)

    def unbatch(self, output: Floats) -> list[Floats]:
        return list(output)

    def encode_response(self, output: Floats) -> dict[str, Any]:
        return answer(output)


async def serving() -> None:
    set_role("front end")


chosen = options()
if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=chosen.workers, timeout=60)
    set_role("queues")  # of the process that is started next and passes on requests and responses
    quiet = {"log_level": "warning", "generate_client_file": False}
    server.run(port=chosen.port, host="127.0.0.1", callback_notify=serving, **quiet)  # uvicorn calls it in its process
