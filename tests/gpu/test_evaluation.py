"""Log-likelihoods and lm_eval on a GPU: batches of contexts against the CPU, where each is read alone."""

from __future__ import annotations

import copy

import pytest
import torch

from mambakit.data import BytesTokenizer
from mambakit.evaluate import log_likelihoods
from mambakit.models import MambaConfig, MambaLanguageModel

pytestmark = pytest.mark.gpu

LENGTHS = (1, 2, 17, 64, 64, 64, 130, 2100)


@pytest.fixture(scope="module")
def model() -> MambaLanguageModel:
    torch.manual_seed(0)
    return MambaLanguageModel(MambaConfig(d_model=128, n_layer=4, vocab_size=257)).eval()


@pytest.fixture(scope="module")
def pairs() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(256, (length,), generator=generator).tolist()

    contexts = [ids(length) for length in LENGTHS]
    endings = [(context, ids(n)) for context in contexts for n in (9, 4, 1, 1)]
    return [*endings, *((ids(n), ids(n % 7 + 1)) for n in range(5, 60, 3))]


@pytest.mark.parametrize("batch_size", [1, 5, 16, 64])
def test_any_batch_agrees_with_the_cpu(model, pairs, batch_size):
    expected = dict(log_likelihoods(model, pairs))
    found = dict(log_likelihoods(copy.deepcopy(model).cuda(), pairs, batch_size))
    assert sorted(found) == sorted(expected)
    for index in expected:
        assert found[index].log_prob == pytest.approx(expected[index].log_prob, rel=1e-4)
        assert found[index].is_greedy == expected[index].is_greedy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, pairs, dtype):
    expected = dict(log_likelihoods(model, pairs))
    found = dict(log_likelihoods(copy.deepcopy(model).to("cuda", dtype), pairs))
    for index in expected:
        assert found[index].log_prob == pytest.approx(expected[index].log_prob, rel=0.02, abs=0.05)


def test_all_that_lm_eval_asks_for(model):
    pytest.importorskip("lm_eval", reason="needs lm-eval; pip install 'mambakit[eval]'")
    from lm_eval.api.instance import Instance

    from mambakit.evaluate.harness import HarnessModel

    texts = [f"{n} and {n * n}, " * (1 + n % 4) for n in range(20)]
    options = {"until": ["\n"], "max_gen_toks": 12}
    cpu, gpu = (
        HarnessModel(one, BytesTokenizer(), batch_size=8)
        for one in (model, copy.deepcopy(model).cuda())
    )
    asked = {
        "loglikelihood": [(text, end) for text in texts for end in ("one", " thirty-two", "3")],
        "loglikelihood_rolling": [(text,) for text in texts],
        "generate_until": [(text, options) for text in texts],
    }
    for kind, arguments in asked.items():
        some = [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]
        expected, found = (getattr(one, kind)(some, disable_tqdm=True) for one in (cpu, gpu))
        if kind == "loglikelihood":
            expected, found = ([value for value, _ in answers] for answers in (expected, found))
        if kind != "generate_until":
            expected = pytest.approx(expected, rel=1e-4)
        assert found == expected


@pytest.mark.filterwarnings("ignore")  # lm_eval's own.
def test_tasks_give_the_same_at_batch_1_and_16(model, task_folder, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs lm-eval; pip install 'mambakit[eval]'")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # Takes seconds.
    from mambakit.evaluate.harness import HarnessModel
    from mambakit.evaluate.tasks import evaluate_tasks

    names = ("squares_choice", "squares_answer", "squares_text", "squares_written")
    one, many = (
        evaluate_tasks(
            HarnessModel(copy.deepcopy(model).cuda(), BytesTokenizer(), batch_size=size),
            names,
            include_path=task_folder,
            num_fewshot=2,
        )
        for size in (1, 16)
    )
    for name in names:
        metrics = one["results"][name]
        assert len(metrics) > 2
        for key, value in metrics.items():
            wanted = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert many["results"][name][key] == wanted, f"{name}: {key}"
    written = [
        [example["resps"] for example in results["samples"]["squares_written"]]
        for results in (one, many)
    ]
    assert written[0] == written[1]
    assert len(written[0]) == 12
