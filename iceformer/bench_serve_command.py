"""The command `iceformer bench-serve`: a load on a server, as a table and as JSON."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .host.files import check_absent
from .host.terminal import stdout

_ROWS = {
    "first_token_seconds": "first token, s",
    "per_token_seconds": "each later token, s",
    "gap_seconds": "between two chunks of text, s",
    "request_seconds": "whole answer, s",
}


def bench_serve(
    url: Annotated[str, typer.Argument(help="Of an OpenAI-compatible server, such as http://127.0.0.1:8000.")],
    model: Annotated[str | None, typer.Option(help="Name of the model.", show_default="the only one")] = None,
    rate: Annotated[float, typer.Option(help="Requests a second, on average; they come as a Poisson process.")] = 0.5,
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 40,
    words: Annotated[
        str,
        typer.Option(help="Words of the prompts, each length equally often. Words are invented: several tokens each."),
    ] = "50,400,2000",
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of each answer.")] = 32,
    first_limit: Annotated[float, typer.Option(help="Seconds to the first token of a good answer.")] = 10.0,
    token_limit: Annotated[float, typer.Option(help="Seconds for each later token of a good answer.")] = 0.2,
    timeout: Annotated[float, typer.Option(help="Seconds without a byte until a request is given up.")] = 600.0,
    seed: Annotated[int, typer.Option(min=0, help="Of times, lengths and words.")] = 0,
    api_key: Annotated[
        str | None, typer.Option(envvar="ICEFORMER_API_KEY", help="Of the server.", show_default="none")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file to write, with every answer's times.", show_default="none")
    ] = None,
) -> None:
    """Measure how a server bears requests that come whether or not it is ready for them."""
    from .evaluate.serve_load import Load, measure_serving

    if output is not None:
        check_absent(output)
    try:
        lengths = tuple(int(each) for each in words.split(","))
    except ValueError:
        raise ValueError(f"--words is {words!r}, expected numbers separated by commas") from None
    load = Load(
        rate=rate,
        requests=requests,
        words=lengths,
        max_tokens=max_tokens,
        seed=seed,
        timeout=timeout,
        first_limit=first_limit,
        token_limit=token_limit,
    )
    with stdout.status("asking") as status:
        result = measure_serving(
            url, load, model=model, api_key=api_key, done=lambda count: status.update(f"{count} of {requests} answered")
        )
    _show(result.summary(), load)
    if output is not None:
        output.write_text(json.dumps(result.to_json(), indent=1) + "\n")
        stdout.print(f"result: {output}", soft_wrap=True)


def _show(summary: dict[str, Any], load: Any) -> None:
    from rich.table import Table

    table = Table("", "p50", "p95", "p99", "max")
    for name, text in _ROWS.items():
        found = summary[name]
        if found is not None:
            table.add_row(text, *(f"{found[key]:.3f}" for key in ("p50", "p95", "p99", "max")))
    for words, found in summary["first_token_seconds_by_words"].items():
        if found is not None:
            row = (f"{found[key]:.3f}" for key in ("p50", "p95", "p99", "max"))
            table.add_row(f"first token, {words} words, s", *row)
    stdout.print(table)
    stdout.print(
        f"{summary['answered']} of {summary['requests']} answered, {summary['good']} within {load.first_limit:g} s to "
        f"the first token and {load.token_limit:g} s for each later one: {summary['goodput_per_second']:.3f} a second",
        soft_wrap=True,
    )
    stdout.print(
        f"{summary['prompt_tokens_per_second']:.1f} tokens/s of prompts, {summary['tokens_per_second']:.1f} tokens/s "
        "written",
        soft_wrap=True,
    )
    for error, count in summary["errors"].items():
        stdout.print(f"{count} ended with: {error}", soft_wrap=True)
