"""The precision of the scores of a model that computes in half precision, as it does under autocast."""

from __future__ import annotations

import copy

import torch
from torch.fx.node import Argument, map_aggregate

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.graph import tensor_of
from early_exit.handler.backbone.scores import score_error
from early_exit.handler.backbone.signature import HALF_PRECISION

_MARGIN = 3.0
"""The factor on the error of the probe. Two processors sum in different orders, so both may have an error. The error on
other inputs may be larger than on the probe."""


def rounding_error(backbone: Backbone) -> float:
    """Return how far the scores of two processors may differ because the backbone rounds to half precision.

    The result is 0 if the backbone does not compute in half precision. It is measured on the probe: the same operations
    in float32 give the scores without rounding.
    """
    values = map(tensor_of, backbone.graph.graph.nodes)
    if not any(value is not None and value.dtype in HALF_PRECISION for value in values):
        return 0.0
    exact = copy.deepcopy(backbone.graph).float()
    for node in exact.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, _raised), map_aggregate(node.kwargs, _raised)
    exact.recompile()
    inputs = [x.to(backbone.device) for x in backbone.probe]
    with torch.no_grad():
        rounded = backbone.graph(*inputs)
        unrounded = exact(*(x.float() if x.is_floating_point() else x for x in inputs))
    return _MARGIN * score_error(rounded[0].float(), unrounded[0].float(), backbone.description.scores)


def _raised(argument: Argument) -> Argument:
    """Return float32 for an argument that is a half-precision dtype, and any other argument as it is."""
    return torch.float32 if argument in HALF_PRECISION else argument
