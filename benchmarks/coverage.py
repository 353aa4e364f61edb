"""Which of transformers' causal LMs train exactly as a pipeline; writes docs/coverage.md.

    python benchmarks/coverage.py [--write] [name ...]

Tries the published models of tests/support/published_bases.py, built narrow from their own config.json, and every entry
of transformers' causal-LM mapping. For each, a model of a few layers with random weights (norms, biases and scales
moved away from their initial values) is saved and run in float32 on the CPU, in one stage, in two, and in as many as it
can be cut into. Each stage is loaded from disk, and its layers are recomputed in the backward pass. Checked are:

- logits and the gradient of every parameter, against the unsplit model,
- every parameter and buffer of every stage, bit for bit, against the unsplit model loaded from the same files,
- packed documents, against each document alone; as a control, the second one must differ if it can attend to the first,
- for a published model, the kinds of modules and parameters of the tiny model, against those of the real one,
- for a published model, a LoRA trained for two steps in two stages, against PEFT on the whole model that loads it, and
  two stages with load_in_4bit, against the unsplit model with the weights that bitsandbytes dequantises.

"exact": all of it within 1e-5 (of the largest value, where that is more than 1). "refused": the package says why before
it loads anything. Where packing is refused, the rest is exact with one document a sequence.

Exits with 1 if a model is wrong.
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
from published_bases import PUBLISHED
from tiny_families import Outcome, try_model, try_published

DOCS = Path(__file__).parent.parent / "docs"
PUBLISHED_LAYERS = 12  # a few of each kind that a hybrid has
LONGEST_NOTE = 120  # in docs/coverage.md


PREFACE = """# Which models train as a pipeline

Written by `make coverage` with transformers {transformers}, torch {torch}. **{summary}.**

- *exact*: logits and the gradient of every parameter equal the unsplit model's within 1e-5, and the weights of each
  stage equal the files' bit for bit, at every number of stages given, in float32.
- *one stage*: exact, but the layers cannot be cut without a change of the result: `pipeline_stages: 1`, with replicas.
- *packing*: *isolated*, where packed documents equal each document alone within 1e-5; *refused*, where the model would
  leak from one document into the next, and trains with `packed: false`, one document a sequence.
- *LoRA*: *equal*, where PEFT, on the whole model, gives the logits of the two stages that trained it within 1e-5;
  *equal on attention*, where that is so with target_modules of attention, as the default's are refused for the reason.
- *4 bits*: *equal*, where each weight in nf4 is bitsandbytes' bit for bit, and the logits of two stages are those of
  the unsplit model with such weights within 1e-5.
- *refused*: with the reason, before anything is loaded.
- *not tried*: no tiny model could be built here. Your model is checked in the same way before it is loaded.

For multimodal models, the text model is checked.
"""
BASES = """
## Published models

By their own config.json, narrow, with their first {layers} layers.
"""
TYPES = """
## All types

Every causal LM in transformers' mapping by its defaults, narrow, with four layers.
"""


def table(bases: list[Outcome], types: list[Outcome], summary: str) -> str:
    """Return docs/coverage.md."""
    import transformers

    preface = PREFACE.format(transformers=transformers.__version__, torch=torch.__version__, summary=summary)
    model_types = {name: PUBLISHED[name]["model_type"] for name in PUBLISHED}
    parts = [preface]
    if bases:
        parts += [
            BASES.format(layers=PUBLISHED_LAYERS),
            "| model | type | result | stages | packing | LoRA | 4 bits | reason |",
        ]
        parts += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        parts += [_row(o, f"{o.model_type} | {model_types[o.model_type]}", o.lora, o.four_bit) for o in bases]
    parts += [TYPES, "| type | result | stages | packing | reason |", "| --- | --- | --- | --- | --- |"]
    parts += [_row(o, o.model_type) for o in types]
    return "\n".join([*parts, ""])


def _row(outcome: Outcome, name: str, *more: str) -> str:
    note = outcome.note.replace("|", "/")
    if len(note) > LONGEST_NOTE:
        note = note[:LONGEST_NOTE].rpartition(" ")[0] + " ..."
    result = "one stage" if outcome.result == "exact" and outcome.stages == "1" else outcome.result
    cells = (name, result, outcome.stages, outcome.packing, *more, note)
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Try the models and types, print a line for each, and return 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="types, or published models; by default, all of both")
    parser.add_argument("--write", action="store_true", help="write docs/coverage.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    names = options.names or [*sorted(PUBLISHED, key=str.lower), *sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]
    bases: list[Outcome] = []
    types: list[Outcome] = []
    for name in names:
        began = time.perf_counter()
        outcome = try_published(name, PUBLISHED_LAYERS) if name in PUBLISHED else try_model(name)
        (bases if name in PUBLISHED else types).append(outcome)
        seconds = time.perf_counter() - began
        stages = "1 stage" if outcome.stages == "1" else ""
        print(
            f"{outcome.result:9} {name:28} {stages:7} {outcome.packing:9} {seconds:4.1f} s  {outcome.note}", flush=True
        )
    summary = f"Published models: {count(bases)}; types: {count(types)}"
    print(summary)
    if options.write:
        DOCS.mkdir(exist_ok=True)
        (DOCS / "coverage.md").write_text(table(bases, types, summary))
    return int(any(outcome.result == "WRONG" for outcome in (*bases, *types)))


def count(outcomes: list[Outcome]) -> str:
    """Return how many have which result."""
    whole = sum(outcome.result == "exact" and outcome.stages == "1" for outcome in outcomes)
    results = {r: sum(o.result == r for o in outcomes) for r in ("exact", "refused", "WRONG", "not tried")}
    return (
        f"{results['exact'] - whole} exact in stages, {whole} in one stage, {results['refused']} refused, "
        f"{results['WRONG']} wrong, {results['not tried']} not tried"
    )


if __name__ == "__main__":
    sys.exit(main())
