import sys
from pathlib import Path

# for test_text_part
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
