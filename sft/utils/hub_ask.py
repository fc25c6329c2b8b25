"""Whether the Hub has a repository: asked once, and within a limit that holds for all that a command asks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sft.utils.errors import UserError, first_line
from sft.utils.hub_cache import is_cached
from sft.utils.say import say

ASK_SECONDS = 10.0
"""How long one answer may take."""
SILENT_SECONDS = 60.0
"""How long a Hub that was found silent isn't asked again."""

log = logging.getLogger(__name__)


class UnreachableError(UserError):
    """The Hub would have to be asked, and can't be."""


def ask_hub(what: str, name: str, revision: str | None = None, *, dataset: bool = False) -> None:
    """Ask the Hub for a repository that isn't in the cache.

    Raises:
        UserError: when the answer is no; UnreachableError: where there is none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    ask = HfApi().dataset_info if dataset else HfApi().model_info
    try:
        ask(name, revision=revision, timeout=ASK_SECONDS)
    except RevisionNotFoundError as error:
        raise UserError(f"the {what} {name} has no revision {revision} on the Hub") from error
    except RepositoryNotFoundError as error:
        reason = f"no {what} called {name}: no such folder here, and the Hub has none, or it is private: set HF_TOKEN"
        raise UserError(reason) from error
    except HfHubHTTPError as error:  # the Hub's own trouble, which may be over when the run asks again
        log.info("%s: the Hub answers %s", name, first_line(error))
    except Exception as error:  # httpx's and huggingface_hub's, by its version
        raise UnreachableError(_unreachable(what, name, first_line(error))) from error


def _unreachable(what: str, name: str, why: str) -> str:
    folder = "files" if what == "data set" else "folder"
    return f"no {what} {folder} {name} here, nor in the cache, and the Hub can't be reached ({why})"


def answers(asks: Sequence[tuple[str, str, Callable[[], None]]], seconds: float) -> list[UserError | None]:
    """What became of questions (what, name, how it is asked), all asked at once: None for a yes.

    One without an answer after `seconds` is an UnreachableError: the name of a host may be looked up for minutes, which
    no client's own limit ends.
    """
    found: dict[int, UserError | None] = {}

    def ask(number: int, question: Callable[[], None]) -> None:
        try:
            question()
            found[number] = None
        except UserError as error:
            found[number] = error
        except Exception as error:
            what, name, _ = asks[number]
            found[number] = UserError(f"the {what} {name} can't be asked for: {first_line(error)}")

    threads = [threading.Thread(target=partial(ask, *pair), daemon=True) for pair in enumerate(q for *_, q in asks)]
    end = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late = f"no answer within {seconds:g} seconds"
    silent = [UnreachableError(_unreachable(what, name, late)) for what, name, _ in asks]
    return [found.get(number, silent[number]) for number in range(len(asks))]


@contextmanager
def hub_or_cache(name: str, revision: str | None = None) -> Iterator[None]:
    """Load a model or tokenizer in here: where the Hub can't be reached what is cached is taken at once. The libraries
    would try again and again for each file, half a minute each time, and say nothing."""
    from huggingface_hub import constants

    ask = not constants.HF_HUB_OFFLINE and not Path(name).exists() and is_cached(name, revision)
    if not ask or not _silent(name):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


_silent_at: list[float] = []
"""When the Hub was last found silent."""


def _silent(name: str) -> bool:
    if _silent_at and time.monotonic() - _silent_at[-1] < SILENT_SECONDS:
        return True
    (found,) = answers([("model", name, partial(ask_hub, "model", name))], ASK_SECONDS)
    if not isinstance(found, UnreachableError):
        return False
    _silent_at[:] = [time.monotonic()]
    say(f"{name}: the Hub can't be reached, so what is cached is taken")
    return True
