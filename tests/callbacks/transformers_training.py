"""A training with transformers' own Trainer. Tests import it when they run: it takes 3 s, in each test process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hpo.integrations.transformers import HpoCallback

EPOCHS = 5
Hook = Callable[[int, int], None]


def data(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(count)
    words = torch.randint(0, 32, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": int(row.sum()) % 3} for row in words]


def tiny() -> BertForSequenceClassification:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=32, max_position_embeddings=8, hidden_dropout_prob=0.3, **sizes)
    config.num_labels = 3
    return BertForSequenceClassification(config)


class At(TrainerCallback):
    """Calls a function after each evaluation within the training."""

    def __init__(self, number: int, hook: Hook) -> None:
        self.number, self.hook = number, hook

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.hook(self.number, state.global_step)


def objective(
    folder: Path,
    *,
    hook: Hook = lambda number, step: None,
    monitor: str = "loss",
    patience: int | None = None,
    with_checkpoint: bool = True,
    own_folder: bool = True,
    **options: Any,
) -> Callable[[optuna.Trial], float]:
    def train(trial: optuna.Trial) -> float:
        callback = HpoCallback(trial, monitor)
        args = TrainingArguments(
            output_dir=str(folder / str(trial.number) if own_folder else folder),
            learning_rate=trial.suggest_float("lr", 1e-3, 1e-1, log=True),
            lr_scheduler_type="cosine",
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=8,
            seed=trial.number,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **{"eval_strategy": "epoch", "save_strategy": "no", **options},
        )
        stoppers = [] if patience is None else [EarlyStoppingCallback(patience)]
        callbacks = [callback, *stoppers, At(trial.number, hook)]
        trainer = Trainer(
            tiny(),
            args,
            train_dataset=data(32),
            eval_dataset=data(16),
            compute_metrics=lambda _: {"number": float(trial.number)},
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=callback.checkpoint if with_checkpoint else None)
        return min(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)

    return train
