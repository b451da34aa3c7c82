"""Chat templates render what transformers renders, character for character."""

import pytest

from steep.data.chat_template import render_chat_template
from tests.data.samples import CHATML

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "system", "content": "Du bist Arzt & <b>höflich</b>."},
    {"role": "user", "content": "  Was ist \"Angina\"?\n"},
    {"role": "assistant", "content": "Enge der Brust."},
    {"role": "user", "content": "Danke 👍"},
]

# One template per feature that real models' templates use.
TEMPLATES = {
    "chatml": CHATML,
    "trimmed blocks": """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{{ bos_token }}
    {% for message in rest %}
    [{{ message.role | upper }}]
        {% if loop.first and system is defined %}
        <<SYS>>{{ system }}<</SYS>>
        {% endif %}
{{ message.content | trim }}{{ eos_token }}
    {% endfor %}
""",
    "namespace, loop controls": """{%- set ns = namespace(n=0) -%}
{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}
{{ ns.n }}: {{ message.content }}{% if ns.n == 2 %}{% break %}{% endif %}{% endfor %}""",
    "generation": """{% for message in messages %}{% if message.role == 'assistant' %}
{% generation %}
  {{ message.content }}</s>
{% endgeneration %}
{% else %}{{ message.content }}{% endif %}{% endfor %}""",
    "variables set around generation": "{% set x = 1 %}{% generation %}{{ x }}{% set x = 2 %}{{ x }}{% endgeneration %}"
    "{{ x }}",
    "tojson": "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}"
    "{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true) }}",
    "absent tools": "{% if tools is none and documents is none and not add_generation_prompt is none %}none{% endif %}"
    "{% if custom is defined %}{{ custom }}{% endif %}",
    "macro": "{% macro turn(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}\n{% endfor %}",
    "date": "{{ strftime_now('%Y') }}",
    "undefined is empty": "{{ nothing }}{{ messages[0].nothing }}!",
    "slices and strings": "{{ messages[-1]['content'][:3] }}{{ messages[::-1][0].content.startswith('D') }}"
    "{{ messages[1].content.split('Angina')[0] }}{{ 'a' ~ loop_count | default(3) }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_equal_to_transformers(name: str, prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        conversations=[CHAT],
        chat_template=TEMPLATES[name],
        add_generation_prompt=prompt,
        **SPECIAL,
        custom="given",
    )
    ours = render_chat_template(
        TEMPLATES[name], CHAT, add_generation_prompt=prompt, special_tokens=SPECIAL, custom="given"
    )
    assert ours == expected[0]


def test_a_template_may_refuse() -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('Roles must alternate!') }}{% endif %}"
    with pytest.raises(ValueError, match="chat template: Roles must alternate!"):
        render_chat_template(source, CHAT, add_generation_prompt=True, special_tokens={})
    with pytest.raises(ValueError, match="chat template: .*endfor"):
        render_chat_template("{% for x in messages %}", CHAT, add_generation_prompt=True, special_tokens={})


def test_a_template_cannot_reach_python() -> None:
    for source in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(ValueError, match="chat template"):
            render_chat_template(source, CHAT, add_generation_prompt=True, special_tokens={})
