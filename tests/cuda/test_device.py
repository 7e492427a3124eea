"""The twin keeps to what CUDA promises and to no more; and a real device, where there is one."""

import ctypes
import sys

import pytest
import torch

from engine.cuda.device import Device, TorchDevice, registered
from tests.cuda.virtual_device import STREAMS, VirtualDevice

LATE: tuple[str, ...] = ()
EARLY = STREAMS


def as_engine_sees_it(device: VirtualDevice) -> Device:
    return device


def tensors(device: VirtualDevice, num: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """(on the device, pinned), the latter counting from 1."""
    near, far = device.empty((num,), torch.float32), device.pinned((num,), torch.float32)
    far.copy_(torch.arange(1, num + 1))
    return near, far


def test_memory_that_nobody_wrote_is_poisoned() -> None:
    device = VirtualDevice()
    assert device.empty((3,), torch.bfloat16).isnan().all()
    assert (device.pinned((3,), torch.int32) == -1).all()


@pytest.mark.parametrize("early", [LATE, EARLY])
def test_a_copy_is_there_once_its_event_was_waited_for(early: tuple[str, ...]) -> None:
    device = VirtualDevice(early)
    near, far = tensors(device)
    device.copy(near, far, device.loads)
    event = device.event()
    device.record(event, device.loads)
    device.synchronize(event)
    assert near.tolist() == [1, 2, 3, 4] and device.is_done(event)


def test_a_late_copy_is_poison_until_it_is_waited_for_and_reads_its_source_last() -> None:
    device = VirtualDevice(LATE)
    near, far = tensors(device)
    near.zero_()
    device.copy(near, far, device.loads)
    assert near.isnan().all()
    far.fill_(9)
    device.finish(device.loads)
    assert near.tolist() == [9] * 4


def test_a_late_copy_is_not_there_for_a_stream_that_waits_for_an_earlier_event() -> None:
    device = VirtualDevice()
    near, far = tensors(device)
    event = device.event()
    device.record(event, device.loads)
    device.copy(near, far, device.loads)
    device.wait(device.compute, event)
    assert near.isnan().all()
    device.record(event, device.loads)  # the same event again: it stands for more now
    device.wait(device.compute, event)
    assert near.tolist() == [1, 2, 3, 4]


def test_an_event_that_was_never_recorded_passes_at_once() -> None:
    device = VirtualDevice(LATE)
    near, far = tensors(device)
    event = device.event()
    device.copy(near, far, device.loads)
    device.wait(device.compute, event)
    device.synchronize(event)
    assert device.is_done(event) and near.isnan().all()
    device.record(event, device.loads)
    assert not device.is_done(event)
    device.recycle(event)
    assert device.event() is event and device.is_done(event), "an event keeps what was recorded by others"


def test_a_wait_means_the_record_before_it_not_one_behind() -> None:
    device = VirtualDevice(("stores",))
    near, far = tensors(device)
    other = device.pinned((4,), torch.float32)
    event = device.event()
    device.record(event, device.loads)
    device.wait(device.stores, event)
    device.copy(near, far, device.loads)
    device.record(event, device.loads)
    device.copy(other, near, device.stores)
    assert other.isnan().all(), "the store did not wait for the load, and read what was there"


def test_an_early_copy_waits_for_what_it_must() -> None:
    device = VirtualDevice(("stores",))
    near, far = tensors(device)
    other = device.pinned((4,), torch.float32)
    done = []
    device.launch(device.compute, "fill", lambda: done.append(near.fill_(7)))
    computed, stored = device.event(), device.event()
    device.record(computed, device.compute)
    device.wait(device.stores, computed)
    device.copy(other, near, device.stores)
    device.record(stored, device.stores)
    assert not done
    device.synchronize(stored)
    assert done and other.tolist() == [7] * 4


def test_a_copy_that_is_held_up_has_not_begun_to_write() -> None:
    device = VirtualDevice(LATE)
    near, far = tensors(device)
    other = device.pinned((4,), torch.float32)
    near.fill_(5)
    device.copy(other, near, device.stores)
    stored = device.event()
    device.record(stored, device.stores)
    device.wait(device.loads, stored)
    device.copy(near, far, device.loads)
    assert near.tolist() == [5] * 4
    device.finish()
    assert other.tolist() == [5] * 4 and near.tolist() == [1, 2, 3, 4]


def test_work_on_a_stream_comes_behind_all_that_it_was_given() -> None:
    device = VirtualDevice(LATE)
    near, far = tensors(device)
    device.copy(near, far, device.loads)
    with device.on(device.loads):
        near += 1
    assert near.tolist() == [2, 3, 4, 5]


def test_asking_a_late_stream_again_and_again_comes_to_an_end() -> None:
    device = VirtualDevice(LATE)
    near, far = tensors(device)
    device.copy(near, far, device.loads)
    event = device.event()
    device.record(event, device.loads)
    assert not device.is_done(event)
    assert device.is_done(event)


def test_seconds_grow_with_the_work_between_two_events() -> None:
    device = VirtualDevice(LATE)
    near, far = tensors(device)
    first, second = device.event(), device.event()
    device.record(first, device.loads)
    device.copy(near, far, device.loads)
    device.record(second, device.loads)
    device.synchronize(second)
    assert device.seconds_between(first, second) > 0


def test_a_host_side_that_is_not_pinned_is_refused() -> None:
    device = VirtualDevice()
    near, _ = tensors(device)
    with pytest.raises(AssertionError, match="not pinned"):
        device.copy(near, torch.zeros(4), device.loads)


def test_a_wait_can_be_left_out_by_its_place() -> None:
    plain = VirtualDevice()
    waited(plain)
    (site,) = plain.sites
    assert waited(VirtualDevice()) and not waited(VirtualDevice(ignored_site=site))


def waited(device: VirtualDevice) -> bool:
    """Whether a load was there after it had been waited for."""
    near, far = tensors(device)
    device.copy(near, far, device.loads)
    event = device.event()
    device.record(event, device.loads)
    device.wait(device.compute, event)
    return not near.isnan().any()


def test_the_twin_is_a_device() -> None:
    assert as_engine_sees_it(VirtualDevice(free_bytes=5)).room().num_bytes == 5


class Runtime:
    """Stands in for what torch shows of the CUDA runtime."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if not self.error:
            self.registered[address] = num_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        ctypes.memset(address, 1, self.registered.pop(address))  # it is still mapped
        return 0


@pytest.mark.skipif(sys.platform != "linux", reason="takes memory as Linux gives it")
def test_memory_is_registered_as_large_as_it_is_until_nobody_has_any_of_it() -> None:
    runtime = Runtime()
    memory = registered((3, 1000), torch.bfloat16, runtime, pytest.fail)
    assert memory is not None and runtime.registered == {memory.data_ptr(): 6000}
    memory.fill_(1.5)
    part = memory[1]
    del memory
    assert runtime.registered and (part == 1.5).all()
    del part
    assert not runtime.registered


@pytest.mark.skipif(sys.platform != "linux", reason="takes memory as Linux gives it")
def test_memory_that_cannot_be_registered_is_none_and_the_refusal_is_told() -> None:
    """Or torch would take it for what became of its next kernel."""
    told: list[bool] = []
    assert registered((3, 1000), torch.bfloat16, Runtime(error=801), lambda: told.append(True)) is None
    assert told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num", [1000, 500_000])
def test_a_gpu_copies_both_ways_through_pinned_memory(num: int) -> None:
    device = TorchDevice(torch.device("cuda:0"))
    far, back = device.pinned((num,), torch.float32), device.pinned((num,), torch.float32)
    assert far.is_pinned() and far[1:].is_pinned() and far.nbytes == 4 * num
    far.copy_(torch.arange(num))
    near = device.empty((num,), torch.float32)
    first, loaded, stored = (device.event() for _ in range(3))
    device.record(first, device.loads)
    device.copy(near, far, device.loads)
    device.record(loaded, device.loads)
    device.wait(device.compute, loaded)
    with device.on(device.compute):
        near += 1
    device.record(loaded, device.compute)
    device.wait(device.stores, loaded)
    device.copy(back, near, device.stores)
    device.record(stored, device.stores)
    device.synchronize(stored)
    assert device.is_done(stored) and device.seconds_between(first, stored) > 0
    assert torch.equal(back, far + 1)
    assert device.room().num_bytes > 0
