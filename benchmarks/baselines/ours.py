"""This project's server: `rednet serve`, with the null model if that is asked for."""

import os
import sys

from benchmarks.baselines.null_model import load_null_network
from benchmarks.baselines.shared import options
from rednet.service.cli import parser as cli
from rednet.service.main import serve
from rednet.service.processes.supervisor import supervise
from rednet.service.settings import Settings
from rednet.service.system.hangup import Hangups
from rednet.service.system.sockets import bind

NULL_ENGINE = "benchmarks.baselines.null_engine"


def serve_null(settings: Settings, front_ends: int) -> int:
    sockets = bind(settings.host, settings.port)
    if front_ends == 1:
        return serve(settings, sockets, None, Hangups(), load_model=load_null_network)
    os.environ["PYTHONPATH"] = os.getcwd()  # where processes find this folder
    return supervise(settings, sockets, front_ends, Hangups(), engine=NULL_ENGINE)


if __name__ == "__main__":
    chosen = options()
    flags = {"port": chosen.port, "decoders": chosen.workers, "frontends": chosen.frontends}
    if chosen.model == "null":
        sys.exit(serve_null(Settings(**flags), chosen.frontends))
    command = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    sys.exit(cli.main(["serve", *command, "--precision", "fp32"]))  # as in the other servers
