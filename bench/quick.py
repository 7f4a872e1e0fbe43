"""What our ways of doing things bring, beside the simple ones, in less than three minutes on two cores.

    python bench/quick.py

Sizes are small and a busy machine shows: for figures to quote there is `make bench`. What is printed never makes it
fail; it fails where the code does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import decode
import torch
from growth import Sizes, Update
from kernel.ours import reverse_kl
from kernel.setting import Inputs
from kernel.setting import Sizes as PassSizes
from parts import in_turn, record
from results import ratio

from opd.config.schema import Learner


def pass_over_vocabulary(rounds: int) -> str:
    """Tile by tile, and with all logits at once and torch's own gradients."""
    sizes = PassSizes(tokens=512, vocab=32_768, student_width=256, teacher_width=512)
    inputs = Inputs.random(sizes, torch.float32)

    def ours() -> None:
        inputs.forget()
        reverse_kl(inputs, Learner().chunk_tokens).backward()

    def naive() -> None:
        inputs.forget()
        log_p_TV = (inputs.hidden_TD @ inputs.weight_VD.T).log_softmax(-1)
        log_q_TV = (inputs.teacher_TD @ inputs.teacher_VD.T).log_softmax(-1)
        (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).mean().backward()

    return line("pass over the vocabulary, against all logits at once", *in_turn(ours, naive, rounds))


def writing(rounds: int) -> str:
    """Our decoder, and `generate` of transformers."""
    setting = decode.Setting(vocab=32_768, rows=8, new_tokens=32)
    tokens = setting.rows * setting.new_tokens
    found = decode.measure(setting, runs=rounds, ways=("ours_float32", "theirs_float32"))
    ours, theirs = ([tokens * s for s in found[way]] for way in ("ours_float32", "theirs_float32"))
    return line("8 answers of 32 tokens, against generate of transformers", ours, theirs)


def shared_prompts(rounds: int) -> str:
    """An update on eight answers to each prompt that reads the prompt once, and one that reads it eight times."""
    sizes = Sizes(rows=16, prompt=256, answer=32, vocab=4096)
    ours, naive = (Update(sizes, samples=8, share=share) for share in (True, False))
    times = in_turn(ours.run, naive.run, rounds)
    return line("update on 8 answers to each prompt, against prompts read 8 times", *times)


def journal(steps: int) -> str:
    """What a step of the demo's size spends on writing its record."""
    found = record(steps)
    shares = (100 * found[name] for name in ("share", "low", "high"))
    return f"record of a step: {found['record']:.4f} s of {found['step']:.3f} s, " + (
        "{:.1f} % ({:.1f} to {:.1f} %)".format(*shares)
    )


def line(name: str, ours: Sequence[float], naive: Sequence[float]) -> str:
    found = ratio(ours, naive)
    factor = f"{found['ratio_median']:.2f} ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})"
    return f"{name}: ours {found['ours']:.3f} s, naive {found['peer']:.3f} s, ratio {factor}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for measured in (pass_over_vocabulary, writing, shared_prompts):
        print(measured(args.rounds), flush=True)
    print(journal(steps=args.rounds + 3))


if __name__ == "__main__":
    main()
