"""What the model writes while it trains."""

from __future__ import annotations

from rich.console import Console

from mambakit.generate import SamplingOptions, generate_text
from mambakit.train.callbacks import Callback
from mambakit.train.trainer import Trainer

OPTIONS = SamplingOptions(temperature=0.8, top_p=0.95)


class Samples(Callback):
    """Prints a sample now and then, and adds it to the log.

    Args:
        every: Steps between two samples.
        prompt: Text that they continue; empty: a new document.
        console: Where they are printed.
        max_tokens: Length of a sample.
    """

    def __init__(self, every: int, prompt: str, console: Console, max_tokens: int = 200) -> None:
        self._every = every
        self._prompt = prompt
        self._console = console
        self._max_tokens = max_tokens

    def on_step(self, trainer: Trainer, loss: float) -> None:
        """Write a sample, always with the same random numbers."""
        if trainer.step % self._every:
            return
        trainer.model.eval()
        (text,) = generate_text(
            trainer.model,
            trainer.tokenizer,
            [self._prompt],
            OPTIONS,
            max_tokens=self._max_tokens,
            seed=0,
        )
        trainer.model.train()
        trainer.log.write(trainer.step, {"sample": self._prompt + text})
        self._console.rule(f"sample at step {trainer.step}")
        self._console.print(self._prompt + text, markup=False, highlight=False)
        self._console.rule()
