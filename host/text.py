"""Text from files and stdin, read in one way.

It is UTF-8. A byte order mark is removed, `\\r\\n` is read as `\\n`, and one line end at the very end is removed. Lines
end at `\\n` only: form feeds, lone carriage returns, U+0085 and U+2028 are characters like others.
"""

import codecs
import sys
from pathlib import Path

_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the file cannot be opened.
        ValueError: it is not UTF-8, or holds zero bytes.
    """
    return decode(file.read_bytes(), str(file))


def read_stdin() -> str:
    """The text of stdin; ValueError if it is closed, or as `read_text`."""
    if sys.stdin is None:
        raise ValueError("stdin is closed: give the text as an argument or in a file")
    return decode(sys.stdin.buffer.read(), "stdin")


def decode(data: bytes, name: str) -> str:
    """The text of bytes; ValueError, with the name and the place, if they are not UTF-8 or hold zero bytes."""
    for mark, encoding in _OTHER_MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"{name} is {encoding} text, expected UTF-8: {_how_to_save(encoding)}")
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start + mark
        raise ValueError(
            f"{name} is not UTF-8 text: it has the byte 0x{data[at]:02x} at offset {at}; "
            f"{_how_to_save('the encoding that it is in, such as LATIN1')}"
        ) from None
    if (zero := data.find(b"\0")) >= 0:
        raise ValueError(
            f"{name} has a zero byte at offset {zero}: it is no text, or in UTF-16; {_how_to_save('UTF-16')}"
        )
    text = text.replace("\r\n", "\n")
    return text.removesuffix("\n")


def lines_of(text: str) -> list[str]:
    """The lines of a text that was read here; none of an empty one."""
    return text.split("\n") if text else []


def _how_to_save(encoding: str) -> str:
    return f"save it as UTF-8, for example with `iconv -f {encoding.partition(', such as ')[2] or encoding} -t UTF-8`"
