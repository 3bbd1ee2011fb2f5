"""Depth order and series from one walk of the autograd graph of a training output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from torch.autograd.graph import Node
else:
    Node: TypeAlias = object

# A graph of more nodes (a recurrence unrolled over thousands of steps) is not worth the seconds: registration order.
MAX_NODES = 200_000


@dataclass(frozen=True, slots=True)
class Depth:
    """Where parameters lie between the loss and the inputs, by ``id(parameter)``."""

    distance: Mapping[int, int]
    """Longest path, in operations, from the output to the operation that uses the parameter."""
    series: frozenset[int]
    """Parameters whose operation lies on every path from the output to the first operations."""


@dataclass(slots=True, eq=False)
class _Graph:
    """The part of the graph between the output and the parameters.

    *Leaves* of a node are the parameters that reach it through nothing but their own preparation (a transpose, a
    cast, a weight norm). All other nodes form the *trunk*: the path of the data.
    """

    order: list[Node]
    leaves: dict[Node, list[int]] = field(default_factory=dict)
    trunk: dict[Node, list[Node]] = field(default_factory=dict)


def walk(outputs: Iterable[Tensor], layer_of: Mapping[int, str]) -> Depth | None:
    """Find depth and series of the parameters in `layer_of` (``id`` to layer name); None if the graph does not tell.

    A compiled model has one node for all of its operations, and a graph can be too large to walk.
    """
    roots = [output.grad_fn for output in outputs if output.grad_fn is not None]
    order = _topological(roots)
    if not order or any("CompiledFunction" in node.name() for node in order):
        return None
    graph = _Graph(order)
    owned = _classify(graph, layer_of)
    if not owned:
        return None
    distance = _longest_paths(graph)
    cut = _cut_nodes(graph, roots)
    return Depth(
        distance={leaf: max(distance[node] for node in nodes) for leaf, nodes in owned.items()},
        series=frozenset(leaf for leaf, nodes in owned.items() if any(node in cut for node in nodes)),
    )


def _children(node: Node) -> list[Node]:
    return [child for child, _ in node.next_functions if child is not None]


def _topological(roots: Iterable[Node]) -> list[Node]:
    """Every node after all nodes that lead to it: the output first; empty if there are too many."""
    post: list[Node] = []
    seen: set[Node] = set()
    for root in roots:
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            node, done = stack.pop()
            if done:
                post.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack.extend((child, False) for child in _children(node))
        if len(seen) > MAX_NODES:
            return []
    return post[::-1]


def _classify(graph: _Graph, layer_of: Mapping[int, str]) -> dict[int, list[Node]]:
    """Split the nodes into leaves and trunk; return the trunk nodes that use each parameter."""
    owned: dict[int, list[Node]] = {}
    for node in reversed(graph.order):
        variable = getattr(node, "variable", None)
        if variable is not None:
            if id(variable) in layer_of:
                graph.leaves[node] = [id(variable)]
            continue
        children = [child for child in _children(node) if child in graph.leaves or child in graph.trunk]
        leaves = [leaf for child in children for leaf in graph.leaves.get(child, ())]
        data = [child for child in children if child in graph.trunk]
        complete = all(child is not None for child, _ in node.next_functions)
        if leaves and not data and complete and len({layer_of[leaf] for leaf in leaves}) == 1:
            graph.leaves[node] = leaves
        elif leaves or data:
            graph.trunk[node] = data
            for leaf in leaves:
                owned.setdefault(leaf, []).append(node)
    return owned


def _longest_paths(graph: _Graph) -> dict[Node, int]:
    distance = dict.fromkeys(graph.trunk, 0)
    for node in graph.order:
        for child in graph.trunk.get(node, ()):
            distance[child] = max(distance[child], distance[node] + 1)
    return distance


def _cut_nodes(graph: _Graph, roots: Iterable[Node]) -> set[Node]:
    """Nodes on every path through the trunk: no edge passes them by in the topological order."""
    nodes = [node for node in graph.order if node in graph.trunk]
    position = {node: index for index, node in enumerate(nodes)}
    edges = [(-1, position[root]) for root in roots if root in position]
    for node in nodes:
        below = [position[child] for child in graph.trunk[node]]
        edges.extend((position[node], end) for end in below or [len(nodes)])
    passing = [0] * (len(nodes) + 1)
    for start, end in edges:
        passing[start + 1] += 1
        passing[end] -= 1
    cut, spanning = set(), 0
    for index, node in enumerate(nodes):
        spanning += passing[index]
        if spanning == 0:
            cut.add(node)
    return cut
