"""The selective scan is a loop of two lines. The fast one gives the same numbers, and gradients."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from mambakit.ops import selective_scan


def scan_by_hand(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """x, dt (batch, length, channels); A (channels, states); B, C (batch, length, states)."""
    h, outputs = torch.zeros(len(x), *A.shape), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt * x)[:, t, :, None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1)


def main() -> None:
    torch.manual_seed(0)
    batch, length, channels, states = 1, 512, 256, 16
    x = torch.randn(batch, length, channels)
    dt = 0.1 * torch.rand(batch, length, channels)
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    B, C = torch.randn(2, batch, length, states)

    selective_scan(x, dt, A, B, C)  # The first call loads the compiled kernel, or compiles it.
    start = time.perf_counter()
    slow = scan_by_hand(x, dt, A, B, C)
    between = time.perf_counter()
    fast, state = selective_scan(x, dt, A, B, C)
    end = time.perf_counter()

    print(f"by hand          {(between - start) * 1e3:7.1f} ms")
    print(f"selective_scan   {(end - between) * 1e3:7.1f} ms")
    error, largest = (slow - fast).abs().max(), fast.abs().max()
    print(f"largest difference {error:.1e}, of values up to {largest:.1f}")

    # The state that comes out goes back in: two halves make a whole.
    half = length // 2
    first, state = selective_scan(x[:, :half], dt[:, :half], A, B[:, :half], C[:, :half])
    second, _ = selective_scan(
        x[:, half:], dt[:, half:], A, B[:, half:], C[:, half:], initial_state=state
    )
    print(f"two halves against one whole: {(torch.cat([first, second], 1) - fast).abs().max():.1e}")


if __name__ == "__main__":
    main()
