"""What a run needs before it runs: memory of a rank in each phase, bytes of a shift, what fits."""
