"""Early stopping: rules that end a trial before its last epoch. They depend only on its raw curves up to an epoch.

So a trial that is resumed from a checkpoint stops at the same epoch as without a break. Training ends after the first
epoch at which a rule applies. E_va is the validation loss, E_tr the training loss, both by epoch. A strip is `strip`
successive epochs. The first one is epochs 1 to `strip`.

GL, PQ and UP: L. Prechelt, Early Stopping - But When?, 1998, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from hpo.spec.metrics import column, direction
from hpo.spec.training import Stopping

Curves = Mapping[str, Sequence[float]]  # raw values by epoch, under the names of the ledger
TRAINING, VALIDATION, SECONDS, GRADIENT = "train_loss", "validation_loss", "seconds", "gradient_norm"


def verdict(settings: Stopping, curves: Curves) -> str | None:
    """Return in one line why a training ends after the last epoch of its curves; None if it continues."""
    if len(curves[VALIDATION]) < settings.min_epochs:
        return None
    reasons = [rule(settings, curves) for name, rule in RULES.items() if getattr(settings, name) is not None]
    return "; ".join(filter(None, reasons)) or None


def columns(settings: Stopping) -> list[str]:
    """Return the names of the curves that `verdict` needs."""
    found = [TRAINING, VALIDATION, SECONDS]
    found += [column(settings.monitor)] if settings.monitor else []
    found += [GRADIENT] if settings.gradient_norm is not None else []
    return list(dict.fromkeys(found))


# --- the rules; each returns why a training ends after the last epoch, or None -------------------------------------------


def patience(settings: Stopping, curves: Curves) -> str | None:
    """Stop if no epoch of the last `patience` improved on the best value b by more than max(min_delta, min_relative * |b|)."""
    assert settings.patience is not None
    assert settings.monitor is not None
    curve = curves[column(settings.monitor)]
    epoch = last_improvement(
        curve, settings.min_delta, settings.min_relative, maximize=direction(settings.monitor) == "maximize"
    )
    if len(curve) - epoch < settings.patience:
        return None
    best = f"the {curve[epoch - 1]:.6g} of epoch {epoch}" if epoch else "no number"
    return f"stopping.patience = {settings.patience}: validation {settings.monitor} did not improve on {best}"


def gl(settings: Stopping, curves: Curves) -> str | None:
    """Stop by GL(alpha): the generalisation loss is above alpha percent."""
    assert settings.gl is not None
    found = generalisation_loss(curves[VALIDATION])
    return f"stopping.gl = {settings.gl:g}: the generalisation loss is {found:.4g} %" if found > settings.gl else None


def pq(settings: Stopping, curves: Curves) -> str | None:
    """Stop by PQ(alpha, k): at a strip's end, generalisation loss divided by training progress is above alpha."""
    assert settings.pq is not None
    if not _ends_strip(settings, curves):
        return None
    loss = generalisation_loss(curves[VALIDATION])
    progress = training_progress(curves[TRAINING][-settings.strip :])
    if not loss > settings.pq * progress:
        return None
    return f"stopping.pq = {settings.pq:g}: generalisation loss {loss:.4g} % at a training progress of {progress:.4g}"


def up(settings: Stopping, curves: Curves) -> str | None:
    """Stop by UP(s): the validation loss rose in s successive strips, E_va(t) > E_va(t - k) at the end t of each."""
    assert settings.up is not None
    if not _ends_strip(settings, curves):
        return None
    ends = curves[VALIDATION][settings.strip - 1 :: settings.strip][-settings.up - 1 :]
    if len(ends) <= settings.up or not all(later > earlier for earlier, later in pairwise(ends)):
        return None
    return (
        f"stopping.up = {settings.up}: the validation loss rose over {settings.up} strips of {settings.strip} epochs, "
        f"from {ends[0]:.6g} to {ends[-1]:.6g}"
    )


def max_seconds(settings: Stopping, curves: Curves) -> str | None:
    """Stop if all epochs together, with validation, took `max_seconds` or more."""
    assert settings.max_seconds is not None
    spent = math.fsum(curves[SECONDS])
    if spent < settings.max_seconds:
        return None
    return f"stopping.max_seconds = {settings.max_seconds:g}: trained for {spent:.3g} s"


def gradient_norm(settings: Stopping, curves: Curves) -> str | None:
    """Stop if the mean 2-norm of the epoch's gradients, before clipping, is below `gradient_norm`."""
    assert settings.gradient_norm is not None
    found = curves[GRADIENT][-1]
    if not found < settings.gradient_norm:
        return None
    return f"stopping.gradient_norm = {settings.gradient_norm:g}: the gradient's mean norm is {found:.4g}"


RULES: dict[str, Callable[[Stopping, Curves], str | None]] = {
    "patience": patience,
    "gl": gl,
    "pq": pq,
    "up": up,
    "max_seconds": max_seconds,
    "gradient_norm": gradient_norm,
}


def _ends_strip(settings: Stopping, curves: Curves) -> bool:
    return len(curves[VALIDATION]) % settings.strip == 0


# --- quantities of the rules ----------------------------------------------------------------------------------------------


def generalisation_loss(validation: Sequence[float]) -> float:
    """Return GL(t) = 100 * (E_va(t) / E_opt(t) - 1) in percent, where E_opt(t) is the lowest validation loss up to t."""
    lowest, last = min(validation), validation[-1]
    if last == lowest:
        return 0.0
    return 100 * (last / lowest - 1) if lowest > 0 else math.inf


def training_progress(strip: Sequence[float]) -> float:
    """Return P_k(t) = 1000 * (mean / min - 1) of a strip's training losses, in thousandths."""
    lowest = min(strip)
    if max(strip) == lowest:
        return 0.0
    return 1000 * (math.fsum(strip) / (len(strip) * lowest) - 1) if lowest > 0 else math.inf


def last_improvement(curve: Sequence[float], min_delta: float, min_relative: float, *, maximize: bool) -> int:
    """Return the last epoch, from 1, that improved on the best value by more than max(min_delta, min_relative * |best|).

    The first finite value is an improvement. A smaller improvement does not change the best value. 0 if no value is
    finite.
    """
    sign, best, epoch = (1.0 if maximize else -1.0), None, 0
    for number, value in enumerate(curve, start=1):
        if not math.isfinite(value):
            continue
        if best is None or sign * (value - best) > max(min_delta, min_relative * abs(best)):
            best, epoch = value, number
    return epoch


def overfits_since(training: Sequence[float], validation: Sequence[float], *, percent: float = 5.0) -> int | None:
    """Return the epoch of the lowest validation loss, from 1, if the model overfits since then, else None.

    It overfits if the final generalisation loss is above `percent` and the training loss is lower than at that epoch. A
    negative loss, as gaussian_nll has, tells no percentage.
    """
    if not validation or not all(map(math.isfinite, (*training, *validation))) or min(validation) < 0:
        return None
    best = min(range(len(validation)), key=validation.__getitem__)
    is_worse = generalisation_loss(validation) > percent
    return best + 1 if is_worse and training[-1] < training[best] else None
