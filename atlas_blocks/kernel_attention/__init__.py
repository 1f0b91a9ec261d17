"""Attention by the exact kernel of phi*: all tokens of a window as one memory."""
