"""What needs a package of its own environment is looked into there alone: nnU-Net's, by `make test-nnunet`."""

from importlib.util import find_spec

collect_ignore_glob = ["tests/nnunet/trainers/*"]
if not find_spec("nnunetv2"):
    collect_ignore_glob += ["medkd_fast/integrations/nnunet.py", "medkd_fast/integrations/nnunet_path/medkd_fast_*"]
