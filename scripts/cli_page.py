"""A hook of mkdocs: fills docs/cli.md with the commands and options that `iceformer` itself documents."""

from typing import Any

import typer.cli
import typer.main

from iceformer.cli import add_two_stage_options, app


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """The page's Markdown, with the command line's behind it if it is that page."""
    if page.file.src_uri != "cli.md":
        return markdown
    add_two_stage_options()
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="iceformer")
    generated = typer.cli.get_docs_for_click(obj=command, ctx=context, name="iceformer")
    title, _, body = generated.partition("\n")
    assert title.startswith("# "), f"typer's page begins with {title!r}, expected a heading, which the page has already"
    return f"{markdown}\n{body}"
