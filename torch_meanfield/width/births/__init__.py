"""How units are born: initialisers, reinjection, splitting, and placement where the loss is steep."""
