"""What the mixer keeps for its backward pass, and that leaving things out changes no gradient."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mambakit.nn import MambaMixer
from mambakit.nn import mixer as mixer_module
from mambakit.nn.recomputation import Recomputation

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "biases": {"bias": True, "conv_bias": False},
    "nothing selective": {"selective": ()},
    "only dt": {"selective": ("dt",)},
    "B and C": {"selective": ("B", "C")},
    "complex": {"A_init": "s4d-lin", "dt_rank": 3},
    "conv 1": {"d_conv": 1},
    "norms": {"norm_epsilon": 0.01},
}


def make_mixer(d_model: int = 8, **options: Any) -> MambaMixer:
    mixer = MambaMixer(d_model, **{"d_state": 4, **options})
    for parameter in mixer.parameters():  # zero biases and equal rows would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mixer


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixer_module, "RECOMPUTES_ON", ("cpu", "cuda"))


@contextlib.contextmanager
def plain(yes: bool) -> Iterator[None]:
    """Without recomputation, if `yes`."""
    with pytest.MonkeyPatch.context() as patch:
        if yes:
            patch.setattr(mixer_module, "RECOMPUTES_ON", ())
        yield


def gradients(mixer: MambaMixer, hidden: Tensor, *, keep: bool, **options: Any) -> list[Tensor]:
    """Outputs and all gradients, of a sequence in two parts, so that states have gradients too."""
    leaves = [hidden.clone().requires_grad_(), *mixer.parameters()]
    with plain(keep):
        first, state = mixer(leaves[0][:, :3], **{k: v[:, :3] for k, v in options.items()})
        second, state = mixer(leaves[0][:, 3:], state, **{k: v[:, 3:] for k, v in options.items()})
    outputs = [first, second, state.ssm_state, state.conv_state]
    loss = sum(output.abs().float().square().sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert their is our is None or torch.equal(our, their)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_same_gradients_bit_for_bit(options: dict[str, Any], documents: bool) -> None:
    mixer, hidden = make_mixer(**options), torch.randn(2, 9, 8)
    packed = {"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2]] * 2)} if documents else {}
    ours, theirs = (gradients(mixer, hidden, keep=keep, **packed) for keep in (False, True))
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    mixer, hidden = make_mixer().to(dtype), torch.randn(2, 9, 8, dtype=dtype)
    assert_same(*(gradients(mixer, hidden, keep=keep) for keep in (False, True)))


def test_autocast() -> None:
    """The recipes give what the forward pass had, though the backward pass runs outside autocast."""
    mixer, hidden = make_mixer(), torch.randn(2, 9, 8)
    results = []
    for keep in (False, True):
        leaves = [hidden.clone().requires_grad_(), *mixer.parameters()]
        with plain(keep), torch.autocast("cpu", torch.bfloat16):
            loss = mixer(leaves[0])[0].float().square().sum()
        results.append(list(torch.autograd.grad(loss, leaves)))
    assert_same(*results)


class Storages(TorchDispatchMode):
    """Looks after all memory that operators make within it, besides that of `old` tensors."""

    def __init__(self, *old: Tensor) -> None:
        super().__init__()
        self._old = {tensor.untyped_storage()._cdata for tensor in old}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(outputs) if isinstance(t, Tensor)):
            if storage._cdata not in self._old:
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return outputs

    def living(self) -> list[int]:
        """Float32 numbers in each piece that still exists, largest first."""
        numbers = (size // 4 for ref, size in self._seen.values() if not ref.expired())
        return sorted(numbers, reverse=True)


def kept(mixer: MambaMixer, hidden: Tensor, *, keep: bool = False) -> list[int]:
    """What exists between forward and backward, in numbers a position."""
    with plain(keep), Storages(hidden, *mixer.parameters()) as storages:
        out = mixer(hidden)[0]
    assert out.requires_grad
    return [size // hidden[..., 0].numel() for size in storages.living()]


def test_what_is_kept_is_xz_the_states_and_y() -> None:
    mixer = make_mixer(64, d_state=16)
    hidden = torch.randn(2, 128, 64, requires_grad=True)
    sizes = kept(mixer, hidden)
    # xz; y and the states, 16 numbers every 16 steps; the output; what x_proj makes.
    assert sizes[:5] == [2 * 128, 128, 128, 64, 4 + 2 * 16]
    assert max(sizes[5:]) <= 8  # A and the like
    assert sum(kept(mixer, hidden, keep=True)) == sum(sizes) + 2 * 128  # x and dt


def test_a_mixer_can_be_told_to_keep_x_and_dt() -> None:
    mixer = make_mixer(64, d_state=16)
    hidden = torch.randn(2, 128, 64, requires_grad=True)
    ours, expected = kept(mixer, hidden), kept(mixer, hidden, keep=True)
    mixer.recomputes = False
    assert kept(mixer, hidden) == expected != ours


def test_dt_that_is_not_selective_takes_no_memory() -> None:
    mixer, hidden = make_mixer(64, d_state=16, selective=("B", "C")), torch.randn(2, 128, 64)
    sizes = kept(mixer, hidden.requires_grad_())
    assert sizes[:5] == [2 * 128, 128, 128, 64, 2 * 16]


def test_what_is_made_again_does_not_stay() -> None:
    mixer, hidden = make_mixer(64), torch.randn(2, 128, 64, requires_grad=True)
    leaves = [hidden, *mixer.parameters()]
    with Storages(*leaves) as storages:
        out = mixer(hidden)[0]
    before = sum(storages.living())
    with storages:
        gradients = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    assert sum(storages.living()) == before + sum(g.numel() for g in gradients)


def test_no_hooks_without_gradient() -> None:
    with torch.no_grad():
        assert Recomputation(wanted=True)._hooks is None


def test_a_graph_can_be_used_twice() -> None:
    mixer, hidden = make_mixer(), torch.randn(2, 9, 8, requires_grad=True)
    y, _ = mixer(hidden)
    (first,) = torch.autograd.grad(y.square().sum(), hidden, retain_graph=True)
    (second,) = torch.autograd.grad(y.square().sum(), hidden)
    assert torch.equal(first, second)


def test_a_part_of_the_gradients() -> None:
    """What one backward pass made again and did not use up is right for the next."""
    mixer, hidden = make_mixer(), torch.randn(2, 9, 8, requires_grad=True)
    y, _ = mixer(hidden)
    leaves = [hidden, *mixer.parameters()]
    together = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    alone = [torch.autograd.grad(y.sum(), leaf, retain_graph=True)[0] for leaf in leaves]
    assert_same(list(together), alone)


def test_within_checkpoint_nothing_else_is_kept() -> None:
    mixer, hidden = make_mixer(64), torch.randn(2, 128, 64, requires_grad=True)
    leaves = [hidden, *mixer.parameters()]
    with Storages(*leaves) as storages:
        out = checkpoint(mixer, hidden, use_reentrant=False)[0]
    assert storages.living() == [out.numel()]
    found = torch.autograd.grad(out.square().sum(), leaves)
    expected = torch.autograd.grad(mixer(hidden)[0].square().sum(), leaves)
    assert_same(list(found), list(expected))


def test_weights_of_the_call_not_of_the_module() -> None:
    """`functional_call` puts weights in for one call; the backward pass runs after it."""
    mixer, other = make_mixer(), make_mixer()
    weights = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    hidden = torch.randn(2, 9, 8)
    y, _ = functional_call(mixer, weights, (hidden,))
    found = torch.autograd.grad(y.square().sum(), list(weights.values()))
    expected = torch.autograd.grad(other(hidden)[0].square().sum(), list(other.parameters()))
    assert_same(list(found), list(expected))


@pytest.mark.parametrize("name", ["conv1d.weight", "dt_proj.weight", "D", "x_proj.weight"])
def test_a_weight_changed_before_the_backward_is_an_error(name: str) -> None:
    mixer = make_mixer()
    y, _ = mixer(torch.randn(2, 9, 8))
    with torch.no_grad():
        mixer.get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()


class Noise(torch.nn.Module):
    """An adapter that gives something else every time."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *inputs: Any) -> Any:
        out = self.base(*inputs)
        first, *rest = out if isinstance(out, tuple) else (out,)
        first = first * torch.rand_like(first)
        return (first, *rest) if rest else first

    @property
    def bias(self) -> Any:
        return self.base.bias


@pytest.mark.parametrize("name", ["conv1d", "dt_proj", "x_proj"])
@pytest.mark.parametrize("kind", ["module", "hook", "in place", "forward"])
def test_adapters_and_hooks_are_not_run_again(name: str, kind: str) -> None:
    mixer, hidden = make_mixer(), torch.randn(2, 9, 8)
    module = getattr(mixer, name)
    if kind == "module":
        setattr(mixer, name, Noise(module))
    elif kind == "forward":
        module.forward = Noise(copy.copy(module)).forward
    else:

        def change(_module: Any, _inputs: Any, out: Any) -> Any:
            first = out[0] if isinstance(out, tuple) else out
            if kind == "in place":
                first.mul_(torch.rand_like(first))
                return None
            first = first * torch.rand_like(first)
            return (first, *out[1:]) if isinstance(out, tuple) else first

        module.register_forward_hook(change)
    results = []
    for keep in (False, True):
        torch.manual_seed(0)
        results.append(gradients(mixer, hidden, keep=keep))
    assert_same(*results)


def test_compiles_whole() -> None:
    mixer, hidden = make_mixer(), torch.randn(2, 9, 8, requires_grad=True)
    leaves = [hidden, *mixer.parameters()]
    expected = torch.autograd.grad(mixer(hidden)[0].square().sum(), leaves)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(hidden)[0].square().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_other_hooks_see_what_they_always_see() -> None:
    mixer, hidden = make_mixer(), torch.randn(2, 9, 8, requires_grad=True)
    expected = gradients(mixer, hidden.detach(), keep=True)
    with torch.autograd.graph.save_on_cpu():
        assert Recomputation(wanted=True)._hooks is None
        found = gradients(mixer, hidden.detach(), keep=False)
    assert_same(found, expected)
