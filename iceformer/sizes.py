"""Sizes on the command line."""

import re


def read_size(text: str, what: str) -> int:
    """A number of bytes, with K, M or G for powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{what} is {text!r}, expected a number of bytes such as 500M or 2G")
    return int(float(match[1]) * 1024 ** " KMG".index(match[2].upper() or " "))
