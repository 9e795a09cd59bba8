"""A study in the hands of a Python program: results, export, and what a person orders."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hpo.api.borders import called
from hpo.errors import HpoError, StudyError

if TYPE_CHECKING:
    import optuna
    import pandas

    from hpo.storage.connect import Storage
    from hpo.study.plain import PlainStudy
    from hpo.study.results import TrialResult
    from hpo.study.status import Summary
    from hpo.study.study import Study as OpenStudy


@dataclass(frozen=True, kw_only=True)
class BestTrial:
    """A finished trial with a result."""

    number: int
    value: float
    params: dict[str, Any]  # by Optuna's names
    config: dict[str, Any] = field(repr=False)
    """What the trial was trained with. Of an objective: its parameters. Of a function with a space: the dict that it got. Of a
    declared training: the content of the exported file, without its receipt."""
    weights: Path | None
    """The trial's checkpoint file, if it is kept. `hpo.load_weights` reads that of a loop with `hpo.epochs`. Of a command it is
    the folder in which its program saved."""
    values: dict[str, float]  # by objective, if there are several


class Study:
    """A study, as `hpo.search` and `hpo.open` return it. Each attribute is read from the storage when it is asked for."""

    def __init__(self, place: Storage, name: str) -> None:
        self._place = place
        self.name = name

    @property
    def storage(self) -> str:
        """The URL of the storage, without its password."""
        return self._place.shown

    @property
    def best(self) -> BestTrial:
        """The best complete trial that violates no constraint.

        Raises StudyError if there is none, and for a study with several objectives: it has a `front`.
        """
        with called():
            study = self._opened()
            if study.goals.are_several:
                names = ", ".join(study.goals.names)
                raise StudyError(
                    f"study {self.name!r} has several objectives ({names}) and no best trial; use study.front"
                )
            return self._results(study, k=1)[0]

    @property
    def front(self) -> list[BestTrial]:
        """The Pareto front of several objectives, the best in the first one first. With one objective, the best trial."""
        with called():
            study = self._opened()
            return self._results(study, k=None if study.goals.are_several else 1)

    @property
    def optuna(self) -> optuna.Study:
        """Optuna's object of the study, with its sampler and pruner. Optuna's plots and importances read it."""
        with called():
            return self._opened().optuna

    def trials_dataframe(self, **arguments: Any) -> pandas.DataFrame:
        """Return all trials as a table with Optuna's column names. Needs pandas.

        Args:
            arguments: those of `optuna.Study.trials_dataframe`.
        """
        study = self.optuna
        with called():
            return study.trials_dataframe(**arguments)

    def export(self, path: str | os.PathLike[str] = "best.toml", *, trial: int | None = None) -> Path:
        """Write the config of the best trial, as `hpo export` does, and return the file's path.

        Args:
            path: the file. It is replaced if it exists.
            trial: the number of another trial to write.

        Raises StudyError if there is no such trial, or if the file cannot be written.
        """
        with called():
            from hpo.study.export import export

            [written] = export(self._opened(), Path(path), number=trial)
            return written

    def enqueue(self, *configurations: Mapping[str, Any], unknown: bool = False) -> list[int]:
        """Queue known configurations, which workers take before new trials. Return the numbers of their trials.

        Args:
            configurations: values by the parameters' dotted paths, or nested dicts of them. The sampler chooses the others.
            unknown: take parameters that no trial of an objective has had yet.

        Raises SpecError that lists all mistakes: a name or value that does not fit the space. Nothing is queued then.
        """
        from hpo.api.settings import plain

        given = [plain(one, f"configuration {place}") for place, one in enumerate(configurations, start=1)]
        with called():
            from hpo.study import queued_trials

            return [one.number for one in queued_trials.enqueue(self._joined(), given, unknown=unknown)]

    def stop(self, *, now: bool = False) -> int:
        """Start no new trial, in any process. Return how many trials are still open.

        Args:
            now: also end running and parked trials, with their current values.
        """
        with called():
            from hpo.study import control

            return control.stop(self._joined(), now=now)

    def resume(self) -> None:
        """Undo `stop` and `hpo pause`. The next `hpo.search` goes on."""
        with called():
            from hpo.study import control

            control.resume(self._joined())

    if not TYPE_CHECKING:  # else a type checker would take any name for an attribute

        def __getattr__(self, name: str) -> NoReturn:
            """Tell where Optuna's attributes are, such as `best_value`."""
            raise AttributeError(f"hpo.Study has no {name!r}; Optuna's study is at .optuna, the best trial at .best")

    def __repr__(self) -> str:
        return f"<hpo.Study {self.name!r} in {self.storage}: {self._told(_in_a_line)}>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self._told(_in_lines))}</pre>"

    def _told(self, words: Callable[[Summary], str]) -> str:
        """Return words on the study, or why it cannot be read: to show a study raises nothing."""
        try:
            with called():
                from hpo.study import plain

                return words(plain.summarize(self._opened()))
        except HpoError as error:
            return str(error)

    def _opened(self) -> OpenStudy | PlainStudy:
        from hpo.study import plain

        return plain.open_any(self._place, self.name)

    def _joined(self) -> OpenStudy:
        from hpo.study.study import join

        return join(self._place, self.name)

    @staticmethod
    def _results(study: OpenStudy | PlainStudy, *, k: int | None) -> list[BestTrial]:
        from hpo.study import plain

        return [_best_trial(study, result) for result in plain.best(study, k)]


def _best_trial(study: OpenStudy | PlainStudy, result: TrialResult) -> BestTrial:
    from hpo.study import export
    from hpo.study.plain import PlainStudy

    config = dict(result.params)
    if not isinstance(study, PlainStudy) and not study.spec.objective:
        document = export.pinned(study, result)
        config = document.get("space") or {key: value for key, value in document.items() if key != "receipt"}
    return BestTrial(
        number=result.number,
        value=result.value,
        params=result.params,
        config=config,
        weights=Path(result.checkpoint) if result.checkpoint else None,
        values=result.values,
    )


def _in_a_line(summary: Summary) -> str:
    from hpo.study.format import value_text
    from hpo.view import words

    told = [f"{words.of_budget(summary.own_finished, summary, ' of ')} trials finished"]
    if summary.objectives:
        told.append(f"front of {len(summary.front)}")
    elif summary.best:
        told.append(f"best {value_text(summary.best.value)} by trial {summary.best.number}")
    return ", ".join([*told, *filter(None, [words.held(summary)])])


def _in_lines(summary: Summary) -> str:
    from hpo.view.pages import status_text

    return status_text(summary)
