"""From a text file to a trained model that writes like it.

python examples/train_on_your_text.py                    Python's own argparse.py
python examples/train_on_your_text.py my.txt 2000        your text, more steps
"""

from __future__ import annotations

import argparse
import sys

from mambakit import MambaConfig
from mambakit.data import prepare
from mambakit.generate import generate_text
from mambakit.train import Progress, TrainConfig, Trainer


def main() -> None:
    text = sys.argv[1] if len(sys.argv) > 1 else argparse.__file__
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 60

    manifest = prepare(text, "data/my-text")
    config = TrainConfig(
        data="data/my-text",
        out="runs/my-text",
        model=MambaConfig(d_model=96, n_layer=2, vocab_size=manifest.vocab_size),
        steps=steps,
        batch_size=4,
        seqlen=256,
        lr=5e-3,
    )
    trainer = Trainer(config, callbacks=[Progress()], overwrite=True)
    trainer.fit()

    [sample] = generate_text(trainer.model, trainer.tokenizer, ["def "], max_tokens=200)
    print(f"def {sample}")


if __name__ == "__main__":
    main()
