"""Asking through the journal: what was answered before isn't asked again, and too many failures end it all."""

from __future__ import annotations

from typing import Protocol

from sft.data.steps.generate.answer import Answer, Request
from sft.data.steps.generate.client import Client, RequestFailedError
from sft.data.steps.generate.journal import Journal
from sft.utils.errors import UserError

FEW = 20  # requests from which a share of failures is taken seriously


class Answerer(Protocol):
    """Who answers requests."""

    async def ask(self, request: Request) -> Answer:
        """The answer. Raises RequestFailedError when there is none, UserError when all must end."""


class FailureLimit:
    """Stops the run when more than a share of its requests fail for good."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.ended = self.failed = 0

    def answered(self) -> None:
        """Count a request that was answered."""
        self.ended += 1

    def failure(self, where: str, why: str) -> None:
        """Count one that failed. Raises UserError when it is one too many."""
        self.ended += 1
        self.failed += 1
        if self.failed > self.share * max(self.ended, FEW):
            raise UserError(
                f"{self.failed} of {self.ended} requests to {where} failed, more than max_failed ({self.share:.0%}) "
                f"allows; the last one: {why.rstrip('.')}. Answers that came are kept: run again when the server is "
                "well, or raise max_failed."
            )


class Desk:
    """An endpoint, asked through the journal."""

    def __init__(self, client: Client, journal: Journal, limit: FailureLimit) -> None:
        self._client, self._journal, self._limit = client, journal, limit
        self._failed: dict[str, RequestFailedError] = {}

    @property
    def concurrency(self) -> int:
        """How many requests the endpoint takes at once."""
        return self._client.endpoint.concurrency

    async def ask(self, request: Request) -> Answer:
        """The journaled answer, else the endpoint's, which is journaled before anything else happens.

        A request that failed fails again without being sent, until `forget_failures`.
        """
        known = self._journal.get(request)
        if known is not None:
            return known
        if request.key in self._failed:
            raise self._failed[request.key]
        try:
            answer, retries = await self._client.ask(request)
        except RequestFailedError as error:
            self._failed[request.key] = error
            self._journal.add_failure(request, str(error), error.retries)
            self._limit.failure(self._client.where, str(error))
            raise
        self._journal.add(request, answer, retries)
        self._limit.answered()
        return answer

    def forget_failures(self) -> None:
        """Start anew with those that failed."""
        self._failed.clear()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
