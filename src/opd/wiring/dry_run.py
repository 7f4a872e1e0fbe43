"""What a run would do, without loading weights: models, texts, data, objective, memory."""

from __future__ import annotations

from rich.console import Console

from opd.config.alignments import Alignment
from opd.config.behaviours import Mixture, writers
from opd.config.objective import DataTerm, OutcomeTerm, Term
from opd.config.presets import as_line
from opd.config.reads import TEACHER, writing_scorers
from opd.config.schema import Config, Scorer, Student
from opd.config.scorers import COPIED, all_scorers, is_away, loaded_as
from opd.config.slots import Sampled, TopK, Weighting
from opd.journal.folder import check as check_folder
from opd.journal.folder import holds_results
from opd.models.loading import adapter_targets, pick_device, read_config
from opd.prompts.mixture import PromptStream
from opd.reports.figures import count, counted, percent
from opd.reports.objective import shape_in_words, target_in_words
from opd.reports.progress import say
from opd.reports.table import memory
from opd.text.agreement import rendered_difference
from opd.text.crossing import Crossing
from opd.text.formats import PromptFormat
from opd.wiring.build import (
    PreparedTask,
    Texts,
    check_context,
    compute_type,
    config_size,
    cut_answers,
    load_prompts,
    load_tasks,
    load_texts,
    read_prompts,
    scorer_role,
    stored_type,
)
from opd.wiring.elsewhere import check_elsewhere
from opd.wiring.foreign import foreign_notes
from opd.wiring.foreign_fit import foreign_lines
from opd.wiring.memory_plan import free_on, plan_memory, shares
from opd.wiring.scorers import called
from opd.wiring.writing import check_writers, make_rewards, one_answer


def dry_run(config: Config, console: Console | None = None) -> None:
    """Prints it for a person. Raises what the run itself would raise before its models are loaded."""
    console = console or Console()
    texts = load_texts(config)
    prompts = load_prompts(config, texts.student)
    tasks = load_tasks(config.evals)
    try:
        check_elsewhere(config, dry=True)
        check_context(config, texts, prompts, tasks)
        check_writers(config, prompts, texts.student)
        if rewards := make_rewards(config, prompts, texts.student):
            rewards.close()
    finally:
        for task in tasks:
            task.grader.close()
    check_folder(
        config.run.folder,
        existing="overwrite" if config.run.existing == "overwrite" else "resume",
        config=config.model_dump(mode="json"),
    )
    sections = [
        ("models", _models(config)),
        ("text", _texts(config, texts, prompts)),
        ("prompts", _prompts(config, prompts)),
        ("objective", _objective(config)),
        ("evals", [_task(task) for task in tasks] or ["none"]),
        ("the first prompt", _first_prompt(texts, prompts, config)),
    ]
    for title, lines in sections:
        say(console, title, "bold")
        for line in lines:
            say(console, f"  {line}")
        say(console, "")
    _memory(config, texts, prompts, console)
    if config.run.existing in ("ask", "refuse") and holds_results(config.run.folder):
        say(console, f"{config.run.folder} holds a run: go on with run.existing=resume, or delete it with overwrite")


def _task(task: PreparedTask) -> str:
    return f"{task.spec.name}: {counted(len(task.rows), 'problem')}, {counted(task.spec.samples, 'answer')} each"


def _models(config: Config) -> list[str]:
    lines = [_model("student", config.student, "student")]
    for name, scorer in all_scorers(config).items():
        if is_away(scorer):
            lines.append(f"{name}  {called(scorer)}: no weights on this machine")
        elif scorer.weights == "model":
            lines.append(_model(name, scorer, scorer_role(config, name)))
        else:
            lines.append(f"{name}  {called(scorer)}: {_own_memory(config, scorer)}")
    return lines if config.student.lora is None else [*lines, *_adapter(config.student, config.student.lora.rank)]


def _model(name: str, spec: Student | Scorer, role: str) -> str:
    size = config_size(spec, role)
    architecture = (read_config(spec, role).architectures or ["?"])[0]
    return (
        f"{name}  {spec.model}  {architecture}, about {count(size.parameters)} parameters, "
        f"{stored_type(spec)} weights, {compute_type(spec)} compute, on {pick_device(spec.device)}"
    )


def _own_memory(config: Config, scorer: Scorer) -> str:
    if scorer.weights in COPIED:
        return "a float32 copy of its adapter" if config.student.lora is not None else "a float32 copy of its weights"
    if shares(config, scorer):
        return "no weights of its own"
    return f"loaded once more, {stored_type(loaded_as(config, scorer))} weights"


def _adapter(student: Student, rank: int) -> list[str]:
    targets = adapter_targets(student)
    kinds = sorted({name.rpartition(".")[2] for name in (*targets.layers, *targets.experts)})
    layers = counted(len(targets.layers) + len(targets.experts), "layer")
    lines = [
        f"adapter  LoRA of rank {rank}, {count(targets.parameters(rank))} float32 parameters beside {layers}: "
        f"{', '.join(kinds)}"
    ]
    if targets.without:
        without = sorted({".".join(name.split(".")[-2:]) for name in targets.without})
        lines.append(f"adapter  none beside {', '.join(without)}: peft cannot reach them")
    return lines


def _texts(config: Config, texts: Texts, prompts: PromptStream) -> list[str]:
    lines = [f"student: {_format(texts.student)}"]
    for name, fmt in texts.scorers.items():
        reads = "" if not fmt.context.columns else f", with {', '.join(fmt.context.columns)} in its prompt"
        lines.append(f"{name}: {_format(fmt)}{reads}")
        for ours, theirs in _ends(texts, name):
            who = "the teacher" if name == TEACHER else name
            lines.append(f"{who} reads the student's end {ours!r} as its own {theirs!r}")
    asked = read_prompts(config, prompts.prompts()) if texts.foreign else {}
    return [*lines, *foreign_lines(texts, asked), *texts.notes, *foreign_notes(config, texts)]


def _ends(texts: Texts, name: str) -> list[tuple[str, str]]:
    """The student's end tokens that a scorer reads as another one of its own."""
    agreement, ours, theirs = texts.agreements[name], texts.student, texts.scorers[name]
    pairs = [(ours.end_ids[0], theirs.end_ids[0])] if isinstance(agreement, Crossing) else list(agreement.end_map)
    said = [(ours.tokenizer.tokens[a], theirs.tokenizer.tokens[b]) for a, b in pairs]
    return [(a, b) for a, b in said if a != b]


def _format(fmt: PromptFormat) -> str:
    ends = ", ".join(repr(fmt.tokenizer.tokens[n]) for n in fmt.end_ids)
    return f"{fmt.kind} format, {fmt.tokenizer.vocab_size} tokens, ends with {ends}"


def _prompts(config: Config, prompts: PromptStream) -> list[str]:
    lines = [f"{len(prompts)} usable, the longest has {prompts.longest} tokens"]
    lines += [
        f"{count} of {name!r} dropped: longer than prompts.max_prompt_tokens = {config.prompts.max_prompt_tokens}"
        for name, count in prompts.dropped.items()
        if count
    ]
    samples = 1 if one_answer(config) else config.sampling.samples_per_prompt
    answers = config.prompts.per_step * samples
    lines.append(
        f"a step: {counted(config.prompts.per_step, 'prompt')} x {counted(samples, 'answer')} = {answers}, "
        f"at most {answers * config.sampling.max_tokens:,} tokens; {counted(config.run.steps, 'step')}"
    )
    read = read_prompts(config, prompts.prompts())
    lines += [f"{name} is asked about {counted(len(asked), 'prompt')} of them" for name, asked in read.items()]
    cut = cut_answers(config, prompts)
    return lines if cut is None else [*lines, cut]


def _objective(config: Config) -> list[str]:
    behaviour = config.objective.behaviour
    assert behaviour is not None, "the preset is not expanded"
    names = {kind: name for name, kind in writing_scorers(behaviour).items()}
    who = [w.kind + (f" ({names[w.kind]})" if w.kind in names else "") for w in writers(behaviour)]
    if isinstance(behaviour, Mixture):
        unit = "batches" if behaviour.per == "batch" else "prompts"
        who = [f"{name} {percent(part.share)} of {unit}" for name, part in zip(who, behaviour.of, strict=True)]
    lines = [f"answers are written by: {', '.join(who)}", *map(_term, config.objective.terms)]
    return lines if config.rewards is None else [*lines, f"rewards: {config.rewards.grader.kind} grader"]


def _term(term: Term) -> str:
    size = as_line(term.coefficient)
    reads = [f" of {', '.join(term.domains)}" if term.domains else ""]
    reads.append(f" by {', '.join(term.written_by)}" if term.written_by else "")
    end = f"{term.reduction}, answers{''.join(reads)}" if any(reads) else term.reduction
    start = f"{term.name}: {size} x"
    if isinstance(term, DataTerm):
        return f"{start} cross-entropy on answers that somebody else wrote, {end}"
    if isinstance(term, OutcomeTerm):
        return f"{start} policy gradient of the reward ({term.advantage}), {_weights(term.importance)}, {end}"
    target = target_in_words(term.target.model_dump())
    if isinstance(term.support, TopK):
        where = f"on {term.support.kind} {term.support.k}, tail {term.support.tail}"
    elif isinstance(term.support, Sampled):
        where = f"on the drawn token, log-ratio under the {term.advantage_under}"
    else:
        where = "on the whole vocabulary"
    weights = "" if term.importance.kind == "none" else f", {_weights(term.importance)}"
    joined = "" if term.alignment.kind == "strict" else f", tokens joined as {_joined(term.alignment)}"
    return f"{start} {shape_in_words(term.shape.model_dump())}, target = {target}, {where}{joined}{weights}, {end}"


def _joined(alignment: Alignment) -> str:
    options = {k: v for k, v in alignment.model_dump(exclude_defaults=True).items() if k != "kind"}
    return alignment.kind + (f" {as_line(options)}" if options else "")


def _weights(importance: Weighting) -> str:
    numbers = [f"{name} {value:g}" for name, value in importance.model_dump().items() if isinstance(value, float)]
    if importance.kind == "none":
        return "no weights"
    return f"weights {importance.kind}" + (f" ({', '.join(numbers)})" if numbers else "")


def _memory(config: Config, texts: Texts, prompts: PromptStream, console: Console) -> None:
    """What the student's device must hold, and what it has."""
    plan = plan_memory(config, prompts, texts=texts)
    available = free_on(plan.device)
    memory(plan.parts, available, console)
    if available is not None and plan.need > available:
        say(
            console,
            "lower learner.tokens_per_micro_batch, engine.slots or sampling.max_tokens, set "
            "student.gradient_checkpointing=true or a scorer's offload, or train an adapter (student.lora={})",
            "yellow",
        )


def _first_prompt(texts: Texts, prompts: PromptStream, config: Config) -> list[str]:
    """What the student reads, and every scorer that is asked about it."""
    first = prompts.batch(0)[0]
    readers = read_prompts(config, [first])
    if not readers:
        return texts.student.show(first.row).splitlines()
    ours = texts.student.show(first.row)
    lines: list[str] = []
    for name in readers:
        theirs = texts.scorers[name]
        if lines and theirs.show(first.row) == ours:
            lines.append(f"--- {name} reads the same as the student")
        else:
            lines += rendered_difference(texts.student, theirs, first.row, name=name).splitlines()
    return lines
