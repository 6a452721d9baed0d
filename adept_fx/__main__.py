"""``python -m adept_fx`` is ``adept-fx``."""

import sys

from adept_fx.cli import main

if __name__ == "__main__":
    sys.exit(main())
