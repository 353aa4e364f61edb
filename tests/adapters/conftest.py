import sys
from pathlib import Path

# tiny_models, stage_jobs
sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("models", "strategy")]
