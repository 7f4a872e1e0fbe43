"""What a run would do, without loading weights: models, texts, data, objective, memory."""

from __future__ import annotations

import torch
from rich.console import Console

from opd.config.objective import Term
from opd.config.schema import Config, Model, Student, Teacher
from opd.costs.memory import available_memory, training_memory
from opd.journal.folder import check as check_folder
from opd.journal.folder import holds_results
from opd.models.loading import adapter_targets, pick_device, pick_dtype, read_config
from opd.prompts.mixture import PromptStream
from opd.reports.figures import count, counted
from opd.reports.progress import say
from opd.reports.table import memory
from opd.text.agreement import rendered_difference
from opd.text.formats import PromptFormat
from opd.wiring.build import (
    PreparedTask,
    Texts,
    check_context,
    config_size,
    cut_answers,
    load_prompts,
    load_tasks,
    load_texts,
)


def dry_run(config: Config, console: Console | None = None) -> None:
    """Prints it for a person. Raises what the run itself would raise before its models are loaded."""
    console = console or Console()
    texts = load_texts(config)
    prompts = load_prompts(config, texts.student)
    tasks = load_tasks(config.evals)
    try:
        check_context(config, texts, prompts, tasks)
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
        ("text", _texts(texts)),
        ("prompts", _prompts(config, prompts)),
        ("objective", [_term(term) for term in config.objective.terms]),
        ("evals", [_task(task) for task in tasks] or ["none"]),
        ("the first prompt", _first_prompt(texts, prompts)),
    ]
    for title, lines in sections:
        say(console, title, "bold")
        for line in lines:
            say(console, f"  {line}")
        say(console, "")
    _memory(config, prompts, console)
    if config.run.existing in ("ask", "refuse") and holds_results(config.run.folder):
        say(console, f"{config.run.folder} holds a run: go on with run.existing=resume, or delete it with overwrite")


def _task(task: PreparedTask) -> str:
    return f"{task.spec.name}: {counted(len(task.rows), 'problem')}, {counted(task.spec.samples, 'answer')} each"


def _models(config: Config) -> list[str]:
    lines = []
    for role, spec in (("student", config.student), ("teacher", config.teacher)):
        if spec is None:
            continue
        device = pick_device(spec.device)
        size = config_size(spec, role)
        architecture = (read_config(spec, role).architectures or ["?"])[0]
        if isinstance(spec, Teacher) and spec.adapter_off:
            lines.append(f"{role}  the student with its adapter off: no weights of its own")
            continue
        lines.append(
            f"{role}  {spec.model}  {architecture}, about {count(size.parameters)} parameters, "
            f"{_stored(spec)} weights, {_dtype(spec)} compute, on {device}"
        )
    return lines if config.student.lora is None else [*lines, *_adapter(config.student, config.student.lora.rank)]


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


def _texts(texts: Texts) -> list[str]:
    lines = [f"student: {_format(texts.student)}"]
    if texts.teacher is not None and texts.agreement is not None:
        lines.append(f"teacher: {_format(texts.teacher)}")
        for ours, theirs in texts.agreement.end_map:
            tokens = texts.student.tokenizer.tokens
            lines.append(f"the teacher reads the student's end {tokens[ours]!r} as its own {tokens[theirs]!r}")
        lines += texts.agreement.notes
    return lines


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
    samples = 1 if config.objective.behaviour == "dataset" else config.sampling.samples_per_prompt
    answers = config.prompts.per_step * samples
    lines.append(
        f"a step: {counted(config.prompts.per_step, 'prompt')} x {counted(samples, 'answer')} = {answers}, "
        f"at most {answers * config.sampling.max_tokens:,} tokens; {counted(config.run.steps, 'step')}"
    )
    cut = cut_answers(config, prompts)
    return lines if cut is None else [*lines, cut]


def _term(term: Term) -> str:
    start = f"{term.name}: {term.coefficient:g} x"
    if term.target == "data":
        return f"{start} cross-entropy on the data's own answers, {term.reduction}"
    if term.support == "full":
        return f"{start} {term.shape.formula} on the whole vocabulary, {term.reduction}"
    weights = "" if term.importance == "none" else ", weighted by student / sampler"
    return (
        f"{start} {term.shape.formula} on the drawn token, log-ratio under the {term.advantage_under}{weights}, "
        f"{term.reduction}"
    )


def _memory(config: Config, prompts: PromptStream, console: Console) -> None:
    """What the student's device must hold, and what it has."""
    student, teacher = config.student, config.teacher
    device = pick_device(student.device)
    together = teacher is not None and not teacher.adapter_off and pick_device(teacher.device) == device
    parts = training_memory(
        config_size(student, "student"),
        config_size(teacher, "teacher") if teacher is not None and together else None,
        student_dtype=_dtype(student),
        teacher_dtype="float32" if teacher is None else _stored(teacher),
        tokens_per_micro_batch=config.learner.tokens_per_micro_batch,
        chunk_tokens=config.learner.chunk_tokens,
        slots=min(config.engine.slots, config.prompts.per_step * config.sampling.samples_per_prompt),
        max_len=prompts.longest + config.sampling.max_tokens,
        gradient_checkpointing=student.gradient_checkpointing,
        adapter=None if student.lora is None else adapter_targets(student).parameters(student.lora.rank),
        student_weights=_stored(student),
    )
    if device.type == "cuda":
        available: int | None = torch.cuda.mem_get_info(device)[0]
    else:
        available = available_memory("mps" if device.type == "mps" else "cpu")
    memory(parts, available, console)
    if available is not None and sum(parts.values()) > available:
        say(
            console,
            "lower learner.tokens_per_micro_batch, engine.slots or sampling.max_tokens, set "
            "student.gradient_checkpointing=true or teacher.offload=cpu, or train an adapter (student.lora={})",
            "yellow",
        )


def _stored(spec: Student | Teacher) -> str:
    """What the weights are kept in: what is trained in float32, what is only read in fewer bits."""
    if isinstance(spec, Student) and spec.lora is None:
        return "float32"
    return _dtype(spec) if spec.quantisation == "none" else spec.quantisation


def _dtype(spec: Model) -> str:
    return str(pick_dtype(spec.dtype, pick_device(spec.device))).removeprefix("torch.")


def _first_prompt(texts: Texts, prompts: PromptStream) -> list[str]:
    row = prompts.batch(0)[0].row
    if texts.teacher is None:
        return texts.student.show(row).splitlines()
    return rendered_difference(texts.student, texts.teacher, row).splitlines()
