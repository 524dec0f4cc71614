"""Options of a command from the fields of the dataclass that they set, with the help that its docstring has."""

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import typer

Command = TypeVar("Command", bound=Callable[..., None])


def takes_options(command: Command) -> Command:
    """Decorates a command that takes more options as `**options`, which `add_options` adds."""
    parameters = inspect.signature(command).parameters.values()
    own = [each for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]
    command.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    return command


@functools.cache
def add_options(command: Callable[..., None], settings: type, panel: str, skip: tuple[str, ...] = ()) -> None:
    """Gives a command an option for each field of a dataclass, None by default; once for each dataclass.

    A field may name its `choices`, or a `metavar`, in its metadata, and what its `default` is called.

    Args:
        command: decorated with `takes_options`.
        settings: the dataclass.
        panel: the heading of the options in the command's help.
        skip: fields that are no options.
    """
    signature = inspect.signature(command)
    own = list(signature.parameters.values())
    texts, hints = attribute_help(settings), typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if field.name in skip:
            continue
        hint = _option_type(hints[field.name])
        annotation = Annotated[hint | None, _option(field, hint, texts, panel)]
        kind = inspect.Parameter.KEYWORD_ONLY
        own.append(inspect.Parameter(field.name, kind, default=None, annotation=annotation))
    command.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    command.__annotations__ |= {each.name: each.annotation for each in own}


def attribute_help(settings: type) -> Mapping[str, str]:
    """What a class's docstring says of each attribute."""
    text = inspect.getdoc(settings) or ""
    section = text.partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section, re.DOTALL | re.MULTILINE)
    lines = {name: " ".join(entry.split()).replace("`", "") for name, entry in entries}
    return {name: line[:1].upper() + line[1:] for name, line in lines.items()}


def _option_type(hint: Any) -> Any:
    """The type of an option that may be left out; text for a number or a pair of them, which the command reads."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    if not isinstance(hint, types.UnionType):
        return hint
    return kinds[0] if len(kinds) == 1 else str


def _option(field: dataclasses.Field[Any], hint: Any, texts: Mapping[str, str], panel: str) -> Any:
    name, default = field.name.replace("_", "-"), field.default
    flag = f"--{name}/--no-{name}" if hint is bool else f"--{name}"
    shown = f"{'' if default else 'no-'}{name}" if hint is bool else field.metadata.get("default", str(default))
    choices = "|".join(field.metadata.get("choices", ())) or field.metadata.get("metavar")
    return typer.Option(flag, help=texts[field.name], show_default=shown, metavar=choices, rich_help_panel=panel)
