"""Tiny Shakespeare, character level: the validation loss of a model of at most 1 M parameters after ten minutes.

    python benchmarks/tiny_shakespeare.py tinyshakespeare.txt --json benchmarks/results/tiny-shakespeare.json

The text (1,115,394 characters of ASCII, so a byte is a character) is split as usual: the first 90 % to train on, the
rest to validate on. The number of steps is planned from the speed of the machine; the loss is over the whole validation
split. The clock runs from the start of the program to the last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch

from mambakit import MambaConfig
from mambakit.data import prepare
from mambakit.generate import SamplingOptions, generate_text
from mambakit.train import Progress, TrainConfig, Trainer
from mambakit.train.planning import seconds_per_step
from report import environment, save

MOST_PARAMETERS = 1_000_000


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder, "data"), Path(folder, "run")
        manifest = prepare(arguments.text, data, valid_fraction=0.1)
        config = TrainConfig(
            data=data, out=out, model=MambaConfig(d_model=128, n_layer=8, vocab_size=257),
            batch_size=8, seqlen=256, lr=5e-3, min_lr=1e-4, warmup=0.05, valid_every=0, valid_tokens=0, keep=1,
        )  # fmt: skip
        step_seconds = seconds_per_step(config)
        left = 60 * arguments.minutes - (time.perf_counter() - start)
        steps = int(0.94 * left / step_seconds)
        config = dataclasses.replace(
            config, steps=steps, log_every=max(1, steps // 50), save_every=steps
        )
        trainer = Trainer(config, callbacks=[Progress()])
        trainer.fit()
        seconds = time.perf_counter() - start
        results = {
            "environment": environment(),
            "parameters": trainer.model.num_parameters(),
            "steps": steps,
            "tokens": steps * config.batch_size * config.seqlen,
            "seconds": seconds,
            "validation_characters": manifest.splits["valid"].tokens - 1,
            **last_validation(out),
        }
        options = SamplingOptions(temperature=0.8)
        print(
            generate_text(
                trainer.model, trainer.tokenizer, ["ROMEO:"], options, max_tokens=400, seed=0
            )[0]
        )
    assert results["parameters"] <= MOST_PARAMETERS
    print(json.dumps(results, indent=2))
    if arguments.json:
        save(arguments.json, results)


def last_validation(run: Path) -> dict[str, float]:
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return next(
        {k: v for k, v in record.items() if k.startswith("valid_")}
        for record in reversed(records)
        if "valid_loss_nats" in record
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
