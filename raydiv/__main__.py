"""``python -m raydiv``."""

import sys

from raydiv.cli import main

sys.exit(main())
