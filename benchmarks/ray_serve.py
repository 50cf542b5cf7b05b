"""Ray Serve with two nodes on this machine, under an open loop of photos.

python -m benchmarks.ray_serve faults PHOTOS    requests lost when a replica or a node is killed, and in deployments
python -m benchmarks.ray_serve scaling PHOTOS   time until a second replica answers
python -m benchmarks.ray_serve cpu PHOTOS       CPU time per request behind each proxy, and of `rednet serve`

PHOTOS is a folder of JPEG files.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.load import Answers, Load, open_loop
from benchmarks.measure import report
from benchmarks.roles import descendants, process_cpu_s
from benchmarks.server import post_when_ready

T = TypeVar("T")

PORT = 18_200
URL = f"http://127.0.0.1:{PORT}/v1/predict"
MAX_PHOTOS = 64
RATE, SECONDS = 15.0, 30.0  # of each fault; a replica with one core answers about four times as many
EVENT_S = 8.0  # from the beginning of the load to the fault
CPU_RATE, CPU_SECONDS, TURNS = 20.0, 10.0, 2


class Deployment:
    """The application on two nodes with two logical cores each; replicas have one.

    Args:
        cluster: which runs it.
    """

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster

    def deploy(self, replicas: int, max_queue: int = 256) -> None:
        """Deploy; another `max_queue` than before makes Serve replace the replicas one by one."""
        self._run({"num_replicas": replicas}, max_queue)

    def autoscale(self, max_queue: int) -> None:
        """Deploy one replica, with the bounds and delays of deploy/ray/serve.yaml."""
        import yaml

        config = yaml.safe_load(Path("deploy/ray/serve.yaml").read_text())
        scaling = config["applications"][0]["deployments"][0]["autoscaling_config"]
        self._run({"autoscaling_config": scaling | {"max_replicas": 2}}, max_queue)

    def _run(self, options: dict[str, Any], max_queue: int) -> None:
        from ray import serve

        from rednet.service.ray import RedNet

        deployment = RedNet.options(ray_actor_options={"num_cpus": 1}, **options)  # type: ignore[attr-defined]
        serve.run(deployment.bind({"max_queue": max_queue, "log_level": "warning"}), name="rednet")

    @property
    def running(self) -> int:
        """Replicas that take requests."""
        from ray import serve

        states: dict[str, int] = serve.status().applications["rednet"].deployments["RedNet"].replica_states
        return states.get("RUNNING", 0)

    def kill_replica(self) -> None:
        pids = [pid for pid in descendants(os.getpid()) if b"ray::ServeReplica" in _command(pid)]
        os.kill(pids[-1], signal.SIGKILL)

    def kill_node(self) -> None:
        """Kill the node without HAProxy, with all its processes."""
        self.cluster.remove_node(self.cluster.worker_nodes.copy().pop(), allow_graceful=False)


@contextmanager
def deployment() -> Iterator[Deployment]:
    """Two nodes with Serve, without replicas. The environment says which proxy it has."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=2, object_store_memory=200_000_000, include_dashboard=False)
    cluster.wait_for_nodes()
    ray.init(cluster.address, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT, "location": "HeadOnly"})
        yield Deployment(cluster)
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def lost_requests(photos: Sequence[bytes]) -> list[dict[str, Any]]:
    """The requests that were not answered with 200, for each fault."""
    rows = []
    with deployment() as ray:
        ray.deploy(2)
        faults: dict[str, Callable[[], None]] = {
            "kill -9 of a replica": ray.kill_replica,
            "rolling update": lambda: ray.deploy(2, max_queue=128),
            "scale-down to one replica": lambda: ray.deploy(1, max_queue=128),
            "scale-up to two replicas": lambda: ray.deploy(2, max_queue=128),
            "kill -9 of a node": ray.kill_node,
        }
        for name, fault in faults.items():
            post_when_ready(URL, photos[0])
            if not name.startswith("scale-up"):
                _wait(lambda: ray.running == 2, 60)
            timer = threading.Timer(EVENT_S, fault)
            timer.start()
            answers = open_loop(Load(URL, photos), RATE, SECONDS)
            timer.join()
            rows.append({"fault": name} | _summary(answers))
            print(rows[-1], flush=True)
    return rows


def time_to_second_replica(photos: Sequence[bytes]) -> list[dict[str, Any]]:
    """With the documented configuration, and most requests refused until then."""
    with deployment() as ray:
        ray.autoscale(max_queue=4)
        post_when_ready(URL, photos[0])
        time.sleep(20)  # Serve averages over the look-back period
        began = time.monotonic()
        found: list[float] = []

        def watch() -> None:
            _wait(lambda: ray.running == 2, 90)
            found.append(time.monotonic() - began)

        watching = threading.Thread(target=watch)
        watching.start()
        answers = Answers()
        while watching.is_alive():
            answers += open_loop(Load(URL, photos), 150.0, 5.0)
        return [{"second replica after, s": round(found[0], 1)} | _summary(answers)]


def cpu_per_request(photos: Sequence[bytes]) -> list[dict[str, Any]]:
    """In turns, each server in a process of its own: the environment chooses the proxy when Ray is imported."""
    rows = []
    for turn in range(TURNS):
        for name, variables in SERVERS.items():
            command = [sys.executable, "-m", "benchmarks.ray_serve", "serve", name]
            with subprocess.Popen(command, env=os.environ | variables, stdin=subprocess.PIPE) as process:
                post_until_ready(photos[0])
                _, idle_s = _cpu_s(process.pid, lambda: time.sleep(CPU_SECONDS))
                answers, busy_s = _cpu_s(process.pid, lambda: open_loop(Load(URL, photos), CPU_RATE, CPU_SECONDS))
                count = len(answers.ok())
                rows.append(
                    {"server": name, "turn": turn, "ms per request": round(1000 * (busy_s - idle_s) / count, 1)}
                    | {"ms per second idle": round(1000 * idle_s / CPU_SECONDS)}
                    | _summary(answers)
                )
                print(rows[-1], flush=True)
                process.communicate()
    return rows


SERVERS = {
    "rednet serve": {},
    "Ray Serve, HAProxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1"},
    "Ray Serve, its own proxy": {"RAY_SERVE_ENABLE_HA_PROXY": "0"},
}


def serve_one(name: str) -> None:
    """Serve with one core and no log until standard input ends."""
    if name == "rednet serve":
        options = ["--port", str(PORT), "--threads", "1", "--decoders", "1", "--log-level", "warning"]
        with subprocess.Popen([sys.executable, "-m", "rednet", "serve", *options]) as server:
            sys.stdin.read()
            server.terminate()
        return
    with deployment() as ray:
        ray.deploy(1)
        sys.stdin.read()


def post_until_ready(photo: bytes) -> None:
    """Send a photo until it is answered, which warms the server up."""
    while True:
        try:
            post_when_ready(URL, photo)
            return
        except OSError:  # nothing listens yet, or the proxy knows no replica
            time.sleep(0.1)


def _cpu_s(root: int, work: Callable[[], T]) -> tuple[T, float]:
    """The result of a call, and the CPU time that the descendants of a process spend meanwhile."""

    def so_far() -> dict[int, float]:
        return {pid: process_cpu_s(pid) for pid in descendants(root)}

    before = so_far()
    result = work()
    return result, sum(seconds - before.get(pid, 0.0) for pid, seconds in so_far().items())


def _summary(answers: Answers) -> dict[str, Any]:
    statuses = Counter(answer.status for answer in answers)
    took = answers.ok()
    return {
        "requests": len(answers),
        "not 200": {status: count for status, count in statuses.items() if status != 200},
        "p50, ms": round(1000 * took[len(took) // 2]),
        "max, ms": round(1000 * took[-1]),
    }


def _wait(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["faults", "scaling", "cpu", "serve"])
    parser.add_argument("photos", help="for `serve`, which `cpu` calls: the name of a server")
    options = parser.parse_args()
    if options.what == "serve":
        serve_one(options.photos)
        return
    photos = [path.read_bytes() for path in sorted(Path(options.photos).iterdir())[:MAX_PHOTOS]]
    if options.what != "cpu":
        os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1")
    measure = {"faults": lost_requests, "scaling": time_to_second_replica, "cpu": cpu_per_request}[options.what]
    report(f"ray_{options.what}", f"Ray Serve: {options.what}", measure(photos))


if __name__ == "__main__":
    main()
