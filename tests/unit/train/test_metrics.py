from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mambakit.train.metrics import RunLog, measure_matmul_flops, read_log


def test_records_go_to_the_log_and_to_tensorboard(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write(1, {"train_loss_nats": 2.5})
    log.write(2, {"sample": "text"})
    log.close()
    assert read_log(tmp_path / "log.jsonl") == [
        {"step": 1, "train_loss_nats": 2.5},
        {"step": 2, "sample": "text"},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss_nats")] == [(1, 2.5)]
    assert events.Tensors("sample/text_summary")[0].tensor_proto.string_val == [b"text"]


def test_going_on_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "train_loss_nats": 1.0}) for step in (10, 20, 30)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 4']), encoding="utf-8")
    log = RunLog(tmp_path, 20)
    log.write(21, {"train_loss_nats": 0.5})
    log.close()
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [10, 20, 21]


@pytest.mark.parametrize("records", [0, 3])
def test_the_picture_is_drawn(tmp_path: Path, records: int) -> None:
    log = RunLog(tmp_path, 0)
    for step in range(records):
        log.write(step, {"train_loss_nats": 3.0 - step, "valid_loss_nats": 3.5 - step})
    log.draw()
    log.close()
    picture = matplotlib.image.imread(tmp_path / "loss.png")
    assert picture.shape[:2] == (600, 960)
    colours = len({tuple(pixel) for pixel in picture.reshape(-1, picture.shape[2])})
    assert colours > (100 if records else 10)


def test_the_peak_is_that_of_a_computer() -> None:
    assert 1e8 < measure_matmul_flops(torch.device("cpu"), torch.float32) < 1e15
