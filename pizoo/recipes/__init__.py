"""Recipes: one YAML file per zoo entry, read into validated, frozen objects; the only place that knows their fields."""

from pizoo.recipes.files import list_recipes, load_recipe, recipes_dir
from pizoo.recipes.messages import RecipeError
from pizoo.recipes.parts import Compact, Constant, Cosine, InfPi, Multistep, Tasks, Train, Transfer
from pizoo.recipes.recipe import Recipe, decisive

__all__ = [
    "Compact",
    "Constant",
    "Cosine",
    "InfPi",
    "Multistep",
    "Recipe",
    "RecipeError",
    "Tasks",
    "Train",
    "Transfer",
    "decisive",
    "list_recipes",
    "load_recipe",
    "recipes_dir",
]
