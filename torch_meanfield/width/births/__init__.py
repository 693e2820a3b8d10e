"""How units are born: initialisers, reinjection, clones and splits, and placement where the loss is steep.

In: the vacancies of a population. Out: what its newborn units own.
Who died, and why, is not known here.
"""
