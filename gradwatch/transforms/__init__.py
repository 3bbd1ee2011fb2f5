"""Changes to gradients on the device, before the update: clipping and exact skipping."""

from gradwatch.transforms.adagc import AdaGC
from gradwatch.transforms.agc import AdaptiveGradientClip
from gradwatch.transforms.autoclip import AutoClip
from gradwatch.transforms.clipping import ClipByGlobalNorm, ClipByTensorNorm, ClipByValue
from gradwatch.transforms.dry_run import DryRun
from gradwatch.transforms.gradients import Gradients, Transform
from gradwatch.transforms.skipping import SkipNonfinite, SkipSpike
from gradwatch.transforms.zclip import ZClip

__all__ = [
    "AdaGC",
    "AdaptiveGradientClip",
    "AutoClip",
    "ClipByGlobalNorm",
    "ClipByTensorNorm",
    "ClipByValue",
    "DryRun",
    "Gradients",
    "SkipNonfinite",
    "SkipSpike",
    "Transform",
    "ZClip",
]
