"""Which experts stay on the device: pure policies over small tables, the same code in the compiled step and in replay of a trace.

A policy keeps tables of one row a layer, learns of the experts that every step asked for (`touch`), and says how much each is worth keeping
(`keep`, or `keep_all` where all layers share one pool). `choose` and `choose_shared` make of that the set of experts that is held after a step.
Nothing here knows of slots, stores or models.
"""

from jaxmoe.residency.policies import POLICIES, find_policy
from jaxmoe.residency.policy import UNTOLD, Knowledge, Policy, Shape
from jaxmoe.residency.resolve import Choice, choose, choose_shared

__all__ = ["POLICIES", "UNTOLD", "Choice", "Knowledge", "Policy", "Shape", "choose", "choose_shared", "find_policy"]
