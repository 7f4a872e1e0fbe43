"""How long it takes to read answers for a teacher with another tokenizer, up to a million tokens long.

    python bench/alignment.py            one minute
    python bench/alignment.py --quick    up to a hundred thousand tokens

The texts are this repository's own pages and sources, over and over; the tokenizers are trained on them. One answer of
each length is read as `Crossing.read` does it: the student's bytes, the teacher's tokens of the same text, and the
spans of both. `encoding` is the part of that which is the teacher's tokenizer itself. bert changes most of what it
reads (no upper case, no accents), so that its places are told from offsets. Seconds are of the processor; found is the
slope of a line through log(seconds) against log(tokens), and 1 is linear.

Results go to bench/results/latest.json under `alignment`; the picture is docs/figures/alignment.svg.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import numpy as np
from growth import slope
from measures.drawing import Line, Panel, figure
from results import record
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opd.text.crossing import Crossing, agree
from opd.text.formats import Format, PromptFormat
from opd.text.tokenizer import Tokenizer
from opd.types import Prompt, Rollout, Row

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "figures" / "alignment.svg"
TOKENS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
PAIRS = (("byte-level BPE", "Unigram"), ("Unigram", "byte-level BPE"), ("byte-level BPE", "bert"))
PLAIN = Format(kind="plain", plain_template="{prompt}", system_prompt=None, chat_template_kwargs={}, end_tokens=())
END, UNKNOWN = "<end>", "<unk>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def corpus() -> list[str]:
    files = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("src/opd/**/*.py")])
    return [file.read_text(encoding="utf-8") for file in files]


def trained(family: str, texts: Sequence[str]) -> PromptFormat:
    """A tokenizer of about 4,000 tokens (BPE), 2,000 (bert) or 1,500 (Unigram)."""
    special = [UNKNOWN, END]
    if family == "byte-level BPE":
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=4000, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
    elif family == "Unigram":
        backend = Backend(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback()])
        trainer = trainers.UnigramTrainer(
            vocab_size=1500, special_tokens=special, unk_token=UNKNOWN, show_progress=False
        )
    else:
        backend = Backend(models.WordPiece(unk_token=UNKNOWN))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=special, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    unknown = None if family == "byte-level BPE" else UNKNOWN
    return PromptFormat(
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, unk_token=unknown), family), PLAIN
    )


def answer(fmt: PromptFormat, text: str) -> Rollout:
    row = Row(id="bench/0", domain="bench", prompt="Go on:\n")
    ids = fmt.answer_ids(row, text)
    return Rollout(
        id="bench/0/0",
        prompt=Prompt(row=row, ids=fmt.prompt_ids(row)),
        response_ids=ids,
        behaviour_logprobs=np.zeros(len(ids), dtype=np.float32),
        mask=np.ones(len(ids), dtype=np.bool_),
        policy_version=0,
        behaviour="student",
        finish_reason="length",
    )


def seconds(crossing: Crossing, text: str, rounds: int) -> tuple[int, float, float]:
    """Of reading one text: its tokens, and medians of the whole and of the teacher's own encoding."""
    rollout = answer(crossing.student_fmt, text)
    whole, encoding = [], []
    for _ in range(rounds):
        began = time.process_time()
        read = crossing.read(rollout)
        between = time.process_time()
        crossing.teacher_fmt.tokenizer.encode(text)
        encoding.append(time.process_time() - between)
        whole.append(between - began)
        assert len(read.spans.span_T) == len(rollout.response_ids)
    return len(rollout.response_ids), statistics.median(whole), statistics.median(encoding)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    texts = corpus()
    everything = "\n".join(texts)
    formats = {family: trained(family, texts) for family in {family for pair in PAIRS for family in pair}}
    lengths = [n for n in TOKENS if not args.quick or n <= 100_000]
    found, lines = {}, []
    for colour, (student, teacher) in enumerate(PAIRS):
        crossing = agree(formats[student], formats[teacher])
        assert isinstance(crossing, Crossing)
        per_token = len(everything) / len(formats[student].tokenizer.encode(everything))
        points = []
        for length in lengths:
            size = int(length * per_token)
            text = (everything * (size // len(everything) + 1))[:size]
            points.append(seconds(crossing, text, args.rounds))
            print(
                f"{student} -> {teacher}: {points[-1][0]:>9,} tokens {points[-1][1]:.3f} s, "
                f"{points[-1][2]:.3f} s of it encoding",
                flush=True,
            )
        tokens, whole, encoding = (list(column) for column in zip(*points, strict=True))
        _, read = crossing.read_text(everything)
        power = slope(tokens, whole)
        found[f"{student} to {teacher}"] = {
            "tokens": tokens,
            "seconds": whole,
            "encoding_seconds": encoding,
            "slope": power,
            "mapped": float((read.spans.span_T >= 0).mean()),
        }
        name = f"{teacher} reads {student}: slope {power:.2f}"
        lines.append(Line(name=name, points=[(n / 1000, s) for n, s in zip(tokens, whole, strict=True)], colour=colour))
    if args.quick:
        return
    record(("alignment",), found)
    highest = max(value for line in lines for _, value in line.points)
    lowest = min(value for line in lines for _, value in line.points)
    panel = Panel(
        title="Reading answers of another tokenizer",
        x_label="tokens of the student's, thousands",
        y_label="seconds of the processor",
        lines=lines,
        x=(TOKENS[0] / 1000 * 0.9, TOKENS[-1] / 1000 * 1.1),
        y=(lowest / 1.3, highest * 1.3),
        log_x=True,
        log_y=True,
    )
    PICTURE.write_text(figure("Seconds of an alignment against the tokens of the answer, both logarithmic", [panel]))


if __name__ == "__main__":
    main()
