"""Says which provider serves every op node of ours, in forward and backward graphs.

The op chose when it was traced, and its choice is an argument of the node. "auto" keeps it where it
can serve the device, dtypes and widths of the graph, as it cannot where a graph traced for one
device is compiled for another; then it chooses again. A provider's name asks for it everywhere
that the op has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx

from atlas_blocks import check
from atlas_blocks.compile_passes.graph_pass import GraphPass, bound, is_atlas, values
from atlas_blocks.graph import providers
from atlas_blocks.newton_schulz.op import NewtonSchulzCall
from atlas_blocks.omega import inline, one_token, step_op
from atlas_blocks.omega.op import OmegaCall, Settings, describe, unflatten
from atlas_blocks.omega.rule import NAMES as RULE_NAMES


class OpNode(NamedTuple):
    """A node of ours: the op's name, and its arguments with fake tensors."""

    node: fx.Node
    op: str  # as the providers know it, so without "_backward"
    backward: bool
    provider: str
    arguments: dict[str, Any]

    @property
    def call(self) -> Any:
        """What its providers learn of it, None for an op that has none of its own."""
        describe = CALLS.get(self.op)
        return None if describe is None else describe(self.arguments, self.backward)


class LowerOps(GraphPass):
    """Sets the provider of every op node. Raises ValueError where the one asked for cannot serve,
    or comes too late: a rule that was inlined when it was traced has no node of its own.

    A match is a node whose provider was changed.
    """

    name = "lower_ops"

    def __init__(self, mode: str = "auto") -> None:
        known = {name for op in CALLS for name in providers.names(op)}
        check.choice("provider", mode, {"auto", *known})
        self.mode = mode
        # Another provider that is registered may be chosen.
        self.settings = repr((mode, [(op, providers.names(op)) for op in CALLS]))

    def run(self, graph: fx.Graph) -> int:
        matches = 0
        taken = inlined(graph)
        if self.mode not in ("auto", inline.NAME) and taken:
            raise ValueError(
                f"provider: {self.mode!r} cannot serve this call of {taken[0]}: it was traced for "
                f"'inline' (use_provider({self.mode!r}) around the first call traces for it)"
            )
        for found in op_nodes(graph):
            name = self._choice(found)
            if name != found.provider:
                _set_provider(found.node, name)
                matches += 1
        return matches

    def _choice(self, found: OpNode) -> str:
        call = found.call
        if call is None:
            # It hands the name on to the ops inside, and each of those takes it or chooses. What
            # they compute is in no graph that could take it in.
            return found.provider if self.mode in ("auto", inline.NAME) else self.mode
        asked = found.provider if self.mode == "auto" else self.mode
        if asked not in providers.names(found.op):
            asked = found.provider
        if asked == inline.NAME and 0 in found.arguments["tensors"][0].shape[:2]:
            asked = found.provider  # of no token there was nothing to take in
        reason = _refusal(found, asked)
        if reason is None:
            return asked
        if asked == found.provider:
            by_itself = providers.explain_choice(found.op, call).provider
            for name in (by_itself, providers.DEFINITION):
                if _refusal(found, name) is None:
                    return name
        raise ValueError(f"provider: {asked!r} cannot serve this call of {found.op}: {reason}")


def inlined(graph: fx.Graph) -> list[str]:
    """The ops that were taken into the graph when they were traced, by name.

    A walk is left of many tokens' rule; of one token's nothing but where its nodes come from.
    """
    names = ("atlas::omega_walk", "atlas::omega_walk_backward")
    walks = [n for n in graph.nodes if is_atlas(n.target) and n.target._schema.name in names]
    modules = defaultdict(set)  # that call it, by the lines that lead to it
    for node in graph.nodes:
        lines, found, _ = (node.meta.get("stack_trace") or "").partition(one_token.__file__)
        if found:
            stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
            modules[lines] |= {str(list(stack.values())[-1])} if stack else set()
    steps = [
        "omega_rule_step" if step_op.__file__ in lines else "omega_rule"
        for lines, callers in modules.items()
        for _ in callers or [None]
    ]
    return len(walks) * ["omega_rule"] + steps


def op_nodes(graph: fx.Graph) -> list[OpNode]:
    """Every node of ours that has a provider."""
    found = []
    for node in list(graph.nodes):
        target, arguments = node.target, None
        if is_atlas(target):
            arguments = bound(node, target)
        elif str(target).startswith("auto_functionalized") and is_atlas(node.args[0]):
            # An op that writes to its arguments: the decode step.
            target, arguments = node.args[0], dict(node.kwargs)
        if arguments is None or "provider" not in arguments:
            continue
        name = target._schema.name.partition("::")[2]
        op = name.removesuffix("_backward")
        provider = arguments["provider"]
        found.append(OpNode(node, op, op != name, provider, values(arguments)))
    return found


def _refusal(found: OpNode, name: str) -> str | None:
    """Why this provider cannot serve the node, or None where it can."""
    call = found.call
    reason = providers.refusal(found.op, name, call)
    if reason is not None or not call.needs_grad:
        return reason
    traced, other = (providers.find(found.op, n).saves for n in (found.provider, name))
    if traced == other:
        return None
    return (
        f"what the backward is given was traced for {found.provider!r} "
        f"(use_provider({name!r}) around the first call traces for it)"
    )


def _set_provider(node: fx.Node, name: str) -> None:
    if "provider" in node.kwargs:
        node.update_kwarg("provider", name)
        return
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    node.update_arg(names.index("provider"), name)


# --- what the providers learn of a node -------------------------------------------------------


def _settings(arguments: dict[str, Any]) -> Settings:
    names = ("momentum", "packed", "feature_map", "feature_sizes", *RULE_NAMES)
    return Settings.of(*(arguments[name] for name in names))


def _rule_call(arguments: dict[str, Any], backward: bool) -> OmegaCall:
    a = unflatten(arguments["tensors"], _settings(arguments))
    return describe(a, backward or arguments["save"])


def _step_call(arguments: dict[str, Any], backward: bool) -> step_op.StepCall:
    state = arguments.get("state")
    if state is None:  # functionalised: its tensors are among those that are written
        bases, count = arguments["_all_bases"], arguments["_state_length"]
        state = [bases[arguments[f"_state_{i}_base_index"]] for i in range(count)]
    settings = _settings(arguments)
    return step_op.describe_step(step_op.arguments(arguments["tensors"], state, settings))


def _iteration_call(arguments: dict[str, Any], backward: bool) -> NewtonSchulzCall:
    s = arguments["s"]
    rows, columns = (int(n) for n in s.shape[-2:])
    return NewtonSchulzCall(s.device.type, s.dtype, rows, columns, backward, s.device.index)


# By op; "memory_as_context" has no providers, and hands the name to the ops inside it.
CALLS: dict[str, Callable[[dict[str, Any], bool], Any]] = {
    "newton_schulz": _iteration_call,
    "omega_rule": _rule_call,
    "omega_rule_step": _step_call,
}
