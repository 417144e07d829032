"""`mambakit bench`: how fast this machine runs the kernels and a model."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mambakit.cli.parsing import parse
from mambakit.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    import torch
    from rich.status import Status

    from mambakit.models.language_model import MambaLanguageModel


SCAN = (2048, 1536, 16)
"""L, D and N of the scan."""
BUDGET_SECONDS = 2.0
"""Time to spend on each number."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure how fast this machine runs the selective scan, training and generation.

    The times are medians after a warm-up; other work on the machine changes them.
    """

    preset: str = "130m"
    """Shape of the model: 130m, 370m, 790m, 1.4b or 2.8b; its weights are random."""
    checkpoint: Path | None = None
    """Checkpoint or run folder to measure instead of a preset."""
    seqlen: int = 512
    """Tokens of the training sequence and of the prompt."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""


def run(args: Sequence[str]) -> int:
    """Run `mambakit bench`."""
    options = parse(Bench, args, "bench")
    if options.seqlen < 1:
        raise ArgumentError(f"seqlen: got {options.seqlen}, wanted at least 1")

    import torch
    from rich.console import Console
    from rich.table import Table

    from mambakit.ops.cpu.features import check_bfloat16
    from mambakit.train.distributed import find_device

    device = find_device(options.device)
    model = _make_model(options, device)
    size = f"{model.num_parameters() / 1e6:.1f} M parameters"
    shape = "L = {}, D = {}, N = {}".format(*SCAN)
    scans = Table("backend", "forward", "backward", title=f"selective scan, {shape}, Melem/s")
    speeds = Table(
        "precision", "training", "reading", "writing", title=f"{size} on {device}, tokens/s"
    )
    for table in (scans, speeds):
        for column in table.columns[1:]:
            column.justify = "right"
    console = Console()
    with _measuring("the scan, a minute or less"):
        for scan_row in _scan(device):
            scans.add_row(*scan_row)
    console.print(scans)
    with _measuring(f"the model, {size}"):
        speeds.add_row("float32", *_model_rates(model, options.seqlen, device, torch.float32))
        try:
            check_bfloat16(device)
        except ConfigError as error:
            speeds.caption = str(error)
        else:
            speeds.add_row("bfloat16", *_model_rates(model, options.seqlen, device, torch.bfloat16))
    console.print(speeds)
    return 0


def _measuring(what: str) -> Status:
    """Say what is measured: a spinner on a terminal, a line elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"measuring {what}")
    return console.status(f"measuring {what}")


def _make_model(options: Bench, device: torch.device) -> MambaLanguageModel:
    from mambakit.models import MambaLanguageModel, load_model, preset
    from mambakit.train.checkpointing import find_model

    if options.checkpoint is not None:
        return load_model(find_model(options.checkpoint), device)
    return MambaLanguageModel(preset(options.preset)).to(device)


def _scan(device: torch.device) -> Iterator[tuple[str, ...]]:
    """Forward and backward of each backend that can run, with all options, on random inputs."""
    import torch

    from mambakit.ops import selective_scan
    from mambakit.ops.dispatch import explain

    seqlen, d_inner, d_state = SCAN
    x, dt, z = (torch.randn(1, seqlen, d_inner, device=device) for _ in range(3))
    A = -torch.rand(d_inner, d_state, device=device)
    B, C = (torch.randn(1, seqlen, d_state, device=device) for _ in range(2))
    D, dt_bias = (torch.randn(d_inner, device=device) for _ in range(2))
    inputs = [tensor.requires_grad_() for tensor in (x, dt, A, B, C, D, z, dt_bias)]

    def scan(backend: str) -> torch.Tensor:
        y, _ = selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus=True, backend=backend)
        return y

    for choice in explain(device, torch.float32):
        if choice.unavailable is not None:
            continue
        with torch.no_grad():
            forward_seconds = _seconds(partial(scan, choice.backend), device)
        y = scan(choice.backend)
        backward = partial(torch.autograd.grad, y, inputs, torch.ones_like(y), retain_graph=True)
        seconds = (forward_seconds, _seconds(backward, device))
        yield choice.backend, *(_rate(seqlen * d_inner / 1e6 / s) for s in seconds)


def _model_rates(
    model: MambaLanguageModel, seqlen: int, device: torch.device, dtype: torch.dtype
) -> Iterator[str]:
    """Tokens per second of training (a quantised model is not trained), of reading a prompt and of writing."""
    import torch

    tokens = torch.randint(model.config.vocab_size, (1, seqlen), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss, _ = model.loss(tokens, tokens)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    yield "-" if model.quantisation else _rate(seqlen / _seconds(train, device))
    reader = copy.deepcopy(model).to(dtype)
    _, state = reader.prefill(tokens)
    yield _rate(seqlen / _seconds(partial(reader.prefill, tokens), device))
    step = reader.prepared_step(state)
    with torch.no_grad():
        yield _rate(1 / _seconds(partial(step, tokens[:, 0]), device))


def _rate(value: float) -> str:
    """With three digits at least, so that what is slow is not zero."""
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, over at least 3 calls if they are not long, after one that is not counted."""
    import torch

    times: list[float] = []
    function()
    while sum(times) < BUDGET_SECONDS or (len(times) < 3 and times[0] < BUDGET_SECONDS):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
