"""What sources are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sft.recipe.merge import name_of
from sft.recipe.schema import DataSource


def source_name(source: DataSource) -> str:
    """What a source is called: its name, its recipe's or data set's, or its file's."""
    if source.name:
        return source.name
    if source.generate is not None:
        return f"generate:{source.generate.family}"
    return name_of(source.recipe or source.path or "sources")


def source_names(sources: Sequence[DataSource]) -> list[str]:
    """What the sources of a group are called: two files of one name go by their folders too, and what is still alike
    by a number. Alike are those alone that the recipe itself calls so."""
    names = [source_name(source) for source in sources]
    for depth in range(1, 8):
        counts = Counter(names)
        for place, source in enumerate(sources):
            if counts[names[place]] > 1 and not source.name and source.generate is None:
                parents = Path(source.path or source.recipe or "").expanduser().absolute().parts[1:-1][-depth:]
                names[place] = "/".join([*parents, source_name(source)])
    alike = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{n} {a + 1}" if a and not s.name else n for n, a, s in zip(names, alike, sources, strict=True)]
