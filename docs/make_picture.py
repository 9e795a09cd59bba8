"""Makes the README's picture anew: `python docs/make_picture.py docs/assets/run.svg` runs the demo until two thirds are done."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hpo.cli.app import quiet_optuna
from hpo.launch.launcher import run_workers
from hpo.launch.local import Fleet
from hpo.storage.connect import connect
from hpo.study import resolve
from hpo.study import study as studies
from hpo.study.status import Summary
from hpo.study.trial_history import FinishedTrial
from hpo.view.live import LiveView
from hpo.view.picture import Around, render

DEMO = Path(__file__).parent.parent / "examples" / "digits.toml"
WIDTH, HEIGHT = 100, 28


class Camera(LiveView):
    """A live view that keeps the picture of the moment when two thirds of the budget are spent."""

    def __init__(self) -> None:
        super().__init__(console=Console(file=io.StringIO(), force_terminal=True, width=WIDTH, height=HEIGHT))
        self.film = Console(file=io.StringIO(), record=True, width=WIDTH, height=HEIGHT)
        self.has_taken = False

    def update(self, summary: Summary, newly_finished: Sequence[FinishedTrial], around: Around | None = None) -> None:
        super().update(summary, newly_finished, around)
        if not self.has_taken and summary.own_finished >= summary.own_budget * 2 // 3 and summary.running:
            self.film.print(render(summary, WIDTH, HEIGHT, around))
            self.has_taken = True


def main(target: Path) -> None:
    quiet_optuna()
    found = resolve.read(DEMO)
    with tempfile.TemporaryDirectory() as folder:
        place = connect(f"sqlite:///{folder}/studies.db", create=True)
        study = studies.create_or_join(place, found.spec, code_folder=found.code_folder, code_digest=found.code_digest)
        camera = Camera()
        run_workers(study, Fleet(study, 2, code_folder=found.code_folder), camera, timeout=None)
    assert camera.has_taken, "the run ended between two looks; run it again"
    target.write_text(camera.film.export_svg(title="hpo run examples/digits.toml"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
