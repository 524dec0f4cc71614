"""`python -m iceformer` and the command `iceformer`: only what makes Ctrl-C plain while the rest is imported."""

import os
import sys

_INTERRUPTED = 130
"""The exit code after Ctrl-C."""


def main() -> None:
    """Runs the command line of the process and exits."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None
    try:
        run()
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            # What XLA was compiling is half made, and taking it apart with the interpreter can crash.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_INTERRUPTED)
        raise


if __name__ == "__main__":
    main()
