"""Softmax attention over a sliding window, or over everything."""
