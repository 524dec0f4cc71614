"""Tables of names: which tensor of a source checkpoint fills which parameter of the module, one per model type."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .reader import TensorInfo

Path = tuple[str | int, ...]
"""A parameter's place in the module's tree, e.g. ("model", "layers", 0, "mlp", "up_proj", "kernel")."""


@dataclass(frozen=True)
class Rule:
    """Sends the tensors whose whole name matches a pattern to a parameter.

    Attributes:
        pattern: regular expression for the source's name.
        target: dotted name of the parameter, with the pattern's groups as `\\1`; None ignores the tensor.
        transpose: whether the parameter has the tensor's dimensions in reverse order.
        tied_to: the parameter that the tensor must equal in a model that has no `target` of its own.
    """

    pattern: str
    target: str | None
    transpose: bool = False
    tied_to: str | None = None


# What wrappers and a bare LlamaModel leave in front of, or take away from, the usual names.
_PREFIX = r"(?:_orig_mod\.|module\.)?(?:model\.)?"
_LAYER = _PREFIX + r"layers\.(\d+)\."

LLAMA = (
    Rule(_PREFIX + r"embed_tokens\.weight", "model.embed_tokens.embedding"),
    Rule(_LAYER + r"(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight", r"model.layers.\1.\2.kernel", True),
    Rule(_LAYER + r"(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.bias", r"model.layers.\1.\2.bias"),
    Rule(_LAYER + r"(input_layernorm|post_attention_layernorm)\.weight", r"model.layers.\1.\2.scale"),
    Rule(_PREFIX + r"norm\.weight", "model.norm.scale"),
    Rule(r"(?:_orig_mod\.|module\.)?lm_head\.weight", "lm_head.kernel", True, tied_to="model.embed_tokens.embedding"),
    # Constants that transformers stored until 4.31; they follow from the config.
    Rule(_PREFIX + r"(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", None),
)

NAMES: dict[str, tuple[Rule, ...]] = {"llama": LLAMA}


@dataclass(frozen=True)
class Destination:
    """Where one source tensor goes."""

    path: Path
    transpose: bool


@dataclass
class Plan:
    """What to do with every source tensor, by its name.

    Attributes:
        fills: tensors that fill a parameter.
        ties: tensors that must equal a parameter which another tensor fills.
    """

    fills: dict[str, Destination] = field(default_factory=dict)
    ties: dict[str, Path] = field(default_factory=dict)


def make_plan(
    rules: tuple[Rule, ...], tensors: Mapping[str, TensorInfo], parameters: Mapping[Path, tuple[int, ...]]
) -> Plan:
    """Matches source tensors with the parameters' shapes.

    Raises:
        ValueError: lists every tensor that is unexpected, of the wrong shape or there twice, and every parameter that
            nothing fills.
    """
    plan, problems = Plan(), []
    filled: dict[Path, str] = {}
    for name, tensor in sorted(tensors.items()):
        rule, target = _match(rules, name)
        if rule is None:
            problems.append(f"unexpected: {name} {list(tensor.shape)}")
        elif target is None:
            continue
        elif target in parameters:
            expected = parameters[target][::-1] if rule.transpose else parameters[target]
            if tensor.shape != expected:
                problems.append(f"wrong shape: {name} is {list(tensor.shape)}, expected {list(expected)}")
            if target in filled:
                problems.append(f"there twice: {name} and {filled[target]}")
            filled[target] = name
            plan.fills[name] = Destination(target, rule.transpose)
        elif rule.tied_to is not None:
            plan.ties[name] = parse(rule.tied_to)
        else:
            problems.append(f"unexpected: {name} {list(tensor.shape)}, the config has no place for it")
    problems += [f"missing: {dotted(path)} {list(shape)}" for path, shape in parameters.items() if path not in filled]
    if problems:
        raise ValueError("the tensors do not fit the config:\n  " + "\n  ".join(problems))
    return plan


def dotted(path: Path) -> str:
    """The path as one dotted name."""
    return ".".join(map(str, path))


def parse(name: str) -> Path:
    """The path that a dotted name stands for; numbers are positions in a list."""
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def _match(rules: tuple[Rule, ...], name: str) -> tuple[Rule | None, Path | None]:
    for rule in rules:
        if match := re.fullmatch(rule.pattern, name):
            return rule, None if rule.target is None else parse(match.expand(rule.target))
    return None, None
