"""Networks by name and arguments, what they give for a patch, and their size in figures."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from monai.networks import nets
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from medkd_fast.layers import finest
from medkd_fast.training.errors import WrongUse


def build_network(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    dims: int,
    in_channels: int,
    num_classes: int,
    patch: Sequence[int],
    seed: int,
) -> nn.Module:
    """A network that takes [B, in_channels, *S] and gives logits [B, num_classes, *S], its weights drawn from `seed` alone.

    name: a class of `monai.networks.nets`, or "module:callable" (the current folder is searched too). arguments: its own. What
    it takes by the names spatial_dims, in_channels, out_channels, num_classes and img_size is filled in.
    num_classes: with the background. patch: the spatial size of what it will be trained on.

    Raises WrongUse for a network that does not exist, or arguments that it does not take.

    >>> network = build_network(
    ...     "BasicUNet", {"features": [4, 4, 8, 16, 32, 4]}, dims=2, in_channels=1, num_classes=9, patch=(32, 32), seed=0
    ... )
    >>> network(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 9, 32, 32])
    """
    make = find_network(name)
    given = {
        "spatial_dims": dims,
        "in_channels": in_channels,
        "out_channels": num_classes,
        "num_classes": num_classes,
        "img_size": list(patch),
    }
    takes = inspect.signature(make).parameters
    values = {k: v for k, v in given.items() if k in takes} | dict(arguments or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = make(**values)
        except Exception as error:  # whatever a network's constructor raises, its arguments are to blame
            want = ", ".join(str(p).split(":")[0].split("=")[0] for p in takes.values() if p.name not in given)
            raise WrongUse(f"network {name} with {values}: {_first_line(error)}; its arguments are {want}") from error
    if not isinstance(network, nn.Module):
        raise WrongUse(f"network {name} gave a {type(network).__name__}: it must return a torch.nn.Module")
    if isinstance(network, nets.BasicUNetPlusPlus):
        network.register_forward_hook(_most_refined_first)
    return network


def find_network(name: str) -> Callable[..., Any]:
    """The class or function that a name means. Raises WrongUse with the nearest names where there is none."""
    module, colon, attribute = name.partition(":")
    if not colon:
        found = getattr(nets, name, None)
        if not inspect.isclass(found) or not issubclass(found, nn.Module):
            near = difflib.get_close_matches(name, network_names(), n=3, cutoff=0.4)
            raise WrongUse(
                f"no network {name!r} in monai.networks.nets{f' (near it: {chr(44).join(near)})' if near else ''}: "
                "give one of its classes, or your own as module:callable"
            )
        return found
    if os.getcwd() not in sys.path:  # a console script does not search there
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise WrongUse(
            f"network {name!r}: {error}; give module:callable, importable from the current folder"
        ) from error
    if not callable(found):
        raise WrongUse(f"network {name!r} is no class or function but a {type(found).__name__}")
    return found


def network_names() -> list[str]:
    """MONAI's networks that give as many channels as they are told."""
    return sorted(
        {
            c.__name__
            for c in vars(nets).values()
            if inspect.isclass(c) and issubclass(c, nn.Module) and "out_channels" in inspect.signature(c).parameters
        }
    )


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """`["features=4,4,8,16,32,4", "norm=batch"]` to keyword arguments, as `parse_value` reads each.

    >>> parse_arguments(["features=4,4,8", "norm=batch", "kernel_size=[[3,3],[1,1]]"])
    {'features': [4, 4, 8], 'norm': 'batch', 'kernel_size': [[3, 3], [1, 1]]}
    """
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise WrongUse(f"network argument {pair!r}: write key=value, such as features=16,16,32,64,128,16")
        if key in arguments:
            raise WrongUse(f"network argument {key} is given twice: give it once")
        arguments[key] = parse_value(value)
    return arguments


def parse_value(text: str) -> Any:
    """A Python literal, true, false, none, else the text itself; with commas a list; tuples become lists, as YAML has them.

    >>> parse_value("1e-3"), parse_value("2,2"), parse_value("true"), parse_value("('group', {'num_groups': 4})")
    (0.001, [2, 2], True, ['group', {'num_groups': 4}])
    """
    words = {"true": True, "false": False, "none": None, "null": None}
    text = text.strip()
    if text.lower() in words:
        return words[text.lower()]
    try:
        return _lists(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        if "," in text and not any(c in text for c in "([{'\""):
            return [parse_value(part) for part in text.split(",") if part.strip()]
        return text


@dataclass(frozen=True)
class Layer:
    """A module's output in a dry run: its name, [B, C, *S], and when it began and ended among all others."""

    name: str
    shape: tuple[int, ...]
    began: int
    ended: int
    tensor: int  # which tensor it was: two layers that gave the same one agree

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def size(self) -> tuple[int, ...]:
        return self.shape[2:]

    @property
    def pixels(self) -> int:
        return math.prod(self.size)


@dataclass(frozen=True)
class Survey:
    """What a dry run showed: the layers that gave maps, in the order in which they ended, and the logits' shape."""

    network: nn.Module
    layers: tuple[Layer, ...]
    logits: tuple[int, ...]
    output: frozenset[int]  # the tensors of the network's output

    def __contains__(self, name: str) -> bool:
        return any(layer.name == name for layer in self.layers)

    def __getitem__(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)

    def candidates(self, count: int = 12) -> list[Layer]:
        """The last `count` layers whose maps a loss could compare, of blocks that give the same one the outermost."""
        last = {layer.tensor: layer for layer in self.layers if layer.name and layer.tensor not in self.output}
        return sorted(last.values(), key=lambda layer: layer.ended)[-count:]

    def decoder(self) -> list[Layer]:
        """The decoder's layers from coarse to fine: one a spatial size, what its last block gave there.

        They run after the layer with the fewest pixels and are not part of the head, the module that gives the logits.

        >>> arguments = {"channels": [4, 8, 16, 32], "strides": [2, 2, 2]}
        >>> network = build_network("UNet", arguments, dims=2, in_channels=1, num_classes=3, patch=(32, 32), seed=0)
        >>> [(layer.name, layer.shape) for layer in survey(network, (2, 1, 32, 32)).decoder()]
        [('model.1.submodule.1.submodule.2', (2, 8, 8, 8)), ('model.1.submodule.2', (2, 4, 16, 16))]
        """
        size, classes = self.logits[2:], self.logits[1]
        maps = [
            layer
            for layer in self.layers
            # a whole fraction of the input along every axis, and not pooled to one value (squeeze and excitation)
            if all(a % b == 0 for a, b in zip(size, layer.size, strict=True)) and layer.pixels > 1
        ]
        if not maps:
            return []
        fewest = min(layer.pixels for layer in maps)
        bottleneck = -1  # a network that keeps the input's size has none
        if fewest < math.prod(size):
            bottleneck = max(layer.ended for layer in maps if layer.pixels == fewest)
        after = [layer for layer in maps if layer.began > bottleneck]
        heads = [layer for layer in after if layer.tensor in self.output]
        levels: dict[tuple[int, ...], Layer] = {}
        for layer in after:
            # nor the inside of a block that goes on to another size
            inside = any(_holds(h, layer) for h in heads) or any(
                _holds(block, layer) and block.size != layer.size for block in after
            )
            if inside or not layer.name or layer.channels == 1:
                continue
            # as many channels as classes: logits of deep supervision, if there is something else of this size
            if layer.channels != classes or levels.get(layer.size, layer).channels == classes:
                levels[layer.size] = layer
        # a block and its last part give the same tensor: the block ends last
        return sorted(levels.values(), key=lambda layer: layer.pixels)


def survey(network: nn.Module, shape: Sequence[int], *, training: bool = True) -> Survey:
    """Run a network, in training mode or not, on made-up values [B, C, *S], without computing anything, and see what its layers give.

    The network's weights, statistics and mode stay as they are. Raises what the network raises, for example on a size that
    it does not take.
    """
    layers: list[Layer] = []
    clock = 0
    began: dict[str, int] = {}
    kept: list[Tensor] = []  # what is alive has an identity of its own

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            nonlocal clock
            clock += 1
            began[name] = clock

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal clock
            clock += 1
            if isinstance(output, Tensor) and output.dim() == len(shape) and output.shape[0] == shape[0]:
                kept.append(output)
                layers.append(Layer(name, tuple(output.shape), began[name], clock, id(output)))

        return hook

    handles, before_it = [], network.training
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    try:
        log.setLevel(logging.CRITICAL)  # it prints a traceback of its own before it raises
        for name, module in network.named_modules():
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
        network.train(training)
        output = _dry_run(network, shape)
        logits = finest(output, len(shape))
        outputs = frozenset(id(x) for x in (output if isinstance(output, (list, tuple)) else [output]))
    finally:
        log.setLevel(level)
        network.train(before_it)
        for handle in handles:
            handle.remove()
    return Survey(network, tuple(layers), tuple(logits.shape), outputs)


def check_network(
    network: nn.Module, name: str, shape: Sequence[int], num_classes: int, *, training: bool = True
) -> Survey:
    """The survey of a network. Raises WrongUse where it does not take [B, C, *S], or gives no logits [B, num_classes, *S]."""
    try:
        found = survey(network, shape, training=training)
    except Exception as error:
        raise WrongUse(
            f"network {name} does not run on patches of {tuple(shape[2:])} with {shape[1]} channel(s): "
            f"{_first_line(error)}; choose another --patch or other --network-arg"
        ) from error
    want = (shape[0], num_classes, *shape[2:])
    if found.logits != want:
        raise WrongUse(
            f"network {name} gives logits {found.logits} for patches {tuple(shape)}, wanted {want}: "
            "it must keep the patch's size and give a channel for every class and the background"
        )
    return found


def all_outputs(output: Any, dims: int) -> list[Tensor]:
    """The maps of what a network gave, the finest first: one, or several with deep supervision.

    dims: dimensions of its input, [B, C, *S]; a tensor with one more is [B, outputs, C, *S], as DynUNet stacks them.

    >>> [x.shape[2] for x in all_outputs([torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 8, 8), torch.zeros(())], dims=4)]
    [8, 4]
    """
    if isinstance(output, Tensor) and output.dim() == dims + 1:
        return list(output.unbind(1))
    if not isinstance(output, (list, tuple)):
        return [finest(output, dims)]
    maps = [x for x in output if isinstance(x, Tensor) and x.dim() == dims]
    return sorted(maps, key=lambda x: -x.shape[2:].numel())


def parameter_count(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def multiply_accumulates(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulate operations of the convolutions and matrix products of one forward on an input of `shape`."""
    counter = FlopCounterMode(display=False)
    _dry_run(network, shape, counter)
    return counter.get_total_flops() // 2


def _dry_run(network: nn.Module, shape: Sequence[int], *modes: AbstractContextManager[Any]) -> Any:
    """What a network gives for made-up values [B, C, *S], with nothing computed: shapes alone. `modes` see its operations."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    state = {k: fake.from_tensor(v) for k, v in [*network.named_parameters(), *network.named_buffers()]}
    with ExitStack() as stack:
        for mode in (fake, torch.no_grad(), torch.random.fork_rng(devices=[]), *modes):
            stack.enter_context(mode)
        return torch.func.functional_call(network, state, (torch.zeros(tuple(shape)),))


def _most_refined_first(network: nn.Module, inputs: Any, output: list[Tensor]) -> list[Tensor]:
    """MONAI's BasicUNetPlusPlus lists its nested decoders' outputs from the shallowest to the deepest."""
    return output[::-1]


def _lists(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_lists(v) for v in value]
    return {k: _lists(v) for k, v in value.items()} if isinstance(value, dict) else value


def _holds(block: Layer, layer: Layer) -> bool:
    return block.began <= layer.began and layer.ended <= block.ended


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
