"""Float64 reference of every operator, written from its semantics: slow, obvious, independent of the implementations.

``compute`` is the dtype of the arithmetic. float64 gives the answer; the tensors' own dtype the same arithmetic in low
precision, whose error sets the tolerance (tolerance.py).
"""
