"""Show what a conversion did: a page, a table, and a comparison of two outputs.

Called by the commands `report` and `compare`. It reads what mfptq left beside an output, no weight, and draws with
matplotlib (extra `plot`).
"""
