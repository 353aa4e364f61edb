"""Corrects the state of Lightning's fit loop in a checkpoint where Lightning would not resume exactly from it."""

from __future__ import annotations

import copy
from typing import Any

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.loop_counts import recount
from lightning_pipelite.shared.wording import counted

_BATCHES = "epoch_loop.batch_progress"
_EVALUATED = "epoch_loop.val_loop.batch_progress"


def at_step_end(fit_loop: dict[str, Any], ahead: int, loaders: list[Any], evaluated: bool) -> dict[str, Any]:
    """Return the state of the fit loop as of the end of the last step.

    The weights do not change until the next step ends, so a checkpoint requested in between can still be that of the
    last step.

    Args:
        fit_loop: Its current ``state_dict()``.
        ahead: Number of micro-batches fetched since then.
        loaders: The states of the data loaders at the end of that step.
        evaluated: Whether an evaluation ran right after that step.
    """
    fit_loop = copy.deepcopy(fit_loop)
    for span in ("total", "current"):
        counts = fit_loop[_BATCHES][span]
        ready = counts["ready"] - ahead
        # As in the last hook of a batch, or in the evaluation that follows it: Lightning can resume from both.
        counts.update(ready=ready, started=ready, processed=ready, completed=ready if evaluated else ready - 1)
        epoch = fit_loop["epoch_progress"][span]  # still under way, though stopping here may have counted it already
        epoch.update(processed=epoch["ready"] - 1, completed=epoch["ready"] - 1)
    fit_loop[_BATCHES]["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # Lightning counts a step after its hooks
    if loaders:
        fit_loop["state_dict"]["combined_loader"] = loaders
    return fit_loop


def before_training(fit_loop: dict[str, Any], loaders: list[Any]) -> dict[str, Any]:
    """Return the state of the fit loop before the first micro-batch.

    From the uncorrected state, Lightning (2.6) would count a step on resuming.

    Args:
        fit_loop: Its ``state_dict()``.
        loaders: The states of the data loaders, if they differ from those in ``fit_loop``.
    """
    fit_loop = copy.deepcopy(fit_loop)
    if loaders:
        fit_loop["state_dict"]["combined_loader"] = loaders
    for span in ("total", "current"):
        fit_loop[_BATCHES][span]["completed"] = -1
        fit_loop["epoch_progress"][span]["ready"] = fit_loop["epoch_progress"][span]["started"]
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = -1
    return fit_loop


def before_evaluation(fit_loop: dict[str, Any], loaders: list[Any]) -> dict[str, Any]:
    """Return the state of the fit loop between a step and the evaluation right after it, or within that evaluation.

    It is the state of a run stopped at the evaluation's first batch: Lightning (2.6) then starts the evaluation again.

    Args:
        fit_loop: Its ``state_dict()``, in the last hook of a batch or later.
        loaders: The states of the data loaders, if they differ from those in ``fit_loop``.
    """
    fit_loop = copy.deepcopy(fit_loop)
    for span in ("total", "current"):
        counts = fit_loop[_BATCHES][span]
        counts.update(processed=counts["ready"], completed=counts["ready"])
        fit_loop[_EVALUATED][span].update(ready=1, started=1, processed=0, completed=0)
    fit_loop[_EVALUATED]["is_last_batch"] = False
    if loaders:
        fit_loop["state_dict"]["combined_loader"] = loaders
    return fit_loop


def between_batches(fit_loop: dict[str, Any], loaders: list[Any], evaluated: bool, training: bool) -> dict[str, Any]:
    """Return the state of a fit loop that an error has stopped between a step and the first micro-batch of the next.

    Args:
        fit_loop: Its current ``state_dict()``.
        loaders: The states of the data loaders at the end of the step.
        evaluated: Whether an evaluation ran right after that step.
        training: Whether the error occurred outside an evaluation.
    """
    fit_loop = copy.deepcopy(fit_loop)
    if loaders:
        fit_loop["state_dict"]["combined_loader"] = loaders
    epoch, batches = fit_loop["epoch_progress"]["current"], fit_loop[_BATCHES]["current"]
    if epoch["started"] < epoch["ready"]:  # in the first hooks of an epoch, so it has not begun
        for span in ("total", "current"):
            fit_loop["epoch_progress"][span]["ready"] -= 1
    elif training and epoch["processed"] < epoch["ready"] and 0 < batches["ready"] == batches["completed"]:
        for span in ("total", "current"):
            fit_loop[_BATCHES][span]["completed"] -= 0 if evaluated else 1
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    return fit_loop


def after_last_batch(fit_loop: dict[str, Any], by_steps: bool) -> None:
    """Correct, in place, a state saved in ``on_train_epoch_end`` or later; leave others unchanged.

    If the epoch's data was used up, the epoch is counted as complete and its last batch as not yet completed, so that
    Lightning (2.6) resets the batch counts. Uncorrected, with ``max_steps`` it would resume within the epoch that has
    ended and repeat the order of its data; with ``max_epochs`` it needs no correction. If training was stopped within
    the epoch, Lightning has counted the epoch nevertheless; the state then becomes that of the last batch.

    Args:
        fit_loop: The state; a second call changes nothing.
        by_steps: Whether the resuming training has ``max_steps``.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop[_BATCHES]
    now, batch = epochs["current"], batches["current"]
    in_hook = now["processed"] == now["completed"] + 1
    later = now["ready"] == now["processed"] == now["completed"]
    over = batches["is_last_batch"]
    if not (in_hook or later) or not 0 < batch["ready"] == batch["completed"] or (over and not by_steps):
        return
    for span in ("total", "current"):
        number = epochs[span]["processed"]
        done = number if over else number - 1
        epochs[span].update(ready=number, started=number, processed=done, completed=done)
        batches[span]["completed"] = batches[span]["ready"] - 1
    batches["is_last_batch"] = False  # otherwise Lightning would count the epoch again
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def for_replicas(loops: dict[str, Any], before: tuple[int, int], after: tuple[int, int]) -> None:
    """Adjust the micro-batch counters, which Lightning keeps per replica, to the current number of replicas.

    Args:
        loops: The states of all loops, changed in place.
        before: Numbers of replicas and of micro-batches per step on each, when the checkpoint was written.
        after: The same now.

    Raises:
        ConfigurationError: If the global batch size differs.
    """
    if before == after:
        return
    (replicas, batches), (replicas_now, batches_now) = before, after
    a_step = replicas * batches
    if a_step != replicas_now * batches_now:
        advice = (
            f"set accumulate_grad_batches to {a_step // replicas_now}"
            if a_step % replicas_now == 0
            else f"choose a number of replicas that divides {a_step}"
        )
        raise ConfigurationError(
            f"ckpt_path: the checkpoint was trained with {counted(a_step, 'micro-batch')} per step ({batches} on each "
            f"of {counted(replicas, 'replica')}), not {replicas_now * batches_now} ({batches_now} on each of "
            f"{replicas_now}): {advice}."
        )
    progress = loops["fit_loop"][_BATCHES]
    for span in ("total", "current"):
        # An incomplete last round counts as a full one.
        recount(progress[span], -(-progress[span]["ready"] * replicas // replicas_now))
