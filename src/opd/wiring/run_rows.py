"""The rows behind a run's recorded answers: what a model with another format needs to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.config.loading import load_config
from opd.errors import DataError, OpdError
from opd.text.formats import PromptFormat
from opd.types import Row
from opd.wiring.build import load_prompts


def run_rows(folder: Path, lines: Sequence[Mapping[str, Any]], fmt: PromptFormat) -> dict[str, Row]:
    """Prompt id to its row, from the sources that the run's config names.

    lines  recorded rollouts, each with the ids of its prompt. fmt: the run's student's.
    DataError where the sources do not give these prompts any more.
    """
    said = (
        f"{folder}: a teacher with another tokenizer needs the rows that these answers are about, not the ids that the "
        "student read, and the run's own sources do not give them: {}. Give the rows themselves, in a file with "
        "columns prompt and completion"
    )
    wanted = {line["prompt_id"].partition("#")[0]: line for line in lines}
    rows: dict[str, Row] = {}
    try:
        for prompt in load_prompts(load_config([folder / "config.json"]).config, fmt).prompts():
            line = wanted.get(prompt.id)
            if line is None:
                continue
            if prompt.ids.tolist() != line["prompt_ids"]:
                raise DataError(f"the prompt of {line['id']} is another one there now")
            rows[prompt.id] = prompt.row
            if len(rows) == len(wanted):
                break
    except OpdError as error:
        raise DataError(said.format(error)) from error
    missing = sorted(wanted.keys() - rows.keys())
    if missing:
        raise DataError(said.format(f"there is no {missing[0]}"))
    return {line["prompt_id"]: rows[line["prompt_id"].partition("#")[0]] for line in lines}
