"""Op contracts: what torch.compile, export and FLOP counters see of functional/."""
