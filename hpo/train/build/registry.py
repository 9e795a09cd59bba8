"""The parts of a training by name, ours or the user's own: data, models, losses, optimizers, schedules and so on.

This module checks a study file's values: every range end and every choice is checked against the part that takes it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import nn
from torch.optim import Optimizer

from hpo import data
from hpo.data import SOURCES, Source
from hpo.data.files import BadFile
from hpo.errors import Mistakes, SpecError, closest, nearest, shown
from hpo.models import MODELS
from hpo.models.blocks import TooLarge
from hpo.models.libraries import LIBRARIES, Build
from hpo.models.shapes import Shape
from hpo.models.transfer import FILE_OR_NAME, is_file
from hpo.spec import extras, metrics, options, space, usercode
from hpo.spec.options import Function
from hpo.spec.space import Choices, Range, Tree
from hpo.spec.study_file import SPLIT_FORMAT, SPLIT_SEED, StudySpec, check_path
from hpo.spec.training import TABLES, Part, TrainConfig, read_section, training_defaults
from hpo.train.build import range_types
from hpo.train.optim import param_groups, warmup
from hpo.train.optim.averaging import AVERAGINGS, Averaging
from hpo.train.optim.losses import LOSSES
from hpo.train.optim.optimizers import NEEDS, OPTIMIZERS
from hpo.train.optim.schedules import SCHEDULES
from hpo.train.optim.warmup import WARMUPS


@dataclass(frozen=True, kw_only=True)
class PartKind:
    """One kind of part, such as models or optimizers."""

    functions: Mapping[str, Function]  # by name
    given: int  # number of leading arguments that we pass
    gives: str = ""  # what they are, in words
    returns: Any  # a class, or Callable
    common: Function | None = None  # maps a function's result to a result of the same type, by options that all share
    prepare: Function | None = None  # makes a function's argument from what we have, by options that all share
    # By prefix of a name: the function of a name, and all names.
    libraries: Mapping[str, tuple[Callable[[str], Build], Callable[[], list[str]]]] = field(default_factory=dict)

    @property
    def shared(self) -> Function | None:
        """The function with the options that all share. We pass its first argument."""
        return self.common or self.prepare

    def known(self, name: str) -> Function | None:
        """Return the function of one of our names, or of a library's; None if there is none, or a user's own."""
        library, _, inner = name.partition(":")
        if library in self.libraries:
            return self.libraries[library][0](inner)
        return self.functions.get(name)


KINDS = {
    "data": PartKind(functions=SOURCES, given=0, returns=Source, common=data.select),
    "model": PartKind(
        functions=MODELS,
        given=2,
        gives="the shape of one input and the number of outputs",
        returns=nn.Module,
        libraries=LIBRARIES,
    ),
    "loss": PartKind(functions=LOSSES, given=0, returns=Callable),
    # parameter groups, made from a model
    "optimizer": PartKind(functions=OPTIMIZERS, given=1, returns=Optimizer, prepare=param_groups.split),
    "schedule": PartKind(functions=SCHEDULES, given=1, returns=Callable),  # length in optimizer steps
    # length in steps, made from the lengths of the schedule and of an epoch
    "warmup": PartKind(functions=WARMUPS, given=1, returns=Callable, prepare=warmup.steps),
    "averaging": PartKind(functions=AVERAGINGS, given=0, returns=Averaging),
}
UNJUDGED = (".label_smoothing", ".class_weights", ".pos_weight")  # options of losses that validation does not use
OF_LABELS = {"of", "label_smoothing"}  # options of losses that have no use in a regression
SIZES = ("widths", "channels", "depth", "width")  # options that can make our models large
MAX_PARAMETERS = 250 * 10**9  # one terabyte of weights
#: Models with no more layers, and no larger layers, are far below MAX_PARAMETERS and are not checked.
FEW_LAYERS, SMALL_SIZE = 100, 255
STAND_IN = (3, 32, 32)  # image shape while the data is not known
#: Sections in which nothing may be searched, with the reason.
UNSEARCHED = {
    "data": "trials are compared on the same data",
    "watch": "what is watched changes no training",
}


def function(section: str, name: str, folder: Path) -> Function:
    """Return the function of a part's name; SpecError if there is none."""
    kind = KINDS[section]
    if usercode.is_reference(name):
        return usercode.load(name, folder, f"{section}.name")  # type: ignore[no-any-return]
    _refuse_unknown_in_library(section, name)
    known = kind.known(name)
    if known is None:
        mend = nearest(name, kind.functions)
        raise SpecError(f'{section}.name: there is no {section} {name!r}{mend}; your own is "package.module:name"')
    return known


@cache  # timm lists 3,000 names
def _refuse_unknown_in_library(section: str, name: str) -> None:
    """Raise SpecError if a library's name is not one of its names, or if the library is not installed."""
    library, _, inner = name.partition(":")
    if library not in KINDS[section].libraries:
        return
    if library in extras.EXTRAS and (why := extras.missing(library)):
        raise SpecError(f"{section}.name = {name!r}: {why}; or choose another {section}")
    _, names = KINDS[section].libraries[library]
    if inner not in (known := names()):
        meant = closest(inner, known)
        mend = f"did you mean {meant!r}?" if meant else f"the list_models() of {library} has all"
        raise SpecError(f"{section}.name: {library} has no {section} {inner!r} ({mend})")


def option_models(folder: Path) -> range_types.ModelOf:
    """Return a function that returns the model of a part's options, given section and name."""

    def model_of(section: str, name: str) -> type[pydantic.BaseModel]:
        if section in TABLES:
            return TABLES[section]
        kind = KINDS[section]
        return options.model_of(function(section, name, folder), kind.given, kind.shared)

    return model_of


def call(section: str, part: Part, folder: Path, *given: Any) -> Any:
    """Build a part: call its function with our arguments and its options; SpecError if that fails.

    Args:
        folder: folder of the study file.
        given: our arguments.
    """
    kind, found = KINDS[section], function(section, part.name, folder)
    with _in_file(section, part):
        own, shared = _divided(kind, found, part)
        if kind.prepare:
            given = (kind.prepare(*given, **shared),)
        built = found(*given, **_located(kind, found, own, folder))
    if kind.common and isinstance(built, kind.returns):
        with _in_file(section, part, is_ours=True):
            built = kind.common(built, **shared)
    if not isinstance(built, kind.returns):
        raise SpecError(f"{section} {part.name}: returned a {type(built).__name__}, not a {kind.returns.__name__}")
    return built


def prepared(section: str, part: Part, folder: Path, given: Any) -> Any:
    """Return the argument that `prepare` makes for a part's function; SpecError if it refuses the options."""
    kind, found = KINDS[section], function(section, part.name, folder)
    assert kind.prepare is not None
    with _in_file(section, part):
        return kind.prepare(given, **_divided(kind, found, part)[1])


@contextmanager
def _in_file(section: str, part: Part, *, is_ours: bool = False) -> Iterator[None]:
    """Turn errors into SpecErrors that name the part. Those of our code are told without their type."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # not a fault of the study file
    except Exception as error:
        is_known = is_ours or KINDS[section].known(part.name) is not None
        of_ours = is_known and isinstance(error, ValueError | BadFile)
        said = str(error) if of_ours else f"{type(error).__name__}: {error}"
        if isinstance(error, TypeError) and not of_ours:  # perhaps it wanted other arguments
            said += options.passed_first(KINDS[section].gives)
        first, *more = error.lines if of_ours and isinstance(error, BadFile) else [said]
        raise SpecError(f"{section} {part.name}: {first}", *more) from error


def _divided(kind: PartKind, found: Function, part: Part) -> tuple[Tree, Tree]:
    """Divide a part's options into those of its own function and those that all functions of its kind share."""
    shared = options.names(kind.shared, 1) - options.names(found, kind.given) if kind.shared else set()
    return (
        {key: value for key, value in part.options.items() if key not in shared},
        {key: value for key, value in part.options.items() if key in shared},
    )


def _located(kind: PartKind, found: Function, given: Tree, folder: Path) -> Tree:
    """Return options with relative paths of files resolved against the folder of the study file."""
    named = options.marked(found, kind.given, data.FILE)
    perhaps = options.marked(found, kind.given, FILE_OR_NAME)
    full = {key: folder / Path(given[key]).expanduser() for key in given.keys() & (named | perhaps)}
    return given | {key: str(path) for key, path in full.items() if key in named or path.is_file()}


def files(spec: StudySpec) -> list[str]:
    """Return the files of data and weights that a spec names, as it writes them. Only our own parts are known."""
    return _named(spec, "data", data.FILE) + weights(spec)


def refuse_missing_data(spec: StudySpec, folder: Path) -> None:
    """Raise SpecError if a file or folder that [data] names does not exist."""
    named = _named(spec, "data", data.FILE)
    if missing := [name for name in named if not (folder / Path(name).expanduser()).exists()]:
        where = f"a relative path starts at {folder}"
        raise SpecError(*(f"data: {name!r} does not exist; correct the path, {where}" for name in missing))


def weights(spec: StudySpec) -> list[str]:
    """Return the files of weights that a spec's models name, as it writes them."""
    return [name for name in _named(spec, "model", FILE_OR_NAME) if is_file(name)]


def _named(spec: StudySpec, section: str, mark: str) -> list[str]:
    """Return the possible texts of options with this mark, each once."""
    found: dict[str, None] = {}
    tree = spec.tree if spec.is_declared else {}
    for variant in space.variants({section: tree[section]} if section in tree else {}):
        if section in variant:
            part, kind = Part.from_tree(section, variant[section]), KINDS[section]
            known = kind.known(part.name)
            wanted = options.marked(known, kind.given, mark) if known else set()
            found |= {value: None for key, value in part.options.items() if key in wanted and isinstance(value, str)}
    return list(found)


def read(tree: Tree, folder: Path) -> TrainConfig:
    """Return the config of a pinned tree; SpecError lists the faults of its sections, else their contradictions."""
    refuse_wrong_sections(tree, folder)
    refuse_huge_models(tree, folder)
    return _together(tree)


def refuse_wrong_sections(tree: Tree, folder: Path) -> None:
    """Raise SpecError that lists the faults of each section, at all ends of ranges and all choices."""
    mistakes = Mistakes()
    for section, table in tree.items():
        for variant in space.variants({section: table}):
            with mistakes.collect():
                _check_section(section, variant[section], folder)
    _explain_real_steps(tree, mistakes)
    mistakes.raise_if_any()


def _explain_real_steps(tree: Tree, mistakes: Mistakes) -> None:
    """Add a mend for ranges with whole ends whose values are refused because their step makes them real numbers."""
    for path, given in space.parameters(tree):
        is_refused = any(line.startswith(f"{path} = ") and "valid integer" in line for line in mistakes.lines)
        if is_refused and isinstance(given, Range) and given.step and given.has_whole_ends and not given.integer:
            step = int(given.step) if given.step.is_integer() else 1
            mistakes.add(SpecError(f"{path} = {given}: its real step gives real numbers; write step = {step}"))


def _for_search(line: str) -> str:
    """Return the message with a mend if it says that a list stands for one number, as a grid is written elsewhere."""
    found = re.match(r"([\w.]+) = (\[.*\]): input should be a valid", line)
    if found is None or found[1].partition(".")[0] in UNSEARCHED:
        return line
    return f"{line}; to search these values, write {{ choices = {found[2]} }}"


def _check_section(section: str, table: Tree, folder: Path) -> None:
    """Raise SpecError if a pinned section is wrong, or if its part does not take its options."""
    part = read_section(section, table)
    if not isinstance(part, Part):
        return
    kind, found = KINDS[section], function(section, part.name, folder)
    try:
        options.check(section, part.name, found, kind.given, part.options, part.paths, kind.shared, gives=kind.gives)
    except SpecError as error:
        raise SpecError(*map(_for_search, error.lines)) from error.__cause__
    for key in options.marked(found, kind.given, data.FILE) | options.marked(found, kind.given, FILE_OR_NAME):
        check_path(part.options.get(key), part.paths.get(key, key))
    if section == "optimizer":
        _refuse_a_missing_package(part)


def _together(tree: Tree) -> TrainConfig:
    """Return the config of a pinned tree whose sections are valid; SpecError if sections contradict each other."""
    config = TrainConfig.from_tree(tree)
    _refuse_a_cycle_without_momentum(config)
    _refuse_ratios_of_a_negative_loss(config)
    return config


def _refuse_a_missing_package(optimizer: Part) -> None:
    extra = NEEDS.get(optimizer.name)
    if extra and (why := extras.missing(extra)):
        raise SpecError(f"optimizer.name = {optimizer.name!r}: {why}; or choose another optimizer")


def _refuse_a_cycle_without_momentum(config: TrainConfig) -> None:
    known = OPTIMIZERS.get(config.optimizer.name)  # a user's own optimizer is checked when it is built
    if not config.schedule.options.get("cycle_momentum") or known is None:
        return
    if not {"momentum", "beta1"} & inspect.signature(known).parameters.keys():
        raise SpecError(
            f"{config.schedule.paths['cycle_momentum']} = true: optimizer {config.optimizer.name} has no momentum; "
            "set it to false or choose another optimizer"
        )


def _refuse_ratios_of_a_negative_loss(config: TrainConfig) -> None:
    """Raise SpecError for stopping rules that divide losses, if the loss may be negative."""
    if config.loss is None or config.loss.name != "gaussian_nll":
        return
    for rule in ("gl", "pq"):
        if (value := getattr(config.stopping, rule)) is not None:
            raise SpecError(
                f"stopping.{rule} = {value:g}: divides by the loss, which gaussian_nll lets become negative; "
                "use stopping.patience or stopping.up"
            )


def refuse_huge_models(tree: Tree, folder: Path) -> None:
    """Raise SpecError if one of our models is too large for any machine at some end of the space, for any data.

    Other faults of a model are reported when the data is known, since the image shape is only a stand-in here.
    """
    mistakes = Mistakes()
    for variant in space.variants({"model": tree["model"]}):
        part = Part.from_tree("model", variant["model"])
        if part.name in MODELS and _has_large_numbers(part):
            with mistakes.collect():
                try:
                    without_memory(part, folder, STAND_IN, 10)
                except SpecError as error:
                    if isinstance(error.__cause__, TooLarge):
                        raise
    mistakes.raise_if_any()


def _has_large_numbers(part: Part) -> bool:
    given = [part.options.get(key) or 1 for key in SIZES]
    sizes = [size for one in given for size in (one if isinstance(one, list) else [one])]
    return max(sizes) > SMALL_SIZE or len(sizes) * (part.options.get("depth") or 1) > FEW_LAYERS


def without_memory(part: Part, folder: Path, shape: Shape, outputs: int) -> nn.Module:
    """Build one of our models without memory for its weights; SpecError if that fails or the model is too large."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: nn.Module = call("model", part, folder, shape, outputs)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MAX_PARAMETERS:
        said = ", ".join(f"{part.paths[key]} = {shown(part.options[key])}" for key in SIZES if key in part.paths)
        terabytes = f"{4e-12 * count:,.1f} TB of weights"
        raise SpecError(f"{said}: makes {count:,} parameters, {terabytes}; make the model smaller") from TooLarge()
    return model


def resolve(spec: StudySpec, folder: Path) -> StudySpec:
    """Return the spec with the defaults of every part filled in and all values checked; SpecError lists the faults."""
    tree, mistakes = spec.tree, Mistakes()
    with mistakes.collect():
        refuse_searches(spec)
    with mistakes.collect():
        refuse_wrong_sections(tree, folder)
    mistakes.raise_if_any()  # contradictions are only looked for between valid sections
    _refuse_a_warmup_without_end(tree)
    for variant in space.variants(tree):
        with mistakes.collect():
            _together(variant)
    with mistakes.collect():
        refuse_huge_models(tree, folder)
    if spec.format > 1:
        with mistakes.collect():
            tree = range_types.typed(tree, option_models(folder))
    mistakes.raise_if_any()
    filled = space.lower(_filled(tree, folder, spec.metric))
    return spec.model_copy(update=filled if spec.format < SPLIT_FORMAT else filled | _with_split_seed(filled["data"]))


def _with_split_seed(data: Tree) -> Tree:
    """Return the section `data` with a split seed. SpecError if a user's own source has an option of that name that is none."""
    seed = data.get(SPLIT_SEED, 0)
    if not isinstance(seed, int) or seed < 0:
        raise SpecError(f"data.{SPLIT_SEED} = {shown(seed)}: hpo splits the data by it; give a whole number from 0")
    return {"data": {**data, SPLIT_SEED: seed}}


# --- what cannot be searched, and what is left out ----------------------------------------------------------------------


def refuse_searches(spec: StudySpec) -> None:
    """Raise SpecError that lists the ranges and choices that are not allowed."""
    mistakes = Mistakes()
    for section, why in UNSEARCHED.items():
        for path, parameter in space.parameters({section: spec.tree.get(section, {})}):
            mistakes.add(SpecError(f"{path} = {parameter}: {why}; give one value"))
    with mistakes.collect():
        _refuse_values_in_several_measures(spec)
    mistakes.raise_if_any()


def _refuse_values_in_several_measures(spec: StudySpec) -> None:
    """Raise SpecError if the loss is searched and trials are compared by it: different losses cannot be compared.

    Label smoothing and weights of classes of our losses are allowed, since validation does not use them.
    """
    if spec.metric != "loss" or "loss" not in spec.tree:
        return
    for path, parameter in space.parameters({"loss": spec.tree["loss"]}):
        of_ours = not any(map(usercode.is_reference, spec.code_references))
        if not (path.endswith(UNJUDGED) and of_ours):
            raise SpecError(
                f"{path} = {parameter}: losses of several kinds cannot be compared; give one value, or another metric: "
                'metric = "accuracy", or "rmse" for a regression'
            )


def _refuse_a_warmup_without_end(tree: Tree) -> None:
    training, epochs = tree["training"], tree.get("warmup", {}).get("epochs")
    key = "schedule_epochs" if "schedule_epochs" in training else "epochs"
    length = training.get(key, training_defaults()["epochs"])
    if epochs is not None and max(space.ends_of(epochs)) >= min(space.ends_of(length)):
        raise SpecError(
            f"warmup.epochs = {epochs}: may be as long as the whole schedule, training.{key} = {length}; "
            "shorten it or write warmup.share"
        )


def _filled(tree: Tree, folder: Path, metric: str) -> Tree:
    """Return the tree with the defaults of every part that may be chosen, each under its own choice."""
    cycles = any(path.endswith("cycle_momentum") for path in _paths(tree["schedule"]))
    left_out = {
        "optimizer": {"momentum", "beta1"} if cycles else set(),  # in this case the schedule sets them
        "loss": OF_LABELS if metrics.is_of_numbers(metric) else set(),
    }
    return {
        section: _filled_part(section, dict(part), folder, left_out.get(section, set()))
        if section in KINDS
        else _filled_table(section, part)
        for section, part in tree.items()
    }


def _filled_table(section: str, table: Tree) -> Tree:
    return training_defaults() | table if section == "training" else table


def _filled_part(section: str, part: Tree, folder: Path, left_out: set[str]) -> Tree:
    name, kind = part["name"], KINDS[section]
    names = name.options if isinstance(name, Choices) else [name]
    functions = {choice: function(section, choice, folder) for choice in names}
    part |= _filled_once(kind, part, list(functions.values()))
    for choice, taker in functions.items():
        found = options.defaults(taker, kind.given, kind.prepare)
        branch = part.get(choice, {})
        missing = {key: value for key, value in found.items() if key not in part.keys() | branch.keys() | left_out}
        if isinstance(name, Choices) and missing:
            part[choice] = branch | missing
        else:
            part |= missing
    return part


def _filled_once(kind: PartKind, part: Tree, functions: list[Function]) -> Tree:
    """Return the missing defaults that all choices share, unless a choice has the option in its branch or as its own."""
    if kind.prepare is None:
        return {}
    apart = {key for branch in space.branches(part).values() for key in branch}
    apart |= {key for taker in functions for key in options.names(taker, kind.given)}
    found = options.defaults(kind.prepare, 1)
    return {key: value for key, value in found.items() if key not in part.keys() | apart}


def _paths(tree: Tree, path: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found += _paths(value, f"{path}.{key}") if isinstance(value, dict) else [f"{path}.{key}"]
    return found
