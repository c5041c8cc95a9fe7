"""Gearshift: InstructGPT's reinforcement learning from human feedback on DeepSpeed, in one set of processes."""

__version__ = "0.1.0"
