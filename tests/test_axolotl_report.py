"""`stm_report: true` in a real `axolotl train`, and what `stm sweep` finds in the run's folder afterwards."""

import json

import pytest

pytest.importorskip("axolotl", reason="axolotl is not installed")

from axolotl_helpers import LORA, axolotl, base_model, make_config, one_process, receipt, write_config
from test_report import check_against_receipt

from stm_plugin.cli import main
from stm_plugin.inspection.scored import read_scored

__all__ = ["base_model", "make_config", "one_process"]

STM = {"plugins": "stm", "stm_threshold": 400.0, "stm_report": True, "max_steps": 2}


@pytest.mark.parametrize(
    "keys", [LORA, pytest.param({"sample_packing": True}, marks=pytest.mark.slow)], ids=["lora", "packed"]
)
def test_a_run_leaves_its_report(keys, make_config, tmp_path, capsys):
    path = write_config(make_config(**STM, **keys), tmp_path)
    done = axolotl("train", path, "--launcher", "python", cwd=tmp_path)
    assert "Report:" in done.stdout
    page = tmp_path / "out" / "stm_report.html"
    check_against_receipt(page.read_text(encoding="utf-8"), tmp_path / "out")
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()
    capsys.readouterr()
    assert main(["sweep", str(tmp_path / "out"), "--json", "--thresholds", "400"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["thresholds"]
    assert row["masked_tokens"] == receipt(tmp_path / "out")["masked_tokens"]


def test_scoring_ahead_leaves_a_report_too(make_config, tmp_path):
    path = write_config(make_config(**STM), tmp_path)
    done = axolotl("stm-score", path, cwd=tmp_path)
    assert "quantiles of their perplexity" in done.stdout
    assert (tmp_path / "out" / "stm_report.html").exists()
    (entry,) = (tmp_path / "stm-home" / "scores").glob("[!.]*")
    assert read_scored(entry).kept.name == "chats"


def test_live_masks_have_no_report(make_config, tmp_path):
    path = write_config(make_config(**STM | {"stm_threshold": None}, stm_reference="current"), tmp_path)
    done = axolotl("train", path, "--launcher", "python", cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "stm_report has no effect while stm_reference is 'current'" in " ".join(done.stdout.split())
