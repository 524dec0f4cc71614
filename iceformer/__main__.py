"""`python -m iceformer` and the command `iceformer`: only what makes Ctrl-C plain while the rest is imported."""

import sys


def main() -> None:
    """Runs the command line of the process and exits."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
