"""Distillation with Hugging Face Accelerate.

accelerate launch examples/with_accelerate.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from demo_ct import arguments, batches, mean_dice, network, slices, task_loss, trained_teacher

from medkd_fast import Distiller, Term


def main(given: Sequence[str] | None = None) -> list[float]:
    args = arguments(__doc__, given)
    accelerator = Accelerator()
    train, held_out = slices(args.size)
    torch.manual_seed(0)  # every process trains the same teacher; yours would load one from a file
    teacher, student = trained_teacher(train, args.steps), network(4)

    terms = [Term("cpkd", student="upcat_2", weight=0.3), Term("dkd", weight=0.02)]
    kd = Distiller(teacher, student, terms, example=train[0][0].unsqueeze(0))
    optimizer = torch.optim.AdamW(kd.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(kd, optimizer, batches(train, args.steps))
    task, history = task_loss(), []
    for image, label in loader:
        logits = model(image)
        loss = task(logits, label) + accelerator.unwrap_model(model).loss(label)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        history.append(loss.item())
    accelerator.print(f"loss {history[0]:.3f} -> {history[-1]:.3f}")
    accelerator.print(f"Dice on held-out slices: student {mean_dice(student.cpu(), held_out):.3f}")
    return history


if __name__ == "__main__":
    main()
