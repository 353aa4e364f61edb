"""Which of transformers' causal LMs train exactly as a pipeline: docs/coverage.md.

    python benchmarks/coverage.py [--write] [model_type ...]

For every entry of transformers' causal-LM mapping, a model of four layers with random weights (norms, biases and scales
moved away from their initial values) is saved and tried in float32 on the CPU, in one, two and as many stages as it has
items to deal out, each stage loaded from the disk and its layers recomputed in the backward pass:

- logits and the gradient of every parameter against the unsplit model,
- every parameter and buffer of every stage, bit for bit, against the unsplit model loaded from the same files,
- packed documents against each document alone, with the control that unpacked the second one differs.

"exact": all of it within 1e-5 (of the largest value, where that is more than 1). "refused": the package says why before
it loads anything. Where packing is refused, the rest is exact with one document a sequence. Exits with 1 if a model is
wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import tests_support  # noqa: F401
from tiny_families import Outcome, try_model

DOCS = Path(__file__).parent.parent / "docs"


PREFACE = """# Which models train as a pipeline

Written by `make coverage` with transformers {transformers}, torch {torch}. **{summary}.**

Every causal LM in transformers' mapping, as a model of four layers with random weights in float32. Of a model with
images or sound it is the text model.

- *exact*: logits and the gradient of every parameter equal the unsplit model's within 1e-5, and the weights of each
  stage equal the files' bit for bit, at every number of stages given.
- *packing*: *isolated*, where packed documents equal each document alone within 1e-5; *refused*, where the model would
  leak from one document into the next, and trains with `packed: false`, one document a sequence.
- *refused*: with the reason, before anything is loaded.
- *not tried*: no tiny model of the type could be built here. Your model is put to the same trial before it is loaded.
"""


def table(outcomes: list[Outcome], summary: str) -> str:
    """Return docs/coverage.md."""
    import transformers

    head = [
        PREFACE.format(transformers=transformers.__version__, torch=torch.__version__, summary=summary),
        "| model type | result | stages of 4 layers | packing | reason |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = [
        f"| {o.model_type} | {o.result} | {o.stages} | {o.packing} | {o.note.replace('|', '/')} |" for o in outcomes
    ]
    return "\n".join([*head, *rows, ""])


def main() -> int:
    """Try the types, print a line for each, and return 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="all of the mapping by default")
    parser.add_argument("--write", action="store_true", help="write docs/coverage.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    outcomes = []
    for model_type in options.model_types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        began = time.perf_counter()
        outcome = try_model(model_type)
        outcomes.append(outcome)
        seconds = time.perf_counter() - began
        print(f"{outcome.result:9} {model_type:28} {outcome.packing:9} {seconds:4.1f} s  {outcome.note}", flush=True)
    counts = {
        result: sum(o.result == result for o in outcomes) for result in ("exact", "refused", "WRONG", "not tried")
    }
    summary = f"{counts['exact']} exact, {counts['refused']} refused, {counts['WRONG']} wrong"
    print(f"{summary} ({counts['not tried']} not tried)")
    if options.write:
        DOCS.mkdir(exist_ok=True)
        (DOCS / "coverage.md").write_text(table(outcomes, f"{summary}, {counts['not tried']} not tried"))
    return int(counts["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main())
