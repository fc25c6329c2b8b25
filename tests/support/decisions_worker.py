"""Every case of sft.utils.distributed on this rank: `python decisions_worker.py FOLDER`; what came out, as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from sft.run.lock import lock, lock_for_all
from sft.train.interrupt import Interrupted
from sft.utils import distributed
from sft.utils.distributed import barrier, check_shared_folder, decide, gather, is_main, rank, together, world_size
from sft.utils.errors import UsageError, UserError


class Odd(Exception):  # noqa: N818
    """An error that can't be made again from its arguments."""

    def __init__(self, first: str, second: int) -> None:
        super().__init__(f"{first} {second}")
        self.second = second


def failing(error: BaseException, ranks: tuple[int, ...] = (0,)) -> Callable[[], str]:
    def function() -> str:
        if rank() in ranks:
            raise error
        return "fine"

    return function


def local_class() -> BaseException:
    class HiddenError(Exception):
        pass

    return HiddenError("out of sight")


def outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except BaseException as error:
        kept = {key: value for key, value in error.__dict__.items() if isinstance(value, int | str)}
        return [type(error).__name__, str(error), kept]


def slow() -> str:
    if rank() == 0:
        time.sleep(2.5 * distributed.SLICE.total_seconds())
    return "slow"


def nested() -> list[str]:
    return [decide(lambda: "inner"), *gather("alone"), together(lambda: "own")]


def lock_of_a_dead_main(path: Path) -> str:
    """Whether rank 0, as another command would, gets the lock that rank 1 alone still holds."""
    with ExitStack() as held:
        held.enter_context(lock_for_all(path, "busy"))
        if rank() == 0:
            held.pop_all().close()
        barrier()
        try:
            with lock(path, "busy") if rank() == 0 else nullcontext():
                return "free"
        except UserError as error:
            return str(error)
        finally:
            barrier()


def lock_of_the_run_before(path: Path) -> str:
    """Whether rank 0 gets the lock of a run that it has left, and that a slower rank 1 has not."""
    for _ in range(2):
        with lock_for_all(path, "busy"):
            if rank() == 1:
                time.sleep(0.3)
    return "free"


def cases(folder: Path) -> dict[str, Callable[[], Any]]:
    calls: list[int] = []
    errors = [
        UserError("a user's"),
        UsageError("the recipe's"),
        Interrupted("stopped", 15),
        FileNotFoundError(2, "No such file"),
        Odd("odd", 3),
        KeyboardInterrupt(),
        local_class(),
    ]
    return {
        "size": lambda: [rank(), world_size(), is_main()],
        "value": lambda: decide(lambda: calls.append(rank()) or {"from": rank()}),
        "calls": lambda: calls,
        **{f"error {i}": lambda error=error: decide(failing(error)) for i, error in enumerate(errors)},
        "unpicklable": lambda: decide(lambda: open(os.devnull)),
        "slow": lambda: decide(slow),
        "nested": lambda: decide(nested),
        "gather": lambda: gather(f"of {rank()}"),
        "barrier": barrier,
        "together": lambda: together(lambda: f"of {rank()}"),
        "one fails": lambda: together(failing(UsageError("rank 1's"), ranks=(1,))),
        "both fail": lambda: together(failing(UserError(f"rank {rank()}'s"), ranks=(0, 1))),
        "shared": lambda: check_shared_folder(folder / "shared"),
        "not shared": lambda: check_shared_folder(folder / f"local-{rank()}"),
        "lock": lambda: lock_of_a_dead_main(folder / f"{world_size()}.lock"),
        "lock again": lambda: lock_of_the_run_before(folder / f"{world_size()}.lock"),
        "after all that": lambda: decide(lambda: "in step"),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.SEEN_WITHIN = 0.5
    results = {name: outcome(case) for name, case in cases(folder).items()}
    results["process group"] = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
    results["torch"] = "torch" in sys.modules
    results["left"] = sorted(path.name for path in folder.rglob(".shared-*"))
    (folder / f"{world_size()}-{rank()}.json").write_text(json.dumps(results, default=repr))
    barrier()


if __name__ == "__main__":
    main()
