"""`sft serve`: a model behind the OpenAI API."""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from typing import TYPE_CHECKING, Any

from sft.cli.answering import add_model_arguments, check_which_model, named_model
from sft.cli.common import positive, real, whole
from sft.utils.errors import UsageError, UserError
from sft.utils.quiet import quiet_libraries
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.serve.vllm_engine import VllmServer

TAKES_OVERRIDES = True
KEY_VARIABLE = "SFT_API_KEY"
LONGEST = 32768
PREFILL_CHUNK, MAX_WAITING, MAX_BODY, TIMEOUT, DRAIN_TIMEOUT = 1024, 256, 4 << 20, 3600.0, 60.0
OWN_ALONE = {
    "prefill_chunk": PREFILL_CHUNK,
    "max_waiting": MAX_WAITING,
    "max_body": MAX_BODY,
    "timeout": TIMEOUT,
    "drain_timeout": DRAIN_TIMEOUT,
}
"""Options that vLLM has no counterpart of, and what they are where nobody sets them."""


def seconds(text: str) -> float:
    """An option's time above zero."""
    number = real(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {number:g}")
    return number


def port(text: str) -> int:
    """An option's port."""
    number = whole(text)
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError(f"must be from 0 (any free one) to 65535, not {number}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, where, and what it allows."""
    add_model_arguments(parser)
    parser.add_argument("--engine", choices=["own", "vllm"], default="own", help="vllm: start vLLM's server of --model")
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
    parser.add_argument(
        "--prefill_chunk", type=positive, default=PREFILL_CHUNK, metavar="N", help="tokens read between steps"
    )
    parser.add_argument("--max_waiting", type=positive, default=MAX_WAITING, metavar="N", help="answers that may wait")
    parser.add_argument("--max_body", type=positive, default=MAX_BODY, metavar="BYTES", help="most of a request")
    parser.add_argument("--timeout", type=seconds, default=TIMEOUT, metavar="SECONDS", help="for a request's answers")
    parser.add_argument(
        "--drain_timeout",
        type=seconds,
        default=DRAIN_TIMEOUT,
        metavar="SECONDS",
        help="to finish answers after SIGTERM",
    )
    parser.add_argument(
        "--reasoning",
        choices=["separate", "inline"],
        help="thinking goes to reasoning_content (default), or stays in the content (with vLLM)",
    )


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Serve until Ctrl-C or SIGTERM; 0 when all that was under way was answered."""
    overrides = check_which_model(arguments, overrides)
    if arguments.engine == "vllm":
        return _become_vllm(arguments)
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
    _warn(listener.host, settings.api_key)

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
        separate_thinking=arguments.reasoning != "inline",
    )


def _become_vllm(arguments: argparse.Namespace) -> int:
    """Turn this process into vLLM's server; returns only by an error."""
    from sft.serve.vllm_engine import check_vllm_installed

    asked = vllm_server(arguments)
    check_vllm_installed(asked.model)
    key = arguments.api_key or os.environ.get(KEY_VARIABLE)
    if key:
        os.environ["VLLM_API_KEY"] = key  # not among the arguments, which every user of the machine can read
    _warn(asked.host, key)
    say(f"starting python {' '.join(asked.arguments())}")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *asked.arguments()])


def vllm_server(arguments: argparse.Namespace) -> VllmServer:
    """The server that the options ask vLLM for.

    Raises:
        UsageError: an option that vLLM doesn't know, by its name.
    """
    from sft.serve.vllm_engine import VllmServer, longest_of

    if arguments.model is None:
        raise UsageError("--engine vllm serves a folder: `sft export` the run's model, and give it as --model")
    for name, usual in OWN_ALONE.items():
        if getattr(arguments, name) != usual:
            raise UsageError(f"--{name} is an option of our own engine; --engine vllm doesn't know it")
    if arguments.reasoning == "separate":
        raise UsageError("--reasoning separate: with --engine vllm thinking stays in the content; leave it out")
    if arguments.port == 0:
        raise UsageError("--port 0: --engine vllm needs a port by its number")
    return VllmServer(
        model=arguments.model,
        host=arguments.host,
        port=arguments.port,
        name=arguments.served_model_name or arguments.model,
        max_length=arguments.max_length or longest_of(arguments.model, LONGEST),
        batch_size=arguments.batch_size,
        trust_remote_code=arguments.trust_remote_code,
    )


def _warn(host: str, key: str | None) -> None:
    if key is None and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        say(f"no API key is set ({KEY_VARIABLE}): whoever reaches this port can ask")
