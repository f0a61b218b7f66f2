"""A recipe inside `transformers.Trainer`: one line more than without.

    python examples/trainer.py [STEPS]
"""

from __future__ import annotations

import sys
import tempfile

import torch
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

import burnish
from burnish.fit.assets import GLYPH_VIT
from burnish.fit.data import read
from burnish.fit.tasks import task_for


def main(steps: int = 100) -> float:
    torch.manual_seed(0)
    data = read("digits")
    task = task_for(data, str(GLYPH_VIT))           # pictures to tensors, as the model wants them
    model = AutoModelForImageClassification.from_pretrained(
        GLYPH_VIT, num_labels=10, ignore_mismatched_sizes=True)

    tuned = burnish.tune(model, "snella(rank=8)")
    trainer = Trainer(
        model,
        TrainingArguments(tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=32,
                          report_to=[], disable_tqdm=True, save_strategy="no"),
        train_dataset=task.rows("train"),
        data_collator=task.collate,
        optimizers=(tuned.optimizer(lr=1e-2), None),
        callbacks=[burnish.TrainerCallback(tuned)],
    )
    trainer.train()

    model.eval()
    rows = task.rows("test")
    batch = task.collate([rows[i] for i in range(len(rows))])
    with torch.no_grad():
        guess = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
    accuracy = (guess == batch["labels"]).float().mean().item()
    print(f"{tuned.recipe}: test accuracy {accuracy:.3f} after {steps} steps")
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
