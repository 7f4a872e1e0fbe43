"""How a term joins the student's tokens with those of a scorer that has another tokenizer. Imports no torch.

Both tokenizations are of the same bytes. Where their borders meet, the tokens in between are a span of each side, and
what the scorer says about its part is about the student's. A scorer with the student's own tokenizer is joined token by
token, whatever is said here. Exact for this segmentation of this text, not for the probability of its bytes: other
tokens could have spelled them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from opd.config.spec import Spec


class Strict(Spec):
    """Only spans of one token on either side, the same token to both; only vocabulary that both have is compared.

    Whatever else either could have said is one more class.
    """

    kind: Literal["strict"] = "strict"


class Span(Spec):
    """h of the ratio of whole spans, log q~(span) - log p(span), on every token of the span: the chain rule's sums."""

    kind: Literal["span"] = "span"


class Gold(Spec):
    """The distribution at a span's last token, times the probability of the span's tokens before it, on either side:
    the shape's divergence on shared vocabulary, and the sum of |sorted p - sorted q| on the rest (GOLD; ULD)."""

    kind: Literal["gold"] = "gold"
    match: Literal["text", "token"] = Field(
        default="text",
        description="which entries of the two merged distributions are the same. text: those that spell the same text, "
        "in a span of several tokens its own last tokens and no others; token: equal vocabulary wherever it stands, as "
        "published: behind different beginnings it is different text",
    )
    sort: Literal["rest", "all"] = Field(
        default="rest", description="what is compared by rank: vocabulary that is not shared; all of it (ULD alone)"
    )
    matched_weight: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="weight of the shared vocabulary, 1 - weight is that of the rest; none: the share of the scorer's "
        "vocabulary that the student has",
    )


class ALM(Spec):
    """The shape's divergence between two chances, that of the span and that of anything else, p^(1/tau) and the rest,
    of either side (approximate likelihood matching). No vocabularies are compared."""

    kind: Literal["alm"] = "alm"
    tau: float = Field(default=100.0, ge=1, description="root that is taken of a span's probability")


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Alignment = Strict | Span | Gold | ALM
AlignmentKind = Literal["strict", "span", "gold", "alm"]
AnyAlignment = Annotated[
    Annotated[Alignment, Field(discriminator="kind")],
    BeforeValidator(_named, json_schema_input_type=AlignmentKind | Alignment),
]
