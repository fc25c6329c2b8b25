"""The plug-in in vLLM, against our engine: greedy answers, log-probabilities, refusals, the OpenAI server.

    python tests/in_vllm/run.py [CHECK ...] [--fresh]

Builds .versions/vllm (the CPU build of one release of vLLM, and the plug-in from serve/), exports small random models,
and compares. Checks: chunks, fast, heads, prefixes, turns, halves, refusals, server; without names all of them. The
environment is kept for the next run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from answers import chunks, fast, halves, heads, prefixes, turns
from environment import build
from refusals import refusals
from server import server

CHECKS: dict[str, Callable[[Path], list[str]]] = {
    check.__name__: check for check in (chunks, fast, heads, prefixes, turns, halves, refusals, server)
}


def main() -> int:
    """Build, and run the checks that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join(CHECKS))
    parser.add_argument("--fresh", action="store_true", help="make the environment anew")
    options = parser.parse_args()
    unknown = [name for name in options.checks if name not in CHECKS]
    if unknown:
        parser.error(f"no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    build(options.fresh)
    for name in options.checks or CHECKS:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            for line in CHECKS[name](Path(place)):
                print(line, flush=True)
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
