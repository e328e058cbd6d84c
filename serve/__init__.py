"""The hall: forecasts over HTTP."""
