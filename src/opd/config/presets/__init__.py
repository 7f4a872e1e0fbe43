"""Named methods: each a short function from its parameters to who writes, what is minimised and which scorers it needs.

A file for every family; importing this registers them all.
"""

from opd.config.presets import across_tokenizers as across_tokenizers
from opd.config.presets import divergences as divergences
from opd.config.presets import outcomes as outcomes
from opd.config.presets import own_teacher as own_teacher
from opd.config.presets import sampled as sampled
from opd.config.presets import several_scorers as several_scorers
from opd.config.presets import supervised as supervised
from opd.config.presets import top_k as top_k
from opd.config.presets.registry import METHODS, Method, Preset, as_line, expand

__all__ = ["METHODS", "Method", "Preset", "as_line", "expand"]
