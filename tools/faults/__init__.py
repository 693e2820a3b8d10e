"""Trainings to which something happens, each beside one to which nothing did: for tests and soak."""
