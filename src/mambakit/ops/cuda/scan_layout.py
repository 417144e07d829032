"""How the scan is laid out on a GPU: who holds what in a warp, and into how many chunks time is cut."""

from __future__ import annotations

import functools
from typing import NamedTuple

from mambakit.ops.cuda.arrays import Variants

MOST_STATES = 256
"""States of a channel that a warp holds at a time."""

SHARED_LIMIT = 99 * 1024
"""Shared memory that a block can have on every GPU from compute capability 8.0 on, in bytes."""


class Layout(NamedTuple):
    """Who holds what in a warp; see kernels/selective_scan.cuh."""

    states: int
    spread: int
    channels: int
    warps: int
    number_bytes: int

    @property
    def padded(self) -> int:
        """States of a channel, with padding."""
        return self.states * self.spread

    @property
    def slots(self) -> int:
        """Lanes of a warp that hold different channels."""
        return 32 // self.spread

    @property
    def save_every(self) -> int:
        """Steps between the states that are kept for the backward."""
        return 16 if self.padded * self.number_bytes <= 256 else 8

    @property
    def tile(self) -> int:
        """Steps of B and C that the forward holds in shared memory."""
        return 32 if self.padded * self.number_bytes <= 256 else self.save_every

    @property
    def segment(self) -> int:
        """Steps between two exchanges within a warp of the forward."""
        return 16 if self.on_tensor_cores else 8

    def blocks(self, width: int) -> int:
        """Blocks that `width` channels of a group need."""
        return -(-width // (self.warps * self.slots * self.channels))

    def constants(self) -> dict[str, int]:
        """As the kernels read them."""
        return {
            "STATES": self.states,
            "SPREAD": self.spread,
            "CHANNELS": self.channels,
            "WARPS": self.warps,
            "SAVE_EVERY": self.save_every,
            "COMPLEX": int(self.number_bytes == 8),
        }

    def forward_bytes(self) -> int:
        """Shared memory of `scan_forward`: steps, sums of y, B and C twice, restarts."""
        floats = 4 * self.channels
        warp = self.segment * (self.slots * (2 * floats + (self.spread + 1) * floats) + 4)
        return _aligned(self.warps * warp + 4 * self.tile * self.padded * self.number_bytes)

    def copied(self, io_bytes: int) -> int:
        """Neighbouring channels that the backward can copy at a time: up to 16 bytes of a warp's."""
        return min(self.slots * self.channels, 16 // io_bytes)

    def backward_segment(self, is_few: bool) -> int:
        """Steps that a warp of the backward walks back at a time."""
        return 8 if is_few else 4

    def backward_bytes(self, io_bytes: int, is_few: bool = False) -> int:
        """Shared memory of `scan_backward`, in the order of its structs."""
        tile, segment, floats = self.save_every, self.backward_segment(is_few), 4 * self.channels
        states, lanes = self.states * self.number_bytes, 32 * self.channels
        gap = 0 if self.on_tensor_cores else self.slots
        begin = (lanes + 4 if self.on_tensor_cores else lanes) * states
        halves = 8 if self.on_tensor_cores else self.spread
        left = _aligned(max(begin, segment * 2 * halves * states))
        warp = _aligned(tile * self.slots * 2 * floats)
        warp += 4 * _aligned(2 * tile * self.slots * self.channels * io_bytes)
        warp = _aligned(warp + 2 * self.slots * floats + segment * self.slots * floats)
        warp += 2 * begin + tile // segment * left + segment * (32 + gap) * 3 * floats
        warp += 2 * self.channels * self.slots * 8 + 4 * tile + 4 * 32 * 8 + 8 * self.slots
        if self.on_tensor_cores:
            warp += 1
        else:
            warp = _aligned(warp) + segment * 2 * self.spread * (self.slots + 1) * states
        weight = io_bytes if self.on_tensor_cores and io_bytes == 2 else self.number_bytes
        return self.warps * _aligned(warp) + 4 * tile * self.padded * weight

    @property
    def on_tensor_cores(self) -> bool:
        """Whether tensor cores sum over the channels; see kernels/channel_sums.cuh."""
        return (self.states, self.spread, self.number_bytes) == (4, 4, 4)


def layout(d_state: int, is_complex: bool) -> Layout:
    """A lane holds 16 bytes of states, or more where 32 lanes with 16 bytes are not enough."""
    size = 8 if is_complex else 4
    least = states = 16 // size
    while 32 * states < d_state:
        states *= 2
    spread = 1
    while spread * states < d_state:
        spread *= 2
    forms = (
        Layout(states, spread, 2 if states == least else 1, warps, size) for warps in (4, 2, 1)
    )
    return next(form for form in forms if form.backward_bytes(4) <= SHARED_LIMIT or form.warps == 1)


class Narrow(NamedTuple):
    """A block of `scan_narrow`; see kernels/selective_scan_narrow.cu."""

    warps: int = 4
    """Warps that walk; as many help."""
    tile: int = 64
    """Steps that the helpers are ahead: one for each two of their lanes."""

    def blocks(self, width: int) -> int:
        """Blocks that `width` channels of a group need."""
        return -(-width // (4 * self.warps))

    def constants(self) -> dict[str, int]:
        """As the kernel reads them."""
        common = {"STATES": 2, "SPREAD": 8, "CHANNELS": 1, "COMPLEX": 0, "SAVE_EVERY": 16}
        sizes = {"WARPS": self.warps, "TILE": self.tile, "MIN_BLOCKS": NARROW_PACE.resident}
        return {**common, **sizes, "SHARED_BYTES": self.bytes()}

    def bytes(self) -> int:
        """Shared memory: steps of two tiles, sums of y and inputs of four, restarts, barriers."""
        ring = 2 * self.tile
        rows = self.warps * (4 * (ring + 2) * 8 + 32 + 8 * (2 * ring + 16) * 4 + 32)
        inputs = 4 * self.tile * (2 * 16 + 3 * 4 * self.warps) * 2
        return _aligned(rows + inputs + 4 * ring + 2 * 8)


NARROW = Narrow()


def takes_narrow(form: Layout, io_bytes: int) -> bool:
    """Whether `scan_narrow` knows the sizes: 9 to 16 real states, in half precision."""
    return form.on_tensor_cores and io_bytes == 2


class Pace(NamedTuple):
    """How fast a kernel goes with blocks of a layout; measured on an H100."""

    resident: int
    """Blocks that a multiprocessor holds at a time."""
    floor: float
    """r resident blocks take as long as r + floor blocks would without latencies."""
    cost: float
    """Of a block, relative to other layouts of the same kernel."""
    extra: float
    """Cost of the pass that makes the starts of chunks, relative to the main pass."""


FORWARD = {2: Pace(5, 1.5, 0.78, 0.75), 1: Pace(4, 1.95, 0.4, 0.75)}
"""By channels a lane."""
NARROW_PACE = Pace(2, 0.05, 0.25, 0.0)
"""Of `scan_narrow`, which is never cut in time."""
NARROW_START = 80
"""Steps in whose time a block of it begins and ends."""
NARROW_KEEPING = 0.95
"""Its cost where states are kept for the backward, relative to the other kernel's: that loses 7 % by it, this one 2."""
BACKWARD = Pace(3, 0.95, 1.0, 0.2)

FEW_FORWARD, FEW_BACKWARD = Pace(2, 2.04, 0.52, 0.0), Pace(2, 1.06, 0.85, 0.0)
"""Where no multiprocessor gets a third block: each of two may then have 255 registers. Two channels a lane, and time is
not cut."""


@functools.lru_cache(maxsize=1024)
def plan(
    blocks: int, seqlen: int, multiprocessors: int, pace: Pace, most: int = 64
) -> tuple[int, float]:
    """Into how many chunks to cut time.

    Args:
        blocks: Blocks of one chunk.
        seqlen: L.
        multiprocessors: Of the device.
        pace: Of the kernel.
        most: Chunks at most.

    Returns:
        The number with the smallest estimated time, and that, in units that compare layouts: waves
        of blocks, each as long as a chunk.
    """

    def time(chunks: int) -> float:
        waves, rest = divmod(blocks * chunks, multiprocessors * pace.resident)
        passes = waves * (pace.resident + pace.floor)
        passes += -(-rest // multiprocessors) + pace.floor if rest else 0.0
        return pace.cost * passes / chunks * (1 + pace.extra * (chunks - 1) / chunks)

    best = min(range(1, max(1, min(most, seqlen // 128)) + 1), key=time)
    return best, time(best)


def narrow_time(blocks: int, seqlen: int, multiprocessors: int, keeps: bool) -> float:
    """What `scan_narrow` takes, in the units of `plan`.

    At 343 sizes, from 512 channels to 64 x 6,144 and from 256 steps to 65,536, the kernel chosen so is on average 0.3 %
    slower than the faster one, and by more than 3 % at 13, where states are kept 7; by 20 % at most.
    """
    _, time = plan(blocks, seqlen, multiprocessors, NARROW_PACE, most=1)
    return time * (1 + NARROW_START / seqlen) * (NARROW_KEEPING if keeps else 1.0)


def variants() -> Variants:
    """The kernels of the usual sizes, and of every branch of the sources."""
    options = {"B_VARIES": 1, "C_VARIES": 1, "HAS_Z": 1, "SOFTPLUS": 1, "HAS_RESTART": 0}
    others = {"B_VARIES": 0, "C_VARIES": 0, "HAS_Z": 0, "SOFTPLUS": 0, "HAS_RESTART": 1}
    found: Variants = []
    for io, size, d_state, is_complex, chosen, aligned in (
        ("bfloat16", 2, 16, False, options, 1),
        ("float", 4, 16, False, options, 1),
        ("float16", 2, 16, False, {**options, "HAS_RESTART": 1}, 0),
        ("bfloat16", 2, 16, False, others, 1),
        ("bfloat16", 2, 64, False, options, 1),
        ("float", 4, 256, False, options, 0),
        ("float", 4, 16, True, options, 1),
    ):
        form = layout(d_state, is_complex)
        common: dict[str, int | str] = {"IO": io, "ALIGNED": aligned, **chosen}
        for channels in range(1, form.channels + 1):
            for mode in ("CHUNK_STATES", "OUTPUTS", "CHUNK_ADJOINTS"):
                found.append(forward_kernel(form._replace(channels=channels), mode, common))
        copied = form.copied(size) if aligned else 1
        backward = {**common, "COPIED": copied, "WEIGHTS_ALIGNED": aligned}
        found.append(backward_kernel(form, size, "scan_backward", backward))
        if form.on_tensor_cores:
            found.append(forward_kernel(form, "OUTPUTS", common, is_few=True))
            found.append(backward_kernel(form, size, "scan_backward", backward, is_few=True))
        if takes_narrow(form, size):
            lanes = {"B_LANES": 8 if aligned else 1, "C_LANES": 8 if aligned else 2}
            found.append(narrow_kernel({**common, **lanes}))
    return found


def forward_kernel(
    form: Layout, mode: str, options: dict[str, int | str], is_few: bool = False
) -> tuple[str, str, dict[str, int | str]]:
    """File, name and constants of `scan_forward`; for `mode` see there."""
    pace = FEW_FORWARD if is_few else FORWARD[form.channels]
    resident = pace.resident if form.on_tensor_cores else 1
    if resident > 4 and options["IO"] == "float":
        resident = 4  # Its exact functions need the registers.
    constants: dict[str, int | str] = {"MODE": mode, "MIN_BLOCKS": resident}
    constants |= {"TILE": form.tile, "SEGMENT": form.segment}
    constants |= {**form.constants(), **options, "SHARED_BYTES": form.forward_bytes()}
    return "selective_scan_forward.cu", "scan_forward", constants


def narrow_kernel(options: dict[str, int | str]) -> tuple[str, str, dict[str, int | str]]:
    """File, name and constants of `scan_narrow`."""
    return "selective_scan_narrow.cu", "scan_narrow", {**NARROW.constants(), **options}


def backward_kernel(
    form: Layout, io_bytes: int, name: str, options: dict[str, int | str], is_few: bool = False
) -> tuple[str, str, dict[str, int | str]]:
    """File, name and constants of a kernel in the backward's file."""
    pace = FEW_BACKWARD if is_few else BACKWARD
    resident = pace.resident if form.on_tensor_cores else 1
    constants: dict[str, int | str] = {"MIN_BLOCKS": resident, **form.constants(), **options}
    constants["SEGMENT"] = form.backward_segment(is_few)
    constants["SHARED_BYTES"] = form.backward_bytes(io_bytes, is_few)
    return "selective_scan_backward.cu", name, constants


def _aligned(size: int) -> int:
    return -(-size // 16) * 16
