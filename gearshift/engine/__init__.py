"""A model across ranks: ZeRO-3 training, tensor-parallel rollouts, the shift between them.

Names are imported on first use: the settings of this floor must not cost an import of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gearshift.engine.batches import Episodes, Prompts, Rollouts, Rows, TokenBatch
    from gearshift.engine.causal import CausalModel
    from gearshift.engine.distributed import World, init_distributed
    from gearshift.engine.hybrid import HybridEngine
    from gearshift.engine.reward_model import RewardModel
    from gearshift.engine.sampling import Sampling
    from gearshift.engine.stopping import StopStrings
    from gearshift.engine.zero import Training

_HOME = {
    "Episodes": "batches",
    "Prompts": "batches",
    "Rollouts": "batches",
    "Rows": "batches",
    "TokenBatch": "batches",
    "World": "distributed",
    "init_distributed": "distributed",
    "HybridEngine": "hybrid",
    "Sampling": "sampling",
    "StopStrings": "stopping",
    "CausalModel": "causal",
    "RewardModel": "reward_model",
    "Training": "zero",
}

__all__ = [
    "CausalModel",
    "Episodes",
    "HybridEngine",
    "Prompts",
    "RewardModel",
    "Rollouts",
    "Rows",
    "Sampling",
    "StopStrings",
    "TokenBatch",
    "Training",
    "World",
    "init_distributed",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"gearshift.engine.{_HOME[name]}"), name)
