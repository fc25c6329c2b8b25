"""A row on its way through the steps, and the parquet schema that it is stored with between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sft.data.read.message import Message, spelled

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class TopLogprobs:
    """A teacher's likeliest tokens at n places, in our vocabulary.

    ids (n, k) int32, different ones at a place, -1 where there are fewer (or none); logprobs (n, k) float16, their
    natural log probabilities, 0 where the id is -1.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float16]


@dataclass(frozen=True, slots=True, eq=False)
class TeacherTokens:
    """The tokens of the last answer as a teacher wrote them, (n,) int32 of our vocabulary (-1: it isn't in the text),
    and what the teacher found likeliest in the place of each."""

    tokens: NDArray[np.int32]
    top: TopLogprobs


@dataclass(frozen=True, slots=True)
class Tokens:
    """One document: ids (n,) int32 and mask (n,) uint8, 1 where the token is trained.

    `top`: what a teacher found likeliest at each trained token, in order; `weights`: of each token's loss, (n,)
    float64. Each is None where there is none.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    top: TopLogprobs | None = None
    weights: NDArray[np.float64] | None = None

    @property
    def supervised(self) -> int:
        """How many tokens are trained."""
        return int(self.mask.sum())

    def first(self, count: int) -> Tokens:
        """The first tokens alone."""
        mask, top = self.mask[:count], self.top
        trained = int(mask.sum())
        top = None if top is None else TopLogprobs(top.ids[:trained], top.logprobs[:trained])
        return Tokens(self.ids[:count], mask, top, None if self.weights is None else self.weights[:count])


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
        untrained: numbers of the assistant's messages that are context only.
        tools: JSON text of the functions that the row declares beside its messages.
        chat_template_kwargs: the chat template's own arguments.
        answer: the gold answer.
        domain: such as math, code, science.
        tokens: length under the chat template, None while it isn't known; `trained`: those that are learned.
        tokens_at: where the ids and the mask are stored (see sft.data.pack.tokens); None while `tokens` is.
        carried: columns of the source that the recipe carries along, as they are.
        facts: what steps found out, by the step's name; JSON.
        teacher_ids, teacher_logprobs: tokens of the answer as the teacher wrote them, and their natural log
            probabilities (n,); None where they aren't known.
        teacher_top: the same tokens in our vocabulary with the likeliest ones in the place of each; to learn from.
        encoded: ids and mask themselves, in the process that has just made them; not stored.
        row: its number in the file that holds its text; known while a pass runs.
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
    tokens_at: str | None = None
    untrained: list[int] = field(default_factory=list)
    tools: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    teacher_ids: list[int] | None = None
    teacher_logprobs: list[float] | None = None
    teacher_top: TeacherTokens | None = field(default=None, compare=False, repr=False)
    encoded: Tokens | None = field(default=None, compare=False, repr=False)
    row: int = field(default=-1, compare=False, repr=False)
    _printed: tuple[str, str, int] | None = field(default=None, init=False, compare=False, repr=False)

    def forget_tokens(self) -> None:
        """The text is another now: its tokens aren't known any more."""
        self.tokens = self.trained = self.tokens_at = self.encoded = None

    @property
    def completion(self) -> str | None:
        """The last assistant message, or None."""
        for message in reversed(self.messages or []):
            if message["role"] == "assistant":
                content: str = message["content"]
                return content
        return None

    @property
    def text(self) -> str:
        """All that is said in the row, for looking at or comparing whole rows."""
        if self.messages is None:
            return self.problem or ""
        return "\n".join([*map(spelled, self.messages), *([self.tools] if self.tools else [])])


def fingerprint(record: Record) -> int:
    """128 bits that stand for a row in the checksums that prove that none was lost: its id and place."""
    printed = record._printed
    # Every step of a pass asks for it.
    if printed is None or printed[0] is not record.id or printed[1] is not record.place:
        printed = record._printed = (record.id, record.place, text_hash(f"{record.id}\0{record.place}"))
    return printed[2]


def text_hash(text: str) -> int:
    """128 bits of BLAKE2b of `text`: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), "little")


def schema() -> pa.Schema:
    """Columns of a shard."""
    import pyarrow as pa

    top = pa.struct(
        [("tokens", pa.list_(pa.int32())), ("ids", pa.list_(pa.int32())), ("logprobs", pa.list_(pa.float16()))]
    )
    message = pa.struct([("role", pa.string()), ("content", pa.large_string()), ("more", pa.large_string())])
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
            ("tokens_at", pa.string()),
            ("untrained", pa.list_(pa.int32())),
            ("tools", pa.large_string()),
            ("chat_template_kwargs", pa.large_string()),
            ("carried", pa.large_string()),
            ("facts", pa.large_string()),
            ("teacher_ids", pa.large_list(pa.int32())),
            ("teacher_logprobs", pa.large_list(pa.float32())),
            ("teacher_top", top),
        ]
    )


def thin_schema() -> pa.Schema:
    """Columns of a shard whose steps only judged: which rows of the file with their texts go on, and what is new."""
    import pyarrow as pa

    names = ("id", "source", "facts", "tokens", "trained", "tokens_at")
    return pa.schema([pa.field("row", pa.int64()), *(schema().field(name) for name in names)])


def aside_schema() -> pa.Schema:
    """Columns of a side file: those of a shard, the step at which the row was put aside, and why."""
    import pyarrow as pa

    why = [("step", pa.string()), ("reason", pa.string()), ("detail", pa.large_string())]
    return pa.schema([*schema(), *(pa.field(name, kind) for name, kind in why)])


def to_table(records: Sequence[Record], columns: pa.Schema | None = None) -> pa.Table:
    """Records as an Arrow table of `schema()`, or of other `columns` that are a record's."""
    import pyarrow as pa

    columns = columns or schema()
    return pa.Table.from_pylist([_plain(record, columns.names) for record in records], schema=columns)


def _plain(record: Record, names: Sequence[str]) -> dict[str, Any]:
    value = {name: getattr(record, name) for name in names}
    # ASCII, so that half surrogates survive.
    if "carried" in value:
        value["carried"] = json.dumps(record.carried, default=str)
        value["chat_template_kwargs"] = json.dumps(record.chat_template_kwargs)
        value["messages"] = None if record.messages is None else list(map(_stored, record.messages))
    value["facts"] = json.dumps(record.facts)
    if (said := value.get("teacher_top")) is not None:
        value["teacher_top"] = {
            "tokens": said.tokens,
            "ids": said.top.ids.ravel(),
            "logprobs": said.top.logprobs.ravel(),
        }
    return value


def _stored(message: Message) -> Message:
    """Role, content, and JSON of what else there is."""
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    return {**message, "more": json.dumps(more) if more else None}


def from_table(table: pa.Table | pa.RecordBatch) -> list[Record]:
    """The records of a table of `schema()` (columns beyond it are ignored)."""
    return [_record(value) for value in table.select(schema().names).to_pylist()]


def renewed(record: Record, new: dict[str, Any]) -> Record:
    """A row of `thin_schema()` applied to the record that it is about."""
    return replace(record, **{**new, "facts": json.loads(new["facts"])})


def _record(value: dict[str, Any]) -> Record:
    for name in ("carried", "facts", "chat_template_kwargs"):
        value[name] = json.loads(value[name])
    for message in value["messages"] or ():
        message |= json.loads(message.pop("more") or "{}")
    if (top := value["teacher_top"]) is not None:
        value["teacher_top"] = _teacher_tokens(top)
    return Record(**value)


def _teacher_tokens(stored: dict[str, Any]) -> TeacherTokens:
    import numpy as np

    tokens = np.array(stored["tokens"], np.int32)
    ids, logprobs = np.array(stored["ids"], np.int32), np.array(stored["logprobs"], np.float16)
    return TeacherTokens(tokens, TopLogprobs(ids.reshape(len(tokens), -1), logprobs.reshape(len(tokens), -1)))
