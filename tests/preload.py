"""What every rank imports, once for all: the fork server loads this, and ranks are forked from it."""

import gc

import deepspeed  # noqa: F401
import torch
import torch._dynamo
import transformers  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

import gearshift.engine.checkpoints.writing
import gearshift.rlhf.ppo  # noqa: F401
from gearshift.engine.distributed import import_muon

import_muon()
torch.set_num_threads(1)
# DeepSpeed collects garbage at every start of an engine: over all that is imported, three quarters of a second.
gc.collect()
gc.freeze()
