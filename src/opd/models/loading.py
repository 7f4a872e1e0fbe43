"""From a config entry to a loaded model, with messages a person can act on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from opd.config.schema import Model, Student, Teacher
from opd.errors import ModelError
from opd.models.causal import CausalLM

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(wanted: str, role: str = "") -> torch.device:
    """The device a config means by `auto`, `cuda:0`, ...; raises ModelError when it is not there."""
    option = f"{role}.device" if role else "device"
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as e:
        raise ModelError(f"{option}: {wanted!r} is not a device; use auto, cpu, cuda or cuda:0") from e
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ModelError(f"{option}: {wanted!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps":
        raise ModelError(f"{option}: mps has no float64, in which tokens are drawn; use cpu")
    return device


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The compute type a config means; `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[wanted]


def load_student(spec: Student, vocab_size: int) -> CausalLM:
    """The trained model: float32 parameters, products in the spec's dtype."""
    device = pick_device(spec.device)
    loaded = _load(spec, role="student", vocab_size=vocab_size, parameter_dtype=torch.float32, device=device)
    if spec.gradient_checkpointing:
        # The older name is the only one in the lowest transformers we accept; both default to use_reentrant=False.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(loaded.module, name) for name in names if hasattr(loaded.module, name))()
    return loaded


def load_teacher(spec: Teacher, vocab_size: int) -> CausalLM:
    """The scoring model."""
    return load_frozen(spec, vocab_size, role="teacher")


def load_frozen(spec: Model, vocab_size: int, *, role: str) -> CausalLM:
    """A model that is only run: its parameters are in the spec's dtype too, or in the bits a teacher asks for."""
    device = pick_device(spec.device)
    dtype = pick_dtype(spec.dtype, device)
    loaded = _load(
        spec,
        role=role,
        vocab_size=vocab_size,
        parameter_dtype=dtype,
        device=device,
        quantisation=_quantisation(spec, dtype) if isinstance(spec, Teacher) else None,
    )
    loaded.module.requires_grad_(False)
    return loaded


def check_loadable(spec: Model, role: str) -> None:
    """Raises ModelError for what is known without reading weights: folder, config, device, quantisation."""
    pick_device(spec.device, role)
    _read_config(spec, role)
    if isinstance(spec, Teacher) and spec.quantisation != "none":
        _quantisation(spec, torch.float32)


def saved_dtype(spec: Model) -> torch.dtype:
    """The type the checkpoint is stored in: a trained student is written back in it."""
    return _read_config(spec, "student").dtype or torch.float32


def read_config(spec: Model, role: str) -> Any:
    """The model's config without its weights; raises ModelError."""
    return _read_config(spec, role)


def generation_end_ids(spec: Model, role: str) -> tuple[int, ...]:
    """End tokens that the model itself names: its generation config, then its config; empty when it names none."""
    from transformers import GenerationConfig

    config = _read_config(spec, role)
    try:
        named = GenerationConfig.from_pretrained(_source(spec), **_revision(spec)).eos_token_id
    except OSError:  # no generation_config.json beside the weights
        named = getattr(config, "eos_token_id", None)
    if named is None:
        return ()
    return tuple(named) if isinstance(named, list) else (named,)


def _load(
    spec: Model,
    *,
    role: str,
    vocab_size: int,
    parameter_dtype: torch.dtype,
    device: torch.device,
    quantisation: Any = None,
) -> CausalLM:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = _read_config(spec, role)
    options: dict[str, Any] = {}
    if spec.attention != "auto":
        options["attn_implementation"] = spec.attention
    if quantisation is not None:
        options |= {"quantization_config": quantisation, "device_map": {"": str(device)}}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            _source(spec),
            config=config,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            dtype=parameter_dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as e:
        raise _explained(e, spec, role) from e
    module, report = loaded
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise ModelError(
            f"{role}.model: {spec.model!r} is not a whole {type(module).__name__}: {len(absent)} of its weights are "
            f"not in the checkpoint or have another shape, the first {absent[0]}. They would be random numbers."
        )
    if quantisation is None:
        module.to(device)  # pyright: ignore[reportArgumentType]
    module.eval()
    return CausalLM(
        module, vocab_size=vocab_size, compute_dtype=pick_dtype(spec.dtype, device), name=f"{role} {spec.model}"
    )


def _read_config(spec: Model, role: str) -> Any:
    from transformers import AutoConfig

    _require_folder(spec.model, role)
    try:
        return AutoConfig.from_pretrained(
            _source(spec), revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except Exception as e:
        raise _explained(e, spec, role) from e


def _source(spec: Model) -> str:
    return os.path.expanduser(spec.model)


def _revision(spec: Model) -> dict[str, Any]:
    return {} if spec.revision is None else {"revision": spec.revision}


def _require_folder(source: str, role: str) -> None:
    """A path that is not there must not be looked up on the hub."""
    path = Path(source).expanduser()
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or (os.sep != "/" and os.sep in source)
    if looks_local and not path.is_dir():
        raise ModelError(f"{role}.model: there is no folder {source!r} (seen from {Path.cwd().name}/)")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ModelError(
            f"{role}.model: {source!r} is an adapter (LoRA), not a model. Merge it into its base first, with peft's "
            "merge_and_unload, and give the merged folder."
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{role}.model: the folder {source!r} has no config.json; is it a transformers checkpoint?")


def _explained(error: Exception, spec: Model, role: str) -> ModelError:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    where = f"{role}.model: {spec.model!r}" + (f" at revision {spec.revision!r}" if spec.revision else "")
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(c, GatedRepoError) for c in causes):
        return ModelError(f"{where} is gated: accept its licence on the hub and set HF_TOKEN to your access token.")
    if any(isinstance(c, RepositoryNotFoundError) for c in causes):
        return ModelError(f"{where} is not on the hub, or it is private: check the name, or set HF_TOKEN.")
    if any(isinstance(c, LocalEntryNotFoundError | ConnectionError) for c in causes):
        return ModelError(f"{where} is no local folder and the hub cannot be reached; it is not in the cache either.")
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{where} brings its own code, which opd does not run unasked. Read it, then set "
            f"{role}.trust_remote_code=true."
        )
    first = (str(error).strip() or repr(error)).splitlines()[0][:300]
    return ModelError(f"{where} cannot be loaded: {first}")


def _quantisation(spec: Teacher, dtype: torch.dtype) -> Any:
    if spec.quantisation == "none":
        return None
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise ModelError(
            f"teacher.quantisation: {spec.quantisation} needs bitsandbytes: pip install 'opd[quantisation]'"
        ) from e
    from transformers import BitsAndBytesConfig

    if spec.quantisation == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
