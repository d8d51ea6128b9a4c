"""Conversations become the text that transformers makes of them; a template cannot do more than that."""

import json
import time

import pytest
import tokenizer_files
import tokenizers

from portlm.chat import MAX_MESSAGES, MAX_TEMPLATE_CHARS, ChatTemplate
from portlm.errors import FormatError, UsageError
from portlm.tokenizer import Tokenizer

# Of the forms that published models use, written anew: what matters is what they ask of the engine.
TEMPLATES = {
    "marked turns with a default system message": """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "headers, dates and tools": """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0]["content"]|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday: " ~ date_string ~ "\\n" ~ system }}
{%- if tools is not none %}
    {%- for tool in tools %}{{ "\\n" ~ tool | tojson(indent=4) }}{% endfor %}
{%- endif %}
{% for message in messages %}
    {%- if message.tool_calls is defined %}
        {{- "<|start|>call<|end|>" + message.tool_calls[0].function | tojson }}
    {%- else %}
{{ "<|start|>" + message.role + "<|end|>\\n\\n" + message.content | trim + "<|eot|>" }}
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt -%}
<|start|>assistant<|end|>

{% endif -%}""",
    "alternating roles": """\
{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}""",
    "namespace, macros, loop controls and reasoning": """\
{% macro turn(role, text) %}<{{ role }}>{{ text }}</{{ role }}>
{% endmacro %}
{% set ns = namespace(last=-1, seen=[]) %}
{% for message in messages %}
    {% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{% endfor %}
{% for message in messages %}
    {% if message.role == 'skip' %}{% continue %}{% endif %}
    {{ turn(message.role, message.content.split('</think>')[-1].lstrip('\\n')) }}
    {% if message.reasoning_content and loop.index0 > ns.last %}{{ message.thinking | length }}{% endif %}
    {% if loop.last or loop.length > 99 %}{% break %}{% endif %}
{% endfor %}
{{ dict(a=ns.last).items() | list }}{{ '%s' % ns.last }}{{ "é<&>" | tojson }}""",
    "marks of what is generated": """\
{% for message in messages %}{% if message.role == 'assistant' %}\
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}\
{% else %}{{ message.content | upper | replace("A", "-") }}{% endif %}{% endfor %}""",
    "content in blocks": """\
{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}\
{% for block in message.content if block.type == 'text' %}{{ block['text'] }}{% endfor %}{% endif %}|{% endfor %}""",
}
TALKS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "  Be brief. "}, {"role": "user", "content": "<b>é</b>\n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>x</think>\n\nb", "reasoning": "why"},
     {"role": "user", "content": "c"}, {"role": "assistant", "content": "dA", "thinking": "so"}],
    [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image"},
                                  {"type": "text", "text": "two"}]}],
    [{"role": "user", "content": "w"},
     {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"é": 1}}}]}],
    [{"role": "skip", "content": "no"}, {"role": "user", "content": ""}],
    [{"role": "assistant", "content": "I begin"}],
]  # fmt: skip
CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "does é", "parameters": {"type": "object"}}}
]


@pytest.fixture(scope="module")
def theirs():
    """transformers' tokenizer, of whose template alone is asked."""
    transformers = pytest.importorskip("transformers", reason="the differential test needs transformers")
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_files.document("llama 2")))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers_or_both_refuse(theirs, name):
    template, said = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"}), 0
    for talk in TALKS:
        for more in ({}, {"add_generation_prompt": True}, {"tools": TOOLS, "date_string": "today"}):
            try:
                wanted = theirs.apply_chat_template(
                    talk, chat_template=TEMPLATES[name], tokenize=False, **more
                )
            except Exception:  # a template fails with whatever it runs into
                with pytest.raises(UsageError, match="chat template"):
                    template.render(talk, **more)
            else:
                assert template.render(talk, **more) == wanted
                said += 1
    assert said >= 9


def test_a_template_comes_from_its_file_or_from_the_config(tmp_path):
    with pytest.raises(FormatError, match="has no chat template"):
        ChatTemplate.load(tmp_path)
    listed = [
        {"name": "default", "template": "d{{ bos_token }}"},
        {"name": "tool_use", "template": "t{{ eos_token }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"chat_template": listed}))
    talk = [{"role": "user", "content": ""}]
    assert ChatTemplate.load(tmp_path).render(talk) == "d<s>"
    assert ChatTemplate.load(tmp_path, "tool_use").render(talk) == "t</s>"
    with pytest.raises(FormatError, match="no chat template 'rag', only 'default', 'tool_use'"):
        ChatTemplate.load(tmp_path, "rag")
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].role }}")
    assert ChatTemplate.load(tmp_path).render(talk) == "file user"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="not UTF-8"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("kind", ["llama 3", "qwen 2", "llama 2", "gpt2"])
def test_what_a_user_says_never_becomes_a_control_token(kind, tmp_path):
    """Whatever is spelled in a message, the template's own control tokens are there, and no others."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_files.document(kind)))
    tokenizer = Tokenizer.load(tmp_path)
    mark = list(tokenizer.special)[-1]
    template = ChatTemplate(
        "{% for m in messages %}{{ mark }}{{ m.role }}: {{ m.content }}{% endfor %}{{ mark }}"
    )
    plain = [{"role": "user", "content": "Say hello"}]
    control = set(tokenizer.special.values())
    ids = template.encode(plain, tokenizer, mark_unused=1, mark="")
    assert not control & set(ids)
    template = ChatTemplate(template.source.replace("{{ mark }}", mark))
    wanted = tokenizer.encode(f"{mark}user: Say hello{mark}", special=True, add_special_tokens=False)
    assert template.encode(plain, tokenizer) == wanted
    for name in tokenizer.special:
        for text in (name, f"x {name} y", name * 2, name[0] + name, f"{name[:3]}{name}{name[3:]}", name[:-1]):
            ids = template.encode([{"role": "user", "content": text}], tokenizer)
            assert [i for i in ids if i in control] == [tokenizer.special[mark]] * 2, text


def test_a_name_that_role_and_content_spell_together_is_the_templates(tmp_path):
    """Only whole names are guarded: a template that puts pieces of a name around a message has itself to blame."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_files.document("llama 3")))
    tokenizer = Tokenizer.load(tmp_path)
    template = ChatTemplate("<|{{ messages[0].content }}|>")
    ids = template.encode([{"role": "user", "content": "endoftext"}], tokenizer)
    assert ids == [tokenizer.special["<|endoftext|>"]]


ENDLESS = {
    "loops in loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "a loop over text": "{% for a in range(9999) %}{% for b in 'x' * 9999 %}{% endfor %}{% endfor %}",
    "a text that doubles": "{% set n = namespace(s='x') %}{% for i in range(80) %}{% set n.s=n.s~n.s %}{% endfor %}",
    "a sum that doubles": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "a text many times": "{{ 'x' * 99999999999 }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "much output": "{% for a in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
    "a long range": "{% for a in range(10**9) %}{% endfor %}",
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_template_that_never_ends_is_ended(what):
    template, begun = ChatTemplate(ENDLESS[what]), time.process_time()
    with pytest.raises((FormatError, UsageError), match="chat template"):
        template.render([{"role": "user", "content": ""}])
    assert time.process_time() - begun < 20  # a second or two; hours without a limit


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ self.__init__.__globals__.__builtins__ }}",
        "{{ ''|attr('__class__') }}",
        "{% set n = namespace() %}{{ n.__class__.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{% include 'chat_template.jinja' %}",
        "{{ '{0.__class__}'.format('') }}",
    ],
)
def test_a_template_reaches_nothing_of_python(source):
    """Refused, or undefined and therefore empty."""
    try:
        text = ChatTemplate(source).render([{"role": "user", "content": ""}])
    except (FormatError, UsageError):
        return
    assert text == ""


def test_errors_are_clear():
    talk = [{"role": "user", "content": "x"}]
    with pytest.raises(FormatError, match="no Jinja that can be read"):
        ChatTemplate("{% for %}")
    with pytest.raises(FormatError, match=f"the limit is {MAX_TEMPLATE_CHARS}"):
        ChatTemplate("x" * (MAX_TEMPLATE_CHARS + 1))
    with pytest.raises(UsageError, match="refuses this conversation: no system message"):
        ChatTemplate("{{ raise_exception('no system message') }}").render(talk)
    with pytest.raises(UsageError, match="cannot be filled"):
        ChatTemplate("{{ messages[0].absent.name }}").render(talk)
    template = ChatTemplate("")
    for bad, message in (
        ("text", "list of at most"),
        (talk * (MAX_MESSAGES + 1), "list of at most"),
        (["x"], "an object with a role"),
        ([{"content": "x"}], "an object with a role"),
        ([{"role": "user", "content": object()}], "plain data, and a object"),
        ([{"role": "user", "content": "x" * 2**22}], "more than 4194304 characters"),
    ):
        with pytest.raises(UsageError, match=message):
            template.render(bad)
    nested: list = []
    for _ in range(30):
        nested = [nested]
    with pytest.raises(UsageError, match="more than 16 deep"):
        template.render([{"role": "user", "content": nested}])
