"""A hook of mkdocs: fills docs/cli.md with the commands and options that `iceformer` itself documents."""

import subprocess
import sys
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """The page's Markdown, with the command line's behind it if it is that page."""
    if page.file.src_uri != "cli.md":
        return markdown
    command = [sys.executable, "-m", "typer", "iceformer.cli", "utils", "docs", "--name", "iceformer"]
    generated = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    title, _, body = generated.partition("\n")
    assert title.startswith("# "), f"typer's page begins with {title!r}, expected a heading, which the page has already"
    return f"{markdown}\n{body}"
