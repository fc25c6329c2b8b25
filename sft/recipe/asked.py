"""How a stage's data asks its problems: suites without templates of their own ask the model as it was taught."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from sft.recipe.schema import DataSection, DataSource, Templates
from sft.recipe.steps import StepEntry
from sft.recipe.steps.render import RenderStep

log = logging.getLogger(__name__)


def asked_as(data: DataSection) -> Templates:
    """The templates around a problem after all steps, where all sources agree; else those of the section, and a line
    says so. (`completion_template` is of no use to a question, and left out.)"""
    ways = list(_ways(data.sources, [data], data.steps))
    if any(way != ways[0] for way in ways):
        log.warning(
            "the sources of this stage ask in different ways; suites ask as its data section says: give them a "
            "prompt_template and a system_prompt of their own"
        )
        return _rendered(_inherited([data]), data.steps)
    return ways[0]


def _ways(sources: Sequence[DataSource], around: list[Templates], after: Sequence[StepEntry]) -> Iterator[Templates]:
    for source in sources:
        inside, steps = [source, *around], [*source.steps, *after]
        if source.sources is not None:
            yield from _ways(source.sources, inside, steps)
        else:
            yield _rendered(_inherited(inside), steps)


def _inherited(sections: Sequence[Templates]) -> Templates:
    """The innermost section's word counts."""
    names = ("prompt_template", "system_prompt")
    return Templates(**{name: next(filter(None, (getattr(s, name) for s in sections)), None) for name in names})


def _rendered(templates: Templates, steps: Sequence[StepEntry]) -> Templates:
    """What `render` steps make of a problem that these templates have asked."""
    prompt, system = templates.prompt_template, templates.system_prompt
    for config in (entry.config for entry in steps):
        if isinstance(config, RenderStep):
            if config.prompt_template is not None:
                prompt = config.prompt_template.replace("{prompt}", prompt or "{prompt}")
            if config.system == "keep":
                system = system or config.system_prompt
            else:
                system = config.system_prompt if config.system == "replace" else None
    return Templates(prompt_template=prompt, system_prompt=system)
