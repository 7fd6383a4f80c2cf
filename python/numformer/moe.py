"""Mixture of experts: choose experts, sort tokens by expert, run the experts, sum what they say.

    routing = moe.route(logits, top_k=2)
    y = moe.mlp(x, routing, gate_up, down)              # or, in steps:
    y = moe.combine(experts(moe.dispatch(x, routing)), routing)
    loss = loss + 0.01 * moe.load_balancing_loss(routing)
"""
from numformer.ops.moe import Routing as Routing
from numformer.ops.moe import combine as combine
from numformer.ops.moe import dispatch as dispatch
from numformer.ops.moe import load_balancing_loss as load_balancing_loss
from numformer.ops.moe import mlp as mlp
from numformer.ops.moe import route as route
from numformer.ops.moe import route_expert_choice as route_expert_choice
from numformer.ops.moe import router_z_loss as router_z_loss
