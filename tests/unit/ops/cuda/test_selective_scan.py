"""Which way a scan goes on a GPU: a function of sizes, so tensors without memory do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambakit.ops.cuda import selective_scan as cuda


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100."""
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(cuda, "shared_memory", lambda device: 228 * 1024)


def inputs(
    batch: int,
    seqlen: int,
    channels: int,
    d_state: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    groups: int = 1,
) -> cuda._Inputs:
    with torch.device("meta"):
        x = torch.empty(batch, seqlen, channels, dtype=dtype)
        B = torch.empty(batch, seqlen, groups, d_state, dtype=dtype)
        return cuda._Inputs(x, x, torch.empty(channels, d_state), B, B, None, x, None, None, True)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize(
    ("batch", "seqlen", "channels"),
    [(1, 65536, 1536), (8, 2048, 1536), (1, 2048, 5120), (32, 2048, 1536)],
)
def test_channels_are_walked_in_one_pass(
    batch: int, seqlen: int, channels: int, keeps: bool
) -> None:
    assert inputs(batch, seqlen, channels).is_narrow(keeps)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize(
    ("batch", "seqlen", "channels"),
    [(1, 65536, 1024), (2, 8192, 512), (1, 65536, 64), (64, 512, 1536), (16, 256, 4096)],
)
def test_very_few_channels_and_short_sequences_are_not(
    batch: int, seqlen: int, channels: int, keeps: bool
) -> None:
    assert not inputs(batch, seqlen, channels).is_narrow(keeps)


@pytest.mark.parametrize(("batch", "channels"), [(4, 4096), (8, 5120)])
def test_many_channels_are_where_states_are_kept(batch: int, channels: int) -> None:
    assert inputs(batch, 2048, channels).is_narrow(keeps=True)
    assert not inputs(batch, 2048, channels).is_narrow(keeps=False)


def test_what_the_kernel_does_not_know() -> None:
    assert not inputs(1, 65536, 1536, d_state=17).is_narrow(keeps=True)
    assert not inputs(1, 65536, 1536, dtype=torch.float32).is_narrow(keeps=True)


def test_a_block_stays_in_its_group() -> None:
    assert inputs(2, 64, 96, groups=1).narrow_blocks == 2 * 6
    assert inputs(2, 64, 96, groups=4).narrow_blocks == 2 * 4 * 2


def test_helpers_move_eight_channels_at_once_where_they_are_aligned() -> None:
    assert inputs(1, 64, 1536).options(channels=8)["ALIGNED"] == 1
    assert inputs(1, 64, 1532).options(channels=8)["ALIGNED"] == 0
    assert inputs(1, 64, 1536, groups=128).options(channels=8)["ALIGNED"] == 0


def test_tests_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "IS_NARROW", True)
    assert inputs(8, 2048, 5120).is_narrow(keeps=True)
    assert not inputs(8, 2048, 5120, dtype=torch.float32).is_narrow(keeps=True)
    monkeypatch.setattr(cuda, "CHUNKS", 3)
    assert not inputs(1, 65536, 1536).is_narrow(keeps=True)


def test_one_channel_a_lane_where_two_leave_processors_idle() -> None:
    few, many = inputs(1, 65536, 1024), inputs(8, 2048, 5120)
    assert few.cut_forward()[1] > 8
    assert many.cut_forward() == (2048, 1)
    assert many.form.channels == 2


@pytest.mark.parametrize(
    ("batch", "seqlen", "channels", "is_few"),
    [(4, 2048, 4096, True), (8, 2048, 2048, True), (8, 2048, 5120, False), (8, 2048, 1536, False),
     (32, 2048, 1536, False), (64, 512, 1536, False), (1, 65536, 1536, False), (1, 2048, 5120, False)],
)  # fmt: skip
def test_what_counts_as_few_blocks(batch: int, seqlen: int, channels: int, is_few: bool) -> None:
    """As measured on an H100: where they count as few, that is faster than any other way."""
    scan = inputs(batch, seqlen, channels)
    cut = scan.cut_backward()
    assert scan.is_few == is_few
    assert not is_few or cut == (seqlen, 1)
    cut = scan.cut_forward()
    assert scan.is_few == is_few
    assert not is_few or (cut == (seqlen, 1) and scan.form.channels == 2)


def test_few_blocks_need_room_and_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_few(**options: Any) -> tuple[bool, bool]:
        scan = inputs(4, 2048, 4096, **options)
        scan.cut_forward()
        forward = scan.is_few
        scan.cut_backward()
        return forward, scan.is_few

    assert is_few() == is_few(dtype=torch.float32) == (True, True)
    assert is_few(d_state=17) == (False, False)
    monkeypatch.setattr(cuda, "shared_memory", lambda device: 164 * 1024)
    assert is_few() == (True, False)
    monkeypatch.setattr(cuda, "IS_FEW", False)
    assert is_few() == (False, False)
    monkeypatch.setattr(cuda, "IS_FEW", True)
    assert is_few(d_state=17) == (False, False)


@pytest.mark.parametrize("has_room", [False, True])
def test_gradients_have_memory_of_their_own(
    monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    """As compiled code takes them: each at a multiple of 16 bytes. Without a GPU kernels do nothing."""
    launched = []
    monkeypatch.setattr(
        cuda,
        "kernel",
        lambda file, name, *_, **__: lambda *args, **_: launched.append((name, args)),
    )
    batch, seqlen, channels = 2, 5, 98
    x, A = torch.empty(batch, seqlen, channels), torch.empty(channels, 16)
    B, D = torch.empty(batch, seqlen, 16), torch.empty(channels)
    saved, state = cuda._saved_like(x, A, True), torch.empty(batch, channels, 16)
    room = torch.empty(batch, seqlen, 2, channels)[..., 1, :] if has_room else None
    found = cuda._run_backward(x, state, x, x, A, B, B, D, x, D, None, saved, True, room)
    assert [name for name, _ in launched] == ["scan_backward", "scan_add_parts"]
    assert [g.shape for g in found] == [t.shape for t in (x, x, A, B, B, D, x, D, state)]
    if room is None:
        assert len({g.untyped_storage()._cdata for g in found}) == len(found)
        assert all(g.is_contiguous() and g.data_ptr() % 16 == 0 for g in found)
    else:
        dx, ddt, *others, dz, _, _ = found
        assert dz is room
        assert (
            dx.stride() == ddt.stride() == dz.stride() == (seqlen * 2 * channels, 2 * channels, 1)
        )
        assert all(g.is_contiguous() for g in others)
