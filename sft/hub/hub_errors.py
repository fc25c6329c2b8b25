"""What went wrong on the way to the Hub, in one sentence, without the token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sft.utils.errors import UserError, first_line
from sft.utils.secrets import scrub

LOG_IN = (
    "no Hugging Face token: run `hf auth login`, or set the environment variable HF_TOKEN to a token with write access "
    "(https://huggingface.co/settings/tokens)"
)
OFFLINE = "offline mode is on; unset HF_HUB_OFFLINE"


@contextmanager
def explained(doing: str, repo_id: str, endpoint: str, token: str | None) -> Iterator[None]:
    """Turn the Hub client's exceptions into a UserError that begins with `doing`.

    Errors in our own code (TypeError and the like) pass through: they are bugs, not news for the user.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error, repo_id, endpoint)
        if reason is None:
            raise
        # The original stays attached for --debug only where it can't hold the token.
        raw = f"{error}{error.__cause__}"
        cause = error if token is None or token not in raw else None
        raise UserError(scrub(f"{doing}: {reason}", token)) from cause


def _reason(error: BaseException, repo_id: str, endpoint: str) -> str | None:
    """Why, for an error of the client or of the network; None for any other."""
    from huggingface_hub import errors

    network_error = errors.HfHubHTTPError.__mro__[1]
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, errors.OfflineModeIsEnabled):
            return OFFLINE
        if isinstance(link, errors.HfHubHTTPError):
            return _http_reason(link, repo_id, endpoint)
        if isinstance(link, errors.HFValidationError):
            return f"{repo_id!r} is no valid repository name: {first_line(link)}"
    for link in chain:
        if isinstance(link, network_error | ConnectionError | TimeoutError):
            what = f"{type(link).__name__}: {first_line(link)}"
            return f"{endpoint} can't be reached or broke off ({what}); check the network"
    if isinstance(error, OSError) or _from_hub(error):
        return first_line(error)
    return None


def _http_reason(error: BaseException, repo_id: str, endpoint: str) -> str:
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    said = getattr(error, "server_message", None) or ""
    said = f" ({said.strip().splitlines()[0]})" if said.strip() else ""
    refused = response is not None and response.headers.get("X-Error-Message", "").startswith("Invalid credentials")
    if refused or (status == 401 and "whoami" in str(response.url if response is not None else "")):
        return f"{endpoint} refused the token (401); log in again with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repo_id} doesn't exist, or this token may not see it ({status})"
    reasons = {
        400: f"{endpoint} refused the request (400){said}",
        401: f"this token may not do that ({status}){said}; use a token with write access to {repo_id}",
        403: f"this token may not do that ({status}){said}; use a token with write access to {repo_id}",
        404: f"{endpoint} doesn't know this call or file (404){said}",
        412: f"{repo_id} was changed by someone else meanwhile (412)",
        413: f"the request is too large for {endpoint} (413)",
        429: f"{endpoint} asks for patience (429, too many requests); wait some minutes",
    }
    if status >= 500:
        return f"{endpoint} failed ({status}){said}"
    return reasons.get(status, f"{endpoint} answered {status}{said}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _from_hub(error: BaseException) -> bool:
    """Whether the exception was raised by the Hub's client or its storage library."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return str(module).split(".")[0] in ("huggingface_hub", "hf_xet", "httpx", "httpx2", "httpcore", "httpcore2")
