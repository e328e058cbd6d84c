"""Verification scores, one a file; each is a `Score` (see `score`)."""
