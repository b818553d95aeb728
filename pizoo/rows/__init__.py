"""Rows: what a growing layer is made of, and the only thing training adds to it.

A growing layer stores M rows ``(A_m, B_m, amult_m)``. Training appends rows and never changes those stored, apart from
weight decay (one running factor for all of them) and momentum (which moves ``amult``). Room is reserved ahead, so that
appending b rows costs b rows however many there are.

Read it in this order, each module uses only those before it: what rows of a dtype hold (:mod:`dtypes`), where rows are kept
(:mod:`storage`), those that a step is about to append (:mod:`pending`), the parameters that have them for a gradient
(:mod:`parameters`), and the rows of a layer as a module of torch's (:mod:`module`).
"""

from pizoo.rows.dtypes import converted, directed, row_scale, scaled
from pizoo.rows.module import Rows, growing_layers, rows_problem
from pizoo.rows.parameters import GrowingWeight, RowsParameter
from pizoo.rows.pending import NO_TENSOR, PendingRows, product_norm_of_grams, rows_norm_of_grams
from pizoo.rows.storage import Place, Reserved, Share, check_place, empty_rows, stored_columns

__all__ = [
    "NO_TENSOR",
    "GrowingWeight",
    "PendingRows",
    "Place",
    "Reserved",
    "Rows",
    "RowsParameter",  # layers pickled when this was one module name it here
    "Share",
    "check_place",
    "converted",
    "directed",
    "empty_rows",
    "growing_layers",
    "product_norm_of_grams",
    "row_scale",
    "rows_norm_of_grams",
    "rows_problem",
    "scaled",
    "stored_columns",
]
