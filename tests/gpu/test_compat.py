"""`mambakit.compat` on a GPU: models, CUDA graphs, layers of transformers, tensors of more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from examples import skip_or_fail

import mambakit.compat
from mambakit.compat.mamba_ssm.models.config_mamba import MambaConfig
from mambakit.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mambakit.compat.mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mambakit.ops import selective_scan

pytestmark = pytest.mark.gpu


def make_model(rms_norm: bool = True, **fields) -> MambaLMHeadModel:
    model = MambaLMHeadModel(
        MambaConfig(d_model=64, n_layer=3, vocab_size=96, tie_embeddings=False, rms_norm=rms_norm),
        device="cuda",
        **fields,
    )
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def test_same_logits_as_on_the_cpu():
    model, tokens = make_model(), torch.randint(0, 96, (2, 37))
    with torch.no_grad():
        found = model(tokens.cuda()).logits.cpu()
        torch.testing.assert_close(found, model.cpu()(tokens).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_plain", [True, False])
def test_a_cuda_graph_decodes_the_same(dtype, is_plain):
    """A plain model by the fused steps of our own, one with layer norms module by module."""
    model = make_model(rms_norm=is_plain, dtype=dtype)
    assert (model.decoder() is not None) == is_plain
    for batch, length in (
        (2, 9),
        (2, 5),
        (3, 7),
        (2, 9),
    ):  # The graph is used again, and made anew.
        prompts = torch.randint(0, 96, (batch, length), device="cuda")
        expected = model.generate(prompts, 40, return_dict_in_generate=True, output_scores=True)
        found = model.generate(
            prompts, 40, cg=True, teacher_outputs=expected.sequences, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        for ours, eager in zip(found.scores, expected.scores, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-2)
    cache = model._decoding_cache
    model.generate(prompts, 40, cg=True)
    assert model._decoding_cache is cache


def test_padding_in_front_with_a_cuda_graph():
    model = make_model()
    prompts = torch.randint(0, 96, (2, 8), device="cuda")
    mask = torch.ones_like(prompts)
    mask[1, :3] = 0
    found = model.generate(prompts, 20, cg=True, attention_mask=mask)
    alone = model.generate(prompts[1:, 3:], 17)
    assert torch.equal(found[1, 3:], alone[0])


JAMBA = {
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_period": 2,
    "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "pad_token_id": 0,
}  # fmt: skip
EVERY_MODEL = pytest.mark.parametrize("name", ["Mamba", "FalconMamba", "Jamba"])


def make_transformers_model(name):
    transformers = pytest.importorskip("transformers", minversion="5.21")
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
    fields |= JAMBA if name == "Jamba" else {}
    config = getattr(transformers, f"{name}Config")(**fields)
    return getattr(transformers, f"{name}ForCausalLM")(config)


@EVERY_MODEL
def test_layers_of_transformers(name):
    model = make_transformers_model(name).cuda().train()
    tokens = torch.randint(0, 96, (2, 33), device="cuda")
    results = []
    for install in (False, True):
        if install:
            mambakit.compat.install()
        try:
            model.zero_grad()
            output = model(tokens, labels=tokens, use_cache=False)
            output.loss.backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            results.append([output.logits.detach(), *gradients])
        finally:
            mambakit.compat.uninstall()
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_MODEL
def test_steps_of_transformers(name, dtype):
    """One token after another from a cache, against the whole sequence at once on the CPU."""
    model = make_transformers_model(name).eval()
    key = "past_key_values" if name == "Jamba" else "cache_params"
    tokens = torch.randint(0, 96, (2, 17))
    mambakit.compat.install()
    try:
        with torch.no_grad():
            expected = model(tokens, use_cache=False).logits[:, 8:]
            model.to("cuda", dtype)
            output, logits = model(tokens[:, :8].cuda(), use_cache=True), []
            for token in tokens[:, 8:].cuda().split(1, dim=1):
                output = model(token, use_cache=True, **{key: output[key]})
                logits.append(output.logits.float().cpu())
    finally:
        mambakit.compat.uninstall()
    error = 1e-3 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=error, atol=error)


@pytest.mark.slow
@pytest.mark.xdist_group("large")
def test_more_than_2_to_the_31_elements():
    """In the authors' layout, (B, D, L): upstream offsets of 32 bits overflow."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 64 * 2**30:
        skip_or_fail(f"this test needs 64 GiB of GPU memory, {free / 2**30:.0f} are free")
    channels, d_state, tail = 1024, 16, 1500
    seqlen = 2**31 // channels + 1000
    made = {"device": "cuda", "dtype": torch.bfloat16}
    u, delta, z = (torch.randn(1, channels, seqlen, **made) for _ in range(3))
    B, C = (torch.randn(1, d_state, seqlen, **made) for _ in range(2))
    A = -0.01 - torch.rand(channels, d_state, device="cuda")
    bias = torch.full((channels,), -4.0, device="cuda")
    with torch.no_grad():
        y, last = selective_scan_fn(u, delta, A, B, C, None, z, bias, True, True)
        first = [t[..., :-tail] for t in (u, delta, B, C, z)]
        _, state = selective_scan_fn(*first[:2], A, *first[2:4], None, first[4], bias, True, True)
        x_end, dt_end, B_end, C_end, z_end = (
            t[..., -tail:].transpose(1, 2) for t in (u, delta, B, C, z)
        )
        expected, expected_last = selective_scan(
            x_end, dt_end, A, B_end, C_end, None, z_end, bias, True, initial_state=state
        )
    torch.testing.assert_close(last, expected_last, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y[..., -tail:], expected.transpose(1, 2), rtol=0.02, atol=0.02)
    head = [t[..., :tail] for t in (u, delta, B, C, z)]
    expected = selective_scan_fn(*head[:2], A, *head[2:4], None, head[4], bias, True)
    torch.testing.assert_close(y[..., :tail], expected, rtol=0.02, atol=0.02)
