"""The Omega rule: a memory optimised over a sliding window of tokens.

Read in this order: rule.py, what is computed; reference.py, token by token; definition.py, whole
chunks at a time, by chunks.py, walk.py and online.py; backward.py; one_token.py; op.py, the rule as
an op of torch, with inline.py and step_op.py. What can be brought from outside has a table each:
memories.py, objectives.py, updates.py, feature_maps.py.
"""
