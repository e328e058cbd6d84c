"""`FORWARD`: which computation weights were learned by."""

FORWARD = 1
"""Raised by whoever changes what any network forecasts from the same weights.

Weights mean something to the computation alone that they were learned by: another one takes them without an
error, and forecasts other rain. Each model's card tells this number, and one of another number is refused.
"""
