"""Every line that the doctor draws, with its reason. "Ours" is one that we drew by eye between lab cases with a known
answer (`tests/doctor`): a rule of thumb, not a result."""

from __future__ import annotations

from opd.reports.crossed import LITTLE

# ---- text and data ----------------------------------------------------------------------------------------------

DROPPED = 0.1  # share of prompts that are too long, above which the run sees another data set than was meant (ours)
FORGED_SOME = 0.0  # share of prompts with the text of a control token: they are read as text, so any is worth a note
FORGED_MOST = 0.5  # share above which the prompts were rendered before, and the template would be applied twice (ours)
TWICE = 0.2  # share of prompts that occur more than once (ours)

# ---- the teacher by itself --------------------------------------------------------------------------------------

REPEATS = 1e-3  # nats between two readings in one process; bfloat16 with another batch shape stays below (ours)
SELF_KL = 1e-2  # nats of KL(student || student read as a teacher): 0 but for rounding in bfloat16 (ours)
FLAT = 0.5  # entropy of the teacher as a share of ln V, above which it says next to nothing (ours; language models that
# work are below 0.2 on answers)
FLAT_SPREAD = 1.0  # nats around the mean of a score that is as low for every token, where no entropy is known (ours)
SERVER_GAP = 0.05  # nats between a served teacher and the same weights here; replicas may differ by more than the
# signal (NovaSky-AI/SkyRL#2256)

# ---- templates --------------------------------------------------------------------------------------------------

FORMAT_GAP = 0.25  # nats a token that the answers gain when the teacher reads the prompt in another format; a reported
# failure had .287 (thinking-machines-lab/tinker-cookbook#796)
FORMAT_BROKEN = 1.0  # the same, above which no grader is needed to stop (ours)
CONTROL = 0.1  # share of answers with a control token that is no end inside them (ours)
END_MISSED = 0.5  # share of ends at which the teacher's first choice is a control token that is no end (ours)

# ---- answers ----------------------------------------------------------------------------------------------------

TRUNCATED_WARN = 0.1  # share of answers cut at sampling.max_tokens (ours; arXiv 2604.08527 takes
# truncation as a sign of length inflation)
REPETITION = 0.2  # share of tokens in loops (ours; arXiv 2604.08527)

# ---- another tokenizer --------------------------------------------------------------------------------------------

COVERED_LEAST = 1 / 3  # share of the student's tokens in spans of both, below which a run is about too little (ours; an
# agreement is refused there, too, on probe texts)
COVERED = LITTLE  # the same, below which the report of a run says that the rest was not trained (ours)
SAME = 0.7  # share of tokens that are the same to both, from which strict leaves little out (ours)

# ---- support ----------------------------------------------------------------------------------------------------

TOP_K = 16  # of the overlap, as in arXiv 2604.13016; a tenth of a vocabulary that is smaller than 160
OVERLAP_START = 0.72  # successful runs started there and rose to .91 (arXiv 2604.13016)
OVERLAP_LOW = 0.4  # below, with most of the student's mass elsewhere, the student has no support (ours)
MASS_OUTSIDE = 0.5  # the student's mass outside the teacher's top k (ours)
UNREACHED = 0.01  # a token of the teacher's own answer that the student gives less than this is out of reach (ours)
UNREACHED_SHARE = 0.15  # share of such tokens above which the student hardly ever writes such an answer (ours)
TAIL = 10.0  # nats of |log-ratio| of a token that outweighs thousands of others (ours)
TAIL_SHARE = 0.01  # share of such tokens that is too much; below 2 % of tokens decide a run anyhow (arXiv 2609.33791)
LATE = 2.0  # times KL of the last third of the answer over that of the first: signal explodes with position (ours;
# arXiv 2604.13016 saw collapse from the back in answers of 10K and more)
AUC_NONE = 0.55  # a score that separates nothing has .5; with a few dozen answers .55 is not told from it (ours)
AUC_FEWEST = 4  # right and wrong answers each, below which the figure says nothing (ours)
SIGMA = 2.0  # standard errors that make a difference of accuracies (about 95 %)
SOLVES = 0.05  # accuracy of the teacher below which it cannot do the task (ours)

# ---- advice -----------------------------------------------------------------------------------------------------

NOISE_BATCH = 4.0  # answers a step over the noise scale, above which more answers hardly help (McCandlish et al. 2018:
# steps needed grow as 1 + noise scale / batch)
FULL_PAYS = (
    1.5  # variance of an answer's gradient, drawn tokens over more evidence, above which that is worth it (ours)
)
MOVED_MOST = 0.5  # nats of KL(before || after) in the first update at the configured rate. PPO's trust regions end at
# .015 to .03 (target_kl of OpenAI Spinning Up), but Adam's first step is its largest by far (ours)
MOVED_LEAST = 1e-6  # below, an update does nothing that can be told from rounding (ours)

# ---- memory -----------------------------------------------------------------------------------------------------

SPARE = 0.1  # of the memory that no estimate covers: libraries, gaps of the allocator (`costs/memory.py`)
