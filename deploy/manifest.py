"""manifest.json of an artifact as frozen dataclasses.

Everything a session knows about an artifact before it opens machine code stands here. No pydantic: it is not among what
running an artifact needs.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from ..host import strict_json
from .evidence import Contract, Evidence
from .generation_defaults import GenerationDefaults
from .records import read_record

SCHEMA = 12
TAIL = 128
"""Tokens of the calls that read a prompt's end, at most."""
TAIL_ENTRY = "prefill_tail"
CHECKED_ROWS = 4
"""Rows of a call that checks guessed tokens, at least: as many as the native kernels multiply with the weights in one
reading, each as if it were alone."""
_NEARLY_WHOLE = 7 / 8
"""Share of a chunk from which on one call for all of it takes less time than the many for its pieces."""
DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "uint8")
"""Of weights, caches, arguments and results."""
ENTRIES = {"decoder": ("prefill", "decode", "check", "score"), "encoder": ("encode",)}
"""The compiled functions that every bucket has, by the kind of model; `entry_names` has those of one bucket."""

SHA256 = re.compile(r"[0-9a-f]{64}")
"""A hash as hex."""


class ArtifactError(ValueError):
    """An artifact that cannot be used here; the message says what was found and what to do."""


@dataclass(frozen=True)
class FileInfo:
    """A file of the artifact: its path inside the folder (with `/`), size in bytes, and sha256 as hex."""

    path: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        path = PurePosixPath(self.path)
        if not self.path or path.is_absolute() or ".." in path.parts or "\\" in self.path:
            raise ArtifactError(f"manifest.json names the file {self.path!r}, which is not a path inside the artifact")
        if not SHA256.fullmatch(self.sha256):
            raise ArtifactError(
                f"manifest.json has sha256 {self.sha256[:80]!r} of {self.path!r}, expected 64 hex digits"
            )


@dataclass(frozen=True)
class ArrayInfo:
    """Shape and dtype of an argument or a result."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ArtifactError(f"manifest.json has dtype {self.dtype!r}, expected one of: {', '.join(DTYPES)}")

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    @property
    def size_in_bytes(self) -> int:
        """Memory of the array."""
        dtype = np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)
        return math.prod(self.shape) * dtype.itemsize


@dataclass(frozen=True)
class Environment:
    """What machine code depends on.

    Attributes:
        jax, jaxlib, python: versions; Python's is major.minor.
        machine: the architecture, e.g. "x86_64".
        cpu_model: the processor's name, for people.
        cpu_features: instruction sets that the machine code may use, as /proc/cpuinfo names them.
        xla_flags: the flags of XLA_FLAGS that change code, sorted.
        kernels: version of the native kernels that the machine code calls, "" if it calls none; of a host, the version
            that is built there.
    """

    jax: str
    jaxlib: str
    python: str
    machine: str
    cpu_model: str
    cpu_features: tuple[str, ...]
    xla_flags: tuple[str, ...]
    kernels: str


@dataclass(frozen=True)
class TextInfo:
    """How an encoder takes texts, as its source asks.

    Attributes:
        segments: whether token types mark the second text of a pair.
        max_seq_length: tokens at which a text is cut, special tokens included; None if none is.
        truncation_side: where a text that is too long loses tokens, "right" or "left".
        prompts: texts by name that may be put in front of a text.
        default_prompt_name: the one that is, if a caller names none.
        embedding: of a sentence embedder: what makes its embedding of the hidden states, step by step, for people.
        truncate_dim: numbers of an embedding that are kept; None for all.
        similarity_fn_name: by which embeddings are to be compared, for people.
        score_activation: that makes scores of a classifier's logits, for people; None for other models.
    """

    segments: bool
    max_seq_length: int | None
    truncation_side: str
    prompts: dict[str, str]
    default_prompt_name: str | None
    embedding: tuple[str, ...]
    truncate_dim: int | None
    similarity_fn_name: str | None
    score_activation: str | None

    def __post_init__(self) -> None:
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            raise ArtifactError(
                f"manifest.json has default_prompt_name {self.default_prompt_name!r}, which is not one of its prompts"
            )
        if self.truncation_side not in ("right", "left"):
            raise ArtifactError(
                f"manifest.json has truncation_side {self.truncation_side!r}, expected 'right' or 'left'"
            )


@dataclass(frozen=True)
class ModelInfo:
    """What a session needs to know of the model.

    Attributes:
        kind: "decoder" or "encoder".
        model_type: the architecture.
        task: what it is for.
        labels: names of the classes, in their order, of a model that classifies; empty for others.
        vocab_size: token ids are below it; None for a model that takes no tokens.
        max_tokens: that a row may have; None if there is no limit.
        fixed_tokens: that every row has, in a model of images or sound; None for others.
        parameters: how many.
        eos_token_ids: ids that end a text.
        generation: how its checkpoint wants texts generated; None for a model that writes none.
        config: the whole config.json.
        text: how it takes texts; None for a decoder, and for a model of images or sound.
    """

    kind: str
    model_type: str
    task: str
    labels: tuple[str, ...]
    vocab_size: int | None
    max_tokens: int | None
    fixed_tokens: int | None
    parameters: int
    eos_token_ids: tuple[int, ...]
    generation: GenerationDefaults | None
    config: dict[str, Any]
    text: TextInfo | None


@dataclass(frozen=True)
class QuantizationError:
    """What rounding weights, or keys and values, cost, with exact attention over a text.

    Attributes:
        text: what it is, as in `CalibrationInfo.kind`.
        tokens: how many of it were looked at.
        nll: of a decoder: mean negative log-probability of its next tokens (natural logarithm), before rounding.
        rounded_nll: the same after.
        greedy_agreement: share of the positions whose most likely next token stayed the same.
        cosine: of an encoder: mean cosine of the angle between a token's last hidden states before and after.
    """

    text: str
    tokens: int
    nll: float | None = None
    rounded_nll: float | None = None
    greedy_agreement: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class WeightsInfo:
    """The weights.

    Attributes:
        file: that holds them.
        tensors: that it holds, by name, in the order in which every entry takes them, which is that of their names.
        format: "int4", "int8" or "bfloat16" if the kernels of linear layers, experts and convolutions are rounded to
            it; "same" if they have the artifact's dtype.
        error: what rounding them cost, together with the activations; None if they are not rounded.
        group: inputs of a linear layer that share a scale, where they come in whole groups; None without scales.
        rounding: how: "nearest" or "gptq"; None if they are not rounded.
        fitted_tokens: first tokens of the calibration text that they were rounded for; the error is that of the tokens
            behind them. 0 if each weight is rounded by itself.
        unseen_experts: experts that got none of these tokens: their gate and up projections are rounded for all
            tokens, the weights of their down projections each to its nearest.
    """

    file: FileInfo
    tensors: dict[str, ArrayInfo]
    format: str
    error: QuantizationError | None
    group: int | None = None
    rounding: str | None = None
    fitted_tokens: int = 0
    unseen_experts: int = 0

    def __post_init__(self) -> None:
        if list(self.tensors) != sorted(self.tensors):
            raise ArtifactError("manifest.json has weights.tensors in another order than that of their names")


@dataclass(frozen=True)
class MemoryInfo:
    """Bytes that one call needs: its arguments, its results, and what it allocates in between."""

    argument_bytes: int
    output_bytes: int
    temp_bytes: int


@dataclass(frozen=True)
class EntryInfo:
    """One compiled function of a bucket.

    It takes the weights, the cache and then `arguments`, and gives the cache and then `results`, in the order written.
    An encoder's cache is empty. `attention` says how many of its layers' attentions are computed by what, and why.
    """

    native: FileInfo
    portable: FileInfo
    arguments: dict[str, ArrayInfo]
    results: dict[str, ArrayInfo]
    stablehlo_sha256: str
    custom_calls: tuple[str, ...]
    attention: dict[str, int]
    memory: MemoryInfo
    compile_seconds: float


@dataclass(frozen=True)
class CacheInfo:
    """A bucket's KV cache; no layers for an encoder.

    Attributes:
        layers: the arrays of each layer by name: `key` and `value`, their scales where they are int8, and what the
            attention keeps of the keys and of each slot.
        windows: of each layer, the tokens that it sees and keeps, each in the place of one that nobody sees any more;
            0 for a layer that keeps whole rows.
        page: tokens of a page, whose places a table gives; 0 where each slot is one page.
        state: names of the arrays that hold what is kept of each slot, [slots, ...]; all others hold tokens.
    """

    layers: tuple[dict[str, ArrayInfo], ...]
    windows: tuple[int, ...]
    page: int
    state: tuple[str, ...] = ()

    @property
    def size_in_bytes(self) -> int:
        """Memory of the whole cache."""
        return sum(array.size_in_bytes for layer in self.layers for array in layer.values())


def kv_arrays(dtype: str) -> dict[str, str]:
    """The arrays of a layer's cache that hold keys and values of that dtype, by name, and the dtype of each."""
    scales = {"key_scale": "float32", "value_scale": "float32"} if dtype == "int8" else {}
    return {"key": dtype, "value": dtype, **scales}


def tail_of(chunk: int) -> int:
    """Tokens of the calls that read a prompt's end: a divisor of the chunk, or a chunk that is small itself."""
    if chunk < 2 * TAIL:
        return chunk
    return next((size for size in range(TAIL, TAIL // 4, -1) if chunk % size == 0), chunk)


def entry_names(kind: str, chunk: int) -> tuple[str, ...]:
    """The compiled functions that a bucket has at least."""
    has_tail = kind == "decoder" and tail_of(chunk) < chunk
    return (*ENTRIES[kind], TAIL_ENTRY) if has_tail else ENTRIES[kind]


@dataclass(frozen=True)
class BucketInfo:
    """One capacity with its entries.

    Attributes:
        capacity: longest sequence, in tokens.
        chunk: tokens of a row that one call takes.
        plan: the attention of `prompt` (and scoring and encoding) and of `decode`, each with its `kind`.
        plan_reason: why it is that one, in a sentence.
        evidence: what was measured for the contract; empty without one, and where exact attention keeps everything.
        cache: its KV cache.
        entries: its compiled functions by name.
    """

    capacity: int
    chunk: int
    plan: dict[str, dict[str, Any]]
    plan_reason: str
    evidence: tuple[Evidence, ...]
    cache: CacheInfo
    entries: dict[str, EntryInfo]

    @property
    def tail(self) -> int:
        """Tokens of the calls that read a prompt's end, behind its whole chunks."""
        return tail_of(self.chunk)

    def piece_sizes(self, tokens: int) -> list[int]:
        """The calls that read a prompt of so many tokens, in their order, by the tokens that each takes.

        Nothing but the number of tokens decides on them: the same prompt always runs through the same calls.
        """
        whole, rest = divmod(tokens, self.chunk)
        if rest > self.chunk * _NEARLY_WHOLE:
            return [self.chunk] * (whole + 1)
        return [self.chunk] * whole + [self.tail] * -(-rest // self.tail)


@dataclass(frozen=True)
class CrossoverRow:
    """The time of one call with exact and with two-stage attention, or with a selection, on the machine that compiled.

    Attributes:
        keys: that a query block sees, on average over the blocks that select among them.
        exact_seconds: with exact attention, for some of the model's heads.
        two_stage_seconds: with two-stage attention, or with a selection, for as many.
    """

    keys: int
    exact_seconds: float
    two_stage_seconds: float

    @property
    def ratio(self) -> float:
        """Two-stage attention's time as a share of exact attention's."""
        return self.two_stage_seconds / self.exact_seconds


@dataclass(frozen=True)
class ProductRow:
    """The time of a product of bfloat16 with weights in bfloat16, on the machine that compiled.

    Attributes:
        in_features, out_features: of the weights.
        rows: that were multiplied.
        kernel_seconds: by the native kernel.
        xla_seconds: by XLA.
    """

    in_features: int
    out_features: int
    rows: int
    kernel_seconds: float
    xla_seconds: float

    @property
    def in_kernel(self) -> bool:
        """Whether the kernel computes it."""
        return self.kernel_seconds < self.xla_seconds


@dataclass(frozen=True)
class CalibrationInfo:
    """What the attention was calibrated on, or what a contract was judged on.

    Attributes:
        kind: "default text", "text", "task", "ids", "random ids" or "random inputs".
        tokens: how many.
        sha256: of the ids as int32, or of the random inputs as float32.
    """

    kind: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class ContractInfo:
    """A contract that every bucket fulfils.

    Attributes:
        asked: the contract.
        held_out: the text or task that it was judged on, of which the calibration saw nothing.
    """

    asked: Contract
    held_out: CalibrationInfo


@dataclass(frozen=True)
class Provenance:
    """The checkpoint's folder name, its iceformer.json (source and hashes), and what calibrated the attention."""

    checkpoint: str
    source: dict[str, Any]
    calibration: CalibrationInfo | None


@dataclass(frozen=True)
class Manifest:
    """Everything about an artifact except its weights and machine code.

    Attributes:
        schema: version of this format.
        iceformer: version of the package that wrote it.
        created: UTC time, ISO 8601.
        environment: where it was compiled.
        model: what was compiled.
        crossover: what was measured to choose each bucket's attention; empty where it was as asked.
        decode_crossover: the same of new tokens, for one of them in one layer.
        products: what was measured to choose who multiplies bfloat16 with the weights.
        contract: what each bucket keeps of exact attention; None if nothing was asked.
        dtype: of activations, and of the weights that are not rounded.
        activations: "int8" or "int16" if the layers with int8 weights round what they multiply to it, but for a few
            rows; "same" if not.
        kv_dtype: of keys and values in the cache: `dtype`, or "int8" with a scale for each token and head.
        kv_error: what rounding keys and values cost, beside the weights as they are; None if they are not rounded.
        batch: rows of every call of an encoder; of a decoder, slots: rows that its cache holds.
        weights: the weights file.
        buckets: by rising capacity.
        files: everything else in the folder (tokenizer, generation config, card).
        provenance: where it came from.
    """

    schema: int
    iceformer: str
    created: str
    environment: Environment
    model: ModelInfo
    crossover: tuple[CrossoverRow, ...]
    decode_crossover: tuple[CrossoverRow, ...]
    products: tuple[ProductRow, ...]
    contract: ContractInfo | None
    dtype: str
    activations: str
    kv_dtype: str
    kv_error: QuantizationError | None
    batch: int
    weights: WeightsInfo
    buckets: tuple[BucketInfo, ...]
    files: tuple[FileInfo, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        capacities = [bucket.capacity for bucket in self.buckets]
        if not capacities or capacities != sorted(set(capacities)):
            raise ArtifactError(f"manifest.json has buckets {capacities}, expected ascending capacities")
        if self.model.kind not in ENTRIES:
            raise ArtifactError(
                f"manifest.json has model.kind {self.model.kind!r}, expected one of: {', '.join(ENTRIES)}"
            )
        for bucket in self.buckets:
            expected = entry_names(self.model.kind, bucket.chunk)
            if not set(expected) <= bucket.entries.keys():
                raise ArtifactError(
                    f"manifest.json has entries {list(bucket.entries)} in bucket {bucket.capacity}, "
                    f"expected {list(expected)}"
                )
            if bucket.chunk < 1 or bucket.capacity % bucket.chunk:
                raise ArtifactError(
                    f"manifest.json has chunk {bucket.chunk} in bucket {bucket.capacity}, expected a divisor"
                )

    def all_files(self) -> list[FileInfo]:
        """Every file that the manifest vouches for."""
        entries = [entry for bucket in self.buckets for entry in bucket.entries.values()]
        code = [file for entry in entries for file in (entry.native, entry.portable)]
        return [self.weights.file, *self.files, *code]

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"


def parse_manifest(text: str | bytes) -> Manifest:
    """Reads manifest.json.

    Raises:
        ArtifactError: not JSON, another schema version, or a field that is missing, unknown or of the wrong type.
    """
    try:
        value = strict_json.parse(text, "manifest.json")
    except ValueError as error:
        raise ArtifactError(f"{error}: compile the artifact again") from None
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA:
        raise ArtifactError(
            f"manifest.json has schema {schema!r} and this iceformer reads schema {SCHEMA}: "
            "compile the artifact again with this version"
        )
    try:
        return read_record(Manifest, value, "manifest.json")
    except ValueError as error:
        raise ArtifactError(f"{error}: copy the artifact again or compile it again") from None
