"""Training of one model on data that is made on its device, in steps that a GPU runs without Python."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mambakit.errors import CheckpointError, TrainingError
from mambakit.files import atomic_write
from mambakit.models.weights import write_pickle
from mambakit.reproduce.draws import Draws
from mambakit.reproduce.evaluation import TRAINING, validate
from mambakit.reproduce.experiment import Contestant, Task
from mambakit.reproduce.models import answer_logits, autocast, build
from mambakit.train.step_graph import StepGraph

CHECKPOINT = "checkpoint.pt"


class Training:
    """A model in training, or one that goes on from its checkpoint, bit for bit on a CPU as if never stopped.

    Data is a function of seed and step, and the step is counted on the device. So `steps_per_call` steps (data,
    forward, backward, Adam) are one function of nothing, and on a GPU one CUDA graph.

    Args:
        task: What is learned.
        contestant: The model and its recipe.
        folder: Holds the checkpoint.
        device: Where it all happens.

    Attributes:
        model: The model.
        step: Optimizer steps done.
        loss: Mean loss since the last reading, nats.
        seconds: Time that the steps took, without validation.
        warm_steps: Steps after the first reading of each process, which compiles kernels and captures the graph.
        warm_seconds: Time that they took.
        history: Of each validation: step, mean training loss since the last one in nats, accuracy in percent.
        held: Validations in a row, up to the last one, that reached the target.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """

    def __init__(
        self, task: Task, contestant: Contestant, folder: Path, device: torch.device
    ) -> None:
        self.task = task
        self.recipe = contestant.recipe
        self.model = build(contestant.model, self.recipe.seed).to(device)
        self.step = 0
        self.loss = math.nan
        self.seconds = 0.0
        self.warm_steps = 0
        self.warm_seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.held = 0
        self._path = folder / CHECKPOINT
        self._loss_since = 0.0
        self._is_warm = False
        on_gpu = device.type == "cuda"
        self._optimizer = torch.optim.Adam(
            self.model.parameters(), lr=self.recipe.lr, fused=True, capturable=on_gpu
        )
        self._counter = torch.zeros((), dtype=torch.int64, device=device)
        if self._path.exists():
            self._restore(device)
        self._advance: Callable[[], Tensor] = StepGraph(self._steps) if on_gpu else self._steps

    @property
    def is_done(self) -> bool:
        """Whether the last step is done, or the target held for long enough."""
        return self.step >= self.recipe.steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether it ended because validation held the target."""
        return 0 < self.recipe.hold <= self.held

    @property
    def steps_per_second(self) -> float | None:
        """Pace of the warm steps, or of all if there are none; None before the first."""
        if self.warm_steps:
            return self.warm_steps / self.warm_seconds
        return self.step / self.seconds if self.step else None

    def go_on(self) -> None:
        """Train up to the next reading of the loss; validate and save when it is time to.

        Raises:
            TrainingError: The loss is not finite.
        """
        recipe = self.recipe
        calls = recipe.log_every // recipe.steps_per_call
        start = time.perf_counter()
        total = torch.zeros((), device=self._counter.device)
        for _ in range(calls):
            total += self._advance()
        self.loss = float(total) / recipe.log_every  # The one wait for the GPU.
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.step += recipe.log_every
        if self._is_warm:
            self.warm_steps += recipe.log_every
            self.warm_seconds += seconds
        self._is_warm = True
        if not math.isfinite(self.loss):
            raise TrainingError(
                f"step {self.step}: the loss is {self.loss}; the last checkpoint is {self._path}"
            )
        self._loss_since += self.loss * recipe.log_every
        if self.step % recipe.validate_every == 0 or self.step == recipe.steps:
            self._validate()
            self.save()

    def save(self) -> None:
        """Write the checkpoint; the old one is replaced when the new one is whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict()["state"],
            **{name: getattr(self, name) for name in _PLAIN},
        }
        with atomic_write(self._path) as partial:
            write_pickle(state, partial)

    def _steps(self) -> Tensor:
        """Make data for some steps and do them; gives the sum of their losses."""
        recipe = self.recipe
        steps = self._counter + torch.arange(recipe.steps_per_call, device=self._counter.device)
        draws = Draws(recipe.seed, TRAINING, steps)
        examples = self.task.make(draws, recipe.batch_size, recipe.seqlen)
        losses = []
        for tokens, targets in zip(*examples, strict=True):
            with autocast(recipe, tokens.device):
                logits = answer_logits(self.model, tokens, self.task.answers)
            loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            torch.autograd.backward(loss)
            self._optimizer.step()
            self._optimizer.zero_grad()
            losses.append(loss.detach())
        self._counter += recipe.steps_per_call
        return torch.stack(losses).sum()

    def _validate(self) -> None:
        accuracy = validate(self.model, self.task, self.recipe)
        steps = self.step - (self.history[-1]["step"] if self.history else 0)
        self.history.append(
            {"step": self.step, "loss_nats": self._loss_since / steps, "accuracy_percent": accuracy}
        )
        self._loss_since = 0.0
        self.held = self.held + 1 if accuracy >= self.recipe.target else 0

    def _restore(self, device: torch.device) -> None:
        state = read_checkpoint(self._path, device)
        self.model.load_state_dict(state["model"])
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        for name in _PLAIN:
            setattr(self, name, state[name])
        self._counter.fill_(self.step)


_PLAIN = (
    "step", "loss", "seconds", "warm_steps", "warm_seconds", "history", "held", "_loss_since",
)  # fmt: skip
"""Attributes of a training that its checkpoint holds as plain values."""


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read what `Training.save` wrote.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; train the model first") from None
    except Exception as error:  # A damaged file fails in many ways inside torch and zipfile.
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}); remove it to train the model again"
        ) from error
    return state
