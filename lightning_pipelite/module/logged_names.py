"""The names of logged metrics; it imports nothing slow."""


def is_logged(name: str) -> bool:
    """Tell whether a metric of that name can come from PipeLiteModule, its strategy or this package's callbacks."""
    # Which train/ metrics there are depends on the adapter and the device; LearningRateMonitor's begin with lr-.
    return name in ("eval/loss", "eval/perplexity") or name.startswith(("eval/loss/", "train/", "lr-"))
