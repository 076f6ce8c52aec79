"""Which provider of ONNX Runtime took each node of a graph, and whether that is the one that was asked for.

ONNX Runtime gives a node for which a provider has no kernel to another provider, in the end to its own on the CPU, and
says nothing. Here that is an error, or a warning where the caller prefers.

What may be left out are nodes that give nothing but integers and booleans, as the graph file tells their types: shapes,
positions, masks of a few values. Providers of GPUs leave those to the CPU on purpose, next to the code that allocates
memory by them. A node that the graph file does not have comes out of the definition of an operator that no provider has
a kernel for, which ONNX Runtime then computes by its definition (GroupNormalization on CUDA); such nodes have neither
names nor types, and may be left out where their operator is one of BODIES.

ONNX Runtime's own switch for this, `session.disable_cpu_ep_fallback`, is not set: it refuses the arithmetic of shapes
too, which leaves no graph with dynamic sizes for CUDA, and does not say which nodes it means.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from .errors import BackendError, InputError, PlacementError
from .graph_types import whole_number_nodes

Placement = Literal["fail", "warn"]
OPTION = "placement"
RECORD = "session.record_ep_graph_assignment_info"  # ONNX Runtime's setting
BODIES = frozenset({"Shape", "Size", "Concat", "Div"})  # of shapes, in the definition of GroupNormalization
EXAMPLES = 3

log = logging.getLogger("kandrt")


@dataclass(frozen=True)
class Placed:
    """A node and the provider that has it."""

    provider: str
    operator: str
    name: str


def placement(name: str, text: str) -> Placement:
    """Read the option; raises InputError where it is neither "fail" nor "warn"."""
    if text not in ("fail", "warn"):
        raise InputError(f"{name}: option {OPTION!r}: expected 'fail' or 'warn', found {text!r}")
    return cast("Placement", text)


def placed(session: Any) -> list[Placed]:
    """The nodes of an `onnxruntime.InferenceSession` that was opened with RECORD.

    Raises BackendError where the installed onnxruntime cannot tell.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise BackendError(
            "the installed onnxruntime cannot tell which provider has which node, 1.31 can; "
            "run: pip install --upgrade onnxruntime"
        )
    return [
        Placed(part.ep_name, f"{node.domain}.{node.op_type}".lstrip("."), node.name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def left_out(nodes: Sequence[Placed], provider: str, whole_numbers: frozenset[str]) -> list[Placed]:
    """The nodes that compute and that another provider has; `whole_numbers` names those that only give integers."""
    others = (node for node in nodes if node.provider != provider)
    return [node for node in others if not (node.name in whole_numbers if node.name else node.operator in BODIES)]


def check_placement(name: str, session: Any, graph: Path, provider: str, mode: Placement) -> None:
    """See that `provider` has every node of a component that computes.

    Otherwise raises PlacementError, or with mode "warn" logs a warning: operators, how many of each, and which.
    """
    nodes = placed(session)
    left = left_out(nodes, provider, whole_number_nodes(graph))
    if not left:
        return
    kinds = Counter(node.operator for node in left)
    examples = {kind: [node.name for node in left if node.operator == kind and node.name] for kind in kinds}
    listing = "; ".join(f"{count} {kind}{some(examples[kind])}" for kind, count in kinds.most_common())
    where = ", ".join(sorted({node.provider for node in left}))
    message = f"{name}: {provider} has no kernels for {len(left)} of {len(nodes)} nodes, {where} has them: {listing}"
    if mode == "fail":
        raise PlacementError(f"{message}; use another backend, or accept this with option {OPTION}=warn")
    log.warning(message)


def some(names: Sequence[str]) -> str:
    """The first of several names, in brackets."""
    shown = ", ".join(names[:EXAMPLES]) + (", …" if len(names) > EXAMPLES else "")
    return f" ({shown})" if shown else ""
