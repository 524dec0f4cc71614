"""Writes the tables of architectures and of selection methods from the registries.

--check only says whether they are up to date.
"""

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from iceformer.attention import METHODS, Method
from iceformer.model.decoder import CausalLM
from iceformer.model.registry import ARCHITECTURES, Architecture

ROOT = Path(__file__).resolve().parent.parent


def support_table() -> str:
    """The table in Markdown, decoders first."""
    rows = sorted(ARCHITECTURES.items(), key=lambda item: (not is_decoder(item[1]), item[1].name.lower()))
    lines = ["| models | `model_type` | kind | what is special |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {known.name} | `{model_type}` | {'decoder' if is_decoder(known) else 'encoder'} | {known.features} |"
        for model_type, known in rows
    ]
    return "\n".join(lines)


def is_decoder(architecture: Architecture) -> bool:
    """Whether it is a language model, that can generate; else it encodes."""
    return issubclass(architecture.module, CausalLM)


def methods_table() -> str:
    """The table in Markdown, in the order of the registry."""
    lines = [
        "| method | what ranks a key block | source | options | new tokens | by mass |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, method in METHODS.items():
        cells = [f"`{name}`", _summary(method), method.source, ", ".join(_options(method))]
        cells += ["yes" if x else "no" for x in (method.single_queries, method.estimates)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _summary(method: type[Method]) -> str:
    """The first sentence of the class."""
    return inspect.cleandoc(method.__doc__ or "").split("\n\n")[0].replace("\n", " ").split("; ")[0].removesuffix(".")


def _options(method: type[Method]) -> Iterator[str]:
    for field in dataclasses.fields(method):
        yield f"`{field.name}` {field.default}"


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "architectures": (ROOT / "README.md", support_table),
    "methods": (ROOT / "docs" / "methods.md", methods_table),
}
"""Where each table stands, between `<!-- name -->` and `<!-- end of name -->`."""


def _with_table(table: str, match: re.Match[str]) -> str:
    return f"{match[1]}{table}\n{match[2]}"


def main() -> None:
    """Rewrites the files or, with --check, exits with 1 if that would change one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Change nothing; exit with 1 if a table is out of date.")
    check = parser.parse_args().check
    for name, (file, table) in TABLES.items():
        before = file.read_text(encoding="utf-8")
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        after = between.sub(partial(_with_table, table()), before)
        if check and after != before:
            sys.exit(f"the table of {name} in {file.name} is out of date: run python scripts/support_table.py")
        file.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
