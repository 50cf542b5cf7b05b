"""The processes that decode: whatever becomes of one, the others and the server go on."""

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
    """Run a test around a decoder, and look that nothing is left of it."""

    async def run() -> None:
        decoder = Decoder(PREPROCESS, DecodeLimits.derive(1_000_000, DECODER_BYTES, count), count)
        try:
            await use(decoder)
        finally:
            decoder.close()

    asyncio.run(run())
    assert not decoder_pids(os.getpid())


def replace_decoding(decoder: Decoder, expression: str) -> None:
    """Have the processes that it will start make pixels by an expression of `data`, `rest` and the `right` function."""
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
        while not decoder.available:  # noqa: ASYNC110  (nothing is signalled)
            await asyncio.sleep(0.01)


def test_photos_come_back_as_pixels_or_errors() -> None:
    """Many at once, each its own; the pixels may be written to, as torch wants it."""

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


def test_a_process_that_ends_costs_nobody_anything() -> None:
    """It may have been anything, as the system when memory is short: its photo and those behind it go to the next."""

    async def use(decoder: Decoder) -> None:
        await decoder.decode(PHOTO)
        (pid,) = decoder_pids(os.getpid())
        os.kill(pid, signal.SIGSTOP)
        tasks = [asyncio.create_task(decoder.decode(PHOTO)) for _ in range(3)]
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        assert len(await asyncio.gather(*tasks)) == 3

    using(use)


def test_no_photo_is_blamed_for_what_befell_all_processes() -> None:
    """It is tried again in one that is alive, even if nothing has been heard yet of those that are not."""

    async def use(decoder: Decoder) -> None:
        await decoder.start()
        for pid in decoder_pids(os.getpid()):
            os.kill(pid, signal.SIGKILL)
            while is_decoder(pid):  # it ends, and the event loop does not hear of it yet
                time.sleep(0.001)  # noqa: ASYNC251
        assert (await decoder.decode(PHOTO)).decode_s > 0

    using(use, count=3)


def test_a_photo_that_breaks_two_processes_is_broken() -> None:
    """Its caller has the error, and the photos behind it are decoded."""

    async def use(decoder: Decoder) -> None:
        replace_decoding(decoder, "os._exit(7) if data == b'poison' else right(data, *rest)")
        outcomes = await asyncio.gather(*map(decoder.decode, (PHOTO, b"poison", PHOTO, PHOTO)), return_exceptions=True)
        assert [type(each).__name__ for each in outcomes] == ["Decoded", "UnreadableImage", "Decoded", "Decoded"]

    using(use)


def test_sound_photo_survives_a_stopped_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stopped process uses no processor time; another one decodes the photo."""
    monkeypatch.setattr(stall_detector, "CHECK_S", 0.1)

    async def use(decoder: Decoder) -> None:
        await decoder.decode(PHOTO)
        (pid,) = decoder_pids(os.getpid())
        os.kill(pid, signal.SIGSTOP)
        assert (await decoder.decode(PHOTO)).pixels.shape == (3, 32, 32)
        assert pid not in decoder_pids(os.getpid())

    using(use)


def test_photo_whose_decoders_are_always_killed_is_not_damaged() -> None:
    """Signals from outside say nothing about the photo: it is tried again, and in the end answered with 503."""

    async def use(decoder: Decoder) -> None:
        replace_decoding(decoder, "os.kill(os.getpid(), 9) if data == b'victim' else right(data, *rest)")
        outcomes = await asyncio.gather(*map(decoder.decode, (PHOTO, b"victim", PHOTO, PHOTO)), return_exceptions=True)
        assert [type(each) for each in outcomes] == [Decoded, DecoderUnavailable, Decoded, Decoded]

    using(use)


def test_photo_that_uses_too_much_processor_time_is_refused() -> None:
    """First it is moved to the pool of large photos, where it may take longer; there it is 422."""

    async def use(decoder: Decoder) -> None:
        replace_decoding(decoder, "endless() if data == b'endless' else right(data, *rest)")
        for pool in decoder._pools:
            options = json.loads(pool.command[-1])
            options["limits"]["cpu_s"] = 1.0
            pool.command[-1] = json.dumps(options)
        with pytest.raises(UnreadableImage, match="too long"):
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


def test_nobody_waits_behind_a_photo_that_takes_long() -> None:
    """Where many wait, each process has the next photo already; if it does not come to it soon, another one does."""

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


def test_a_caller_who_leaves_takes_nothing_along() -> None:
    """Before their turn, nothing is decoded for them; in the middle of it, the process goes on to the next."""

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
    """After a few attempts, photos are refused at once with 503; as soon as processes start, all is well."""

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
    """Also for photos that waited for a process that has ended; as soon as it starts some again, all is well."""

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
            assert len({id(each) for each in outcomes}) == 3  # each photo has an error of its own
            with pytest.raises(DecoderUnavailable):
                await decoder.decode(PHOTO)
        await until_available(decoder)
        assert (await decoder.decode(PHOTO)).pixels.shape == (3, 32, 32)

    using(use)


def test_restarts_of_useless_decoders_are_paced() -> None:
    """Processes that end at once are started less and less often."""

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


def test_one_that_does_not_start_harms_nobody_while_others_work() -> None:
    """Their photos wait for those that do."""

    async def use(decoder: Decoder) -> None:
        await decoder.decode(PHOTO)
        for pool in decoder._pools:
            pool.command[0] = "/bin/false"
        assert len(await asyncio.gather(*(decoder.decode(PHOTO) for _ in range(5)))) == 5

    using(use, count=2)


def test_when_it_is_closed_everyone_is_told() -> None:
    """Whose photo is being decoded, who waits, and who comes later."""

    async def use(decoder: Decoder) -> None:
        await decoder.decode(PHOTO)
        tasks = [asyncio.create_task(decoder.decode(PHOTO)) for _ in range(3)]
        await asyncio.sleep(0)
        decoder.close()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, Draining) for each in outcomes)
        with pytest.raises(Draining):
            await decoder.decode(PHOTO)

    using(use)


def test_a_server_lives_on_without_its_decoders_and_they_not_without_it(tiny_path: Path) -> None:
    """Killed one and all, they are replaced; when the server itself is killed, none is left behind."""
    with ServerProcess("--checkpoint", tiny_path) as running:
        wait_until(lambda: len(decoder_pids(running.process.pid)) == usable_cores(), "a decoder for each core")
        first = decoder_pids(running.process.pid)
        for pid in first:
            os.kill(pid, signal.SIGTERM)  # meant for the server: they do not take it for themselves
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
    """503 with Retry-After, `/readyz` too; `/livez` stays 200. When processes start again, photos are answered."""

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


def test_decoders_killed_under_load_cost_no_answer(tiny_path: Path) -> None:
    """One a second: no 500, and every 200 is right. A photo is tried again elsewhere."""
    with ServerProcess("--checkpoint", tiny_path) as running, ThreadPoolExecutor(8) as pool:
        expected = probabilities(predict(running.client, PHOTO))
        statuses: Counter[int] = Counter()

        def ask(_: int) -> None:
            response = predict(running.client, PHOTO)
            statuses[response.status_code] += 1
            if response.status_code == 200:  # torch rounds otherwise in another batch size
                assert probabilities(response) == pytest.approx(expected, abs=1e-5)

        with killing_decoders(running.process.pid, 1.0, random.Random(0)) as killed:
            while len(killed) < 12:
                list(pool.map(ask, range(16)))
        assert statuses.keys() <= {200, 429, 503}
        assert statuses[200] > 0.9 * statuses.total()


def test_sound_photo_survives_a_stopped_server() -> None:
    """Server and decoders stop for longer than a photo may take, as in a machine that is suspended."""
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
    decoder.close()
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
