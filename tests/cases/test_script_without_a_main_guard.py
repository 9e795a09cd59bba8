"""A script that runs its study when it is imported is stopped there: nothing is written and no trial is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from hpo.errors import SpecError
from hpo.spec import usercode
from tests.support.paths import ROOT

OBJECTIVE = "import optuna\ndef objective(trial):\n    open('ran', 'w'); return trial.suggest_float('x', 0, 1)\n"
SCRIPTS = {
    "import hpo\nhpo.search(objective, name='theirs', direction='minimize')\n": 5,
    "study = optuna.create_study(storage='sqlite:///theirs.db')\nstudy.optimize(objective, n_trials=3)\n": 4,
    "optuna.create_study().optimize(objective, n_trials=3)\n": 4,
    "\nstudy = optuna.load_study(study_name='theirs', storage='sqlite:///theirs.db')\n": 5,
    "from optuna import create_study as make\n\nstudy = make()\n": 6,
    "storage = optuna.storages.RDBStorage('sqlite:///theirs.db')\n": 4,
    "from optuna.storages.journal import JournalFileBackend\nbackend = JournalFileBackend('theirs.log')\n": 5,
    "try:\n    optuna.create_study()\nexcept:\n    pass\n": 5,
    "if True:\n    optuna.delete_study(study_name='theirs', storage='sqlite:///theirs.db')\n": 5,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_line_is_told(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "train.py"
    file.write_text(OBJECTIVE + script)
    line = SCRIPTS[script]
    source = file.read_text().splitlines()[line - 1].strip()
    with pytest.raises(SpecError) as caught:
        usercode.load_objective("train.py:objective", tmp_path)
    assert str(caught.value) == (
        f"objective: train.py: it runs an Optuna study during its import, at {file}:{line} ({source}); "
        'nothing was run; put code that is only for the command line below `if __name__ == "__main__":`'
    )
    assert set(os.listdir(tmp_path)) - {"cache", "__pycache__"} == {"train.py"}


def test_the_line_that_led_to_it_is_told(tmp_path: Path) -> None:
    """Of a function that is called when the file is imported, and of a file that this one imports."""
    (tmp_path / "search.py").write_text("import optuna\ndef main():\n    optuna.create_study()\n")
    (tmp_path / "train.py").write_text(f"{OBJECTIVE}import search\nsearch.main()\n")
    with pytest.raises(SpecError) as caught:
        usercode.load_objective("train.py:objective", tmp_path)
    where = f"{tmp_path}/search.py:3 (optuna.create_study()), called from {tmp_path}/train.py:5 (search.main())"
    assert f"at {where};" in str(caught.value)


def test_what_runs_no_study_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of Optuna when the file is imported, and studies within a trial."""
    monkeypatch.setattr(optuna.logging, "set_verbosity", lambda level: None)  # the tests' own stays
    script = """
import optuna
from optuna import create_study
optuna.logging.set_verbosity(optuna.logging.ERROR)
SAMPLER = optuna.samplers.RandomSampler(seed=0)
def objective(trial):
    inner = create_study(sampler=SAMPLER)
    inner.optimize(lambda trial: trial.suggest_float("y", 0, 1) * 0 + 7, n_trials=2)
    return inner.best_value
if __name__ == "__main__":
    optuna.create_study(storage="sqlite:///theirs.db").optimize(objective)
"""
    (tmp_path / "train.py").write_text(script)
    assert usercode.load_objective("train.py:objective", tmp_path)(None) == 7


def test_optuna_need_not_be_loaded_before(tmp_path: Path) -> None:
    """Nor named by the file that is imported: here its package runs the study."""
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("from . import search\n")
    (tmp_path / "pkg" / "search.py").write_text(
        "from optuna import create_study\ncreate_study(storage='sqlite:///theirs.db')\n"
    )
    (tmp_path / "pkg" / "train.py").write_text("def objective(trial): return 0.0\n")
    code = (
        "import sys\nfrom pathlib import Path\nfrom hpo.spec import usercode\nassert 'optuna' not in sys.modules\n"
        "try: usercode.load('pkg.train:objective', Path.cwd(), 'objective')\nexcept Exception as error: print(error)\n"
    )
    command, environment = [sys.executable, "-P", "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert f"it runs an Optuna study during its import, at {tmp_path}/pkg/search.py:2" in done.stdout
    assert not (tmp_path / "theirs.db").exists()
