from __future__ import annotations

import json
from typing import Any

import pytest

from meshnode.core.serving.text import Conversation, Vocabulary
from meshnode.errors import InvalidRequest, StageError
from meshnode.io.llama.chat_template import ChatTemplate

TURNS = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi <|end|>"})


def templated(template: str) -> ChatTemplate:
    vocabulary = Vocabulary(
        pieces=(b"", b""), markers={0: b"<s>", 1: b"</s>"}, end=frozenset({1}), bos=0, eos=1, chat_template=template
    )
    return ChatTemplate(vocabulary)


def rendered(template: str, **variables: Any) -> str:
    return templated(template).render(Conversation(TURNS, variables))


def test_without_a_template_a_chat_is_chatml_as_in_llama_cpp() -> None:
    assert rendered("") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi <|end|><|im_end|>\n<|im_start|>assistant\n"
    )


def test_templates_find_what_hugging_face_gives_them() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m['content'] }}{% endfor %}{{ eos_token }}{{ tools is none }}"
        "{{ add_generation_prompt }}{{ strftime_now('%Y') | length }}"
        "{% generation %}kept{% endgeneration %}"
    )
    assert rendered(template) == "<s>Be brief.</s>TrueTrue4kept"


def test_blocks_leave_no_white_space_as_hugging_face_renders_them() -> None:
    assert rendered("  {% if true %}\nx\n  {% endif %}\n") == "x\n"


def test_tojson_writes_plain_json() -> None:
    assert json.loads(rendered("{{ {'a': '<é>'} | tojson }}")) == {"a": "<é>"}
    assert "<é>" in rendered("{{ {'a': '<é>'} | tojson(indent=2) }}")


def test_variables_of_the_request_are_read_but_cannot_replace_the_messages() -> None:
    template = "{{ enable_thinking }}{{ messages | length }}"
    assert rendered(template, enable_thinking=False, messages=[]) == "False2"


def test_a_refusal_of_the_template_is_the_clients_error() -> None:
    with pytest.raises(InvalidRequest, match="no system role") as refused:
        rendered("{{ raise_exception('no system role') }}")
    assert refused.value.param == "messages"


def test_a_system_message_joins_the_first_question_where_the_template_has_no_such_role() -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    assert rendered(template) == "[user]Be brief.\n\nhi <|end|>"


def test_a_template_that_walks_over_tools_unasked_finds_none() -> None:
    assert rendered("{% for tool in tools %}{{ tool }}{% endfor %}{{ messages[1].content }}") == "hi <|end|>"


@pytest.mark.parametrize(
    "template",
    ["{{ messages[9].content.x }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ messages | sum }}", "{{ missing.attribute }}"],
)
def test_a_template_that_stumbles_over_a_conversation_is_a_client_error(template: str) -> None:
    with pytest.raises(InvalidRequest):
        rendered(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for a in range(10**9) %}{% endfor %}",
    ],
)
def test_a_template_reaches_nothing_of_python(template: str) -> None:
    with pytest.raises((StageError, InvalidRequest)):
        rendered(template)


def test_what_the_sandbox_hides_is_undefined() -> None:
    assert rendered("{{ (1).__class__ }}") == ""


@pytest.mark.parametrize("template", ["{% if %}", "{{", "{% unknown %}", "{% include 'x' %}{% extends 'y' %}"])
def test_a_template_that_does_not_compile_refuses_chats_only(template: str) -> None:
    with pytest.raises((StageError, InvalidRequest)):
        rendered(template)


def test_a_template_that_writes_without_end_is_stopped() -> None:
    loop = "{% for a in range(90000) %}{% for b in range(90000) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}"
    with pytest.raises(StageError, match="writes more"):
        rendered(loop)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for c in m.tool_calls %}{{ '' + c.function.arguments }}{% endfor %}{% endfor %}",
    ],
)
def test_arguments_of_earlier_calls_are_an_object_or_text_as_the_template_wants(template: str) -> None:
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    turns = ({"role": "assistant", "content": "", "tool_calls": [call]},)
    assert templated(template).render(Conversation(turns)) == '{"a": "é"}'


def test_the_prompt_may_end_without_the_beginning_of_an_answer() -> None:
    template = "{{ add_generation_prompt }}"
    assert (rendered(template), rendered(template, add_generation_prompt=False)) == ("True", "False")
