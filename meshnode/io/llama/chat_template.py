"""Chat templates: Jinja programs from model files, and model files are untrusted.

The sandbox keeps a template from Python's objects; it cannot keep it from looping or from filling memory. So a
template runs in the tokenizer process, whose memory is limited and which its parent ends when it takes too long.
"""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from meshnode.core.serving.text import Conversation, Vocabulary
from meshnode.errors import InvalidRequest, StageError

PROMPT_CHARACTERS: Final = 8 * 1024 * 1024
"""Twice what is tokenized: a template that writes more is stopped instead of collected."""
CHATML: Final = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""What llama.cpp uses where a model has no template."""


class _Refusal(jinja2.TemplateError):
    """The template itself refuses the conversation."""


class _Generation(Extension):
    """`{% generation %}`: marks the answer for training; the text in it stays as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One model's template. It is compiled when first used: compiling computes constants, so it may run wild too."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        self._environment.filters["tojson"] = _to_json
        self._environment.globals["raise_exception"] = _refuse
        self._environment.globals["strftime_now"] = _strftime_now
        self._source = vocabulary.chat_template or CHATML
        self._bos = vocabulary.written(vocabulary.bos).decode("utf-8", "replace")
        self._eos = vocabulary.written(vocabulary.eos).decode("utf-8", "replace")
        self._template: jinja2.Template | None = None

    def render(self, conversation: Conversation) -> str:
        """The prompt with the beginning of the answer, unless `add_generation_prompt` says otherwise.

        Raises InvalidRequest where the template refuses the conversation or lacks something in it, StageError
        (`template`) where the template itself is at fault.
        """
        messages = conversation.messages
        try:
            return self._attempt(messages, {"tools": None, "documents": None, **conversation.variables})
        except InvalidRequest:
            # Tool templates walk over `tools` unasked, and Gemma's knows no system role. Both have an obvious reading,
            # which llama.cpp takes too; where it fails as well, the first error is the true one.
            lists = {"tools": [], "documents": [], **conversation.variables}
            for reading in (messages, _without_system(messages), _with_written_arguments(messages)):
                with suppress(InvalidRequest):
                    return self._attempt(reading, lists)
            raise

    def _attempt(self, messages: tuple[dict[str, Any], ...], variables: dict[str, Any]) -> str:
        fixed = {
            "messages": list(messages),
            "bos_token": self._bos,
            "eos_token": self._eos,
        }
        try:
            return self._collect(self._compiled(), {"add_generation_prompt": True, **variables, **fixed})
        except _Refusal as error:
            raise InvalidRequest(f"the model's chat template refuses: {str(error)[:200]}", "messages") from None
        except jinja2.exceptions.SecurityError:
            raise StageError("template", "the model's chat template does what templates may not do") from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            message = f"the model's chat template cannot render this conversation: {type(error).__name__}"
            raise InvalidRequest(message, "messages") from None
        except (MemoryError, RecursionError) as error:
            raise StageError("template", f"the model's chat template ran into {type(error).__name__}") from None

    def _compiled(self) -> jinja2.Template:
        if self._template is None:
            try:
                self._template = self._environment.from_string(self._source)
            except (jinja2.TemplateError, SyntaxError, ValueError, TypeError, ArithmeticError) as error:
                # The model still completes plain prompts.
                message = f"the model's chat template does not compile: {type(error).__name__}"
                raise StageError("template", message) from None
        return self._template

    def _collect(self, template: jinja2.Template, given: dict[str, Any]) -> str:
        parts: list[str] = []
        size = 0
        for part in template.generate(**given):
            size += len(part)
            if size > PROMPT_CHARACTERS:
                raise StageError(
                    "template", f"the model's chat template writes more than {PROMPT_CHARACTERS} characters"
                )
            parts.append(part)
        return "".join(parts)


def _without_system(messages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """A leading system message as the beginning of the user's first one."""
    match messages:
        case ({"role": "system", "content": str(system)}, {"role": "user", "content": str(user), **more}, *rest):
            return ({**more, "role": "user", "content": f"{system}\n\n{user}"}, *rest)
        case _:
            return messages


def _with_written_arguments(messages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Arguments of calls as JSON text, which templates of DeepSeek join to text; others walk over the object."""
    return tuple(
        {**turn, "tool_calls": [_written(call) for call in turn["tool_calls"]]} if "tool_calls" in turn else turn
        for turn in messages
    )


def _written(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    given = function["arguments"]
    return {**call, "function": {**function, "arguments": given if isinstance(given, str) else _to_json(given)}}


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own escapes for HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: object) -> NoReturn:
    raise _Refusal(str(message))


def _strftime_now(form: str) -> str:
    """Templates that tell the model today's date."""
    return datetime.now().strftime(form)
