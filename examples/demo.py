"""Three networks on handwritten digits: one whose gradient vanishes, one whose gradient explodes, a healthy one."""

from __future__ import annotations

import argparse
from pathlib import Path

import exploding
import healthy
import torch
import vanishing
from digits import train

EXAMPLES = {"vanishing": vanishing.build, "exploding": exploding.build, "healthy": healthy.build}


def main() -> None:
    """Train the three and say where to look at them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log-dir", help="folder for the TensorBoard logs", default="runs/demo")
    parser.add_argument("--tensorboard", help="command that the last line names", default="tensorboard")
    arguments = parser.parse_args()
    found = {}
    for name, build in EXAMPLES.items():
        print(f"\n=== {name} ===")
        torch.manual_seed(0)
        watch = train(name, *build(), log_dir=str(Path(arguments.log_dir) / name))
        found[name] = [alert for alert in watch.alerts if alert.severity != "info"]
    print("\n=== what gradwatch found ===")
    for name, alerts in found.items():
        said = ", ".join(f"{alert.kind} at step {alert.opened}" for alert in alerts)
        print(f"{name:>10}: {said or 'nothing to say'}")
    print(f"\nLook at it:  {arguments.tensorboard} --logdir {arguments.log_dir}")


if __name__ == "__main__":
    main()
