"""The real training step compiles for a TPU v5e and fits in its memory; where the extra tpu-check is installed."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
pytest.importorskip('jax', reason="needs pip install -e '.[tpu-check]'")
pytest.importorskip('libtpu', reason="needs pip install -e '.[tpu-check]'")


def test_the_step_of_four_replicas_fits_a_v5e_and_needs_no_host():
    """GhostNet 1.0, bfloat16, 256 images of 224 pixels a replica."""
    script = subprocess.run([sys.executable, 'benchmarks/tpu_compile.py'], cwd=REPOSITORY, capture_output=True,
                            text=True)
    assert script.returncode == 0, script.stderr
    report = json.loads(script.stdout.splitlines()[-1])
    assert (report['rows'], report['num_replicas'], report['precision']) == (256, 4, 'mixed_bfloat16')
    assert report['memory_gb'] < 16
    assert report['all_reduces'] == 1 and report['host_transfers'] == 0
    # 3 x 2 x 141 M multiply-adds an image forwards and backwards, and what is not a convolution: the whole network.
    assert 0.8 < report['gflop'] / report['rows'] < 1.5
