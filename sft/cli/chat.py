"""`sft chat`: talk to a model."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from sft.cli.answering import add_model_arguments, check_which_model, named_model
from sft.cli.asking import Asked, Part, ask, model_of
from sft.cli.common import positive, real, seed, whole
from sft.train.interrupt import stop_signals
from sft.utils.errors import RefusedPromptError, UsageError
from sft.utils.quiet import quiet_libraries

TAKES_OVERRIDES = True
KEY_VARIABLE = "SFT_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, one prompt or a conversation, and how to sample."""
    add_model_arguments(parser)
    parser.add_argument(
        "--server", metavar="URL", help="ask this server of the OpenAI API instead; --model: which of its models"
    )
    parser.add_argument("--api_key", metavar="KEY", help=f"--server: its key (default: {KEY_VARIABLE}, if set)")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit; - reads standard input")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max_new_tokens", type=positive, default=1024, metavar="N")
    parser.add_argument("--temperature", type=real, default=0.0, metavar="T", help="0 (default): greedy")
    parser.add_argument("--top_p", type=real, default=1.0, metavar="P")
    parser.add_argument("--top_k", type=whole, default=0, metavar="N", help="0 (default): all tokens")
    parser.add_argument("--repetition_penalty", type=real, default=1.0, metavar="R", help="1 (default): none")
    parser.add_argument("--seed", type=seed, default=0)


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Answer --prompt, or converse until end of input."""
    if arguments.server is None:
        overrides = check_which_model(arguments, overrides)
    _check_server(arguments, overrides)
    if not 0 <= arguments.temperature < float("inf") or not 0 < arguments.top_p <= 1:
        raise UsageError("--temperature must be at least 0, and --top_p in (0, 1]")
    if arguments.top_k < 0 or not 0.01 <= arguments.repetition_penalty <= 100:
        raise UsageError("--top_k must be at least 0, and --repetition_penalty from 0.01 to 100")
    asked = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if asked is not None and not asked.strip():
        raise UsageError("--prompt is empty")
    if asked is None and arguments.json:
        raise UsageError("--json goes with --prompt, which has one answer to tell")
    quiet_libraries(debug=arguments.debug)
    talk: Conversation
    if arguments.server is None:
        _, load = named_model(arguments, overrides)
        talk = Conversation(*load(), arguments)
    else:
        talk = FromServer(arguments)
    if asked is not None:
        talk.answer(asked)
        arguments.told.update(talk.last())
        return 0
    _converse(talk)
    return 0


def _check_server(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Raise UsageError for options that don't go together."""
    if arguments.server is None:
        if arguments.api_key is not None:
            raise UsageError("--api_key has no effect without --server")
        return
    told = {
        "--config": arguments.config,
        "--stage": arguments.stage,
        "--trust_remote_code": arguments.trust_remote_code,
    }
    if no_use := [*overrides, *(option for option, value in told.items() if value)]:
        raise UsageError(f"{no_use[0]} has no effect with --server, which has its own model: leave one out")
    if not re.match("https?://.", arguments.server):
        raise UsageError(f"--server: {arguments.server!r} is no http address, as http://127.0.0.1:8000/v1")


def _only_as_asked(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> str:
    """Let nothing but the options decide how `model` answers, and say what they are.

    Of the model's generation configuration the engine takes where an answer ends, and nothing else.
    """
    from transformers import GenerationConfig

    from sft.models.end_tokens import end_token_ids
    from sft.models.merge import base_of

    base = base_of(model)
    base.generation_config = GenerationConfig(eos_token_id=end_token_ids(tokenizer, base))
    return _how(arguments)


def _how(arguments: argparse.Namespace) -> str:
    names = ("temperature", "top_p", "top_k") if arguments.temperature else ()
    how = "sampling" if arguments.temperature else "greedy"
    return f"{how}: {', '.join(f'{name} {getattr(arguments, name):g}' for name in (*names, 'repetition_penalty'))}"


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
        self._tokens, self._begun = 0, 0.0
        self._said: dict[str, str] = {}
        self._engine: Any = None
        print(self._how(), file=sys.stderr)
        self.clear()

    def _how(self) -> str:
        return _only_as_asked(self.model, self.tokenizer, self.arguments)

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
        self.messages.append({"role": "user", "content": text})
        pieces = []
        shown = Dimmed(sys.stdout)
        self._tokens, self._said = 0, {"thought": "", "answer": "", "mark": ""}
        try:
            for kind, piece in self._parts():
                shown.write(kind, piece)
                self._said[kind] += piece
                pieces.append(piece if kind == "answer" or not self._remembers_answers_only else "")
        finally:
            shown.close()
        print()
        self._tell()
        answer = "".join(pieces)
        spelled = self._forged(answer)
        if spelled is None:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.forget_last()
            print(
                f"[forgotten: the answer spells out {spelled}, which would be read as the real token]", file=sys.stderr
            )
        return answer

    _remembers_answers_only = False

    def _forged(self, answer: str) -> str | None:
        from sft.tokenizers.control import ControlTokens

        return ControlTokens(self.tokenizer).find(answer)

    def last(self) -> dict[str, Any]:
        """The last answer without its thinking, that, its tokens (0: not known), and whether it was cut off."""
        said = {"answer": self._said["answer"], "thinking": self._said["thought"]}
        return {**said, "tokens": self._tokens, "cut_off": self._cut}

    def _tell(self) -> None:
        """How fast the answer came, and whether it was cut off."""
        seconds = time.monotonic() - self._begun
        if self._tokens and seconds > 0:
            print(f"[{self._tokens} tokens, {self._tokens / seconds:.1f} tokens/s]", file=sys.stderr)
        if self._cut:
            print(f"[cut off after {self.arguments.max_new_tokens} tokens: see --max_new_tokens]", file=sys.stderr)

    def _parts(self) -> Iterator[Part]:
        """The answer to the messages, in parts."""
        from sft.generate.text import Thinking, opens_thinking
        from sft.tokenizers.prompt import prompt_text

        rendered = prompt_text(self.tokenizer, self.messages)
        thinking = Thinking(opened=opens_thinking(rendered))
        for piece in self._stream(rendered):
            yield from thinking.add(piece)
        yield from thinking.finish()

    def _stream(self, rendered: str) -> Iterator[str]:
        """The answer's text to what is `rendered`, token by token."""
        from sft.generate import Engine
        from sft.generate.streaming import stream
        from sft.generate.text import TextStream

        if self._engine is None:
            self._engine = Engine(self.model, self.tokenizer, batch_size=1)
        ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        text, self._begun = TextStream(self.tokenizer), time.monotonic()
        for piece in stream(self._engine, ids, self._params()):
            self._tokens += len(piece.ids)
            if piece.end is None:
                yield text.add(piece.ids)
            else:
                self._cut = not piece.end.finished
                yield text.finish(piece.ids)

    def _params(self) -> Any:
        from sft.generate import SamplingParams

        names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
        return SamplingParams(**{name: getattr(self.arguments, name) for name in names})


class FromServer(Conversation):
    """The same with a server's model. Its thinking isn't sent back to it, which is what such servers expect."""

    _remembers_answers_only = True

    def __init__(self, arguments: argparse.Namespace) -> None:
        key = arguments.api_key or os.environ.get(KEY_VARIABLE) or None
        self._server = Asked(arguments.server.rstrip("/"), key, "")
        self._server = self._server._replace(model=arguments.model or model_of(self._server))
        super().__init__(None, None, arguments)

    def _how(self) -> str:
        return f"{self._server.model} at {self._server.url}, {_how(self.arguments)}"

    def _forged(self, answer: str) -> str | None:
        return None  # the server sees to that

    def _parts(self) -> Iterator[Part]:
        self._cut, self._begun = False, time.monotonic()
        for kind, value in ask(self._server, {"messages": self.messages, **_fields(self.arguments)}):
            if kind == "tokens":
                self._tokens = int(value)
            elif kind == "finish":
                self._cut = value == "length"
            else:
                yield kind, value


def _fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as the API has them; what not every server knows is left out where it has no effect."""
    names = {name: getattr(arguments, name) for name in ("temperature", "top_p", "seed")}
    beyond = {"top_k": 0, "repetition_penalty": 1.0}
    more = {name: getattr(arguments, name) for name, none in beyond.items() if getattr(arguments, name) != none}
    return {**names, **more, "max_tokens": arguments.max_new_tokens}


class Dimmed:
    """A terminal on which thinking is dim; anywhere else it is text as any."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._terminal, self._dim = out, out.isatty(), False

    def write(self, kind: str, text: str) -> None:
        """Show a part of an answer."""
        self._turn(kind != "answer")
        print(text, end="", flush=True, file=self._out)

    def close(self) -> None:
        """Be as before."""
        self._turn(False)

    def _turn(self, dim: bool) -> None:
        if self._terminal and dim != self._dim:
            print("\033[2m" if dim else "\033[22m", end="", flush=True, file=self._out)
        self._dim = dim
