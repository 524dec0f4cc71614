"""Environment variables that jax and XLA read: checked first, because XLA ends the process where it cannot use them.

XLA has no list of its flags that could be asked, so a process of its own tries them. What only shows when something is
compiled, such as an odd value that a flag allows, is not found here.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping

ISAS = ("SSE4_2", "AVX", "AVX2", "AVX512", "AVX512_VNNI", "AVX512_BF16", "AMX", "AMX_FP16")
"""Instruction sets that `--xla_cpu_max_isa` knows."""
_TRY_FLAGS = "from jaxlib import _jax; _jax.CompileOptions()"
_TRY_PLATFORMS = "import jax; jax.devices('cpu')"
_MAX_THREADS = 4096
# The first that XLA logs as an error, or the last line of a traceback.
_REASONS = (re.compile(r"^[EF]\d+ .*?\] (.*)", re.MULTILINE), re.compile(r"^\w*Error: (.*)\Z", re.MULTILINE))
_SECONDS = 60


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Raises ValueError with the variable, its value and what to do, if jax could not start on the CPU with these.

    Costs nothing where XLA_FLAGS is not set and JAX_PLATFORMS names nothing but the CPU; else a process of its own, for
    a quarter of a second or a second.
    """
    check_platforms(environment)
    if flags := environment.get("XLA_FLAGS", "").strip():
        _check_flags(flags, environment)
    threads = environment.get("NPROC", "")
    if threads and not (threads.isascii() and threads.isdecimal() and 1 <= int(threads[:9]) <= _MAX_THREADS):
        raise ValueError(
            f"NPROC is {threads[:40]!r}, expected a number of threads from 1 to {_MAX_THREADS}: change it or unset it"
        )
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms not in ("", "cpu") and (reason := _failure(_TRY_PLATFORMS, environment)):
        raise ValueError(f"JAX_PLATFORMS is {platforms!r}, with which jax does not start ({reason}): set it to cpu")


def check_platforms(environment: Mapping[str, str] = os.environ) -> None:
    """Raises ValueError if JAX_PLATFORMS leaves the CPU out."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        raise ValueError(f"JAX_PLATFORMS is {platforms!r}, but iceformer runs on the CPU: set it to cpu or unset it")


def _check_flags(flags: str, environment: Mapping[str, str]) -> None:
    if reason := _failure(_TRY_FLAGS, environment):
        raise ValueError(f"XLA_FLAGS is {flags!r}, which XLA cannot use ({reason}): correct it or unset it")
    try:
        words = shlex.split(flags)
    except ValueError:
        raise ValueError(f"XLA_FLAGS is {flags!r}, which lacks a closing quotation mark: correct it") from None
    isa = re.search(r"--xla_cpu_max_isa=(\S*)", " ".join(words))
    if isa and isa[1].upper() not in ISAS:
        raise ValueError(
            f"XLA_FLAGS is {flags!r}, which names the instruction set {isa[1]!r}, expected one of: {', '.join(ISAS)}"
        )


def _failure(code: str, environment: Mapping[str, str]) -> str:
    """Why a line of Python fails in a process of its own, in a few words; empty if it does not."""
    tried = subprocess.run(
        [sys.executable, "-c", code],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=_SECONDS,
    )
    if tried.returncode == 0:
        return ""
    said = tried.stderr.decode(errors="replace").strip()
    found = next(filter(None, (reason.search(said) for reason in _REASONS)), None)
    return found[1].partition(". (")[0].rstrip(".") if found else f"the process ends with {tried.returncode}"
