"""What a client is told when it gets no answer: the API's form of errors."""

from __future__ import annotations

from typing import Any

from sft.utils.errors import shown

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}
_LONGEST = 500


class ApiError(Exception):
    """A request that gets an error: HTTP status, a sentence, and by name what of the request it is about.

    Attributes:
        retry_after: seconds after which it may be asked again.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        # A client's own words stand in some messages: however long, and whatever characters they have.
        message = shown(str(self)[:_LONGEST])
        param = None if self.param is None else shown(self.param[:100])
        kind = _KINDS.get(self.status, "api_error")
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the response."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return {**headers, "WWW-Authenticate": "Bearer"} if self.status == 401 else headers
