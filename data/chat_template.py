"""Chat templates: a model's Jinja template -> the text of a conversation. Touches no files.

The environment is the one that Hugging Face documents for chat templates ("Chat templates: advanced usage"): a
sandbox, blocks trimmed, `raise_exception`, `strftime_now`, a `tojson` that keeps non-ASCII text, loop controls, and
`{% generation %}`, which marks what the assistant said for training masks and renders as its body.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` -> its body, in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML; a prompt wants plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(source)


def render_chat_template(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, Any],
    **variables: Any,
) -> str:
    """The conversation as text, special-token strings included.

    Args:
        source: the Jinja template.
        messages: {"role": ..., "content": ...} in order.
        add_generation_prompt: end with the opening of an assistant's turn.
        special_tokens: `bos_token`, `eos_token`, ... as the template sees them.
        variables: what else the template may ask for, such as `enable_thinking=False`.

    Raises:
        ValueError: the template does not compile, or refuses the messages (`raise_exception`), with its own words.
    """
    context = {
        **special_tokens,
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **variables,
    }
    try:
        return _compile(source).render(**context)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template: {error}") from None
