"""The training loop: from prepared tokens to a model, safe to kill at any moment."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mambakit.data.dataset import TokenDataset
from mambakit.data.loader import Loader, windows
from mambakit.errors import TrainingError
from mambakit.evaluate.perplexity import count_bytes, score
from mambakit.models.checkpoint import load_model
from mambakit.models.language_model import MambaLanguageModel
from mambakit.ops.cpu.features import check_bfloat16
from mambakit.train import checkpointing, run_folder
from mambakit.train.callbacks import Callback
from mambakit.train.config import TrainConfig, write_toml
from mambakit.train.distributed import World
from mambakit.train.interruption import Interruption
from mambakit.train.memory import check_fits
from mambakit.train.metrics import RunLog, Throughput
from mambakit.train.optimizer import make_optimizer
from mambakit.train.schedule import learning_rate
from mambakit.train.start import check_config, make_adapter, open_start
from mambakit.train.step_graph import StepGraph

MAX_SKIPPED = 50
"""Steps that `non_finite="skip"` may leave out in a row; then the run stops all the same."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    """Optimizer steps done; their result is saved."""
    signal: signal.Signals | None
    """The signal that stopped it before its last step, if any."""


class Trainer:
    """Trains a language model as a `TrainConfig` says, or goes on where an earlier run stopped.

    Killed at any moment, even while it saves, a run goes on from its last whole checkpoint when a
    trainer with the same run folder is made; on a CPU, with the same number of threads, bit for
    bit as if it had never stopped. Under `torchrun` every process takes its share of the data
    (DistributedDataParallel), and the first one writes the files.

    Args:
        config: The run.
        model: Model to train. Default: that of `config.init_from`, or a new one, from `config.model`
            and `config.seed`.
        callbacks: Called in the first process only; see `Callback`.
        overwrite: Start afresh and remove what an earlier run left in the run folder.

    Attributes:
        step: Optimizer steps done.
        changes: What differs from the config of the run that this one goes on with.
        model: The model in training, float32, on its device.
        adapter: What is trained of it, if not all.
        tokenizer: The tokenizer of the data.
        log: Of the running `fit`.

    Raises:
        ConfigError: The config does not fit the data, the machine, the checkpoint that it starts
            from, or the run that it should go on with.
        CheckpointError: The checkpoint that it starts from cannot be opened.
        DataError: The data cannot be used.
        MambakitError: The run folder cannot be written.

    Example:
        >>> from mambakit.train import TrainConfig, Trainer
        >>> config = TrainConfig(data="data", out="runs/first", steps=500)
        >>> Trainer(config).fit()  # doctest: +SKIP
        Outcome(step=500, signal=None)
    """

    log: RunLog

    def __init__(
        self,
        config: TrainConfig,
        model: MambaLanguageModel | None = None,
        callbacks: Sequence[Callback] = (),
        *,
        overwrite: bool = False,
    ) -> None:
        self.config = config
        self.step = 0
        self.changes: list[str] = []
        self.dataset = TokenDataset(config.data, "train")
        self.tokenizer = self.dataset.tokenizer()
        has_valid = "valid" in self.dataset.manifest.splits
        self._valid = TokenDataset(config.data, "valid") if has_valid else None
        self._bytes_per_token = count_bytes(self.tokenizer)
        check_config(config, self.tokenizer, model)
        run_folder.check_place(config.out, config.data)
        self.world = World.join(config.device)
        self.callbacks = callbacks if self.world.is_main else ()
        self.loader = Loader(
            self.dataset,
            config.seqlen,
            config.batch_size,
            seed=config.seed,
            rank=self.world.rank,
            world_size=self.world.size,
            documents=config.documents,
        )
        if config.precision == "bfloat16":
            check_bfloat16(self.world.device)
        check_fits(config, self.world.device)
        torch.manual_seed(config.seed)
        goes_on = not overwrite and checkpointing.list_checkpoints(config.out)
        # A run that goes on has its weights in its checkpoint, but for those beneath adapters.
        if config.init_from is not None and (config.lora or not goes_on):
            model = open_start(config, self.tokenizer, self.world.device)
        model = model or MambaLanguageModel(config.model)
        self.model = model.to(self.world.device, torch.float32)
        self.model.recomputation = config.recomputation
        self.model.activation_checkpointing = config.activation_checkpointing
        self.adapter = make_adapter(self.model, config)
        self.optimizer = make_optimizer(self.model, config)
        self._learning_rate = partial(
            learning_rate,
            steps=config.steps,
            warmup_steps=config.warmup_steps,
            peak=config.lr,
            floor=config.min_lr,
        )
        self._skipped = 0
        self._recent: list[tuple[float, float]] = []
        self._open_run(overwrite)
        self._loss: nn.Module = _Loss(self.model)
        self._update: Callable[..., Tensor] = self._run_update
        draws_again = config.activation_checkpointing and config.lora_dropout > 0
        if self.world.size > 1:
            self._loss = DistributedDataParallel(self._loss)
        elif config.cuda_graph and self.world.device.type == "cuda" and not draws_again:
            self._update = StepGraph(self._run_update)

    def _open_run(self, overwrite: bool) -> None:
        """Go on with the run in the run folder, if any, and show that the folder can be written."""
        run = self.config.out
        if self.world.is_main:
            if overwrite:
                run_folder.remove_run(run)
            checkpointing.remove_leftovers(run)
        self.world.wait()
        if found := checkpointing.list_checkpoints(run):
            self._restore(found[-1])
        if self.world.is_main:
            write_toml(self.config, run / run_folder.CONFIG)

    def fit(self) -> Outcome:
        """Train until the last step, or until SIGINT or SIGTERM, and save.

        The first signal lets the step end and saves; a second Ctrl-C raises KeyboardInterrupt.

        Raises:
            TrainingError: The loss or the gradient is not finite and the config says stop.
            CheckpointError: A checkpoint cannot be written.
        """
        config = self.config
        with contextlib.ExitStack() as stack:
            stack.callback(self.world.leave)
            interruption = stack.enter_context(Interruption(self._tell_interruption))
            if self.world.is_main:
                self.log = RunLog(config.out, self.step)
                stack.callback(self.log.close)
                stack.callback(self._tell_end)
            throughput = Throughput(self.model, config, self.world)
            for callback in self.callbacks:
                callback.on_start(self)
            stopping = False
            while self.step < config.steps and not stopping:
                with throughput:
                    loss = self._train_step()
                for callback in self.callbacks:
                    callback.on_step(self, loss)
                stopping = self.world.any(interruption.signal is not None)
                self._do_what_is_due(throughput, stopping)
            return Outcome(self.step, interruption.signal if self.step < config.steps else None)

    def _do_what_is_due(self, throughput: Throughput, stopping: bool) -> None:
        """Log, validate and save after a step, each when it is time to."""
        config = self.config
        is_last = self.step == config.steps
        if is_last or self.step % config.log_every == 0:
            self._record({**self._averages(), **throughput.measure(self.step)})
        if is_last or (config.valid_every and self.step % config.valid_every == 0):
            self._record(self._validate())
        if is_last or stopping or self.step % config.save_every == 0:
            self._save()

    def _train_step(self) -> float:
        """One optimizer step; gives its loss in nats per token."""
        rate = self._learning_rate(self.step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.step += 1
        batches = islice(self.loader, self.config.accumulation)
        found = self._update(*(t for b in batches for t in b.to(self.world.device).tensors))
        sum_of_losses, norm = map(float, found.tolist())  # The one wait for the GPU.
        loss = sum_of_losses / self.world.size
        if math.isfinite(loss) and math.isfinite(norm):
            self._recent.append((loss, norm))
            self._skipped = 0
        else:
            self._refuse(loss, norm)
        return loss

    def _run_update(self, *tensors: Tensor | None) -> Tensor:
        """Forward, backward and optimizer step; gives the sum of the processes' losses, and the norm of the gradient.

        Args:
            tensors: `Batch.tensors` of each batch of the step, one after another.
        """
        total = self._accumulate_gradients(tensors)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        total_norm = nn.utils.get_total_norm(gradients).to(total.device)
        # The optimizer itself divides the gradients, while it reads them anyway, and leaves out what is not finite (the
        # protocol of gradient scalers), so that all work of a step is queued on a GPU before the one wait for it, for
        # these two numbers.
        self.optimizer.grad_scale = (total_norm / self.config.grad_clip).clamp(min=1)  # type: ignore[attr-defined]
        self.optimizer.found_inf = (~torch.isfinite(total + total_norm)).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack([total, total_norm])

    def _accumulate_gradients(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Forward and backward over the batches of one step; gives the sum of their mean loss over the processes."""
        count = self.config.accumulation
        total = torch.zeros((), device=self.world.device)
        for index in range(count):
            tokens, targets, seq_idx = tensors[3 * index : 3 * index + 3]
            with self._keep_gradients_here(index < count - 1):
                with self._autocast():
                    loss = self._loss(tokens, targets, seq_idx) / count
                loss.backward()
            total += loss.detach()
        return self.world.sum(total)

    def _refuse(self, loss: float, norm: float) -> None:
        """Leave out a step whose loss or gradient is not finite, or stop."""
        last = self.loader.position - 1
        first = last - self.config.accumulation + 1
        message = (
            f"step {self.step}: the loss is {loss} and the norm of the gradient {norm}, with "
            f"batch {first}{f' to {last}' if last > first else ''} (epoch {self.loader.epoch:.2f})"
        )
        self._skipped += 1
        if self.config.non_finite == "skip" and self._skipped <= MAX_SKIPPED:
            self._record({"skipped": message})
            return
        saved = checkpointing.list_checkpoints(self.config.out)
        raise TrainingError(
            f"{message}; the last checkpoint is {saved[-1] if saved else 'the start'}; lower lr, "
            "or leave such steps out with non_finite='skip'"
        )

    def _averages(self) -> dict[str, float]:
        """Mean loss and gradient norm of the steps since the last call that were not left out."""
        values = {"learning_rate": self._learning_rate(self.step - 1)}
        if self._recent:
            losses, norms = zip(*self._recent, strict=True)
            values["train_loss_nats"] = sum(losses) / len(losses)
            values["gradient_norm"] = sum(norms) / len(norms)
        self._recent.clear()
        return values

    def _validate(self) -> dict[str, float]:
        """Score the model on the start of the validation split, in the main process."""
        config = self.config
        if self._valid is None or not self.world.is_main:
            return {}
        batches = windows(self._valid, config.seqlen, config.batch_size, documents=config.documents)
        if config.valid_tokens:
            count = math.ceil(config.valid_tokens / (config.seqlen * config.batch_size))
            batches = islice(batches, count)
        with self._autocast():
            result = score(self.model, batches, self._bytes_per_token)
        return {
            "valid_loss_nats": result.loss,
            "valid_perplexity": result.perplexity,
            "valid_bits_per_byte": result.bits_per_byte,
        }

    def _record(self, values: Mapping[str, float | str]) -> None:
        if values and self.world.is_main:
            self.log.write(self.step, values)
            for callback in self.callbacks:
                callback.on_log(self, values)

    def _save(self) -> None:
        """Save a checkpoint and draw the loss so far, in the main process."""
        if not self.world.is_main:
            return
        state = {
            "identity": self._identity(),
            "optimizer": self.optimizer.state_dict()["state"],
            "loader": self.loader.state_dict(),
            "random": checkpointing.random_state(),
        }
        folder = checkpointing.save_checkpoint(
            self.config.out,
            self.step,
            self.model,
            self.tokenizer,
            state,
            self.config.keep,
            self.adapter,
        )
        self.log.draw()
        for callback in self.callbacks:
            callback.on_checkpoint(self, folder)

    def _restore(self, checkpoint: Path) -> None:
        """Take everything up as a checkpoint has it."""
        state = checkpointing.load_training_state(checkpoint)
        self.changes = run_folder.compare(state["identity"], self._identity(), self.config.out)
        if self.adapter is None:
            self.model.load_state_dict(load_model(checkpoint).state_dict())
        else:
            self.adapter.load(checkpoint)
        # Learning rate, betas and weight decay are those of the config, which may have changed.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        self.loader.load_state_dict(state["loader"])
        checkpointing.restore_random_state(state["random"])
        self.step = state["step"]

    def _identity(self) -> dict[str, Any]:
        """What decides the course of a run."""
        return {
            **self.config.to_dict(),
            "data_content": self.dataset.content,
            "base_content": self.adapter.fingerprint if self.adapter else None,
            "processes": self.world.size,
        }

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)

    def _keep_gradients_here(self, yes: bool) -> contextlib.AbstractContextManager[None]:
        """Put off the sum of the gradients over the processes to the last batch of a step."""
        if yes and isinstance(self._loss, DistributedDataParallel):
            return self._loss.no_sync()
        return contextlib.nullcontext()

    def _tell_interruption(self) -> None:
        for callback in self.callbacks:
            callback.on_interrupt(self)

    def _tell_end(self) -> None:
        for callback in self.callbacks:
            callback.on_end(self)


class _Loss(nn.Module):
    """The loss as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, model: MambaLanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, seq_idx: Tensor | None) -> Tensor:
        loss, _ = self.model.loss(tokens, targets, seq_idx=seq_idx)
        return loss
