"""README.md of an artifact: a card that tells people what the folder is and how to use it."""

from collections.abc import Sequence

from ..model.int4 import INT4_GROUP
from ..model.products import FEW_ROWS
from ..model.rounding import GROUP, TIED_GROUP
from .artifact import TOKENIZER
from .evidence import positions_of
from .generation_defaults import generation_rows
from .inputs import COUNTS
from .manifest import Manifest, QuantizationError
from .tables import (
    ATTENTION_OF,
    CROSSOVER_COLUMNS,
    EVIDENCE_COLUMNS,
    MEGABYTE,
    PRODUCT_COLUMNS,
    code_rows,
    crossovers,
    describe_plan,
    describe_rounding,
    describe_task,
    evidence_rows,
    product_call,
    product_rows,
    quantization_error_cells,
    text_rows,
)


def card_text(manifest: Manifest, name: str) -> str:
    """The card in Markdown; `name` is the artifact's folder."""
    model, environment = manifest.model, manifest.environment
    calibration = manifest.provenance.calibration
    fitted = f" Calibrated on {calibration.kind} ({calibration.tokens} tokens)." if calibration else ""
    python, command = _USE[model.kind](manifest, name)
    return f"""\
# {name}

A {model.model_type} model ({model.kind}, for {describe_task(model)}) of {model.parameters / 1e6:.2f} million parameters
({manifest.dtype}), compiled ahead of time by iceformer {manifest.iceformer} on {manifest.created} from the checkpoint
`{manifest.provenance.checkpoint}`.

**This folder holds machine code. Load it only if you trust the person who gave it to you.**

- Attention of {ATTENTION_OF[model.kind]}: see below.{fitted}
- Compiled for {environment.machine} with {", ".join(environment.cpu_features) or "unknown CPU features"}
  ({environment.cpu_model}), jax {environment.jax}, jaxlib {environment.jaxlib}, Python {environment.python}.
  Elsewhere the StableHLO in `portable/` is compiled on first use.
- Weights: {manifest.weights.file.size / MEGABYTE:.1f} MB, shared by all buckets. Rows per call: {manifest.batch}.

{_bucket_table(manifest)}
{_texts(manifest)}{_generation(manifest)}
## Attention

{_attention_text(manifest)}
{_contract_text(manifest)}{_weights_text(manifest)}{_cache_text(manifest)}
## Use

```python
import iceformer

session = iceformer.load("{name}")
{python}
```

```
iceformer inspect {name}
{command}
```

`manifest.json` describes every file; loading refuses a file whose sha256 differs.
"""


_NLL = {"decoder": " (nll: mean negative log-probability of the next token, in nats)", "encoder": ""}


def _use_of_decoder(manifest: Manifest, name: str) -> tuple[str, str]:
    """Lines of Python, and a command."""
    prompt, words = ('"Once upon a time"',) * 2 if _has_tokenizer(manifest) else ("[1, 2, 3]", '"1 2 3"')
    return (
        f"print(session.generate({prompt}, max_new_tokens=32))\n"
        "scores = session.score([1, 2, 3])  # scores.logprobs, scores.argmax",
        f"iceformer generate {name} {words} --max-new-tokens 32",
    )


def _use_of_encoder(manifest: Manifest, name: str) -> tuple[str, str]:
    """Lines of Python, and a command."""
    entry = manifest.buckets[0].entries["encode"]
    given = [argument for argument in entry.arguments if argument not in COUNTS]
    results = ", ".join(f"encoding.{result}" for result in entry.results)
    if "input_ids" not in given:
        arrays = ", ".join(f'"{argument}": array' for argument in given)
        shapes = " and ".join(f"{argument} {list(entry.arguments[argument].shape[1:])}" for argument in given)
        return (
            f"encoding = session.encode({{{arrays}}})  # {shapes}\nprint({results})",
            f"iceformer encode {name} --file arrays.npz",
        )
    row, words = ('"Once upon a time"',) * 2 if _has_tokenizer(manifest) else ("[1, 2, 3]", '"1 2 3"')
    return f"encoding = session.encode({row})\nprint({results})", f"iceformer encode {name} {words}"


_USE = {"decoder": _use_of_decoder, "encoder": _use_of_encoder}


def _generation(manifest: Manifest) -> str:
    rows = generation_rows(manifest.model.generation)
    lines = "".join(f"- {name}: {value}\n" for name, value in rows.items())
    return f"\n## Generation, as the checkpoint asks\n\n{lines}" if rows else ""


def _texts(manifest: Manifest) -> str:
    rows = text_rows(manifest)
    return "\n## Texts\n\n" + "".join(f"- {name}: {value}\n" for name, value in rows.items()) if rows else ""


def _has_tokenizer(manifest: Manifest) -> bool:
    return any(file.path == TOKENIZER for file in manifest.files)


def _attention_text(manifest: Manifest) -> str:
    text = _markdown_table(
        ("bucket (tokens)", "attention", "why"),
        [(str(bucket.capacity), describe_plan(bucket.plan), bucket.plan_reason) for bucket in manifest.buckets],
    )
    for _, call, rows in crossovers(manifest):
        text += f"\n\nMeasured at compile time: {call}:\n\n{_markdown_table(CROSSOVER_COLUMNS, rows)}"
    if manifest.products:
        table = _markdown_table(PRODUCT_COLUMNS, product_rows(manifest))
        text += f"\n\nProducts of bfloat16, measured at compile time: {product_call(manifest)}:\n\n{table}"
    return text


def _contract_text(manifest: Manifest) -> str:
    if manifest.contract is None:
        return ""
    asked, held_out = manifest.contract.asked, manifest.contract.held_out
    if asked.retain is not None:
        bound = f"at {asked.retain:g} of the positions or more, the most likely token is that of the reference"
    else:
        bound = f"the mean of KL(reference || configuration) is at most {asked.kl:g} nats"
    rows = evidence_rows(manifest)
    return f"""
## Retention contract

In every bucket, {bound}.
The reference is exact attention with weights, keys and values in {manifest.dtype}. The positions are those of
{positions_of(held_out.kind)}, in what nothing was calibrated on ({held_out.kind}, {held_out.tokens} tokens). The
contract is about prompts and scoring; new tokens attend exactly. Seconds are those that the layers took for one prompt;
KL and loss of log-probability are in nats.

{_markdown_table(EVIDENCE_COLUMNS, rows) if rows else "Every bucket has the reference itself."}
"""


_SCALES = {
    "int8": f" with a scale for every {GROUP} inputs of each output, {TIED_GROUP} where it is tied",
    "int4": f""" with a scale for every {INT4_GROUP} inputs of each output; the projections of values,
and what is outside of the layers, are int8""",
}


def _weights_text(manifest: Manifest) -> str:
    error = manifest.weights.error
    if error is None:
        return ""
    return f"""
## Weights

The kernels of linear layers, experts and convolutions, and an output layer tied to embeddings, are
{manifest.weights.format}{_SCALES.get(manifest.weights.format, "")}; activations are {_activations(manifest)}.
{_rounding(manifest)}{_cost(manifest, error)}"""


def _rounding(manifest: Manifest) -> str:
    weights = manifest.weights
    if weights.format != "int4":
        return ""
    if weights.rounding != "gptq":
        return "Weights are each rounded to its nearest: there was no text to round them for.\n"
    return f"Weights are {describe_rounding(weights)}; the loss is that of the tokens behind them.\n"


def _activations(manifest: Manifest) -> str:
    if manifest.activations == "same":
        return manifest.dtype
    return (
        f"{manifest.dtype}, and where experts, and linear layers but the output layer,\n"
        f"multiply more than {FEW_ROWS} rows,\n"
        f"{manifest.activations} with a scale for every {GROUP} numbers of a row"
    )


def _cache_text(manifest: Manifest) -> str:
    error = manifest.kv_error
    if error is None:
        return ""
    return f"""
## KV cache

Keys and values are {manifest.kv_dtype} with one scale for each token and head.
{_cost(manifest, error)}"""


def _cost(manifest: Manifest, error: QuantizationError) -> str:
    cells = quantization_error_cells(error)
    return f"""What quantisation cost, with exact attention{_NLL[manifest.model.kind]}:

{_markdown_table(tuple(cells), [tuple(cells.values())])}
"""


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def _bucket_table(manifest: Manifest) -> str:
    lines = [
        "| bucket (tokens) | entry | code (MB) | temporary memory (MB) | results (MB) | KV cache (MB) | compiled (s) |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [f"| {' | '.join(row)} |" for bucket in manifest.buckets for row in code_rows(bucket)]
    return "\n".join(lines)
