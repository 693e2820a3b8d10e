"""Who dies and who is born, and the event that carries it out."""
