"""Puts ``tests/support`` on the path: benchmarks share with the tests what they train and compare.

Only imported for this effect, before the modules from there: a benchmark is run by its path, so only its own folder is
on Python's path.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
