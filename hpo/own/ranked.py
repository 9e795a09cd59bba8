"""A function of the user's own as the training of a trial on several processes: each rank calls it, the worker decides.

The worker holds the trial and is no rank. A rank asks it for parameters, reports to it, and asks whether to go on. What is
decided for rank 0's call counts for the same call of all ranks. So they are pruned and parked at the same epoch.
"""

from __future__ import annotations

import math
import socket
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import optuna

from hpo.errors import LostLease, Outage, Parked, ProgramError, Signal
from hpo.own import command
from hpo.own.command import GRACE_SECONDS, LINGER_SECONDS, LOOK_SECONDS, Curve, Site
from hpo.own.process import OutOfMemoryCount
from hpo.own.rank_channel import Answer, Ask, EndOfEpoch, Result, Task, Turns, take_up
from hpo.own.ranks import Ranks
from hpo.spec import seeds, space, usercode
from hpo.spec.program import Reported
from hpo.spec.study_file import StudySpec

RANK = [sys.executable, "-P", "-m", "hpo.worker.rank"]  # -P: a folder `hpo` at hand is not ours


class RankedTraining:
    """A function that trains one trial on several processes. `trial.loop` is the Site of the trial."""

    def __init__(self, spec: StudySpec, folder: Path) -> None:
        """Make the training of a study with `train` or `objective`; SpecError if the function cannot be imported or called."""
        self._spec = spec
        self._folder = folder.absolute()
        self._key, self._reference = ("train", spec.train) if spec.train else ("objective", spec.objective or "")
        usercode.load_function(self._reference, folder, self._key, ("config", "trial") if spec.train else ("trial",))

    def __call__(self, trial: optuna.Trial) -> Any:
        """Run the ranks to their end. Return what rank 0's function returned.

        Raises TrialPruned if rank 0's function did, one of the Signals if the attempt must end, and ProgramError if a rank
        fails.
        """
        site: Site = trial.loop  # type: ignore[attr-defined]
        config = space.suggest(self._spec.tree, trial) if self._spec.train else None
        memory, count = OutOfMemoryCount(), self._spec.processes
        site.begin([self._reference])
        try:
            talk = Talk(trial, site, count, self._spec.recovery.checkpoint_seconds)
            with talk, self._started(trial, site, talk) as running:
                talk.send(self._task(trial, site, config))
                run = RankedRun(running, talk, site)
                run.to_its_end()
                if running.exit_code != 0:
                    command.refuse_failure(running, [], memory, site)
        finally:
            site.end()
        if talk.result is None:
            raise ProgramError("rank 0 ended before its function returned; let it return the trial's value")
        return talk.result.value

    def _started(self, trial: optuna.Trial, site: Site, talk: Talk) -> Ranks:
        return Ranks(
            RANK,
            self._spec.processes,
            folder=Path.cwd(),
            environment={**command.environment(), **command.variables(self._spec, trial, site)},
            keep=site.keep,
            timeout=self._spec.recovery.rank_seconds,
            reports=site.reports,
            channels=talk.theirs,
        )

    def _task(self, trial: optuna.Trial, site: Site, config: dict[str, Any] | None) -> Task:
        return Task(
            key=self._key,
            reference=self._reference,
            folder=self._folder,
            config=config,
            number=trial.number,
            user_attrs=trial.user_attrs,
            seed=seeds.of_trial(self._spec.seed, trial.number, trial.user_attrs),
            save_to=site.folder,
            resumes_at=take_up(site.folder, self._spec.processes),
        )


class RankedRun:
    """One run of all ranks, from their first word to their end."""

    def __init__(self, running: Ranks, talk: Talk, site: Site) -> None:
        self._ranks = running
        self._talk = talk
        self._site = site

    def to_its_end(self) -> None:
        """Answer the ranks until they end, or until one fails. Raises what ends the attempt before."""
        deadline = math.inf
        try:
            while self._goes_on() and time.monotonic() < deadline:
                if not self._talk.is_over:
                    self._site.let_go()
                self._listen()
                deadline = min(deadline, self._talk.deadline(self._ranks.running))
        except (Parked, Outage) as why:
            self._await_end(why)
        except LostLease:  # another worker may be about to run the trial in the same folder, so the ranks get no grace
            raise
        except BaseException:
            self._ranks.terminate()
            self._linger(min(GRACE_SECONDS, self._site.grace))
            raise
        self._linger(LINGER_SECONDS)
        self._talk.raise_ending()

    def _goes_on(self) -> bool:
        """Return whether ranks run, and none has failed. Once the attempt is to end, how they end does not count."""
        if self._talk.is_over:
            return bool(self._ranks.running)
        return self._ranks.exit_code is None

    def _await_end(self, why: Signal) -> None:
        """Let the ranks come to the end of an epoch, where they learn that the trial is parked, or let the grace pass.

        If rank 0's function returns before, the trial is complete.
        """
        self._talk.wanted = why
        deadline = time.monotonic() + self._site.grace
        while self._ranks.running and time.monotonic() < deadline:
            self._listen()
            deadline = min(deadline, self._talk.deadline(self._ranks.running))
        self._linger(0)
        self._talk.raise_ending()
        if not (isinstance(why, Parked) and self._talk.result is not None and self._ranks.exit_code == 0):
            raise why

    def _listen(self) -> None:
        chunk = self._ranks.read(LOOK_SECONDS, self._talk.descriptors)
        if chunk:
            self._site.keep(chunk)
        if self._talk.serve():
            self._ranks.note_sign()

    def _linger(self, seconds: float) -> None:
        """Take what the ranks have said and printed last."""
        deadline = time.monotonic() + seconds
        while self._ranks.is_open and time.monotonic() < deadline:
            self._listen()
        self._talk.serve()


class Talk:
    """What the ranks of a trial ask, and what the worker answers.

    Attributes:
        theirs: the ranks' ends of the sockets.
        result: what rank 0's function returned, or that it raised TrialPruned.
        wanted: why the attempt is to end at the next point where rank 0 can be told; None if it goes on.
    """

    def __init__(self, trial: optuna.Trial, site: Site, count: int, checkpoint_seconds: float) -> None:
        pairs = [socket.socketpair() for _ in range(count)]
        self.theirs = [theirs for _, theirs in pairs]
        self.result: Result | None = None
        self.wanted: Signal | None = None
        self._own = {rank: Connection(own.detach()) for rank, (own, _) in enumerate(pairs)}
        self._trial = trial
        self._site = site
        self._curve = Curve(trial, site)
        self._decided: dict[str, list[tuple[Answer, object]]] = {"report": [], "prune": [], "epoch": []}
        self._turns = [Turns() for _ in range(count)]
        self._waiting: dict[int, Ask] = {}  # questions of other ranks that rank 0 has not come to
        self._told: set[int] = set()  # ranks that know that the attempt ends
        self._ending: BaseException | None = None
        self._ended_at = math.inf
        self._has_loop = False  # then the trial is parked where the loop saves
        self._has_new = False  # rank 0's last report was new, so that the pruner is asked
        self._checkpoint_seconds = checkpoint_seconds
        self._saved_at = time.monotonic()

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        for channel in self._own.values():
            channel.close()
        for theirs in self.theirs:
            theirs.close()

    def send(self, task: Task) -> None:
        """Tell every rank what to call."""
        for channel in self._own.values():
            with suppress(OSError):
                channel.send(task)

    @property
    def descriptors(self) -> list[int]:
        """What can be waited for."""
        return [channel.fileno() for channel in self._own.values()]

    @property
    def is_over(self) -> bool:
        """Whether rank 0 knows that the attempt ends, or has been pruned."""
        return self._ending is not None or (self.result is not None and self.result.is_pruned)

    def deadline(self, running: list[int]) -> float:
        """Return until when ranks may run on after the attempt's end was decided."""
        if not self.is_over:
            return math.inf
        if isinstance(self._ending, Parked | Outage) and (0 in running or self._told >= set(running)):
            return self._ended_at + self._site.grace
        return self._ended_at + min(GRACE_SECONDS, self._site.grace)

    def raise_ending(self) -> None:
        """Raise what ended the attempt, if it was told to rank 0, or if rank 0 was pruned."""
        if self._ending is not None:
            raise self._ending
        if self.result is not None and self.result.is_pruned:
            raise optuna.TrialPruned(self.result.reason)

    def serve(self) -> bool:
        """Answer what the ranks ask. Return whether one has said something."""
        has_heard = False
        for rank in [*self._own]:
            while rank in self._own and self._own[rank].poll(0):
                try:
                    said = self._own[rank].recv()
                except (EOFError, OSError):  # the rank has ended
                    self._own.pop(rank).close()
                    continue
                has_heard = True
                self._hear(rank, said)
        return has_heard

    def _hear(self, rank: int, said: Ask | Result) -> None:
        if isinstance(said, Result):
            if rank == 0:
                self.result = said
                self._ended_at = time.monotonic()
                self._answer_waiting()
        elif said.step is None:
            self._answer(rank, self._at_once(rank, said))
        else:
            self._waiting[rank] = said
            if rank == 0 and self._ending is None:
                self._decided[said.step].append((self._decide(said), said.arguments[-1]))
            self._answer_waiting()

    def _answer(self, rank: int, answer: Answer) -> None:
        if answer.ends is not None or (isinstance(answer.value, EndOfEpoch) and answer.value.parks):
            self._told.add(rank)
        with suppress(OSError):  # the rank has ended
            self._own[rank].send(answer)

    def _answer_waiting(self) -> None:
        """Answer the questions whose answer is known by now."""
        for rank, ask in [*self._waiting.items()]:
            assert ask.step is not None
            turn, decided = self._turns[rank].made[ask.step], self._decided[ask.step]
            if turn < len(decided):
                answer, at = decided[turn]
                self._refuse_another_step(rank, ask, at)
                self._turns[rank].made[ask.step] += 1
            elif self._ending is not None:
                answer = Answer(ends=str(self._ending))
            elif self.result is not None:  # rank 0 has ended, and nothing is decided any more
                answer = _go_on(self.result, ask)
            else:
                continue
            del self._waiting[rank]
            self._answer(rank, answer)

    @staticmethod
    def _refuse_another_step(rank: int, ask: Ask, at: object) -> None:
        step = ask.arguments[-1]
        if step is not None and at is not None and step != at:
            raise ProgramError(
                f"rank {rank} is at step {step} where rank 0 was at step {at}; let all ranks call trial.report and "
                "trial.should_prune at the same steps, or rank 0 alone"
            )

    def _at_once(self, rank: int, ask: Ask) -> Answer:
        try:
            if ask.call == "suggest":
                return Answer(value=self._trial.give(*ask.arguments))  # type: ignore[attr-defined]
            if ask.call == "attribute" and rank == 0:
                self._trial.set_user_attr(*ask.arguments)
            elif ask.call == "constraint" and rank == 0:
                self._trial.set_constraint(*ask.arguments)
            elif ask.call == "loop":
                self._has_loop = True
        except Exception as error:
            return Answer(error=_plain(error))
        return Answer()

    def _decide(self, ask: Ask) -> Answer:
        """Decide at a call of rank 0."""
        try:
            return Answer(value=self._decided_value(ask))
        except ProgramError:
            raise
        except Signal as why:
            self._end_by(why)
            return Answer(ends=str(why))
        except Exception as error:
            return Answer(error=_plain(error))

    def _decided_value(self, ask: Ask) -> Any:
        if ask.step == "report":
            return self._report(*ask.arguments)
        return self._prune() if ask.step == "prune" else self._end_epoch(*ask.arguments)

    def _end_by(self, why: Signal) -> None:
        self._ending, self._ended_at = why, time.monotonic()

    def _report(self, value: float, step: int) -> None:
        self._has_new = self._curve.report(Reported(value=value, epoch=step, line=f"step {step}: {value!r}"))
        if not self._has_loop:
            self._let_go()

    def _prune(self) -> bool:
        if not self._has_loop:
            self._let_go()
        return self._has_new and self._trial.should_prune()

    def _let_go(self) -> None:
        if self.wanted is not None:
            raise self.wanted
        self._site.let_go()

    def _end_epoch(self, is_forced: bool, is_last: bool, epoch: int) -> EndOfEpoch:  # noqa: ARG002
        """Decide what all ranks do after an epoch of `hpo.epochs`: save if that is due, or if the trial is to be parked.

        After the last epoch nothing is saved. An attempt that began there would have no epoch left, and return no value.
        """
        if is_last:
            self._has_loop = False  # a report after the loop may park the trial
            return EndOfEpoch(saves=False, parks=False)
        try:
            self._let_go()
        except (Parked, Outage) as why:
            self._end_by(why)
            return EndOfEpoch(saves=True, parks=True)
        is_due = time.monotonic() - self._saved_at >= self._checkpoint_seconds
        saves = is_forced or is_due
        if saves:
            self._saved_at = time.monotonic()
        return EndOfEpoch(saves=saves, parks=False)


def _go_on(result: Result, ask: Ask) -> Answer:
    """Return what another rank is told at a call to which rank 0 has not come before its end."""
    if result.is_pruned:
        return Answer(ends="rank 0 was pruned")
    return Answer(value=EndOfEpoch(saves=False, parks=False) if ask.step == "epoch" else None)


def _plain(error: Exception) -> Exception:
    """Return an error that every rank can read."""
    kind = type(error) if type(error) in (ValueError, TypeError) else RuntimeError
    return kind(str(error))
