"""The step `explode_rollouts`: a row with several answers becomes a row for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sft.data.read.conversation import to_conversation
from sft.data.read.message import Message, context_only
from sft.data.read.outcomes import Dropped, Outcome, Replaced
from sft.data.read.record import Record
from sft.data.read.row import BadRow
from sft.data.steps.base import RowStep
from sft.recipe.steps.explode_rollouts import ExplodeRolloutsStep


class ExplodeRollouts(RowStep):
    """One row for each rollout, named `<id>#g<index>`, of the same `problem_id`.

    A rollout is an answer (text, or an assistant message), which the section's templates join with the problem, or a
    whole conversation. Of the parent's carried columns the rollouts go, and a list aligned to them becomes the
    rollout's own value. facts["explode_rollouts"] of each: `index`, `of` (how many the parent had), `flags` by name,
    and `pass_rate`: the share of the parent's rollouts that meet `require` and `require_all` (all flags where neither
    is given), among those whose flags decide it; None where none does.

    Reasons of a rollout: flag_false, flag_missing, empty_rollout, wrong_type, no_problem (an answer without a
    question), over_max_rollouts, and what is wrong with a conversation (`sft.data.read.conversation`). Reasons of a
    row: no_rollouts, wrong_type (also: more flags than rollouts).
    """

    config: ExplodeRolloutsStep
    version = 2
    changes_text = True

    def __call__(self, batch: list[Record]) -> Iterator[Outcome]:
        return map(self._explode, batch)

    def _explode(self, parent: Record) -> Dropped | Replaced:
        rollouts = parent.carried.get(self.config.column)
        if not rollouts and (rollouts is None or isinstance(rollouts, list)):
            return Dropped(
                parent, "no_rollouts", f"'{self.config.column}' is {'null' if rollouts is None else 'empty'}"
            )
        problem = self._not_aligned(parent, rollouts)
        if problem is not None:
            return Dropped(parent, "wrong_type", problem)
        flags = [self._flags(parent, index, rollout) for index, rollout in enumerate(rollouts)]
        known = [passed for passed in map(self._passed, flags) if passed is not None]
        rate = sum(known) / len(known) if known else None
        outcome = Replaced(parent)
        for index, rollout in enumerate(rollouts):
            child = self._child(parent, index, len(rollouts))
            child.facts["explode_rollouts"] = {
                "index": index,
                "of": len(rollouts),
                "flags": {name: value if isinstance(value, bool) else None for name, value in flags[index].items()},
                "pass_rate": rate,
            }
            dropped = self._fill(child, rollout, flags[index])
            if dropped is None:
                outcome.kept.append(child)
            else:
                outcome.dropped.append(dropped)
        self._limit(outcome)
        return outcome

    def _not_aligned(self, parent: Record, rollouts: Any) -> str | None:
        """What is wrong with the row's lists, or None."""
        if not isinstance(rollouts, list):
            return f"'{self.config.column}' is {type(rollouts).__name__}, expected a list"
        for column in self.config.aligned_columns:
            values = parent.carried.get(column)
            if values is not None and not isinstance(values, list):
                return f"'{column}' is {type(values).__name__}, expected a list"
            if values is not None and len(values) > len(rollouts):
                return f"'{column}' has {len(values)} values for {len(rollouts)} rollouts"
        return None

    def _flags(self, parent: Record, index: int, rollout: Any) -> dict[str, Any]:
        """The rollout's flags as they are found, None where one is missing."""
        flags = {}
        for name, column in self.config.flags.items():
            if column.startswith("."):
                value = rollout.get(column[1:]) if isinstance(rollout, dict) else None
            else:
                value = _at(parent.carried.get(column), index)
            flags[name] = bool(value) if isinstance(value, (int, float)) and value in (0, 1) else value
        return flags

    def _passed(self, flags: dict[str, Any]) -> bool | None:
        """Whether the rollout meets what is required; None where its flags don't decide it."""
        every = self.config.require_all or ([] if self.config.require else list(self.config.flags))
        verdicts = [_all_true([flags[name] for name in every])] if every else []
        if self.config.require:
            verdicts.append(_any_true([flags[name] for name in self.config.require]))
        return _all_true(verdicts) if verdicts else None

    def _child(self, parent: Record, index: int, of: int) -> Record:
        carried = {name: value for name, value in parent.carried.items() if name != self.config.column}
        for column in self.config.aligned_columns:
            carried[column] = _at(carried.get(column), index)
        child = replace(
            parent,
            id=f"{parent.id}#g{index}",
            messages=None,
            carried=carried,
            facts=dict(parent.facts),
            teacher_ids=None,
            teacher_logprobs=None,
            teacher_top=None,
        )
        child.forget_tokens()
        return child

    def _fill(self, child: Record, rollout: Any, flags: dict[str, Any]) -> Dropped | None:
        """Give the child its conversation; why it is dropped, or None when it is kept."""
        odd = [name for name, value in flags.items() if value is not None and not isinstance(value, bool)]
        if odd:
            return Dropped(child, "wrong_type", f"the flag {odd[0]} is {flags[odd[0]]!r:.80}, expected true or false")
        messages = self._messages(child, rollout)
        if isinstance(messages, BadRow):
            return Dropped(child, messages.reason, messages.detail)
        child.messages, child.untrained = messages, context_only(messages)
        if not (self.config.require or self.config.require_all):
            return None
        passed = self._passed(flags)
        if passed is None and self.config.missing_flag == "drop":
            return Dropped(child, "flag_missing", _shown(flags))
        return Dropped(child, "flag_false", _shown(flags)) if passed is False else None

    def _messages(self, child: Record, rollout: Any) -> list[Message] | BadRow:
        where = f"{self.config.column}[{child.facts['explode_rollouts']['index']}]"
        if isinstance(rollout, dict) and self.config.key is not None:
            where, rollout = f"{where}.{self.config.key}", rollout.get(self.config.key)
        if rollout is None or rollout == [] or (isinstance(rollout, str) and not rollout.strip()):
            return BadRow("empty_rollout", f"{where} is {'null' if rollout is None else 'empty'}")
        if isinstance(rollout, str):
            rollout = [{"role": "assistant", "content": rollout}]
        elif isinstance(rollout, dict):
            if "content" not in rollout and "from" not in rollout:
                keys = ", ".join(map(str, rollout)) or "no keys"
                return BadRow("wrong_type", f"{where} is a mapping with {keys}; name the one with the text in `key`")
            rollout = [rollout if "from" in rollout else {"role": "assistant", **rollout}]
        elif not isinstance(rollout, list):
            return BadRow("wrong_type", f"{where} is {type(rollout).__name__}, expected text or messages")
        messages = to_conversation(rollout, where)
        if isinstance(messages, BadRow):
            return BadRow("empty_rollout", messages.detail) if messages.reason == "empty_answer" else messages
        return self._with_problem(child, messages)

    def _with_problem(self, child: Record, messages: list[Message]) -> list[Message] | BadRow:
        """A conversation as it is; an answer with its question in front."""
        templates = self.context.templates
        own_system = messages[:1] if messages[0]["role"] == "system" else []
        if any(message["role"] == "user" for message in messages):
            added = templates.system_prompt if not own_system else None
            return [{"role": "system", "content": added}, *messages] if added else messages
        if child.problem is None:
            return BadRow("no_problem", "an answer without a question: map `problem` in the source's columns")
        *before, answer = messages
        if before != own_system:
            return BadRow("wrong_type", "a conversation without a user's message that is more than one answer")
        *asked, said = templates.conversation(child.problem, answer["content"])
        asked = [message for message in asked if not own_system or message["role"] != "system"]
        return [*own_system, *asked, {**answer, **said}]

    def _limit(self, outcome: Replaced) -> None:
        """Drop what is over `max_rollouts`: those with the highest numbers drawn from the seed and their own name."""
        most = self.config.max_rollouts
        if most is None or len(outcome.kept) <= most:
            return
        drawn = sorted(outcome.kept, key=lambda child: self.context.draw("rollouts", child))
        over = {id(child) for child in drawn[most:]}
        usable = len(outcome.kept)
        outcome.dropped.extend(
            Dropped(child, "over_max_rollouts", f"{usable} usable, {most} taken")
            for child in outcome.kept
            if id(child) in over
        )
        outcome.kept[:] = [child for child in outcome.kept if id(child) not in over]


def _at(values: Any, index: int) -> Any:
    """The value at `index` of a list that may be shorter or null."""
    return values[index] if values is not None and index < len(values) else None


def _all_true(values: list[Any]) -> bool | None:
    """False as soon as one is, None where one is missing, else True."""
    if any(value is False for value in values):
        return False
    return True if all(value is True for value in values) else None


def _any_true(values: list[Any]) -> bool | None:
    """True as soon as one is, None where one is missing, else False."""
    if any(value is True for value in values):
        return True
    return False if all(value is False for value in values) else None


def _shown(flags: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {'missing' if value is None else str(value).lower()}" for name, value in flags.items())
