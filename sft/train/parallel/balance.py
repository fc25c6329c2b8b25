"""Where to cut a row so that its shares cost the same: a causal row's late tokens see more keys than its early ones.

Costs are multiply-adds of the forward pass by token; the backward pass and recomputation multiply them all alike. A
token in the cross-decoder costs more the later it stands in its document, and one that the loss needs nothing of costs
the self-decoder alone, so equal numbers of tokens would leave ranks waiting. Shares stay contiguous: a zigzag of two
pieces a rank would give ranks equal numbers of tokens too, for twice the cuts and a longer chain of states.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sft.models.row_shares import TokenCosts


def balanced_cuts(
    lengths: NDArray[np.int64], supervised: NDArray[np.bool_], costs: TokenCosts, ranks: int
) -> tuple[int, ...]:
    """`(ranks + 1,)`: cuts of a row that part its cost evenly.

    Args:
        lengths: `(S,)`, tokens of each document; supervised: `(T,)`, whether a token has something to predict.
    """
    total = len(supervised)
    ends = np.cumsum(lengths)
    starts = np.repeat(ends - lengths, lengths)
    # A document's cross-decoder is computed from its first token that has something to predict.
    seen = np.concatenate([[0], np.cumsum(supervised)])
    computed = seen[1:] > seen[starts]
    keys = np.arange(total) - starts + 1
    cost = costs.self_decoder + computed * (costs.cross_decoder + costs.key * keys) + supervised * costs.head
    reached = np.cumsum(cost)
    wanted = (reached[-1] if total else 0.0) * np.arange(1, ranks) / ranks
    return (0, *(int(cut) for cut in np.searchsorted(reached, wanted, side="left")), total)
