"""What converting takes of memory, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_conversion.py"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_peak_memory_is_near_the_size_of_the_weights(tmp_path: Path, form: str) -> None:
    """One shard of 2.5 GB: beside the parameters and what a small model takes too, there is no room for a second copy.

    The difference to a small model tells what grows with the weights; the bound is that of a 7B model, 13.5 GB.
    """

    def measure(layers: int) -> tuple[int, int]:
        options = ["--layers", str(layers), "--shard-gigabytes", "3", "--form", form]
        command = [sys.executable, str(SCRIPT), str(tmp_path / str(layers)), *options]
        result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return result["bytes"], result["peak_bytes"]

    (small, small_peak), (large, large_peak) = measure(1), measure(5)
    assert large > 2.5e9
    growth = (large_peak - small_peak) / (large - small)
    assert small_peak + growth * (13.5e9 - small) < 1.3 * 13.5e9
