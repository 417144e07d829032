from __future__ import annotations

import pytest

from mambakit.train.schedule import learning_rate


def rates(steps: int, warmup_steps: int) -> list[float]:
    return [
        learning_rate(s, steps=steps, warmup_steps=warmup_steps, peak=1.0, floor=0.1)
        for s in range(steps)
    ]


def test_warm_up_is_linear_and_the_cosine_ends_at_the_floor() -> None:
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.868198, 0.55, 0.231802, 0.1]
    assert rates(9, 4) == pytest.approx(expected, abs=1e-6)


def test_without_warm_up_it_starts_at_the_peak() -> None:
    assert rates(3, 0) == pytest.approx([1.0, 0.55, 0.1])


@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (1, 1), (2, 2), (2, 1)])
def test_tiny_runs_have_a_rate_for_every_step(steps: int, warmup_steps: int) -> None:
    assert all(0.1 <= rate <= 1.0 for rate in rates(steps, warmup_steps))


def test_beyond_the_last_step_it_stays_at_the_floor() -> None:
    assert learning_rate(99, steps=9, warmup_steps=4, peak=1.0, floor=0.1) == pytest.approx(0.1)
