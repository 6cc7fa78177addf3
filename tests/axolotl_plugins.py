"""Plugins that tests list in a config beside `stm`, by `axolotl_plugins.NAME`, for runs of the command `axolotl`."""

import os
import signal

import torch
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback


class Seeded(BasePlugin):
    """The same fresh adapter in every process, where Axolotl draws another each time."""

    def pre_lora_load(self, cfg, model):
        torch.manual_seed(0)


class Pauses(BasePlugin):
    """Says so and waits for a signal in the middle of the step after number `PAUSE_AFTER`."""

    def add_callbacks_post_trainer(self, cfg, trainer):
        return [_Pause()]


class _Pause(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ["PAUSE_AFTER"]):
            print("TRAINED", state.global_step, flush=True)
            signal.pause()


class Switches(BasePlugin):
    """What STM sets so that the loss is that of all tokens of a step."""

    def post_trainer_create(self, cfg, trainer):
        trainer.model_accepts_loss_kwargs = True
        trainer.args.average_tokens_across_devices = True


class NoPeers(BasePlugin):
    """Two processes on a machine without GPUs: Axolotl 0.21 asks torch whether they are peers, and torch raises."""

    def __init__(self):
        super().__init__()
        ask_for_no_peers()


def ask_for_no_peers():
    if not torch.cuda.is_available():
        torch.cuda.can_device_access_peer = lambda *ranks: True
