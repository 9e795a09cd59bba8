"""A tiny vision transformer of Hugging Face's `transformers`, whose trials report, are pruned, and go on after a kill.

The weights are random, so nothing is downloaded. The file also runs under `study.optimize`.
Needs `pip install --editable '.[transformers]'`.
"""

import tempfile

import optuna
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from hpo.integrations.transformers import HpoCallback

EPOCHS = 6


def load_rows() -> tuple[list[dict], list[dict]]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, digits.target, strict=True)]
    train, validation = train_test_split(rows, test_size=0.2, stratify=digits.target, random_state=0)
    return train, validation


def accuracy(predicted) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def objective(trial: optuna.Trial) -> float:
    callback = HpoCallback(trial, monitor="accuracy")
    width = trial.suggest_categorical("width", [16, 32])
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout_prob=trial.suggest_float("dropout", 0.0, 0.3),
    )
    config.num_labels = 10
    train, validation = load_rows()
    with tempfile.TemporaryDirectory() as folder:  # stays empty: hpo keeps the checkpoints
        arguments = TrainingArguments(
            output_dir=folder,
            eval_strategy="epoch",
            save_strategy="no",
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=64,
            learning_rate=trial.suggest_float("lr", 3e-3, 3e-2, log=True),
            seed=trial.number,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(
            ViTForImageClassification(config),
            arguments,
            train_dataset=train,
            eval_dataset=validation,
            compute_metrics=accuracy,
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=callback.checkpoint)
        return trainer.evaluate()["eval_accuracy"]
