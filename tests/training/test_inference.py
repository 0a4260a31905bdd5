"""Sliding-window logits: every voxel, once, by the windows that cover it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from monai.networks.nets import BasicUNet
from torch import nn

from medkd_fast.training.data.sampling import crop
from medkd_fast.training.inference import predict_logits


def pointwise(dims: int) -> nn.Module:
    """A network that sees one voxel at a time: windows must not show in what it answers."""
    convolution = nn.Conv2d if dims == 2 else nn.Conv3d
    return convolution(2, 3, 1)


@pytest.mark.parametrize(("dims", "patch"), [(2, (8, 6)), (3, (4, 8, 6)), (2, (32, 32)), (3, (16, 16, 16))])
def test_windows_do_not_show(dims, patch):
    image, network = torch.randn(2, 5, 13, 11), pointwise(dims)
    found = predict_logits(network, image, dims=dims, patch=patch, overlap=0.25, batch_size=3)
    with torch.no_grad():
        expected = network(image.transpose(0, 1)).transpose(0, 1) if dims == 2 else network(image[None])[0]
    assert found.dtype == torch.float32 and found.device.type == "cpu"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_logits_of_slices_are_written_where_they_stay():
    # put together at the end, they would be in memory twice, turned once more three times
    found = predict_logits(pointwise(2), torch.randn(2, 5, 13, 11), dims=2, patch=(8, 6), batch_size=2)
    assert found.is_contiguous() and found.untyped_storage().nbytes() == 3 * 5 * 13 * 11 * 4


def test_a_2d_network_sees_each_slice_alone():
    network = BasicUNet(spatial_dims=2, in_channels=1, out_channels=3, features=(4, 4, 4, 4, 4, 4))
    image = torch.randn(1, 5, 32, 32)
    found = predict_logits(network, image, dims=2, patch=(32, 32), batch_size=2)
    with torch.no_grad():
        for index in range(5):
            torch.testing.assert_close(found[:, index], network(image[:, index][None])[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dims", "patch"), [(2, (16, 16)), (3, (16, 16, 16))])
def test_what_a_volume_lacks_of_a_window_is_as_in_training(dims, patch):
    seen = []

    def network(windows):
        seen.append(windows)
        return torch.cat([windows, -windows], 1)

    image = torch.full((1, 16 if dims == 2 else 5, 10, 13), -1.0)
    image[:, 3, 4:7, 4:9] = 1.5
    mask = torch.zeros(image.shape, dtype=torch.uint8)
    logits = predict_logits(network, image, dims=dims, patch=patch, batch_size=1)
    torch.testing.assert_close(logits, torch.cat([image, -image]))
    size = patch if dims == 3 else (1, *patch)
    volume = SimpleNamespace(image=image, mask=mask)
    want, _ = crop(volume, [3 if dims == 2 else 2, 5, 6], size, 0)
    assert torch.equal(seen[3 if dims == 2 else 0].reshape(want.shape), want)


def test_windows_meet_without_a_seam():
    # a box filter of 5 x 5: at the border of a window it sees the padding, in the middle of its neighbour it does not
    box = nn.Conv2d(1, 1, 5, padding=2, bias=False)
    nn.init.constant_(box.weight, 1 / 25)
    image = torch.ones(1, 1, 40, 40)
    found = predict_logits(box, image, dims=2, patch=(16, 16), overlap=0.75)[0, 0]
    assert (found[8:-8, 8:-8] - 1).abs().max() < 0.05  # a window alone is 0.4 off at its border
    worst = predict_logits(box, image, dims=2, patch=(16, 16), overlap=0.0)[0, 0, 8:-8, 8:-8]
    assert (worst - 1).abs().max() > 0.3


def test_the_first_of_several_outputs_counts_and_the_network_is_in_eval_mode():
    class Deep(nn.Module):
        def forward(self, x):
            assert not self.training
            return [x.half() * 2, x * 3]

    image = torch.randn(1, 2, 8, 8)
    found = predict_logits(Deep().train(), image, dims=2, patch=(8, 8))
    torch.testing.assert_close(found, image * 2, atol=2e-2, rtol=1e-2)  # half precision in, float32 out
    assert found.dtype == torch.float32


@pytest.mark.parametrize(("dims", "patch"), [(4, (4, 4)), (2, (4, 4, 4)), (3, (4, 4))])
def test_wrong_arguments(dims, patch):
    with pytest.raises(ValueError, match="dims must be 2 or 3"):
        predict_logits(pointwise(2), torch.zeros(2, 4, 4, 4), dims=dims, patch=patch)
