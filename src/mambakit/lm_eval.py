"""The model type "mambakit" of lm-evaluation-harness, for its own command and functions.

    lm_eval --model mambakit --model_args pretrained=CHECKPOINT --tasks lambada_openai

needs an lm_eval that looks for plugins (entry points of the group "lm_eval.models"), or, since the
released 0.4.13 does not yet, packages/lm-eval-mambakit. Without either the same command is

    python -m mambakit.lm_eval --model mambakit --model_args pretrained=CHECKPOINT --tasks ...

and `import mambakit.lm_eval` makes `lm_eval.simple_evaluate(model="mambakit", ...)` work.
"""

from __future__ import annotations

from pathlib import Path

import lm_eval.models  # noqa: F401  # Registers lm_eval's own types, which it does only before all others.
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry

from mambakit.cli.loading import load_checkpoint
from mambakit.errors import ArgumentError
from mambakit.evaluate.harness import HarnessModel
from mambakit.ops.cpu.features import check_bfloat16
from mambakit.train.distributed import find_device

TYPE = "mambakit"


class CheckpointModel(HarnessModel):
    """A checkpoint, opened from the arguments that lm_eval passes on (`--model_args`).

    Args:
        pretrained: Checkpoint, run folder (its last one is taken), or hub id.
        tokenizer: "bytes", a tokenizer.json, a folder that holds one, or a hub id. Default: the
            checkpoint's.
        device: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16" or "float16".
        batch_size: As in `HarnessModel`, like the rest.
        max_length: Most tokens read for a prediction.
        add_bos_token: Put the separator of documents in front of every context.

    Raises:
        MambakitError: An argument is out of range, or there is no such checkpoint or device.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int | str = 16,
        max_length: int | None = None,
        add_bos_token: bool = False,
    ) -> None:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ArgumentError(f"dtype: got {dtype!r}, wanted float32, bfloat16 or float16")
        if not str(batch_size).isdecimal():
            raise ArgumentError(f"batch_size: got {batch_size!r}, wanted a number")
        if dtype == "bfloat16":
            check_bfloat16(find_device(device))
        model, found = load_checkpoint(Path(pretrained), device, dtype, tokenizer)
        super().__init__(
            model,
            found,
            batch_size=int(batch_size),
            max_length=max_length,
            add_bos_token=add_bos_token,
        )


if TYPE not in model_registry:  # This module may be there a second time, as __main__.
    model_registry.register(TYPE, target="mambakit.lm_eval:CheckpointModel")

if __name__ == "__main__":
    cli_evaluate()
