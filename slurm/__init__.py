"""Sweeps and their state, for login nodes: the standard library alone, since importing polar takes seconds there."""
