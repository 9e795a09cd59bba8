"""A trained model together with its units. Exported models take raw inputs and give values in original units."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpo.data import Splits
from hpo.data.inputs import each
from hpo.train.inputs import Batch
from hpo.train.precision import number_type


class Deployed(nn.Module):
    """Maps raw inputs [B, ...] to outputs [B, O], float32.

    Images are uint8 pixels as the data source gives them, or floats of the same range. Floats of any kind are
    standardised in float32 with mean and std of the training part, and a missing number becomes the mean. Then they are
    cast to the model's number type. Codes of categories and tokens stay as they are. The outputs of a regression are in
    original units, those of other tasks are logits.
    """

    target_mean: Tensor
    target_std: Tensor

    def __init__(self, model: nn.Module, splits: Splits) -> None:
        super().__init__()
        self.model = model
        self.dtype = number_type(model)
        means = splits.mean if isinstance(splits.mean, dict) else {"": splits.mean}
        stds = splits.std if isinstance(splits.std, dict) else {"": splits.std}
        dimensions = each(splits.train.inputs, lambda one: one.ndim)  # type: ignore[arg-type]
        self.places = {name: place for place, name in enumerate(means)}  # a buffer's name may not have a dot
        for name, mean in means.items():
            behind = (-1, *[1] * ((dimensions[name] if isinstance(dimensions, dict) else dimensions) - 2))
            self.register_buffer(f"mean{self.places[name]}", mean.float().view(behind).clone())
            self.register_buffer(f"scale{self.places[name]}", 1.0 / stds[name].float().view(behind))
        self.is_regression = splits.target_mean is not None
        if splits.target_mean is not None and splits.target_std is not None:
            self.register_buffer("target_mean", splits.target_mean.float().clone())
            self.register_buffer("target_std", splits.target_std.float().clone())

    def normalised(self, inputs: Batch) -> Batch:
        """Return standardised inputs in the model's number type; codes as they are."""
        if isinstance(inputs, dict):
            return {name: self._normalised(name, one) for name, one in inputs.items()}
        return self._normalised("", inputs)

    def _normalised(self, name: str, values: Tensor) -> Tensor:
        place = self.places[name]
        mean, scale = self.get_buffer(f"mean{place}"), self.get_buffer(f"scale{place}")
        if not mean.numel():
            return values
        found = values.to(torch.float32).sub(mean).mul(scale)
        if values.dtype != torch.uint8:
            found = found.nan_to_num(0.0, torch.inf, -torch.inf)
        return found.to(self.dtype)

    def forward(self, inputs: Batch) -> Tensor:
        """Return the outputs [B, O] for raw inputs [B, ...]."""
        outputs: Tensor = self.model(self.normalised(inputs)).to(torch.float32)
        if not self.is_regression:
            return outputs
        return outputs[:, : len(self.target_mean)] * self.target_std + self.target_mean

    @property
    def origin(self) -> Tensor:
        """What a standardised output of 0 stands for: 0 for logits."""
        return self.target_mean if self.is_regression else torch.zeros(())

    @property
    def unit(self) -> Tensor:
        """What a step of 1 in a standardised output stands for: 1 for logits."""
        return self.target_std if self.is_regression else torch.ones(())
