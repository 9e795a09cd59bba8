"""The trial that an objective gets: Optuna's own, whose reports go through the lease it is held under.

It is an `optuna.Trial` in every respect. Both `report` and `should_prune` are where a trial learns that it must let go, by
one of the Signals in `errors.py`; a storage that fails holds up neither.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState

from hpo.errors import ChangedSpace, Diverged, nearest
from hpo.queue.finish import STATES, End
from hpo.queue.report import Report
from hpo.queue.start import SuggestedParams
from hpo.search import distributions
from hpo.spec import space
from hpo.spec.curve import ValueRule
from hpo.spec.failures import Failure, Verdict
from hpo.spec.objectives import NOTHING, Beside, Goals, KnownCosts
from hpo.storage import choices
from hpo.storage.finished_trials import COST_PREFIX
from hpo.storage.optuna_storage import OptunaStorage
from hpo.study.study import forget_stop, look_anew, stop_was_requested
from hpo.text import command
from hpo.worker.client import Lease

log = logging.getLogger(__name__)
Taken = TypeVar("Taken")

MAX_STEP = 2**31 - 1  # what an integer column of Postgres holds
OWN_METRIC = "value"  # how the curve of a user's own objective is called in the ledger


class LeasedTrial(optuna.trial.Trial):
    """A trial held under a lease."""

    def __init__(
        self,
        study: optuna.Study,
        lease: Lease,
        rule: ValueRule | None,
        curve: list[float] | None = None,
        goals: Goals | None = None,
        *,
        shifts: bool = False,
    ) -> None:
        """Open a claimed trial.

        Args:
            rule: makes of a curve the value that Optuna sees; without one values are kept as reported.
            curve: what the trial reported before, up to its checkpoint.
            goals: what it is judged by, if that is more than one value.
            shifts: count all steps from 1 if the first is 0, as in studies of format 1.
        """
        super().__init__(study, lease.claim.trial_id)
        self.goals = goals if goals is not None and (goals.are_several or goals.bounds) else None
        self.known: KnownCosts | None = (
            None  # of its end, by its costs or by what an objective of the user's own returned
        )
        self.lease = lease
        self.rule = rule
        self.curve = list(curve or [])  # the judged metric, raw, in the order of the steps
        self.finer_accumulation: int | None = None  # micro-batches with which it could be tried if memory runs out
        self.end_reason: str | None = None  # why it completes, if not because it has had all its epochs
        self._had_params = frozenset(self._cached_frozen_trial.params)  # before this attempt
        self._shift = None if shifts else 0  # None: until the first report
        self._last_step = -1
        self._reporting = threading.Lock()  # an objective may report from several threads

    # --- what an objective calls ------------------------------------------------------------------------------------

    def report(self, value: float, step: int) -> None:
        """Report a value as `optuna.Trial.report` does: steps come in any order, and of each the first value is kept."""
        number, step = self._checked(value, step)
        with self._reporting:
            if self._shift is None:
                self._shift = int(step == 0)
            step += self._shift
            if step in self._cached_frozen_trial.intermediate_values:
                warnings.warn(f"trial {self.number}: step {step} was reported already; ignored", stacklevel=2)
                return
            self.write(*self._reports_of(number, step))
        self.lease.let_go()

    def _reports_of(self, number: float, step: int) -> list[Report]:
        """Return what to report of a value at a step: at later steps, if there are any, the rule may give another value now."""
        known = self._cached_frozen_trial.intermediate_values
        later = sorted(other for other in known if other > step) if step < self._last_step else []
        place = len(self.curve) - len(later)
        self.curve.insert(place, number)
        claim = self.lease.claim
        judged = self.rule(self.curve[: place + 1]) if self.rule else number
        changed = self.rule.changed(self.curve, place, [known[at] for at in later]) if self.rule else ()
        return [
            Report(claim=claim, step=step, value=judged, metrics={OWN_METRIC: number}),
            *(Report(claim=claim, step=at, value=value, metrics={}) for at, value in zip(later, changed, strict=False)),
        ]

    @staticmethod
    def _checked(value: Any, step: Any) -> tuple[float, int]:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"report: value {value!r} is a {type(value).__name__}, not a number") from None
        if not 0 <= int(step) < MAX_STEP:
            raise ValueError(f"report: step {step} is not in 0..{MAX_STEP - 1}; count epochs from 1")
        return number, int(step)

    def should_prune(self) -> bool:
        """Ask the study's pruner; one of the Signals if the trial must let go."""
        self.lease.let_go()
        return self.pruner_says_stop()

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        self.lease.check()  # Optuna's own writes are not fenced
        stored = distributions.as_stored(name, distribution)
        try:
            return self._suggest_as_recorded(name, distribution, stored)
        except ValueError as error:
            known = self._history.distribution_of(self._trial_id, name)
            if known is None or not distributions.clash(known, stored):
                raise
            why = f"{name}: the study has {distributions.words(known)}, the objective asks for {distributions.words(stored)}"
            raise self._clash(why) from error

    def _suggest_as_recorded(self, name: str, distribution: BaseDistribution, stored: BaseDistribution) -> Any:
        """Return what is recorded: an integer as a float holds it, and of choices this very one of the objective's own, since
        Optuna takes True, 1 and 1.0 for the same.
        """
        is_new = name not in self._cached_frozen_trial.params
        value = super()._suggest(name, stored)
        if not isinstance(distribution, CategoricalDistribution):
            return stored.to_external_repr(stored.to_internal_repr(value))
        assert isinstance(stored, CategoricalDistribution)
        place = choices.position(stored.choices, value)
        assert place is not None
        if is_new and place != stored.to_internal_repr(value):
            self.storage.set_trial_param(self._trial_id, name, place, stored)
        chosen = distribution.choices[place]
        self._cached_frozen_trial.params[name] = chosen
        return chosen

    def _clash(self, why: str) -> BaseException:
        """Return what ends a trial that asks for what its study cannot take; of code that changed, it ends the worker."""
        if not self.lease.ledger.code_has_changed():
            return ValueError(f"{why}; Optuna takes no such change within a study")
        mend = f"undo the change, or take the trials along with `{command('fork', self.study.study_name)} NEW FILE`"
        return ChangedSpace(f"{why}; {mend}", self._cached_frozen_trial.params.keys() - self._had_params)

    def set_user_attr(self, key: str, value: Any) -> None:
        """Set an attribute as `optuna.Trial.set_user_attr` does."""
        self.lease.check()
        super().set_user_attr(key, value)

    # --- what our own objective calls -------------------------------------------------------------------------------

    def read_queued(self, tree: space.Tree) -> None:
        """Read what somebody queued this trial with; ValueError for a value that its parameter cannot have."""
        known = dict(space.parameters(tree))
        for path, value in self._fixed_params.items():
            if path in known:
                self._fixed_params[path] = space.queued(known[path], path, value)
            else:
                mend = nearest(path, known)
                log.warning("trial %d: was queued with %s, which the study does not search%s", self.number, path, mend)

    def suggested(self, take: Callable[[LeasedTrial], Taken]) -> tuple[Taken, SuggestedParams]:
        """Return what is taken of the trial's suggestions, and what to write of them: nothing of it is written here."""
        with self._history.deferred_writes(self._trial_id) as given:
            taken = take(self)
        params, attributes = list(given.params.values()), list(given.attributes.values())
        return taken, SuggestedParams(claim=self.lease.claim, params=params, attributes=attributes)

    def report_epoch(self, step: int, value: float, metrics: Mapping[str, float]) -> Report:
        """Report an epoch and return what was reported; of the Signals only LostLease is raised."""
        report = self.reporting(step, value, metrics)
        self.write(report)
        return report

    def reporting(self, step: int, value: float, metrics: Mapping[str, float]) -> Report:
        """Return what to report of the judged metric's raw value at a step and the raw metrics beside it.

        What Optuna sees at a step is the study's rule applied to the curve so far.
        """
        self.curve.append(value)
        judged = self.rule(self.curve) if self.rule else value
        return Report(claim=self.lease.claim, step=step, value=judged, metrics=metrics)

    def write(self, *reports: Report) -> None:
        """Write reports as they are, and let Optuna's trial know of them."""
        self.lease.report(*reports, since=self._history.low(self.study._study_id))
        for report in reports:
            self.take_note(report)

    def take_note(self, report: Report) -> None:
        """Let Optuna's trial know of what was reported."""
        self._last_step = max(self._last_step, report.step)
        self._cached_frozen_trial.intermediate_values[report.step] = report.value

    @functools.cached_property
    def frozen(self) -> optuna.trial.FrozenTrial:
        """The trial as this process knows it, for a pruner that decides on several at once: what that writes down about it,
        it remembers here.
        """
        frozen = self._cached_frozen_trial
        if self.lease.claim.checkpoint is not None:  # earlier attempts, or what they left, may have said more since
            frozen.system_attrs = self.storage.get_trial_system_attrs(self._trial_id)
        return frozen

    def pruner_says_stop(self) -> bool:
        """Ask the study's pruner, whatever else is wanted of the trial: for who lets go at a moment of its own choice.

        While the storage is away it does not say so; it is asked again at the next epoch, or at the next rung if what it
        wrote at this one arrived after all.
        """
        if self.lease.is_cut_off:
            return False
        self._history.set_known_finished(self.study._study_id, self.lease.finished)
        return bool(self.lease.ask_optuna(self._ask_the_pruner))

    def _ask_the_pruner(self) -> bool:
        """Do as `optuna.Trial.should_prune`, which refuses several objectives."""
        return self.study.pruner.prune(self.study, self._get_latest_trial())

    @property
    def _history(self) -> OptunaStorage:
        """The storage as what it is: besides Optuna's contract, it knows what has finished."""
        assert isinstance(self.storage, OptunaStorage)
        return self.storage

    def start_over(self) -> None:
        """Go back to epoch 0, since the checkpoint cannot be read; the parameters stay."""
        self.lease.retry(lambda: self.lease.ledger.start_over(self.lease.claim))
        self.curve.clear()
        self._cached_frozen_trial.intermediate_values.clear()

    def learn_costs(self, measure: Callable[[], Mapping[str, float]]) -> None:
        """Record what the trial costs, measured at its first attempt only: another machine may measure something else."""
        if self.goals is None:
            return
        attributes = self._cached_frozen_trial.user_attrs
        costs = {name: float(attributes[key]) for name in self.goals.costs if (key := COST_PREFIX + name) in attributes}
        if costs and len(costs) == len(self.goals.costs):
            self.known = self.goals.known(costs)
            return
        costs = dict(measure())
        self.known = known = self.goals.known(costs)
        self.lease.retry(lambda: self.lease.ledger.record_costs(self.lease.claim, costs, known))
        found = {COST_PREFIX + name: cost for name, cost in costs.items()}
        self._cached_frozen_trial.user_attrs = {**attributes, **found}

    # --- its end ----------------------------------------------------------------------------------------------------

    def judge(self, returned: Any) -> float:
        """Return the trial's first value: the rule on its curve if there is one, else what the objective returned.

        Of an objective of the user's own that returns several, the others are remembered. Raises ValueError for what is no
        number, or not so many, Diverged for one that is not finite.
        """
        if self.goals is not None and self.known is None:
            returned = self._judge_all(returned)
        value = self.rule(self.curve) if self.rule and self.curve else returned
        return self._finite(value, "return one number")

    def _judge_all(self, returned: Any) -> float:
        """Take note of all that an objective returned, and return the first."""
        assert self.goals is not None
        names = self.goals.names
        mend = f"return {len(names)} numbers: {', '.join(names)}"
        if isinstance(returned, str) or not isinstance(returned, Sequence) or len(returned) != len(names):
            raise ValueError(f"the objective returned {returned!r}, a {type(returned).__name__}; {mend}")
        values = {name: self._finite(value, mend) for name, value in zip(names, returned, strict=True)}
        first = self.rule(self.curve) if self.rule and self.curve else values[names[0]]
        self.known = self.goals.returned({**values, names[0]: first})
        return first

    @staticmethod
    def _finite(value: Any, mend: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"the objective returned {value!r}, a {type(value).__name__}; {mend}") from None
        if not math.isfinite(number):
            raise Diverged(f"the objective returned {number}; a trial's value must be a finite number")
        return number

    def beside(self, value: float | None) -> tuple[float | None, Beside]:
        """Return the first value and what else the end is written with; no value if of several objectives one is not known."""
        if self.known is not None:
            return value, self.known.beside(value)
        return None if self.goals is not None and self.goals.are_several else value, NOTHING

    def ending(self, state: TrialState, value: float | None, *, reason: str | None = None) -> End:
        """Tell the sampler of the end of a trial that did not fail, and return it, to be written; LostLease if another worker
        owns it by now.
        """
        self.lease.flush()
        value, beside = self.beside(value)
        self._tell_the_sampler(state, value, beside)
        self.pass_on_a_stop()
        outcome = state.name.lower()
        return End(claim=self.lease.claim, state=state, value=value, outcome=outcome, reason=reason, beside=beside)

    @property
    def last_finite(self) -> float | None:
        """The last number that it reported for Optuna and that a sampler can use: its value if the pruner ends it."""
        reported = sorted(self._cached_frozen_trial.intermediate_values.items(), reverse=True)
        return next((value for _, value in reported if math.isfinite(value)), None)

    def fail(self, failure: Failure) -> Verdict:
        """Write a failed attempt and do what the study's policy says; LostLease if another worker owns it by now."""
        self.lease.flush()
        self.pass_on_a_stop()
        ledger, claim, finer = self.lease.ledger, self.lease.claim, self.finer_accumulation
        verdict = self.lease.retry(lambda: ledger.fail(claim, failure, accumulation=finer))
        if verdict in STATES:
            value = self.last_finite if verdict is Verdict.PRUNE else None
            self._tell_the_sampler(STATES[verdict], *self.beside(value))
            self.pass_on_a_stop()
        return verdict

    def end_as_stopped(self) -> None:
        """Write the end of a trial that a person ended: it keeps its last value."""
        self.lease.flush()
        self.lease.retry(lambda: self.lease.ledger.end_as_stopped(self.lease.claim))

    def _tell_the_sampler(self, state: TrialState, value: float | None, beside: Beside) -> None:
        frozen = self._get_latest_trial()
        try:
            look_anew(self.study)
            filtered = optuna.pruners._filter_study(self.study, frozen)
            self.study.sampler.after_trial(filtered, frozen, state, None if value is None else [value, *beside.values])
        except Exception:  # as in Optuna, a sampler's trouble does not keep a trial from its end
            log.warning("trial %d: the sampler failed after it", self.number, exc_info=True)

    def pass_on_a_stop(self) -> None:
        """Stop the study if the objective or the sampler said so: before the trial ends, or a kill in between loses it."""
        if stop_was_requested(self.study):
            reason = "the objective or the sampler called study.stop()"
            self.lease.retry(lambda: self.lease.ledger.stop(reason))
            forget_stop(self.study)
