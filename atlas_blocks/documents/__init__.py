"""Documents packed along one row."""
