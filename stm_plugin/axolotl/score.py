"""`axolotl stm-score config.yml`: score the training set of a config, and train nothing.

On several processes: `accelerate launch -m stm_plugin.axolotl.score config.yml`.
"""

from typing import Any

import click

from ..inspection.sweep import sweep_of
from .names import ADD_THE_LINE, is_active


@click.command("stm-score", context_settings={"show_default": True})
@click.argument("config", type=click.Path(exists=True, path_type=str))
def stm_score(config: str) -> None:
    """Score CONFIG's training set with its model, as training would, and show what thresholds mask.

    The scores stay where `axolotl train CONFIG` finds them: it makes no second pass.
    """
    trainer = make_trainer(config)
    run = trainer.stm_score()
    if not trainer.is_world_process_zero():
        return
    for line in sweep_of(trainer.stm_scored_data(run)).lines():
        click.echo(line)
    click.echo(f"Scores: {run.receipt['scores_entry']}")


def make_trainer(config: str) -> Any:
    """The trainer that `axolotl train` would train with.

    Args:
        config: Path of an Axolotl config that lists the plugin.

    Raises:
        ValueError: If it does not.
    """
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.integrations.base import PluginManager
    from axolotl.train import setup_model_and_trainer

    cfg = load_cfg(config)
    if not is_active(cfg):
        raise ValueError(f"{config} does not list the plugin. {ADD_THE_LINE}.")
    dataset_meta = PluginManager.get_instance().load_datasets(cfg) or load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    return setup_model_and_trainer(cfg, dataset_meta)[0]


if __name__ == "__main__":
    stm_score()
