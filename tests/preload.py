"""What every rank imports, once for all: the fork server loads this, and ranks are forked from it."""

import deepspeed  # noqa: F401
import torch
import torch._dynamo
import transformers  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

import gearshift.engine.checkpoints.writing
import gearshift.rlhf.ppo  # noqa: F401
from gearshift.engine.distributed import import_muon
from gearshift.engine.memory import spare_what_is_imported

import_muon()
torch.set_num_threads(1)
spare_what_is_imported()
