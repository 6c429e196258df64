"""What was published for a recipe at a length, what lies between two lengths, and what nobody has published."""

import math

import pytest

from config import RECIPES
from engine.run.published import FFCV_16_CURVE, POINTS, SEED_RUN, published_curve, published_result


@pytest.mark.parametrize(
    ("recipe", "epochs", "top1"),
    [
        ("fast", 16, 73.76),
        ("long", 88, 78.43),
        ("mild", 29, 76.19),
        ("mild", 60, 78.1),
        ("medium", 60, 78.1),
        ("medium", 240, 79.5),
        ("seed", 100, 59.21),
    ],
)
def test_a_published_accuracy_is_given_as_it_is(recipe, epochs, top1):
    result = published_result(recipe, epochs)
    assert (result.top1, result.between) == (top1, ())
    assert result.source


def test_between_two_published_lengths_it_is_linear_in_the_logarithm_of_the_epochs_and_marked():
    result = published_result("medium", 120)  # the middle of 60 and 240 in logarithms
    assert result.top1 == pytest.approx((78.1 + 79.5) / 2)
    assert result.between == (60, 240)
    result = published_result("mild", 40)
    assert result.top1 == pytest.approx(76.19 + (78.1 - 76.19) * math.log(40 / 29) / math.log(60 / 29))
    assert "mosaicml/benchmarks" in result.source and "databricks.com" in result.source
    assert published_result("fast", 60).between == (40, 88)


@pytest.mark.parametrize(
    ("recipe", "epochs"),
    [("fast", 15), ("fast", 89), ("mild", 28), ("mild", 61), ("medium", 59), ("medium", 241), ("hot", 270), ("demo", 8)],
)
def test_beyond_the_published_lengths_nothing_is_said(recipe, epochs):
    assert published_result(recipe, epochs) is None
    assert published_curve(recipe, epochs) is None


def test_a_curve_is_the_published_one_or_the_last_epochs_point():
    assert published_curve("fast", 16) == (FFCV_16_CURVE, "FFCV, 16 epochs")
    assert published_curve("seed", 100)[0] == SEED_RUN["curve"]
    assert published_curve("mild", 60) == ({60: 78.1}, "the last epoch alone")
    points, name = published_curve("medium", 120)
    assert list(points) == [120]
    assert name == "the last epoch alone, interpolated between 60 and 240 epochs"


def test_each_published_recipe_is_one_of_the_projects():
    assert POINTS.keys() <= RECIPES.keys()
