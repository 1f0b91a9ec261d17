"""Newton-Schulz: a matrix brought near its orthogonal factor."""
