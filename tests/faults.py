"""Kills, reloads and stops a server under load, again and again: what is lost, refused or wrong, and for how long?

python -m tests.faults [--times N] [--frontends N] [KIND ...]    # `make faults`: 20 times each, with two front ends
"""

import argparse
import asyncio
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx

from rednet import load_checkpoint, save_checkpoint
from tests.chaos import assert_unharmed, right_answers
from tests.conftest import encoded, photo
from tests.http_helpers import sample
from tests.processes import decoder_pids, module_pids
from tests.servers import ServerProcess, wait_until

CONNECTIONS = 16
PHOTOS = [encoded(photo(seed, 300, 200)) for seed in range(5)]
CALM_S = 2.0  # between two faults
ENGINE_CALM_S = 25.0  # three ends of the engine within a minute end the server
SETTLE_S = 60.0
OTHER = "other "  # what the labels of the other checkpoint begin with


@dataclass
class Tally:
    """What came of the requests while a kind of fault happened.

    Attributes:
        answered: with status 200.
        refused: with 429 or 503, and `Retry-After`.
        lost: connections that broke without an answer.
        wrong: answers that are not wholly those of one network, or with another status.
        gaps_s: for each fault, the time until the next answer to a request that was sent after it.
    """

    answered: int = 0
    refused: int = 0
    lost: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    gaps_s: list[float] = field(default_factory=list)


class Load:
    """Clients that send photos over open connections, one after the other, and check every answer.

    Args:
        server: that is asked.
        expected: labels of the first classes of each photo, by model name.
    """

    def __init__(self, server: ServerProcess, expected: Mapping[str, list[str]]) -> None:
        self.tally = Tally()
        self.over = False
        self._server, self._expected = server, expected
        self.recovered = asyncio.Event()  # a request that was sent after the last fault has been answered
        self._faulted = 0.0  # when the last fault happened

    def fault(self) -> None:
        """A fault happens now."""
        self._faulted = time.monotonic()
        self.recovered.clear()

    async def begin(self) -> "asyncio.Future[None]":
        """Start the clients; returns their end when some have been answered."""
        running = asyncio.ensure_future(self._run())
        await self.recovered.wait()
        await asyncio.sleep(CALM_S)
        return running

    async def _run(self) -> None:
        await asyncio.gather(*(self._client(number) for number in range(CONNECTIONS)))

    async def _client(self, number: int) -> None:
        async with httpx.AsyncClient(base_url=self._server.url, timeout=60) as client:
            turn = number
            while not self.over:
                turn += 1
                await self._ask(client, turn % len(PHOTOS))

    async def _ask(self, client: httpx.AsyncClient, index: int) -> None:
        sent = time.monotonic()
        try:
            answer = await client.post("/v1/predict", content=PHOTOS[index], headers={"Content-Type": "image/png"})
        except httpx.ConnectError:  # nothing was sent
            await asyncio.sleep(0.05)
            return
        except httpx.TransportError:
            self.tally.lost += 1
            return
        if answer.status_code in (429, 503) and "retry-after" in answer.headers:
            self.tally.refused += 1
            await asyncio.sleep(0.1)
            return
        body = answer.json()
        if answer.status_code != 200:
            self.tally.wrong[f"{answer.status_code} {body}"] += 1
            return
        label = body["predictions"][0]["classes"][0]["label"]
        if self._expected.get(body["model"], [])[index : index + 1] != [label]:
            self.tally.wrong[f"{body['model']}: {label}"] += 1
            return
        self.tally.answered += 1
        if self._faulted <= sent and not self.recovered.is_set():
            if self._faulted:
                self.tally.gaps_s.append(time.monotonic() - self._faulted)
            self.recovered.set()


class Faults:
    """The kinds of faults, each a method. It returns when the fault has happened.

    Args:
        server: that suffers them.
        checkpoint: that it serves; `other` and `embedded` are what reloads alternate between.
    """

    def __init__(self, server: ServerProcess, checkpoint: Path, embedded: bytes, other: bytes) -> None:
        self._server, self._checkpoint = server, checkpoint
        self._contents = {"same": embedded, "other": other, "broken": b"no weights"}
        self._random = random.Random(0)

    def kinds(self) -> Mapping[str, Callable[[], None]]:
        pid = self._server.process.pid
        return {
            "front end killed": lambda: self._kill(module_pids(pid, "front_end")),
            "decoder killed": lambda: self._kill(decoder_pids(pid)),
            "engine killed": lambda: self._kill(module_pids(pid, "engine")),
            "reload, same": lambda: self._reload("same"),
            "reload, other": lambda: self._reload(self._random.choice(("other", "same"))),
            "reload, broken": lambda: self._reload("broken"),
        }

    def _kill(self, pids: list[int]) -> None:
        os.kill(self._random.choice(pids), signal.SIGKILL)

    def _reload(self, content: str) -> None:
        before = self._reloads
        written = self._checkpoint.with_suffix(".new")
        written.write_bytes(self._contents[content])
        written.replace(self._checkpoint)
        self._server.process.send_signal(signal.SIGHUP)
        while self._reloads == before:
            time.sleep(0.05)

    @property
    def _reloads(self) -> int:
        """Reloads that have ended, by the log."""
        log = self._server.log
        return log.count("has answered its last request") + log.count("the checkpoint was not loaded")


async def suffer(server: ServerProcess, load: Load, inflict: Callable[[], None], times: int, calm_s: float) -> None:
    """Inflict a fault so many times under load."""
    running = await load.begin()
    for _ in range(times):
        load.fault()
        await asyncio.to_thread(inflict)
        async with asyncio.timeout(SETTLE_S):
            await load.recovered.wait()
        await asyncio.sleep(calm_s)
    load.over = True
    await running


async def stop_under_load(options: tuple[object, ...], expected: Mapping[str, list[str]]) -> Tally:
    """SIGTERM to a loaded server; what is lost is what it had accepted."""
    with ServerProcess(*options) as server:
        load = Load(server, expected)
        running = await load.begin()
        server.process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(server.process.wait, SETTLE_S)
        load.over = True
        await running
        if status:
            load.tally.wrong[f"exit status {status}"] += 1
        return load.tally


def counters(server: ServerProcess) -> Mapping[str, float]:
    """All series that must never go back."""
    lines = (line.rpartition(" ") for line in server.client.get("/metrics").text.splitlines() if line[0] != "#")
    return {name: float(value) for name, _, value in lines if "_total" in name or "_count" in name or "_sum" in name}


def show(kind: str, tally: Tally) -> None:
    gaps = sorted(tally.gaps_s) or [0.0]
    row = f"{kind:18} {tally.answered:8} {tally.refused:8} {tally.lost:5} {tally.wrong.total():6}"
    print(f"{row} {statistics.median(gaps):9.2f} {gaps[-1]:9.2f}", flush=True)
    for what, count in tally.wrong.items():
        print(f"    {count} x {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="words of the kinds to inflict (default: all)")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--frontends", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options.times, options.frontends, options.kinds)


def run(folder: Path, times: int, front_ends: int, wanted: list[str]) -> None:
    """Inflict every kind of fault, and print a line for each; fails if an answer was wrong, or something is left."""
    embedded = load_checkpoint()
    labels = [label._replace(name=OTHER + label.name) for label in embedded.labels]
    other = replace(embedded, labels=labels, name="other")
    served = folder / "served.safetensors"
    save_checkpoint(folder / "other.safetensors", other)
    save_checkpoint(served, embedded)
    contents = served.read_bytes(), (folder / "other.safetensors").read_bytes()
    server_options = ("--frontends", front_ends, "--checkpoint", served)
    print(f"{'':18} {'answered':>8} {'refused':>8} {'lost':>5} {'wrong':>6} {'median s':>9} {'longest s':>9}")
    wrong = 0
    with ServerProcess(*server_options) as server:
        right = right_answers(server)
        names = [classes[0]["classes"][0]["label"] for classes in right]  # type: ignore[index]
        expected = {embedded.name: names, "other": [OTHER + name for name in names]}
        for kind, inflict in Faults(server, served, *contents).kinds().items():
            if wanted and not any(word in kind for word in wanted):
                continue
            before = counters(server)
            load = Load(server, expected)
            calm_s = ENGINE_CALM_S if kind == "engine killed" else CALM_S
            asyncio.run(suffer(server, load, inflict, times, calm_s))
            show(kind, load.tally)
            after = counters(server)
            back = [name for name, value in before.items() if after.get(name, 0.0) < value]
            assert not back, f"counters have gone back: {back}"
            wrong += load.tally.wrong.total()
        served.write_bytes(contents[0])
        assert_unharmed(server, right)
        wait_until(lambda: sample(server.client, "rednet_slots_in_use") == 0, "all slots to be free")
    if not wanted or "stop" in wanted:
        total = Tally()
        for _ in range(times):
            tally = asyncio.run(stop_under_load(server_options, expected))
            total.answered += tally.answered
            total.refused += tally.refused
            total.lost += tally.lost
            total.wrong += tally.wrong
        show("stop (SIGTERM)", total)
        wrong += total.wrong.total()
    raise SystemExit(int(wrong > 0))


if __name__ == "__main__":
    main()
