"""The choice of the native kernels by environment variables, each in a process of its own."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iceformer import kernels
from iceformer.attention import LowRank, TwoStage

from .attention.calls import two_stage_attention

# Two-stage attention to 300 keys, by a selection and exactly; prints the instruction set and the output.
ATTEND = """
import json, warnings
import jax.numpy as jnp, numpy as np
from iceformer import kernels
from tests.test_kernels import attend
print(json.dumps([kernels.instruction_set(), attend().tolist()]))
"""


def attend() -> np.ndarray:
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((1, heads, 300, 16)).astype(np.float32) for heads in (4, 2))
    config = TwoStage(budget=64, query_block=8, key_block=4, sink=4, local=4)
    constants = {name: jnp.asarray(x) for name, x in LowRank().calibrate(query[0], key[0]).items()}
    rows = {"offset": jnp.zeros(1, jnp.int32), "lengths": jnp.full(1, 300, jnp.int32)}
    arrays = (jnp.asarray(x) for x in (query, key, key))
    call = jax.jit(partial(two_stage_attention, config))
    return np.asarray(call(*arrays, constants=constants, **rows)).sum(axis=(1, 3))


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ICEFORMER_")}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def built() -> None:
    if not kernels.register():
        pytest.skip("the native kernels are not built")


@pytest.fixture(scope="module")
def in_xla() -> np.ndarray:
    with kernels.disabled():
        return attend()


@pytest.mark.parametrize("index", [0, *(pytest.param(index, marks=pytest.mark.native) for index in range(1, 5))])
@pytest.mark.usefixtures("built")
def test_every_instruction_set_gives_the_same_in_a_process_of_its_own(index: int, in_xla: np.ndarray) -> None:
    names = (*kernels.instruction_sets(), "")
    if index >= len(names) - 1:
        pytest.skip("this processor has fewer instruction sets")
    result = run(ATTEND, ICEFORMER_ISA=names[index])
    assert (result.returncode, result.stderr) == (0, "")
    name, output = json.loads(result.stdout)
    assert name == names[index]
    np.testing.assert_allclose(output, in_xla, atol=1e-4)  # sums of 64 numbers


def test_switched_off_they_are_not_missed(in_xla: np.ndarray) -> None:
    result = run(ATTEND, ICEFORMER_KERNELS="0")
    assert (result.returncode, result.stderr) == (0, "")
    name, output = json.loads(result.stdout)
    assert name is None
    np.testing.assert_allclose(output, in_xla, atol=1e-5)


def test_missing_they_are_missed_once(in_xla: np.ndarray) -> None:
    missing = "from pathlib import Path; from iceformer import kernels; kernels._LIBRARY = Path('nowhere.so')\n"
    result = run(missing + ATTEND)
    assert result.returncode == 0
    assert result.stderr.count("KernelsMissingWarning: iceformer was installed without its native kernels") == 1
    assert result.stderr.count("Warning") == 1 + result.stderr.count("KernelsMissingWarning,")
    name, output = json.loads(result.stdout)
    assert name is None
    np.testing.assert_allclose(output, in_xla, atol=1e-5)


def test_a_library_that_is_damaged_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(b"no library")
    code = "from iceformer import kernels; print(kernels.register())"
    result = run(code, ICEFORMER_KERNELS=str(tmp_path / "lib.so"))
    assert result.stdout == "False\n"
    assert "KernelsMissingWarning: iceformer's native kernels cannot be loaded" in result.stderr


@pytest.mark.usefixtures("built")
def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    twice = """
from iceformer import kernels
for _ in range(2):
    try: kernels.register()
    except ValueError as error: print(error)
"""
    result = run(twice, ICEFORMER_ISA="abacus")
    known = ", ".join(kernels.instruction_sets())
    message = f"ICEFORMER_ISA is 'abacus', but this build and this processor have: {known}\n"
    assert (result.stdout, result.stderr) == (message * 2, "")


def test_a_library_that_is_not_there_is_refused_by_name() -> None:
    result = run("from iceformer import kernels; kernels.register()", ICEFORMER_KERNELS="/nowhere/lib.so")
    assert result.returncode == 1
    expected = "FileNotFoundError: ICEFORMER_KERNELS is '/nowhere/lib.so', but there is no such file: expected the path"
    assert expected in result.stderr


@pytest.mark.usefixtures("built")
def test_disabled_lasts_for_its_block_and_stays_in_what_was_traced() -> None:
    def lowered() -> str:
        return jax.jit(lambda: attend_traced()).lower().as_text()

    def attend_traced() -> jax.Array:
        query = jnp.ones((1, 2, 8, 16))
        offset, lengths, basis = jnp.zeros(1, jnp.int32), jnp.full(1, 8, jnp.int32), jnp.ones((2, 2, 16, 4))
        return two_stage_attention(TwoStage(), query, query, query, offset=offset, lengths=lengths, basis=basis)

    assert kernels.enabled()
    assert kernels.TWO_STAGE in lowered()
    with kernels.disabled():
        assert not kernels.enabled()
        assert kernels.TWO_STAGE not in lowered()
        with kernels.disabled():
            pass
        assert not kernels.enabled()
    assert kernels.enabled()
    assert kernels.TWO_STAGE in lowered()
