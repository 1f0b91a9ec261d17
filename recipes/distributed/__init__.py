"""Training in several processes, which torchrun starts: see docs/distributed.md.

layout: how many ranks do what. parallel: the model over them. tensor, sequence: heads, and parts of
the text, on ranks of their own. folders: checkpoints that all ranks write and any number reads.
"""
