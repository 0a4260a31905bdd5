"""The trainers of the tests: nnU-Net's and ours, with next to nothing to do."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from medkd_fast.integrations.nnunet import nnUNetTrainerDistill


class nnUNetTrainerTiny(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device) -> None:  # nnU-Net reads these names
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 3, 1


class nnUNetTrainerDistillTiny(nnUNetTrainerDistill, nnUNetTrainerTiny):
    pass
