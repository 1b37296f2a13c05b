"""Read inner layers of any module, by dotted path.

A path names a module, then what of it:

    path  = names ["@" call] [":input"] {"[" key "]"}
    names = name {"." name}, as in ``named_modules``; nothing for the module itself

=============================  ==========================================================================
``model.layers.9``             the layer's output, which has to be a tensor
``model.layers.-1``            the last of a ModuleList or Sequential
``encoder.*.attn``             each that matches, under its own name; * is anything within one name
``encoder.layer.3[0]``         of a tuple or list, its first
``decoder[hidden][-1]``        of a dict, dataclass or named tuple; then the last of what is there
``cache['0']``                 a quoted key is a text even if it looks like a number
``lm_head:input``              its first positional argument
``attn:input[1]``              its second one; ``attn:input[hidden_states]`` is a keyword argument
``block@1``                    the second call of a module that one forward calls several times
=============================  ==========================================================================

Wrappers are not part of a path: what DistributedDataParallel, FSDP, torch.compile and checkpoint_wrapper put around a
module, at the top or inside, is looked through. A forward is one call of the module given (or of its ``called`` part).
Calls that a backward makes, as gradient checkpointing does, are not seen.

What cannot be read: a module whose weights are used without calling it (``out_proj`` of nn.MultiheadAttention); inside
torch.compile, a module whose graph was compiled before the taps were put on it, as compiled code does not look for new
hooks; replicas of DataParallel; tensors of re-entrant checkpointing and of inference mode. All of these raise.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attar.errors import UsageError

__all__ = ["Tap", "Taps", "resolve"]

_PATH = re.compile(
    r"""(?P<names> [^@:\[\]]* )
        (?P<rest> (?: @ (?P<call>\d+) )? (?P<input> :input )? (?P<keys> (?: \[ [^\[\]]+ \] )* ) )""",
    re.VERBOSE,
)
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Tap:
    """One tensor to be read in a forward."""

    name: str
    """the path as given; of a glob, with the match's own names"""
    module: str
    """the dotted path of its module, wrappers left out"""
    call: int | None
    """which call within a forward, from 0; None where there shall be only one"""
    of_input: bool
    keys: tuple[str | int, ...]
    """what is taken of the output, or of the arguments (by position or name), one after another"""


def resolve(module: nn.Module, paths: Iterable[str]) -> tuple[Tap, ...]:
    """The taps that the paths name, in order, each once.

    Raises:
        UsageError: a path cannot be read or names nothing; the message gives the nearest names.
    """
    return tuple(tap for tap, _ in _located(module, paths))


class Taps(Mapping[str, Tensor]):
    """Reads tensors in each forward of a module, while the ``with`` block lasts.

    >>> with Taps(student, ["model.layers.3", "model.layers.-1"]) as taps:
    ...     student(**batch)
    ...     hidden = taps["model.layers.3"]

    A tensor is the very one that flows through the module: with its graph, and as it was (one that is overwritten in
    place later in the forward is refused). Only those of the last forward are held, and none after the block.

    Args:
        module: any module, wrapped or not.
        paths: what to read; the module's docstring has the grammar.
        called: the path of the inner module that is called in place of ``module``: "model" where a causal language
            model's head is left out. Other paths are still those of ``module``.

    Raises:
        UsageError: a path cannot be read or names nothing; in a forward, a path that names no tensor, or one that
            was made without the gradients that the forward has.
    """

    def __init__(self, module: nn.Module, paths: Iterable[str], *, called: str = "") -> None:
        located = _located(module, paths)
        if not located:
            raise UsageError("paths is empty; wanted at least one")
        [(start, root), *others] = _located(module, [called])
        if others or start != Tap(called, start.module, None, False, ()):
            raise UsageError(f"called is {called!r}; wanted the path of one module, without a selector")
        self._root = root
        self._label = f"{type(_inner(module)).__name__}{'.' if called else ''}{start.module}"
        self._points = {tap.name: _Point(tap, hooked) for tap, hooked in located}
        self._seen: dict[str, _Seen] = {}
        self._handles: list[RemovableHandle] = []
        self._forwards = 0
        self._running = self._gradients = False

    def __enter__(self) -> Taps:
        if self._handles:
            raise UsageError("these taps are already in use; leave their with block first, or make others")
        self._forwards = 0
        self._handles.append(self._root.register_forward_pre_hook(self._start))
        for point in self._points.values():
            if point.tap.of_input:
                handle = point.module.register_forward_pre_hook(self._input_hook(point), with_kwargs=True)
            else:
                handle = point.module.register_forward_hook(self._output_hook(point))
            self._handles.append(handle)
        # Registered last: a tap on the root itself is read before the forward is over.
        self._handles.append(self._root.register_forward_hook(self._stop, always_call=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()
        self._running = False

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of the last forward.

        Raises:
            UsageError: no such tap; there has been no forward; it was not reached in it; it was called several times
                and the path does not say which; it was overwritten.
        """
        if name not in self._points:
            raise UsageError(f"there is no tap {name!r}; nearest: {_nearest(name, self._points)}")
        if not self._handles:
            raise UsageError(f"{name!r} is read outside the with block of its taps, where no tensor is held")
        if not self._forwards:
            raise UsageError(f"{name!r} is read before a forward of {self._label}, the module that is to be called")
        tap, calls = self._points[name].tap, self._points[name].calls
        if calls > 1 and tap.call is None:
            path, rest = tap.module, name[len(_PATH.fullmatch(name)["names"]) :]  # type: ignore[index]
            raise UsageError(
                f"{name!r} was called {calls} times in one forward; say which call, from {path}@0{rest} to "
                f"{path}@{calls - 1}{rest}"
            )
        if name not in self._seen:
            if calls:
                raise UsageError(f"{name!r} was called {calls} times in this forward; wanted a call below that, from 0")
            raise UsageError(
                f"{name!r} was not reached in the last forward of {self._label}: this forward left it out, or used its "
                "weights without calling it, or ran code compiled before the taps were put on (enter Taps before the "
                "first compiled forward, or call torch.compiler.reset())"
            )
        tensor, version = self._seen[name]
        if version is not None and tensor._version != version:
            raise UsageError(
                f"{name!r} was overwritten in place later in the forward, by a ReLU(inplace=True) perhaps; turn that "
                "off, or tap the module that overwrites it"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def __contains__(self, name: object) -> bool:
        return name in self._points

    def _start(self, module: nn.Module, args: Any) -> None:
        if _in_backward():
            return
        self._seen.clear()
        for point in self._points.values():
            point.calls = 0
        self._forwards += 1
        self._running, self._gradients = True, torch.is_grad_enabled()

    def _stop(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running = False

    def _output_hook(self, point: _Point) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._see(point, output)

        return hook

    def _input_hook(self, point: _Point) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(point, {**dict(enumerate(args)), **kwargs})

        return hook

    def _see(self, point: _Point, value: Any) -> None:
        if not self._running or _in_backward():
            return
        if point.calls == (point.tap.call or 0):
            self._seen[point.tap.name] = self._take(point.tap, value)
        point.calls += 1

    def _take(self, tap: Tap, value: Any) -> _Seen:
        for key in tap.keys:
            value = _item(tap, value, key)
        if not isinstance(value, Tensor):
            hint = " (a model computes attention weights with attn_implementation='eager')" if value is None else ""
            raise UsageError(f"{tap.name!r} is no tensor but {_listed(value)}; add a selector{hint}")
        if self._gradients and not torch.is_grad_enabled():
            raise UsageError(
                f"{tap.name!r} was made without gradients inside a forward that has them: set use_reentrant=False for "
                "gradient checkpointing; where no gradient is wanted, run the whole forward under torch.no_grad()"
            )
        if torch.compiler.is_compiling():
            # A compiled graph does not count versions, so what overwrites it later would go unseen.
            return _Seen(value.clone(), None)
        if value.is_inference():
            raise UsageError(
                f"{tap.name!r} is a tensor of inference mode, which no loss can use; run the forward under "
                "torch.no_grad() instead"
            )
        return _Seen(value, value._version)


@dataclass(eq=False)
class _Point:
    """Where the hook of a tap stands."""

    tap: Tap
    module: nn.Module
    calls: int = 0
    """in this forward"""


class _Seen(NamedTuple):
    tensor: Tensor
    version: int | None
    """how often it had been overwritten; None where that is not known"""


def _in_backward() -> bool:
    """Whether autograd is at work, so that this call repeats one of the forward."""
    # Inside a compiled graph the question cannot be asked, and hooks are not run again.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _located(module: nn.Module, paths: Iterable[str]) -> list[tuple[Tap, nn.Module]]:
    """Each tap, and the module that its hook goes on."""
    if isinstance(paths, str):
        raise UsageError(f"paths is {paths!r}; wanted a list of paths")
    found: dict[str, tuple[Tap, nn.Module]] = {}
    for path in paths:
        parsed = _PATH.fullmatch(path)
        names = parsed["names"] if parsed else ""
        pattern = names.split(".") if names else []
        if parsed is None or "" in pattern:
            raise UsageError(f"{path!r} is no path; wanted names[@call][:input][[key]], as in model.layers.-1@0[0]")
        matches = list(_matches(module, pattern))
        if not matches:
            raise UsageError(_missing(module, path, pattern))
        keys = tuple(_key(text) for text in re.findall(r"\[([^\[\]]+)\]", parsed["keys"]))
        call = None if parsed["call"] is None else int(parsed["call"])
        for own, hooked in matches:
            name = ".".join(own) + parsed["rest"] if "*" in names else path
            of_input = parsed["input"] is not None
            tap = Tap(name, ".".join(own), call, of_input, keys or ((0,) if of_input else ()))
            found[name] = tap, _outside_compiled(hooked)
    return list(found.values())


def _key(text: str) -> str | int:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    quoted = re.fullmatch(r"""(['"])(.*)\1""", text)
    return quoted[2] if quoted else text


def _matches(module: nn.Module, pattern: Sequence[str]) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """What the names match, each with its own names."""
    if not pattern:
        yield (), module
        return
    children, head = _children(module), pattern[0]
    names = [head] if head in children else []
    if "*" in head:
        any_of = re.compile(".*".join(map(re.escape, head.split("*"))))
        names = [name for name in children if any_of.fullmatch(name)]
    elif re.fullmatch(r"-\d+", head) and isinstance(_inner(module), nn.ModuleList | nn.Sequential):
        names = list(children)[int(head) :][:1] if -int(head) <= len(children) else []
    for name in names:
        for rest, found in _matches(children[name], pattern[1:]):
            yield (name, *rest), found


def _missing(module: nn.Module, path: str, pattern: Sequence[str]) -> str:
    depth = next(n for n in range(len(pattern) - 1, -1, -1) if any(_matches(module, pattern[:n])))
    own, parent = next(_matches(module, pattern[:depth]))
    children = list(_children(parent))
    shown = ", ".join(children[:8]) + (f", ... {children[-1]} ({len(children)} in all)" if len(children) > 8 else "")
    owner = ".".join(own) or "it"
    return (
        f"{path!r} names no module of {type(_inner(module)).__name__}: {owner} has no {pattern[depth]!r} but "
        f"{shown or 'no parts'}; nearest: {_nearest('.'.join(pattern), _names(module))}"
    )


def _nearest(name: str, names: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, list(names), n=3, cutoff=0.4)) or "none"


def _names(module: nn.Module) -> Iterator[str]:
    for name, child in _children(module).items():
        yield name
        yield from (f"{name}.{rest}" for rest in _names(child))


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in _inner(module)._modules.items() if child is not None}


def _unwrap(module: nn.Module) -> nn.Module | None:
    """What one wrapper holds; None where the module is no wrapper."""
    if isinstance(module, nn.DataParallel):
        raise UsageError("DataParallel runs copies of the module in threads; use DistributedDataParallel")
    if isinstance(module, nn.parallel.DistributedDataParallel):
        wrapped: nn.Module = module.module
        return wrapped
    return next((module._modules[name] for name in _WRAPPED if name in module._modules), None)


def _inner(module: nn.Module) -> nn.Module:
    while (wrapped := _unwrap(module)) is not None:
        module = wrapped
    return module


def _outside_compiled(module: nn.Module) -> nn.Module:
    """The inner module; but a compiled one with its wrapper, whose hooks run outside the compiled code."""
    while "_orig_mod" not in module._modules and (wrapped := _unwrap(module)) is not None:
        module = wrapped
    return module


def _item(tap: Tap, value: Any, key: str | int) -> Any:
    """value[key], or its attribute where it is a dataclass or a named tuple."""
    if isinstance(value, Mapping):
        try:
            return value[key]  # a ModelOutput takes numbers as well
        except (KeyError, IndexError):
            pass
    elif isinstance(value, tuple | list) and isinstance(key, int):
        if -len(value) <= key < len(value):
            return value[key]
    elif key in _fields(value):
        return getattr(value, str(key))
    raise UsageError(f"{tap.name!r}: [{key}] is not in {_listed(value)}")


def _fields(value: Any) -> tuple[str, ...]:
    if dataclasses.is_dataclass(value):
        return tuple(one.name for one in dataclasses.fields(value))
    return tuple(getattr(value, "_fields", ()))


def _listed(value: Any) -> str:
    """What there is to choose from."""
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif fields := _fields(value):
        parts = [(name, getattr(value, name)) for name in fields]
    elif isinstance(value, tuple | list):
        parts = list(enumerate(value))
    else:
        return _kind(value)
    return f"{type(value).__name__} of " + (", ".join(f"[{key}] {_kind(part)}" for key, part in parts) or "nothing")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"Tensor {tuple(value.shape)}"
    return "None" if value is None else type(value).__name__
