"""A prefix is a value: read it once, save it, and branch from it at will."""

from __future__ import annotations

from pathlib import Path

from quick_start import train, zen_of_python

from mambakit.generate import Engine, Prefix, Request, SamplingOptions


def main() -> None:
    model = train(zen_of_python())
    beginning = "\n".join(zen_of_python().splitlines()[:5]) + "\n"
    path = Path("prefix.safetensors")
    Prefix.read(model, list(beginning.encode())).save(path)

    prefix = Prefix.load(path, model)
    print(f"\n{prefix.length} bytes are read; their state takes {prefix.nbytes:,} bytes.")
    openings = ("Complex is", "Readability")
    requests = [
        Request(
            prompt=list(opening.encode()),
            prefix=prefix,
            options=SamplingOptions(temperature=0),
            max_tokens=40,
        )
        for opening in openings
    ]
    for opening, done in zip(openings, Engine(model).generate(requests), strict=True):
        print((opening + bytes(done.tokens).decode(errors="replace")).splitlines()[0])


if __name__ == "__main__":
    main()
