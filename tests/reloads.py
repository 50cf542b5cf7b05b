"""Reloads under load: no request may be lost or refused, and every answer must be of one network.

python -m tests.reloads [--times N]    # `make reloads`: 20 times each, some minutes
"""

import argparse
import asyncio
import itertools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families

from rednet import Checkpoint, Preprocess, create_rednet, save_checkpoint
from rednet.model.io.labels import Label
from tests.chaos import Request, as_json, form, post
from tests.conftest import encoded, lively, photo
from tests.http_helpers import sample
from tests.processes import decoder_pids
from tests.servers import PATIENCE_S, ServerProcess, wait_until
from tests.test_damaged_photos import resident_mb

CONNECTIONS = 32
PHOTOS = 6
TOP_K = 100  # all classes
MAX_DIFFERENCE = 1e-4  # of a probability: batches of other sizes are rounded otherwise
KINDS = ("same", "other", "broken")
LOADED = "has answered its last request"
CLASSES = {"first": 5, "second": 7}  # number of classes by the name of the network

Probabilities = Mapping[str, float]  # by label


@dataclass
class Report:
    """What came of the requests during the reloads of one kind."""

    kind: str
    reloads: int = 0
    answers: Counter[str] = field(default_factory=Counter)  # by network
    lost: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    switched_s: list[float] = field(default_factory=list)  # from the signal to the first answer of the new network
    done_s: list[float] = field(default_factory=list)  # to the log line that says how it ended
    slowest_s: float = 0.0
    mb: list[float] = field(default_factory=list)  # of the server, after each reload

    def line(self) -> str:
        def times(seconds: Sequence[float]) -> str:
            return f"{np.median(seconds):.2f} / {max(seconds):.2f}" if seconds else "-"

        return (
            f"| {self.kind} | {self.reloads} | {self.answers.total()} | {self.lost} | {self.refused} | "
            f"{len(self.wrong)} | {times(self.switched_s)} | {times(self.done_s)} | {self.slowest_s:.2f} | "
            f"{self.mb[min(1, len(self.mb) - 1)]:.0f} / {self.mb[-1]:.0f} |"
        )


HEADER = """\
| checkpoint | reloads | requests | lost | refused | wrong | new network answers after (median / longest, s) | \
old network gone after (s) | slowest answer (s) | MB after the second / last |
|---|---|---|---|---|---|---|---|---|---|"""


class Checkpoints:
    """Checkpoints in a folder, and a link to the one that is served.

    Args:
        folder: to write to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.served = folder / "served"
        for seed, (name, classes) in enumerate(CLASSES.items()):
            net = lively(create_rednet("rednet26", num_classes=classes, base_channels=16, stem_channels=32))
            with torch.no_grad():
                net.head.fc.bias.add_(seed * torch.arange(classes))  # predictions differ
            labels = [Label(f"{name}-{index}", f"{name} {index}") for index in range(classes)]
            preprocess = Preprocess(resize=72 - 8 * seed, crop=64 - 8 * seed)
            checkpoint = Checkpoint(net=net, labels=labels, preprocess=preprocess, name=name)
            save_checkpoint(self._path(name), checkpoint)
        content = self._path("first").read_bytes()
        nans = np.full(1000, np.nan, np.float32).tobytes()
        broken = {"empty": b"", "text": b"no checkpoint", "cut": content[:-1000], "nan": content[: -len(nans)] + nans}
        for name, damaged in broken.items():
            self._path(name).write_bytes(damaged)
        self._broken = itertools.cycle((*broken, "missing"))
        self.name = "first"
        self._serve(self.name)

    def change(self, kind: str) -> None:
        """Serve the same checkpoint again, another one, or one that is broken."""
        if kind == "other":
            self.name = next(name for name in CLASSES if name != self.name)
        self._serve(next(self._broken) if kind == "broken" else self.name)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def _serve(self, name: str) -> None:
        link = self._folder / "link"
        link.symlink_to(self._path(name))
        link.replace(self.served)


class Load:
    """Clients that send requests over open connections, one after the other, and check every answer.

    Args:
        server: to send to.
        expected: the right probabilities by network and photo.
    """

    def __init__(self, server: ServerProcess, expected: Mapping[str, Sequence[Probabilities]]) -> None:
        parts = urlsplit(server.url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._expected = expected
        self._over = False
        self.requests = 0
        self.report = Report("none")
        self.newest: tuple[str, float] = ("", 0.0)  # the network that answers new requests, and since when
        self.switches = -1

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for index in range(CONNECTIONS):
                group.create_task(self._client(index))

    def stop(self) -> None:
        self._over = True

    async def _client(self, index: int) -> None:
        reader, writer = await asyncio.open_connection(*self._address)
        for turn in itertools.count(index):
            if self._over:
                break
            photos = [turn % PHOTOS] if turn % 5 else [turn % PHOTOS, (turn + 1) % PHOTOS]
            self.requests += 1
            began = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    status, body = await _ask(reader, writer, _request(turn, photos))
            except (OSError, EOFError, TimeoutError, ValueError):
                self.report.lost += 1
                reader, writer = await asyncio.open_connection(*self._address)
                continue
            self.report.slowest_s = max(self.report.slowest_s, time.monotonic() - began)
            if status == 200:
                self._check(json.loads(body), photos, began)
            else:
                self.report.refused += 1
        writer.close()

    def _check(self, answer: Any, photos: Sequence[int], began: float) -> None:
        name = answer["model"]
        self.report.answers[name] += 1
        if name != self.newest[0] and began > self.newest[1]:
            self.newest = (name, time.monotonic())
            self.switches += 1
        found = [_probabilities(each["classes"]) for each in answer["predictions"]]
        right = [self._expected[name][index] for index in photos]
        if not all(map(_agree, found, right)):
            self.report.wrong.append(f"{name}: {found} instead of {right}")


def _request(turn: int, photos: Sequence[int]) -> Request:
    files = [PHOTO_FILES[index] for index in photos]
    if len(files) == 1 and turn % 3:
        return post(files[0], path=f"/v1/predict?top_k={TOP_K}")
    request = as_json(files) if turn % 2 else form(files)
    return Request(request.head.replace(b"/v1/predict", f"/v1/predict?top_k={TOP_K}".encode()), request.body)


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Request) -> tuple[int, bytes]:
    writer.write(request.head + request.body)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


def _probabilities(classes: Sequence[Mapping[str, Any]]) -> Probabilities:
    return {each["label"]: each["probability"] for each in classes}


def _agree(found: Probabilities, right: Probabilities) -> bool:
    return found.keys() == right.keys() and all(abs(found[label] - right[label]) <= MAX_DIFFERENCE for label in right)


PHOTO_FILES = [encoded(photo(seed, 300, 200), "JPEG") for seed in range(PHOTOS)]


def right_answers(server: ServerProcess) -> Sequence[Probabilities]:
    answers = (server.client.post(f"/v1/predict?top_k={TOP_K}", content=each) for each in PHOTO_FILES)
    return [_probabilities(each.json()["predictions"][0]["classes"]) for each in answers]


class Counters:
    """Checks that no counter of a server ever goes back, and that one network is described at a time."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._values: dict[tuple[str, str], float] = {}

    def reloads(self, outcome: str) -> float:
        """How many reloads of the checkpoint have ended so."""
        labels = str([("outcome", outcome), ("what", "checkpoint")])
        return self._values.get(("rednet_reloads_total", labels), 0.0)

    def scrape(self) -> None:
        described = []
        for family in text_string_to_metric_families(self._server.client.get("/metrics").text):
            for each in family.samples:
                if each.name == "rednet_model_info":
                    described.append(each.labels["name"])
                if family.type in ("counter", "histogram"):
                    series = (each.name, str(sorted(each.labels.items())))
                    assert each.value >= self._values.get(series, 0.0), f"{series} went back"
                    self._values[series] = each.value
        assert len(described) == 1, described


@dataclass
class Resources:
    """What a server uses."""

    decoders: int
    threads: int
    mb: float

    def same(self, other: "Resources") -> bool:
        """Whether processes and threads are as many."""
        return (self.decoders, self.threads) == (other.decoders, other.threads)

    @classmethod
    def of(cls, server: ServerProcess) -> "Resources":
        pid = server.process.pid
        threads = len(os.listdir(f"/proc/{pid}/task"))
        return cls(len(decoder_pids(pid)), threads, resident_mb(pid))


class Drill:
    """Reloads a server under load.

    Args:
        server: serves `checkpoints.served`.
        checkpoints: to be loaded.
        load: runs meanwhile.
    """

    def __init__(self, server: ServerProcess, checkpoints: Checkpoints, load: Load) -> None:
        self._server, self._checkpoints, self._load = server, checkpoints, load
        self._counters = Counters(server)
        self._before = Resources.of(server)

    async def run(self, kind: str, times: int) -> Report:
        """Load a kind of checkpoint so many times; fails where a promise is not kept."""
        report = self._load.report = Report(kind)
        for _ in range(times):
            switches = self._load.switches
            self._checkpoints.change(kind)
            signalled = time.monotonic()
            await self._reload("failed" if kind == "broken" else "ok")
            report.done_s.append(time.monotonic() - signalled)
            report.reloads += 1
            requests = self._load.requests  # some of them may be answered by the network before, and none of the next
            await _until(lambda requests=requests: self._load.requests >= requests + 2 * CONNECTIONS)  # type: ignore[misc]
            name, since = self._load.newest
            assert name == self._checkpoints.name, f"{name} still answers, not {self._checkpoints.name}"
            assert self._load.switches == switches + (kind == "other"), "the network before has answered again"
            if kind == "other":
                report.switched_s.append(since - signalled)
            report.mb.append(Resources.of(self._server).mb)
        assert not report.lost, report
        assert not report.refused, report
        assert not report.wrong, report.wrong[:3]
        return report

    async def _reload(self, outcome: str) -> None:
        await asyncio.to_thread(self._counters.scrape)
        before = self._counters.reloads(outcome)
        self._server.process.send_signal(signal.SIGHUP)

        async def is_done() -> bool:
            await asyncio.to_thread(self._counters.scrape)
            return self._counters.reloads(outcome) > before and Resources.of(self._server).same(self._before)

        async with asyncio.timeout(PATIENCE_S):
            while not await is_done():  # noqa: ASYNC110  (there is no event to wait for)
                await asyncio.sleep(0.05)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  (there is no event to wait for)
            await asyncio.sleep(0.01)


async def run(server: ServerProcess, checkpoints: Checkpoints, times: int) -> list[Report]:
    """All of it.

    Args:
        server: serves `checkpoints.served`.
        checkpoints: to be loaded.
        times: to reload, for each kind of checkpoint.
    """
    expected = {checkpoints.name: right_answers(server)}
    checkpoints.change("other")
    server.process.send_signal(signal.SIGHUP)
    await asyncio.to_thread(wait_until, lambda: LOADED in server.log, "the first reload")
    expected[checkpoints.name] = right_answers(server)
    load = Load(server, expected)
    drill = Drill(server, checkpoints, load)
    running = asyncio.create_task(load.run())
    await _until(lambda: load.newest[0] != "")
    reports = [await drill.run(kind, times) for kind in KINDS]
    load.stop()
    await running
    assert_gauges_are_zero(server)
    return reports


def assert_gauges_are_zero(server: ServerProcess) -> None:
    def gauges() -> list[float]:
        names = ("rednet_queue_depth", "rednet_backlog_seconds", "rednet_inflight_requests")
        return [sample(server.client, name) for name in names]

    wait_until(lambda: gauges() == [0, 0, 1], "the gauges to be zero but for the scrape itself")


@contextmanager
def server_with_checkpoints() -> Iterator[tuple[ServerProcess, Checkpoints]]:
    with TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        with ServerProcess("--checkpoint", checkpoints.served) as server:
            yield server, checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    options = parser.parse_args()
    with server_with_checkpoints() as (server, checkpoints):
        reports = asyncio.run(run(server, checkpoints, options.times))
        print(HEADER, *(report.line() for report in reports), sep="\n")
        print(f"exit status {server.terminate()}")


if __name__ == "__main__":
    main()
