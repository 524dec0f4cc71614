"""The decoding benchmark: its bytes beside real arrays, what it times, its report, and a run of the command."""

import importlib.util
import io
import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

from iceformer.attention import DecodeSelection
from iceformer.attention.methods.low_rank import LowRank
from iceformer.cli import main
from iceformer.deploy.artifact import open_artifact
from iceformer.deploy.engine import Engine as Requests
from iceformer.deploy.engine import PromptRead, RequestLost, TokenWritten
from iceformer.deploy.manifest import Manifest, kv_arrays
from iceformer.evaluate import decode_benchmark, decode_engines
from iceformer.evaluate.benchmark_result import Benchmark
from iceformer.evaluate.benchmark_retention import Retention
from iceformer.evaluate.decode_benchmark import DecodeOptions, Peers, run_decode_benchmark, token_bytes
from iceformer.evaluate.decode_bytes import DecoderSizes, cache_bytes, file_bytes, our_cache_bytes, weight_bytes
from iceformer.evaluate.decode_engines import GENAI, DecodeJob, prompts, written_tokens
from iceformer.evaluate.decode_report import decode_plot, decode_summary, decode_table
from iceformer.evaluate.processes import Timing, time_in_turn
from iceformer.evaluate.shapes import ModelShape, write_random_model
from iceformer.model.registry import build
from iceformer.model.rounding import GROUP, TIED_GROUP, quantize_kernel, round_weights

from ..conftest import Once
from ..few import few

SHAPE = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, mlp=96, vocab=128)
SIZES = DecoderSizes(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=96, vocab=128, tied=False)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
}
DEPTH, NEW = 200, 4


class Run(SimpleNamespace):
    """What the command wrote: `work`, the folder, and `printed`."""

    work: Path
    printed: str

    @property
    def manifest(self) -> Manifest:
        """Of the artifact of the engine `selection`."""
        return open_artifact(self.work / f"selection-{DEPTH}").manifest


@pytest.fixture(scope="module")
def run(once: Once) -> Run:
    folder = once("decode benchmark", run_the_command)
    return Run(work=folder / "work", printed=(folder / "printed").read_text())


def run_the_command(folder: Path) -> None:
    """On a tiny random model in int8, with an engine whose executable is missing."""
    (folder / "model.gguf").write_bytes(bytes(1000))
    options = {
        "--engines": "selection,llama_cpp",
        "--gguf": folder / "model.gguf",
        "--llama-bench": "/nowhere/llama-bench",
        "--lengths": DEPTH,
        "--new-tokens": NEW,
        "--budget": 96,
        "--weights": "int8",
        "--kv-dtype": "int8",
        "--threads": 1,
        "--hidden": 64,
        "--layers": 2,
        "--heads": 4,
        "--kv-heads": 2,
        "--mlp": 96,
        "--vocab": 128,
    }
    printed = io.StringIO()
    command = ["benchmark", str(folder / "work"), "--decode", *(str(x) for option in options.items() for x in option)]
    with redirect_stdout(printed), pytest.raises(SystemExit) as end:
        main(command)
    assert not end.value.code
    (folder / "printed").write_text(printed.getvalue())


def job(engine: str, **options: Any) -> DecodeJob:
    given: dict[str, Any] = {"length": DEPTH, "dtype": "float32", "threads": 1, "output": "", "vocab": 128}
    return DecodeJob(engine=engine, new_tokens=NEW, **(given | options))


def made_up() -> Benchmark:
    timings = [
        Timing("exact", 1000, (0.02, 0.01, 0.03), token_bytes=1_000_000_000),
        Timing("selection", 1000, (0.01, 0.01, 0.01), token_bytes=400_000_000, busy=0.5),
        Timing("sdpa", 1000, (0.05, 0.05, 0.05)),
        Timing("llama_cpp", 1000, skipped="llama-bench is not there"),
        Timing("exact", 500, (0.01, 0.01, 0.01), token_bytes=500_000_000),
    ]
    settings = {"mode": "decode", "dtype": "float32", "threads": 2, "rounds": 3, "batch": 4}
    settings |= {"weights": "int8", "kv_dtype": "same"}
    return Benchmark(settings, {"cpu": "a CPU"}, 1e9, 0, timings, Retention(missing="not asked"), 100e9)


def test_the_command_measures_ours_and_says_why_it_skips_a_peer(run: Run) -> None:
    result = Benchmark.load(run.work / "benchmark.json")
    skipped, measured = result.timings
    assert (skipped.engine, skipped.skipped) == ("llama_cpp", "/nowhere/llama-bench is not an executable")
    assert (measured.engine, measured.length, len(measured.seconds)) == ("selection", DEPTH, 3)
    assert 0 < measured.median < 1
    assert measured.peak_bytes > 1e7
    assert measured.token_bytes == weight_bytes(SIZES, "float32", "int8") + our_cache_bytes(
        SIZES, DEPTH, "int8", DecodeSelection(budget=96)
    )
    assert result.read_bandwidth > 1e8
    assert result.retention.missing == "--decode measures speed only"
    assert "llama_cpp, 200 tokens, not measured: /nowhere/llama-bench is not an" in run.printed
    assert (run.work / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_int8_weights_are_those_of_the_artifact(run: Run) -> None:
    """Without the embedding, of which a token reads a row, and without a selection's projections."""
    tensors = run.manifest.weights.tensors.items()
    read = [array for name, array in tensors if not name.startswith(("attention.", "model.embed_tokens."))]
    assert weight_bytes(SIZES, "float32", "int8") == sum(array.size_in_bytes for array in read)


@pytest.mark.parametrize("tied", [False, True])
def test_int4_weights_are_those_of_a_model(tied: bool) -> None:
    config = CONFIG | {"max_position_embeddings": 64, "tie_word_embeddings": tied}
    architecture, built = build(config)
    model = round_weights(architecture.module(built, rngs=nnx.Rngs(0), param_dtype=jnp.float32), "int4")
    state = nnx.to_flat_state(nnx.state(model))
    read = [leaf.get_value().nbytes for path, leaf in state if tied or "embed_tokens" not in path]
    assert weight_bytes(replace(SIZES, tied=tied), "float32", "int4") == sum(read)


def test_cache_and_index_are_those_of_the_artifact(run: Run) -> None:
    """A row that attends to every key reads keys and values; one that selects reads the index and the chosen keys."""
    (bucket,) = run.manifest.buckets
    names = kv_arrays("int8")
    pairs = [sum(layer[name].size_in_bytes for name in names) for layer in bucket.cache.layers]
    indexes = [sum(layer[name].size_in_bytes for name in layer if name not in names) for layer in bucket.cache.layers]
    capacity = bucket.capacity
    assert our_cache_bytes(SIZES, capacity, "int8") == sum(pairs)
    assert our_cache_bytes(SIZES, capacity, "int8", DecodeSelection(budget=capacity)) == sum(pairs)
    selected = our_cache_bytes(SIZES, capacity, "int8", DecodeSelection(budget=96))
    assert selected == pairs[0] + indexes[1] + pairs[1] * 96 // capacity


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_weights_that_are_not_rounded_are_those_of_the_file(tmp_path: Path, dtype: str, size: int) -> None:
    folder = write_random_model(tmp_path / "model", SHAPE, 64, dtype)
    sizes = DecoderSizes.of(json.loads((folder / "config.json").read_text()))
    assert sizes == SIZES
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    assert weight_bytes(SIZES, dtype, "same") == sum(array.nbytes for array in tensors.values())
    numbers = [array.size for array in tensors.values() if array.ndim == 2]
    norms = sum(array.size for array in tensors.values() if array.ndim == 1)
    assert weight_bytes(SIZES, dtype, "bfloat16") == 2 * sum(numbers) + size * norms


@pytest.mark.parametrize("tied", [False, True])
def test_wide_layers_have_several_scales_for_each_output(tied: bool) -> None:
    sizes = DecoderSizes(hidden=256, layers=1, heads=2, kv_heads=1, head_dim=64, mlp=384, vocab=40, tied=tied)
    rounded = [(256, 128), (256, 64), (128, 256), (256, 384), (256, 384), (384, 256)]
    expected = sum(part.nbytes for shape in rounded for part in quantize_kernel(np.zeros(shape, np.float32)))
    output = quantize_kernel(np.zeros((256, 40), np.float32), TIED_GROUP if tied else GROUP)
    expected += sum(part.nbytes for part in output)
    in_bfloat16 = 256 * 64
    norms = 3 * 256
    assert weight_bytes(sizes, "float32", "int8") == expected + 2 * in_bfloat16 + 4 * norms
    assert len(quantize_kernel(np.zeros((256, 1), np.float32))[1]) > 1


def test_a_selection_reads_what_the_formula_of_sparq_says() -> None:
    """n r + 2 k d + 4 d numbers against 2 n d + 2 d, for each KV head and layer (Ribar et al., arXiv 2312.04985).

    The terms 4 d and 2 d do not grow with n or k, and ours has none. The r numbers of a key have one byte here.
    """
    n, r, k, d = 4096, 8, 512, 64
    sizes = DecoderSizes(hidden=256, layers=3, heads=4, kv_heads=2, head_dim=d, mlp=96, vocab=128, tied=False)
    selection = DecodeSelection(method=LowRank(rank=r), budget=k, exact_layers=0)
    bytes_of_sparq = n * r + 4 * (2 * k * d + 4 * d)
    bytes_of_all = 4 * (2 * n * d + 2 * d)
    heads = sizes.layers * sizes.kv_heads
    assert our_cache_bytes(sizes, n, "float32", selection) == heads * (bytes_of_sparq - 4 * 4 * d)
    assert our_cache_bytes(sizes, n, "float32") == heads * (bytes_of_all - 4 * 2 * d)


def test_a_file_counts_without_the_embedding_that_is_only_looked_up() -> None:
    numbers = SIZES.linear + SIZES.output + SIZES.norms
    assert file_bytes(SIZES, 2 * (numbers + SIZES.output)) == 2 * numbers
    assert file_bytes(replace(SIZES, tied=True), 2 * numbers) == 2 * numbers


def test_bytes_of_a_token_by_engine(tmp_path: Path) -> None:
    """Peers have their own formats: 8 bits and two float32 beside each key and value, and float16."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(bytes(10_000))
    keys = 2 * SIZES.layers * SIZES.kv_heads * 50
    options = DecodeOptions(batch=3, weights="int8", kv_dtype="same")

    def of(engine: str, options: DecodeOptions = options) -> int:
        return token_bytes(engine, CONFIG, 50, "bfloat16", options, gguf)

    assert of("exact") == weight_bytes(SIZES, "bfloat16", "int8") + 3 * keys * 16 * 2
    assert of("exact", replace(options, kv_dtype="int8")) - of("exact") == 3 * keys * (16 + 4 - 32)
    assert of("selection") == of("exact"), "the budget covers all keys"
    assert of("sdpa") == weight_bytes(SIZES, "bfloat16", "same") + 3 * keys * 16 * 2
    for engine in GENAI:
        assert of(engine) == file_bytes(SIZES, 10_000) + 3 * keys * (16 + 8)
    assert of("llama_cpp") == file_bytes(SIZES, 10_000) + keys * 16 * 2
    assert cache_bytes(SIZES, 50, "float32") == keys * 16 * 4


@pytest.mark.parametrize("change", [{"model_type": "gemma3_text"}, {"model_type": "qwen2", "use_sliding_window": True}])
def test_bytes_of_other_models_are_not_known(change: dict[str, Any]) -> None:
    assert DecoderSizes.of(CONFIG | change) is None
    assert token_bytes("exact", CONFIG | change, 50, "float32", DecodeOptions(), None) == 0


def test_ours_read_their_prompts_once_and_are_timed_behind_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a step that reads a prompt takes 100 s, and any other 1 s."""
    clock, steps = [0.0], []
    step = Requests.step

    def slow(requests: Requests) -> Any:
        events = step(requests)
        steps.append(events)
        clock[0] += 100.0 if any(isinstance(event, PromptRead) for event in events) else 1.0
        return events

    monkeypatch.setattr(Requests, "step", slow)
    monkeypatch.setattr(decode_engines.time, "perf_counter", lambda: clock[0])
    given = job("selection", form=str(run.work / f"selection-{DEPTH}"))
    engine = decode_engines.ours(given)
    assert engine.output() is None
    assert [engine.run() for _ in range(given.rounds)] == [1.0] * given.rounds
    assert [isinstance(event, PromptRead) for events in steps for event in events].count(True) == 1
    assert len(steps) == 1 + NEW * (given.rounds + 1)
    assert all(isinstance(event, TokenWritten) for events in steps[1:] for event in events)
    with pytest.raises(RuntimeError, match="a step wrote to 0 rows, expected all 1"):
        engine.run()


def test_a_lost_request_ends_the_measurement(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Requests, "step", lambda requests: [RequestLost(0, "the model is broken")])
    engine = decode_engines.ours(job("selection", form=str(run.work / f"selection-{DEPTH}")))
    with pytest.raises(RuntimeError, match="the model is broken"):
        engine.output()


def test_sdpa_reads_its_prompts_once_and_is_timed_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, widths = [0.0], []

    def model(ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        widths.append(tuple(ids.shape))
        clock[0] += 100.0 if ids.shape[1] > 1 else 1.0
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 128)[:, -1:], past_key_values=None)

    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(decode_engines.time, "perf_counter", lambda: clock[0])
    engine = decode_engines.sdpa(job("sdpa", batch=2))
    engine.output()
    assert engine.run() == engine.run() == 1.0
    assert widths == [(2, DEPTH), *[(2, 1)] * (3 * NEW)]


def test_llama_cpp_fills_the_cache_before_it_is_timed(tmp_path: Path) -> None:
    bench = tmp_path / "llama-bench"
    bench.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "pathlib.Path(sys.argv[0]).with_name('given').write_text(json.dumps(sys.argv[1:]))\n"
        "print(json.dumps([{'avg_ns': 8e9, 'n_gen': 4}]))\n"
    )
    bench.chmod(0o755)
    assert decode_engines.llama_cpp(job("llama_cpp", gguf="a.gguf", llama_bench=str(bench))).run() == 2.0
    given = json.loads((tmp_path / "given").read_text())
    assert dict(zip(given[::2], given[1::2], strict=True)) == {
        "-m": "a.gguf",
        "-p": "0",
        "-n": str(NEW),
        "-d": str(DEPTH),
        "-t": "1",
        "-r": "1",
        "-o": "json",
    }


_GENAI = """
import json, os, time, types
SchedulerConfig = SparseAttentionConfig = GenerationConfig = lambda **given: types.SimpleNamespace(**given)
SparseAttentionMode = types.SimpleNamespace(XATTENTION="xattention")
class Handle:
    left = 0
    def can_read(self):
        return self.left > 0
    def read(self):
        self.left -= 1
class ContinuousBatchingPipeline:
    def __init__(self, model, scheduler, device, options):
        sparse = getattr(scheduler, "sparse_attention_config", None)
        self.told = [model, device, options, scheduler.cache_size, sparse and sparse.mode]
        self.handles, self.steps = [], 0
    def add_request(self, number, ids, config):
        self.told += [number, ids.tolist(), vars(config)]
        self.handles.append(Handle())
        return self.handles[-1]
    def step(self):
        self.steps += 1
        time.sleep(0.2 if self.steps <= 3 else 0.01)
        for handle in self.handles[: self.steps]:
            handle.left += 1
        with open(os.environ["GENAI_TOLD"], "w") as file:
            json.dump([self.steps, *self.told], file)
"""


GIVEN = list(zip(GENAI, (None, "xattention"), strict=True))


@pytest.mark.parametrize(("engine", "sparse"), few(GIVEN, GIVEN[1:]))
def test_openvino_genai_reads_its_prompts_once_and_is_timed_behind_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, sparse: str | None
) -> None:
    """In an interpreter that has only the peer's packages; here they are made up, and read a prompt a step."""
    (tmp_path / "openvino.py").write_text("Tensor = lambda array: array\n")
    (tmp_path / "openvino_genai.py").write_text(_GENAI)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("GENAI_TOLD", str(tmp_path / "told.json"))
    given = job(engine, gguf="a.gguf", length=5, batch=3, output=str(tmp_path / "out.npy"))
    (timing,) = time_in_turn([given], {}, 3, lambda step: None)
    assert (timing.skipped, len(timing.seconds)) == ("", 3)
    assert all(0.01 <= seconds < 0.2 for seconds in timing.seconds)
    config = {"max_new_tokens": 5, "ignore_eos": True, "do_sample": False}
    rows = [x for row, ids in enumerate(prompts(given).tolist()) for x in (row, [ids], config)]
    options = {"INFERENCE_NUM_THREADS": 1}
    assert json.loads((tmp_path / "told.json").read_text()) == [3 + 4 * NEW, "a.gguf", "CPU", options, 6, sparse, *rows]


def test_every_engine_gets_the_same_ids_and_room_for_its_neighbours() -> None:
    ids = prompts(job("exact", batch=3))
    assert (ids.shape, ids.dtype) == ((3, DEPTH), np.int32)
    assert 0 <= ids.min() < ids.max() < 128
    np.testing.assert_array_equal(ids, prompts(job("sdpa", batch=3)))
    assert written_tokens(10, 3, 1, 5000) == 42
    assert written_tokens(10, 3, 4, 5000) == 42 + 3 * 40, "the first writes while three prompts are read"


def test_peers_that_cannot_run_are_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(bytes(100))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(decode_benchmark, "start_or_resume", lambda _, settings, *__: Benchmark(settings, {}, 1.0, 0))
    peers = Peers(gguf=tmp_path / "model.gguf", openvino_python=sys.executable)
    options: dict[str, Any] = {"shape": SHAPE, "lengths": (8,), "peers": peers}
    one = run_decode_benchmark(tmp_path / "one", engines=("llama_cpp",), **options)
    assert [timing.skipped for timing in one.timings] == ["llama-bench is not on PATH (--llama-bench)"]
    two = run_decode_benchmark(tmp_path / "two", engines=("llama_cpp",), **options, options=DecodeOptions(batch=2))
    assert [timing.skipped for timing in two.timings] == ["its benchmark runs one request, and the batch is 2"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": (16, 0)}, ValueError, r"depths are \[16, 0\], expected some of at least 1 token"),
        ({"lengths": ()}, ValueError, r"depths are \[\]"),
        ({"engines": ("abacus",)}, ValueError, "expected some of: two_stage, exact, selection, sdpa"),
        ({"rounds": 2}, ValueError, "rounds is 2, expected at least 3"),
        ({"engines": ("llama_cpp",)}, ValueError, "engine llama_cpp needs the same model as a GGUF file"),
        (
            {"engines": ("llama_cpp",), "peers": Peers(gguf=Path("/nowhere/model.gguf"))},
            FileNotFoundError,
            "/nowhere/model.gguf is not a file",
        ),
        (
            {"engines": ("openvino_genai",), "peers": Peers(gguf=Path(__file__))},
            ModuleNotFoundError,
            "needs openvino-genai: install it, or give --openvino-python PYTHON",
        ),
    ],
)
def test_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino_genai" else found(name))
    with pytest.raises(error, match=message):
        run_decode_benchmark(tmp_path, shape=SHAPE, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch": 0}, "batch is 0, expected at least 1"), ({"new_tokens": 2}, "new_tokens is 2, expected at least 3")],
)
def test_options_that_measure_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeOptions(**options)


def test_the_table_has_a_row_for_each_engine_and_depth() -> None:
    table = decode_table(made_up())
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("exact", "500", "10.00", "0%", "400.0", "500.0", "50%", "1.00"),
        ("exact", "1000", "20.00", "100%", "200.0", "1000.0", "50%", "1.00"),
        ("selection", "1000", "10.00", "0%", "400.0", "400.0", "40%", "0.50"),
        ("sdpa", "1000", "50.00", "0%", "80.0", "-", "-", "2.50"),
        ("llama_cpp", "1000", "not measured", *[""] * 5),
    ]
    title = "decode, float32, weights int8, KV cache same, batch 4, 2 threads, medians of 3\na CPU"
    assert str(table.title) == title
    assert str(table.caption) == (
        "the machine reads 100.0 GB/s\nllama_cpp, 1000 tokens, not measured: llama-bench is not there"
    )


def test_summary_and_plot(tmp_path: Path) -> None:
    lines = decode_summary(made_up())
    assert lines[0] == "bytes are by formula; what an answer loses is not measured here"
    assert any("something else used 50% of the processors" in line for line in lines[1:])
    decode_plot(made_up(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    nothing = replace(made_up(), timings=[Timing("exact", 1000, skipped="no")])
    decode_plot(nothing, tmp_path / "empty.png")


def test_the_file_has_the_figures_of_each_depth(tmp_path: Path) -> None:
    made_up().save(tmp_path / "benchmark.json")
    assert Benchmark.load(tmp_path / "benchmark.json") == made_up()
    depths = json.loads((tmp_path / "benchmark.json").read_text())["figures"]["depths"]
    assert list(depths) == ["500", "1000"]
    assert depths["1000"]["selection"] == {
        "seconds_per_token": 0.01,
        "tokens_per_second": 400.0,
        "bytes_per_token": 400_000_000,
        "share_of_bandwidth": 0.4,
        "ratio_to_exact": 0.5,
    }
    assert depths["1000"]["sdpa"]["share_of_bandwidth"] is None
    assert set(depths["1000"]["llama_cpp"].values()) == {None}
