"""Many requests at once on one model: they come and go at any step."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType

import torch

from mambakit.errors import ArgumentError
from mambakit.generate.decoding import Chosen
from mambakit.generate.delivery import Delivery
from mambakit.generate.handle import Handle
from mambakit.generate.memory import prepare
from mambakit.generate.prefix import fingerprint
from mambakit.generate.prefix_cache import PrefixCache
from mambakit.generate.reading import Reader, on_its_way
from mambakit.generate.request import Completion, Output, Request, token_ids
from mambakit.generate.task import Task
from mambakit.generate.tokenizer import Tokenizer, check_tokenizer
from mambakit.models.language_model import MambaLanguageModel

CHUNK, CPU_CHUNK = 512, 128
"""Tokens read at once by default, while the others wait. In pieces of 128 the 130M model reads a prompt on one
core a tenth slower than in pieces of 256."""

FOLLOW_SECONDS = 0.01
"""After so long a client that waits looks whether the one that steps the engine has left."""


class Engine:
    """Continues many prompts together, each as it would be continued alone.

    A step of the engine adds one token to every request that is being continued, then reads on in
    the prompts that wait, at most `chunk` tokens, taking turns: a long prompt stalls neither the
    requests under way nor shorter prompts. On the CPU the tokens of a request are, bit for bit, those
    that it would get alone (float32 and bfloat16); on a GPU with `batch_invariant`, else up to the
    rounding of sums, which may depend on the size of the batch.

    Requests can be submitted and cancelled from any thread. Who waits for one steps the engine,
    or a background thread does: between `start` and `stop`, or in a `with` block.

    On a GPU the host is one step behind the device: it reads the tokens of a step while the next one
    runs, and lets go of what that computed in vain for a request that has ended. The model's weights
    must not be replaced meanwhile.

    Args:
        model: The model, on any device.
        slots: Most requests that are continued at once; memory for their states is taken at once.
        tokenizer: For prompts of text, stop strings and pieces of text. Default: none.
        chunk: Most tokens of prompts read in a step. Default: 512; on the CPU 128, since the others
            wait meanwhile.
        prefix_cache: Where states of beginnings of prompts are left and looked for. Default: none.
        cuda_graphs: On a GPU, whether a step is a CUDA graph, captured here; if not, it is launched
            operation by operation.
        prompt_graphs: The same for the reading of chunks, which pays from some dozens of prompts on. Default:
            as `cuda_graphs`.
        batch_invariant: On a GPU, whether a request gets the same logits, bit for bit, whatever else is
            in the batch. Steps then have kernels in common, if need be by working on free rows: in half
            precision on Hopper an engine of up to 8 slots steps at least 2 rows, one of 16 to 128 at
            least 16, and any other always all.

    Raises:
        ArgumentError: An argument is out of range, or so many slots do not fit into the memory;
            then the message says how many do.

    Example:
        >>> from mambakit import MambaConfig, MambaLanguageModel
        >>> from mambakit.generate import Engine, Request, SamplingOptions
        >>> model = MambaLanguageModel(MambaConfig(d_model=16, n_layer=2, vocab_size=8))
        >>> engine = Engine(model, slots=2)
        >>> greedy = SamplingOptions(temperature=0)
        >>> requests = [Request(prompt=[1] * n, options=greedy, max_tokens=n) for n in (3, 1, 2)]
        >>> [len(done.tokens) for done in engine.generate(requests)]
        [3, 1, 2]
    """

    def __init__(
        self,
        model: MambaLanguageModel,
        *,
        slots: int = 8,
        tokenizer: Tokenizer | None = None,
        chunk: int | None = None,
        prefix_cache: PrefixCache | None = None,
        cuda_graphs: bool = True,
        prompt_graphs: bool | None = None,
        batch_invariant: bool = False,
    ) -> None:
        for name, value in (("slots", slots), ("chunk", chunk)):
            if value is not None and value < 1:
                raise ArgumentError(f"{name}: got {value}, wanted at least 1")
        self._vocab_size = model.config.vocab_size
        if tokenizer is not None:
            check_tokenizer(tokenizer, self._vocab_size)
        self._model, self._tokenizer, self._size = model, tokenizer, slots
        self._mark = "" if prefix_cache is None else fingerprint(model)
        self._device = model.initial_state(1).layers[0].ssm_state.device
        chunk = chunk or (CPU_CHUNK if self._device.type == "cpu" else CHUNK)
        with self._on_device():
            prompts = cuda_graphs if prompt_graphs is None else prompt_graphs
            read_chunk, self._decoder = prepare(
                model,
                slots,
                chunk,
                self._device,
                steps=cuda_graphs,
                prompts=prompts,
                batch_invariant=batch_invariant,
            )

        self._arrivals: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._reader = Reader(read_chunk, chunk, prefix_cache, self._mark)
        self._writing: list[Task] = []  # In the order of their rows.
        self._under_way: list[Task] = []  # All that have not ended.
        self._deliveries: deque[Delivery] = deque()
        self._lag = 1 if self._device.type == "cuda" else 0
        self._steps = 0
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._stopping = False

    def submit(self, request: Request) -> Handle:
        """Queue a request, from any thread.

        Raises:
            ArgumentError: The request does not fit the model or needs a tokenizer.
        """
        task = Task(request, self._ids(request), self._vocab_size, self._tokenizer)
        if request.prefix is not None:
            self._mark = self._mark or fingerprint(self._model)
            request.prefix.check_model(self._mark)
        self._arrivals.put(task)
        self._wake.set()
        return Handle(task, self._advance)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Continue requests and wait for all of them.

        A Ctrl-C while it waits, or a call of `stop`, ends them: then this returns what there is.

        Raises:
            ArgumentError: A request does not fit; then none has been started.
        """
        handles = [self.submit(request) for request in requests]
        try:
            return [handle.result() for handle in handles]
        except KeyboardInterrupt:
            for handle in handles:
                handle.cancel()
            return [handle.result() for handle in handles]

    @property
    def free_slots(self) -> int:
        """How many more requests the next step could take in."""
        with self._lock:
            under_way = [*self._reader.reading, *self._writing]
        taken = (not task.cancelled and task.finish_reason is None for task in under_way)
        return self._size - sum(taken)

    @torch.no_grad()
    def step(self) -> bool:
        """Add a token to every request under way, and read some of a prompt; from any thread.

        Returns:
            Whether there is more to do.

        Raises:
            Exception: Whatever goes wrong; it ends all requests under way, whose handles raise it too.
        """
        with self._lock, self._on_device():
            try:
                self._steps += 1
                self._let_go()
                self._write()
                self._hand_out(self._steps - self._lag)
                self._read()
                is_busy = self._writing or self._reader.reading
                self._hand_out(self._steps - self._lag if is_busy else self._steps)
            except BaseException as error:
                self._end_all(error if isinstance(error, Exception) else None)
                raise
            queued = self._reader.waiting or is_busy or self._deliveries
            return bool(queued) or not self._arrivals.empty()

    def start(self) -> None:
        """Let a background thread step whenever there is something to do."""
        with self._lock:
            if self._thread is None:
                self._stopping = False
                self._thread = threading.Thread(
                    target=self._run, name="mambakit-engine", daemon=True
                )
                self._thread.start()

    def stop(self) -> None:
        """End all requests with what they have, and the background thread; from any other thread."""
        self._stopping = True
        self._wake.set()
        thread = self._thread
        if thread is not None:
            thread.join()
        with self._lock:
            self._thread = None
            self._end_all(None)

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._stopping:
            with contextlib.suppress(Exception):  # The handles raise it.
                if self.step():
                    continue
                self._wake.wait()
                self._wake.clear()

    def _advance(self, task: Task) -> Output | None:
        """The next output of a task; None at its end."""
        while True:
            if self._thread is not None:
                return task.outputs.get()
            with contextlib.suppress(queue.Empty):
                return task.outputs.get_nowait()
            if self._lock.acquire(blocking=False):
                try:
                    self.step()
                finally:
                    self._lock.release()
            else:  # Another client steps, for all of them.
                with contextlib.suppress(queue.Empty):
                    return task.outputs.get(timeout=FOLLOW_SECONDS)

    def _let_go(self) -> None:
        """Take in what was submitted; give up what was cancelled or has ended."""
        self._take_in()
        self._under_way = [task for task in self._under_way if task.finish_reason is None]
        for queued in (self._reader.waiting, self._reader.reading):
            for task in [task for task in queued if task.cancelled]:
                task.finish("cancelled")
                queued.remove(task)
        for task in [task for task in self._writing if task.cancelled or task.finish_reason]:
            task.finish("cancelled")
            self._leave(task)

    def _take_in(self) -> None:
        while not self._arrivals.empty():
            self._under_way.append(self._arrivals.get())
            self._reader.waiting.append(self._under_way[-1])

    def _write(self) -> None:
        """Launch a token for every request whose prompt is read."""
        if self._writing:
            chosen = self._decoder.step(max(task.method for task in self._writing))
            self._launched(self._writing, chosen)

    def _read(self) -> None:
        """Read on in prompts; a request whose prompt is read takes a slot and its first token."""
        for task, logits in self._reader.read(self._size - len(self._writing)):
            assert task.state is not None
            seen = task.seen
            seen = None if seen is None else on_its_way(seen, self._device)
            task.row = self._decoder.slots.join(task.state, task.sampling, seen)
            task.state = None
            self._writing.append(task)
            self._launched([task], self._decoder.first(task.row, logits, task.method))

    def _launched(self, tasks: Sequence[Task], chosen: Chosen) -> None:
        """Note what is on its way; who gets the last token now needs no slot any more."""
        self._deliveries.append(Delivery(tasks, chosen, self._steps))
        for task in list(tasks):
            task.launched += 1
            if task.launched == task.request.max_tokens:
                self._leave(task)

    def _hand_out(self, until: int) -> None:
        """Give the tasks what was launched in the steps up to `until`."""
        while self._deliveries and self._deliveries[0].step <= until:
            self._deliveries.popleft().hand_out()

    def _leave(self, task: Task) -> None:
        last = self._writing.pop()
        if last is not task:
            self._writing[task.row] = last
            last.row = task.row
        self._decoder.slots.leave(task.row)

    def _end_all(self, error: Exception | None) -> None:
        self._take_in()
        for task in self._under_way:
            task.finish("cancelled", error)
        self._reader.clear()
        self._writing.clear()
        self._deliveries.clear()
        self._decoder.slots.taken = 0

    def _ids(self, request: Request) -> list[int]:
        if self._tokenizer is None:
            if isinstance(request.prompt, str) or request.stop:
                raise ArgumentError(
                    "prompt and stop: got text, wanted token ids and stop_ids; "
                    "for text give the engine a tokenizer"
                )
            return token_ids("prompt", request.prompt, self._vocab_size)
        if isinstance(request.prompt, str):
            return list(self._tokenizer.encode(request.prompt)) or [self._tokenizer.eos_id]
        return token_ids("prompt", request.prompt, self._vocab_size)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        return torch.cuda.device(self._device)
