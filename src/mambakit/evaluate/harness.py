"""A model behind the interface of lm-evaluation-harness (`lm_eval` 0.4.13)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, warning_once
from tqdm import tqdm

from mambakit import __version__
from mambakit.data.tokenizer import Tokenizer
from mambakit.errors import ArgumentError
from mambakit.evaluate.likelihood import log_likelihoods
from mambakit.generate.engine import Engine
from mambakit.generate.options import SamplingOptions
from mambakit.generate.prefix_cache import PrefixCache
from mambakit.generate.request import Request
from mambakit.generate.tokenizer import check_tokenizer
from mambakit.models.language_model import MambaLanguageModel

PREFIX_BYTES = 2**28
"""Memory for states of what prompts begin with, such as examples that all of them share."""

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_log = logging.getLogger(__name__)


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval ships no types.
    """A model and its tokenizer, for the tasks of lm-evaluation-harness.

    The separator of documents stands in front of an empty context and of a text that is scored
    whole, as lm_eval does with models that have no other token for a beginning.

    Args:
        model: The model, on any device, in evaluation mode.
        tokenizer: The one that the model was trained with.
        batch_size: Most rows read, and most prompts continued, at once; see `log_likelihoods`.
        max_length: Most tokens read for a prediction. Of longer contexts the beginning is left out;
            longer texts are scored in windows, each from an empty state. Default: no limit, since the
            model has none.
        add_bos_token: Put the separator of documents in front of every context.

    Raises:
        ArgumentError: An argument is out of range, or the tokenizer does not fit the model.

    Example:
        >>> from lm_eval.api.instance import Instance
        >>> from mambakit import MambaConfig, MambaLanguageModel
        >>> from mambakit.data import load_tokenizer
        >>> model = MambaLanguageModel(MambaConfig(d_model=16, n_layer=2, vocab_size=257))
        >>> harness = HarnessModel(model, load_tokenizer("bytes"))
        >>> request = Instance("loglikelihood", {}, ("two and", " two"), 0)
        >>> [(log_prob, is_greedy)] = harness.loglikelihood([request], disable_tqdm=True)
        >>> log_prob < 0
        True
    """

    def __init__(
        self,
        model: MambaLanguageModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        add_bos_token: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ArgumentError(f"{name}: got {value}, wanted at least 1")
        check_tokenizer(tokenizer, model.config.vocab_size)
        self._model, self._tokenizer = model, tokenizer
        self._device = next(model.parameters()).device
        self.batch_size, self.max_length = batch_size, max_length
        self._add_bos = add_bos_token

    @property
    def eot_token_id(self) -> int:
        """The separator of documents."""
        return self._tokenizer.eos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text; with a separator in front if asked for, but never with two."""
        ids: list[int] = self._tokenizer.encode(string).tolist()
        wants_bos = self._add_bos if add_special_tokens is None else add_special_tokens
        return [self.eot_token_id, *ids] if wants_bos and ids[:1] != [self.eot_token_id] else ids

    def get_model_info(self) -> dict[str, Any]:
        """What is written beside the results."""
        return {
            "model_num_parameters": self._model.num_parameters(),
            "model_dtype": str(self._model.backbone.norm_f.weight.dtype),
            "max_length": self.max_length,
            "add_bos_token": self._add_bos,
            "mambakit_version": __version__,
        }

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm_eval has it: together, and cut after as many ids as the context alone has."""
        before, after = super()._encode_pair(context, continuation)
        if continuation and not after:  # It has melted into the last token of the context.
            after = self.tok_encode(continuation, add_special_tokens=False)
        return before, after

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Score (text of the pair or None, ids of context, ids of continuation)."""
        pairs = [
            # The last token is predicted, but not read.
            (self._end(context or [self.prefix_token_id], len(rest) - 1), rest)
            for _, context, rest in requests
        ]
        results: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), desc="Scoring", disable=disable_tqdm) as progress:
            for index, result in log_likelihoods(self._model, pairs, self.batch_size):
                results[index] = (result.log_prob, result.is_greedy)
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
                progress.update()
        return [results[index] for index in range(len(pairs))]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probabilities of whole texts, the first token after a separator of documents."""
        windows: list[tuple[None, list[int], list[int]]] = []
        ends = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            parts = get_rolling_token_windows(
                token_list=ids,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length or max(1, len(ids)),
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(part)) for part in parts]
            ends.append(len(windows))
        scores = [value for value, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        starts = [0, *ends]
        totals = [sum(scores[a:b], 0.0) for a, b in zip(starts, ends, strict=False)]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts, each up to a stop string, the end of the document or max_gen_toks."""
        made = [self._request(row, *request.args) for row, request in enumerate(requests)]
        engine = Engine(
            self._model,
            slots=min(self.batch_size, max(1, len(made))),
            tokenizer=self._tokenizer,
            prefix_cache=PrefixCache(PREFIX_BYTES),
        )
        handles = [engine.submit(request) for request in made]
        texts = []
        for request, handle in zip(
            requests, tqdm(handles, desc="Generating", disable=disable_tqdm), strict=True
        ):
            texts.append(handle.result().text)
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _request(self, row: int, context: str, options: dict[str, Any]) -> Request:
        kwargs = dict(normalize_gen_kwargs(options))
        most, until = kwargs.pop("max_gen_toks"), kwargs.pop("until")
        draws = kwargs.pop("do_sample")
        if kwargs.pop("num_beams", 1) != 1:
            raise ArgumentError("num_beams: there is no beam search; wanted 1")
        sampling = {name: kwargs.pop(name) for name in _SAMPLING if name in kwargs}
        if kwargs:
            raise ArgumentError(
                f"generation_kwargs: got {', '.join(kwargs)}, wanted no others than until, "
                f"max_gen_toks, do_sample, {', '.join(_SAMPLING)}"
            )
        if not draws:
            sampling["temperature"] = 0.0
        if not sampling.get("top_k", 1):
            sampling["top_k"] = None  # There 0 is off.
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return Request(
            prompt=self._end(ids, most),  # One token less than could be read, as lm_eval has it.
            options=SamplingOptions(**sampling),
            max_tokens=most,
            stop=[text for text in until if text],
            seed=row,
        )

    def _end(self, context: list[int], further: int) -> list[int]:
        """So much of the end of a context that with further tokens max_length are read."""
        if self.max_length is None:
            return context
        if further >= self.max_length:
            raise ArgumentError(
                f"max_length: got {self.max_length}, but a task needs {further} tokens after its "
                f"context; wanted at least {further + 1}"
            )
        room = self.max_length - further
        if len(context) > room:
            limit = self.max_length
            warning_once(_log, f"contexts are cut to their ends, for max_length is {limit}")
        return context[-room:]
