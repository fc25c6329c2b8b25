"""`sft serve`: a model behind the OpenAI API."""

from __future__ import annotations

import argparse
import ipaddress
import os
from typing import Any

from sft.cli.answering import add_model_arguments, check_which_model, named_model
from sft.cli.common import positive
from sft.utils.errors import UserError
from sft.utils.quiet import quiet_libraries
from sft.utils.say import say

TAKES_OVERRIDES = True
KEY_VARIABLE = "SFT_API_KEY"
LONGEST = 32768


def seconds(text: str) -> float:
    """An option's time above zero."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {number:g}")
    return number


def port(text: str) -> int:
    """An option's port."""
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError(f"must be from 0 (any free one) to 65535, not {number}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, where, and what it allows."""
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0: all (default: this machine)")
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="default: 8000; 0: any free one")
    parser.add_argument("--api_key", metavar="KEY", help=f"that clients must bring (default: {KEY_VARIABLE}, if set)")
    parser.add_argument("--served_model_name", metavar="NAME", help="what requests call the model (default: as here)")
    parser.add_argument(
        "--max_length",
        type=positive,
        metavar="N",
        help=f"most tokens of prompt and answer (default: the model's, but at most {LONGEST})",
    )
    parser.add_argument("--batch_size", type=positive, default=32, metavar="N", help="answers written at once")
    parser.add_argument("--prefill_chunk", type=positive, default=1024, metavar="N", help="tokens read between steps")
    parser.add_argument("--max_waiting", type=positive, default=256, metavar="N", help="answers that may wait")
    parser.add_argument("--max_body", type=positive, default=4 << 20, metavar="BYTES", help="most of a request")
    parser.add_argument("--timeout", type=seconds, default=3600.0, metavar="SECONDS", help="for a request's answers")
    parser.add_argument(
        "--drain_timeout", type=seconds, default=60.0, metavar="SECONDS", help="to finish answers after SIGTERM"
    )
    parser.add_argument(
        "--reasoning",
        choices=["separate", "inline"],
        default="separate",
        help="thinking goes to reasoning_content (default), or stays in the content",
    )


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Serve until Ctrl-C or SIGTERM; 0 when all that was under way was answered."""
    overrides = check_which_model(arguments, overrides)
    quiet_libraries(debug=arguments.debug)
    name, load = named_model(arguments, overrides)
    from sft.serve.installed import bind, check_installed

    check_installed()
    at = bind(arguments.host, arguments.port)
    model, tokenizer = load()
    from sft.generate import Engine
    from sft.generate.streaming import AsyncEngine
    from sft.serve.listen import Listener

    settings = _settings(arguments, model, name)
    engine = Engine(model, tokenizer, batch_size=arguments.batch_size, prefill_chunk=arguments.prefill_chunk)
    listener = Listener(AsyncEngine(engine, longest=settings.max_length), settings, at)
    _warn(listener.host, settings)

    def ready() -> None:
        address = f"[{listener.host}]" if ":" in listener.host else listener.host
        say(f"serving {settings.name} at http://{address}:{listener.port}/v1 (Ctrl-C or SIGTERM ends it)")

    if listener.run(ready=ready):
        return 0
    raise UserError(f"stopped; requests that got no whole answer: {listener.cut_off}")


def _settings(arguments: argparse.Namespace, model: Any, name: str) -> Any:
    from sft.serve.settings import Settings

    own = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    if arguments.max_length is not None and arguments.max_length > own:
        raise UserError(f"--max_length {arguments.max_length}: the model's positions end at {own}")
    return Settings(
        name=arguments.served_model_name or name,
        max_length=arguments.max_length or min(own, LONGEST),
        api_key=arguments.api_key or os.environ.get(KEY_VARIABLE) or None,
        max_waiting=arguments.max_waiting,
        max_body=arguments.max_body,
        seconds=arguments.timeout,
        drain_seconds=arguments.drain_timeout,
        separate_thinking=arguments.reasoning == "separate",
    )


def _warn(host: str, settings: Any) -> None:
    if settings.api_key is None and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        say(f"no API key is set ({KEY_VARIABLE}): whoever reaches this port can ask")
