"""What every rank imports, once for all: the fork server loads this, and ranks are forked from it."""

import deepspeed  # noqa: F401
import torch
import transformers  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

import gearshift.engine.checkpoints.writing
import gearshift.rlhf.ppo  # noqa: F401

torch.set_num_threads(1)
