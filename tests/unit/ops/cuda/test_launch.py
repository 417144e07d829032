"""How arguments reach a kernel; and on a GPU: streams, graphs, threads, shared memory, time to the first launch."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from mambakit.errors import BackendError
from mambakit.ops.cuda import compiler, launch

Write = Callable[..., None]
OVERLAP = (compiler.KERNELS / "overlap.cuh").read_text(encoding="utf-8")
SET = 'extern "C" __global__ void set(float* x, long long n, float a, int on) { if (on) x[blockIdx.x] = n * a; }'


def test_arguments() -> None:
    tensor = torch.zeros(3)
    assert launch._argument(tensor) == tensor.data_ptr()
    assert launch._argument(None) == 0
    assert launch._argument(2**40) == 2**40
    number, flag = launch._argument(0.5), launch._argument(True)
    assert isinstance(number, ctypes.c_float)
    assert number.value == 0.5
    assert isinstance(flag, ctypes.c_int32)
    assert flag.value == 1


@pytest.mark.parametrize("grid", [0, (0, 3), (3, 0), (1, 2, 0)])
def test_no_blocks_no_launch(grid: int | tuple[int, ...]) -> None:
    nothing = launch.Kernel.__new__(launch.Kernel)  # Looking at anything of it would fail.
    nothing(grid, 32)


@pytest.fixture
def set_kernel(write_kernel: Write) -> launch.Kernel:
    write_kernel(SET)
    return compiler.kernel("a.cu", "set", torch.device("cuda", 0))


@pytest.mark.gpu
def test_launches_on_the_current_stream(set_kernel: launch.Kernel) -> None:
    stream, x = torch.cuda.Stream(), torch.zeros(4, device="cuda")
    assert x.sum() == 0  # loads what the sum below needs: that could take longer than the sleep
    set_kernel(4, 1, torch.zeros_like(x), 6, 0.5, True)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        set_kernel(4, 1, x, 6, 0.5, True)
    assert x.sum() == 0  # The default stream does not wait for the other one.
    stream.synchronize()
    assert x.tolist() == [3.0] * 4
    set_kernel(4, 1, x, 7, 1.0, False)
    assert x.tolist() == [3.0] * 4


@pytest.mark.gpu
def test_first_launch_of_a_kernel_within_a_capture(write_kernel: Write) -> None:
    write_kernel(SET)
    x, graph = torch.zeros(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compiler.kernel("a.cu", "set", x.device)(4, 1, x, 6, 0.5, True)
    assert x.tolist() == [0.0] * 4
    graph.replay()
    assert x.tolist() == [3.0] * 4


@pytest.mark.gpu
def test_launches_from_a_thread_that_never_used_the_gpu(set_kernel: launch.Kernel) -> None:
    x = torch.zeros(1, device="cuda")
    thread = threading.Thread(target=set_kernel, args=(1, 1, x, 6, 0.5, True))
    thread.start()
    thread.join()
    assert x.item() == 3.0


@pytest.mark.gpu
def test_much_shared_memory(write_kernel: Write) -> None:
    write_kernel(
        'extern "C" __global__ void last(float* x, long long n) { extern __shared__ float s[];'
        "s[n - 1] = 5; __syncthreads(); x[0] = s[n - 1]; }"
    )
    x, size = torch.zeros(1, device="cuda"), 99 * 1024
    compiler.kernel("a.cu", "last", x.device)(1, 1, x, size // 4, shared=size)
    assert x.item() == 5.0


COUNT = (
    "struct Given { unsigned* arrived; float* y; long long n; double a; };"
    'extern "C" __global__ void count(const __grid_constant__ Given given) { extern __shared__ float s[];'
    "atomicAdd(given.arrived, 1); while (*(volatile unsigned*)given.arrived % gridDim.x > 0);"
    "given.y[blockIdx.x] = given.n * given.a; }"
)
"""Blocks that wait for one another."""


@pytest.mark.gpu
def test_blocks_together(write_kernel: Write) -> None:
    """Alone and in a graph."""
    write_kernel(COUNT)
    blocks, shared = torch.cuda.get_device_properties(0).multi_processor_count, 96 * 1024
    arrived = torch.zeros(1, dtype=torch.int32, device="cuda")
    y = torch.zeros(blocks, device="cuda")
    kernel = compiler.kernel("a.cu", "count", y.device)
    parameters = struct.pack("3qd", arrived.data_ptr(), y.data_ptr(), 6, 0.5)
    kernel.with_struct(blocks, 1, parameters, shared=shared, together=True)
    assert (y == 3).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.with_struct(blocks, 1, parameters, shared=shared, together=True)
    y.zero_()
    graph.replay()
    assert (y == 3).all()
    assert arrived.item() == 2 * blocks


@pytest.mark.gpu
def test_more_blocks_together_than_there_is_room_for(write_kernel: Write) -> None:
    write_kernel(COUNT)
    kernel = compiler.kernel("a.cu", "count", torch.device("cuda", 0))
    with pytest.raises(BackendError, match="cannot launch count"):
        kernel.with_struct(
            10_000, 1, struct.pack("3qd", 0, 0, 0, 0.0), shared=96 * 1024, together=True
        )


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="needs clusters",
)
def test_clusters_at_once(write_kernel: Write) -> None:
    """Of blocks of which one fits into a multiprocessor, and of smaller ones."""
    write_kernel('extern "C" __global__ void __cluster_dims__(2, 1, 1) pair() {}')
    kernel = compiler.kernel("a.cu", "pair", torch.device("cuda", 0))
    properties = torch.cuda.get_device_properties(0)
    found = kernel.clusters(128, shared=properties.shared_memory_per_block_optin - 1024)
    assert 0 < found <= properties.multi_processor_count // 2
    assert kernel.clusters(128, shared=1024) > found


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(write_kernel: Write) -> None:
    write_kernel(SET)
    for index in (1, 0):
        x = torch.zeros(1, device=f"cuda:{index}")
        compiler.kernel("a.cu", "set", x.device)(1, 1, x, 6, 0.5, True)
        assert x.item() == 3.0
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_a_kernel_that_overlaps_sees_what_the_one_before_wrote(write_kernel: Write) -> None:
    """Alone and in a graph. The first one takes long, and lets the second begin at once."""
    write_kernel(
        '#include "overlap.cuh"\n'
        'extern "C" __global__ void first(float* x, long long cycles) { let_next_begin(); long long start = clock64();'
        "while (clock64() - start < cycles); x[threadIdx.x] = 3; }\n"
        'extern "C" __global__ void second(float* x, float* y) { let_next_begin(); await_previous();'
        "y[threadIdx.x] = x[threadIdx.x] + 1; }"
    )
    (compiler.KERNELS / "overlap.cuh").write_text(OVERLAP, encoding="utf-8")
    x, y = torch.zeros(2, 32, device="cuda")
    first, second = (compiler.kernel("a.cu", name, x.device) for name in ("first", "second"))

    def both() -> None:
        first(1, 32, x, 10_000_000)
        second(1, 32, x, y, overlaps=True)

    both()
    assert y.tolist() == [4.0] * 32
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    x.zero_()
    y.zero_()
    graph.replay()
    assert y.tolist() == [4.0] * 32


PROGRAM = """
import time, torch
from mambakit.ops import rms_norm
import cuda.core
x, weight = torch.ones(2, 768, device="cuda"), torch.ones(768, device="cuda")
torch.cuda.synchronize()
start = time.perf_counter()
rms_norm(x, weight, backend="cuda")
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


@pytest.mark.gpu
def test_seconds_to_the_first_result(write_kernel: Write) -> None:
    """The first process on a machine compiles, later ones read the file; other work may slow one of them."""

    def seconds() -> float:
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
        )
        return float(run.stdout)

    assert seconds() < 3.0
    assert min(seconds() for _ in range(3)) < 0.05


@pytest.mark.gpu
def test_ptx_finished_by_the_driver(write_kernel: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that is newer than NVRTC."""
    write_kernel(SET)
    monkeypatch.setattr(compiler, "target", lambda *_: "compute_80")
    x = torch.zeros(1, device="cuda")
    compiler.kernel("a.cu", "set", x.device)(1, 1, x, 6, 0.5, True)
    assert x.item() == 3.0
