"""The names of metrics; nothing long is imported for them."""


def is_logged(name: str) -> bool:
    """Whether a metric of that name can come from PipeLiteModule, its strategy or the callbacks of this package."""
    # Their names in training depend on the adapter and the device; LearningRateMonitor's begin with lr-.
    return name in ("eval/loss", "eval/perplexity") or name.startswith(("eval/loss/", "train/", "lr-"))
