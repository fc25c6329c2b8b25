"""`sft preview`: rows as they will be trained on."""

from __future__ import annotations

import argparse

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options and how many rows."""
    from sft.cli.common import add_recipe_arguments

    add_recipe_arguments(parser)
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="rows to show of each stage (default 2)")
