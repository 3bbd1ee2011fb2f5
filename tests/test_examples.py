"""What the README promises runs, and says what it should say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "demo.py", "--log-dir", str(log_dir)]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr, log_dir


def test_the_demo_finds_what_is_wrong_and_nothing_else(demo):
    text, _ = demo
    found = dict(re.findall(r"^ *(\w+): (.+)$", text.split("what gradwatch found")[1], flags=re.MULTILINE))

    assert re.fullmatch(r"vanishing at step \d+", found["vanishing"])
    assert re.fullmatch(r"exploding at step \d+", found["exploding"])
    assert found["healthy"] == "nothing to say"


def test_the_demo_names_the_command_that_opens_its_log(demo):
    text, log_dir = demo

    assert f"tensorboard --logdir {log_dir}" in text
    for name in ("vanishing", "exploding", "healthy"):
        assert list((log_dir / name).glob("events*"))
        assert (log_dir / name / "gradwatch.jsonl").stat().st_size > 0


@pytest.mark.parametrize("name", ["vanishing", "exploding", "healthy"])
def test_each_example_runs_by_itself(name, tmp_path):
    command = [sys.executable, f"{name}.py", "--log-dir", str(tmp_path)]

    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=True)

    assert f"tensorboard --logdir {tmp_path}" in done.stdout


def test_the_loop_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    setup = (
        "import torch\nfrom torch import nn\nmodel = nn.Linear(4, 2)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\nloss_fn = nn.functional.cross_entropy\n"
        "loader = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))] * 3\n"
    )

    blocks = [block for block in blocks if "pl.Trainer" not in block]
    assert blocks
    for block in blocks:
        exec(compile(setup + block, "README.md", "exec"), {})


def test_the_lightning_example_trains_and_logs(tmp_path):
    command = [sys.executable, "lightning_digits.py", "--log-dir", str(tmp_path)]

    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=True)

    assert "gradwatch found: nothing to say" in done.stdout
    assert len(list(tmp_path.glob("events*"))) == 1


def test_the_mitigation_example_diverges_by_itself_and_trains_with_us():
    done = subprocess.run([sys.executable, "mitigation.py"], cwd=EXAMPLES, capture_output=True, text=True, check=True)

    last = {
        name: float(re.findall(rf"{name}: epoch 24/24 +loss +(\S+)", done.stdout)[0])
        for name in ("itself", "gradwatch")
    }
    assert not last["itself"] < 1.0
    assert last["gradwatch"] < 0.5
    assert "learning_rate at step" in done.stderr
