"""`compile` lowers a checkpoint's model ahead of time for fixed sequence buckets and writes the artifact.

A checkpoint folder, bucket capacities and an attention configuration come in; a folder with machine code, portable
StableHLO, weights and a manifest goes out, whole or not at all.
"""

import dataclasses
import datetime
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from .. import __version__, kernels
from ..attention import Attention, Auto, Exact, Plan
from ..attention.keys import LEAST_PAGE
from ..attention.shape import AttentionShape
from ..convert.auxiliary_files import CHAT_TEMPLATES
from ..convert.checkpoint import CONFIG, PROVENANCE, load_model
from ..convert.generation_config import eos_token_ids, generation_settings
from ..convert.json_file import read_json
from ..convert.text import read_text_settings
from ..host.files import check_absent, new_folder
from ..model.activations import LEVELS
from ..model.decoder import CausalLM, DecoderConfig
from ..model.encoder import CLASSIFYING, read_labels
from ..model.moe import separate_experts
from ..model.products import in_kernel
from ..model.registry import Model, ModelConfig, build
from ..model.rounding import FORMATS, GROUPS
from ..model.self_attention import LayerConstants
from . import artifact as layout
from .calibrated_rounding import GPTQ, round_model, rounding_text
from .calibration import MAX_TOKENS, calibrate, calibration_inputs
from .card import card_text
from .contract import Subject, Terms, fulfil
from .cpu import features_up_to
from .crossover import Choice, TimedCall, decide, needs_measurement
from .decode_crossover import decide_decode, needs_decode_measurement
from .entries import entries_class
from .evidence import Contract
from .generation_defaults import GenerationDefaults, read_defaults
from .held_out import held_out_prompts
from .lowering import compile_bucket
from .manifest import (
    SCHEMA,
    BucketInfo,
    CalibrationInfo,
    ContractInfo,
    Environment,
    FileInfo,
    Manifest,
    ModelInfo,
    Provenance,
    TextInfo,
    WeightsInfo,
    entry_names,
)
from .product_choice import kernel_shapes, measure_products
from .quantization_error import kv_quantization_error, quantization_error
from .steps import progress_of
from .weights import cpu_device, described, write_weights

DTYPES = ("float32", "bfloat16")
WEIGHTS = ("same", *FORMATS)
ACTIVATIONS = tuple(LEVELS)
KV_DTYPES = ("same", "int8")
AUTO = "auto"
"""The KV format that a contract chooses."""
BUCKETS = {"decoder": (4096, 16384), "encoder": (128, 512, 4096, 16384)}
"""The buckets of each kind of model, if none are asked for. An encoder's row takes as long as its whole bucket does."""
_TIMED_QUERIES = 2048
"""Of an encoder whose tokens see only those before them, when attention is timed at a length."""


def compile(
    checkpoint: str | Path,
    artifact: str | Path,
    *,
    buckets: Sequence[int] | None = None,
    attention: Attention | Plan | Auto | None = None,
    dtype: str = "float32",
    weights: str = "same",
    activations: str = "same",
    kv_dtype: str = "same",
    batch: int = 1,
    chunk: int = 2048,
    page: int | None = None,
    calibration: str | Path | ArrayLike | None = None,
    retain: float | None = None,
    kl: float | None = None,
    progress: bool = False,
) -> Path:
    """Compiles a checkpoint for this machine's kind of CPU and writes the artifact.

    Args:
        checkpoint: a folder written by `iceformer.convert_checkpoint`.
        artifact: the folder to write, which must not exist.
        buckets: ascending sequence capacities in tokens; a row runs in the smallest one that holds it. None means 4096
            and 16384 for decoders, and 128, 512, 4096 and 16384 for encoders, up to the model's context. Models of
            images and sound have one bucket, for the input that they take.
        attention: for prompts, scoring and encoding. `TwoStage(...)` and `Exact()` apply to every bucket. `Auto(...)`
            measures from how many keys two-stage attention is faster on this machine, and chooses for each bucket.
            None means `Auto()`. New tokens attend exactly, unless `Plan(prompt, decode)` or `Auto(decode=...)` says
            otherwise.
        dtype: "float32" or "bfloat16", for weights, activations and KV cache.
        weights: "same" as dtype; "bfloat16": the kernels of linear layers, experts, convolutions and patch embeddings,
            and an output layer tied to embeddings, are rounded to it, activations are not; "int8": these are quantised
            to int8 with a scale for every 64 inputs of each output (32 of a tied output layer), but for the projections
            of values, which are bfloat16; an output layer tied to embeddings is rounded with them; "int4": the layers'
            kernels, experts included, are quantised to int4 with a scale for every 32 inputs of each output, but for
            the projections of values, which are int8 as everything outside of the layers is. int4 is rounded for the
            inputs that each layer and each expert gets of the calibration text, by GPTQ; without a text (no tokenizer,
            images or sound), each weight to its nearest, which manifest and card say, as they say how many experts got
            no token. A book rounds better than the few pages of the default text. The loss of accuracy is measured on
            the calibration text, with int4 on its last quarter (1024 tokens at most), which the rounding has not seen,
            and recorded in the manifest and the card.
        activations: with int8 weights, what more than 4 rows, as prompts have, are rounded to before linear layers and
            experts multiply them, in integers: "int8" or "int16", with a scale for every 64 numbers of a row. "same"
            multiplies them in dtype. An output layer, convolutions and patch embeddings always take them as they are.
            The loss of accuracy is measured and recorded together with that of the weights.
        kv_dtype: of a decoder's KV cache: "same" as dtype, or "int8" with one scale for each token and head, which is
            read four times as fast as float32. The loss of accuracy is measured and recorded like that of int8 weights.
            "auto", with a contract: int8 if every bucket then fulfils it, else "same".
        batch: for an encoder, rows per call; for a decoder, how many requests have a place in its KV cache and run
            together.
        chunk: prompt tokens per call; must divide every bucket (a smaller bucket is one chunk). An encoder takes whole
            rows.
        page: tokens per page of the KV cache, a power of two of at least 128 that divides every bucket: the pages of a
            request then lie anywhere in the cache. None keeps each request in one piece, which is a little faster.
        calibration: for calibrating the attention method, if it needs that, for rounding weights to int4, and for
            measuring the error of rounded weights, keys and values: a text file, token ids, or None for the text that
            ships with the package (seeded random ids for a model without a tokenizer, random numbers for images or
            sound). At most 4096 tokens are used, 16384 for rounding to int4. A contract is judged on what follows
            them, which must be as long as the longest bucket at least. Or a task, a .jsonl file of examples with
            `context`, `question`, `answer_prefix` and `answer`: its first context calibrates, and a contract is judged
            on the answers to questions over the others.
        retain: the contract that every bucket keeps at least this share of the most likely tokens. With `attention`
            left to `compile`, each bucket gets the first of these that does on held-out text, if it is faster than
            exact attention: the fixed budget of `Auto`, if it has one, then masses from 0.95 to 0.995. What counts are
            the positions in the last quarter of up to two windows as long as the bucket, or the tokens of the answers
            of up to 16 examples of a task, and the token that is most likely there with exact attention, floating-point
            weights, keys and values (both in `dtype`). `weights` and `kv_dtype` are judged together with the attention.
            New tokens attend exactly.
        kl: instead of `retain`, the largest mean divergence KL(exact || configuration) at these positions, in nats.
        progress: show a progress bar, and print a table at the end.

    Returns:
        The artifact's path.

    Raises:
        FileNotFoundError: the checkpoint does not exist or is incomplete.
        FileExistsError: the artifact exists.
        PermissionError, NotADirectoryError: the artifact cannot be created there.
        ValueError: options that do not fit together, a contract that nothing fulfils, or code that another process
            could not load.
    """
    checkpoint, target = Path(checkpoint), Path(artifact)
    asked = Auto() if attention is None else Plan(attention) if isinstance(attention, Attention) else attention
    check_absent(target)
    raw_config = _read_config(checkpoint)
    _, config = build(raw_config)
    ends = _eos_token_ids(checkpoint, raw_config, config)
    contract = _contract(retain, kl, kv_dtype, asked, config)
    cheapest = "int8" if kv_dtype == AUTO else kv_dtype
    check_options(config, buckets=buckets, dtype=dtype, weights=weights, kv_dtype=cheapest, batch=batch, chunk=chunk)
    check_activations(activations, weights)
    buckets = default_buckets(config, chunk) if buckets is None else buckets
    _check_page(page, config, buckets)
    kept = dtype if cheapest == "same" else cheapest
    timed = _timed_call(config, dtype, batch, chunk, kept)
    _check_decode(asked, config)
    measures = needs_measurement(asked, buckets, timed) + needs_decode_measurement(asked, buckets, timed)
    rounds = weights not in ("same", dtype)
    weights = weights if rounds else "same"
    terms = None
    if contract is not None:
        assert isinstance(asked, Auto)
        assert isinstance(config, DecoderConfig)
        tokenizer, most = checkpoint / layout.TOKENIZER, config.max_tokens or MAX_TOKENS
        may_select = [capacity for capacity in buckets if needs_measurement(asked, (capacity,), timed)]
        judged = tuple(buckets) if rounds or kept != dtype else tuple(may_select)
        kv_dtypes = (kept, dtype) if kv_dtype == AUTO else (kept,)
        prompts, held_out = held_out_prompts(calibration, tokenizer, config.vocab_size, most, judged, weights)
        terms = Terms(contract, asked.two_stage, kv_dtypes, prompts, held_out)
    readings = 0 if terms is None else terms.most_readings
    entry_count = sum(len(entry_names(config.kind, min(chunk, capacity))) for capacity in buckets)
    layers = config.num_hidden_layers if weights == "int4" else 1
    steps = 2 + (dtype == "bfloat16") + rounds * layers + (kept == "int8") + measures + readings + entry_count

    # The folder first, so that one that cannot be written is known before the work.
    with (
        new_folder(target) as folder,
        jax.default_device(cpu_device()),
        progress_of(steps, progress) as report,
    ):
        report("loading the checkpoint")
        model = floats = load_model(checkpoint, dtype=dtype)
        info = _model_info(checkpoint, raw_config, config, ends, model)
        error = kv_error = rounding = None
        unseen = 0
        if rounds:
            rounding = rounding_text(model, weights, calibration, checkpoint / layout.TOKENIZER)
            if rounding.method != GPTQ:
                report.drop(layers - 1)
            rounded = round_model(model, weights, rounding, report, activations)
            model, unseen = rounded.model, rounded.unseen_experts
            error = quantization_error(floats, model, rounding.judged, rounding.first)
        else:
            separate_experts(model)
        choices, measured = decide(asked, buckets, timed, report)
        choices, measured_decode = decide_decode(choices, asked, buckets, timed, report)
        report("calibrating the attention")
        constants, calibrated_on = _calibrate(model, choices, checkpoint, calibration, buckets[-1])
        if terms is not None:
            assert isinstance(floats, CausalLM)
            assert isinstance(model, CausalLM)
            subject = Subject(floats, model, weights, constants, dtype, chunk)
            kept, choices = fulfil(terms, subject, buckets, choices, report)
            del subject
            if not _calibrated(choices):
                constants = calibrated_on = None
        del floats
        if kept == "int8":
            report("measuring the error of int8 keys and values")
            kv_error = kv_quantization_error(
                model, calibration_inputs(model, calibration, checkpoint / layout.TOKENIZER)
            )
        elif kv_dtype == AUTO:
            report.drop(1)
        entries = entries_class(model).of(model, constants)
        arrays = {name: np.asarray(array) for name, array in zip(entries.names, entries.weights, strict=True)}
        products = ()
        if dtype == "bfloat16":
            report("measuring the products of bfloat16")
            products = measure_products(model)
        with in_kernel(kernel_shapes(products)):
            compiled = tuple(
                compile_bucket(
                    folder,
                    entries,
                    capacity=capacity,
                    chunk=min(chunk, capacity) if config.kind == "decoder" else capacity,
                    batch=batch,
                    page=page or 0,
                    choice=choice,
                    kv_dtype=kept,
                    report=report,
                )
                for capacity, choice in zip(buckets, choices, strict=True)
            )
        manifest = Manifest(
            schema=SCHEMA,
            iceformer=__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            environment=_compile_environment(compiled),
            model=info,
            crossover=measured,
            decode_crossover=measured_decode,
            products=products,
            contract=None if terms is None else ContractInfo(terms.contract, terms.held_out),
            dtype=dtype,
            activations=activations,
            kv_dtype=kept,
            kv_error=kv_error,
            batch=batch,
            weights=WeightsInfo(
                write_weights(folder / layout.WEIGHTS, arrays),
                described(arrays),
                weights,
                error,
                GROUPS.get(weights),
                None if rounding is None else rounding.method,
                0 if rounding is None else rounding.fitted_tokens,
                unseen,
            ),
            buckets=compiled,
            files=_copy_files(checkpoint, folder),
            provenance=Provenance(checkpoint.resolve().name, read_json(checkpoint / PROVENANCE), calibrated_on),
        )
        card = layout.write_file(folder, layout.CARD, card_text(manifest, target.name).encode())
        manifest = dataclasses.replace(manifest, files=(*manifest.files, card))
        layout.write_manifest(folder, manifest)
    if progress:
        _print_tables(manifest)
    return target


def default_buckets(config: ModelConfig, chunk: int) -> tuple[int, ...]:
    """The buckets of a model if none are asked for, all of which it can have."""
    if config.fixed_tokens is not None:
        return (config.fixed_tokens,)
    limit = config.max_tokens
    capped = {capacity if limit is None else min(capacity, limit) for capacity in BUCKETS[config.kind]}
    if config.kind == "decoder":
        capped = {capacity - (capacity % chunk if capacity > chunk else 0) for capacity in capped}
    return tuple(sorted(capped))


def check_options(
    config: ModelConfig,
    *,
    buckets: Sequence[int] | None,
    dtype: str,
    weights: str,
    kv_dtype: str,
    batch: int,
    chunk: int,
) -> None:
    """Raises ValueError, with what was found and expected, for options that cannot be compiled."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of: {', '.join(DTYPES)}")
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}, expected one of: {', '.join(WEIGHTS)}")
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype is {kv_dtype!r}, expected one of: {', '.join(KV_DTYPES)}")
    if kv_dtype != "same" and config.kind != "decoder":
        raise ValueError(f"kv_dtype is {kv_dtype!r}, but an encoder has no KV cache: leave it out")
    if batch < 1 or chunk < 1:
        raise ValueError(f"batch is {batch} and chunk is {chunk}, expected at least 1 each")
    if buckets is None:
        return
    if config.fixed_tokens is not None and tuple(buckets) != (config.fixed_tokens,):
        raise ValueError(
            f"buckets are {tuple(buckets)}, but every row of this model has {config.fixed_tokens} tokens: "
            "leave buckets out"
        )
    if not buckets or min(buckets) < 1 or any(low >= high for low, high in itertools.pairwise(buckets)):
        raise ValueError(f"buckets are {tuple(buckets)}, expected ascending numbers of tokens without duplicates")
    for capacity in buckets:
        if config.kind == "decoder" and capacity % min(chunk, capacity):
            raise ValueError(f"bucket {capacity} is not a multiple of chunk {chunk}: change one of them")
    limit = config.max_tokens
    if limit is not None and buckets[-1] > limit:
        raise ValueError(
            f"bucket {buckets[-1]} is longer than the {limit} positions that the model was trained for "
            f"({CONFIG}): choose buckets up to {limit}"
        )


def check_activations(activations: str, weights: str) -> None:
    """Raises ValueError for activations that cannot be rounded so beside these weights."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations is {activations!r}, expected one of: {', '.join(ACTIVATIONS)}")
    if activations != "same" and weights != "int8":
        raise ValueError(
            f"activations is {activations!r} and weights is {weights!r}, but only int8 weights are multiplied with "
            'rounded activations: give weights="int8", or leave activations out'
        )


def _check_page(page: int | None, config: ModelConfig, buckets: Sequence[int]) -> None:
    if page is None:
        return
    if config.kind != "decoder":
        raise ValueError(f"page is {page}, but an encoder has no KV cache: leave it out")
    if page < LEAST_PAGE or page & (page - 1) or any(capacity % page for capacity in buckets):
        raise ValueError(
            f"page is {page} and the buckets are {tuple(buckets)}, expected a power of two of at least {LEAST_PAGE} "
            "that divides every bucket"
        )


def _check_decode(asked: Plan | Auto, config: ModelConfig) -> None:
    if config.kind != "decoder" and asked.decode not in (None, Exact()):
        raise ValueError(f"decode is {asked.decode}, but an encoder writes no tokens: leave it out")


def _contract(
    retain: float | None, kl: float | None, kv_dtype: str, asked: Plan | Auto, config: ModelConfig
) -> Contract | None:
    """The contract that is asked for, if one is: there must be something to choose, and it can be judged."""
    if retain is None and kl is None:
        if kv_dtype == AUTO:
            raise ValueError(f"kv_dtype is {AUTO!r}, which a contract chooses: give retain or kl, or another kv_dtype")
        return None
    contract = Contract(retain, kl)
    if config.kind != "decoder":
        raise ValueError(f"{contract} is about predictions of the next token, and an encoder makes none: leave it out")
    if not isinstance(asked, Auto):
        raise ValueError(f"attention is {asked}, which leaves {contract} no choice: leave it out, or give Auto(...)")
    if asked.decode is not None:
        raise ValueError(
            f"decode is {asked.decode}, and {contract} is judged on prompts, not on new tokens: leave decode out"
        )
    return contract


def _read_config(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's config.json, after a look whether the folder is a checkpoint at all."""
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is not a folder: expected a checkpoint written by `iceformer convert`")
    missing = [name for name in (CONFIG, PROVENANCE) if not (checkpoint / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{checkpoint} lacks {', '.join(missing)}: expected a checkpoint; "
            f"`iceformer convert {checkpoint} CHECKPOINT` makes one from a Hugging Face folder"
        )
    return read_json(checkpoint / CONFIG)


def _calibrate(
    model: Model, choices: Sequence[Choice], checkpoint: Path, source: str | Path | ArrayLike | None, longest: int
) -> tuple[LayerConstants | None, CalibrationInfo | None]:
    """The constants that the buckets' plans need of each layer, for rows of up to `longest` tokens, and what they come
    from; None and None if none does."""
    strategies = _calibrated(choices)
    if not strategies:
        return None, None
    row = calibration_inputs(model, source, checkpoint / layout.TOKENIZER)
    return calibrate(model, strategies, row.inputs, row.tokens, longest=longest), row.info


def _calibrated(choices: Sequence[Choice]) -> set[Attention]:
    """The strategies of the buckets' plans that need constants."""
    return {strategy for choice in choices for strategy in choice.plan.strategies if strategy.calibrated}


def _timed_call(config: ModelConfig, dtype: str, batch: int, chunk: int, kv_dtype: str) -> TimedCall:
    shape = AttentionShape(config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.causal)
    return TimedCall(
        shape,
        dtype,
        batch,
        chunk if config.kind == "decoder" else _TIMED_QUERIES,
        only_exact=_only_exact(config),
        kv_dtype=kv_dtype,
    )


def _only_exact(config: ModelConfig) -> str:
    if None not in config.windows:
        return "every layer has a sliding window"
    return "two-stage attention would rank keys without the relative position bias" if config.relative_bias else ""


def _compile_environment(buckets: Sequence[BucketInfo]) -> Environment:
    """This host's environment, with the CPU features that XLA was allowed to use and the kernels that are called."""
    host = layout.host_environment()
    flag = re.search(r"--xla_cpu_max_isa=(\w+)", layout.xla_flags_text())
    features = features_up_to(frozenset(host.cpu_features), flag[1] if flag else None)
    called = {call for bucket in buckets for entry in bucket.entries.values() for call in entry.custom_calls}
    return dataclasses.replace(
        host, cpu_features=tuple(sorted(features)), kernels=host.kernels if called & kernels.TARGETS else ""
    )


def _eos_token_ids(checkpoint: Path, raw_config: dict[str, Any], config: ModelConfig) -> tuple[int, ...]:
    """Ids that end a text that the model writes."""
    if not isinstance(config, DecoderConfig) or config.kind != "decoder":
        return ()
    return eos_token_ids(checkpoint, raw_config, config.vocab_size)


def _model_info(
    checkpoint: Path, raw_config: dict[str, Any], config: ModelConfig, ends: tuple[int, ...], model: Model
) -> ModelInfo:
    return ModelInfo(
        kind=config.kind,
        model_type=config.model_type,
        task=config.task,
        labels=read_labels(raw_config) if config.task in CLASSIFYING else (),
        vocab_size=getattr(config, "vocab_size", None),
        max_tokens=config.max_tokens,
        fixed_tokens=config.fixed_tokens,
        parameters=sum(array.size for array in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))),
        eos_token_ids=ends,
        generation=_generation(checkpoint, raw_config, config),
        config=_finite(raw_config),
        text=_text_info(checkpoint),
    )


def _generation(checkpoint: Path, raw_config: dict[str, Any], config: ModelConfig) -> GenerationDefaults | None:
    if config.kind != "decoder":
        return None
    _, settings = generation_settings(checkpoint, raw_config)
    return read_defaults(_finite(settings))


def _text_info(checkpoint: Path) -> TextInfo | None:
    settings = read_text_settings(checkpoint)
    if settings is None:
        return None
    described = () if settings.embedding is None else settings.embedding.describe()
    return TextInfo(**{**vars(settings), "embedding": described})


def _finite(value: Any) -> Any:
    """JSON with the names of NaN and the infinities, which JSON does not have, in their places."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _copy_files(checkpoint: Path, folder: Path) -> tuple[FileInfo, ...]:
    """Copies the tokenizer, templates of chats and the generation config where the checkpoint has them."""
    tokenizer = (layout.TOKENIZER, layout.TOKENIZER_CONFIG, layout.SPECIAL_TOKENS_MAP)
    patterns = (*tokenizer, *CHAT_TEMPLATES, layout.GENERATION_CONFIG)
    files = [file for pattern in patterns for file in sorted(checkpoint.glob(pattern))]
    return tuple(layout.write_file(folder, str(file.relative_to(checkpoint)), file.read_bytes()) for file in files)


def _print_tables(manifest: Manifest) -> None:
    from ..host.terminal import stdout
    from .tables import attention_tables, code_table, product_tables, rounding_tables

    for table in (
        *attention_tables(manifest),
        *product_tables(manifest),
        *rounding_tables(manifest),
        code_table(manifest),
    ):
        stdout.print(table)
