"""A row on its way through the steps, and the parquet schema that it is stored with between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sft.data.read.conversation import Message

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(slots=True)
class Record:
    """One row: a conversation to learn from, or a problem that a later step answers.

    Attributes:
        id: the row's own id in its source, else its place; rows made from it get a suffix (`#g2`: its second rollout,
            `#2`: its second copy).
        source: name of the source in the recipe.
        place: `file:line` of the row that it comes from.
        problem: the question alone, without templates; None where a conversation doesn't begin with the user.
        problem_id: the same for all rows that answer one problem of one source.
        messages: the conversation, or None for a problem without an answer.
        answer: the gold answer.
        domain: such as math, code, science.
        tokens: length under the chat template, None without `messages`; `trained`: those that are learned.
        carried: columns of the source that the recipe carries along, as they are.
        facts: what steps found out, by the step's name; JSON.
        teacher_ids, teacher_logprobs: tokens of the answer as the teacher wrote them, and their natural log
            probabilities (n,); None where they aren't known.
    """

    id: str
    source: str
    place: str
    problem: str | None = None
    problem_id: str = ""
    messages: list[Message] | None = None
    answer: str | None = None
    domain: str | None = None
    tokens: int | None = None
    trained: int | None = None
    carried: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    teacher_ids: list[int] | None = None
    teacher_logprobs: list[float] | None = None

    @property
    def completion(self) -> str | None:
        """The last assistant message, or None."""
        for message in reversed(self.messages or []):
            if message["role"] == "assistant":
                return message["content"]
        return None

    @property
    def text(self) -> str:
        """All that is said in the row, for looking at or comparing whole rows."""
        if self.messages is None:
            return self.problem or ""
        return "\n".join(message["content"] for message in self.messages)


def fingerprint(record: Record) -> int:
    """128 bits that stand for a row in the checksums that prove that none was lost: its id and place."""
    return text_hash(f"{record.id}\0{record.place}")


def text_hash(text: str) -> int:
    """128 bits of BLAKE2b of `text`: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), "little")


def checksum(records: Iterable[Record]) -> int:
    """Sum of the fingerprints modulo 2^128: independent of order, and different when a row is lost or doubled."""
    return sum(map(fingerprint, records)) % (1 << 128)


def schema() -> pa.Schema:
    """Columns of a shard."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.large_string()), ("tools", pa.large_string())])
    return pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("place", pa.string()),
            ("problem", pa.large_string()),
            ("problem_id", pa.string()),
            ("messages", pa.large_list(message)),
            ("answer", pa.large_string()),
            ("domain", pa.string()),
            ("tokens", pa.int64()),
            ("trained", pa.int64()),
            ("carried", pa.large_string()),
            ("facts", pa.large_string()),
            ("teacher_ids", pa.large_list(pa.int32())),
            ("teacher_logprobs", pa.large_list(pa.float32())),
        ]
    )


def dropped_schema() -> pa.Schema:
    """Columns of a side file: those of a shard, and why the row isn't there any more."""
    import pyarrow as pa

    return schema().append(pa.field("reason", pa.string())).append(pa.field("detail", pa.large_string()))


def to_table(records: Sequence[Record]) -> pa.Table:
    """Records as an Arrow table of `schema()`."""
    import pyarrow as pa

    return pa.Table.from_pylist([_plain(record) for record in records], schema=schema())


def _plain(record: Record) -> dict[str, Any]:
    value = {name: getattr(record, name) for name in Record.__slots__}
    # ASCII, so that half surrogates survive.
    value["carried"] = json.dumps(record.carried, default=str)
    value["facts"] = json.dumps(record.facts)
    return value


def from_table(table: pa.Table | pa.RecordBatch) -> list[Record]:
    """The records of a table of `schema()` (columns beyond it are ignored)."""
    return [_record(value) for value in table.select(schema().names).to_pylist()]


def _record(value: dict[str, Any]) -> Record:
    value["carried"], value["facts"] = json.loads(value["carried"]), json.loads(value["facts"])
    if value["messages"] is not None:
        value["messages"] = [
            {key: text for key, text in message.items() if text is not None} for message in value["messages"]
        ]
    return Record(**value)
