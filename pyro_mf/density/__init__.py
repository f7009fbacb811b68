"""A Pyro model as a pure function of one flat unconstrained vector."""
