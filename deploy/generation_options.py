"""The options of generating a text, and what they are where a caller leaves them out: as the checkpoint's
generation_config.json asks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from .generation_defaults import GenerationDefaults
from .inputs import check_count
from .sampling import MOST_LOGPROBS, Sampling
from .text_stream import check_stop

MAX_NEW_TOKENS = 64
"""New tokens at most, where neither caller nor checkpoint says it."""


class SamplingOptions(TypedDict, total=False):
    """Options of `Session.generate` and `Session.chat` on how tokens are chosen; None is the checkpoint's default.

    Attributes:
        top_k: draw from the k most likely tokens only; 0 for all.
        top_p: draw from the fewest most likely tokens that have this probability together; 1 for all.
        min_p: draw from the tokens that have at least this share of the largest probability; 0 for all.
        repetition_penalty: above 1 makes tokens of the prompt and of the text less likely; 1 for none.
        presence_penalty: taken from the logits of tokens that were written, from -2 to 2.
        frequency_penalty: taken from the logit of a token each time that it was written, from -2 to 2.
        logit_bias: added to the logits of these token ids.
        stop: strings at which the text ends; they do not belong to it.
        logprobs: tell the log-probability of each new token, and of so many of the most likely ones, up to 20.
        speculate: guess tokens where the text repeats what stands before, and check several in one call, as long as
            that is faster. The text is the same as without.
    """

    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop: Sequence[str] | None
    logprobs: int | None
    speculate: bool | None


@dataclass(frozen=True)
class Choices:
    """What `choices` makes of the options: all of them checked, none left open."""

    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]
    logprobs: int | None
    speculate: bool


def choices(
    defaults: GenerationDefaults | None,
    max_new_tokens: int | None,
    temperature: float | None,
    seed: int,
    options: SamplingOptions,
) -> Choices:
    """The options of one text.

    Of the defaults, `top_k`, `top_p` and `min_p` go with a checkpoint that samples: with one that does not, they are
    what transformers has for all models, and a caller who gives a temperature draws from all tokens.

    Raises:
        ValueError: a value that makes no sense, or an option that does not exist.
    """
    defaults = defaults or GenerationDefaults()
    stop, logprobs, speculate = options.get("stop"), options.get("logprobs"), options.get("speculate")
    left = {name: value for name, value in options.items() if name not in ("stop", "logprobs", "speculate")}
    unknown = left.keys() - SamplingOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"there is no option {min(unknown)}, expected of: {', '.join(SamplingOptions.__annotations__)}")
    values: dict[str, Any] = {"temperature": defaults.effective_temperature}
    values["repetition_penalty"] = defaults.repetition_penalty
    if defaults.do_sample:
        values |= {name: getattr(defaults, name) for name in ("top_k", "top_p", "min_p")}
    given = {"temperature": temperature, **left}
    values |= {name: value for name, value in given.items() if value is not None}
    most = max_new_tokens if max_new_tokens is not None else defaults.max_new_tokens or MAX_NEW_TOKENS
    if logprobs is not None and check_count(logprobs, "logprobs", 0) > MOST_LOGPROBS:
        raise ValueError(f"logprobs is {logprobs}, expected at most {MOST_LOGPROBS}")
    if speculate not in (None, True, False):
        raise ValueError(f"speculate is {speculate!r}, expected True or False")
    return Choices(
        Sampling(**values, seed=seed),
        check_count(most, "max_new_tokens", 1),
        check_stop(defaults.stop_strings if stop is None else stop),
        logprobs,
        speculate is not False,
    )
