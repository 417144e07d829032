from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from mambakit.cli import bench
from mambakit.cli.main import main
from mambakit.models import MambaConfig, MambaLanguageModel, Quantisation, quantise, save_model
from mambakit.ops.cpu import features


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_it_prints_a_rate_for_every_job(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    has_bfloat16: bool,
) -> None:
    monkeypatch.setattr(features, "features", lambda: {"avx512bf16"} if has_bfloat16 else {"avx2"})
    monkeypatch.setattr(features.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(bench, "SCAN", (64, 32, 16))
    monkeypatch.setattr(bench, "BUDGET_SECONDS", 1e-9)
    save_model(MambaLanguageModel(MambaConfig(d_model=16, n_layer=1, vocab_size=16)), tmp_path)
    assert main(["bench", "--checkpoint", str(tmp_path), "--seqlen", "16", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    expected = {"cpu": 2, "reference": 2, "float32": 3}
    if has_bfloat16:
        expected["bfloat16"] = 3
    else:
        assert "got bfloat16, but this CPU" in " ".join(out.split())
    for row, count in expected.items():
        (numbers,) = re.findall(rf"^│ {row} +│(.*)│$", out, re.MULTILINE)
        rates = [float(number.replace(",", "")) for number in numbers.split("│")]
        assert len(rates) == count
        assert min(rates) > 0


def test_a_quantised_model_is_not_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SCAN", (64, 32, 16))
    monkeypatch.setattr(bench, "BUDGET_SECONDS", 1e-9)
    model = MambaLanguageModel(MambaConfig(d_model=16, n_layer=1, vocab_size=16))
    quantise(model, Quantisation(bits=8))
    save_model(model, tmp_path)
    assert main(["bench", "--checkpoint", str(tmp_path), "--seqlen", "16", "--device", "cpu"]) == 0
    (cells,) = re.findall(r"^│ float32 +│(.*)│$", capsys.readouterr().out, re.MULTILINE)
    training, *rates = (cell.strip() for cell in cells.split("│"))
    assert training == "-"
    assert all(float(rate.replace(",", "")) > 0 for rate in rates)


def test_a_sequence_of_no_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--seqlen", "0"]) == 2
    assert capsys.readouterr().err == "error: seqlen: got 0, wanted at least 1\n"


@pytest.mark.parametrize(
    ("delays", "median"), [((0.2, 0.01, 0.02, 0.03), 0.02), ((0.01, 0.1), 0.1)]
)
def test_the_median_leaves_the_first_call_out_and_takes_a_long_one_alone(
    monkeypatch: pytest.MonkeyPatch, delays: tuple[float, ...], median: float
) -> None:
    left = iter(delays)
    monkeypatch.setattr(bench, "BUDGET_SECONDS", 0.05)
    seconds = bench._seconds(lambda: time.sleep(next(left)), torch.device("cpu"))
    assert seconds == pytest.approx(median, abs=0.005)
    assert not [*left]


def test_it_says_what_it_measures_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with bench._measuring("the scan"):
        pass
    assert capsys.readouterr().err == "measuring the scan\n"
