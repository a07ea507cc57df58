"""``python -m cached``: the same as the command ``cached``."""

from __future__ import annotations

import sys

from cached.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
