"""The thin U-Net loop: data, networks, Lightning module, metrics and report of a distillation run.

Needs the extra: ``pip install --no-build-isolation ".[train]"``. `import medkd_fast` never imports this package.
"""
