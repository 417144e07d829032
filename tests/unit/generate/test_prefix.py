from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mambakit.errors import ArgumentError, CheckpointError
from mambakit.generate import Engine, Prefix, Request, SamplingOptions
from mambakit.generate.prefix import fingerprint
from mambakit.models import MambaConfig, MambaLanguageModel

GREEDY = SamplingOptions(temperature=0)


def make(**fields: object) -> MambaLanguageModel:
    torch.manual_seed(1)
    return MambaLanguageModel(MambaConfig(d_model=16, n_layer=2, vocab_size=50, **fields))


def assert_equal(one: Prefix, other: Prefix) -> None:
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.fingerprint == other.fingerprint
    for layer, expected in zip(one.state.layers, other.state.layers, strict=True):
        assert torch.equal(layer.conv_state, expected.conv_state)
        assert torch.equal(layer.ssm_state, expected.ssm_state)


def test_a_prefix_continues_like_the_whole_prompt(small):
    tokens = torch.randint(50, (23,)).tolist()
    prefix = Prefix.read(small, tokens[:9], chunk=3)
    prefix = Prefix.read(small, tokens[9:12], after=prefix, chunk=3)
    assert (prefix.length, prefix.tokens.tolist()) == (12, tokens[:12])
    engine = Engine(small, chunk=3)
    for options in (GREEDY, SamplingOptions(repetition_penalty=1.5)):
        fields = {"options": options, "max_tokens": 9, "seed": 4, "logprobs": 0}
        branches = [Request(prompt=tokens[12:], prefix=prefix, **fields) for _ in range(2)]
        *branched, whole = engine.generate([*branches, Request(prompt=tokens, **fields)])
        # Bit for bit, since the chunks are cut at the same places.
        assert branched[0].outputs == branched[1].outputs == whole.outputs


def test_a_prefix_of_any_length(small, monkeypatch):
    tokens = torch.randint(50, (23,)).tolist()
    prefix = Prefix.read(small, tokens[:10])
    sizes, prefill = [], small.prefill
    monkeypatch.setattr(
        small,
        "prefill",
        lambda tokens, *rest, **options: (
            sizes.append(tokens.shape[1]),
            prefill(tokens, *rest, **options),
        )[1],
    )
    engine = Engine(small, chunk=4)
    [one, whole] = engine.generate(
        [
            Request(prompt=tokens[10:], prefix=prefix, options=GREEDY, max_tokens=9),
            Request(prompt=tokens, options=GREEDY, max_tokens=9),
        ]
    )
    assert one.tokens == whole.tokens
    # Both are cut at multiples of 4 tokens from the beginning of the whole, and take turns.
    assert sizes == [2, 4, 4, 4, 4, 4, 3, 4, 4, 3]


def test_its_size_does_not_depend_on_its_length(small):
    short, long = Prefix.read(small, [1]), Prefix.read(small, [1] * 1001)
    assert long.nbytes - short.nbytes == 4 * 1000
    states = 2 * 32 * (16 * 4 + 3 * 4)
    assert short.nbytes == states + 4


@pytest.mark.parametrize("kind", ["real", "complex", "bfloat16"])
def test_saving_and_loading(kind, tmp_path):
    model = make(A_init="s4d-lin") if kind == "complex" else make()
    model = model.bfloat16() if kind == "bfloat16" else model
    prefix = Prefix.read(model, [1, 2, 3])
    prefix.save(tmp_path / "a" / "prefix.safetensors")
    assert_equal(Prefix.load(tmp_path / "a" / "prefix.safetensors", model), prefix)


def test_a_file_of_another_model_is_refused(tmp_path):
    path = tmp_path / "prefix.safetensors"
    Prefix.read(make(), [1, 2, 3]).save(path)
    trained = make()
    with torch.no_grad():
        trained.backbone.norm_f.weight[0] += 0.5
    for other in (make(tie_embeddings=False), trained, make().bfloat16()):
        with pytest.raises(CheckpointError, match="was read by another model, or by other weights"):
            Prefix.load(path, other)
        with pytest.raises(ArgumentError, match="prefix: was read by another model"):
            Prefix.read(other, [1], after=Prefix.load(path, make()))
        with pytest.raises(ArgumentError, match="prefix: was read by another model"):
            Engine(other).submit(Request(prompt=[1], prefix=Prefix.load(path, make())))


def test_fingerprints():
    assert fingerprint(make()) == fingerprint(make())
    assert len(fingerprint(make())) == 64


def rewrite(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    save_file(tensors, path, metadata=metadata)


def test_files_that_cannot_be_used(tmp_path):
    model, path = make(), tmp_path / "prefix.safetensors"
    with pytest.raises(CheckpointError, match="is missing; give a file of Prefix.save"):
        Prefix.load(path, model)
    prefix = Prefix.read(model, [1, 2])
    prefix.save(path)
    tensors, whole = load_file(path), path.read_bytes()
    metadata = {"format": "mambakit prefix", "version": "1", "fingerprint": prefix.fingerprint}
    path.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match="is damaged or cut off"):
        Prefix.load(path, model)
    rewrite(path, tensors)
    with pytest.raises(CheckpointError, match="is not a saved prefix"):
        Prefix.load(path, model)
    rewrite(path, tensors, **{**metadata, "version": "2"})
    with pytest.raises(CheckpointError, match="has version 2, wanted 1; upgrade mambakit"):
        Prefix.load(path, model)
    for name in ("tokens", "layers.1.ssm_state"):
        rewrite(path, {key: tensor for key, tensor in tensors.items() if key != name}, **metadata)
        with pytest.raises(CheckpointError, match="is damaged"):
            Prefix.load(path, model)
    wrong = {**tensors, "layers.0.conv_state": torch.zeros(1, 2, 3)}
    rewrite(path, wrong, **metadata)
    with pytest.raises(CheckpointError, match="a state is missing or has another shape"):
        Prefix.load(path, model)


@pytest.mark.parametrize("prompt", [[], [50], "text"])
def test_wrong_prompts(small, prompt):
    with pytest.raises(ArgumentError, match="prompt: got"):
        Prefix.read(small, prompt)
