"""When not to trust a fit: checks with their numbers, and the verdict drawn from them."""
