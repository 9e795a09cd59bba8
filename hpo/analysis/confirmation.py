"""The confirmation of a study: its leaders trained again with common fresh seeds, as trials of a sister study.

The sister study has the source's spec, without its sampler and pruner. So training, data and split are the same; only the
seed of a trial, and with folds the validation part, come from the trial's attributes. All that is still to be done stands in
the database: a killed confirmation goes on at the next call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpo.analysis import leaders, noise, verdict
from hpo.analysis.leaders import Leader
from hpo.analysis.noise import Closeness, Noise
from hpo.analysis.verdict import Dominance, Mean, Verdict
from hpo.errors import MismatchError, SpecError, StudyError
from hpo.spec import metrics, seeds, space
from hpo.spec.budget import Budget
from hpo.spec.seeds import SEED_KEY
from hpo.spec.study_file import MAX_NAME, StudySpec
from hpo.spec.training import Part
from hpo.storage import sql, study_rows
from hpo.storage.tables import FINISHED, FOLD_KEY, UID_KEY, Hold
from hpo.study import deletion, interval, resolve
from hpo.study import study as studies
from hpo.study.query import ranking, recorded, trial_columns
from hpo.study.status import Best
from hpo.study.study import FINGERPRINT_KEY, Study
from hpo.text import command

SUFFIX = "/confirm"  # of the sister's name
PLAN_KEY = "hpo:confirms"  # user attribute of the sister: what it confirms
RUN_KEY = "hpo:run"  # user attribute of its trials: the leader and the number of the run
SEEDS = 5  # runs of each leader, if the caller names no number
DELTA = 0.005
UNMADE = "a confirmation was cut off while it was made; the same `hpo confirm` makes it whole"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sister study confirms. It is kept as one of its user attributes."""

    study: str
    uid: str  # of the source
    leaders: Sequence[int]  # numbers of the source's trials, the best first
    looks: Sequence[int]  # runs of each leader at the first verdict, at the second, and so on
    delta: float
    last: int | None = None  # number of the source's last trial when the leaders were chosen; None in early versions

    @property
    def runs(self) -> int:
        """The runs of each leader in the end."""
        return self.looks[-1]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A wanted confirmation, checked against what there is. Nothing is written yet."""

    source: Study
    plan: Plan
    leaders: Sequence[Leader]  # of a new confirmation and of one that gets further runs; else empty
    sister: Study | None  # None before it is made
    done: int  # runs of each leader that are queued already

    @property
    def adds(self) -> bool:
        """Whether runs are to be queued."""
        return self.done < self.plan.runs


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """A leader after its runs."""

    number: int
    seen: tuple[float, ...]  # by objective, in the search
    runs: Sequence[tuple[float, ...]]  # by objective, of each run that counts
    means: Sequence[Mean]  # by objective; empty without runs
    left_out: str  # why it is not compared, "" if it is
    dominance: Dominance | None = None  # with several objectives: by which other leader it is dominated now


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """A confirmation as it stands."""

    study: str
    name: str  # of the sister study
    objectives: Mapping[str, str]  # name -> direction
    delta: float
    looks: Sequence[int]
    leaders: Sequence[Confirmed]
    settled: int  # runs that have ended
    folds: int | None
    seeded: bool  # whether the code gets its seed from hpo alone: a declared training
    verdict: Verdict | None = None  # of the last look whose runs are all settled; None with several objectives
    is_exact: bool = False  # all runs of each leader gave the same value
    newer: int = 0  # trials that the search has added since, and that were better in it than the last leader

    @property
    def runs(self) -> int:
        return self.looks[-1] * len(self.leaders)

    @property
    def is_complete(self) -> bool:
        return self.settled == self.runs

    @property
    def several(self) -> bool:
        return len(self.objectives) > 1


def name_of(study: str) -> str:
    """Return the name of the sister study that confirms a study. Raises StudyError if it would be too long."""
    if len(study) + len(SUFFIX) > MAX_NAME:
        raise StudyError(
            f"study {study!r}: its name is too long to add {SUFFIX!r}; at most {MAX_NAME} characters are possible"
        )
    return study + SUFFIX


# --- asked for --------------------------------------------------------------------------------------------------------


def ask(source: Study, *, top: int | None, runs: int | None, delta: float | None) -> Request:
    """Return what a confirmation of this study has to do. Nothing is written.

    Args:
        source: the study.
        top: how many leaders; by default those of the confirmation that is there, else `leaders.TOP`.
        runs: how many runs of each; by default as many as the confirmation has, else SEEDS.
        delta: the difference that does not matter; by default the confirmation's own, else DELTA.

    Raises SpecError for wrong numbers. Raises StudyError if there is nothing to confirm, if the search is still running, or if
    the confirmation that is there has other leaders.
    """
    if delta is not None and not (math.isfinite(delta) and delta > 0):
        raise SpecError(f"--delta {delta:g}: must be above 0; it is the difference that does not matter to you")
    for option, number in (("--top", top), ("--seeds", runs)):
        if number is not None and number < 2:
            raise SpecError(f"{option} {number}: must be at least 2; one alone cannot be compared")
    if (of := source_of(source)) is not None:
        raise StudyError(f"study {source.name!r} is a confirmation itself; name the study that it confirms, {of!r}")
    sister = find(source)
    plan = None if sister is None else _plan_of(sister)
    if sister is None or plan is None:
        _refuse_running(source)
        found = leaders.choose(source, top)
        with source.storage.engine.connect() as connection:
            last = trial_columns.last_number(connection, source)
        plan = Plan(
            study=source.name,
            uid=source.uid,
            leaders=[one.number for one in found],
            looks=[runs or SEEDS],
            delta=delta or DELTA,
            last=last,
        )
        return Request(source=source, plan=plan, leaders=found, sister=None, done=0)
    if top is not None and top != len(plan.leaders):
        raise StudyError(
            f"study {source.name!r} is confirmed with {len(plan.leaders)} leaders, --top asks for {top}; leave --top out, or "
            f"delete the confirmation with `{command('delete', sister.name)}` and confirm again"
        )
    looks = [*plan.looks, runs] if runs is not None and runs > plan.runs else plan.looks
    wanted = replace(plan, looks=looks, delta=delta or plan.delta)
    again = _leaders_of(source, plan) if looks != plan.looks else []
    return Request(source=source, plan=wanted, leaders=again, sister=sister, done=plan.runs)


def _refuse_running(source: Study) -> None:
    try:
        deletion.refuse_if_at_work(source)
    except StudyError as error:
        raise StudyError(f"the search is still running, and its leaders may change: {error}") from None


def find(source: Study) -> Study | None:
    """Return the sister study that confirms a study, None if there is none that is whole.

    Raises StudyError if another study has its name.
    """
    name, place = name_of(source.name), source.storage
    if name not in studies.all_names(place) or studies.is_plain(place, name):  # plain: cut off just after Optuna's part
        return None
    sister = studies.join(place, name)
    plan = _plan_of(sister)
    if plan is None and sister.stop_reason == UNMADE:
        return None
    if plan is None or plan.uid != source.uid:
        what = "is not a confirmation" if plan is None else f"confirms an earlier study {source.name!r}"
        raise StudyError(f"study {name!r} {what}; delete it with `{command('delete', name)}`")
    return sister


def source_of(study: Study) -> str | None:
    """Return the name of the study that this one confirms, None if it is no confirmation."""
    plan = _plan_of(study) if study.name.endswith(SUFFIX) else None
    return plan.study if plan else None


def _plan_of(sister: Study) -> Plan | None:
    with sister.storage.engine.connect() as connection:
        found = study_rows.user_attributes(connection, sister.study_id).get(PLAN_KEY)
    return Plan(**found) if found else None


def _leaders_of(source: Study, plan: Plan) -> list[Leader]:
    """Return the leaders of a plan again. They may have been deleted by nobody: a study's trials stay."""
    with source.storage.engine.connect() as connection:
        rows = [ranking.result(connection, source, number) for number in plan.leaders]
        return leaders.read(connection, source, rows)


# --- made -------------------------------------------------------------------------------------------------------------


def check_unchanged(source: Study, folder: Path) -> str:
    """Return the digest of the user's code in a folder. Raises MismatchError if code or data are not those of the search."""
    digest = resolve.load_and_digest(source.spec, folder)
    with source.storage.engine.connect() as connection:
        row = study_rows.living_row(connection, source.study_id)
    if row is None:
        raise StudyError(f"study {source.name!r} was deleted")
    if not studies.lets_in(row, digest):
        raise MismatchError(
            f"code: the search was made with {row.code_digest[:12]}, in {folder} it is {digest[:12] or 'missing'}; "
            "new runs would not repeat its trials. Undo the change, or name the folder of the old code with --code"
        )
    if row.data_digest is not None and (data := resolve.data_digest(source.spec, folder)) != row.data_digest:
        raise MismatchError(
            f"data: the search was made on {row.data_digest[:12]}, here the data is {str(data)[:12]}; restore the files, or "
            "search again on the new data"
        )
    return digest


def enlist(request: Request, folder: Path, code_digest: str) -> Study:
    """Queue the wanted runs, all or none, in the sister study. It is made if there is none. Return it.

    Args:
        request: what is wanted.
        folder: the folder of the user's code.
        code_digest: the digest of that code.
    """
    from hpo.storage import trial_writes  # loads Optuna

    source, plan = request.source, request.plan
    made = request.sister or studies.create_or_join(
        source.storage,
        sister_spec(source.spec, len(plan.leaders) * plan.runs),
        code_folder=folder,
        code_digest=code_digest,
        forking=UNMADE,
    )
    with sql.writing(source.storage.engine) as connection:
        row = study_rows.lock_and_read(connection, made.study_id)
        old = study_rows.living_row(connection, source.study_id)
        if row is None or old is None:
            raise StudyError(f"study {source.name!r} or its confirmation was deleted meanwhile; call hpo confirm again")
        known = study_rows.user_attributes(connection, made.study_id).get(PLAN_KEY)
        begun = Plan(**known).runs if known else 0
        if request.done < begun < plan.runs:
            raise StudyError(
                f"another confirmation has queued {begun} runs of each leader meanwhile; the same command adds the other runs"
            )
        if begun < plan.runs and begun == request.done:  # else another process was faster
            wanted = list(_runs(request))
            trial_writes.insert_queued(connection, made.study_id, *zip(*wanted, strict=True))
            study_rows.set_user_attributes(
                connection, made.study_id, {**_handed_on(source, connection), PLAN_KEY: asdict(plan)}
            )
            budget = len(plan.leaders) * plan.runs
            changes = {"trials": budget, "stop_reason": None, "hold": None if row.hold == Hold.FORKING else row.hold}
            study_rows.update(connection, made.uid, data_digest=old.data_digest, **changes)
    return studies.join(source.storage, made.name)


def remember_delta(sister: Study, plan: Plan) -> None:
    """Keep the difference that a later `hpo export --confirmed` judges by."""
    if _plan_of(sister) != plan:
        with sql.writing(sister.storage.engine) as connection:
            study_rows.set_user_attributes(connection, sister.study_id, {PLAN_KEY: asdict(plan)})


def sister_spec(spec: StudySpec, trials: int) -> StudySpec:
    """Return the spec of the study that confirms a study of this spec: the same training on the same data."""
    from hpo.strategy import pruners, samplers

    budget = Budget(trials=trials, trial_timeout=spec.budget.trial_timeout)
    bare: dict[str, Any] = {"sampler": {"name": "random"}, "pruner": {"name": "none"}, "budget": budget, "start": []}
    return pruners.resolve(samplers.resolve(spec.model_copy(update={"name": name_of(spec.name), **bare})))


def folds_of(spec: StudySpec) -> tuple[int, int] | None:
    """Return the number of folds of a study's data and the fold of the search, None without folds."""
    if not spec.is_declared:
        return None
    options = Part.from_tree("data", next(space.variants(spec.tree))["data"]).options
    return (options["folds"], options["fold"]) if options.get("folds") is not None else None


def _runs(request: Request) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return parameters and attributes of the trials to queue. Those of one fold follow each other, so that they stack.

    All leaders have the same seeds. With folds, run r is on the r-th fold after that of the search.
    """
    spec, folds = request.source.spec, folds_of(request.source.spec)

    def fold_of(run: int) -> int | None:
        return None if folds is None else (folds[1] + 1 + run) % folds[0]

    wanted = []
    for run in sorted(range(request.done, request.plan.runs), key=lambda run: (fold_of(run) or 0, run)):
        fold = fold_of(run)
        common = {SEED_KEY: seeds.derive(spec.seed, "confirm", run)} | ({} if fold is None else {FOLD_KEY: fold})
        for leader in request.leaders:
            params = {path: space.encode(value) if spec.tree else value for path, value in leader.params.items()}
            wanted.append((params, {**leader.attributes, **common, RUN_KEY: {"trial": leader.number, "run": run}}))
    return wanted


def _handed_on(source: Study, connection: sql.Connection) -> dict[str, Any]:
    """Return the source's user attributes that a user's own objective may read."""
    if source.spec.is_declared:
        return {}
    found = study_rows.user_attributes(connection, source.study_id)
    return {key: value for key, value in found.items() if key not in (UID_KEY, FINGERPRINT_KEY)}


# --- read -------------------------------------------------------------------------------------------------------------


def read(source: Study) -> Confirmation | None:
    """Return a study's confirmation as it stands, None if there is none. Nothing is written."""
    sister = find(source)
    plan = None if sister is None else _plan_of(sister)
    if sister is None or plan is None:
        return None
    with source.storage.engine.connect() as connection:
        seen = {one.number: one for one in _leaders_of(source, plan)}
        done = _read_runs(connection, sister)
        newer = leaders.newer(connection, source, plan.last, seen[plan.leaders[-1]])
    settled = {key for key, run in done.items() if run.is_settled}
    whole = [
        count
        for count in plan.looks
        if all((number, run) in settled for number in plan.leaders for run in range(count))
    ]
    bounds = [_bounds(source.spec, name) for name in source.goals.directions]
    found = [_confirmed(seen[number], done, plan.runs, bounds) for number in plan.leaders]
    confirmation = Confirmation(
        study=source.name,
        name=sister.name,
        objectives=dict(source.goals.directions),
        delta=plan.delta,
        looks=plan.looks,
        leaders=found,
        settled=sum(number in plan.leaders and run < plan.runs for number, run in settled),
        folds=None if (folds := folds_of(source.spec)) is None else folds[0],
        seeded=source.spec.is_declared,
        is_exact=_is_exact(found),
        newer=newer,
    )
    return _judged(confirmation, whole) if whole else confirmation


@dataclass(frozen=True, kw_only=True)
class _Run:
    is_settled: bool
    state: str
    values: tuple[float, ...]  # empty without a value
    violated: Sequence[str]
    params: Mapping[str, Any]


def _read_runs(connection: sql.Connection, sister: Study) -> dict[tuple[int, int], _Run]:
    """Return {(leader, run): its trial}."""
    rows = connection.execute(ranking.results(sister)).all()
    told = recorded.with_attribute(connection, sister, RUN_KEY)
    rows = [row for row in rows if row.trial_id in told]
    judged = ranking.judged(connection, sister, rows)
    params = recorded.params(connection, sister, [row.trial_id for row in rows])
    found: dict[tuple[int, int], _Run] = {}
    for row in rows:
        known = row.value_type is not None
        key = (told[row.trial_id]["trial"], told[row.trial_id]["run"])
        found[key] = _Run(
            is_settled=row.state in FINISHED,
            state=row.state.lower(),
            values=(judged[row.trial_id].values or (trial_columns.value_of(row),)) if known else (),
            violated=judged[row.trial_id].violated,
            params=params[row.trial_id],
        )
    return found


def _confirmed(
    leader: Leader, done: Mapping[tuple[int, int], _Run], runs: int, bounds: Sequence[tuple[float, float]]
) -> Confirmed:
    own = [done[leader.number, run] for run in range(runs) if (leader.number, run) in done]
    ended = [run for run in own if run.is_settled]
    good = [run for run in ended if run.state == "complete" and run.values and not run.violated]
    values = [run.values for run in good]
    return Confirmed(
        number=leader.number,
        seen=leader.values,
        runs=values,
        means=[verdict.mean(*one) for one in zip(zip(*values, strict=True), bounds, strict=True)] if values else [],
        left_out=_why_left_out(ended, good, leader),
    )


def _bounds(spec: StudySpec, name: str) -> tuple[float, float]:
    """Return the bounds of an objective. A user's own training may give a metric's name to any number."""
    return metrics.bounds(name) if spec.is_declared else metrics.FREE


def _why_left_out(ended: Sequence[_Run], good: Sequence[_Run], leader: Leader) -> str:
    if bad := len(ended) - len(good):
        violated = sorted({name for run in ended for name in run.violated})
        what = f"violate {', '.join(violated)}" if violated else "have no value: failed or diverged"
        return f"{bad} of its {len(ended)} runs {what}"
    if any(run.params != leader.params for run in good):
        return "its runs had other parameters: the objective asks for some that the trial does not have"
    return ""


def _judged(confirmation: Confirmation, whole: Sequence[int]) -> Confirmation:
    """Return the confirmation with its verdict at the last look whose runs are all settled."""
    compared = {one.number: one.runs[: whole[-1]] for one in confirmation.leaders if not one.left_out}
    if len(compared) < 2:
        return confirmation
    look, directions = len(whole), list(confirmation.objectives.values())
    if confirmation.several:
        found = verdict.dominances(compared, directions, look=look)
        changed = [replace(one, dominance=found.get(one.number)) for one in confirmation.leaders]
        return replace(confirmation, leaders=changed)
    judged = verdict.judge(
        {number: [value for (value,) in runs] for number, runs in compared.items()},
        delta=confirmation.delta,
        direction=directions[0],  # type: ignore[arg-type]
        look=look,
    )
    return replace(confirmation, verdict=judged)


def _is_exact(found: Sequence[Confirmed]) -> bool:
    several = [one for one in found if len(one.runs) > 1]
    return bool(several) and all(len(set(one.runs)) == 1 for one in several)


# --- used -------------------------------------------------------------------------------------------------------------


def winner(source: Study) -> tuple[int, dict[str, Any]]:
    """Return the confirmed trial's number and a receipt of its confirmation.

    Raises StudyError if the study is not confirmed, or if nothing is decided.
    """
    again = command("confirm", source.name)
    found = read(source)
    if found is None:
        raise StudyError(f"study {source.name!r} is not confirmed; `{again}` trains its leaders again")
    if found.several:
        raise StudyError(
            f"study {source.name!r} has several objectives, and its confirmed front has no single best trial; choose by --trial"
        )
    if found.verdict is None:
        left = (
            f"{found.settled} of {found.runs} runs have ended"
            if not found.is_complete
            else "its runs cannot be compared"
        )
        raise StudyError(f"the confirmation of study {source.name!r} has no verdict yet: {left}; `{again}` shows more")
    judged = found.verdict
    if not judged.is_decided:
        more = command("confirm", source.name, options=f"--seeds {found.looks[-1] + (judged.more or 1)}")
        raise StudyError(
            f"the confirmation of study {source.name!r} has not decided; `{more}` may. Without --confirmed, or with "
            f"`--trial {judged.leader}`, you choose all the same"
        )
    chosen = next(one for one in found.leaders if one.number == judged.leader)
    (mean,) = chosen.means
    receipt = {
        "study": found.name,
        "verdict": judged.kind,
        "delta": judged.delta,
        "error": judged.error,
        "leaders": [one.number for one in found.leaders],
        "runs": mean.runs,
        "mean": mean.value,
        "mean_interval": [mean.low, mean.high],
    }
    return judged.leader, receipt


def decided(source: Study) -> Confirmation | None:
    """Return a study's confirmation if its verdict is decided, else None."""
    try:
        found = read(source)
    except StudyError:  # another study has the sister's name
        return None
    return found if found and found.verdict and found.verdict.is_decided else None


def measured_noise(source: Study) -> Noise | None:
    """Return the deviation from run to run that a confirmation has measured, None without one."""
    try:
        found = read(source)
    except StudyError:  # another study has the sister's name
        return None
    if found is None or found.several:
        return None
    repeats = [[value for (value,) in one.runs] for one in found.leaders]
    return noise.of_runs(verdict.pooled_deviation(repeats), sum(map(len, repeats)))


def closeness(source: Study, best: Best | None = None) -> Closeness | None:
    """Return how many trials tie with the best or lie within the noise.

    None for several objectives, with constraints, and for a confirmation, whose trials repeat a few configurations.

    Args:
        source: the study.
        best: its best trial, for the number of its validation examples; without it that noise is not known.
    """
    if source.goals.are_several or source.goals.bounds or source_of(source) is not None:
        return None
    images = best and best.interval and best.interval.images
    with source.storage.engine.connect() as connection:
        values = recorded.complete_values(connection, source)
    assert source.spec.direction is not None
    item = noise.of_one_item(interval.metric_of(source.spec), images or None)
    return noise.closeness(values, source.spec.direction, noise.larger(item, measured_noise(source)))
