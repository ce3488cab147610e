"""Lightning callbacks, addressed in YAML as ``callbacks.<name>``."""

from callbacks.adapter_export import AdapterExport
from callbacks.fisher import FisherCollector
from callbacks.fit_checkpoint import FitCheckpoint
from callbacks.sample_logger import SampleLogger
from callbacks.throughput import Throughput

__all__ = ["AdapterExport", "FisherCollector", "FitCheckpoint", "SampleLogger", "Throughput"]
