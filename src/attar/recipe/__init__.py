"""The recipe: one frozen model per stage, and the only place where defaults stand."""

from attar.recipe.agent import AgentRecipe
from attar.recipe.base import Evaluate, MachinePrice, Recipe, ShipIf
from attar.recipe.chat import ChatRecipe
from attar.recipe.classify import ApiPrice, ClassifyEvaluate, ClassifyRecipe
from attar.recipe.load import load_recipe, parse_recipe
from attar.recipe.record import Record

__all__ = [
    "AgentRecipe",
    "ApiPrice",
    "ChatRecipe",
    "ClassifyEvaluate",
    "ClassifyRecipe",
    "Evaluate",
    "MachinePrice",
    "Recipe",
    "Record",
    "ShipIf",
    "load_recipe",
    "parse_recipe",
]
