"""Model cards: an entry's README, with its evaluation results in the Hub's own metadata.

What a card says follows from the kind of its entry: a net measured on test images (:mod:`images`; a kernel there too), on
tasks (:mod:`tasks`), or by its features on another data set (:mod:`transfer`).
"""

from pizoo.cards.page import card_text, check_recipe, refresh, write_card, write_config
from pizoo.cards.record import data_sets, title
from pizoo.cards.text import duration, markdown_table, mean_and_error, words

__all__ = [
    "card_text",
    "check_recipe",
    "data_sets",
    "duration",
    "markdown_table",
    "mean_and_error",
    "refresh",
    "title",
    "words",
    "write_card",
    "write_config",
]
