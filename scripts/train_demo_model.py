"""Train the small long-context retrieval model of demo/model on a CPU.

The demonstration needs a model that is small enough for any machine and yet really uses a context of 16k tokens:
this one finds a line of a long record by its key and copies the line's value (LongEval's line retrieval, see
iceformer.evaluate.line_retrieval). It is a Llama of 2.5 million parameters, trained from nothing in less than two hours
on two cores.

Plain training on records stays at chance for very long: the model copies any value it has seen.  Two auxiliary losses
take it off that plateau within 250 steps, on a stream of (key, value) pairs:

* a throw-away linear head has to read the *previous token* from the first layer's output;
* the attention of the last layer, where an answer is due, has to fall on the places that hold the answer.

Then come records, longer and longer; a stage ends when its answers are right often enough.  Shorter sequences have
positions that jump at line ends, so that all distances of the context are known before long sequences are met.

The committed model was made with seed 0 by

    OMP_NUM_THREADS=2 python scripts/train_demo_model.py --seed 0 --words middlemarch.txt war-and-peace.txt

where the two texts are those of Project Gutenberg, and measured by

    python scripts/train_demo_model.py --evaluate 200_lines.jsonl 600_lines.jsonl \\
        --words middlemarch.txt war-and-peace.txt --generated 50

with LongEval's published cases, which nothing of the training has seen.  demo/model/README.md has the results, and
says in what the run differed from an uninterrupted one.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb, repeat_kv

from iceformer.evaluate.line_retrieval import (
    ANSWER_PREFIX,
    CLOSING,
    INTRODUCTION,
    QUESTION,
    Record,
    make_record,
    pseudo_words,
    words_of_text,
)

log = logging.getLogger("train_demo_model")

CONTEXT = 16384
VOCABULARY = 4096
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
LINE_END = "Ċ"  # a line feed, as byte-level BPE writes it
# Digits in runs of up to three; a word takes the space or hyphen before it; punctuation and line ends stand alone.
SPLIT = r"\p{N}{1,3}|[ -]?[\p{L}\p{M}_]+| ?[^\s\p{L}\p{M}\p{N}_]|\n|[^\S\n]+"
VALUE = re.compile(r"line (\S+): REGISTER_CONTENT is <(\d+)>")
TOKENS_A_LINE = 15


@dataclass(frozen=True)
class Stage:
    """One kind of sequence, trained until its accuracy passes ``until`` or for ``steps`` steps at most."""

    name: str
    tokens: int  # length of a sequence
    batch: int
    steps: int
    rate: tuple[float, float]  # learning rate at the first and at the last of the steps
    until: float
    keys: int = 0  # a stream of pairs with so many different keys instead of records
    values: int = 0  # and so many different values
    previous: float = 0.0  # weight of the auxiliary loss on the previous token
    match: float = 0.0  # weight of the auxiliary loss on the last layer's attention
    jumps: float = 0.0  # part of the sequences whose positions jump at line ends, to span the context


STAGES = (
    Stage("pairs", 64, 16, 1000, (1e-3, 1e-3), 0.95, keys=32, values=128, previous=1.0, match=1.0),
    Stage("records-128", 128, 16, 4000, (1e-3, 1e-3), 0.70, previous=0.3, match=1.0),
    Stage("records-256", 256, 16, 4000, (1e-3, 1e-3), 0.90, previous=0.1, match=1.0),
    Stage("records-512", 512, 8, 4000, (1e-3, 1e-3), 0.92, match=1.0, jumps=0.5),
    Stage("records-1024", 1024, 4, 4000, (1e-3, 1e-3), 0.92, match=0.5, jumps=0.5),
    Stage("records-2048", 2048, 2, 250, (1e-3, 1e-3), 0.94, match=0.5, jumps=0.5),
    Stage("records-4096", 4096, 1, 320, (1e-3, 6e-4), 0.97, match=0.5, jumps=0.5),
    Stage("records-8192", 8192, 1, 90, (6e-4, 2e-4), 0.98, match=0.5, jumps=0.3),
    Stage("records-16384", 16384, 1, 75, (2e-4, 0.0), 2.0, match=0.5),
    Stage("records-16384 again", 16384, 1, 28, (3e-4, 0.0), 2.0, match=0.5),
)


# --------------------------------------------------------------------------------------------- model and tokenizer


def configuration() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        # slow rotations keep their sense over the whole context
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        initializer_range=0.06,  # about 1 / sqrt(hidden_size)
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def train_tokenizer(rng: np.random.Generator, words: Sequence[str]) -> Tokenizer:
    """Byte-level BPE over keys made of ``words``; every run of one to three digits becomes a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    numbers = [f"{number:0{width}d}" for width in (1, 2, 3) for number in range(10**width)]

    def corpus() -> Iterator[str]:
        for _ in range(200):  # often enough that no piece of a word comes before a number
            yield INTRODUCTION + CLOSING + QUESTION.format(key="a-b") + ANSWER_PREFIX.format(key="a-b")
            yield " ".join(numbers)
            yield " <" + " <".join(numbers)
        for _ in range(3):
            order = rng.permutation(len(words))
            yield from (f" {words[a]}-{words[b]}" for a, b in zip(order, order[::-1], strict=True))

    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    missing = [number for number in numbers if tokenizer.token_to_id(number) is None]
    if missing:
        raise RuntimeError(f"numbers without a token of their own: {missing[:5]}")
    return tokenizer


def training_words(rng: np.random.Generator, files: Sequence[Path]) -> tuple[list[str], list[str]]:
    """The words of the given texts, and as many made-up words (20000 without texts)."""
    english = sorted({word for path in files for word in words_of_text(path.read_text(encoding="utf-8"))})
    return english, pseudo_words(rng, len(english) or 20000)


# ------------------------------------------------------------------------------------------------------- sequences


@dataclass
class Batch:
    tokens: Tensor  # (batch, length)
    positions: Tensor  # (batch, length)
    graded: Tensor  # (n, 2): row and index of every token of an answer
    answer: Tensor  # (n,): number of the answer that the graded token belongs to
    labels: Tensor  # (batch, length): the same for the same place of the same key's value, or -1


def pairs_batch(rng: np.random.Generator, stage: Stage) -> Batch:
    """Streams of (key, value) pairs; the values of keys that come again are graded."""
    pairs, different = stage.tokens // 2, stage.tokens // 8
    ordinary = np.random.default_rng(0).permutation(np.arange(3, VOCABULARY))
    keys, values = ordinary[: stage.keys], ordinary[stage.keys : stage.keys + stage.values]
    tokens = np.empty((stage.batch, pairs, 2), np.int64)
    labels = np.full((stage.batch, pairs, 2), -1)
    graded = []
    for row in range(stage.batch):
        which = rng.integers(different, size=pairs)
        tokens[row, :, 0] = rng.choice(keys, size=different, replace=False)[which]
        tokens[row, :, 1] = rng.choice(values, size=different, replace=False)[which]
        labels[row, :, 1] = which
        again = np.ones(pairs, bool)
        again[np.unique(which, return_index=True)[1]] = False
        graded += [(row, 2 * index + 1) for index in np.flatnonzero(again)]
    starts = rng.integers(CONTEXT - stage.tokens, size=(stage.batch, 1))
    return Batch(
        torch.from_numpy(tokens.reshape(stage.batch, -1)),
        torch.from_numpy(starts + np.arange(stage.tokens)),
        torch.tensor(graded),
        torch.arange(len(graded)),
        torch.from_numpy(labels.reshape(stage.batch, -1)),
    )


def sample_record(rng: np.random.Generator, tokens: int, words: Sequence[str]) -> Record:
    """A record of about ``tokens`` tokens, in one of the layouts that the model should know."""
    introduction = tokens >= 512 and bool(rng.random() < 0.5)
    room = (tokens - 110 * introduction) / TOKENS_A_LINE
    sentences = float(rng.choice([0.0, 0.0, 0.1, 1.0]))
    cost = 1 + 1.3 * sentences  # lines' worth of tokens that a question takes
    if rng.random() < 0.4:  # questions all along the record
        asked = float(np.exp(rng.uniform(np.log(0.3), np.log(2.0))))
        lines = max(4, int(room / (1 + asked * cost)))
        return make_record(rng, lines, words, asked=asked, closing=0, sentences=sentences, introduction=introduction)
    # LongEval's layout, but with many questions after the record
    part = float(np.exp(rng.uniform(np.log(0.1), np.log(0.6))))
    return make_record(
        rng,
        max(4, int(room * (1 - part)) - 2),
        words,
        asked=float(rng.choice([0.0, 0.1])),
        closing=max(1, int(room * part / cost)),
        sentences=sentences,
        introduction=introduction,
    )


def jumping_positions(rng: np.random.Generator, line_ends: np.ndarray, length: int) -> np.ndarray:
    """Positions for ``length`` tokens that leave gaps after some line ends, so that they span up to the context."""
    steps = np.ones(length, np.int64)
    steps[0] = 0
    spare = int(rng.integers(CONTEXT - length + 1))
    places = line_ends[line_ends < length - 1] + 1
    if spare and len(places):
        places = rng.choice(places, size=min(len(places), int(rng.integers(1, 17))), replace=False)
        shares = rng.dirichlet(np.ones(len(places) + 1))[1:]
        steps[places] += np.floor(shares * spare).astype(np.int64)
    positions = np.cumsum(steps)
    return positions + int(rng.integers(CONTEXT - positions[-1]))


def answer_spans(starts: np.ndarray, spans: Sequence[tuple[int, int]]) -> list[range]:
    """The tokens of every answer: its digits, the closing ">" and the line end, from the spans of the digits."""
    return [
        range(int(first), int(last) + 2)
        for first, last in zip(*np.searchsorted(starts, np.asarray(spans).T), strict=True)
    ]


def records_batch(rng: np.random.Generator, stage: Stage, tokenizer: Tokenizer, words: Sequence[str]) -> Batch:
    """Records cut or filled up to the length; the answers of their questions are graded."""
    shape = (stage.batch, stage.tokens)
    tokens = np.full(shape, tokenizer.token_to_id(PAD))
    labels = np.full(shape, -1)
    positions = np.tile(np.arange(stage.tokens), (stage.batch, 1))
    graded, answer, answers = [], [], 0
    for row in range(stage.batch):
        record = sample_record(rng, stage.tokens, words)
        encoding = tokenizer.encode(record.text)
        starts = np.asarray([start for start, _ in encoding.offsets])
        ids = encoding.ids[: stage.tokens]
        tokens[row, : len(ids)] = ids

        names: dict[str, int] = {}
        found = list(VALUE.finditer(record.text))
        for match, span in zip(found, answer_spans(starts, [match.span(2) for match in found]), strict=True):
            for place, index in enumerate(span):
                if index < len(ids):
                    labels[row, index] = names.setdefault(match[1], len(names)) * 8 + place
        if record.questions:
            for span in answer_spans(starts, [(question.start, question.end) for question in record.questions]):
                if span.stop <= len(ids):
                    graded += [(row, index) for index in span]
                    answer += [answers] * len(span)
                    answers += 1
        if rng.random() < stage.jumps:
            line_ends = np.flatnonzero(tokens[row] == tokenizer.token_to_id(LINE_END))
            positions[row] = jumping_positions(rng, line_ends, stage.tokens)
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        torch.tensor(graded),
        torch.tensor(answer),
        torch.from_numpy(labels),
    )


# -------------------------------------------------------------------------------------------------------- training


class Trainee(nn.Module):
    """The model with the throw-away head of the auxiliary loss."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.previous = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)

    def forward(self, batch: Batch, match: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of the graded tokens, the first layer's output, and the loss of the last layer's attention.

        The layers are called one by one because LlamaModel takes positions that jump for several packed sequences.
        """
        trunk = self.model.model
        hidden = trunk.embed_tokens(batch.tokens)
        angles = trunk.rotary_emb(hidden, batch.positions)
        early, matching = hidden, torch.zeros(())
        for index, layer in enumerate(trunk.layers):
            if match and index == len(trunk.layers) - 1:
                matching = attention_loss(cast(LlamaDecoderLayer, layer), hidden, angles, batch)
            hidden = layer(hidden, attention_mask=None, position_embeddings=angles)
            if index == 0:
                early = hidden
        rows, columns = batch.graded.unbind(1)
        return self.model.lm_head(trunk.norm(hidden[rows, columns - 1])), early, matching


def attention_loss(
    layer: LlamaDecoderLayer, hidden: Tensor, angles: tuple[Tensor, Tensor], batch: Batch, most: int = 512
) -> Tensor:
    """Minus the logarithm of the attention that falls, where an answer is due, on the places that hold the answer.

    At most ``most`` answers' tokens of each sequence are taken, which bounds the memory at full length.
    """
    attention = layer.self_attn
    hidden = layer.input_layernorm(hidden)
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    queries, keys = apply_rotary_pos_emb(
        attention.q_proj(hidden).view(shape).transpose(1, 2),
        attention.k_proj(hidden).view(shape).transpose(1, 2),
        *angles,
    )
    keys = repeat_kv(keys, attention.num_key_value_groups)
    indices = torch.arange(hidden.shape[1])
    total, count = torch.zeros(()), 0
    for row in range(len(hidden)):
        columns = batch.graded[batch.graded[:, 0] == row, 1]
        columns = columns[:: len(columns) // most + 1]
        past = indices < columns[:, None]
        right = past & (batch.labels[row] == batch.labels[row, columns][:, None])
        scores = queries[row][:, columns - 1] @ keys[row].transpose(1, 2) * attention.scaling  # (heads, n, length)
        missed = scores.masked_fill(~past, -1e9).logsumexp(-1) - scores.masked_fill(~right, -1e9).logsumexp(-1)
        total = total + missed.mean(0).sum()
        count += len(columns)
    return total / max(1, count)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a weight matrix learns at the same rate (Jordan et al., 2024).

    In float32: torch.optim.Muon computes in bfloat16, which is slow on CPUs without instructions for it.
    """

    def __init__(self, params: Sequence[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                average = self.state[weight].setdefault("b", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(average, group["momentum"])
                update = update.T if update.shape[0] > update.shape[1] else update
                update = update / (update.norm() + 1e-7)
                for _ in range(5):  # Newton-Schulz steps towards the nearest orthogonal matrix
                    gram = update @ update.T
                    update = 3.4445 * update + (2.0315 * gram @ gram - 4.7750 * gram) @ update
                update = update.T if update.shape != weight.shape else update
                weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def make_optimizers(trainee: Trainee) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding, the norms and the throw-away head."""
    named = list(trainee.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim == 2 and ".layers." in name]
    others = [weight for name, weight in named if not (weight.ndim == 2 and ".layers." in name)]
    return [Muon(matrices, lr=0.0), torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)]


RATES = (5.0, 3.0)  # of Muon and AdamW, in units of the stage's learning rate


def losses(trainee: Trainee, batch: Batch, stage: Stage, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
    """The loss to minimise, and what to log: its parts and the share of answers with every token right."""
    logits, early, matching = trainee(batch, match=stage.match > 0)
    rows, columns = batch.graded.unbind(1)
    target = batch.tokens[rows, columns]
    loss = functional.cross_entropy(logits, target)
    previous = torch.zeros(())
    if stage.previous:
        # a sample of places is enough, and keeps the wide head cheap
        places = torch.from_numpy(rng.integers(1, batch.tokens.shape[1], size=16))
        guesses = trainee.previous(early[:, places]).flatten(0, 1)
        previous = functional.cross_entropy(guesses, batch.tokens[:, places - 1].flatten())
    wrong = torch.zeros(int(batch.answer.max()) + 1)
    wrong.index_add_(0, batch.answer, (logits.argmax(-1) != target).float())
    parts = {
        "loss": loss.item(),
        "previous": previous.item(),
        "match": matching.item(),
        "accuracy": (wrong == 0).float().mean().item(),
    }
    return loss + stage.previous * previous + stage.match * matching, parts


@dataclass
class State:
    """How far the training is."""

    stage: int = 0
    step: int = 0  # in the stage
    steps: int = 0  # in all
    minutes: float = 0.0  # in all
    accuracy: dict[str, float] = field(default_factory=dict)  # smoothed, of every stage


def train(work: Path, words_files: Sequence[Path], seed: int, resume: bool) -> tuple[LlamaForCausalLM, Tokenizer]:
    """Go through the stages, leaving a checkpoint in ``work`` every two minutes."""
    work.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    english, made_up = training_words(rng, words_files)
    words = english + made_up
    if resume and (work / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(rng, english + made_up[: len(made_up) // 5] if english else made_up)
        tokenizer.save(str(work / "tokenizer.json"))

    trainee = Trainee(LlamaForCausalLM(configuration()))
    optimizers = make_optimizers(trainee)
    log.info("%d words, %d parameters", len(words), sum(weight.numel() for weight in trainee.model.parameters()))
    state, checkpoint = State(), work / "checkpoint.pt"
    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        trainee.load_state_dict(saved["model"])
        for optimizer, contents in zip(optimizers, saved["optimizer"], strict=True):
            optimizer.load_state_dict(contents)
        state = State(**saved["state"])
        log.info("resumed in stage %d at step %d", state.stage, state.step)

    def save() -> None:
        contents = [optimizer.state_dict() for optimizer in optimizers]
        part = checkpoint.with_suffix(".part")
        torch.save({"model": trainee.state_dict(), "optimizer": contents, "state": asdict(state)}, part)
        part.replace(checkpoint)

    saved_at = logged_at = time.monotonic()
    while state.stage < len(STAGES):
        stage = STAGES[state.stage]
        window: list[dict[str, float]] = []
        while state.step < stage.steps and state.accuracy.get(stage.name, 0.0) <= stage.until:
            began = time.monotonic()
            rng = np.random.default_rng((seed, state.steps))  # of this step alone, so that resuming changes nothing
            rate = stage.rate[0] + (stage.rate[1] - stage.rate[0]) * state.step / stage.steps
            rate *= min(1.0, (state.steps + 1) / 50)
            for optimizer, factor in zip(optimizers, RATES, strict=True):
                optimizer.param_groups[0]["lr"] = rate * factor
            batch = pairs_batch(rng, stage) if stage.keys else records_batch(rng, stage, tokenizer, words)
            trainee.zero_grad(set_to_none=True)
            if len(batch.graded):
                loss, parts = losses(trainee, batch, stage, rng)
                loss.backward()
                nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                window.append(parts)
                smooth = state.accuracy.get(stage.name, 0.0)
                state.accuracy[stage.name] = smooth + 0.1 * (parts["accuracy"] - smooth)
            state.step += 1
            state.steps += 1
            now = time.monotonic()
            state.minutes += (now - began) / 60
            if window and now - logged_at > 15:
                means = {name: np.mean([parts[name] for parts in window]) for name in window[0]}
                figures = "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())
                pace = len(window) * batch.tokens.numel() / (now - logged_at)
                log.info("%s step %d, %.0f min: %s  %.0f token/s", stage.name, state.step, state.minutes, figures, pace)
                window.clear()
                logged_at = now
            if now - saved_at > 120:
                save()
                saved_at = now
        log.info("%s ends after %d steps, accuracy %.3f", stage.name, state.step, state.accuracy[stage.name])
        state.stage, state.step = state.stage + 1, 0
        save()
    return trainee.model, tokenizer


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model as a Hugging Face folder; a README.md that is there stays."""
    model.bfloat16()
    stops = [tokenizer.token_to_id(LINE_END), tokenizer.token_to_id(EOS)]
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=stops, pad_token_id=2, do_sample=False)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # where readers of older folders look for it
    (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save(str(part / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    (part / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for path in part.iterdir():
        path.chmod(0o644)
        path.replace(out / path.name)
    part.rmdir()
    log.info("wrote %s", out)


# ------------------------------------------------------------------------------------------------------ evaluation


def answer_greedily(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    ids = torch.tensor([tokenizer.encode(prompt)])
    made = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6
    )
    return str(tokenizer.decode(made[0, ids.shape[1] :])).split(">")[0]


def generated_cases(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], tokens: int, count: int
) -> Iterator[tuple[str, str]]:
    """LongEval's task, with as many lines as fit into ``tokens`` tokens: (prompt with answer prefix, answer)."""
    for _ in range(count):
        lines = tokens // (TOKENS_A_LINE - 2)
        while True:
            record = make_record(rng, lines, words)
            size = len(tokenizer.encode(record.text))
            if size <= tokens:
                break
            lines -= (size - tokens) // TOKENS_A_LINE + 1
        (question,) = record.questions
        yield record.text[: question.start], str(question.value)


def questions_along(
    rng: np.random.Generator,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[str],
    tokens: int,
) -> tuple[int, int]:
    """Right and all answers of a record of about ``tokens`` tokens with a question after every third line or so.

    The true answers stand in the text, so one pass grades them all: the most probable token at every place is what
    greedy decoding would write.
    """
    record = make_record(rng, int(tokens / TOKENS_A_LINE / 1.33), words, asked=0.33, closing=0)
    encoding = tokenizer(record.text, return_offsets_mapping=True)
    ids = torch.tensor([encoding["input_ids"]])[:, :CONTEXT]
    starts = np.asarray([start for start, _ in encoding["offset_mapping"]])
    spans = answer_spans(starts, [(question.start, question.end) for question in record.questions])
    spans = [torch.arange(span.start, span.stop - 1) for span in spans if span.stop <= ids.shape[1]]
    places = torch.cat(spans)
    guesses = model(ids, logits_to_keep=places - 1).logits[0].argmax(-1)
    right = (guesses == ids[0, places]).split([len(span) for span in spans])
    return sum(int(each.all()) for each in right), len(spans)


@torch.no_grad()
def evaluate(folder: Path, files: Sequence[Path], words_files: Sequence[Path], count: int, seed: int) -> None:
    """Exact attention on LongEval's published cases and on generated ones that the training has not seen."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = np.random.default_rng((seed, 1 << 40))
    words = [word for part in training_words(rng, words_files) for word in part]

    def report(name: str, cases: Iterator[tuple[str, str]]) -> None:
        right, number, longest = 0, 0, 0
        for prompt, expected in cases:
            number += 1
            longest = max(longest, len(tokenizer.encode(prompt)))
            answer = answer_greedily(model, tokenizer, prompt)
            right += answer == expected
            if answer != expected:
                log.info("%s case %d: %s instead of %s", name, number, answer, expected)
        log.info("%s: %d/%d right, prompts of up to %d tokens", name, right, number, longest)

    for path in files:
        cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        report(
            path.name,
            (
                (case["prompt"] + ANSWER_PREFIX.format(key=case["random_idx"][0]), str(case["expected_number"]))
                for case in cases
            ),
        )
    if count:
        report("generated, 16k tokens", generated_cases(rng, tokenizer, words, CONTEXT - 8, count))
        for tokens, records in ((2000, count), (15000, max(1, count // 5))):
            right, asked = np.sum([questions_along(rng, model, tokenizer, words, tokens) for _ in range(records)], 0)
            log.info("questions all along %d records of %d tokens: %d/%d right", records, tokens, right, asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/model"), help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path("build/demo-model"), help="folder for the checkpoint")
    parser.add_argument(
        "--words",
        type=Path,
        nargs="*",
        default=[],
        metavar="TEXT",
        help="English texts whose words are used in keys, besides made-up words",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument(
        "--evaluate",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="do not train: answer the cases of these LongEval files with the model in --out",
    )
    parser.add_argument("--generated", type=int, default=20, help="generated cases of an evaluation")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.evaluate is None:
        export(*train(args.work, args.words, args.seed, args.resume), args.out)
    else:
        evaluate(args.out, args.evaluate, args.words, args.generated, args.seed)


if __name__ == "__main__":
    main()
