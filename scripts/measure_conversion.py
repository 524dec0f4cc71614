"""Peak memory of converting a sharded bfloat16 Llama with random weights, as a multiple of its weights' size.

    python scripts/measure_conversion.py FOLDER [--layers 32] [--shard-gigabytes 2] [--form safetensors|bin]

The shapes are those of Llama 2 7B, whose 32 layers take 13.5 GB; fewer layers make a smaller model. Writes
FOLDER/source and FOLDER/checkpoint (twice the size on disk) and removes them; prints one JSON object.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000
SUFFIXES = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shard-gigabytes", type=float, default=2.0)
    parser.add_argument("--form", choices=SUFFIXES, default="safetensors")
    options = parser.parse_args()
    source, checkpoint = options.folder / "source", options.folder / "checkpoint"
    source.mkdir(parents=True)
    try:
        size = write_llama(source, options.layers, int(1e9 * options.shard_gigabytes), SUFFIXES[options.form])
        start = time.perf_counter()
        peak = peak_of_converting(source, checkpoint)
        seconds = time.perf_counter() - start
    finally:
        for made in (source, checkpoint):
            shutil.rmtree(made, ignore_errors=True)
    result = {"form": options.form, "bytes": size, "peak_bytes": peak, "ratio": peak / size, "seconds": seconds}
    print(json.dumps(result))


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama by their names in a checkpoint."""
    square = {f"self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
    wide = {f"mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
    norms = {f"{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    layer = {**square, **wide, "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE), **norms}
    return {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        **{f"model.layers.{at}.{name}": shape for at in range(layers) for name, shape in layer.items()},
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }


def write_llama(folder: Path, layers: int, shard_bytes: int, name: str) -> int:
    """Writes config, shards and their index; gives the bytes of the weights."""
    random = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    for at, shard in enumerate(shards(layers, shard_bytes)):
        file = name.replace(".", f"-{at:05}.", 1)
        tensors = {
            key: (random.random(shape, np.float32) - 0.5).astype(ml_dtypes.bfloat16) for key, shape in shard.items()
        }
        if name.endswith(".bin"):
            import torch

            torch.save(
                {key: torch.from_numpy(value.view(np.int16)).view(torch.bfloat16) for key, value in tensors.items()},
                folder / file,
            )
        else:
            save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    return sum(file.stat().st_size for file in folder.iterdir() if file.name in weight_map.values())


def shards(layers: int, shard_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors' shapes in groups of about `shard_bytes`."""
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes(layers).items():
        shard[name] = shape
        if 2 * sum(int(np.prod(shape)) for shape in shard.values()) >= shard_bytes:
            yield shard
            shard = {}
    if shard:
        yield shard


def peak_of_converting(source: Path, checkpoint: Path) -> int:
    """The largest resident memory, in bytes, of a process that does nothing else."""
    script = (
        "import pathlib, sys, iceformer\n"
        "iceformer.convert_checkpoint(*sys.argv[1:])\n"
        "print(pathlib.Path('/proc/self/status').read_text())\n"
    )
    command = [sys.executable, "-c", script, str(source), str(checkpoint)]
    status = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
