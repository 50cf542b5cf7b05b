"""The engine's process of this project's server, with the null model."""

from functools import partial

from benchmarks.baselines.null_model import load_null_network
from rednet.service.processes.engine import main
from rednet.service.system.exit import run_process

if __name__ == "__main__":
    run_process(partial(main, load_null_network))
