from __future__ import annotations

import numpy as np
import pytest
import torch

from mambakit.errors import ArgumentError
from mambakit.generate import Completion, Output, Request
from mambakit.generate.request import token_ids


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: got 0, wanted at least 1"),
        ({"seed": -1}, r"seed: got -1, wanted one from 0 to 2\*\*63 - 1"),
        ({"seed": 2**63}, "seed: got 9223372036854775808"),
        ({"logprobs": -1}, "logprobs: got -1, wanted at least 0, or None"),
        ({"stop": "END"}, "stop: got 'END', wanted a list of strings"),
        ({"stop": [""]}, "stop: got"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ArgumentError, match=message):
        Request(prompt=[1], **fields)


@pytest.mark.parametrize(
    "prompt", [[1, 2], (1, 2), torch.tensor([1, 2]), np.array([1, 2]), b"\1\2"]
)
def test_kinds_of_prompts(prompt):
    assert token_ids("prompt", prompt, 3) == [1, 2]


def test_the_first_wrong_id_is_named():
    with pytest.raises(ArgumentError, match=r"prompts\[3\]: got id 9, wanted 0 <= id < 5"):
        token_ids("prompts[3]", [1, 9, -1, 2], 5)


def test_tokens_and_text_of_a_completion():
    outputs = [Output(token=1, text="a"), Output(token=2), Output(token=None, text="b")]
    done = Completion(outputs=outputs, finish_reason="stop", reused_tokens=0)
    assert done.tokens == [1, 2]
    assert done.text == "ab"
