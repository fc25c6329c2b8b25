"""The processes of a run: one, or those that a launcher started. Rank 0 decides, and the others do as it says.

What one rank finds on a disk another may not find, or not yet; two ranks that go different ways wait for each other for
ever. So rank 0 alone looks, and its answer (or its error) goes to all. Messages go through the launcher's key-value
store: it needs no process group, so that a stage can end its own; no collective's time-out runs while rank 0 prepares
data for hours; and signals are heard while waiting.
"""

from __future__ import annotations

import functools
import os
import pickle
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from sft.utils.errors import UserError

WAIT = timedelta(hours=24)
"""How long ranks wait for each other; rank 0 alone prepares data, which may take hours."""

SLICE = timedelta(seconds=2)
"""A wait is cut into these, because signals are heard between them only."""

SEEN_WITHIN = 5.0
"""Seconds that a shared file system may take to show a new file on another node."""

Result = TypeVar("Result")


OF_NODES = ("MASTER_ADDR", "NODE_RANK", "NNODES")
"""Variables that a cluster sets for its nodes, and a launcher for the processes that it starts."""


def is_launched() -> bool:
    """Whether RANK and WORLD_SIZE, where they are set, are this process's. Where a cluster has set them for a node
    (sft.run.placement), without a LOCAL_RANK, this process is alone until it starts some."""
    if "LOCAL_RANK" in os.environ or not any(name in os.environ for name in OF_NODES):
        return True
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and bool(torch.distributed.is_initialized())


def rank() -> int:
    """This process's number among all of the run, from 0."""
    return int(os.environ.get("RANK", "0")) if is_launched() else 0


def world_size() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1")) if is_launched() else 1


def beside() -> int:
    """How many processes of the run are at work on this machine now."""
    return 1 if is_alone() else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_alone() -> bool:
    """Whether this process acts for itself: it is the only one, or the others wait for what it decides."""
    return world_size() == 1 or _Channel.deciding


def is_main() -> bool:
    """Whether this is rank 0, which alone decides, writes and speaks."""
    return rank() == 0


def decide(function: Callable[[], Result]) -> Result:
    """What `function` returns on rank 0, on every rank; the others don't run it.

    With several processes the result has to be picklable. An error of rank 0 is raised on every rank, with its type,
    message and attributes, and `from_rank` = 0 beside them. Every rank must come here as often as all others; calls
    inside `function` are part of it. Raises UserError when rank 0 doesn't answer within WAIT, or is lost.
    """
    if is_alone():
        return function()
    _refuse_lost({0})
    channel = _channel()
    key = channel.next_key()
    if is_main():
        _Channel.deciding = True
        try:
            outcome: Any = (function(), None)
            message = pickle.dumps(outcome)
        except BaseException as error:
            channel.store.set(key, pickle.dumps((None, _portable(error))))
            raise
        finally:
            _Channel.deciding = False
        channel.store.set(key, message)
        return outcome[0]
    result, failure = channel.read(key, of=0)
    if failure is not None:
        raise _rebuilt(failure, of=0)
    return result


def gather(value: Result) -> list[Result]:
    """The `value` of every rank, by rank, on every rank.

    Raises UserError when one doesn't answer within WAIT, or is lost.
    """
    if is_alone():
        return [value]
    _refuse_lost(range(world_size()))
    return list(_of_the_living(value).values())


def _of_the_living(value: Result) -> dict[int, Result]:
    channel = _channel()
    key = channel.next_key()
    channel.store.set(f"{key}/{rank()}", pickle.dumps(value))
    living = [other for other in range(world_size()) if other not in _Channel.lost]
    return {other: channel.read(f"{key}/{other}", of=other) for other in living}


def together(function: Callable[[], Result]) -> Result:
    """What `function` returns here, once it has run on all; where one fails all raise (their own error first). Those
    that are lost are left out."""
    if is_alone():
        return function()
    _refuse_lost({0})
    try:
        result, failure = function(), None
    except BaseException as error:
        _of_the_living(_portable(error))
        raise
    for other, found in _of_the_living(failure).items():
        if found is not None:
            raise _rebuilt(found, of=other)
    return result


def barrier() -> None:
    """Go on when every rank has come here."""
    gather(None)


def lose(ranks: Iterable[int]) -> None:
    """Go on without ranks that have died: all that are left call this alike. What needs every rank raises UserError
    from now on, where it would wait for them."""
    _Channel.lost |= set(ranks)


def lost_ranks() -> frozenset[int]:
    """The ranks that have died, as far as that was told to `lose`."""
    return frozenset(_Channel.lost)


def _refuse_lost(needed: Iterable[int]) -> None:
    if gone := sorted(_Channel.lost.intersection(needed)):
        named = f"rank {gone[0]} has" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))} have"
        error = UserError(f"The processes can't go on: {named} died. Start all again; the same command continues.")
        if 0 not in _Channel.lost:
            error.__dict__["from_rank"] = 0  # every rank says so: the main one tells it
        raise error


@contextmanager
def alike() -> Iterator[None]:
    """For what all ranks find alike, such as a wrong word of their command: rank 0 alone is to tell it."""
    try:
        yield
    except UserError as error:
        error.__dict__.setdefault("from_rank", 0)
        raise


def check_shared_folder(path: str | os.PathLike[str]) -> None:
    """Raise UserError on every rank when one doesn't see what rank 0 writes to the folder `path` (made if needed)."""
    if world_size() == 1:
        return
    folder = Path(path)

    def leave_a_file() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        name = f".shared-{secrets.token_hex(8)}"
        (folder / name).touch()
        return name

    name = decide(leave_a_file)
    answers = gather((socket.gethostname(), _appears(folder, name)))
    if is_main():
        (folder / name).unlink(missing_ok=True)
    blind = [(number, host) for number, (host, seen) in enumerate(answers) if not seen]
    if blind:
        raise UserError(
            f"{folder} isn't shared between the nodes: rank {blind[0][0]} on {blind[0][1]} doesn't see what rank 0 on "
            f"{answers[0][0]} writes there. Set output_dir (and prepared_dir) to a folder that every node mounts."
        )


def _appears(folder: Path, name: str) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN
    while time.monotonic() < deadline:
        # A listing, not a look at the one name: network file systems remember for a while that a name wasn't there.
        if folder.is_dir() and name in os.listdir(folder):
            return True
        time.sleep(0.2)
    return False


class _Channel:
    """Numbered messages in the launcher's store; all ranks count alike."""

    deciding = False
    lost: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        from torch.distributed import PrefixStore, rendezvous

        store, _, _ = next(rendezvous("env://"))
        self.store: Any = PrefixStore(f"sft/{_name_of_start(PrefixStore('sft', store))}", store)
        self.count = 0

    def next_key(self) -> str:
        self.count += 1
        return str(self.count)

    def read(self, key: str, *, of: int) -> Any:
        return pickle.loads(_read(self.store, key, of=of))


def _read(store: Any, key: str, *, of: int) -> bytes:
    """What rank `of` writes there, once it does. Raises UserError after WAIT."""
    from torch.distributed import DistStoreError

    deadline = time.monotonic() + WAIT.total_seconds()
    while True:
        try:
            store.wait([key], SLICE)
            return bytes(store.get(key))
        except DistStoreError as error:
            if time.monotonic() > deadline:
                raise _unanswered(of) from error


def _unanswered(of: int) -> UserError:
    return UserError(f"Rank {of} hasn't answered rank {rank()} for {WAIT}: see its output.")


def _name_of_start(store: Any) -> str:
    """A name that the processes which were started together agree on, and none that were before.

    A launcher that starts its processes again (torchrun, --max_restarts) keeps its store, and what was written there: a
    rank would take an old decision for today's. So each asks with a word of its own, which rank 0 answers.
    """
    own = secrets.token_hex(8)
    if not is_main():
        store.set(f"asked/{rank()}", own)
        name = _read(store, f"answered/{own}", of=0).decode()
        store.set(f"here/{name}/{rank()}", "")
        return name
    waited_for, pause = list(range(1, world_size())), 0.01
    deadline = time.monotonic() + WAIT.total_seconds()
    while waited_for := [other for other in waited_for if not store.check([f"here/{own}/{other}"])]:
        if time.monotonic() > deadline:
            raise _unanswered(waited_for[0])
        for other in waited_for:
            if store.check([f"asked/{other}"]):  # by that rank of today, or by the one before it
                store.set(f"answered/{store.get(f'asked/{other}').decode()}", own)
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    return own


def store_of_group() -> Any:
    """Where the processes find each other for a process group that is begun now, on all of them: without the addresses
    of the group before it, which torch leaves in the launcher's store."""
    from torch.distributed import PrefixStore

    channel = _channel()
    return PrefixStore(f"group/{channel.next_key()}", channel.store)


@functools.cache
def _channel() -> _Channel:
    return _Channel()


def _portable(error: BaseException) -> tuple[Any, ...]:
    """An error as plain values; of one whose class or content doesn't travel, the type's name and the message."""
    try:
        # Not pickled as it is: many errors can't be made again from their `args`.
        parts = (type(error), error.args, error.__dict__)
        pickle.loads(pickle.dumps(parts))
        return parts
    except Exception:
        return (RuntimeError, (f"{type(error).__name__}: {error}",), {})


def _rebuilt(parts: tuple[Any, ...], *, of: int) -> BaseException:
    kind, args, attributes = parts
    error: BaseException = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes, from_rank=of)
    return error
