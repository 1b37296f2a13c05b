"""Any number of processes trains the same student: losses, weights and checkpoints against a run of one."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attar.errors import UsageError
from attar.train.batches import SharedBatches
from attar.train.sharding import check_launch
from devices import Case, Outcome

HERE = Path(__file__).parent
ALL, FIRST, LAST = range(1, 21), range(1, 7), range(11, 21)
RAM = {"cpu_ram_efficient_loading": True}
APART = {"transformer_cls_names_to_wrap": ["LlamaDecoderLayer", "Linear"]}
PLAN = [
    Case("one"),
    Case("ddp", "ddp"),
    Case("fsdp", "fsdp"),
    Case("one-untied", tied=False, steps=6),
    Case("fsdp-untied", "fsdp", tied=False, steps=6),
    Case("one-hidden", source="hidden", steps=6),
    Case("ddp-hidden", "ddp", source="hidden", steps=6),
    Case("one-module", source="module"),
    Case("ddp-module", "ddp", source="module"),
    Case("ddp-written", "ddp", source="written"),
    Case("ddp-written-on", "ddp", source="written", resume="ddp-written"),
    Case("one-written-on", source="written", resume="ddp-written"),
    Case("fsdp-written", "fsdp", source="written", steps=1),
    Case("one-from-ddp", resume="ddp"),
    Case("ddp-from-one", "ddp", resume="one"),
    Case("fsdp-one", "fsdp-one", steps=10),
    Case("fsdp-from-fsdp-one", "fsdp", resume="fsdp-one"),
    Case("fsdp-one-from-fsdp", "fsdp-one", resume="fsdp"),
    Case("other-steps", resume="ddp", batches_per_step=2),
    Case("fsdp-ram", "fsdp", steps=6, plugin=RAM),
    Case("fsdp-half", "fsdp", source="hidden", steps=2, half=True),
    Case("fsdp-apart", "fsdp", tied=False, steps=1, plugin=APART),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    plan = folder / "plan.json"
    plan.write_text(json.dumps([asdict(case) for case in PLAN]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, str(HERE / "devices.py"), str(folder), str(plan)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {case.name: Outcome(folder / case.name) for case in PLAN}


def check(found, wanted, steps):
    """Losses, gradients and evaluations of these steps."""
    values = found.values(steps)
    # The norms of single objectives are asked of one process's batch, and not of sharded weights.
    reference = {key: value for key, value in wanted.values(steps).items() if key in values}
    assert len(reference) >= 4 * len(steps)
    for key, value in reference.items():
        assert values[key] == pytest.approx(value, abs=1e-8), key
    for ours, theirs in zip(losses(found, steps), losses(wanted, steps), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-6)


def losses(outcome, steps):
    """The Trainer's own figure, which it sums in float32."""
    return [log["loss"] for log in outcome.logs if log["step"] in steps and "loss" in log]


def same_weights(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-8, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("name", "wanted", "steps"),
    [
        ("ddp", "one", ALL),
        ("fsdp", "one", ALL),
        ("fsdp-untied", "one-untied", FIRST),
        ("ddp-hidden", "one-hidden", FIRST),
        ("ddp-module", "one-module", ALL),
        ("one-from-ddp", "one", LAST),
        ("ddp-from-one", "one", LAST),
        ("ddp-written-on", "ddp-written", LAST),
        ("fsdp-from-fsdp-one", "one", LAST),
        ("fsdp-one-from-fsdp", "one", LAST),
    ],
)
def test_processes_do_not_change_what_is_learned(outcomes, name, wanted, steps):
    check(outcomes[name], outcomes[wanted], steps)
    same_weights(outcomes[name].saved, outcomes[wanted].saved)
    same_weights(outcomes[name].student, outcomes[wanted].student)


def test_the_reference_learns_something(outcomes):
    assert losses(outcomes["one"], ALL)[-1] < losses(outcomes["one"], ALL)[0] - 0.2
    assert outcomes["one"].shares == [1.0, 1.0]


def test_the_loss_is_the_weighted_sum_of_the_means_over_all_processes(outcomes):
    for log in outcomes["ddp"].logs:
        if "loss" in log:
            each = 0.5 * log["loss_response"] + log["loss_logit"] + 0.3 * log["loss_feature_mse"]
            assert log["loss"] == pytest.approx(each, abs=2e-6)


def test_fsdp_shards_student_and_teacher(outcomes):
    student, teacher = outcomes["fsdp"].shares
    assert 0.45 < student < 0.55
    assert 0.45 < teacher < 0.55


def test_checkpoints_hold_what_is_trained_alone_and_tied_weights_once(outcomes):
    for name in ("one", "ddp", "fsdp"):
        keys = outcomes[name].saved.keys()
        assert not [key for key in keys if "teacher" in key]
        assert "student.model.embed_tokens.weight" in keys
        assert "student.lm_head.weight" not in keys


def test_weights_that_one_process_loads_for_all_stay_tied(outcomes):
    check(outcomes["fsdp-ram"], outcomes["one"], FIRST)


def test_mixed_precision_does_not_round_what_is_logged(outcomes):
    half, whole = outcomes["fsdp-half"], outcomes["one-hidden"]
    assert half.values([1])[1, "loss_logit"] == pytest.approx(whole.values([1])[1, "loss_logit"], rel=0.05)
    for key, value in half.values([1, 2]).items():
        if key[1].startswith("loss_"):
            assert value != float(torch.tensor(value).bfloat16()), key


def test_a_step_of_other_batches_is_refused(outcomes):
    assert "took 4 batches" in outcomes["other-steps"].error
    assert "set gradient_accumulation_steps to 4" in outcomes["other-steps"].error


def test_each_process_writes_for_itself(outcomes):
    one, other = (outcomes["ddp-written"].written(rank) for rank in (0, 1))
    assert one
    assert other
    assert not [ids for ids in one if ids in other]
    logs = [log for log in outcomes["ddp-written"].logs if "on_policy_tokens" in log]
    # two of a step's four batches, of two processes
    assert all(log["on_policy_length"] <= 6 for log in logs)
    assert all(0 < log["on_policy_time"] < 1 for log in logs)


def test_what_other_processes_wrote_is_not_guessed(outcomes):
    assert "on_policy-0-of-1.safetensors is wanted" in outcomes["one-written-on"].error


def test_sharded_students_do_not_write(outcomes):
    assert "sharded: True" in outcomes["fsdp-written"].error


def test_a_head_that_is_sharded_by_itself_is_refused(outcomes):
    assert outcomes["fsdp-apart"].error.startswith("CapabilityError: the weights of the head, (48, 16)")


def accelerator(plugin, **more):
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), **more)


def test_launches_that_would_run_as_something_else_are_refused():
    with pytest.raises(UsageError, match="fsdp_version is 1"):
        check_launch(accelerator(SimpleNamespace(fsdp_version=1)), asked_fsdp=True)
    cpus = {"num_processes": 2, "distributed_type": "MULTI_CPU", "device": torch.device("cpu")}
    with pytest.raises(UsageError, match="asks for FSDP and accelerate runs MULTI_CPU"):
        check_launch(accelerator(None, **cpus), asked_fsdp=True)
    check_launch(accelerator(None, **cpus), asked_fsdp=False)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_held_out_batches_are_dealt_out_once_each(processes):
    batches = [[0, 1], [2], [3, 4], [5], [6]]
    dealt = [SharedBatches(batches, processes, rank) for rank in range(processes)]
    assert len({len(part) for part in dealt}) == 1
    assert sorted(batch for part in dealt for batch in list(part)[: part.own]) == sorted(batches)
