"""The `iceformer` command: each subcommand calls one public function and prints its result.

Results go to stdout, progress and errors to stderr. A known error is one red line and exit code 1; Ctrl-C is one word
and exit code 130.
"""

import errno
import io
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_args

import typer

from . import __version__
from .bench_serve_command import bench_serve
from .conversation import CHAT_TOKENS, Conversation, Written, system_messages, write_out
from .fields import add_options, takes_options
from .host import strict_json
from .host.environment import check_environment
from .host.files import check_absent, check_parent
from .host.interrupts import check as check_interrupt
from .host.interrupts import interruptible
from .host.messages import printable_message
from .host.terminal import Description, progress_bar, stderr, stdout
from .host.text import lines_of as split_lines
from .host.text import read_stdin, read_text
from .logit_bias import read_logit_bias
from .serve_command import serve
from .sizes import read_size

if TYPE_CHECKING:
    from rich.table import Table

    from .attention import Attention, Auto, DecodeSelection, Plan
    from .deploy.session import Progress, Session
    from .evaluate.configuration import Configuration

app = typer.Typer(
    help="Run long-context transformers on CPUs: convert a checkpoint, compile it ahead of time, run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class AttentionKind(StrEnum):
    """Attention of prompts and scoring."""

    AUTO = "auto"
    TWO_STAGE = "two_stage"
    EXACT = "exact"


class EvaluatedAttention(StrEnum):
    """Attention that is compared with exact attention, or exact attention with other number formats."""

    TWO_STAGE = "two_stage"
    EXACT = "exact"


class Dtype(StrEnum):
    """Number format of weights, activations and KV cache."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class WeightFormat(StrEnum):
    """Number format of the weights of linear layers, experts and convolutions."""

    SAME = "same"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT4 = "int4"


class ActivationFormat(StrEnum):
    """Number format of what linear layers and experts with int8 weights multiply."""

    SAME = "same"
    INT8 = "int8"
    INT16 = "int16"


class CacheFormat(StrEnum):
    """Number format of the KV cache."""

    SAME = "same"
    INT8 = "int8"


class ChosenCacheFormat(StrEnum):
    """Number format of the KV cache, or the choice of one by a contract."""

    SAME = "same"
    INT8 = "int8"
    AUTO = "auto"


class DecodeKind(StrEnum):
    """Attention of new tokens."""

    EXACT = "exact"
    SELECTION = "selection"
    AUTO = "auto"


_RANDOM_MODEL, _ATTENTION_ONLY, _RETENTION = "Random model", "Attention alone", "Retention"
_SAMPLING = "Sampling (where nothing is given, as the model's generation_config.json asks)"
_TASKS = "Tasks"
_TWO_STAGE, _DECODE, _CONTRACT = "Two-stage attention", "Decoding", "Retention contract (needs --calibration)"
ArtifactPath = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder written by `iceformer compile`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
SpecialTokens = Annotated[
    bool | None,
    typer.Option(
        "--special-tokens/--no-special-tokens",
        help="Add all of the tokenizer's special tokens to a text, or none.",
        show_default="those that the text does not have already",
    ),
]


PromptFile = Annotated[
    Path | None, typer.Option(help="Read the prompt from this UTF-8 file, without its final line end.")
]
System = Annotated[str | None, typer.Option(help="System message of the conversation.")]
CacheFolder = Annotated[
    Path | None, typer.Option(help="Folder written by `iceformer cache`, whose tokens are not read again.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Maximum number of new tokens.", show_default="the model's, or 64; chat 512")
]
MethodName = Annotated[
    str | None, typer.Option(help="How key blocks are ranked.", show_default="low_rank", rich_help_panel=_TWO_STAGE)
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="An option of the method, such as rank=8.", rich_help_panel=_TWO_STAGE),
]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text at which the answer ends; may be repeated.")]
Speculate = Annotated[
    bool | None,
    typer.Option(
        "--speculate/--no-speculate",
        help="Guess tokens where the text repeats what stands before, as long as that is faster; the text is the same.",
        show_default="speculate",
    ),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TOKEN:VALUE",
        help="Added to the logit of a token, given as its id or as a text that is one token; may be repeated.",
        rich_help_panel=_SAMPLING,
    ),
]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line (that of the process if `arguments` is None) and exits."""
    warnings.showwarning = _print_warning
    words = sys.argv if arguments is None else arguments
    if "compile" in words or "evaluate" in words:
        add_two_stage_options()
    if "generate" in words or "chat" in words:
        add_sampling_options()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks
    try:
        with interruptible(), _plain_interrupts():
            app(args=arguments, prog_name="iceformer")
    except KeyboardInterrupt:
        stderr.end_line()
        stderr.print("interrupted", style="red")
        raise SystemExit(130) from None
    except OSError as error:
        _fail(_described(error))
    except (ValueError, ModuleNotFoundError, MemoryError) as error:
        _fail(str(error) or type(error).__name__)


def add_two_stage_options() -> None:
    """The options of `compile` and `evaluate` that follow TwoStage, whose import takes a second."""
    from .attention.two_stage import TwoStage

    for command in (compile, evaluate):
        add_options(command, TwoStage, _TWO_STAGE, skip=("method", "crossover"))


def add_sampling_options() -> None:
    """The options of `generate` and `chat` that follow Sampling, whose import takes a moment."""
    from .deploy.sampling import Sampling

    for command in (generate, chat):
        add_options(command, Sampling, _SAMPLING, skip=("logit_bias",))


@contextmanager
def _plain_interrupts() -> Iterator[None]:
    """Ctrl-C as KeyboardInterrupt, which typer turns into an exit code; and one that got lost, although all went on."""
    try:
        yield
    except SystemExit as exit_:
        if exit_.code == 130:
            raise KeyboardInterrupt from None
        check_interrupt()
        raise


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"iceformer {__version__}")
        raise typer.Exit
    return wanted


@app.callback(help=app.info.help)
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before any subcommand."""
    check_environment()


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Hugging Face folder (config.json and weights), name of a model on the hub (organisation/name), or "
            "GGUF file.",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Checkpoint folder to write. It must not exist.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a LoRA adapter saved by PEFT, to merge into the weights.")
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Number format for the quantised tensors of a GGUF file. bfloat16 halves their size.",
            show_default="float32",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a model on the hub.", show_default="main")
    ] = None,
) -> None:
    """Convert a Hugging Face folder, a hub model or a GGUF file to a checkpoint (weights, config, tokenizer)."""
    from . import convert_checkpoint

    checkpoint = convert_checkpoint(source, target, adapter=adapter, dtype=dtype, revision=revision, progress=True)
    stdout.print(f"checkpoint: {checkpoint}", soft_wrap=True)


@app.command()
@takes_options
def compile(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder written by `iceformer convert`.")],
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder to write. It must not exist.")],
    buckets: Annotated[
        str | None,
        typer.Option(
            help="Sequence capacities in tokens, ascending, separated by commas.",
            show_default="4096,16384; encoders 128,512,4096,16384; up to the model's context",
        ),
    ] = None,
    attention: Annotated[
        AttentionKind,
        typer.Option(
            help="Attention for prompts, scoring and encoding. auto measures on this machine from which length "
            "two-stage attention is faster, and chooses for each bucket."
        ),
    ] = AttentionKind.AUTO,
    decode: Annotated[
        DecodeKind,
        typer.Option(
            help="Decoders: attention for new tokens. selection attends to the keys that a method ranks highest; auto, "
            "which needs --attention auto, measures from which length that is faster.",
            rich_help_panel=_DECODE,
        ),
    ] = DecodeKind.EXACT,
    decode_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="An option of the selection, such as budget=2048, mass=0.95 or method=sparq.",
            rich_help_panel=_DECODE,
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format of weights and KV cache.")] = Dtype.FLOAT32,
    weights: Annotated[
        WeightFormat,
        typer.Option(
            help="Number format of linear layers, experts and convolutions: same as --dtype, bfloat16, int8 with a "
            "scale for every 64 inputs of each output, or int4 with one for every 32, rounded for the calibration "
            "text. The loss of accuracy is measured and reported."
        ),
    ] = WeightFormat.SAME,
    activations: Annotated[
        ActivationFormat,
        typer.Option(
            help="With int8 weights: number format of prompts where layers multiply them, int8 or int16 with a "
            "scale for every 64 numbers, or same as --dtype. The loss of accuracy is measured and reported."
        ),
    ] = ActivationFormat.SAME,
    kv_dtype: Annotated[
        ChosenCacheFormat,
        typer.Option(
            help="Decoders: number format of the KV cache: same as --dtype, or int8 with one scale for each token and "
            "head. The loss of accuracy is measured and reported. auto: int8 if --retain or --kl then holds."
        ),
    ] = ChosenCacheFormat.SAME,
    batch: Annotated[
        int,
        typer.Option(help="Decoders: number of requests that run together. Encoders: rows per call."),
    ] = 1,
    page: Annotated[
        int | None,
        typer.Option(
            help="Decoders: tokens per page of the KV cache, a power of two, at least 128.",
            show_default="no pages",
        ),
    ] = None,
    chunk: Annotated[int, typer.Option(help="Decoders: prompt tokens per call. Must divide every bucket.")] = 2048,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text file for calibrating the method and measuring the error of rounded weights, keys and values. "
            "A contract is judged on what follows the first 4096 tokens; or on a task, a .jsonl file of questions with "
            "their contexts and answers.",
            show_default="a text that ships with iceformer",
        ),
    ] = None,
    retain: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Decoders: choose for each bucket the cheapest attention that keeps this share of exact attention's "
            "most likely tokens, such as 0.99, and fail if none does.",
            show_default="no contract",
            rich_help_panel=_CONTRACT,
        ),
    ] = None,
    kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="The same by the mean divergence from exact attention's predictions that is allowed, such as 0.01.",
            show_default="no contract",
            rich_help_panel=_CONTRACT,
        ),
    ] = None,
    method: MethodName = None,
    method_option: MethodOptions = None,
    **two_stage: Any,
) -> None:
    """Compile a checkpoint ahead of time into an artifact for this kind of CPU."""
    from . import compile as compile_checkpoint

    given = _two_stage_options(two_stage, method, method_option)
    path = compile_checkpoint(
        checkpoint,
        artifact,
        buckets=None if buckets is None else _integers(buckets, "--buckets"),
        attention=_plan(attention, given, decode, decode_option or []),
        dtype=dtype.value,
        weights=weights.value,
        activations=activations.value,
        kv_dtype=kv_dtype.value,
        batch=batch,
        chunk=chunk,
        page=page,
        calibration=calibration,
        retain=retain,
        kl=kl,
        progress=True,
    )
    stdout.print(f"artifact: {path}", soft_wrap=True)


@app.command()
@takes_options
def generate(
    artifact: ArtifactPath,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help="The prompt; - reads stdin. Token ids if there is no tokenizer."),
    ] = None,
    prompt_file: PromptFile = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message, which the model's chat template wraps.")
    ] = False,
    system: System = None,
    cache: CacheFolder = None,
    max_new_tokens: MaxNewTokens = None,
    stop: Stop = None,
    logit_bias: LogitBias = None,
    speculate: Speculate = None,
    special_tokens: SpecialTokens = None,
    **sampling: Any,
) -> None:
    """Continue a prompt. The new text goes to stdout as it is written."""
    from . import load

    text = _prompt_text(prompt, prompt_file)
    options = _writing_options(max_new_tokens, stop, speculate, sampling)
    with load(artifact, cache_ram=0) as session:
        options |= _logit_bias(session, logit_bias)
        if cache is not None:
            session.load_prefix(cache)
        start = time.perf_counter()
        with _progress("prompt") as progress:
            if chat or system is not None:
                messages = [*system_messages(system), {"role": "user", "content": text}]
                stream = session.chat(messages, stream=True, progress=progress, **options)
            else:
                stream = session.generate(
                    _ids(session, text), stream=True, add_special_tokens=special_tokens, progress=progress, **options
                )
            first = next(stream)
        until_first = time.perf_counter() - start
        _show_speed(write_out(stream, first, []), until_first)


@app.command()
@takes_options
def chat(
    artifact: ArtifactPath,
    file: Annotated[
        Path | None, typer.Option(help="A document to talk about: UTF-8, put before the first message.")
    ] = None,
    system: System = None,
    cache: CacheFolder = None,
    cache_ram: Annotated[
        str, typer.Option(help="Memory for what was read already, such as 500M or 2G; 0 for none.")
    ] = "1G",
    max_new_tokens: MaxNewTokens = None,
    stop: Stop = None,
    logit_bias: LogitBias = None,
    speculate: Speculate = None,
    **sampling: Any,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, /new begins again, /exit or Ctrl-D ends."""
    from . import load

    document = None if file is None else read_text(file)
    options = _writing_options(max_new_tokens or CHAT_TOKENS, stop, speculate, sampling)
    with load(artifact, cache_ram=read_size(cache_ram, "--cache-ram")) as session:
        options |= _logit_bias(session, logit_bias)
        if cache is not None:
            session.load_prefix(cache)
        Conversation(session, system, document, options, lambda: _progress("reading")).run()


@app.command()
def cache(
    artifact: ArtifactPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write. It must not exist.")],
    prompt_file: Annotated[Path, typer.Option(help="Document to prefill: UTF-8, read without its final line end.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="For `chat --file` and `generate --chat`: as the chat template begins it.")
    ] = False,
    system: System = None,
    room: Annotated[
        int, typer.Option(help="Tokens that will follow: questions and answers. They decide on the bucket.")
    ] = 1024,
    special_tokens: SpecialTokens = None,
) -> None:
    """Prefill a document once and keep the result on disk, for `generate --cache` and `chat --cache`."""
    from . import load

    check_absent(out)
    text = read_text(prompt_file)
    with load(artifact, cache_ram=0) as session, _progress("prompt") as progress:
        prompt = _ids(session, text)
        if chat or system is not None:
            messages = [*system_messages(system), {"role": "user", "content": text}]
            prompt, special_tokens = session.chat_prompt(messages), False
        tokens = session.save_prefix(prompt, out, room=room, add_special_tokens=special_tokens, progress=progress)
    stdout.print(f"cache: {out} ({tokens} tokens)", soft_wrap=True)


@app.command()
def score(
    artifact: ArtifactPath,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="UTF-8 text, read without its final line end, or token ids: .npy, .json, or numbers if there is no "
            "tokenizer.",
        ),
    ],
    special_tokens: SpecialTokens = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well the model predicts a text: mean log-probability, perplexity, greedy agreement."""
    import numpy as np

    from . import load

    session = load(artifact)
    ids = _read_ids(session, file, special_tokens)
    if len(ids) < 2:
        raise ValueError(f"{file} has {len(ids)} tokens, expected at least 2: the first one is only context")
    start = time.perf_counter()
    with _progress("score") as progress:
        result = session.score(ids, progress=progress)
    seconds = time.perf_counter() - start
    mean = float(np.mean(result.logprobs))
    figures = {
        "tokens": len(ids),
        "mean_logprob": mean,
        "perplexity": math.exp(-mean),
        "agreement": float(np.mean(result.argmax[:-1] == ids[1:])),
        "seconds": round(seconds, 3),
        "tier": session.tier,
    }
    if as_json:
        typer.echo(json.dumps(figures))
        return
    for name, value in figures.items():
        stdout.print(f"{name:>12}  {value:.4f}" if isinstance(value, float) else f"{name:>12}  {value}")


@app.command()
def encode(
    artifact: ArtifactPath,
    text: Annotated[
        str | None,
        typer.Argument(metavar="[TEXT]", help="The text; - reads stdin. Token ids if there is no tokenizer."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 file with one text per line (lines end at a line feed), or .npz with batches of arrays under "
            "the model's input names."
        ),
    ] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Each text is a pair of texts separated by a tab.")] = False,
    prompt: Annotated[
        str | None,
        typer.Option(help="Text to put before each text.", show_default="the model's default, if it has one"),
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Name of one of the model's prompts; `iceformer inspect` lists them.")
    ] = None,
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate/--no-truncate", help="Truncate longer texts at the model's max_seq_length, or refuse them."
        ),
    ] = True,
    truncate_dim: Annotated[
        int | None,
        typer.Option(
            help="Dimensions of a sentence embedding to keep.", show_default="what the model's files say, or all"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write to .npy (one vector per text) or .npz (all outputs by name) instead of printing vectors."
        ),
    ] = None,
    special_tokens: SpecialTokens = None,
    as_json: AsJson = False,
) -> None:
    """Encode texts, images or sound: sentence embeddings, classes, hidden states."""
    from . import load
    from .deploy.encoding_report import FORMATS, json_of, lines_of, outputs_for, write_encodings

    if (text is None) == (file is None):
        raise ValueError("give the text either as an argument (- for stdin) or with --file")
    if out is not None and out.suffix not in FORMATS:
        raise ValueError(f"--out is {out}, expected a file that ends in {' or '.join(FORMATS)}")
    if out is not None and as_json:
        raise ValueError("--json cannot be combined with --out")
    if out is not None:
        check_parent(out)
    session = load(artifact)
    texts, inputs = _encoder_inputs(session, text, file, pairs)
    outputs = outputs_for(session.info, out) if session.info.model.kind == "encoder" else None
    with _progress("encode") as progress:
        encodings = session.encode(
            inputs,
            prompt=prompt,
            prompt_name=prompt_name,
            truncate=truncate,
            truncate_dim=truncate_dim,
            outputs=outputs,
            add_special_tokens=special_tokens is not False,
            progress=progress,
        )
    if cut := sum(encoding.truncated for encoding in encodings):
        limit = session.info.model.text.max_seq_length if session.info.model.text else None
        stderr.print(f"{cut} of {len(encodings)} texts truncated at {limit} tokens", soft_wrap=True)
    if out is not None:
        write_encodings(out, encodings)
        stdout.print(f"{len(encodings)} encodings: {out}", soft_wrap=True)
        return
    if as_json:
        typer.echo(json.dumps({"encodings": [json_of(one, session.info) for one in encodings], "tier": session.tier}))
        return
    for line, encoding in zip(texts or [None] * len(encodings), encodings, strict=True):
        if line is not None and len(encodings) > 1:
            stdout.print(line, style="bold", soft_wrap=True)
        for found in lines_of(encoding, session.info, None if pairs else line):
            stdout.print(found, soft_wrap=True)
    if not session.info.model.labels:
        stdout.print("Use --out FILE.npy or --out FILE.npz to write all values.", style="dim")


@app.command()
def inspect(artifact: ArtifactPath, as_json: AsJson = False) -> None:
    """Check an artifact's files and show what it contains."""
    from .deploy.artifact import open_artifact
    from .deploy.tables import (
        attention_tables,
        code_table,
        file_table,
        product_tables,
        rounding_tables,
        summary_table,
    )

    opened = open_artifact(artifact)
    if as_json:
        typer.echo(json.dumps({**asdict(opened.manifest), "tier": opened.tier, "differences": opened.differences}))
        return
    info = opened.manifest
    for table in (
        summary_table(info),
        *attention_tables(info),
        *product_tables(info),
        *rounding_tables(info),
        code_table(info),
        file_table(info),
    ):
        stdout.print(table)
    if opened.differences:
        stdout.print(
            f"On this machine, its StableHLO would have to be compiled first: {'; '.join(opened.differences)}.",
            style="yellow",
        )
    else:
        stdout.print("All files are unchanged, and the machine code runs here.", style="green")


@app.command()
@takes_options
def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Folder written by `iceformer convert`, of a decoder.")
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for the results. The same command continues an interrupted evaluation.")
    ],
    text: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="UTF-8 text, or token ids as .npy or .json; may be repeated."),
    ],
    tokens: Annotated[int, typer.Option(help="Tokens of a window of text.")] = 8192,
    windows: Annotated[int, typer.Option(help="Number of windows, spread over the texts.")] = 4,
    blocks: Annotated[
        int,
        typer.Option(help="Query blocks at which attention itself is measured, in the first window of each text."),
    ] = 4,
    attention: Annotated[
        EvaluatedAttention,
        typer.Option(help="Attention to compare with exact attention; exact itself only in other number formats."),
    ] = EvaluatedAttention.TWO_STAGE,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=OPTIONS",
            help="One more configuration: the options above with changes, such as half=budget=512,local=16 or "
            "small=weights=int8,kv_dtype=int8 or mean=method=mean_pool; may be repeated.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Number format of weights, activations and KV cache, of exact attention too.")
    ] = Dtype.FLOAT32,
    weights: Annotated[WeightFormat, typer.Option(help="Number format of linear layers.")] = WeightFormat.SAME,
    activations: Annotated[
        ActivationFormat, typer.Option(help="Number format of what int8 weights are multiplied with.")
    ] = ActivationFormat.SAME,
    kv_dtype: Annotated[CacheFormat, typer.Option(help="Number format of the KV cache.")] = CacheFormat.SAME,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text file for calibrating the method.", show_default="a text that ships with iceformer"),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Separated by commas: passkey, needle, lines, key_value, repetition, and of RULER multi_key, "
            "multi_value, multi_query, variable_tracking, common_words, frequent_words; none to leave them out.",
            rich_help_panel=_TASKS,
        ),
    ] = "passkey,needle",
    task_lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a task's prompts, separated by commas.",
            show_default="half of --tokens, and all of them",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    depths: Annotated[int, typer.Option(help="Places in a context that are asked about.", rich_help_panel=_TASKS)] = 5,
    samples: Annotated[int, typer.Option(help="Contexts of each task and length.", rich_help_panel=_TASKS)] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the tasks.", rich_help_panel=_TASKS)] = 0,
    method: MethodName = None,
    method_option: MethodOptions = None,
    **two_stage: Any,
) -> None:
    """Measure what two-stage attention keeps of a model's accuracy on your text, beside its speed.

    The results are OUTPUT/evaluation.json, OUTPUT/evaluation.html and the page's plots as PNG.
    """
    from . import evaluate_checkpoint
    from .evaluate.bench import Options
    from .evaluate.evaluation_report import check_plots, notes, summary_table, write_report

    check_plots()

    given = {
        "attention": attention.value,
        "weights": weights.value,
        "activations": activations.value,
        "kv_dtype": kv_dtype.value,
        **_two_stage_options(two_stage, method, method_option),
    }
    configurations = _configurations(given, compare or [])
    options = Options(
        tokens=tokens,
        windows=windows,
        dtype=dtype.value,
        blocks=blocks,
        tasks=() if tasks == "none" else tuple(tasks.replace(",", " ").split()),
        lengths=_integers(task_lengths, "--task-lengths") if task_lengths else (),
        depths=depths,
        samples=samples,
        seed=seed,
    )
    with _steps() as report:
        result = evaluate_checkpoint(
            checkpoint, output, text, configurations, options=options, calibration=calibration, report=report
        )
    page = write_report(result, output)
    stdout.print(summary_table(result))
    for line in notes(result):
        stdout.print(line, soft_wrap=True)
    stdout.print(f"result: {output / 'evaluation.json'}, page: {page}", soft_wrap=True)


@app.command()
def benchmark(
    work: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Folder for model, artifacts and results. An interrupted run continues."),
    ],
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face folder.", show_default="random weights of the shape below")
    ] = None,
    hidden: Annotated[int, typer.Option(help="Hidden size of the random model.", rich_help_panel=_RANDOM_MODEL)] = 768,
    layers: Annotated[int, typer.Option(help="Number of layers.", rich_help_panel=_RANDOM_MODEL)] = 4,
    heads: Annotated[
        int, typer.Option(help="Number of query heads, also with --attention-only.", rich_help_panel=_RANDOM_MODEL)
    ] = 12,
    kv_heads: Annotated[
        int,
        typer.Option(help="Number of key and value heads, also with --attention-only.", rich_help_panel=_RANDOM_MODEL),
    ] = 12,
    mlp: Annotated[int, typer.Option(help="Intermediate size of the MLP.", rich_help_panel=_RANDOM_MODEL)] = 2048,
    vocab: Annotated[int, typer.Option(help="Vocabulary size.", rich_help_panel=_RANDOM_MODEL)] = 32000,
    attention_only: Annotated[
        bool,
        typer.Option(
            "--attention-only",
            help="Time attention alone, on random queries, keys and values.",
            rich_help_panel=_ATTENTION_ONLY,
        ),
    ] = False,
    bidirectional: Annotated[
        bool,
        typer.Option(
            "--bidirectional",
            help="With --attention-only: every query sees every key.",
            rich_help_panel=_ATTENTION_ONLY,
        ),
    ] = False,
    head_dim: Annotated[
        int | None,
        typer.Option(help="With --attention-only: head width.", show_default="64", rich_help_panel=_ATTENTION_ONLY),
    ] = None,
    decode: Annotated[
        bool,
        typer.Option("--decode", help="Time new tokens after prompts of --lengths tokens.", rich_help_panel=_DECODE),
    ] = False,
    batch: Annotated[
        int | None,
        typer.Option(help="Requests that decode together.", show_default="1", rich_help_panel=_DECODE),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            help="New tokens of each request in a run, at least 3.", show_default="32", rich_help_panel=_DECODE
        ),
    ] = None,
    weights: Annotated[
        WeightFormat | None,
        typer.Option(
            help="Number format of linear layers in our engines.", show_default="same", rich_help_panel=_DECODE
        ),
    ] = None,
    kv_dtype: Annotated[
        CacheFormat | None,
        typer.Option(
            help="Number format of the KV cache in our engines.", show_default="same", rich_help_panel=_DECODE
        ),
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(help="The same model as a GGUF file, for openvino_genai and llama_cpp.", rich_help_panel=_DECODE),
    ] = None,
    openvino_python: Annotated[
        str | None,
        typer.Option(
            metavar="PYTHON",
            help="Python interpreter that has openvino-genai.",
            show_default="this one",
            rich_help_panel=_DECODE,
        ),
    ] = None,
    llama_bench: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="llama.cpp's llama-bench.",
            show_default="llama-bench on PATH",
            rich_help_panel=_DECODE,
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens, separated by commas; the depths of --decode.")
    ] = "4096,16384",
    engines: Annotated[
        str | None,
        typer.Option(
            help="Separated by commas: two_stage, exact, floor (attention left out), sdpa, eager, openvino, "
            "onnxruntime. With --attention-only: two_stage, exact, sdpa, eager. With --decode: two_stage, exact, "
            "selection, sdpa, openvino_genai, openvino_genai_xattention, llama_cpp.",
            show_default="two_stage,exact,floor,sdpa; exact,selection,sdpa with --decode",
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format of every engine.")] = Dtype.FLOAT32,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="KEYS or LEAST:MOST",
            help="Number of keys that a query attends to with two-stage attention or a selection; with two-stage "
            "attention also the least and the most, by mass.",
            show_default="1024; 512:32768 for prompts with --model",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed runs per engine and length, at least 3.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Threads of every engine.", show_default="all cores")] = None,
    retention: Annotated[
        bool | None,
        typer.Option(
            "--retention/--no-retention",
            help="Measure the retention of the timed attention on the demo model. Takes minutes, once per folder.",
            show_default="yes; no with --attention-only or --decode",
            rich_help_panel=_RETENTION,
        ),
    ] = None,
    retention_records: Annotated[
        int, typer.Option(help="Number of records of each kind.", rich_help_panel=_RETENTION)
    ] = 2,
    retention_tokens: Annotated[
        int, typer.Option(help="Approximate number of tokens per record.", rich_help_panel=_RETENTION)
    ] = 16384,
) -> None:
    """Compare the speed of prefill, of attention alone, or of decoding, with other engines.

    All engines get the same weights, input and threads, and take turns in one run. The results are
    FOLDER/benchmark.json and FOLDER/benchmark.png. If a run is interrupted, the same command continues it.
    """
    from . import TwoStage
    from .attention.shape import AttentionShape
    from .evaluate.attention_benchmark import run_attention_benchmark
    from .evaluate.benchmark import run_benchmark
    from .evaluate.benchmark_report import benchmark_table, plot, summary
    from .evaluate.decode_benchmark import DecodeOptions, Peers, run_decode_benchmark
    from .evaluate.decode_report import decode_plot, decode_summary, decode_table
    from .evaluate.shapes import ModelShape

    formats = {"weights": weights, "kv_dtype": kv_dtype, "batch": batch, "new_tokens": new_tokens}
    places = {"gguf": gguf, "openvino_python": openvino_python, "llama_bench": llama_bench}
    given = {name: value for name, value in (formats | places).items() if value is not None}
    if given and not decode:
        raise ValueError(f"--{min(given).replace('_', '-')} needs --decode")
    if decode and attention_only:
        raise ValueError("--decode cannot be combined with --attention-only: choose one")
    if decode and retention:
        raise ValueError("--retention cannot be combined with --decode, which measures speed only")
    if not attention_only and (bidirectional or head_dim):
        raise ValueError(f"--{'bidirectional' if bidirectional else 'head-dim'} needs --attention-only")
    if attention_only and model:
        raise ValueError(
            "--model cannot be combined with --attention-only, which takes --heads, --kv-heads and --head-dim"
        )
    options: dict[str, Any] = {
        "lengths": _integers(lengths, "--lengths"),
        "dtype": dtype.value,
        "rounds": rounds,
        "threads": threads,
    }
    if engines:
        options["engines"] = engines.replace(",", " ").split()
    shape = ModelShape(hidden, layers, heads, kv_heads, mlp, vocab)
    if decode:
        keys = {} if budget is None else {"budget": _one_budget(budget)}
        chosen = DecodeOptions(**keys, **{name: given[name] for name in formats if name in given})
        peers = Peers(**{name: given[name] for name in places if name in given})
        with _steps() as report:
            result = run_decode_benchmark(
                work, model=model, shape=shape, options=chosen, peers=peers, report=report, **options
            )
        decode_plot(result, work / "benchmark.png")
        _print_benchmark(work, decode_table(result), decode_summary(result))
        return
    # Random weights look everywhere: by mass they would need nearly every key.
    by_default = TwoStage() if model else TwoStage(budget=1024)
    options |= {
        "attention": by_default if budget is None else TwoStage(budget=_budget("--budget", budget)),
        "retention": not attention_only if retention is None else retention,
        "retention_records": retention_records,
        "retention_tokens": retention_tokens,
    }
    with _steps() as report:
        if attention_only:
            attention_shape = AttentionShape(heads, kv_heads, head_dim or 64, causal=not bidirectional)
            result = run_attention_benchmark(work, shape=attention_shape, report=report, **options)
        else:
            result = run_benchmark(work, model=model, shape=shape, report=report, **options)
    plot(result, work / "benchmark.png")
    _print_benchmark(work, benchmark_table(result), summary(result))


app.command()(serve)
app.command()(bench_serve)


def _print_benchmark(work: Path, table: "Table", lines: list[str]) -> None:
    stdout.print(table)
    for line in lines:
        stdout.print(line, soft_wrap=True)
    stdout.print(f"result: {work / 'benchmark.json'}, plot: {work / 'benchmark.png'}", soft_wrap=True)


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt of an argument, of stdin or of a file."""
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give the prompt either as an argument (- for stdin) or with --prompt-file")
    if prompt_file is not None:
        return read_text(prompt_file)
    return read_stdin() if prompt == "-" else str(prompt)


def _writing_options(
    max_new_tokens: int | None, stop: list[str] | None, speculate: bool | None, sampling: dict[str, Any]
) -> dict[str, Any]:
    """What a session takes, of the options that were given."""
    given = {"max_new_tokens": max_new_tokens, "stop": stop or None, "speculate": speculate, **sampling}
    return {name: value for name, value in given.items() if value is not None}


def _logit_bias(session: "Session", given: list[str] | None) -> dict[str, Any]:
    """The same of --logit-bias, for which a session must know the tokens."""
    return {"logit_bias": read_logit_bias(session, given)} if given else {}


def _show_speed(written: Written, until_first: float) -> None:
    """How long it took, on a terminal."""
    if stderr.is_terminal:
        generation = written.generation
        kept = f", {generation.cached_tokens} of them from the cache" if generation.cached_tokens else ""
        rate = f", {written.tokens_per_second:.1f} tokens/s" if written.tokens_per_second else ""
        right = f", {generation.guessed_tokens} of {generation.proposed_tokens} guesses right"
        guesses = right if generation.proposed_tokens else ""
        stderr.print(
            f"prompt: {generation.prompt_tokens} tokens{kept}, first token after {until_first:.1f} s; "
            f"answer: {len(generation.ids)} tokens{rate}{guesses}",
            style="dim",
            soft_wrap=True,
        )


def _ids(session: "Session", text: str) -> Any:
    """The text itself for a model with tokenizer, else the token ids written in it."""
    return text if session.has_tokenizer else _integers(text, "the text (the model has no tokenizer)")


def _encoder_inputs(
    session: "Session", text: str | None, file: Path | None, pairs: bool
) -> tuple[list[str] | None, Any]:
    """The texts to encode, None if they are arrays, and what the session takes: a list, or a dict of arrays."""
    import numpy as np

    if file is not None and file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            return None, dict(arrays)
    if file is not None:
        texts = split_lines(read_text(file))
    else:
        texts = split_lines(read_stdin()) if text == "-" else [str(text)]
    if not texts:
        raise ValueError(f"{file or 'stdin'} has no lines, expected one text per line")
    if not pairs:
        return texts, [_ids(session, line) for line in texts]
    split = [tuple(line.split("\t")) for line in texts]
    wrong = next((index for index, pair in enumerate(split) if len(pair) != 2), None)
    if wrong is not None:
        raise ValueError(
            f"text {wrong} has {len(split[wrong]) - 1} tabs, but --pairs expects two texts separated by one tab"
        )
    return texts, split


def _read_ids(session: "Session", file: Path, special_tokens: bool | None) -> Any:
    """Token ids from a file: .npy, .json, or a text for the model's tokenizer."""
    import numpy as np

    if file.suffix == ".npy":
        return np.load(file, allow_pickle=False)
    text = read_text(file)
    if file.suffix == ".json":
        return strict_json.parse(text, str(file))
    if not session.has_tokenizer:
        return np.asarray(_integers(text, str(file)))
    return session.tokenize(text, add_special_tokens=special_tokens)


def _integers(text: str, what: str) -> tuple[int, ...]:
    """Integers between commas or blanks."""
    try:
        return tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"{what} is {text[:40]!r}, expected integers separated by commas or spaces") from None


def _two_stage_options(
    two_stage: dict[str, Any], method: str | None, method_option: list[str] | None
) -> dict[str, Any]:
    """The options of two-stage attention that were given."""
    from .attention.methods import make_method

    if method_option and not method:
        raise ValueError("--method-option needs --method: name the method that the option belongs to")
    given = {name: value for name, value in two_stage.items() if value is not None}
    if "budget" in given:
        given["budget"] = _budget("--budget", given["budget"])
    return given | (
        {"method": make_method(method, **_assigned("--method-option", method_option or []))} if method else {}
    )


def _budget(option: str, value: Any) -> int | tuple[int, int]:
    """A number of keys, or the least and the most, given as LEAST:MOST."""
    if isinstance(value, tuple):
        return value
    numbers = str(value).split(":")
    if len(numbers) > 2 or not all(number.strip().isdecimal() for number in numbers):
        raise ValueError(f"{option} is {value!r}, expected a number of keys, or LEAST:MOST")
    least, most = int(numbers[0]), int(numbers[-1])
    return least if len(numbers) == 1 else (least, most)


def _one_budget(value: str) -> int:
    """A number of keys alone."""
    keys = _budget("--budget", value)
    if isinstance(keys, tuple):
        raise ValueError(f"--budget is {value!r}, but new tokens attend to a fixed number of keys: give one number")
    return keys


_FORMATS = ("weights", "activations", "kv_dtype")


def _configurations(given: dict[str, Any], compare: list[str]) -> dict[str, "Configuration"]:
    """What `evaluate` compares with exact attention: the options of the command, and those with changes.

    Exact attention is compared in other number formats only, for in the model's own it is the reference itself.
    """
    asked = {"two_stage" if given["attention"] == EvaluatedAttention.TWO_STAGE else "rounded": given}
    for text in compare:
        name, _, changes = text.partition("=")
        if not name or "=" not in changes or name in asked:
            raise ValueError(f"--compare is {text!r}, expected a new NAME=OPTION=VALUE, more options behind commas")
        assigned = _assigned("--compare", changes.split(","))
        exact = assigned.get("attention") == EvaluatedAttention.EXACT
        kept = {key: value for key, value in given.items() if not exact or key in _FORMATS}
        asked[name] = kept | assigned
    reference = {"attention": "exact", **dict.fromkeys(_FORMATS, "same")}
    return {name: _configuration(name, options) for name, options in asked.items() if options != reference}


def _configuration(name: str, options: dict[str, Any]) -> "Configuration":
    """A configuration from options by name; those of the method have its name before a dot."""
    from . import Auto, TwoStage
    from .attention.methods import make_method
    from .evaluate.configuration import Configuration

    option = f"--compare {name}"
    formats = {key: options[key] for key in _FORMATS}
    method = {key.removeprefix("method."): value for key, value in options.items() if key.startswith("method.")}
    if method and not isinstance(options.get("method"), str):
        raise ValueError(f"{option} has method.{min(method)}, but no method=NAME: name the method that it belongs to")
    own = {key: value for key, value in options.items() if key not in ("attention", *formats, "method")}
    budget = {"budget": _budget(f"{option}: budget", own.pop("budget"))} if "budget" in own else {}
    given = _checked(option, TwoStage, {key: value for key, value in own.items() if not key.startswith("method.")})
    given |= budget
    if "method" in options:
        named = options["method"]
        given["method"] = make_method(named, **method) if isinstance(named, str) else named
    if options["attention"] not in list(EvaluatedAttention):
        raise ValueError(
            f"{option}: attention is {options['attention']!r}, expected one of: {', '.join(EvaluatedAttention)}"
        )
    attention = _attention(AttentionKind(options["attention"]), given)
    assert not isinstance(attention, Auto)
    return Configuration(attention, **formats)


def _attention(kind: AttentionKind, two_stage: dict[str, Any]) -> "Attention | Auto":
    """What `compile` takes as attention, `two_stage` being the options that were given."""
    from . import Auto, Exact, TwoStage

    if kind is AttentionKind.EXACT:
        if two_stage:
            raise ValueError(
                f"--{min(two_stage).replace('_', '-')} is for --attention auto or two_stage, not for exact"
            )
        return Exact()
    asked = TwoStage(**two_stage)
    return Auto(asked) if kind is AttentionKind.AUTO else asked


def _plan(
    kind: AttentionKind, two_stage: dict[str, Any], decode: DecodeKind, options: list[str]
) -> "Attention | Plan | Auto":
    """What `compile` takes as attention, for prompts and for new tokens."""
    from . import Auto, Plan

    prompt = _attention(kind, two_stage)
    if decode is DecodeKind.EXACT:
        if options:
            raise ValueError("--decode-option needs --decode selection or --decode auto, for exact has no options")
        return prompt
    selection = _selection(options)
    if isinstance(prompt, Auto):
        if decode is DecodeKind.SELECTION:  # from its budget on: nothing is measured
            selection = replace(selection, crossover=selection.exact_keys)
        return Auto(prompt.two_stage, selection)
    if decode is DecodeKind.AUTO:
        raise ValueError(f"--decode auto needs --attention auto, found --attention {kind.value}: measure both or none")
    return Plan(prompt, selection)


_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a name"}


def _selection(options: list[str]) -> "DecodeSelection":
    """The selection that options given as NAME=VALUE describe."""
    from . import DecodeSelection

    return DecodeSelection(**_checked("--decode-option", DecodeSelection, _assigned("--decode-option", options)))


def _checked(option: str, settings: type, given: dict[str, Any]) -> dict[str, Any]:
    """Values given by name for the fields of a dataclass, of the types that these have."""
    kinds = {field.name: field.type for field in fields(settings)}
    checked = dict(given)
    for name, value in given.items():
        if name not in kinds:
            raise ValueError(f"{option} is {name}, expected one of: {', '.join(kinds)}")
        allowed = get_args(kinds[name]) or (kinds[name],)
        if float in allowed and type(value) is int:
            checked[name] = float(value)
        elif type(value) not in allowed:
            expected = " or ".join(_KINDS[kind] for kind in allowed if kind in _KINDS)
            raise ValueError(f"{option} {name} is {value!r}, expected {expected}")
    return checked


def _assigned(option: str, assignments: list[str]) -> dict[str, Any]:
    """NAME=VALUE as a dictionary; values are numbers, true, false, or names."""
    pairs = [text.partition("=") for text in assignments]
    if not all(name and value for name, _, value in pairs):
        raise ValueError(f"{option} is {assignments}, expected NAME=VALUE")
    return {name: _value(value) for name, _, value in pairs}


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


@contextmanager
def _progress(what: str) -> "Iterator[Progress]":
    """A progress bar on stderr, if that is a terminal, as the callback that a session takes."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (Description(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with progress_bar(*columns, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            check_interrupt()
            bar.update(task, completed=done, total=total)

        yield update


@contextmanager
def _steps() -> Iterator[Callable[[str], None]]:
    """Shows on stderr the step that begins: a live line with its time on a terminal, else a plain line."""
    from rich.progress import SpinnerColumn, TimeElapsedColumn

    start = time.perf_counter()
    columns = (SpinnerColumn(), TimeElapsedColumn(), Description())
    with progress_bar(*columns, transient=True, disable=not stderr.is_terminal) as live:

        def report(step: str) -> None:
            check_interrupt()
            if not stderr.is_terminal:
                stderr.print(f"{time.perf_counter() - start:7.0f} s  {step}", soft_wrap=True)
                return
            for task in live.tasks:
                took = f"{task.elapsed or 0:7.1f} s  {task.description}"
                live.console.print(took, soft_wrap=True)
                live.remove_task(task.id)
            live.add_task(step, total=None)

        yield report


def _print_warning(message: Warning | str, *_: Any) -> None:
    stderr.print(f"warning: {printable_message(str(message))}", style="yellow", soft_wrap=True)


def _fail(message: str) -> NoReturn:
    stderr.print(f"error: {printable_message(message)}", style="red", soft_wrap=True)
    raise SystemExit(1)


def _described(error: OSError) -> str:
    """The path first, where the system says which; and what to do where it is known."""
    if error.errno is None or error.strerror is None:
        return str(error)
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{place}{error.strerror}{_REMEDIES.get(error.errno, '')}"


_REMEDIES = {
    errno.EACCES: "; check its owner and mode, and those of the folders above it",
    errno.EPERM: "; check its owner and mode, and those of the folders above it",
    errno.EROFS: "; choose a path on another file system",
    errno.ENOSPC: "; free some space or choose a path on another file system",
    errno.EDQUOT: "; free some space or choose a path on another file system",
    errno.EISDIR: "; expected a file",
    errno.ENOTDIR: "; expected a folder",
}


if __name__ == "__main__":
    main()
