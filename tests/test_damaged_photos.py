"""Damaged photos of every served format, on a real server."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import EVERY_FORMAT, encoded, photo
from tests.http_helpers import predict
from tests.servers import ServerProcess

MUTANTS = 40  # for each format
LARGEST_GROWTH_MB = 100
LONGEST_S = 2.0


def mutants(file_format: str, count: int, rng: random.Random) -> Iterator[bytes]:
    """Photos with flipped bits, truncated, with parts duplicated or removed, or with lengths and sizes overwritten."""
    whole = encoded(photo(rng.randint(0, 9), 300, 200), file_format)
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5, 30))):
            place = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 64))
            match rng.randrange(5):
                case 0:
                    data[place] ^= 1 << rng.randrange(8)
                case 1:
                    del data[max(1, place) :]
                case 2:
                    data[place:place] = data[place : place + rng.randrange(1, 200)]
                case 3:
                    del data[place : place + rng.randrange(1, 50)]
                case 4:
                    data[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)))
            if not data:
                data += b"\0"
        yield bytes(data)


def resident_mb(pid: int) -> float:
    line = next(each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("VmRSS"))
    return int(line.split()[1]) / 1000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which is not here")
def test_damaged_photos_are_answered_quickly_without_leaks(tiny_path: Path) -> None:
    """Each gets a prediction or a client error. None is slow, memory does not grow, and a valid photo is still
    answered."""
    rng = random.Random(7)
    with ServerProcess("--checkpoint", tiny_path) as running:
        for file_format in EVERY_FORMAT:
            assert predict(running.client, encoded(photo(1, 300, 200), file_format)).status_code == 200
        before_mb = resident_mb(running.process.pid)
        for file_format in EVERY_FORMAT:
            for data in mutants(file_format, MUTANTS, rng):
                started = time.monotonic()
                response = predict(running.client, data)
                assert response.status_code in (200, 400, 413, 415, 422), (file_format, response.text)
                assert time.monotonic() - started < LONGEST_S
        assert resident_mb(running.process.pid) - before_mb < LARGEST_GROWTH_MB
        assert predict(running.client, encoded(photo())).status_code == 200
        assert "unhandled exception" not in running.log
