"""`load` opens an artifact into a session that scores, generates and encodes without tracing or compiling anything.

Imports only jax, numpy and (when text comes in) tokenizers. Everything on the host is numpy: the only things that run
under XLA are the artifact's own entries.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from ..host.environment import check_platforms
from ..host.files import check_absent
from .artifact import TOKENIZER, TOKENIZER_CONFIG, Artifact, Tier, open_artifact
from .chat_template import DEFAULT, ChatTemplate, read_chat_template
from .encoding import Encoding, bucket_for, check_outputs, check_truncate_dim, encode_rows
from .engine import Engine, Event, PromptRead, Request, RequestLost, TokenWritten
from .generation_options import SamplingOptions, choices
from .inputs import TextOptions, check_count, check_ids, choose_prompt, is_nested, read_rows
from .manifest import ENTRIES, FileInfo, Manifest
from .prefix_cache import KeptPiece, PrefixCache
from .prefix_file import fingerprint, read_prefix, write_prefix
from .runner import Runner
from .stream import Generation, Progress, Stream
from .text_stream import TextStream
from .tokenization import Cut, TextTokenizer

Ids = NDArray[np.integer[Any]] | Sequence[int]
Message = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Score:
    """The model's predictions for one sequence of n tokens.

    Attributes:
        logprobs: float32 [n - 1], natural logarithm of the probability of each given next token.
        argmax: int32 [n], the most likely next token at each position.
    """

    logprobs: NDArray[np.float32]
    argmax: NDArray[np.int32]


class Scores(list[Score]):
    """The scores of several sequences. `logprobs` and `argmax` are lists with one array per sequence."""

    @property
    def logprobs(self) -> list[NDArray[np.float32]]:
        """One float32 [n - 1] array for each sequence."""
        return [score.logprobs for score in self]

    @property
    def argmax(self) -> list[NDArray[np.int32]]:
        """One int32 [n] array for each sequence."""
        return [score.argmax for score in self]


class EncodeOptions(TypedDict, total=False):
    """The options of `Session.encode`, which describes them."""

    prompt: str | None
    prompt_name: str | None
    truncate: bool
    truncate_dim: int | None
    outputs: Sequence[str] | None
    add_special_tokens: bool | None
    progress: Progress | None


CACHE_RAM = 1 << 30
"""Bytes of memory for prefixes of prompts, if `load` is told nothing else."""
_NO_FORK = 'start it with the method "spawn" or "forkserver" of multiprocessing instead, and load the artifact there'
_process_of_jax: int | None = None


def load(artifact: str | Path, *, cache_ram: int = CACHE_RAM, max_stall: float | None = None) -> "Session":
    """Opens an artifact written by `iceformer.compile`.

    Every file is checked against the manifest first, and the manifest against the entries and the weights. The folder
    contains machine code: load only artifacts from people you trust. The hashes do not detect an artifact that somebody
    created from scratch with matching hashes: there is no signature.

    The weights stay in their file, which is mapped into memory. While a session is open, never overwrite or truncate
    the artifact's files in place: results would change, or the process would die (SIGBUS). It is safe to write a new
    folder and rename it, or to remove the old one.

    Args:
        artifact: the folder.
        cache_ram: bytes of memory for what prompts leave in the KV cache, in whole pieces, so that later prompts that
            begin alike need not compute it again; 0 for none.
        max_stall: seconds for which reading a prompt may keep other texts from their next tokens, as far as the
            artifact's smallest calls allow; None for as long as a whole call takes, which is fastest.

    Raises:
        FileNotFoundError: the folder does not exist.
        PermissionError: a file cannot be read.
        ArtifactError: a file is missing or was changed, or the artifact cannot be used here at all.
        ValueError: an environment variable keeps jax off the CPU.
        RuntimeError: this process was forked from one that had a session.

    Warns:
        PortableTierWarning: the machine code does not fit this host; its StableHLO is compiled here on first use.
    """
    check_platforms()
    return Session(open_artifact(artifact), check_count(cache_ram, "cache_ram", 0), max_stall)


class Session:
    """An open artifact: machine code and weights in memory, and one KV cache for each bucket that was used.

    Calls from several threads run one after the other. A call that raises or is interrupted leaves the session usable.
    `close`, or the end of a `with` block, frees its memory. A forked child cannot use its parent's session: start the
    child with the multiprocessing method "spawn" or "forkserver", and load the artifact there.

    Attributes:
        info: the manifest.
        tier: "native" if the artifact's machine code runs, "portable" if its StableHLO is compiled here on first use.
    """

    def __init__(self, artifact: Artifact, cache_ram: int, max_stall: float | None = None) -> None:
        self.info: Manifest = artifact.manifest
        self._artifact = artifact
        self._process = _first_process()
        self._runner = Runner(artifact)
        self.tier: Tier = self._runner.tier
        self._prefixes = PrefixCache(cache_ram)
        self._engine = Engine(self._runner, self._prefixes, max_stall)
        self._events: dict[int, deque[Event]] = {}
        self._text_tokenizer: TextTokenizer | None = None
        self._text_cutter: TextTokenizer | None = None
        self._templates: dict[str, ChatTemplate | None] = {}
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._closed = False

    def close(self) -> None:
        """Frees the memory of weights, caches and machine code, after a call that is running has ended.

        Closing twice does nothing. Afterwards every call raises RuntimeError.
        """
        if os.getpid() != self._process or self._closed:
            return
        with self._turn():
            self._closed = True
            self._text_tokenizer, self._text_cutter = None, None
            self._prefixes.clear()
            self._runner.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @overload
    def score(
        self,
        ids: list[str] | Sequence[Ids],
        *,
        add_special_tokens: bool | None = None,
        progress: Progress | None = None,
    ) -> Scores: ...

    @overload
    def score(
        self, ids: str | Ids, *, add_special_tokens: bool | None = None, progress: Progress | None = None
    ) -> Score: ...

    def score(
        self, ids: Any, *, add_special_tokens: bool | None = None, progress: Progress | None = None
    ) -> Score | Scores:
        """Log-probabilities of the given tokens, and the most likely tokens.

        Args:
            ids: token ids as a 1-D integer array or a list of ints, or a text; or a list of these, of any lengths.
            add_special_tokens: for texts, as in `tokenize`.
            progress: called after each chunk with the number of tokens done and the total.

        Returns:
            A `Score`, or `Scores` with one per sequence of a list. The time depends on the true length, rounded up to
            chunks. Logits of at most a few hundred positions are held at once.

        Raises:
            ValueError: an empty sequence, an id outside the vocabulary, more tokens than the largest bucket has, or an
                encoder.
        """
        self._check_entry("score")
        nested = is_nested(ids)
        named = {f"sequence {index}": row for index, row in enumerate(ids)} if nested else {"the sequence": ids}
        rows = [self._read_ids(row, name, add_special_tokens) for name, row in named.items()]
        with self._turn():
            scores = self._score_rows(rows, progress)
        return scores if nested else scores[0]

    @overload
    def generate(
        self,
        prompt: str | Ids,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        *,
        stream: Literal[False] = False,
        add_special_tokens: bool | None = None,
        progress: Progress | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: str | Ids,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        *,
        stream: Literal[True],
        add_special_tokens: bool | None = None,
        progress: Progress | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream: ...

    def generate(
        self,
        prompt: str | Ids,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        *,
        stream: bool = False,
        add_special_tokens: bool | None = None,
        progress: Progress | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | Stream:
        """Continues a prompt.

        What the prompt has in common with an earlier one, in whole pieces, is not computed again, and the text is the
        same to the bit as if it were.

        Args:
            prompt: text, or token ids as a 1-D integer array or list.
            max_new_tokens: maximum number of new tokens; None for what the checkpoint's generation_config.json says,
                or 64.
            temperature: 0 takes the most likely token each time; above 0 samples from softmax(logits / temperature);
                None for what generation_config.json says, or 0.
            seed: random seed for sampling.
            stream: return an iterator over the new tokens, each as soon as it is written, instead of waiting for all.
            add_special_tokens: for a text, as in `tokenize`. By default a prompt from a chat template that begins with
                the beginning-of-sequence token gets no second one.
            progress: called after each chunk with the number of prompt tokens done and the total.
            options: as `SamplingOptions` describes them.

        Raises:
            ValueError: an empty prompt, text for a model without tokenizer, an id outside the vocabulary, more tokens
                than the largest bucket has, an option that makes no sense, or an encoder.
        """
        self._check_entry("decode")
        chosen = choices(self.info.model.generation, max_new_tokens, temperature, seed, options)
        if chosen.stop and not self.has_tokenizer:
            raise ValueError("stop has strings, but this model has no tokenizer: leave it out")
        if is_nested(prompt):
            raise ValueError(
                f"the prompt is a {type(prompt).__name__} of {len(prompt)}, and generate continues one prompt: call it "
                "once for each"
            )
        ids = self._read_ids(prompt, "the prompt", add_special_tokens)
        text = self.text_stream(chosen.stop) if self.has_tokenizer else None
        with self._turn():
            request = Request(ids, chosen.max_new_tokens, chosen.sampling, chosen.logprobs, chosen.speculate)
            handle = self._engine.add(request)
            self._events[handle] = deque()
        written = Stream(partial(self._next_token, handle), partial(self._end, handle), len(ids), text, progress)
        return written if stream else written.wait()

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        *,
        stream: Literal[False] = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        progress: Progress | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        *,
        stream: Literal[True],
        tools: Sequence[Mapping[str, Any]] | None = None,
        progress: Progress | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream: ...

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        *,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        progress: Progress | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Any:
        """Answers the last message of a conversation, which the model's chat template turns into a prompt.

        Args:
            messages: dicts with `role` ("system", "user", "assistant", ...) and `content`, in their order.
            tools: JSON schemas of functions, for models whose template knows of them.
            max_new_tokens, temperature, seed, stream, progress, options: as in `generate`.

        Raises:
            ValueError: as `generate`; an artifact without a chat template; messages that are none.
            ChatTemplateError: a ValueError: the template refuses the messages, or is not fit to be run.
        """
        self._check_entry("decode")
        ids = self.tokenize(self.chat_prompt(messages, tools=tools), add_special_tokens=False)
        return self.generate(ids, max_new_tokens, temperature, seed, stream=stream, progress=progress, **options)

    def chat_prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> str:
        """The prompt that `chat` continues, special tokens included.

        Args:
            messages, tools: as in `chat`.
            variables: others that the template knows, e.g. `enable_thinking`.

        Raises:
            ValueError: as `chat`.
        """
        template = (self._chat_template("tool_use") if tools else None) or self._chat_template(DEFAULT)
        if template is None:
            raise ValueError("this artifact has no chat template: use generate, with a prompt as the model expects it")
        return template.render(messages, tools=tools, **variables)

    def save_prefix(
        self,
        prompt: str | Ids,
        folder: str | Path,
        *,
        room: int = 1024,
        add_special_tokens: bool | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Writes what prefill makes of a prompt, for `load_prefix` of this or a later session.

        Args:
            prompt: text, or token ids.
            folder: the folder to write, which must not exist.
            room: tokens that will follow it, question and answer together. They decide on the bucket.
            add_special_tokens: for a text, as in `tokenize`.
            progress: called after each chunk with the number of tokens done and the total.

        Returns:
            The number of tokens that are kept: those at the end are read again.

        Raises:
            FileExistsError: the folder exists.
            ValueError: as `generate`; a prompt too short.
        """
        self._check_entry("decode")
        check_absent(Path(folder))
        room = check_count(room, "room", 0)
        ids = self._read_ids(prompt, "the prompt", add_special_tokens)
        bucket = bucket_for(self.info, len(ids) + room)
        pieces: list[KeptPiece] = []
        with self._turn():
            while not self._engine.has_room(len(ids) + room):
                self._step()
            for piece in self._engine.prefix(ids, room):
                pieces.append(piece)
                if progress:
                    progress(sum(piece.tokens for piece in pieces), len(ids))
        if not pieces:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, too few to keep: expected more than {bucket.tail}, the smallest "
                "piece that is read at once"
            )
        write_prefix(Path(folder), self.fingerprint, bucket, pieces)
        return sum(piece.tokens for piece in pieces)

    def load_prefix(self, folder: str | Path) -> int:
        """Maps what `save_prefix` wrote, so that prompts that begin with it start behind it.

        While the session is open, never overwrite or truncate the folder's files in place.

        Returns:
            The number of tokens.

        Raises:
            FileNotFoundError: no such folder.
            PrefixError: a ValueError: no prefix, a changed one, or one of another artifact.
        """
        self._check_entry("decode")
        with self._turn():
            tokens, pieces = read_prefix(Path(folder), self.fingerprint, self.info.buckets)
            for piece in pieces:
                self._prefixes.keep(piece)
        return tokens

    @overload
    def encode(
        self,
        inputs: str | tuple[str, str] | NDArray[np.integer[Any]] | list[int],
        **options: Unpack[EncodeOptions],
    ) -> Encoding: ...

    @overload
    def encode(
        self,
        inputs: list[str] | list[tuple[str, str]] | list[NDArray[Any]] | list[list[int]],
        **options: Unpack[EncodeOptions],
    ) -> list[Encoding]: ...

    @overload
    def encode(
        self,
        inputs: Any,
        **options: Unpack[EncodeOptions],
    ) -> Any: ...

    def encode(
        self,
        inputs: Any,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate: bool = True,
        truncate_dim: int | None = None,
        outputs: Sequence[str] | None = None,
        add_special_tokens: bool | None = True,
        progress: Progress | None = None,
    ) -> Encoding | list[Encoding]:
        """Hidden states, and the results of pooler, pooling or task head. For encoders.

        Texts are treated as the files of a sentence embedder or a cross-encoder ask for, as in sentence-transformers:
        the prompt is added before them, and they are truncated at `max_seq_length`. `info.model.text` has these
        settings. Token ids and arrays are used unchanged.

        Args:
            inputs: a text; a pair of texts as a tuple; token ids as a 1-D integer array or list; a dict of arrays under
                the model's input names (`pixel_values`, `input_features`, `input_ids`, ...); or a list of such inputs,
                of any lengths. The arrays of a dict may have a batch dimension, which makes it a list.
            prompt: text to add before each text, or before the first text of a pair; "" for nothing.
            prompt_name: name of one of the model's prompts ("query" and "document" correspond to `encode_query` and
                `encode_document` of sentence-transformers). Without it and `prompt`, the model's default, if it has
                one.
            truncate: whether to truncate a text that is longer than the model's `max_seq_length`, or to raise an error.
            truncate_dim: number of dimensions of a sentence embedding to keep; None for what the model's files say. If
                the model normalises embeddings, it does so before they are truncated.
            outputs: which of `last_hidden_state`, `pooled`, `logits` and `scores` to keep; None for all that the model
                returns. For many texts, keep only what you use: it saves memory.
            add_special_tokens: for texts, as in `tokenize`, except that the default adds all of them.
            progress: called after each call with the number of inputs done and the total.

        Returns:
            An `Encoding`, or a list with one per input. A call takes the time of its bucket, whatever the length.

        Raises:
            ValueError: an empty input, text for a model without tokenizer, an id outside the vocabulary, arrays of
                other names or shapes, more tokens than the largest bucket has, a prompt name that the model does not
                have, a prompt for what is no text, or a decoder.
        """
        self._check_entry("encode")
        kept = check_outputs(outputs, tuple(self.info.buckets[0].entries["encode"].results))
        numbers = check_truncate_dim(truncate_dim, self.info)
        asked = prompt is not None or prompt_name is not None
        front = choose_prompt(self.info, prompt, prompt_name)
        options = TextOptions(front, asked, truncate, add_special_tokens)
        rows, nested = read_rows(inputs, self.info, self._cutting_tokenizer, options)
        with self._turn():
            encodings = encode_rows(rows, self.info, kept, numbers, self._runner.call, progress)
        return encodings if nested else encodings[0]

    def tokenize(self, text: str, *, add_special_tokens: bool | None = None) -> NDArray[np.int32]:
        """Token ids of a text.

        Args:
            text: the text.
            add_special_tokens: None adds the special tokens of the model's tokenizer, except those that the text
                already begins or ends with, so that `<s>Hello` has one `<s>`. True adds all of them, whatever the text
                has. False adds none, as for a prompt from a chat template.

        Raises:
            ValueError: the artifact has no tokenizer, or its tokenizer produces ids that the model does not have; or
                the text has half of a surrogate pair.
        """
        if not isinstance(text, str):
            raise ValueError(f"the text is a {type(text).__name__}, expected a str")
        return self._tokenizer().encode(text, add_special_tokens=add_special_tokens).ids

    def detokenize(self, ids: Ids) -> str:
        """The text of token ids, without special tokens.

        Raises:
            ValueError: the artifact has no tokenizer.
        """
        return self._tokenizer().decode(np.asarray(ids, np.int64).tolist())

    def text_stream(self, stop: Sequence[str] = ()) -> TextStream:
        """The text of token ids that come one at a time, up to a stop string.

        Raises:
            ValueError: the artifact has no tokenizer, or a stop string is empty.
        """
        return TextStream(self._tokenizer(), stop)

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of a token alone, which may be a part of a character; those of its name for a special token.

        Raises:
            ValueError: the artifact has no tokenizer.
        """
        return self._tokenizer().token_bytes(id)

    def count_tokens(self, *texts: str) -> int:
        """How many tokens a text or a pair of texts has, with all special tokens and before anything is cut.

        Raises:
            ValueError: as `tokenize`.
        """
        return len(self._tokenizer().encode(*texts, add_special_tokens=True).ids)

    def is_special(self, id: int) -> bool:
        """Whether a token is a special one, which `detokenize` leaves out.

        Raises:
            ValueError: the artifact has no tokenizer.
        """
        return self._tokenizer().token(id) is None

    @property
    def engine(self) -> Engine:
        """What runs the requests, for a server that takes its steps itself.

        One thread takes them, and calls `encode` between them. Such a session is not asked to `generate`, `chat`,
        `score` or `save_prefix`, which take steps of their own.
        """
        self._check_open()
        return self._engine

    @property
    def prefixes(self) -> PrefixCache:
        """What is kept of earlier prompts."""
        return self._prefixes

    @property
    def fingerprint(self) -> str:
        """What the bits of a text depend on besides prompt and options, as hex."""
        return fingerprint(self._artifact, self.tier)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the artifact has a tokenizer, so that prompts may be text."""
        return self._file(TOKENIZER) is not None

    def _chat_template(self, name: str) -> ChatTemplate | None:
        """A template of the artifact by name, read once."""
        if name not in self._templates:
            self._templates[name] = read_chat_template(self._artifact, name)
        return self._templates[name]

    def _file(self, path: str) -> FileInfo | None:
        return next((file for file in self.info.files if file.path == path), None)

    def _tokenizer(self) -> TextTokenizer:
        self._check_open()
        if self._text_tokenizer is None:
            self._text_tokenizer = self._open_tokenizer(None)
        return self._text_tokenizer

    def _cutting_tokenizer(self) -> TextTokenizer:
        """The tokenizer of what is encoded, which cuts texts where the model's files say so."""
        text = self.info.model.text
        if text is None or text.max_seq_length is None:
            return self._tokenizer()
        self._check_open()
        if self._text_cutter is None:
            self._text_cutter = self._open_tokenizer(Cut(text.max_seq_length, text.truncation_side))
        return self._text_cutter

    def _open_tokenizer(self, cut: Cut | None) -> TextTokenizer:
        file, options = self._file(TOKENIZER), self._file(TOKENIZER_CONFIG)
        if file is None:
            raise ValueError("this model has no tokenizer: use token ids")
        read = self._artifact.read
        content = read(options) if options else None
        return TextTokenizer(read(file), self.info.model.vocab_size, cut, options=content)

    def _read_ids(self, given: Any, what: str, add_special_tokens: bool | None) -> NDArray[np.int32]:
        """Checked token ids of a text or of ids."""
        ids = self.tokenize(given, add_special_tokens=add_special_tokens) if isinstance(given, str) else given
        return check_ids(ids, what, self.info)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The session for this thread alone; waits for other threads."""
        self._check_open()
        if self._thread == threading.get_ident():
            raise RuntimeError(
                "the session is called while a call of this thread is running, from its progress callback or a signal "
                "handler: call it after that one has returned, or load the artifact a second time"
            )
        with self._lock:
            try:
                self._thread = threading.get_ident()
                self._check_open()
                yield
            finally:
                self._thread = None

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"the session was loaded in process {self._process} and this is {os.getpid()}, a fork of it, where its "
                f"threads are missing: {_NO_FORK}"
            )
        if self._closed:
            raise RuntimeError("the session is closed: load the artifact again")

    def _check_entry(self, name: str) -> None:
        model = self.info.model
        if name not in ENTRIES[model.kind]:
            content = {
                "decoder": f"a decoder ({model.model_type}): it can only score and generate",
                "encoder": f"an encoder ({model.model_type}): it can only encode",
            }[model.kind]
            raise ValueError(f"this artifact holds {content}")

    def _end(self, handle: int) -> None:
        """Ends a request, from any thread, at any time."""
        self._engine.cancel(handle)
        self._events.pop(handle, None)

    def _next_token(self, handle: int, told: Callable[[PromptRead], None]) -> TokenWritten:
        """The next token of a request that has not ended; `told` hears of what is read of the prompt before it."""
        events = self._events[handle]
        while True:
            with self._turn():
                if not events:
                    self._step()
                while events:
                    event = events.popleft()
                    if isinstance(event, TokenWritten):
                        return event
                    if isinstance(event, RequestLost):
                        raise RuntimeError(f"the text cannot be continued, because {event.why}")
                    told(event)

    def _step(self) -> None:
        """One step of the engine, whose events are kept for those who follow a request."""
        for event in self._engine.step():
            if event.handle in self._events:
                self._events[event.handle].append(event)

    def _score_rows(self, rows: list[NDArray[np.int32]], progress: Progress | None) -> Scores:
        scores = Scores()
        done, total = 0, sum(len(row) for row in rows)
        for row in rows:
            while not self._engine.has_room(len(row)):
                self._step()
            logprobs, argmax = [], []
            for end, chunk_logprobs, chunk_argmax in self._engine.score(row):
                logprobs.append(chunk_logprobs)
                argmax.append(chunk_argmax)
                if progress:
                    progress(done + min(len(row), end), total)
            done += len(row)
            scores.append(Score(np.concatenate(logprobs)[: len(row) - 1], np.concatenate(argmax)[: len(row)]))
        return scores


def _first_process() -> int:
    """This process; RuntimeError if it is a fork of one that had a session, because XLA's threads are not in it."""
    global _process_of_jax
    here = os.getpid()
    if _process_of_jax not in (None, here):
        raise RuntimeError(f"this process was forked from one that had a session ({_process_of_jax}): {_NO_FORK}")
    _process_of_jax = here
    return here
