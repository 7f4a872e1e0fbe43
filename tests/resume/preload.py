"""Imported once by the process that all others are forked from: what takes seconds to load."""

import torch

torch.set_num_threads(1)

import transformers.models.llama.modeling_llama  # noqa: E402
import transformers.models.qwen3.modeling_qwen3  # noqa: E402, F401

import opd.cli.main  # noqa: E402
import opd.wiring.run  # noqa: E402, F401
