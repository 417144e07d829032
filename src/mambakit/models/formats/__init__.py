"""Formats of checkpoints: one file each, with what its config and its tensors are called.

mambakit.py      our own
official.py      the authors' code (`mamba_ssm`)
huggingface.py   `mamba` and `falcon_mamba` of transformers
gguf.py          llama.cpp, which is written but not read
"""
