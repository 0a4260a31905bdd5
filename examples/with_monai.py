"""Distillation in MONAI's SupervisedTrainer: its own iteration, with the teacher's losses added.

python examples/with_monai.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from demo_ct import BATCH, CLASSES, arguments, mean_dice, network, slices, task_loss, trained_teacher
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.handlers import MeanDice, from_engine
from monai.transforms import AsDiscreted, Compose, RandFlipd, RandGaussianNoised, ToTensord
from torch.utils.data import RandomSampler

from medkd_fast import Distiller, Term
from medkd_fast.integrations.monai import distillation_step


def main(given: Sequence[str] | None = None) -> SupervisedTrainer:
    args = arguments(__doc__, given)
    train, held_out = slices(args.size)
    teacher, student = trained_teacher(train, args.steps), network(4)

    both = ["image", "label"]
    augmented = Compose(
        [ToTensord(both), RandFlipd(both, prob=0.5, spatial_axis=1), RandGaussianNoised("image", prob=0.5, std=0.02)]
    )
    dataset = Dataset([{"image": image, "label": label} for image, label in train], augmented)
    sampler = RandomSampler(dataset, replacement=True, num_samples=BATCH * args.steps)
    terms = [Term("cpkd", student="upcat_2", weight=0.3), Term("dkd", weight=0.02)]
    kd = Distiller(teacher, student, terms, example=train[0][0].unsqueeze(0))
    trainer = SupervisedTrainer(
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        max_epochs=1,
        train_data_loader=DataLoader(dataset, batch_size=BATCH, sampler=sampler),
        network=kd,
        optimizer=torch.optim.AdamW(kd.parameters(), lr=1e-2),
        loss_function=task_loss(),
        iteration_update=distillation_step(kd),
        postprocessing=Compose(
            [AsDiscreted("pred", argmax=True, to_onehot=CLASSES), AsDiscreted("label", to_onehot=CLASSES)]
        ),
        key_train_metric={"dice": MeanDice(include_background=False, output_transform=from_engine(["pred", "label"]))},
    )
    kd.to(trainer.state.device)
    trainer.run()
    last = {name: f"{value:.4f}" for name, value in trainer.state.output[0].items() if "kd/" in name or name == "loss"}
    print(f"last step: {last}; Dice over the training: {trainer.state.metrics['dice']:.3f}")
    print(f"Dice on held-out slices: student {mean_dice(student.cpu(), held_out):.3f}")
    return trainer


if __name__ == "__main__":
    main()
