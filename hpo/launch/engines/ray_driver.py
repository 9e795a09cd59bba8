"""The driver of workers on a Ray cluster: one actor for each slot of a launch, started, watched, moved and ended.

Its actors are no detached ones: they die with it, and their workers park. It holds no state that the study needs. A driver
that is started again begins with the slots that the database names.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo import text
from hpo.errors import Fault, StudyError
from hpo.files import write_json
from hpo.launch import exit_codes
from hpo.launch.engines.ray import SLOT, Plan
from hpo.launch.engines.ray_actor import Ended, Place, WorkerActor
from hpo.launch.engines.ray_cluster import Cluster, Needs
from hpo.launch.slots import HEALTHY_SECONDS, KILL_SECONDS, LONGEST_PAUSE_SECONDS, RESTART_SECONDS
from hpo.queue import launches
from hpo.storage.connect import FAILURES, connect, storage_url
from hpo.study import study as studies
from hpo.study.status import summarize
from hpo.study.study import Study
from hpo.worker.gpu_share import SHARE
from hpo.worker.signals import StopSignal

log = logging.getLogger(__name__)
TICK_SECONDS = 0.5  # in which ended workers and draining nodes are noticed
LOOK_SECONDS = 2.0  # between two looks into the database
OVER_SECONDS = 30.0  # between two looks whether the study is over, while workers wait for a place
QUIET_SECONDS = 5.0  # after which a worker that waits for a place is worth a word, if the cluster is too small
LONG_SECONDS = 60.0  # likewise, if it is large enough
MOST_FAILURES = 3  # of a slot in a row; its supervisor has restarted the worker several times before each
AWAY_SECONDS = 30.0  # before a worker runs again that left since the storage was away


@dataclass
class Slot:
    """A place for one worker, with the actor that serves it now."""

    number: int
    actor: Any = None
    place: Place | None = None  # None while the cluster has no room
    placing: Any = None  # the call that returns the place
    running: Any = None  # the call that returns how the worker has ended
    asked_at: float = 0.0  # when the actor was asked for
    start_at: float | None = 0.0  # when another actor is to be asked for; None if there is one, or none any more
    failures: int = 0  # in a row
    is_leaving: bool = False  # its worker was asked to park
    is_given_up: bool = False

    @property
    def state(self) -> str:
        """What `Engine.present` says of it; "" if it is through."""
        if self.actor is None:
            return "" if self.start_at is None else "pending"
        return "running" if self.place else "pending"


class Driver:
    """Keeps a worker in each wanted slot until nothing is left to do."""

    def __init__(self, plan: Plan, study: Study, cluster: Cluster, needs: Needs, stopping: StopSignal) -> None:
        self.plan = plan
        self.study = study
        self.cluster = cluster
        self.needs = needs
        self.stopping = stopping
        self.slots = {number: Slot(number=number) for number in range(plan.first, plan.last + 1)}
        self._stop_at: float | None = None  # when those are killed that were asked to leave
        self._look_at = 0.0
        self._over_at = time.monotonic() + OVER_SECONDS
        self._said = self._written = ""

    def run(self) -> int:
        """Run workers to their end. Return the exit code: of a signal, 1 if a slot was given up, else 0."""
        while self.tend():
            self.cluster.wait([slot.running for slot in self.slots.values() if slot.actor], TICK_SECONDS)
        if self.stopping():
            return self.stopping.exit_code
        return exit_codes.FAILED if any(slot.is_given_up for slot in self.slots.values()) else exit_codes.DONE

    def tend(self) -> bool:
        """Look after each slot once. Return whether one still has a worker, or is to have one."""
        self._take_ended()
        self._follow_database()
        if self.stopping():
            self._stop()
        self._leave_draining_nodes()
        for slot in self.slots.values():
            if slot.actor is not None and slot.place is None:
                self._look_for_place(slot)
            if slot.start_at is not None and time.monotonic() >= slot.start_at:
                self._start(slot)
        self._say_what_waits()
        self._write_state()
        return any(slot.state for slot in self.slots.values())

    # --- one slot -----------------------------------------------------------------------------------------------------

    def _start(self, slot: Slot) -> None:
        number = str(slot.number)
        slot.actor = self.cluster.actor(WorkerActor, self.needs)
        slot.place, slot.start_at, slot.is_leaving, slot.asked_at = None, None, False, time.monotonic()
        slot.placing = slot.actor.place.remote()
        command = [number if word == SLOT else word for word in self.plan.command]
        path = self.plan.log and str(Path(self.plan.log).with_name(Path(self.plan.log).name.replace(SLOT, number)))
        slot.running = slot.actor.run.remote(command, self._environment(), self.plan.folder, path)

    def _environment(self) -> dict[str, str]:
        """Return what workers need beside their node's environment. It goes to them as an argument, which Ray shows nowhere."""
        passed = {name: os.environ[name] for name in self.plan.environment if name in os.environ}
        share = {SHARE: repr(self.plan.gpus)} if self.plan.gpus else {}
        return {**passed, **self.study.storage.environment, **share, "PYTHONUNBUFFERED": "1"}

    def _look_for_place(self, slot: Slot) -> None:
        found = self.cluster.ready(slot.placing)
        if isinstance(found, Place):
            slot.place = found
            log.info("slot %d: worker on %s%s", slot.number, found.host, found.gpus and f", GPU {found.gpus}")

    def _take_ended(self) -> None:
        for slot in self.slots.values():
            if slot.actor is not None and (found := self.cluster.ready(slot.running)) is not None:
                self.cluster.kill(slot.actor)
                slot.actor = None
                self._go_on(slot, found) if isinstance(found, Ended) else self._go_on_elsewhere(slot, found)

    def _go_on(self, slot: Slot, ended: Ended) -> None:
        """Decide what comes after a worker that has ended, by its exit code."""
        if self.stopping():
            return
        if ended.code == exit_codes.DONE:
            self._over_at = 0.0  # perhaps the study is over
        elif ended.code in exit_codes.PARKED:
            log.info("slot %d: the worker has parked its trials; it goes on elsewhere", slot.number)
            slot.start_at = time.monotonic()
        elif ended.code == exit_codes.TRY_AGAIN:
            log.info("slot %d: the storage was away; another worker starts in %g s", slot.number, AWAY_SECONDS)
            slot.start_at = time.monotonic() + AWAY_SECONDS
        else:
            self._fail(slot, f"the worker ended with exit code {ended.code}", ended)

    def _go_on_elsewhere(self, slot: Slot, error: Exception) -> None:
        """Decide what comes after an actor that is gone. A lost node is no failure of the worker."""
        if self.stopping():
            return
        if why := self.cluster.why_not_begun(error):
            what = f"the actor could not begin: {text.short(why)}; every node needs the same hpo-torch[ray] and Python"
            self._fail(slot, what, None)
        elif slot.place is None or self.cluster.is_lost(slot.place.node, error):
            log.info("slot %d: its node is gone, or cannot be reached; another worker starts", slot.number)
            slot.start_at = time.monotonic() + RESTART_SECONDS
        else:
            self._fail(slot, f"the actor died: {text.short(str(error).splitlines()[0])}", None)

    def _fail(self, slot: Slot, what: str, ended: Ended | None) -> None:
        """Count a failure and start another worker after a pause, or give the slot up and show the log."""
        slot.failures = 1 if ended and ended.seconds >= HEALTHY_SECONDS else slot.failures + 1
        refused = ended is not None and ended.code == exit_codes.USAGE_ERROR
        slot.is_given_up = refused or slot.failures >= MOST_FAILURES
        where = f" on {slot.place.host}" if slot.place else ""
        if not slot.is_given_up:
            pause = min(RESTART_SECONDS * 2**slot.failures, LONGEST_PAUSE_SECONDS)
            slot.start_at = time.monotonic() + pause
            log.warning("slot %d%s: %s; another one starts in %g s", slot.number, where, what, pause)
            return
        log.error("slot %d%s: %s; no other one is started", slot.number, where, what)
        for line in ended.last_lines if ended else []:
            log.error("  %s", line)

    def _ask(self, slot: Slot) -> None:
        """Let a slot's worker park and leave. One that has no place yet is dropped at once."""
        slot.start_at = None
        if slot.actor is not None and slot.place is None:
            self.cluster.kill(slot.actor)
            slot.actor = None
        elif slot.actor is not None and not slot.is_leaving:
            slot.is_leaving = True
            slot.actor.ask.remote()

    # --- all slots ----------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        for slot in self.slots.values():
            self._ask(slot)
        if self._stop_at is None:
            log.info("stopping: running trials are parked")
            self._stop_at = time.monotonic() + self.plan.grace + 2 * KILL_SECONDS
        if time.monotonic() > self._stop_at:
            for slot in self.slots.values():
                if slot.actor is not None:
                    self.cluster.kill(slot.actor)
                    slot.actor = None

    def _leave_draining_nodes(self) -> None:
        """Let workers park on nodes that are about to be taken away. They go on elsewhere."""
        draining = self.cluster.draining()
        for slot in self.slots.values():
            if (
                slot.place is not None
                and slot.actor is not None
                and slot.place.node in draining
                and not slot.is_leaving
            ):
                log.info("slot %d: %s is draining; the worker parks its trials", slot.number, slot.place.host)
                slot.is_leaving = True
                slot.actor.ask.remote()

    def _follow_database(self) -> None:
        """Drop slots that are not wanted any more. While the database is away, all goes on as it is."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_SECONDS
        try:
            wanted = self._wanted()
        except FAILURES:
            return
        for slot in self.slots.values():
            if slot.number not in wanted and slot.state:
                self._ask(slot) if slot.state == "pending" else None  # a running one sees it by itself

    def _wanted(self) -> frozenset[int]:
        """Return the slots that are to have a worker. Raises an error of FAILURES if the storage is away."""
        wanted = frozenset(self.slots)
        try:
            if self.plan.launch is not None:
                found = launches.of_study(self.study.storage.engine, self.study.uid)
                wanted = next((each.wanted for each in found if each.number == self.plan.launch), frozenset())
            waits = any(slot.state == "pending" for slot in self.slots.values())
            if waits and time.monotonic() >= self._over_at:
                self._over_at = time.monotonic() + OVER_SECONDS
                wanted = frozenset() if summarize(self.study).is_over else wanted
        except StudyError:  # the study was deleted
            return frozenset()
        return wanted

    def _say_what_waits(self) -> None:
        """Say once for what workers wait that have no place."""
        now = time.monotonic()
        waiting = [now - slot.asked_at for slot in self.slots.values() if slot.actor and not slot.place]
        said = self.cluster.lack(self.needs, len(self.slots)) if max(waiting, default=0.0) > QUIET_SECONDS else ""
        if not said and max(waiting, default=0.0) > LONG_SECONDS:
            said = f"each worker needs {self.needs.text}, and other jobs hold what the cluster has"
        if said and said != self._said:
            log.warning("%d of %d workers wait for a place: %s", len(waiting), len(self.slots), said)
        self._said = said

    def _write_state(self) -> None:
        """Write what the slots do, for `hpo fleet`."""
        states = {str(slot.number): slot.state for slot in self.slots.values() if slot.state}
        if self.plan.state is not None and str(states) != self._written:
            write_json(Path(self.plan.state), {"address": self.cluster.address, "slots": states})
            self._written = str(states)


def main(words: str) -> int:
    """Run a driver. Return the exit code."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(text.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    plan = Plan.read(words)
    try:
        study = studies.join(connect(storage_url(None, None)), plan.study)
        with Cluster.joined(plan.address) as cluster:
            stopping = StopSignal.installed()  # after Ray has installed its own handler of SIGTERM
            needs = cluster.needs(plan.gpus, plan.cpus, plan.resources)
            log.info("connected to %s: %s", cluster.address, cluster.inventory)
            code = Driver(plan, study, cluster, needs, stopping).run()
    except Fault as fault:
        text.say_page(f"error: {fault}", to=sys.stderr)
        return exit_codes.USAGE_ERROR
    log.info("leaving with exit code %d", code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
