"""Puts ``tests/support`` on the path: benchmarks share with the tests what they train and compare.

Imported for that alone, before what lies there. A benchmark is run by its path, so that Python knows its folder only.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
