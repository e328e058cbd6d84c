"""The workshop: files, time, training, forecasting and verification."""
