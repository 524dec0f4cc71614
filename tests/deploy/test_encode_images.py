"""Encoders whose rows all have the same number of tokens and are given as arrays: a toy of image patches."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

import iceformer
from iceformer.attention import LowRank
from iceformer.convert.parameters import save_params
from iceformer.deploy.session import Session
from iceformer.model import registry
from iceformer.model.encoder import Encoder, EncoderConfig, InputInfo
from iceformer.model.layers import PostNormLayer
from iceformer.model.modules import MLP, LayerNorm, Linear
from iceformer.model.self_attention import SelfAttention

CHANNELS, SIDE, PATCH = 3, 32, 4
TOKENS = (SIDE // PATCH) ** 2
TWO_STAGE = iceformer.TwoStage(
    method=LowRank(rank=4), budget=40, query_block=8, key_block=2, sink=0, local=4, exact_last_block=False
)


@dataclass(frozen=True, kw_only=True)
class PatchConfig(EncoderConfig):
    model_type: ClassVar[str] = "patches"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "PatchConfig":
        return cls(
            task="features",
            num_labels=2,
            hidden_size=config["hidden_size"],
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_tokens=TOKENS,
            fixed_tokens=TOKENS,
            ropes=(None,) * 2,
            windows=(None,) * 2,
        )


class Patches(nnx.Module):
    def __init__(self, hidden_size: int, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        size = CHANNELS * PATCH * PATCH
        self.projection = Linear(size, hidden_size, use_bias=False, rngs=rngs, param_dtype=param_dtype)

    def inputs(self, tokens: int) -> dict[str, InputInfo]:
        return {"pixel_values": InputInfo((CHANNELS, SIDE, SIDE), "float32")}

    def __call__(self, inputs: Mapping[str, Array]) -> Float[Array, "batch tokens hidden_size"]:
        pixels = inputs["pixel_values"].astype(self.projection.kernel[...].dtype)
        grid = pixels.reshape(pixels.shape[0], CHANNELS, SIDE // PATCH, PATCH, SIDE // PATCH, PATCH)
        return self.projection(grid.transpose(0, 2, 4, 1, 3, 5).reshape(pixels.shape[0], TOKENS, -1))


class PatchEncoder(Encoder):
    def __init__(self, config: PatchConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
        size = config.hidden_size
        made: dict[str, Any] = {"use_bias": True, "rngs": rngs, "param_dtype": param_dtype}
        norm = partial(LayerNorm, size, epsilon=1e-6, param_dtype=param_dtype)
        layers = [
            PostNormLayer(
                SelfAttention(config, **made),
                MLP(config, hidden_act="gelu", **made),
                norm,
            )
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, Patches(config.hidden_size, rngs, param_dtype), layers)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of an architecture that is registered for these tests only."""
    fields = {"model_type": "patches", "hidden_size": 16}
    folder = tmp_path_factory.mktemp("patches")
    model = PatchEncoder(PatchConfig.from_hf(fields), rngs=nnx.Rngs(0))
    save_params(folder / "params", nnx.to_pure_dict(nnx.state(model)))
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "iceformer.json").write_text(json.dumps({"format": 2}))
    with pytest.MonkeyPatch.context() as patch:
        toy = registry.Architecture("Patches", PatchConfig, PatchEncoder, "none")
        patch.setitem(registry.ARCHITECTURES, "patches", toy)
        yield folder


@pytest.fixture(scope="module")
def session(checkpoint: Path) -> Session:
    return iceformer.load(iceformer.compile(checkpoint, checkpoint / "artifact", attention=iceformer.Exact(), batch=2))


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, CHANNELS, SIDE, SIDE)).astype(np.float32)


def direct(checkpoint: Path, pixels: np.ndarray) -> np.ndarray:
    model = iceformer.load_model(checkpoint)
    assert isinstance(model, Encoder)
    lengths = jnp.full((len(pixels),), TOKENS, jnp.int32)
    return np.asarray(
        jax.jit(lambda pixels: model.encode({"pixel_values": pixels}, lengths))(pixels)["last_hidden_state"]
    )


def test_one_image_and_a_batch(session: Session, checkpoint: Path) -> None:
    pixels = images(3)
    expected = direct(checkpoint, pixels)
    for encoding, states in zip(session.encode({"pixel_values": pixels}), expected, strict=True):
        np.testing.assert_allclose(encoding.last_hidden_state, states, atol=1e-5)
        assert (encoding.tokens, encoding.ids, encoding.pooled) == (TOKENS, None, None)
    one = session.encode({"pixel_values": pixels[1]})
    np.testing.assert_allclose(one.last_hidden_state, expected[1], atol=1e-5)


def test_the_one_bucket_is_what_the_model_takes(session: Session, checkpoint: Path) -> None:
    model = session.info.model
    assert (model.fixed_tokens, model.vocab_size) == (TOKENS, None)
    assert [bucket.capacity for bucket in session.info.buckets] == [TOKENS]
    card = (checkpoint / "artifact" / "README.md").read_text()
    assert f'session.encode({{"pixel_values": array}})  # pixel_values [3, {SIDE}, {SIDE}]' in card
    with pytest.raises(ValueError, match=rf"buckets are \(4096,\), but every row of this model has {TOKENS} tokens"):
        iceformer.compile(checkpoint, checkpoint / "no", buckets=(4096,))


def test_calibrated_on_random_numbers(checkpoint: Path, tmp_path: Path, session: Session) -> None:
    path = iceformer.compile(checkpoint, tmp_path / "a", attention=TWO_STAGE)
    selected = iceformer.load(path)
    calibration = selected.info.provenance.calibration
    assert calibration is not None
    assert (calibration.kind, calibration.tokens) == ("random inputs", TOKENS)
    inputs = {"pixel_values": images(1)[0]}
    ours, exact = (each.encode(inputs).last_hidden_state for each in (selected, session))
    assert 1e-6 < np.abs(ours - exact).mean() < exact.std() / 2
    with pytest.raises(ValueError, match="the model takes pixel_values, not text: leave it out"):
        iceformer.compile(checkpoint, tmp_path / "b", attention=TWO_STAGE, calibration=[1, 2])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("a text", rf"the input is text, but the model takes pixel_values \[3, {SIDE}, {SIDE}\]"),
        ([5, 6], r"the input is list of shape \(2,\), but the model takes pixel_values"),
        ({"input_ids": [5]}, "the input has input_ids, but the model takes pixel_values"),
        ({"pixel_values": images(1)[0, :, :5]}, r"pixel_values of shape \(3, 5, 32\) and dtype float32, expected"),
        ({"pixel_values": [images(1)[0], images(1)[0] * np.nan]}, "input 1 has pixel_values with NaN or infinite"),
    ],
)
def test_refuses(session: Session, inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session.encode(inputs)
