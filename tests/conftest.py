"""Shared by all tests: few threads, no network, no telemetry; real tiny models on disk, made once per session."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by whomever

_CACHE = tempfile.TemporaryDirectory(prefix="opd-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name  # what was measured on this machine must not decide what a test sees

settings.register_profile("opd", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("opd")
