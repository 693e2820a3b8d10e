"""Who dies and whose place is taken by whom, and the event that carries it out.

In: gradients, a scheme (:class:`.TurnoverRule`) and a birth rule. Out: events.
How the optimizer steps, and what a checkpoint looks like, is not known here.
"""
