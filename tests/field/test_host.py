"""Terminal, text files, JSON and Ctrl-C: what comes from outside, and what the process around the package does."""

import importlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import iceformer
from iceformer.host import interrupts, strict_json, text
from iceformer.host.files import replacing
from iceformer.host.messages import printable, printable_message
from iceformer.host.terminal import Description, Terminal

PACKAGE = Path(iceformer.__file__).resolve().parent
ODD = "a[v1] [red]b[/red] :smile: \x1b[31mc\x07 \u202ed \x9b2J \udcff"
SHOWN = "a[v1] [red]b[/red] :smile: \\x1b[31mc\\x07 \\u202ed \\x9b2J \\udcff"


def printed(renderable: object) -> str:
    file = io.StringIO()
    Terminal(file=file, width=200, force_terminal=True, color_system=None).print(renderable)
    return file.getvalue()


def test_what_is_printed_is_neither_markup_nor_a_command() -> None:
    table = Table(title=ODD, caption=ODD)
    table.add_column(ODD)
    table.add_row(ODD)
    for renderable, times in ((ODD, 1), (table, 4)):
        found = printed(renderable)
        assert found.count(SHOWN) == times
        assert "\x1b[3" not in found
    assert "\x1b" not in printed(Text(ODD))


def test_descriptions_of_progress_are_printed_as_they_are() -> None:
    file = io.StringIO()
    console = Terminal(file=file, width=200, force_terminal=True, color_system=None)
    with Progress(Description(), console=console, auto_refresh=False) as bar:
        bar.add_task(ODD, total=1)
    assert SHOWN in file.getvalue()


def test_names_have_no_lines_and_lists_of_problems_do() -> None:
    assert printable("a\nb\r\tc") == "a\\nb\\r\\tc"
    assert printable_message("found:\n  one\n  two\nthree\u2028") == "found:\n  one\n  two\\nthree\\u2028"
    assert printable("日本語 Ünïcödé 👍") == "日本語 Ünïcödé 👍"


def test_a_line_that_was_left_open_is_ended_once() -> None:
    file = io.StringIO()
    console = Terminal(file=file)
    console.end_line()
    console.print("half a line", end="")
    console.end_line()
    console.end_line()
    console.print("a word")
    console.end_line()
    assert file.getvalue() == "half a line\na word\n"


def test_all_printing_goes_through_the_terminal() -> None:
    """Rich's own consoles read markup in whatever they print."""
    own = re.compile(r"from rich[.\w]* import [^\n]*\b(Console|Progress|TextColumn|track|print)\b")
    folders = ("attention", "convert", "deploy", "evaluate", "host", "model")
    files = [PACKAGE / "cli.py", *(file for folder in folders for file in (PACKAGE / folder).rglob("*.py"))]
    assert [file.name for file in files if own.search(file.read_text(encoding="utf-8"))] == ["terminal.py"]


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"\n", []),
        (b"a", ["a"]),
        (b"a\n", ["a"]),
        (b"a\n\n", ["a", ""]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"\xef\xbb\xbfa\nb", ["a", "b"]),
        (
            "a\u2028b\u2029c\u0085d\x0ce\x0bf\x1cg\x1dh\x1ei\rj\n".encode(),
            ["a\u2028b\u2029c\u0085d\x0ce\x0bf\x1cg\x1dh\x1ei\rj"],
        ),
        ("a\ufeffb\n".encode(), ["a\ufeffb"]),
    ],
)
def test_lines_end_at_line_feeds_only(data: bytes, lines: list[str]) -> None:
    assert text.lines_of(text.decode(data, "file")) == lines


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("é".encode("latin-1"), "f is not UTF-8 text: it has the byte 0xe9 at offset 0; save it as UTF-8"),
        (b"\xef\xbb\xbfab\xff", "the byte 0xff at offset 5"),
        (b"ab\xc3", "the byte 0xc3 at offset 2"),
        (b"\xed\xa0\x80", "the byte 0xed at offset 0"),
        ("hé".encode("utf-16"), "f is UTF-16 text, expected UTF-8: .*`iconv -f UTF-16 -t UTF-8`"),
        ("hé".encode("utf-32"), "f is UTF-32 text"),
        ("hi".encode("utf-16-le"), "f has a zero byte at offset 1: it is no text, or in UTF-16"),
    ],
)
def test_other_encodings_are_refused_by_name_and_place(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text.decode(data, "f")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 500 + b"]" * 500, "nested too deeply"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested too deeply"),
        (b"[NaN]", "it has NaN"),
        (b"[-Infinity]", "it has -Infinity"),
        (b"[1e999]", "it has 1e999, which is too large"),
        (b"[" + b"9" * 5000 + b"]", "an integer of 5000 digits"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' twice"),
        (b'{"c": 1, "c": 2}', "two values for 'c'"),
        (b"\xff", "f is not valid JSON"),
        (b"\xef\xbb\xbf{}", "f is not valid JSON"),
        (b"", "f is not valid JSON"),
        (b"{} {}", "f is not valid JSON"),
    ],
)
def test_json_that_could_mean_nothing_or_two_things(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        strict_json.parse(data, "f")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_bytes(b"old")

    def write(data: bytes, error: BaseException | None) -> None:
        with replacing(file) as opened:
            opened.write(data)
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write(b"half", KeyboardInterrupt())
    assert (file.read_bytes(), list(tmp_path.iterdir())) == (b"old", [file])
    write(b"new", None)
    assert (file.read_bytes(), list(tmp_path.iterdir())) == (b"new", [file])


def test_a_full_disk_is_named() -> None:
    """/dev/full takes no byte."""
    with (
        pytest.raises(OSError, match=r"No space left on device: '/dev/full'") as caught,
        replacing(Path("/dev/full")) as out,
    ):
        out.write(b"x" * 100_000)
    assert caught.value.filename == "/dev/full"


def test_ctrl_c_in_a_destructor_is_raised_soon_or_at_the_next_step() -> None:
    class Deaf:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            list(range(10))  # where Python handles the signal

    steps = []

    def work() -> None:
        with interrupts.interruptible():
            Deaf()
            steps.append(1)
            interrupts.check()
            steps.append(2)

    def work_without_steps() -> None:
        with interrupts.interruptible():
            Deaf()
            steps.append(3)
            while time.monotonic() < end:
                pass
            steps.append(4)

    end = time.monotonic() + 30
    for attempt in (work, work_without_steps):
        with pytest.raises(KeyboardInterrupt):
            attempt()
    assert steps == [1, 3]


def test_ctrl_c_waits_for_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["import os, signal", "os.kill(os.getpid(), signal.SIGINT)", "whole = sum(range(100))"]
    (tmp_path / "interrupted_module.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)

    def work() -> None:
        with interrupts.interruptible():
            importlib.import_module("interrupted_module")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert sys.modules.pop("interrupted_module").whole == 4950


def test_ctrl_c_under_a_broad_except_is_raised_at_the_end() -> None:
    def work() -> None:
        with interrupts.interruptible(), interrupts.interruptible(), suppress(BaseException):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        work()
    interrupts.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_handles_ctrl_c_keeps_doing_so() -> None:
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with interrupts.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [1]


def command(*arguments: object, environment: dict[str, str] | None = None, stdin: bytes = b"") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "iceformer.cli", *map(str, arguments)],
        env=os.environ | (environment or {}),
        input=stdin,
        capture_output=True,
        check=False,
        timeout=120,
    )
    return result.returncode, result.stdout.decode(), result.stderr.decode()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("JAX_PLATFORMS", "cuda", "JAX_PLATFORMS is 'cuda', but iceformer runs on the CPU: set it to cpu or unset it"),
        ("JAX_PLATFORMS", "tpu,cpu", "JAX_PLATFORMS is 'tpu,cpu', with which jax does not start (Unable to"),
        ("XLA_FLAGS", "--xla_nonsense=1", "XLA_FLAGS is '--xla_nonsense=1', which XLA cannot use (Unknown flag"),
        ("XLA_FLAGS", "nowhere", "XLA_FLAGS is 'nowhere', which XLA cannot use (Could not open file"),
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math=x", "(Couldn't interpret value x for flag xla_cpu_enable_fast_math)"),
        ("XLA_FLAGS", "--xla_cpu_max_isa=MMX", "which names the instruction set 'MMX', expected one of: SSE4_2"),
        ("NPROC", "many", "NPROC is 'many', expected a number of threads from 1 to"),
        ("ICEFORMER_KERNELS", "libc.so.6", "ICEFORMER_KERNELS is 'libc.so.6', but there is no such file"),
    ],
)
def test_variables_that_jax_cannot_use_are_named(artifact: Path, variable: str, value: str, message: str) -> None:
    code, out, err = command("inspect", artifact, environment={variable: value})
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ")
    assert message in err


def test_a_library_that_is_not_ours_is_refused_by_name(artifact: Path) -> None:
    others = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libc.so.6" in line]
    code, out, err = command("inspect", artifact, environment={"ICEFORMER_KERNELS": others[0]})
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "which is not a build of these kernels (it lacks iceformer_version" in err


def interrupted(checkpoint: Path, target: Path, seconds: float) -> tuple[int | None, str]:
    """Exit code and last line of stderr of a compile that is sent SIGINT after so many seconds; None if it was done."""
    options = ["--buckets", "32,64", "--chunk", "32", "--attention", "two_stage", "--method", "mean_pool"]
    # A process in the background may have been told to ignore the signal, and its children with it.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; from iceformer.__main__ import main; print(flush=True); main()"
    arguments = [sys.executable, "-c", code, "compile", str(checkpoint), str(target), *options]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # Python has started, which takes its time on a busy machine.
    try:
        process.wait(seconds)
        return None, ""
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    return process.returncode, err.decode().strip().rpartition("\n")[2]


def test_ctrl_c_ends_a_compile(artifact: Path, tmp_path: Path) -> None:
    code, last = interrupted(artifact.parent / "checkpoint", tmp_path / "new" / "artifact", 3.0)
    assert (code, last) == (130, "interrupted")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_ends_a_compile_at_any_moment(artifact: Path, tmp_path: Path) -> None:
    """Each is interrupted, with nothing left, or was done and is whole."""
    random = np.random.default_rng(int(os.environ.get("ICEFORMER_TEST_SEED", "0")))
    outcomes = set()
    for index, seconds in enumerate(random.uniform(0.5, 12, 40)):
        folder = tmp_path / str(index)
        code, last = interrupted(artifact.parent / "checkpoint", folder / "artifact", float(seconds))
        outcomes.add(code)
        if code is None:
            iceformer.load(folder / "artifact").close()
        else:
            assert (code, last) == (130, "interrupted"), seconds
            assert not folder.exists() or iceformer.load(folder / "artifact")
    assert 130 in outcomes
