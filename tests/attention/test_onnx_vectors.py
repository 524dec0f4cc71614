"""Exact attention against the published vectors of the ONNX operator `Attention`, from the package `onnx`."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ..few import few
from .calls import exact_attention

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data" / "node"


def has_mask(folder: Path) -> bool:
    """Whether a case has an array as its mask, which nothing here needs: masks are rules."""
    inputs = onnx.load(str(folder / "model.onnx")).graph.node[0].input
    return len(inputs) > 3 and inputs[3] != ""


# 4-D inputs only, without the cases that ask for the operator's intermediate products (`qk_matmul`).
CASES = sorted(
    path.name
    for path in DATA.glob("test_attention_4d*")
    if not path.name.endswith("_expanded") and "qk_matmul" not in path.name and not has_mask(path)
)


def load_case(name: str) -> tuple[dict[str, np.ndarray], dict[str, float], np.ndarray]:
    """Named inputs, attributes, and the expected output of a case."""
    graph = onnx.load(str(DATA / name / "model.onnx")).graph
    node = graph.node[0]
    operands = ["Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"]
    inputs = {}
    names = [value.name for value in graph.input]
    for operand, tensor in zip(operands, node.input, strict=False):
        if tensor:
            file = DATA / name / "test_data_set_0" / f"input_{names.index(tensor)}.pb"
            inputs[operand] = numpy_helper.to_array(onnx.load_tensor(str(file)))
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    output = numpy_helper.to_array(onnx.load_tensor(str(DATA / name / "test_data_set_0" / "output_0.pb")))
    return inputs, attributes, output


def test_cases_are_found() -> None:
    assert len(CASES) >= 13


@pytest.mark.parametrize(
    "name",
    few(
        CASES,
        [
            "test_attention_4d_fp16",
            "test_attention_4d_gqa_softcap",
            "test_attention_4d_diff_heads_sizes_causal",
        ],
    ),
)
def test_published_vector(name: str) -> None:
    inputs, attributes, expected = load_case(name)
    query, key, value = inputs["Q"], inputs["K"], inputs["V"]
    batch, past = query.shape[0], 0
    if "past_key" in inputs:
        past = inputs["past_key"].shape[2]
        key = np.concatenate([inputs["past_key"], key], axis=2)
        value = np.concatenate([inputs["past_value"], value], axis=2)
    lengths = inputs.get("nonpad_kv_seqlen", np.full(batch, key.shape[2]))
    output = exact_attention(
        jnp.asarray(query),
        jnp.asarray(key),
        jnp.asarray(value),
        offset=jnp.full(batch, past, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        causal=bool(attributes.get("is_causal", 0)),
        scale=attributes.get("scale"),
        softcap=attributes.get("softcap") or None,
        query_block=4,
        key_block=4,
    )
    tolerance = 5e-3 if query.dtype == np.float16 else 1e-5
    np.testing.assert_allclose(np.asarray(output), expected, rtol=tolerance, atol=tolerance)
