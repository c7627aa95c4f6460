"""`python -m sim`: one run, a sweep over many seeds, or the report."""

from __future__ import annotations

import sys

from sim.commands import main

sys.exit(main(sys.argv[1:]))
