import numpy as np
import pytest
from scipy.special import log_softmax

from attar.errors import RecipeError, RunError
from attar.recipe import parse_recipe
from attar.signals.calibration import Calibration, _bias_to_prior, fit_calibration
from attar.signals.labels import LabelQuestion

LABELS = ["a", "b", "c"]


def recipe(**teacher):
    content = {"labels": LABELS, "pool": "p.jsonl", "test": "t.jsonl"}
    base = {"model": "x:Y", "prompts": [{"template": "{{ text }}"}]}
    if teacher.get("calibration") not in ("none", "contextual"):
        base["prior"] = "uniform"
    return parse_recipe({"name": "n", "task": "classify", "data": content, "teacher": {**base, **teacher}}, "here")


def test_a_prior_that_nothing_would_use_is_refused():
    with pytest.raises(RecipeError, match="calibration contextual uses no prior"):
        recipe(calibration="contextual", prior="uniform")


def scores(n=3000, words=2, noise=1.5, seed=0):
    """Raw scores [n, 1, 3 * words] with a preference for label 0, directions that hold more than one word, and gold."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 3, n)
    signal = np.eye(3)[gold].repeat(words, axis=1) * 2.0
    # What all words of two labels share moves them together and says nothing about the label.
    shared = rng.normal(size=(n, 1)) * noise
    raw = signal + rng.normal(size=(n, 3 * words)) * 0.7
    raw[:, :words] += 3.0 + shared
    return raw[:, None].astype(np.float32), gold, [i for i in range(3) for _ in range(words)]


def accuracy(log_probs, gold):
    return float((log_probs.argmax(-1) == gold).mean())


def test_bias_reaches_the_prior():
    rng = np.random.default_rng(0)
    logits = rng.normal(loc=[2.0, 0.0, -1.0, 0.5], size=(500, 4))
    prior = np.array([0.4, 0.3, 0.2, 0.1])
    shares = np.exp(log_softmax(logits + _bias_to_prior(logits, prior), axis=-1)).mean(0)
    np.testing.assert_allclose(shares, prior, atol=1e-8)


def test_it_survives_json_and_gives_distributions():
    calibration = Calibration(np.array([[0.1, -0.3], [0.2, 1 / 3]]), np.array([0.5, -0.5]))
    raw = np.array([[[-1.0], [-3.0]], [[0.5], [2.0]]], dtype=np.float32)
    result = calibration.apply(raw)
    np.testing.assert_allclose(np.exp(result).sum(1), 1)
    assert (Calibration.from_json(calibration.to_json()).apply(raw) == result).all()


def test_none_is_the_mean_of_a_labels_words_over_the_prompts_by_hand():
    raw = np.array([[[-1.0, -3.0, -2.0, -5.0], [-2.0, -2.0, -1.0, -1.0]]], dtype=np.float32)
    fitted = fit_calibration(recipe(calibration="none"), [0, 0, 1, 2], raw, raw, np.full(3, 1 / 3))
    # label 0: mean of (-2, -2) over the prompts; 1: mean of (-2, -1); 2: mean of (-5, -1)
    np.testing.assert_allclose(fitted.apply(raw), log_softmax([[-2.0, -1.5, -3.0]], axis=-1))


def test_contextual_makes_inputs_without_content_even():
    raw, _, owners = scores(50, words=1)
    fitted = fit_calibration(recipe(calibration="contextual"), owners, raw, raw[:1], np.full(3, 1 / 3))
    np.testing.assert_allclose(np.exp(fitted.apply(raw[:1])), 1 / 3)


def test_batch_gives_the_pool_the_prior_and_the_labels_their_due():
    raw, gold, owners = scores()
    plain = fit_calibration(recipe(calibration="none"), owners, raw, raw, np.full(3, 1 / 3)).apply(raw)
    fitted = fit_calibration(recipe(calibration="batch"), owners, raw, raw, np.full(3, 1 / 3)).apply(raw)
    np.testing.assert_allclose(np.exp(fitted).mean(0), 1 / 3, atol=1e-6)
    assert accuracy(plain, gold) < 0.6
    assert accuracy(fitted, gold) > accuracy(plain, gold) + 0.1


def test_prototypes_see_what_moves_together():
    raw, gold, owners = scores()
    prior = np.full(3, 1 / 3)
    batch = fit_calibration(recipe(calibration="batch"), owners, raw, raw, prior).apply(raw)
    fitted = fit_calibration(recipe(calibration="prototypical"), owners, raw, raw, prior)
    found = fitted.apply(raw)
    np.testing.assert_allclose(np.exp(found).mean(0), prior, atol=1e-4)
    assert accuracy(found, gold) > accuracy(batch, gold) + 0.02
    fresh, fresh_gold, _ = scores(seed=1)
    assert accuracy(fitted.apply(fresh), fresh_gold) == pytest.approx(accuracy(found, gold), abs=0.03)


def test_prototypes_refuse_a_label_that_nothing_is_like():
    raw, _, owners = scores(60)
    with pytest.raises(RunError, match="label number 2 has fewer than one"):
        fit_calibration(recipe(calibration="prototypical"), owners, raw, raw, np.array([0.5, 0.5 - 1e-9, 1e-9]) / (1.0))


def test_words_of_a_label_are_scored_and_the_first_is_shown():
    question = LabelQuestion(
        recipe(
            label_words={"b": ["bee", "buzz"]},
            prompts=[{"template": "{{ words.b }} {{ text }}", "examples": []}],
        )
    )
    assert question.scored == ["a", "bee", "buzz", "c"]
    assert question.owners == [0, 1, 1, 2]
    assert question.prompts("x")[0][0].text == "bee "


def test_one_word_for_two_labels_is_refused():
    with pytest.raises(RecipeError, match=r"teacher\.label_words: bee stands for more than one label"):
        recipe(label_words={"a": "bee", "b": ["buzz", "bee"]})
    with pytest.raises(RecipeError, match="repeated: bee"):
        recipe(label_words={"b": ["bee", "bee"]})
