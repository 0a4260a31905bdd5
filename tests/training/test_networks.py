"""Networks by name: what is filled in, what a dry run shows, which layers are a decoder's, and clear errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medkd_fast.training.errors import WrongUse
from medkd_fast.training.networks import (
    all_outputs,
    build_network,
    check_network,
    multiply_accumulates,
    network_names,
    parameter_count,
    parse_arguments,
    parse_value,
    survey,
)

# by name: arguments, and the decoder from coarse to fine, {layer: (channels, size for an input of 64)}
NETWORKS = {
    "BasicUNet": (
        {"features": [4, 4, 8, 16, 32, 6]},
        {"upcat_4": (16, 8), "upcat_3": (8, 16), "upcat_2": (4, 32), "upcat_1": (6, 64)},
    ),
    "UNet": (
        {"channels": [4, 8, 16, 32], "strides": [2, 2, 2], "num_res_units": 2},
        {"model.1.submodule.1.submodule.2": (8, 16), "model.1.submodule.2": (4, 32)},
    ),
    "DynUNet": (
        {
            "kernel_size": [3, 3, 3, 3],
            "strides": [1, 2, 2, 2],
            "upsample_kernel_size": [2, 2, 2],
            "filters": [4, 8, 16, 32],
            "deep_supervision": True,
            "deep_supr_num": 2,
        },
        {"upsamples.0": (16, 16), "upsamples.1": (8, 32), "upsamples.2": (4, 64)},
    ),
    "SegResNet": ({}, {"up_layers.0": (32, 16), "up_layers.1": (16, 32), "up_layers.2": (8, 64)}),
    "SegResNetDS": (
        {"init_filters": 8, "dsdepth": 3},
        {"up_layers.0.blocks": (32, 16), "up_layers.1.blocks": (16, 32), "up_layers.2.blocks": (8, 64)},
    ),
    "AttentionUnet": (
        {"channels": [4, 8, 16], "strides": [2, 2]},
        {"model.1.submodule.1.merge": (8, 32), "model.1.merge": (4, 64)},
    ),
    "UNETR": (
        {"feature_size": 8, "hidden_size": 48, "num_heads": 4, "mlp_dim": 96},
        {"decoder5": (64, 8), "decoder4": (32, 16), "decoder3": (16, 32), "decoder2": (8, 64)},
    ),
    "SwinUNETR": (
        {"feature_size": 12},
        {"decoder5": (96, 4), "decoder4": (48, 8), "decoder3": (24, 16), "decoder2": (12, 32), "decoder1": (12, 64)},
    ),
}


def built(name: str, dims: int = 2, size: int = 64, classes: int = 3, **arguments) -> nn.Module:
    patch = (size,) * dims
    return build_network(name, arguments, dims=dims, in_channels=2, num_classes=classes, patch=patch, seed=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_decoder_of_common_networks_is_found(name):
    arguments, decoder = NETWORKS[name]
    found = check_network(built(name, **arguments), name, (2, 2, 64, 64), 3)
    assert {x.name: (x.channels, x.size[0]) for x in found.decoder()} == decoder


def test_the_decoder_in_3d_with_anisotropic_strides():
    arguments = dict(NETWORKS["DynUNet"][0], kernel_size=[[1, 3, 3], 3, 3, 3], strides=[1, [1, 2, 2], 2, 2])
    arguments["upsample_kernel_size"] = [[1, 2, 2], 2, 2]
    found = check_network(built("DynUNet", dims=3, size=32, **arguments), "DynUNet", (2, 2, 32, 32, 32), 3)
    assert [x.size for x in found.decoder()] == [(16, 8, 8), (32, 16, 16), (32, 32, 32)]


def test_a_network_that_keeps_its_size_has_no_decoder_but_layers_to_choose_from():
    found = survey(built("HighResNet"), (1, 2, 64, 64))
    assert found.decoder() == []
    assert len(found.candidates()) == 12 and all(x.size == (64, 64) for x in found.candidates())


def test_a_dry_run_changes_nothing():
    network = built("UNet", channels=[4, 8], strides=[2], norm="batch", dropout=0.5).eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    state = torch.get_rng_state()
    survey(network, (2, 2, 64, 64))
    assert not network.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert network(torch.ones(1, 2, 64, 64)).shape == (1, 3, 64, 64)  # still real tensors


def test_weights_come_from_the_seed_alone():
    a = built("BasicUNet", features=[4] * 6).state_dict()
    torch.rand(5)
    state = torch.get_rng_state()
    b = built("BasicUNet", features=[4] * 6).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_network_of_your_own(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n"
        "def thin(in_channels, num_classes, width=3):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.Conv2d(width, num_classes, 1))\n"
        "number = 3\n"
        "def none():\n    return None\n"
    )
    monkeypatch.chdir(tmp_path)
    network = built("my_networks:thin", width=5)
    assert network[0].weight.shape == (5, 2, 3, 3) and network[1].weight.shape == (3, 5, 1, 1)
    for name, message in (
        ("my_networks:thick", "has no attribute 'thick'; give module:callable"),
        ("their_networks:thin", "No module named 'their_networks'"),
        ("my_networks:number", "is no class or function but a int"),
        ("my_networks:none", "gave a NoneType: it must return a torch.nn.Module"),
    ):
        with pytest.raises(WrongUse, match=message):
            built(name)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("BasicUnit", {}, r"no network 'BasicUnit' in monai.networks.nets \(near it: BasicUNet"),
        ("BasicUNet", {"widths": 3}, "unexpected keyword argument 'widths'; its arguments are features, act, norm"),
        ("UNet", {}, "missing 2 required .* 'channels' and 'strides'"),
        ("torch", {}, "no network 'torch'"),
    ],
)
def test_networks_that_cannot_be_built(name, arguments, message):
    with pytest.raises(WrongUse, match=message) as error:
        built(name, **arguments)
    assert "\n" not in str(error.value)


def test_networks_that_do_not_fit_the_patch(capfd):
    with pytest.raises(
        WrongUse, match=r"BasicUNet does not run on patches of \(8, 8\) with 2 channel.*another --patch"
    ):
        check_network(built("BasicUNet", features=[4] * 6), "BasicUNet", (2, 2, 8, 8), 3)
    with pytest.raises(WrongUse, match=r"gives logits \(2, 3, 64, 64\) .* wanted \(2, 4, 64, 64\)"):
        check_network(built("BasicUNet", features=[4] * 6), "BasicUNet", (2, 2, 64, 64), 4)
    assert capfd.readouterr().err == ""  # no traceback of torch's own


def test_arguments_as_text():
    text = [
        "features=16,16,32",
        "norm=('group', {'num_groups': 4})",
        "strides=[[1,2,2],2]",
        "act=relu",
        "deep=true",
        "p=.5",
    ]
    assert parse_arguments(text) == {
        "features": [16, 16, 32],
        "norm": ["group", {"num_groups": 4}],
        "strides": [[1, 2, 2], 2],
        "act": "relu",
        "deep": True,
        "p": 0.5,
    }
    assert parse_value("window,zscore") == ["window", "zscore"] and parse_value("none") is None
    for pairs, message in ((["features"], "write key=value"), (["a=1", "a=2"], "a is given twice")):
        with pytest.raises(WrongUse, match=message):
            parse_arguments(pairs)


def test_the_finest_of_several_outputs_comes_first():
    fine, coarse = torch.rand(1, 2, 8, 8), torch.rand(1, 2, 4, 4)
    for output in ([coarse, fine], (fine, coarse, torch.tensor(1.0))):
        first, second = all_outputs(output, dims=4)
        assert first is fine and second is coarse
    assert all_outputs({"out": fine, "aux": coarse}, dims=4)[0] is fine
    stacked = all_outputs(torch.stack([fine, 2 * fine], 1), dims=4)
    assert torch.equal(stacked[0], fine) and torch.equal(stacked[1], 2 * fine)


def test_the_deepest_output_of_a_nested_unet_comes_first():
    network = built("BasicUNetPlusPlus", features=[4] * 6, deep_supervision=True)
    image = torch.rand(1, 2, 64, 64)
    caught = []
    network.final_conv_0_4.register_forward_hook(lambda m, i, o: caught.append(o))
    assert network(image)[0] is caught[0]


def test_sizes():
    network = nn.Conv2d(2, 3, 3, padding=1)
    assert parameter_count(network) == 2 * 3 * 9 + 3
    assert multiply_accumulates(network, (1, 2, 8, 8)) == 2 * 3 * 9 * 64
    assert {"BasicUNet", "SwinUNETR"} <= set(network_names())
