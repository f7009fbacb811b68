"""``fit()``: chooses a solver, runs it, and returns the result."""
