"""What a run is, in a few lines above its first step."""

from __future__ import annotations

from pathlib import Path

from opd.config.schema import Config
from opd.config.scorers import all_scorers
from opd.prompts.mixture import PromptStream
from opd.reports.figures import counted
from opd.wiring.build import Texts, cut_answers, read_prompts
from opd.wiring.foreign import foreign_notes
from opd.wiring.foreign_fit import foreign_lines
from opd.wiring.scorers import called


def headline(config: Config, texts: Texts, prompts: PromptStream, folder: Path) -> list[str]:
    """Models, objective, prompts, folder; prompts that were dropped, and what fits but is worth a look."""
    scorers = [f"{name} {called(scorer)}" for name, scorer in all_scorers(config).items()]
    terms = " + ".join(t.name for t in config.objective.terms)
    lines = [
        f"student {config.student.model}",
        *(scorers or ["no teacher"]),
        f"objective {config.objective.preset or terms}",
        f"{counted(len(prompts), 'prompt')}, {config.prompts.per_step} a step",
        f"folder {folder}",
    ]
    limit = config.prompts.max_prompt_tokens
    dropped = [(name, n) for name, n in prompts.dropped.items() if n]
    lines += [f"{name}: {counted(n, 'prompt')} dropped, longer than {limit} tokens" for name, n in dropped]
    if texts.foreign:
        lines += foreign_lines(texts, read_prompts(config, prompts.prompts()))
    notes = [*texts.notes, *foreign_notes(config, texts)]
    if cut := cut_answers(config, prompts):
        notes.append(cut)
    return lines + [f"note: {note}" for note in notes]
