"""Loading a binary into the driver, and launching its kernels on PyTorch's current stream."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mambakit.errors import BackendError

DEFAULT_SHARED = 48 * 1024
"""Bytes of shared memory that a block gets without asking, those that the kernel declares included."""

_thread = threading.local()


class Kernel:
    """A kernel on one device. Calling it launches it on the stream that is current there, and returns at once."""

    def __init__(self, function: Any, name: str, index: int) -> None:
        from cuda.bindings import driver
        from cuda.core import launch

        self._function, self._launch, self._index, self.name = function, launch, index, name
        self._handle, self._device = driver.CUkernel(int(function.handle)), driver.CUdevice(index)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        status, declared = driver.cuKernelGetAttribute(attribute, self._handle, self._device)
        assert int(status) == 0, status
        self._shared = DEFAULT_SHARED - declared

    def __call__(
        self,
        grid: int | tuple[int, ...],
        block: int,
        *args: object,
        shared: int = 0,
        overlaps: bool = False,
    ) -> None:
        """Launch.

        Args:
            grid: Blocks, in one to three dimensions; none at all if one of them is zero.
            block: Threads in a block.
            args: Tensors (their address), None (the null pointer), int (`long long`), float (`float`), bool (`int`).
            shared: Bytes of dynamic shared memory.
            overlaps: Whether it may begin while the kernel before it runs, where the GPU can do that; see
                kernels/overlap.cuh.
        """
        if grid == 0 or (isinstance(grid, tuple) and 0 in grid):
            return
        if torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._index):
                self(grid, block, *args, shared=shared, overlaps=overlaps)
            return
        if self._index not in _bound_devices():
            _bind(self._index)
        if shared > self._shared:
            self._allow(shared)
        stream = _stream(self._index, torch._C._cuda_getCurrentRawStream(self._index))
        config = _config(grid, block, shared, overlaps and _can_overlap(self._index))
        self._launch(stream, config, self._function, *map(_argument, args))

    def with_struct(
        self, grid: int, block: int, parameters: bytes, *, shared: int, together: bool = False
    ) -> None:
        """Launch a kernel that takes one struct.

        Args:
            grid: Blocks.
            block: Threads in a block.
            parameters: The bytes of the struct.
            shared: Bytes of dynamic shared memory.
            together: None of the blocks, which wait for one another, begins before there is room for all.
        """
        from cuda.bindings import driver

        with torch.cuda.device(self._index):
            if self._index not in _bound_devices():
                _bind(self._index)
            if shared > self._shared:
                self._allow(shared)
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            attribute.value.cooperative = int(together)
            config = driver.CUlaunchConfig()
            config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
            config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
            config.sharedMemBytes = shared
            config.hStream = driver.CUstream(torch._C._cuda_getCurrentRawStream(self._index))
            config.attrs, config.numAttrs = [attribute], 1
            struct = ctypes.create_string_buffer(parameters, len(parameters))
            pointers = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
            function = driver.CUfunction(int(self._handle))
            (status,) = driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0)
        if int(status) != 0:
            raise BackendError(
                f"the NVIDIA driver cannot launch {self.name} ({status}); use backend='reference'"
            )

    def clusters(self, block: int, *, shared: int) -> int:
        """How many clusters of a kernel that declares their size the device runs at once.

        Args:
            block: Threads in a block.
            shared: Bytes of dynamic shared memory of a block.
        """
        from cuda.bindings import driver

        with torch.cuda.device(self._index):
            if self._index not in _bound_devices():
                _bind(self._index)
            if shared > self._shared:
                self._allow(shared)
            config = driver.CUlaunchConfig()
            config.gridDimX, config.gridDimY, config.gridDimZ = 4, 1, 1
            config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
            config.sharedMemBytes = shared
            config.attrs, config.numAttrs = [], 0
            function = driver.CUfunction(int(self._handle))
            status, count = driver.cuOccupancyMaxActiveClusters(function, config)
        assert int(status) == 0, f"{self.name}: {status}"
        return int(count)

    def _allow(self, shared: int) -> None:
        from cuda.bindings import driver

        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(attribute, shared, self._handle, self._device)
        assert int(status) == 0, f"{self.name}: {shared} bytes of shared memory: {status}"
        self._shared = shared


def loaded(binary: bytes, name: str, index: int) -> Kernel:
    """Load a binary on a device and find a kernel in it.

    Raises:
        BackendError: The driver does not take the binary.
    """
    from cuda.bindings import driver
    from cuda.core import ObjectCode

    make = ObjectCode.from_cubin if binary[:4] == b"\x7fELF" else ObjectCode.from_ptx
    with torch.cuda.device(index), _outside_of_capture():
        _bind(index)
        try:
            function = make(binary).get_kernel(name)
            # CUDA loads lazily, at the first launch, which a stream capture may forbid: load now.
            status, _ = driver.cuKernelGetFunction(driver.CUkernel(int(function.handle)))
            assert int(status) == 0, status
        except Exception as error:
            raise BackendError(
                f"the NVIDIA driver cannot load {name} ({error}); update the driver, or use backend='reference'"
            ) from error
    return Kernel(function, name, index)


def _argument(value: object) -> object:
    """A value as cuda.core wants it: it takes int as an address or `long long`."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int32(value) if isinstance(value, bool) else value


@functools.lru_cache(maxsize=4096)
def _config(grid: int | tuple[int, ...], block: int, shared: int, overlaps: bool) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(
        grid=grid, block=block, shmem_size=shared, programmatic_stream_serialization=overlaps
    )


@functools.cache
def _can_overlap(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


@functools.lru_cache(maxsize=256)
def _stream(index: int, handle: int) -> Any:
    from cuda.core import LEGACY_DEFAULT_STREAM, Stream

    return Stream.from_handle(handle) if handle else LEGACY_DEFAULT_STREAM


def _bound_devices() -> set[int]:
    """The devices whose context this thread has had current."""
    try:
        devices: set[int] = _thread.devices
    except AttributeError:
        devices = _thread.devices = set()
    return devices


def _bind(index: int) -> None:
    """Make PyTorch's context current in a thread that has none yet; the runtime does so only at its first own call."""
    from cuda.bindings import driver
    from cuda.core import Device

    _, context = driver.cuCtxGetCurrent()
    if int(context) == 0:
        Device(index).set_current()
    _bound_devices().add(index)


@contextlib.contextmanager
def _outside_of_capture() -> Iterator[None]:
    """Let this thread load code while it captures a graph, as PyTorch's allocator does to allocate."""
    from cuda.bindings import driver

    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    _, before = driver.cuThreadExchangeStreamCaptureMode(relaxed)
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)
