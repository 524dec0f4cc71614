"""What a manifest says of one thing in several places, and what a session takes for granted, checked in one place.

An entry's own shapes are compared with these where it is loaded (`executables`), the weights where they are mapped
(`weights`).
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from .encoding import OUTPUTS
from .generation_defaults import disagreements
from .manifest import (
    CHECKED_ROWS,
    TAIL_ENTRY,
    ArrayInfo,
    ArtifactError,
    BucketInfo,
    Manifest,
    ModelInfo,
    kv_arrays,
    tail_of,
)

_FLOATS = ("float32", "bfloat16", "float16")


def check_agreement(manifest: Manifest) -> None:
    """Raises ArtifactError, with what was found and expected, for values that do not fit together."""
    found = next(_disagreements(manifest), None)
    if found:
        raise ArtifactError(f"manifest.json {found}: copy the artifact again or compile it again")


def decoder_arguments(capacity: int, chunk: int, slots: int, page: int) -> dict[str, dict[str, ArrayInfo]]:
    """What each entry of a decoder takes after weights and cache; `page` is 0 where a slot is one page."""

    def integers(*shape: int) -> ArrayInfo:
        return ArrayInfo(shape, "int32")

    table = {"table": integers(slots, capacity // page)} if page else {}
    piece, tail = integers(1, chunk), tail_of(chunk)

    def tokens(rows: int) -> dict[str, ArrayInfo]:
        return {name: integers(rows) for name in ("tokens", "slot", "offset")}

    row = {"slot": integers(1), "offset": integers(1), "length": integers(1)}
    end = {TAIL_ENTRY: {"tokens": integers(1, tail), **row, **table}} if tail < chunk else {}
    return {
        "prefill": {"tokens": piece, **row, **table},
        **end,
        "decode": {**tokens(slots), **table},
        "check": {**tokens(max(slots, CHECKED_ROWS)), **table},
        "score": {"tokens": piece, "targets": piece, **row, **table},
    }


def _disagreements(manifest: Manifest) -> Iterator[str]:
    if manifest.batch < 1:
        yield "has batch 0, expected at least 1"
    if manifest.dtype not in _FLOATS:
        yield f"has dtype {manifest.dtype!r}, expected one of: {', '.join(_FLOATS)}"
    if manifest.kv_dtype not in (manifest.dtype, "int8"):
        yield f"has kv_dtype {manifest.kv_dtype!r}, expected int8 or its dtype, {manifest.dtype}"
    yield from _of_model(manifest.model)
    if any(row.exact_seconds <= 0 for row in (*manifest.crossover, *manifest.decode_crossover)):
        yield "has a measurement of no seconds in crossover"
    for bucket in manifest.buckets:
        where = f"in bucket {bucket.capacity}"
        yield from (f"{what} {where}" for what in (*_of_bucket(manifest, bucket), *_of_evidence(manifest, bucket)))
    if manifest.model.kind == "encoder":
        first = manifest.buckets[0].entries["encode"]
        for bucket in manifest.buckets[1:]:
            entry = bucket.entries["encode"]
            if list(entry.arguments) != list(first.arguments) or list(entry.results) != list(first.results):
                yield f"has other arguments or results in bucket {bucket.capacity} than in the first"


def _of_evidence(manifest: Manifest, bucket: BucketInfo) -> Iterator[str]:
    if not bucket.evidence:
        return
    if manifest.contract is None:
        yield "has evidence but no contract"
    if not all(_is_attention(each.attention) for each in bucket.evidence):
        yield "has evidence of what is no attention"
    chosen = [each for each in bucket.evidence if each.chosen]
    if len(chosen) != 1:
        yield f"has {len(chosen)} configurations that were chosen, expected one"
    elif not chosen[0].holds:
        yield "was compiled with a configuration that does not hold the contract"
    elif (chosen[0].attention, chosen[0].kv_dtype) != (bucket.plan.get("prompt"), manifest.kv_dtype):
        yield "was compiled with another configuration than the one that was chosen"


def _of_model(model: ModelInfo) -> Iterator[str]:
    if model.kind == "decoder" and not model.vocab_size:
        yield f"has model.vocab_size {model.vocab_size}, expected that of a decoder"
    types = model.config.get("type_vocab_size", 2)
    if types is not None and (type(types) is not int or types < 0):
        yield f"has type_vocab_size {types!r} in model.config, expected a number of token types"
    if (model.generation is None) != (model.kind != "decoder"):
        yield f"has generation {model.generation} in model.generation, expected it of decoders alone"
    if model.generation is not None:
        yield from disagreements(model.generation)


def _of_bucket(manifest: Manifest, bucket: BucketInfo) -> Iterator[str]:
    model = manifest.model
    if model.max_tokens is not None and bucket.capacity > model.max_tokens:
        yield f"has a model of at most {model.max_tokens} tokens"
    if model.fixed_tokens is not None and bucket.capacity != model.fixed_tokens:
        yield f"has a model of rows of {model.fixed_tokens} tokens"
    if list(bucket.plan) != ["prompt", "decode"] or not all(map(_is_attention, bucket.plan.values())):
        yield "has a plan that is not an attention for prompt and one for decode"
    yield from _of_decoder(manifest, bucket) if model.kind == "decoder" else _of_encoder(manifest, bucket)


def _is_attention(attention: Mapping[str, Any]) -> bool:
    """Whether it is one that can be shown."""
    if not isinstance(kind := attention.get("kind"), str) or not kind:
        return False
    method = attention.get("method", {"name": ""})
    return isinstance(method, dict) and isinstance(method.get("name"), str)


def _of_decoder(manifest: Manifest, bucket: BucketInfo) -> Iterator[str]:
    slots, vocabulary, page = manifest.batch, manifest.model.vocab_size, bucket.cache.page
    assert vocabulary is not None
    if page and (page & (page - 1) or bucket.capacity % page):
        yield f"has pages of {page} tokens, expected a power of two that divides the capacity"
        return
    for name, arguments in decoder_arguments(bucket.capacity, bucket.chunk, slots, page).items():
        if list(bucket.entries[name].arguments.items()) != list(arguments.items()):
            yield f"has {_shown(bucket.entries[name].arguments)} as arguments of {name}, expected {_shown(arguments)}"
    piece = (1, bucket.chunk)
    results = {
        **{name: {"logits": ((1, vocabulary), _FLOATS)} for name in ("prefill", TAIL_ENTRY) if name in bucket.entries},
        "decode": {"logits": ((slots, vocabulary), _FLOATS)},
        "check": {"logits": ((max(slots, CHECKED_ROWS), vocabulary), _FLOATS)},
        "score": {"logprobs": (piece, _FLOATS), "argmax": (piece, ("int32",))},
    }
    for name, expected in results.items():
        found = bucket.entries[name].results
        if list(found) != list(expected) or any(
            found[key].shape != shape or found[key].dtype not in dtypes for key, (shape, dtypes) in expected.items()
        ):
            shapes = ", ".join(f"{key} {list(shape)}" for key, (shape, _) in expected.items())
            yield f"has {_shown(found)} as results of {name}, expected {shapes}"
    if len(bucket.cache.windows) != len(bucket.cache.layers):
        yield f"has a cache of {len(bucket.cache.layers)} layers and {len(bucket.cache.windows)} windows"
    for layer, window in zip(bucket.cache.layers, bucket.cache.windows, strict=False):
        yield from _of_layer(manifest, bucket, layer, window)


def _of_layer(manifest: Manifest, bucket: BucketInfo, layer: Mapping[str, ArrayInfo], window: int) -> Iterator[str]:
    """Keys and values of all slots: of whole rows, of their pages, or of the last tokens only (a ring)."""
    slots, page = manifest.batch, bucket.cache.page
    keys, kinds = layer.get("key"), kv_arrays(manifest.kv_dtype)
    fit = keys is not None and all(
        name in layer and layer[name] == ArrayInfo(keys.shape if name in ("key", "value") else keys.shape[:3], dtype)
        for name, dtype in kinds.items()
    )
    if keys is None or not fit or len(keys.shape) != 4:
        yield f"has a layer of the cache without keys and values of one shape in {manifest.kv_dtype}, or their scales"
        return
    pages, heads, length, _ = keys.shape
    if window:
        fits = len(layer) == len(kinds) and (pages, length) == (slots, window) and window <= bucket.capacity
    elif page:
        fits = (pages, length) == (slots * bucket.capacity // page, page)
    else:
        fits = pages == slots and length >= bucket.capacity
    known = all(
        array.shape[:1] == (slots,)
        if name in bucket.cache.state
        else array.shape[:2] == (pages, heads) and len(array.shape) > 2 and array.shape[2] <= length
        for name, array in layer.items()
    )
    if not (known and fits) or any(0 in array.shape for array in layer.values()):
        yield f"has {_shown(layer)} as a layer of the cache, expected {slots} slots of {bucket.capacity} tokens"


def _of_encoder(manifest: Manifest, bucket: BucketInfo) -> Iterator[str]:
    model, batch = manifest.model, manifest.batch
    entry = bucket.entries["encode"]
    if bucket.cache.layers:
        yield "has a cache, but encoders have none"
    if bucket.chunk != bucket.capacity:
        yield f"has chunk {bucket.chunk}, expected whole rows"
    arguments = dict(entry.arguments)
    row = ArrayInfo((batch,), "int32")
    if arguments.pop("lengths", None) != row or arguments.pop("prompt_lengths", row) != row or not arguments:
        yield f"has {_shown(entry.arguments)} as arguments, expected the model's inputs and lengths of {batch} rows"
    if model.fixed_tokens is None:
        tokens = ArrayInfo((batch, bucket.capacity), "int32")
        if model.vocab_size is None or "input_ids" not in arguments or set(arguments.values()) != {tokens}:
            yield f"has {_shown(entry.arguments)} as arguments, expected input_ids and others of {tokens}"
    for name, array in entry.arguments.items():
        if array.shape[:1] != (batch,):
            yield f"has {array} as {name}, expected {batch} rows"
    for name, array in entry.results.items():
        of_tokens = len(array.shape) == 3 and array.shape[1] == bucket.capacity
        fits = array.shape[:1] == (batch,) and (len(array.shape) == 2 or of_tokens) and array.dtype in _FLOATS
        if name not in OUTPUTS or not fits or math.prod(array.shape) == 0:
            yield f"has {array} as {name}, expected {batch} rows of one of: {', '.join(OUTPUTS)}"
    if model.text is not None and model.text.embedding and "pooled" not in entry.results:
        yield f"has an embedding and {_shown(entry.results)} as results, expected pooled"
    logits = entry.results.get("logits")
    if not entry.results or (model.labels and (logits is None or logits.shape[-1] != len(model.labels))):
        yield f"has {len(model.labels)} labels and {_shown(entry.results)} as results"


def _shown(arrays: Mapping[str, ArrayInfo]) -> str:
    return ", ".join(f"{name} {array}" for name, array in arrays.items()) or "nothing"
