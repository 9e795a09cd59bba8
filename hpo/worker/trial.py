"""The trial that an objective gets: an `optuna.Trial` whose reports go through its worker's client.

`report` and `should_prune` raise one of the Signals in `errors.py` if the attempt must end. A storage that fails delays
neither of them.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from hpo.errors import ChangedSpace, Diverged, Outage, Parked, nearest
from hpo.queue.report import Report
from hpo.queue.start import SuggestedParams
from hpo.spec import space
from hpo.spec.curve import ValueRule
from hpo.spec.divergence import DivergenceGuard
from hpo.spec.metrics import OWN_METRIC
from hpo.spec.objectives import NOTHING, Beside, Goals, KnownCosts
from hpo.storage import choices
from hpo.storage.optuna_private import ExtensibleTrial, id_of
from hpo.storage.optuna_storage import OptunaStorage
from hpo.storage.tables import COST_PREFIX
from hpo.strategy import distributions
from hpo.study.format import value_text
from hpo.text import command
from hpo.worker.client import QueueClient
from hpo.worker.lease import Lease

if TYPE_CHECKING:
    from hpo.train.user_state import UserState

log = logging.getLogger(__name__)
Taken = TypeVar("Taken")

MAX_STEP = 2**31 - 1  # the largest integer in a column of Postgres


class LeasedTrial(ExtensibleTrial):
    """A trial held under a lease."""

    def __init__(
        self,
        study: optuna.Study,
        client: QueueClient,
        lease: Lease,
        rule: ValueRule | None,
        curve: Sequence[float],
        goals: Goals,
        *,
        shifts: bool,
        guard: DivergenceGuard | None = None,
    ) -> None:
        """Open a claimed trial.

        Args:
            rule: computes from a curve the value that Optuna sees. Without one Optuna sees the reported values.
            curve: what the trial reported up to its checkpoint.
            goals: the study's objectives and bounds. They are used if there are several objectives or a bound.
            shifts: count all steps from 1 if the first one is 0, as in studies of format 1.
            guard: ends the trial if its curve diverges; None for no guard.
        """
        super().__init__(study, lease.claim.trial_id)
        self.goals = goals if goals.are_several or goals.bounds else None
        #: What is known of the trial's end, by its costs or by what a user's own objective returned.
        self.known: KnownCosts | None = None
        self.client = client
        self.lease = lease
        self.rule = rule
        self._guard = guard
        self.curve = [*curve]  # raw values of the judged metric, in the order of the steps
        self._had_params = frozenset(self.cached.params)  # the names from before this attempt
        self._shift = None if shifts else 0  # None until the first report
        self.pruned_at: int | None = None  # the last step at which `should_prune` was true
        self.loop: object = None  # of a user's own training; what `hpo.epochs` or a command works with
        self.user_state: UserState | None = None  # of that loop; keeps the weights of the best report
        self.parks_in_reports = True  # else the loop parks the trial after the epoch's body
        self.has_reported = False  # in this attempt
        self.saved_epochs = 0  # finished epochs at the last `hpo.save` of this attempt
        self.last_step = max(self.cached.intermediate_values, default=-1)
        self._reporting = threading.Lock()  # an objective may report from several threads

    # --- what an objective calls ------------------------------------------------------------------------------------

    def report(self, value: float, step: int) -> None:
        """Report a value as `optuna.Trial.report` does. Steps may come in any order. The first value of a step is kept.

        Raises one of the Signals if the attempt must end, or if the trial has diverged. Raises TypeError for a value that is
        no number, and ValueError for a step outside 0..MAX_STEP - 1.
        """
        number, step = self._checked(value, step)
        with self._reporting:
            if self._shift is None:
                self._shift = int(step == 0)
            step += self._shift
            if step in self.cached.intermediate_values:
                warnings.warn(f"trial {self.number}: step {step} was reported already; ignored", stacklevel=2)
                return
            if 0 < self.saved_epochs == step + 1:
                log.warning(
                    "trial %d: step %d was reported after hpo.save of its epoch: a kill before the next save loses it; "
                    "report first, then save",
                    self.number,
                    step,
                )
            self.has_reported = True
            self.write(*self._reports_of(number, step))
            if self.user_state is not None:
                self.user_state.note_report(number, step)
        self._let_go()
        if why := self.why_diverged("step", "value"):
            raise Diverged(why)

    def _reports_of(self, number: float, step: int) -> list[Report]:
        """Return the report of a value at a step, and new reports of later steps whose value by the rule has changed."""
        known = self.cached.intermediate_values
        later = sorted(other for other in known if other > step) if step < self.last_step else []
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
        """Return whether the study's pruner ends the trial. Raises one of the Signals if the attempt must end."""
        self._let_go()
        says_stop = self.pruner_says_stop()
        if says_stop:
            self.pruned_at = self.last_step
        return says_stop

    def _let_go(self) -> None:
        """Raise the Signal that ends the attempt, if there is one. A loop with checkpoints is left only between epochs."""
        try:
            self.client.let_go(self.lease)
        except (Parked, Outage):
            if self.parks_in_reports:
                raise

    def why_diverged(self, unit: str, metric: str) -> str | None:
        """Return in one line why the divergence guard ends the trial after its last report; None if it does not.

        Args:
            unit: "epoch" or "step".
            metric: the name of the reported values.
        """
        why = self._guard.why(self.curve) if self._guard else None
        return why and f"{unit} {self.last_step}: {metric} {value_text(self.curve[-1])}; {why} (failures.diverged)"

    def give(self, name: str, distribution: BaseDistribution) -> Any:
        """Suggest a parameter's value as Optuna does, in the type that the objective asks for."""
        self.lease.check()  # Optuna's own writes are not guarded by the claim
        stored = distributions.as_stored(name, distribution)
        try:
            return self._suggest_as_recorded(name, distribution, stored)
        except ValueError as error:
            known = self._history.distribution_of(self.own_id, name)
            if known is None or not distributions.clash(known, stored):
                raise
            why = f"{name}: the study has {distributions.words(known)}, the objective asks for {distributions.words(stored)}"
            raise self._clash(why) from error

    def _suggest_as_recorded(self, name: str, distribution: BaseDistribution, stored: BaseDistribution) -> Any:
        """Return the value as the database stores it: an integer as a float holds it, a choice as the objective's own object.

        Optuna does not tell True, 1 and 1.0 apart, so choices are compared here.
        """
        is_new = name not in self.cached.params
        value = super().give(name, stored)
        if not isinstance(distribution, CategoricalDistribution):
            return stored.to_external_repr(stored.to_internal_repr(value))
        assert isinstance(stored, CategoricalDistribution)
        place = choices.position(stored.choices, value)
        assert place is not None
        if is_new and place != stored.to_internal_repr(value):
            self.storage.set_trial_param(self.own_id, name, place, stored)
        chosen = distribution.choices[place]
        self.cached.params[name] = chosen
        return chosen

    def _clash(self, why: str) -> BaseException:
        """Return the error for a distribution that does not fit the study. If the code has changed, it ends the worker."""
        if not self.client.code_has_changed():
            return ValueError(
                f"{why}; Optuna allows one distribution per parameter, so ask for the same in every trial"
            )
        mend = f"undo the change, or copy the trials with `{command('fork', self.study.study_name)} NEW FILE`"
        return ChangedSpace(f"{why}; {mend}", self.cached.params.keys() - self._had_params)

    def set_user_attr(self, key: str, value: Any) -> None:
        """Set an attribute as `optuna.Trial.set_user_attr` does."""
        self.lease.check()
        super().set_user_attr(key, value)

    # --- what our own objective calls -------------------------------------------------------------------------------

    def read_queued(self, tree: space.Tree) -> None:
        """Read the values that this trial was queued with. Raises ValueError for a value that its parameter cannot have."""
        known = dict(space.parameters(tree))
        for path, value in self.queued_with.items():
            if path in known:
                self.queued_with[path] = space.queued(known[path], path, value)
            else:
                mend = nearest(path, known)
                log.warning("trial %d: was queued with %s, which the study does not search%s", self.number, path, mend)

    def tell_unused(self) -> None:
        """Log the parameters that this trial was queued with and for which a user's own objective did not ask."""
        asked = self.cached.params
        for name in sorted(self.queued_with.keys() - asked.keys()):
            mend = nearest(name, asked)
            log.warning("trial %d: was queued with %s, for which the objective did not ask%s", self.number, name, mend)

    def suggested(self, take: Callable[[LeasedTrial], Taken]) -> tuple[Taken, SuggestedParams]:
        """Return the result of `take`, and the suggestions that it asked for. Nothing is written here.

        Args:
            take: asks the trial for suggestions.
        """
        with self._history.deferred_writes(self.own_id) as given:
            taken = take(self)
        params, attributes = list(given.params.values()), list(given.attributes.values())
        return taken, SuggestedParams(claim=self.lease.claim, params=params, attributes=attributes)

    def reporting(self, step: int, value: float, metrics: Mapping[str, float]) -> Report:
        """Return the report of a step, with the study's rule applied to the curve so far.

        Args:
            value: the raw value of the judged metric. It is added to the curve.
            metrics: all raw metrics of the step.
        """
        self.curve.append(value)
        judged = self.rule(self.curve) if self.rule else value
        return Report(claim=self.lease.claim, step=step, value=judged, metrics=metrics)

    def write(self, *reports: Report) -> None:
        """Write reports as they are, and add them to Optuna's trial."""
        self.client.report(reports)
        self.lease.check()
        for report in reports:
            self.take_note(report)

    def take_note(self, report: Report) -> None:
        """Add a report to Optuna's trial."""
        self.last_step = max(self.last_step, report.step)
        self.cached.intermediate_values[report.step] = report.value

    @functools.cached_property
    def frozen(self) -> optuna.trial.FrozenTrial:
        """The trial as this process knows it, for a pruner that decides on several at once.

        The pruner also stores here what it writes about the trial.
        """
        frozen = self.cached
        if self.lease.claim.checkpoint is not None:  # earlier attempts or pending reports may have written more
            frozen.system_attrs = self.storage.get_trial_system_attrs(self.own_id)
        return frozen

    def pruner_says_stop(self) -> bool:
        """Return whether the study's pruner ends the trial, without the check of `should_prune`.

        While the storage fails this is False. The pruner is asked again at the next epoch, or at the next rung if its
        write at this rung arrived after all.
        """
        if self.client.calls.is_cut_off:
            return False
        self._history.set_known_finished(id_of(self.study), self.client.finished)
        return bool(self.client.calls.ask_optuna(self._ask_the_pruner))

    def _ask_the_pruner(self) -> bool:
        """Do what `optuna.Trial.should_prune` does, also with several objectives."""
        return self.study.pruner.prune(self.study, self.read_anew())

    @property
    def _history(self) -> OptunaStorage:
        """The storage by its real type, which also knows which trials have finished."""
        assert isinstance(self.storage, OptunaStorage)
        return self.storage

    def start_over(self) -> None:
        """Go back to epoch 0, because the checkpoint cannot be read. The parameters stay."""
        self.client.start_over(self.lease)
        self.curve.clear()
        self.last_step = -1
        self.cached.intermediate_values.clear()

    def learn_costs(self, measure: Callable[[], Mapping[str, float]]) -> None:
        """Record the trial's costs. They are measured at the first attempt only, because machines may differ."""
        if self.goals is None:
            return
        attributes = self.cached.user_attrs
        costs = {name: float(attributes[key]) for name in self.goals.costs if (key := COST_PREFIX + name) in attributes}
        if costs and len(costs) == len(self.goals.costs):
            self.known = self.goals.known(costs)
            return
        costs = dict(measure())
        self.known = known = self.goals.known(costs)
        self.client.record_costs(self.lease, costs, known)
        found = {COST_PREFIX + name: cost for name, cost in costs.items()}
        self.cached.user_attrs = {**attributes, **found}

    # --- its value --------------------------------------------------------------------------------------------------

    def judge(self, returned: Any) -> float:
        """Return the trial's first value: the rule applied to its curve if it has both, else what the objective returned.

        If a user's own objective returned several values, the others are kept for the end. Raises ValueError for a
        value that is no number, or for a wrong number of values. Raises Diverged for a value that is not finite.
        """
        if self.goals is not None and self.known is None:
            returned = self._judge_all(returned)
        elif isinstance(returned, list | tuple) and len(returned) == 1:  # as Optuna accepts it
            (returned,) = returned
        value = self.rule(self.curve) if self.rule and self.curve else returned
        return self._finite(value, "return one number")

    def _judge_all(self, returned: Any) -> float:
        """Keep all values that an objective returned, and return the first."""
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
        """Return the first value and what else is written with the end.

        With several objectives of which one is not known there is no value.
        """
        if self.known is not None:
            return value, self.known.beside(value)
        return None if self.goals is not None and self.goals.are_several else value, NOTHING

    @property
    def last_finite(self) -> float | None:
        """The last finite value that was reported to Optuna. A pruned trial ends with it."""
        reported = sorted(self.cached.intermediate_values.items(), reverse=True)
        return next((value for _, value in reported if math.isfinite(value)), None)
