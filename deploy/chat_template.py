"""The chat template of a checkpoint: messages come in, the prompt that the model was trained on goes out.

It renders as `apply_chat_template` of transformers does. A template is a program from whoever made the checkpoint, so
it runs in the sandbox of `template_sandbox`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..host.messages import shown
from .artifact import SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, Artifact

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE = "chat_template.jinja"
DEFAULT = "default"
_LEGACY = "chat_template.json"
_FOLDERS = ("additional_chat_templates", "chat_templates")
_LONGEST = 2**18
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_ANOTHER = "change the messages, or use a chat template of your own"


class ChatTemplateError(ValueError):
    """A chat template that cannot be read or rendered; the message says what happened and what to do."""


class ChatTemplate:
    """A template in jinja2's language.

    Args:
        source: its text.
        special_tokens: what it may name, e.g. `bos_token`.

    Raises:
        ChatTemplateError: the text is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self._template = _compiled(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation. It has its special tokens: tokenize it with `add_special_tokens=False`.

        Args:
            messages: dicts with `role` and `content`; the content is a text, a list of parts, or None beside
                `tool_calls`.
            add_generation_prompt: whether the text ends with what an answer begins with.
            tools: JSON schemas of the functions that the model may call.
            documents: dicts that the model may refer to.
            variables: others that the template knows, e.g. `enable_thinking`.

        Raises:
            ChatTemplateError: messages, tools or documents of another form, or a template that refuses them, fails,
                takes too long, or writes too much.
        """
        check_messages(messages)
        given = {
            **self.special_tokens,
            **variables,
            "messages": [_with_reasoning(_without_none(message)) for message in messages],
            "tools": _check_dicts(tools, "tools"),
            "documents": _check_dicts(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        from . import template_sandbox as sandbox

        try:
            return sandbox.run(self._template, _plain(given))
        except sandbox.RefusedError as error:
            raise ChatTemplateError(f"the chat template refuses the messages ({shown(error)}): {_ANOTHER}") from None
        except sandbox.BudgetError as error:
            raise ChatTemplateError(f"the chat template {error}: {_ANOTHER}") from None
        except Exception as error:
            raise ChatTemplateError(f"the chat template fails ({_described(error)}): {_ANOTHER}") from error


def check_messages(messages: Any) -> None:
    """Raises ChatTemplateError, with what was found and expected, for what is no list of messages."""
    if not isinstance(messages, list | tuple):
        raise ChatTemplateError(f"messages is of type {type(messages).__name__}, expected a list of dicts")
    if not messages:
        raise ChatTemplateError("messages is empty, expected at least one")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")


def read_chat_template(artifact: Artifact, name: str = DEFAULT) -> ChatTemplate | None:
    """The chat template of an artifact, or another of its templates by name, such as "tool_use"; None if it has none.

    As in transformers, templates in files of their own come before those in tokenizer_config.json.

    Raises:
        ArtifactError: a file was changed.
        ChatTemplateError: the text is no template.
    """
    files = {file.path: file for file in artifact.manifest.files}
    config = {} if TOKENIZER_CONFIG not in files else _read_object(artifact.read(files[TOKENIZER_CONFIG]))
    tokens = {} if SPECIAL_TOKENS_MAP not in files else _read_object(artifact.read(files[SPECIAL_TOKENS_MAP]))
    stems = {f"{folder}/{name}.jinja" for folder in _FOLDERS}
    path = next((path for path in files if path in stems or (name == DEFAULT and path == TEMPLATE)), None)
    if path is not None:
        source = _text(artifact.read(files[path]), path)
    else:
        source = _named(config.get("chat_template"), name)
        if source is None and _LEGACY in files:
            source = _named(_read_object(artifact.read(files[_LEGACY])).get("chat_template"), name)
    return None if source is None else ChatTemplate(source, _special_tokens({**tokens, **_without_none(config)}))


def _compiled(source: str) -> "Template":
    from . import template_sandbox as sandbox

    if len(source) > _LONGEST:
        raise ChatTemplateError(f"the chat template has {len(source)} characters, expected up to {_LONGEST}")
    try:
        return sandbox.compile_template(source)
    except Exception as error:
        raise ChatTemplateError(
            f"the chat template cannot be read ({_described(error)}): correct it, or use one of your own"
        ) from error


def _special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that tokenizer files name, each a text or an object with one."""
    extra = fields.get("extra_special_tokens")
    named = {name: fields.get(name) for name in _TOKENS} | (extra if isinstance(extra, dict) else {})
    contents = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    return {name: token for name, token in contents.items() if isinstance(token, str)}


def _named(templates: Any, name: str) -> str | None:
    """A template by name, of one text, which is the default, or of a list or an object of named ones."""
    if isinstance(templates, str):
        return templates if name == DEFAULT else None
    if isinstance(templates, list):
        entries = [entry for entry in templates if isinstance(entry, dict)]
        templates = {str(entry.get("name")): entry.get("template") for entry in entries}
    found = templates.get(name) if isinstance(templates, dict) else None
    return found if isinstance(found, str) else None


def _read_object(data: bytes) -> dict[str, Any]:
    """A JSON object that `convert` has read already; empty for another value."""
    content = json.loads(data)
    return content if isinstance(content, dict) else {}


def _text(data: bytes, path: str) -> str:
    try:
        # As a file that is opened for reading gives it.
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ChatTemplateError(f"{shown(path)} is not UTF-8 (byte {error.start}): correct it") from None


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise ChatTemplateError(f"{where} is of type {type(message).__name__}, expected a dict with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise ChatTemplateError(f"{where} has a role of type {type(role).__name__}, expected a str such as 'user'")
    if content is None and not message.get("tool_calls"):
        raise ChatTemplateError(f"{where} has no content, expected a text, a list of parts, or tool_calls beside it")
    if isinstance(content, list) and not all(isinstance(part, dict | str) for part in content):
        raise ChatTemplateError(f"{where} has parts that are no dicts, expected e.g. {{'type': 'text', 'text': ...}}")
    if not isinstance(content, str | list | None):
        raise ChatTemplateError(f"{where} has content of type {type(content).__name__}, expected a str or a list")


def _check_dicts(given: Any, name: str) -> Any:
    if given is not None and not (isinstance(given, list | tuple) and all(isinstance(item, dict) for item in given)):
        raise ChatTemplateError(
            f"{name} is no list of dicts, as it is expected to be: give each of them as JSON has it"
        )
    return given


def _without_none(value: Mapping[str, Any]) -> dict[str, Any]:
    """Templates handle a field that is missing, but few one that is None."""
    return {name: inner for name, inner in value.items() if inner is not None}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """What an answer was thought with goes by several names."""
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """The value as JSON has it, so that a template gets no objects whose methods do something."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(map(_plain, value))
    if value is None or isinstance(value, bool):
        return value
    base = next((base for base in (str, int, float) if isinstance(value, base)), None)
    return f"<{type(value).__name__}>" if base is None else getattr(base, f"__{base.__name__}__")(value)


def _described(error: Exception) -> str:
    """What kind of error, where, and what it says, in a line."""
    line = getattr(error, "lineno", None)
    where = "" if line is None else f" in line {line}"
    return f"{type(error).__name__}{where}: {shown(error)}"
