"""``python -m marlkit`` is the command ``marlkit``."""

from __future__ import annotations

import signal
import sys


def command() -> int:
    """Run the command of this process; see :func:`marlkit.cli.main`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # While it is imported, an interrupt ends the process instead of raising an exception.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from marlkit.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(command())
