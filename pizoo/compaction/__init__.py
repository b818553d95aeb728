"""Fewer rows, the same function: a net that nobody can carry as one small file."""
