"""The nn.Modules users compose: y, state = block(x, state=None)."""
