"""The shares of a row that several ranks compute: their tokens, and what went before them."""

from __future__ import annotations

from dataclasses import dataclass

from sft.run.plan.shape import Shape


@dataclass(frozen=True)
class Share:
    """A rank's tokens of a row, the documents that they are of, the tokens of the first that ranks before it have, and
    whether ranks after it have some of the last."""

    tokens: int
    documents: int
    before: int
    goes_on: bool = False


def shares_of(shape: Shape, ranks: int, tokens: int, documents: int) -> list[Share]:
    """Those that may need most: the first, which has most tokens, and the last, which reads most of others'.

    Cuts part the row's cost evenly (sft.train.parallel.balance); documents are taken to be of one length.
    """
    if ranks == 1:
        return [Share(tokens, documents, 0)]
    length = tokens / documents
    cuts = [0, *(_reached(shape, length, tokens, part / ranks) for part in range(1, ranks)), tokens]
    found = []
    for start, end in ((cuts[0], cuts[1]), (cuts[-2], cuts[-1])):
        parts = int((end - 1) // length) - int(start // length) + 1
        found.append(Share(end - start, parts, round(start % length), end < tokens and end % length > 0))
    return found


def _reached(shape: Shape, length: float, tokens: int, part: float) -> int:
    """The token up to which this part of the row's cost has come."""
    per_token, per_key = _costs(shape)
    whole = per_token * length + per_key * length * length / 2
    documents, rest = divmod(part * tokens / length * whole, whole)
    low, high = 0.0, length
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if per_token * middle + per_key * middle * middle / 2 < rest else (low, middle)
    return round(documents * length + low)


def _costs(shape: Shape) -> tuple[float, float]:
    """Multiply-adds of a token, and of a key that it sees."""
    key = 3 * shape.hidden_size
    windows = (shape.memory_layer // 2) * key * shape.sliding_window
    full = shape.num_hidden_layers // 2 - shape.memory_layer // 2
    return sum(matrix.numel for matrix in shape.matrices()) + windows + shape.embedding, full * key
