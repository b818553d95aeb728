"""Files of ``torch.save``, read without executing anything in them.

A pickle is a program for a small stack machine, and the machine of Python's standard library imports and calls what the
program names. The one here knows the few instructions that ``torch.save`` writes, imports nothing and calls nothing: tensors
become :class:`StoredTensor` (where their numbers lie in the file), objects of the classes it is told of become
:class:`Inert` (their name and attributes), and everything else is refused by name. Numbers are read later, in blocks, so that a
file may be larger than memory.

Read it in this order, each module uses only those before it: how a file is refused (:mod:`messages`), tensors whose numbers are
still in it (:mod:`tensors`), the machine (:mod:`machine`), and the two formats around it (:mod:`formats`).
"""

from pizoo.pickles.formats import read_pickled
from pizoo.pickles.machine import Inert
from pizoo.pickles.tensors import StoredTensor

__all__ = ["Inert", "StoredTensor", "read_pickled"]
