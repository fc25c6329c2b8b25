"""`sft chat`: talk to a model."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from typing import Any

from sft.cli.common import check_model, positive, recipe_and_keys, recipe_of, seed
from sft.recipe import RunPaths
from sft.train.interrupt import stop_signals
from sft.utils.errors import RefusedPromptError, UsageError
from sft.utils.quiet import quiet_libraries
from sft.utils.say import say

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, one prompt or a conversation, and how to sample."""
    parser.add_argument(
        "--config", metavar="RECIPE", help="recipe whose trained model answers; may stand without --config"
    )
    parser.add_argument("--stage", metavar="NAME", help="the model after this stage (default: the last one trained)")
    parser.add_argument(
        "--model", metavar="PATH", help="a model or adapter folder (an export, a stage) or Hub id instead of --config"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="--model: run the code it comes with")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit; - reads standard input")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max_new_tokens", type=positive, default=1024, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): greedy")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P")
    parser.add_argument("--top_k", type=int, default=0, metavar="N", help="0 (default): all tokens")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, metavar="R", help="1 (default): none")
    parser.add_argument("--seed", type=seed, default=0)


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Answer --prompt, or converse until end of input."""
    if arguments.model is None:
        arguments.config, overrides = recipe_and_keys(arguments.config, overrides)
    if (arguments.config is None) == (arguments.model is None):
        raise UsageError("say which model answers: --config RECIPE or --model PATH")
    if arguments.model is not None and overrides:
        raise UsageError(f"unknown argument {overrides[0]!r}; keys of a recipe go with --config")
    if not 0 <= arguments.temperature < float("inf") or not 0 < arguments.top_p <= 1:
        raise UsageError("--temperature must be at least 0, and --top_p in (0, 1]")
    if arguments.top_k < 0 or not 0 < arguments.repetition_penalty < float("inf"):
        raise UsageError("--top_k must be at least 0, and --repetition_penalty above 0")
    asked = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if asked is not None and not asked.strip():
        raise UsageError("--prompt is empty")
    if arguments.model is not None:
        check_model(arguments.model)
    quiet_libraries(debug=arguments.debug)
    model, tokenizer = _load(arguments, overrides)
    talk = Conversation(model, tokenizer, arguments)
    if asked is not None:
        talk.answer(asked)
        return 0
    _converse(talk)
    return 0


def _load(arguments: argparse.Namespace, overrides: list[str]) -> tuple[Any, Any]:
    if arguments.model is not None:
        from sft.run.named import load_named

        return load_named(arguments.model, arguments.trust_remote_code)
    from sft.run.publish import taken_stage

    paths = RunPaths(recipe_of(arguments, overrides, as_run=True))
    stage = taken_stage(paths, arguments.stage, say)
    from sft.models.load import on_device
    from sft.train.handover import load_stage_model

    model, tokenizer = load_stage_model(paths, stage)
    return on_device(model), tokenizer


def _only_as_asked(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> str:
    """Let nothing but the options decide how `model` answers, and say what they are.

    What a call to `generate` doesn't say, transformers takes from the model's generation configuration, and then from
    defaults of its own, among them the 50 likeliest tokens.
    """
    from transformers import GenerationConfig

    from sft.models.end_tokens import end_token_ids
    from sft.models.merge import base_of

    base = base_of(model)
    settings = {"repetition_penalty": arguments.repetition_penalty}
    if arguments.temperature:
        names = ("temperature", "top_p", "top_k")
        settings = {**{name: getattr(arguments, name) for name in names}, **settings}
    ends, pad = end_token_ids(tokenizer, base), tokenizer.pad_token_id
    base.generation_config = GenerationConfig(
        do_sample=bool(arguments.temperature), **settings, eos_token_id=ends, pad_token_id=pad
    )
    how = "sampling" if arguments.temperature else "greedy"
    return f"{how}: {', '.join(f'{name} {value:g}' for name, value in settings.items())}"


HELP = "Ctrl-D ends, /clear starts afresh, Ctrl-C stops an answer."


def _converse(talk: Conversation) -> None:
    """Read messages until end of input; `/clear` forgets, Ctrl-C stops the answer, or drops what is being typed."""
    print(HELP, file=sys.stderr)
    while True:
        try:
            text = input("you> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except UnicodeDecodeError:
            print("\nthat was no UTF-8 text", file=sys.stderr)
            continue
        except KeyboardInterrupt as error:
            _forget_signal(error)
            print(f"\n{HELP}", file=sys.stderr)
            continue
        if text == "/clear":
            talk.clear()
        elif re.fullmatch("/[a-z]+", text):
            print(f"there is no command {text}. {HELP}", file=sys.stderr)
        elif text:
            _reply(talk, text)


def _reply(talk: Conversation, text: str) -> None:
    """Answer a message; one that is refused, or whose answer is stopped, is forgotten."""
    try:
        talk.answer(text)
    except RefusedPromptError as error:
        talk.forget_last()
        print(error, file=sys.stderr)
    except KeyboardInterrupt as error:
        _forget_signal(error)
        talk.forget_last()
        print("\n[stopped]", file=sys.stderr)


def _forget_signal(error: KeyboardInterrupt) -> None:
    """Go on after Ctrl-C; any other signal ends the conversation."""
    if getattr(error, "exit_code", 130) != 130:
        raise error
    with stop_signals() as signals:
        signals.forget()


class Conversation:
    """Messages so far, and the model that answers them."""

    def __init__(self, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
        self.model, self.tokenizer, self.arguments = model, tokenizer, arguments
        self.messages: list[dict[str, str]] = []
        self._cut = False
        print(_only_as_asked(model, tokenizer, arguments), file=sys.stderr)
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system message."""
        system = self.arguments.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def forget_last(self) -> None:
        """Forget a message that got no whole answer."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def answer(self, text: str) -> str:
        """Print the answer as it comes, and return it."""
        from sft.tokenizers.control import ControlTokens
        from sft.tokenizers.prompt import prompt_text

        self.messages.append({"role": "user", "content": text})
        pieces = []
        for piece in self._stream(prompt_text(self.tokenizer, self.messages)):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        if self._cut:
            print(f"[cut off after {self.arguments.max_new_tokens} tokens: see --max_new_tokens]", file=sys.stderr)
        answer = "".join(pieces)
        spelled = ControlTokens(self.tokenizer).find(answer)
        if spelled is None:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.forget_last()
            print(
                f"[forgotten: the answer spells out {spelled}, which would be read as the real token]", file=sys.stderr
            )
        return answer

    def _stream(self, rendered: str) -> Iterator[str]:
        """The answer's text to what is `rendered`, word by word."""
        from threading import Thread

        import torch
        from transformers import TextIteratorStreamer

        from sft.tokenizers.vocabulary import check_vocabulary

        inputs = self.tokenizer(rendered, add_special_tokens=False, return_tensors="pt")
        check_vocabulary(self.model, int(inputs["input_ids"].max()))
        inputs = inputs.to(self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = self.arguments
        stop = _Stop()
        failed: list[BaseException] = []
        torch.manual_seed(options.seed)

        def generate() -> None:
            try:
                made = self.model.generate(
                    **inputs,
                    max_new_tokens=options.max_new_tokens,
                    streamer=streamer,
                    stopping_criteria=[stop],
                )
                new = made[0, inputs["input_ids"].shape[1] :].tolist()
                ends = self.model.generation_config.eos_token_id
                self._cut = len(new) == options.max_new_tokens and new[-1] not in ends
            except BaseException as error:
                failed.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.asked = True
            thread.join(timeout=60)  # it ends with the next token
        if failed:
            raise failed[0]


class _Stop:
    """Ends generation when asked to."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        return torch.full((input_ids.shape[0],), self.asked, dtype=torch.bool, device=input_ids.device)
