"""From logits to the tokens of a batch's requests: penalties, the choice, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sambay_kernels import choose_token
from torch import Tensor

from sft.generate.requests import Request, TokenLogprobs
from sft.generate.sampling import check_finite, choice_of
from sft.utils.errors import UserError

Chosen = tuple[int, TokenLogprobs | None]


def choose(rows: Sequence[Request], logits: Tensor) -> list[Chosen]:
    """The next token of each row from logits (R, V); on a GPU the host waits for it.

    Raises UserError when logits aren't finite, the model's own or with penalties.
    """
    randoms = torch.tensor([row.randoms(1)[0] for row in rows], dtype=torch.float64)
    choice = choice_of([row.params for row in rows], randoms, logits.device)
    asked = penalised(rows, logits)
    tokens, largest = choose_token(asked, choice)
    if asked is not logits and not bool(torch.isfinite(largest).all()):
        check_finite(logits.amax(dim=-1))
        raise UserError(
            "With their penalties the logits are not finite; bring repetition_penalty nearer to 1, and "
            "presence_penalty nearer to 0."
        )
    check_finite(largest)
    chosen: list[int] = tokens.tolist()
    return list(zip(chosen, logprobs_of(rows, logits, tokens), strict=True))


def penalised(rows: Sequence[Request], logits: Tensor) -> Tensor:
    """The logits with the rows' penalties; the very tensor where there are none."""
    some = [(index, row) for index, row in enumerate(rows) if row.params.penalises]
    if not some:
        return logits
    logits = logits.clone()
    for index, row in some:
        mine, params = logits[index], row.params
        said = torch.tensor(sorted(set(row.tokens)), device=logits.device)
        held = mine[said]
        factor = params.repetition_penalty
        mine[said] = torch.where(held > 0, held / factor, held * factor)
        mine[torch.tensor(sorted(set(row.ids)), dtype=torch.long, device=logits.device)] -= params.presence_penalty
    return logits


def logprobs_of(rows: Sequence[Request], logits: Tensor, tokens: Tensor) -> list[TokenLogprobs | None]:
    """Log-probabilities for the rows that ask for them, of the model's own distribution."""
    wanted = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    found: list[TokenLogprobs | None] = [None] * len(rows)
    if wanted:
        of = torch.log_softmax(logits[wanted].to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        count = min(max(rows[index].params.logprobs or 0 for index in wanted), logits.shape[-1])
        own, top = of.gather(-1, tokens[wanted][:, None])[:, 0].tolist(), of.topk(count, dim=-1)
        for place, index in enumerate(wanted):
            mine = rows[index].params.logprobs or 0
            likeliest = zip(top.indices[place, :mine].tolist(), top.values[place, :mine].tolist(), strict=True)
            found[index] = TokenLogprobs(own[place], dict(likeliest))
    return found
