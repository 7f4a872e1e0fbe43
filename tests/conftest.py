"""Shared by all tests: few threads, no network, no telemetry; real tiny models on disk, made once per session."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

settings.register_profile("opd", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("opd")
