"""A student that answers in this process, from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sft.data.read.record import text_hash
from sft.data.steps.generate.answer import Answer, Request
from sft.data.steps.generate.journal import Journal
from sft.tokenizers.prompt import prompt_text

if TYPE_CHECKING:
    from sft.recipe.steps.generate import Checkpoint


class LocalStudent:
    """Answers chat requests with a checkpoint. What it said is journaled, so that a killed run goes on from there."""

    def __init__(self, config: Checkpoint, journal: Journal) -> None:
        self._config, self._journal = config, journal
        self._loaded: tuple[Any, Any] | None = None

    def prepare(self, requests: Sequence[Request]) -> None:
        """Answer those requests that aren't answered yet, those of about the same limit together."""
        waiting = [request for request in requests if request not in self._journal]
        waiting.sort(key=lambda request: (request.body["max_tokens"], request.key))
        size = self._config.batch_size
        for start in range(0, len(waiting), size):
            self._answer(waiting[start : start + size])

    async def ask(self, request: Request) -> Answer:
        """What `prepare` was answered."""
        answer = self._journal.get(request)
        assert answer is not None, "prepare() was not given this request"
        return answer

    def _answer(self, requests: Sequence[Request]) -> None:
        from sft.generate.engine import generate_batch
        from sft.generate.requests import Generation

        model, tokenizer = self._loaded = self._loaded or self._load()
        prompts = [_ids(tokenizer, request.body["messages"]) for request in requests]
        sampling = requests[0].body

        def done(index: int, generation: Generation) -> None:
            request = requests[index]
            limit = request.body["max_tokens"]
            cut = not generation.finished or len(generation.ids) > limit
            answer = Answer(
                tokenizer.decode(generation.ids[:limit], skip_special_tokens=False),
                "",
                "length" if cut else "stop",
                len(prompts[index]),
                min(len(generation.ids), limit),
                None,
                self._config.checkpoint,
            )
            self._journal.add(request, answer, 0)

        generate_batch(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max(request.body["max_tokens"] for request in requests),
            temperature=sampling.get("temperature", 1.0),
            top_p=sampling.get("top_p", 1.0),
            batch_size=len(requests),
            requests=[text_hash(request.key) for request in requests],
            on_done=done,
        )

    def _load(self) -> tuple[Any, Any]:
        import torch

        from sft.models.load import load_checkpoint
        from sft.tokenizers.load import load_tokenizer

        config = self._config
        model = load_checkpoint(config.checkpoint, dtype=config.dtype, revision=config.revision)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return model.to(device), load_tokenizer(config.checkpoint, revision=config.revision)  # type: ignore[arg-type]


def _ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = prompt_text(tokenizer, messages, "The student's question")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
