"""Where nnU-Net looks for trainers, when `nnUNet_extTrainer` names this folder: it imports what lies in it."""

from medkd_fast.integrations.nnunet import nnUNetTrainerDistill

__all__ = ["nnUNetTrainerDistill"]
