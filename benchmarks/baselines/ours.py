"""This project's server around the null model; around the network it is `rednet serve`."""

import sys
from collections.abc import Callable, Mapping, Sequence

from benchmarks.baselines.shared import MAX_BATCH, MAX_PIXELS, checkpoint, null_network, options
from rednet import prepare
from rednet.service.build import build
from rednet.service.cli import parser as cli
from rednet.service.cost_table import CostTable
from rednet.service.decoding.limits import DecodeLimits, memory_for_decoders
from rednet.service.engine.admission import OwnCounts
from rednet.service.engine.transfer import Finished
from rednet.service.http.app import create_app
from rednet.service.http.server import Server, uvicorn_config
from rednet.service.model_description import describe
from rednet.service.network import Network
from rednet.service.observability import log
from rednet.service.observability.metrics import Metrics
from rednet.service.pipeline import Pipeline
from rednet.service.reloading import ReloadablePipeline
from rednet.service.settings import Settings
from rednet.service.system.hangup import Hangups
from rednet.service.types import ExplainSpec, Pixels, RunnerOutput, Running


class NullRunner:
    def warm_up(self, begin: Callable[[float], None]) -> CostTable:
        return CostTable({1: 1e-5, MAX_BATCH: 8e-5}, MAX_BATCH)

    def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
        logits = null_network(pixels)
        return Finished(RunnerOutput(logits, logits))


def serve_null(port: int, workers: int) -> int:
    settings = Settings(port=port, decoders=workers)
    log.configure(settings.log_level, settings.log_format)
    served = checkpoint()
    described = describe(served, [prepare(served.net, served.preprocess)])
    limits = DecodeLimits.derive(MAX_PIXELS, memory_for_decoders(), workers)
    network, metrics = Network(described, served.preprocess, {"null": NullRunner}), Metrics()

    counts = OwnCounts()

    def load() -> Pipeline:
        return build(settings, network, metrics, counts, limits)

    pipeline = ReloadablePipeline(load(), load, metrics, counts)
    config = uvicorn_config(create_app(settings, pipeline), settings)
    server = Server(config, pipeline, settings.drain_timeout_s, Hangups(), pipeline.reload)
    server.run()
    return server.exit_code


if __name__ == "__main__":
    chosen = options()
    if chosen.model == "null":
        sys.exit(serve_null(chosen.port, chosen.workers))
    sys.exit(cli.main(["serve", "--port", str(chosen.port), "--precision", "fp32"]))  # as in the other servers
