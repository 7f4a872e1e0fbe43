"""Decoding, scoring, training and a whole step on a CUDA device, against transformers and TRL.

    python bench/gpu_step.py --out gpu.json --merge bench/results/latest.json
    python bench/gpu_step.py --tiny          the same code in seconds, on the host: no figure of it means anything

Models are random and made on the device, in the shapes of Qwen3: 0.6B from 4B, 1.7B from 8B. Students have float32
weights and bfloat16 products, teachers are bfloat16. Every row is another prompt, and no answer ends early, so that all
sides make the same tokens.

decode    tokens/s of the answers, prompts read first: our engine, and `generate` of transformers on a bfloat16 copy.
scoring   tokens/s of the teacher over prompts and answers, log-probabilities of the answers' tokens.
training  tokens/s of the learner on drawn tokens, optimiser included, with the teacher's numbers made beforehand.
step      write, score, train and take the weights back, reverse KL over the whole vocabulary; and TRL's step, made by
          the interpreter that --trl-python names.

Useful work counts the body at every token and the head at answers' tokens: 2 FLOPs for a weight, 4 x width for a pair
of tokens in a layer of attention; three times that where there is a gradient. Padding and what is computed twice is
not useful. Its share is taken of the bfloat16 products that this device does in the same run, and of its data sheet.

Sides run in turn, after runs that do not count; times are CUDA events, figures are medians with lowest and highest. A
part that does not fit into memory is not_measured, with the reason, and the others go on.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
import transformers
from gpu_peer import against_trl, compared, spread
from results import not_measured

from opd.config.objective import Objective as ObjectiveSpec
from opd.config.presets import expand
from opd.config.schema import Learner, Optim
from opd.costs.size import ModelSize, model_size
from opd.learner.learner import LocalLearner, is_out_of_memory
from opd.models.causal import CausalLM
from opd.models.packing import pack, plan
from opd.objectives.objective import Objective
from opd.rollouts.engine import EmbeddedEngine
from opd.teachers.local import LocalTeacher
from opd.text.agreement import Agreement
from opd.types import Batch, Prompt, Rollout, Row, SamplingParams, ScorerRows, Spans, Want

FULL_RATE = {"H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s of data sheets, by a part of the device's name; the first that fits counts."""


@dataclass(frozen=True)
class Shape:
    """Of a Qwen3 model, as its published config says it."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int = 8
    head_dim: int = 128
    tied: bool = True
    vocab: int = 151_936

    def config(self) -> dict[str, Any]:
        """Arguments of `transformers.Qwen3Config`."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "max_position_embeddings": 40_960,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }


@dataclass(frozen=True)
class Work:
    """One student and teacher, and the rows of a step."""

    student: Shape
    teacher: Shape
    rows: int = 64
    prompt_tokens: int = 128
    new_tokens: int = 256
    product: int = 8192  # side of the square matrices whose product gives the device's rate

    @property
    def tokens(self) -> int:
        """Of prompts and answers."""
        return self.rows * (self.prompt_tokens + self.new_tokens)

    @property
    def answer_tokens(self) -> int:
        return self.rows * self.new_tokens


WORKS = {
    "0.6B<-4B": Work(Shape(1024, 3072, 28, 16), Shape(2560, 9728, 36, 32)),
    "1.7B<-8B": Work(Shape(2048, 6144, 28, 16), Shape(4096, 12288, 36, 32, tied=False)),
}
_SMALL = Shape(64, 128, 2, 4, kv_heads=2, head_dim=16, vocab=512)
PARTS = ("decode", "scoring", "training", "step")
TINY = {"tiny": Work(_SMALL, _SMALL, rows=4, prompt_tokens=8, new_tokens=8, product=128)}


class RowIds:
    """A prompt format without text: what `LocalTeacher` needs of one."""

    fingerprint = "random ids"

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._ids = {p.id: p.ids for p in prompts}

    def prompt_ids(self, row: Row) -> np.ndarray:
        return self._ids[row.id]


class MadeBefore:
    """Evidence of a teacher that was made before the clock runs; by the answers of a micro-batch."""

    def __init__(self, teacher: LocalTeacher, rollouts_N: Sequence[Rollout]) -> None:
        self._handle = teacher.evidence(rollouts_N)
        self._made: dict[tuple[str, ...], list[ScorerRows]] = {}

    def spans(self) -> Mapping[str, Mapping[str, Spans]]:
        return self._handle.spans()

    def prepare(self, wants: Mapping[str, Want]) -> int:
        return 0

    def pull(self, batch: Batch, wants: Mapping[str, Want]) -> list[ScorerRows]:
        key = tuple(r.id for r in batch.rollouts)
        if key not in self._made:
            self._made[key] = self._handle.pull(batch, wants)
        return self._made[key]

    def lengths(self) -> Mapping[str, Sequence[int]]:
        return self._handle.lengths()

    def release(self) -> None:
        """Stays: the next update reads it again."""


def causal(shape: Shape, device: torch.device, dtype: torch.dtype, *, name: str, trained: bool) -> CausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        config = transformers.Qwen3Config(**shape.config())
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32 if trained else dtype)
    module.to(device).eval().requires_grad_(trained)
    return CausalLM(module, vocab_size=shape.vocab, compute_dtype=dtype, name=name)


class Bench:
    """One `Work` on one device."""

    def __init__(self, work: Work, device: torch.device, runs: int, warm_up: int) -> None:
        self.work, self.device, self.runs, self.warm_up = work, device, runs, warm_up
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        rng, V = np.random.default_rng(0), work.student.vocab
        self.prompts = [
            Prompt(row=Row(id=f"r/{n}", domain="r", prompt=""), ids=rng.integers(0, V, work.prompt_tokens))
            for n in range(work.rows)
        ]
        self.params = SamplingParams(max_tokens=work.new_tokens)
        self.student = causal(work.student, device, self.dtype, name="student", trained=True)
        self.teacher = LocalTeacher(
            causal(work.teacher, device, self.dtype, name="teacher", trained=False),
            RowIds(self.prompts),  # pyright: ignore[reportArgumentType]
            Agreement(vocab_size=V),
            name="teacher",
            temperature=1.0,
            chunk_tokens=Learner().chunk_tokens,
            share_prompts=Learner().share_prompts,
        )

    def engine(self) -> EmbeddedEngine:
        return EmbeddedEngine(self.student, seed=0, slots=self.work.rows, path="lean")

    def learner(self, preset: str) -> LocalLearner:
        made = expand(preset, {})
        spec = ObjectiveSpec(behaviour=made.behaviour, terms=made.terms)
        learner = Learner(diagnostics_every=0)
        return LocalLearner(self.student, Objective(spec), optim=Optim(), spec=learner, total_steps=1000)

    def write(self, engine: EmbeddedEngine) -> list[Rollout]:
        return engine.generate(self.prompts, self.params, tag="bench")

    def seconds(self, *sides: Callable[[], object]) -> list[list[float]]:
        """Of each side, run by run."""
        for _ in range(self.warm_up):
            for side in sides:
                side()
        found: list[list[float]] = [[] for _ in sides]
        for _ in range(self.runs):
            for side, times in zip(sides, found, strict=True):
                times.append(self._seconds(side))
        return found

    def finish(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _seconds(self, side: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            side()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        side()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000

    def product_rate(self) -> float:
        """FLOP/s of one large product of random matrices: the best of the runs."""
        side = self.work.product
        left, right = (torch.randn(side, side, device=self.device).to(self.dtype) for _ in range(2))
        (times,) = self.seconds(lambda: left @ right)
        return 2 * side**3 / min(times)


def decode(bench: Bench) -> dict[str, Any]:
    engine, work = bench.engine(), bench.work
    theirs = copy.deepcopy(bench.student.module).to(bench.dtype).requires_grad_(False)
    ids_NS = torch.from_numpy(np.stack([p.ids for p in bench.prompts])).to(bench.device)
    more = {"max_new_tokens": work.new_tokens, "do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}

    @torch.inference_mode()
    def generate() -> None:
        made_NT = theirs.generate(ids_NS, attention_mask=torch.ones_like(ids_NS), pad_token_id=0, **more)
        assert made_NT.shape[1] == work.prompt_tokens + work.new_tokens, "an answer ended early"

    ours, peer = bench.seconds(lambda: bench.write(engine), generate)
    return compared(ours, peer, work.answer_tokens, "transformers generate", path=engine.path)


def scoring(bench: Bench, rollouts: Sequence[Rollout], rates: Mapping[str, float | None]) -> dict[str, Any]:
    wants = {"teacher": Want("sampled", frozenset(r.id for r in rollouts))}
    groups = plan(rollouts, Learner().tokens_per_micro_batch)

    def score() -> None:
        evidence = bench.teacher.evidence(rollouts)
        for group in groups:
            evidence.pull(pack(group, device=bench.device), wants)

    (times,) = bench.seconds(score)
    return used(times, bench.work.tokens, useful_flops(bench.work, bench.teacher.model), rates)


def training(bench: Bench, rollouts: Sequence[Rollout], rates: Mapping[str, float | None]) -> dict[str, Any]:
    learner, evidence = bench.learner("tml"), MadeBefore(bench.teacher, rollouts)
    (times,) = bench.seconds(lambda: learner.update(rollouts, evidence))
    made = used(times, bench.work.tokens, 3 * useful_flops(bench.work, bench.student), rates)
    return made | {"kernel": learner.kernel.name, "lowered": learner.lowered()}


def step(bench: Bench) -> dict[str, Any]:
    engine, learner = bench.engine(), bench.learner("reverse_kl")
    parts: dict[str, list[float]] = {"rollout": [], "score and update": []}

    def whole() -> None:
        start = time.perf_counter()
        rollouts = bench.write(engine)
        written = time.perf_counter()  # every token has been read by now
        learner.update(rollouts, bench.teacher.evidence(rollouts))
        engine.load(learner.weights())
        bench.finish()
        parts["rollout"].append(written - start)
        parts["score and update"].append(time.perf_counter() - written)

    (times,) = bench.seconds(whole)
    return {
        "seconds": spread(times),
        "response_tokens_per_second": spread([bench.work.answer_tokens / s for s in times]),
        "parts": {name: spread(seconds[bench.warm_up :]) for name, seconds in parts.items()},
        "kernel": learner.kernel.name,
        "lowered": learner.lowered(),
        "times": times,
    }


def useful_flops(work: Work, model: CausalLM) -> float:
    """Of one forward pass over the rows, as the head of this file counts them."""
    size: ModelSize = model_size(model.config.to_dict(), model.parameter_count)
    head = model.vocab_size * model.config.hidden_size
    length = work.prompt_tokens + work.new_tokens
    pairs = work.rows * length * (length + 1) / 2
    body = 2.0 * (size.active_parameters - head) * work.tokens + 2.0 * head * work.answer_tokens
    return body + 4.0 * size.attention_layers * size.attention_width * pairs


def used(times: Sequence[float], tokens: int, flops: float, rates: Mapping[str, float | None]) -> dict[str, Any]:
    made: dict[str, Any] = {"seconds": spread(times), "tokens_per_second": spread([tokens / s for s in times])}
    for name, rate in rates.items():
        share = None if rate is None else spread([flops / s / rate for s in times])
        made[f"mfu_of_{name}"] = not_measured("this device's data sheet is not listed here") if share is None else share
    return made


def measured(device: torch.device, what: str, part: Callable[[], dict[str, Any]], failed: list[str]) -> dict[str, Any]:
    """A part with its peak memory; without room for it, or when it fails, why not."""
    print(f"{what} ...", file=sys.stderr, flush=True)
    free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        made = part()
    except Exception as error:
        if not is_out_of_memory(error):
            traceback.print_exc()
            failed.append(what)
        return not_measured(f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}")
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return made | {"peak_memory_bytes": not_measured("only on CUDA") if peak is None else peak}


def free(device: torch.device) -> None:
    """Gives back what the part before held; TRL's process wants it, too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def one(name: str, work: Work, device: torch.device, args: argparse.Namespace, failed: list[str]) -> dict[str, Any]:
    """All parts of one pair of models."""
    found: dict[str, Any] = {"setting": asdict(work)}

    def take(part: str, make: Callable[[], dict[str, Any]]) -> None:
        found[part] = measured(device, f"{name}: {part}", make, failed)

    def with_models() -> dict[str, Any]:
        bench = Bench(work, device, args.runs, args.warm_up)
        rate = bench.product_rate()
        rates = {"measured_products": rate, "data_sheet": data_sheet(device)}
        take("decode", lambda: decode(bench))
        rollouts = bench.write(bench.engine())
        take("scoring", lambda: scoring(bench, rollouts, rates))
        take("training", lambda: training(bench, rollouts, rates))
        take("step", lambda: step(bench))
        return {"products_flops_per_second": rate}

    made = measured(device, f"{name}: models", with_models, failed)
    found |= {part: not_measured("there were no models") for part in PARTS if part not in found} | {"models": made}
    free(device)
    times = found["step"].pop("times", None)
    for key, vllm in (("step_against_trl", False), ("step_against_trl_vllm", True)):
        if times is None:
            found[key] = not_measured("our own step was not measured")
        else:
            found[key] = against_trl(args.trl_python, work, times, args.runs, args.warm_up, vllm=vllm)
    return found


def data_sheet(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate for part, rate in FULL_RATE.items() if part in name), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", choices=WORKS, action="append", help="may come several times; all without it")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="small models on the host: does it run at all")
    parser.add_argument("--trl-python", help="an interpreter that has trl")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON; printed without it")
    parser.add_argument("--merge", type=Path, help="a JSON file whose key gpu they become")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("bench/gpu_step.py needs a CUDA device, and torch sees none; --tiny runs on the host")
    device, works = torch.device("cpu" if args.tiny else "cuda"), TINY if args.tiny else WORKS
    failed: list[str] = []
    found = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "host",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "runs": args.runs,
        **{
            name: one(name, work, device, args, failed)
            for name, work in works.items()
            if name in (args.models or works)
        },
    }
    text = json.dumps(found, indent=2)
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text + "\n")
    if args.merge is not None:
        whole = json.loads(args.merge.read_text()) if args.merge.exists() else {}
        args.merge.parent.mkdir(parents=True, exist_ok=True)
        args.merge.write_text(json.dumps(whole | {"gpu": found}, indent=2) + "\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
