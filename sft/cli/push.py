"""`sft push`: the exported folder onto the Hub, and back to compare."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.cli.common import add_recipe_arguments, dry_run, recipe_of
from sft.recipe import RunPaths
from sft.utils.errors import UsageError
from sft.utils.quiet import quiet_libraries
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.hub.push import PushResult

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options, what to push, and to whom it shows."""
    add_recipe_arguments(parser, stage=False)
    parser.add_argument(
        "--folder", metavar="DIR", help="exported folder to push (default: <output_dir>/export, made where needed)"
    )
    parser.add_argument("--repo_id", metavar="NAME/MODEL", help="default: the recipe's push.repo_id")
    parser.add_argument("--public", action="store_true", help="publish it; without this the repository is private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to (default main)")
    parser.add_argument(
        "--replace_card", action="store_true", help="also a README.md or LICENSE edited on the Hub, which else stays"
    )


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Export where nothing is named, upload what the Hub hasn't got yet, reload and compare."""
    recipe = recipe_of(arguments, overrides, as_run=True)
    paths, folder = RunPaths(recipe), Path(arguments.folder) if arguments.folder else None
    asked: dict[str, Any] = {
        "folder": folder,
        "repo_id": arguments.repo_id,
        "public": arguments.public,
        "revision": arguments.revision,
        "replace_card": arguments.replace_card,
    }
    if arguments.dry_run:
        from sft.run.outlook_of_results import push_outlook

        return dry_run(arguments, recipe, push_outlook(paths, **asked))
    if not (arguments.repo_id or recipe.push.repo_id):
        raise UsageError("say where to: --repo_id my-name/my-model, or set push.repo_id in the recipe")
    quiet_libraries(paths.root, debug=arguments.debug)
    from sft.run.publish import check_push, export_stage, push_export

    check_push(paths, folder=folder, repo_id=arguments.repo_id)
    asked["folder"] = folder or export_stage(paths, reuse=True, progress=say)
    arguments.told.update(show_push(push_export(paths, **asked, progress=say)))
    return 0


def show_push(result: PushResult) -> dict[str, Any]:
    """Where it is, who sees it, what was sent; the same as values."""
    seen = "public" if result.public else "private"
    sent = f"{len(result.uploaded)} files sent, {len(result.unchanged)} were there"
    print(f"pushed: {result.url} ({seen}; {sent}; reloaded and equal)")
    return asdict(result)
