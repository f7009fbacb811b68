"""How an objective is optimised."""
