"""How a source of data is called where it was given no name."""

from __future__ import annotations

from pathlib import Path

from opd.config.sources import InlineSource, ReasoningGymSource, Source


def source_name(source: Source) -> str:
    """How reports and row ids call a source: its `name`, else its task, or its path's last name without its ending."""
    if source.name is not None:
        return source.name
    if isinstance(source, ReasoningGymSource):
        return source.task
    if isinstance(source, InlineSource):
        return "inline"
    last = Path(source.path).name
    return last.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json").removesuffix(".parquet")
