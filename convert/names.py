"""What is strange about the names of a checkpoint as a whole, where a list of all of them would only hide it."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

_ORIGINAL = re.compile(r"layers\.\d+\.attention\.w[qkvo]\.weight")


def strange_names(names: Sequence[str], is_known: Callable[[str], bool]) -> str | None:
    """One sentence on a checkpoint whose tensors are known, or most of them, only under other names; None for others.

    Args:
        names: of all tensors.
        is_known: whether the model's table has a name.
    """
    unknown = [name for name in names if not is_known(name)]
    if 2 * len(unknown) <= len(names):
        return None
    if any(map(_ORIGINAL.fullmatch, unknown)):
        return (
            "the tensors have the names of the model's authors (layers.0.attention.wq.weight ...), expected those of "
            "transformers: download model.safetensors, or the shards with their index"
        )
    prefix = max(_prefixes(unknown), key=lambda prefix: _known_under(prefix, unknown, is_known), default="")
    if prefix and 2 * _known_under(prefix, unknown, is_known) > len(unknown):
        return (
            f"{len(unknown)} of {len(names)} tensors have the prefix {prefix!r} ({unknown[0]} ...), which the model's "
            "names do not have: save the tensors without it, or save only that part of the model"
        )
    if len(unknown) < len(names):
        return None
    counts = Counter(name.partition(".")[0] for name in names).most_common(3)
    groups = ", ".join(f"{first} ({count})" for first, count in counts)
    return (
        f"none of the {len(names)} tensors has a name of this architecture: the names begin with {groups}: check "
        "model_type in the config"
    )


def _prefixes(names: Sequence[str]) -> list[str]:
    """Beginnings of names, whole words of them, that at least half of the names have; the shortest first."""
    counts = Counter(name[: end.end()] for name in names for end in re.finditer(r"\.", name))
    common = [prefix for prefix, count in counts.items() if 2 * count > len(names)]
    return sorted(common, key=len)


def _known_under(prefix: str, names: Sequence[str], is_known: Callable[[str], bool]) -> int:
    return sum(name.startswith(prefix) and is_known(name.removeprefix(prefix)) for name in names)
