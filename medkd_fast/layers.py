"""What layers of a network put out while it runs: found by name, caught by forward hooks."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

#: The keys that networks with several outputs use for the one that is judged.
OUTPUT_KEYS = ("logits", "out")


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside `DistributedDataParallel` and `torch.compile`, whose layers have their own names."""
    while True:
        if isinstance(network, nn.DataParallel):
            raise TypeError(
                "DataParallel runs copies of a network, whose layers nobody sees; use DistributedDataParallel"
            )
        if isinstance(network, nn.parallel.DistributedDataParallel):
            network = network.module
        elif isinstance(inner := getattr(network, "_orig_mod", None), nn.Module):
            network = inner
        else:
            return network


def find_layers(network: nn.Module, pattern: str, whose: str) -> list[str]:
    """The layers of a network that a name or a wildcard means, in the network's order; "" is the network itself.

    `*`, `?` and `[...]` stand for characters between two dots: "decoder.*" is every child of decoder, not their children.

    >>> network = nn.ModuleDict({"up": nn.ModuleList([nn.ReLU(), nn.ReLU()]), "head": nn.ReLU()})
    >>> find_layers(network, "up.*", "student"), find_layers(network, "head", "student")
    (['up.0', 'up.1'], ['head'])
    """
    names = [name for name, _ in network.named_modules()]
    if pattern in (name for name, _ in network.named_modules(remove_duplicate=False)):  # by any of its names
        return [pattern]
    parts = pattern.split(".")
    found = [name for name in names if name and _matches(name.split("."), parts)]
    if not found:
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[1:6]
        raise ValueError(
            f"{whose}: there is no layer {pattern!r}; near it: {', '.join(near) or 'none'}. "
            "`for name, layer in network.named_modules()` lists them all"
        )
    return found


def _matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(name) == len(pattern) and all(fnmatchcase(n, p) for n, p in zip(name, pattern, strict=True))


def finest(output: Any, dims: int | None = None) -> torch.Tensor:
    """The map of what a layer puts out: a tensor, or of a list, tuple, dictionary or dataclass the one with most pixels, the first of
    equals.

    Dictionaries with "logits" or "out" mean that entry. dims: dimensions of the network's input, [B, C, *S]; a tensor with one
    more is deep supervision as [B, outputs, C, *S], the finest first.

    >>> finest([torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)]).shape
    torch.Size([1, 2, 8, 8])
    """
    if isinstance(output, torch.Tensor):
        return output[:, 0] if dims is not None and output.dim() == dims + 1 else output
    parts = _parts(output)
    if isinstance(parts, Mapping):
        for key in OUTPUT_KEYS:
            if key in parts:
                return finest(parts[key], dims)
    maps = _maps(output)
    if not maps:
        raise ValueError(f"a layer gave {type(output).__name__} without a map [B, C, *S]; name one that gives a map")
    return finest(max(maps, key=_pixels), dims)


def _parts(output: Any) -> Any:
    """What is inside: of a dataclass its fields by name."""
    inside = dataclasses.is_dataclass(output) and not isinstance(output, Mapping | type)
    return vars(output) if inside else output


def _tensors(output: Any) -> Iterable[torch.Tensor]:
    parts = _parts(output)
    if isinstance(parts, torch.Tensor):
        yield parts
    elif isinstance(parts, list | tuple | Mapping):
        for part in parts.values() if isinstance(parts, Mapping) else parts:
            yield from _tensors(part)


def _maps(output: Any) -> list[torch.Tensor]:
    return [x for x in _tensors(output) if x.dim() >= 3 and x.is_floating_point()]


def _pixels(x: torch.Tensor) -> int:
    pixels = 1
    for size in x.shape[2:]:
        pixels *= size
    return pixels


class Caught:
    """What a network took and what its layers put out in its last run. Copies and pickles of it are empty."""

    def __init__(self, whose: str, in_eval: bool = False) -> None:
        self.whose = whose
        self.in_eval = in_eval  # catches in eval mode too
        self.running = False
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.answered = False  # others have run on these inputs since
        self.outputs: dict[str, Any] = {}
        self.versions: dict[str, dict[int, int]] = {}  # of the tensors in the outputs, by their id
        self.warned: set[tuple[str, str]] = set()

    def start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.clear()
        self.inputs = args, kwargs

    def clear(self) -> None:
        self.inputs, self.outputs, self.versions, self.answered = None, {}, {}, False

    def keep(self, name: str, output: Any) -> None:
        if not torch.compiler.is_compiling():
            if name in self.outputs:
                self._warn(
                    name,
                    "ran more than once in one run of the network, and what it gave last is compared; give every place a layer of "
                    "its own, or name another layer",
                )
            # inference tensors have no version
            self.versions[name] = {id(x): x._version for x in _tensors(output) if not x.is_inference()}
        self.outputs[name] = output

    def has_graph(self) -> bool:
        """Whether what the network itself put out has a gradient."""
        return any(x.requires_grad for x in _tensors(self.outputs.get("")))

    def map(self, name: str) -> torch.Tensor:
        """The map [B, C, *S] of a layer; of the network itself by ""."""
        if name not in self.outputs:
            raise RuntimeError(
                f"{self.whose}: the layer {name!r} did not run with the network; name one that does; replace layers (as SyncBatchNorm "
                "does) before the distiller is made and compile a network after it; torch._dynamo.reset() drops what was compiled for "
                "another network of the same class"
            )
        inputs = (*self.inputs[0], *self.inputs[1].values()) if self.inputs else ()
        images = next((x for x in inputs if isinstance(x, torch.Tensor)), None)
        found = finest(self.outputs[name], images.dim() if images is not None and not name else None)
        if not torch.compiler.is_compiling():
            self._warn_of_equals(name, found)
            before = self.versions.get(name, {}).get(id(found))
            if before is not None and found._version != before:
                self._warn(
                    name,
                    "gave a tensor that was changed in place afterwards, as ReLU(inplace=True) does, and the changed one is "
                    "compared; name the layer that changes it, or make that with inplace=False",
                )
        # of a tensor that carries more, as MONAI's with its affine, the values
        return found if type(found) is torch.Tensor else torch.Tensor.as_subclass(found, torch.Tensor)

    def _warn_of_equals(self, name: str, found: torch.Tensor) -> None:
        output = self.outputs[name]
        if isinstance(output, list | tuple) and sum(x.shape == found.shape for x in _maps(output)) > 1:
            self._warn(
                name,
                f"gave several maps of {tuple(found.shape)}, of which the first is compared; name the layer of another",
            )

    def _warn(self, name: str, what: str) -> None:
        if (name, what) not in self.warned:
            self.warned.add((name, what))
            warnings.warn(f"{self.whose}: the layer {name!r} {what}", stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        return Caught(self.whose, self.in_eval).__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class Start:
    """A hook before a network runs. Its layers are caught until it has run: what gradient checkpointing runs later is not."""

    def __init__(self, caught: Caught) -> None:
        self.caught = caught

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.caught.running = network.training or self.caught.in_eval
        if self.caught.running:
            self.caught.start(args, kwargs)


class Catch:
    """A hook after a layer, or after the network itself, whose name is ""."""

    def __init__(self, caught: Caught, name: str) -> None:
        self.caught, self.name = caught, name

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self.caught.running:
            self.caught.keep(self.name, output)
            self.caught.running = self.name != ""


def attach(network: nn.Module, names: Iterable[str], caught: Caught) -> list[RemovableHandle]:
    """Hooks on these layers and on the network itself, which hold what they catch and nothing else."""
    handles = [network.register_forward_pre_hook(Start(caught), with_kwargs=True)]
    for name in dict.fromkeys([*names, ""]):
        handles.append(network.get_submodule(name).register_forward_hook(Catch(caught, name)))
    return handles
