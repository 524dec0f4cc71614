"""LoRA adapters: what PEFT saved beside or apart from a base model, merged into the base's tensors as they are read.

A module's weight W becomes W + scale * B A, with scale = alpha / r (Hu et al., LoRA, arXiv 2106.09685, section 4.1) or
alpha / sqrt(r) (Kalajdzievski, rsLoRA, arXiv 2312.03732). Tensors that the adapter saved whole replace those of the
base. Adapter and base meet in the parameter that both fill, whatever prefixes their names have.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..host.messages import listed
from .json_file import read_json
from .layouts import JOINED_UNTRANSPOSED, SAME, Shape
from .reader import Weights, check_dtypes, open_file
from .rules import Path as ParameterPath
from .rules import Rule, Slot, match, parse
from .tensor_file import TensorInfo

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
FILES = (CONFIG, *WEIGHTS)
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?")
# Ways to begin training that leave the base's weights as they are; with others the adapter goes with changed weights.
_INITIALIZERS = (None, True, False, "gaussian", "eva", "orthogonal")
_APPLIED = {"peft_type", "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "init_lora_weights"}
# What only training reads, or what shows in the names and shapes of the tensors.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "velora_config",
}


@dataclass(frozen=True)
class Factors:
    """A change of low rank: scale * B A, of names of the adapter's tensors; A is [r, in], B is [out, r]."""

    a: TensorInfo
    a_name: str
    b: TensorInfo
    b_name: str
    scale: float

    @property
    def shape(self) -> Shape:
        """That of the weight of a torch `Linear`, [out, in]."""
        return (self.b.shape[0], self.a.shape[1])


@dataclass(frozen=True)
class Adapter:
    """An opened LoRA adapter.

    Attributes:
        folder: that holds it.
        weights: its tensors, as they are named in its file.
        factors: changes by the name of the module in the base model, without PEFT's prefix.
        whole: names of the tensors that replace one of the base, by the name that they have there.
    """

    folder: Path
    weights: Weights
    factors: Mapping[str, Factors]
    whole: Mapping[str, str]


@dataclass(frozen=True)
class AdaptedWeights(Weights):
    """The weights of a base model with an adapter merged into them.

    Attributes:
        base: the base model's.
        adapter: the adapter.
        changes: factors by the name of the base's tensor, and whether their product is transposed.
        replaced: names of the adapter's tensors by that of the tensor whose place they take.
    """

    base: Weights
    adapter: Adapter
    changes: Mapping[str, tuple[Factors, bool]]
    replaced: Mapping[str, str]

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor once, those that the adapter adds at the end."""
        left = set(self.replaced)
        for name, tensor in self.base.read():
            left.discard(name)
            yield name, self._merged(name, tensor)
        for name in sorted(left):
            yield name, self._merged(name, self._own(name))

    def read_one(self, name: str) -> np.ndarray:
        """One tensor by name, merged."""
        return self._merged(name, self._own(name) if name in self.replaced else self.base.read_one(name))

    def _own(self, name: str) -> np.ndarray:
        return self.adapter.weights.read_one(self.replaced[name])

    def _merged(self, name: str, tensor: np.ndarray) -> np.ndarray:
        if name in self.replaced:
            tensor = self._own(name)
        if name not in self.changes:
            return tensor
        factors, transposed = self.changes[name]
        a, b = (self.adapter.weights.read_one(one).astype(np.float32) for one in (factors.a_name, factors.b_name))
        change = factors.scale * (b @ a)
        return (tensor.astype(np.float32) + (change.T if transposed else change)).astype(tensor.dtype)


def has_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT's, with or without a base model beside it."""
    return (folder / CONFIG).is_file()


def open_adapter(folder: Path) -> Adapter:
    """Reads the config, and the names and shapes of an adapter.

    Raises:
        FileNotFoundError: no such folder, or a file of the adapter is missing.
        ValueError: another kind of adapter than plain or rank-stabilised LoRA, by name, or tensors that are not its.
    """
    if not has_adapter(folder):
        raise FileNotFoundError(f"{folder} lacks {CONFIG}: expected the folder of a LoRA adapter saved by PEFT")
    config = read_json(folder / CONFIG)
    _check(folder / CONFIG, config)
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{folder} has {CONFIG} but neither {' nor '.join(WEIGHTS)}: download the adapter again"
        )
    weights = Weights((file,), open_file(file).infos())
    check_dtypes(weights, weights.tensors)
    pairs: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in weights.tensors:
        inner = name.removeprefix(_PREFIX)
        if factor := _FACTOR.fullmatch(inner):
            pairs.setdefault(factor["module"], {})[factor["side"]] = name
        else:
            whole[inner.replace(".base_layer.", ".")] = name
    return Adapter(folder, weights, _factors(file, config, weights, pairs), whole)


def adapt(
    weights: Weights, adapter: Adapter, rules: tuple[Rule, ...], parameters: Mapping[ParameterPath, Shape]
) -> AdaptedWeights:
    """The base's weights with the adapter's merged into them.

    Args:
        weights: of the base model.
        adapter: the adapter.
        rules: of the model's names.
        parameters: the shapes of the module's parameters.

    Raises:
        ValueError: tensors of the adapter that find no tensor of the base, or one of another shape; all are listed.
    """
    homes: dict[tuple[Slot, ...], str] = {}
    for name in weights.tensors:
        if slots := match(rules, name, parameters)[1]:
            homes.setdefault(slots, name)
    changes: dict[str, tuple[Factors, bool]] = {}
    tensors, replaced, problems = dict(weights.tensors), {}, []
    shared = {
        parse(rule.tied_to)
        for rule in rules
        if rule.tied_to and isinstance(rule.target, str) and parse(rule.target) not in parameters
    }
    for inner, name in adapter.whole.items():
        rule, slots = match(rules, inner, parameters)
        if rule is None:
            problems.append(f"{inner}: is neither a tensor of the base model's architecture nor a LoRA factor")
            continue
        home = homes.get(slots, inner)
        replaced[home], tensors[home] = name, adapter.weights.tensors[name]
    for module, factors in adapter.factors.items():
        rule, slots = match(rules, f"{module}.weight", parameters)
        if rule is not None and not slots:
            continue  # A part of the model that is left out.
        home = homes.get(slots)
        if rule is None or home is None:
            problems.append(f"{module}: the base model has no such weight")
            continue
        # A torch `Linear`'s weight is [out, in]; an embedding, and a linear layer of GPT-2, are the other way round.
        transposed = rule.layout in (SAME, JOINED_UNTRANSPOSED)
        shape = factors.shape[::-1] if transposed else factors.shape
        if shape != tensors[home].shape:
            problems.append(
                f"{module}: changes a weight of {list(shape)}, but the base's is {list(tensors[home].shape)}"
            )
        if shared & {slot.path for slot in slots}:
            problems.append(
                f"{module}: the base model's output layer shares this weight, but the adapter changes only one of them"
            )
        changes[home] = factors, transposed
    if problems:
        raise ValueError(f"the adapter {adapter.folder} does not fit the base model:{listed(problems)}")
    return AdaptedWeights((*weights.files, *adapter.weights.files), tensors, weights, adapter, changes, replaced)


def adapter_alone(folder: Path) -> str:
    """What to say of a folder that holds an adapter and no base model."""
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    named = f" ({base})" if isinstance(base, str) and base else ""
    return (
        f"{folder} is an adapter without its base model: convert the base model{named} and give the adapter with it, "
        f"`iceformer convert BASE TARGET --adapter {folder}`"
    )


def _check(file: Path, config: Mapping[str, Any]) -> None:
    """ValueError for what is not plain or rank-stabilised LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type is {kind!r}, supported: only 'LORA': merge the adapter with PEFT first")
    if config.get("init_lora_weights") not in _INITIALIZERS:
        raise ValueError(
            f"{file}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base model's weights: "
            "merge the adapter with PEFT first"
        )
    unknown = [name for name, value in config.items() if value and name not in _APPLIED | _HARMLESS]
    if unknown:
        raise ValueError(
            f"{file}: {', '.join(f'{name} is {config[name]!r}' for name in sorted(unknown))}, which is not supported: "
            "merge the adapter with PEFT first"
        )


def _factors(
    file: Path, config: Mapping[str, Any], weights: Weights, pairs: Mapping[str, Mapping[str, str]]
) -> dict[str, Factors]:
    found, problems = {}, []
    for module, sides in pairs.items():
        if set(sides) != {"A", "B"}:
            problems.append(f"{module}: has only lora_{min(sides)}")
            continue
        a, b = (weights.tensors[sides[side]] for side in "AB")
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            problems.append(
                f"{module}: its factors are {list(a.shape)} and {list(b.shape)}, expected [r, in] and [out, r]"
            )
            continue
        found[module] = Factors(a, sides["A"], b, sides["B"], _scale(file, config, module, a.shape[0]))
    if problems:
        raise ValueError(f"{file} does not contain a complete LoRA adapter:{listed(problems)}")
    return found


def _scale(file: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r); alpha may be a module's own, by a pattern at the end of its name."""
    alpha: Any = config.get("lora_alpha", 8)
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if _ends_with(module, pattern):
            alpha = own
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{file.parent / CONFIG}: lora_alpha is {alpha!r}, expected a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _ends_with(module: str, pattern: str) -> bool:
    """Whether a module's name, or the end of it from a dot on, matches a regular expression, as PEFT reads patterns."""
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module) is not None
    except re.error as error:
        raise ValueError(f"{CONFIG}: alpha_pattern has {pattern!r}, not a regular expression ({error})") from None
