"""The study file: its shape, its defaults, its fingerprint, and what is said about a wrong one."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from hpo.errors import SpecError
from hpo.spec import space, study_file
from hpo.spec.durations import seconds
from hpo.spec.failures import Policies
from hpo.spec.recovery import Recovery
from hpo.spec.study_file import StudySpec, as_meant
from hpo.study import resolve
from tests.support.paths import ROOT

DATA, MODEL = '[data]\nname = "digits"\n', '[model]\nname = "mlp"\n'
OPTIMIZER = '[optimizer]\nname = "sgd"\nlr = { low = 1e-3, high = 0.1, log = true }\n'
SMALL = DATA + MODEL + OPTIMIZER


def read(folder: Path, text: str, name: str = "s.toml") -> StudySpec:
    (folder / name).write_text(text)
    return resolve.read(folder / name).spec


def fault(folder: Path, text: str) -> list[str]:
    """Return the lines of the fault, without the file's path, which each of them must begin with."""
    with pytest.raises(SpecError) as caught:
        read(folder, text)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{folder}/s.toml: ") for line in lines)
    return [line.removeprefix(f"{folder}/s.toml: ") for line in lines]


def test_the_smallest_file_has_every_default_filled(tmp_path: Path) -> None:
    assert read(tmp_path, SMALL).document == {
        "format": 3,
        "name": "s",
        "seed": 0,
        "params": {},
        "metric": "accuracy",
        "direction": "maximize",
        "value": "best",
        "data": {"name": "digits", "split_seed": 0},
        "model": {"name": "mlp", "widths": [64, 32], "dropout": 0.0, "norm": "batch", "activation": "relu"},
        "optimizer": {
            "name": "sgd",
            "lr": {"low": 1e-3, "high": 0.1, "log": True},
            "weight_decay": 0.0,
            "momentum": 0.0,
            "nesterov": False,
            "decoupled": False,
            "decay": "weights",
        },
        "schedule": {"name": "constant"},
        "training": {"epochs": 20, "batch_size": 32, "precision": "float32", "threads": 1},
        "sampler": {
            "name": "tpe",
            "n_startup_trials": 10,
            "n_ei_candidates": 24,
            "multivariate": True,
            "constant_liar": True,
            "group": False,
        },
        "recovery": Recovery().model_dump(exclude={"rank_timeout"}),
        "failures": Policies().model_dump(),
        "executor": "auto",
        "slots": "auto",
        "pruner": {
            "name": "median",
            "n_startup_trials": 5,
            "n_warmup_steps": 0,
            "interval_steps": 1,
            "n_min_trials": 3,
        },
        "budget": {"trials": 64},
    }


def test_how_it_is_run_is_no_part_of_what_a_study_is(tmp_path: Path) -> None:
    there = read(tmp_path, SMALL)
    for line in ('executor = "loop"', 'executor = "stack"', "slots = 8"):
        assert read(tmp_path, f"{line}\n{SMALL}").fingerprint == there.fingerprint


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('executor = "fast"', "executor = 'fast': input should be 'auto', 'loop' or 'stack'"),
        ("slots = 0", "slots = 0: input should be 'auto', or be greater than or equal to 1"),
        ('slots = "many"', "slots = 'many': input should be 'auto', or be a valid integer"),
        ("slots = 1.5", "slots = 1.5: input should be 'auto', or be a valid integer"),
    ],
)
def test_a_wrong_executor_or_number_of_slots_is_told(tmp_path: Path, line: str, said: str) -> None:
    assert fault(tmp_path, f"{line}\n{SMALL}") == [said]


def test_augmentation_is_searched_like_anything_else_and_checked(tmp_path: Path) -> None:
    searched = SMALL + "\n[augment]\ncrop = { low = 0, high = 2 }\nhorizontal_flip = 0.5\n"
    assert "augment.crop" in dict(space.parameters(read(tmp_path, searched).tree))
    assert read(tmp_path, searched).fingerprint != read(tmp_path, SMALL).fingerprint
    for line, said in (("crop = -1", "augment.crop"), ("flip = 0.5", "augment takes no 'flip'")):
        with pytest.raises(SpecError, match=said):
            read(tmp_path, SMALL + f"\n[augment]\n{line}\n")


@pytest.mark.parametrize("file", ["hpo/spec/template.toml", "examples/digits.toml"])
def test_the_files_we_ship_are_right_and_searchable(file: str) -> None:
    found = resolve.read(ROOT / file).spec
    assert not found.is_pinned
    assert {"optimizer.lr", "optimizer.weight_decay", "model.dropout", "optimizer.name", "schedule.name"} <= {
        path for path, _ in space.parameters(found.tree)
    }


def test_a_resolved_spec_survives_its_way_through_the_storage(tmp_path: Path) -> None:
    found = resolve.read(ROOT / "examples/digits.toml").spec
    stored = StudySpec.from_document(json.loads(json.dumps(found.document)))
    assert stored == found
    assert stored.fingerprint == found.fingerprint
    assert study_file.differences(stored, found) == []
    assert read(tmp_path, SMALL).fingerprint == read(tmp_path, SMALL).fingerprint


def test_the_metric_decides_the_direction(tmp_path: Path) -> None:
    assert read(tmp_path, 'metric = "loss"\n' + SMALL).direction == "minimize"
    assert fault(tmp_path, 'metric = "loss"\ndirection = "maximize"\n' + SMALL) == [
        "direction = 'maximize': loss must be minimized; remove direction"
    ]


# --- fingerprint ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "workers = 3\n",
        'storage = "sqlite:///x.db"\n',
        'checkpoints = "/tmp/c"\n',
        "receipt = { trial = 3 }\n",
        "budget = { trials = 3 }\n",
        'budget = { timeout = "3m" }\n',
        "# a comment\n\n",
        "seed = 0\n",
        'value = "best"\n',
        'direction = "maximize"\n',
        'schedule = { name = "constant" }\n',
        "training = { epochs = 20 }\n",
        'sampler = { name = "tpe", multivariate = true }\n',
    ],
)
def test_what_the_fingerprint_ignores(change: str, tmp_path: Path) -> None:
    """The fingerprint ignores where and how much and what only repeats a default."""
    assert read(tmp_path, change + SMALL).fingerprint == read(tmp_path, SMALL).fingerprint


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("seed = 1\n", "seed: the study has 0, the file has 1"),
        ('name = "other"\n', 'name: the study has "s", the file has "other"'),
        ('value = "last"\n', 'value: the study has "best", the file has "last"'),
        ("training = { epochs = 21 }\n", "training.epochs: the study has 20, the file has 21"),
        ("training = { threads = 2 }\n", "training.threads: the study has 1, the file has 2"),
        (
            "training = { schedule_epochs = 5 }\n",
            "training.schedule_epochs: the study has nothing, the file has 5",
        ),
        (
            "training = { epochs = { low = 5, high = 9 } }\n",
            'training.epochs: the study has 20, the file has {"low": 5, "high": 9}',
        ),
        (
            'pruner = { name = "median", n_warmup_steps = 1 }\n',
            "pruner.n_warmup_steps: the study has 0, the file has 1",
        ),
        (
            'sampler = { name = "tpe", n_startup_trials = 11 }\n',
            "sampler.n_startup_trials: the study has 10, the file has 11",
        ),
        (
            'schedule = { name = "cosine" }\n',
            "schedule.final_factor: the study has nothing, the file has 0.0\n"
            'schedule.name: the study has "constant", the file has "cosine"',
        ),
    ],
)
def test_what_changes_the_fingerprint_is_named(change: str, line: str, tmp_path: Path) -> None:
    """The fingerprint changes with anything else and the difference is named."""
    stored, mine = read(tmp_path, SMALL), read(tmp_path, change + SMALL)
    assert stored.fingerprint != mine.fingerprint
    assert "\n".join(study_file.differences(stored, mine)) == line


def test_the_fingerprint_is_a_sha256_of_the_identity(tmp_path: Path) -> None:
    """The fingerprint is a sha256 of the identity with the format in front."""
    import hashlib

    found = read(tmp_path, SMALL)
    text = json.dumps([3, found.identity], sort_keys=True, separators=(",", ":"))
    assert found.fingerprint == hashlib.sha256(text.encode()).hexdigest()
    assert not {"budget", "workers", "storage", "checkpoints", "receipt"} & found.identity.keys()


# --- durations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("2d", 172800), ("1d1h1m1s", 90061), (" 5m ", 300), ("0h5s", 5)],
)
def test_a_duration_is_read(text: str, expected: int) -> None:
    assert seconds(text, "budget.timeout") == expected


@pytest.mark.parametrize(
    "text", ["", " ", "30", "0s", "0m0s", "-5m", "5 m", "1.5h", "30m1h", "m", "5w", "9" * 400 + "s"]
)
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        seconds(text, "--timeout")
    assert str(caught.value) == f"--timeout: {text!r} is not a duration; write it like 90s, 30m or 1h30m"


# --- an objective of the user's own ---------------------------------------------------------------------------------


def test_an_own_objective_needs_a_direction(tmp_path: Path) -> None:
    """An objective of the user's own needs a direction and takes no training."""
    (tmp_path / "mine.py").write_text("def objective(trial): return 1.0\n")
    own = 'objective = "mine.py:objective"\n'
    found = read(tmp_path, own + 'direction = "minimize"\n')
    assert (found.tree, found.rule, found.is_pinned) == ({}, None, False)
    assert found.code_references == ["mine.py:objective"]
    assert fault(tmp_path, own) == ['direction: needed with an objective of your own; write "maximize" or "minimize"']
    for section in ("data", "model", "optimizer", "schedule", "training"):
        assert fault(tmp_path, f'{own}direction = "minimize"\n[{section}]\nname = "x"\n') == [
            f"{section}: belongs to a declared training, not to objective = 'mine.py:objective'; remove it"
        ]


def test_code_references_are_those_names_that_mean_code(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def net(shape, classes, *, width: int = 3): pass\n")
    text = DATA + '[model]\nname = { choices = ["mlp", "mine.py:net"] }\n' + OPTIMIZER
    assert read(tmp_path, text).code_references == ["mine.py:net"]
    assert read(tmp_path, SMALL).code_references == []


# --- wrong files ----------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, str]] = {
    "a key near a known one": ("sead = 1\n" + SMALL, "sead: a study file takes no 'sead' (did you mean 'seed'?)"),
    "a key in budget": (
        SMALL + "[budget]\ntrails = 5",
        "budget.trails: budget takes no 'trails' (did you mean 'trials'?)",
    ),
    "a key in training": (
        SMALL + "[training]\nepoch = 3",
        "training.epoch: training takes no 'epoch' (did you mean 'epochs'?)",
    ),
    "a key in a part": (
        DATA + '[model]\nname = "mlp"\ndropuot = 0.1\n' + OPTIMIZER,
        "model.dropuot: model mlp takes no 'dropuot' (did you mean 'dropout'?)",
    ),
    "a key written out": (
        DATA + MODEL + '[optimizer]\nname = "sgd"\nlearning_rate = 0.1\n',
        "optimizer.learning_rate: optimizer sgd takes no 'learning_rate' (did you mean 'lr'?)",
    ),
    "a key in a branch": (
        SMALL + "[optimizer.sgd]\nmomentun = 0.1",
        "optimizer.sgd.momentun: optimizer sgd takes no 'momentun' (did you mean 'momentum'?)",
    ),
    "a key in the sampler": (
        SMALL + '[sampler]\nname = "tpe"\nn_startup = 3',
        "sampler.n_startup: sampler tpe takes no 'n_startup' (did you mean 'n_startup_trials'?)",
    ),
    "a key in the pruner": (
        SMALL + '[pruner]\nname = "median"\nn_warmup = 3',
        "pruner.n_warmup: pruner median takes no 'n_warmup' (did you mean 'n_warmup_steps'?)",
    ),
    "a key for a data source without options": (
        '[data]\nname = "digits"\nsize = 3\n' + MODEL + OPTIMIZER,
        "data.size: data digits takes no 'size' (known: classes, fold, folds, reading, resident, split, split_seed, subset)",
    ),
    "an unknown dataset": (
        '[data]\nname = "digit"\n' + MODEL + OPTIMIZER,
        "data.name: there is no data 'digit' (did you mean 'digits'?); your own is \"package.module:name\"",
    ),
    "an unknown model": (
        DATA + '[model]\nname = "mpl"\n' + OPTIMIZER,
        "model.name: there is no model 'mpl' (did you mean 'mlp'?); your own is \"package.module:name\"",
    ),
    "an unknown model far from all": (
        DATA + '[model]\nname = "perceptron"\n' + OPTIMIZER,
        "model.name: there is no model 'perceptron' (known: cnn, cnn1d, efficientnet_b0, gru, lstm, mlp, mobilenet_v3, "
        "resnet18, resnet34, resnet50, transformer, vgg11, vgg13, vgg16, vgg19, vit_b_16, wide_resnet); your own is "
        '"package.module:name"',
    ),
    "an unknown optimizer among choices": (
        DATA + MODEL + '[optimizer]\nname = { choices = ["sgd", "rmsporp"] }\nlr = 0.1',
        "optimizer.name: there is no optimizer 'rmsporp' (did you mean 'rmsprop'?); your own is \"package.module:name\"",
    ),
    "a known optimizer in torch's case": (
        DATA + MODEL + '[optimizer]\nname = "adamW"\nlr = 0.1',
        "optimizer.name: there is no optimizer 'adamW' (did you mean 'adamw'?); your own is \"package.module:name\"",
    ),
    "an unknown schedule": (
        SMALL + '[schedule]\nname = "cosin"',
        "schedule.name: there is no schedule 'cosin' (did you mean 'cosine'?); your own is \"package.module:name\"",
    ),
    "an unknown sampler": (
        SMALL + '[sampler]\nname = "tep"',
        "sampler.name: there is no sampler 'tep' (did you mean 'tpe'?)",
    ),
    "an unknown pruner": (
        SMALL + '[pruner]\nname = "medain"',
        "pruner.name: there is no pruner 'medain' (did you mean 'median'?)",
    ),
    "low above high": (
        DATA + MODEL + '[optimizer]\nname = "sgd"\nlr = { low = 1.0, high = 0.1 }',
        "optimizer.lr: low = 1.0 is above high = 0.1; swap them",
    ),
    "a log range from 0": (
        DATA + MODEL + '[optimizer]\nname = "sgd"\nlr = { low = 0.0, high = 0.1, log = true }',
        "optimizer.lr: a log range cannot start at low = 0.0; use a low above 0 or remove log",
    ),
    "empty choices": (
        DATA + MODEL + '[optimizer]\nname = "sgd"\nlr = { choices = [] }',
        "optimizer.lr: choices = [] is empty or not a list; give at least one value in brackets",
    ),
    "the high end of a range out of bounds": (
        DATA + '[model]\nname = "mlp"\ndropout = { low = 0.0, high = 1.0 }\n' + OPTIMIZER,
        "model.dropout = 1.0: input should be less than 1",
    ),
    "the low end of a range out of bounds": (
        DATA + MODEL + '[optimizer]\nname = "sgd"\nlr = { low = 0.0, high = 1.0 }',
        "optimizer.lr = 0.0: input should be greater than 0",
    ),
    "one choice of a wrong type": (
        SMALL + '[training]\nbatch_size = { choices = [16, "32"] }',
        "training.batch_size = '32': input should be a valid integer",
    ),
    "one choice inside a list": (
        DATA + '[model]\nname = "mlp"\nwidths = { choices = [[64], [64, 0]] }\n' + OPTIMIZER,
        "model.widths.1 = 0: input should be greater than 0",
    ),
    "text for a number": (
        DATA + MODEL + '[optimizer]\nname = "sgd"\nlr = "0.1"',
        "optimizer.lr = '0.1': input should be a valid number",
    ),
    "a float for an int": (
        SMALL + "[training]\nepochs = 10.0",
        "training.epochs = 10.0: input should be a valid integer",
    ),
    "a value not among the allowed": (
        SMALL + '[training]\nprecision = "float16"',
        "training.precision = 'float16': input should be 'float32' or 'bfloat16'",
    ),
    "text for a section": (
        'model = "mlp"\n' + DATA + OPTIMIZER,
        "model = 'mlp': is not a table; write its keys under [model]",
    ),
    "a number for the budget": ("budget = 5\n" + SMALL, "budget = 5: is not a table; write its keys under [budget]"),
    "a budget of nothing": (
        SMALL + "[budget]\ntrials = 0",
        "budget.trials = 0: input should be greater than or equal to 1",
    ),
    "a budget that no database can hold": (
        SMALL + "[budget]\ntrials = 3000000000",
        "budget.trials = 3000000000: input should be less than or equal to 2147483647",
    ),
    "a timeout that is none": (
        SMALL + '[budget]\ntimeout = "30x"',
        "budget.timeout: '30x' is not a duration; write it like 90s, 30m or 1h30m",
    ),
    "a date": (
        DATA + MODEL + '[optimizer]\nname = "sgd"\nlr = 2020-01-01',
        "optimizer.lr: 2020-01-01 is a date; write it as text in quotes",
    ),
    "a date among choices": (
        DATA + MODEL + '[optimizer]\nname = "sgd"\nlr = { choices = [2020-01-01] }',
        "optimizer.lr.choices: 2020-01-01 is a date; write it as text in quotes",
    ),
    "infinity": (DATA + MODEL + '[optimizer]\nname = "sgd"\nlr = inf', "optimizer.lr: inf is not a finite number"),
    "a part without a name": (DATA + "[model]\nwidths = [3]\n" + OPTIMIZER, 'model.name: missing; write name = "..."'),
    "a part whose name is a number": (
        DATA + "[model]\nname = 3\n" + OPTIMIZER,
        'model.name: 3 is not the name of a model; write name = "..."',
    ),
    "a part that is a choice": (
        DATA + '[model]\nchoices = ["mlp"]\n' + OPTIMIZER,
        'model.name: missing; write name = "..."',
    ),
    "a missing section": (
        MODEL + OPTIMIZER,
        'data: missing; add [data] with name = "...", or objective = "file.py:function"',
    ),
    "a missing option": (DATA + MODEL + '[optimizer]\nname = "sgd"', "optimizer.lr: optimizer sgd needs 'lr'; add it"),
    "a doubled option": (
        SMALL + "[optimizer.sgd]\nlr = 0.5",
        "optimizer.sgd.lr: optimizer.lr is given too; keep one of the two",
    ),
    "a table under training": (
        SMALL + "[training]\nepochs = { lo = 1, hi = 3 }",
        "training.epochs: { lo = 1, hi = 3 } is neither a range nor a choice; "
        "a range is { low = ..., high = ... }, a choice is { choices = [...] }",
    ),
    "a child under no choice": (
        SMALL + "[optimizer.adam]\nbeta1 = 0.5",
        "optimizer.adam: no choice has this name: optimizer.name is 'sgd'; add 'adam' to the choices of "
        "optimizer.name or remove [optimizer.adam]; a range is { low = ..., high = ... }, a choice is { choices = [...] }",
    ),
    "a search over data": (
        '[data]\nname = { choices = ["digits", "mnist"] }\n' + MODEL + OPTIMIZER,
        'data.name = { choices = ["digits", "mnist"] }: trials are compared on the same data; give one value',
    ),
    "a momentum that a schedule would overwrite": (
        SMALL + 'momentum = 0.9\n[schedule]\nname = "onecycle"\ncycle_momentum = true',
        "optimizer.momentum = 0.9: would be overwritten by schedule.cycle_momentum = true; remove one of the two",
    ),
    "a beta1 that a schedule would overwrite in some trials": (
        DATA + MODEL + '[optimizer]\nname = { choices = ["sgd", "adamw"] }\nlr = 0.1\n[optimizer.adamw]\nbeta1 = 0.8\n'
        '[schedule]\nname = { choices = ["constant", "onecycle"] }\n[schedule.onecycle]\ncycle_momentum = true',
        "optimizer.adamw.beta1 = 0.8: would be overwritten by schedule.onecycle.cycle_momentum = true; remove one of the two",
    ),
    "a momentum to be cycled where there is none": (
        DATA + MODEL + '[optimizer]\nname = "adagrad"\nlr = 0.1\n[schedule]\nname = "onecycle"\ncycle_momentum = true',
        "schedule.cycle_momentum = true: optimizer adagrad has no momentum; set it to false or choose another optimizer",
    ),
    "a list for a number": (
        DATA + MODEL + '[optimizer]\nname = "sgd"\nlr = [0.1, 2]',
        "optimizer.lr = [0.1, 2]: input should be a valid number; to search these values, write { choices = [0.1, 2] }",
    ),
    "a bool for a list": (
        DATA + '[model]\nname = "mlp"\nwidths = true\n' + OPTIMIZER,
        "model.widths = true: input should be a list",
    ),
    "a number for a bool": (SMALL + "nesterov = 1", "optimizer.nesterov = 1: input should be true or false"),
    "a date for a duration": (
        SMALL + "[budget]\ntimeout = 2020-01-01",
        "budget.timeout = 2020-01-01: input should be text in quotes",
    ),
    "a table for a name": (
        DATA + "[model]\nname = { size = 1, deep = true }\n" + OPTIMIZER,
        "model.name: { size = 1, deep = true } is neither a name nor a choice; "
        "a range is { low = ..., high = ... }, a choice is { choices = [...] }",
    ),
    "tables for a section": (
        '[[model]]\nname = "mlp"\n' + DATA + OPTIMIZER,
        "model = [{ name = 'mlp' }]: is not a table; write its keys under [model]",
    ),
    "neither of several types": (
        '[data]\nname = "digits"\nclasses = [1, 2.5]\n' + MODEL + OPTIMIZER,
        "data.classes.1 = 2.5: input should be text in quotes, or be a valid integer, or be a list",
    ),
    "a bool for a name": (
        DATA + MODEL + "[optimizer]\nname = true\nlr = 0.1",
        'optimizer.name: true is not the name of an optimizer; write name = "..."',
    ),
    "a choice of samplers": (
        SMALL + '[sampler]\nname = { choices = ["tpe"] }',
        "sampler.name: { choices = ['tpe'] } is not the name of a sampler; write name = \"...\"",
    ),
    "a pruner without a name": (
        SMALL + "[pruner]\nn_warmup_steps = 3",
        'pruner.name: missing; write name = "..." (known: auto, hyperband, median, none, patient, percentile, '
        "successive_halving, threshold)",
    ),
    "params without an objective": (
        SMALL + "[params]\nx = 1",
        "params: belongs to an objective of your own; write the values into their sections",
    ),
    "a rule that is none": (
        'value = "mean"\n' + SMALL,
        "value: 'mean' is not a rule; use 'last', 'best' or 'mean of last 3'",
    ),
    "an empty name": ('name = ""\n' + SMALL, "name = '': is not a name for a study; use 1 to 200 printable characters"),
    "a name with a control character": (
        'name = "a\\u0000"\n' + SMALL,
        "name = 'a\\x00': is not a name for a study; use 1 to 200 printable characters",
    ),
    "a name that looks like an option": (
        'name = "-x"\n' + SMALL,
        "name = '-x': a command would read it as an option or a file; choose another name",
    ),
    "a name that looks like a file": (
        'name = "a.toml"\n' + SMALL,
        "name = 'a.toml': a command would read it as an option or a file; choose another name",
    ),
    "an empty objective": ('objective = ""\n' + SMALL, "objective = '': string should have at least 1 character"),
    "broken TOML": ("a = = 3", "not TOML: Invalid value (at line 1, column 5)"),
    "an objective without a file": (
        'objective = "nope.py:f"\ndirection = "minimize"',
        "objective: no file {folder}/nope.py; paths are relative to the study file",
    ),
    "a model whose import fails": (
        DATA + '[model]\nname = "no_such_module:net"\n' + OPTIMIZER,
        "model.name: importing no_such_module failed: ModuleNotFoundError: No module named 'no_such_module'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_naming_file_key_value_and_mend(case: str, tmp_path: Path) -> None:
    text, message = WRONG[case]
    assert fault(tmp_path, text) == [message.format(folder=tmp_path) if "{folder}" in message else message]


def test_every_wrong_value_is_told_at_once(tmp_path: Path) -> None:
    text = DATA + '[model]\nname = "mlp"\ndropout = 2.0\nnorm = "instance"\n' + OPTIMIZER + "[training]\nepochs = 20"
    assert fault(tmp_path, text) == [
        "model.dropout = 2.0: input should be less than 1",
        "model.norm = 'instance': input should be 'none', 'batch', 'layer' or 'group'",
    ]


MANY_MISTAKES = """
seed = -1
slots = "many"
[data]
name = "digits"
subset = { low = 100, high = 200 }
[model]
name = "mlp"
dropout = 2.0
widths = { low = 9, high = 3 }
[optimizer]
name = { choices = ["sgd", "rmsporp"] }
lr = -1.0
[optimizer.adam]
beta1 = 0.5
[training]
epochs = "ten"
[stopping]
gl = "none"
[schedule]
name = "cosin"
[augment]
crop = 2020-01-01
[budget]
timeout = "30x"
[recovery]
lease = "soon"
[sampler]
name = "tep"
[pruner]
name = "hyperband"
min_resource = 0
"""


def test_all_that_is_wrong_with_a_file_is_told_at_once_and_nothing_else(tmp_path: Path) -> None:
    assert [line.partition(":")[0] for line in fault(tmp_path, MANY_MISTAKES)] == [
        "seed = -1",
        "slots = 'many'",
        "budget.timeout",
        "recovery.lease",
        "augment.crop",
        "model.widths",
        "optimizer.adam",
        "data.subset = { low = 100, high = 200 }",
        "schedule.name",
        "training.epochs = 'ten'",
        "stopping.gl = 'none'",
        "sampler.name",
        "pruner.min_resource = 0",
    ]


@pytest.mark.parametrize("section", ['[stopping]\ngl = "none"', "[stopping]\nstrip = 3", "[watch]\nnorm = true"])
def test_a_wrong_section_hides_no_other(section: str, tmp_path: Path) -> None:
    text = DATA + '[model]\nname = "mlp"\ndropout = 2.0\n' + section + '\n[optimizer]\nname = "sgd"\nlr = -1\n'
    lines = fault(tmp_path, text + '[pruner]\nname = "medain"')
    assert [line.partition(":")[0].partition(" ")[0] for line in lines] == [
        "model.dropout",
        "optimizer.lr",
        "watch.norm" if "watch" in section else "stopping.gl" if "gl" in section else "stopping",
        "pruner.name",
    ]


def test_sections_are_compared_once_each_is_right(tmp_path: Path) -> None:
    cycled = SMALL + 'momentum = 0.9\n[schedule]\nname = "onecycle"\ncycle_momentum = true\n'
    assert [line[:20] for line in fault(tmp_path, cycled)] == ["optimizer.momentum ="]
    assert [line[:20] for line in fault(tmp_path, cycled + "[training]\nepochs = 0")] == ["training.epochs = 0:"]


def test_a_missing_a_binary_and_a_folder_are_no_study_files(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        resolve.read(tmp_path / "no.toml")
    assert (
        str(caught.value) == f"{tmp_path}/no.toml: no such file; `hpo init {tmp_path}/no.toml` writes one to start from"
    )
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match=r"binary.toml: is UTF-16; save it as UTF-8"):
        resolve.read(tmp_path / "binary.toml")
    with pytest.raises(SpecError, match=r"cannot be read: it is a folder; name the file in it"):
        resolve.read(tmp_path)


@pytest.mark.parametrize("name", ["", "-x", "a.toml", "a\nb", " a", "x" * 201])
def test_a_name_given_on_the_command_line_is_checked_as_well(name: str, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SMALL)
    with pytest.raises(SpecError, match=r"^--name = "):
        resolve.read(tmp_path / "s.toml", name=name)
    assert resolve.read(tmp_path / "s.toml", name="a/b c").spec.name == "a/b c"


def test_nan_in_a_receipt_is_no_fault(tmp_path: Path) -> None:
    found = read(tmp_path, SMALL + "[receipt]\ncurves = { loss = [nan, inf] }")
    assert found.receipt["curves"]["loss"][1] == float("inf")


def test_a_file_is_pinned_when_no_range_is_left() -> None:
    document: dict[str, Any] = tomllib.loads(SMALL) | {"name": "s"}
    assert not StudySpec.from_document(document).is_pinned
    document["optimizer"]["lr"] = 0.1
    assert StudySpec.from_document(document).is_pinned


@pytest.mark.parametrize(
    ("optimizer", "decay"),
    [
        ({"name": "sgd", "lr": 0.1}, "all"),
        ({"name": "sgd", "lr": 0.1, "decay": "weights"}, "weights"),
        ({"name": {"choices": ["sgd", "adam"]}, "lr": 0.1, "adam": {"decay": "weights"}}, None),
        ({}, None),
    ],
)
def test_a_file_from_before_decay_means_what_it_meant(optimizer: dict[str, Any], decay: str | None) -> None:
    """A file resolved before decay could be chosen means what it meant."""
    assert as_meant({"optimizer": optimizer})["optimizer"].get("decay") == decay


def test_an_earlier_pinned_file_decays_all(tmp_path: Path) -> None:
    """A pinned file of an earlier version decays all and a new one what the default says."""
    text = DATA + MODEL + OPTIMIZER
    for receipt, decay in [("", None), ('[receipt]\nfingerprint = "f"\n', "all")]:
        (tmp_path / "s.toml").write_text(text + receipt)
        assert StudySpec.load(tmp_path / "s.toml").optimizer.get("decay") == decay
