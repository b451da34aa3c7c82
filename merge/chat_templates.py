"""The chat template of a merged model: one by name, the most common among the models, or one as written.

Reads chat_template.jinja and tokenizer_config.json of model folders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..data.chat_template import render_chat_template
from ..data.files import read_json

_HEADER = "'<|start_header_id|>' ~ {} ~ '<|end_header_id|>\\n\\n'"
# The names that mergekit has, without the line breaks and indents that some of its files leave in the text.
NAMED = {
    "chatml": """\
{% for message in messages %}
{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "llama3": f"""\
{{% for message in messages %}}
{{{{ (bos_token if loop.first else '') ~ {_HEADER.format("message.role")} ~ message.content | trim ~ '<|eot_id|>' }}}}
{{%- endfor %}}
{{% if add_generation_prompt %}}
{{{{ {_HEADER.format("'assistant'")} }}}}
{{%- endif %}}
""",
    "mistral": """\
{% set with_system = messages[0].role == 'system' %}
{{ bos_token }}
{%- for message in (messages[1:] if with_system else messages) %}
{% if message.role != ('assistant' if loop.index0 % 2 else 'user') %}
{{ raise_exception('after an optional system message, user and assistant must take turns') }}
{%- elif message.role == 'assistant' %}
{{ ' ' ~ message.content ~ eos_token }}
{%- else %}
{{ ' [INST] ' ~ (messages[0].content ~ '\\n\\n' if loop.first and with_system else '') ~ message.content ~ ' [/INST]' }}
{%- endif %}
{%- endfor %}
""",
    "exaone": """\
{% for message in messages %}
{% if loop.first and message.role != 'system' %}
{{ '[|system|][|endofturn|]\\n' }}
{%- endif %}
{{ '[|' ~ message.role ~ '|]' ~ message.content ~ ('\\n' if message.role == 'user' else '[|endofturn|]\\n') }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '[|assistant|]' }}
{%- endif %}
""",
    "alpaca": """\
{% set titles = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'} %}
{% set system = messages | selectattr('role', 'equalto', 'system') | list %}
{{ (system[-1].content | trim if system else '') ~ '\\n\\n' }}
{%- for message in messages if message.role in titles %}
{{ '### ' ~ titles[message.role] ~ ':\\n' ~ message.content | trim ~ ('' if loop.last else '\\n\\n') }}
{%- endfor %}
{% if add_generation_prompt and messages[-1].role != 'assistant' %}
{{ '\\n\\n### Response:\\n' }}
{%- endif %}
""",
}


def read_template(folder: Path) -> str | None:
    """The default template of a model folder."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    if not (file := folder / "tokenizer_config.json").is_file():
        return None
    template = read_json(file).get("chat_template")
    if isinstance(template, list):  # several with names
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template if isinstance(template, str) else None


def choose_template(wanted: str, folders: Sequence[Path]) -> tuple[str | None, str]:
    """The template that `chat_template` asks for, and where it comes from in words.

    Args:
        wanted: auto (the most common among the models, the first of them at a tie), a name, or a Jinja template.

    Raises:
        ValueError: neither a name nor a template, or a template that cannot be rendered.
    """
    if wanted == "auto":
        templates = [(template.strip(), folder) for folder in folders if (template := read_template(folder))]
        if not templates:
            return None, "none: no model has one"
        ((chosen, _),) = Counter(template for template, _ in templates).most_common(1)
        return chosen, str(next(folder for template, folder in templates if template == chosen))
    if wanted in NAMED:
        return NAMED[wanted], f"'{wanted}'"
    if "{" not in wanted:
        raise ValueError(f"chat_template: allowed: auto, {', '.join(NAMED)}, or a Jinja template; found {wanted!r}")
    messages, tokens = [{"role": "user", "content": "?"}], {"bos_token": "", "eos_token": ""}
    try:
        render_chat_template(wanted, messages, add_generation_prompt=True, special_tokens=tokens)
    except ValueError as error:
        raise ValueError(f"chat_template: {error}") from None
    return wanted, "the configuration"
