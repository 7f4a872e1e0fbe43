"""Any causal language model of transformers, seen as two parts: a body that makes hidden states, and a head.

The split is what makes a large vocabulary affordable: bodies run over whole sequences, heads only over the tokens that
somebody asks about, a chunk at a time.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opd.errors import ModelError
from opd.objectives.head import head_logits
from opd.objectives.product import FasterLinear
from opd.types import Head

if TYPE_CHECKING:
    from opd.models.adapters import Adapter, LowRank


class CausalLM:
    """A loaded model. Its parameters are live: sampler, teacher and learner may share one instance.

    module         the transformers model, always in eval mode: the student trains as what it sampled as.
    vocab_size     real tokens of the tokenizer; the embedding may have more rows (padding), which nobody reads.
    compute_dtype  what matrix products run in; parameters may be wider (float32 master weights).
    adapter        the low-rank matrices that are trained beside the frozen parameters, None where there are none.
    max_positions  longest sequence the model was made for, None where it states none.
    shares_prompts whether answers may stand on a prompt that was read once; None until `answer_states` has tried it.
    """

    def __init__(self, module: nn.Module, *, vocab_size: int, compute_dtype: torch.dtype, name: str) -> None:
        self.module: Any = module
        self.name = name
        self.vocab_size = vocab_size
        self.compute_dtype = compute_dtype
        self.adapter: Adapter | None = None
        self.shares_prompts: bool | None = None
        self._body = _body(self.module)
        self._body_takes = set(inspect.signature(self._body.forward).parameters)
        rows = self.module.get_output_embeddings().weight.shape[0]
        if rows < vocab_size:
            raise ModelError(
                f"{name}: its tokenizer has {vocab_size} tokens but its output layer has only {rows} rows. "
                "Use the tokenizer that belongs to this model (option `tokenizer`)."
            )
        self._scale = _logit_scale(self.module.config)
        self._softcap = getattr(_text_config(self.module.config), "final_logit_softcapping", None)
        self._check_split()

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def config(self) -> Any:
        return _text_config(self.module.config)

    @property
    def max_positions(self) -> int | None:
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def architecture(self) -> type:
        """The class of the transformers model."""
        return type(self.module)

    @property
    def parameter_count(self) -> int:
        """Numbers in the model, an adapter included; a packed weight of 4 bits counts what it stands for."""
        return sum(_numel(p) for p in self.module.parameters())

    @property
    def trainable_count(self) -> int:
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)

    @property
    def head(self) -> Head:
        """The output layer over the live parameters."""
        layer = self.module.get_output_embeddings()
        return Head(
            weight_VD=layer.weight,
            vocab_size=self.vocab_size,
            bias_V=getattr(layer, "bias", None),
            scale=self._scale,
            softcap=self._softcap,
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Products in `compute_dtype`, whatever the parameters are stored in."""
        parameter = next(self.module.parameters())
        adapted = self.adapter is not None and self.compute_dtype != torch.float32  # its own matrices are float32
        if parameter.dtype == self.compute_dtype and not adapted:
            return nullcontext()
        return torch.autocast(parameter.device.type, dtype=self.compute_dtype)

    def hidden(
        self, ids_NS: Tensor, attention_NS: Tensor | None, positions_NS: Tensor | None, cache: Any = None
    ) -> Tensor:
        """[N, S, D] states that the head turns into logits, in `compute_dtype`; no logits are made.

        Without an attention mask and positions, sequences begin in the first column, and causal attention hides what
        stands behind them.

        cache   keys and values of transformers: what it holds stands before the sequences, `attention_NS` covers it
                too, and each layer of the body hands its own to it.
        """
        if torch.is_grad_enabled():
            self._recompute()
        given = {
            "input_ids": ids_NS,
            "attention_mask": attention_NS,
            "position_ids": positions_NS,
            "use_cache": cache is not None,
            "past_key_values": cache,
        }
        with self.autocast(), self._products():
            states_NSD = self._body(**{k: v for k, v in given.items() if k in self._body_takes}).last_hidden_state
        return states_NSD.to(self.compute_dtype)

    def _products(self) -> AbstractContextManager[Any]:
        """Faster products in float32 on a CPU. A layer that is recomputed must find what it saw the first time, and is
        recomputed outside: it keeps torch's own."""
        if self.device.type != "cpu" or self.compute_dtype != torch.float32 or self.recomputes:
            return nullcontext()
        return FasterLinear()

    @property
    def recomputes(self) -> bool:
        """Whether layers are recomputed in the backward pass (gradient checkpointing)."""
        return any(getattr(layer, "gradient_checkpointing", False) for layer in self.module.modules())

    def _recompute(self) -> None:
        """transformers recomputes activations only in layers in training mode. The layers alone are put there: their
        parts stay in eval mode, so that dropout stays off and the student trains as what it sampled as."""
        for layer in self.module.modules():
            if getattr(layer, "gradient_checkpointing", False):
                layer.training = True

    def linear_parts(self, layer: Any) -> tuple[Any, LowRank | None]:
        """A linear layer of the module as the layer of the base, and what its adapter adds to it now."""
        return (layer, None) if self.adapter is None else self.adapter.linear_parts(layer)

    def fingerprint(self) -> str:
        """Hash of names, shapes and up to 512 spread values of every tensor: tells two checkpoints apart in
        milliseconds, though not two that differ only in values it did not look at."""
        return digest(self.module.state_dict())

    @torch.no_grad()
    def _check_split(self) -> None:
        """Body and head must give the model's own logits; some architectures scale or cap in ways we do not know."""
        training = self.module.training
        self.module.eval()
        ids_NS = torch.arange(1, 5, device=self.device).remainder(self.vocab_size)[None]
        ones_NS, positions_NS = torch.ones_like(ids_NS), torch.arange(4, device=self.device)[None]
        hidden_TD = self.hidden(ids_NS, ones_NS, positions_NS)[0]
        ours_TV = head_logits(hidden_TD, self.head)
        with self.autocast():
            theirs_TV = self.module(input_ids=ids_NS, attention_mask=ones_NS).logits[0, :, : self.vocab_size].float()
        self.module.train(training)
        if not torch.isfinite(theirs_TV).all():
            return  # broken weights are reported where the model's role is known
        tolerance = 1e-4 if self.compute_dtype == torch.float32 else 5e-2
        worst = (ours_TV - theirs_TV).abs().max().item()
        if worst > tolerance * max(1.0, theirs_TV.abs().max().item()):
            raise ModelError(
                f"{self.name}: {self.architecture.__name__} does something between its last hidden state and its "
                f"logits that opd does not know (difference {worst:.2g}). Please report this architecture."
            )


def digest(tensors: Mapping[str, Any]) -> str:
    """The hash behind `fingerprint`; what is not a tensor is left out."""
    made = hashlib.blake2b(digest_size=8)
    for key, value in sorted(tensors.items()):
        if not isinstance(value, Tensor):
            continue
        flat = value.detach().reshape(-1)
        picked = flat[:: max(1, -(-flat.numel() // 512))].to("cpu", torch.float32)
        made.update(f"{key}{tuple(value.shape)}".encode())
        made.update(picked.numpy().tobytes())
    return made.hexdigest()


def _numel(parameter: Any) -> int:
    packed = getattr(parameter, "quant_state", None)  # bitsandbytes, 4 bits: two numbers in a byte
    return parameter.numel() if packed is None else packed.shape.numel()


def _body(module: Any) -> Any:
    """The part of a causal LM that ends in the last hidden state."""
    if hasattr(module, "get_decoder"):
        body = module.get_decoder()
        if body is not None and body is not module:
            return body
    return module.base_model


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _logit_scale(config: Any) -> float:
    """Constant factor between the output layer and the logits, in the names that architectures give it."""
    text = _text_config(config)
    if getattr(text, "logits_scaling", None):  # Granite divides
        return 1.0 / float(text.logits_scaling)
    if getattr(text, "logit_scale", None):  # Cohere multiplies
        return float(text.logit_scale)
    return 1.0
