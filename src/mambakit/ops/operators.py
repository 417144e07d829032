"""Our kernels as operators of PyTorch, without the cost of one where nobody looks.

`torch.compile`, `torch.export`, fake and meta tensors and subclasses must see an operator: its name, its fake outputs,
its gradient. Plain eager code need not, and reaches the function in a third of the time; the kernels of a small model
take less than that. (PyTorch's own transforms, `torch.func`, find an operator and refuse it in words.)

`torch.library.custom_op` is not used: it imports the whole of `torch._dynamo`, seconds before the first result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

_library = torch.library.Library("mambakit", "FRAGMENT")  # type: ignore[no-untyped-call]


class Operator:
    """A function that reads tensors and returns new ones, for one type of device.

    Args:
        name: In the namespace "mambakit"; begins with the backend.
        device: "cpu" or "cuda".
        function: Its annotations are the schema. No output shares memory with an input.
        fake: Takes the same arguments; returns tensors like the outputs, without values.
        setup: Called with ctx, the inputs and the output, as `setup_context` of `torch.autograd.Function`; keeps what
            `gradients` needs.
        gradients: Called with ctx and the gradients of the outputs; returns one of each input, or None. Default: the
            operator is not differentiable.
        mutates: Names of the arguments that it changes in place.
    """

    def __init__(
        self,
        name: str,
        device: str,
        function: Callable[..., Any],
        *,
        fake: Callable[..., Any],
        setup: Callable[..., None] | None = None,
        gradients: Callable[..., Any] | None = None,
        mutates: Sequence[str] = (),
    ) -> None:
        self._function = function
        schema = torch.library.infer_schema(function, mutates_args=mutates, op_name=name)
        _library.define(schema)  # type: ignore[no-untyped-call]
        self.overload = getattr(torch.ops.mambakit, name).default
        names = [argument.name for argument in self.overload._schema.arguments]
        self._mutated = [names.index(argument) for argument in mutates]

        def refuse(ctx: Any, *_: Tensor | None) -> None:
            raise RuntimeError(f"{name} has no derivative; use backend='reference', which has")

        setup, gradients = setup or _keep_nothing, gradients or refuse
        self._node = _node(name, function, setup, gradients)
        _library.impl(name, self._run, device.upper())  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"mambakit::{name}", fake, lib=_library)
        if not mutates:
            torch.library.register_autograd(
                f"mambakit::{name}", gradients, setup_context=setup, lib=_library
            )

    def __call__(self, *args: Any) -> Any:
        """Call it; all arguments by position."""
        if is_observed(args):
            return self.overload(*args)
        if torch.is_grad_enabled() and not self._mutated and _needs_gradient(args):
            return self._node.apply(*args)
        return self._run(*args)

    def _run(self, *args: Any) -> Any:
        for place in self._mutated:
            increment_version(args[place])
        return self._function(*args)


def is_observed(args: Sequence[Any]) -> bool:
    """Whether somebody looks at what is done with these arguments, so that an operator has to be seen."""
    if torch.compiler.is_compiling():
        return True
    # There is no public way to ask for modes and transforms that are in force.
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return True
    return any(isinstance(arg, Tensor) and (type(arg) not in _PLAIN or arg.is_meta) for arg in args)


_PLAIN = (Tensor, torch.nn.Parameter)


def _needs_gradient(args: tuple[Any, ...]) -> bool:
    return any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _node(
    name: str,
    function: Callable[..., Any],
    setup: Callable[..., None],
    gradients: Callable[..., Any],
) -> Any:
    """The operator as a node of autograd, in plain eager code."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = function(*args)
        setup(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    return type(name, (torch.autograd.Function,), members)
