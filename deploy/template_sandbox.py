"""A sandbox for templates that come from a checkpoint: jinja2's own, with bounds on time, on sizes, and on the output.

`compile_template` reads a template; `run` renders it. A template cannot reach the process, as in jinja2's sandbox, and
here it cannot keep it busy either: loops, calls, filters and tests look at the clock, and no value becomes larger than
`Budget.size`.
"""

import datetime
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, ext, filters, nodes, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.runtime import Macro, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 5.0
"""Processor time of one rendering."""
SIZE = 2**22
"""Characters of the output, and of every value on the way, beside what the input has."""
_TIMES_INPUT = 8
_FILTERED = 64
_ELEMENT = 16
_BITS = 4096
_WIDTH = 1000
_SHOWN = 20
_FILTERS = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape"),
    *("first", "float", "groupby", "int", "items", "last", "length", "list", "lower"),
    *("map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select", "selectattr"),
    *("sort", "string", "title", "trim", "unique", "upper", "wordcount"),
)
_UNBOUNDED = {"encode", "expandtabs", "from_bytes", "maketrans", "to_bytes", "translate"}
_LONG_NUMBER = re.compile(r"\d{4,}")
_WIDE_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(?:\*|\d{4,}|\d*\.(?:\*|\d{4,}))")
_WIDE_BRACES = re.compile(r"{[^{}]*(?:{|:[^{}]*\d{4,})")


class BudgetError(Exception):
    """A template that does too much; the message says of what."""


class RefusedError(TemplateError):
    """What `raise_exception` of a template says."""


class Budget:
    """What one rendering may use.

    Args:
        given: weight of what is rendered, as `weigh` has it.
    """

    def __init__(self, given: int) -> None:
        self.size = SIZE + _TIMES_INPUT * given
        self._filtered = _FILTERED * self.size
        self._deadline = time.thread_time() + SECONDS

    def tick(self) -> None:
        """BudgetError if the time is over."""
        if time.thread_time() > self._deadline:
            raise BudgetError(f"takes more than {SECONDS:g} seconds")

    def allow(self, size: int) -> None:
        """BudgetError if a value of that size is too large."""
        if size > self.size:
            raise BudgetError(f"makes a value of more than {self.size} characters")

    def checked(self, value: Any) -> Any:
        """A value; BudgetError if it is too large."""
        if isinstance(value, int):
            _check_bits(value.bit_length())
        self.allow(weigh(value, self.size))
        return value

    def filtered(self, value: Any) -> Any:
        """What a filter made, of which there may be many at once."""
        self.checked(value)
        self._filtered -= weigh(value) if isinstance(value, str) else _ELEMENT
        if self._filtered < 0:
            raise BudgetError("makes too many values with filters")
        return value


_budget: ContextVar[Budget] = ContextVar("budget")


def weigh(value: Any, most: int = sys.maxsize) -> int:
    """About how many characters a value has if it is written out; some number above `most` if they are more."""
    total, waiting = 0, [value]
    while waiting and total <= most:
        value = waiting.pop()
        total += len(value) if isinstance(value, str) else _ELEMENT
        if isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
    return total


def compile_template(source: str) -> Template:
    """Reads a template; jinja2's TemplateSyntaxError and others if it is none."""
    return _Environment().from_string(source)


def run(template: Template, variables: dict[str, Any]) -> str:
    """The output of a template.

    Raises:
        BudgetError: it does too much.
        RefusedError: it calls `raise_exception`.
        Exception: whatever else a template does wrong.
    """
    budget = Budget(weigh(variables))
    token = _budget.set(budget)
    try:
        return _join_output(template.generate(variables))
    finally:
        _budget.reset(token)


def _join_output(parts: Iterable[str]) -> str:
    budget, kept, size = _budget.get(), [], 0
    for part in parts:
        size += len(part)
        if size > budget.size:
            raise BudgetError(f"writes more than {budget.size} characters")
        kept.append(part)
    return "".join(kept)


class _Environment(ImmutableSandboxedEnvironment):
    """As transformers sets it up, with fewer filters."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_join_output)  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        # Without optimizing, nothing of a template runs before it is rendered.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Guards, ext.loopcontrols])
        filters = {name: self.filters[name] for name in _FILTERS} | _OWN_FILTERS
        self.filters = {name: _guarded_filter(function) for name, function in filters.items()}
        self.tests = {name: _guarded_test(function) for name, function in self.tests.items()}
        self.globals.pop("lipsum")
        self.globals |= {
            "dict": _Dict(),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Guarding(self).visit(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _UNBOUNDED and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _OPERATOR_CHECKS[operator](left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, args, kwargs)
            return wrapped(*args, **kwargs)

        return checked

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget = _budget.get()
        budget.tick()
        # A macro, for one, has them as a tuple and a dict.
        budget.checked([args, kwargs])
        text, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(text, str) and name in _METHOD_CHECKS:
            _METHOD_CHECKS[name](text, *args, **kwargs)
        return budget.checked(super().call(__context, __obj, *args, **kwargs))


class _Guards(ext.Extension):
    """The calls that `_Guarding` adds, and the tag `generation`, whose content is as without it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

    def content(self, caller: Macro) -> str:
        """What stands in the tag."""
        return caller()

    def tick(self) -> None:
        """Looks at the clock."""
        _budget.get().tick()

    def checked(self, value: Any) -> Any:
        """A list, tuple or dict of the template."""
        return _budget.get().checked(value)

    def joined(self, *parts: Any) -> str:
        """`~` of a template."""
        _budget.get().allow(sum(weigh(part, _budget.get().size) for part in parts))
        return str_join(parts)


class _Guarding(NodeTransformer):
    """Adds calls of `_Guards` to a template that was read."""

    def __init__(self, environment: _Environment) -> None:
        self._guards = environment.extensions[_Guards.identifier]

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        tick = nodes.ExprStmt(self._guards.call_method("tick", lineno=node.lineno), lineno=node.lineno)
        node.body.insert(0, tick)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return self._guards.call_method("joined", node.nodes, lineno=node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Expr:  # noqa: N802
        return self._checked(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:  # noqa: N802
        return self._checked(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        return self._checked(node) if node.ctx == "load" else node

    def _checked(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return self._guards.call_method("checked", [node], lineno=node.lineno)


class _Namespace(Namespace):
    """Its attributes have no names of Python's own, and written out it does not show them."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Without names, so that a template may use any for its attributes.
        self, *rest = args
        for name in (attributes := dict(*rest, **kwargs)):
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class _Dict:
    """`dict` without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name[:40]!r}")


def _raise_exception(message: Any) -> NoReturn:
    raise RefusedError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > _WIDTH or _LONG_NUMBER.search(format):
        raise BudgetError("asks for a date that is too long")
    return datetime.datetime.now().strftime(format)


def _guarded_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.tick()
        return budget.filtered(function(*args, **kwargs))

    return guarded


def _guarded_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _budget.get().tick()
        return function(*args, **kwargs)

    return guarded


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without the escapes for HTML of jinja2's own."""
    if max(indent if isinstance(indent, int) else weigh(indent), weigh(separators)) > _WIDTH:
        raise BudgetError("asks for JSON that is too wide")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_environment
def _join(environment: Any, value: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    items = value if attribute is None else map(filters.make_attrgetter(environment, attribute), value)
    return _joined(str(d), items)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    most = -1 if count is None else count
    _check_replace(str(text), str(old), str(new), most)
    return str(text).replace(str(old), str(new), most)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    size = len(width) if isinstance(width, str) else width
    _budget.get().allow(len(text) + size * (len(text.splitlines()) + 1))
    return filters.do_indent(text, width, first, blank)


def _format(text: Any, *args: Any, **kwargs: Any) -> str:
    _check_percent(text, kwargs or args)
    return filters.do_format(text, *args, **kwargs)


@pass_environment
def _sum(environment: Any, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, int | float):
        raise BudgetError("adds up what are no numbers")
    return filters.sync_do_sum(environment, iterable, attribute, start)


def _round(value: Any, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > _WIDTH:
        raise BudgetError("rounds to too many digits")
    return filters.do_round(value, precision, method)


_OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "sum": _sum,
    "tojson": _to_json,
}


def _joined(separator: str, items: Iterable[Any]) -> str:
    """`str.join` of what may be no str."""
    budget, parts, size = _budget.get(), [], 0
    for item in items:
        parts.append(str(item))
        size += len(separator) + len(parts[-1])
        budget.allow(size)
    return separator.join(parts)


def _check_replace(text: str, old: str, new: str, count: int = -1) -> None:
    found = text.count(old) if count < 0 else min(count, text.count(old))
    _budget.get().allow(len(text) + found * len(new))


def _check_join(separator: str, items: Any) -> None:
    # What can be read only once, such as the result of a filter, has strings that were made one by one.
    items = items if isinstance(items, list | tuple | dict) else ()
    _budget.get().allow(sum(len(separator) + weigh(item) for item in items))


def _check_width(text: str, width: int, fill: str = " ") -> None:
    _budget.get().allow(max(len(text), width))


_METHOD_CHECKS: dict[str, Callable[..., None]] = {
    "replace": _check_replace,
    "join": _check_join,
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _check_width),
}


def _check_plus(left: Any, right: Any) -> None:
    size = _budget.get().size
    _budget.get().allow(weigh(left, size) + weigh(right, size))


def _check_times(left: Any, right: Any) -> None:
    numbers = [abs(value) for value in (left, right) if isinstance(value, int)]
    if len(numbers) == 2:
        _check_bits(sum(number.bit_length() for number in numbers))
    elif numbers:
        other = right if isinstance(left, int) else left
        if isinstance(other, str | list | tuple):
            _budget.get().allow(numbers[0] * weigh(other, _budget.get().size))


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))


def _check_bits(bits: int) -> None:
    if bits > _BITS:
        raise BudgetError(f"makes a number of more than {_BITS} bits")


def _check_percent(left: Any, right: Any) -> None:
    if isinstance(left, str):
        _check_fields(left, left.count("%"), _WIDE_PERCENT.search(left), right)


def _check_format(text: str, *given: Any) -> None:
    _check_fields(text, text.count("{"), _WIDE_BRACES.search(text.replace("{{", "")), given)


def _check_fields(text: str, fields: int, wide: re.Match[str] | None, given: Any) -> None:
    """A text with so many fields at most, one that is wide or has a width of its own choice, and what they hold."""
    if wide is not None:
        raise BudgetError(f"writes a value that is too wide ({wide[0][:_SHOWN]!r})")
    budget = _budget.get()
    budget.allow(len(text) + fields * (_WIDTH + weigh(given, budget.size)))


_OPERATOR_CHECKS: dict[str, Callable[[Any, Any], None]] = {
    "+": _check_plus,
    "*": _check_times,
    "**": _check_power,
    "%": _check_percent,
}
