"""`retention bench`: how fast power retention is here, beside what one would use instead.

`problem.py` and `timing.py` import torch alone: `upstream.py` uses them in a process of its own,
where the name ``retention`` means another package.
"""
