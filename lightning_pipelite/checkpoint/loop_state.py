"""The state of Lightning's fit loop in a checkpoint, put right where Lightning would not resume exactly from it."""

from __future__ import annotations

import copy
from typing import Any

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.loop_counts import recount
from lightning_pipelite.shared.wording import counted

_BATCHES = "epoch_loop.batch_progress"
_EVALUATED = "epoch_loop.val_loop.batch_progress"


def at_step_end(fit_loop: dict[str, Any], ahead: int, loaders: list[Any], evaluated: bool) -> dict[str, Any]:
    """Return the state of the fit loop when the last step ended.

    Until the next step ends the weights are what they were then, so that a checkpoint that is asked for in between can
    still be that of the last step.

    Args:
        fit_loop: Its ``state_dict()``, now.
        ahead: How many micro-batches have been taken since.
        loaders: The states of the data loaders at that time.
        evaluated: Whether there was an evaluation right after that step.
    """
    fit_loop = copy.deepcopy(fit_loop)
    for span in ("total", "current"):
        counts = fit_loop[_BATCHES][span]
        ready = counts["ready"] - ahead
        # Within the last hook of a batch, or within the evaluation that follows: there Lightning can resume.
        counts.update(ready=ready, started=ready, processed=ready, completed=ready if evaluated else ready - 1)
        epoch = fit_loop["epoch_progress"][span]  # under way, though one that is stopped here may have been counted
        epoch.update(processed=epoch["ready"] - 1, completed=epoch["ready"] - 1)
    fit_loop[_BATCHES]["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # Lightning counts a step after its hooks
    if loaders:
        fit_loop["state_dict"]["combined_loader"] = loaders
    return fit_loop


def before_training(fit_loop: dict[str, Any], loaders: list[Any]) -> dict[str, Any]:
    """Return the state of the fit loop before the first micro-batch.

    Lightning (2.6) would count a step when it resumes.

    Args:
        fit_loop: Its ``state_dict()``.
        loaders: The states of the data loaders if they are others than in ``fit_loop``.
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

    As one that was stopped within the evaluation, at its first batch: that Lightning (2.6) takes up from the beginning.

    Args:
        fit_loop: Its ``state_dict()``, in the last hook of a batch or later.
        loaders: The states of the data loaders if they are others than in ``fit_loop``.
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
    """Return the state of the fit loop that an error has stopped between a step and the first micro-batch of the next.

    Args:
        fit_loop: Its ``state_dict()``, now.
        loaders: The states of the data loaders when the step ended.
        evaluated: Whether there was an evaluation right after that step.
        training: Whether the error was not in an evaluation.
    """
    fit_loop = copy.deepcopy(fit_loop)
    if loaders:
        fit_loop["state_dict"]["combined_loader"] = loaders
    epoch, batches = fit_loop["epoch_progress"]["current"], fit_loop[_BATCHES]["current"]
    if epoch["started"] < epoch["ready"]:  # in the first hooks of an epoch, which then has not begun
        for span in ("total", "current"):
            fit_loop["epoch_progress"][span]["ready"] -= 1
    elif training and epoch["processed"] < epoch["ready"] and 0 < batches["ready"] == batches["completed"]:
        for span in ("total", "current"):
            fit_loop[_BATCHES][span]["completed"] -= 0 if evaluated else 1
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    return fit_loop


def after_last_batch(fit_loop: dict[str, Any], by_steps: bool) -> None:
    """Put the state from ``on_train_epoch_end`` or later right, in place; leave others as they are.

    If the epoch's data was used up, it is counted as complete, and its last batch as not quite, from which Lightning
    (2.6) resets the counts of batches. Without, with ``max_steps`` it resumes within the epoch that has ended, and
    repeats the order of its data; with ``max_epochs`` it takes such a state up as it should. If training was stopped
    within the epoch, Lightning has counted that all the same; then the state becomes that of the last batch.

    Args:
        fit_loop: The state; a second call changes nothing.
        by_steps: Whether the training that resumes has ``max_steps``.
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
    batches["is_last_batch"] = False  # else Lightning would count the epoch once more
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def for_replicas(loops: dict[str, Any], before: tuple[int, int], after: tuple[int, int]) -> None:
    """Adjust the counters of micro-batches, which Lightning counts on one replica.

    Args:
        loops: All loops' states, changed in place.
        before: The numbers of replicas and of micro-batches a step of each, when the checkpoint was written.
        after: The same now.

    Raises:
        ConfigurationError: If the global batch is another one.
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
            f"ckpt_path: the checkpoint was trained with {counted(a_step, 'micro-batch')} a step ({batches} on each of "
            f"{counted(replicas, 'replica')}), not {replicas_now * batches_now} ({batches_now} on each of "
            f"{replicas_now}): "
            f"{advice}."
        )
    progress = loops["fit_loop"][_BATCHES]
    for span in ("total", "current"):
        # A last round that is not full is filled up.
        recount(progress[span], -(-progress[span]["ready"] * replicas // replicas_now))
