"""Sessions: what they are asked, how they end, and artifacts whose parts do not fit together."""

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iceformer
from iceformer.deploy.manifest import ArtifactError
from iceformer.deploy.session import Session

from ..test_cli import run
from .spoiling import Edit, edit_header, edit_manifest, put, write_manifest, write_vouched

IDS = np.arange(10, 60)


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(artifact, tmp_path / "artifact")


class TestSpecialTokens:
    @pytest.mark.parametrize(
        ("text", "add", "around"),
        [
            ("Hello", None, (1, 1)),
            ("Hello", True, (1, 1)),
            ("Hello", False, (0, 0)),
            ("<s>Hello", None, (1, 1)),
            ("<s>Hello", True, (2, 1)),
            ("<s>Hello", False, (1, 0)),
            ("<s>Hello</s>", None, (1, 1)),
            ("<s>Hello</s>", True, (2, 2)),
            ("<s>Hello</s>", False, (1, 1)),
            ("<s><s>Hello", None, (2, 1)),
        ],
    )
    def test_those_of_the_text_are_not_added_again(
        self, session: Session, text: str, add: bool | None, around: tuple[int, int]
    ) -> None:
        ids = session.tokenize(text, add_special_tokens=add).tolist()
        before, after = around
        hello = session.tokenize("Hello", add_special_tokens=False).tolist()
        assert ids == [1] * before + hello + [2] * after
        scored = session.score(text, add_special_tokens=add)
        np.testing.assert_array_equal(scored.logprobs, session.score(ids).logprobs)
        assert session.generate(text, 1, add_special_tokens=add).prompt_tokens == len(ids)

    def test_they_are_all_there_is_of_no_text(self, session: Session) -> None:
        assert session.tokenize("").tolist() == [1, 2]
        assert session.tokenize("<s>").tolist() == [1, 2]

    def test_of_the_commands(self, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "text").write_bytes(b"\xef\xbb\xbf<s>Hello there\r\n")
        tokens = [
            json.loads(run(capsys, "score", artifact, tmp_path / "text", "--json", *options)[1])["tokens"]
            for options in ([], ["--special-tokens"], ["--no-special-tokens"])
        ]
        assert tokens[0] + 1 == tokens[1] == tokens[2] + 2


# Wrong types are tried in a process of its own, because the tests check types before the session does.
ASK = """
import json, sys, pathlib, decimal
import numpy as np
import iceformer

session = iceformer.load(sys.argv[1])
def told(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except ValueError as error:
        return str(error)
    except Exception as error:
        return repr(error)
    return "fine"

prompts = [["a", "b"], ("a", "b"), [["a"]], [[1, 2], [3]], np.ones((2, 3), np.int32), b"a", None, {}, 3, {1}, [1.5],
    [2**70], [True], pathlib.Path("a"), object(), [None], "\\ud800", "a\\udcffb"]
found = [told(session.generate, prompt) for prompt in prompts]
options = [{"temperature": value} for value in ("1", [1], float("inf"), 10**400, True, 1j, decimal.Decimal(1))]
options += [{"max_new_tokens": value} for value in ("1", 1.0, -1, True, [1])]
options += [{"seed": value} for value in (None, "1", 1.5, -1, True)]
found += [told(session.generate, [5], **given) for given in options]
good = [{"temperature": None}, {"max_new_tokens": None}, {"temperature": np.float32(0.5)}, {"temperature": 1}]
good += [{"max_new_tokens": np.int64(2)}, {"seed": np.uint8(3)}]
fine = [told(session.generate, [5], **{"max_new_tokens": 1, **given}) for given in good]
fine += [told(session.generate, prompt, 1) for prompt in (np.str_("a"), (5, 6), range(5, 9))]
print(json.dumps([found, fine, told(session.tokenize, 3), told(session.score, ["a", 3])]))
"""


def python(code: str, *arguments: object) -> str:
    """What a script prints."""
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_what_is_no_prompt_is_told_in_a_sentence(artifact: Path) -> None:
    found, fine, tokenized, scored = json.loads(python(ASK, artifact))
    for message in found:
        assert "expected" in message or "call it once for each" in message or "which is not a character" in message
        assert "Error(" not in message
    assert found[0] == "the prompt is a list of 2, and generate continues one prompt: call it once for each"
    assert found[5] == "the prompt is bytes, expected text or token ids: decode it first"
    assert found[6].startswith("the prompt is a NoneType, expected text, or token ids")
    assert set(fine) == {"fine"}
    assert tokenized == "the text is a int, expected a str"
    assert scored.startswith("sequence 1 has shape ()")


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-300, 1e-30])
def test_the_smallest_temperatures_are_greedy(session: Session, temperature: float) -> None:
    greedy = session.generate([5, 6], 8).ids
    for seed in range(3):
        np.testing.assert_array_equal(session.generate([5, 6], 8, temperature, seed).ids, greedy)


def test_a_call_from_the_own_callback_is_refused(session: Session) -> None:
    before = session.score(IDS).logprobs
    calls: list[Callable[[], object]] = [lambda: session.score(IDS), lambda: session.generate([5], 1), session.close]
    for call in calls:

        def ask(done: int, total: int, call: Callable[[], object] = call) -> None:
            call()

        with pytest.raises(RuntimeError, match="while a call of this thread is running"):
            session.score(IDS, progress=ask)
    np.testing.assert_array_equal(session.score(IDS).logprobs, before)
    seen = []
    session.score(IDS, progress=lambda done, total: seen.append(session.tokenize("Hello")))
    assert len(seen) == 2


FORK = """
import os, sys, warnings
warnings.simplefilter("ignore")
import iceformer
session = iceformer.load(sys.argv[1])
session.score([5, 6])
if (child := os.fork()) == 0:
    for call in (lambda: session.score([5, 6]), lambda: session.tokenize("a"), lambda: iceformer.load(sys.argv[1])):
        try:
            call()
        except RuntimeError as error:
            print(error, flush=True)
    session.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
session.score([5, 6])
"""


def test_a_fork_is_told_to_load_anew(artifact: Path) -> None:
    lines = python(FORK, artifact).splitlines()
    assert len(lines) == 3
    assert all('"spawn" or "forkserver"' in line for line in lines)


def test_close_gives_everything_back(copy: Path) -> None:
    session = iceformer.load(copy)
    session.generate("Hello", 2)
    mapped = str(copy / "weights.safetensors")
    assert mapped in Path("/proc/self/maps").read_text()
    with session as same:
        assert same is session
    assert mapped not in Path("/proc/self/maps").read_text()
    session.close()
    for call in (lambda: session.score([5, 6]), lambda: session.generate("a"), lambda: session.tokenize("a")):
        with pytest.raises(RuntimeError, match="the session is closed: load the artifact again"):
            call()
    assert session.info.batch == 1


def test_close_waits_for_the_call_of_another_thread(artifact: Path) -> None:
    session = iceformer.load(artifact)
    begun, closing = threading.Event(), threading.Event()
    scores = []

    def wait(done: int, total: int) -> None:
        begun.set()
        assert closing.wait(60)

    scoring = threading.Thread(target=lambda: scores.append(session.score(IDS, progress=wait)))
    scoring.start()
    assert begun.wait(60)
    closer = threading.Thread(target=session.close)
    closer.start()
    closing.set()
    scoring.join(60)
    closer.join(60)
    assert len(scores) == 1
    with pytest.raises(RuntimeError, match="closed"):
        session.score(IDS)


def test_the_weights_are_in_the_file_that_was_checked(copy: Path, session: Session) -> None:
    """A file of the usual name beside it is not read."""
    weights = copy / "weights.safetensors"
    decoy = bytearray(weights.read_bytes())
    weights.rename(copy / "w.safetensors")
    decoy[-4096:] = bytes(4096)
    weights.write_bytes(decoy)
    edit_manifest(copy, put("w.safetensors", "weights", "file", "path"))
    with iceformer.load(copy) as other:
        np.testing.assert_array_equal(other.score(IDS).logprobs, session.score(IDS).logprobs)


def refused(artifact: Path) -> str:
    """The message with which loading fails, which is one line."""
    with pytest.raises(ArtifactError) as caught:
        iceformer.load(artifact)
    message = str(caught.value)
    assert "\n" not in message
    assert "compile" in message
    return message


def swap_names(manifest: Any) -> None:
    """Two tensors of one shape change places in the manifest."""
    tensors = manifest["weights"]["tensors"]
    names = list(tensors)
    first, second = next(
        (a, b) for a in names for b in names if a < b and tensors[a] == tensors[b] and len(tensors[a]["shape"]) == 2
    )
    other = {first: second, second: first}
    manifest["weights"]["tensors"] = {other.get(name, name): tensors[name] for name in names}


def both(manifest: Any) -> tuple[list[Any], list[Any]]:
    """What the cache has for each layer."""
    cache = manifest["buckets"][0]["cache"]
    return cache["layers"], cache["windows"]


ENTRIES, PLAN = ("buckets", 0, "entries"), ("buckets", 0, "plan")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put(2, "batch"), "as arguments of decode, expected"),
        (put(0, "batch"), "has batch 0"),
        (put(16, "buckets", 0, "chunk"), "as arguments of prefill, expected"),
        (put(128, "buckets", 0, "capacity"), "as a layer of the cache"),
        (put("bfloat16", "dtype"), "has kv_dtype 'float32', expected int8 or its dtype, bfloat16"),
        (put("float99", "dtype"), "has dtype 'float99'"),
        (put(319, "model", "vocab_size"), r"as results of prefill, expected logits \[1, 319\]"),
        (put(None, "model", "vocab_size"), "has model.vocab_size None"),
        (put(32, "model", "max_tokens"), "a model of at most 32 tokens"),
        (put("encoder", "model", "kind"), "has entries"),
        (put([1, 64], *ENTRIES, "score", "arguments", "tokens", "shape"), "as arguments of score"),
        (put("int8", *ENTRIES, "score", "arguments", "tokens", "dtype"), "as arguments of score"),
        (put([1], *ENTRIES, "decode", "results", "logits", "shape"), "as results of decode"),
        (put("bfloat16", *ENTRIES, "decode", "results", "logits", "dtype"), "gives float32 .* says bfloat16"),
        (put("complex64", *ENTRIES, "decode", "results", "logits", "dtype"), "has dtype 'complex64'"),
        (lambda m: [kept.pop() for kept in both(m)], "takes .* arrays, where manifest.json says"),
        (lambda m: [layer.popitem() for layer in m["buckets"][0]["cache"]["layers"]], "without keys and values"),
        (put({"kind": "two_stage", "method": {"name": 3}}, *PLAN, "prompt"), "has a plan that is not an attention"),
        (put({"kind": None}, *PLAN, "decode"), "has a plan that is not an attention"),
        (lambda m: m["buckets"][0]["plan"].pop("decode"), "has a plan that is not an attention"),
        (put(8, "buckets", 0, "cache", "windows", 1), "as a layer of the cache"),
        (lambda m: m["buckets"][0]["cache"]["windows"].pop(), "has a cache of 2 layers and 1 windows"),
        (put(96, "buckets", 0, "cache", "page"), "has pages of 96 tokens, expected a power of two"),
        (put(32, "buckets", 0, "cache", "page"), "as arguments of prefill, expected"),
        (swap_names, "in another order than that of their names"),
        (lambda m: m["weights"]["tensors"].popitem(), "is float32 .*, expected none"),
        (lambda m: m["weights"]["tensors"].update(zzz={"shape": [1], "dtype": "float32"}), "zzz is missing"),
        (lambda m: next(iter(m["weights"]["tensors"].values()))["shape"].reverse(), "does not fit manifest.json"),
        (put("generation_config.json", "weights", "file", "path"), "is not the file that was compiled|lacks"),
        (put("x", "weights", "file", "sha256"), "expected 64 hex digits"),
        (put(10**30, "weights", "file", "size"), r"below 2\^63"),
    ],
)
def test_values_that_do_not_fit_are_refused_at_load(copy: Path, edit: Edit, message: str) -> None:
    edit_manifest(copy, edit)
    assert re.search(message, refused(copy))


def first(header: Any) -> Any:
    """The tensor at the beginning of the file."""
    return next(entry for entry in header.values() if entry["data_offsets"][0] == 0)


def moved(by: int) -> Edit:
    def edit(header: Any) -> None:
        begin, end = first(header)["data_offsets"]
        first(header)["data_offsets"] = [begin + by, end + by]

    return edit


def extended(header: Any) -> None:
    """The last tensor lies beyond the file."""
    last = max(header.values(), key=lambda entry: entry["data_offsets"][1])
    last["data_offsets"] = [offset + 2**40 for offset in last["data_offsets"]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (moved(-64), "without a shape and two data_offsets that are not negative"),
        (moved(64), "leaves a hole|overlaps"),
        (extended, "leaves a hole"),
        (lambda h: first(h).update(data_offsets=[0]), "two data_offsets"),
        (lambda h: first(h).update(data_offsets="0 4"), "two data_offsets"),
        (lambda h: first(h).update(data_offsets=[0, 2.5]), "two data_offsets"),
        (lambda h: first(h).update(shape=[2**62, 2**62]), "of shape"),
        (lambda h: first(h).update(shape=None), "without a shape"),
        (lambda h: first(h).update(dtype="F64"), "of dtype 'F64', expected one of F32"),
        (lambda h: first(h).update(dtype=["F32"]), "of dtype"),
        (lambda h: first(h)["shape"].reverse(), "does not fit manifest.json"),
        (lambda h: h.update(extra=3), "'extra' of dtype"),
        (lambda h: h.update(zzz={"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}), "zzz is int8"),
        (lambda h: h.update(deep=json.loads("[" * 200 + "]" * 200)), "nested too deeply"),
        (lambda h: h.update(nan=float("nan")), "it has NaN"),
    ],
)
def test_weights_that_lie_elsewhere_are_refused(copy: Path, edit: Edit, message: str) -> None:
    edit_header(copy, edit)
    assert re.search(message, refused(copy))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"1234", "names a header of"),
        ((2**60).to_bytes(8, "little") + b"{}", f"names a header of {2**60}"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "names a header of"),
        ((2).to_bytes(8, "little") + b"[]", "is no object"),
        ((2).to_bytes(8, "little") + b"{x", "is not valid JSON"),
        ((2).to_bytes(8, "little") + b"{}", "is missing, expected"),
        ((22).to_bytes(8, "little") + b'{"a":{},"a":{},"b":{}}', "the key 'a' twice"),
    ],
)
def test_headers_that_are_none_are_refused(copy: Path, data: bytes, message: str) -> None:
    write_vouched(copy, "weights.safetensors", data)
    assert message in refused(copy)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 10**6, "nested too deeply"),
        (b'{"schema": NaN}', "it has NaN"),
        (b'{"schema": 4, "schema": 4}', "the key 'schema' twice"),
        (b'{"schema": ' + b"4" * 10**5 + b"}", "an integer of 100000 digits"),
        (b"\xff\xfe{\0}\0", "is not valid JSON"),
        (b"3", "has schema None"),
    ],
)
def test_manifests_that_are_none_are_refused(copy: Path, data: bytes, message: str) -> None:
    write_manifest(copy, data)
    assert message in refused(copy)


@pytest.mark.parametrize("data", [b"", b"[" * 10**6, b"{}", b"\xff", b'{"version": "1.0", "model": null}'])
def test_a_tokenizer_that_is_none_is_named(copy: Path, session: Session, data: bytes) -> None:
    write_vouched(copy, "tokenizer.json", data)
    with iceformer.load(copy) as spoiled:
        with pytest.raises(ArtifactError, match=r"^tokenizer\.json cannot be read \("):
            spoiled.generate("Hello")
        np.testing.assert_array_equal(spoiled.score(IDS).logprobs, session.score(IDS).logprobs)


def test_a_tokenizer_of_another_model_is_named(copy: Path) -> None:
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    added = {"id": 5000, "content": "<far>", "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append({**added, "normalized": False, "special": True})
    tokenizer["model"]["vocab"]["<far>"] = 5000
    write_vouched(copy, "tokenizer.json", json.dumps(tokenizer).encode())
    with (
        iceformer.load(copy) as spoiled,
        pytest.raises(ValueError, match="'<far>' the id 5000, but the model has 320 ids"),
    ):
        spoiled.generate("<far>")
