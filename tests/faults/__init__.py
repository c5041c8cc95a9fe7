"""Real processes, really killed; minutes of it. `make test-faults` runs these, plain `pytest` does not."""
