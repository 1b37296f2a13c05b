import pytest

from attar.evaluate.stats import Estimate
from attar.evaluate.verdict import break_even, cost_per_request, cost_ratio, verdict
from attar.recipe import ApiPrice, ClassifyEvaluate, MachinePrice


def test_it_ships_on_the_lower_end_and_not_on_the_point():
    settings = ClassifyEvaluate()
    good = {"retention": Estimate(0.95, 0.91, 0.99), "speedup": Estimate(9, 8, 10), "cost_ratio": Estimate(20, 15, 25)}
    assert verdict(settings, good)[0] == "ship"
    for name, low in (("retention", 0.89), ("speedup", 4.9), ("cost_ratio", 9.9)):
        spoiled = {**good, name: Estimate(good[name].value, low, good[name].hi)}
        decision, reasons = verdict(settings, spoiled)
        assert decision == "hold"
        assert sum("does not reach" in reason for reason in reasons) == 1


def test_costs_by_hand():
    machine = ClassifyEvaluate(machine=MachinePrice(usd_per_hour=3.6, source="s", date="d"))
    assert cost_per_request(machine, [0.5, 1.0], None) == pytest.approx([0.0005, 0.001])
    api = ClassifyEvaluate(teacher_api=ApiPrice(input_usd_per_million_tokens=2.0, output_usd_per_million_tokens=8.0))
    # 500 tokens in, one out
    assert cost_per_request(api, [0.5], 500.0) == pytest.approx([(500 * 2 + 8) / 1e6])
    ratio = cost_ratio(machine, [0.002, 0.002], [0.0001, 0.0001], seed=0)
    assert ratio.value == pytest.approx(20)


def test_break_even_by_hand():
    assert break_even(0.01, 0.002, 1.0)["requests"] == 125
    never = break_even(0.001, 0.002, 1.0)
    assert never["requests"] is None
    assert "never pays back" in never["note"]
