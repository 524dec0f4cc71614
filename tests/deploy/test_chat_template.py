"""Chat templates of many families render as in transformers, and what a template must not do ends in a sentence."""

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from iceformer.conversation import system_messages
from iceformer.deploy import template_sandbox as sandbox
from iceformer.deploy.chat_template import ChatTemplate, ChatTemplateError, check_messages

from ..few import few

SOURCES = {file.stem: file.read_text() for file in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
USER = {"role": "user", "content": "Hello, who are you?"}
CALL = {"id": "abcdef012", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "n": 2}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of <a city> & its 'surroundings'.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [{"role": "system", "content": "Be brief. /no_think"}, USER],
    "turns": [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA model."},
        {"role": "user", "content": "And?"},
    ],
    "unicode": [{"role": "user", "content": "日本語 🦊 \u2028 café <|im_end|> & \"quotes\" {{ 'no template' }}"}],
    "spaces": [{"role": "user", "content": "  \n a \n\n"}, {"role": "assistant", "content": "\n\n b \t"}],
    "thinking": [USER, {"role": "assistant", "content": "Yes.", "reasoning": "because", "name": None}],
    "call": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "12.5", "tool_call_id": "abcdef012"},
        {"role": "assistant", "content": "12.5 degrees."},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " Look: "}, {"type": "image"}]}],
    "roles out of order": [{"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "no prompt": {"add_generation_prompt": False},
    "tools": {"tools": [TOOL, TOOL]},
    "documents": {"documents": [{"title": "t", "text": "One."}, {"title": "u", "text": "Two."}], "tools": [TOOL]},
    "variables": {"enable_thinking": False, "date_string": "1 Jan 2025", "controls": {"length": "long"}},
    "token": {"bos_token": "<other>"},
}


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({token: at for at, token in enumerate(TOKENS.values())}, "<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **TOKENS)


@pytest.mark.parametrize(
    ("family", "conversation"),
    few(
        itertools.product(SOURCES, CONVERSATIONS),
        [
            *itertools.product(SOURCES, ("call", "thinking")),
            *itertools.product(("mistral", "qwen3"), CONVERSATIONS),
        ],
    ),
)
def test_renders_as_transformers(reference: PreTrainedTokenizerFast, family: str, conversation: str) -> None:
    messages, source = CONVERSATIONS[conversation], SOURCES[family]
    template = ChatTemplate(source, TOKENS)
    for options in OPTIONS.values():
        given = {"add_generation_prompt": True, **options}
        try:
            expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False, **given)
        except (TemplateError, TypeError):
            with pytest.raises(ChatTemplateError, match=r"the chat template (refuses|fails \((?!TypeCheck))"):
                template.render(messages, **given)
        else:
            assert template.render(messages, **given) == expected


@pytest.mark.parametrize("family", SOURCES)
def test_every_family_renders_something(reference: PreTrainedTokenizerFast, family: str) -> None:
    messages = CONVERSATIONS["turns"]
    expected = reference.apply_chat_template(messages, chat_template=SOURCES[family], tokenize=False)
    text = ChatTemplate(SOURCES[family], TOKENS).render(messages, add_generation_prompt=False)
    assert text == expected
    assert "who are you?" in text or "WHO ARE YOU?" in text


@pytest.mark.parametrize("family", [family for family in SOURCES if family != "macros"])  # which is of no model
@pytest.mark.parametrize("system", few([None, "Be brief."], ["Be brief."]))
def test_conversations_about_a_document_begin_alike(family: str, system: str | None) -> None:
    """What `cache --chat` reads of a document is how `chat --file` begins, in the first turn and in later ones."""
    template, document = ChatTemplate(SOURCES[family], TOKENS), "Chapter 1.\n\nThere was a small fox,\nwho had a wood."

    def rendered(*contents: str) -> str:
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
        return template.render(system_messages(system) + messages)

    if family == "gemma" and system:
        with pytest.raises(ChatTemplateError, match="System role not supported"):
            rendered(document)
        return
    kept, question = rendered(document), f"{document}\n\nWho?"
    turns = [rendered(question), rendered(question, "A fox.", "Where?")]
    if family == "mistral" and system:
        del turns[1]  # the system message stands before the last question, wherever that is
    end = kept.index("had a wood") + len("had a wood")
    assert all(text[:end] == kept[:end] for text in turns)


def rendered(source: str, messages: list[dict[str, Any]] | None = None, **variables: Any) -> str:
    return ChatTemplate(source, TOKENS).render(messages or [USER], **variables)


@pytest.mark.parametrize(
    "source", ["{{ x[ }}", "{% for a in b %}", "{% nothing %}", "{{ 1 | center }}", "{{ '" + "(" * 9]
)
def test_what_is_no_template(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"cannot be read \(Template\w+Error in line 1: .*own$"):
        ChatTemplate(source, {})


def test_a_deep_template_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="cannot be read"):
        ChatTemplate("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", {})


def test_a_long_template_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="expected up to"):
        ChatTemplate(" " * 2**21, {})


def test_what_a_template_raises_is_said() -> None:
    with pytest.raises(
        ChatTemplateError, match=r"refuses the messages \(roles \\nmust alternate\): change the messages"
    ):
        rendered("{{ raise_exception('roles \nmust alternate') }}")


DOUBLE = "{% set ns = namespace(x='ab') %}{% for i in range(200) %}{% set ns.x = EXPRESSION %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% set x = range(50) | list %}" + "{% for a in x %}" * 12 + "{% endfor %}" * 12,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ range(90000) | map('tojson') | map('length') | list }}" * 200,
        "{% for a in range(90000) %}{{ range(90000) | select('equalto', 1) | list }}{% endfor %}",
    ],
)
def test_the_time_is_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    started = time.thread_time()
    with pytest.raises(ChatTemplateError, match=r"takes more than 0\.3 seconds|too many values"):
        rendered(source)
    assert time.thread_time() - started < 3


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [0] * 10**9 }}",
        "{{ (1, 2) * 10**9 }}",
        "{{ 10 ** 10000000000 }}",
        "{{ true * 2 ** 4000 * 2 ** 4000 }}",
        "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%.999999999f' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%*d' | format(999999999, 1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 999999999) }}",
        "{{ '{a:{b}}'.format_map({'a': 1, 'b': 999999999}) }}",
        "{{ '%(a)+9999d' % {'a': 1} }}",
        "{{ '{{{:9999}}}'.format(1) }}",
        "{% set n = ('f' * 100000) | int(base=16) %}{{ n // 3 }}",
        "{{ 'a'.center(999999999) }}",
        "{{ 'a'.ljust(width=999999999) }}",
        "{{ '1'.zfill(999999999) }}",
        "{{ 'a\ta'.expandtabs(999999999) }}",
        "{{ (1).to_bytes(999999999, 'big') }}",
        "{{ 'a' | indent(999999999, true) }}",
        "{{ {'a': 1} | tojson(indent=999999999) }}",
        "{{ 1.5 | round(999999999, 'ceil') }}",
        "{{ [[1]] | sum(start=[]) }}",
        "{{ strftime_now('%999999999d') }}",
        "{{ range(10**9) }}",
        "{{ lipsum(10**6) }}",
        *(
            DOUBLE.replace("EXPRESSION", expression)
            for expression in (
                "ns.x + ns.x",
                "ns.x ~ ns.x",
                "[ns.x, ns.x]",
                "(ns.x, ns.x)",
                "{'a': ns.x, 'b': ns.x}",
                "dict(a=ns.x, b=ns.x)",
                "cycler(ns.x, ns.x).items",
                "[ns.x, ns.x] | join",
                "ns.x.join([ns.x, ns.x, ns.x])",
                "ns.x.replace('a', ns.x)",
                "ns.x | replace('a', ns.x)",
                "ns.x.translate({97: ns.x})",
                "'%s%s' % (ns.x, ns.x)",
                "'%s%s' | format(ns.x, ns.x)",
                "'{0}{0}'.format(ns.x)",
                "ns.x | tojson | tojson",
                "dict.fromkeys([1, 2], ns.x)",
            )
        ),
        "{% set x = 'a' * 1900000 %}{{ range(90000) | map('replace', '', x) | list }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(200) %}{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = x %}{% endfor %}",
        "{% macro f(x, n) %}{% if n %}{{ f(x, n - 1) }}{{ f(x, n - 1) }}{% else %}{{ x }}{% endif %}{% endmacro %}"
        "{{ f('a' * 100000, 20) }}",
        "{% set ns = namespace(x='ab') %}{% macro f() %}{% set ns.x = varargs %}{% endmacro %}"
        "{% for i in range(200) %}{{ f(ns.x, ns.x) }}{% endfor %}{{ ns.x }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% for i in range(100000) %}{{ 'a' * 10000 }}{% endfor %}",
    ],
)
def test_sizes_are_bounded(source: str) -> None:
    started = time.thread_time()
    with pytest.raises(ChatTemplateError, match=r"the chat template (?!fails \(TypeCheck)"):
        rendered(source)
    assert time.thread_time() - started < 5


def test_numbers_beside_fields_are_no_widths() -> None:
    assert rendered("{{ '%s in 20240 * 2, 100%%' % 1 }} {{ '{} in {{20240}} {:>3}'.format(1, 2) }}") == (
        "1 in 20240 * 2, 100% 1 in {20240}   2"
    )


def test_written_out_namespaces_do_not_grow() -> None:
    nested = DOUBLE.replace("EXPRESSION", "namespace(a=ns.x, b=ns.x)")
    assert rendered(nested) == "<Namespace>"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'].__mro__ }}",
        "{{ '' | attr('__class__') | attr('mro') }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__.__globals__.x }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ ['{0.__class__.__mro__}'.format] | map('call') | list }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% extends 'x' %}",
        "{{ nothing.at.all }}",
        "{{ messages | tojson(nothing=1) }}",
        "{{ nothing | tojson }}",
    ],
)
def test_tricks_end_in_a_sentence(source: str) -> None:
    with pytest.raises(
        ChatTemplateError, match=r"the chat template (fails|cannot be read) \((?!TypeCheck).*of your own"
    ):
        rendered(source)


def test_the_messages_are_not_changed_and_objects_do_not_come_in() -> None:
    class Name(str):
        def evil(self) -> str:
            raise AssertionError

    messages = [{"role": Name("user"), "content": "x", "extra": None, "of": (1, object(), {"a": 2.5, "b": True})}]
    assert rendered("{{ messages[0].role.evil }}|{{ messages[0] | tojson }}", messages) == (
        '|{"role": "user", "content": "x", "of": [1, "<object>", {"a": 2.5, "b": true}]}'
    )
    assert "extra" in messages[0]


def test_long_conversations_are_no_attack() -> None:
    turns = [{"role": role, "content": "word " * 2000} for role in ("user", "assistant")] * 200 + [USER]
    assert len(rendered(SOURCES["qwen3"], turns)) > 200 * 2000 * 5 * 2
    assert len(rendered(SOURCES["mistral"], turns)) > 200 * 2000 * 5 * 2


def test_threads_render_at_the_same_time() -> None:
    template, texts = ChatTemplate(SOURCES["smollm2"], TOKENS), []
    threads = [threading.Thread(target=lambda: texts.append(template.render([USER]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [template.render([USER])] * 8


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", "messages is of type str, expected a list of dicts"),
        ([], "messages is empty"),
        (["Hello"], r"messages\[0\] is of type str"),
        ([USER, {"content": "x"}], r"messages\[1\] has a role of type NoneType, expected a str"),
        ([{"role": 1, "content": "x"}], "a role of type int"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 3}], "content of type int, expected a str or a list"),
        ([{"role": "user", "content": [3]}], "parts that are no dicts"),
    ],
)
def test_strange_messages(messages: Any, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        check_messages(messages)
