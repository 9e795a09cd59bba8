"""The broadcast step against torch's own optimizers, by itself and in a stack; the tests run it on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

from hpo.train import loop
from hpo.train.optim.schedules import cosine, onecycle
from hpo.train.optim.sgdw import SGDW
from hpo.train.stack.broadcast import Broadcast
from hpo.train.stack.broadcast_optimizers import FORMS
from hpo.train.stack.flat_parameters import FlatParameters
from hpo.train.stack.forward import StackedForward
from hpo.train.stack.row_optimizers import ROW_OPTIMIZERS
from hpo.train.stack.row_state import order_of, own_state
from hpo.train.stack.stack import Stack
from tests.support.stacks import Trial, apart, digits, numbers, stop_before, train, weights

Make = Callable[[nn.Module], Optimizer]
STEPS = 120
CPU = torch.device("cpu")


def plainly(kind: type[Optimizer], **options: Any) -> Make:
    return lambda model: kind(model.parameters(), **options)


KIND_ROWS: dict[str, list[Make]] = {
    "sgd": [
        plainly(SGD, lr=0.1),
        plainly(SGD, lr=0.05, momentum=0.9),
        plainly(SGD, lr=0.02, momentum=0.8, nesterov=True, weight_decay=0.1),
        plainly(SGD, lr=0.03, weight_decay=0.01),
    ],
    "sgdw": [
        plainly(SGDW, lr=0.1, weight_decay=0.01),
        plainly(SGDW, lr=0.05, momentum=0.9),
        plainly(SGDW, lr=0.02, momentum=0.8, nesterov=True, weight_decay=0.1),
        plainly(SGDW, lr=0.03, momentum=0.5, weight_decay=0.3),
    ],
    "adam": [
        plainly(Adam, lr=0.01),
        plainly(Adam, lr=0.003, weight_decay=0.1, betas=(0.5, 0.9)),
        plainly(Adam, lr=0.02, eps=1e-3, betas=(0.0, 0.99)),
    ],
    "adamw": [
        plainly(AdamW, lr=0.01),
        plainly(AdamW, lr=0.003, weight_decay=0.0, betas=(0.5, 0.3)),
        plainly(AdamW, lr=0.02, eps=1e-3, weight_decay=0.5),
    ],
    "rmsprop": [
        plainly(RMSprop, lr=0.01),
        plainly(RMSprop, lr=0.003, alpha=0.9, momentum=0.9),
        plainly(RMSprop, lr=0.02, eps=1e-3, momentum=0.5, weight_decay=0.1),
    ],
    "adagrad": [
        plainly(Adagrad, lr=0.1),
        plainly(Adagrad, lr=0.2, lr_decay=0.01, initial_accumulator_value=0.5),
        plainly(Adagrad, lr=0.05, weight_decay=0.1, eps=1e-3),
    ],
    "adamax": [
        plainly(Adamax, lr=0.01),
        plainly(Adamax, lr=0.003, weight_decay=0.1, betas=(0.5, 0.9)),
        plainly(Adamax, lr=0.02, eps=1e-2),
    ],
    "nadam": [
        plainly(NAdam, lr=0.01),
        plainly(NAdam, lr=0.003, weight_decay=0.1, betas=(0.5, 0.9), momentum_decay=0.1),
        plainly(NAdam, lr=0.02, weight_decay=0.1, decoupled_weight_decay=True),
    ],
    "radam": [
        plainly(RAdam, lr=0.01),
        plainly(RAdam, lr=0.003, weight_decay=0.1, betas=(0.5, 0.9)),
        plainly(RAdam, lr=0.02, weight_decay=0.1, decoupled_weight_decay=True, betas=(0.9, 0.6)),
    ],
}
BY_TURNS = [rows[place] for place in range(3) for rows in KIND_ROWS.values()]  # no two of a kind lie side by side


def model_of(row: int, dtype: torch.dtype, device: torch.device = CPU) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(row)
        return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7)).to(dtype).to(device)


def gradients_of(row: int, step: int, model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * row + step)
    drawn = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]
    return [g.to(p) for g, p in zip(drawn, model.parameters(), strict=True)]


class SequentialRunner:
    """Models that torch trains, each by itself."""

    def __init__(self, makes: Sequence[Make], dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> None:
        self.models = [model_of(row, dtype, device) for row in range(len(makes))]
        self.optimizers = [make(model) for make, model in zip(makes, self.models, strict=True)]

    def step(self, step: int, rows: Iterable[int] | None = None) -> None:
        for row in range(len(self.models)) if rows is None else rows:
            model = self.models[row]
            for parameter, gradient in zip(model.parameters(), gradients_of(row, step, model), strict=True):
                parameter.grad = gradient if parameter.requires_grad else None
            self.optimizers[row].step()


class StackedRunner(SequentialRunner):
    """The same models in rows, stepped by broadcasting."""

    def __init__(self, makes: Sequence[Make], dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> None:
        super().__init__(makes, dtype, device)
        self.rows = FlatParameters(self.models[0], order_of(self.optimizers[0], self.names(0)), len(makes))
        self.steps = Broadcast(self.rows)
        for row in range(len(makes)):
            self.put(row)

    def names(self, row: int) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.models[row].named_parameters()}

    def put(self, row: int) -> None:
        self.rows.adopt(row, self.models[row])
        self.steps.put(row, self.optimizers[row], self.names(row))

    def set_gradients(self, step: int) -> None:
        for row, model in enumerate(self.models):
            for (parameter, name), gradient in zip(
                self.names(row).items(), gradients_of(row, step, model), strict=True
            ):
                if parameter.requires_grad:
                    self.rows.of(self.rows.gradients, row, name).copy_(gradient)

    def step(self, step: int, rows: Iterable[int] | None = None) -> None:
        self.set_gradients(step)
        take(self.steps, list(range(len(self.models)) if rows is None else rows))


def take(steps: Broadcast, rows: Sequence[int]) -> None:
    """Take one step of these rows with the rates that their optimizers have."""
    steps.begin(rows, lambda _batch: None, until=1)
    steps.take(0)


def tensors(one: SequentialRunner, row: int) -> Iterator[tuple[str, Tensor]]:
    """Yield all that a row has come to, its optimizer's state included."""
    yield from one.models[row].state_dict().items()
    for place, state in one.optimizers[row].state_dict()["state"].items():
        yield from ((f"{place}.{name}", value) for name, value in state.items() if value is not None)


def assert_alike(one: SequentialRunner, other: SequentialRunner, tolerance: float) -> None:
    for row in range(len(one.models)):
        ours, theirs = dict(tensors(one, row)), dict(tensors(other, row))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert ours[name].device == tensor.device
            far = float((ours[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-30))
            assert far <= tolerance, (row, name, far)


def assert_same(one: SequentialRunner, other: SequentialRunner, rows: Iterable[int]) -> None:
    for row in rows:
        for (name, a), (_, b) in zip(tensors(one, row), tensors(other, row), strict=True):
            assert torch.equal(a, b), (row, name)


def set_rates(step: int, *runs: SequentialRunner) -> None:
    """Let rates move as a schedule would, and momentum with them where there is some."""
    for one in runs:
        for optimizer in one.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - step / STEPS) ** 0.5
                if group.get("momentum"):
                    group["momentum"] = 0.9 - 0.1 * step / STEPS
                if "betas" in group:
                    group["betas"] = (0.8 + 0.1 * step / STEPS, group["betas"][1])


def test_every_kind_that_rows_know_can_be_broadcast() -> None:
    assert FORMS.keys() == ROW_OPTIMIZERS.keys()


@pytest.mark.parametrize("kind", KIND_ROWS)
def test_many_steps_are_those_of_torch(kind: str) -> None:
    ours, theirs = StackedRunner(KIND_ROWS[kind]), SequentialRunner(KIND_ROWS[kind])
    for step in range(STEPS):
        set_rates(step, ours, theirs)
        ours.step(step)
        theirs.step(step)
    assert_alike(ours, theirs, 1e-12)


def test_many_steps_of_mixed_kinds_are_those_of_torch() -> None:
    ours, theirs = StackedRunner(BY_TURNS), SequentialRunner(BY_TURNS)
    for step in range(STEPS):
        set_rates(step, ours, theirs)
        ours.step(step)
        theirs.step(step)
    assert_alike(ours, theirs, 1e-12)


@pytest.mark.parametrize("makes", [*KIND_ROWS.values(), BY_TURNS], ids=[*KIND_ROWS, "mixed"])
def test_the_first_step_in_float32_is_that_of_torch(makes: list[Make]) -> None:
    ours, theirs = StackedRunner(makes, torch.float32), SequentialRunner(makes, torch.float32)
    ours.step(0)
    theirs.step(0)
    assert_alike(ours, theirs, 1e-6)


@pytest.mark.parametrize("makes", [*KIND_ROWS.values(), BY_TURNS], ids=[*KIND_ROWS, "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_company_changes_no_bit(makes: list[Make], dtype: torch.dtype) -> None:
    together = StackedRunner(makes, dtype)
    for step in range(10):
        together.step(step)
    for row in range(len(makes)):
        alone = StackedRunner([plainly(SGD, lr=0.1)] * row + [makes[row]], dtype)  # in the same row, stepped by itself
        for step in range(10):
            alone.step(step, [row])
        assert_same(together, alone, [row])


def grouped(kind: type[Optimizer], *, swapped: bool = False, **options: Any) -> Make:
    def make(model: nn.Module) -> Optimizer:
        first, second = (list(part.parameters()) for part in model.children())
        groups: list[dict[str, Any]] = [{"params": first, "lr": 0.01}, {"params": second, "lr": 0.03}]
        return kind(groups[::-1] if swapped else groups, **options)

    return make


def test_groups_are_stepped_each_with_its_own_numbers() -> None:
    makes = [
        grouped(AdamW),
        plainly(AdamW, lr=0.02),
        grouped(AdamW, weight_decay=0.3),
        grouped(SGD, momentum=0.9),
        plainly(SGD, lr=0.02),
    ]
    ours, theirs = StackedRunner(makes), SequentialRunner(makes)
    for step in range(STEPS):
        set_rates(step, ours, theirs)
        ours.step(step)
        theirs.step(step)
    assert_alike(ours, theirs, 1e-12)


def frozen(model: nn.Module) -> Optimizer:
    next(model.children()).requires_grad_(False)
    return AdamW([{"params": part.parameters()} for part in model.children()], lr=0.01)


def test_what_is_not_trained_stays() -> None:
    ours, theirs = StackedRunner([frozen, frozen]), SequentialRunner([frozen, frozen])
    before = [parameter.clone() for parameter in ours.models[1][0].parameters()]
    for step in range(3):
        ours.step(step)
        theirs.step(step)
    assert_alike(ours, theirs, 1e-12)
    assert all(torch.equal(p, q) for p, q in zip(ours.models[1][0].parameters(), before, strict=True))


def test_rows_that_wait_stay_as_they_are() -> None:
    ours, theirs = StackedRunner(BY_TURNS), SequentialRunner(BY_TURNS)
    waiting = {0, 3, 9, 20}
    active = [row for row in range(len(BY_TURNS)) if row not in waiting]
    for step in range(6):
        rows = active if step in (2, 3) else None
        before = Snapshot(ours, waiting)
        ours.step(step, rows)
        theirs.step(step, rows)
        assert before.holds() == (rows is not None)
    assert_alike(ours, theirs, 1e-12)


class Snapshot:
    def __init__(self, of: SequentialRunner, rows: Iterable[int]) -> None:
        self._of = of
        self._taken = {(row, name): tensor.clone() for row in rows for name, tensor in tensors(of, row)}

    def holds(self) -> bool:
        rows = {row for row, _ in self._taken}
        now = {(row, name): tensor for row in rows for name, tensor in tensors(self._of, row)}
        return now.keys() == self._taken.keys() and all(torch.equal(now[key], was) for key, was in self._taken.items())


def test_a_state_goes_on_in_plain_torch_and_comes_from_it() -> None:
    ours, theirs, third = StackedRunner(BY_TURNS), SequentialRunner(BY_TURNS), SequentialRunner(BY_TURNS)
    for step in range(20):
        ours.step(step)
        theirs.step(step)
    for row in range(len(BY_TURNS)):
        third.models[row].load_state_dict(ours.models[row].state_dict())
        third.optimizers[row].load_state_dict(ours.optimizers[row].state_dict())
    back = StackedRunner(BY_TURNS)
    for row in range(len(BY_TURNS)):
        back.models[row] = third.models[row]
        back.optimizers[row] = third.optimizers[row]
        back.steps.remove(row)
        back.put(row)
        own_state(ours.optimizers[row])
    for step in range(20, 40):
        back.step(step)
        theirs.step(step)
    assert_alike(back, theirs, 1e-12)
    for step in range(20, 40):
        SequentialRunner.step(ours, step)  # the same objects, taken out of the rows
    assert_alike(ours, theirs, 1e-12)


def test_a_row_that_is_not_a_number_leaves_the_others_alone() -> None:
    sound, ill = StackedRunner(BY_TURNS), StackedRunner(BY_TURNS)
    rows = range(len(BY_TURNS))
    for step in range(5):
        for one in (sound, ill):
            one.set_gradients(step)
        ill.rows.gradients[[0, 8, 16]] = torch.nan if step else torch.inf
        ill.optimizers[5].param_groups[0]["lr"] = torch.inf
        for one in (sound, ill):
            take(one.steps, rows)
    assert all(not next(ill.models[row].parameters()).isfinite().any() for row in (0, 5, 8, 16))
    assert_same(sound, ill, [row for row in rows if row not in (0, 5, 8, 16)])


def test_a_square_that_overflows_stops_an_element_as_in_torch() -> None:
    makes = [rows[0] for name, rows in KIND_ROWS.items() if name in ("adam", "adamw", "rmsprop", "nadam")]
    ours, theirs = StackedRunner(makes), SequentialRunner(makes)
    for step in range(5):
        ours.set_gradients(step)
        ours.rows.gradients[:, 0] *= 1e160
        take(ours.steps, range(len(makes)))
        for row, model in enumerate(theirs.models):
            for parameter, gradient in zip(model.parameters(), gradients_of(row, step, model), strict=True):
                parameter.grad = gradient
            next(model.parameters()).grad[0, 0] *= 1e160
            theirs.optimizers[row].step()
    for one, other in zip(ours.models, theirs.models, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert p.isfinite().all()
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [SGD, RMSprop])
def test_momentum_may_come_and_go(kind: type[Optimizer]) -> None:
    makes = [plainly(kind, lr=0.01), plainly(kind, lr=0.02, momentum=0.9)]
    ours, theirs = StackedRunner(makes), SequentialRunner(makes)
    for step in range(12):
        for one in (ours, theirs):
            one.optimizers[0].param_groups[0]["momentum"] = 0.7 if step in (2, 3, 8, 9) else 0.0
        if step == 2:
            assert "momentum_buffer" not in next(iter(ours.optimizers[0].state.values()), {})
        if kind is RMSprop and step == 2:
            # torch's RMSprop wants the buffer from the start; a schedule that brings momentum fails there
            for state in theirs.optimizers[0].state.values():
                state["momentum_buffer"] = torch.zeros_like(state["square_avg"])
        ours.step(step)
        theirs.step(step)
    assert_alike(ours, theirs, 1e-12)


def with_hook(model: nn.Module) -> Optimizer:
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def test_what_is_unusual_takes_torchs_own_step() -> None:
    makes = [
        plainly(AdamW, lr=0.01),
        plainly(AdamW, lr=0.01, amsgrad=True),
        with_hook,
        plainly(torch.optim.Adadelta, lr=0.01),
        plainly(SGD, lr=0.1, maximize=True),
        grouped(AdamW, swapped=True),
    ]
    ours, theirs = StackedRunner(makes), SequentialRunner(makes)
    for step in range(5):
        ours.step(step)
        theirs.step(step)
    assert_alike(ours, theirs, 1e-12)


def test_number_types_of_low_precision_take_torchs_own_step() -> None:
    makes = KIND_ROWS["adam"]
    ours, theirs = StackedRunner(makes, torch.bfloat16), SequentialRunner(makes, torch.bfloat16)
    for step in range(5):
        ours.step(step)
        theirs.step(step)
    assert_same(ours, theirs, range(len(makes)))


class Operations(TorchDispatchMode):
    """Counts operations over rows, and whether a number was read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.over_rows = 0
        self.read = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.read |= func is torch.ops.aten._local_scalar_dense.default
        if isinstance(result, Tensor) and result.ndim == 2 and result.shape[1] > SMALL and not func.is_view:
            self.over_rows += 1
        return result


SMALL = 40  # elements; a row has more, nothing else in a step has
OPERATIONS = {
    "sgd": 5,
    "sgdw": 5,
    "adam": 9,
    "adamw": 9,
    "rmsprop": 11,
    "adagrad": 6,
    "adamax": 8,
    "nadam": 11,
    "radam": 11,
}  # with all options


@pytest.mark.parametrize("kind", KIND_ROWS)
def test_a_step_has_few_operations_and_no_more_for_more_rows(kind: str) -> None:
    def done(makes: list[Make]) -> Operations:
        together = StackedRunner(makes)
        together.step(0)
        with Operations() as operations:
            take(together.steps, range(len(makes)))
        return operations

    few, many = done(KIND_ROWS[kind]), done(KIND_ROWS[kind] * 5)
    assert few.over_rows == many.over_rows == OPERATIONS[kind]
    assert few.read == (kind == "nadam")  # its product of momenta, which torch keeps on the host
    between = [make for make in KIND_ROWS[kind] for make in (make, plainly(torch.optim.Adadelta))]
    assert done(between).over_rows > OPERATIONS[kind]  # rows that do not follow one another are copied


# --- in a stack ----------------------------------------------------------------------------------------------------------


def trials(count: int = 6) -> list[Trial]:
    kinds: list[Any] = [
        partial(SGD, momentum=0.9),
        AdamW,
        SGD,
        NAdam,
        RMSprop,
        partial(Adam, weight_decay=0.1),
        Adagrad,
        Adamax,
        partial(SGD, momentum=0.8, nesterov=True, weight_decay=0.1),
        partial(AdamW, betas=(0.8, 0.9), weight_decay=0.2),
    ]
    few = digits()
    return [
        Trial(splits=few, optimizer=kinds[row % len(kinds)], seed=row, lr=0.02 / (row + 1), schedule=cosine)
        for row in range(count)
    ]


def stack_of(runs: Sequence[Any], slots: int = 0) -> Stack:
    stack = Stack(StackedForward(runs[0].model), runs[0], slots or len(runs), Broadcast)
    for run in runs:
        stack.put(run)
    return stack


def test_trials_of_all_kinds_come_to_what_each_comes_to_alone() -> None:
    some = trials(10)
    runs = [trial.run() for trial in some]
    results = train(stack_of(runs))
    for trial, run in zip(some, runs, strict=True):
        alone = trial.run()
        assert apart(numbers(results[run]), numbers(loop.train(alone))) <= 1e-10
        theirs = weights(alone)
        assert all((tensor - theirs[name]).abs().max() <= 1e-10 for name, tensor in weights(run).items())


def test_slots_are_filled_again_whatever_the_kind() -> None:
    some = [replace(trial, epochs=3 + row) for row, trial in enumerate(trials(8))]
    runs = [trial.run() for trial in some]
    stack, coming = stack_of(runs[:3]), list(runs[3:])
    results: dict[Any, Any] = {}
    while stack.runs:
        for run, result in zip(stack.runs, stack.train_epoch(), strict=True):
            results.setdefault(run, []).append(result)
            if run.finished:
                stack.remove(run)
                if coming:
                    stack.put(coming.pop(0))
        stack.compact()
    for trial, run in zip(some, runs, strict=True):
        assert apart(numbers(results[run]), numbers(loop.train(trial.run()))) <= 1e-10


def test_a_run_that_was_left_amid_an_epoch_waits_for_the_others() -> None:
    some = [replace(trial, epochs=4) for trial in trials(5)]
    runs = [trial.run() for trial in some]
    list(loop.train(runs[1], stop_before(2)))  # left before its third batch
    results = train(stack_of(runs))
    for trial, run in zip(some, runs, strict=True):
        assert apart(numbers(results[run]), numbers(loop.train(trial.run()))) <= 1e-10


def test_a_schedule_of_momentum_reaches_every_row() -> None:
    some = [
        replace(trial, epochs=5, schedule=partial(onecycle, cycle_momentum=True))
        for trial in trials(10)
        if trial.optimizer is not Adagrad  # which has no momentum
    ]
    runs = [trial.run() for trial in some]
    results = train(stack_of(runs))
    for trial, run in zip(some, runs, strict=True):
        assert apart(numbers(results[run]), numbers(loop.train(trial.run()))) <= 1e-10


def test_a_saved_run_goes_on_alone() -> None:
    some = [replace(trial, epochs=4) for trial in trials(6)]
    runs = [trial.run() for trial in some]
    stack = stack_of(runs)
    stack.train_epoch()
    for trial, run in zip(some, runs, strict=True):
        further = trial.run()
        further.load_state_dict(run.state_dict())
        assert apart(numbers(loop.train(further)), numbers(loop.train(trial.run()))[1:]) <= 1e-10


def test_gradients_are_clipped_row_by_row_before_the_step() -> None:
    clipped: list[dict[str, Any]] = [{"clip_norm": 0.1}, {}, {"clip_value": 0.01}]
    some = [replace(trial, epochs=3, options=clipped[row % 3]) for row, trial in enumerate(trials(6))]
    runs = [trial.run() for trial in some]
    results = train(stack_of(runs))
    for trial, run in zip(some, runs, strict=True):
        assert apart(numbers(results[run]), numbers(loop.train(trial.run()))) <= 1e-10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_steps_on_a_gpu_are_those_of_torch_and_wait_for_nothing(fused: bool) -> None:
    device = torch.device("cuda")
    makes = [plainly(kind, lr=0.01, fused=True) for kind in (AdamW, SGD, Adam, AdamW)] if fused else BY_TURNS
    ours, theirs = StackedRunner(makes, torch.float64, device), SequentialRunner(makes, torch.float64, device)
    for step in range(STEPS):
        ours.set_gradients(step)
        theirs.step(step)
        if step:  # in the first it is found out who is stepped with whom, which is sent to the device
            torch.cuda.set_sync_debug_mode("error")
        try:
            take(ours.steps, range(len(makes)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_alike(ours, theirs, 1e-10)
