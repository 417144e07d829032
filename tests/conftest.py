"""What all tests share: a seed from the test's name, and GPU tests that skip or, if required, fail."""

from __future__ import annotations

import json
import os
import re
import zlib
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """The same inputs for every backend."""
    name = re.sub(r"\b(cpu|cuda)\b", "", request.node.nodeid)
    torch.manual_seed(zlib.crc32(name.encode()))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        if "gpu" in os.environ.get("MAMBAKIT_REQUIRE", "").split(","):
            pytest.fail("MAMBAKIT_REQUIRE=gpu, but torch sees no GPU")
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of lm-evaluation-harness of each kind, over twelve examples in a file."""
    folder = tmp_path_factory.mktemp("tasks")
    examples = [
        {
            "question": f"line {n}: {n * n} is the square of",
            "answer": f" {n}\n",
            "choices": [f" {n + 1}\n", f" {n}\n", " x"],
        }
        for n in range(12)
    ]
    lines = "".join(json.dumps(example) + "\n" for example in examples)
    (folder / "squares.jsonl").write_text(lines, encoding="utf-8")
    kinds = {
        "squares_choice": {
            "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": 1,
            "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}],
        },
        "squares_answer": {
            "output_type": "loglikelihood", "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}", "metric_list": [{"metric": "perplexity"}],
        },
        "squares_text": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{question}}", "metric_list": [{"metric": "bits_per_byte"}],
        },
        "squares_written": {
            "output_type": "generate_until", "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}", "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        },
    }  # fmt: skip
    for name, fields in kinds.items():
        files = {"test": str(folder / "squares.jsonl")}
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            "test_split": "test",
        }
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(common | fields), encoding="utf-8")
    return folder
