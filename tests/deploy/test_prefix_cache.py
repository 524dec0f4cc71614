"""A prompt that begins as an earlier one starts behind their common chunks, with the same bits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

import iceformer
from iceformer.attention import Attention
from iceformer.deploy.artifact import Artifact, open_artifact
from iceformer.deploy.engine import Engine, PromptRead, Request, RequestLost, TokenWritten
from iceformer.deploy.manifest import tail_of
from iceformer.deploy.prefix_cache import KeptPiece, PrefixCache, piece_keys, tokens_behind
from iceformer.deploy.runner import Runner

from ..few import few
from .conftest import TWO_STAGE, VOCABULARY
from .test_session import greedy

CHUNK = 32
LARGE = 1 << 30


def prompt(seed: int, length: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(4, VOCABULARY, length).astype(np.int32)


@pytest.fixture(scope="module")
def artifacts(
    checkpoint: Path, exact_256_artifact: Path, paged_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("prefixes")
    made = {"exact": exact_256_artifact, "pages": paged_artifact}
    options = {"whole slots": {}, "int8": {"kv_dtype": "int8"}}

    def artifact(name: str) -> Path:
        if name in made:
            return made[name]
        path = folder / name
        if not path.exists():
            iceformer.compile(checkpoint, path, buckets=(256,), attention=TWO_STAGE, chunk=CHUNK, **options[name])
        return path

    return artifact


def run(engine: Engine, *requests: Request) -> tuple[list[list[int]], list[int]]:
    """What is written, and how much of each prompt was restored."""
    handles = [engine.add(request) for request in requests]
    written: dict[int, list[int]] = {handle: [] for handle in handles}
    restored = dict.fromkeys(handles, 0)
    while engine.busy:
        for event in engine.step():
            assert not isinstance(event, RequestLost)
            if isinstance(event, TokenWritten):
                written[event.handle].append(event.id)
            elif isinstance(event, PromptRead):
                restored[event.handle] = event.restored
    return list(written.values()), list(restored.values())


def cache_bits(engine: Engine, tokens: int) -> list[bytes]:
    """The keys and values of the first tokens of the first slot."""
    bucket = engine._info.buckets[0]
    views = engine._runner.cache_views(bucket)
    if bucket.cache.page:
        return [view[: tokens // bucket.cache.page].tobytes() for layer in views for view in layer.values()]
    return [layer[name][0, :, :tokens].tobytes() for layer in views for name in ("key", "value")]


@pytest.mark.parametrize("memory", few(["whole slots", "pages", "exact", "int8"], ["pages", "exact"]))
def test_a_restored_prefix_has_the_same_bits(artifacts: Callable[[str], Path], memory: str) -> None:
    document = prompt(0, 160)
    first, second = (np.concatenate([document, prompt(seed, 21)]) for seed in (1, 2))
    artifact = open_artifact(artifacts(memory))
    plain, caching = Engine(Runner(artifact)), Engine(Runner(artifact), PrefixCache(LARGE))
    run(caching, Request(first, 8))
    expected, none = run(plain, Request(second, 24))
    written, restored = run(caching, Request(second, 24))
    assert none == [0]
    assert restored == [160], "every chunk of the document, none of which is computed again"
    assert written == expected
    assert cache_bits(caching, 128) == cache_bits(plain, 128)


def test_the_whole_prompt_again_computes_its_last_tokens_only(artifacts: Callable[[str], Path]) -> None:
    for name in ("exact", "pages"):
        artifact = open_artifact(artifacts(name))
        engine, ids = Engine(Runner(artifact), PrefixCache(LARGE)), prompt(3, 192)
        (before,), _ = run(engine, Request(ids, 6))
        (after,), (restored,) = run(engine, Request(ids, 6))
        assert after == before
        behind = tokens_behind(artifact.manifest.buckets[0])
        assert restored == (192 - behind) // CHUNK * CHUNK >= 128


def test_chunks_near_the_end_of_a_prompt_are_not_kept(artifacts: Callable[[str], Path]) -> None:
    """With `exact_last_block` their bits depend on where the prompt ends."""
    artifact = open_artifact(artifacts("pages"))
    plain, caching = Engine(Runner(artifact)), Engine(Runner(artifact), PrefixCache(LARGE))
    for length in range(160, 200, 3):
        ids = prompt(4, length)
        assert run(caching, Request(ids, 5))[0] == run(plain, Request(ids, 5))[0]


def test_a_larger_bucket_goes_on_from_what_a_smaller_one_read(exact_artifact: Path) -> None:
    artifact = open_artifact(exact_artifact)
    plain, caching = Engine(Runner(artifact)), Engine(Runner(artifact), PrefixCache(LARGE))
    begin = prompt(11, 50)
    (answer,), _ = run(caching, Request(begin, 8))
    longer = np.concatenate([begin, np.array(answer, np.int32), prompt(12, 20)])
    assert len(begin) + 8 <= artifact.manifest.buckets[0].capacity < len(longer)
    expected, _ = run(plain, Request(longer, 12))
    assert run(caching, Request(longer, 12)) == (expected, [32])


def test_buckets_that_read_otherwise_share_nothing(exact_artifact: Path) -> None:
    small, large = open_artifact(exact_artifact).manifest.buckets
    other = replace(large, plan={**large.plan, "prompt": {"kind": "two_stage", "query_block": 1}})
    ids = prompt(13, 60)
    keys, same, others = (piece_keys(bucket, ids, bucket.piece_sizes(60)) for bucket in (small, large, other))
    assert keys == same
    assert keys
    assert not set(keys) & set(others)


def test_requests_at_once_share_what_the_first_read(artifacts: Callable[[str], Path]) -> None:
    engine = Engine(Runner(open_artifact(artifacts("pages"))), PrefixCache(LARGE))
    document = prompt(5, 128)
    requests = [Request(np.concatenate([document, prompt(seed, 30)]), 5) for seed in (6, 7)]
    written, restored = run(engine, *requests)
    assert restored == [0, 128]
    alone = Engine(Runner(open_artifact(artifacts("pages"))))
    assert written == [run(alone, request)[0][0] for request in requests]


@pytest.mark.parametrize(
    "attention", few([iceformer.Exact(), TWO_STAGE], [iceformer.Exact()]), ids=["exact", "two stage"]
)
def test_a_prompts_end_is_read_and_kept_in_smaller_pieces(
    checkpoint: Path, tmp_path: Path, reference: LlamaForCausalLM, attention: Attention
) -> None:
    path = iceformer.compile(checkpoint, tmp_path / "artifact", buckets=(512,), chunk=256, attention=attention)
    artifact = open_artifact(path)
    (bucket,) = artifact.manifest.buckets
    assert (bucket.chunk, bucket.tail) == (256, 128)
    assert bucket.piece_sizes(410) == [256, 128, 128]
    assert bucket.piece_sizes(512) == bucket.piece_sizes(481) == [256, 256]
    assert bucket.piece_sizes(480) == [256, 128, 128]
    document = prompt(9, 390)
    first, second, longer = (
        np.concatenate([document, prompt(seed, extra)]) for seed, extra in ((1, 20), (2, 40), (3, 122))
    )
    plain, caching = Engine(Runner(artifact)), Engine(Runner(artifact), PrefixCache(LARGE))
    run(caching, Request(first, 3))
    for asked, kept, new in ((second, 384, 12), (longer, 256, 1)):
        written, (restored,) = run(caching, Request(asked, new))
        assert written == run(plain, Request(asked, new))[0]
        assert restored == kept
    _check_pieces(artifact, prompt(10, 500))
    if attention == iceformer.Exact():
        with iceformer.load(path) as session:
            assert session.generate(second, 8).ids.tolist() == greedy(reference, second.astype(np.int64), 8)


def _check_pieces(artifact: Artifact, ids: NDArray[np.int32]) -> None:
    """A bound that no chunk holds: small pieces leave the same bits, are found again, and go on from whole chunks."""
    request, prefixes = Request(ids, 10), PrefixCache(LARGE)
    plain, bounded = Engine(Runner(artifact)), Engine(Runner(artifact), prefixes, max_stall=1e-9)
    expected, _ = run(plain, request)
    handle, read = bounded.add(request), list[int]()
    for _ in range(4):
        read += [event.done for event in bounded.step() if isinstance(event, PromptRead)]
    assert read == [128, 256, 384, 500]
    bounded.cancel(handle)
    assert run(bounded, request) == (expected, [384])
    assert cache_bits(bounded, 500) == cache_bits(plain, 500)
    wholes = PrefixCache(LARGE)
    run(Engine(Runner(artifact), wholes), request)
    assert run(Engine(Runner(artifact), wholes, max_stall=1e-9), request) == (expected, [256])
    assert run(Engine(Runner(artifact), prefixes), request) == (expected, [384])


@pytest.mark.parametrize(("chunk", "tail"), [(2048, 128), (256, 128), (255, 255), (32, 32), (1000, 125), (1021, 1021)])
def test_the_size_of_the_last_pieces(chunk: int, tail: int) -> None:
    assert tail_of(chunk) == tail


def test_other_tokens_share_nothing(artifacts: Callable[[str], Path]) -> None:
    bucket = open_artifact(artifacts("exact")).manifest.buckets[0]
    ids = prompt(8, 100)
    other = ids.copy()
    other[40] += 1
    keys, others = (piece_keys(bucket, row, bucket.piece_sizes(100)) for row in (ids, other))
    assert len(keys) == 3
    assert keys[0] == others[0]
    assert not set(keys[1:]) & set(others[1:])
    assert piece_keys(bucket, ids[:33], bucket.piece_sizes(33))[0] == keys[0]
    assert piece_keys(bucket, ids[:32], bucket.piece_sizes(32)) == []


def piece(name: str, size: int, *, mapped: bool = False) -> KeptPiece:
    return KeptPiece(name.encode(), size, ({"key": np.zeros(size, np.int8)},), mapped)


def test_what_was_used_longest_ago_leaves_first_and_ends_before_beginnings() -> None:
    cache = PrefixCache(100)
    for name in "abc":
        cache.keep(piece(name, 30), [other.encode() for other in "abc"[: "abc".index(name)]])
    cache.keep(piece("x", 30))
    assert [name for name in "abcx" if name.encode() in cache] == ["a", "b", "x"]
    cache.find([b"a", b"b"])
    cache.keep(piece("y", 30))
    assert [name for name in "abcxy" if name.encode() in cache] == ["a", "b", "y"]
    assert cache.size_in_bytes == 90


def test_a_prompt_beyond_the_limit_keeps_its_beginning() -> None:
    cache = PrefixCache(100)
    cache.keep(piece("a", 60))
    assert not cache.has_room(60, [b"a"])
    assert cache.has_room(60, [])
    assert not PrefixCache(0).has_room(1, [])


def test_mapped_chunks_take_nothing_of_the_limit() -> None:
    cache = PrefixCache(10)
    cache.keep(piece("m", 1000, mapped=True))
    cache.keep(piece("a", 10))
    cache.keep(piece("b", 10))
    assert [name for name in "mab" if name.encode() in cache] == ["m", "b"]
    assert cache.size_in_bytes == 10
    cache.clear()
    assert b"m" not in cache
