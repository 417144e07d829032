"""Text appears as it is written, for several prompts at once.

python examples/stream_generation.py                     trains a tiny model first
python examples/stream_generation.py CHECKPOINT "Once"   a checkpoint of yours
"""

from __future__ import annotations

import sys

from quick_start import train, zen_of_python

from mambakit.data import BytesTokenizer, load_tokenizer
from mambakit.generate import SamplingOptions, stream_text
from mambakit.models import load_model


def main() -> None:
    if len(sys.argv) > 1:
        checkpoint, *prompts = sys.argv[1:]
        model, tokenizer = load_model(checkpoint).eval(), load_tokenizer(checkpoint)
    else:
        model, tokenizer = train(zen_of_python(), vocab_size=257), BytesTokenizer()
        prompts = ["Now is better than never."]

    # One prompt: each piece is printed the moment it is certain.
    options = SamplingOptions(temperature=0.7, top_p=0.95)
    print(f"\n{prompts[0]}", end="", flush=True)
    for _, piece in stream_text(model, tokenizer, prompts[:1], options, max_tokens=60, seed=1):
        print(piece, end="", flush=True)

    # Several prompts in one batch; each stops at the end of its line.
    prompts = ["Explicit", "In the face", "There should", "If the"]
    lines = list(prompts)
    greedy = SamplingOptions(temperature=0)
    for row, piece in stream_text(model, tokenizer, prompts, greedy, max_tokens=90, stop=["\n"]):
        lines[row] += piece
    print("\n", *lines, sep="\n")


if __name__ == "__main__":
    main()
