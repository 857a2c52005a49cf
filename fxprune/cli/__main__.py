"""`python -m fxprune.cli`."""

from __future__ import annotations

import sys

from fxprune.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
