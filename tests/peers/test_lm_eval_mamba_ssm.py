"""The model type `mamba_ssm` of lm-evaluation-harness, which imports the authors' package, on ours."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import mambakit.compat
from mambakit.models import MambaConfig, MambaLanguageModel

pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install lm-eval")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # The peer's own.


def test_loglikelihood_and_generation(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {"<|endoftext|>": 0, **{piece: i for i, piece in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>"
    )
    fast.save_pretrained(tmp_path / "tokenizer")
    model = MambaLanguageModel(
        MambaConfig(d_model=16, n_layer=2, vocab_size=257, pad_vocab_size_multiple=1)
    )
    model.save_pretrained(tmp_path / "model", "official")
    pairs = [("hello", " world"), ("this is", " a text"), ("a", " b")]
    mambakit.compat.install()
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.mamba_lm import MambaLMWrapper

        sources = {"pretrained": str(tmp_path / "model"), "tokenizer": str(tmp_path / "tokenizer")}
        harness = MambaLMWrapper(**sources, device="cpu", dtype="float32", batch_size=2)
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        found = harness.loglikelihood(requests, disable_tqdm=True)
        options = {"until": ["\n"], "max_gen_toks": 5, "temperature": 0.0}
        request = Instance("generate_until", {}, ("hello", options), 0)
        [text] = harness.generate_until([request], disable_tqdm=True)
    finally:
        mambakit.compat.uninstall()
    for (context, continuation), (score, _) in zip(pairs, found, strict=True):
        start, tokens = len(context), fast(context + continuation)["input_ids"]
        logs = model(torch.tensor([tokens]))[0][0].log_softmax(-1)
        expected = sum(logs[t - 1, tokens[t]] for t in range(start, len(tokens)))
        assert score == pytest.approx(float(expected), rel=1e-3)
    prompt = fast("hello")["input_ids"]
    [greedy] = model.generate([prompt], max_tokens=5, temperature=0)
    assert text == fast.decode(greedy).split("\n")[0]
