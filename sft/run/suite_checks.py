"""Suites whose problems are here, read before anything starts: those that couldn't be asked are told with the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sft.data.read import local
from sft.recipe.problems import KeyProblem
from sft.tokenizers.control import template_of
from sft.utils.errors import RefusedPromptError, UserError
from sft.utils.files import sha256_json

if TYPE_CHECKING:
    from sft.evaluate.suites import Problem
    from sft.recipe.schema import SuiteSection, Templates


class SuiteReader:
    """Reads the problems of suites; those that several stages ask once."""

    def __init__(self) -> None:
        self._found: dict[str, list[Problem] | UserError] = {}

    def read(self, suite: SuiteSection) -> list[Problem]:
        """The problems. Raises UserError for those that couldn't be asked."""
        key = sha256_json(suite.model_dump(include={"name", "source", "columns", "choices", "max_problems"}))
        if key not in self._found:
            self._found[key] = self._look(suite)
        found = self._found[key]
        if isinstance(found, UserError):
            raise found
        return found

    def _look(self, suite: SuiteSection) -> list[Problem] | UserError:
        from sft.evaluate.suites import load_problems

        try:
            return load_problems(suite)
        except UserError as error:
            return error


def suite_problems(
    suite: SuiteSection, reader: SuiteReader, tokenizer: Any | None = None, defaults: Templates | None = None
) -> Iterator[KeyProblem]:
    """What is wrong with the problems of a suite, as far as local files or the generator have them, and with what a
    `tokenizer` that is here would be asked. A data set of the Hub isn't fetched for it."""
    source = suite.source
    if source.path is not None and not local.looks_local(source.path):
        return
    from sft.evaluate.suites import check_prompts

    try:
        problems = reader.read(suite)
    except UserError as error:
        yield _problem(suite, error)
        return
    if tokenizer is None or template_of(tokenizer) is None:
        return
    try:
        check_prompts(tokenizer, problems, suite, defaults)
    except RefusedPromptError as error:
        yield _problem(suite, error)
    except UserError:
        return  # a prompt_template without {prompt}: told of the key itself


def _problem(suite: SuiteSection, error: UserError) -> KeyProblem:
    return KeyProblem((), str(error).removeprefix(f"Suite {suite.name}: "), error)
