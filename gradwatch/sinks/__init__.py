"""Where records go: TensorBoard, JSON lines, the console, memory."""

from gradwatch.sinks.console import ConsoleSink
from gradwatch.sinks.jsonl import JSONLSink
from gradwatch.sinks.memory import MemorySink
from gradwatch.sinks.tensorboard import TensorBoardSink

__all__ = ["ConsoleSink", "JSONLSink", "MemorySink", "TensorBoardSink"]
