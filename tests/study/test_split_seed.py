"""The split seed alone decides the test part: the study's seed never moves an image into it or out of it."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
from torch import Tensor

import hpo as package
from hpo import data
from hpo.analysis import confirmation
from hpo.data import split
from hpo.final import trajectory
from hpo.storage.connect import connect
from hpo.study import study as studies
from tests.cli.test_commands import Hpo, hpo
from tests.support.declared import work
from tests.support.old_files import put_study_down

__all__ = ["hpo"]  # a fixture

OLD = Path(__file__).parents[1] / "fixtures" / "d46d32a"
FILE = """
name = "digits"
executor = "loop"
{top}
[data]
name = "digits"
{data}
[model]
name = "mlp"
widths = [8]
[training]
epochs = 1
batch_size = 256
[optimizer]
name = "sgd"
lr = {{ low = 1e-3, high = 1e-1, log = true }}
[budget]
trials = 2
[sampler]
name = "random"
[pruner]
name = "none"
"""

Parts = tuple[Tensor, Tensor, Tensor]


class Splits:
    """Every split that was made, as the indices of its three parts."""

    def __init__(self) -> None:
        self.made: list[list[list[int]]] = []

    def all_are(self, seed: int) -> bool:
        """Return whether something was split since the last call, and each time by this seed."""
        made, self.made = self.made, []
        return bool(made) and all(parts == of_digits(seed) for parts in made)


def of_digits(seed: int) -> list[list[int]]:
    return [part.tolist() for part in split.parted(data.digits(), seed)]


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the seconds of matplotlib, as where it is not installed."""
    monkeypatch.setattr(trajectory, "can_draw", lambda: False)


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> Splits:
    """Look on while the data is split: nothing but `parted` decides on parts."""
    seen = Splits()

    def parted(source: data.Source, seed: int) -> Parts:
        parts = split.parted(source, seed)
        seen.made.append([part.tolist() for part in parts])
        return parts

    monkeypatch.setattr(data, "parted", parted)
    monkeypatch.setattr(sys.modules["hpo.data.overview"], "parted", parted)
    return seen


def write(path: Path, top: str = "", data: str = "") -> Path:
    path.write_text(FILE.format(top=top, data=data))
    return path


def train(name: str) -> studies.Study:
    """Train what is left of a study of the current folder in this process."""
    place = connect(f"sqlite:///{Path('studies.db').absolute()}")
    study = studies.join(place, name)
    assert work(study) == 0
    place.close()
    return study


def confirm(name: str) -> studies.Study:
    """Train the two best trials of a study again, each with two seeds, as `hpo confirm` does."""
    place = connect(f"sqlite:///{Path('studies.db').absolute()}")
    source = studies.join(place, name)
    request = confirmation.ask(source, top=2, runs=2, delta=None)
    digest = confirmation.check_unchanged(source, source.code_folder)
    sister = confirmation.enlist(request, source.code_folder, digest)
    assert work(sister) == 0
    place.close()
    return sister


def done(hpo: Hpo, *arguments: str) -> str:
    code, said, complaint = hpo(*arguments)
    assert code == 0, complaint
    return said


def refused(hpo: Hpo, *arguments: str) -> str:
    code, _, complaint = hpo(*arguments)
    assert code == 2
    return " ".join(complaint.split())


def test_the_test_part_is_the_same_whatever_the_seed(hpo: Hpo, splits: Splits, tmp_path: Path) -> None:
    """Each public way splits by the split seed, which is 0 where nobody gives one."""
    assert of_digits(0) != of_digits(7)
    file = write(tmp_path / "f.toml", top="seed = 7")
    done(hpo, "check", str(file))
    assert splits.all_are(0)

    done(hpo, "run", str(file), "--workers", "0")
    assert train("digits").spec.seed == 7
    assert splits.all_are(0)
    assert package.open("digits").best.config["data"]["split_seed"] == 0
    package.open("digits").export("best.toml")
    done(hpo, "train", "best.toml", "--replay")
    done(hpo, "train", "best.toml", "-o", "run")
    done(hpo, "train", "best.toml", "-o", "again", "--seed", "9")
    done(hpo, "after", "run", "-o", "after")
    assert splits.all_are(0)

    assert confirm("digits").spec.split_seed == 0
    assert splits.all_are(0)

    other = write(tmp_path / "other.toml", top="seed = 8")
    done(hpo, "fork", "digits", "fork", str(other))
    done(hpo, "run", str(other), "--name", "fork", "--workers", "0")
    train("fork")
    assert splits.all_are(0)

    package.search(file, name="python", workers=0, progress=False)
    train("python")
    assert splits.all_are(0)


def test_another_split_seed_is_another_test_part_and_a_fork_takes_it_over(
    hpo: Hpo, splits: Splits, tmp_path: Path
) -> None:
    done(hpo, "run", str(write(tmp_path / "f.toml", data="split_seed = 4")), "--workers", "0")
    train("digits")
    assert splits.all_are(4)
    plain = str(write(tmp_path / "plain.toml", top="seed = 3"))
    done(hpo, "fork", "digits", "fork", plain)
    done(hpo, "run", plain, "--name", "fork", "--workers", "0")  # the file names no split seed, so it joins
    train("fork")
    assert splits.all_are(4)
    another = str(write(tmp_path / "another.toml", data="split_seed = 0"))
    assert refused(hpo, "fork", "digits", "fork-2", another) == (
        "error: data.split_seed = 0: study 'digits' has 4 for its split, so its trials have seen images that would be in the new "
        "study's validation or test part; remove split_seed, and the fork takes 4 over"
    )
    assert "data.split_seed: the study has 4, the file has 0" in refused(hpo, "run", another, "--workers", "0")
    old_format = str(write(tmp_path / "old.toml", top="format = 2\nseed = 3"))
    complaint = refused(hpo, "fork", "digits", "fork-2", old_format)
    assert complaint.startswith("error: seed = 3: study 'digits' has 4 for its split")
    assert complaint.endswith("remove format = 2, so that data.split_seed decides the split instead of seed")


def test_folds_and_a_subset_leave_the_test_part_as_it_is() -> None:
    source = data.digits()
    *_, test = split.parted(source, 0)
    folds = [split.parted(data.select(source, folds=3, fold=fold, subset=300), 0) for fold in range(3)]
    assert all(parts[2].equal(test) for parts in folds)
    assert not set(test.tolist()) & {index for parts in folds for part in parts[:2] for index in part.tolist()}


@pytest.mark.parametrize("study", ["digits", "fork"])
def test_a_config_whose_split_seed_was_changed_is_not_tested(study: str, hpo: Hpo, tmp_path: Path) -> None:
    """A trial that a fork has taken over has no receipt of its own."""
    file = str(write(tmp_path / "f.toml"))
    done(hpo, "run", file, "--workers", "0")
    train("digits")
    if study == "fork":
        done(hpo, "fork", "digits", "fork", file)
    done(hpo, "export", study, "-o", "best.toml")
    text = (tmp_path / "best.toml").read_text()
    (tmp_path / "best.toml").write_text(text.replace("\nsplit_seed = 0", "\nsplit_seed = 1", 1))
    assert refused(hpo, "train", "best.toml") == (
        "error: best.toml: data.split_seed = 1: the trial was chosen with 0, so examples that it has seen would be in the test "
        "part; restore 0, and give another seed of the training by --seed, or remove [receipt]"
    )
    assert not (tmp_path / "runs").exists()


# --- what an earlier hpo left, with seed = 5 ----------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the study, its file, its best trial's file and a final training, in the current folder."""
    put_study_down(tmp_path, OLD)
    (tmp_path / "sqlite.db").rename(tmp_path / "studies.db")
    return tmp_path


def test_an_old_study_goes_on_with_the_split_of_its_seed(hpo: Hpo, old: Path, splits: Splits) -> None:
    before = tomllib.loads((old / "winner.toml").read_text())["receipt"]["fingerprint"]
    done(hpo, "run", "digits.toml", "--workers", "0")  # its file, which has no split seed, joins it
    study = train("digits")
    assert splits.all_are(5)
    assert (study.spec.format, study.spec.split_seed, study.spec.fingerprint) == (2, 5, before)
    assert (confirm("digits").spec.format, splits.all_are(5)) == (2, True)
    done(hpo, "export", "digits", "--trial", "0", "-o", "again.toml")
    assert tomllib.loads((old / "again.toml").read_text())["data"] == {"name": "digits"}


def test_an_old_config_and_its_training_keep_their_split(hpo: Hpo, old: Path, splits: Splits) -> None:
    assert "already finished" in done(hpo, "train", "winner.toml", "-o", "run")
    done(hpo, "train", "winner.toml", "-o", "new", "--seed", "9")
    done(hpo, "after", "run", "-o", "after")
    assert splits.all_are(5)
    text = (old / "winner.toml").read_text()
    (old / "winner.toml").write_text(text.replace("\nseed = 5\n", "\nseed = 6\n", 1))
    assert refused(hpo, "train", "winner.toml", "-o", "moved").startswith(
        "error: winner.toml: seed = 6: the trial was chosen"
    )


def test_a_fork_of_an_old_study_keeps_its_split(hpo: Hpo, old: Path, splits: Splits) -> None:
    text = (old / "digits.toml").read_text()
    (old / "other.toml").write_text(text.replace("seed = 5", "seed = 6"))
    done(hpo, "fork", "digits", "fork", "other.toml")
    done(hpo, "run", "other.toml", "--name", "fork", "--workers", "0")
    spec = train("fork").spec
    assert splits.all_are(5)
    assert (spec.format, spec.seed, spec.data["split_seed"]) == (3, 6, 5)


def test_an_old_file_makes_a_new_study_with_split_seed_0(hpo: Hpo, old: Path, splits: Splits) -> None:
    done(hpo, "run", "digits.toml", "--name", "new", "--workers", "0")
    assert (train("new").spec.seed, splits.all_are(0)) == (5, True)


@pytest.mark.parametrize(("given", "code"), [(5, 0), (4, 2)])
def test_a_split_seed_given_to_an_old_study_must_be_its_seed(hpo: Hpo, old: Path, given: int, code: int) -> None:
    text = (old / "digits.toml").read_text()
    (old / "digits.toml").write_text(text.replace("[data]\n", f"[data]\nsplit_seed = {given}\n"))
    found, _, complaint = hpo("run", "digits.toml", "--workers", "0")
    assert found == code, complaint
    if code:
        assert " ".join(complaint.split()) == (
            "error: digits.toml: data.split_seed = 4: in format 2 the study's seed decides the split, here seed = 5; "
            "remove split_seed, or start a new study with --name"
        )
