"""Log probabilities of given tokens under a causal language model, without ever holding full logits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sambay_kernels import linear_cross_entropy
from torch import Tensor

from sft.data.steps.score.ranks import logprobs_and_ranks
from sft.models import Phi4FlashForCausalLM
from sft.utils.errors import UserError

IGNORE = -100
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids (n,) and which of them are scored (n,) bool. The first never is: nothing comes before it."""

    ids: NDArray[np.int32]
    scored: NDArray[np.bool_]


def in_batches(items: Iterable[T], length: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Lists of neighbouring items, in order, each of at most `most` in length; a longer item is a list by itself."""
    batch: list[T] = []
    total = 0
    for item in items:
        size = length(item)
        if batch and total + size > most:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch


def load_frozen(name: str, dtype: str, revision: str | None = None) -> Any:
    """A checkpoint to score with: on the GPU in `dtype` where there is one, else in what `machine_dtype` says.

    Raises UserError when it can't be loaded.
    """
    from sft.models.load import load_checkpoint, machine_dtype

    held = machine_dtype(name, dtype, revision=revision)
    model: Any = load_checkpoint(name, dtype=held, revision=revision)
    model.requires_grad_(False)
    return model.to("cuda") if torch.cuda.is_available() else model


def free_memory() -> None:
    """Give back what a model took that nothing names any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class TokenScorer:
    """Scores documents with one model, in eval mode and without gradients.

    A SambaY reads several documents end to end, which never see each other; of any other model one runs at a time.
    `max_rank`: the tokens' ranks are wanted too, each at most this (see `logprobs_and_ranks`).
    """

    def __init__(self, model: Any, batch_tokens: int = 32768, max_rank: int | None = None) -> None:
        """Raises UserError for a model whose logits aren't its hidden states times its head's weight."""
        self.model = model.eval()
        self.max_rank = max_rank
        self.columns: tuple[int, ...] = () if max_rank is None else (2,)
        self.batch_tokens = batch_tokens
        self._device = model.get_input_embeddings().weight.device
        self._packs = isinstance(model, Phi4FlashForCausalLM)
        if not self._packs:
            self._check_head()

    def __call__(self, documents: Sequence[Document]) -> list[NDArray[np.float32]]:
        """Natural log probabilities of each document's scored tokens, in order: (number scored,) float32; with
        `max_rank` (number scored, 2), log probability and rank.

        Results don't depend on a document's neighbours beyond rounding. At most `batch_tokens` tokens run at once,
        or a single document that is longer.
        Raises:
            UserError: for an id outside the model's vocabulary, scores that aren't finite, or too little memory.
            ValueError: when a document's first token is to be scored, or ids and marks differ in number.
        """
        for document in documents:
            self._check(document)
        results: list[NDArray[np.float32]] = []
        limit = self.batch_tokens if self._packs else 1
        for batch in in_batches(documents, lambda document: len(document.ids), limit):
            results += self._run(batch)
        return results

    def _check(self, document: Document) -> None:
        if len(document.ids) != len(document.scored):
            raise ValueError(f"a document has {len(document.ids)} ids and {len(document.scored)} marks")
        if document.scored[:1].any():
            raise ValueError("a document's first token can't be scored: nothing comes before it")
        rows = self.model.get_input_embeddings().weight.shape[0]
        if len(document.ids) and not 0 <= document.ids.min() <= document.ids.max() < rows:
            raise UserError(
                f"The model has {rows} tokens, but the tokenizer gives the id {document.ids.max()}: "
                "score with the tokenizer that belongs to the model."
            )

    def _run(self, batch: list[Document]) -> list[NDArray[np.float32]]:
        counts = [int(document.scored.sum()) for document in batch]
        if not sum(counts):
            return [np.zeros((0, *self.columns), np.float32) for _ in batch]
        tokens = sum(len(document.ids) for document in batch)
        try:
            with torch.no_grad():
                found = self._packed(batch) if self._packs else torch.cat([self._alone(one) for one in batch])
        except torch.OutOfMemoryError as error:
            raise UserError(f"The GPU's memory doesn't hold {tokens} tokens at once: lower batch_tokens.") from error
        scores = found.float().cpu().numpy()
        if not np.isfinite(scores).all():
            raise UserError("The model's log probabilities are not finite: its weights are broken.")
        return np.split(scores, np.cumsum(counts)[:-1])

    def _packed(self, batch: list[Document]) -> Tensor:
        """Scores of all scored tokens, in order; layers of which no scored token reads anything are skipped."""
        lengths = [len(document.ids) for document in batch]
        ids = np.concatenate([document.ids for document in batch]).astype(np.int64)
        labels = np.where(np.concatenate([document.scored for document in batch]), ids, IGNORE)
        boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        output = self.model.model(
            input_ids=self._tensor(ids)[None],
            labels=self._tensor(labels)[None],
            cu_seq_lens_q=self._tensor(boundaries),
            max_length_q=max(lengths),
            use_cache=False,
        )
        kept = output.targets != IGNORE
        return self._scores(output.last_hidden_state[kept], output.targets[kept])

    def _alone(self, document: Document) -> Tensor:
        ids = self._tensor(document.ids.astype(np.int64))
        targets = self._tensor(np.flatnonzero(document.scored))
        return self._scores(self._hidden(ids)[targets - 1], ids[targets])

    def _scores(self, hidden: Tensor, targets: Tensor) -> Tensor:
        weight = self.model.get_output_embeddings().weight
        if self.max_rank is not None:
            return logprobs_and_ranks(hidden, weight, targets, self.max_rank)
        return -linear_cross_entropy(hidden, weight, targets, reduction="none")

    def _hidden(self, ids: Tensor) -> Tensor:
        """(n,) -> (n, hidden size), what the head reads."""
        hidden: Tensor = self.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        return hidden

    def _check_head(self) -> None:
        ids = torch.arange(16, device=self._device) % self.model.get_input_embeddings().weight.shape[0]
        with torch.no_grad():
            logits = self.model(input_ids=ids[None], use_cache=False).logits[0].float()
            product = (self._hidden(ids) @ self.model.get_output_embeddings().weight.T).float()
        if logits.shape != product.shape or (logits - product).abs().max() > 0.02 * logits.abs().max():
            raise UserError(
                f"{type(self.model).__name__} makes its logits otherwise than by its hidden states times its head's "
                "weight (a bias, a scale, a cap), so its tokens can't be scored in pieces: take another student."
            )

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self._device)
