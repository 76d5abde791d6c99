"""Many conversations at a time: requests join the running batch and leave it between two tokens.

One thread prepares requests, one after the other: images are read, encoded and stitched in. Another runs the decoder:
a piece of one prompt, then one token for every sequence that has begun, again and again, so that neither a long prompt
nor an image keeps the others waiting for longer than a piece takes.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter

from ..errors import OneVisionError
from .constraint import Constraint
from .generation import Running, Timings, TokenLogprob
from .model import Generation, Model, Prepared, advance, generation_of
from .prompts import Messages
from .sampling import SamplingParams
from .slots import Slots
from .tokenizer import StreamDecoder

LOG = logging.getLogger(__name__)
PIECE = 256  # tokens of a prompt between two tokens of the others, at most
PIECE_SECONDS = 0.15  # that it may take while others wait for theirs
_LEAST = 32  # tokens of a piece


class QueueFullError(OneVisionError):
    """No request is taken now. retry_after: seconds after which there may be room."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting, which is all the queue holds: try again later")
        self.retry_after = retry_after


class ClosingError(OneVisionError):
    """No request is taken any more."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One conversation to answer. constraint: what its tokens have to follow; it stays as it is."""

    messages: Messages
    params: SamplingParams = field(default_factory=SamplingParams)
    min_pixels: int | None = None
    max_pixels: int | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became final, and the log-probabilities of the tokens behind it where they were asked for."""

    text: str
    logprobs: list[TokenLogprob]


@dataclass(frozen=True, slots=True)
class Finished:
    """The whole answer. queue_seconds: of its time to the first token, what was spent waiting."""

    generation: Generation
    queue_seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """Why there is no answer: an OneVisionError is the request's own fault."""

    error: Exception


Event = Piece | Finished | Failed


@dataclass(slots=True, eq=False)
class Ticket:
    """A request on its way."""

    request: ChatRequest
    listener: Callable[[Event], None]
    submitted: float
    cancelled: bool = False
    ended: bool = False
    prepared: Prepared | None = None
    sequence: Running | None = None
    decoder: StreamDecoder | None = None
    timings: Timings = field(default_factory=Timings)  # of prefill and decode
    waited: float = 0.0
    told: int = 0  # log-probabilities that were told

    def tell(self, event: Event) -> None:
        """Tell the listener, whose faults are its own."""
        self.ended = self.ended or not isinstance(event, Piece)
        if self.cancelled:
            return
        try:
            self.listener(event)
        except Exception:
            LOG.exception("a listener failed")


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """What is going on, and totals since the start."""

    running: int = 0
    waiting: int = 0
    slots: int = 0
    steps: int = 0
    decoded_tokens: int = 0  # in steps, so that their ratio is the mean batch
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    cached_image_tokens: int = 0
    generated_tokens: int = 0


class Scheduler:
    """Answers requests with a model that nobody else uses meanwhile. slots: sequences at a time; queue: that wait."""

    def __init__(self, model: Model, *, slots: int = 8, queue: int = 64, piece: int = PIECE) -> None:
        if min(slots, queue, piece) < 1:
            raise OneVisionError(f"slots ({slots}), queue ({queue}) and piece ({piece}) must be whole numbers from 1")
        self.model, self._queue, self._piece = model, queue, piece
        self._slots = Slots(model, slots)
        self._lock = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._ready: deque[Ticket] = deque()
        self._preparing = 0
        self._active: dict[int, Ticket] = {}
        self._prompts: deque[int] = deque()  # slots whose prompts are being read
        self._closing = self._stopped = False
        self._seconds = 1.0  # of a request, lately
        self._token_seconds = 0.0  # of a prompt's token, lately
        self._stats = SchedulerStats(slots=slots)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._prepare_all, self._run_all)]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def submit(self, request: ChatRequest, listener: Callable[[Event], None]) -> Ticket:
        """Queue a request. Raises QueueFullError or ClosingError.

        listener: told of every Piece and at last of Finished or Failed, in order, from the scheduler's threads, whom
        it must not keep waiting.
        """
        ticket = Ticket(request, listener, perf_counter())
        with self._lock:
            if self._closing:
                raise ClosingError("the server is shutting down: it takes no more requests")
            waiting = self._pending()
            if waiting >= self._queue:
                raise QueueFullError(waiting, max(1.0, self._seconds * waiting / self._slots.count))
            self._waiting.append(ticket)
            self._lock.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request: its listener is told no more, and its slot is free after the step under way."""
        with self._lock:
            if ticket.cancelled or ticket.ended:
                return
            ticket.cancelled = True
            self._count(cancelled=1)
            for queue in (self._waiting, self._ready):
                if ticket in queue:
                    queue.remove(ticket)
            self._lock.notify_all()

    def drain(self, seconds: float | None = None) -> bool:
        """Take no more requests, and wait for those in flight; whether all have ended."""
        with self._lock:
            self._closing = True
            return self._lock.wait_for(self._idle, seconds)

    def stop(self) -> None:
        """End the threads; requests in flight are told that they failed."""
        with self._lock:
            self._closing = self._stopped = True
            left = [*self._waiting, *self._ready]
            self._waiting.clear()
            self._ready.clear()
            self._lock.notify_all()
        for ticket in left:
            ticket.tell(Failed(ClosingError("the server was stopped before this request was answered")))
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    @property
    def stats(self) -> SchedulerStats:
        """What is going on now."""
        with self._lock:
            return replace(self._stats, running=len(self._active), waiting=self._pending())

    # The thread that prepares.

    def _prepare_all(self) -> None:
        while (ticket := self._next_to_prepare()) is not None:
            try:
                self._prepare(ticket)
            except Exception as error:
                self._fail(ticket, error)
            with self._lock:
                self._preparing -= 1
                if ticket.prepared is not None and not (ticket.cancelled or self._stopped):
                    self._ready.append(ticket)
                self._lock.notify_all()

    def _next_to_prepare(self) -> Ticket | None:
        """The request that has waited longest, once few enough are ready; None at the end."""
        with self._lock:
            self._lock.wait_for(lambda: self._stopped or (bool(self._waiting) and len(self._ready) < self._slots.count))
            if self._stopped:
                return None
            self._preparing += 1
            return self._waiting.popleft()

    def _prepare(self, ticket: Ticket) -> None:
        request, model = ticket.request, self.model
        processor = model.processor.with_pixels(request.min_pixels, request.max_pixels)
        prepared = model.prepared(request.messages, processor)
        assert model.tokenizer is not None  # or `prepared` had said so
        ticket.sequence = model.sequence(prepared.prompt, replace(request.params, speculate=0), request.constraint)
        ticket.decoder = StreamDecoder(model.tokenizer, request.params.stop)
        ticket.prepared = prepared

    # The thread that runs the decoder.

    def _run_all(self) -> None:
        while self._admit():
            try:
                self._step()
            except Exception as error:
                LOG.exception("a step failed")
                for slot in list(self._active):
                    self._end(slot, Failed(error))
        for slot in list(self._active):
            self._end(slot, Failed(ClosingError("the server was stopped before this request was answered")))

    def _admit(self) -> bool:
        """Give free slots to requests that are ready; waits where there is nothing to do. False at the end."""
        with self._lock:
            self._lock.wait_for(lambda: self._stopped or bool(self._active) or bool(self._ready))
            while self._ready and not self._stopped:
                sequence = self._ready[0].sequence
                assert sequence is not None
                slot = self._slots.take(sequence)
                if slot is None:
                    break
                self._active[slot] = self._ready.popleft()
                self._prompts.append(slot)
            self._lock.notify_all()
            return not self._stopped

    def _step(self) -> None:
        """A piece of one prompt, then a token for everyone who has begun."""
        for slot in [slot for slot, ticket in self._active.items() if ticket.cancelled]:
            self._end(slot, None)
        if self._prompts:
            self._read(self._prompts[0])
        begun = [slot for slot in self._active if slot not in self._prompts]
        if begun:
            started = perf_counter()
            self._slots.decode(begun)
            seconds = perf_counter() - started
            self._count(steps=1, decoded_tokens=len(begun))
            for slot in begun:
                self._active[slot].timings.decode += seconds
                self._tell(slot)

    def _read(self, slot: int) -> None:
        """A piece of a prompt; at its end, the first token."""
        ticket, started = self._active[slot], perf_counter()
        try:
            before = self._slots.sequences[slot].cached
            ended = self._slots.prefill(slot, self._tokens())
        except Exception as error:
            LOG.exception("a prompt could not be read")
            self._end(slot, Failed(error))
            return
        now = perf_counter()
        ticket.timings.prefill += now - started
        self._token_seconds = (now - started) / max(self._slots.sequences[slot].cached - before, 1)
        if ended:
            self._prompts.popleft()
            assert ticket.prepared is not None
            own = ticket.prepared.timings.time_to_first_token + ticket.timings.prefill
            ticket.waited = max(now - ticket.submitted - own, 0.0)
            self._tell(slot)

    def _tokens(self) -> int:
        """How many tokens of a prompt are read at once: as many as PIECE_SECONDS allow where others wait."""
        waiting = len(self._active) > len(self._prompts)
        if not (waiting and self._token_seconds):
            return self._piece
        fitting = int(PIECE_SECONDS / self._token_seconds) // _LEAST * _LEAST
        return min(self._piece, max(_LEAST, fitting))

    def _tell(self, slot: int) -> None:
        """What a slot's newest token made final, and the answer where it was the last."""
        ticket = self._active[slot]
        sequence, decoder = ticket.sequence, ticket.decoder
        assert sequence is not None
        assert decoder is not None
        assert ticket.prepared is not None
        if sequence.fault is not None:
            self._end(slot, Failed(sequence.fault))
            return
        text, finished = advance(sequence, decoder), sequence.finish_reason is not None
        if finished:
            text += decoder.finish()
        logprobs = sequence.logprobs[ticket.told :]
        if text or logprobs:
            ticket.told += len(logprobs)
            ticket.tell(Piece(text, logprobs))
        if finished:
            answer = generation_of(sequence, decoder.text, ticket.prepared, ticket.timings)
            self._end(slot, Finished(answer, ticket.waited))

    def _end(self, slot: int, event: Finished | Failed | None) -> None:
        """Free a slot. event: what its request is told, None for a cancelled one."""
        ticket = self._active[slot]
        if event is not None:
            ticket.tell(event)
        with self._lock:
            del self._active[slot]
            if slot in self._prompts:
                self._prompts.remove(slot)
            self._slots.leave(slot)
            if isinstance(event, Finished):
                self._finished(event.generation, perf_counter() - ticket.submitted)
            elif event is not None:
                self._count(failed=1)
            self._lock.notify_all()

    def _finished(self, answer: Generation, seconds: float) -> None:
        self._seconds += 0.1 * (seconds - self._seconds)
        self._count(
            finished=1,
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            image_tokens=answer.image_tokens,
            cached_image_tokens=answer.cached_image_tokens,
            generated_tokens=len(answer.token_ids),
        )

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if not isinstance(error, OneVisionError):
            LOG.error("a request could not be prepared", exc_info=error)
        self._count(failed=0 if ticket.cancelled else 1)
        ticket.tell(Failed(error))

    def _pending(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting) + len(self._ready) + self._preparing

    def _idle(self) -> bool:
        return not (self._pending() or self._active)

    def _count(self, **more: int) -> None:
        """Add to the totals, which both threads and callers do."""
        with self._lock:
            self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})
