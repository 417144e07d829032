from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-eval; pip install 'mambakit[eval]'")

import lm_eval
from lm_eval.api.registry import get_model, model_registry
from lm_eval.tasks import TaskManager

from mambakit.data import BytesTokenizer
from mambakit.errors import ArgumentError, BackendError, CheckpointError
from mambakit.evaluate.harness import HarnessModel
from mambakit.evaluate.tasks import evaluate_tasks
from mambakit.lm_eval import CheckpointModel
from mambakit.models import MambaConfig, MambaLanguageModel

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # lm_eval's own.
    pytest.mark.usefixtures("quick_lm_eval"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = MambaLanguageModel(MambaConfig(d_model=24, n_layer=2, vocab_size=257))
    model.save_pretrained(folder, tokenizer=BytesTokenizer())
    return folder


def test_the_type_is_there_beside_those_of_lm_eval():
    assert get_model("mambakit") is CheckpointModel
    assert {"hf", "dummy", "mamba_ssm"} <= set(model_registry)


def test_later_releases_of_lm_eval_find_it_as_a_plugin():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    table = project.partition('[project.entry-points."lm_eval.models"]\n')[2]
    (target,) = re.findall(r'^mambakit = "(.+)"$', table.partition("\n[")[0], re.MULTILINE)
    assert EntryPoint("mambakit", target, "lm_eval.models").load() is CheckpointModel


@pytest.mark.parametrize(
    "arguments",
    ["pretrained={},batch_size=3,dtype=float32", {"pretrained": "{}", "tokenizer": "bytes"}],
)
def test_simple_evaluate_by_name(checkpoint, task_folder, arguments):
    if isinstance(arguments, str):
        arguments = arguments.format(checkpoint)
    else:
        arguments = arguments | {"pretrained": str(checkpoint)}
    results = lm_eval.simple_evaluate(
        model="mambakit",
        model_args=arguments,
        tasks=["squares_answer", "squares_choice"],
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
    )
    model = HarnessModel(MambaLanguageModel.from_pretrained(checkpoint).eval(), BytesTokenizer())
    ours = evaluate_tasks(model, ["squares_answer", "squares_choice"], include_path=task_folder)
    for task, metric in (("squares_answer", "perplexity,none"), ("squares_choice", "acc,none")):
        assert results["results"][task][metric] == ours["results"][task][metric]
    assert results["config"]["model_num_parameters"] == model._model.num_parameters()


def test_options_of_the_type(checkpoint):
    harness = CheckpointModel.create_from_arg_string(
        f"pretrained={checkpoint},dtype=float16,max_length=77,add_bos_token=True",
        {"batch_size": "5", "max_batch_size": None, "device": "cpu"},
    )
    assert harness.batch_size == 5
    assert harness.max_length == 77
    assert harness.tok_encode("a") == [256, 97]
    assert harness.get_model_info()["model_dtype"] == "torch.float16"
    assert harness.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": "auto"}, ArgumentError, "batch_size: got 'auto', wanted a number"),
        ({"dtype": "int8"}, ArgumentError, "dtype: got 'int8'"),
        ({"device": "cuda:99"}, BackendError, "device is 'cuda:99'"),
        ({"pretrained": "nowhere"}, CheckpointError, "nowhere"),
    ],
)
def test_wrong_options(checkpoint, options, error, message):
    with pytest.raises(error, match=message):
        CheckpointModel(**{"pretrained": str(checkpoint), "device": "cpu"} | options)
