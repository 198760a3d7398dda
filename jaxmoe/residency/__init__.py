"""Which experts stay on the device: pure policies over small tables, the same code in the compiled step and in replay of a trace.

A policy keeps tables of one row a layer, learns of the experts that every step asked for (`touch`), and says how much each is worth keeping
(`keep`). `choose` makes of that the set of experts that a layer holds after a step. Nothing here knows of slots, stores or models.
"""

from jaxmoe.residency.policies import POLICIES, Policy, find_policy
from jaxmoe.residency.resolve import Choice, choose

__all__ = ["POLICIES", "Choice", "Policy", "choose", "find_policy"]
