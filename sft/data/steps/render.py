"""The step `render`: conversations as they are trained, whatever marks and system messages their sources use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sft.data.read.message import Message
from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record
from sft.data.steps.base import RowStep
from sft.data.text.thinking import Broken, canonical, find_thinking
from sft.recipe.steps.render import RenderStep


class Render(RowStep):
    """Rewrites thinking and system messages.

    Messages whose marks of thinking make no sense stay as they are, for `quality` to judge. Answers that lose their
    thinking as history are context from here on: answering without thinking would be learned. What was changed is noted
    in facts["render"]: `marks` (which ones became <think>), `opened` (a missing <think> was put in), `unwrapped` (marks
    around the answer went), `stripped` and `history_stripped` (messages that lost their thinking), `broken` (messages
    left alone), `system` (added, replaced or dropped), `prompt_template`.

    Reasons: no_answer (nothing is left without the thinking).
    """

    config: RenderStep
    version = 2
    changes_text = True

    def __call__(self, batch: list[Record]) -> Iterator[Outcome]:
        return map(self._rewrite, batch)

    def _rewrite(self, record: Record) -> Outcome:
        """Change the record's messages."""
        if record.messages is None:
            return Kept(record)
        notes: dict[str, Any] = {}
        messages = [dict(message) for message in record.messages]
        context = [messages[number] for number in record.untrained]
        problem = self._think(messages, notes, context)
        if problem is not None:
            return Dropped(record, "no_answer", problem)
        messages = self._system(messages, notes)
        self._prompt(messages, notes)
        if notes:
            record.facts["render"] = notes
        record.messages = messages
        places = (number for number, message in enumerate(messages) if any(message is other for other in context))
        record.untrained = list(places)
        record.forget_tokens()
        return Kept(record)

    def _think(self, messages: list[Message], notes: dict[str, Any], context: list[Message]) -> str | None:
        """Rewrite the assistant's messages in place; what is wrong where one would be left empty.

        Those that lose their thinking as history go into `context`.
        """
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=0)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            in_history = number < last_user and self.config.history_think == "strip"
            before = notes.get("history_stripped", 0)
            message["content"] = self._content(message["content"], in_history, notes)
            if notes.get("history_stripped", 0) > before:
                context.append(message)
            if not message["content"].strip() and "tool_calls" not in message:
                return f"message {number} has thinking and nothing else"
        return None

    def _content(self, content: str, in_history: bool, notes: dict[str, Any]) -> str:
        strip = self.config.think == "strip" or in_history
        if self.config.think == "keep" and not strip:
            return content
        thought = find_thinking(content)
        if thought is None:
            return content
        if isinstance(thought, Broken):
            notes["broken"] = notes.get("broken", 0) + 1
            return content
        if strip:
            key = "stripped" if self.config.think == "strip" else "history_stripped"
            notes[key] = notes.get(key, 0) + 1
            return thought.answer.strip()
        if thought.marks != "think":
            notes["marks"] = thought.marks
        elif not thought.opened:
            notes["opened"] = True
        if thought.wrapped:
            notes["unwrapped"] = True
        return canonical(thought)

    def _system(self, messages: list[Message], notes: dict[str, Any]) -> list[Message]:
        """The messages under the policy for system messages. The tools that one declares stay: calls refer to them."""
        own = [message for message in messages if message["role"] == "system"]
        prompt = self.config.system_prompt
        if self.config.system == "keep":
            if own or not prompt:
                return messages
            notes["system"] = "added"
            return [{"role": "system", "content": prompt}, *messages]
        tools = next(({"tools": message["tools"]} for message in own if message.get("tools")), None)
        rest = [message for message in messages if message["role"] != "system"]
        if self.config.system == "drop":
            kept = [{"role": "system", "content": "", **tools}] if tools else []
            if own and own != kept:
                notes["system"] = "dropped"
            return [*kept, *rest]
        front: list[Message] = [{"role": "system", "content": prompt or "", **(tools or {})}]
        if own != front:
            notes["system"] = "replaced" if own else "added"
        return [*front, *rest]

    def _prompt(self, messages: list[Message], notes: dict[str, Any]) -> None:
        """Put the first user's message into the template; the record's `problem` stays what it is."""
        user = next((message for message in messages if message["role"] == "user"), None)
        if self.config.prompt_template is None or user is None:
            return
        # Not str.format: prompts are full of LaTeX braces.
        user["content"] = self.config.prompt_template.replace("{prompt}", user["content"])
        notes["prompt_template"] = True
