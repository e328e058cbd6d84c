"""Forecasters that do not learn, one a file; each is a `metnet.forecaster.Forecaster`."""
