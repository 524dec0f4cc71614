"""Whether an engine that writes attention scores out has the memory for it: better not started than killed."""

from pathlib import Path

_BYTES_PER_SCORE = {
    # Logits and their softmax are alive together; in bfloat16 the softmax is computed in float32 and cast.
    ("eager", "float32"): 8,
    ("eager", "bfloat16"): 10,
    # OpenVINO splits the attention of a prompt into products and a softmax; measured, and the same in both dtypes.
    ("openvino", "float32"): 4,
    ("openvino", "bfloat16"): 4,
}
_USABLE = 0.8
"""Share of the available memory that one engine may fill with scores."""


def score_bytes(engine: str, dtype: str, heads: int, length: int) -> int:
    """Bytes of the [heads, length, length] arrays that an engine holds at a time; 0 for an engine that holds none."""
    return _BYTES_PER_SCORE.get((engine, dtype), 0) * heads * length**2


def shortage(needed: int) -> str:
    """Why `needed` bytes cannot be had; empty if they can."""
    available = available_bytes()
    if needed <= available * _USABLE:
        return ""
    return f"its scores take {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are available"


def available_bytes() -> int:
    """Memory that a new process can fill, in bytes: what the machine has, and what a control group leaves of it."""
    meminfo = Path("/proc/meminfo").read_text()
    available = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return available  # no control group, or one without a limit
    return min(available, limit - used + int(statistics.get("inactive_file", 0)))
