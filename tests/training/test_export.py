"""export: files that compute what the network computes, for any batch and size, and a check that would notice if not."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from medkd_fast.cli import main
from medkd_fast.training import export as module
from medkd_fast.training.data.dataset import open_dataset
from medkd_fast.training.data.prepare import prepare
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.export import compare_exported, export_network, load_exported
from medkd_fast.training.runs import fit, load_run


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    """Of a network that is quick to trace."""
    small = config.resolved(network="UNet", network_args={"channels": [4, 8], "strides": [2]}, epochs=1, steps=2)
    out = fit(small, tmp_path_factory.mktemp("export") / "run")
    prepare(open_dataset(small.data), load_run(out).preprocessing)  # for tests in which nothing can be written
    return out


@pytest.mark.parametrize(("format", "name"), [("onnx", "student.onnx"), ("torch-export", "student.pt2")])
def test_the_command(run, format, name, capsys):
    assert main(["export", str(run), "--format", format]) == 0
    said = capsys.readouterr().out
    assert (
        "any batch; sizes that are multiples of 32 x 32" in said and "on case4, other windows: logits at most" in said
    )
    about = json.loads((run / f"{name}.json").read_text())
    assert about["classes"]["3"] == "liver" and about["sizes_are_multiples_of"] == [32, 32]
    assert about["preprocessing"]["intensity"] == ["none"] and about["checked_on"] == "case4"
    assert not (run / "student.json").exists()  # which the other format would write too
    network, exported = load_run(run).network, load_exported(run / name)
    for shape in ((1, 1, 32, 32), (3, 1, 64, 96)):
        image = torch.rand(shape)
        with torch.no_grad():
            torch.testing.assert_close(exported(image), network(image), atol=1e-5, rtol=1e-4)


def test_a_file_that_computes_something_else_is_removed(run, tmp_path, monkeypatch, capsys):
    network = load_run(run).network
    monkeypatch.setattr(module, "load_exported", lambda file: lambda image: network(image) + 0.1)
    assert main(["export", str(run), "--format", "torch-export", "--out", str(tmp_path / "a.pt2")]) == 2
    assert "the torch-export file answers otherwise than the network on case4" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_without_test_cases_and_data_without_labels(run, small_csv, config, tmp_path, capsys):
    folder, small = Path(small_csv).parent, load_run(run).config
    (tmp_path / "classes.json").write_text((folder / "classes.json").read_text())
    for name, label in (("taught", f"{folder}/label1.nii.gz"), ("bare", "")):
        row = f"{folder}/image1.nii.gz,{label},{name} case"
        (tmp_path / f"{name}.csv").write_text(f"image,label,case\n{row}\n")
    of_all = {"data": str(tmp_path / "taught.csv"), "fractions": (1.0, 0.0, 0.0), "epochs": 1, "steps": 1}
    taught = config.resolved(network="UNet", network_args=small.network_args, **of_all)
    out = ["--format", "torch-export", "--out", str(tmp_path / "a.pt2")]
    assert main(["export", str(fit(taught, tmp_path / "run")), *out]) == 0
    assert "on taught case, windows of the patch" in capsys.readouterr().out
    assert main(["export", str(run), *out, "--data", str(tmp_path / "bare.csv")]) == 0
    assert "on bare case, windows of the patch" in capsys.readouterr().out


@pytest.fixture(scope="module")
def padding(config, tmp_path_factory) -> Path:
    """A run of a network that pads what it has halved, where a size is no multiple of 16."""
    odd = config.resolved(patch=(24, 32), epochs=1, steps=1)
    return fit(odd, tmp_path_factory.mktemp("padding") / "run")


@pytest.mark.parametrize(("format", "name"), [("onnx", "student.onnx"), ("torch-export", "student.pt2")])
def test_a_network_whose_padding_depends_on_the_size_is_written_for_its_patch(padding, format, name, capfd):
    assert main(["export", str(padding), "--format", format]) == 0
    said = capfd.readouterr()
    assert "any batch; sizes of 24 x 32\n" in said.out and "other windows" not in said.out
    assert "ExecuteKernel" not in said.err  # onnxruntime's remarks on the sizes that failed
    about = json.loads((padding / f"{name}.json").read_text())
    assert about["sizes_are_multiples_of"] is None and about["input"][1] == ["batch", 1, 24, 32]
    image = torch.rand(3, 1, 24, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            load_exported(padding / name)(image), load_run(padding).network(image), atol=1e-5, rtol=1e-4
        )


def test_a_file_that_fails_for_its_patch_is_removed(run, tmp_path, monkeypatch, capsys):
    def failing(image: Tensor) -> Tensor:
        raise RuntimeError("\nPad node\nof shape 3")

    monkeypatch.setattr(module, "load_exported", lambda file: failing)
    assert main(["export", str(run), "--format", "torch-export", "--out", str(tmp_path / "a.pt2")]) == 2
    assert "answers otherwise than the network on case4 (Pad node): it was removed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_third_size_is_checked(tmp_path):
    """A file that is right where both axes are odd, or both even, multiples of 8, and nowhere else."""
    network, file = nn.Conv2d(1, 3, 1).eval(), tmp_path / "a.pt2"

    def exported(image: Tensor) -> Tensor:
        height, width = (size // 8 % 2 for size in image.shape[2:])
        return network(image) + (height != width)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_exported", lambda file: exported)
        found = compare_exported(file, network, torch.rand(1, 3, 60, 60), patch=(40, 56), multiples=(8, 8))
    assert [f.logits > 0.5 for f in found] == [False, False, True]


@pytest.mark.parametrize(("format", "suffix"), [("onnx", ".onnx"), ("torch-export", ".pt2")])
def test_a_full_disk_is_one_line_and_leaves_no_file(run, tmp_path, capsys, format, suffix):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # or the kernel would end the process
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        assert main(["export", str(run), "--format", format, "--out", str(tmp_path / f"a{suffix}")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert f"a{suffix} cannot be written (File too large): make room or choose another" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class OneSize(nn.Module):
    """Takes 16 x 16 and nothing else; answers as networks with deep supervision do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 3, 1)
        self.place = nn.Parameter(torch.randn(1, 3, 16, 16))

    def forward(self, image: Tensor) -> list[Tensor]:
        logits = self.head(image) + self.place
        return [logits, nn.functional.avg_pool2d(logits, 2)]


def test_a_network_of_one_size_and_several_outputs(tmp_path):
    network, file = OneSize().eval(), tmp_path / "one.pt2"
    assert export_network(network, file, format="torch-export", in_channels=1, patch=(16, 16)) is None
    (found,) = compare_exported(file, network, torch.rand(1, 3, 20, 20), patch=(16, 16), multiples=None)
    assert found.logits < 1e-5 < found.scale and found.voxels == 0
    with pytest.raises(Exception, match=r"(?i)shape|size|guard"):
        load_exported(file)(torch.rand(1, 1, 32, 32))


class Untraceable(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image * 2 if image.sum().item() > 0 else image


def test_wrong_use(run, tmp_path, monkeypatch, capsys):
    def error(*arguments: str) -> str:
        assert main(["export", str(run), *arguments]) == 2
        return capsys.readouterr().err

    assert "unknown format 'tflite': choose from onnx, torch-export" in error("--format", "tflite")
    assert "must end in .onnx, got a.pt2" in error("--out", str(tmp_path / "a.pt2"))
    with pytest.raises(WrongUse, match="cannot be traced by torch.export"):
        export_network(Untraceable(), tmp_path / "x.pt2", format="torch-export", in_channels=1, patch=(8, 8))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "onnx, onnxscript, onnxruntime not installed: run `pip install onnx onnxscript onnxruntime`" in error()
    assert not list(tmp_path.iterdir())
