"""The entry point: finds the verb, runs it, and turns errors into one sentence and an exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

from sft.cli.told import add_json_argument, handed_up, spoken_aside, tell, wants_json
from sft.train.interrupt import stop_signals
from sft.utils.distributed import alike, is_main, rank
from sft.utils.error_codes import STALLED, as_json
from sft.utils.errors import UsageError, UserError, sentence, shown
from sft.utils.progress import end_line
from sft.utils.quiet import tell_our_warnings

if TYPE_CHECKING:
    from sft.run.placement import Placement

# Verb -> what it does. The module of a verb is sft.cli.<verb> (eval: its name is a builtin's, so evaluate).
VERBS = {
    "run": "all stages in order: prepare, train, evaluate; then export and report",
    "launch": "start one of these on a cluster: by Slurm, torchrun, or a list of hosts",
    "sweep": "run a grid of recipes: keys with several values, as in --defaults.train.seed 1,2",
    "plan": "tell what a recipe will take on given GPUs: memory, time, disk; what to change where it doesn't fit",
    "prepare": "tokenise and pack the data of the stages",
    "preview": "show rows as they will be trained on, token by token",
    "train": "train the stages, without evaluating",
    "eval": "answer the recipe's held-out problems and check the answers",
    "compare": "tell whether one model is better than another, problem by problem",
    "bench": "measure how fast a model answers, beside a transformer of its size",
    "chat": "talk to a stage's model, an exported folder or a Hub model",
    "serve": "answer clients of the OpenAI API",
    "export": "write the folder that goes to the Hub",
    "push": "upload the exported folder to the Hub, reload it and compare",
    "report": "write the run's HTML report",
    "recipes": "list, show or copy packaged recipes; say what keys a recipe takes",
    "doctor": "show what is installed, which kernels are used, and what to do about it",
}
MODULES = {"eval": "evaluate"}
INTERRUPTED = "interrupted; the same command continues it"


class Verb(Protocol):
    """A module of this package that is a verb."""

    TAKES_OVERRIDES: bool

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's own options."""

    def execute(self, arguments: argparse.Namespace, overrides: list[str]) -> int:
        """Do it; the exit status."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors look like all others and point at --help."""

    def error(self, message: str) -> object:  # type: ignore[override]
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's).

    Returns 0 for done, 1 for failed, 2 for wrong usage; after a signal 128 and its number: 130 for Ctrl-C, 143 for
    SIGTERM, 138 for SIGUSR1.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    tell_our_warnings()
    with stop_signals():
        try:
            return _run(words)
        except BaseException as error:
            status, text = _status(error, continues=words[:1] not in (["chat"], ["serve"], ["bench"]))
            if "--debug" in words and not isinstance(error, SystemExit):
                traceback.print_exc()
            if wants_json(words) and text is not None:
                tell(as_json(error, text, status))
            return status


def _run(words: list[str]) -> int:
    with alike():
        verb, arguments, rest = parsed(words)
        where = _processes(arguments)
    if where is not None:
        return _as_processes(words, where)
    with spoken_aside(wants_json(words)):
        status = verb.execute(arguments, rest)
    if wants_json(words) and is_main():
        tell(arguments.told)
    return status


def _as_processes(words: list[str], where: Placement) -> int:
    """The command as several processes; what they have to tell is told here."""
    from sft.run.launching import launch

    with handed_up(wants_json(words)) as told, spoken_aside(wants_json(words)):
        status = launch(words, where)
    if wants_json(words) and (told or status):
        code = {STALLED: "stalled"}.get(status, "interrupted" if status > 128 else "processes")
        message = f"its processes ended with status {status}, for the reason told on standard error"
        tell(told or {"error": {"code": code, "message": message}, "exit_status": status})
    return status


def _processes(arguments: argparse.Namespace) -> Placement | None:
    """The processes that the command is to be; None: this one does it."""
    if not getattr(arguments, "as_processes", False) or arguments.dry_run or getattr(arguments, "rescore", False):
        return None
    from sft.run.placement import placement

    return placement(arguments.num_processes)


def parsed(words: list[str]) -> tuple[Verb, argparse.Namespace, list[str]]:
    """The verb that a command line names, its options, and the words that are left for the recipe's keys.

    Raises UsageError for a verb or an option that isn't there.
    """
    parser = _top_parser()
    if not words or words[0] in ("-h", "--help", "--version"):
        parser.parse_args(words or ["--help"])
    name = words[0]
    if name not in VERBS:
        from sft.recipe.problems import nearest

        raise UsageError(f"no verb {name!r}{nearest(name, VERBS) or ''}; `sft --help` lists them")
    verb = cast(Verb, importlib.import_module(f"sft.cli.{MODULES.get(name, name)}"))
    verb_parser = Parser(
        prog=f"sft {name}",
        usage=f"sft {name} RECIPE [options] [--key value ...]" if verb.TAKES_OVERRIDES else None,
        description=f"{VERBS[name][0].upper()}{VERBS[name][1:]}.",
        epilog=_OVERRIDES_HELP if verb.TAKES_OVERRIDES else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb_parser.set_defaults(words=words)
    verb_parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if name != "serve":
        add_json_argument(verb_parser)
    verb.add_arguments(verb_parser)
    arguments, rest = verb_parser.parse_known_args(words[1:])
    if rest and not verb.TAKES_OVERRIDES:
        verb_parser.error(f"unknown argument {rest[0]!r}")
    return verb, arguments, rest


_OVERRIDES_HELP = """any key of the recipe can be set, the later of two wins:
  --stages.NAME.train.learning_rate 2e-5     a stage by its name or number, or `all`
  --model.tokenizer DIR   --seed=7   --stages.sft.data.sources.0.path rows.jsonl"""


def _top_parser() -> argparse.ArgumentParser:
    from sft import __version__

    verbs = "\n".join(f"  {name:9}{text}" for name, text in VERBS.items())
    parser = Parser(
        prog="sft",
        usage="sft VERB [RECIPE] [--stage NAME] [--key value ...]",
        description="Staged supervised fine-tuning of SambaY and other causal language models.",
        epilog=f"verbs:\n{verbs}\n\n`sft VERB --help` says more. Start with: sft recipes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sambay-sft {__version__}")
    return parser


def _status(error: BaseException, *, continues: bool = True) -> tuple[int, str | None]:
    """Say what happened in one sentence; the exit status that goes with it, and the sentence, unless another process
    says it."""
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else 0 if error.code is None else 1), None
    if isinstance(error, BrokenPipeError):
        # The reader of our output went away (`sft recipes | head`); Python would complain again when flushing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, None
    if isinstance(error, UserError):
        ours = getattr(error, "from_rank", rank()) == rank()  # told once, by the process that it happened to
        return error.exit_code, _say(str(error)) if ours else None
    if isinstance(error, KeyboardInterrupt):
        text = INTERRUPTED if continues else "interrupted"
        return int(getattr(error, "exit_code", 130)), _say(text) if is_main() else None
    return 1, _say(sentence(error))


def _say(text: str) -> str:
    end_line()
    for line in text.splitlines():
        print(f"sft: {shown(line)}", file=sys.stderr)
    return text
