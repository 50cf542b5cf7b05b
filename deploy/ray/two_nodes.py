"""Starts two Ray nodes on this machine, for trying: python deploy/ray/two_nodes.py [CPUS_PER_NODE]

Then, in another terminal: serve run --address ADDRESS deploy/ray/serve.yaml. Ctrl-C stops the nodes.
"""

import signal
import sys

import ray
from ray import serve
from ray.cluster_utils import Cluster


def main() -> None:
    cpus = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    cluster = Cluster()
    for is_head in (True, False):
        cluster.add_node(num_cpus=cpus, object_store_memory=200_000_000, include_dashboard=is_head)
    cluster.wait_for_nodes()
    print(f"two nodes with {cpus} CPUs each: RAY_ADDRESS={cluster.address}", flush=True)
    try:
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    finally:
        ray.init(cluster.address, log_to_driver=False)
        serve.shutdown()  # HAProxy would outlive the nodes
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    main()
