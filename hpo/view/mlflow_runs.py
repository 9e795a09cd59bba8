"""Writes a study into MLflow: a parent run for the study, and in it a run for each trial. Our storage is only read.

A run is found again by its tags, so a second export updates and never duplicates. Needs the extra `mlflow`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when MLflow is imported

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from hpo.errors import Fault
from hpo.storage.redaction import redacted_text
from hpo.study import status, trial_records
from hpo.study.query.changes import Cursor
from hpo.study.status import Past, Summary
from hpo.study.study import Study
from hpo.study.trial_records import TrialRecord

if TYPE_CHECKING:
    from collections.abc import Mapping

PARENT, NAME = "mlflow.parentRunId", "mlflow.runName"  # MLflow's own tags
UID, TRIAL, STATE, IS_FINAL = "hpo_study_uid", "hpo_trial", "hpo_state", "hpo_is_final"
OF_STUDY = "study"  # in place of a trial's number
STATUS = {"complete": "FINISHED", "fail": "FAILED", "pruned": "KILLED", "parked": "SCHEDULED"}  # all others: RUNNING
RECEIPT = ("seed", "commit", "device", "processor", "threads", "executor", "host", "data_digest", "best_step")
PACKAGES = ("torch", "optuna")
LONGEST_PARAM = 6000  # characters that MLflow takes
BATCH = 100  # entries that MLflow takes at once
PAGE = 1000


class Exporter:
    """Writes one study."""

    def __init__(self, study: Study, uri: str) -> None:
        """Find or make the experiment and the parent run. Raises Fault if MLflow refuses."""
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._study = study
        self._cursor = Cursor()
        self._past: Past | None = None
        with refused(uri):
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(study.name)
            self._experiment = found.experiment_id if found else self._client.create_experiment(study.name)
            self._runs = {run.data.tags[TRIAL]: run for run in self._found()}
            self._parent = self._run_of(OF_STUDY, study.name, {})
        self._uri = uri
        self.shown = redacted_text(uri)

    def export(self) -> Summary:
        """Write what has changed since the last call, and return the study's summary. Raises Fault if MLflow refuses."""
        reading = status.read(self._study, self._past)  # first: a trial that ends meanwhile is written by the next call
        records = trial_records.read(self._study, self._cursor)
        with refused(self._uri):
            for trial in records.trials:
                self._write(trial)
            self._write_study(reading.summary)
        self._past, self._cursor = reading.past, records.cursor
        return reading.summary

    def _found(self) -> Iterator[Run]:
        """Return the study's runs that are there."""
        token: str | None = None
        while True:
            filters = f"tags.{UID} = '{self._study.uid}'"
            page = self._client.search_runs([self._experiment], filters, max_results=PAGE, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _run_of(self, key: str, name: str, more: Mapping[str, str], began: float | None = None) -> Run:
        if key not in self._runs:
            tags = {UID: self._study.uid, TRIAL: key, "hpo_study": self._study.name, NAME: name, **more}
            start = None if began is None else milliseconds(began)
            self._runs[key] = self._client.create_run(self._experiment, start_time=start, tags=tags)
        return self._runs[key]

    def _write(self, trial: TrialRecord) -> None:
        parent = {PARENT: self._parent.info.run_id}
        run = self._run_of(str(trial.number), f"trial {trial.number}", parent, trial.began)
        if run.data.tags.get(IS_FINAL) == "true":
            return
        self._log_metrics(run, trial)
        params = [
            Param(key, str(value)[:LONGEST_PARAM]) for key, value in trial.params.items() if key not in run.data.params
        ]
        self._log(run, *params)
        state = STATUS.get(trial.state, "RUNNING")
        if trial.ended is None:
            self._client.update_run(run.info.run_id, status=state)
        else:
            self._client.set_terminated(run.info.run_id, status=state, end_time=milliseconds(trial.ended))
        self._log(run, *(RunTag(key, value) for key, value in tags_of(trial).items()))  # last: it may say "final"
        self._runs[str(trial.number)] = self._client.get_run(run.info.run_id)

    def _log_metrics(self, run: Run, trial: TrialRecord) -> None:
        """Write the points that are missing. MLflow deletes none: of a step that was trained again it keeps both values."""
        now = milliseconds(trial.began)  # always the same, so a point that is written twice is one
        last = max((step for curve in trial.curves.values() for step in curve), default=0)
        finals = {f"final_{name}": {last: value} for name, value in trial.values.items()}
        metrics = []
        for key, curve in {**trial.curves, **finals}.items():
            there = run.data.metrics.get(key) is not None
            known = (
                {(one.step, one.value) for one in self._client.get_metric_history(run.info.run_id, key)}
                if there
                else ()
            )
            metrics += [Metric(key, value, now, step) for step, value in curve.items() if (step, value) not in known]
        self._log(run, *metrics)

    def _write_study(self, summary: Summary) -> None:
        spec = self._study.spec
        tags = {
            STATE: "over" if summary.is_over else "open",
            "hpo_direction": str(spec.direction) if not spec.objectives else str(dict(spec.objectives)),
            "hpo_sampler": summary.sampler,
            "hpo_pruner": summary.pruner,
            **({} if summary.best is None else {"hpo_best_trial": str(summary.best.number)}),
        }
        self._log(self._parent, *(RunTag(key, value) for key, value in tags.items()))
        run_id = self._parent.info.run_id
        if summary.best is not None:
            found = Metric("best_value", summary.best.value, self._parent.info.start_time, summary.finished)
            self._log(self._parent, found)  # a point that is there already is not written again
        if summary.is_over:
            self._client.set_terminated(run_id, status="FINISHED")
        else:
            self._client.update_run(run_id, status="RUNNING")

    def _log(self, run: Run, *found: Metric | Param | RunTag) -> None:
        for start in range(0, len(found), BATCH):
            batch = found[start : start + BATCH]
            self._client.log_batch(
                run.info.run_id,
                metrics=[one for one in batch if isinstance(one, Metric)],
                params=[one for one in batch if isinstance(one, Param)],
                tags=[one for one in batch if isinstance(one, RunTag)],
            )


def tags_of(trial: TrialRecord) -> dict[str, str]:
    """Return the tags of a trial's run: its state, and the main fields of its receipt."""
    versions = trial.receipt.get("versions", {})
    told = {f"hpo_{key}": trial.receipt.get(key) for key in RECEIPT}
    told |= {f"hpo_{package}_version": versions.get(package) for package in PACKAGES}
    told |= {STATE: trial.state, "hpo_outcome": trial.outcome, "hpo_attempts": trial.attempts}
    told |= {IS_FINAL: "true" if trial.is_final else "false"}
    return {key: str(value) for key, value in told.items() if value not in (None, "")}


def milliseconds(seconds: float) -> int:
    """Return a time as MLflow counts it."""
    return round(1000 * seconds)


@contextmanager
def refused(uri: str) -> Iterator[None]:
    """Turn an error of MLflow into a Fault."""
    try:
        yield
    except MlflowException as error:
        raise Fault(f"MLflow at {redacted_text(uri)}: {error}") from error
