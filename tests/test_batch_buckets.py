"""Batches padded to fixed sizes, on a device whose memory the test limits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rednet.model.inference.cuda.batch_buckets import BatchBuckets, Program, bucket_size


class Device:
    """Makes programs that add one to each image, and records what it made and ran."""

    def __init__(self, room: int = 1 << 20) -> None:
        self.room = room
        self.made: list[int] = []
        self.ran: list[tuple[int, int]] = []  # size, images

    def make(self, size: int) -> Program:
        if size > self.room:
            raise MemoryError
        self.made.append(size)

        def program(pixels: Tensor) -> tuple[Tensor, ...]:
            assert len(pixels) <= size
            self.ran.append((size, len(pixels)))
            return pixels + 1, pixels * 2

        return program


def test_bucket_sizes_bound_the_padding() -> None:
    """A batch is padded by less than half of its size, with few sizes."""
    sizes = [bucket_size(images) for images in range(1, 257)]
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert all(images <= size < 1.5 * images for images, size in enumerate(sizes, start=1))


@given(st.lists(st.integers(1, 70), min_size=1, max_size=8), st.integers(1, 80))
def test_every_batch_gets_its_results_with_any_memory(batches: list[int], room: int) -> None:
    """Results are right whatever ran before and however little memory there is. No program is made twice."""
    device = Device(room)
    buckets = BatchBuckets(device.make)
    for images in batches:
        pixels = torch.arange(images)
        plus, doubled = buckets(pixels)
        assert plus.tolist() == (pixels + 1).tolist()
        assert doubled.tolist() == (pixels * 2).tolist()
    assert len(device.made) == len(set(device.made))


def test_no_program_is_made_after_the_largest_batch() -> None:
    """The programs of all smaller sizes are made with the largest one, which is made first, because they fit into its
    memory."""
    device = Device()
    buckets = BatchBuckets(device.make)
    buckets(torch.zeros(24))
    assert device.made == [24, 16, 12, 8, 6, 4, 3, 2, 1]
    for images in range(1, 25):
        buckets(torch.zeros(images))
    assert len(device.made) == 9
    assert device.ran[-3:] == [(24, 22), (24, 23), (24, 24)]


def test_batches_are_split_when_memory_is_exhausted() -> None:
    """Allocation is tried once, and the largest size that fits is used from then on."""
    device = Device(room=9)
    buckets = BatchBuckets(device.make)
    buckets(torch.zeros(20))
    assert device.made == [8, 6, 4, 3, 2, 1]
    assert device.ran == [(8, 8), (8, 8), (4, 4)]
    device.room = 100
    buckets(torch.zeros(64))
    assert max(device.made) == 8


def test_existing_programs_stay_in_use_when_memory_is_exhausted() -> None:
    """Warm-up doubles the batch size until one does not fit."""
    device = Device(room=128)
    buckets = BatchBuckets(device.make)
    for images in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        buckets(torch.zeros(images))
    assert device.ran[-2:] == [(128, 128), (128, 128)]
    buckets(torch.zeros(7))
    assert device.ran[-1] == (8, 7)


def test_memory_error_when_not_even_one_image_fits() -> None:
    """The caller gets the MemoryError."""
    with pytest.raises(MemoryError):
        BatchBuckets(Device(room=0).make)(torch.zeros(3))


def test_batches_of_a_failed_program_run_in_the_next_larger_one(caplog: pytest.LogCaptureFixture) -> None:
    """Or in parts, if it is the largest. The failure is logged, and not tried again."""
    device = Device()
    make, tried = device.make, []

    def failing(size: int) -> Program:
        tried.append(size)
        if size in (4, 16):
            raise RuntimeError("rows are wrong")
        return make(size)

    buckets = BatchBuckets(failing)
    for images in (8, 4, 4, 12, 16, 16):
        plus, _ = buckets(torch.arange(images))
        assert plus.tolist() == list(range(1, images + 1))
    assert device.ran == [(8, 8), (6, 4), (6, 4), (12, 12), (12, 12), (6, 4), (12, 12), (6, 4)]
    assert tried == [8, 6, 4, 3, 2, 1, 12, 16]
    assert [record.getMessage() for record in caplog.records] == [
        f"no CUDA graph for batches of {size}: rows are wrong" for size in (4, 16)
    ]


@pytest.mark.parametrize("error", [RuntimeError("the first one fails"), torch.AcceleratorError("lost")])
def test_errors_that_leave_no_program_are_raised(error: Exception) -> None:
    """So that another backend is chosen."""

    def fail(size: int) -> Program:
        raise error

    with pytest.raises(type(error)):
        BatchBuckets(fail)(torch.zeros(2))


def test_lost_device_is_raised_although_other_programs_exist() -> None:
    """The process has to end: nothing will run on the device again."""
    device = Device()

    def fail(size: int) -> Program:
        if size > 2:
            raise torch.AcceleratorError("lost")
        return device.make(size)

    buckets = BatchBuckets(fail)
    buckets(torch.zeros(2))
    with pytest.raises(torch.AcceleratorError):
        buckets(torch.zeros(3))
