"""Does it fit: bytes by part before anything is loaded, their peak over a step, and the memory there is.

Weights, moments and the cache are exact counts. Activations and what the pass over the vocabulary takes are estimates
of what PyTorch keeps; `activation_bytes_per_token` says how good they are, `bench/doctor_accuracy.py` how good the peak
is. Buffers of libraries, the allocator's gaps and a CUDA context come on top: leave a tenth of the memory free.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from opd.costs.size import ModelSize

# Quantised, beside the numbers: a float32 scale for every 64 of four bits; those of eight bits are one a row.
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 64}


_ROLLOUT = ("sampler_weights", "kv_cache", "engine_while_writing")
_UPDATE = ("_gradients", "student_compute_copy", "activations", "logits_chunk", "blocks", "head_gradient")
_NUMBERS_HOST = 2**20  # numbers in a block of the pass over the vocabulary on a CPU, of which about four are alive
_SCORER_TOKENS_HOST = 192  # tokens of a scorer's logits at a time, there
_KERNELS_KEPT = 1024  # products of different shapes whose kernels torch and oneDNN keep on a CPU
_KERNELS_OF_ONE = 556_000  # bytes of each: 569 MB with 1024 bfloat16 products on AVX-512, whatever their size
_HEAP_KEEPS = 31 * 2**20  # one array of the largest that glibc puts on its heap (`objectives.freed_memory.KEPT`): a
# hole that the next, longer one does not fit into, and that what is kept behind it does not let shrink


def training_memory(
    student: ModelSize,
    scorers: Mapping[str, tuple[ModelSize, str]],
    *,
    student_dtype: str,
    copies: Collection[str] = (),
    tokens_per_micro_batch: int,
    chunk_tokens: int,
    slots: int,
    max_len: int,
    gradient_checkpointing: bool,
    adapter: int | None = None,
    student_weights: str | None = None,
    sampler_dtype: str | None = None,
    on_host: bool = False,
    whole: Collection[str] | None = None,
    products: int = 0,
    one_batch: bool = False,
    foreign: Mapping[str, tuple[int, float]] | None = None,
) -> dict[str, int]:
    """Bytes by part when sampler, scorers and learner stand on one device; `need` is their peak. Order is stable.

    scorers         by name: size, and what the weights are stored in: float32, bfloat16, float16, or int8 and int4 for
                    a quantised one.

    student_dtype   compute type; with float32 the master weights are the compute weights.
    copies          scorers that are a float32 copy of what is trained.
    slots, max_len  answers written at the same time, and tokens of the longest prompt plus answer.
    adapter         parameters of a LoRA adapter; the student's own are then frozen. None: all are trained.
    student_weights what frozen weights are stored in (as a scorer's); read only with an adapter.
    sampler_dtype   what answers are written in; None: the compute type. Another one is a copy of the weights.
    on_host         the device is a CPU: our decoder keeps its cache in float32, and its weights packed: a copy. The
                    C library keeps some of what is freed.
    whole           scorers that give the whole vocabulary, and so a tile of logits; None: all of them.
    products        on a host: matrix products of different shapes (`products_on_host`).
    one_batch       a step is one micro-batch: gradients of the layers come while their activations go, and only the
                    head's are there with all of them.
    foreign         scorers with another tokenizer: the tokens of their vocabulary, and how many of theirs one of the
                    student's is.
    """
    foreign = foreign or {}
    width, sampled = BYTES[student_dtype], BYTES[sampler_dtype or student_dtype]
    quantised = adapter is not None and student_weights in ("int8", "int4")  # the model writes with its own forward
    copied = (on_host or sampled != width) and not quantised
    multiplied = student.parameters - student.tables + student.vocab * student.hidden
    tile = max(chunk_tokens, _NUMBERS_HOST // student.vocab) if on_host else chunk_tokens
    read = [name for name in (*scorers, *copies) if whole is None or name in whole]
    entries = sum(foreign[name][0] if name in foreign else student.vocab for name in read)
    who, trained = ("student", student.parameters) if adapter is None else ("adapter", adapter)
    parts: dict[str, float] = {
        f"{who}_master_weights": 4 * trained,
        f"{who}_gradients": 4 * trained,
        "adam_moments": 8 * trained,
        "student_compute_copy": 0 if adapter is not None or student_dtype == "float32" else width * trained,
        "sampler_weights": sampled * min(multiplied, student.parameters) if copied else 0,
        "kv_cache": slots * max_len * student.attention_layers * student.kv_width * (4 if on_host else sampled),
        "activations": tokens_per_micro_batch
        * activation_bytes_per_token(student, width, gradient_checkpointing=gradient_checkpointing),
        "logits_chunk": 4 * (student.vocab * tile + entries * (min(tile, _SCORER_TOKENS_HOST) if on_host else tile)),
    }
    if one_batch and adapter is None:
        parts["student_gradients"] = 4 * min(student.vocab * student.hidden, trained)
        parts["gradients_of_layers"] = 4 * trained - parts["student_gradients"]
    if on_host:
        parts["blocks"] = 4 * 4 * max(_NUMBERS_HOST, student.vocab)
        parts["heap_keeps"] = _HEAP_KEEPS
        parts["compiled_kernels"] = _KERNELS_OF_ONE * min(products, _KERNELS_KEPT)
    if adapter is None:
        parts["head_gradient"] = 4 * student.vocab * student.hidden  # summed by itself, then added to what there is
    if adapter is not None:
        stored = student_weights or student_dtype
        parts["student_frozen_weights"] = _stored(student, stored, width)
        if not (copied or quantised):  # the sampler fuses some projections, which copies them
            sides = student.attention_width + student.kv_width + 2 * student.mlp_width
            parts["sampler_weights"] = width * student.layers * student.hidden * sides
    for name, (size, dtype) in scorers.items():
        compute = max(BYTES[dtype], 2.0)  # quantised weights are multiplied in 16 bits
        parts[f"{name}_weights"] = _stored(size, dtype, compute)
        # A forward pass without gradients holds one layer, and hands over its last hidden states.
        tokens = tokens_per_micro_batch * max(foreign[name][1] if name in foreign else 1.0, 1.0)
        parts[f"{name}_activations"] = tokens * (_layer(size, compute) + size.hidden * compute)
    for name in copies:
        parts[f"{name}_weights"] = 4 * trained
        parts[f"{name}_activations"] = tokens_per_micro_batch * (_layer(student, width) + student.hidden * width)
    return {part: round(size) for part, size in parts.items()}


def products_on_host(rows: int, lengths: int, *, student_dtype: str, adapter: bool) -> int:
    """Matrix products of different shapes in a run on a CPU. oneDNN compiles kernels for each, and keeps them.

    rows     different numbers of rows that are written at a time.
    lengths  different numbers of tokens in a micro-batch.

    Counted in its log (ONEDNN_VERBOSE=profile_create) on Qwen3 models: our decoder has five products (four a layer,
    and the head), with an adapter in 16 bits twelve; a layer read by its own forward four, or nine; trained, each
    comes three times, with frozen weights twice. Before that the decoder is held against the model, in 16 bits by its
    own forward too.
    """
    narrow = student_dtype != "float32"
    written, read, trained = (12 if narrow else 5, 9, 18) if adapter else (5, 4, 12)
    checks = 4 * written + (8 * (read + 1) if narrow else 0)
    return written * rows + trained * lengths + checks + 20  # two more lengths by scorers, and tiles of the vocabulary


def need(parts: Mapping[str, int]) -> int:
    """Bytes at the peak of a step, from what `training_memory` says.

    Weights and moments are there all the time. Answers are written, read by scorers and trained on one after another,
    so on a device the largest of the three counts. On a host what was freed in small arrays stays with the process:
    there writing and training add up.
    """
    rollout = sum(size for part, size in parts.items() if part in _ROLLOUT)
    reading = max((size for part, size in parts.items() if _of_scorer(part)), default=0)
    update = sum(size for part, size in parts.items() if part.endswith(_UPDATE) and not _of_scorer(part))
    gradients = sum(size for part, size in parts.items() if part.endswith("_gradients"))
    later = parts.get("gradients_of_layers", 0)
    training = max(update, gradients + later, gradients + reading)
    passing = (*_ROLLOUT, "gradients_of_layers")
    always = sum(size for part, size in parts.items() if not (part in passing or part.endswith(_UPDATE)))
    return always + (rollout + training if "heap_keeps" in parts else max(rollout, training))


def _of_scorer(part: str) -> bool:
    return part.endswith("_activations")


def _stored(size: ModelSize, dtype: str, compute: float) -> float:
    """Bytes of a model's weights. Quantised are its layers alone: the tables stay in the compute type."""
    tables = min(size.tables, size.parameters) if dtype in ("int8", "int4") else 0
    return BYTES[dtype] * (size.parameters - tables) + compute * tables


def activation_bytes_per_token(size: ModelSize, width: float, *, gradient_checkpointing: bool) -> float:
    """Estimated bytes that autograd keeps for one padded token; `width` is the bytes of one number in compute type.

    A layer keeps about 8 hidden + 4 attention + 4 MLP widths: inputs, float32 copies and outputs of the norms, the
    residual; queries, keys, values and the attention's output; gate, its activation, up and their product. With
    checkpointing only each layer's input stays, plus one layer that is being recomputed. Held against what autograd
    saves (tests): Llama, Qwen3, Mistral, OLMo-2, Gemma 3 within 0.75 to 1.35 of it. Attention that keeps its scores
    (`eager`, dropout) needs more for long sequences, recurrent layers up to 1.6 times as much.
    """
    if gradient_checkpointing:
        return (size.layers + 2) * size.hidden * width + _layer(size, width)
    return size.layers * _layer(size, width) + 2 * size.hidden * width


def _layer(size: ModelSize, width: float) -> float:
    norms = 8 * size.hidden * 4.0  # norms compute in float32 whatever the compute type is
    return norms + 4 * (size.attention_width + size.mlp_width) * width


def available_memory(device: str) -> int | None:
    """Bytes that this process can still take on the host: free memory, or less where a container has a limit.

    `device` is "cpu", or "mps", which shares the host's memory; an accelerator's own memory is asked of its library.
    None where the system does not say.
    """
    assert device in ("cpu", "mps"), f"{device}: not the host's memory"
    return _host_memory(Path("/"))


def _host_memory(root: Path) -> int | None:
    found = [size for size in (_meminfo(root), _container(root)) if size is not None]
    if not found:
        names = os.sysconf_names
        page = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES"
        return os.sysconf(page) * os.sysconf("SC_PAGE_SIZE") if page in names else None
    return min(found)


def _meminfo(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _container(root: Path) -> int | None:
    """Limit minus use of the control group, version 2 or 1; page cache that can be dropped counts as free."""
    for folder, limit, used in (
        ("sys/fs/cgroup", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        most, now = _read(root / folder / limit).strip(), _read(root / folder / used).strip()
        if most.isdigit() and now.isdigit():
            stat = dict(line.split() for line in _read(root / folder / "memory.stat").splitlines())
            cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            return max(int(most) - int(now) + cache, 0)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
