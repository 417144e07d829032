"""Train a small Mamba on the Zen of Python, byte by byte, and let it recite. Takes seconds."""

from __future__ import annotations

import codecs
import contextlib
import io

import torch

from mambakit import MambaConfig, MambaLanguageModel


def zen_of_python() -> str:
    with contextlib.redirect_stdout(io.StringIO()):  # The module prints itself when imported.
        import this
    return codecs.decode(this.s, "rot13")


def train(text: str, steps: int = 80, vocab_size: int = 256) -> MambaLanguageModel:
    """Learn a text by heart: one sequence, its bytes are the tokens."""
    torch.manual_seed(0)
    model = MambaLanguageModel(MambaConfig(d_model=64, n_layer=2, vocab_size=vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    tokens = torch.tensor([list(text.encode())])
    for step in range(steps):
        loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3}: {loss.item():.3f} nats per byte", flush=True)
    return model.eval()


def main() -> None:
    model = train(zen_of_python())
    print(f"\n{model.num_parameters():,} parameters now recite:\n")
    prompt = "Beautiful is"
    [continuation] = model.generate([list(prompt.encode())], max_tokens=200, temperature=0)
    print(prompt + bytes(continuation).decode(errors="replace"))


if __name__ == "__main__":
    main()
