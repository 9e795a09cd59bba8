"""The section `recovery` of a study file: leases, checkpoints and restarts."""

from __future__ import annotations

from typing import Annotated

import pydantic
from annotated_types import Ge, Le

from hpo.errors import Mistakes
from hpo.spec.budget import MAX_TRIALS
from hpo.spec.durations import seconds
from hpo.spec.training import Positive


class Recovery(pydantic.BaseModel):
    """Leases, checkpoints and restarts of workers."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    lease: str = "60s"
    """A worker that is silent for longer loses its trial. Workers renew their leases three times in this time. Use 20s or more,
    which is longer than a wait for a database lock."""
    grace: str = "30s"
    """Time from the stop signal to the end of a worker process. The worker parks its trials in this time."""
    outage_patience: str = "10m"
    """How long a worker waits for a failing storage before it exits. It trains on meanwhile."""
    checkpoint_every: str = "30s"
    """Training time between two checkpoints. Each is written at the end of an epoch; "0s" writes one after every epoch."""
    keep_checkpoints: Annotated[int, Ge(0), Le(MAX_TRIALS)] = 1
    """Number of best COMPLETE trials whose last checkpoint is kept. With several objectives any number above 0 keeps the whole
    Pareto front."""
    rank_timeout: str = "30m"
    """With `processes_per_trial`: how long all processes of a trial may be silent before the attempt ends. Printed lines and
    reports count. Use more than the longest epoch takes."""
    recycle_trials: Positive = 10_000
    """Number of trials after which a worker process restarts."""
    recycle_growth_mb: Positive = 2048
    """Growth of a worker's resident memory, in MiB, after which its process restarts."""

    @property
    def lease_seconds(self) -> float:
        return seconds(self.lease, "recovery.lease")

    @property
    def grace_seconds(self) -> float:
        return seconds(self.grace, "recovery.grace")

    @property
    def rank_seconds(self) -> float:
        return seconds(self.rank_timeout, "recovery.rank_timeout")

    @property
    def outage_seconds(self) -> float:
        return seconds(self.outage_patience, "recovery.outage_patience")

    @property
    def checkpoint_seconds(self) -> float:
        return seconds(self.checkpoint_every, "recovery.checkpoint_every", zero=True)

    def check(self) -> None:
        """Raise SpecError that lists wrong durations."""
        mistakes = Mistakes()
        for key in ("lease_seconds", "grace_seconds", "rank_seconds", "outage_seconds", "checkpoint_seconds"):
            with mistakes.collect():
                getattr(self, key)
        mistakes.raise_if_any()
