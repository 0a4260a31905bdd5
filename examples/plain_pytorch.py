"""Distillation in a plain PyTorch loop.

python examples/plain_pytorch.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from demo_ct import arguments, batches, mean_dice, network, slices, task_loss, trained_teacher

from medkd_fast import Distiller, Term
from medkd_fast.losses import CPKDLoss, DKDLoss


def main(given: Sequence[str] | None = None) -> list[float]:
    args = arguments(__doc__, given)
    train, held_out = slices(args.size)
    teacher, student = trained_teacher(train, args.steps), network(4)

    terms = [
        # relations between channels and between pixels of a decoder feature, 4 channels against 16: an adapter is made
        Term(CPKDLoss(), student="upcat_2", weight=0.3, warm_up=args.steps // 10),
        # what the logits say of the classes that are not the label's
        Term(DKDLoss(), weight=0.02),
    ]
    kd = Distiller(teacher, student, terms, example=train[0][0].unsqueeze(0))
    optimizer = torch.optim.AdamW(kd.parameters(), lr=1e-2)  # the student's and the adapter's
    task, history = task_loss(), []
    for step, (image, label) in enumerate(batches(train, args.steps)):
        logits = kd(image)
        loss = task(logits, label) + kd.loss(label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", {name: f"{value:.4f}" for name, value in kd.log().items()})
    kd.close()  # the student is a plain network again

    print(
        f"Dice on held-out slices: teacher {mean_dice(teacher, held_out):.3f}, student {mean_dice(student, held_out):.3f}"
    )
    return history


if __name__ == "__main__":
    main()
