"""Mamba, FalconMamba and Jamba of transformers after `mambakit.compat.install()`: their results, by our operations."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

import mambakit.compat
from mambakit.compat.transformers import mixer
from mambakit.compat.transformers.patching import MIXERS

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # The peer's own, of which it has many.

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
VOCAB = 96
COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": VOCAB}
JAMBA = {
    **COMMON, "num_hidden_layers": 4, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8,
    "mamba_dt_rank": 3, "expert_layer_period": 2, "expert_layer_offset": 1, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "mamba": ("Mamba", {**COMMON, "state_size": 8}),
    "mamba, biases, odd": (
        "Mamba", {**COMMON, "state_size": 5, "use_bias": True, "conv_kernel": 3, "time_step_rank": 3},
    ),
    "mamba, no conv bias": ("Mamba", {**COMMON, "use_conv_bias": False}),
    "falcon": ("FalconMamba", {**COMMON, "state_size": 8}),
    "jamba": ("Jamba", JAMBA),
    "jamba, biases": ("Jamba", {**JAMBA, "mamba_proj_bias": True, "mamba_conv_bias": False}),
}  # fmt: skip
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _uninstalled():
    # Imported without our names, so that their own functions are what they are compared by.
    for module in MIXERS:
        __import__(module)
    yield
    mambakit.compat.uninstall()


@pytest.fixture
def calls(monkeypatch):
    """Names of our operations in the order in which the layers call them."""
    found = []
    for name in ("causal_conv1d", "causal_conv1d_step", "selective_scan", "selective_scan_step"):
        function = getattr(mixer, name)

        def counted(*args, _name=name, _function=function, **kwargs):
            assert _name != "causal_conv1d" or args[3] == "silu"
            found.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setattr(mixer, name, counted)

    def fused(*args, _function=mixer.fused_step):
        stepped = _function(*args)
        found.extend(["fused_step"] * (stepped is not None))
        return stepped

    monkeypatch.setattr(mixer, "fused_step", fused)
    return found


def make_model(name):
    kind, fields = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def make_batch():
    """Two rows, the second with five positions of padding in front."""
    tokens = torch.randint(1, VOCAB, (2, 17))
    mask = torch.ones_like(tokens)
    tokens[1, :5], mask[1, :5] = 0, 0
    return tokens, mask


def layers_of_mamba(model):
    return sum(type(module).__name__ in MIXERS.values() for module in model.modules())


@EVERY_MODEL
def test_same_logits(name, calls):
    model = make_model(name)
    tokens = torch.randint(0, VOCAB, (2, 33))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        assert not calls
        mambakit.compat.install()
        found = model(tokens, use_cache=False).logits
    assert calls == ["causal_conv1d", "selective_scan"] * layers_of_mamba(model)
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("is_padded", [False, True])
@EVERY_MODEL
def test_same_gradients(name, is_padded, calls):
    model = make_model(name).train()
    tokens, mask = make_batch()
    labels = tokens.masked_fill(mask == 0, -100)
    results = []
    for installs in (False, True):
        if installs:
            mambakit.compat.install()
        model.zero_grad()
        loss = model(tokens, attention_mask=mask if is_padded else None, labels=labels).loss
        loss.backward()
        gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    assert calls.count("selective_scan") == layers_of_mamba(model)
    (loss, gradients), (our_loss, our_gradients) = results
    torch.testing.assert_close(our_loss, loss, **TOLERANCE)
    assert our_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[key], gradient, **TOLERANCE, msg=key)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("name", ["falcon", "jamba"])
def test_gradients_are_the_same_bits_if_tensors_are_made_again(name, is_padded, monkeypatch):
    model = make_model(name).train()
    tokens, mask = make_batch()
    mambakit.compat.install()
    results = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(mixer, "RECOMPUTES_ON", devices)
        model.zero_grad()
        torch.manual_seed(0)
        model(tokens, attention_mask=mask if is_padded else None, labels=tokens).loss.backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *results))


@EVERY_MODEL
def test_same_greedy_tokens_with_padding(name, calls):
    model = make_model(name)
    tokens, mask = make_batch()
    arguments = {
        "attention_mask": mask,
        "max_new_tokens": 20,
        "do_sample": False,
        "eos_token_id": None,
    }
    expected = model.generate(tokens, pad_token_id=0, **arguments)
    mambakit.compat.install()
    found = model.generate(tokens, pad_token_id=0, **arguments)
    assert found.tolist() == expected.tolist()
    count = layers_of_mamba(model)
    assert calls.count("selective_scan") == count
    steps = "fused_step" if name == "mamba" else "selective_scan_step"
    assert calls == ["causal_conv1d", "selective_scan"] * count + [
        call for call in calls if call in (steps, "causal_conv1d_step")
    ]
    assert calls.count(steps) == 19 * count
    alone = model.generate(tokens[1:, 5:], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert found[1, 5:].tolist() == alone[0].tolist()


def take_steps(model, tokens):
    """Logits of the last five tokens, one by one after a prompt of the others, and the states then."""
    with torch.no_grad():
        cache, logits = model(tokens[:, :-5], use_cache=True).cache_params, []
        for token in tokens[:, -5:].split(1, dim=1):
            logits.append(model(token, use_cache=True, cache_params=cache).logits)
    layers = range(layers_of_mamba(model))
    states = [
        state
        for layer in layers
        for state in (cache.get_conv_state(layer), cache.get_recurrent_state(layer))
    ]
    return [torch.cat(logits, dim=1), *states]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt", [1, 2, 9])
def test_a_step_in_one_call_equals_the_operations(prompt, dtype, batch, calls, monkeypatch):
    model = make_model("mamba").to(dtype)
    tokens = torch.randint(0, VOCAB, (batch, prompt + 5))
    mambakit.compat.install()
    found = take_steps(model, tokens)
    assert calls.count("fused_step") == 5 * layers_of_mamba(model)
    monkeypatch.setattr(mixer, "fused_step", lambda *args: None)
    expected = take_steps(model, tokens)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **near)


def add_hook(layer):
    layer.x_proj.register_forward_hook(lambda module, args, output: output * 1.5)


def add_bias(layer):
    layer.in_proj.bias = torch.nn.Parameter(torch.randn(len(layer.in_proj.weight)))


@pytest.mark.parametrize("change", [add_hook, add_bias])
def test_a_step_that_is_not_plain_is_left_to_the_operations(change, calls):
    model = make_model("mamba")
    change(model.backbone.layers[1].mixer)
    tokens = torch.randint(0, VOCAB, (2, 9))
    expected = take_steps(model, tokens)
    mambakit.compat.install()
    found = take_steps(model, tokens)
    assert calls.count("fused_step") == 5 * 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_a_step_under_autocast_is_left_to_the_operations(calls):
    model = make_model("mamba")
    mambakit.compat.install()
    with torch.autocast("cpu", torch.bfloat16):
        take_steps(model, torch.randint(0, VOCAB, (2, 9)))
    assert "fused_step" not in calls


@EVERY_MODEL
def test_several_tokens_go_on_from_a_cache(name):
    """Theirs forgets the state of the scan there."""
    model = make_model(name)
    tokens = torch.randint(0, VOCAB, (2, 24))
    mambakit.compat.install()
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        cache, logits = None, []
        key = "past_key_values" if name.startswith("jamba") else "cache_params"
        for part in tokens.split([7, 1, 9, 2, 1, 4], dim=1):
            output = model(part, use_cache=True, **{key: cache})
            cache = output[key]
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **TOLERANCE)


def test_packed_documents_do_not_see_one_another():
    model = make_model("jamba")
    layer = next(m for m in model.modules() if type(m).__name__ == "JambaMambaMixer")
    mambakit.compat.install()
    first, second = torch.randn(1, 7, 32), torch.randn(1, 6, 32)
    seq_idx = torch.tensor([[0] * 7 + [1] * 6])
    packed = layer(torch.cat([first, second], dim=1), seq_idx=seq_idx)
    apart = torch.cat([layer(first), layer(second)], dim=1)
    torch.testing.assert_close(packed, apart, **TOLERANCE)


def test_another_activation():
    model = make_model("mamba")
    for block in model.backbone.layers:
        block.mixer.activation, block.mixer.act = "gelu", torch.nn.GELU()
    tokens = torch.randint(0, VOCAB, (2, 9))
    expected = take_steps(model, tokens)
    mambakit.compat.install()
    for ours, theirs in zip(take_steps(model, tokens), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("name", ["mamba", "falcon"])
def test_adapters_of_all_projections_count_and_merge(name, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model(name)
    plain = copy.deepcopy(model)
    mambakit.compat.install()
    tokens = torch.randint(0, VOCAB, (1, 9))
    targets = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).train()
    loss = adapted(tokens, labels=tokens).loss
    loss.backward()
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            assert parameter.grad.abs().sum() > 0, key
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = adapted(tokens, use_cache=False).logits
        merged = adapted.merge_and_unload()(tokens, use_cache=False).logits
    torch.testing.assert_close(merged, expected, **TOLERANCE)
    again = peft.PeftModel.from_pretrained(plain, tmp_path)
    with torch.no_grad():
        found = again(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_peft_refuses_what_would_be_passed_by():
    """Without our layers the output projection, and the convolution in any case."""
    peft = pytest.importorskip("peft")
    for installed, target in ((False, "out_proj"), (True, "conv1d")):
        if installed:
            mambakit.compat.install()
            mambakit.compat.install()
        with pytest.raises(ValueError, match=f"Module .{target}. is incompatible"):
            peft.get_peft_model(make_model("mamba"), peft.LoraConfig(target_modules=[target]))
    mambakit.compat.uninstall()
    with pytest.raises(ValueError, match="Module .out_proj. is incompatible"):
        peft.get_peft_model(make_model("mamba"), peft.LoraConfig(target_modules=["out_proj"]))


@pytest.mark.slow
def test_compiled_as_one_graph():
    model = make_model("mamba")
    mambakit.compat.install()
    tokens = torch.randint(0, VOCAB, (2, 9))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected, **TOLERANCE)


@pytest.mark.slow
def test_a_compiled_step_is_left_to_the_operations(calls):
    model = make_model("mamba")
    mambakit.compat.install()
    tokens = torch.randint(0, VOCAB, (2, 7))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = []
    with torch.no_grad():
        for step in (model, compiled):
            cache = model(tokens[:, :-1], use_cache=True).cache_params
            logits.append(step(tokens[:, -1:], use_cache=True, cache_params=cache).logits)
    assert calls.count("fused_step") == layers_of_mamba(model)
    torch.testing.assert_close(*logits, **TOLERANCE)


@pytest.mark.slow
def test_an_export_does_not_need_us():
    model = make_model("mamba")
    tokens = torch.randint(0, VOCAB, (1, 5))
    expected = model(tokens, use_cache=False).logits
    mambakit.compat.install()
    program = torch.export.export(model, (tokens,), {"use_cache": False})
    assert "mambakit" not in str(program.graph)
    found = program.module()(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_uninstall_gives_their_forward_back(calls):
    model = make_model("mamba")
    mambakit.compat.install()
    mambakit.compat.uninstall()
    model(torch.tensor([[1, 2]]), use_cache=False)
    assert not calls


def test_install_before_the_import():
    script = """
import mambakit.compat
mambakit.compat.install()
import torch, transformers
from transformers import MambaConfig, MambaForCausalLM
import transformers.models.mamba.modeling_mamba as modelling
from transformers.models.mamba2 import modeling_mamba2
assert modelling.MambaMixer.forward.__module__ == "mambakit.compat.transformers.mixer"
import mamba_ssm, causal_conv1d
# What other models of transformers take by name.
names = [cell.cell_contents for f in (modelling.mamba_selective_scan, modelling.causal_conv1d_fn)
         for cell in f.__closure__ if callable(cell.cell_contents)]
assert mamba_ssm.selective_scan_fn in names and causal_conv1d.causal_conv1d_fn in names, names
model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=9))
model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
print("done")
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "done"


def test_another_version_keeps_its_own_layers(monkeypatch):
    layer = transformers.models.mamba.modeling_mamba.MambaMixer
    theirs = layer.forward
    monkeypatch.delattr("transformers.cache_utils.Cache.get_conv_state")  # As before 5.21.
    with pytest.warns(UserWarning, match=r"modeling_mamba of .* upgrade transformers to 5\.21"):
        mambakit.compat.install()
    assert layer.forward is theirs
