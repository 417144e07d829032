"""The Mamba mixer: gated selective state space layer (Gu & Dao 2023, section 3.4, Figure 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mambakit.nn.conv import CausalConv1d, convolve
from mambakit.nn.ends import WHOLE, Ends
from mambakit.nn.initial import a_imag_init, a_log_init, b_init, c_init, dt_bias_init
from mambakit.nn.joined_gradients import joins_gradients, linear_beside, linear_in_halves
from mambakit.nn.linear import DtProjection, Linear, product, project_to
from mambakit.nn.recomputation import Recomputation, is_plain
from mambakit.nn.state import MixerState
from mambakit.ops import rms_norm, selective_scan, selective_scan_step
from mambakit.ops.causal_conv1d_linear import causal_conv1d_linear, fuses

RECOMPUTES_ON = ("cuda",)
"""Devices where x and dt are made again in the backward. A CPU has memory, and would take 5 % more time."""


class MambaMixer(nn.Module):
    """Mixes a sequence in time, in place of attention.

        x, z = in_proj(hidden);  x = silu(conv1d(x));  dt, B, C = x_proj(x);  dt = dt_proj(dt)
        y = out_proj(scan(x, softplus(dt + dt_bias), A, B, C, D) * silu(z))

    Names of modules and parameters are those of the official checkpoints. A "B" or "C" that is
    not `selective` is a parameter (D, N); without a selective "dt", a parameter `dt_bias` (D,)
    takes the place of dt_proj. With a complex A ("s4d-lin") B and C are complex too: re and im
    alternate in the 2 N outputs of x_proj, and are the last dimension of a parameter (D, N, 2).
    With a `norm_epsilon`, each of the outputs dt, B and C of x_proj is divided by its root mean
    square, as in FalconMamba (arXiv 2410.05355): it keeps large models stable.

    A_log, A_imag, B, C, D and the bias of dt stay float32 under `.to(bfloat16)` and `.half()`,
    because the recurrence is sensitive to them, and are marked with `_no_weight_decay`.

    Args:
        d_model: Width of the input and the output (M).
        d_state: State size of each channel (N).
        d_conv: Width of the convolution (W).
        expand: D = expand * M.
        dt_rank: Rank of the projection to dt (R); "auto" is ceil(M / 16).
        dt_min: Smallest initial time step.
        dt_max: Largest initial time step.
        dt_init: "random" or "constant", the initial weight of dt_proj; see `DtProjection`.
        dt_scale: Factor of that weight.
        dt_init_floor: Initial time steps are not smaller than this.
        conv_bias: Whether the convolution has a bias.
        bias: Whether in_proj and out_proj have one.
        selective: Which of "dt", "B" and "C" depend on the input.
        A_init: "s4d-real", "constant", "random" or "s4d-lin"; see `a_log_init`.
        norm_epsilon: Added to the mean squares of dt, B and C. Default: they are not normalised.

    Attributes:
        recomputes: Whether the backward pass makes x and dt again instead of keeping them, on a GPU. Settable.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        selective: Sequence[str] = ("dt", "B", "C"),
        A_init: str = "s4d-real",
        norm_epsilon: float | None = None,
    ) -> None:
        super().__init__()
        self.d_inner = expand * d_model
        self.is_complex = A_init == "s4d-lin"
        self.norm_epsilon = norm_epsilon
        self.recomputes = True
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        numbers = 2 * d_state if self.is_complex else d_state
        sizes = {"dt": rank, "B": numbers, "C": numbers}
        self._sizes = [size if name in selective else 0 for name, size in sizes.items()]

        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = CausalConv1d(self.d_inner, d_conv, bias=conv_bias)
        self.x_proj = Linear(self.d_inner, sum(self._sizes), bias=False) if selective else None
        dt_bias = dt_bias_init(self.d_inner, dt_min, dt_max, dt_init_floor)
        if "dt" in selective:
            self.dt_proj = DtProjection(rank, dt_bias, dt_init, dt_scale)
        else:
            self.dt_bias = nn.Parameter(dt_bias)
        self.A_log = nn.Parameter(a_log_init(self.d_inner, d_state, A_init))
        if self.is_complex:
            self.A_imag = nn.Parameter(a_imag_init(self.d_inner, d_state))
        shape = (self.d_inner, d_state, self.is_complex)
        self.B = None if "B" in selective else nn.Parameter(b_init(*shape))
        self.C = None if "C" in selective else nn.Parameter(c_init(*shape))
        self.D = nn.Parameter(torch.ones(self.d_inner, dtype=torch.float32))
        self.out_proj = Linear(self.d_inner, d_model, bias=bias)
        _mark_no_weight_decay(self)
        self.register_load_state_dict_post_hook(_mark_no_weight_decay)  # type: ignore[no-untyped-call]

    def forward(
        self,
        hidden: Tensor,
        state: MixerState | None = None,
        *,
        seq_idx: Tensor | None = None,
        ends: Ends = WHOLE,
        only_last: bool = False,
    ) -> tuple[Tensor, MixerState]:
        """Mix a sequence.

        Args:
            hidden: (B, L, M).
            state: What came before; default: nothing.
            seq_idx: Document number of each position, (B, L); the state starts afresh where it
                changes.
            ends: The last positions, behind which there is padding. Default: there is none.
            only_last: Whether to leave out all outputs but those at the `ends`: who reads a prompt wants no others
                of the last layer.

        Returns:
            (B, L, M), or (B, 1, M), and the state after the last position.
        """
        joins = joins_gradients(hidden)
        if is_plain(self.in_proj, Linear) and only_last:
            x, z = self._for_last(hidden, ends)
        elif is_plain(self.in_proj, Linear) and joins:
            x, z = linear_in_halves(hidden, self.in_proj.weight, self.in_proj.bias)
        else:
            x, z = self.in_proj(hidden).chunk(2, dim=-1)
        old_conv_state, ssm_state = (state.conv_state, state.ssm_state) if state else (None, None)
        # The backward pass needs x and dt, each as large as z, but they are cheap to make again.
        wanted = self.recomputes and hidden.device.type in RECOMPUTES_ON
        with Recomputation(wanted=wanted) as again:
            inputs = (x, old_conv_state, seq_idx)
            x, conv_state, projected = self._convolve(*inputs)
            conv_state = ends.last_inputs(conv_state, *inputs[:2])
            if is_plain(self.conv1d, CausalConv1d):
                again.instead_of(x, convolve, self.conv1d.weight, self.conv1d.bias, *inputs)
            if joins and self.x_proj is not None and is_plain(self.x_proj, Linear):
                x, projected = linear_beside(x, self.x_proj.weight)
            dt, B, C = self._steering(x, projected, again)
            dt, A, dt_bias = ends.without_padding(dt), self._decay(), self._dt_bias()
            y, ssm_state = selective_scan(
                x, dt, A, B, C, self.D, z, dt_bias, True, initial_state=ssm_state, seq_idx=seq_idx
            )
        return self._output(y, ends if only_last else None), MixerState(conv_state, ssm_state)

    def step(self, hidden: Tensor, state: MixerState) -> Tensor:
        """Mix one position, (B, M) to (B, M); `state` is updated in place. Has no gradient."""
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        x = self.conv1d.step(x, state.conv_state)
        dt, B, C = self._steering(x)
        A, dt_bias = self._decay(), self._dt_bias()
        y = selective_scan_step(state.ssm_state, x, dt, A, B, C, self.D, z, dt_bias, True)
        out: Tensor = self.out_proj(y)
        return out

    def initial_state(self, batch: int) -> MixerState:
        """The state before any token, for `batch` sequences, on the device of the weights."""
        device, dtype = self.conv1d.weight.device, self.conv1d.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        inputs = self.conv1d.kernel_size[0] - 1
        A = self._decay()
        return MixerState(
            torch.zeros(batch, self.d_inner, inputs, device=device, dtype=dtype),
            torch.zeros(batch, *A.shape, device=device, dtype=A.dtype),
        )

    def _for_last(self, hidden: Tensor, ends: Ends) -> tuple[Tensor, Tensor]:
        """x, and z of the last position in the place of all."""
        weights, bias = self.in_proj.weight.chunk(2), self.in_proj.bias
        biases = (None, None) if bias is None else bias.chunk(2)
        x = product(hidden, weights[0], biases[0])
        z = product(ends.last(hidden), weights[1], biases[1])
        return x, z[:, None].expand_as(x)

    def _convolve(
        self, x: Tensor, state: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the convolution makes of x, its state, and what x_proj makes of the first if one kernel does both."""
        convolution, x_proj = self.conv1d, self.x_proj
        if x_proj is not None and is_plain(x_proj, Linear) and is_plain(convolution, CausalConv1d):
            filters = convolution.weight.squeeze(1)
            if fuses(x, filters, x_proj.weight, seq_idx):
                return causal_conv1d_linear(
                    x, filters, x_proj.weight, convolution.bias, "silu", initial_state=state
                )
        return (*convolution(x, state, seq_idx), None)

    def _steering(
        self, x: Tensor, projected: Tensor | None = None, again: Recomputation | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What steers the scan at x, (..., D): dt before bias and softplus, B and C.

        Args:
            x: Output of the convolution.
            projected: x_proj(x), if that is there already.
            again: Learns how to make dt again.
        """
        parts: tuple[Tensor, ...] = (x, x, x)  # What is not selective is not looked at.
        if self.x_proj is not None:
            projected = self.x_proj(x) if projected is None else projected
            parts = self._normalised(projected.split(self._sizes, dim=-1))
        dt = self.dt_proj(parts[0]) if self._sizes[0] else x.new_zeros(1).expand_as(x)
        if again is not None and self._sizes[0] and is_plain(self.dt_proj, DtProjection):
            again.instead_of(dt, project_to(dt.dtype), parts[0], self.dt_proj.weight)
        is_step = x.ndim == 2
        B = self._weight(parts[1], self.B, is_step)
        C = self._weight(parts[2], self.C, is_step)
        return dt, B, C

    def _normalised(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs of x_proj, each scaled to a mean square of one if the mixer has such norms."""
        if self.norm_epsilon is None:
            return parts
        # Not a buffer, which would be a tensor without values in a model made on the meta device.
        ones = torch.ones(max(self._sizes), device=parts[0].device)
        return tuple(
            rms_norm(part, ones[:size], self.norm_epsilon) if size else part
            for part, size in zip(parts, self._sizes, strict=True)
        )

    def _weight(self, projected: Tensor, constant: Tensor | None, is_step: bool) -> Tensor:
        """B or C in the form that the scan, or its step, takes: the parameter if there is one."""
        if constant is None:
            weight = (
                projected.reshape(*projected.shape[:-1], -1, 2) if self.is_complex else projected
            )
        else:
            weight = constant[None] if is_step else constant
        return _as_complex(weight) if self.is_complex else weight

    def _output(self, y: Tensor, ends: Ends | None) -> Tensor:
        """What out_proj makes of y, or only of the `ends`, (B, 1, M)."""
        out: Tensor = self.out_proj(y) if ends is None else self.out_proj(ends.last(y))[:, None]
        return out

    def _decay(self) -> Tensor:
        """A, (D, N)."""
        # On the CPU exp is MKL's, which wakes a second thread for these few numbers; on a busy machine
        # waiting for it takes longer than the rest of a step. Elsewhere each kernel counts.
        on_cpu = self.A_log.device.type == "cpu"
        A = -(torch.exp2(self.A_log / math.log(2)) if on_cpu else torch.exp(self.A_log))
        return torch.complex(A, self.A_imag) if self.is_complex else A

    def _dt_bias(self) -> Tensor:
        return self.dt_proj.bias if self._sizes[0] else self.dt_bias

    def _float32_parameters(self) -> list[nn.Parameter]:
        dt_bias = [self.dt_proj.bias] if self._sizes[0] else []
        return [*self.parameters(recurse=False), *dt_bias]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MambaMixer:
        """Move or cast like any module, but never narrow what must stay float32."""
        kept = [tensor for p in self._float32_parameters() for tensor in (p, p.grad)]

        def keep_float32(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if out.dtype.itemsize < 4 and any(tensor is other for other in kept):
                return tensor.to(out.device)
            return out

        super()._apply(keep_float32, recurse)  # type: ignore[no-untyped-call]
        _mark_no_weight_decay(self)
        return self


def _mark_no_weight_decay(mixer: MambaMixer, *_: object) -> None:
    # Again after moving and loading, which may put new parameters in place of the marked ones.
    for parameter in mixer._float32_parameters():
        parameter._no_weight_decay = True  # type: ignore[attr-defined]


def _as_complex(pairs: Tensor) -> Tensor:
    """(..., 2) with re and im to complex; half precision becomes complex64."""
    wide = pairs.to(torch.promote_types(pairs.dtype, torch.float32))
    # Not view_as_complex, which an odd dt_rank before B in x_proj's output puts off its alignment.
    return torch.complex(wide[..., 0], wide[..., 1])
