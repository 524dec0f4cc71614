"""README.md of an artifact: a card that tells people what the folder is and how to use it."""

from collections.abc import Sequence

from .artifact import TOKENIZER
from .manifest import Manifest
from .tables import CROSSOVER_COLUMNS, MEGABYTE, WEIGHT_LOSS_COLUMNS, crossover_rows, describe, weight_loss_row


def card_text(manifest: Manifest, name: str) -> str:
    """The card in Markdown; `name` is the artifact's folder."""
    model, environment = manifest.model, manifest.environment
    calibration = manifest.provenance.calibration
    has_tokenizer = any(file.path == TOKENIZER for file in manifest.files)
    prompt = '"Once upon a time"' if has_tokenizer else "[1, 2, 3]"
    fitted = f" Calibrated on {calibration.kind} ({calibration.tokens} tokens)." if calibration else ""
    return f"""\
# {name}

A {model.model_type} model of {model.parameters / 1e6:.2f} million parameters ({manifest.dtype}), compiled ahead of time
by iceformer {manifest.iceformer} on {manifest.created} from the checkpoint `{manifest.provenance.checkpoint}`.

**This folder holds machine code. Load it only if you trust the person you have it from.**

- Attention for prompts and scoring: see below.{fitted} New tokens attend exactly.
- Compiled for {environment.machine} with {", ".join(environment.cpu_features) or "unknown CPU features"}
  ({environment.cpu_model}), jax {environment.jax}, jaxlib {environment.jaxlib}, Python {environment.python}.
  Elsewhere the StableHLO in `portable/` is compiled on first use.
- Weights: {manifest.weights.file.size / MEGABYTE:.1f} MB, shared by all buckets. Rows per call: {manifest.batch}.

{_bucket_table(manifest)}

## Attention

{_attention_text(manifest)}
{_weights_text(manifest)}
## Use

```python
import iceformer

session = iceformer.load("{name}")
print(session.generate({prompt}, max_new_tokens=32))
scores = session.score([1, 2, 3])  # scores.logprobs, scores.argmax
```

```
iceformer inspect {name}
iceformer generate {name} {prompt if has_tokenizer else '"1 2 3"'} --max-new-tokens 32
```

`manifest.json` describes every file; loading refuses a file whose sha256 differs.
"""


def _attention_text(manifest: Manifest) -> str:
    text = _markdown_table(
        ("bucket (tokens)", "attention", "why"),
        [(str(bucket.capacity), describe(bucket.attention), bucket.attention_reason) for bucket in manifest.buckets],
    )
    if not manifest.crossover:
        return text
    measured = _markdown_table(CROSSOVER_COLUMNS, crossover_rows(manifest))
    return f"{text}\n\nMeasured when this was compiled, one chunk of a prompt, some heads of one layer:\n\n{measured}"


def _weights_text(manifest: Manifest) -> str:
    loss = manifest.weights.loss
    if loss is None:
        return ""
    return f"""
## Weights

The kernels of linear layers are {manifest.weights.format} with a scale for each output channel; activations,
embeddings and an output layer tied to them are {manifest.dtype}. What rounding cost, with exact attention (nll: mean
negative log-probability of the next token, in nats):

{_markdown_table(WEIGHT_LOSS_COLUMNS, [weight_loss_row(loss)])}
"""


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def _bucket_table(manifest: Manifest) -> str:
    lines = [
        "| bucket (tokens) | entry | code (MB) | temporary memory (MB) | KV cache (MB) | compiled in (s) |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {bucket.capacity} | {name} | {entry.native.size / MEGABYTE:.2f} | {entry.memory.temp_bytes / MEGABYTE:.1f} "
        f"| {bucket.cache.size_in_bytes / MEGABYTE:.1f} | {entry.compile_seconds:.1f} |"
        for bucket in manifest.buckets
        for name, entry in bucket.entries.items()
    ]
    return "\n".join(lines)
