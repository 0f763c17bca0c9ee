"""``python -m marlkit`` is the command ``marlkit``."""

from __future__ import annotations

import sys

from marlkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
