"""The contenders of ``benchmarks.fit``, one module each, and the models in their own languages."""
