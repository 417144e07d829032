"""How the scan is cut for a GPU: pure functions of sizes."""

from __future__ import annotations

import pytest

from mambakit.ops.cuda.scan_layout import (
    BACKWARD,
    FEW_BACKWARD,
    FORWARD,
    NARROW,
    NARROW_PACE,
    SHARED_LIMIT,
    Pace,
    layout,
    narrow_time,
    plan,
    takes_narrow,
)

MULTIPROCESSORS = 132


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("d_state", [1, 4, 5, 16, 17, 64, 100, 256])
def test_a_warp_holds_every_state_of_its_channels(d_state: int, is_complex: bool) -> None:
    form = layout(d_state, is_complex)
    assert d_state <= form.padded < 2 * max(d_state, form.states)
    assert form.spread * form.slots == 32
    assert form.tile % form.save_every == 0
    assert form.save_every % form.segment == 0 or form.segment % form.save_every == 0


@pytest.mark.parametrize("d_state", [1, 4, 16, 64, 128, 256])
def test_a_block_fits_on_every_gpu(d_state: int) -> None:
    form = layout(d_state, is_complex=False)
    assert form.forward_bytes() <= SHARED_LIMIT
    assert form.backward_bytes(4) <= SHARED_LIMIT
    assert form.save_every % form.backward_segment(False) == 0


@pytest.mark.parametrize("io_bytes", [2, 4])
def test_so_many_blocks_find_room_as_the_kernels_have_registers_for(io_bytes: int) -> None:
    """On an H100, of whose 228 KB of shared memory each block takes 1 KB for itself; but for float32 of many blocks."""
    form = layout(16, is_complex=False)
    for pace, is_few in ((BACKWARD, False), (FEW_BACKWARD, True)):
        resident = 2 if io_bytes == 4 else pace.resident
        assert resident * (form.backward_bytes(io_bytes, is_few) + 1024) <= 228 * 1024
        assert form.save_every % form.backward_segment(is_few) == 0


@pytest.mark.parametrize("pace", [*FORWARD.values(), BACKWARD])
def test_many_channels_are_not_cut_in_time(pace: Pace) -> None:
    full = MULTIPROCESSORS * pace.resident
    assert plan(full, 4096, MULTIPROCESSORS, pace)[0] == 1


@pytest.mark.parametrize("pace", [*FORWARD.values(), BACKWARD])
def test_few_channels_of_a_long_sequence_fill_the_gpu(pace: Pace) -> None:
    blocks = 24
    chunks, _ = plan(blocks, 65536, MULTIPROCESSORS, pace)
    waves = blocks * chunks / (MULTIPROCESSORS * pace.resident)
    assert waves > 0.9
    assert waves / -(-waves // 1) > 0.8  # the last wave is nearly full


@pytest.mark.parametrize("seqlen", [1, 127, 255, 256, 1000])
def test_a_chunk_is_worth_its_launch(seqlen: int) -> None:
    chunks, _ = plan(1, seqlen, MULTIPROCESSORS, BACKWARD)
    assert 1 <= chunks <= max(1, seqlen // 128)


def test_a_narrow_block_fits_on_every_gpu() -> None:
    assert NARROW.bytes() <= SHARED_LIMIT


@pytest.mark.parametrize(
    ("d_state", "is_complex", "io_bytes", "expected"),
    [(16, False, 2, True), (9, False, 2, True), (8, False, 2, False), (17, False, 2, False),
     (16, True, 2, False), (16, False, 4, False)],
)  # fmt: skip
def test_what_is_walked_in_one_pass(
    d_state: int, is_complex: bool, io_bytes: int, expected: bool
) -> None:
    assert takes_narrow(layout(d_state, is_complex), io_bytes) == expected


def test_what_is_walked_in_one_pass_is_not_cut() -> None:
    assert plan(1, 65536, MULTIPROCESSORS, NARROW_PACE, most=1)[0] == 1


def test_time_of_one_pass() -> None:
    """Beginning and end are as long however short the sequence is."""
    long, short = (narrow_time(300, n, MULTIPROCESSORS, keeps=False) for n in (8000, 80))
    assert short == pytest.approx(2 * long / 1.01)
    assert narrow_time(300, 80, MULTIPROCESSORS, keeps=True) < short
