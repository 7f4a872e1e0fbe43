"""From a config entry to a loaded model, with messages a person can act on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from opd.config.schema import Model, Quantisation, Scorer, Student
from opd.errors import ModelError
from opd.models import quantisation
from opd.models.adapter_folder import AdapterFolder, adapter_folder
from opd.models.adapters import add_adapter, merge_folder, plan_adapter, require_peft
from opd.models.causal import CausalLM
from opd.models.targets import Targets

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
    """The trained model: float32 parameters, products in the spec's dtype.

    With an adapter, the model is frozen and stored in the spec's dtype or in the bits it asks for; the adapter's own
    parameters are float32, and drawn from torch's global generator.
    """
    device = pick_device(spec.device)
    if spec.lora is None:
        loaded = _load(spec, role="student", vocab_size=vocab_size, parameter_dtype=torch.float32, device=device)
    else:
        _check_adapter_on_adapter(spec)
        dtype = pick_dtype(spec.dtype, device)
        quantised = spec.quantisation
        loaded = _load(
            spec, role="student", vocab_size=vocab_size, parameter_dtype=dtype, device=device, bits=quantised
        )
        add_adapter(loaded, spec.lora, base=spec.model, revision=spec.revision)
    if spec.gradient_checkpointing:
        # The older name is the only one in the lowest transformers we accept; both default to use_reentrant=False.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(loaded.module, name) for name in names if hasattr(loaded.module, name))()
    return loaded


def load_frozen(spec: Model, vocab_size: int, *, role: str) -> CausalLM:
    """A model that is only run: its parameters are in the spec's dtype too, or in the bits a scorer asks for."""
    device = pick_device(spec.device)
    dtype = pick_dtype(spec.dtype, device)
    loaded = _load(
        spec,
        role=role,
        vocab_size=vocab_size,
        parameter_dtype=dtype,
        device=device,
        bits=spec.quantisation if isinstance(spec, Scorer) else "none",
    )
    loaded.module.requires_grad_(False)
    return loaded


def check_loadable(spec: Model, role: str) -> None:
    """Raises ModelError for what is known without reading weights: folder, config, device, quantisation, adapters."""
    pick_device(spec.device, role)
    _read_config(spec, role)
    adapted = adapter_folder(spec.model, role)
    if adapted is not None:
        require_peft(role)
    if isinstance(spec, Student | Scorer) and spec.quantisation != "none":
        quantisation.settings(spec.quantisation, torch.float32, role)
        if isinstance(spec, Scorer) and adapted is not None:
            raise _quantised_merge(spec, role)
    if isinstance(spec, Student) and spec.lora is not None:
        adapter_targets(spec, role)


def adapter_targets(spec: Student, role: str = "student") -> Targets:
    """Which layers the student's adapter stands beside, by its config alone. Raises ModelError."""
    from transformers import AutoModelForCausalLM

    assert spec.lora is not None
    config = _read_config(spec, role)
    try:
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    except Exception as e:
        raise _explained(e, spec, role) from e
    return plan_adapter(module, spec.lora, role=role)


def tokenizer_source(spec: Model) -> tuple[str, str | None]:
    """Folder or hub name and revision of a model's tokenizer: the one that is named, else the one beside the weights;
    of an adapter that has none, its base's."""
    if spec.tokenizer:
        return spec.tokenizer, None
    adapted = adapter_folder(spec.model, "model")
    if adapted is None or adapted.has_tokenizer:
        return spec.model, spec.revision
    return adapted.base, adapted.revision


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
    source, revision, adapted = _weights(spec, role)
    if adapted is not None and (adapted.path / "generation_config.json").is_file():
        source, revision = str(adapted.path), None
    try:
        named = GenerationConfig.from_pretrained(source, **_revision(revision)).eos_token_id
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
    bits: Quantisation = "none",
) -> CausalLM:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = _read_config(spec, role)
    source, revision, adapted = _weights(spec, role)
    options: dict[str, Any] = {}
    if spec.attention != "auto":
        options["attn_implementation"] = spec.attention
    if bits != "none":
        if adapted is not None:
            raise _quantised_merge(spec, role)
        asked = quantisation.settings(bits, parameter_dtype, role)
        options |= {"quantization_config": asked, "device_map": {"": str(device)}}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=revision,
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
    if adapted is not None:
        try:
            module = merge_folder(module, adapted.path, role)
        except Exception as e:
            raise ModelError(
                f"{role}.model: the adapter in {spec.model!r} does not fit its base {source!r}: {_first_line(e)}"
            ) from e
    if bits != "none":
        quantisation.settle(module, bits, role)
    else:
        module.to(device)
    module.eval()
    return CausalLM(
        module, vocab_size=vocab_size, compute_dtype=pick_dtype(spec.dtype, device), name=f"{role} {spec.model}"
    )


def _read_config(spec: Model, role: str) -> Any:
    from transformers import AutoConfig

    source, revision, _ = _weights(spec, role)
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=spec.trust_remote_code)
    except Exception as e:
        raise _explained(e, spec, role) from e


def _weights(spec: Model, role: str) -> tuple[str, str | None, AdapterFolder | None]:
    """Where the weights are, at which revision, and the adapter that has to be merged into them."""
    adapted = adapter_folder(spec.model, role)
    source, revision = (spec.model, spec.revision) if adapted is None else (adapted.base, adapted.revision)
    _require_folder(source, role)
    return os.path.expanduser(source), revision, adapted


def _revision(revision: str | None) -> dict[str, Any]:
    return {} if revision is None else {"revision": revision}


def _check_adapter_on_adapter(spec: Student) -> None:
    if spec.lora is not None and spec.lora.save == "adapter" and adapter_folder(spec.model, "student") is not None:
        raise ModelError(
            f"student.lora.save: {spec.model!r} is an adapter itself, which is merged before the new one is trained; "
            "no folder would hold the model that the new one belongs to. Use save: merged."
        )


def _quantised_merge(spec: Model, role: str) -> ModelError:
    return ModelError(
        f"{role}.quantisation: {spec.model!r} is an adapter, and merging it into weights of few bits would round it "
        f"away. Use {role}.quantisation: none, or give a folder with the merged model."
    )


def _require_folder(source: str, role: str) -> None:
    """A path that is not there must not be looked up on the hub."""
    path = Path(source).expanduser()
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or (os.sep != "/" and os.sep in source)
    if looks_local and not path.is_dir():
        raise ModelError(f"{role}.model: there is no folder {source!r} (seen from {Path.cwd().name}/)")
    if (path / "run.lock").is_file() and (path / "metrics.jsonl").is_file():
        raise ModelError(f"{role}.model: {source!r} is the folder of a run; its trained model is {source}/final")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ModelError(
            f"{role}.model: {source!r} is an adapter (LoRA), and another adapter names it as its base. Merge it into "
            "its own base first, with peft's merge_and_unload, and name the merged folder."
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
    return ModelError(f"{where} cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]
