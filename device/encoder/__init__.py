"""The encoder and the heads on ONNX Runtime.

Only this room imports onnxruntime, so its telemetry is switched off here: without this variable, releases from 1.29 on
keep a device id and an upload queue in the home directory and send them.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
