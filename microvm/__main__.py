"""``python -m microvm``."""

from __future__ import annotations

import sys

from microvm.cli import main

sys.exit(main())
