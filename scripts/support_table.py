"""Writes the README's table of architectures from the registry; --check only says whether it is up to date."""

import argparse
import re
import sys
from pathlib import Path

from iceformer.model.decoder import CausalLM
from iceformer.model.registry import ARCHITECTURES, Architecture

README = Path(__file__).resolve().parent.parent / "README.md"
_BETWEEN = re.compile(r"(<!-- architectures -->\n).*?(<!-- end of architectures -->)", re.DOTALL)


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


def main() -> None:
    """Rewrites the README or, with --check, exits with 1 if that would change it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Change nothing; exit with 1 if the table is out of date.")
    check = parser.parse_args().check
    before = README.read_text(encoding="utf-8")
    after = _BETWEEN.sub(lambda match: f"{match[1]}{support_table()}\n{match[2]}", before)
    if check and after != before:
        sys.exit("the table of architectures in README.md is out of date: run python scripts/support_table.py")
    README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
