"""Evaluation: how well a model predicts a text, and solves tasks.

`harness` and `tasks` need lm-evaluation-harness (extra `eval`), and are imported by their own names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mambakit.lazy import attach

if TYPE_CHECKING:
    from mambakit.evaluate.likelihood import Likelihood as Likelihood
    from mambakit.evaluate.likelihood import log_likelihoods as log_likelihoods
    from mambakit.evaluate.perplexity import Score as Score
    from mambakit.evaluate.perplexity import count_bytes as count_bytes
    from mambakit.evaluate.perplexity import score as score

_EXPORTS = {
    "Likelihood": "mambakit.evaluate.likelihood",
    "Score": "mambakit.evaluate.perplexity",
    "count_bytes": "mambakit.evaluate.perplexity",
    "log_likelihoods": "mambakit.evaluate.likelihood",
    "score": "mambakit.evaluate.perplexity",
}
__all__ = ["Likelihood", "Score", "count_bytes", "log_likelihoods", "score"]

__getattr__, __dir__ = attach(__name__, _EXPORTS)
