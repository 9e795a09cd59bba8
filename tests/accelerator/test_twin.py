"""The twin device itself: what it counts, what it refuses, and that its numbers are the CPU's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support import twin


@pytest.fixture(autouse=True)
def plugged_in() -> Iterator[None]:
    with twin.plugged_in():
        yield


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 3))
    return nn.Sequential(*layers).double()


def trained(device: torch.device | str, **options: bool) -> tuple[list[float], list[twin.Counts]]:
    """Train three steps on a device; return the losses and what was counted in each step."""
    model = small_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    torch.manual_seed(1)
    inputs, targets = torch.randn(8, 6, dtype=torch.float64).to(device), torch.randint(3, (8,)).to(device)
    losses, counted = [], []
    torch.manual_seed(2)
    for _ in range(3):
        with twin.counting() as counts:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        counted.append(counts)
    return losses, counted


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_numbers_are_the_cpus(options: dict[str, bool]) -> None:
    losses, counted = trained(twin.DEVICE, **options)
    assert losses == trained("cpu", **options)[0]
    assert [(one.waits, one.to_device, one.to_host) for one in counted] == [(0, 0, 0)] * 3


def test_launches_are_those_of_the_operations() -> None:
    _, [_, step, _] = trained(twin.DEVICE, fused=True)
    forward = {"addmm.default": 2, "native_batch_norm.default": 1, "add_.Tensor": 1, "relu.default": 1}
    forward |= {"native_dropout.default": 1, "_log_softmax.default": 1, "nll_loss_forward.default": 1}
    backward = {"ones_like.default": 1, "nll_loss_backward.default": 1, "_log_softmax_backward_data.default": 1}
    backward |= {"mm.default": 3, "sum.dim_IntList": 2, "native_dropout_backward.default": 1}
    backward |= {"threshold_backward.default": 1, "native_batch_norm_backward.default": 1}
    assert dict(step.operations) == forward | backward | {"_foreach_add_.Scalar": 1, "_fused_adamw_.default": 1}
    assert step.launches == sum(step.operations.values()) == 21


def test_lists_launch_as_multi_tensor_kernels_do() -> None:
    def launches(lists: list[list[Tensor]]) -> int:
        with twin.counting() as counts:
            torch._foreach_add_(*lists)
        return counts.launches

    few = [torch.zeros(3, device=twin.DEVICE) for _ in range(64)]
    assert launches([few, few]) == 1
    assert launches([few * 2, few * 2]) == 2
    large = torch.zeros(65536 * 321, dtype=torch.int8, device=twin.DEVICE)
    assert launches([[large], [large]]) == 2
    assert launches([few, [one.double() for one in few]]) == 64  # of two types: one by one


def test_copies_and_waits_are_counted_in_each_direction() -> None:
    def counted(action: object) -> tuple[int, ...]:
        assert callable(action)
        with twin.counting() as counts:
            action()
        return counts.launches, counts.waits, counts.to_device, counts.blocking, counts.to_host

    here = torch.arange(6.0)
    there = here.to(twin.DEVICE)
    mask = there > 2
    assert counted(lambda: here.to(twin.DEVICE)) == (0, 0, 1, 1, 0)
    assert counted(lambda: here.to(twin.DEVICE, non_blocking=True)) == (0, 0, 1, 1, 0)
    assert counted(lambda: here.pin_memory().to(twin.DEVICE, non_blocking=True)) == (0, 0, 1, 0, 0)
    assert counted(lambda: there.copy_(here.pin_memory()[:], non_blocking=True)) == (0, 0, 1, 0, 0)
    assert counted(lambda: there.to(twin.DEVICE)) == (0, 0, 0, 0, 0)
    assert counted(lambda: there.double()) == (1, 0, 0, 0, 0)
    assert counted(there.cpu) == (0, 1, 0, 0, 1)
    assert counted(there.tolist) == (0, 1, 0, 0, 1)
    assert counted(lambda: there[0].item()) == (0, 1, 0, 0, 1)
    assert counted(lambda: there[1:].view(5, 1).t()) == (0, 0, 0, 0, 0)
    assert counted(lambda: there[mask]) == (1, 1, 0, 0, 0)
    assert counted(lambda: there[torch.tensor([1, 2])]) == (1, 0, 1, 1, 0)
    assert counted(lambda: torch.empty(3, device=twin.DEVICE)) == (0, 0, 0, 0, 0)
    assert counted(lambda: torch.zeros(3, device=twin.DEVICE)) == (1, 0, 0, 0, 0)
    assert counted(lambda: torch.tensor([1.0], device=twin.DEVICE)) == (0, 0, 1, 1, 0)
    assert counted(lambda: torch.get_device_module(twin.DEVICE).synchronize()) == (0, 1, 0, 0, 0)


def test_without_autograd_an_operation_of_several_counts_as_its_parts() -> None:
    inputs, layer = torch.ones(2, 6, device=twin.DEVICE), nn.Linear(6, 5).to(twin.DEVICE)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), twin.counting() as counts:
            assert layer(inputs).to("cpu").device.type == "cpu"
        assert (counts.operations, counts.to_host) == ({"addmm.default": 1}, 1)
    assert repr(inputs[0, :2]) == "tensor([1., 1.], device='twin:0')"
    assert f"{inputs[0, 0]:.2f}" == "1.00"


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: there + here,
        lambda here, there: here + there,
        lambda here, there: here + there[0],
        lambda here, there: torch.cat([here, there]),
        lambda here, there: torch._foreach_add_([there[0]], [here[0]]),
        lambda here, there: here[there.long()],
        lambda here, there: there.gather(0, here.long()),
        lambda here, there: there.bernoulli_(0.5, generator=torch.Generator()),
    ],
)
def test_what_cuda_refuses_is_refused(mix: object) -> None:
    assert callable(mix)
    here = torch.arange(3.0)
    with pytest.raises(RuntimeError, match=r"same device|device type for generator"):
        mix(here, here.to(twin.DEVICE))
    assert (here.to(twin.DEVICE) + torch.tensor(1.0)).tolist() == [1.0, 2.0, 3.0]  # a scalar of the CPU may go along


def test_random_numbers_come_from_the_devices_own_generators() -> None:
    backend, generator = torch.get_device_module(twin.DEVICE), torch.Generator(twin.DEVICE)
    generator.manual_seed(5)
    first = torch.empty(4, device=twin.DEVICE).uniform_(generator=generator)
    assert first.tolist() == torch.rand(4, generator=torch.Generator().manual_seed(5)).tolist()
    with pytest.raises(RuntimeError, match="RNG state is wrong size"):
        generator.set_state(torch.Generator().get_state())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    drawn = torch.rand(3, device=twin.DEVICE)
    assert torch.equal(torch.get_rng_state(), state)  # the CPU's generator did not move
    torch.manual_seed(7)
    kept = backend.get_rng_state()
    assert torch.rand(3).tolist() == torch.rand(3, device=twin.DEVICE).tolist() == drawn.tolist()
    backend.set_rng_state(kept)
    assert torch.rand(3, device=twin.DEVICE).tolist() == drawn.tolist()


def test_memory_is_that_of_living_tensors() -> None:
    backend = torch.get_device_module(twin.DEVICE)
    before = backend.memory_allocated()
    kept = torch.zeros(1000, device=twin.DEVICE)
    row = kept[3:5]
    assert backend.memory_allocated() - before == 4000
    with twin.counting() as counts:
        (kept.double() + 1).sum()  # at its peak both arrays of 8,000 bytes live
    assert counts.peak_bytes - before == 4000 + 2 * 8000
    del kept
    assert backend.memory_allocated() - before == 4000  # a view keeps its storage
    del row
    assert backend.memory_allocated() == before


def test_views_copies_and_files_hold_their_numbers(tmp_path: Path) -> None:
    there = torch.arange(4.0).to(twin.DEVICE)
    there.view(2, 2)[0] += 5
    assert there.tolist() == [5.0, 6.0, 2.0, 3.0]
    flat = torch.ones(3, device=twin.DEVICE)
    parameter = nn.Parameter(torch.zeros(3, device=twin.DEVICE))
    parameter.data = flat
    flat.mul_(4)
    assert (parameter * 1).tolist() == [4.0, 4.0, 4.0]
    assert parameter.data_ptr() == flat.data_ptr()
    model = small_model().to(twin.DEVICE)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert copied[0].weight.requires_grad
    assert copied[0].weight.abs().sum().item() > 0
    torch.save(copied.state_dict(), tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True, map_location="cpu")
    assert torch.equal(loaded["0.weight"], copied[0].weight.cpu())
    with pytest.raises(TypeError, match="twin"):
        model[0].weight.numpy(force=False)


def test_the_device_is_gone_when_it_is_not_plugged_in() -> None:
    assert torch.accelerator.is_available()
    generator = torch.Generator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twin.Backend, "plugged_in", False)
        assert not torch.accelerator.is_available()
    assert isinstance(torch.default_generator, generator)
