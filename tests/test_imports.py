import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["dpal_edge.cli", "dpal_edge.runtime", "dpal_edge.runtime.doctor"])
def test_import_leaves_heavy_packages_unloaded(module):
    code = f"import sys, {module}; print(*sys.modules.keys() & {{'torch', 'timm', 'onnxruntime', 'openvino', 'cv2'}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
