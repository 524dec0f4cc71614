"""The command `iceformer serve`: its options, and what they are for the server."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .host.terminal import stdout
from .sizes import read_size

_NETWORK, _LIMITS = "Network", "Limits"


class OverflowKind(StrEnum):
    """What becomes of a prompt that does not fit."""

    ERROR = "error"
    TRUNCATE_OLDEST = "truncate-oldest"


def serve(
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT",
            help="Folders written by `iceformer compile`. Clients ask for each by the name of its folder, or by "
            "NAME if it is given as NAME=ARTIFACT.",
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.", rich_help_panel=_NETWORK)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any free one.", rich_help_panel=_NETWORK)
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="ICEFORMER_API_KEY",
            help="Key that clients must send, on every route but /health/live. On the command line, other users of the "
            "machine can see it: prefer the environment variable.",
            show_default="none",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Web pages of this origin may ask, such as https://example.org; * for all; may be repeated.",
            show_default="none",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that compute.", show_default="one for each core")
    ] = None,
    cache_ram: Annotated[
        str,
        typer.Option(help="Memory of each artifact for what was read already, such as 500M or 2G; 0 for none."),
    ] = "1G",
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which clients may save what was read of a prompt, through /cache/save.", show_default="none"
        ),
    ] = None,
    overflow: Annotated[
        OverflowKind,
        typer.Option(
            help="What becomes of a prompt that does not fit into the largest bucket: error refuses it, "
            "truncate-oldest drops its oldest messages or tokens and says in the answer how many."
        ),
    ] = OverflowKind.ERROR,
    queue: Annotated[
        int,
        typer.Option(
            min=1, help="Prompts that may wait, of each artifact. Others are refused (429).", rich_help_panel=_LIMITS
        ),
    ] = 64,
    max_stall: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="How long reading prompts may keep other texts from their next tokens, and a client that left may "
            "keep its slot. Chunks of --chunk tokens that take longer are read in pieces of 128 tokens.",
            rich_help_panel=_LIMITS,
        ),
    ] = 0.5,
    max_choices: Annotated[
        int,
        typer.Option(
            min=1, help="Texts that one request may ask for: its prompts, each n times.", rich_help_panel=_LIMITS
        ),
    ] = 16,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="New tokens that one text may have.",
            show_default="what the context has room for",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_body: Annotated[
        str, typer.Option(help="Size of a request, such as 500K or 32M.", rich_help_panel=_LIMITS)
    ] = "32M",
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.", rich_help_panel=_LIMITS)] = 3600.0,
    drain: Annotated[
        float,
        typer.Option(help="Seconds that running requests are given after SIGTERM or Ctrl-C.", rich_help_panel=_LIMITS),
    ] = 60.0,
    ping: Annotated[
        float,
        typer.Option(
            help="Seconds without news after which a stream gets a comment, so that nothing in between closes it.",
            rich_help_panel=_LIMITS,
        ),
    ] = 10.0,
) -> None:
    """Serve artifacts over HTTP, compatible with OpenAI's API, until SIGTERM or Ctrl-C."""
    paths = _served(artifacts)
    if threads is not None:
        os.environ["NPROC"] = str(threads)  # XLA reads it when it starts.
    try:
        from .serve.server import serve as run
        from .serve.settings import Settings
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"iceformer serve needs {error.name}: pip install 'iceformer[serve]'", name=error.name
        ) from error
    if cache_dir is not None:
        cache_dir.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        api_key=api_key,
        overflow=overflow.value,
        queue=queue,
        max_stall=max_stall,
        timeout=timeout,
        drain=drain,
        ping=ping,
        max_choices=max_choices,
        max_tokens=max_tokens,
        max_body=read_size(max_body, "--max-body"),
        cache_dir=cache_dir,
        cors_origins=tuple(cors_origin or ()),
    )

    def started(url: str) -> None:
        stdout.print(f"listening at {url} (OpenAI's API: {url}/v1)", soft_wrap=True)

    def ready(name: str) -> None:
        stdout.print(f"ready: {name}", soft_wrap=True)

    cache_bytes = read_size(cache_ram, "--cache-ram")
    run(paths, settings, host=host, port=port, cache_ram=cache_bytes, started=started, ready=ready)


def _served(given: list[str]) -> dict[str, Path]:
    """Artifacts by name, of folders and of NAME=FOLDER."""
    paths: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        named = bool(equals) and not Path(text).exists()
        path = Path(folder if named else text)
        name = name if named else path.resolve().name
        if not name or not path.name:
            raise ValueError(f"{text!r} is no artifact, expected a folder or NAME=FOLDER")
        if name in paths:
            raise ValueError(f"two artifacts have the name {name!r}: give one of them another, as NAME={text}")
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder: expected an artifact written by `iceformer compile`")
        paths[name] = path
    return paths
