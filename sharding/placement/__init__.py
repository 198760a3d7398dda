"""Which device holds which experts, decided from recorded routing: even loads, and tokens that stay where they are from layer to layer."""

from sharding.placement.assignment import Placement, contiguous, placement_of, shuffled
from sharding.placement.judge import baselines, judge, judge_devices
from sharding.placement.problem import Problem, even_links, node_links, problem_of
from sharding.placement.replicas import Replicas, read_placement, replicate
from sharding.placement.solve import METHODS, Plan, Report, Stage, plan, solve, solve_replicas

__all__ = [
    "METHODS", "Placement", "Plan", "Problem", "Replicas", "Report", "Stage", "baselines", "contiguous", "even_links", "judge", "judge_devices",
    "node_links", "placement_of", "plan", "problem_of", "read_placement", "replicate", "shuffled", "solve", "solve_replicas",
]  # fmt: skip
