"""Judge a checkpoint as an inference engine would, from tables and rules of its own.

Called by `checking` and by planning of conversions. It shares no rule with the code that plans and writes: it must
never import `planning` or `names.fusion`, since a mistake made twice would never be found.
"""
