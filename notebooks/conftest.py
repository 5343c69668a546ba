"""The notebook is tested at smoke scale, in a runs folder that is thrown away."""

import os
import tempfile

os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ["WM_SCALE"] = "smoke"
os.environ["WM_GENERATIONS"] = "2"
os.environ["WM_RUNS"] = tempfile.mkdtemp(prefix="wm-notebook-")
