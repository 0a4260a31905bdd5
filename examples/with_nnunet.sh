#!/usr/bin/env bash
# An nnU-Net data set from raw images to a distilled student's predictions.
#
#   bash examples/with_nnunet.sh 3 3d_fullres predictions        (nnUNet_raw, nnUNet_preprocessed and nnUNet_results are set)
#
# DEVICE, TRAINER, DISTILL, FOLD and WORKERS may be set: where to train, other trainers, another fold, how many processes.
set -euo pipefail
number=$1 configuration=$2 out=$3
device=${DEVICE:-cuda} trainer=${TRAINER:-nnUNetTrainer} distill=${DISTILL:-nnUNetTrainerDistill} fold=${FOLD:-0} workers=${WORKERS:-4}

nnUNetv2_plan_and_preprocess -d "$number" -c "$configuration" -np "$workers" -npfp "$workers"
nnUNetv2_train "$number" "$configuration" "$fold" -tr "$trainer" -device "$device"

# the teacher just trained; any other of the same labels will do, and the student may have plans of its own (-p)
dataset=$(basename "$(echo "$nnUNet_raw"/Dataset"$(printf %03d "$number")"_*)")
export MEDKD_FAST_TEACHER=$nnUNet_results/$dataset/${trainer}__nnUNetPlans__$configuration
export MEDKD_FAST_LOSS=${MEDKD_FAST_LOSS:-kd:1:temperature=1}
eval "$(medkd-fast nnunet-path)"
nnUNetv2_train "$number" "$configuration" "$fold" -tr "$distill" -device "$device"

# the student is nnU-Net's: predicting needs neither the teacher nor this package
unset MEDKD_FAST_TEACHER nnUNet_extTrainer
nnUNetv2_predict -d "$number" -c "$configuration" -f "$fold" -tr "$distill" -device "$device" \
  -i "$nnUNet_raw/$dataset/imagesTs" -o "$out" -npp "$workers" -nps "$workers"
