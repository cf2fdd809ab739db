"""Judge a checkpoint as an inference engine would, from tables and rules of its own.

Called by `checking`, on a checkpoint or on the plan of one. It shares no rule with the code that plans and writes: it must
never import `planning` or `names.fusion`, since a mistake made twice would never be found.
"""
