import contextlib
import gc
import weakref
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from attar.errors import UsageError
from attar.taps import Tap, Taps, resolve


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x, mask=None, *, scale=1.0):
        return self.norm(x + scale * self.attn(x))


class Net(nn.Module):
    """What tests read; ``how`` is called with the block and its input."""

    def __init__(self, how=None):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        self.unused = nn.Linear(4, 4)
        self.how = how or (lambda block, x: block(x))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = self.how(block, x)
        return self.head(x)


def inputs(n=5, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


# paths


def test_a_path_reads_the_output_itself():
    net, x = Net(), inputs()
    with Taps(net, ["embed", "blocks.0", ""]) as taps:
        y = net(x)
        torch.testing.assert_close(taps["embed"], net.embed(x), rtol=0, atol=0)
        torch.testing.assert_close(taps["blocks.0"], net.blocks[0](net.embed(x)), rtol=0, atol=0)
        assert taps[""] is y


@pytest.mark.parametrize(
    ("path", "modules"),
    [
        ("blocks.-1", ["blocks.2"]),
        ("blocks.-3.attn", ["blocks.0.attn"]),
        ("head.-1", ["head.2"]),
        ("blocks.*.attn", ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]),
        ("blocks.*", ["blocks.0", "blocks.1", "blocks.2"]),
        ("*", ["embed", "blocks", "head", "unused"]),
        ("*e*d", ["embed", "head", "unused"]),
        ("*s", ["blocks"]),
        ("blocks.1.*", ["blocks.1.attn", "blocks.1.norm"]),
        ("", [""]),
    ],
)
def test_paths_resolve(path, modules):
    assert [tap.module for tap in resolve(Net(), [path])] == modules


def test_a_star_stays_within_a_name():
    with pytest.raises(UsageError, match=r"'\*\.norm\.x' names no module"):
        resolve(Net(), ["*.norm.x"])
    assert resolve(Net(), ["blocks.*"]) == resolve(Net(), ["blocks.0", "blocks.1", "blocks.2"])
    net = nn.ModuleDict({"a+b": nn.ReLU(), "aab": nn.ReLU()})
    assert [tap.module for tap in resolve(net, ["a+*"])] == ["a+b"]


def test_each_match_is_an_entry_of_its_own():
    net = Net()
    with Taps(net, ["blocks.*.attn:input", "blocks.1.attn:input", "head.-1"]) as taps:
        net(inputs())
        assert list(taps) == ["blocks.0.attn:input", "blocks.1.attn:input", "blocks.2.attn:input", "head.-1"]
        assert len(taps) == 4
        assert {name: tuple(tensor.shape) for name, tensor in taps.items()}["head.-1"] == (5, 2)
        assert not torch.equal(taps["blocks.0.attn:input"], taps["blocks.1.attn:input"])
        assert "head.-1" in taps
        assert "head" not in taps


def test_a_tap_spelled_out():
    assert resolve(Net(), ["blocks.-1@1:input[x]['0'][-2]"]) == (
        Tap("blocks.-1@1:input[x]['0'][-2]", "blocks.2", 1, True, ("x", "0", -2)),
    )
    assert resolve(Net(), ["embed:input"])[0].keys == (0,)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("blocks.0.atn", r"Net: blocks\.0 has no 'atn' but attn, norm; nearest: blocks\.0\.attn, "),
        ("block.0", r"Net: it has no 'block' but embed, blocks, head, unused; nearest: blocks\.0, "),
        ("blocks.3", r"blocks has no '3' but 0, 1, 2;"),
        ("blocks.-4", r"blocks has no '-4' but 0, 1, 2;"),
        ("embed.-1", r"embed has no '-1' but no parts"),
        ("blocks.0.-1", r"blocks\.0 has no '-1' but attn, norm"),
        ("blocks.*.mlp", r"blocks\.0 has no 'mlp'"),
        ("zzzz", "nearest: none"),
        ("blocks..0", "is no path; wanted names"),
        ("embed:output", "is no path"),
        ("embed[0", "is no path"),
        ("embed[]", "is no path"),
        ("embed[0]@1", "is no path"),
        ("embed@-1", "is no path"),
    ],
)
def test_wrong_paths_are_refused(path, message):
    for refused in (resolve, Taps):
        with pytest.raises(UsageError, match=message):
            refused(Net(), [path])


def test_a_long_list_of_names_is_cut():
    with pytest.raises(UsageError, match=r"has no '20' but 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. 11 \(12 in all\)"):
        resolve(nn.Sequential(*[nn.ReLU() for _ in range(12)]), ["20"])


def test_other_wrong_arguments():
    with pytest.raises(UsageError, match="paths is 'embed'; wanted a list"):
        Taps(Net(), "embed")
    with pytest.raises(UsageError, match="paths is empty"):
        Taps(Net(), [])
    for called in ("blocks.*", "embed[0]", "embed:input", "embed@1"):
        with pytest.raises(UsageError, match="called is"):
            Taps(Net(), ["embed"], called=called)


# selectors


@dataclass
class Record:
    hidden: torch.Tensor
    rest: tuple


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.inner = nn.Identity()
        self.inner.forward = function

    def forward(self, x):
        self.inner(x)
        return x


@pytest.mark.parametrize(
    ("function", "selector"),
    [
        (lambda x: (x + 1, x), "[0]"),
        (lambda x: [x, x + 1], "[-1]"),
        (lambda x: {"hidden": x + 1}, "[hidden]"),
        (lambda x: {"hidden": x + 1}, "['hidden']"),
        (lambda x: {"hidden": x + 1}, '["hidden"]'),
        (lambda x: {"0": x + 1}, "['0']"),
        (lambda x: {0: x + 1}, "[0]"),
        (lambda x: Record(x + 1, (x,)), "[hidden]"),
        (lambda x: Record(x, (x, x + 1)), "[rest][1]"),
        (lambda x: Pair(x, x + 1), "[second]"),
        (lambda x: Pair(x, x + 1), "[1]"),
        (lambda x: ({"a": [x, x + 1]}, None), "[0][a][-1]"),
    ],
)
def test_selectors(function, selector):
    net, x = Returns(function), inputs()
    with Taps(net, ["inner" + selector]) as taps:
        net(x)
        assert torch.equal(taps["inner" + selector], x + 1)


@pytest.mark.parametrize(
    ("function", "selector", "message"),
    [
        (
            lambda x: (x, None, 3),
            "",
            r"'inner' is no tensor but tuple of \[0\] Tensor \(5, 3\), \[1\] None, \[2\] int;",
        ),
        (lambda x: {"a": x}, "", r"dict of \[a\] Tensor \(5, 3\); add a selector"),
        (lambda x: Record(x, ()), "", r"Record of \[hidden\] Tensor \(5, 3\), \[rest\] tuple;"),
        (lambda x: Pair(x, x), "", r"Pair of \[first\] Tensor \(5, 3\), \[second\] Tensor"),
        (lambda x: (), "", "tuple of nothing"),
        (lambda x: (x,), "[1]", r"\[1\] is not in tuple of \[0\] Tensor"),
        (lambda x: (x,), "[-2]", r"\[-2\] is not in tuple"),
        (lambda x: (x,), "[a]", r"\[a\] is not in tuple"),
        (lambda x: {"0": x}, "[0]", r"\[0\] is not in dict of \[0\] Tensor"),
        (lambda x: Record(x, ()), "[0]", r"\[0\] is not in Record"),
        (lambda x: x, "[0]", r"\[0\] is not in Tensor \(5, 3\)"),
        (lambda x: (x, None), "[1]", r"is no tensor but None; .*attn_implementation='eager'"),
    ],
)
def test_what_is_no_tensor_is_refused(function, selector, message):
    net = Returns(function)
    with Taps(net, ["inner" + selector]), pytest.raises(UsageError, match=message):
        net(inputs())


def test_inputs():
    net = Net(how=lambda block, x: block(x, x + 7, scale=x.new_tensor(2.0)))
    paths = ["blocks.0:input", "blocks.0:input[0]", "blocks.0:input[1]", "blocks.0:input[scale]", ":input"]
    with Taps(net, paths) as taps:
        x = inputs()
        net(x)
        torch.testing.assert_close(taps["blocks.0:input"], net.embed(x))
        assert taps["blocks.0:input[0]"] is taps["blocks.0:input"]
        assert torch.equal(taps["blocks.0:input[1]"], taps["blocks.0:input"] + 7)
        assert taps["blocks.0:input[scale]"].item() == 2
        assert taps[":input"] is x


def test_inputs_by_keyword_have_to_be_named():
    net = Net(how=lambda block, x: block(x=x))
    with (
        Taps(net, ["blocks.0:input"]),
        pytest.raises(UsageError, match=r"\[0\] is not in dict of \[x\] Tensor \(5, 4\)"),
    ):
        net(inputs())


# several calls


def test_a_module_called_twice_needs_a_call_index():
    net = Net(how=lambda block, x: block(block(x)))
    with Taps(net, ["blocks.0", "blocks.0@0", "blocks.0@1", "blocks.0@1:input", "blocks.0@2", "embed@0"]) as taps:
        for _ in range(2):  # and counting starts anew with each forward
            x = inputs()
            net(x)
            once = net.blocks[0](net.embed(x))
            torch.testing.assert_close(taps["blocks.0@0"], once)
            assert taps["blocks.0@1:input"] is taps["blocks.0@0"]
            torch.testing.assert_close(taps["blocks.0@1"], net.blocks[0](once))
            assert taps["embed@0"].shape == (5, 4)
            with pytest.raises(UsageError, match=r"'blocks\.0' was called 2 times .* from blocks\.0@0 to blocks\.0@1"):
                taps["blocks.0"]
            with pytest.raises(UsageError, match=r"'blocks\.0@2' was called 2 times"):
                taps["blocks.0@2"]


def test_the_cure_is_a_path():
    net = Net(how=lambda block, x: block(block(x)))
    with Taps(net, ["blocks.-1:input[0]"]) as taps:
        net(inputs())
        with pytest.raises(UsageError, match=r"from blocks\.2@0:input\[0\] to blocks\.2@1:input\[0\]"):
            taps["blocks.-1:input[0]"]
    resolve(net, ["blocks.2@0:input[0]"])


def test_a_shared_module_is_counted_under_both_names():
    net = Net()
    net.blocks[2] = net.blocks[0]
    with Taps(net, ["blocks.0", "blocks.2@1"]) as taps:
        net(inputs())
        assert taps["blocks.2@1"].shape == (5, 4)
        with pytest.raises(UsageError, match="was called 2 times"):
            taps["blocks.0"]


# what was not read


def test_what_was_not_reached():
    net = Net()
    with Taps(net, ["unused", "embed"]) as taps:
        with pytest.raises(UsageError, match=r"'embed' is read before a forward of Net"):
            taps["embed"]
        net(inputs())
        with pytest.raises(UsageError, match=r"'unused' was not reached in the last forward of Net"):
            taps["unused"]
        with pytest.raises(UsageError, match=r"no tap 'embd'; nearest: embed"):
            taps["embd"]
    with pytest.raises(UsageError, match="outside the with block"):
        taps["embed"]


def test_a_call_outside_a_forward_is_not_one():
    net = Net()
    with Taps(net, ["embed"]) as taps:
        net(inputs())
        first = taps["embed"]
        net.embed(inputs(seed=1))
        assert taps["embed"] is first


def test_another_module_may_be_the_one_that_is_called():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.out = Net(), nn.Linear(2, 9)

        def forward(self, x):
            return self.out(self.body(x))

    model = Model()
    with Taps(model, ["body.embed", "out"], called="body") as taps:
        model.body(inputs())
        assert taps["body.embed"].shape == (5, 4)
        model.out(torch.zeros(1, 2))
        with pytest.raises(UsageError, match=r"'out' was not reached in the last forward of Model\.body"):
            taps["out"]


def test_what_is_overwritten_in_place_is_refused():
    net = Net()
    net.head[1] = nn.ReLU(inplace=True)
    with Taps(net, ["head.0", "head.1", "head.1:input"]) as taps:
        net(inputs())
        assert (taps["head.1"] >= 0).all()
        for name in ("head.0", "head.1:input"):
            with pytest.raises(UsageError, match=f"{name}' was overwritten in place"):
                taps[name]


# hooks and tensors go


def test_hooks_are_removed():
    net = Net()
    taps = Taps(net, ["blocks.*", "embed:input"])
    assert hooks(net) == 0
    with taps:
        assert hooks(net) == 6
        with pytest.raises(UsageError, match="already in use"), taps:
            pass
        assert hooks(net) == 6
        net(inputs())
    assert hooks(net) == 0
    with pytest.raises(ZeroDivisionError), taps:
        1 / (hooks(net) - 6)
    assert hooks(net) == 0
    with taps:  # and may be used again
        with pytest.raises(UsageError, match="before a forward"):
            taps["embed:input"]
        net(inputs())
        assert taps["embed:input"].shape == (5, 3)


def test_a_forward_that_fails_is_over():
    def fail(block, x):
        if fail.now:
            raise ZeroDivisionError
        return block(x)

    net = Net(how=fail)
    with Taps(net, ["blocks.0"]) as taps:
        fail.now = True
        with pytest.raises(ZeroDivisionError):
            net(inputs())
        net.blocks[0](torch.ones(5, 4))
        with pytest.raises(UsageError, match="not reached"):
            taps["blocks.0"]
        fail.now = False
        net(inputs())
        assert taps["blocks.0"].shape == (5, 4)


def test_only_the_last_forward_is_held():
    net = Net(how=lambda block, x: (block(x), x)[0])
    seen = []
    with Taps(net, ["blocks.0", "blocks.1@0"]) as taps:
        for seed in range(3):
            net(inputs(seed=seed)).sum().backward()
            seen.extend(weakref.ref(tensor) for tensor in (taps["blocks.0"], taps["blocks.1@0"]))
            gc.collect()
            assert [ref() is not None for ref in seen] == [False] * (2 * seed) + [True] * 2
    gc.collect()
    assert all(ref() is None for ref in seen)


def test_the_previous_forward_is_dropped_before_the_next_begins():
    alive = []
    net = Net(how=lambda block, x: alive.append(ref() is not None) or block(x))
    ref = lambda: None  # noqa: E731
    with Taps(net, ["blocks.0"]) as taps:
        net(inputs())
        ref = weakref.ref(taps["blocks.0"])
        alive.clear()
        net(inputs())
    assert alive == [False] * 3


def test_nothing_else_of_an_output_is_held():
    class Two(nn.Module):
        def forward(self, x):
            other = x + 1
            self.ref = weakref.ref(other)
            return x * 2, other

    two = Two()
    net = nn.ModuleDict({"two": two})
    net.forward = lambda x: net["two"](x)[0]
    with Taps(net, ["two[0]"]) as taps:
        net(inputs())
        gc.collect()
        assert two.ref() is None
        assert taps["two[0]"].shape == (5, 3)


# autograd


def test_gradients_flow_through_a_tap():
    net, x = Net(), inputs()
    with Taps(net, ["blocks.1"]) as taps:
        net(x)
        taps["blocks.1"].square().sum().backward()
    expected = Net()
    expected.load_state_dict(net.state_dict())
    expected.blocks[1](expected.blocks[0](expected.embed(x))).square().sum().backward()
    for (name, ours), theirs in zip(net.named_parameters(), expected.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not name.startswith(("embed", "blocks.0", "blocks.1")))
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_teacher_without_gradients():
    net = Net()
    with Taps(net, ["blocks.1"]) as taps, torch.no_grad():
        net(inputs())
    with Taps(net, ["blocks.1"]) as taps:
        with torch.no_grad():
            net(inputs())
        assert not taps["blocks.1"].requires_grad
        with torch.inference_mode(), pytest.raises(UsageError, match=r"inference mode.*torch\.no_grad"):
            net(inputs())


@pytest.mark.parametrize("path", ["blocks.1", "blocks.1.attn", "blocks.1:input", "blocks.1.attn@0"])
def test_checkpointing_changes_nothing(path):
    def gradients(how):
        torch.manual_seed(0)
        net = Net(how)
        with Taps(net, [path]) as taps:
            y = net(inputs())
            tapped = taps[path]
            (y.sum() + tapped.square().sum()).backward()
            assert taps[path] is tapped  # the second run, in the backward, is neither counted nor kept
        return [parameter.grad for parameter in net.parameters()]

    plain = gradients(None)
    recomputed = gradients(lambda block, x: checkpoint(block, x, use_reentrant=False))
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other)


def test_a_checkpointed_forward_runs_again_unseen():
    net = Net()
    with Taps(net, ["embed"]) as taps:
        y = checkpoint(net, inputs(), use_reentrant=False)
        tapped = taps["embed"]
        y.sum().backward()
        assert taps["embed"] is tapped


def test_a_backward_within_a_forward_is_not_seen():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net(lambda block, x: checkpoint(block, x, use_reentrant=False))

        def forward(self, x):
            y = self.net(x).sum()
            torch.autograd.grad(y, list(self.net.embed.parameters()), retain_graph=True)
            return y

    outer = Outer()
    with Taps(outer, ["net.blocks.0.attn"]) as taps:
        outer(inputs())
        assert taps["net.blocks.0.attn"].requires_grad


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused():
    net = Net(lambda block, x: checkpoint(block, x, use_reentrant=True))
    with Taps(net, ["blocks.1"]), pytest.raises(UsageError, match="set use_reentrant=False"):
        net(inputs())
    with Taps(net, ["blocks.1"]) as taps, torch.no_grad():
        net(inputs())
        assert taps["blocks.1"].shape == (5, 4)


# wrappers


@contextlib.contextmanager
def processes():
    from torch.testing._internal.distributed.fake_pg import FakeStore  # a group that sends nothing

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_wrapped(net, wrapped):
    """The paths are those of the inner module; hooks see what it computes."""
    paths = ["embed", "blocks.-1.attn", "blocks.1.attn", "blocks.*", "head:input"]
    assert [tap.module for tap in resolve(wrapped, paths)] == [
        "embed", "blocks.2.attn", "blocks.1.attn", "blocks.0", "blocks.1", "blocks.2", "head",
    ]  # fmt: skip
    with Taps(wrapped, paths) as taps:
        wrapped(inputs())
        torch.testing.assert_close(taps["embed"], net.embed(inputs()))
        assert taps["head:input"] is taps["blocks.2"]
        assert taps["blocks.2"].requires_grad
    assert hooks(net) == 0


def test_distributed_data_parallel():
    with processes():
        net = Net()
        wrapped = nn.parallel.DistributedDataParallel(net)
        check_wrapped(net, wrapped)
        with pytest.raises(UsageError, match=r"'module\.embed' names no module of Net: .*nearest: embed"):
            resolve(wrapped, ["module.embed"])
        with Taps(net, ["embed"]) as taps:  # wrapped after the taps were made
            wrapped(inputs())
            assert taps["embed"].shape == (5, 4)


def test_fsdp():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    with processes():
        net = Net()
        for index in range(3):
            net.blocks[index] = FullyShardedDataParallel(net.blocks[index], device_id=torch.device("cpu"))
        wrapped = FullyShardedDataParallel(net, device_id=torch.device("cpu"))
        with Taps(wrapped, ["embed", "blocks.-1.attn", "blocks.1"]) as taps:
            wrapped(inputs())
            assert [tuple(tensor.shape) for tensor in taps.values()] == [(5, 4)] * 3
        net = Net()
        mesh = init_device_mesh("cpu", (2,))
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
        with Taps(net, ["embed", "blocks.-1.attn", "blocks.1"]) as taps:
            net(inputs())
            assert [tuple(tensor.shape) for tensor in taps.values()] == [(5, 4)] * 3


def test_checkpoint_wrapper():
    net = Net()
    net.blocks[1] = checkpoint_wrapper(net.blocks[1])
    check_wrapped(net, net)


def test_data_parallel_is_refused():
    with pytest.raises(UsageError, match="DataParallel runs copies"):
        resolve(nn.DataParallel(Net()), ["embed"])


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(test):
    # The compiler hides some of its own warnings, which an error gets past.
    return pytest.mark.filterwarnings("ignore")(pytest.mark.usefixtures("compiler")(test))


@compiled
def test_compiled_with_the_taps_on():
    net = Net()
    wrapped = torch.compile(net, backend="eager", fullgraph=True)
    x = inputs()
    assert [tap.module for tap in resolve(wrapped, ["blocks.*"])] == ["blocks.0", "blocks.1", "blocks.2"]
    with Taps(wrapped, ["blocks.0", "head.2:input", ""]) as taps:
        for _ in range(2):
            y = wrapped(x)
            torch.testing.assert_close(taps["blocks.0"], net.blocks[0](net.embed(x)))
            torch.testing.assert_close(
                taps["head.2:input"], net.head[:2](net.blocks[2](net.blocks[1](taps["blocks.0"])))
            )
            assert taps[""] is y
            assert taps["blocks.0"].requires_grad
    assert hooks(net) == hooks(wrapped) == 0


@compiled
def test_compiled_before_the_taps_were_put_on():
    net, x = Net(), inputs()
    wrapped = torch.compile(net, backend="eager")
    wrapped(x)
    with Taps(wrapped, ["blocks.0", ""]) as taps:
        y = wrapped(x)
        assert taps[""] is y
        with pytest.raises(UsageError, match=r"compiled before the taps were put on.*torch\.compiler\.reset"):
            taps["blocks.0"]


@compiled
def test_compiled_in_place():
    net = Net()
    net.compile(backend="eager", fullgraph=True)
    net.blocks[1].compile(backend="eager", fullgraph=True)
    with Taps(net, ["blocks.0", "blocks.1", ""]) as taps:
        for seed in range(2):
            y = net(inputs(seed=seed))
            torch.testing.assert_close(taps["blocks.1"], net.blocks[1](net.blocks[0](net.embed(inputs(seed=seed)))))
            torch.testing.assert_close(taps[""], y)


@compiled
def test_a_compiled_layer_is_read_from_outside():
    net = Net()
    net.blocks[1] = torch.compile(net.blocks[1], backend="eager", fullgraph=True)
    net(inputs())
    with Taps(net, ["blocks.1", "blocks.1:input", "blocks.0"]) as taps:
        net(inputs())
        torch.testing.assert_close(taps["blocks.1"], net.blocks[1](taps["blocks.0"]))
        assert taps["blocks.1:input"] is taps["blocks.0"]


@compiled
def test_what_compiled_code_overwrites_is_read_as_it_was():
    net = Net()
    net.head[1] = nn.ReLU(inplace=True)
    wrapped = torch.compile(net, backend="aot_eager")
    with Taps(wrapped, ["head.0"]) as taps:
        wrapped(inputs())
        assert (taps["head.0"] < 0).any()


# a real model


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_a_causal_language_model(llama):
    ids = torch.tensor([[1, 2, 3, 4]])
    paths = ["model.layers.*", "model.layers.-1.self_attn.k_proj", "model.layers.0.self_attn[0]", "lm_head:input"]
    with Taps(llama, [*paths, "model[last_hidden_state]", "model[0]", "[logits]"]) as taps:
        output = llama(ids, output_hidden_states=True)
        torch.testing.assert_close(taps["model.layers.0"], output.hidden_states[1])
        torch.testing.assert_close(taps["model.layers.1"], output.hidden_states[2])
        assert taps["model.layers.-1.self_attn.k_proj"].shape == (1, 4, 4)
        assert taps["model.layers.0.self_attn[0]"].shape == (1, 4, 8)
        torch.testing.assert_close(taps["lm_head:input"], output.hidden_states[-1])
        assert taps["model[0]"] is taps["model[last_hidden_state]"]
        assert taps["[logits]"] is output.logits


def test_its_gradient_checkpointing(llama):
    ids = torch.tensor([[1, 2, 3, 4]])

    calls = []
    handle = llama.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))

    def gradient():
        llama.zero_grad()
        with Taps(llama, ["model.layers.1", "lm_head:input"]) as taps:
            calls.clear()
            llama(ids)
            (taps["model.layers.1"].square().sum() + taps["lm_head:input"].sum()).backward()
            assert taps["model.layers.1"].requires_grad
        return llama.model.layers[0].mlp.up_proj.weight.grad.clone()

    llama.train()
    plain = gradient()
    for layer in llama.model.layers:  # as the model's own switch does, whose name changes between versions
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    torch.testing.assert_close(gradient(), plain)
    assert len(calls) == 2
    handle.remove()
    for layer in llama.model.layers:
        layer.gradient_checkpointing = False


def test_its_body_alone(llama):
    with Taps(llama, ["model.layers.-1"], called="model") as taps:
        llama.model(torch.tensor([[1, 2, 3]]))
        assert taps["model.layers.-1"].shape == (1, 3, 8)
