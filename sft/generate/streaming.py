"""Answers as they come: from an engine in this thread, or from one that a thread of its own runs for many askers."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from sft.generate.engine import Engine, evaluating
from sft.generate.requests import Generation, Request, TokenLogprobs
from sft.generate.sampling import SamplingParams
from sft.utils.errors import UserError

STOPPED = "The engine has stopped."

Prompt = tuple[Sequence[int], int]
"""Token ids, and the number by which random numbers are drawn."""


@dataclass(frozen=True)
class Piece:
    """What an answer has grown by: tokens without an end token, their log-probabilities if asked for, and at its end
    the whole of it."""

    ids: list[int]
    logprobs: list[TokenLogprobs]
    end: Generation | None = None


def grown(request: Request, sent: int) -> Piece | None:
    """What there is of an answer behind its first `sent` tokens; None where nothing is new."""
    end = request.generation() if request.done else None
    ids = (request.ids if end is None else end.ids)[sent:]
    if end is None and not ids:
        return None
    logprobs = request.logprobs if end is None else end.logprobs or []
    return Piece(ids, logprobs[sent:], end)


def stream(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> Iterator[Piece]:
    """One answer, a piece after each step of the engine; who stops asking stops it."""
    request = engine.request(0, 0, prompt, params)
    batch, queue, sent = engine.batch(request.longest), deque([request]), 0
    while not request.done:
        with evaluating(engine.model):
            batch.step(queue)
        piece = grown(request, sent)
        if piece is not None:
            sent += len(piece.ids)
            yield piece


class Answers:
    """Answers that were asked for together, as they come; leaving the context gives up those that aren't done.

    Belongs to the event loop in which it was made.
    """

    def __init__(self, front: AsyncEngine, requests: list[Request]) -> None:
        self._front, self.requests = front, requests
        self.loop = asyncio.get_running_loop()
        self.sent = [0] * len(requests)  # of the engine's thread
        self._open = set(range(len(requests)))
        self._new: list[tuple[int, Piece]] = []
        self._event = asyncio.Event()
        self._error: BaseException | None = None

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *raised: object) -> None:
        self._front.leave(self, [self.requests[position] for position in self._open])

    @property
    def open(self) -> int:
        """How many aren't done."""
        return len(self._open)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(position, what its answer has grown by), until all are done.

        Raises:
            UserError: what the engine failed with, or that it stops.
        """
        while True:
            await self._event.wait()  # bounded: by whoever asks; and the engine tells its own end
            self._event.clear()
            new, self._new = self._new, []
            for position, piece in _joined(new):
                yield position, piece
            if self._error is not None:
                raise self._error
            if not self._open:
                return

    def put(self, new: list[tuple[int, Piece]], error: BaseException | None) -> None:
        """What the engine tells, in the event loop."""
        self._new += new
        self._error = error
        self._open.difference_update(position for position, piece in new if piece.end is not None)
        self._event.set()


def _joined(new: list[tuple[int, Piece]]) -> list[tuple[int, Piece]]:
    """One piece for each answer: who reads slower than the engine writes gets larger ones."""
    found: dict[int, Piece] = {}
    for position, piece in new:
        before = found.get(position)
        found[position] = (
            piece if before is None else Piece(before.ids + piece.ids, before.logprobs + piece.logprobs, piece.end)
        )
    return list(found.items())


class AsyncEngine:
    """An engine for the clients of an event loop; one thread runs it, as long as there is something to do.

    Args:
        longest: tokens that a prompt and its answer may come to.

    Raises:
        UserError: there is no memory for a prompt and an answer of that length.
    """

    def __init__(self, engine: Engine, *, longest: int) -> None:
        self.engine, self.longest = engine, longest
        self.failed: BaseException | None = None
        self._batch = engine.batch(longest)
        self._queue: deque[Request] = deque()
        self._owner: dict[Request, tuple[Answers, int]] = {}
        self._inbox: list[Answers] = []
        self._left: list[Request] = []
        self._under_way: set[Answers] = set()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Answers that were asked for and are neither done nor given up."""
        return sum(answers.open for answers in self._under_way)

    @property
    def live(self) -> int:
        """Answers that have a slot."""
        return self._batch.live

    @property
    def pages(self) -> tuple[int, int]:
        """Pages of keys and values that are in use, and all of them; (0, 0) for a cache without pages."""
        return self._batch.pages

    def submit(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> Answers:
        """Ask for an answer to each prompt. Equal ones that follow each other are read once.

        Raises:
            UsageError: an empty prompt, or one that with its answer is longer than `longest`.
            UserError: tokens outside the model's vocabulary; the engine doesn't run any more.
        """
        made = [
            self.engine.request(position, number, prompt, mine)
            for position, ((prompt, number), mine) in enumerate(zip(prompts, params, strict=True))
        ]
        if beyond := [request for request in made if not request.most or request.longest > self.longest]:
            raise ValueError(f"{beyond[0].longest} tokens of prompt and answer, of at most {self.longest}")
        answers = Answers(self, made)
        with self._wake:
            if self.failed is not None or self._closing:
                raise UserError(STOPPED) from self.failed
            self._under_way.add(answers)
            self._inbox.append(answers)
            self._wake.notify()
        return answers

    def leave(self, answers: Answers, unfinished: list[Request]) -> None:
        """Nobody waits for these any more: what they hold of the engine is free after its present step."""
        self._under_way.discard(answers)
        with self._wake:
            self._left += unfinished
            self._wake.notify()

    def close(self, timeout: float = 60.0) -> bool:
        """Stop: what isn't done fails. Whether the engine's thread has ended within `timeout` seconds."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # ---- in the engine's thread ----

    def _run(self) -> None:
        try:
            with evaluating(self.engine.model):
                while self._next():
                    try:
                        self._batch.step(self._queue)
                        self._tell()
                    except Exception as error:
                        self._start_again(error)
        except BaseException as error:
            self.failed = error
            raise
        finally:
            self._fail(UserError(STOPPED))

    def _next(self) -> bool:
        """Wait for something to do; take in who came, and let go who left. False: it is over."""
        with self._wake:
            self._wake.wait_for(self._something)
            new, self._inbox, left, self._left = self._inbox, [], self._left, []
        for answers in new:
            self._queue.extend(answers.requests)
            self._owner.update((request, (answers, place)) for place, request in enumerate(answers.requests))
        for request in left:
            if self._owner.pop(request, None) is None:
                continue  # done meanwhile, or failed
            if request in self._queue:
                self._queue.remove(request)
            else:
                self._batch.drop(request)
        return not self._closing and self.failed is None

    def _something(self) -> bool:
        return bool(self._inbox or self._left or self._queue or self._batch.rows or self._closing)

    def _tell(self) -> None:
        """Hand what each answer has grown by to those who wait for it."""
        news: dict[Answers, list[tuple[int, Piece]]] = {}
        for request, (answers, place) in list(self._owner.items()):
            piece = grown(request, answers.sent[place])
            if piece is None:
                continue
            answers.sent[place] += len(piece.ids)
            news.setdefault(answers, []).append((place, piece))
            if piece.end is not None:
                del self._owner[request]
        for answers, new in news.items():
            _in_loop(answers, new, None)

    def _start_again(self, error: Exception) -> None:
        """All that was under way fails with `error`; the engine goes on with an empty batch."""
        self._fail(error)
        try:
            self._batch = self.engine.batch(self.longest)
        except Exception as again:
            self.failed = again

    def _fail(self, error: BaseException) -> None:
        with self._wake:
            new, self._inbox = self._inbox, []
        waiting = {answers for answers, _ in self._owner.values()} | set(new)
        self._owner.clear()
        self._queue.clear()
        for answers in waiting:
            _in_loop(answers, [], error)


def _in_loop(answers: Answers, new: list[tuple[int, Piece]], error: BaseException | None) -> None:
    if not answers.loop.is_closed():
        answers.loop.call_soon_threadsafe(answers.put, new, error)
