"""Rules of names, and the plan that they make of a checkpoint: which tensor fills which parameter of the module."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..host.messages import listed
from .layouts import SAME, Layout, Shape
from .names import strange_names
from .reader import TensorInfo

Path = tuple[str | int, ...]
"""A parameter's place in the module's tree, e.g. ("model", "layers", 0, "mlp", "up_proj", "kernel")."""


@dataclass(frozen=True)
class Rule:
    """Sends the tensors whose whole name matches a pattern to a parameter, or to several.

    Attributes:
        pattern: regular expression for the source's name.
        target: dotted name of the parameter, with the pattern's groups as `\\1`; `[\\2]` behind it sends the tensor to
            one row of a parameter that stacks several. A tuple of names for a tensor that holds several parameters;
            None ignores the tensor.
        layout: how the tensor lies in what it fills.
        tied_to: the parameter that the tensor must equal where `target` is None or one that the model does not have.
        optional: a model that has no `target` does without the tensor.
        spare: the same, and the plan says so: the tensor is part of a head that the model's task does not use.
        copy: the tensor must equal what fills `target`, where another tensor of the checkpoint does.
    """

    pattern: str
    target: str | tuple[str, ...] | None
    layout: Layout = SAME
    tied_to: str | None = None
    optional: bool = False
    spare: bool = False
    copy: bool = False


@dataclass(frozen=True)
class Slot:
    """A parameter, or one row of it.

    Attributes:
        path: the parameter.
        row: index along its first dimension, None for all of it.
    """

    path: Path
    row: int | None = None

    def __str__(self) -> str:
        return dotted(self.path) + ("" if self.row is None else f"[{self.row}]")

    def shape(self, parameters: Mapping[Path, Shape]) -> Shape:
        """The shape of what fills it."""
        shape = parameters[self.path]
        return shape if self.row is None else shape[1:]


@dataclass(frozen=True)
class Destination:
    """Where one source tensor goes."""

    slots: tuple[Slot, ...]
    layout: Layout


@dataclass
class Plan:
    """What to do with every source tensor, by its name.

    Attributes:
        fills: tensors that fill parameters.
        ties: tensors that must equal a parameter which another tensor fills.
        spare: tensors of heads that the model's task does not use.
    """

    fills: dict[str, Destination] = field(default_factory=dict)
    ties: dict[str, Path] = field(default_factory=dict)
    spare: list[str] = field(default_factory=list)


def check_names(rules: tuple[Rule, ...], names: Iterable[str]) -> None:
    """ValueError of one sentence for names that are another architecture's, or that all begin with a prefix."""
    if problem := strange_names(list(names), lambda name: match(rules, name, {})[0] is not None):
        raise ValueError(problem)


def make_plan(rules: tuple[Rule, ...], tensors: Mapping[str, TensorInfo], parameters: Mapping[Path, Shape]) -> Plan:
    """Matches source tensors with the parameters' shapes.

    Raises:
        ValueError: lists every tensor that is unexpected, of the wrong shape or there twice, and every parameter that
            nothing fills.
    """
    matches = {name: match(rules, name, parameters) for name in tensors}
    plan, problems = Plan(), []
    filled: dict[Slot, str] = {}
    for name in sorted(tensors, key=lambda name: (_is_copy(matches[name][0]), name)):
        (rule, slots), shape = matches[name], tensors[name].shape
        if rule is None:
            problems.append(f"unexpected: {name} {list(shape)}")
        elif slots and all(_exists(slot, parameters) for slot in slots):
            if rule.copy and slots[0] in filled:
                plan.ties[name] = slots[0].path
                continue
            expected = rule.layout.source_shape([slot.shape(parameters) for slot in slots])
            if shape != expected:
                problems.append(f"wrong shape: {name} is {list(shape)}, expected {list(expected)}")
            problems += [f"there twice: {name} and {filled[slot]}" for slot in slots if slot in filled]
            filled |= dict.fromkeys(slots, name)
            plan.fills[name] = Destination(slots, rule.layout)
        elif rule.tied_to is not None:
            plan.ties[name] = parse(rule.tied_to)
        elif rule.spare:
            plan.spare.append(name)
        elif slots and not rule.optional:
            problems.append(f"unexpected: {name} {list(shape)}, the config has no place for it")
    problems += [f"missing: {slot} {list(slot.shape(parameters))}" for slot in _unfilled(parameters, filled)]
    if problems:
        raise ValueError(f"the tensors do not fit the config:{listed(problems)}")
    return plan


def reaches(rules: tuple[Rule, ...], name: str, module: str) -> bool:
    """Whether a source tensor of that name is one of a module's, such as "pooler"."""
    return any(slot.path[0] == module for slot in match(rules, name, {})[1])


def dotted(path: Path) -> str:
    """The path as one dotted name."""
    return ".".join(map(str, path))


def parse(name: str) -> Path:
    """The path that a dotted name stands for; numbers are positions in a list."""
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def match(rules: tuple[Rule, ...], name: str, parameters: Mapping[Path, Shape]) -> tuple[Rule | None, tuple[Slot, ...]]:
    """The first rule for a tensor whose target the model has, or else the first one."""
    first: tuple[Rule | None, tuple[Slot, ...]] = None, ()
    for rule in rules:
        if found := re.fullmatch(rule.pattern, name):
            targets = (rule.target,) if isinstance(rule.target, str) else rule.target or ()
            slots = tuple(_parse_slot(found.expand(target)) for target in targets)
            if all(_exists(slot, parameters) for slot in slots):
                return rule, slots
            first = first if first[0] else (rule, slots)
    return first


def _is_copy(rule: Rule | None) -> bool:
    return rule is not None and rule.copy


def _parse_slot(text: str) -> Slot:
    name, bracket, row = text.partition("[")
    return Slot(parse(name), int(row.rstrip("]")) if bracket else None)


def _exists(slot: Slot, parameters: Mapping[Path, Shape]) -> bool:
    return slot.path in parameters and (slot.row is None or slot.row < parameters[slot.path][0])


def _unfilled(parameters: Mapping[Path, Shape], filled: Mapping[Slot, str]) -> list[Slot]:
    """What nothing fills: whole parameters, or the rows that are missing of those that are filled by rows."""
    by_rows = {slot.path for slot in filled if slot.row is not None}
    slots = [
        slot
        for path, shape in parameters.items()
        for slot in ([Slot(path, row) for row in range(shape[0])] if path in by_rows else [Slot(path)])
    ]
    return [slot for slot in slots if slot not in filled]
