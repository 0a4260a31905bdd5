"""Distillation on several GPUs, or processes: the distiller goes into DistributedDataParallel, student and adapters with it.

torchrun --nproc-per-node 2 examples/ddp_torchrun.py
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from demo_ct import BATCH, arguments, mean_dice, network, slices, task_loss, trained_teacher
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from medkd_fast import Distiller, Term


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(__doc__, given)
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")

    train, held_out = slices(args.size)
    torch.manual_seed(0)  # every process trains the same teacher; yours would load one from a file
    teacher, student = trained_teacher(train, args.steps), network(4)
    terms = [Term("cpkd", student="upcat_2", weight=0.3), Term("dkd", weight=0.02)]
    kd = Distiller(teacher, student, terms, example=train[0][0].unsqueeze(0)).to(device)  # the teacher goes along
    model = DistributedDataParallel(kd, static_graph=True)
    optimizer = torch.optim.AdamW(kd.parameters(), lr=1e-2)

    sampler, task, history = DistributedSampler(train), task_loss(), []
    loader = DataLoader(train, BATCH, sampler=sampler, drop_last=True)
    while len(history) < args.steps:
        sampler.set_epoch(len(history))
        for image, label in loader:
            image, label = image.to(device), label.to(device)
            logits = model(image)  # through DDP, which gathers the gradients of all that kd trains
            loss = task(logits, label) + kd.loss(label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())

    weights = torch.nn.utils.parameters_to_vector(kd.parameters()).detach()
    least, largest = weights.clone(), weights.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    dice = mean_dice(student.cpu(), held_out)
    if rank == 0:
        print(f"loss {history[0]:.3f} -> {history[-1]:.3f} in {dist.get_world_size()} processes")
        print(f"largest difference of a weight between processes: {(largest - least).max().item()}")
        print(f"Dice on held-out slices: student {dice:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
