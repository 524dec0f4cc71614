"""Measures what decoding keeps of a model: given tokens of a text go through `decode` one by one, after a prompt.

The first artifact is the reference, compiled to attend exactly, in float32. Of every artifact: the mean log-probability
of the given tokens, how far it is below the reference's, the share of positions where the most likely token is the
reference's, the mean Kullback-Leibler divergence from the reference, and milliseconds a token. Prints a table and,
last, a JSON list.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import iceformer
from iceformer.deploy.artifact import open_artifact
from iceformer.deploy.runner import Runner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+", help="decoders with a tokenizer; the first is the reference")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text that is long enough")
    parser.add_argument("--skip", type=int, default=0, help="tokens of the text before the prompt")
    parser.add_argument("--context", type=int, default=7000, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens that are given after it")
    arguments = parser.parse_args()
    with iceformer.load(arguments.artifacts[0]) as session:
        ids = np.asarray(session.tokenize(arguments.text.read_text()), np.int32)
    end = arguments.skip + arguments.context + arguments.tokens
    if len(ids) < end:
        parser.error(f"{arguments.text} has {len(ids)} tokens, expected at least {end}")
    ids = ids[arguments.skip : end]
    reference: np.ndarray | None = None
    rows: list[dict[str, Any]] = []
    for path in arguments.artifacts:
        logprobs, seconds = decoded(path, ids, arguments.context)
        reference = logprobs if reference is None else reference
        given = ids[arguments.context :, None]
        means = [float(np.mean(np.take_along_axis(x, given, axis=1))) for x in (logprobs, reference)]
        rows.append(
            {
                "artifact": path.name,
                "logprob": means[0],
                "fall": means[1] - means[0],
                "agreement": float(np.mean(logprobs.argmax(1) == reference.argmax(1))),
                "kl": float(np.mean(np.sum(np.exp(reference) * (reference - logprobs), axis=1))),
                "ms": statistics.median(seconds) * 1e3,
            }
        )
    table = Table(title=f"{arguments.tokens} tokens after {arguments.context} of {arguments.text.name}")
    for column in ("artifact", "log-probability", "fall", "same most likely token", "KL", "ms a token"):
        table.add_column(column, justify="left" if column == "artifact" else "right")
    for row in rows:
        table.add_row(
            row["artifact"],
            f"{row['logprob']:.4f}",
            f"{row['fall']:+.4f}",
            f"{row['agreement']:.2%}",
            f"{row['kl']:.5f}",
            f"{row['ms']:.1f}",
        )
    Console().print(table)
    print(json.dumps(rows))


def decoded(path: Path, ids: np.ndarray, context: int) -> tuple[np.ndarray, list[float]]:
    """Log-probabilities [tokens, vocab] of what follows each position from the prompt's last on, and seconds a call."""
    runner = Runner(open_artifact(path))
    bucket = next(bucket for bucket in runner.info.buckets if bucket.capacity >= len(ids))
    table = () if not bucket.cache.page else (np.arange(bucket.capacity // bucket.cache.page, dtype=np.int32)[None],)
    logits: Any = None
    for start in range(0, context, bucket.chunk):
        piece = np.zeros((1, bucket.chunk), np.int32)
        piece[0, : min(bucket.chunk, context - start)] = ids[start : min(start + bucket.chunk, context)]
        (logits,) = runner.call(bucket, "prefill", piece, _one(0), _one(start), _one(context), *table)
    rows, seconds = [np.asarray(logits)[0]], []
    for position in track(range(context, len(ids) - 1), path.name, console=Console(stderr=True)):
        begin = time.perf_counter()
        (logits,) = runner.call(bucket, "decode", _one(ids[position]), _one(0), _one(position), *table)
        rows.append(np.asarray(logits)[0])
        seconds.append(time.perf_counter() - begin)
    runner.close()
    found = np.stack(rows).astype(np.float64)
    found -= found.max(axis=1, keepdims=True)
    return found - np.log(np.exp(found).sum(axis=1, keepdims=True)), seconds


def _one(number: int) -> np.ndarray:
    return np.array([number], np.int32)


if __name__ == "__main__":
    main()
