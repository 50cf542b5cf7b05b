"""Decoder processes that end, hang or cannot start, and the server around them."""

import asyncio
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from rednet import Preprocess
from rednet.service.decoding import stall_detector
from rednet.service.decoding.decoder import Decoded, Decoder
from rednet.service.decoding.fair_queue import Flow
from rednet.service.decoding.limits import DecodeLimits
from rednet.service.errors import DecoderUnavailable, Draining, UnreadableImage, UnsupportedMediaType
from rednet.service.system.cores import usable_cores
from tests.conftest import encoded, photo
from tests.http_helpers import CUT, TEXT, assert_error, predict, sample
from tests.processes import PROC, decoder_pids, is_decoder, killing_decoders
from tests.servers import DECODER_BYTES, PATIENCE_S, FakeRunner, ServerProcess, ServerThread, wait_until

pytestmark = pytest.mark.skipif(not PROC.exists(), reason="processes are found in /proc, which is not here")

PREPROCESS = Preprocess(resize=40, crop=32)
PHOTO = encoded(photo())


def using(use: Callable[[Decoder], Coroutine[None, None, None]], count: int = 1) -> None:
    """Run a test around a decoder, and check that no process is left."""

    async def run() -> None:
        decoder = Decoder(PREPROCESS, DecodeLimits.derive(1_000_000, DECODER_BYTES, count), count)
        try:
            await use(decoder)
        finally:
            await decoder.close()

    asyncio.run(run())
    assert not decoder_pids(os.getpid())


def replace_decoding(decoder: Decoder, expression: str) -> None:
    """Make future decoder processes compute pixels by an expression of `data`, `rest` and the `right` function."""
    script = (
        "import os, time, rednet.service.decoding.worker as process;"
        "right = process.decode_image; endless = lambda: all(True for _ in iter(int, 1));"
        f"process.decode_image = lambda data, *rest: {expression};"
        "process.main()"
    )
    for pool in decoder._pools:
        command = pool.command
        command[command.index("-m") : command.index("-m") + 2] = ["-c", script]


async def until_available(decoder: Decoder) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not decoder.available:  # noqa: ASYNC110  (there is no event to wait for)
            await asyncio.sleep(0.01)


def test_concurrent_photos_are_decoded_or_raise_their_own_error() -> None:
    """The pixels are writable, as torch requires."""

    async def use(decoder: Decoder) -> None:
        photos = [encoded(photo(seed)) for seed in range(12)]
        for seed, decoded in enumerate(await asyncio.gather(*map(decoder.decode, photos))):
            assert (decoded.pixels == PREPROCESS.pixels(photo(seed))).all()
            assert decoded.pixels.flags.writeable
            assert decoded.decode_s > 0
        with pytest.raises(UnreadableImage, match="damaged"):
            await decoder.decode(CUT)
        with pytest.raises(UnsupportedMediaType):
            await decoder.decode(TEXT)
        assert len(decoder_pids(os.getpid())) == 3

    using(use, count=3)


def test_photos_of_a_decoder_that_ends_are_retried() -> None:
    """A process may end for any reason, such as a lack of memory. Its photo and those behind it go to the next
    process."""

    async def use(decoder: Decoder) -> None:
        await decoder.decode(PHOTO)
        (pid,) = decoder_pids(os.getpid())
        os.kill(pid, signal.SIGSTOP)
        tasks = [asyncio.create_task(decoder.decode(PHOTO)) for _ in range(3)]
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        assert len(await asyncio.gather(*tasks)) == 3

    using(use)


def test_photo_is_retried_when_all_decoders_end() -> None:
    """It is retried on a live process, even if the exits of the others have not been noticed yet."""

    async def use(decoder: Decoder) -> None:
        await decoder.start()
        for pid in decoder_pids(os.getpid()):
            os.kill(pid, signal.SIGKILL)
            while is_decoder(pid):  # it ends, unnoticed by the event loop
                time.sleep(0.001)  # noqa: ASYNC251
        assert (await decoder.decode(PHOTO)).decode_s > 0

    using(use, count=3)


def test_photo_that_crashes_two_decoders_is_unreadable() -> None:
    """Its request gets the error, and the photos behind it are decoded."""

    async def use(decoder: Decoder) -> None:
        replace_decoding(decoder, "os._exit(7) if data == b'poison' else right(data, *rest)")
        outcomes = await asyncio.gather(*map(decoder.decode, (PHOTO, b"poison", PHOTO, PHOTO)), return_exceptions=True)
        assert [type(each).__name__ for each in outcomes] == ["Decoded", "UnreadableImage", "Decoded", "Decoded"]

    using(use)


def test_photo_of_a_stopped_decoder_is_decoded_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stopped process uses no CPU time, so the CPU limit does not end it."""
    monkeypatch.setattr(stall_detector, "CHECK_S", 0.1)

    async def use(decoder: Decoder) -> None:
        await decoder.decode(PHOTO)
        (pid,) = decoder_pids(os.getpid())
        os.kill(pid, signal.SIGSTOP)
        assert (await decoder.decode(PHOTO)).pixels.shape == (3, 32, 32)
        assert pid not in decoder_pids(os.getpid())

    using(use)


def test_photo_whose_decoders_are_always_killed_is_unavailable() -> None:
    """Signals from outside do not mean that the photo is damaged: it is retried, and finally answered with 503."""

    async def use(decoder: Decoder) -> None:
        replace_decoding(decoder, "os.kill(os.getpid(), 9) if data == b'victim' else right(data, *rest)")
        outcomes = await asyncio.gather(*map(decoder.decode, (PHOTO, b"victim", PHOTO, PHOTO)), return_exceptions=True)
        assert [type(each) for each in outcomes] == [Decoded, DecoderUnavailable, Decoded, Decoded]

    using(use)


def test_photo_that_exceeds_the_cpu_limit_is_unreadable() -> None:
    """It is first moved to the pool of large photos, whose limit is higher."""

    async def use(decoder: Decoder) -> None:
        replace_decoding(decoder, "endless() if data == b'endless' else right(data, *rest)")
        for pool in decoder._pools:
            options = json.loads(pool.command[-1])
            options["limits"]["cpu_s"] = 1.0
            pool.command[-1] = json.dumps(options)
        with pytest.raises(UnreadableImage, match="more processor time"):
            await decoder.decode(b"endless")
        assert (await decoder.decode(PHOTO)).pixels.shape == (3, 32, 32)

    using(use)


def test_cancelled_photo_that_exceeds_the_cpu_limit_is_not_set_aside() -> None:
    """Its request has ended, and would never be counted as finished in the pool of large photos."""

    async def use(decoder: Decoder) -> None:
        replace_decoding(decoder, "endless() if data == b'endless' else right(data, *rest)")
        changes: list[int] = []
        task = asyncio.create_task(decoder.decode(b"endless", Flow(on_set_aside=changes.append)))
        await asyncio.sleep(0.5)
        task.cancel()
        await decoder.decode(PHOTO)  # after the process has reached its limit
        assert changes == []

    using(use)


def test_photos_behind_a_slow_photo_go_to_another_decoder() -> None:
    """Under load each process has its next photo already. If it does not start it soon, another process takes it."""

    async def use(decoder: Decoder) -> None:
        replace_decoding(
            decoder, "time.sleep(3) or right(data[4:], *rest) if data[:4] == b'slow' else right(data, *rest)"
        )
        await decoder.start()
        photos = [PHOTO, PHOTO, b"slow" + PHOTO, *(encoded(photo(seed)) for seed in range(12))]
        tasks = [asyncio.create_task(decoder.decode(each)) for each in photos]
        _, pending = await asyncio.wait(tasks, timeout=2.5)
        assert pending == {tasks[2]}
        for seed, task in enumerate(tasks[3:]):
            assert (task.result().pixels == PREPROCESS.pixels(photo(seed))).all()
        assert (await tasks[2]).pixels.shape == (3, 32, 32)

    using(use, count=2)


def test_cancelled_photo_delays_no_others() -> None:
    """A cancelled photo in the queue is not decoded. If it is being decoded, the process continues with the next
    one."""

    async def use(decoder: Decoder) -> None:
        await decoder.decode(PHOTO)
        before = decoder_pids(os.getpid())
        tasks = [asyncio.create_task(decoder.decode(PHOTO)) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[1].cancel()
        assert (await tasks[2]).pixels.shape == (3, 32, 32)
        assert decoder_pids(os.getpid()) == before

    using(use)


def test_decoders_that_cannot_start_are_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a few attempts, photos are rejected immediately with 503. When processes start again, photos are
    decoded."""

    async def use(decoder: Decoder) -> None:
        python = decoder._first.command[0]
        for pool in decoder._pools:
            pool.command[0] = "/bin/false"
        for _ in range(2):
            with pytest.raises(DecoderUnavailable):
                await decoder.decode(PHOTO)
            assert not decoder.available
        for pool in decoder._pools:
            pool.command[0] = python
        await until_available(decoder)
        assert (await decoder.decode(PHOTO)).pixels.shape == (3, 32, 32)

    using(use, count=2)


def test_system_that_starts_no_process_makes_decoders_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photos that wait for a process that has ended are rejected, too. When processes start again, photos are
    decoded."""

    def none(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    async def use(decoder: Decoder) -> None:
        await decoder.decode(PHOTO)
        (process,) = decoder_pids(os.getpid())
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", none)
            os.kill(process, signal.SIGSTOP)
            tasks = [asyncio.create_task(decoder.decode(PHOTO)) for _ in range(3)]
            await asyncio.sleep(0)
            os.kill(process, signal.SIGKILL)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(each, DecoderUnavailable) for each in outcomes)
            assert len({id(each) for each in outcomes}) == 3  # each photo has its own error
            with pytest.raises(DecoderUnavailable):
                await decoder.decode(PHOTO)
        await until_available(decoder)
        assert (await decoder.decode(PHOTO)).pixels.shape == (3, 32, 32)

    using(use)


def test_restarts_of_decoders_that_end_immediately_back_off() -> None:
    """The time between two starts grows."""

    async def use(decoder: Decoder) -> None:
        starts = 0

        def launch(*_: object, **__: object) -> None:
            nonlocal starts
            starts += 1
            raise OSError(errno.ENOMEM, "no memory")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "Popen", launch)
            with pytest.raises(DecoderUnavailable):
                await decoder.decode(PHOTO)
            await asyncio.sleep(1.0)
        assert 3 <= starts <= 16

    using(use, count=2)


def test_decoder_that_does_not_start_delays_photos_only_to_another() -> None:
    """Its photos wait for processes that work."""

    async def use(decoder: Decoder) -> None:
        await decoder.decode(PHOTO)
        for pool in decoder._pools:
            pool.command[0] = "/bin/false"
        assert len(await asyncio.gather(*(decoder.decode(PHOTO) for _ in range(5)))) == 5

    using(use, count=2)


def test_close_rejects_current_waiting_and_later_photos() -> None:
    """All of them get the error `Draining`."""

    async def use(decoder: Decoder) -> None:
        await decoder.decode(PHOTO)
        tasks = [asyncio.create_task(decoder.decode(PHOTO)) for _ in range(3)]
        await asyncio.sleep(0)
        await decoder.close()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, Draining) for each in outcomes)
        with pytest.raises(Draining):
            await decoder.decode(PHOTO)

    using(use)


@pytest.mark.slow
def test_killed_decoders_are_replaced_and_end_with_the_server(tiny_path: Path) -> None:
    """When the server itself is killed, no decoder is left."""
    with ServerProcess("--checkpoint", tiny_path) as running:
        wait_until(lambda: len(decoder_pids(running.process.pid)) == usable_cores(), "a decoder for each core")
        first = decoder_pids(running.process.pid)
        for pid in first:
            os.kill(pid, signal.SIGTERM)  # decoders ignore SIGTERM, which is meant for the server
        assert predict(running.client, PHOTO).status_code == 200
        assert decoder_pids(running.process.pid) == first
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not set(decoder_pids(running.process.pid)) & set(first), "their end")
        assert predict(running.client, PHOTO).status_code == 200
        assert_error(predict(running.client, CUT), 422, "unreadable_image")
        last = decoder_pids(running.process.pid)
        running.process.kill()
        running.process.wait()
        wait_until(lambda: not any(map(is_decoder, last)), "the decoders' end")


def test_server_without_decoders_is_not_ready_and_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions and `/readyz` answer 503 with Retry-After, `/livez` stays 200. When processes start again, photos are
    answered."""

    def none(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    with ServerThread(FakeRunner()) as running:
        wait_until(lambda: running.client.get("/readyz").status_code == 200, "readiness")
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", none)
            for pid in decoder_pids(os.getpid()):
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: running.client.get("/readyz").status_code == 503, "the loss to be noticed")
            refused = predict(running.client, PHOTO)
            assert_error(refused, 503, "decoder_unavailable")
            assert int(refused.headers["retry-after"]) >= 1
            assert running.client.get("/readyz").json() == {"status": "decoder_unavailable"}
            assert running.client.get("/v2/health/ready").status_code == 503
            assert running.client.get("/livez").status_code == 200
            assert sample(running.client, "rednet_ready") == 0
        wait_until(lambda: running.client.get("/readyz").status_code == 200, "new decoders")
        assert predict(running.client, PHOTO).status_code == 200


def probabilities(response: httpx.Response) -> dict[str, float]:
    return {score["label"]: score["probability"] for score in response.json()["predictions"][0]["classes"]}


@pytest.mark.slow
def test_decoders_killed_under_load_cause_no_errors(tiny_path: Path) -> None:
    """One decoder is killed per second: there is no 500, and every 200 is right, because photos are retried."""
    with ServerProcess("--checkpoint", tiny_path) as running, ThreadPoolExecutor(8) as pool:
        expected = probabilities(predict(running.client, PHOTO))
        statuses: Counter[int] = Counter()

        def ask(_: int) -> None:
            response = predict(running.client, PHOTO)
            statuses[response.status_code] += 1
            if response.status_code == 200:  # torch rounds differently for other batch sizes
                assert probabilities(response) == pytest.approx(expected, abs=1e-5)

        with killing_decoders(running.process.pid, 1.0, random.Random(0)) as killed:
            while len(killed) < 12:
                list(pool.map(ask, range(16)))
        assert statuses.keys() <= {200, 429, 503}
        assert statuses[200] > 0.9 * statuses.total()


@pytest.mark.slow
def test_photo_survives_a_suspended_server() -> None:
    """Server and decoders stop for longer than the decode timeout, as on a machine that is suspended."""
    script = f"""
import asyncio, os
from rednet import Preprocess
from rednet.service.decoding.limits import DecodeLimits
from rednet.service.decoding.decoder import Decoder
from tests.conftest import encoded, photo
async def main():
    decoder = Decoder(Preprocess(resize=40, crop=32), DecodeLimits.derive(1_000_000, {DECODER_BYTES}, 1), 1)
    await decoder.start()
    tasks = [asyncio.create_task(decoder.decode(encoded(photo(seed)))) for seed in range(200)]
    await asyncio.sleep(0)
    print("decoding", flush=True)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    print(sum(not isinstance(each, Exception) for each in outcomes), flush=True)
    await decoder.close()
asyncio.run(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout
    assert process.stdout.readline() == "decoding\n"
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(11)
    os.killpg(process.pid, signal.SIGCONT)
    assert process.communicate(timeout=PATIENCE_S)[0] == "200\n"
