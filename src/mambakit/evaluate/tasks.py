"""The tasks of lm-evaluation-harness, on one of our models."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from mambakit.errors import ArgumentError, DataError

RESAMPLES = 1000
"""For standard errors that are estimated by resampling; lm_eval's default takes minutes."""

Results = dict[str, Any]


def evaluate_tasks(
    model: LM,
    tasks: Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
) -> Results:
    """Run tasks of lm-evaluation-harness.

    Args:
        model: Such as a `HarnessModel`.
        tasks: Names of tasks, groups or tags, also with wildcards ("mmlu_*"), or YAML files.
        include_path: Folder with tasks of one's own, as YAML files. Default: none.
        limit: So many examples of each task; below 1, this share of them. Default: all.
        num_fewshot: Solved examples in front of each one. Default: what the task says.

    Returns:
        What `lm_eval.simple_evaluate` returns: "results" has the metrics of each task, "samples"
        every example with the model's answers.

    Raises:
        ArgumentError: There is no such task, or an argument is out of range.
        DataError: A task cannot be loaded, as when its dataset is not on this machine and there is
            no network.
    """
    if limit is not None and limit <= 0:
        raise ArgumentError(f"limit: got {limit}, wanted more than 0")
    if num_fewshot is not None and num_fewshot < 0:
        raise ArgumentError(f"num_fewshot: got {num_fewshot}, wanted at least 0")
    if include_path is not None and not Path(include_path).is_dir():
        raise ArgumentError(f"include_path: {include_path} is no folder")
    # Its processes would be forks of this one, which has threads, and perhaps a GPU.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    manager, names = _find(tasks, include_path)
    results: Results = simple_evaluate(
        model=model,
        tasks=names,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=getattr(model, "batch_size", None),
        device=str(model.device),
        bootstrap_iters=RESAMPLES,
        task_manager=manager,
    )
    return results


class _Tasks(TaskManager):  # type: ignore[misc]  # lm_eval ships no types.
    """Tasks by name, whose errors say what cannot be loaded."""

    def load(self, task_list: Sequence[str]) -> Any:
        try:
            return super().load(list(task_list))
        except (
            Exception
        ) as error:  # Many types: of datasets, of the hub, of YAML, of the task's own code.
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"tasks: {', '.join(task_list)} cannot be loaded "
                f"({type(error).__name__}: {reason}); check the network, or the files of the task"
            ) from error


def _find(
    names: Sequence[str], include_path: str | os.PathLike[str] | None
) -> tuple[TaskManager, list[str]]:
    """The tasks that names, wildcards and files mean, each once, and who loads them."""
    if not names:
        raise ArgumentError("tasks: got none, wanted names such as lambada_openai")
    own = None if include_path is None else os.fspath(include_path)
    manager = _Tasks(include_path=own, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        manager = _Tasks(include_path=own)  # Reads all files of lm_eval: ten seconds.
    found: dict[str, None] = {}
    for name in names:
        is_file = name.endswith((".yaml", ".yml")) and Path(name).is_file()
        matches = [name] if is_file else manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise ArgumentError(
                f"tasks: got {name!r}, wanted a task of lm_eval or a YAML file; {hint}"
            )
        found.update(dict.fromkeys(matches))
    return manager, list(found)
