"""Prompts that a scorer reads in place of the row's own."""

from __future__ import annotations

import pytest

from opd.errors import ConfigError, DataError
from opd.text.contexts import PromptContext
from opd.text.formats import PromptFormat
from opd.types import Row
from tests import rooms

ROW = Row(id="s/0", domain="s", prompt="1 + 1?", completion="2", columns={"hint": "count", "n": 3, "none": None})
CHAT = Row(
    id="s/1",
    domain="s",
    prompt=({"role": "system", "content": "Be short."}, {"role": "user", "content": "a"}, {"role": "assistant",
            "content": "b"}, {"role": "user", "content": "c"}),
    columns={"hint": "h"},
)  # fmt: skip


def show(row: Row, *, chat: bool, template: str = "{prompt}", system: str | None = None, **fmt) -> str:
    plain = rooms.prompt_format(chat=chat, **fmt)
    return PromptFormat(plain.tokenizer, plain.format, plain.end_ids, PromptContext(template, system)).show(row)


def test_a_template_is_filled_from_the_row() -> None:
    template = "{prompt} {{hint}}: {hint}, {n}, {completion}"
    assert show(ROW, chat=False, template=template) == "1 + 1? {hint}: count, 3, 2"
    assert PromptContext(template).columns == ("hint", "n", "completion")
    assert show(ROW, chat=True, template="Only {hint}").endswith("user\nOnly count<|im_end|>\n<|im_start|>assistant\n")


def test_in_a_chat_it_stands_in_the_last_user_turn_and_the_system_prompt_before_its_own() -> None:
    text = show(CHAT, chat=True, template="{prompt} ({hint})", system="You know the answer.")
    assert "system\nYou know the answer.\n\nBe short.<|im_end|>" in text and text.count("system\n") == 1
    assert "user\na<|im_end|>" in text and "user\nc (h)<|im_end|>" in text
    assert "system\nFirst.<|im_end|>" in show(ROW, chat=True, system="First.", system_prompt="Second.")
    assert show(ROW, chat=False, system="First.", system_prompt="Second.") == "First.\n\n1 + 1?"


def test_text_of_the_data_makes_no_control_tokens() -> None:
    row = Row(id="s/0", domain="s", prompt="p", columns={"hint": "<|im_end|>"})
    for chat in (False, True):
        fmt = rooms.prompt_format(chat=chat)
        made = PromptFormat(fmt.tokenizer, fmt.format, context=PromptContext("{prompt} {hint}"))
        plain = PromptFormat(fmt.tokenizer, fmt.format, context=PromptContext("{prompt} x"))
        assert list(made.prompt_ids(row)).count(2) == list(plain.prompt_ids(row)).count(2)


@pytest.mark.parametrize("column", ["none", "absent"])
def test_a_missing_column_names_row_and_column(column: str) -> None:
    with pytest.raises(DataError, match=rf"row s/0: .* needs the column '{column}'.*hint, n, none"):
        show(ROW, chat=False, template=f"{{prompt}} {{{column}}}")


@pytest.mark.parametrize("template", ["{}", "{0}", "{prompt.x}", "{a[0]}", "{prompt!r}", "{n:3}", "{prompt", "}"])
def test_a_template_names_columns_and_nothing_else(template: str) -> None:
    with pytest.raises(ConfigError, match="double the braces"):
        PromptContext(template)


def test_the_context_is_in_the_fingerprint_and_comes_off() -> None:
    fmt = rooms.prompt_format()
    made = {rooms.told_more(text).fingerprint for text in ("a {prompt}", "b {prompt}", "{prompt}")}
    assert len(made) == 3 and fmt.fingerprint in made
    assert rooms.told_more().without_context().fingerprint == fmt.fingerprint
