"""Sharded checkpoints of a whole run: written aside, checked by digest, loaded without running what they hold.

    checkpoints/latest                      name of the newest step; moved last
    checkpoints/step-00000012/manifest.json every file's size and SHA-256, and the state of the run that is no tensor
    checkpoints/step-00000012/policy/...    DeepSpeed's own files of one model, two for each rank
    checkpoints/step-00000012/ranks/...     random states of each rank

`files` does what is done to files, `manifest` describes a step, `reading` finds the one to go on from, `retention`
removes old ones: these need no torch. `shards` is DeepSpeed's way to its files, `recutting` the same for other ranks
than wrote them, `writing` puts a step together, `exporting` makes a model's folder of it.
"""
